"""Tests of `slrmerge.sweep`, module by module."""
