"""The proof of a certificate as a file that an independent checker can verify."""

from orthonet.certify.proof.file import load, named_constants, save

__all__ = ["load", "named_constants", "save"]
