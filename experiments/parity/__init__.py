"""Proof that the full-fidelity vision tower computes what the reference computed."""
