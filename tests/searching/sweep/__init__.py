"""Tests of `slrmerge.searching.sweep`, module by module."""
