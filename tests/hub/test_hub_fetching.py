"""Packages from strangers: every hostile one is refused, every interrupted one leaves nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hub_helpers import Server, declare, members, serve, special, tar, zip_special, zipped
from test_hub_sharing import failing

import atlas
from atlas.errors import AtlasError, ConfigError, OutputError, PackageError, RemoteError
from atlas.hub import manifest

Listing = Callable[[Path], set[str]]
Edit = Callable[[Path], object]


# archives


def _pax(name: str) -> tuple[tarfile.TarInfo, bytes]:
    about = tarfile.TarInfo("x")
    about.pax_headers = {"path": name}
    return about, b"x"


def _first(entries: list[Any], extra: list[Any]) -> list[Any]:
    return [*entries[:1], *extra, *entries[1:]]


_TAR: dict[str, tuple[Callable[[list[Any]], bytes], str]] = {
    "absolute": (lambda own: tar([*own, ("/tmp/evil", b"x")]), "absolute path"),
    "above": (lambda own: tar([*own, ("../evil", b"x")]), "leads out of the package"),
    "above within": (lambda own: tar([*own, ("model/../../evil", b"x")]), "leads out"),
    "backslashes": (lambda own: tar([*own, ("..\\evil", b"x")]), "leads out"),
    "drive": (lambda own: tar([*own, ("C:evil", b"x")]), "absolute path"),
    "dot": (lambda own: tar([("./" + name, data) for name, data in own]), "another form"),
    "symbolic link": (
        lambda own: tar(_first(own, [(special("card.md", tarfile.SYMTYPE, "/etc/passwd"), b"")])),
        "'card.md': a symbolic link",
    ),
    "link of a folder": (
        lambda own: tar(_first(own, [(special("model", tarfile.SYMTYPE, "/tmp"), b"")])),
        "'model': a symbolic link",
    ),
    "hard link": (
        lambda own: tar([*own, (special("card.md", tarfile.LNKTYPE, "package.json"), b"")]),
        "a link",
    ),
    "device": (lambda own: tar([*own, (special("card.md", tarfile.CHRTYPE), b"")]), "a device"),
    "block device": (lambda own: tar([*own, (special("x", tarfile.BLKTYPE), b"")]), "a device"),
    "pipe": (lambda own: tar([*own, (special("card.md", tarfile.FIFOTYPE), b"")]), "a pipe"),
    "folder": (lambda own: tar(_first(own, [(special("model", tarfile.DIRTYPE), b"")])), "folder"),
    "sparse": (
        lambda own: tar([*own, (special("x", tarfile.GNUTYPE_SPARSE), b"")]),
        "another kind",
    ),
    "long name": (
        lambda own: tar([*own, ("a/" * 80 + "b", b"x")], format=tarfile.GNU_FORMAT),
        "a long name",
    ),
    "pax": (
        lambda own: tar([*own, _pax("../evil")], format=tarfile.PAX_FORMAT),
        "a header of pax",
    ),
    "undeclared": (lambda own: tar([*own, ("model/pickle.pt", b"x")]), "pickle.pt, undeclared"),
    "twice": (lambda own: tar([*own, own[-1]]), "a second time"),
    "manifest twice": (lambda own: tar([*own, own[0]]), "package.json a second time"),
    "missing": (lambda own: tar(own[:-1]), "no card.md"),
    "order": (lambda own: tar([*own[1:], own[0]]), "model/model.json in the first place"),
    "empty": (lambda own: tar([]), "nothing in the first place"),
    "longer": (lambda own: tar([*own[:-1], (own[-1][0], own[-1][1] + b"x")]), "are declared"),
    "shorter": (lambda own: tar([*own[:-1], (own[-1][0], own[-1][1][1:])]), "are declared"),
    "other bytes": (
        lambda own: tar([*own[:-1], (own[-1][0], b"#" * len(own[-1][1]))]),
        "card.md with SHA-256",
    ),
    "after the end": (lambda own: _longer(tar(own), b"x" * 512), "after the end of the archive"),
    "zeros for ever": (lambda own: _longer(tar(own), bytes(10**6)), "after the end"),
    "truncated": (lambda own: tar(own)[:-2000], "The archive is damaged"),
    "flipped": (lambda own: _flipped(tar(own)), "damaged or with SHA-256"),
    "checksum": (lambda own: _packed(b"package.json".ljust(512, b"\0")), "The archive is damaged"),
    "negative size": (lambda own: _packed(_header(b"\xff" * 12)), "bytes"),
    "immense size": (lambda own: _packed(_header(b"\x80" + b"\0" * 3 + b"\x7f" * 8)), "longer"),
    "no archive": (lambda own: b"\x80\x04\x95pickle", "no .tar.gz and no .zip"),
    "nothing": (lambda own: b"", "no .tar.gz and no .zip"),
    "plain tar": (lambda own: zlib.decompress(tar(own), 31), "no .tar.gz and no .zip"),
}


def _packed(content: bytes) -> bytes:
    packer = zlib.compressobj(wbits=31)
    return packer.compress(content) + packer.flush()


def _longer(archive: bytes, more: bytes) -> bytes:
    return _packed(zlib.decompress(archive, 31) + more)


def _flipped(archive: bytes) -> bytes:
    middle = len(archive) // 2
    return archive[:middle] + bytes([archive[middle] ^ 0x55]) + archive[middle + 1 :]


def _header(size: bytes) -> bytes:
    """The header of ``package.json`` with a size field of its own, and a right checksum."""
    block = bytearray(tarfile.TarInfo("package.json").tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("kind", _TAR)
def test_a_hostile_tar_is_refused(
    package: Path, tmp_path: Path, listing: Listing, kind: str
) -> None:
    make, words = _TAR[kind]
    _refuse(make(members(package)), words, tmp_path, listing)


def _encrypted(own: list[Any]) -> bytes:
    data = bytearray(zipped(own))
    place = data.index(b"PK\x01\x02")
    data[place + 8] |= 1  # in the list of entries, and before the entry itself
    data[6] |= 1
    return bytes(data)


def _by_method(method: int) -> Callable[[list[Any]], bytes]:
    def make(own: list[Any]) -> bytes:
        about = zipfile.ZipInfo("card.md")
        about.compress_type = method
        return zipped([*own[:-1], (about, own[-1][1])])

    return make


def _lying(field: int, value: int) -> Callable[[list[Any]], bytes]:
    """A zip whose list of entries says another size of its first entry."""

    def make(own: list[Any]) -> bytes:
        data = bytearray(zipped(own))
        struct.pack_into("<I", data, data.index(b"PK\x01\x02") + field, value)
        return bytes(data)

    return make


def _many(own: list[Any]) -> bytes:
    """A list of entries of more bytes than is read at once."""
    data = zipped(own)
    start = data.index(b"PK\x01\x02")
    end = data.index(b"PK\x05\x06")
    entry = data[start : data.index(b"PK\x01\x02", start + 4)]
    filled = entry * (6 * 10**6 // len(entry))
    tail = bytearray(data[end:])
    struct.pack_into("<HHII", tail, 8, 65535, 65535, len(filled), start)
    return data[:start] + filled + bytes(tail)


_ZIP: dict[str, tuple[Callable[[list[Any]], bytes], str]] = {
    "absolute": (lambda own: zipped([*own, ("/tmp/evil", b"x")]), "absolute path"),
    "above": (lambda own: zipped([*own, ("../evil", b"x")]), "leads out of the package"),
    "backslashes": (lambda own: zipped([*own, ("..\\evil", b"x")]), "leads out"),
    "drive": (lambda own: zipped([*own, ("C:/evil", b"x")]), "absolute path"),
    "symbolic link": (
        lambda own: zipped([*own, (zip_special("x", stat.S_IFLNK | 0o777), b"/etc/passwd")]),
        "a symbolic link",
    ),
    "device": (lambda own: zipped([*own, (zip_special("x", stat.S_IFCHR), b"")]), "a device"),
    "pipe": (lambda own: zipped([*own, (zip_special("x", stat.S_IFIFO), b"")]), "a pipe"),
    "folder": (lambda own: zipped([*own, ("model/", b"")]), "a folder"),
    "undeclared": (lambda own: zipped([*own, ("model/x.pt", b"x")]), "x.pt, undeclared"),
    "twice": (lambda own: zipped([*own, own[-1]]), "a second time"),
    "manifest twice": (lambda own: zipped([own[0], *own]), "package.json a second time"),
    "missing": (lambda own: zipped(own[:-1]), "no card.md"),
    "no manifest": (lambda own: zipped(own[1:]), "in the first place"),
    "longer": (lambda own: zipped([*own[:-1], (own[-1][0], own[-1][1] + b"x")]), "are declared"),
    "other bytes": (
        lambda own: zipped([*own[:-1], (own[-1][0], b"#" * len(own[-1][1]))]),
        "card.md with SHA-256",
    ),
    "encrypted": (_encrypted, "encrypted"),
    "bzip2": (_by_method(zipfile.ZIP_BZIP2), "compressed by method 12"),
    "lzma": (_by_method(zipfile.ZIP_LZMA), "compressed by method 14"),
    "more than it says": (_lying(24, 100), "damaged"),
    "less than it says": (_lying(24, 10**6), "in place of 1,000,000"),
    "immense": (_lying(24, 2**32 - 2), "longer than is taken"),
    "list of millions": (_many, "a list of entries of"),
    "truncated": (lambda own: zipped(own)[:-100], "damaged"),
    "flipped": (lambda own: _flipped(zipped(own)), "damaged or with SHA-256"),
    "empty": (lambda own: zipped([]), "no .tar.gz and no .zip"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", _ZIP)
def test_a_hostile_zip_is_refused(
    package: Path, tmp_path: Path, listing: Listing, kind: str
) -> None:
    make, words = _ZIP[kind]
    _refuse(make(members(package)), words, tmp_path, listing)


def _refuse(archive: bytes, words: str, tmp_path: Path, listing: Listing) -> None:
    """It is refused in these words, and nothing is left, here or where its entries point."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "package"  # its kind is told by what it holds
    path.write_bytes(archive)
    with pytest.raises(PackageError) as raised:
        atlas.fetch(path, tmp_path / "in" / "out")
    assert any(one in str(raised.value) for one in words.split(" or ")), str(raised.value)
    assert str(path) in str(raised.value)
    assert listing(tmp_path) == {"in", "in/package"}
    assert not Path("/tmp/evil").exists()


