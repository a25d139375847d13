"""Operators of the layers with a convolution window."""
