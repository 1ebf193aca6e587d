"""One frozen dataclass per step of the main job; each goes to JSON and comes back checked."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from atlas.errors import ConfigError

GeneLikelihood = Literal["zinb", "nb", "poisson"]
Dispersion = Literal["gene", "gene-batch"]
Norm = Literal["layer", "batch"]
LibraryKind = Literal["observed", "latent", "size-factor"]
Precision = Literal["float32", "bfloat16"]
Profile = Literal["fast", "portable", "small"]
StoreFormat = Literal["zarr", "tiledb"]
Balance = Literal["none", "batch", "label"]
ScanviTraining = Literal["alternating", "joint", "scvi-tools"]
ExpressionLikelihood = Literal["nb", "zinb", "gaussian"]
MmdOn = Literal["decoder", "z"]
Strategy = Literal["conditions", "input_layers", "all"]
BenchTask = Literal["loader", "train", "embed", "neighbours", "update"]
"""What ``atlas bench`` measures."""

Initialisation = Literal["random", "zero", "mean", "nearest"]
MissingGenes = Literal["mask", "zero"]
BatchNames = Literal["no-donors", "all", "none"]
"""Which names of batches leave with a shared model: all but those of donors, all, or none."""
VoteKernel = Literal["gaussian", "scarches", "uniform"]


@dataclass(frozen=True, slots=True)
class _Config:
    """JSON in and out, with literal choices and types checked on the way in."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise ConfigError(
                    f"{name} has a value that is not offered",
                    found=repr(value),
                    expected=" or ".join(map(repr, get_args(hint))),
                )
        self._check()

    def _check(self) -> None:
        """Raise :class:`ConfigError` where a number is out of range."""

    def _require(self, name: str, condition: bool, expected: str) -> None:
        if not condition:
            raise ConfigError(
                f"{name} is out of range", found=repr(getattr(self, name)), expected=expected
            )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, one per field."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_json`; an unknown field is an error.

        A field that a later version added takes its default, which does as before.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not set(values) <= names:
            raise ConfigError(
                f"{cls.__name__} does not have these fields",
                found=", ".join(sorted(values)),
                expected=", ".join(sorted(names)),
            )
        return cls(**values)


@dataclass(frozen=True, slots=True)
class ScviConfig(_Config):
    """Architecture of scVI, with scvi-tools' names.

    The defaults are those of a reference that is meant for surgery (scArches, Lotfollahi et al.
    2022, Methods): two layers, LayerNorm, and an encoder that sees the batch.

    Attributes
    ----------
    n_layers, n_hidden
        Number and width of the hidden layers of encoder and decoder.
    n_latent
        Dimensions of z.
    dropout_rate
        Dropout in the encoder.
    gene_likelihood
        ``"zinb"``, ``"nb"`` or ``"poisson"``.
    dispersion
        Inverse dispersion per gene, or per gene and batch.
    norm
        LayerNorm or BatchNorm after each linear layer.
    encode_batch
        Whether the encoder sees the batch; without it surgery cannot move a query.
    library
        ``"observed"``: the sum over the modelled genes that the study has. ``"latent"``: inferred,
        with a log-normal prior per batch
        (scVI, Lopez et al. 2018, Methods). ``"size-factor"``: given for each cell; the genes' means
        are the size factor times the softplus of the decoder's output, as in scvi-tools.
    encode_covariates
        Whether the encoder sees the further covariates; the decoder always does.
    """

    n_layers: int = 2
    n_hidden: int = 128
    n_latent: int = 10
    dropout_rate: float = 0.1
    gene_likelihood: GeneLikelihood = "zinb"
    dispersion: Dispersion = "gene"
    norm: Norm = "layer"
    encode_batch: bool = True
    library: LibraryKind = "observed"
    encode_covariates: bool = False

    def _check(self) -> None:
        self._require("n_layers", self.n_layers >= 1, "at least 1")
        self._require("n_hidden", self.n_hidden >= 1, "at least 1")
        self._require("n_latent", self.n_latent >= 1, "at least 1")
        self._require("dropout_rate", 0 <= self.dropout_rate < 1, "in [0, 1)")


