"""Records, random streams, low-rank arithmetic, errors and text, for use in every room."""
