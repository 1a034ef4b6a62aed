"""BLIP-2 and its Q-Former in JAX: train the connector between a frozen vision tower and a frozen language model."""

__version__ = '0.1.0'
