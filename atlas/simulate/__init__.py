"""Counts of several studies with known truth, as h5ad files, for the demo, tests and benchmarks.

The truth, in the order in which it is drawn:

1. A cell type is a curve in a latent space of 10 dimensions, a centre and a direction; a *state* is
   one of 16 points spread evenly along it. A cell is in one state of its type, each as likely. On a
   tree (:mod:`atlas.simulate.tree`) the states lie along its branches.
2. Gene g has log expression ``min(baseline_g + loadings_g · z, 5.5)``. One gene in five has
   loadings, on a tree almost all. The softmax over all genes is the state's ``rho``.
3. A batch multiplies rho by a log-normal factor per gene (the study's times the batch's own) and
   rho is normalised again. A cell's library is log-normal around its batch's location.
4. The count of gene g is zero with probability ``1 / (1 + exp(-dropout_logit_g))`` and otherwise
   negative binomial with mean ``library × rho_g`` and inverse dispersion ``theta_g``: variance
   ``μ + μ² / theta_g``. Or it comes from transcripts that are captured, amplified and sequenced
   (:mod:`atlas.simulate.capture`).

Types have unequal shares, which vary a little from study to study, and where there are several
studies and types each study lacks one type. A gene that a study has not measured is absent from its
file; the other counts are what they would have been, the library still sums over all genes.

Each cell, or block of cells, draws from a generator of its own, so that the files depend on the
arguments and not on the number of threads.
"""

from atlas.simulate.capture import Capture, CaptureGenes
from atlas.simulate.cells import UNLABELED, Process
from atlas.simulate.studies import CAPTURE_FILE, TREE_FILE, TRUTH_FILE, simulate
from atlas.simulate.tree import END_RADIUS, STATES_PER_BRANCH, Tree, draw_tree
from atlas.simulate.truth import N_LATENT, STATES_PER_TYPE, Truth, draw_truth

__all__ = [
    "CAPTURE_FILE",
    "END_RADIUS",
    "N_LATENT",
    "STATES_PER_BRANCH",
    "STATES_PER_TYPE",
    "TREE_FILE",
    "TRUTH_FILE",
    "UNLABELED",
    "Capture",
    "CaptureGenes",
    "Process",
    "Tree",
    "Truth",
    "draw_tree",
    "draw_truth",
    "simulate",
]
