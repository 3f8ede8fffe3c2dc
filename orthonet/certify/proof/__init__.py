"""The proof of a certificate as a file that an independent checker can verify."""

from orthonet.certify.proof.file import FORMAT, load, save

__all__ = ["FORMAT", "load", "save"]
