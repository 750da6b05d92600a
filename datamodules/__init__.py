"""LightningDataModules: nuScenes frames and the language datasets on them."""
