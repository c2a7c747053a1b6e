"""A merge as a value: worked out from headers and configs before one byte moves."""
