"""A store in another format or compression holds the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from anndata import AnnData

import atlas
from atlas.cli import main
from atlas.errors import ConfigError, CorruptStoreError, StoreError
from atlas.store import convert, layout


@pytest.fixture
def store(tmp_path: Path, make_study: Callable[..., AnnData], monkeypatch) -> atlas.CountStore:
    """Two studies with a layer, an embedding, an annotation, genes chosen; one study dropped."""
    monkeypatch.setattr(layout, "CHUNK", 64)
    monkeypatch.setattr(layout, "SHARD", 256)
    store = atlas.create_store(tmp_path / "store")
    for i, name in enumerate(["gone", "one", "two"]):
        adata = make_study(90, 30 + i, seed=i, prefix=name)
        adata.layers["spliced"] = sp.csr_matrix(adata.X) * 0.5
        keys = {"batch_key": "batch", "label_key": "cell_type", "keep_layers": ("spliced",)}
        store.append(adata, study=name, **keys)
    store.drop("gone")
    store.write_embedding("z", np.arange(360, dtype=np.float32).reshape(180, 2), {"how": "made up"})
    atlas.select_genes(store, 5)
    return store


TARGETS = [("zarr", "fast"), ("zarr", "portable"), ("zarr", "small"), ("tiledb", "fast")]


def same(a: atlas.CountStore, b: atlas.CountStore) -> None:
    assert (a.studies, a.batches, a.labels, a.genes) == (b.studies, b.batches, b.labels, b.genes)
    assert a.var.equals(b.var)
    for name, codes in a.obs_codes.items():
        assert (codes == b.obs_codes[name]).all()
    for order in ("store", "input"):
        x, y = (atlas.to_anndata(s, embedding="z", order=order) for s in (a, b))
        assert x.obs.equals(y.obs)
        assert (x.X != y.X).nnz == 0
        assert (x.layers["spliced"] != y.layers["spliced"]).nnz == 0
        assert (x.obsm["X_z"] == y.obsm["X_z"]).all()
        assert (x.obsm["X_pca"] == y.obsm["X_pca"]).all()
    assert a.embedding_details("z") == b.embedding_details("z")
    assert a.split(0.2).train == b.split(0.2).train


@pytest.mark.parametrize(("format", "profile"), TARGETS)
def test_the_same_store(store, tmp_path, make_study, format, profile):
    if format == "tiledb":
        pytest.importorskip("tiledb", reason="the extra tiledb is not installed")
    there = atlas.convert_store(store, tmp_path / "there", format=format, profile=profile)
    same(store, there)
    there.verify()
    kinds = {entry.profile for entry in there.manifest.studies}
    assert kinds == {"tiledb" if format == "tiledb" else profile}
    back = atlas.convert_store(there, tmp_path / "back")
    same(store, back)
    if format == "zarr" and profile == "fast":
        assert there.fingerprint == store.fingerprint
    there.append(make_study(20, seed=9, prefix="more"), study="more")  # it goes on as a store
    assert there.n_obs == store.n_obs + 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "store", "there"]


def test_an_interrupted_conversion_goes_on(store, tmp_path, monkeypatch):
    real, calls = convert._study, []

    def study(source: Path, *arguments: object) -> None:
        calls.append(source.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, *arguments)

    monkeypatch.setattr(convert, "_study", study)
    with pytest.raises(KeyboardInterrupt):
        atlas.convert_store(store, tmp_path / "there", profile="small")
    assert not (tmp_path / "there").exists()
    there = atlas.convert_store(store, tmp_path / "there", profile="small")
    assert calls == ["one", "two", "two"]
    same(store, there)
    there.verify()


def test_wrong_use(store, tmp_path, make_study):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(StoreError, match="cannot be written here"):
        atlas.convert_store(store, tmp_path / "taken")
    with pytest.raises(ConfigError, match="no such profile"):
        atlas.convert_store(store, tmp_path / "there", profile="tiny")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no such format"):
        atlas.convert_store(store, tmp_path / "there", format="hdf5")  # type: ignore[arg-type]
    shard = store.study("two").folder / "X" / "data" / "c" / "0"
    content = bytearray(shard.read_bytes())
    content[20] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptStoreError, match="damaged"):
        atlas.convert_store(atlas.open_store(store.path), tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_from_the_command_line(store, tmp_path, capsys):
    assert main(["convert", str(store.path), str(tmp_path / "small"), "--profile", "small"]) == 0
    same(store, atlas.open_store(tmp_path / "small"))
    assert main(["convert", str(store.path), str(tmp_path / "x.h5ad")]) == 0
    assert (tmp_path / "x.h5ad").exists()
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "x.h5ad"), str(tmp_path / "new")]) != 0
    assert "atlas ingest" in capsys.readouterr().err
