"""Experiments: the paper's claims put to the test, theory, scale and speed."""
