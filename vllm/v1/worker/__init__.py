"""The device side of a step: input tensors, the forward pass, sampling."""
