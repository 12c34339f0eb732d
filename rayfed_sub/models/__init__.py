"""Models: their shape without weights, their weights by name, and the tokens they read."""
