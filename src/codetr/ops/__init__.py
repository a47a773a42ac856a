"""Tensor operations that know nothing of detectors."""
