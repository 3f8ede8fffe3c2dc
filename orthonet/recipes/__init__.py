"""Recipes: from a name to a trained, certified and attacked network, with its files.

A recipe is a function that returns a frozen [`TrainConfig`][orthonet.recipes.TrainConfig];
[`train`][orthonet.recipes.train] carries it out. Data, figures and progress bars need the extra
`demo`.
"""

from orthonet.recipes._checkpoint import load_checkpoint, save_checkpoint
from orthonet.recipes._config import ORTHO_PARAMS, RECIPES, TrainConfig, digits, mnist5k
from orthonet.recipes._data import Images, Split, load, stratified_split
from orthonet.recipes._evaluate import Evaluation, evaluate
from orthonet.recipes._run import Report, certify_checkpoint, train
from orthonet.recipes._spectra import Spectrum, layer_spectra
from orthonet.recipes._train import fit

__all__ = [
    "Evaluation",
    "Images",
    "ORTHO_PARAMS",
    "RECIPES",
    "Report",
    "Spectrum",
    "Split",
    "TrainConfig",
    "certify_checkpoint",
    "digits",
    "evaluate",
    "fit",
    "layer_spectra",
    "load",
    "load_checkpoint",
    "mnist5k",
    "save_checkpoint",
    "stratified_split",
    "train",
]
