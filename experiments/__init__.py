"""Experiments, the pipeline that runs them, tracking and the command line."""
