"""What a user gets wrong is answered by one sentence: who, which argument, its value, what to do.

Each row: who answers, the argument that is named, and the call.
"""

import functools
import logging
import re

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
from orthonet import reparametrizers as R
from orthonet.errors import InPlaceEditWarning, ProjectionWarning
from orthonet.layers import OrthoConv2d as OC
from orthonet.layers import OrthoLinear as OL

F8 = torch.float8_e4m3fn
X, Y = torch.ones(2, 4), torch.tensor([0, 1])
IMAGES = torch.ones(2, 4, 6, 6)
LOGITS = torch.ones(2, 3)
EYE, INTS = torch.eye(4), torch.ones(4, 4, dtype=torch.int64)
NAN, ARRAY = torch.full((4, 4), float("nan")), np.eye(4, dtype=np.float32)
PLAIN, ORTHO, CONV, RNN = (
    nn.Linear(4, 3).eval(),
    OL(4, 4).eval(),
    OC(4, 4, 3),
    layers.OrthoRNN(4, 4),
)
META = OL(4, 4, device="meta")


@functools.cache
def certificate():
    return orthonet.certify(PLAIN, X)


def linear():
    return nn.Linear(4, 4)


def network():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def definite():
    return C.positive_definite(linear())


def point():
    return nn.Parameter(torch.eye(4))


PRESETS_AND_SIZES = [
    ("OrthoLinear", "ortho_params", lambda: OL(4, 4, ortho_params="choleski")),
    ("OrthoLinear", "ortho_params", lambda: OL(4, 4, ortho_params=None)),
    ("OrthoLinear", "ortho_params", lambda: OL(4, 4, ortho_params=R.OrthoParams)),
    ("OrthoLinear", "ortho_params", lambda: OL(4, 4, ortho_params=R.BatchedQROrthogonalization)),
    ("OrthoLinear", "ortho_params", lambda: OL(4, 4, ortho_params=nn.ReLU())),
    ("OrthoLinear", "ortho_params", lambda: OL(4, 4, ortho_params={"niters": 3})),
    ("OrthoConv2d", "ortho_params", lambda: OC(4, 4, 3, ortho_params=7)),
    (
        "OrthoConvTranspose2d",
        "ortho_params",
        lambda: layers.OrthoConvTranspose2d(4, 4, 3, ortho_params=""),
    ),
    ("OrthoGRU", "ortho_params", lambda: layers.OrthoGRU(4, 4, ortho_params=None)),
    ("OrthoLSTMCell", "ortho_params", lambda: layers.OrthoLSTMCell(4, 4, ortho_params="newton")),
    ("LipNeXtBlock2d", "ortho_params", lambda: layers.LipNeXtBlock2d(4, 4, ortho_params="newton")),
    (
        "OrthoParams",
        "orthogonalizer",
        lambda: OL(
            4, 4, ortho_params=R.OrthoParams(R.BatchedQROrthogonalization, R.BatchedPowerIteration)
        ),
    ),
    ("OrthoParams", "orthogonalizer", lambda: R.OrthoParams(orthogonalizer="qr")),
    (
        "OrthoParams",
        "orthogonalizer",
        lambda: R.OrthoParams(orthogonalizer=R.BatchedQROrthogonalization((4, 4))),
    ),
    ("OrthoParams", "spectral_normalizer", lambda: R.OrthoParams(None)),
    ("OrthoParams", "field", lambda: R.OrthoParams(normalizer=R.BatchedIdentity)),
    ("OrthoLinear", "bias", lambda: OL(4, 4, orthonet.QR_ORTHO_PARAMS)),
    ("OrthoLinear", "bias", lambda: OL(4, 4, "no")),
    ("OrthoLinear", "bias", lambda: OL(4, 4, None)),
    ("OrthoConv2d", "bias", lambda: OC(4, 4, 3, bias="no")),
    ("OrthoLinear", "in_features", lambda: OL(0, 4)),
    ("OrthoLinear", "in_features", lambda: OL(-4, 4)),
    ("OrthoLinear", "in_features", lambda: OL(4.0, 4)),
    ("OrthoLinear", "in_features", lambda: OL("4", 4)),
    ("OrthoLinear", "in_features", lambda: OL((4,), 4)),
    ("OrthoLinear", "out_features", lambda: OL(4, True)),
    ("OrthoLinear", "dtype", lambda: OL(4, 4, dtype=F8)),
    ("OrthoLinear", "dtype", lambda: OL(4, 4, dtype=torch.int32)),
    ("OrthoLinear", "dtype", lambda: OL(4, 4, dtype=torch.complex64)),
    ("OrthoLinear", "dtype", lambda: OL(4, 4, dtype="float32")),
    ("OrthoLinear", "dtype", lambda: OL(4, 4, dtype=float)),
    ("OrthoLinear", "device", lambda: OL(4, 4, device="gpu")),
    ("OrthoLinear", "device", lambda: OL(4, 4, device=torch.float64)),
    ("OrthoLinear", "lipschitz", lambda: OL(4, 4, lipschitz=0)),
    ("OrthoLinear", "lipschitz", lambda: OL(4, 4, lipschitz=-1.0)),
    ("OrthoLinear", "lipschitz", lambda: OL(4, 4, lipschitz="1")),
    ("OrthoLinear", "lipschitz", lambda: OL(4, 4, lipschitz=float("nan"))),
    ("UnitNormLinear", "dtype", lambda: layers.UnitNormLinear(4, 4, dtype=F8)),
    ("UnitNormLinear", "dtype", lambda: layers.UnitNormLinear(4, 4, dtype=torch.int64)),
    ("AOLLinear", "dtype", lambda: layers.AOLLinear(4, 4, dtype=torch.int64)),
    ("AOLConv2d", "dtype", lambda: layers.AOLConv2d(4, 4, 3, dtype=torch.int64)),
    (
        "CayleyConv2d",
        "dtype",
        lambda: layers.CayleyConv2d(4, 4, 3, padding="same", dtype=torch.int64),
    ),
    ("SOCConv2d", "dtype", lambda: layers.SOCConv2d(4, 4, 3, dtype=torch.int64)),
    ("CPLLinear", "dtype", lambda: layers.CPLLinear(4, 4, dtype=F8)),
    ("SandwichLinear", "dtype", lambda: layers.SandwichLinear(4, 4, dtype=torch.complex64)),
    ("OrthoRNN", "dtype", lambda: layers.OrthoRNN(4, 4, dtype=torch.int64)),
    ("OrthoGRUCell", "dtype", lambda: layers.OrthoGRUCell(4, 4, dtype=F8)),
    ("LipNeXtBlock2d", "dtype", lambda: layers.LipNeXtBlock2d(4, 4, dtype=torch.int64)),
]

