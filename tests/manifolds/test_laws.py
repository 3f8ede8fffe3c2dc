"""The laws of design: every space, every option, every shape, in both precisions."""

import copy
import pickle

import pytest
import torch

from orthonet.errors import NotOnManifoldError
from orthonet.manifolds import (
    SO,
    Bounded,
    Correlation,
    DoublyStochastic,
    Grassmannian,
    Hurwitz,
    Hyperbolic,
    Manifold,
    Nonnegative,
    NormBall,
    Parametrization,
    PoincareBall,
    ProductManifold,
    ProjectedParametrization,
    Simplex,
    SpectralBall,
    Stiefel,
    Symplectic,
    Trivialization,
    Unitary,
)
from orthonet.manifolds._linear import VectorSpace
from orthonet.testing import tolerances
from tests.each import each
from tests.manifolds.common import CASES, EXACT, SPACES, fits, relative

every_case = each("case", CASES, of=lambda case: repr(case[0]))
PROJECTED = {torch.float64: 1e-10, torch.float32: 2e-6}  # some projections iterate
OVERCOMPLETE = (Simplex, DoublyStochastic, Correlation)
KINKED = (Nonnegative, Bounded, NormBall, SpectralBall, Simplex)


def build(case, dtype) -> tuple[Manifold, Parametrization]:
    space, shape, options = case
    return space, space.parametrization(shape, **options).to(dtype)


@every_case
def test_a_sample_lies_on_the_space_and_survives_the_round_trip(case, dtype):
    space, p = build(case, dtype)
    x = space.sample(case[1], dtype=dtype)
    assert x.shape == case[1]
    assert x.dtype is dtype
    assert space.contains(x), space.contains(x)
    c = p.right_inverse(x)
    assert c.shape == p.coordinate_shape
    assert relative(p(c), x) <= EXACT[dtype]


@every_case
def test_any_coordinates_give_a_point_and_finite_gradients(case, dtype):
    space, p = build(case, dtype)
    p.right_inverse(space.sample(case[1], dtype=dtype))
    for scale in (0.0, 0.3, 3.0):
        if isinstance(space, (Symplectic, DoublyStochastic)) and scale > 1:
            continue  # unbounded groups leave float32; Sinkhorn nears a permutation slowly
        c = (scale * torch.randn(p.coordinate_shape, dtype=dtype)).requires_grad_()
        x = p(c)
        found = space.contains(x)
        assert found, found
        if c.numel():
            (grad,) = torch.autograd.grad(x.square().sum() + x.sum(), c)
            assert torch.isfinite(grad).all()


@every_case
def test_the_base_moves_without_moving_the_point(case, dtype):
    space, p = build(case, dtype)
    c = p.right_inverse(space.sample(case[1], dtype=dtype))
    c = c + 0.3 * torch.randn_like(c)
    x = p(c)
    for _ in range(3):
        c, v = p.update_base(c, torch.randn_like(c))
        assert torch.isfinite(v).all()
        assert relative(p(c), x) <= EXACT[dtype]  # observed 1.7e-15 and 4.7e-7
        if isinstance(space, Stiefel):
            off = torch.linalg.svdvals(p(c).double()) - 1.0
            assert off.abs().max() <= tolerances.PROMISE[dtype]  # observed 8e-7 in float32
    if isinstance(p, Trivialization) and not hasattr(p, "start"):
        assert not c.any()


@every_case
def test_a_wrong_point_is_refused_with_the_reason_and_nothing_changes(case, dtype):
    space, p = build(case, dtype)
    p.right_inverse(space.sample(case[1], dtype=dtype))
    before = copy.deepcopy(p.state_dict())
    bad = torch.full(case[1], float("nan"), dtype=dtype)
    with pytest.raises(NotOnManifoldError, match=r"finite.*distance=inf"):
        p.right_inverse(bad)
    with pytest.raises(ValueError, match="shape"):
        p.right_inverse(bad[..., None])
    assert all(torch.equal(before[k], v) for k, v in p.state_dict().items())


@every_case
def test_copies_and_pickles_compute_the_same(case):
    _, p = build(case, torch.float64)
    c = torch.randn(p.coordinate_shape, dtype=torch.float64)
    expected = p(c)
    assert torch.equal(copy.deepcopy(p)(c), expected)
    assert torch.equal(pickle.loads(pickle.dumps(p))(c), expected)


