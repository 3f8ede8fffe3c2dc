"""The records of operations, one file for each family; see `registry`."""
