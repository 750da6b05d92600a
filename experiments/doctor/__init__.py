"""Looks at everything a run will need before the run does."""
