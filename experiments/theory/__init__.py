"""The paper's bounds and open questions on a convex problem with a known optimum."""