@dataclass(frozen=True, slots=True)
class ScanviConfig(ScviConfig):
    """Architecture of scANVI: that of scVI, and of what is above z (Xu et al. 2021).

    The defaults are the paper's for transferring labels between studies; its setting for seed
    labels in one study is a classifier of 2 layers of 256, trained for 1 epoch at a time (Online
    Methods, Hyperparameters).

    Attributes
    ----------
    training
        ``"alternating"``: the bound is maximised with the classifier fixed, and after each epoch
        the classifier is trained with the rest fixed on labelled cells, each label equally often
        (Supplementary Note 3, Algorithm 2). ``"joint"``: both at once (Algorithm 1).
        ``"scvi-tools"``: its objective, with the unlabelled cells' bound for all cells and a
        cross-entropy. In these two forms labels come as often as their cells, unless ``balance``
        is ``"label"``, and a minibatch has the labelled cells that it happens to have.
    classifier_layers, classifier_hidden
        Number and width of the hidden layers of the classifier.
    classifier_epochs
        Passes over the labelled cells after each epoch, with alternating training.
    classification_weight
        Weight of the cross-entropy, with joint training and in scvi-tools' objective.
    unobserved_classes
        Classes for types of cells that no label stands for.
    """

    training: ScanviTraining = "alternating"
    classifier_layers: int = 1
    classifier_hidden: int = 128
    classifier_epochs: int = 100
    classification_weight: float = 50.0
    unobserved_classes: int = 0

    def _check(self) -> None:
        # Without arguments super() does not know the class: slots make it anew.
        ScviConfig._check(self)
        self._require("classifier_layers", self.classifier_layers >= 0, "at least 0")
        self._require("classifier_hidden", self.classifier_hidden >= 1, "at least 1")
        self._require("classifier_epochs", self.classifier_epochs >= 1, "at least 1")
        self._require("classification_weight", self.classification_weight >= 0, "at least 0")
        self._require("unobserved_classes", self.unobserved_classes >= 0, "at least 0")


@dataclass(frozen=True, slots=True)
class TrvaeConfig(_Config):
    """Architecture of trVAE (scArches, Lotfollahi et al. 2022, Methods).

    Attributes
    ----------
    n_layers, n_hidden
        Number and width of the hidden layers of encoder and decoder.
    n_latent
        Dimensions of z.
    dropout_rate
        Dropout in encoder and decoder.
    gene_likelihood
        ``"nb"`` or ``"zinb"`` of counts, or ``"gaussian"`` of normalised expression: the logarithm
        of 1 plus the counts per 10,000.
    mmd_weight
        Weight of the maximum mean discrepancy (β), which is a mean over all pairs of batches that
        have two cells or more in the minibatch (``balance="batch"`` gives rare ones that many).
        scArches takes the sum: its weight times K (K - 1) / 2 is the same of K batches.
    mmd_on
        Where it is measured: at the output of the first layer of the decoder, as in the paper, or
        at z.
    """

    n_layers: int = 2
    n_hidden: int = 128
    n_latent: int = 10
    dropout_rate: float = 0.05
    gene_likelihood: ExpressionLikelihood = "nb"
    mmd_weight: float = 1.0
    mmd_on: MmdOn = "decoder"

    def _check(self) -> None:
        self._require("n_layers", self.n_layers >= 1, "at least 1")
        self._require("n_hidden", self.n_hidden >= 1, "at least 1")
        self._require("n_latent", self.n_latent >= 1, "at least 1")
        self._require("dropout_rate", 0 <= self.dropout_rate < 1, "in [0, 1)")
        self._require("mmd_weight", self.mmd_weight >= 0, "at least 0")


@dataclass(frozen=True, slots=True)
class CvaeConfig(_Config):
    """Architecture of the conditional autoencoder that scArches compares with: trVAE without MMD.

    Attributes
    ----------
    n_layers, n_hidden, n_latent, dropout_rate, gene_likelihood
        As in :class:`TrvaeConfig`.
    """

    n_layers: int = 2
    n_hidden: int = 128
    n_latent: int = 10
    dropout_rate: float = 0.05
    gene_likelihood: ExpressionLikelihood = "nb"

    def _check(self) -> None:
        TrvaeConfig(**self.to_json())  # which has the same limits


@dataclass(frozen=True, slots=True)
class DavaeConfig(_Config):
    """Architecture of DAVAE (papers/davae.txt, Methods, "The non-linear model").

    Attributes
    ----------
    n_latent
        Dimensions of z; the hidden layers are 128, 64, 32 wide before it and 32, 64, 128 after.
    dropout_rate
        Dropout in the hidden layers.
    norm
        BatchNorm (the paper) or LayerNorm (for surgery) after each linear layer.
    encode_batch
        Whether the encoder sees the batch: not in the paper; for surgery.
    adversary_weight
        Weight λ of the domain classifier (equation 11), of which the paper gives no value.
    adversary_ramp
        Share of the training over which λ rises from 0, in proportion to the steps; 0 is the
        paper's form. Both defaults were chosen on one data set with three seeds, for which
        benchmarks/LOG.md has what others did; without a ramp one seed mixed types.
    """

    n_latent: int = 10
    dropout_rate: float = 0.1
    norm: Norm = "batch"
    encode_batch: bool = False
    adversary_weight: float = 2.0
    adversary_ramp: float = 0.5

    def _check(self) -> None:
        self._require("n_latent", self.n_latent >= 1, "at least 1")
        self._require("dropout_rate", 0 <= self.dropout_rate < 1, "in [0, 1)")
        self._require("adversary_weight", self.adversary_weight >= 0, "at least 0")
        self._require("adversary_ramp", 0 <= self.adversary_ramp <= 1, "in [0, 1]")


