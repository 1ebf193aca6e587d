"""The index of a shared reference: the same answers elsewhere, and nothing of it is believed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import safetensors.numpy
from hub_helpers import declare

import atlas
from atlas.errors import PackageError
from atlas.evaluation.index import Choice, Kind, NeighborIndex, choose, neighbor_index
from atlas.evaluation.index.arrays import ListArrays
from atlas.evaluation.index.lists import Approximate
from atlas.evaluation.neighbours import nearest
from atlas.hub import manifest
from atlas.hub import package as packages
from atlas.workflows import prepare_share
from atlas.workflows.indexing import stored_index

pytest.importorskip("faiss", reason="FAISS is not installed")
RNG = np.random.default_rng(5)
QUERIES = RNG.normal(size=(200, 4)).astype(np.float32)
Edit = Callable[[Path], object]


def _chosen(patch: pytest.MonkeyPatch, kind: Kind) -> None:
    """Have an index of this kind chosen, as it would be of many cells."""

    def choice(*arguments: Any, **options: Any) -> Choice:
        asked = options.get("kind")
        return choose(*arguments, **{**options, "kind": kind if asked == "auto" else asked})

    patch.setattr(neighbor_index, "choose", choice)


def _kept(reference: Path, to: Path, kind: Kind) -> atlas.CountStore:
    """A copy of the store with the scvi kept in it, and an index of some kind."""
    shutil.copytree(reference / "ref.atlas", to)
    store = atlas.open_store(to)
    with pytest.MonkeyPatch.context() as patch:
        _chosen(patch, kind)
        atlas.keep(store, reference / "scvi", device="cpu")
    return store


@pytest.fixture(scope="module")
def owner(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> atlas.CountStore:
    """With inverted lists."""
    return _kept(reference, tmp_path_factory.mktemp("owner") / "s.atlas", "ivf")


@pytest.fixture(scope="module")
def indexed(owner: atlas.CountStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with its lists."""
    to = tmp_path_factory.mktemp("indexed") / "p"
    atlas.share(owner, "scvi", to)
    return to


# the same answers


def _same(found: NeighborIndex, expected: NeighborIndex, k: int = 20) -> None:
    ours, theirs = found.search(QUERIES, k), expected.search(QUERIES, k)
    np.testing.assert_array_equal(ours.indices, theirs.indices)
    np.testing.assert_array_equal(ours.distances, theirs.distances)
    assert ours.recall == theirs.recall


@pytest.mark.parametrize("kind", ["ivf", "disk"])
def test_lists_as_arrays_answer_as_the_index_that_they_are_of(kind: Kind, tmp_path: Path) -> None:
    """Also where it is wrong: with two lists looked at, a tenth of the neighbours is missed."""
    z = (100 + RNG.normal(size=(2500, 4))).astype(np.float32)
    built = NeighborIndex.build(z[:2000], kind=kind, device="cpu", seed=4)
    if kind == "ivf":
        built.add(z[2000:])
    z = built.vectors
    index = NeighborIndex.load(built.save(tmp_path / "index"))
    assert index._lists is not None
    index._lists.breadth = 2
    index._recalls.clear()
    lists = ListArrays.of(index)
    assert lists is not None
    again = lists.index(z, device="cpu")
    found = again.search(100 + QUERIES, 20)
    expected = index.search(100 + QUERIES, 20)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.distances, expected.distances)
    assert found.recall == expected.recall
    assert found.recall is not None
    assert 0.3 < found.recall.value < 0.97
    exact = nearest(z, 100 + QUERIES, 20)
    assert (found.indices != exact.indices).any()
    again.add(z[:10])
    assert len(again) == len(z) + 10


@pytest.mark.parametrize("kind", ["exact", "flat", "hnsw"])
def test_there_are_no_lists_of_other_kinds(kind: Kind) -> None:
    z = RNG.normal(size=(300, 4)).astype(np.float32)
    assert ListArrays.of(NeighborIndex.build(z, kind=kind, device="cpu")) is None


