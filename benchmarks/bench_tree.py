"""Do the probabilities of labels fall with the distance to the end points of a tree?

scANVI, Xu et al. 2021, Supplementary Figure 15: cells lie along the branches of a tree, those
beside an end point (the root, the tips) have its label, and the probability of a label is looked at
in all others. The cells are simulated, with bursts of transcription, capture, PCR and reads, one
batch; each seed has a tree, cells and a training of its own.

A model without classes takes the share of each label among the 15 nearest labelled cells in its
latent space as its probability, as PCA does. Measures, over the cells without a label:

nearness
    Mean distance along the tree to a cell's 15 neighbours in the latent space, divided by that to
    all cells: 0 where the latent space is the tree, 1 where it holds nothing of it.
along paths
    Spearman's correlation of a label's probability and the distance to its end point, with the
    sign turned, over the cells on the path to another end point; mean over all such paths. 1 where
    the probability falls all the way. The standard error is that of 100 resamplings of the cells.
of all cells
    The same over all cells. Less than 1 is no fault here: half way between two end points that are
    near each other, a cell is as far from one as others are that it is still the next to.
falling
    Share of the steps between nine bins of a path, of as many cells each, at which the mean
    probability falls.
graded
    Share of the cells whose most probable label has a probability below .9: a score that is always
    near 0 or 1 tells nothing of the way between two end points.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from bench_models import FEW, Side, ours, scvi_tools
from common import (
    Json,
    Outcome,
    Phases,
    argument_parser,
    phases_json,
    provenance,
    run_worker,
    say,
    say_provenance,
    serve_worker,
    table,
    write_json,
)

Floats = npt.NDArray[np.float64]

FULL = {"cells": 2000, "n_genes": 500, "tips": 5, "library": 3000.0, "n_hidden": 128, "epochs": 60}
TINY = {"cells": 300, "n_genes": 100, "tips": 3, "library": 500.0, "n_hidden": 16, "epochs": 2}
BINS = 9
RESAMPLINGS = 100
SIDES = [
    Side("PCA, kNN", "pca", {}),
    Side("scVI, kNN", "ours", {"model": "scvi"}),
    Side("scANVI", "ours", {"model": "scanvi"}),
    Side("scANVI, from scVI", "ours", {"model": "scanvi", "pretrained": True}),
    Side("scANVI, joint", "ours", {"model": "scanvi", "training": "joint"}),
    Side("scvi-tools SCANVI", "scvi_tools", {"model": "scanvi"}),
]


# workers


def prepare(arguments: Json, phases: Phases) -> Json:
    """Simulate, ingest; tell what is known of the cells in ``cells.npz``, in store order."""
    import atlas
    from atlas.simulate import UNLABELED, Capture, simulate

    folder, varying = Path(arguments["folder"]), arguments["varying_genes"]
    phases.begin("simulate")
    # Settings of the paper's simulation (Online Methods, "Continuous Simulation using SymSim"):
    # capture .1 ± .05, PCR 16 rounds at .7.
    capture = Capture(efficiency=0.1, efficiency_spread=0.5, rounds=16, rate=0.7)
    (path,) = simulate(
        folder / "simulated",
        arguments["cells"],
        studies=1,
        batches=1,
        seed=arguments["seed"],
        genes=arguments["n_genes"],
        types=arguments["tips"],
        library=arguments["library"],
        varying_genes=varying,
        process="reads",
        capture=capture,
        tree=True,
        progress=False,
    )
    path.rename(folder / "cells.h5ad")
    phases.begin("ingest")
    store = atlas.create_store(folder / "cells.atlas")
    store.append(folder / "cells.h5ad", study="cells", label_key="cell_type", unlabeled=UNLABELED)
    genes = atlas.select_genes(store, n=arguments["n_genes"])
    obs = store.obs()
    seen = obs["cell_type"].astype(object).where(obs["cell_type"] != UNLABELED)
    store.annotate(seen.to_frame("seen"))
    ends = [column for column in obs.columns if column.startswith("distance_")]
    np.savez(
        folder / "cells.npz",
        genes=genes,
        input_position=store.index_array("input_position"),
        seen=seen.where(seen.notna(), "").to_numpy(str),
        ends=[column.removeprefix("distance_") for column in ends],
        distance=obs[ends].to_numpy(np.float64),
    )
    return {
        "n_cells": store.n_obs,
        "n_labelled": int(seen.notna().sum()),
        "ends": len(ends),
    }


def pca(arguments: Json, phases: Phases) -> Json:
    """Ten components of log-normalised counts, in store order."""
    import anndata as ad
    from sklearn.decomposition import PCA

    folder = Path(arguments["folder"])
    cells = np.load(folder / "cells.npz")
    counts = ad.read_h5ad(folder / "cells.h5ad")[:, cells["genes"]].X.toarray()
    phases.begin("train")
    log = np.log1p(1e4 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    z = PCA(10, random_state=arguments["seed"]).fit_transform(log)
    z = z[cells["input_position"].astype(np.int64)]
    np.savez(folder / f"{arguments['out']}.npz", z=z.astype(np.float32))
    return {}


# measures


def probabilities(folder: Path, out: str) -> Floats:
    """Of each end point's label: (n_cells, n_ends)."""
    from atlas.evaluation.neighbours import nearest

    cells, made = np.load(folder / "cells.npz"), np.load(folder / f"{out}.npz")
    ends = cells["ends"].tolist()
    if "p" in made:
        column = {name: i for i, name in enumerate(made["classes"].tolist())}
        p: Floats = made["p"][:, [column[end] for end in ends]].astype(np.float64)
        return p
    known = np.flatnonzero(cells["seen"] != "")
    near = nearest(made["z"][known], made["z"], min(FEW, len(known)))
    labels = cells["seen"][known][near.indices]
    return np.stack([(labels == end).mean(axis=1) for end in ends], axis=1)


