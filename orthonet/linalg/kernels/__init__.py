"""The algebra of convolution kernels."""