CONVOLUTIONS = [
    ("OrthoConv2d", "kernel_size", lambda: OC(4, 4, (3,))),
    ("OrthoConv2d", "kernel_size", lambda: OC(4, 4, 3.5)),
    ("OrthoConv2d", "kernel_size", lambda: OC(4, 4, 0)),
    ("OrthoConv2d", "kernel_size", lambda: OC(4, 4, "3")),
    ("OrthoConv2d", "kernel_size", lambda: OC(4, 4, (3, 3, 3))),
    ("OrthoConv2d", "kernel_size", lambda: OC(4, 4, None)),
    ("OrthoConv2d", "stride", lambda: OC(4, 4, 3, stride=0)),
    ("OrthoConv2d", "stride", lambda: OC(4, 4, 3, stride=-1)),
    ("OrthoConv2d", "stride", lambda: OC(4, 4, 3, stride=1.5)),
    ("OrthoConv2d", "stride", lambda: OC(4, 4, 3, stride=(1, 1, 1))),
    ("OrthoConv2d", "padding", lambda: OC(4, 4, 3, padding=-1)),
    ("OrthoConv2d", "padding", lambda: OC(4, 4, 3, padding="full")),
    ("OrthoConv2d", "padding", lambda: OC(4, 4, 3, padding=0.5)),
    ("OrthoConv2d", "padding", lambda: OC(4, 4, 3, padding=(1, 1, 1))),
    ("OrthoConv2d", "padding", lambda: OC(4, 4, 3, stride=2, padding="same")),
    ("OrthoConv2d", "dilation", lambda: OC(4, 4, 3, dilation=0)),
    ("OrthoConv2d", "dilation", lambda: OC(4, 4, 3, dilation=-2)),
    ("OrthoConv2d", "groups", lambda: OC(4, 4, 3, groups=3)),
    ("OrthoConv2d", "groups", lambda: OC(4, 4, 3, groups=0)),
    ("OrthoConv2d", "padding_mode", lambda: OC(4, 4, 3, padding_mode="wrap")),
    ("OrthoConv2d", "method", lambda: OC(4, 4, 3, method="bjorck")),
    ("OrthoConv2d", "ranks", lambda: OC(4, 4, 3, ranks="all")),
    ("OrthoConv2d", "kernel_size", lambda: OC(4, 8, 1, stride=2)),
    ("OrthoConv2d", "in_channels", lambda: OC(None, 8, 1)),
    ("OrthoConv2d", "lipschitz", lambda: OC(4, 8, 3, lipschitz=0.0)),
    ("OrthoConv2d", "dtype", lambda: OC(4, 8, 3, dtype=torch.int8)),
    ("OrthoConv1d", "kernel_size", lambda: layers.OrthoConv1d(4, 4, (3, 3))),
    ("OrthoConv3d", "kernel_size", lambda: layers.OrthoConv3d(4, 4, (3, 3))),
    ("OrthoConv3d", "stride", lambda: layers.OrthoConv3d(4, 4, 3, 0)),
    ("OrthoConvTranspose2d", "kernel_size", lambda: layers.OrthoConvTranspose2d(4, 4, 3.5)),
    ("OrthoConvTranspose2d", "stride", lambda: layers.OrthoConvTranspose2d(4, 4, 3, 0)),
    ("OrthoConvTranspose2d", "padding", lambda: layers.OrthoConvTranspose2d(4, 4, 3, 1, -1)),
    (
        "OrthoConvTranspose2d",
        "output_padding",
        lambda: layers.OrthoConvTranspose2d(4, 4, 3, 1, 0, -1),
    ),
    (
        "OrthoConvTranspose2d",
        "padding_mode",
        lambda: layers.OrthoConvTranspose2d(4, 4, 3, padding_mode="circle"),
    ),
    ("AOLConv2d", "kernel_size", lambda: layers.AOLConv2d(4, 4, 3.5)),
    ("AOLConv2d", "kernel_size", lambda: layers.AOLConv2d(4, 4, (3, 3, 3))),
    ("AOLConv2d", "stride", lambda: layers.AOLConv2d(4, 4, 3, stride=0)),
    ("AOLConv2d", "padding", lambda: layers.AOLConv2d(4, 4, 3, padding=-1)),
    ("AOLConv2d", "groups", lambda: layers.AOLConv2d(4, 4, 3, groups=3)),
    ("BROConv2d", "kernel_size", lambda: layers.BROConv2d(4, 4, 3.5, padding="same")),
    ("BROConv2d", "stride", lambda: layers.BROConv2d(4, 4, 3, stride=0)),
    (
        "CayleyConv2d",
        "padding_mode",
        lambda: layers.CayleyConv2d(4, 4, 3, padding="same", padding_mode="valid"),
    ),
    ("SOCConv2d", "kernel_size", lambda: layers.SOCConv2d(4, 4, "3")),
    ("SOCConv2d", "terms", lambda: layers.SOCConv2d(4, 4, 3, terms=0)),
    ("CPLConv2d", "kernel_size", lambda: layers.CPLConv2d(4, 4, 3.5)),
    ("CPLLinear", "activation", lambda: layers.CPLLinear(4, 4, activation="gelu")),
    ("SandwichConv2d", "kernel_size", lambda: layers.SandwichConv2d(4, 4, None)),
    ("LipNeXtBlock2d", "fraction", lambda: layers.LipNeXtBlock2d(4, 4, fraction=2)),
    ("make_linear", "name", lambda: layers.make_linear("cayly", 4, 4)),
    ("make_conv", "name", lambda: layers.make_conv("unit_norm", 4, 4, 3)),
    ("available", "kind", lambda: layers.available("dense")),
    ("method", "name", lambda: layers.method("x")),
]

