"""Doors for users of other libraries: their names and argument orders, over this library.

Each module stands for one peer: a script runs after one changed import, such as
`import orthonet.compat.geotorch as geotorch`.
"""

__all__: list[str] = []
