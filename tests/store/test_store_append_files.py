"""Several files as one study."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from atlas.cli import main
from atlas.errors import ConfigError, InputError
from atlas.store import create_store, open_store, to_anndata

MakeStudy = Callable[..., AnnData]


@pytest.fixture
def three(tmp_path: Path, make_study: MakeStudy) -> tuple[list[Path], list[AnnData]]:
    """Files of the same genes in other orders."""
    generator = np.random.default_rng(0)
    paths, parts = [], []
    for i, n in enumerate((30, 1, 45)):
        adata = make_study(n, 25, seed=i, prefix=f"p{i}_")
        adata.layers["spliced"] = adata.X * 0.5
        adata = adata[:, generator.permutation(25)].copy() if i else adata
        adata.var["chromosome"] = [f"chr{name[4:]}" for name in adata.var_names]
        adata.var["mean"] = np.asarray(adata.X.mean(axis=0)).ravel()
        parts.append(adata)
        paths.append(tmp_path / f"part{i}.h5ad")
        adata.write_h5ad(paths[-1])
    return paths, parts


@pytest.mark.parametrize("kind", ["files", "objects", "both"])
def test_several_inputs_are_one_study(
    tmp_path: Path, three: tuple[list[Path], list[AnnData]], kind: str
) -> None:
    paths, parts = three
    inputs = {"files": paths, "objects": parts, "both": [paths[0], parts[1], paths[2]]}[kind]
    store = create_store(tmp_path / "s.atlas")
    report = store.append(inputs, study="one", batch_key="file", keep_layers=["spliced"])
    assert report.n_obs == 76
    assert store.studies == ("one",)
    names = [name for part in parts for name in part.obs_names]
    back = to_anndata(store, order="input")
    assert list(back.obs_names) == names
    expected = anndata.concat(parts, join="outer")
    expected = expected[names, back.var_names]
    assert abs(back.X - expected.X).nnz == 0
    np.testing.assert_array_equal(back.obsm["X_pca"], expected.obsm["X_pca"])
    np.testing.assert_array_equal(back.obs["score"], expected.obs["score"])
    assert list(back.obs["cell_type"].astype(str)) == list(expected.obs["cell_type"].astype(str))
    layer = store.study("one").layer("spliced").read(0, 76)
    assert layer[2].sum() * 2 == expected.X.sum()
    labels = (
        ["part0", "part1", "part2"]
        if kind == "files"
        else ["input0", "input1", "input2"]
        if kind == "objects"
        else ["part0", "input1", "part2"]
    )
    assert list(back.obs["file"]) == np.repeat(labels, [30, 1, 45]).tolist()
    assert sorted(store.batches) == sorted(f"one/{label}" for label in labels)
    var = store.study("one").table("var")
    assert list(var.columns) == ["chromosome"]
    assert any("mean" in note for note in report.notes)
    store.verify()


def test_one_file_and_the_same_file_cut_in_two_make_the_same_counts(
    tmp_path: Path, make_study: MakeStudy
) -> None:
    adata = make_study(80, 30)
    adata[:33].write_h5ad(tmp_path / "a.h5ad")
    adata[33:].write_h5ad(tmp_path / "b.h5ad")
    one, two = (create_store(tmp_path / f"{name}.atlas") for name in ("one", "two"))
    one.append(adata, study="s", batch_key="batch")
    two.append([tmp_path / "a.h5ad", tmp_path / "b.h5ad"], study="s", batch_key="batch")
    for path in sorted((one.path / "studies/s/X").rglob("*")):
        if path.is_file():
            other = two.path / path.relative_to(one.path)
            assert path.read_bytes() == other.read_bytes()
    for name in ("content_hash", "row_hash", "input_position", "batch"):
        np.testing.assert_array_equal(one.index_array(name), two.index_array(name))


def test_genes_that_differ_are_refused_or_left_out(tmp_path: Path, make_study: MakeStudy) -> None:
    one = make_study(20, [f"gene{i}" for i in range(10)], prefix="x")
    two = make_study(20, [f"gene{i}" for i in range(12, 2, -1)], prefix="y")
    store = create_store(tmp_path / "s.atlas")
    with pytest.raises(InputError) as caught:
        store.append([one, two], study="s")
    message = str(caught.value)
    assert "did not measure the same genes" in message
    assert "3 genes only in input0 (AnnData in memory): gene0, gene1, gene2" in message
    assert "3 genes only in input1 (AnnData in memory): gene12, gene11, gene10" in message
    assert "--genes-of-all" in message
    report = store.append([one, two], study="s", genes_of_all=True)
    assert "7 genes that all 2 inputs have were kept" in report.notes
    shared = [f"gene{i}" for i in range(3, 10)]
    assert list(store.var.index) == shared
    back = to_anndata(store, order="input")
    np.testing.assert_array_equal(back.X[:20].toarray(), one[:, shared].X.toarray())
    np.testing.assert_array_equal(back.X[20:].toarray(), two[:, shared].X.toarray())
    with pytest.raises(InputError, match="no gene in common"):
        store.append([one, make_study(5, ["A", "B"], prefix="z")], study="t", genes_of_all=True)
    assert store.studies == ("s",)


def test_genes_meet_by_their_ids(tmp_path: Path, make_study: MakeStudy) -> None:
    one = make_study(20, ["A", "B"], prefix="x")
    two = make_study(20, ["ENSG00000000002", "ENSG00000000001"], prefix="y")
    one.var["gene_ids"] = ["ENSG00000000001", "ENSG00000000002"]
    store = create_store(tmp_path / "s.atlas")
    store.append([one, two], study="s")
    back = to_anndata(store, order="input")
    assert list(back.var_names) == ["A", "B"]
    np.testing.assert_array_equal(back.X[20:].toarray(), two.X.toarray()[:, ::-1])


def test_row_names_are_unique_over_files(tmp_path: Path, make_study: MakeStudy) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        make_study(20, 10, seed=ord(folder)).write_h5ad(tmp_path / folder / "x.h5ad")
    paths = [tmp_path / "a" / "x.h5ad", tmp_path / "b" / "x.h5ad"]
    store = create_store(tmp_path / "s.atlas")
    with pytest.raises(InputError) as caught:
        store.append(paths, study="s")
    message = str(caught.value)
    assert "20 names, e.g. cell0, cell1" in message
    assert str(paths[0]) in message
    assert "--prefix-rows" in message
    store.append(paths, study="s", prefix_rows=True, batch_key=["file", "batch"])
    assert set(store.obs([]).index[:3].str[:4]) <= {"a/x:", "b/x:"}
    assert store.batches == ("s/a/x|a", "s/a/x|b", "s/b/x|a", "s/b/x|b")
    store.append(paths[0], study="t", prefix_rows=True, batch_key="file")
    assert "x:cell0" in store.obs([]).index
    assert store.batches[-1] == "t/x"
    with pytest.raises(InputError, match="cannot be told apart"):
        store.append([paths[0], paths[0]], study="u")
    with pytest.raises(ConfigError, match="No input was given"):
        store.append([], study="u")


def test_columns_of_obs_are_joined(tmp_path: Path, make_study: MakeStudy) -> None:
    one, two = make_study(4, 5, prefix="x"), make_study(4, 5, prefix="y", seed=1)
    one.obs["n"], two.obs["n"] = [1, 2, 3, 4], [5, 6, 7, 8]
    one.obs["only"], one.obs["flag"] = [1, 2, 3, 4], True
    one.obs["stage"] = pd.Categorical(["b", "a", "b", "a"], categories=["b", "a"])
    two.obs["stage"] = pd.Categorical(["c", "a", "c", "a"], categories=["c", "a"])
    two.obs["file"] = "mine"
    store = create_store(tmp_path / "s.atlas")
    report = store.append([one, two], study="s")
    assert any("'file' already" in note for note in report.notes)
    obs = store.obs().loc[[*one.obs_names, *two.obs_names]]
    assert obs["n"].tolist() == [*range(1, 9)]
    assert obs["only"].tolist()[:4] == [1, 2, 3, 4]
    assert obs["only"].isna().tolist() == [False] * 4 + [True] * 4
    assert obs["flag"].tolist()[:4] == [True] * 4
    assert obs["stage"].tolist() == ["b", "a", "b", "a", "c", "a", "c", "a"]
    assert list(obs["stage"].cat.categories) == ["b", "a", "c"]
    assert obs["file"].tolist()[4:] == ["mine"] * 4


def test_a_bad_file_among_good_ones_is_named_and_leaves_nothing(
    tmp_path: Path, three: tuple[list[Path], list[AnnData]]
) -> None:
    paths, parts = three
    bad = parts[2].copy()
    bad.X.data[7] = 0.5
    bad.write_h5ad(paths[2])
    store = create_store(tmp_path / "s.atlas")
    before = sorted(p for p in store.path.rglob("*"))
    with pytest.raises(InputError, match=r"fractions\n(?s:.*)part2.h5ad"):
        store.append(paths, study="s")
    assert [p for p in store.path.rglob("*") if "writer" not in p.name] == [
        p for p in store.path.rglob("*") if p in before
    ]
    assert open_store(store.path).studies == ()


def test_the_command_line(
    tmp_path: Path,
    three: tuple[list[Path], list[AnnData]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = [str(path) for path in three[0]]
    where = str(tmp_path / "s.atlas")
    options = ["--study", "s", "--batch-key", "file", "--memory", "300MB"]
    assert main(["ingest", where, *paths, *options, "--prefix-rows"]) == 0
    assert "s: 76 cells" in capsys.readouterr().out
    assert open_store(where).batches == ("s/part0", "s/part1", "s/part2")
    assert main(["ingest", where, *paths, "--study", "t", "--memory", "1kB"]) == 2
    assert "give --memory 1MB or more" in capsys.readouterr().err
