"""A Flower app written by rayfed_sub."""