Architecture = ScviConfig | ScanviConfig | TrvaeConfig | CvaeConfig | DavaeConfig

ARCHITECTURES: dict[str, type[Architecture]] = {
    "scvi": ScviConfig,
    "scanvi": ScanviConfig,
    "trvae": TrvaeConfig,
    "cvae": CvaeConfig,
    "davae": DavaeConfig,
}
"""Models by name, and the configuration of each."""


def model_name(config: Architecture) -> str:
    """Name of the model that a configuration is of."""
    return next(name for name, kind in ARCHITECTURES.items() if kind is type(config))


@dataclass(frozen=True, slots=True)
class TrainConfig(_Config):
    """How a model is trained; defaults as scvi-tools where it has them.

    Attributes
    ----------
    max_epochs
        Passes over the training rows.
    seed
        Seeds weights, noise and order.
    minibatch_size
        Cells of one step. With 512 an scVI wanted four times the default learning rate, .004; with
        2,048 it learned less in a pass at each rate tried (benchmarks/LOG.md, bench_minibatch).
    lr, eps, weight_decay
        Of Adam.
    warmup_share
        Share of all training steps over which the KL weight rises from 0 to 1. A share, not a
        number of epochs, so that few epochs on many cells end at weight 1 too.
    validation_share
        Share of the cells, by row hash, that are held out for validation.
    average_steps
        Steps over which the weights are averaged; the average is what is validated and kept. With
        0 it is the weights of the last step.
    early_stopping
        Stop when the validation bound has not improved for ``patience`` epochs; the weights of the
        best epoch are kept.
    patience
        Epochs to wait for an improvement; counted only after the warm-up.
    precision
        ``"bfloat16"`` runs the matrix products in bfloat16, the likelihood in float32. On a
        processor without its instructions that is slower, of which a warning tells.
    device
        ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; ``"auto"`` takes a GPU where there is one.
    threads
        Threads of a step; 0 takes what torch would take. Torch's own operations have no more than
        one for each 2^20 values (cells × genes) of a minibatch. Recorded, because another number
        may sum in another order.
    checkpoint_steps, checkpoint_minutes
        A checkpoint every so many steps (0: none by steps) and every so many minutes, besides one
        at the end of each epoch.
    balance
        ``"batch"`` or ``"label"``: draw cells so that each batch, or each label, comes equally
        often, cells without a label as one label more: with 4 labels a fifth of the draws is of
        these, however many there are. ``"none"`` takes each cell once an epoch.
    block_size, buffer_size
        Of the loader, in rows; 0 takes the loader's default.
    memory
        What the loader may hold, e.g. ``512MB``; empty for what it needs, with some room. Never
        changes the order of cells.
    project
        Write the genes modelled to a training store in the run folder first, and read that: faster
        epochs with the same result. It is removed when the run has ended.
    profile
        Tell at the end where the time went: waiting for minibatches, copying, forward, backward,
        optimiser; also as ``profile.json`` in the run folder. On a GPU each step then waits for it.
    """

    max_epochs: int = 400
    seed: int = 0
    minibatch_size: int = 128
    lr: float = 1e-3
    eps: float = 0.01
    weight_decay: float = 1e-6
    warmup_share: float = 0.5
    validation_share: float = 0.1
    average_steps: int = 500
    early_stopping: bool = False
    patience: int = 45
    precision: Precision = "float32"
    device: str = "auto"
    threads: int = 0
    checkpoint_steps: int = 0
    checkpoint_minutes: float = 5.0
    balance: Balance = "none"
    block_size: int = 0
    buffer_size: int = 0
    memory: str = ""
    project: bool = False
    profile: bool = False

    def _check(self) -> None:
        self._require("max_epochs", self.max_epochs >= 1, "at least 1")
        self._require("seed", 0 <= self.seed < 2**63, "in [0, 2^63)")
        self._require("minibatch_size", self.minibatch_size >= 1, "at least 1")
        self._require("lr", self.lr > 0, "above 0")
        self._require("eps", self.eps > 0, "above 0")
        self._require("weight_decay", self.weight_decay >= 0, "at least 0")
        self._require("warmup_share", 0 <= self.warmup_share <= 1, "in [0, 1]")
        self._require("validation_share", 0 <= self.validation_share < 1, "in [0, 1)")
        self._require("average_steps", self.average_steps >= 0, "at least 0")
        self._require("patience", self.patience >= 1, "at least 1")
        self._require("threads", self.threads >= 0, "at least 0")
        self._require("checkpoint_steps", self.checkpoint_steps >= 0, "at least 0")
        self._require("checkpoint_minutes", self.checkpoint_minutes > 0, "above 0")
        self._require("block_size", self.block_size >= 0, "at least 0")
        self._require("buffer_size", self.buffer_size >= 0, "at least 0")
