"""Looking at runs from outside: ranks of changes (diagnostics, memory plan and report live here too).  No Ray."""
