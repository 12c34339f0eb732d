"""From a task to token rows dealt out to clients, and from rows to batches."""
