"""`orthonet-check certificate.json [model.safetensors ...]`."""

from __future__ import annotations

import argparse
import sys

from orthonet_checker import Rejected, __version__, check


def main(arguments: list[str] | None = None) -> int:
    """Check a certificate; 0 if all is verified, 1 if it is rejected, 2 with assumptions."""
    parser = argparse.ArgumentParser(prog="orthonet-check", description=main.__doc__)
    parser.add_argument("certificate", help="the JSON file that certificate.save() wrote")
    parser.add_argument(
        "weights",
        nargs="*",
        help="safetensors files of the model, "
        "whose tensors are compared with the constants by name",
    )
    parser.add_argument("--quiet", action="store_true", help="no line for each node")
    parser.add_argument("--version", action="version", version=__version__)
    options = parser.parse_args(arguments)
    say = (lambda line: None) if options.quiet else print
    try:
        verdict = check(options.certificate, options.weights, say)
    except (Rejected, OSError) as error:
        print(f"rejected: {error}", file=sys.stderr)
        return 1
    for note in verdict.notes:
        print(f"note: {note}")
    print(verdict)
    return 2 if verdict.assumed else 0


if __name__ == "__main__":
    sys.exit(main())
