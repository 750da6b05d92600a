"""Matching, perception criteria and masked cross-entropy."""
