"""Mistakes in rooms that few programs enter, answered as in `test_mistakes`."""

import functools
import tempfile

import pytest
import torch
from torch import nn

import orthonet
from orthonet import convert, downstream, init, layers, losses, models, recipes, testing
from orthonet import functional as F
from orthonet import manifolds as M
from orthonet.testing import laws, tolerances
from tests.test_mistakes import (
    ARRAY,
    EYE,
    LOGITS,
    PLAIN,
    X,
    Y,
    answered_badly,
    certificate,
    linear,
)

WIDE, TOKENS, FOLDER = torch.ones(2, 4, 8, 8), torch.ones(2, 5, 8), tempfile.gettempdir()
PIXELS, LABELS = torch.ones(2, 3, 4, 4), torch.zeros(2, 4, 4).long()


@functools.cache
def painter():
    return orthonet.certify(nn.Conv2d(1, 3, 1).eval(), torch.ones(2, 1, 4, 4))


TESTING = [
    ("assert_lipschitz", "input_shape", lambda: testing.assert_lipschitz(linear(), 4)),
    ("assert_lipschitz", "constant", lambda: testing.assert_lipschitz(linear(), (4,), constant=-1)),
    (
        "assert_lipschitz",
        "constant",
        lambda: testing.assert_lipschitz(linear(), (4,), constant="1"),
    ),
    ("assert_lipschitz", "seed", lambda: testing.assert_lipschitz(linear(), (4,), seed="x")),
    ("assert_lipschitz", "fn", lambda: testing.assert_lipschitz(3, (4,))),
    ("assert_lipschitz", "input", lambda: testing.assert_lipschitz(linear(), (5,))),
    ("assert_orthogonal", "input_shape", lambda: testing.assert_orthogonal(linear(), "4")),
    ("assert_orthogonal", "atol", lambda: testing.assert_orthogonal(linear(), (4,), atol=-1)),
    (
        "assert_orthogonal",
        "dtype",
        lambda: testing.assert_orthogonal(linear(), (4,), dtype=torch.int64),
    ),
    ("assert_orthogonal", "fn", lambda: testing.assert_orthogonal(EYE, (4,))),
    ("assert_orthogonal", "input_shape", lambda: testing.assert_orthogonal(nn.ReLU(), (0,))),
    ("dense_operator", "input", lambda: testing.dense_operator(linear(), ())),
    ("dense_operator", "input_shape", lambda: testing.dense_operator(linear(), (-4,))),
    ("dense_operator", "fn", lambda: testing.dense_operator(nn.Linear, (4,))),
    ("dense_operator", "input_shape", lambda: testing.singular_values(linear(), None)),
    ("jacobian", "x", lambda: testing.jacobian(linear(), 3)),
    ("jacobian", "x", lambda: testing.jacobian(linear(), torch.ones(4).long())),
    ("jacobian", "input", lambda: testing.jacobian(linear(), torch.ones(5))),
    ("orthogonality_error", "w", lambda: testing.orthogonality_error(ARRAY)),
    ("orthogonality_error", "w", lambda: testing.orthogonality_error(torch.ones(4))),
    ("orthogonality_error", "w", lambda: testing.orthogonality_error(torch.ones(4, 4).long())),
    ("hard_matrix", "dtype", lambda: testing.hard_matrix("zero", (4, 4), torch.int64)),
    ("hard_matrix", "seed", lambda: testing.hard_matrix("zero", (4, 4), seed="x")),
    ("fuzz_certificates", "graphs", lambda: testing.fuzz_certificates(-1)),
    ("fuzz_certificates", "graphs", lambda: testing.fuzz_certificates("3")),
    ("fuzz_certificates", "seconds", lambda: testing.fuzz_certificates(1, seconds=-1)),
    ("fuzz_certificates", "operations", lambda: testing.fuzz_certificates(1, operations="linear")),
    ("fuzz_certificates", "seed", lambda: testing.fuzz_certificates(1, seed="x")),
    ("fuzz_certificates", "progress", lambda: testing.fuzz_certificates(1, progress=3)),
    ("LAYER_LAWS", "factory", lambda: laws.assert_eval_is_pure(linear(), (4,))),
    ("LAYER_LAWS", "input_shape", lambda: laws.assert_eval_is_pure(linear, 4)),
    ("rounding", "dtype", lambda: tolerances.rounding(torch.int64, 3)),
    ("rounding", "dtype", lambda: tolerances.rounding("float32", 1)),
    ("rounding", "size", lambda: tolerances.rounding(torch.float32, 1, size="x")),
]