ACTIVATIONS_POOLING_NORMS = [
    ("MaxMin", "dim", lambda: layers.MaxMin("x")),
    ("MaxMin", "dim", lambda: layers.MaxMin(1.5)),
    ("max_min", "channels", lambda: layers.MaxMin()(torch.ones(2, 3))),
    ("max_min", "x", lambda: layers.MaxMin()(torch.ones(2, 4, dtype=torch.int64))),
    ("max_min", "x", lambda: layers.MaxMin()(torch.ones(2, 4, dtype=torch.complex64))),
    ("max_min", "x", lambda: layers.MaxMin()(np.ones((2, 4), dtype=np.float32))),
    ("max_min", "x", lambda: layers.MaxMin()([1.0, 2.0])),
    ("max_min", "dim", lambda: layers.MaxMin(dim=3)(X)),
    ("GroupSort", "group_size", lambda: layers.GroupSort(0)),
    ("GroupSort", "group_size", lambda: layers.GroupSort(2.0)),
    ("GroupSort", "dim", lambda: layers.GroupSort(2, dim=None)),
    ("group_sort", "channels", lambda: layers.GroupSort(3)(X)),
    ("group_sort", "x", lambda: layers.GroupSort(2)(X.int())),
    ("FullSort", "x", lambda: layers.FullSort()(X.to(torch.complex64))),
    ("HouseholderActivation", "channels", lambda: layers.HouseholderActivation(3)),
    ("HouseholderActivation", "channels", lambda: layers.HouseholderActivation("4")),
    ("BetaAbs", "beta", lambda: layers.BetaAbs(1.5)),
    ("SoftHuber", "delta", lambda: layers.SoftHuber(0)),
    ("NActivation", "channels", lambda: layers.NActivation(0)),
    ("ChannelShuffle", "groups", lambda: layers.ChannelShuffle(0)),
    ("L2NormPool", "kernel_size", lambda: layers.L2NormPool(0)),
    ("L2NormPool", "dims", lambda: layers.L2NormPool((2, 2, 2, 2))),
    ("L2NormPool", "kernel_size", lambda: layers.L2NormPool(2.5)),
    ("L2NormPool", "stride", lambda: layers.L2NormPool(2, stride=0)),
    ("L2NormPool", "padding", lambda: layers.L2NormPool(2, padding=-1)),
    ("ScaledAvgPool", "kernel_size", lambda: layers.ScaledAvgPool("2")),
    ("ScaledAvgPool", "stride", lambda: layers.ScaledAvgPool(2, stride=-2)),
    ("AdaptiveL2NormPool", "output_size", lambda: layers.AdaptiveL2NormPool(0)),
    ("AdaptiveL2NormPool", "dims", lambda: layers.AdaptiveL2NormPool((1, 1, 1, 1))),
    ("SpaceToDepth2d", "downscale_factor", lambda: layers.SpaceToDepth2d(0)),
    ("SpaceToDepth2d", "downscale_factor", lambda: layers.SpaceToDepth2d(2.0)),
    ("SpaceToDepth1d", "downscale_factor", lambda: layers.SpaceToDepth1d(-2)),
    ("space_to_depth", "spatial_sizes", lambda: layers.SpaceToDepth2d(4)(IMAGES)),
    ("PadToStride", "stride", lambda: layers.PadToStride(0)),
    ("Scale", "factor", lambda: layers.Scale("2")),
    ("Normalize", "std", lambda: layers.Normalize(0.5, 0.0)),
    ("Normalize", "mean", lambda: layers.Normalize("imagenet", 1.0)),
    ("LayerCentering", "dim", lambda: layers.LayerCentering("x")),
    ("BatchCentering", "num_features", lambda: layers.BatchCentering(0)),
    ("BatchCentering", "momentum", lambda: layers.BatchCentering(4, momentum=2.0)),
    ("BatchLipNorm", "num_features", lambda: layers.BatchLipNorm("4")),
    ("BatchLipNorm", "eps", lambda: layers.BatchLipNorm(4, eps=-1)),
    ("ConvexResidual", "branch", lambda: layers.ConvexResidual(3)),
    ("FirstChannels", "channels", lambda: layers.FirstChannels(0)),
]

RECURRENT = [
    ("OrthoRNN", "hidden_size", lambda: layers.OrthoRNN(4, 0)),
    ("OrthoRNN", "input_size", lambda: layers.OrthoRNN(4.0, 4)),
    ("OrthoRNN", "num_layers", lambda: layers.OrthoRNN(4, 4, 0)),
    ("OrthoRNN", "nonlinearity", lambda: layers.OrthoRNN(4, 4, nonlinearity="gelu")),
    ("OrthoRNN", "dropout", lambda: layers.OrthoRNN(4, 4, dropout=2.0)),
    ("OrthoRNN", "init", lambda: layers.OrthoRNN(4, 4, init="eye")),
    ("OrthoRNN", "triv", lambda: layers.OrthoRNN(4, 4, triv="cayley", ortho_params="qr")),
    ("OrthoLSTM", "proj_size", lambda: layers.OrthoLSTM(4, 4, proj_size=9)),
    ("ContractiveRNN", "leak", lambda: layers.ContractiveRNN(4, 4, leak=0)),
    ("ContractiveRNN", "contraction", lambda: layers.ContractiveRNN(4, 4, contraction=1.5)),
    ("OrthoRNN", "input", lambda: RNN(torch.ones(2, 3, 5))),
    ("OrthoRNN", "input", lambda: RNN(torch.ones(0, 3, 4))),
    ("OrthoRNN", "input", lambda: RNN(np.ones((2, 3, 4), dtype=np.float32))),
    ("OrthoRNN", "hx", lambda: RNN(torch.ones(2, 3, 4), torch.ones(2, 3, 4))),
    ("OrthoRNN", "batch_first", lambda: layers.OrthoRNN(4, 4, batch_first="yes")),
]

INPUTS = [
    ("OrthoLinear", "device", lambda: META(X)),
    ("OrthoConv2d", "device", lambda: OC(4, 4, 3, device="meta")(IMAGES)),
    ("AOLLinear", "input", lambda: layers.AOLLinear(4, 4)(torch.ones(2, 5))),
    ("OrthoLinear", "input", lambda: ORTHO(np.ones((2, 4), dtype=np.float32))),
    ("OrthoLinear", "input", lambda: ORTHO([1.0, 2.0, 3.0, 4.0])),
    ("OrthoLinear", "input", lambda: ORTHO(torch.ones(2, 5))),
    ("OrthoLinear", "input", lambda: ORTHO(torch.ones(2, 4).long())),
    ("OrthoLinear", "y", lambda: ORTHO.adjoint(torch.ones(2, 5))),
    ("OrthoLinear", "out_features", lambda: OL(4, 5).inverse(torch.ones(2, 5))),
    ("OrthoConv2d", "input", lambda: CONV(np.ones((2, 4, 6, 6), dtype=np.float32))),
    ("OrthoConv2d", "input", lambda: CONV(torch.ones(2, 3, 6, 6))),
    ("OrthoConv2d", "input", lambda: CONV(torch.ones(4, 4))),
]

WEIGHTS = [
    ("OrthoLinear", "distance", lambda: setattr(ORTHO, "weight", torch.ones(4, 4))),
    ("OrthoLinear", "weight", lambda: setattr(ORTHO, "weight", torch.eye(5))),
    ("OrthoLinear", "weight", lambda: setattr(ORTHO, "weight", np.eye(4))),
    (
        "OrthoLinear",
        "weight",
        lambda: setattr(ORTHO, "weight", torch.eye(4).to(torch.complex64) * 1j),
    ),
    ("OrthoLinear", "weight", lambda: setattr(ORTHO, "weight", torch.full((4, 4), float("nan")))),
    ("OrthoLinear", "weight", lambda: setattr(ORTHO, "weight", 3)),
    ("OrthoLinear", "weight", lambda: ORTHO.project_(np.eye(4))),
    ("OrthoLinear", "weight", lambda: ORTHO.project_(torch.full((4, 4), float("inf")))),
    ("OrthoLinear", "weight", lambda: ORTHO.project_(torch.eye(3))),
    ("OrthoLinear", "weight", lambda: ORTHO.project_(torch.eye(4).to(torch.complex64) * 1j)),
    ("OrthoConv2d", "relative_distance", lambda: setattr(CONV, "weight", torch.ones(4, 4, 3, 3))),
    (
        "UnitNormLinear",
        "relative_distance",
        lambda: setattr(layers.UnitNormLinear(4, 4), "weight", torch.ones(4, 4)),
    ),
    ("UnitNormLinear", "weight", lambda: layers.UnitNormLinear(4, 4).project_(np.eye(4))),
]

