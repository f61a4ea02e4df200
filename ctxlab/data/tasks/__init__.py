"""Synthetic tasks: seeded generators whose items are training data as well as questions of an evaluation. One file a task."""
