"""Archives of any entries but those that `atlas share` writes: each is refused, nothing is left."""

from __future__ import annotations

import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_helpers import declare, flipped, members, special, tar, zip_special, zipped

import atlas
from atlas.errors import PackageError

Listing = Callable[[Path], set[str]]
Edit = Callable[[Path], object]


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
    "index": (
        lambda own: tar([*own, ("index.safetensors", b"x")]),
        "index.safetensors, undeclared",
    ),
    "index of faiss": (lambda own: tar([*own, ("index.faiss", b"x")]), "index.faiss, undeclared"),
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
    "flipped": (lambda own: flipped(tar(own)), "damaged or with SHA-256"),
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
    "flipped": (lambda own: flipped(zipped(own)), "damaged or with SHA-256"),
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
