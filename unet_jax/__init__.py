"""U-Net research in JAX: pure modules, one sharded step, exact resume."""

__version__ = "0.1.0"