CERTIFY = [
    ("certify", "model", lambda: orthonet.certify(3, X)),
    ("certify", "model", lambda: orthonet.certify(PLAIN.state_dict(), X)),
    ("certify", "model", lambda: orthonet.certify(nn.Linear, X)),
    ("certify", "model", lambda: orthonet.certify(X, PLAIN)),
    ("certify", "example_input", lambda: orthonet.certify(PLAIN, None)),
    ("certify", "example_input", lambda: orthonet.certify(PLAIN, (4,))),
    ("certify", "example_input", lambda: orthonet.certify(PLAIN, np.ones((2, 4)))),
    ("certify", "example_input", lambda: orthonet.certify(PLAIN, 4)),
    ("certify", "example_input", lambda: orthonet.certify(PLAIN, "4")),
    ("certify", "example_input", lambda: orthonet.certify(PLAIN, ())),
    ("certify", "example_input", lambda: orthonet.certify(PLAIN, {"x": X})),
    ("certify", "example_input", lambda: orthonet.certify(PLAIN, [(X, Y)])),
    ("certify", "example_input", lambda: orthonet.certify(PLAIN, torch.ones(2, 5))),
    ("certify", "example_input", lambda: orthonet.certify(PLAIN, torch.ones(2, 4).long())),
    ("certify", "example_input", lambda: orthonet.certify(PLAIN, torch.full((2, 4), float("nan")))),
    ("certify", "example_input", lambda: orthonet.certify(PLAIN, torch.tensor(1.0))),
    ("certify", "example_input", lambda: orthonet.certify(PLAIN, torch.ones(2, 4, device="meta"))),
    ("certify", "example_input", lambda: orthonet.certify(PLAIN, (X, X))),
    ("certify", "example_input", lambda: orthonet.certify(PLAIN, torch.ones(4))),
    ("certify", "path", lambda: orthonet.certify(META.eval(), X)),
    ("certify", "effort", lambda: orthonet.certify(PLAIN, X, effort="high")),
    ("certify", "effort", lambda: orthonet.certify(PLAIN, X, effort=["fast"])),
    ("certify", "autocast", lambda: orthonet.certify(PLAIN, X, autocast=True)),
    ("certify", "progress", lambda: orthonet.certify(PLAIN, X, progress=True)),
    ("certify", "lower", lambda: orthonet.certify(PLAIN, X, lower="no")),
    ("summary", "model", lambda: orthonet.summary(PLAIN.state_dict())),
    ("summary", "model", lambda: orthonet.summary(X)),
    ("summary", "example_input", lambda: orthonet.summary(PLAIN, 4)),
    ("summary", "example_input", lambda: orthonet.summary(PLAIN, (2, 4))),
]

CERTIFICATE = [
    ("LipschitzCertificate", "logits", lambda: certificate().radius(PLAIN(X)[0])),
    ("LipschitzCertificate", "logits", lambda: certificate().radius(PLAIN(X).detach().numpy())),
    ("LipschitzCertificate", "logits", lambda: certificate().radius([[1.0, 2.0, 3.0]])),
    ("LipschitzCertificate", "logits", lambda: certificate().radius(torch.ones(2, 5))),
    ("LipschitzCertificate", "logits", lambda: certificate().radius(torch.ones(2, 3).long())),
    (
        "LipschitzCertificate",
        "logits",
        lambda: certificate().radius(torch.full((2, 3), float("nan"))),
    ),
    ("LipschitzCertificate", "x", lambda: certificate().radius()),
    ("LipschitzCertificate", "x", lambda: certificate().radius(PLAIN)),
    ("LipschitzCertificate", "inputs", lambda: certificate().radius(PLAIN, 3)),
    ("LipschitzCertificate", "first", lambda: certificate().radius(X, PLAIN)),
    ("LipschitzCertificate", "inputs", lambda: certificate().radius(PLAIN, torch.ones(2, 5))),
    ("LipschitzCertificate", "changed", lambda: certificate().radius(nn.Linear(4, 3).eval(), X)),
    ("LipschitzCertificate", "norm", lambda: certificate().radius(PLAIN, X, norm=2)),
    ("LipschitzCertificate", "norm", lambda: certificate().radius(PLAIN, X, norm="inf")),
    (
        "LipschitzCertificate",
        "labels",
        lambda: certificate().radius(PLAIN, X, labels=torch.ones(2)),
    ),
    (
        "LipschitzCertificate",
        "labels",
        lambda: certificate().radius(PLAIN, X, labels=torch.tensor([0, 3])),
    ),
    ("LipschitzCertificate", "labels", lambda: certificate().radius(PLAIN, X, labels=[0, 1])),
    (
        "LipschitzCertificate",
        "labels",
        lambda: certificate().radius(PLAIN, X, labels=np.array([0, 1])),
    ),
    ("LipschitzCertificate", "target", lambda: certificate().radius(PLAIN, X, target=1)),
    ("LipschitzCertificate", "radius", lambda: certificate().band(-1.0)),
    ("LipschitzCertificate", "radius", lambda: certificate().band(float("nan"))),
    ("LipschitzCertificate", "radius", lambda: certificate().band("0.1")),
    ("certified_accuracy", "labels", lambda: certificate().curve(PLAIN(X), torch.ones(2))),
    ("certified_accuracy", "labels", lambda: certificate().curve(PLAIN(X), [0, 1])),
    ("certified_accuracy", "radii", lambda: certificate().certified_accuracy(PLAIN(X), Y, 0.1)),
    ("certified_accuracy", "radii", lambda: certificate().certified_accuracy(PLAIN(X), Y, [-0.1])),
    (
        "certified_accuracy",
        "labels",
        lambda: certificate().certified_accuracy(PLAIN(X), Y.float(), [0.1]),
    ),
    (
        "certified_accuracy",
        "labels",
        lambda: certificate().certified_accuracy(PLAIN(X), [0, 1], [0.1]),
    ),
    ("RadiusCurve", "radii", lambda: certificate().curve(PLAIN(X), Y).at(float("nan"))),
    ("RadiusCurve", "radii", lambda: certificate().curve(PLAIN(X), Y).at(-1)),
    ("RadiusCurve", "radii", lambda: certificate().curve(PLAIN(X), Y).at("0.1")),
    ("LipschitzCertificate", "inputs", lambda: certificate().rounding(3)),
    ("LipschitzCertificate", "inputs", lambda: certificate().rounding(torch.ones(2, 5))),
    ("LipschitzCertificate", "dtype", lambda: certificate().rounding(X, dtype=torch.int64)),
    ("LipschitzCertificate", "path", lambda: certificate().save("a.safetensors")),
    ("LipschitzCertificate", "path", lambda: certificate().save("report.html")),
    ("LipschitzCertificate", "path", lambda: certificate().save(3)),
    ("LipschitzCertificate", "model", lambda: certificate().matches(3)),
    ("LipschitzCertificate", "model", lambda: certificate().require_match(PLAIN.state_dict())),
]

