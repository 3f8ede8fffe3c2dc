"""Recipes: from a name to a trained, certified and attacked network, with its files.

A recipe is a function that returns a frozen [`TrainConfig`][orthonet.recipes.TrainConfig];
[`train`][orthonet.recipes.train] carries it out. Data, figures and progress bars need the extra
`demo`.
"""

from orthonet.recipes.beyond.distance import SDFConfig, Trace, sphere_trace, train_sdf
from orthonet.recipes.beyond.flow import FlowConfig, Inverse, ResidualFlow, invert, train_flow
from orthonet.recipes.beyond.report import BeyondReport
from orthonet.recipes.beyond.wasserstein import W1Config, train_w1
from orthonet.recipes.data.cifar import load_cifar10, load_cifar100
from orthonet.recipes.data.digits import Images, Split, stratified_split
from orthonet.recipes.data.folder import ImageFolders
from orthonet.recipes.data.series import Series, SeriesSplit, load_series
from orthonet.recipes.data.sets import load
from orthonet.recipes.downstream.conformal import ConformalConfig, train_conformal
from orthonet.recipes.downstream.regression import RegressionConfig, train_regression
from orthonet.recipes.downstream.segmentation import SegmentationConfig, train_segmentation
from orthonet.recipes.images.certify import certify_checkpoint
from orthonet.recipes.images.checkpoint import load_checkpoint, save_checkpoint
from orthonet.recipes.images.config import ORTHO_PARAMS, CertifyConfig, FolderConfig, TrainConfig
from orthonet.recipes.images.evaluate import Evaluation, evaluate
from orthonet.recipes.images.named import (
    cifar10_xs,
    cifar100_xs,
    demo,
    digits,
    fashion,
    folder,
    mnist,
    mnist5k,
)
from orthonet.recipes.images.report import Report
from orthonet.recipes.images.run import train
from orthonet.recipes.images.spectra import Spectrum, layer_spectra
from orthonet.recipes.images.train import fit
from orthonet.recipes.named.certify import certify_named
from orthonet.recipes.named.convert import convert_file
from orthonet.recipes.running.options import Option, option
from orthonet.recipes.running.registry import Recipe, register, registered
from orthonet.recipes.sequences.config import SequenceConfig
from orthonet.recipes.sequences.gradient_flow import gradient_norms
from orthonet.recipes.sequences.named import copying, seq_mnist
from orthonet.recipes.sequences.run import SequenceReport, SequenceResult, train_sequences
from orthonet.recipes.sequences.series import (
    SeriesConfig,
    SeriesReport,
    SeriesResult,
    train_series,
)
from orthonet.recipes.text.data import python_topics
from orthonet.recipes.text.models import LipschitzCharacters, PlainCharacters
from orthonet.recipes.text.train import TextConfig, train_text
from orthonet.recipes.zoo.bench import bench_zoo
from orthonet.recipes.zoo.config import ZooConfig
from orthonet.recipes.zoo.report import ZooReport

__all__ = [
    "BeyondReport",
    "CertifyConfig",
    "ConformalConfig",
    "Evaluation",
    "FlowConfig",
    "FolderConfig",
    "ImageFolders",
    "Images",
    "Inverse",
    "LipschitzCharacters",
    "ORTHO_PARAMS",
    "Option",
    "PlainCharacters",
    "Recipe",
    "RegressionConfig",
    "Report",
    "ResidualFlow",
    "SDFConfig",
    "SegmentationConfig",
    "SequenceConfig",
    "SequenceReport",
    "SequenceResult",
    "Series",
    "SeriesConfig",
    "SeriesReport",
    "SeriesResult",
    "SeriesSplit",
    "Spectrum",
    "Split",
    "TextConfig",
    "Trace",
    "TrainConfig",
    "W1Config",
    "ZooConfig",
    "ZooReport",
    "bench_zoo",
    "certify_checkpoint",
    "certify_named",
    "cifar100_xs",
    "cifar10_xs",
    "convert_file",
    "copying",
    "demo",
    "digits",
    "evaluate",
    "fashion",
    "fit",
    "folder",
    "gradient_norms",
    "invert",
    "layer_spectra",
    "load",
    "load_checkpoint",
    "load_cifar10",
    "load_cifar100",
    "load_series",
    "mnist",
    "mnist5k",
    "option",
    "python_topics",
    "register",
    "registered",
    "save_checkpoint",
    "seq_mnist",
    "sphere_trace",
    "stratified_split",
    "train",
    "train_conformal",
    "train_flow",
    "train_regression",
    "train_sdf",
    "train_segmentation",
    "train_sequences",
    "train_series",
    "train_text",
    "train_w1",
]