OUTPUTS = [
    (
        "certified_interval",
        "outputs",
        lambda: downstream.certified_interval(torch.ones(2, 7), certificate(), 0.1, X),
    ),
    (
        "certified_pixel_accuracy",
        "ignore",
        lambda: downstream.certified_pixel_accuracy(
            PIXELS, LABELS, painter(), [0.1], None, ignore="x"
        ),
    ),
    (
        "LipschitzTransformerBlock",
        "max_rms",
        lambda: layers.LipschitzTransformerBlock(8, 2, max_length=5, max_rms=0),
    ),
    (
        "LipschitzTransformerBlock",
        "temperature",
        lambda: layers.LipschitzTransformerBlock(8, 2, max_length=5, temperature="x"),
    ),
    (
        "DistanceAttention",
        "key",
        lambda: layers.DistanceAttention(8, 2, max_length=5)(TOKENS, TOKENS[:1]),
    ),
]

TRAINING = [
    ("trades", "perturbed", lambda: losses.trades(LOGITS, "x", Y)),
    ("kr_labels", "target", lambda: losses.kr_labels("x")),
    ("kr_labels", "labels", lambda: losses.kr_labels(torch.tensor([0, 1, 2]))),
    (
        "tau_bce_with_logits",
        "labels",
        lambda: losses.tau_bce_with_logits(LOGITS[:, 0], torch.tensor([0, 3])),
    ),
    ("register", "builder", lambda: models.register(3)),
    ("register", "builder", lambda: models.register(lambda: nn.Linear(2, 2))),
    ("conv_orthogonal_", "gain", lambda: init.conv_orthogonal_(torch.ones(4, 4, 3, 3), gain=None)),
]

FUNCTIONS = [
    ("circular_pad", "pad", lambda: F.circular_pad(WIDE, 3)),
    ("global_scaled_avg_pool", "keepdim", lambda: F.global_scaled_avg_pool(WIDE, 2, keepdim="x")),
    ("householder", "theta", lambda: F.householder(X, 3)),
    ("l2_norm_pool", "padding", lambda: F.l2_norm_pool(WIDE, (2, 2), padding=(5, 5))),
    ("mod_relu", "bias", lambda: F.mod_relu(X, None)),
    ("mod_relu", "x", lambda: F.mod_relu(X.numpy(), torch.ones(4))),
    (
        "recurrence",
        "x",
        lambda: F.recurrence("x", torch.ones(2, 4), torch.ones(4, 8), torch.ones(4, 4)),
    ),
    ("n_activation", "theta", lambda: F.n_activation(X, 3)),
    ("safe_sqrt", "square", lambda: F.safe_sqrt("x")),
    ("safe_sqrt", "square", lambda: F.safe_sqrt(Y)),
    ("scaled_avg_pool", "kernel_size", lambda: F.scaled_avg_pool(WIDE, (2, 2), stride=2.5)),
]

SPACES = [
    ("Stiefel", "dtype", lambda: M.Stiefel().sample((4, 4), dtype=torch.int64)),
    ("Sphere", "device", lambda: M.Sphere().sample((4,), device="gpu")),
    ("Stiefel", "x", lambda: M.Stiefel().project(ARRAY)),
    ("Stiefel", "shape", lambda: M.Stiefel().exp(EYE, torch.eye(3))),
    ("Stiefel", "x", lambda: M.Stiefel().retract(EYE, ARRAY)),
    ("Sphere", "shape", lambda: M.Sphere().exp(torch.ones(3), torch.ones(4))),
    ("Sphere", "shape", lambda: M.Sphere().distance(torch.ones(3), torch.ones(4))),
    ("PSD", "shape", lambda: M.PSD().project(torch.ones(3, 4))),
    ("DoublyStochastic", "shape", lambda: M.DoublyStochastic().project(torch.ones(3, 4))),
    ("Grassmannian", "shape", lambda: M.Grassmannian().exp(torch.ones(4, 2), torch.ones(4, 3))),
    ("FrameTrivialization", "space", lambda: M.FrameTrivialization(3, (4, 4))),
    ("LinearParametrization", "space", lambda: M.LinearParametrization(M.Stiefel(), (4, 4))),
    ("frechet_mean", "max_iter", lambda: M.frechet_mean(M.Sphere(), torch.eye(3), max_iter=0)),
    ("frechet_mean", "tol", lambda: M.frechet_mean(M.Sphere(), torch.eye(3), tol=-1)),
    ("ConvexSum", "init", lambda: convert.ConvexSum("x")),
    ("ConvexSum", "branch", lambda: convert.ConvexSum()(X, torch.ones(2, 5))),
    ("PrescaledSum", "skip", lambda: convert.PrescaledSum()(X, 3)),
]

