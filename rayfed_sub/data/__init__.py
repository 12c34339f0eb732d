"""Tasks, their rows dealt out to clients, and batches of rows."""
