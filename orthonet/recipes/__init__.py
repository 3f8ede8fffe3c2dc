"""Recipes: from a name to a trained, certified and attacked network, with its files.

A recipe is a function that returns a frozen [`TrainConfig`][orthonet.recipes.TrainConfig];
[`train`][orthonet.recipes.train] carries it out. Data, figures and progress bars need the extra
`demo`.
"""

from orthonet.recipes._checkpoint import load_checkpoint, save_checkpoint
from orthonet.recipes._config import ORTHO_PARAMS, RECIPES, TrainConfig, digits, mnist5k
from orthonet.recipes._data import Images, Split, load, stratified_split
from orthonet.recipes._evaluate import Evaluation, evaluate
from orthonet.recipes._gradient_flow import gradient_norms
from orthonet.recipes._run import Report, certify_checkpoint, train
from orthonet.recipes._sequence_config import (
    SEQUENCE_RECIPES,
    SequenceConfig,
    copying,
    seq_mnist,
)
from orthonet.recipes._sequence_run import SequenceReport, SequenceResult, train_sequences
from orthonet.recipes._spectra import Spectrum, layer_spectra
from orthonet.recipes._train import fit
from orthonet.recipes._zoo import ZooConfig, bench_zoo
from orthonet.recipes._zoo_report import ZooReport

__all__ = [
    "Evaluation",
    "Images",
    "ORTHO_PARAMS",
    "RECIPES",
    "Report",
    "SEQUENCE_RECIPES",
    "SequenceConfig",
    "SequenceReport",
    "SequenceResult",
    "Spectrum",
    "Split",
    "TrainConfig",
    "ZooConfig",
    "ZooReport",
    "bench_zoo",
    "certify_checkpoint",
    "copying",
    "digits",
    "evaluate",
    "fit",
    "gradient_norms",
    "layer_spectra",
    "load",
    "load_checkpoint",
    "mnist5k",
    "save_checkpoint",
    "seq_mnist",
    "stratified_split",
    "train",
    "train_sequences",
]
