"""A model hub on loopback, and the real client against it."""
