"""vitad: visual anomaly detection with Vision Transformers (the library behind the book)."""

__version__ = "0.1.0"
