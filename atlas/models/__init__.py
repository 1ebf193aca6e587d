"""Models: what they share, one file each, and trained models on disk."""

from atlas.models.base import Conditions, CovariateSizes, Inputs, Losses, Model
from atlas.models.build import build_model
from atlas.models.columns import ObsColumns
from atlas.models.davae import DAVAE
from atlas.models.labels import LabelTree
from atlas.models.likelihood import nb_loss, zinb_loss
from atlas.models.scanvi import SCANVI
from atlas.models.scvi import SCVI, ScviOutputs
from atlas.models.trained import TrainedModel, load_model
from atlas.models.trvae import TRVAE

__all__ = [
    "DAVAE",
    "SCANVI",
    "SCVI",
    "TRVAE",
    "Conditions",
    "CovariateSizes",
    "Inputs",
    "LabelTree",
    "Losses",
    "Model",
    "ObsColumns",
    "ScviOutputs",
    "TrainedModel",
    "build_model",
    "load_model",
    "nb_loss",
    "zinb_loss",
]
