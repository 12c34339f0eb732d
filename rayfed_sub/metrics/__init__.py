"""Scores of texts, tokens and classes, as plain functions and as `evaluate.Metric` classes."""
