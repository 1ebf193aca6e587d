"""How pure are the seed labels of the scANVI paper's four T-cell signatures?

The sorted T cells of ``zheng_pbmc_facs.h5ad`` that the paper uses (its case study of "seed"
labels): regulatory, naive and memory CD4 and naive CD8, with the sorting as truth. For each
signature: its genes, the share of the cells that have counts of them, and the purity of the seeds,
the share of them that were sorted as that type, with its standard error (binomial). Beside it the
share of the type among all cells, which is the purity of cells taken at random, and the purity that
scanpy's ``score_genes`` gives with as many seeds (positive genes' scores less the negative ones').
"""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from common import (
    DATA,
    Json,
    argument_parser,
    provenance,
    say,
    say_provenance,
    table,
    write_json,
)

SIGNATURES = {
    "CD4 Regulatory": "GITR+ CTLA4+ FOXP3+ CD25+ S100A4- CD45- CD8B-",
    "CD4 Naive": "CCR7+ CD4+ S100A4- CD45- FOXP3- IL2RA- CD69-",
    "CD4 Memory": "S100A4+ CD25- FOXP3- GITR- CCR7-",
    "CD8 Naive": "CD8B+ CCR7+ CD4-",
}
SORTED = {
    "CD4 Regulatory": "CD4+/CD25 T Reg",
    "CD4 Naive": "CD4+/CD45RA+/CD25- Naive T",
    "CD4 Memory": "CD4+/CD45RO+ Memory",
    "CD8 Naive": "CD8+/CD45RA+ Naive Cytotoxic",
}


def _peer(path: Path, found: Json) -> dict[str, float]:
    """Purity of as many cells of the highest scanpy scores."""
    import anndata
    import scanpy

    adata = anndata.read_h5ad(path)
    adata = adata[adata.obs["library"].isin(list(SORTED.values()))].copy()
    adata.X = adata.X.astype(np.float32)
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    out = {}
    for name, row in found.items():
        score = np.zeros(adata.n_obs)
        for sign, genes in ((1, row["positive"]), (-1, row["negative"])):
            scanpy.tl.score_genes(adata, genes, score_name="score", random_state=0)
            score += sign * adata.obs["score"].to_numpy()
        best = np.argsort(-score, kind="stable")[: row["seeds"]]
        out[name] = float((adata.obs["library"].iloc[best] == SORTED[name]).mean())
    return out


def main() -> None:
    """Ingest, seed, compare with the sorting."""
    import atlas

    parser = argument_parser(__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA / "zheng_pbmc_facs.h5ad")
    parser.add_argument("--top", type=int, default=50, help="seeds of a signature")
    options = parser.parse_args()
    top = 10 if options.tiny else options.top
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = atlas.create_store(Path(folder) / "zheng.atlas")
        store.append(options.data, study="zheng", label_key="cell_type")
        start = time.perf_counter()
        found = atlas.seed_labels(
            store, SIGNATURES, top=top, rows={"library": list(SORTED.values())}
        )
        seconds = time.perf_counter() - start
        library = store.obs(["library"])["library"].astype(str).to_numpy()
        chosen = ~np.isnan(found.scores[:, 0])
        detected = {gene.name: gene.detected for gene in found.genes}
        results: Json = {}
        for i, signature in enumerate(found.signatures):
            mine = library[found.labels == i]
            purity = float((mine == SORTED[signature.name]).mean())
            results[signature.name] = {
                "positive": list(signature.positive),
                "negative": list(signature.negative),
                "detected": {g: detected[g] for g in (*signature.positive, *signature.negative)},
                "seeds": len(mine),
                "purity": purity,
                "standard_error": float(np.sqrt(purity * (1 - purity) / len(mine))),
                "share_of_cells": float((library[chosen] == SORTED[signature.name]).mean()),
                "sorted_as": {k: int((mine == v).sum()) for k, v in SORTED.items()},
            }
        for name, purity in _peer(options.data, results).items():
            results[name]["peer"] = purity
    known = provenance()
    say_provenance(known)
    say(f"{chosen.sum()} cells, {top} a signature, {seconds:.1f} s; "
        f"{found.n_shared} cells among the top of several\n")  # fmt: skip
    rows = [
        [name, str(r["seeds"]), f"{r['purity']:.2f} ± {r['standard_error']:.2f}",
         f"{r['peer']:.2f}", f"{r['purity'] / max(r['peer'], 1e-9):.2f}",
         f"{r['share_of_cells']:.2f}",
         ", ".join(f"{g} {d:.1%}" for g, d in r["detected"].items() if g in r["positive"])]
        for name, r in results.items()
    ]  # fmt: skip
    n = sum(r["seeds"] for r in results.values())
    pure = {
        key: sum(r[key] * r["seeds"] for r in results.values()) / n for key in ("purity", "peer")
    }
    rows.append(["all", str(n), f"{pure['purity']:.2f}", f"{pure['peer']:.2f}",
                 f"{pure['purity'] / pure['peer']:.2f}", "", ""])  # fmt: skip
    header = ["signature", "seeds", "purity", "score_genes", "ratio", "at random",
              "positive genes, share of cells"]  # fmt: skip
    say(table(header, rows))
    content = {"seconds": seconds, "signatures": results, "all": pure, **known}
    write_json(options.json, content)


if __name__ == "__main__":
    main()
