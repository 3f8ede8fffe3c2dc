"""More of what a user gets wrong: each is answered by one sentence, as in `test_mistakes`."""

import numpy as np
import pytest
import torch
from torch import nn

import orthonet
from orthonet import certify, convert, init, layers, losses, models, optim
from orthonet import constraints as C
from orthonet import functional as F
from orthonet import linalg as L
from orthonet import manifolds as M
from orthonet.layers import OrthoConv2d as OC
from orthonet.layers import OrthoLinear as OL
from tests.test_mistakes import (
    ARRAY,
    EYE,
    INTS,
    LOGITS,
    ORTHO,
    PLAIN,
    X,
    Y,
    answered_badly,
    certificate,
    linear,
    network,
    point,
)

WIDE = torch.ones(2, 4, 8, 8)

LAYERS = [
    ("ConvexResidual", "branch", lambda: layers.ConvexResidual(nn.Linear)),
    ("ConvexResidual", "init", lambda: layers.ConvexResidual(nn.Linear(4, 4), init=1.5)),
    ("ConvexResidual", "input", lambda: layers.ConvexResidual(nn.Linear(4, 3))(X)),
    ("AdditiveResidual", "branch", lambda: layers.AdditiveResidual(3)),
    ("AdditiveResidual", "input", lambda: layers.AdditiveResidual(nn.Linear(4, 3))(X)),
    ("PrescaledResidual", "init", lambda: layers.PrescaledResidual(nn.Linear(4, 4), init=0)),
    ("L2NormResidual", "branch", lambda: layers.L2NormResidual("x")),
    ("ConcatResidual", "dim", lambda: layers.ConcatResidual(nn.Linear(2, 2), dim="c")),
    ("ConcatResidual", "shape", lambda: layers.ConcatResidual(nn.Linear(2, 2))(torch.ones(2, 3))),
    ("global_l2_norm_pool", "shape", lambda: layers.GlobalL2NormPool()(X)),
    ("GlobalL2NormPool", "dims", lambda: layers.GlobalL2NormPool(dims=4)),
    ("GlobalScaledAvgPool", "keepdim", lambda: layers.GlobalScaledAvgPool(2)),
    ("l2_norm_pool", "shape", lambda: layers.L2NormPool(2)(X)),
    ("l2_norm_pool", "kernel_size", lambda: layers.L2NormPool(9)(WIDE)),
    ("l2_norm_pool", "x", lambda: layers.L2NormPool(2)(WIDE.long())),
    ("scaled_avg_pool", "x", lambda: layers.ScaledAvgPool(2)(WIDE.int())),
    ("scaled_avg_pool", "kernel_size", lambda: layers.ScaledAvgPool(9)(WIDE)),
    ("AdaptiveL2NormPool", "shape", lambda: layers.AdaptiveL2NormPool(3)(WIDE)),
    ("AdaptiveL2NormPool", "output_size", lambda: layers.AdaptiveL2NormPool(None)),
    ("AdaptiveScaledAvgPool", "output_size", lambda: layers.AdaptiveScaledAvgPool("1")),
    ("space_to_depth", "shape", lambda: layers.SpaceToDepth2d(2)(X)),
    ("space_to_depth", "x", lambda: layers.SpaceToDepth2d(2)(WIDE.numpy())),
    ("SpaceToDepth2d", "downscale_factor", lambda: layers.SpaceToDepth2d((2, 2))),
    ("PadToStride", "shape", lambda: layers.PadToStride(2)(X)),
    ("PadToStride", "kernel_size", lambda: layers.PadToStride(2, kernel_size=0)),
    ("BatchCentering", "shape", lambda: layers.BatchCentering(4)(torch.ones(2, 5))),
    ("BatchCentering", "shape", lambda: layers.BatchCentering(4)(torch.ones(4))),
    ("BatchCentering", "x", lambda: layers.BatchCentering(4)(torch.ones(2, 4).long())),
    ("BatchLipNorm", "shape", lambda: layers.BatchLipNorm(4)(torch.ones(2, 3, 8, 8))),
    ("BatchLipNorm", "x", lambda: layers.BatchLipNorm(4)(np.ones((2, 4), dtype=np.float32))),
    ("LayerCentering", "dim", lambda: layers.LayerCentering(5)(X)),
    ("LayerCentering", "x", lambda: layers.LayerCentering(-1)(X.long())),
    ("Normalize", "shape", lambda: layers.Normalize([0.5] * 3, [0.2] * 3)(WIDE)),
    ("Normalize", "mean", lambda: layers.Normalize([0.5] * 3, [0.2] * 2)),
    ("Scale", "factor", lambda: layers.Scale(float("nan"))),
    ("Scale", "factor", lambda: layers.Scale(0)),
    ("FirstChannels", "shape", lambda: layers.FirstChannels(9)(X)),
    ("FirstChannels", "channels", lambda: layers.FirstChannels(2.0)),
    ("channel_shuffle", "channels", lambda: layers.ChannelShuffle(3)(X)),
    ("ChannelShuffle", "dim", lambda: layers.ChannelShuffle(2, dim="c")),
    ("householder", "theta", lambda: layers.HouseholderActivation(4)(torch.ones(2, 6))),
    ("householder_order2", "theta", lambda: layers.HouseholderActivation2(4)(torch.ones(2, 6))),
    ("n_activation", "theta", lambda: layers.NActivation(4)(torch.ones(2, 6))),
    ("BetaAbs", "beta", lambda: layers.BetaAbs("0.5")),
    ("beta_abs", "x", lambda: layers.BetaAbs(0.5)([1.0])),
    ("soft_huber", "x", lambda: layers.SoftHuber(0.1)(X.long())),
    ("absolute", "x", lambda: layers.Abs()(np.ones(3))),
    ("SpatialShift2d", "fraction", lambda: layers.SpatialShift2d(2.0)),
    ("SpatialShift2d", "padding_mode", lambda: layers.SpatialShift2d(padding_mode="reflect")),
    ("spatial_shift", "shape", lambda: layers.SpatialShift2d()(X)),
    ("SymmetricPad", "pad", lambda: layers.SymmetricPad(-1)),
    ("SymmetricPad", "pad", lambda: layers.SymmetricPad(9)(WIDE)),
    ("BatchScaling", "num_features", lambda: layers.BatchScaling("x")),
    ("UnitNormLinear", "in_features", lambda: layers.UnitNormLinear(0, 4)),
    ("UnitNormLinear", "input", lambda: layers.UnitNormLinear(4, 4)(torch.ones(2, 5))),
    ("UnitNormLinear", "input", lambda: layers.UnitNormLinear(4, 4)(X.long())),
    ("SpectralLinear", "input", lambda: layers.SpectralLinear(4, 4)(torch.ones(2, 5))),
    ("SpectralLinear", "out_features", lambda: layers.SpectralLinear(4, -1)),
    ("CayleyLinear", "input", lambda: layers.CayleyLinear(4, 4)(X.numpy())),
    ("SandwichLinear", "input", lambda: layers.SandwichLinear(4, 4)(torch.ones(2, 5))),
    ("SandwichLinear", "activation", lambda: layers.SandwichLinear(4, 4, activation="gelu")),
    ("BROLinear", "rank", lambda: layers.BROLinear(4, 4, rank="x")),
    ("CayleyConv2d", "input", lambda: layers.CayleyConv2d(4, 4, 3, padding="same")(X)),
    ("SOCConv2d", "input", lambda: layers.SOCConv2d(4, 4, 3)(torch.ones(2, 3, 8, 8))),
    ("AOLConv2d", "input", lambda: layers.AOLConv2d(4, 4, 3)(torch.ones(2, 3, 8, 8))),
    ("LipNeXtBlock2d", "input", lambda: layers.LipNeXtBlock2d(4)(torch.ones(2, 3, 8, 8))),
    ("OrthoGRU", "input", lambda: layers.OrthoGRU(4, 4)(torch.ones(2, 3, 5))),
    ("OrthoLSTM", "hx", lambda: layers.OrthoLSTM(4, 4)(torch.ones(2, 3, 4), torch.ones(1, 3, 4))),
    ("OrthoLSTM", "input", lambda: layers.OrthoLSTM(4, 4)("abc")),
    ("OrthoRNNCell", "input", lambda: layers.OrthoRNNCell(4, 4)(torch.ones(2, 5))),
    ("OrthoRNNCell", "hx", lambda: layers.OrthoRNNCell(4, 4)(torch.ones(2, 4), torch.ones(3, 4))),
    ("OrthoLSTMCell", "hx", lambda: layers.OrthoLSTMCell(4, 4)(torch.ones(2, 4), torch.ones(2, 4))),
    ("OrthoRNN", "bias", lambda: layers.OrthoRNN(4, 4, bias="no")),
    ("OrthoRNN", "bidirectional", lambda: layers.OrthoRNN(4, 4, bidirectional=2)),
    ("ContractiveRNN", "input", lambda: layers.ContractiveRNN(4, 4)(torch.ones(2, 3, 5))),
    ("OrthoConv1d", "input", lambda: layers.OrthoConv1d(4, 4, 3)(torch.ones(2, 3, 8))),
    ("OrthoConv2d", "input", lambda: OC(4, 4, 3)(torch.ones(2, 4, 2, 2))),
    ("OrthoConv2d", "input", lambda: OC(4, 4, 3)(torch.ones(2, 4, 8, 8).long())),
    ("OrthoConv2d", "input", lambda: OC(4, 4, 3, padding=1)(torch.ones(2, 8, 8, 4))),
    ("OrthoConv3d", "input", lambda: layers.OrthoConv3d(4, 4, 3)(torch.ones(2, 4, 2, 2, 2))),
    (
        "OrthoConvTranspose2d",
        "input",
        lambda: layers.OrthoConvTranspose2d(4, 4, 3)(torch.ones(2, 3, 8, 8)),
    ),
    ("OrthoConv2d", "input_size", lambda: OC(4, 4, 3, padding_mode="reflect", padding=9)(WIDE)),
    ("OrthoConv2d", "groups", lambda: OC(4, 4, 3, groups="2")),
    ("OrthoConv2d", "groups", lambda: OC(4, 4, 3, groups=None)),
    ("OrthoLinear", "device", lambda: OL(4, 4, True, torch.float64)),
    ("OrthoLinear", "input", lambda: ORTHO(X.to(torch.complex64))),
    ("OrthoLinear", "input", lambda: ORTHO(torch.ones(4, 2))),
    ("OrthoLinear", "input", lambda: ORTHO(torch.tensor(1.0))),
    ("OrthoLinear", "input", lambda: ORTHO("abc")),
    ("OrthoLinear", "input", lambda: ORTHO(None)),
]

