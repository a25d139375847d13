"""Kernels of the mixture of experts, a PyTorch form beside each."""
