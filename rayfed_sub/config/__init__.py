"""Keys, meanings and defaults; loading, editing and checking of configurations."""
