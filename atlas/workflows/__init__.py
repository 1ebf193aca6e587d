"""The steps of the main job, each a function from stores and folders to stores and folders.

This is the only place where stores, models, training and evaluation are wired together.
"""

from atlas.workflows.baselines import baseline
from atlas.workflows.data import StoreInfo, export, info, ingest, select_genes
from atlas.workflows.differential import differential_expression
from atlas.workflows.embedding import embed
from atlas.workflows.expression import (
    dropout_probability,
    impute,
    normalized,
    posterior_predictive,
)
from atlas.workflows.keeping import checkout, history, keep, named, stored_model
from atlas.workflows.labelling import label, label_probabilities
from atlas.workflows.living import update
from atlas.workflows.maintenance import verify
from atlas.workflows.measuring import beside
from atlas.workflows.modelling import train
from atlas.workflows.output import check_file, write_json, write_text
from atlas.workflows.per_batch import embed_per_batch
from atlas.workflows.posterior import (
    latent_posterior,
    library_posterior,
    likelihood,
    posterior_table,
)
from atlas.workflows.projecting import project
from atlas.workflows.results import check_scores_path, compare, evaluate, report, write_scores
from atlas.workflows.scaling import bench
from atlas.workflows.seeding import SeedLabels, seed_labels
from atlas.workflows.sharing import check_target, prepare_share, share
from atlas.workflows.surgery import extend_reference
from atlas.workflows.transfer_result import TransferredLabels
from atlas.workflows.transferring import transfer_labels
from atlas.workflows.unfinished import UnfinishedUpdate, discard_update, unfinished_updates

__all__ = [
    "SeedLabels",
    "StoreInfo",
    "TransferredLabels",
    "UnfinishedUpdate",
    "baseline",
    "bench",
    "beside",
    "check_file",
    "check_scores_path",
    "check_target",
    "checkout",
    "compare",
    "differential_expression",
    "discard_update",
    "dropout_probability",
    "embed",
    "embed_per_batch",
    "evaluate",
    "export",
    "extend_reference",
    "history",
    "impute",
    "info",
    "ingest",
    "keep",
    "label",
    "label_probabilities",
    "latent_posterior",
    "library_posterior",
    "likelihood",
    "named",
    "normalized",
    "posterior_predictive",
    "posterior_table",
    "prepare_share",
    "project",
    "report",
    "seed_labels",
    "select_genes",
    "share",
    "stored_model",
    "train",
    "transfer_labels",
    "unfinished_updates",
    "update",
    "verify",
    "write_json",
    "write_scores",
    "write_text",
]
