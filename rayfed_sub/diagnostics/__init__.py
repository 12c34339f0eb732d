"""Ranks, drift and overlap of what clients learn; alerts."""
