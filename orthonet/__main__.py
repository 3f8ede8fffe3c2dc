"""`python -m orthonet` is the command `orthonet`."""

from orthonet.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
