"""Memory over numbers of clients."""