@every_case
def test_gradients_are_those_of_finite_differences(case):
    """At a generic point and at the assigned one, where spectra of frames are degenerate."""
    space, p = build(case, torch.float64)
    _, shape, options = case
    if shape not in {(1, 1), (1, 5), (4, 4), (6, 3), (3, 6)} or options.get("triv") == "polar":
        return  # the polar factor has gradchecks of its own
    c = p.right_inverse(space.sample(shape, dtype=torch.float64))
    if not c.numel():
        assert p.dimension in (0, 1)
        return
    generic = (c + 0.2 * torch.randn_like(c)).requires_grad_()
    assert torch.autograd.gradcheck(p, generic, fast_mode=True)
    if not isinstance(space, KINKED) and not isinstance(p, ProjectedParametrization):
        assert torch.autograd.gradcheck(p, c.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("space", [s for s, _ in SPACES], ids=repr)
def test_coordinates_are_as_many_as_dimensions(space):
    for shape in ((4, 4), (6, 3), (2, 4, 4)):
        if not fits(space, shape) or isinstance(space, (*OVERCOMPLETE, ProductManifold)):
            continue
        p = space.parametrization(shape)
        copies = torch.Size(p.batch_shape).numel()
        if getattr(space, "lam", 1.0) != 0.0:
            assert torch.Size(p.coordinate_shape).numel() == copies * p.dimension


@pytest.mark.parametrize("space", [s for s, _ in SPACES], ids=repr)
def test_batches_equal_loops(space):
    shape = next(s for s in ((2, 4, 4), (2, 6, 3), (2, 3, 6)) if fits(space, s))
    p, single = space.parametrization(shape).double(), space.parametrization(shape[1:]).double()
    x = space.sample(shape, dtype=torch.float64)
    if isinstance(space, ProductManifold):
        assert relative(space.project(x)[1], space.project(x[1])) <= 1e-12
        return
    c = p.right_inverse(x)
    c = c + 0.1 * torch.randn_like(c)
    together = p(c)
    for i in range(shape[0]):
        own = single.right_inverse(x[i])
        assert relative(single(own + (c[i] - p.right_inverse(x)[i])), together[i]) <= 1e-12


@pytest.mark.parametrize("space", [s for s, _ in SPACES], ids=repr)
def test_projection_arrives_and_leaves_points_alone(space, dtype):
    shape = next(s for s in ((2, 4, 4), (2, 6, 3), (2, 3, 6)) if fits(space, s))
    x = space.sample(shape, dtype=dtype)
    scale = 1e-3 if isinstance(space, Symplectic) else 1.0
    y = space.project(x + scale * torch.randn(shape, dtype=dtype))
    assert space.contains(y), space.contains(y)
    assert relative(space.project(y), y) <= 4 * PROJECTED[dtype]  # Sinkhorn has the largest
    v = torch.randn(shape, dtype=dtype)
    if not isinstance(space, Simplex):
        once = space.tangent(y, v)
        # the low-rank ones, which decompose y, have the largest
        assert relative(space.tangent(y, once), once) <= 1e4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("space", [s for s, _ in SPACES], ids=repr)
def test_what_is_projected_is_parametrized_at_any_rank_and_scale(space, dtype):
    """A determinant that rounding alone made positive was taken for one, and a batch got either."""
    if isinstance(space, Symplectic):
        return  # only near the group is there a projection
    shape = next(s for s in ((3, 6, 6), (3, 4, 4)) if fits(space, s))
    for seed, scale in enumerate((0.0, 1e-6, 1.0, 1e6, 1e-6, 1.0, 1e6)):
        torch.manual_seed(seed)
        column = torch.randn(*shape[:-1], 1, dtype=dtype)
        x = scale * column @ torch.randn(3, 1, shape[-1], dtype=dtype)
        p = space.parametrization(shape).to(dtype)
        value = p(p.right_inverse(x, project=True))
        assert space.contains(value), space.contains(value)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("space", [s for s, _ in SPACES], ids=repr)
def test_tolerances_are_relative(space, scale):
    """Cones and linear spaces accept their points at any scale, and only those."""
    shape = (4, 4) if fits(space, (4, 4)) else (6, 3)
    x = space.sample(shape)
    scalable = type(space).__name__ in {
        "Rn",
        "Symmetric",
        "Skew",
        "LowRank",
        "FixedRank",
        "PSD",
        "PSSD",
        "PSSDLowRank",
        "PSSDFixedRank",
        "GLp",
        "Nonnegative",
    }
    open_or_inside = isinstance(space, (NormBall, SpectralBall, PoincareBall)) and scale < 1
    open_or_inside |= isinstance(space, Hurwitz) and scale > 1
    inside = isinstance(space, Bounded) and scale < 1
    flat = isinstance(space, VectorSpace)
    assert bool(space.contains(scale * x)) == (scalable or flat or open_or_inside or inside)
    kind = type(space).__name__
    if kind != "GLp":
        noise = scale * (x + 0.1 * torch.randn(shape))
        full = {"Rn", "GLp", "FixedRank", "NormBall", "SpectralBall", "Bounded"}
        full |= {"PoincareBall", "Hurwitz"}
        if kind not in full or (kind == "FixedRank" and space.rank < 4):
            assert not space.contains(noise - 0.2 * scale)


def test_bases_keep_float32_when_the_module_is_converted():
    for dtype in (torch.bfloat16, torch.float16):
        p = Stiefel().parametrization((6, 3))
        x = Stiefel().sample((6, 3))
        p.right_inverse(x)
        p.to(dtype)
        assert p.base.dtype is torch.float32
        value = p(torch.zeros(p.coordinate_shape, dtype=dtype))
        assert torch.equal(value, x.to(dtype)) or relative(value, x.to(dtype)) < 1e-2
        assert torch.equal(p.double().base.float(), Stiefel().project(x))


def test_autocast_does_not_reach_the_mathematics():
    p = SO().parametrization((8, 8))
    c = torch.randn(p.coordinate_shape)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(p(c), p(c).float())
    assert SO().contains(p(c))


def test_meta_device_carries_shapes():
    for space, shape in ((SO(), (4, 4)), (Stiefel(), (6, 3)), (Grassmannian(), (3, 6))):
        p = space.parametrization(shape).to("meta")
        assert p(torch.empty(p.coordinate_shape, device="meta")).shape == shape
        assert p.right_inverse(torch.empty(shape, device="meta")).shape == p.coordinate_shape


def test_vmap_and_compile_give_the_same_values():
    for triv in ("exponential", "cayley"):
        for space, shape in ((SO(), (4, 4)), (Stiefel(), (7, 3)), (Hyperbolic(), (5,))):
            options = {} if isinstance(space, Hyperbolic) else {"triv": triv}
            p = space.parametrization(shape, **options).double()
            c = torch.randn(3, *p.coordinate_shape, dtype=torch.float64)
            loop = torch.stack([p(single) for single in c])
            assert relative(torch.func.vmap(p)(c), loop) <= 1e-13
            compiled = torch.compile(p, fullgraph=True, backend="aot_eager")
            assert relative(compiled(c[0]), loop[0]) <= 1e-13


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TYPED = [(space, dtype) for space, _ in SPACES for dtype in DTYPES]
TYPED += [(Unitary(), dtype) for dtype in (torch.complex128, torch.complex64)]


@pytest.mark.parametrize(("space", "dtype"), TYPED, ids=str)
def test_dtype_and_device_are_those_asked_for(space, dtype):
    shape = next(s for s in ((2, 4, 4), (2, 6, 3)) if fits(space, s))
    if dtype.is_complex:
        p = space.parametrization(shape, dtype=dtype)
    else:
        p = space.parametrization(shape).to(dtype)
    x = space.sample(shape, dtype=dtype)
    for point in (x, space.project(x), p.sample(), p(p.right_inverse(p.sample()))):
        assert point.dtype is dtype
        assert space.contains(point)
        assert p.contains(point)
    assert p.sample(dtype=torch.float32).dtype is torch.float32
    assert p.dtype is dtype
    p.to("meta")
    meta = (
        p.sample(),
        space.sample(shape, dtype=dtype, device="meta"),
        space.project(x.to("meta")),
    )
    assert all(m.is_meta and m.dtype is dtype and m.shape == shape for m in meta)
    assert space.contains(meta[0])  # as far as shape and dtype tell
    assert "int64" in space.contains(torch.ones(shape, dtype=torch.int64)).reason


def test_an_unknown_trivialization_is_told_every_name():
    for space in (SO(), Stiefel()):
        with pytest.raises(ValueError, match=r"'cayley', 'polar', got triv='householder'"):
            space.parametrization((4, 4), triv="householder")
    with pytest.raises(ValueError, match=r"'cayley', got triv='polar'"):
        Grassmannian().parametrization((4, 2), triv="polar")
