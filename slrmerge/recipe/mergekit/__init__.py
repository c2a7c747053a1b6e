"""mergekit's configs as merges of a pair, and back.

mergekit: https://github.com/arcee-ai/mergekit, its docs of the config and of the merge methods. Its `layer_range`s are
half-open; only this package knows that. A merge of more than two models, or of layers in another order, is not a merge
of a pair and is refused.
"""
