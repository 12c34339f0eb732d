"""Reports about runs: from their folders to one HTML page."""
