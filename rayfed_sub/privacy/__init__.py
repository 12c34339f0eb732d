"""Central differential privacy: clipping and noise, and the accountant."""
