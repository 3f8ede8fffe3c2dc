"""The proof of a certificate as a file that an independent checker can verify."""

from orthonet.certify.proof.file import load, save

__all__ = ["load", "save"]