DATA_AND_ATTACKS = [
    (
        "certified_accuracy",
        "loader",
        lambda: certify.certified_accuracy(PLAIN, certificate(), [(X, Y)], [0.1]),
    ),
    ("certified_accuracy", "loader", lambda: certify.certified_accuracy(PLAIN, X, [0.1])),
    ("certified_accuracy", "loader", lambda: certify.certified_accuracy([(X, Y)], PLAIN, [0.1])),
    ("certified_accuracy", "radii", lambda: certify.certified_accuracy(PLAIN, [(X, Y)], 0.1)),
    ("certified_accuracy", "radii", lambda: certify.certified_accuracy(PLAIN, [(X, Y)], [-0.1])),
    ("certified_accuracy", "radii", lambda: certify.certified_accuracy(PLAIN, [(X, Y)], ["0.1"])),
    (
        "certified_accuracy",
        "radii",
        lambda: certify.certified_accuracy(PLAIN, [(X, Y)], [float("nan")]),
    ),
    ("certified_accuracy", "batch", lambda: certify.certified_accuracy(PLAIN, (X, Y), [0.1])),
    ("certified_accuracy", "batch", lambda: certify.certified_accuracy(PLAIN, [X], [0.1])),
    (
        "certified_accuracy",
        "norm",
        lambda: certify.certified_accuracy(PLAIN, [(X, Y)], [0.1], norm="inf"),
    ),
    (
        "certified_accuracy",
        "certificate",
        lambda: certify.certified_accuracy(PLAIN, [(X, Y)], [0.1], 1.0),
    ),
    (
        "certified_accuracy",
        "training",
        lambda: certify.certified_accuracy(nn.Linear(4, 3), [(X, Y)], [0.1]),
    ),
    (
        "certified_accuracy",
        "inputs",
        lambda: certify.certified_accuracy(PLAIN, [(torch.ones(2, 5), Y)], [0.1], certificate()),
    ),
    (
        "certified_accuracy",
        "labels",
        lambda: certify.certified_accuracy(PLAIN, [(X, Y.float())], [0.1]),
    ),
    ("certified_curve", "loader", lambda: certify.certified_curve(PLAIN, X)),
    ("certified_curve", "model", lambda: certify.certified_curve(3, [(X, Y)])),
    ("evaluate", "model", lambda: orthonet.evaluate(PLAIN.state_dict(), [(X, Y)], [0.1])),
    ("evaluate", "model", lambda: orthonet.evaluate([(X, Y)], PLAIN, [0.1])),
    ("evaluate", "loader", lambda: orthonet.evaluate(PLAIN, certificate(), [(X, Y)], [0.1])),
    ("evaluate", "loader", lambda: orthonet.evaluate(PLAIN, X, Y)),
    ("evaluate", "radii", lambda: orthonet.evaluate(PLAIN, [(X, Y)], 0.1)),
    ("evaluate", "radii", lambda: orthonet.evaluate(PLAIN, [(X, Y)], [-1])),
    ("evaluate", "radii", lambda: orthonet.evaluate(PLAIN, [(X, Y)], None)),
    ("evaluate", "radii", lambda: orthonet.evaluate(PLAIN, [(X, Y)], [0.1, "b"])),
    ("evaluate", "batch", lambda: orthonet.evaluate(PLAIN, [(X, Y, Y)], [0.1])),
    ("evaluate", "batch", lambda: orthonet.evaluate(PLAIN, [{"x": X}], [0.1])),
    ("evaluate", "samples", lambda: orthonet.evaluate(PLAIN, [], [0.1])),
    ("evaluate", "training", lambda: orthonet.evaluate(nn.Linear(4, 3), [(X, Y)], [0.1])),
    ("evaluate", "certificate", lambda: orthonet.evaluate(PLAIN, [(X, Y)], [0.1], "default")),
    (
        "evaluate",
        "attack",
        lambda: orthonet.evaluate(PLAIN, [(X, Y)], [0.1], certificate(), attack="pgd"),
    ),
    (
        "evaluate",
        "steps",
        lambda: orthonet.evaluate(PLAIN, [(X, Y)], [0.1], certificate(), steps=0),
    ),
    (
        "evaluate",
        "bounds",
        lambda: orthonet.evaluate(PLAIN, [(X, Y)], [0.1], certificate(), bounds=1.0),
    ),
    (
        "LipschitzCertificate",
        "labels",
        lambda: orthonet.evaluate(PLAIN, [(X, Y.float())], [0.1], certificate()),
    ),
    (
        "evaluate",
        "inputs",
        lambda: orthonet.evaluate(PLAIN, [(torch.ones(2, 5), Y)], [0.1], certificate()),
    ),
    ("empirical_accuracy", "model", lambda: certify.empirical_accuracy(X, PLAIN, Y, [0.1])),
    ("empirical_accuracy", "x", lambda: certify.empirical_accuracy(PLAIN, [(X, Y)], Y, [0.1])),
    ("empirical_accuracy", "x", lambda: certify.empirical_accuracy(PLAIN, X.numpy(), Y, [0.1])),
    ("empirical_accuracy", "radii", lambda: certify.empirical_accuracy(PLAIN, X, Y, 0.1)),
    ("empirical_accuracy", "y", lambda: certify.empirical_accuracy(PLAIN, X, [0, 1], [0.1])),
    (
        "attack_certificate",
        "y",
        lambda: certify.attack_certificate(PLAIN, certificate(), X, Y.float()),
    ),
    (
        "attack_certificate",
        "y",
        lambda: certify.attack_certificate(PLAIN, certificate(), X, torch.zeros(3).long()),
    ),
    (
        "attack_certificate",
        "certificate",
        lambda: certify.attack_certificate(PLAIN, X, Y, certificate()),
    ),
    ("attack_certificate", "model", lambda: certify.attack_certificate(3, certificate(), X, Y)),
    (
        "attack_certificate",
        "x",
        lambda: certify.attack_certificate(PLAIN, certificate(), [(X, Y)], Y),
    ),
    ("pgd", "bounds", lambda: certify.attack_certificate(PLAIN, certificate(), X * 3, Y)),
    ("pgd_l2", "radius", lambda: certify.pgd_l2(PLAIN, X, Y, -0.1)),
    ("pgd_l2", "radius", lambda: certify.pgd_l2(PLAIN, X, Y, "0.1")),
    ("pgd_l2", "radius", lambda: certify.pgd_l2(PLAIN, X, Y, float("nan"))),
    ("pgd_l2", "steps", lambda: certify.pgd_l2(PLAIN, X, Y, 0.1, steps=0)),
    ("pgd_l2", "x", lambda: certify.pgd_l2(PLAIN, X.long(), Y, 0.1)),
    ("pgd_l2", "y", lambda: certify.pgd_l2(PLAIN, X, torch.tensor([0, 7]), 0.1)),
    ("pgd_l2", "bounds", lambda: certify.pgd_l2(PLAIN, X, Y, 0.1, bounds=(1.0, 0.0))),
    ("apgd_l2", "loss", lambda: certify.apgd_l2(PLAIN, X, Y, 0.1, loss="margin")),
    ("lipschitz_estimate", "model", lambda: certify.lipschitz_estimate(3, X)),
    ("lipschitz_estimate", "x", lambda: certify.lipschitz_estimate(PLAIN, (2, 4))),
    ("report_html", "certificate", lambda: certify.report_html(PLAIN)),
    (
        "report_html",
        "estimate",
        lambda: certify.report_html(certificate(), estimate=certify.Bound(1.0)),
    ),
    ("Bound", "value", lambda: certify.Bound(-1.0)),
    ("Bound", "value", lambda: certify.Bound("1")),
    ("Bound", "kind", lambda: certify.Bound(1.0, kind="lower")),
    ("mlp_bound", "layers", lambda: certify.mlp_bound(3)),
]

