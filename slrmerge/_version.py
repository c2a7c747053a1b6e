"""The version of slrmerge."""

__version__ = "0.2.0"