def test_the_corpus_is_refused_for_what_is_wrong_with_it(package: Path, tmp_path: Path) -> None:
    """The same archives without the fault are taken."""
    own = members(package)
    for i, archive in enumerate((tar(own), zipped(own), zipped(reversed(own)))):
        (tmp_path / "a").write_bytes(archive)
        assert atlas.fetch(tmp_path / "a", tmp_path / str(i)).n_obs > 0
    (tmp_path / "a").write_bytes(tar(own, format=tarfile.USTAR_FORMAT))
    assert atlas.fetch(tmp_path / "a", tmp_path / "ustar").n_obs > 0


@pytest.mark.parametrize("pack", [tar, zipped])
def test_a_bomb(
    package: Path, tmp_path: Path, listing: Listing, pack: Callable[..., bytes]
) -> None:
    """A package that is in order but for its length: 200 MB of spaces in 200 kB."""
    bomb = tmp_path / "bomb"
    shutil.copytree(package, bomb)
    with (bomb / "reference.safetensors").open("ab") as file:
        file.write(b" " * 200_000_000)
    declare(bomb)
    (tmp_path / "p").write_bytes(pack(members(bomb)))
    shutil.rmtree(bomb)
    assert (tmp_path / "p").stat().st_size < 10**6
    with pytest.raises(PackageError, match="longer than is taken") as raised:
        atlas.fetch(tmp_path / "p", tmp_path / "out", max_bytes="50MB")
    assert "unpacked" in str(raised.value)
    assert "--max-bytes" in str(raised.value)
    assert listing(tmp_path) == {"p"}


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
        (tmp_path / "p" / name).write_bytes(_flipped(data))
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


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_json("package.json", version=2, novelty=1), "by a newer version of Atlas"),
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


