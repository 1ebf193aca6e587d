"""Packages by path and URL: what fails in mid-fetch leaves nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from hub_helpers import Server, failing, members, serve, tar

import atlas
from atlas.errors import AtlasError, ConfigError, OutputError, PackageError, RemoteError

Listing = Callable[[Path], set[str]]
Edit = Callable[[Path], object]


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
