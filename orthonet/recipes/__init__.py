"""Recipes: from a name to a trained, certified and attacked network, with its files.

A recipe is a function that returns a frozen [`TrainConfig`][orthonet.recipes.TrainConfig];
[`train`][orthonet.recipes.train] carries it out. Data, figures and progress bars need the extra
`demo`.
"""

from orthonet.recipes.beyond.distance import SDFConfig, Trace, sphere_trace, train_sdf
from orthonet.recipes.beyond.flow import FlowConfig, Inverse, ResidualFlow, invert, train_flow
from orthonet.recipes.beyond.report import BeyondReport
from orthonet.recipes.beyond.table import BEYOND_RECIPES
from orthonet.recipes.beyond.wasserstein import W1Config, train_w1
from orthonet.recipes.data.cifar import load_cifar10
from orthonet.recipes.data.digits import Images, Split, load, stratified_split
from orthonet.recipes.data.folder import ImageFolders
from orthonet.recipes.images.config import (
    ORTHO_PARAMS,
    RECIPES,
    FolderConfig,
    TrainConfig,
    cifar10_xs,
    digits,
    folder,
    mnist5k,
)
from orthonet.recipes.images.evaluate import Evaluation, evaluate
from orthonet.recipes.images.run import Report, certify_checkpoint, train
from orthonet.recipes.images.spectra import Spectrum, layer_spectra
from orthonet.recipes.images.train import fit
from orthonet.recipes.running.checkpoint import load_checkpoint, save_checkpoint
from orthonet.recipes.sequences.config import (
    SEQUENCE_RECIPES,
    SequenceConfig,
    copying,
    seq_mnist,
)
from orthonet.recipes.sequences.gradient_flow import gradient_norms
from orthonet.recipes.sequences.run import SequenceReport, SequenceResult, train_sequences
from orthonet.recipes.zoo.bench import ZooConfig, bench_zoo
from orthonet.recipes.zoo.report import ZooReport

__all__ = [
    "BEYOND_RECIPES",
    "BeyondReport",
    "Evaluation",
    "FlowConfig",
    "FolderConfig",
    "ImageFolders",
    "Images",
    "Inverse",
    "ORTHO_PARAMS",
    "RECIPES",
    "Report",
    "ResidualFlow",
    "SDFConfig",
    "SEQUENCE_RECIPES",
    "SequenceConfig",
    "SequenceReport",
    "SequenceResult",
    "Spectrum",
    "Split",
    "Trace",
    "TrainConfig",
    "W1Config",
    "ZooConfig",
    "ZooReport",
    "bench_zoo",
    "certify_checkpoint",
    "cifar10_xs",
    "copying",
    "digits",
    "evaluate",
    "fit",
    "folder",
    "gradient_norms",
    "invert",
    "layer_spectra",
    "load",
    "load_checkpoint",
    "load_cifar10",
    "mnist5k",
    "save_checkpoint",
    "seq_mnist",
    "sphere_trace",
    "stratified_split",
    "train",
    "train_flow",
    "train_sdf",
    "train_sequences",
    "train_w1",
]
