"""The algebra of convolution kernels."""

__all__: list[str] = []
