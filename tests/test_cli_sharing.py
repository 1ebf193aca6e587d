"""atlas share and atlas fetch: what is said before anything leaves, and what to wrong ways."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from anndata import AnnData

import atlas
from atlas.cli import main
from atlas.cli import sharing as commands

MakeStudy = Callable[..., AnnData]
Atlas = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharing")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Atlas:
    """Run a command that ends with a code, 0 by default; returns what it printed."""

    def run(*arguments: object, code: int = 0) -> str:
        capsys.readouterr()
        found = main([str(one) for one in arguments])
        said = capsys.readouterr()
        assert found == code, said.err
        return said.err if code == 2 else said.out

    return run


@pytest.fixture
def made(folder: Path, make_study: MakeStudy, run: Atlas) -> tuple[Path, Path]:
    """A store with an embedded scvi, and the run; made once."""
    store = folder / "s.atlas"
    if not store.exists():
        adata = make_study(n=120)
        adata.obs["donor"] = ["Jane" if i % 2 else "John" for i in range(120)]
        adata.write_h5ad(folder / "one.h5ad")
        keys = ("--batch-key", "batch", "--label-key", "cell_type")
        run("ingest", store, folder / "one.h5ad", "--study", "one", *keys)
        run("genes", store, "--n", "20")
        options = ("--epochs", "2", "--n-hidden", "8", "--n-latent", "3")
        run("train", store, "--model", "scvi", "--out", folder / "scvi", *options)
        run("embed", folder / "scvi", store)
    return store, folder / "scvi"


def test_share_and_fetch(made: tuple[Path, Path], tmp_path: Path, run: Atlas) -> None:
    store, model = made
    (tmp_path / "about.md").write_text("Cells of *blood*.")
    to = tmp_path / "pbmc.tar.gz"
    given = ("--licence", "CC-BY-4.0", "--citation", "Us, 2025", "--title", "Blood \x1b[31m")
    given += ("--description", tmp_path / "about.md", "--yes")
    said = run("share", store, "--model", model, "--to", to, *given)
    first, _, last = said.partition(str(to))
    assert "This leaves the machine:\n" in first
    lines = {line.strip().split("  ")[0]: line for line in first.splitlines()[1:]}
    assert lines["batches"].endswith("one/a, one/b")
    assert lines["labels"].endswith("the store's: B, T")
    assert lines["of each cell"].endswith("study, batch, label")
    assert lines["counts"].endswith("none")
    assert not any("donor" in line for line in lines)
    digest = hashlib.sha256(to.read_bytes()).hexdigest()
    assert f"SHA-256 {digest}" in last
    said = run("fetch", to, "--to", tmp_path / "in", "--sha256", digest)
    assert said.startswith(
        "Blood \N{REPLACEMENT CHARACTER}[31m\n"
    )  # nothing that a terminal would act on
    assert "scvi: 20 genes, 2 batches; 120 cells, 2 labels" in said
    assert "licence: CC-BY-4.0\ncitation: Us, 2025\n" in said
    assert "Cells of *blood*." in (tmp_path / "in" / "card.md").read_text()
    run("fetch", tmp_path / "in", "--to", tmp_path / "again")
    assert atlas.load_package(tmp_path / "again").n_obs == 120


def test_named_columns_and_counts(made: tuple[Path, Path], tmp_path: Path, run: Atlas) -> None:
    store, model = made
    named = ("--obs-columns", "donor,score", "--counts", "--label-key", "lane", "--yes")
    said = run("share", store, "--model", model, "--to", tmp_path / "p", *named)
    assert "obs column donor     of each cell, as named: Jane, John" in said
    assert "counts               of 20 genes, of each cell" in said
    package = atlas.load_package(tmp_path / "p")
    assert list(package.obs) == ["donor", "score"]
    assert package.labels is not None
    assert package.labels.names == ("0", "1")
    assert package.counts() is not None


def test_a_dry_run_writes_nothing(made: tuple[Path, Path], tmp_path: Path, run: Atlas) -> None:
    store, model = made
    said = run("share", store, "--model", model, "--to", tmp_path / "p", "--dry-run")
    assert "This leaves the machine" in said
    assert "nothing was written (--dry-run)" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("Yes", 0), ("", 1), ("no", 1)])
def test_somebody_agrees(
    made: tuple[Path, Path],
    tmp_path: Path,
    run: Atlas,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    code: int,
) -> None:
    asked = []

    def ask(question: str) -> str:
        asked.append(question)
        return answer

    monkeypatch.setattr(commands.sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", ask)
    store, model = made
    said = run("share", store, "--model", model, "--to", tmp_path / "p", code=code)
    assert len(asked) == 1
    assert (tmp_path / "p").exists() == (code == 0)
    assert ("nothing was written" in said) == (code == 1)


def test_nobody_agrees_where_there_is_no_terminal(
    made: tuple[Path, Path], tmp_path: Path, run: Atlas
) -> None:
    store, model = made
    error = run("share", store, "--model", model, "--to", tmp_path / "p", code=2)
    assert "add --yes" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--obs-columns", "sex"], ["no such obs column", "'sex'"]),
        (["--embedding", "pca"], ["no such embedding", "pca"]),
        (["--description", "none.md"], ["no such file", "none.md"]),
        (["--to", "p.7z"], ["archive of this kind"]),
        (["--to", "no/where"], ["is not there"]),
        (["--model", "nowhere"], ["no such folder"]),
    ],
)
def test_wrong_ways_to_share(
    made: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Atlas,
    options: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    store, model = made
    given = ["--model", str(model), "--to", "p", "--yes", *options]
    error = run("share", store, *given, code=2)
    assert error.count("atlas: ") == 1
    assert "Traceback" not in error
    for word in words:
        assert word in error, error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sha256", "0" * 64], ["has another digest", "expected: SHA-256 000"]),
        (["--sha256", "md5"], ["no SHA-256"]),
        (["--max-bytes", "1kB"], ["longer than is taken", "--max-bytes"]),
        (["--to", "no/where"], ["is not there"]),
    ],
)
def test_wrong_ways_to_fetch(
    made: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Atlas,
    options: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    store, model = made
    run("share", store, "--model", model, "--to", "p.zip", "--yes")
    error = run("fetch", "p.zip", "--to", "in", *options, code=2)
    assert error.count("atlas: ") == 1
    assert "Traceback" not in error
    for word in words:
        assert word in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["p.zip"]


def test_names_of_a_stranger_do_not_act_on_the_terminal(
    made: tuple[Path, Path], tmp_path: Path, run: Atlas
) -> None:
    store, model = made
    run("share", store, "--model", model, "--to", tmp_path / "p", "--yes")
    path = tmp_path / "p" / "package.json"
    document = json.loads(path.read_bytes())
    document["reference"]["studies"] = ["\x1b[2J"]
    path.write_text(json.dumps(document))
    error = run("fetch", tmp_path / "p", "--to", tmp_path / "in", code=2)
    assert "studies that the model does not know" in error
    assert "\x1b" not in error


def test_a_package_of_a_newer_version(made: tuple[Path, Path], tmp_path: Path, run: Atlas) -> None:
    store, model = made
    run("share", store, "--model", model, "--to", tmp_path / "p", "--yes")
    path = tmp_path / "p" / "package.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "version": 7}))
    error = run("fetch", tmp_path / "p", "--to", tmp_path / "in", code=2)
    assert "newer version of Atlas\n  found: version 7" in error
    assert "update Atlas" in error
    assert not (tmp_path / "in").exists()
