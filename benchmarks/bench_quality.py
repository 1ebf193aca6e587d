"""Is an Atlas model as good as scvi-tools' on the same cells?

Both train scVI with the same architecture on the same training cells of
``pbmc_4batch_3study.h5ad``: Atlas on its path from file to store to loader, scvi-tools in memory by
its own API. Compared, on the same cells, are

bound
    the evidence lower bound of the cells that neither trained on, at KL weight 1, mean of
    ``--draws`` draws of the noise;
entropy
    of the batches among each cell's 50 nearest neighbours, all cells, nats;
accuracy
    of labels carried from Zheng's and the pbmc3k cells to Kang's by the majority of 50 neighbours;
    weighted: mean over the labels of the share that is right.

Each is a mean over cells of something both give for each cell, so differences are paired by cell:
the interval is that of the mean over cells of the per-cell difference, averaged over the seeds
first; normal, 95 %. The verdict is by this interval, which holds for the models trained here. What
other seeds would change is told by the second interval, that of the mean over seeds (Student's t):
with three seeds it is wide. Neighbourhoods overlap, so the cells' entropies are not independent and
their interval is somewhat too narrow.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from common import (
    DATA,
    Json,
    Outcome,
    Phases,
    argument_parser,
    megabytes,
    phases_json,
    provenance,
    run_worker,
    say,
    say_provenance,
    serve_worker,
    table,
    write_json,
)
from scipy.stats import t as student

Floats = npt.NDArray[np.float64]

REFERENCE = ("zheng2017_facs", "pbmc3k")
QUERY = ("kang_ctrl", "kang_stim")
SIDES = ("ours", "peer")
K = 50
HELD_OUT_SHARE = 0.1
EVALUATION_MINIBATCH = 512
NORMAL_95 = 1.959964

FULL = {"n_genes": 2000, "n_hidden": 128, "epochs": 50, "cells_per_batch": None}
TINY = {"n_genes": 200, "n_hidden": 32, "epochs": 2, "cells_per_batch": 300}


# workers


def prepare(arguments: Json, phases: Phases) -> Json:
    """Ingest the file, choose genes, split the cells; tell all in ``cells.npz``, in store order."""
    import anndata as ad

    import atlas

    folder, source = Path(arguments["folder"]), Path(arguments["source"])
    if arguments["cells_per_batch"] is not None:
        adata = ad.read_h5ad(source)
        rng = np.random.default_rng(0)
        batch, n = adata.obs["batch"], arguments["cells_per_batch"]
        rows = [
            rng.choice(np.flatnonzero(batch == name), n, replace=False) for name in batch.unique()
        ]
        source = folder / "cells.h5ad"
        adata[np.unique(np.concatenate(rows))].copy().write_h5ad(source)
    phases.begin("ingest")
    store = atlas.create_store(folder / "pbmc.atlas")
    store.append(source, study="pbmc", batch_key="batch", label_key="cell_type")
    phases.begin("genes")
    genes = atlas.select_genes(store, n=arguments["n_genes"])
    phases.begin("split")
    held_out = np.zeros(store.n_obs, bool)
    for start, stop in store.split(HELD_OUT_SHARE).validation:
        held_out[start:stop] = True
    np.savez(
        folder / "cells.npz",
        genes=genes,
        held_out=held_out,
        input_position=store.index_array("input_position"),
        batch=store.obs_codes["batch"],
        batches=[name.removeprefix("pbmc/") for name in store.batches],
        label=store.obs_codes["label"],
        labels=store.labels,
    )
    return {"source": str(source), "n_cells": store.n_obs, "n_held_out": int(held_out.sum())}


def ours(arguments: Json, phases: Phases) -> Json:
    """Train, embed and bound with Atlas."""
    import torch

    import atlas
    import atlas.workflows
    from atlas.models.base import evaluating
    from atlas.training.inputs import InputsBuilder
    from loaders import SequentialLoader

    folder, seed = Path(arguments["folder"]), arguments["seed"]
    phases.begin("read")
    store = atlas.open_store(folder / "pbmc.atlas")
    phases.begin("train")
    model = atlas.train(
        store,
        "scvi",
        out=folder / f"run-{seed}",
        max_epochs=arguments["epochs"],
        seed=seed,
        n_layers=2,
        n_hidden=arguments["n_hidden"],
        n_latent=10,
        gene_likelihood="zinb",
        dispersion="gene",
        dropout_rate=0.1,
        norm="layer",
        encode_batch=True,
        lr=1e-3,
        eps=0.01,
        weight_decay=1e-6,
        minibatch_size=128,
        warmup_share=0.5,
        validation_share=HELD_OUT_SHARE,
        device="cpu",
    )
    phases.begin("embed")
    z = atlas.embed(model, store, name=None, device="cpu")
    phases.begin("bound")
    rows = store.split(HELD_OUT_SHARE).validation
    loader = SequentialLoader(store.select(model.genes), EVALUATION_MINIBATCH, rows=rows)
    to_inputs = InputsBuilder(torch.device("cpu"), model.presence)
    generator = torch.Generator().manual_seed(10_000 + seed)
    bound = np.zeros(store.n_obs)
    with evaluating(model.module):
        for _ in range(arguments["draws"]):
            for minibatch in loader:
                losses = model.module.loss(to_inputs(minibatch), 1.0, generator)
                bound[minibatch.rows] -= losses.negative_bound.numpy() / arguments["draws"]
    held_out = np.concatenate([np.arange(start, stop) for start, stop in rows])
    np.savez(folder / f"ours-{seed}.npz", z=z, bound=bound[held_out], held_out=held_out)
    history = model.training["history"]
    return {"validation_bound": [-record["validation_bound"] for record in history]}


def peer(arguments: Json, phases: Phases) -> Json:
    """Train, embed and bound with scvi-tools; results in store order."""
    import anndata as ad
    import scvi
    import torch

    folder, seed, epochs = Path(arguments["folder"]), arguments["seed"], arguments["epochs"]
    cells = np.load(folder / "cells.npz")
    position = cells["input_position"].astype(np.int64)
    scvi.settings.verbosity = 30
    phases.begin("read")
    adata = ad.read_h5ad(arguments["source"])[:, cells["genes"]].copy()
    adata.X = adata.X.astype(np.float32)
    phases.begin("train")
    scvi.settings.seed = seed
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    model = scvi.model.SCVI(
        adata,
        n_layers=2,
        n_hidden=arguments["n_hidden"],
        n_latent=10,
        gene_likelihood="zinb",
        dispersion="gene",
        dropout_rate=0.1,
        use_layer_norm="both",
        use_batch_norm="none",
        encode_covariates=True,
    )
    train_rows, held_out_rows = position[~cells["held_out"]], position[cells["held_out"]]
    model.train(
        max_epochs=epochs,
        accelerator="cpu",
        batch_size=128,
        # Atlas validates after each epoch too.
        check_val_every_n_epoch=1,
        datasplitter_kwargs={
            "external_indexing": [train_rows, held_out_rows, np.array([], np.int64)]
        },
        plan_kwargs={
            "lr": 1e-3,
            "eps": 0.01,
            "weight_decay": 1e-6,
            "n_epochs_kl_warmup": epochs // 2,
        },
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=None,
    )
    phases.begin("embed")
    z = model.get_latent_representation(batch_size=EVALUATION_MINIBATCH)
    phases.begin("bound")
    model.module.eval()
    torch.manual_seed(10_000 + seed)
    loader = model._make_data_loader(
        adata=adata, indices=held_out_rows, batch_size=EVALUATION_MINIBATCH, shuffle=False
    )
    bound = np.zeros(len(held_out_rows))
    with torch.no_grad():
        for _ in range(arguments["draws"]):
            parts = []
            for tensors in loader:
                _, _, losses = model.module(tensors, loss_kwargs={"kl_weight": 1.0})
                negative = losses.dict_sum(losses.reconstruction_loss) + losses.dict_sum(
                    losses.kl_local
                )
                parts.append(negative.cpu().numpy())
            bound -= np.concatenate(parts) / arguments["draws"]
    np.savez(
        folder / f"peer-{seed}.npz",
        z=z[position].astype(np.float32),
        bound=bound,
        held_out=np.flatnonzero(cells["held_out"]),
    )
    return {
        "validation_bound": [-float(x) for x in model.history["elbo_validation"].to_numpy()[:, 0]]
    }


# measures: one value for each cell, the same cells for both


@dataclass(frozen=True)
class Measure:
    """How one figure is made of values of cells, and how much of it may be lost.

    Attributes
    ----------
    name, unit
        For the table.
    allowance
        The loss that the interval must exclude, in the figure's unit; None for no verdict.
    relative
        Whether the allowance is a share of the peer's figure.
    """

    name: Literal["bound", "entropy", "accuracy", "weighted accuracy"]
    unit: str
    digits: int
    allowance: float | None
    relative: bool = False


MEASURES = (
    Measure("bound", "nats", 2, 0.01, relative=True),
    Measure("entropy", "nats", 3, 0.03),
    Measure("accuracy", "", 3, 0.02),
    Measure("weighted accuracy", "", 3, None),
)


def cell_values(folder: Path, side: str, seed: int) -> dict[str, Floats]:
    """The measures of one trained model by cell."""
    from atlas.evaluation.labels import majority_vote
    from atlas.evaluation.mixing import batch_entropies
    from atlas.evaluation.neighbours import nearest

    cells, made = np.load(folder / "cells.npz"), np.load(folder / f"{side}-{seed}.npz")
    if not np.array_equal(made["held_out"], np.flatnonzero(cells["held_out"])):
        raise RuntimeError(f"{side} was not bounded on the held-out cells")
    z, batch = made["z"], cells["batch"].astype(np.int64)
    everyone = np.arange(len(z))
    mixed = nearest(z, z, K, everyone)
    voting, asked = label_rows(cells)
    found = nearest(z[voting], z[asked], K)
    label = cells["label"].astype(np.int64)
    vote = majority_vote(label[voting][found.indices], len(cells["labels"]))
    right = (vote.codes == label[asked]).astype(np.float64)
    return {
        "bound": made["bound"],
        "entropy": batch_entropies(mixed.indices, batch, len(cells["batches"])),
        "accuracy": right,
        "weighted accuracy": right,
    }


def label_rows(cells: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Labeled cells of the reference, and of the query."""
    name = cells["batches"][cells["batch"]]
    labeled = cells["label"] >= 0
    return tuple(np.flatnonzero(labeled & np.isin(name, side)) for side in (REFERENCE, QUERY))


