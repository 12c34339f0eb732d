"""A federation of real machines: the server's half of a method, a client's half, and what crosses between them."""
