"""Models of the user's own, named on the command line as package.module:function."""

__all__: list[str] = []
