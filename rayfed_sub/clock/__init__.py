"""Simulated time: devices of the clients and a virtual clock, as pure functions over frozen records."""