def nearness(z: npt.NDArray[np.float32], distance: Floats) -> float:
    """Distance along the tree to the nearest cells in z, relative to that to all."""
    from atlas.evaluation.neighbours import nearest

    near = nearest(z, z, min(FEW, len(z) - 1), np.arange(len(z))).indices
    # The distance of two points of a tree is the largest difference of their distances to an end
    # point: the way from one to the other goes on to some end point.
    found = np.abs(distance[:, None] - distance[near]).max(axis=2).mean()
    some = np.random.default_rng(0).integers(len(z), size=(2, 100_000))
    return float(found / np.abs(distance[some[0]] - distance[some[1]]).max(axis=1).mean())


def correlation(p: Floats, distance: Floats) -> float:
    """Spearman's, of the probability of one label and nearness; 0 where p is constant."""
    from scipy.stats import spearmanr

    return float(spearmanr(p, -distance).statistic) if np.ptp(p) > 0 else 0.0


def paths(distance: Floats) -> list[tuple[int, npt.NDArray[np.int64]]]:
    """For each two end points the first one and the cells between, from the first to the other."""
    out = []
    for end in range(distance.shape[1]):
        for other in set(range(distance.shape[1])) - {end}:
            way = distance[:, end] + distance[:, other]  # least, and the same, on the path
            cells = np.flatnonzero(way < way.min() + 1e-6)
            out.append((end, cells[distance[cells, end].argsort()]))
    return out


def along_paths(
    p: Floats, distance: Floats, ways: list[tuple[int, npt.NDArray[np.int64]]]
) -> Floats:
    """Mean correlation over the paths that begin at each end point: (n_ends,)."""
    sums, n_ends = np.zeros(p.shape[1]), p.shape[1]
    for end, cells in ways:
        sums[end] += correlation(p[cells, end], distance[cells, end])
    return sums / (n_ends - 1)


def profile(p: Floats, ways: list[tuple[int, npt.NDArray[np.int64]]]) -> Floats:
    """Mean probability of the first end point's label in bins of each path: (n_paths, BINS)."""
    return np.array(
        [[p[part, end].mean() for part in np.array_split(cells, BINS)] for end, cells in ways]
    )


