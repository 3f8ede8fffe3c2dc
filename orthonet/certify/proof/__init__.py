"""The proof of a certificate as a file that an independent checker can verify."""

from orthonet.certify.proof.file import load, load_local, named_constants, save, save_local
from orthonet.certify.proof.local import Claims

__all__ = ["Claims", "load", "load_local", "named_constants", "save", "save_local"]
