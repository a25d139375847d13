"""Kernels that more than one kind of layer uses, a plain-PyTorch form beside each."""
