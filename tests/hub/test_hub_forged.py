"""Folders and parts that lie, with digests as a forger would make them: none is believed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hub_helpers import declare, flipped, members

import atlas
from atlas.errors import PackageError
from atlas.hub import manifest

Listing = Callable[[Path], set[str]]
Edit = Callable[[Path], object]


# folders


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda p: (p / "run.py").write_text("import os"), "run.py, undeclared"),
        (lambda p: (p / "model" / ".hidden").write_text("x"), "another form"),
        (lambda p: _link(p / "card.md", "/etc/passwd"), "'card.md': a symbolic link"),
        (lambda p: (p / "more").symlink_to("/tmp"), "'more': a symbolic link"),
        (lambda p: _pipe(p / "card.md"), "'card.md': a pipe"),
        (lambda p: (p / "card.md").unlink(), "no card.md"),
        (lambda p: (p / "package.json").unlink(), "no package.json"),
        (lambda p: (p / "card.md").write_text("x"), "of 1 bytes where"),
    ],
)
def test_a_hostile_folder_is_refused(
    package: Path, tmp_path: Path, listing: Listing, edit: Edit, words: str
) -> None:
    shutil.copytree(package, tmp_path / "p")
    edit(tmp_path / "p")
    before = listing(tmp_path)
    with pytest.raises(PackageError) as raised:
        atlas.fetch(tmp_path / "p", tmp_path / "out")
    assert words in str(raised.value)
    assert listing(tmp_path) == before


def _link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("name", ["card.md", "model/model.json", "reference.safetensors"])
def test_what_is_not_a_file_is_not_loaded(package: Path, tmp_path: Path, name: str) -> None:
    """Where nobody fetched it: a folder that came by other means."""
    shutil.copytree(package, tmp_path / "p")
    shutil.copy(tmp_path / "p" / name, tmp_path / "elsewhere")
    _link(tmp_path / "p" / name, str(tmp_path / "elsewhere"))
    with pytest.raises(PackageError, match="no file"):
        atlas.load_package(tmp_path / "p")


def test_a_flipped_bit_of_any_part(package: Path, tmp_path: Path) -> None:
    for name, data in members(package)[1:]:
        shutil.copytree(package, tmp_path / "p")
        (tmp_path / "p" / name).write_bytes(flipped(data))
        with pytest.raises(PackageError, match=r"not what was shared|not JSON") as raised:
            atlas.load_package(tmp_path / "p")
        assert name in str(raised.value)
        shutil.rmtree(tmp_path / "p")


# what the parts say, with digests as a forger would make them


def _json(name: str, **values: Any) -> Edit:
    def edit(package: Path) -> None:
        path = package / name
        path.write_text(json.dumps({**json.loads(path.read_bytes()), **values}))

    return edit


def _config(**values: Any) -> Edit:
    def edit(package: Path) -> None:
        config = json.loads((package / "model" / "model.json").read_bytes())["config"]
        _json("model/model.json", config={**config, **values})(package)

    return edit


def _labels(names: list[Any]) -> Edit:
    return _json("model/model.json", labels={"names": names, "parents": [-1] * len(names)})


def _covariate(categories: list[Any]) -> Edit:
    def edit(package: Path) -> None:
        columns = json.loads((package / "model" / "model.json").read_bytes())["columns"]
        columns = {**columns, "categorical": {"donor": categories}}
        _json("model/model.json", columns=columns)(package)

    return edit


def _of_reference(**values: Any) -> Edit:
    def edit(package: Path) -> None:
        reference = json.loads((package / "package.json").read_bytes())["reference"]
        _json("package.json", reference={**reference, **values})(package)

    return edit


def _tensors(**values: Any) -> Edit:
    def edit(package: Path) -> None:
        path = package / "reference.safetensors"
        tensors = safetensors.numpy.load_file(path)
        for name, value in values.items():
            made = value(tensors[name]) if callable(value) else value
            tensors[name] = np.ascontiguousarray(made)
        path.write_bytes(safetensors.numpy.save(tensors))

    return edit


def _text(name: str, content: str) -> Edit:
    return lambda package: (package / name).write_text(content)


_DEEP = "[" * 200_000 + "]" * 200_000
_MIXED = [i if i % 2 else str(i) for i in range(200_000)]
"""No two alike, and not to be sorted: to compare all pairs takes time with the square of them."""


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_json("package.json", version=3, novelty=1), "by a newer version of Atlas"),
        (_json("package.json", version=0), "$.version"),
        (_json("package.json", schema="other"), "$.schema"),
        (_json("package.json", novelty=1), "novelty"),
        (_json("package.json", title=None), "$.title"),
        (_text("package.json", "[]"), "is not of type 'object'"),
        (_text("package.json", "{"), "not JSON"),
        (_text("package.json", _DEEP), "recursion"),
        (_text("package.json", '{"version": NaN}'), "NaN"),
        (_text("package.json", '{"version": 1e999}'), "1e999"),
        (_text("package.json", '{"version": ' + "9" * 5000 + "}"), "not JSON"),
        (_of_reference(n_obs=5), "not those of package.json"),
        (_of_reference(n_latent=5), "not those of package.json"),
        (_of_reference(studies=["study_1"]), "codes do not fit"),
        (_of_reference(studies=["study_1", "study_1"]), "a name comes twice in study"),
        (_of_reference(studies=["study_1", "x"]), "studies that the model does not know"),
        (_of_reference(labels=["a"]), "codes do not fit"),
        (_of_reference(columns={"age": None}), "not those of package.json"),
        (_of_reference(columns={"age": [1] * 200_000}), "1 is not of type 'string'"),
        (_of_reference(labels=[str(i) for i in range(10_001)]), "$.reference.labels"),
        (_tensors(study=lambda v: v - 1), "no study or batch"),
        (_tensors(batch=lambda v: v + 10**6), "codes do not fit"),
        (_tensors(label=lambda v: v.astype(np.float32)), "codes are of another type"),
        (_tensors(embedding=lambda v: v.astype(np.float64)), "not of finite float32"),
        (_tensors(embedding=lambda v: v / 0), "not of finite float32"),
        (_tensors(surplus=np.zeros(3)), "not those of package.json"),
        (_text("reference.safetensors", "\x80\x04."), "Safetensor"),
        (_text("model/weights.safetensors", "x" * 100), "damaged"),
        (_json("model/model.json", version=99), "later version of Atlas"),
        (_json("model/model.json", model="pickle"), "damaged"),
        (_text("model/model.json", "3"), "damaged"),
        (_json("model/model.json", genes=_MIXED), "$.genes[1]: 1 is not of type 'string'"),
        (_json("model/model.json", genes=["a", "b", "a"]), "$.genes: 'a' comes twice"),
        (_json("model/model.json", studies=_MIXED), "$.studies[1]: 1 is not of type 'string'"),
        (_labels(_MIXED[:9_000]), "$.labels.names[1]: 1 is not of type 'string'"),
        (_covariate(_MIXED), "$.columns.categorical.donor[1]: 1 is not of type 'string'"),
        (_config(n_hidden=10**9), "shapes of the model"),
        (_config(n_hidden=10**30), "damaged"),
        (_config(n_latent=10**7), "shapes of the model"),
        (_config(n_layers=10**9), "too few for the layers"),
        (_config(n_layers="2"), "too few for the layers"),
        (_config(n_hidden=1.5), "damaged"),
        (_config(n_hidden=None), "damaged"),
        (_config(novelty=1), "does not have these fields"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_parts_that_lie(
    package: Path, tmp_path: Path, listing: Listing, edit: Edit, words: str
) -> None:
    forged = tmp_path / "p"
    shutil.copytree(package, forged)
    edit(forged)
    with suppress(ValueError, TypeError, KeyError, RecursionError):  # where it is itself the lie
        declare(forged)
    before = listing(tmp_path)
    for use in (lambda: atlas.load_package(forged), lambda: atlas.fetch(forged, tmp_path / "out")):
        with pytest.raises(PackageError) as raised:
            use()
        assert words in str(raised.value), str(raised.value)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["a\n", "../a", "/a", "model/../a", "a.pkl", "counts/1.safetensors"]
)
def test_parts_of_other_names_cannot_be_declared(package: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(package, tmp_path / "p")
    document = json.loads((tmp_path / "p" / "package.json").read_bytes())
    part = {"bytes": 1, "sha256": "0" * 64}
    for other in (name, f"card.md{name[-1]}" if name.endswith("\n") else name):
        parts = {**document["parts"], other: part}
        data = json.dumps({**document, "parts": parts}).encode()
        with pytest.raises(PackageError, match=r"\$\.parts"):
            manifest.PackageManifest.from_bytes(data, "here")


@pytest.mark.long
@pytest.mark.parametrize("name", ["package.json", "model/model.json"])
def test_any_value_in_any_place(reference: Path, tmp_path: Path, name: str) -> None:
    """Whatever stands where in the JSON, it loads or is refused; nothing else is raised."""
    store, forged = atlas.open_store(reference / "ref.atlas"), tmp_path / "p"
    atlas.share(store, reference / "scanvi", forged, obs_columns=["donor"], counts=True)
    document = json.loads((forged / name).read_bytes())
    odd = [None, True, -1, 0, 3, 10**12, 1e300, "", "x", [], [[]], {}, {"a": 1}, ["x", 1]]
    tried = 0
    for place in _places(document):
        for value in odd:
            changed = json.loads(json.dumps(document))
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            (forged / name).write_text(json.dumps(changed))
            if name != "package.json":
                declare(forged)
            tried += 1
            try:
                atlas.load_package(forged).counts()
            except PackageError:
                continue
    assert tried > 500


def _places(values: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys of an object and of those in it; of lists the first."""
    found = [above] if above else []
    if above[-1:] == ("history",):
        return found
    keys = list(values) if isinstance(values, dict) else [0] if isinstance(values, list) else []
    for key in keys if len(values if keys else ()) else []:
        found += _places(values[key], (*above, key))
    return found


