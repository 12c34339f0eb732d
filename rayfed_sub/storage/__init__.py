"""Run folders, checkpoints and client states on disk and in object stores; no Ray."""
