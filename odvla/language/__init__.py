"""The causal language model, prompts, splicing and waypoints as text."""
