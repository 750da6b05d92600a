"""A deterministic town, simulated, drawn and written in the format of nuScenes."""
