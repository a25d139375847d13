"""The network: models, layers, kernels, and the loader that fills them."""