CONSTRAINTS = [
    ("constrain", "module", lambda: C.orthogonal(nn.Linear, "weight")),
    ("constrain", "module", lambda: C.orthogonal(EYE)),
    ("constrain", "module", lambda: C.orthogonal(nn.Parameter(EYE))),
    ("constrain", "module", lambda: C.orthogonal("weight", linear())),
    ("constrain", "tensor_name", lambda: C.orthogonal(linear(), "wieght")),
    ("constrain", "tensor_name", lambda: C.orthogonal(linear(), 3)),
    ("constrain", "tensor_name", lambda: C.orthogonal(linear(), "in_features")),
    ("constrain", "tensor_name", lambda: C.orthogonal(nn.Linear(4, 4, bias=False), "bias")),
    ("constrain", "tensor_name", lambda: C.orthogonal(layers.OrthoLinear(4, 4), "weight")),
    ("constrain", "tensor_name", lambda: C.orthogonal(network(), "weight")),
    ("constrain", "tensor_name", lambda: C.orthogonal(network(), "0.weight")),
    ("Stiefel", "shape", lambda: C.orthogonal(linear(), "bias")),
    ("orthogonal", "det", lambda: C.orthogonal(linear(), det=2)),
    ("Stiefel", "triv", lambda: C.orthogonal(linear(), triv=3)),
    ("constrain", "flatten", lambda: C.orthogonal(linear(), flatten="yes")),
    ("Stiefel", "distribution", lambda: C.orthogonal(linear(), init="ones")),
    ("constrain", "init", lambda: C.orthogonal(linear(), init=3)),
    ("constrain", "init", lambda: C.orthogonal(linear(), init=ARRAY)),
    ("constrain", "tensor_name", lambda: C.unitary(linear(), "w")),
    ("SO", "shape", lambda: C.orthogonal(nn.Linear(4, 3), det=1)),
    ("EigenParametrization", "distance", lambda: setattr(definite(), "weight", torch.zeros(4, 4))),
    ("PSD", "shape", lambda: C.positive_definite(nn.Linear(4, 3))),
    ("FixedRank", "rank", lambda: C.fixed_rank(linear(), "weight", rank=0)),
    ("FixedRank", "shape", lambda: C.fixed_rank(linear(), "weight", rank=9)),
    ("FixedRank", "rank", lambda: C.fixed_rank(linear(), "weight", rank=2.0)),
    ("LowRank", "rank", lambda: C.low_rank(linear(), "weight", rank="2")),
    ("Sphere", "radius", lambda: C.sphere(linear(), radius=-1.0)),
    ("Sphere", "radius", lambda: C.sphere(linear(), radius="1")),
    ("AlmostOrthogonal", "lam", lambda: C.almost_orthogonal(linear(), lam=2.0)),
    ("Bounded", "low", lambda: C.bounded(linear(), "weight", 1.0, 0.0)),
    ("NormBall", "radius", lambda: C.norm_ball(linear(), radius=0.0)),
    ("SpectralBall", "radius", lambda: C.spectral_ball(linear(), radius=-1.0)),
    ("constrain", "space", lambda: C.constrain(linear(), "weight", M.SO)),
    ("constrain", "space", lambda: C.constrain(linear(), "weight", "SO")),
    ("remove", "tensor_name", lambda: C.remove(linear(), "weight")),
    ("remove", "tensor_name", lambda: C.remove(C.orthogonal(linear()), "bias")),
    ("update_base", "tensor_name", lambda: orthonet.update_base(linear(), "weight")),
    ("update_base", "module", lambda: orthonet.update_base(EYE)),
    (
        "update_base",
        "optimizer",
        lambda: orthonet.update_base(C.orthogonal(linear()), optimizer="adam"),
    ),
    (
        "rebase_every",
        "steps",
        lambda: orthonet.rebase_every(
            C.orthogonal(linear()), torch.optim.SGD(linear().parameters(), 0.1), 0
        ),
    ),
    ("constraints", "tensor_name", lambda: C.assign(linear(), "w", EYE)),
    ("Linear", "weight", lambda: C.assign(C.orthogonal(linear()), "weight", ARRAY)),
    (
        "FrameTrivialization",
        "distance",
        lambda: setattr(C.orthogonal(linear()), "weight", torch.ones(4, 4)),
    ),
    (
        "FrameTrivialization",
        "shape",
        lambda: setattr(C.orthogonal(linear()), "weight", torch.ones(4, 3)),
    ),
    ("Linear", "weight", lambda: setattr(C.orthogonal(linear()), "weight", ARRAY)),
    ("Linear", "weight", lambda: setattr(C.orthogonal(linear()), "weight", 1.0)),
]

MANIFOLDS = [
    ("SO", "x", lambda: M.SO().contains(ARRAY)),
    ("SO", "x", lambda: M.SO().contains(3)),
    ("SO", "x", lambda: M.SO().project(ARRAY)),
    ("SO", "shape", lambda: M.SO().project(torch.eye(4)[:, :3])),
    ("Stiefel", "shape", lambda: M.Stiefel().project(torch.ones(4))),
    ("polar", "shape", lambda: M.Stiefel().project(NAN)),
    ("Stiefel", "x", lambda: M.Stiefel().project(INTS)),
    ("Stiefel", "shape", lambda: M.Stiefel().sample(4)),
    ("Stiefel", "shape", lambda: M.Stiefel().sample("44")),
    ("Stiefel", "shape", lambda: M.Stiefel().sample((4,))),
    ("Stiefel", "shape", lambda: M.Stiefel().sample((4, -1))),
    ("SO", "det", lambda: M.SO(det=0)),
    ("Sphere", "radius", lambda: M.Sphere(radius=0.0)),
    ("FixedRank", "rank", lambda: M.FixedRank(0)),
    ("FixedRank", "rank", lambda: M.FixedRank("2")),
    ("Bounded", "low", lambda: M.Bounded(2.0, 1.0)),
    ("ProductManifold", "spaces", lambda: M.ProductManifold(3)),
    ("Stiefel", "triv", lambda: M.Stiefel().parametrization((4, 4), triv="newton")),
]