RECIPES = [
    ("TrainConfig", "radii", lambda: recipes.digits(radii=0.1)),
    ("TextConfig", "attention", lambda: recipes.TextConfig(attention="mixing")),
    ("ConformalConfig", "eps", lambda: recipes.ConformalConfig(eps=0.1)),
    ("load_checkpoint", "path", lambda: recipes.load_checkpoint(FOLDER)),
    ("train", "config", lambda: recipes.train(3, FOLDER)),
    ("train", "out", lambda: recipes.train(recipes.digits(), 3)),
    ("bench_zoo", "config", lambda: recipes.bench_zoo(3, FOLDER)),
    ("load_checkpoint", "path", lambda: recipes.certify_checkpoint(FOLDER)),
    ("train_text", "config", lambda: recipes.train_text(recipes.FlowConfig(), FOLDER)),
    ("layer_spectra", "model", lambda: recipes.layer_spectra(3, X)),
    ("evaluate", "images", lambda: recipes.evaluate(PLAIN, [(X, Y)], radii=[0.1])),
    ("register", "recipe", lambda: recipes.register("x", 3)),
    ("ResidualFlow", "blocks", lambda: recipes.ResidualFlow(0, 3, 0.5)),
    ("ResidualFlow", "contraction", lambda: recipes.ResidualFlow(2, 3, 1.5)),
]


TABLES = {
    name: table for name, table in list(globals().items()) if name.isupper() and type(table) is list
}


@pytest.mark.parametrize("name", TABLES)
def test_a_mistake_is_answered_by_one_sentence(name, caplog, capfd):
    assert answered_badly(TABLES[name], caplog, capfd) == []


def test_there_are_as_many_mistakes_as_were_asked_for():
    assert sum(map(len, TABLES.values())) >= 60


def test_refusing_leaves_everything_as_it_was():
    layer = linear()
    before = layer.training, layer.weight.clone()
    for call in (testing.dense_operator, testing.assert_lipschitz, testing.assert_orthogonal):
        with pytest.raises(ValueError, match="must take a batch of this shape"):
            call(layer, (5,))
        assert layer.training == before[0]
    assert torch.equal(layer.weight, before[1])
    point = torch.eye(4)
    with pytest.raises(ValueError, match="gain must be"):
        init.conv_orthogonal_(point[:, :, None], gain=float("nan"))
    assert torch.equal(point, torch.eye(4))
    with pytest.raises(ValueError, match="builder must be"):
        models.register(lambda: linear())
    assert "<lambda>" not in models.list_models()


def test_tensors_of_a_space_may_be_passed_by_name():
    x, v = M.Sphere().sample((3,)), torch.zeros(3)
    assert torch.equal(M.Sphere().exp(x=x, v=v), M.Sphere().exp(x, v))
    assert torch.equal(M.Sphere().project(x=x), M.Sphere().project(x))


def test_every_recipe_names_the_configuration_that_it_takes(tmp_path):
    for command in ("train", "bench"):
        for recipe in recipes.registered(command).values():
            with pytest.raises(ValueError, match=r"^\w+: config must be a \w+Config, got config=3"):
                recipe.run(3, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("labels", [[0, 1, 1], [-1, 1, 1], [1, 1, 1], [False, True, True]])
def test_labels_of_two_classes_are_taken_in_every_spelling(labels):
    target = torch.tensor(labels)
    assert losses.kr_labels(target).shape == (3,)
    assert losses.kr(torch.ones(3), target).shape == ()