CERTIFICATES = [
    ("certify", "effort", lambda: orthonet.certify(PLAIN, X, effort=None)),
    ("certify", "lower", lambda: orthonet.certify(PLAIN, example_input=X, lower=None)),
    ("certify", "path", lambda: orthonet.certify(nn.Linear(4, 3), X)),
    (
        "certify",
        "path",
        lambda: orthonet.certify(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), X),
    ),
    ("certify", "example_input", lambda: orthonet.certify(nn.Embedding(4, 4).eval(), Y)),
    ("certify", "path", lambda: orthonet.certify(nn.Sequential(), X)),
    ("certify", "path", lambda: orthonet.certify(nn.Softmax(0), X)),
    ("certify", "model", lambda: orthonet.certify(lambda x: x, X)),
    ("certify", "model", lambda: orthonet.certify(PLAIN.forward, X)),
    (
        "LipschitzCertificate",
        "labels",
        lambda: certificate().radius(PLAIN(X), labels=torch.tensor([0])),
    ),
    (
        "LipschitzCertificate",
        "labels",
        lambda: certificate().radius(PLAIN(X), labels=torch.tensor([0, -1])),
    ),
    ("LipschitzCertificate", "inputs", lambda: certificate().radius(PLAIN, X.numpy())),
    ("LipschitzCertificate", "changed", lambda: certificate().radius(nn.Linear(4, 3), X)),
    ("plot", "ax", lambda: certificate().plot(3)),
    ("plot", "ax", lambda: certificate().plot("figure.png")),
    ("RadiusCurve", "radii", lambda: certificate().curve(PLAIN(X), Y).at([0.1, None])),
    ("certified_accuracy", "labels", lambda: certificate().curve(PLAIN(X), torch.tensor([0]))),
    ("LipschitzCertificate", "model", lambda: certificate().curve(PLAIN, [(X, Y)])),
    (
        "LipschitzCertificate",
        "model",
        lambda: certificate().certified_accuracy(PLAIN, [(X, Y)], [0.1]),
    ),
    ("LipschitzCertificate", "radius", lambda: certificate().band(X)),
    ("LipschitzCertificate", "radius", lambda: certificate().band(None)),
    ("LipschitzCertificate", "path", lambda: orthonet.LipschitzCertificate.load(3)),
    (
        "evaluate",
        "restarts",
        lambda: orthonet.evaluate(PLAIN, [(X, Y)], [0.1], certificate(), restarts=0),
    ),
    (
        "evaluate",
        "generator",
        lambda: orthonet.evaluate(PLAIN, [(X, Y)], [0.1], certificate(), generator=3),
    ),
    (
        "LipschitzCertificate",
        "labels",
        lambda: orthonet.evaluate(PLAIN, [(X, Y[:1])], [0.1], certificate()),
    ),
    (
        "LipschitzCertificate",
        "labels",
        lambda: orthonet.evaluate(PLAIN, [(X, torch.tensor([0, 9]))], [0.1], certificate()),
    ),
    (
        "evaluate",
        "batch",
        lambda: orthonet.evaluate(PLAIN, [(X.numpy(), Y.numpy())], [0.1], certificate()),
    ),
    (
        "LipschitzCertificate",
        "labels",
        lambda: orthonet.evaluate(PLAIN, [(X, nn.functional.one_hot(Y, 3))], [0.1], certificate()),
    ),
    ("evaluate", "loader", lambda: orthonet.evaluate(PLAIN, 3, [0.1])),
    (
        "Evaluation",
        "path",
        lambda: orthonet.evaluate(PLAIN, [(X, Y)], [0.1], certificate(), attack=False).save(
            "x.pdf"
        ),
    ),
    (
        "Evaluation",
        "path",
        lambda: orthonet.evaluate(PLAIN, [(X, Y)], [0.1], certificate(), attack=False).save(3),
    ),
    (
        "Plot",
        "path",
        lambda: (
            orthonet.evaluate(PLAIN, [(X, Y)], [0.1], certificate(), attack=False)
            .plot()
            .save("x.png")
        ),
    ),
    (
        "plot",
        "ax",
        lambda: orthonet.evaluate(PLAIN, [(X, Y)], [0.1], certificate(), attack=False).plot(
            "x.png"
        ),
    ),
    ("certified_curve", "certificate", lambda: certify.certified_curve(PLAIN, [(X, Y)], 3)),
    ("certified_curve", "training", lambda: certify.certified_curve(nn.Linear(4, 3), [(X, Y)])),
    ("lipschitz_estimate", "steps", lambda: certify.lipschitz_estimate(PLAIN, X, steps=0)),
    ("lipschitz_estimate", "x", lambda: certify.lipschitz_estimate(PLAIN, X[:0])),
    ("lipschitz_estimate", "x", lambda: certify.lipschitz_estimate(PLAIN, X.long())),
    ("pgd_l2", "x", lambda: certify.pgd_l2(PLAIN, X, Y[:1], 0.1)),
    ("pgd_l2", "radius", lambda: certify.pgd_l2(PLAIN, X, Y, [0.1])),
    ("pgd_l2", "restarts", lambda: certify.pgd_l2(PLAIN, X, Y, 0.1, restarts=0)),
    ("pgd_l2", "x", lambda: certify.pgd_l2(PLAIN, X, nn.functional.one_hot(Y, 3), 0.1)),
    ("apgd_l2", "radius", lambda: certify.apgd_l2(PLAIN, X, Y, -1.0)),
    ("apgd_ensemble_l2", "radius", lambda: certify.apgd_ensemble_l2(PLAIN, X, Y, "0.1")),
    ("empirical_accuracy", "radii", lambda: certify.empirical_accuracy(PLAIN, X, Y, [-0.1])),
    ("pgd", "steps", lambda: certify.attack_certificate(PLAIN, certificate(), X, Y, steps=0)),
    ("local_bound", "center", lambda: certify.local_bound(PLAIN, X, 0.1)),
    ("local_bound", "layers", lambda: certify.local_bound(3, X[0], 0.1)),
    ("local_bound", "center", lambda: certify.local_bound(PLAIN, X, -0.1)),
    ("mlp_bound", "layers", lambda: certify.mlp_bound([])),
    ("mlp_bound", "module", lambda: certify.mlp_bound([nn.ReLU()])),
    ("sequence_bound", "state", lambda: certify.sequence_bound(3, X)),
    ("register_rule", "target", lambda: certify.register_rule(nn.ReLU())),
    ("register_rule", "targets", lambda: certify.register_rule()),
    ("register_rule", "target", lambda: certify.register_rule(3)),
    ("Bound", "value", lambda: certify.Bound(float("nan"))),
    ("report_html", "curve", lambda: certify.report_html(certificate(), curve=3)),
    ("report_html", "radii", lambda: certify.report_html(certificate(), radii=0.1)),
    ("report_html", "title", lambda: certify.report_html(certificate(), title=None)),
    ("report_html", "attacked", lambda: certify.report_html(certificate(), attacked=[0.1])),
    ("summary", "model", lambda: orthonet.summary(nn.Linear)),
    ("certify", "conditions", lambda: orthonet.certify(nn.LSTM(4, 4).eval(), torch.ones(2, 3, 4))),
]

