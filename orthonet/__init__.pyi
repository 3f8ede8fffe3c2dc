"""The public names of orthonet and the room that each comes from: the only list of them.

Type checkers read this file; `__init__.py` reads it to load a name on first use.
"""

from torch.nn.utils.parametrize import cached as cached

from orthonet import compat as compat
from orthonet import constraints as constraints
from orthonet import convert as convert
from orthonet import downstream as downstream
from orthonet import errors as errors
from orthonet import functional as functional
from orthonet import init as init
from orthonet import layers as layers
from orthonet import linalg as linalg
from orthonet import losses as losses
from orthonet import manifolds as manifolds
from orthonet import models as models
from orthonet import optim as optim
from orthonet import recipes as recipes
from orthonet import reparametrizers as reparametrizers
from orthonet import testing as testing
from orthonet.certify import LipschitzCertificate as LipschitzCertificate
from orthonet.certify import certified_accuracy as certified_accuracy
from orthonet.certify import evaluate as evaluate
from orthonet.certify import summary as summary
from orthonet.certify._package import certify as certify
from orthonet.constraints import almost_orthogonal as almost_orthogonal
from orthonet.constraints import correlation as correlation
from orthonet.constraints import fixed_rank as fixed_rank
from orthonet.constraints import grassmannian as grassmannian
from orthonet.constraints import invertible as invertible
from orthonet.constraints import low_rank as low_rank
from orthonet.constraints import oblique as oblique
from orthonet.constraints import orthogonal as orthogonal
from orthonet.constraints import positive_definite as positive_definite
from orthonet.constraints import positive_semidefinite as positive_semidefinite
from orthonet.constraints import (
    positive_semidefinite_fixed_rank as positive_semidefinite_fixed_rank,
)
from orthonet.constraints import positive_semidefinite_low_rank as positive_semidefinite_low_rank
from orthonet.constraints import rebase_every as rebase_every
from orthonet.constraints import remove as remove
from orthonet.constraints import skew as skew
from orthonet.constraints import sln as sln
from orthonet.constraints import sphere as sphere
from orthonet.constraints import symmetric as symmetric
from orthonet.constraints import unitary as unitary
from orthonet.constraints import update_base as update_base
from orthonet.convert import orthogonalize as orthogonalize
from orthonet.convert import to_plain as to_plain
from orthonet.errors import NotOnManifoldError as NotOnManifoldError
from orthonet.errors import OrthonetError as OrthonetError
from orthonet.errors import ProjectionWarning as ProjectionWarning
from orthonet.errors import UncertifiableError as UncertifiableError
from orthonet.layers import Abs as Abs
from orthonet.layers import GroupSort as GroupSort
from orthonet.layers import MaxMin as MaxMin
from orthonet.layers import OrthoConv1d as OrthoConv1d
from orthonet.layers import OrthoConv2d as OrthoConv2d
from orthonet.layers import OrthoConv3d as OrthoConv3d
from orthonet.layers import OrthoGRU as OrthoGRU
from orthonet.layers import OrthoLinear as OrthoLinear
from orthonet.layers import OrthoLSTM as OrthoLSTM
from orthonet.layers import OrthoRNN as OrthoRNN
from orthonet.layers import SpaceToDepth2d as SpaceToDepth2d
from orthonet.layers import UnitNormLinear as UnitNormLinear
from orthonet.reparametrizers import AUTO_ORTHO_PARAMS as AUTO_ORTHO_PARAMS
from orthonet.reparametrizers import (
    BJORCK_PASS_THROUGH_ORTHO_PARAMS as BJORCK_PASS_THROUGH_ORTHO_PARAMS,
)
from orthonet.reparametrizers import CHOLESKY_ORTHO_PARAMS as CHOLESKY_ORTHO_PARAMS
from orthonet.reparametrizers import CHOLESKY_STABLE_ORTHO_PARAMS as CHOLESKY_STABLE_ORTHO_PARAMS
from orthonet.reparametrizers import DEFAULT_ORTHO_PARAMS as DEFAULT_ORTHO_PARAMS
from orthonet.reparametrizers import DEFAULT_TEST_ORTHO_PARAMS as DEFAULT_TEST_ORTHO_PARAMS
from orthonet.reparametrizers import EXP_ORTHO_PARAMS as EXP_ORTHO_PARAMS
from orthonet.reparametrizers import POLAR_ORTHO_PARAMS as POLAR_ORTHO_PARAMS
from orthonet.reparametrizers import POLAR_WARM_ORTHO_PARAMS as POLAR_WARM_ORTHO_PARAMS
from orthonet.reparametrizers import QR_ORTHO_PARAMS as QR_ORTHO_PARAMS
from orthonet.reparametrizers import ClassParam as ClassParam
from orthonet.reparametrizers import OrthoParams as OrthoParams
from orthonet.reparametrizers import caching as caching
from orthonet.reparametrizers import defer_pullback as defer_pullback
from orthonet.reparametrizers import fuse as fuse
from orthonet.reparametrizers import invalidate as invalidate
from orthonet.reparametrizers import parameter_groups as parameter_groups
from orthonet.reparametrizers import presets as presets
from orthonet.reparametrizers import share_among_ranks as share_among_ranks
from orthonet.reparametrizers import unfuse as unfuse

__version__: str