def cell_groups(folder: Path) -> dict[str, npt.NDArray[np.int64] | None]:
    """Groups of cells that have equal say in a measure; None where each cell has."""
    cells = np.load(folder / "cells.npz")
    _, asked = label_rows(cells)
    return {m.name: None for m in MEASURES} | {"weighted accuracy": cells["label"][asked]}


def mean_and_error(
    values: Floats, groups: npt.NDArray[np.int64] | None = None
) -> tuple[float, float]:
    """Mean over cells and its standard error; over groups of the means within them where given."""
    if groups is None:
        groups = np.zeros(len(values), np.int64)
    parts = [values[groups == group] for group in np.unique(groups)]
    mean = np.mean([part.mean() for part in parts])
    variance = sum(part.var(ddof=1) / len(part) for part in parts if len(part) > 1)
    return float(mean), float(np.sqrt(variance) / len(parts))


@dataclass(frozen=True)
class Comparison:
    """One measure of both, and the interval of their difference (positive: ours is better).

    Attributes
    ----------
    ours, peer, difference, low, high
        Means, and the 95 % interval of the difference over cells.
    seed_deviation
        Standard deviation of the difference over seeds; None for a single one.
    seed_half_width
        Half the 95 % interval of the difference over seeds (Student's t).
    allowance, passed
        The loss to be excluded, and whether the interval does; None where there is no verdict.
    """

    measure: str
    seed: int | None
    ours: float
    peer: float
    difference: float
    low: float
    high: float
    seed_deviation: float | None = None
    seed_half_width: float | None = None
    allowance: float | None = None
    passed: bool | None = None


