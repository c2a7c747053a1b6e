"""Which layers to restore: every interval and soup of a pair, scored by a proxy task in one pass (paper, section 3)."""