# fetching


@pytest.fixture(scope="module")
def archive(package: Path) -> bytes:
    return tar(members(package))


def _fetch_fails(url: str, tmp_path: Path, listing: Listing, **options: Any) -> AtlasError:
    before = listing(tmp_path)
    with pytest.raises(AtlasError) as raised:
        atlas.fetch(url, tmp_path / "out", **options)
    assert listing(tmp_path) == before
    return raised.value


def test_by_url(archive: bytes, tmp_path: Path) -> None:
    sha256 = hashlib.sha256(archive).hexdigest()
    (tmp_path / "p q.tar.gz").write_bytes(archive)
    file = (tmp_path / "p q.tar.gz").as_uri()
    assert "%20" in file
    assert atlas.fetch(file, tmp_path / "of file", sha256=sha256).n_obs > 0

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/moved":
            handler.send_response(302)
            handler.send_header("Location", "/record/files/p.tar.gz?download=1")
            handler.end_headers()
        elif handler.path == "/old":
            handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + archive)  # of no length
        else:
            serve(handler, archive)

    with Server(answer) as server:
        for i, path in enumerate(("/p.tar.gz", "/moved", "/old")):
            package = atlas.fetch(server.url + path, tmp_path / str(i), sha256=sha256.upper())
            assert package.folder == tmp_path / str(i)


