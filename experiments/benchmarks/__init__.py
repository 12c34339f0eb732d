"""Speed and size of the engine, against others on the same work."""