CONSTRAINTS_AND_SPACES = [
    ("Stiefel", "triv", lambda: C.orthogonal(linear(), "weight", triv="cayly")),
    ("constrain", "flatten", lambda: C.orthogonal(nn.Conv2d(3, 3, 3), "weight", flatten=None)),
    ("SphereTrivialization", "distance", lambda: C.sphere(linear(), radius=float("inf"))),
    ("LowRank", "shape", lambda: C.low_rank(linear(), "weight", 9)),
    ("PSSDLowRank", "rank", lambda: C.positive_semidefinite_low_rank(linear(), "weight", 0)),
    (
        "PSSDFixedRank",
        "shape",
        lambda: C.positive_semidefinite_fixed_rank(nn.Linear(4, 3), "weight", 2),
    ),
    ("Bounded", "low", lambda: C.bounded(linear(), "weight", "a", "b")),
    ("NormBall", "radius", lambda: C.norm_ball(linear(), radius=float("nan"))),
    ("SpectralBall", "radius", lambda: C.spectral_ball(linear(), radius="1")),
    ("Correlation", "shape", lambda: C.correlation(nn.Linear(4, 3))),
    ("Skew", "shape", lambda: C.skew(nn.Linear(4, 3))),
    ("Symmetric", "shape", lambda: C.symmetric(nn.Linear(4, 3))),
    ("GLp", "shape", lambda: C.invertible(nn.Linear(4, 3))),
    ("SL", "shape", lambda: C.sln(nn.Linear(4, 3))),
    ("Symplectic", "shape", lambda: C.symplectic(nn.Linear(3, 3))),
    ("Hurwitz", "alpha", lambda: C.alpha_stable(linear(), alpha="x")),
    ("PoincareBall", "radius", lambda: C.poincare_ball(linear(), radius=0)),
    ("ProductManifold", "spaces", lambda: C.product(linear(), "weight", [3])),
    ("ProductManifold", "spaces", lambda: C.product(linear(), "weight", [])),
    ("constraints", "tensor_name", lambda: C.assign(linear(), "weight", ARRAY)),
    ("constraints", "tensor_name", lambda: C.assign(3, "weight", EYE)),
    ("constrain", "space", lambda: C.constrain(linear(), "weight", 3)),
    (
        "transfer_parametrizations_and_params",
        "from_module",
        lambda: C.transfer_parametrizations_and_params(3, linear()),
    ),
    (
        "transfer_parametrizations_and_params",
        "to_module",
        lambda: C.transfer_parametrizations_and_params(linear(), 3),
    ),
    ("rebase_every", "optimizer", lambda: C.rebase_every(linear(), 3, 10)),
    ("Stiefel", "distribution", lambda: M.Stiefel().sample((4, 4), distribution="x")),
    ("SO", "shape", lambda: M.SO().sample((4, 3))),
    ("frechet_mean", "points", lambda: M.frechet_mean(M.Sphere(), [])),
    ("frechet_mean", "points", lambda: M.frechet_mean(M.Sphere(), 3)),
    ("frechet_mean", "space", lambda: M.frechet_mean(3, EYE)),
    ("Grassmannian", "shape", lambda: M.Grassmannian().distance(EYE, torch.ones(4, 3))),
    ("Bounded", "low", lambda: M.Bounded("0", 1)),
]