def compare(
    measure: Measure,
    values: dict[str, list[Floats]],
    groups: npt.NDArray[np.int64] | None,
    seed: int | None,
) -> Comparison:
    """Compare by cell, after averaging each cell over the seeds given."""
    ours_by_cell, peer_by_cell = (np.mean(values[side], axis=0) for side in SIDES)
    difference, error = mean_and_error(ours_by_cell - peer_by_cell, groups)
    own, theirs = (mean_and_error(v, groups)[0] for v in (ours_by_cell, peer_by_cell))
    allowance = measure.allowance
    if allowance is not None and measure.relative:
        allowance *= abs(theirs)
    low = difference - NORMAL_95 * error
    by_seed = [
        mean_and_error(a - b, groups)[0]
        for a, b in zip(values["ours"], values["peer"], strict=True)
    ]
    deviation = float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None
    half_width = None
    if deviation is not None:
        half_width = float(student.ppf(0.975, len(by_seed) - 1) * deviation / len(by_seed) ** 0.5)
    return Comparison(
        measure=measure.name,
        seed=seed,
        ours=own,
        peer=theirs,
        difference=difference,
        low=low,
        high=difference + NORMAL_95 * error,
        seed_deviation=deviation,
        seed_half_width=half_width,
        allowance=allowance if seed is None else None,
        passed=None if seed is not None or allowance is None else low > -allowance,
    )


def compare_all(folder: Path, seeds: list[int]) -> list[Comparison]:
    """Each measure by seed, and over all seeds."""
    by_seed = {side: [cell_values(folder, side, seed) for seed in seeds] for side in SIDES}
    groups = cell_groups(folder)
    out = []
    for measure in MEASURES:
        values = {side: [v[measure.name] for v in by_seed[side]] for side in SIDES}
        for i, seed in enumerate(seeds):
            one = {side: [values[side][i]] for side in SIDES}
            out.append(compare(measure, one, groups[measure.name], seed))
        out.append(compare(measure, values, groups[measure.name], None))
    return out


