"""GeoTorch's exceptions: what this library raises in their place."""

from orthonet.errors import NotOnManifoldError

__all__ = ["InManifoldError", "InverseError", "NonSquareError", "RankError", "VectorError"]

InManifoldError = NotOnManifoldError
InverseError = NonSquareError = RankError = VectorError = ValueError
