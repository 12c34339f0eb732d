"""Ranks, drift and overlap of clients' changes; alerts."""
