"""Scores many hybrids of a pair in one pass over the layers, so that each layer's weights are read once per variant."""