@pytest.mark.parametrize("kind", ["ivf", "disk"])
@pytest.mark.parametrize("form", ["", ".zip"])
def test_the_owners_index_comes_along(
    reference: Path, tmp_path: Path, kind: Kind, form: str
) -> None:
    store = _kept(reference, tmp_path / "s.atlas", kind)
    shipment = prepare_share(store, "scvi")
    listing = dict(shipment.listing())
    assert listing["index"] == "15 lists, their centroids and the list of each cell"
    shipment.write(tmp_path / f"p{form}")
    package = atlas.fetch(tmp_path / f"p{form}", tmp_path / "in")
    own, index = stored_index(store, "scvi"), package.index(device="cpu")
    assert own is not None
    assert index is not None
    assert index.choice.kind == "ivf"
    _same(index, own)
    about = package.manifest.index
    assert (about.kind, about.n_lists, about.seed) == (kind, 15, 0)
    assert about.recall is not None
    assert about.recall.value == index.recall(about.recall.k).value
    assert f"Index: 15 inverted lists, {about.breadth} looked at, " in package.card
    assert "batch, label, list of the index" in package.card
    names = {path.name for path in (tmp_path / "in").rglob("*")}
    assert names == {"package.json", "model", "model.json", "weights.safetensors", "card.md"} | {
        "reference.safetensors",
        "index.safetensors",
    }


@pytest.mark.parametrize(
    ("kind", "why"), [("flat", "exact"), ("exact", "exact"), ("hnsw", "FAISS's own file")]
)
def test_of_other_kinds_it_is_said_what_is_there(
    reference: Path, tmp_path: Path, kind: Kind, why: str
) -> None:
    store = _kept(reference, tmp_path / "s.atlas", kind)
    atlas.share(store, "scvi", tmp_path / "p")
    package = atlas.load_package(tmp_path / "p")
    assert package.manifest.index.kind == kind
    assert why in package.manifest.index.why
    assert package.index() is None
    assert "none in the package, search is exact" in package.card
    assert not (tmp_path / "p" / "index.safetensors").exists()


def test_without_a_kept_index_there_is_none(package: Path) -> None:
    opened = atlas.load_package(package)
    assert opened.manifest.index.kind == "none"
    assert opened.manifest.index.why == "no index is kept with the embedding"
    assert opened.index() is None


