"""Sweeps: an ablation declared in a few lines, trained once a distinct stage, resumed, compared."""