OPTIMIZERS = [
    ("StiefelAdam", "params", lambda: optim.StiefelAdam(linear())),
    ("StiefelAdam", "params", lambda: optim.StiefelAdam([])),
    ("StiefelAdam", "params", lambda: optim.StiefelAdam(3)),
    ("StiefelAdam", "params", lambda: optim.StiefelAdam(point())),
    ("StiefelAdam", "params", lambda: optim.StiefelAdam(["weight"])),
    ("StiefelAdam", "params", lambda: optim.StiefelAdam(linear().state_dict())),
    ("StiefelAdam", "lr", lambda: optim.StiefelAdam([point()], lr=-1.0)),
    ("StiefelAdam", "lr", lambda: optim.StiefelAdam([point()], lr="0.1")),
    ("StiefelAdam", "lr", lambda: optim.StiefelAdam([point()], lr=None)),
    ("StiefelAdam", "betas", lambda: optim.StiefelAdam([point()], betas=(0.9, 1.0))),
    ("StiefelAdam", "betas", lambda: optim.StiefelAdam([point()], betas=0.9)),
    ("StiefelAdam", "eps", lambda: optim.StiefelAdam([point()], eps=-1.0)),
    ("StiefelAdam", "weight_decay", lambda: optim.StiefelAdam([point()], weight_decay=0.1)),
    ("StiefelAdam", "residual", lambda: optim.StiefelAdam([nn.Parameter(torch.ones(4, 4))])),
    ("StiefelAdam", "shape", lambda: optim.StiefelAdam([nn.Parameter(torch.ones(4))])),
    ("StiefelAdam", "dtype", lambda: optim.StiefelAdam([nn.Parameter(torch.eye(4).half())])),
    ("StiefelSGD", "params", lambda: optim.StiefelSGD(linear())),
    ("StiefelSGD", "lr", lambda: optim.StiefelSGD([point()], lr=float("nan"))),
    ("StiefelSGD", "momentum", lambda: optim.StiefelSGD([point()], momentum=-0.1)),
    ("StiefelMuon", "params", lambda: optim.StiefelMuon(linear())),
    ("StiefelMuon", "ns_steps", lambda: optim.StiefelMuon([point()], ns_steps=-1)),
    ("retract_after_step", "optimizer", lambda: optim.retract_after_step(linear())),
]

LOSSES = [
    ("kr", "input", lambda: losses.KRLoss()(LOGITS.numpy(), Y)),
    ("HKRLoss", "alpha", lambda: losses.HKRLoss(alpha=-1.0)),
    ("HKRLoss", "alpha", lambda: losses.HKRLoss(alpha="10")),
    ("OffsetCrossEntropyLoss", "offset", lambda: losses.OffsetCrossEntropyLoss(-1.0)),
    ("OffsetCrossEntropyLoss", "offset", lambda: losses.OffsetCrossEntropyLoss("1")),
    (
        "OffsetCrossEntropyLoss",
        "temperature",
        lambda: losses.OffsetCrossEntropyLoss(1.0, temperature=0.0),
    ),
    ("MultiMarginLoss", "margin", lambda: losses.MultiMarginLoss(-1.0)),
    (
        "offset_cross_entropy",
        "largest",
        lambda: losses.offset_cross_entropy(LOGITS, torch.tensor([0, 5]), offset=1.0),
    ),
    (
        "offset_cross_entropy",
        "target",
        lambda: losses.offset_cross_entropy(LOGITS, torch.zeros(3).long(), offset=1.0),
    ),
    (
        "offset_cross_entropy",
        "target",
        lambda: losses.offset_cross_entropy(LOGITS, torch.zeros(2), offset=1.0),
    ),
    (
        "offset_cross_entropy",
        "logits",
        lambda: losses.offset_cross_entropy(LOGITS[0], Y, offset=1.0),
    ),
    ("kr", "target", lambda: losses.kr(LOGITS[:, 0], torch.zeros(5))),
    ("trades", "logits", lambda: losses.trades(3, X, Y)),
]

FUNCTIONS = [
    ("absolute", "x", lambda: F.absolute([1.0])),
    ("l2_norm_pool", "x", lambda: F.l2_norm_pool(ARRAY, (2,))),
    ("l2_norm_pool", "kernel_size", lambda: F.l2_norm_pool(torch.ones(1, 4, 4), 0)),
    ("channel_shuffle", "channels", lambda: F.channel_shuffle(X, 3)),
    ("circular_pad", "pad", lambda: F.circular_pad(torch.ones(1, 1, 4), (9, 9))),
    ("householder", "x", lambda: F.householder(ARRAY, torch.ones(2))),
    ("polar", "w", lambda: L.polar(ARRAY)),
    ("polar", "shape", lambda: L.polar(torch.ones(4))),
    ("polar", "w", lambda: L.polar(INTS)),
    ("polar", "shape", lambda: L.polar(NAN)),
    ("polar", "niters", lambda: L.polar(EYE, niters=-1)),
    ("qr", "w", lambda: L.qr(3)),
    ("qr", "w", lambda: L.qr(INTS)),
    ("cholesky_qr", "w", lambda: L.cholesky_qr(ARRAY)),
    ("bjorck", "w", lambda: L.bjorck(ARRAY)),
    ("matrix_exponential", "a", lambda: L.matrix_exponential(ARRAY)),
    ("matrix_exponential", "shape", lambda: L.matrix_exponential(torch.ones(4, 3))),
    ("cayley", "shape", lambda: L.cayley(torch.ones(4, 3))),
    ("skew", "shape", lambda: L.skew(torch.ones(4, 3))),
    ("gram_iteration", "w", lambda: L.gram_iteration([1.0])),
    ("spectral_norm_bound", "matrix", lambda: L.spectral_norm_bound(ARRAY)),
    ("spectral_norm_bound", "matrix", lambda: L.spectral_norm_bound(torch.ones(4))),
    ("spectral_norm_bound", "tensor", lambda: L.spectral_norm_bound(NAN)),
    ("convolution_norm_bound", "kernel", lambda: L.convolution_norm_bound(ARRAY, (8, 8))),
    ("haar", "shape", lambda: L.haar(4)),
    ("haar", "shape", lambda: L.haar((4,))),
    ("haar", "shape", lambda: L.haar((4, -4))),
    ("haar", "dtype", lambda: L.haar((4, 4), dtype=torch.int64)),
    ("orthogonal_", "tensor", lambda: init.orthogonal_(ARRAY)),
    ("orthogonal_", "tensor", lambda: init.orthogonal_(linear())),
    ("orthogonal_", "tensor", lambda: init.orthogonal_(torch.ones(4))),
    ("orthogonal_", "tensor", lambda: init.orthogonal_(INTS)),
    ("conv_orthogonal_", "tensor", lambda: init.conv_orthogonal_(EYE)),
    ("conv_orthogonal_", "tensor", lambda: init.conv_orthogonal_(ARRAY)),
]

