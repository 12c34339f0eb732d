"""Trained models for transformers and peft."""
