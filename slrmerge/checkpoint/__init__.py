"""Checkpoints: tensors by name, wherever they are. One protocol, implemented for folders and Hub repositories."""
