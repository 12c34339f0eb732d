"""Sweeps: many runs over points of a space, side by side under Ray Tune, sharing one backbone and one data set."""