def test_from_a_bucket(archive: bytes, tmp_path: Path, object_store: Any, listing: Listing) -> None:
    object_store.put("shared/p.tar.gz", archive)
    object_store.put("shared/long.tar.gz", archive + bytes(5 * 10**6))
    url = f"s3://{'atlastests'}/shared"
    options = {"options": object_store.options}
    sha256 = hashlib.sha256(archive).hexdigest()
    assert atlas.fetch(f"{url}/p.tar.gz", tmp_path / "in", sha256=sha256, **options).n_obs > 0
    error = _fetch_fails(f"{url}/none.tar.gz", tmp_path, listing, **options)
    assert isinstance(error, RemoteError)
    error = _fetch_fails(f"{url}/long.tar.gz", tmp_path, listing, max_bytes="4MB", **options)
    assert "longer than is taken" in str(error)


def test_another_digest_is_not_opened(
    archive: bytes, package: Path, tmp_path: Path, listing: Listing
) -> None:
    with Server(lambda handler: serve(handler, archive)) as server:
        error = _fetch_fails(server.url, tmp_path, listing, sha256="0" * 64)
    assert isinstance(error, PackageError)
    assert f"found: SHA-256 {hashlib.sha256(archive).hexdigest()}" in str(error)
    (tmp_path / "p").write_bytes(b"no archive, which nobody gets to see")
    error = _fetch_fails(str(tmp_path / "p"), tmp_path, listing, sha256="0" * 64)
    assert "has another digest" in str(error)
    error = _fetch_fails(str(package), tmp_path, listing, sha256="0" * 64)
    assert "has another digest" in str(error)
    own = hashlib.sha256((package / "package.json").read_bytes()).hexdigest()
    assert atlas.fetch(package, tmp_path / "in", sha256=own).n_obs > 0


@pytest.mark.parametrize(
    ("answer", "options", "kind", "words"),
    [
        (lambda h, a: h.send_error(404), {}, RemoteError, "404"),
        (lambda h, a: h.send_error(500), {}, RemoteError, "500"),
        (lambda h, a: serve(h, a[:-500], len(a)), {}, RemoteError, "ends 500 bytes early"),
        (lambda h, a: serve(h, b"", 10**15), {}, PackageError, "1,000,000,000,000,000 bytes"),
        (lambda h, a: _for_ever(h), {"max_bytes": "3MB"}, PackageError, "more than 3,000,000"),
        (lambda h, a: time.sleep(3), {"timeout": 0.2}, RemoteError, "timed out"),
        (lambda h, a: h.wfile.write(b"\0\0\0"), {}, RemoteError, "BadStatusLine"),
        (lambda h, a: _redirect(h, "file:///etc/passwd"), {}, RemoteError, "is not allowed"),
        (lambda h, a: _redirect(h, "ftp://127.0.0.1/p"), {}, RemoteError, "ftp://127.0.0.1/p"),
        (lambda h, a: _redirect(h, h.path), {}, RemoteError, "302"),
    ],
)
def test_servers_that_fail(
    archive: bytes,
    tmp_path: Path,
    listing: Listing,
    answer: Callable[[Any, bytes], object],
    options: dict[str, Any],
    kind: type[AtlasError],
    words: str,
) -> None:
    with Server(lambda handler: answer(handler, archive)) as server:
        error = _fetch_fails(f"{server.url}/p.tar.gz", tmp_path, listing, **options)
        assert server.url in str(error)
    assert isinstance(error, kind)
    assert words in str(error), str(error)


def _redirect(handler: Any, to: str) -> None:
    handler.send_response(302)
    handler.send_header("Location", to)
    handler.end_headers()


def _for_ever(handler: Any) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
    while True:
        handler.wfile.write(bytes(10**5))


