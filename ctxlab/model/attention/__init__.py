"""Attention: mechanisms (who may see whom), one file each, and the functions that compute it in memory linear in the context."""