def test_studies_that_stay_are_in_no_list(
    reference: Path, owner: atlas.CountStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was appended later, without embedding; and one that the model does not know."""
    shutil.copytree(owner.path, tmp_path / "s.atlas")
    store = atlas.open_store(tmp_path / "s.atlas")
    store.append(reference / "study_3.h5ad", study="late", batch_key="batch", label_key="cell_type")
    whole = stored_index(owner, "scvi")
    atlas.share(store, reference / "scvi", tmp_path / "p")
    index = atlas.load_package(tmp_path / "p").index(device="cpu")
    assert index is not None
    assert whole is not None
    _same(index, whole)
    # the kept lists are of the other study's cells too: they are made anew without, by the same
    # rule, by which so few cells have none
    model = atlas.load_model(reference / "scvi")
    fewer = dataclasses.replace(model, studies=("study_1", "x"))
    assert prepare_share(store, fewer).index.kind == "flat"
    _chosen(monkeypatch, "ivf")
    atlas.share(store, fewer, tmp_path / "fewer")
    package = atlas.load_package(tmp_path / "fewer")
    lists, alone = package.lists, NeighborIndex.build(package.embedding)
    made = ListArrays.of(alone)
    assert lists is not None
    assert made is not None
    np.testing.assert_array_equal(lists.centroids, made.centroids)
    index = package.index(device="cpu")
    assert index is not None
    _same(index, alone)


# and it is searched


@pytest.fixture(scope="module")
def mapped(reference: Path, indexed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stranger's store, mapped onto the package."""
    home = tmp_path_factory.mktemp("mapped")
    store = atlas.create_store(home / "query.atlas")
    query = anndata.read_h5ad(reference / "study_3.h5ad")
    store.append(query, study="study_3", batch_key="batch", label_key="cell_type")
    options = {"max_epochs": 5, "lr": 1e-2, "minibatch_size": 64, "threads": 1, "device": "cpu"}
    model = atlas.extend_reference(indexed / "model", store, out=home / "run", **options)
    atlas.embed(model, store, device="cpu")
    return home


def test_labels_from_a_package_are_found_through_its_index(
    reference: Path, owner: atlas.CountStore, indexed: Path, mapped: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As its owner's are, who has the reference's cells and the query in one store."""
    asked = []
    propose = Approximate.propose
    monkeypatch.setattr(
        Approximate, "propose", lambda self, q, k: asked.append(len(q)) or propose(self, q, k)
    )
    package, store = atlas.load_package(indexed), atlas.open_store(mapped / "query.atlas")
    options: dict[str, Any] = {"embedding": "scvi", "k": 20, "name": None}
    found = atlas.transfer_labels(store, reference=package, **options)
    assert "IVF" in found.backend
    assert sum(asked) >= store.n_obs
    assert found.score is not None
    assert found.score.accuracy is not None
    assert found.score.accuracy.accuracy > 0.8
    asked.clear()
    exactly = atlas.transfer_labels(store, reference=package, backend="torch", **options)
    assert exactly.backend == "torch, cpu"
    assert asked == []
    same = found.table["transferred"].astype(str) == exactly.table["transferred"].astype(str)
    assert same.mean() > 0.98
    # no FAISS here: exact, and nothing is raised
    monkeypatch.setattr(packages, "import_faiss", lambda: None)
    assert package.index() is None
    assert "IVF" not in atlas.transfer_labels(store, reference=package, **options).backend


# versions


def _document(package: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = package / "package.json"
    document = json.loads(path.read_bytes())
    edit(document)
    path.write_text(json.dumps(document))


def test_a_package_of_version_1_is_read(package: Path, tmp_path: Path) -> None:
    shutil.copytree(package, tmp_path / "p")
    _document(tmp_path / "p", lambda d: (d.update(version=1), d.pop("index")))
    opened = atlas.fetch(tmp_path / "p", tmp_path / "in")
    assert opened.index() is None
    assert "of a version that had no index" in opened.manifest.index.why
    np.testing.assert_array_equal(opened.embedding, atlas.load_package(package).embedding)


# what lies


def _tensors(edit: Callable[[dict[str, np.ndarray]], object]) -> Edit:
    def write(package: Path) -> None:
        path = package / "index.safetensors"
        tensors = safetensors.numpy.load_file(path)
        edit(tensors)
        whole = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        path.write_bytes(safetensors.numpy.save(whole))

    return write


def _set(**values: Any) -> Edit:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        for name, value in values.items():
            tensors[name] = value(tensors[name]) if callable(value) else value

    return _tensors(edit)


def _about(**values: Any) -> Edit:
    return lambda package: _document(package, lambda d: d["index"].update(values))


def _at(place: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def edit(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.flat[place] = value
        return array

    return edit


def _without_part(package: Path) -> None:
    (package / "index.safetensors").unlink()
    _document(package, lambda d: d["parts"].pop("index.safetensors"))


def _linked(package: Path) -> None:
    (package / "index.safetensors").rename(package.parent / "elsewhere")
    (package / "index.safetensors").symlink_to(package.parent / "elsewhere")


_RECALL = {"k": 50, "value": 1.0, "standard_error": 0.0, "n_queries": 600}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_set(assigned=_at(7, -1)), "rows in lists -1 to 14"),
        (_set(assigned=_at(7, 15)), "rows in lists 0 to 15"),
        (_set(assigned=_at(7, 2**31 - 1)), "rows in lists 0 to 2,147,483,647"),
        (_set(assigned=lambda v: (v + 1) % 15), "whose centroid is not the nearest"),
        (_set(assigned=lambda v: v.astype(np.int64)), "tensors of the index are not those"),
        (_set(assigned=lambda v: v[:-1]), "tensors of the index are not those"),
        (_set(assigned=lambda v: v[:, None]), "tensors of the index are not those"),
        (_set(centroids=_at(3, np.nan)), "centroids that are not finite"),
        (_set(centroids=_at(3, np.inf)), "centroids that are not finite"),
        (_set(centroids=_at(3, 1e30)), "centroids that are not finite"),
        (_set(centroids=lambda v: v.astype(np.float64)), "tensors of the index are not those"),
        (_set(centroids=lambda v: v.T), "tensors of the index are not those"),
        (_set(centroids=lambda v: v[:0]), "tensors of the index are not those"),
        (_set(centroids=np.zeros((15, 10**6), np.float32)), "tensors of the index are not"),
        (_set(centre=_at(0, np.nan)), "centre that are not finite"),
        (_set(centre=lambda v: v.astype(np.float32)), "tensors of the index are not those"),
        (_set(centre=lambda v: v[:-1]), "tensors of the index are not those"),
        (_set(surplus=np.zeros(3)), "tensors of the index are not those"),
        (_tensors(lambda t: t.pop("centre")), "tensors of the index are not those"),
        (lambda p: (p / "index.safetensors").write_bytes(b"IwFl" + bytes(500)), "Safetensor"),
        (lambda p: (p / "index.safetensors").write_bytes(b"\x80\x04."), "Safetensor"),
        (lambda p: (p / "index.safetensors").write_bytes(b""), "Safetensor"),
        (_linked, "index.safetensors"),
        (_about(breadth=0), "15 lists and a breadth of 0"),
        (_about(breadth=16), "15 lists and a breadth of 16"),
        (_about(breadth=-1), "$.index.breadth"),
        (_about(breadth="2"), "$.index.breadth"),
        (_about(n_lists=0), "0 lists and a breadth of"),
        (_about(n_lists=14), "tensors of the index are not those"),
        (_about(n_lists=65537), "$.index.n_lists"),
        (_about(n_lists=16), "tensors of the index are not those"),
        (_about(kind="flat"), "kind 'flat' with index.safetensors"),
        (_about(kind="none"), "kind 'none' with index.safetensors"),
        (_about(kind="hnsw"), "kind 'hnsw' with index.safetensors"),
        (_about(kind="pickle"), "$.index.kind"),
        (_about(seed=-1), "$.index.seed"),
        (_about(seed=2**64), "$.index.seed"),
        (_about(recall_target=0), "$.index.recall_target"),
        (_about(recall={**_RECALL, "value": 2}), "$.index"),
        (_about(recall={**_RECALL, "novelty": 2}), "$.index"),
        (_about(recall={}), "$.index"),
        (_about(why=3), "$.index.why"),
        (_about(novelty=3), "novelty"),
        (lambda p: _document(p, lambda d: d["index"].pop("why")), "'why' is a required"),
        (lambda p: _document(p, lambda d: d.pop("index")), "no index in version 2"),
        (lambda p: _document(p, lambda d: d.update(index=None)), "$.index"),
        (lambda p: _document(p, lambda d: d.update(version=1)), "an index in version 1"),
        (lambda p: _document(p, lambda d: d.update(version=3)), "newer version of Atlas"),
        (_without_part, "kind 'ivf' without index.safetensors"),
        (lambda p: (p / "index.safetensors").unlink(), "index.safetensors"),
    ],
)
def test_an_index_that_lies(indexed: Path, tmp_path: Path, edit: Edit, words: str) -> None:
    """With digests as a forger would make them."""
    forged = tmp_path / "p"
    shutil.copytree(indexed, forged)
    edit(forged)
    if (forged / "index.safetensors").exists() or words.startswith("kind"):
        declare(forged)
    for use in (lambda: atlas.load_package(forged), lambda: atlas.fetch(forged, tmp_path / "out")):
        with pytest.raises(PackageError) as raised:
            use()
        assert words in str(raised.value), str(raised.value)
    assert not (tmp_path / "out").exists()


def test_an_index_that_is_not_as_it_was_shared(indexed: Path, tmp_path: Path) -> None:
    shutil.copytree(indexed, tmp_path / "p")
    path = tmp_path / "p" / "index.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(PackageError, match=r"not what was shared\n  found: index.safetensors"):
        atlas.load_package(tmp_path / "p")


def test_an_index_without_lists_has_no_breadth(package: Path, tmp_path: Path) -> None:
    shutil.copytree(package, tmp_path / "p")
    _about(breadth=3)(tmp_path / "p")
    with pytest.raises(PackageError, match="kind 'none' with 0 lists and a breadth of 3"):
        atlas.load_package(tmp_path / "p")
    assert manifest.VERSION == 2
