"""What a network is trained for and scored by: losses and overlap metrics."""
