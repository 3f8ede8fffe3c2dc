"""Names that are guessed on a certificate, and where what is meant is found."""

__all__ = ["elsewhere"]

_NUMBER = "The number is certificate.lipschitz, and what it means certificate.constant"
_PAGE = "Call orthonet.certify.report_html(certificate), which returns the page"
_GUESSED = {
    **dict.fromkeys(("bound", "value", "L", "K", "lipschitz_constant", "upper"), _NUMBER),
    **dict.fromkeys(("to_html", "html", "report"), _PAGE),
    "estimate": "What was reached from below is certificate.lower, a Bound of kind 'estimate'",
    "layers": "What each operation contributes is in certificate.rows, and as text in .table()",
    "certified_radius": "Call certificate.radius(model, x)",
    "accuracy": "Call orthonet.evaluate(model, loader, radii), or certificate.certified_accuracy",
    "evaluate": "Call orthonet.evaluate(model, loader, radii, certificate=certificate)",
    "verify": "Call certificate.matches(model), or save it and run orthonet-check on the file",
}


def elsewhere(name: str) -> str:
    """The error of an attribute that a certificate does not have."""
    if name in _GUESSED:
        return f"LipschitzCertificate: it has no {name}. {_GUESSED[name]}."
    return f"'LipschitzCertificate' object has no attribute {name!r}"
