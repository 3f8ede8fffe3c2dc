"""Exceptions and warnings that a user may want to catch by name."""

__all__ = [
    "InPlaceEditWarning",
    "NotOnManifoldError",
    "OrthonetError",
    "PresetWarning",
    "ProjectionWarning",
    "UncertifiableError",
]


class OrthonetError(Exception):
    """Base class of the library's own errors."""


class NotOnManifoldError(OrthonetError, ValueError):
    """A tensor was assigned to a constrained weight but does not satisfy the constraint."""


class UncertifiableError(OrthonetError, ValueError):
    """No sound bound is known for a part of the model; the message names the part."""


class ProjectionWarning(UserWarning):
    """A plain weight was loaded into a constrained layer and projected onto its manifold."""


class PresetWarning(UserWarning):
    """A checkpoint does not say with which preset it was made; it was saved before they did."""


class InPlaceEditWarning(UserWarning):
    """A constrained tensor was edited in place, which has no effect; it has to be assigned."""
