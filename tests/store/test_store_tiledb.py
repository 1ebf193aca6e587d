"""Stores of the format tiledb: the same cells as in Zarr, and nothing read as a fill value."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from anndata import AnnData
from safetensors.numpy import load_file

import atlas
from atlas.cli import main
from atlas.errors import ConfigError, CorruptStoreError, FormatError
from atlas.store import layout, study_writer, tiledb_array
from loaders import MinibatchLoader

tiledb = pytest.importorskip("tiledb", reason="the extra tiledb is not installed")


@pytest.fixture
def store(tmp_path: Path, make_study: Callable[..., AnnData], monkeypatch) -> atlas.CountStore:
    """A study of several fragments and tiles."""
    monkeypatch.setattr(layout, "CHUNK", 64)
    monkeypatch.setattr(layout, "SHARD", 256)
    store = atlas.create_store(tmp_path / "store", format="tiledb")
    adata = make_study(90)
    adata.layers["spliced"] = sp.csr_matrix(adata.X) * 2
    options = {"batch_key": "batch", "label_key": "cell_type", "keep_layers": ("spliced",)}
    store.append(adata, study="one", **options)
    return store


def arrays(store: atlas.CountStore) -> Path:
    return store.study("one").folder / "X"


def rows(store: atlas.CountStore) -> np.ndarray:
    """All rows, in the order of an epoch."""
    minibatches = list(MinibatchLoader(store, 16, block_size=4, buffer_size=32))
    return np.concatenate([minibatch.to_scipy().toarray() for minibatch in minibatches])


def test_the_same_cells_as_in_zarr(store, tmp_path, make_study):
    adata = make_study(90)
    twin = atlas.create_store(tmp_path / "zarr")
    twin.append(adata, study="one", batch_key="batch", label_key="cell_type")
    assert (rows(store) == rows(twin)).all()
    assert store.obs().equals(twin.obs())
    for part in ("index", "statistics"):
        mine, theirs = (s.manifest.studies[0].parts[part].files for s in (store, twin))
        assert mine == theirs
    back = atlas.to_anndata(store, order="input")
    assert (back.X != adata.X).nnz == 0
    assert store.study("one").layer("spliced").read(0, 5)[2].sum() == 2 * float(
        store.read_rows(0, 5).data.sum()
    )


def test_training_gives_the_same_weights(tmp_path, real_data):
    adata = ad.read_h5ad(real_data("pbmc3k.h5ad"))[:600].copy()
    weights = []
    for format in ("zarr", "tiledb"):
        store = atlas.create_store(tmp_path / format, format=format)
        store.append(adata, study="pbmc", batch_key="batch")
        atlas.select_genes(store, 200)
        options = {"n_hidden": 16, "n_layers": 1, "n_latent": 4, "device": "cpu", "threads": 1}
        atlas.train(store, out=tmp_path / f"run-{format}", max_epochs=2, seed=3, **options)
        files = sorted((tmp_path / f"run-{format}").glob("*.safetensors"))
        assert files
        weights.append({name: v for file in files for name, v in load_file(file).items()})
    assert weights[0].keys() == weights[1].keys()
    for name, values in weights[0].items():
        assert np.array_equal(values, weights[1][name]), name


def test_a_sound_store_is_sound(store):
    report = store.verify()
    assert report.studies == 1
    n = len(tiledb_array.TileArray(arrays(store) / "indices.tiledb"))
    assert n > 2 * 256
    assert report.chunks >= 4 * -(-n // 64)  # X and a layer, columns and values


def fragments(store: atlas.CountStore, name: str = "data") -> list[Path]:
    return sorted((arrays(store) / f"{name}.tiledb" / "__fragments").iterdir())


def remove_fragment(store: atlas.CountStore) -> str:
    shutil.rmtree(fragments(store)[1])
    return "missing or is not what was written"


def remove_commit(store: atlas.CountStore) -> str:
    """TileDB leaves such a fragment out, and reads fill values in its place."""
    name = fragments(store)[1].name
    (arrays(store) / "data.tiledb" / "__commits" / f"{name}.wrt").unlink()
    return "missing or is not what was written"


def truncate(store: atlas.CountStore) -> str:
    file = fragments(store)[0] / "a0.tdb"
    file.write_bytes(file.read_bytes()[:-7])
    return "missing or is not what was written"


def add_fragment(store: atlas.CountStore) -> str:
    """What somebody else writes over the counts."""
    with tiledb.open(str(arrays(store) / "data.tiledb"), "w") as array:
        array[0:64] = np.ones(64, array.schema.attr(0).dtype)
    return "missing or is not what was written"


def flip(store: atlas.CountStore) -> str:
    file = fragments(store, "indices")[0] / "a0.tdb"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)
    return "cannot be read"


def remove_record(store: atlas.CountStore) -> str:
    (arrays(store) / "indices.tiledb" / "array.json").unlink()
    return "record of a TileDB array is missing"


FAULTS = [remove_fragment, remove_commit, truncate, add_fragment, flip, remove_record]


@pytest.mark.parametrize("damage", FAULTS, ids=lambda damage: damage.__name__)
def test_damage_is_an_error_and_never_zeros(store, damage):
    message = damage(store)
    reopened = atlas.open_store(store.path)
    with pytest.raises(CorruptStoreError, match=message):
        rows(reopened)
    with pytest.raises(CorruptStoreError, match=f"{message}|not what was written"):
        reopened.verify()
    assert "one" in str(atlas.verify(store.path).findings[0].do)


def test_another_schema_is_refused(store):
    folder = arrays(store) / "data.tiledb"
    record = json.loads((folder / "array.json").read_bytes())
    shutil.rmtree(folder)
    tiledb.from_numpy(str(folder), np.zeros((5, 5), np.int64))
    record["fragments"] = tiledb_array._fragments(folder)
    (folder / "array.json").write_text(json.dumps(record))
    with pytest.raises(FormatError, match="another schema"):
        rows(atlas.open_store(store.path))


def test_an_interrupted_ingest_goes_on(tmp_path, make_study, monkeypatch):
    path = tmp_path / "cells.h5ad"
    make_study(90).write_h5ad(path)
    whole = atlas.create_store(tmp_path / "whole", format="tiledb")
    whole.append(path, study="one")
    store = atlas.create_store(tmp_path / "killed", format="tiledb")

    def interrupt(task: tiledb_array.Copy) -> int:
        if task.source.name == "data":
            raise KeyboardInterrupt
        return tiledb_array.copy(task)

    with monkeypatch.context() as patch:
        patch.setattr(study_writer, "copy", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.append(path, study="one")
    assert atlas.open_store(store.path).studies == ()
    report = store.append(path, study="one")
    assert any("going on" in note for note in report.notes)
    assert (rows(store) == rows(whole)).all()
    store.verify()


def test_studies_are_dropped_and_projected(store, tmp_path, make_study):
    store.append(make_study(40, seed=2, prefix="other"), study="two", batch_key="batch")
    genes = list(store.var.index[[5, 2, 9]])
    projected = atlas.project(store, genes, tmp_path / "projected")
    found, expected = (
        sp.csr_matrix((block.data, block.indices, block.indptr), shape=(90, 3))
        for block in (projected.read_rows(0, 90), store.select(genes).read_rows(0, 90))
    )
    assert (found != expected).nnz == 0
    folder = store.study("two").folder
    store.drop("two", purge=True)
    assert not folder.exists()
    store.verify()


def test_from_the_command_line(tmp_path, make_study, capsys):
    path, store = tmp_path / "cells.h5ad", tmp_path / "store"
    make_study(40).write_h5ad(path)
    assert main(["ingest", str(store), str(path), "--study", "one", "--format", "tiledb"]) == 0
    assert main(["verify", str(store)]) == 0
    assert atlas.open_store(store).manifest.studies[0].profile == "tiledb"
    capsys.readouterr()
    again = ["ingest", str(store), str(path), "--study", "two"]
    assert main([*again, "--format", "zarr"]) != 0
    assert "format of a store is fixed" in capsys.readouterr().err
    assert main([*again, "--profile", "small"]) != 0
    assert "no compression profiles" in capsys.readouterr().err


def test_a_format_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match=r"no such format.*\n.*hdf5.*\n.*'zarr' or 'tiledb'"):
        atlas.create_store(tmp_path / "store", format="hdf5")  # type: ignore[arg-type]
    assert not (tmp_path / "store").exists()


def test_without_the_package(tmp_path, monkeypatch):
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(tiledb_array, "import_module", absent)
    with pytest.raises(
        ConfigError, match=r"need the package tiledb(.*\n)*.*atlas-trainer\[tiledb\]"
    ):
        atlas.create_store(tmp_path / "store", format="tiledb")
    assert not (tmp_path / "store").exists()
