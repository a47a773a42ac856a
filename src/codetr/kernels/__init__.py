"""Mount point of the top-level `kernels/` folder (see setup.py)."""
