"""The layer-outer engine that scores many hybrids of a pair in one pass over their layers."""