# tables


def quality_table(comparisons: list[Comparison]) -> str:
    digits = {measure.name: measure.digits for measure in MEASURES}
    rows = []
    for c in comparisons:
        number: Callable[[float], str] = f"{{:.{digits[c.measure]}f}}".format
        signed: Callable[[float], str] = f"{{:+.{digits[c.measure]}f}}".format
        rows.append(
            [
                c.measure,
                "mean" if c.seed is None else str(c.seed),
                number(c.ours),
                number(c.peer),
                signed(c.difference),
                f"{signed(c.low)} … {signed(c.high)}",
                ""
                if c.seed_half_width is None
                else f"{signed(c.difference - c.seed_half_width)} … "
                f"{signed(c.difference + c.seed_half_width)}",
                "" if c.allowance is None else number(c.allowance),
                {None: "", True: "not worse", False: "WORSE OR UNSURE"}[c.passed],
            ]
        )
    header = ["measure", "seed", "ours", "peer", "difference", "95 % over cells"]
    return table([*header, "95 % over seeds", "allowed loss", "verdict"], rows)


def cost(outcomes: dict[str, list[Outcome]]) -> Json:
    """Seconds and peak memory, means over the seeds."""
    out: Json = {}
    for side, runs in outcomes.items():
        out[side] = {
            f"{phase}_{clock}": float(np.mean([getattr(r.phases[phase], clock) for r in runs]))
            for phase in ("read", "train", "embed")
            for clock in ("seconds", "cpu_seconds")
        }
        for kind in ("private", "resident"):
            out[side][f"{kind}_peak_bytes"] = float(
                np.mean([r.peak_above("read", "read", "train", "embed", kind=kind) for r in runs])
            )
    out["ratio"] = {name: out["ours"][name] / out["peer"][name] for name in out["ours"]}
    return out


def cost_table(figures: Json) -> str:
    rows = []
    for name in figures["ours"]:
        if name.endswith("_bytes"):
            label = "peak memory above imports, " + name.split("_")[0]
            values = [megabytes(figures[side][name]) for side in SIDES]
        else:
            phase, clock = name.split("_", maxsplit=1)
            label = phase + (", wall clock" if clock == "seconds" else ", time on all cores")
            values = [f"{figures[side][name]:.1f} s" for side in SIDES]
        rows.append([label, *values, f"{figures['ratio'][name]:.2f}"])
    return table(["mean over seeds", "ours", "peer", "ours / peer"], rows)


def main() -> None:
    serve_worker([prepare, ours, peer])
    parser = argument_parser("Quality beside scvi-tools on the same cells")
    parser.add_argument("--data", type=Path, default=DATA / "pbmc_4batch_3study.h5ad")
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    parser.add_argument("--draws", type=int, default=8, help="of the noise, for the bound")
    args = parser.parse_args()
    seeds = args.seeds or ([0] if args.tiny else [0, 1, 2])
    settings = TINY if args.tiny else FULL
    known = provenance()
    say_provenance(known)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-quality-", dir=args.work) as temporary:
        folder = Path(temporary)
        common = {"folder": str(folder), "draws": args.draws, **settings}
        made = run_worker(__file__, "prepare", common | {"source": str(args.data)}, folder)
        common["source"] = made.result["source"]
        say(f"{made.result['n_cells']} cells, {made.result['n_held_out']} of them held out")
        outcomes: dict[str, list[Outcome]] = {side: [] for side in SIDES}
        for seed in seeds:
            for side in SIDES:
                outcome = run_worker(__file__, side, common | {"seed": seed}, folder)
                outcomes[side].append(outcome)
                say(f"{side}, seed {seed}: trained in {outcome.phases['train'].seconds:.0f} s")
        comparisons = compare_all(folder, seeds)
    costs = cost(outcomes)
    say("\n" + quality_table(comparisons))
    say("\n" + cost_table(costs))
    write_json(
        args.json,
        {
            "benchmark": "quality",
            **known,
            "settings": settings | {"seeds": seeds, "draws": args.draws, "k": K},
            "cells": made.result,
            "comparisons": [asdict(comparison) for comparison in comparisons],
            "cost": costs,
            "runs": [
                {"side": side, "seed": seed, **run.result, "phases": phases_json(run)}
                for side in SIDES
                for seed, run in zip(seeds, outcomes[side], strict=True)
            ],
            "seconds": time.monotonic() - started,
        },
    )


if __name__ == "__main__":
    main()
