"""Deformable attention and convolution, with interchangeable implementations (see backends.py)."""