def test_not_from_an_encrypted_connection_to_one_that_is_none() -> None:
    import urllib.request

    from atlas.hub.download import _Redirects

    request = urllib.request.Request("https://host/p.tar.gz")
    with pytest.raises(RemoteError, match="less to rely on"):
        _Redirects().redirect_request(request, None, 302, "", {}, "http://host/p.tar.gz")
    again = _Redirects().redirect_request(request, None, 302, "", {}, "https://other/p.tar.gz")
    assert again.full_url == "https://other/p.tar.gz"


@pytest.mark.parametrize(
    ("source", "options", "kind", "words"),
    [
        ("ftp://host/p.tar.gz", {}, ConfigError, "of this kind"),
        ("file://host/p.tar.gz", {}, ConfigError, "of this machine"),
        ("nowhere.zip", {}, PackageError, "no such file or folder"),
        ("/dev/zero", {}, PackageError, "This is no file"),
        ("p", {"sha256": "abc"}, ConfigError, "no SHA-256"),
        ("p", {"max_bytes": "much"}, ConfigError, "max_bytes is no number of bytes"),
        ("http://127.0.0.1:1/p", {}, RemoteError, "refused"),
    ],
)
def test_what_cannot_be_fetched(
    tmp_path: Path,
    listing: Listing,
    source: str,
    options: dict[str, Any],
    kind: type[AtlasError],
    words: str,
) -> None:
    error = _fetch_fails(source, tmp_path, listing, **options)
    assert isinstance(error, kind)
    assert words in str(error), str(error)


def test_nothing_is_written_over(package: Path, tmp_path: Path, listing: Listing) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="something here already"):
        atlas.fetch(package, tmp_path / "out")
    with pytest.raises(OutputError, match="is not there"):
        atlas.fetch(package, tmp_path / "no" / "where")
    assert listing(tmp_path) == {"out", "out/mine"}
    (tmp_path / "empty").mkdir()
    assert atlas.fetch(package, tmp_path / "empty").n_obs > 0


@pytest.mark.parametrize("kind", ["url", "folder"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_full_disk_or_ctrl_c_while_fetching_leaves_nothing(
    archive: bytes,
    package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    listing: Listing,
    kind: str,
    error: BaseException,
) -> None:
    with Server(lambda handler: serve(handler, archive)) as server:
        for n in range(50):
            with monkeypatch.context() as patch:
                failing(patch, n, error)
                try:
                    atlas.fetch(server.url if kind == "url" else package, tmp_path / "out")
                    break
                except (OutputError, KeyboardInterrupt) as raised:
                    said = str(raised)
            assert ("nothing is left of it\n  found: [Errno 28]" in said) == (said != "")
            assert listing(tmp_path) == set()
    assert n >= 7
    assert atlas.load_package(tmp_path / "out").n_obs > 0


def test_a_disk_that_fills_in_the_middle_of_a_file(
    archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listing: Listing
) -> None:
    """The kernel takes some bytes, then none."""
    real, left = os.write, [20_000]

    def write(descriptor: int, data: Any) -> int:
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        n = real(descriptor, data[: left[0]])
        left[0] -= n
        return n

    (tmp_path / "p").write_bytes(archive)
    with Server(lambda handler: serve(handler, archive)) as server, monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        for source in (server.url, str(tmp_path / "p")):
            left[0] = 20_000
            error = _fetch_fails(source, tmp_path, listing)
            assert isinstance(error, OutputError)
            assert "No space left" in str(error)
            assert left[0] == 0


def test_a_killed_fetch_can_be_run_again(archive: bytes, tmp_path: Path, listing: Listing) -> None:
    def stall(handler: BaseHTTPRequestHandler) -> None:
        serve(handler, archive[:20_000], len(archive))
        time.sleep(60)

    code = "import sys, atlas; atlas.fetch(sys.argv[1], sys.argv[2])"
    with Server(stall) as server:
        process = subprocess.Popen([sys.executable, "-c", code, server.url, str(tmp_path / "out")])
        while not listing(tmp_path) and process.poll() is None:
            time.sleep(0.05)
        with pytest.raises(OutputError, match="Another process is writing this"):
            atlas.fetch(server.url, tmp_path / "out")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert listing(tmp_path) == {".out.partial"}, "the download has no name"
    (tmp_path / ".out.partial" / "package").mkdir()  # killed a little later
    (tmp_path / ".out.partial" / "package" / "card.md").write_text("half")
    with Server(lambda handler: serve(handler, archive)) as server:
        assert atlas.fetch(server.url, tmp_path / "out").n_obs > 0
    assert not any(name.startswith(".") for name in listing(tmp_path))
