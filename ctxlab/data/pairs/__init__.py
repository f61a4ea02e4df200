"""Pairs of sentences: read, split, turned into tokens, and laid out in batches of like lengths."""