# counts


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t["indices"].__setitem__(0, 10**6),
        lambda t: t["indices"].__setitem__(0, -1),
        lambda t: t["indptr"].__setitem__(1, 10**9),
        lambda t: t["indptr"].__setitem__(0, 1),
        lambda t: t["data"].__setitem__(0, -5),
        lambda t: t.update(data=t["data"].astype(np.float32)),
        lambda t: t.update(indptr=t["indptr"][:1]),
        lambda t: t.update(indptr=t["indptr"][:, None]),
        lambda t: t.pop("data"),
        lambda t: t.update(indptr=t["indptr"][:-1], **_cut(t)),
    ],
)
def test_counts_that_would_lead_scipy_astray(
    reference: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object]
) -> None:
    store, forged = atlas.open_store(reference / "ref.atlas"), tmp_path / "p"
    atlas.share(store, reference / "scvi", forged, counts=True)
    path = forged / "counts" / "000000.safetensors"
    tensors = safetensors.numpy.load_file(path)
    edit(tensors)
    path.write_bytes(safetensors.numpy.save(tensors))
    declare(forged)
    with pytest.raises(PackageError, match="counts"):
        atlas.load_package(forged).counts()


def _cut(tensors: dict[str, Any]) -> dict[str, Any]:
    n = int(tensors["indptr"][-2])
    return {"data": tensors["data"][:n], "indices": tensors["indices"][:n]}
