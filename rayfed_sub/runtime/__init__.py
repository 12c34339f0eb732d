"""The part of a run that needs Ray: session, coordinator, workers, scheduling."""
