"""`orthonet.orthogonal` in place of `torch.nn.utils.parametrizations.orthogonal`."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import orthonet
from orthonet.errors import NotOnManifoldError
from orthonet.linalg.packing import pack_skew
from orthonet.manifolds import SO, Stiefel, Unitary

PAGE = Path(__file__).parents[2] / "docs" / "coming-from-pytorch.md"
MAPS = ("matrix_exp", "cayley")
KINDS = [
    (shape, dtype)
    for shape in ((4, 4), (5, 3), (3, 5))
    for dtype in (torch.float32, torch.complex64)
]


def module(shape, dtype) -> nn.Module:
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.randn(shape, dtype=dtype))
    return holder


def space(dtype):
    return Unitary() if dtype.is_complex else Stiefel()


@pytest.mark.parametrize("use", [True, False], ids=["trivialization", "plain"])
@pytest.mark.parametrize("name", MAPS)
def test_torchs_own_test(name, use):
    """Shapes, gradients, assignment, optimizer steps, with torch's positional arguments."""
    for shape, dtype in KINDS:
        if not use and (shape[0] != shape[1] or dtype.is_complex):
            continue
        torch.manual_seed(0)
        m = module(shape, dtype)
        before = m.weight.detach().clone()
        returned = orthonet.orthogonal(m, "weight", name, use_trivialization=use)
        assert returned is m
        assert parametrize.is_parametrized(m, "weight")
        assert isinstance(m.parametrizations.weight.original, nn.Parameter)
        assert hasattr(m.parametrizations.weight[0], "base") == use
        assert m.weight.shape == shape
        assert m.weight.dtype == dtype
        assert space(dtype).contains(m.weight)
        nearest = (space(dtype) if use else SO()).project(before)
        assert torch.allclose(m.weight, nearest, atol=1e-5)
        value = (space(dtype) if use else SO()).sample(shape, dtype=dtype)
        if use or name == "matrix_exp":
            m.weight = value  # torch refuses without trivialization
            assert torch.allclose(m.weight, value, atol=1e-5)
        with pytest.raises(NotOnManifoldError):  # torch takes the factor Q instead
            m.weight = torch.randn_like(value)
        orthonet.constraints.assign(m, "weight", torch.randn_like(value), project=True)
        assert space(dtype).contains(m.weight)
        copied = copy.deepcopy(m), pickle.loads(pickle.dumps(m))
        assert all(torch.equal(other.weight, m.weight) for other in copied)
        start = m.weight.detach().clone()
        optimizer = torch.optim.SGD(m.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            (m.weight * (1.0 + torch.arange(shape[1]))).abs().sum().backward()
            optimizer.step()
            assert space(dtype).contains(m.weight)
        assert not torch.equal(m.weight, start)
        parametrize.remove_parametrizations(m, "weight")
        assert type(m) is nn.Module


def test_torchs_own_errors():
    m = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=r"'matrix_exp', 'cayley', .*got triv='foo'"):
        orthonet.orthogonal(m, "weight", "foo")
    with pytest.raises(ValueError, match="must be a matrix"):
        orthonet.orthogonal(m, "bias")
    with pytest.raises(ValueError, match="square"):
        orthonet.orthogonal(m, "weight", use_trivialization=False)
    assert not parametrize.is_parametrized(m)
    orthonet.orthogonal(m, "weight")
    with pytest.raises(ValueError, match=r"must have shape \(4, 3\)"):
        m.weight = torch.randn(5, 5)
    with pytest.raises(ValueError, match="determinant must be 1"):
        orthonet.orthogonal(nn.Linear(3, 3), det=-1, use_trivialization=False)


def test_without_a_base_the_weight_is_the_map_of_the_coordinates():
    skew = torch.randn(5, 5, dtype=torch.float64)
    skew = skew - skew.mT
    for triv, value in (
        ("exponential", torch.linalg.matrix_exp(skew)),
        ("cayley", torch.linalg.solve(torch.eye(5) - skew / 2, torch.eye(5) + skew / 2)),
        (torch.linalg.matrix_exp, torch.linalg.matrix_exp(skew)),
    ):
        p = SO().parametrization((5, 5), triv=triv, dynamic=False).double()
        assert torch.allclose(p(pack_skew(skew)), value, atol=1e-12)
        assert "base" not in p.state_dict()
        coordinates = torch.randn(p.coordinate_shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(p, coordinates, fast_mode=True)
    half = torch.diag(torch.tensor([-1.0, -1.0, 1.0]))
    assert torch.allclose(
        SO().parametrization((3, 3), dynamic=False)(
            SO().parametrization((3, 3), dynamic=False).right_inverse(half)
        ),
        half,
        atol=1e-6,
    )
    for options in ({"triv": "cayley"}, {"triv": torch.linalg.matrix_exp}):
        with pytest.raises(ValueError, match="no rotation by 180 degrees"):
            SO().parametrization((3, 3), dynamic=False, **options).right_inverse(half)
    with pytest.raises(ValueError, match="determinant must be 1"):
        SO(det=-1).parametrization((3, 3), dynamic=False)


def test_the_differences_on_the_page_are_those_of_torch_now():
    """Each of them seen in torch, so that a new version of it does not make the page false."""
    ours, theirs = nn.Linear(4, 4), nn.Linear(4, 4)
    theirs.load_state_dict(ours.state_dict())
    orthonet.orthogonal(ours), parametrizations.orthogonal(theirs)
    assert ours.parametrizations.weight.original.shape == (6,)
    assert theirs.parametrizations.weight.original.shape == (4, 4)
    theirs.weight = off = torch.randn(4, 4)  # torch takes another orthogonal matrix
    assert not torch.allclose(theirs.weight, off)
    with pytest.raises(NotOnManifoldError):
        ours.weight = off
    plain = parametrizations.orthogonal(nn.Linear(4, 4), use_trivialization=False)
    with pytest.raises(NotImplementedError, match="not possible to assign"):
        plain.weight = torch.eye(4)
    rectangular = parametrizations.orthogonal(nn.Linear(8, 4))
    assert rectangular.parametrizations.weight[0].base.shape == (8, 8)
    assert orthonet.orthogonal(nn.Linear(8, 4)).parametrizations.weight[0].base.shape == (4, 8)
    with pytest.raises((AttributeError, RuntimeError, pickle.PicklingError)):
        pickle.dumps(theirs)
    with pytest.raises(ValueError, match="householder"):
        orthonet.orthogonal(nn.Linear(4, 4), "weight", "householder")
    rows = re.findall(r"^\| (?!-)(?!`torch)(.+?) \| (.+?) \|$", PAGE.read_text(), re.M)
    assert len(rows) >= 8
