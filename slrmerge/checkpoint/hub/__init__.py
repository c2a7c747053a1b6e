"""Repositories on the Hub as checkpoints."""
