"""Ablation studies: arms, their runs, what can be said about them."""
