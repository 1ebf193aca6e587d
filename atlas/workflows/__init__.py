"""The steps of the main job, each a function from stores and folders to stores and folders.

This is the only place where stores, models, training and evaluation are wired together.
"""

from atlas.workflows.data import StoreInfo, export, info, ingest, select_genes
from atlas.workflows.differential import differential_expression
from atlas.workflows.embedding import embed
from atlas.workflows.expression import (
    dropout_probability,
    impute,
    normalized,
    posterior_predictive,
)
from atlas.workflows.labelling import label, label_probabilities
from atlas.workflows.maintenance import verify
from atlas.workflows.modelling import train
from atlas.workflows.output import write_json
from atlas.workflows.posterior import latent_posterior, library_posterior, likelihood
from atlas.workflows.projecting import project
from atlas.workflows.results import evaluate, report
from atlas.workflows.seeding import SeedLabels, seed_labels
from atlas.workflows.surgery import extend_reference
from atlas.workflows.transfer_result import TransferredLabels
from atlas.workflows.transferring import transfer_labels

__all__ = [
    "SeedLabels",
    "StoreInfo",
    "TransferredLabels",
    "differential_expression",
    "dropout_probability",
    "embed",
    "evaluate",
    "export",
    "extend_reference",
    "impute",
    "info",
    "ingest",
    "label",
    "label_probabilities",
    "latent_posterior",
    "library_posterior",
    "likelihood",
    "normalized",
    "posterior_predictive",
    "project",
    "report",
    "seed_labels",
    "select_genes",
    "train",
    "transfer_labels",
    "verify",
    "write_json",
]
