"""An independent checker of the Lipschitz certificates that orthonet saves.

It shares no code with the library: it reads the JSON file and the weights, builds every linear map
from its definition, and proves each bound again in exact, rational or ball arithmetic.
"""

from orthonet_checker.schema import Rejected
from orthonet_checker.verify import Verdict, check

__version__ = "0.1.0"
__all__ = ["Rejected", "Verdict", "check"]