TRAINING = [
    ("StiefelAdam", "shape", lambda: optim.StiefelAdam(linear().parameters())),
    ("StiefelAdam", "lr", lambda: optim.StiefelAdam([{"params": [point()], "lr": -1}])),
    ("StiefelAdam", "params", lambda: optim.StiefelAdam([{"param": [point()]}])),
    ("StiefelAdam", "betas", lambda: optim.StiefelAdam([point()], betas=(1.5, 0.9))),
    ("StiefelSGD", "momentum", lambda: optim.StiefelSGD([point()], lr=0.1, nesterov="x")),
    ("StiefelSGD", "momentum", lambda: optim.StiefelSGD([point()], lr=0.1, nesterov=True)),
    ("StiefelMuon", "lr", lambda: optim.StiefelMuon([point()], lr=-0.1)),
    ("StiefelMuon", "shape", lambda: optim.StiefelMuon([nn.Parameter(torch.ones(3))], lr=0.1)),
    ("RiemannianAdam", "lr", lambda: optim.RiemannianAdam([nn.Parameter(torch.ones(3))], lr=-1.0)),
    ("RiemannianSGD", "params", lambda: optim.RiemannianSGD(linear(), lr=0.1)),
    ("RiemannianLBFGS", "lr", lambda: optim.RiemannianLBFGS([point()], lr=0.0)),
    ("RiemannianLBFGS", "history_size", lambda: optim.RiemannianLBFGS([point()], history_size=0)),
    ("retract_after_step", "optimizer", lambda: optim.retract_after_step(3)),
    (
        "offset_cross_entropy",
        "logits",
        lambda: losses.OffsetCrossEntropyLoss(0.1)(LOGITS.numpy(), Y),
    ),
    ("offset_cross_entropy", "target", lambda: losses.OffsetCrossEntropyLoss(0.1)(LOGITS, [0, 1])),
    ("offset_cross_entropy", "logits", lambda: losses.OffsetCrossEntropyLoss(0.1)(Y, LOGITS)),
    (
        "OffsetCrossEntropyLoss",
        "reduction",
        lambda: losses.OffsetCrossEntropyLoss(0.1, reduction="avg"),
    ),
    ("hinge_kr", "input", lambda: losses.HKRLoss(1.0)(LOGITS, Y)),
    ("hinge_kr", "input", lambda: losses.HKRLoss(1.0)(LOGITS[:, 0], torch.zeros(5))),
    ("HKRLoss", "margin", lambda: losses.HKRLoss(1.0, margin=-1)),
    (
        "hinge_kr_multiclass",
        "smallest",
        lambda: losses.HKRMulticlassLoss(1.0)(LOGITS, torch.tensor([0, 7])),
    ),
    ("KRLoss", "reduction", lambda: losses.KRLoss(reduction="x")),
    ("multi_margin", "smallest", lambda: losses.MultiMarginLoss()(LOGITS, torch.tensor([0, 9]))),
    ("TRADESLoss", "beta", lambda: losses.TRADESLoss("6")),
    ("TauBCEWithLogitsLoss", "tau", lambda: losses.TauBCEWithLogitsLoss(0.0)),
    ("tau_bce_with_logits", "input", lambda: losses.TauBCEWithLogitsLoss(1.0)(LOGITS, Y)),
    ("EMMALoss", "radius", lambda: losses.EMMALoss(-1)),
    ("LogitAnnealingLoss", "offset", lambda: losses.LogitAnnealingLoss("x")),
    ("CertificateRegularizationLoss", "weight", lambda: losses.CertificateRegularizationLoss("x")),
    (
        "LseHKRMulticlassLoss",
        "temperature",
        lambda: losses.LseHKRMulticlassLoss(1.0, temperature=0),
    ),
    ("SoftHKRMulticlassLoss", "alpha", lambda: losses.SoftHKRMulticlassLoss(-1.0)),
    ("mlp", "hidden", lambda: models.mlp_digits(hidden=0)),
    ("create", "name", lambda: models.create(3)),
    ("create", "arguments", lambda: models.create("mlp", in_features=4)),
    ("convnet", "channels", lambda: models.convnet((3, 32, 32), 10, channels=0)),
]

