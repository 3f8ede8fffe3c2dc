"""GeoTorch's names, argument orders and conventions: `import orthonet.compat.geotorch as geotorch`.

The verbs replace the weight by a random one, spaces are modules that take a size, and `in_manifold`
and `sample` have GeoTorch's arguments. Coordinates are packed vectors, not square tensors.
"""

from orthonet.compat.geotorch import _spaces, _verbs, exceptions, parametrize, so
from orthonet.compat.geotorch._spaces import *
from orthonet.compat.geotorch._verbs import *

__all__ = ["exceptions", "parametrize", "so"]
__all__ += _spaces.__all__
__all__ += _verbs.__all__
