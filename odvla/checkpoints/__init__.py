"""Checkpoints of other projects: read without running anything, converted, and back."""
