"""The records of operations, one file for each family; see `registry`."""

__all__: list[str] = []
