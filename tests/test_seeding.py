"""Seed labels: the calculus against scanpy, the rules by brute force, and what bad input says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy
import scipy.sparse as sp
from anndata import AnnData

import atlas
from atlas.cli import main
from atlas.errors import ConfigError, InputError
from atlas.signatures import Scores, Signature, choose_seeds, score_cells

PAPER = {
    "CD4 Regulatory": "GITR+ CTLA4+ FOXP3+ CD25+ S100A4- CD45- CD8B-",
    "CD4 Naive": "CCR7+ CD4+ S100A4- CD45- FOXP3- IL2RA- CD69-",
    "CD4 Memory": "S100A4+ CD25- FOXP3- GITR- CCR7-",
    "CD8 Naive": "CD8B+ CCR7+ CD4-",
}
ALIASES = {"GITR": "TNFRSF18", "CD25": "IL2RA", "CD45": "PTPRC"}
GENES = ["CD4", "CD8B", "TNFRSF18", "Foxp3", "FCGR3A", "FCGR3B", "x", "y"]
SMALL = {"A": "CD4+ GITR-", "B": "CD8B+ FOXP3+ CD4-"}

RealData = Callable[[str], Path]


def _study(n: int, seed: int, genes: list[str] = GENES, prefix: str = "c") -> AnnData:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.3, 3.0, (n, len(genes))))
    counts[3] = 0
    counts[5, genes.index("x")] = 2**25  # totals beyond what float32 adds exactly
    obs = pd.DataFrame(
        {"half": pd.Categorical(np.where(np.arange(n) % 2, "odd", "even"))},
        index=[f"{prefix}{i}" for i in range(n)],
    )
    adata = AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs)
    adata.var_names = genes
    return adata


pytestmark = pytest.mark.filterwarnings("ignore:cells of different studies have the same row name")


@pytest.fixture
def store(tmp_path: Path) -> atlas.CountStore:
    """Two studies with row names in common; the second lacks FCGR3B."""
    store = atlas.create_store(tmp_path / "s.atlas")
    store.append(_study(90, 0), study="one")
    store.append(_study(70, 1, [g for g in GENES if g != "FCGR3B"]), study="two")
    return store


def _by_hand(store: atlas.CountStore, rows: np.ndarray) -> np.ndarray:
    """Scores of SMALL by plain loops in float64."""
    adata = atlas.to_anndata(store)
    counts = adata.X.toarray().astype(np.float64)
    names = adata.var_names.tolist()
    rows = rows & (counts.sum(axis=1) > 0)
    z = {}
    for gene in ("CD4", "CD8B", "TNFRSF18", "Foxp3"):
        x = np.array([np.log(1 + 1e4 * c[names.index(gene)] / c.sum()) for c in counts[rows]])
        z[gene] = (x - x.mean()) / np.sqrt(((x - x.mean()) ** 2).sum() / (len(x) - 1))
    out = np.full((len(counts), 2), np.nan)
    out[rows, 0] = (z["CD4"] - z["TNFRSF18"]) / 2
    out[rows, 1] = (z["CD8B"] + z["Foxp3"] - z["CD4"]) / 3
    return out


def test_scores_are_those_by_hand(store: atlas.CountStore) -> None:
    every = atlas.seed_labels(store, SMALL, name=None, top=5)
    np.testing.assert_allclose(every.scores, _by_hand(store, np.ones(160, bool)), rtol=1e-9)
    empty = atlas.to_anndata(store).X.sum(axis=1).A1 == 0
    assert every.n_scored == 160 - empty.sum() < 160
    assert (np.isnan(every.scores).all(axis=1) == empty).all()
    half = atlas.seed_labels(store, SMALL, name=None, top=5, rows="half=odd")
    odd = (store.obs(["half"])["half"] == "odd").to_numpy()
    np.testing.assert_allclose(half.scores, _by_hand(store, odd), rtol=1e-9)
    assert (half.labels[~odd] == -1).all()
    assert not np.array_equal(half.scores[odd], every.scores[odd])
    assert [s.positive for s in every.signatures] == [("CD4",), ("CD8B", "Foxp3")]
    assert store.number == atlas.open_store(store.path).number  # nothing was written


def test_scores_are_scanpys_on_real_counts(real_data: RealData, tmp_path: Path) -> None:
    adata = anndata.read_h5ad(real_data("zheng_pbmc_facs.h5ad"))
    store = atlas.create_store(tmp_path / "z.atlas")
    store.append(adata, study="zheng")
    found = atlas.seed_labels(store, PAPER, name=None)
    adata.X = adata.X.astype(np.float64)
    adata = adata[store.obs([]).index].copy()
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    names = {gene: ALIASES.get(gene, gene) for s in PAPER.values() for gene in
             (g[:-1] for g in s.split())}  # fmt: skip
    adata = adata[:, sorted(set(names.values()))].copy()
    scanpy.pp.scale(adata, zero_center=True)
    for i, text in enumerate(PAPER.values()):
        signed = [
            (1 if gene[-1] == "+" else -1) * adata[:, names[gene[:-1]]].X.ravel()
            for gene in text.split()
        ]
        np.testing.assert_allclose(found.scores[:, i], np.mean(signed, axis=0), atol=1e-6)


def test_the_seeds_of_sorted_t_cells_are_mostly_right(real_data: RealData, tmp_path: Path) -> None:
    """By sorting, a quarter of the cells are of each type: seeds must do far better."""
    of = {
        "CD4+/CD25 T Reg": "CD4 Regulatory",
        "CD4+/CD45RA+/CD25- Naive T": "CD4 Naive",
        "CD4+/CD45RO+ Memory": "CD4 Memory",
        "CD8+/CD45RA+ Naive Cytotoxic": "CD8 Naive",
    }
    store = atlas.create_store(tmp_path / "z.atlas")
    store.append(real_data("zheng_pbmc_facs.h5ad"), study="zheng", label_key="cell_type")
    found = atlas.seed_labels(store, PAPER, rows={"library": list(of)}, as_label=True)
    obs = store.obs()
    seeds = obs[obs["seed"].isin(list(PAPER))]
    right = seeds["library"].map(of).astype(str) == seeds["seed"].astype(str)
    purity = right.groupby(seeds["seed"].astype(str)).mean()
    assert (purity > 0.5).all()
    assert right.mean() > 0.7
    assert sum(found.n_seeds) == len(seeds) > 180
    named = obs["atlas_label"].astype(object)
    assert (named.dropna() == seeds["seed"].astype(object).loc[named.dropna().index]).all()
    assert named.notna().sum() == len(seeds)


def _scores(*columns: list[float], baseline: float = 0.0) -> Scores:
    values = np.array(columns, float).T
    return Scores(values, np.full(len(columns), baseline), np.ones(1))


def test_who_is_a_seed() -> None:
    seeds = choose_seeds(_scores([5, 4, 3, 2, np.nan], [1, 2, 3, 4, np.nan]), top=2)
    assert seeds.labels.tolist() == [0, 0, 1, 1, -1]
    assert seeds.n_shared == 0
    # among the top of both: the higher score decides, equal scores are none's, nobody moves up
    seeds = choose_seeds(_scores([5, 4, 1, 0], [3, 4, 1, 0]), top=2)
    assert seeds.labels.tolist() == [0, -1, -1, -1]
    assert seeds.n_shared == 2
    # at the cutoff the first of equals, and none at or below a cell without the genes
    assert choose_seeds(_scores([7, 7, 7, 1]), top=2).labels.tolist() == [0, 0, -1, -1]
    assert choose_seeds(_scores([7, 2, 2, 1], baseline=2.0), 3).labels.tolist() == [0, -1, -1, -1]
    assert (choose_seeds(_scores([np.nan, np.nan]), 3).labels == -1).all()


def test_a_seed_shows_a_positive_gene(store: atlas.CountStore) -> None:
    found = atlas.seed_labels(store, SMALL, name=None, top=1000)
    counts = atlas.to_anndata(store)
    shows = [(counts[:, list(s.positive)].X.toarray() > 0).any(axis=1) for s in found.signatures]
    for i, shown in enumerate(shows):
        assert shown[found.labels == i].all()
        assert 0 < found.n_seeds[i] < shown.sum() + 1


class _Counting:
    """A source that tells which rows were read."""

    def __init__(self, source: atlas.CountStore) -> None:
        self._source, self.largest = source, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._source, name)

    def read_rows(self, starts: object, stops: object) -> object:
        self.largest = max(self.largest, int(np.sum(np.subtract(stops, starts))))
        return self._source.read_rows(starts, stops)  # type: ignore[arg-type]


def test_counts_are_read_in_blocks(tmp_path: Path) -> None:
    store = atlas.create_store(tmp_path / "s.atlas")
    store.append(_study(5000, 2), study="one")
    source, signs = _Counting(store), np.array([[1, -1]])
    scores = score_cells(
        source,  # type: ignore[arg-type]
        store.select(["CD4", "CD8B"]),
        np.array([0, 1]),
        signs,
        np.ones(5000, bool),
    )
    assert source.largest <= 1024
    x = atlas.to_anndata(store).X.toarray().astype(float)
    x = x[x.sum(axis=1) > 0]
    x = np.log1p(1e4 * x[:, :2] / x.sum(axis=1, keepdims=True))
    z = (x - x.mean(axis=0)) / x.std(axis=0, ddof=1)
    found = scores.values[~np.isnan(scores.values[:, 0]), 0]
    np.testing.assert_allclose(found, (z[:, 0] - z[:, 1]) / 2, rtol=1e-9, atol=1e-12)


def test_what_is_written(store: atlas.CountStore) -> None:
    first = store.number
    found = atlas.seed_labels(store, SMALL, name="mine", top=8, rows="study=one")
    assert found.columns == ("mine", "mine_score_A", "mine_score_B")
    assert store.number == first + 1
    obs = store.obs()
    one = (obs["atlas_study"] == "one").to_numpy()
    names = np.array(["A", "B", "Unknown"], dtype=object)
    assert obs["mine"][one].tolist() == names[found.labels[one]].tolist()
    assert obs["mine"][~one].isna().all()
    np.testing.assert_array_equal(obs["mine_score_B"].to_numpy(float), found.scores[:, 1])
    assert (store.obs_codes["label"] == -1).all()
    # again for the other study: the first keeps its own
    more = atlas.seed_labels(
        store, SMALL, name="mine", top=3, rows="study=two", as_label=True, unlabeled="none"
    )
    again = store.obs()
    assert again["mine"][one].tolist() == obs["mine"][one].tolist()
    assert set(again["mine"][~one]) == {"A", "B", "none"}
    assert store.labels == ("A", "B")
    assert store.obs_codes["label"][~one].tolist() == more.labels[~one].tolist()
    assert (store.obs_codes["label"][one] == -1).all()  # of a study that had no cell in it


def test_a_gene_that_nobody_has_counts_for_is_told_and_counts_for_nothing(tmp_path: Path) -> None:
    adata = _study(60, 4)
    adata.X = sp.csr_matrix(adata.X.toarray() * (np.array(GENES) != "CD8B"))
    store = atlas.create_store(tmp_path / "s.atlas")
    store.append(adata, study="one")
    with pytest.warns(UserWarning, match="No cell that was scored has counts of CD8B"):
        found = atlas.seed_labels(store, {"A": "CD4+ CD8B-"}, name=None)
    alone = atlas.seed_labels(store, {"A": "CD4+"}, name=None)
    np.testing.assert_allclose(found.scores, alone.scores / 2)
    assert [gene.detected for gene in found.genes][1] == 0


def test_missing_genes(store: atlas.CountStore) -> None:
    with pytest.raises(InputError, match=r"does not have these genes(.|\n)*CD8BB \(closest: CD8B"):
        atlas.seed_labels(store, {"A": "CD4+ CD8BB-"})
    with pytest.raises(InputError, match=r"CD25 \(nor as IL2R, IL2RA; closest: "):
        atlas.seed_labels(store, {"A": "CD4+ CD25-"})
    with pytest.warns(UserWarning, match="left out: CD8BB"):
        found = atlas.seed_labels(store, {"A": "CD4+ CD8BB-"}, name=None, ignore_missing=True)
    assert found.signatures == (Signature("A", ("CD4",)),)
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(InputError, match="No positive gene of the signature 'A' is left"),
    ):
        atlas.seed_labels(store, {"A": "CD8BB+ CD4-"}, ignore_missing=True)
    with pytest.raises(InputError, match=r"did not measure(.|\n)*FCGR3B not in two"):
        atlas.seed_labels(store, {"A": "CD4+ FCGR3B-"})
    assert atlas.seed_labels(store, {"A": "CD4+ FCGR3B-"}, name=None, rows="study=one").n_scored
    with pytest.warns(UserWarning, match="FCGR3B not in two"):
        atlas.seed_labels(store, {"A": "CD4+ FCGR3B-"}, name=None, ignore_missing=True)


def test_other_wrong_uses(store: atlas.CountStore, tmp_path: Path) -> None:
    before = store.number
    with pytest.raises(InputError, match=r"has a gene twice(.|\n)*GITR and TNFRSF18 are both TNFR"):
        atlas.seed_labels(store, {"A": "GITR+ TNFRSF18-"})
    with pytest.raises(InputError, match="'CD16' may be several genes"):
        atlas.seed_labels(store, {"A": "CD16+"})
    with pytest.raises(ConfigError, match="The number of seeds is out of range"):
        atlas.seed_labels(store, SMALL, top=0)
    with pytest.raises(ConfigError, match="has the name that stands for no label"):
        atlas.seed_labels(store, {"Unknown": "CD4+"})
    with pytest.raises(ConfigError, match="'half' that this command did not write"):
        atlas.seed_labels(store, SMALL, name="half")
    with pytest.raises(ConfigError, match="need a name"):
        atlas.seed_labels(store, SMALL, name=None, as_label=True)
    with pytest.raises(InputError, match="reserved"):
        atlas.seed_labels(store, SMALL, name="atlas_seed")
    assert store.number == before
    path = tmp_path / "x.h5ad"
    _study(30, 1).write_h5ad(path)
    files = atlas.open_files([path])
    with pytest.raises(ConfigError, match="store on disk only"):
        atlas.seed_labels(files, SMALL)
    found = atlas.seed_labels(files, SMALL, name=None, top=3)
    copy = atlas.create_store(tmp_path / "copy.atlas")
    copy.append(path, study="x")
    same = atlas.seed_labels(copy, SMALL, name=None, top=3)
    order = pd.Index(files.obs().index).get_indexer(copy.obs([]).index)
    np.testing.assert_allclose(found.scores[order], same.scores, rtol=1e-12)


def test_the_command(
    store: atlas.CountStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.txt").write_text("A: CD4+ GITR-\nB: CD16+\n")
    (tmp_path / "a.txt").write_text("CD16 FCGR3A\n")
    command = ["seed-labels", str(store.path), str(tmp_path / "s.txt"), "--top", "4"]
    assert main(command) == 2
    assert "'CD16' may be several genes" in capsys.readouterr().err
    assert main([*command, "--aliases", str(tmp_path / "a.txt"), "--as-label"]) == 0
    out = capsys.readouterr().out
    assert "TNFRSF18 (GITR)" in out
    assert "columns seed, seed_score_A, seed_score_B" in out
    assert atlas.open_store(store.path).labels == ("A", "B")
