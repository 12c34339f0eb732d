"""Records, random streams, low-rank arithmetic, errors and text: what every room may use."""
