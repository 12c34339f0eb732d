"""A run before it starts: the job, its traffic, memory and disk."""
