"""Firesteel: open, self-hosted post-training. Write the loop in plain Python; the model work runs in a trainer."""

from firesteel.connection import connect

__version__ = "0.1.0"
__all__ = ["__version__", "connect"]
