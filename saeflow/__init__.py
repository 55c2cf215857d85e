"""saeflow: activations stored once, many sparse autoencoders trained, every feature activation in SQL."""

__version__ = "0.1.0"