CONVERSION = [
    ("orthogonalize", "model", lambda: convert.orthogonalize(network().state_dict())),
    ("orthogonalize", "model", lambda: convert.orthogonalize(nn.Linear)),
    ("orthogonalize", "weights", lambda: convert.orthogonalize(network(), weights="keep")),
    (
        "orthogonalize",
        "rules",
        lambda: convert.orthogonalize(network(), weights="reset", rules=[1]),
    ),
    (
        "orthogonalize",
        "rules",
        lambda: convert.orthogonalize(network(), weights="reset", rules="qr"),
    ),
    (
        "orthogonalize",
        "rule",
        lambda: convert.orthogonalize(network(), weights="reset", rules={"layer9": True}),
    ),
    (
        "orthogonalize",
        "rule",
        lambda: convert.orthogonalize(network(), weights="reset", rules={"0": "qrr"}),
    ),
    (
        "orthogonalize",
        "keywords",
        lambda: convert.orthogonalize(network(), weights="reset", rules={"0": {"orth": 1}}),
    ),
    (
        "orthogonalize",
        "ortho_params",
        lambda: convert.orthogonalize(
            network(), weights="reset", rules={"0": {"ortho_params": "newton"}}
        ),
    ),
    (
        "orthogonalize",
        "rule",
        lambda: convert.orthogonalize(network(), weights="reset", rules={3: True}),
    ),
    ("orthogonalize", "norm", lambda: convert.orthogonalize(network(), norm="batch")),
    ("orthogonalize", "activation", lambda: convert.orthogonalize(network(), activation="relu")),
    ("orthogonalize", "pool", lambda: convert.orthogonalize(network(), pool="max")),
    ("orthogonalize", "downsample", lambda: convert.orthogonalize(network(), downsample="stride")),
    ("orthogonalize", "fallback", lambda: convert.orthogonalize(network(), fallback="none")),
    ("to_plain", "model", lambda: convert.to_plain(network().state_dict())),
    ("to_plain", "model", lambda: convert.to_plain(3)),
    ("on_manifold", "model", lambda: convert.on_manifold(3)),
    ("trivialize", "model", lambda: convert.trivialize(3)),
    ("trivialize", "ortho_params", lambda: convert.trivialize(network(), "newton")),
    ("manifold_groups", "model", lambda: convert.manifold_groups(network())),
]

REPARAMETRIZERS = [
    ("parameter_groups", "model", lambda: R.parameter_groups(3, lr=0.1)),
    ("parameter_groups", "model", lambda: R.parameter_groups(linear().parameters(), lr=0.1)),
    ("caching", "enabled", lambda: R.caching("yes")),
    ("invalidate", "module", lambda: R.invalidate(3)),
    ("register", "module", lambda: R.register(3, "weight", nn.Identity())),
    ("register", "tensor_name", lambda: R.register(linear(), "w", nn.Identity())),
    ("register", "parametrization", lambda: R.register(linear(), "weight", lambda w: w)),
    ("remove", "tensor_name", lambda: R.remove(linear(), "weight")),
    (
        "BatchedPowerIteration",
        "power_it_niter",
        lambda: R.BatchedPowerIteration((4, 4), power_it_niter=0),
    ),
    ("BatchedPowerIteration", "eps", lambda: R.BatchedPowerIteration((4, 4), eps=-1.0)),
    ("BatchedPowerIteration", "weight_shape", lambda: R.BatchedPowerIteration(4)),
    (
        "BatchedBjorckOrthogonalization",
        "beta",
        lambda: R.BatchedBjorckOrthogonalization((4, 4), beta=2.0),
    ),
    (
        "BatchedBjorckOrthogonalization",
        "weight_shape",
        lambda: R.BatchedBjorckOrthogonalization("44"),
    ),
    (
        "BatchedCholeskyOrthogonalization",
        "stable",
        lambda: R.BatchedCholeskyOrthogonalization((4, 4), stable="yes"),
    ),
    (
        "BatchedExponentialOrthogonalization",
        "niters",
        lambda: R.BatchedExponentialOrthogonalization((4, 4), niters=-1),
    ),
    ("OrthoWeight", "weight_shape", lambda: R.OrthoWeight((4,))),
    ("OrthoWeight", "dtype", lambda: R.OrthoWeight((4, 4), dtype=torch.int64)),
]

MODELS = [
    ("create", "name", lambda: models.create("resnet")),
    ("create", "arguments", lambda: models.create("convnet")),
    ("mlp", "hidden", lambda: models.mlp(4, 2, hidden=64)),
    ("mlp", "num_classes", lambda: models.mlp(4, 0)),
    ("mlp", "activation", lambda: models.mlp(4, 2, activation="gelu")),
    ("mlp", "head", lambda: models.mlp(4, 2, head="linear")),
    ("convnet", "in_shape", lambda: models.convnet(3, 10)),
    ("convnet", "in_shape", lambda: models.convnet((3, 32), 10)),
]


TABLES = {
    name: table for name, table in list(globals().items()) if name.isupper() and type(table) is list
}


def answered_badly(table, caplog, capfd):
    """The mistakes of a table that are accepted, or answered otherwise than by one sentence."""
    wrong = []
    with caplog.at_level(logging.WARNING):
        for owner, argument, call in table:
            text = "accepted"
            try:
                call()
            except (ValueError, TypeError) as error:
                text = str(error)
            got = rf"got ([^\n]*\W)?{re.escape(argument)}=[^\n]+"
            if not re.fullmatch(rf"{owner}: [^\n]+, {got}\. [^\n]+\.", text):
                wrong.append((owner, argument, text))
    assert caplog.records == [] and capfd.readouterr() == ("", "")  # nothing of torch's log
    return wrong


@pytest.mark.parametrize("name", TABLES)
def test_a_mistake_is_answered_by_one_sentence(name, caplog, capfd):
    assert answered_badly(TABLES[name], caplog, capfd) == []


def test_there_are_as_many_mistakes_as_were_asked_for():
    calls = [(owner, argument) for table in TABLES.values() for owner, argument, _ in table]
    assert len(calls) >= 58 + 77 + 15 + 80
    assert len({owner for owner, _ in calls}) > 100


def test_one_sample_is_not_read_as_a_batch_of_binary_ones():
    """Radii of squeezed logits were those of three binary samples, and far too large."""
    logits = PLAIN(X).detach()
    for one in (logits[0], logits[:1].squeeze(), logits[:, :1], logits[:, 0]):
        with pytest.raises(ValueError, match=r"LipschitzCertificate: logits must have 3 classes"):
            certificate().radius(one)
        with pytest.raises(ValueError, match=r"logits must have 3 classes"):
            certificate().certified_accuracy(one, torch.zeros(len(one)).long(), [0.1])
    assert certificate().radius(logits[:1]).shape == (1,)


def test_writes_without_effect_and_projections_of_nothing_are_warned_about():
    layer = OL(4, 4)
    with pytest.warns(InPlaceEditWarning, match="OrthoLinear|weight"):
        _ = nn.init.zeros_(layer.weight), layer.weight
    with pytest.warns(
        ProjectionWarning, match=r"OrthoLinear: the zero weight .*got weight="
    ) as seen:
        assert layer.project_(torch.zeros(4, 4)) == float("inf")
    assert "\n" not in str(seen[0].message)


def test_weights_that_are_not_finite_are_refused_when_they_are_read():
    layer = OL(4, 4)
    state = {
        k: v * float("nan") if v.is_floating_point() else v for k, v in layer.state_dict().items()
    }
    layer.load_state_dict(state)
    with pytest.raises(ValueError, match=r"polar: w must be finite, .*names it\.$"):
        _ = layer.weight