CONVERSION_AND_FUNCTIONS = [
    ("fuse", "module", lambda: orthonet.fuse(3)),
    ("fuse", "module", lambda: orthonet.fuse("compile")),
    ("unfuse", "module", lambda: orthonet.unfuse(3)),
    ("invalidate", "module", lambda: orthonet.invalidate(EYE)),
    ("remove", "tensor_name", lambda: orthonet.remove(3, "weight")),
    (
        "parameter_groups",
        "weight_decay",
        lambda: orthonet.parameter_groups(linear(), lr=0.1, weight_decay="x"),
    ),
    ("parameter_groups", "lr", lambda: orthonet.parameter_groups(linear(), lr=-1)),
    (
        "orthogonalize",
        "residual",
        lambda: convert.orthogonalize(network(), weights="reset", residual="sum"),
    ),
    (
        "orthogonalize",
        "progress",
        lambda: convert.orthogonalize(network(), weights="reset", progress="yes"),
    ),
    (
        "orthogonalize",
        "return_report",
        lambda: convert.orthogonalize(network(), weights="reset", return_report="yes"),
    ),
    (
        "certify",
        "example_input",
        lambda: convert.orthogonalize(network(), weights="reset", example_input=3),
    ),
    ("orthogonalize", "model", lambda: convert.orthogonalize([network()])),
    ("orthogonalize", "weights", lambda: convert.orthogonalize(network(), weights=None)),
    (
        "orthogonalize",
        "rule",
        lambda: convert.orthogonalize(network(), weights="reset", rules={"0": 3}),
    ),
    (
        "orthogonalize",
        "returned",
        lambda: convert.orthogonalize(network(), weights="reset", rules={"0": lambda m: 3}),
    ),
    (
        "orthogonalize",
        "rule",
        lambda: convert.orthogonalize(network(), weights="reset", rules={nn.Conv2d: True}),
    ),
    ("to_plain", "model", lambda: convert.to_plain(nn.Linear)),
    ("manifold_groups", "model", lambda: convert.manifold_groups(3)),
    ("ConvexSum", "init", lambda: convert.ConvexSum(0.0)),
    ("BranchGain", "init", lambda: convert.PrescaledSum("1")),
    ("orthogonal_", "gain", lambda: init.orthogonal_(torch.ones(4, 4), gain="x")),
    ("conv_orthogonal_", "groups", lambda: init.conv_orthogonal_(torch.ones(4, 4, 3, 3), groups=3)),
    ("conv_orthogonal_", "stride", lambda: init.conv_orthogonal_(torch.ones(4, 4, 3, 3), stride=0)),
    ("matrix_exponential", "a", lambda: L.matrix_exponential(INTS)),
    ("power_iteration", "w", lambda: L.power_iteration(ARRAY, 3)),
    ("haar", "generator", lambda: L.haar((4, 4), generator=3)),
    ("haar", "device", lambda: L.haar((4, 4), device="gpu")),
    (
        "convolution_norm_bound",
        "kernel",
        lambda: L.convolution_norm_bound(torch.ones(2, 2, 3, 3), 8),
    ),
    (
        "convolution_norm_bound",
        "effort",
        lambda: L.convolution_norm_bound(torch.ones(2, 2, 3, 3), (8, 8), effort="best"),
    ),
    ("householder", "theta", lambda: F.householder(X, torch.ones(5))),
    ("beta_abs", "beta", lambda: F.beta_abs(X, 2.0)),
    (
        "scaled_avg_pool",
        "kernel_size",
        lambda: F.scaled_avg_pool(torch.ones(1, 4, 4), (2, 2, 2, 2)),
    ),
    ("space_to_depth", "spatial_sizes", lambda: F.space_to_depth(WIDE, 3, 2)),
    ("depth_to_space", "channels", lambda: F.depth_to_space(WIDE, 3, 2)),
    ("spatial_shift", "fraction", lambda: F.spatial_shift(WIDE, 2.0)),
    ("symmetric_pad", "pad", lambda: F.symmetric_pad(WIDE, (1,))),
    ("mod_relu", "x", lambda: F.mod_relu(X, torch.ones(5))),
    ("n_activation", "theta", lambda: F.n_activation(X, torch.ones(2, 3))),
    ("group_sort", "dim", lambda: F.group_sort(X, 2, dim=9)),
    ("group_sort", "group_size", lambda: F.group_sort(X, "2")),
    ("max_min", "dim", lambda: F.max_min(X, "c")),
    ("global_l2_norm_pool", "shape", lambda: F.global_l2_norm_pool(X, 3)),
]


TABLES = {
    name: table for name, table in list(globals().items()) if name.isupper() and type(table) is list
}


@pytest.mark.parametrize("name", TABLES)
def test_a_mistake_is_answered_by_one_sentence(name, caplog, capfd):
    assert answered_badly(TABLES[name], caplog, capfd) == []


def test_there_are_as_many_mistakes_as_were_asked_for():
    assert sum(map(len, TABLES.values())) >= 80


def test_a_file_that_is_no_certificate_is_refused_by_one_sentence(tmp_path):
    path = tmp_path / "certificate.json"
    for content in (b"", b"text", b"[]", b"\xff\xfe", b"{}"):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"LipschitzCertificate: the file must be of the format .*got path="
        ):
            orthonet.LipschitzCertificate.load(path)
    with pytest.raises(ValueError, match=r"path must be that of a file, got path=.*nothing"):
        orthonet.LipschitzCertificate.load(tmp_path / "nothing.json")
