"""The version of slrmerge."""

__version__ = "0.1.0"
