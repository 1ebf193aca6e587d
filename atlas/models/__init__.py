"""Models of counts: what they share, scVI, and trained models on disk."""

from atlas.models.base import Inputs, Losses, Model
from atlas.models.build import build_model
from atlas.models.likelihood import nb_loss, zinb_loss
from atlas.models.scvi import SCVI, ScviOutputs
from atlas.models.trained import TrainedModel, load_model

__all__ = [
    "SCVI",
    "Inputs",
    "Losses",
    "Model",
    "ScviOutputs",
    "TrainedModel",
    "build_model",
    "load_model",
    "nb_loss",
    "zinb_loss",
]
