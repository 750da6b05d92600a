"""Files that other projects made of nuScenes: read, written from raw data, and compared."""
