"""Annotating cells: values against pandas, codes against a store ingested with them, errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import atlas
from atlas.cli import main
from atlas.errors import ConfigError, InputError, MissingColumnError, StoreError
from atlas.store import manifest as manifests


@pytest.fixture
def store(tmp_path: Path, make_study) -> atlas.CountStore:
    """Two studies; the first has batches and labels."""
    store = atlas.create_store(tmp_path / "store")
    store.append(make_study(60, 30, 0, "a"), study="one", batch_key="batch", label_key="cell_type")
    store.append(make_study(50, 40, 1, "b"), study="two")
    return store


def test_cells_in_the_table_change_and_no_others(store):
    before, number, fingerprint = store.obs(), store.manifest.number, store.fingerprint
    store.write_embedding("z", np.zeros((110, 2), np.float32), {})
    table = pd.DataFrame(
        {
            "score": [1.5, np.nan, 3.5],
            "cell_type": ["NK", "T", None],
            "age": [30, 40, 50],
            "smoker": [True, False, True],
        },
        index=["a3", "b7", "a9"],
    )
    report = store.annotate(table)
    expected = before.copy()
    expected["cell_type"] = expected["cell_type"].astype(object)
    for name in ("age", "smoker"):
        expected[name] = None
    expected["score"] = expected["score"].astype(object)
    for name in table:
        expected.loc[table.index, name] = table[name].to_numpy(object)
    found = atlas.open_store(store.path).obs()
    for name in expected.columns:
        same = found[name].astype(object).where(found[name].notna(), None)
        wanted = expected[name].astype(object).where(expected[name].notna(), None)
        assert same.tolist() == wanted.tolist(), name
    assert (found["age"].dtype, found["smoker"].dtype) == ("Int64", "boolean")
    assert report.cells == {"one": 2, "two": 1}
    assert atlas.open_store(store.path, number=number).obs().equals(before)
    assert store.fingerprint == fingerprint  # a run goes on: no code has changed
    assert store.embedding("z").shape == (110, 2)
    store.annotate(pd.DataFrame({"score": [9.0]}, index=["a0"]))  # what was annotated before stays
    assert store.obs().loc["a3", "age"] == 30
    assert store.obs().loc["a0", "score"] == 9.0
    assert atlas.verify(store.path).whole


def test_codes_as_if_ingested_with_them(tmp_path, store, make_study):
    adata = make_study(60, 30, 0, "a")
    rng = np.random.default_rng(5)
    donors, types = rng.choice(["d1", "d2", "d3"], 60), rng.choice(["B", "NK", "none"], 60)
    table = pd.DataFrame({"donor": donors, "type": types}, index=adata.obs_names)
    fingerprint = store.fingerprint
    store.annotate(table, batch_key="donor", label_key="type", unlabeled="none")
    other = atlas.create_store(tmp_path / "other")
    adata.obs["donor"], adata.obs["type"] = donors, types
    other.append(adata, study="one", batch_key="donor", label_key="type", unlabeled="none")
    for name in ("batch", "label"):
        ours = store.obs([f"atlas_{name}"])[f"atlas_{name}"].astype(object)[:60]
        theirs = other.obs([f"atlas_{name}"])[f"atlas_{name}"].astype(object)
        assert ours.fillna("-").tolist() == theirs.fillna("-").tolist()
    assert store.batches[:3] == ("one/a", "one/b", "two")  # codes are for ever
    assert store.fingerprint != fingerprint
    entry, reference = store.manifest.studies[0], other.manifest.studies[0]
    for name in ("n_cells", "mean", "variance", "normalized_variance"):
        np.testing.assert_allclose(
            store.part_array(entry, "statistics", name),
            other.part_array(reference, "statistics", name),
        )
    batches = store.part_array(entry, "statistics", "batches")
    assert [store.batches[i] for i in batches] == ["one/d1", "one/d2", "one/d3"]
    assert atlas.verify(store.path).whole


def test_damage_is_found_and_purge_removes_all(store, make_study):
    old = store.manifest.studies[0].parts["index"]
    table = pd.DataFrame({"kind": ["x"] * 60}, index=[f"a{i}" for i in range(60)])
    store.annotate(table, label_key="kind")
    part = store.manifest.studies[0].parts["obs"]
    for folder, file in ((part.path, "column-0.npy"), (old.path, "label.npy")):
        path = store.path / folder / file
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert [Path(f.path) for f in atlas.verify(store.path).findings] == [path]
        if folder == part.path:
            with pytest.raises(StoreError, match="not what was written"):
                atlas.open_store(store.path).obs()
        path.write_bytes(data)
    store.drop("one", purge=True)
    store.append(make_study(9), study="three")  # the next writer removes what is left
    assert not (store.path / part.path).exists()
    assert not (store.path / old.path).exists()


def frame(index, **columns):
    return pd.DataFrame(columns, index=index)


@pytest.mark.parametrize(
    ("table", "options", "error", "message"),
    [
        (frame(["a1", "x1"], k=[1, 2]), {}, InputError, "(?s)not in the store.*1 of 2.*x1"),
        (frame(["b1"], k=[1]), {"study": "one"}, InputError, "(?s)not in the store.*b1.*of one"),
        (frame(["a1", "a1"], k=[1, 2]), {}, InputError, "(?s)more than once.*a1"),
        (frame([None], k=[1]), {}, InputError, "no row name"),
        (frame(["a1"], score=["high"]), {}, InputError, "(?s)mix types.*high.*expected: float"),
        (frame(["a1", "a2"], k=["x", 1]), {}, InputError, "(?s)mixes types.*int, str"),
        (frame(["a1"], atlas_label=["x"]), {}, InputError, "(?s)reserved.*atlas_label"),
        (frame(["a1"]), {}, InputError, "gives no values"),
        (frame(["a1"], k=[1]), {"study": "four"}, StoreError, "(?s)no such study.*one, two"),
        (frame(["a1"], k=[1], atlas_study=["no"]), {}, InputError, "(?s)not in the store.*no"),
        (frame(["a1"], k=[1], atlas_study=["one"]), {"study": "one"}, ConfigError, "twice"),
        (frame(["a1"], k=[1]), {"batch_key": "k"}, InputError, "(?s)no batch.*59 cells"),
        (frame(["a1"], k=[1]), {"label_key": "z"}, MissingColumnError, "(?s)label.*'z'.*cell_type"),
    ],
)
def test_wrong_tables_write_nothing(store, table, options, error, message):
    with pytest.raises(error, match=message):
        store.annotate(table, **options)
    assert manifests.numbers(store.path)[-1] == store.manifest.number
    assert not list(store.path.glob("parts/*/obs-*"))


def test_names_in_two_studies(store, make_study):
    store.append(make_study(20, 30, 2, "a"), study="again")
    with pytest.raises(InputError, match=r"(?s)several studies.*a1.*--study"):
        store.annotate(frame(["a1"], k=[1]))
    store.annotate(frame(["a1", "a1"], k=[1, 2], atlas_study=["one", "again"]))
    store.annotate(frame(["a2"], k=[3]), study="again")
    found = store.obs()[["k", "atlas_study"]].dropna()
    assert sorted(zip(found["k"], found["atlas_study"], strict=True)) == [
        (1, "one"),
        (2, "again"),
        (3, "again"),
    ]


def test_command_line(store, tmp_path, capsys):
    table = tmp_path / "table.csv"
    table.write_text("cell,lane,new\na1,7,x\na2,007,y\n")
    assert main(["annotate", str(store.path), str(table), "--label-key", "new"]) == 0
    assert "one: 2 cells annotated" in capsys.readouterr().out
    store = atlas.open_store(store.path)
    assert store.obs().loc[["a1", "a2"], "lane"].tolist() == ["7", "007"]  # text as in the store
    assert store.obs(["atlas_label"]).dropna()["atlas_label"].tolist().count("y") == 1
    for text, message in (
        ("cell,k,k\na1,1,2\n", "columns of the same name"),
        ("cell,k\na1,1,2,3\n", "cannot be read"),
        ("", "cannot be read"),
        ("cell\tk\na1\t1\n", "gives no values"),
    ):
        table.write_text(text)
        assert main(["annotate", str(store.path), str(table)]) == 2
        assert message in capsys.readouterr().err
    assert main(["annotate", str(store.path), str(tmp_path / "none.csv")]) == 2
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["zarr", "tiledb"])
def test_export_hold_out_and_conversion_see_the_columns(tmp_path, make_study, format):
    if format == "tiledb":
        pytest.importorskip("tiledb", reason="the extra tiledb is not installed")
    store = atlas.create_store(tmp_path / "store", format=format)
    store.append(make_study(120, 30, 0, "a"), study="one", batch_key="batch")
    cells = [f"a{i}" for i in range(120)]
    donors = pd.DataFrame({"donor": np.where(np.arange(120) < 30, "D1", "D2")}, index=cells)
    store.annotate(donors, label_key="donor")
    again = atlas.open_store(store.path)
    assert again.labels == ("D1", "D2")
    exported = atlas.to_anndata(again, order="input")
    assert exported.obs["donor"].tolist() == donors["donor"].tolist()
    assert not atlas.verify(store.path).findings
    other = atlas.convert_store(again, tmp_path / "other")
    assert other.obs()["donor"].tolist() == again.obs()["donor"].tolist()
    options = {"n_hidden": 8, "n_latent": 2, "device": "cpu", "max_epochs": 1}
    genes = list(again.gene_table.names)
    model = atlas.train(again, genes=genes, out=tmp_path / "run", hold_out="donor=D1", **options)
    assert atlas.embed(model, again, name=None).shape == (120, 2)
    with pytest.raises(ConfigError, match="donor"):
        atlas.train(again, genes=genes, out=tmp_path / "no", hold_out="donor=D3", **options)