def measure(folder: Path, out: str) -> Json:
    """All measures of one training, those by end point in the order of ``ends``."""
    cells = np.load(folder / "cells.npz")
    asked = cells["seen"] == ""
    distance, p = cells["distance"][asked], probabilities(folder, out)[asked]
    ways = paths(distance)
    rng = np.random.default_rng(0)
    again = [
        along_paths(p, distance, [(end, rng.choice(own, len(own))) for end, own in ways]).mean()
        for _ in range(RESAMPLINGS)
    ]
    means = profile(p, ways)
    n_ends = distance.shape[1]
    return {
        "ends": cells["ends"].tolist(),
        "nearness": nearness(np.load(folder / f"{out}.npz")["z"], cells["distance"]),
        "along_paths": along_paths(p, distance, ways).tolist(),
        "error": float(np.std(again, ddof=1)),
        "of_all": [correlation(p[:, end], distance[:, end]) for end in range(n_ends)],
        "profile": means.tolist(),
        "falling": float((np.diff(means, axis=1) < 0).mean()),
        "graded": float((p.max(axis=1) < 0.9).mean()),
    }


def row(side: str, found: list[Json], seconds: float) -> list[str]:
    """A line of the table, over seeds."""
    value = np.mean([np.mean(one["along_paths"]) for one in found])
    error = np.sqrt(np.sum([one["error"] ** 2 for one in found])) / len(found)
    by_end = np.concatenate([one["along_paths"] for one in found])
    return [
        side,
        " ".join(f"{one['nearness']:.2f}" for one in found),
        f"{value:.3f} ± {error:.3f}",
        " ".join(f"{np.mean(one['along_paths']):.3f}" for one in found),
        f"{by_end.min():.2f} … {by_end.max():.2f}",
        f"{np.mean([one['of_all'] for one in found]):.3f}",
        f"{np.mean([one['falling'] for one in found]):.2f}",
        f"{np.mean([one['graded'] for one in found]):.2f}",
        " ".join(f"{v:.2f}" for v in np.mean([one["profile"] for one in found], axis=(0, 1))),
        f"{seconds:.0f} s",
    ]


HEADER = [
    "model",
    "nearness, by seed",
    "along paths",
    "by seed",
    "by end point",
    "of all cells",
    "falling",
    "graded",
    "mean probability along paths",
    "training",
]


def main() -> None:
    serve_worker([prepare, pca, ours, scvi_tools])
    parser = argument_parser("Label probabilities along a tree, beside scvi-tools")
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    parser.add_argument("--sides", nargs="+", help="of the names in the table; all by default")
    parser.add_argument("--epochs", type=int, help="passes over the cells")
    parser.add_argument("--cells", type=int)
    parser.add_argument(
        "--varying-genes", type=float, help="share of the genes; see atlas simulate"
    )
    args = parser.parse_args()
    seeds = args.seeds or ([0] if args.tiny else [0, 1, 2])
    settings: dict[str, Any] = dict(TINY if args.tiny else FULL)
    settings["varying_genes"] = args.varying_genes
    settings |= {k: v for k in ("epochs", "cells") if (v := getattr(args, k))}
    known = provenance()
    say_provenance(known)
    started = time.monotonic()
    chosen = [side for side in SIDES if not args.sides or side.name in args.sides]
    found: dict[str, list[Json]] = {side.name: [] for side in chosen}
    runs: dict[str, list[Outcome]] = {side.name: [] for side in chosen}
    cells: list[Json] = []
    for seed in seeds:
        with tempfile.TemporaryDirectory(prefix="bench-tree-", dir=args.work) as temporary:
            folder = Path(temporary)
            common = {"folder": str(folder), "seed": seed, **settings}
            cells.append(run_worker(__file__, "prepare", common, folder).result)
            say(f"\nseed {seed}: {cells[-1]}")
            for i, side in enumerate(chosen):
                asked = {"out": str(i), "options": side.options}
                runs[side.name].append(run_worker(__file__, side.worker, common | asked, folder))
                found[side.name].append(measure(folder, str(i)))
                say(f"{side.name}: {np.round(found[side.name][-1]['along_paths'], 2).tolist()}")
    seconds = {n: np.mean([r.phases["train"].seconds for r in own]) for n, own in runs.items()}
    say("\n" + table(HEADER, [row(name, own, float(seconds[name])) for name, own in found.items()]))
    content = {
        "benchmark": "tree",
        **known,
        "settings": settings | {"seeds": seeds},
        "cells": cells,
        "results": found,
        "runs": {name: [phases_json(run) for run in own] for name, own in runs.items()},
        "seconds": time.monotonic() - started,
    }
    write_json(args.json, content)


if __name__ == "__main__":
    main()
