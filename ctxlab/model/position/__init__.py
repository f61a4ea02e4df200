"""Positional schemes: one file each."""
