"""The parts of the polar factor: its steps, their polynomials, its gradient."""

__all__: list[str] = []
