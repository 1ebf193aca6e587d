"""`atlas evaluate`, `compare`, `report` and `baseline`: what they print, write and refuse."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from anndata import AnnData

import atlas
from atlas.cli import main
from atlas.workflows import results

MakeStudy = Callable[..., AnnData]
Run = Callable[..., str]


@pytest.fixture
def store(tmp_path: Path, make_study: MakeStudy) -> atlas.CountStore:
    """200 cells of two batches and two labels, with an embedding `z` and another, `y`."""
    made = atlas.create_store(tmp_path / "s.atlas")
    made.append(make_study(200), study="one", batch_key="batch", label_key="cell_type")
    rng = np.random.default_rng(0)
    for name in ("z", "y"):
        z = rng.standard_normal((200, 3)) + made.obs_codes["label"][:, None]
        made.write_embedding(name, z.astype(np.float32), {})
    return made


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """What a command prints; it ends with the code given."""

    def run(*arguments: object, code: int = 0) -> str:
        capsys.readouterr()
        try:
            ended = main([str(argument) for argument in arguments])
        except SystemExit as leaving:  # argparse's own errors
            ended = int(str(leaving.code))
        out, err = capsys.readouterr()
        assert ended == code, err
        assert "Traceback" not in err
        return err if code else out

    return run


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--seed", -1, "0 to 4,294,967,295"),
        ("--queries", 1, "from 2"),
        ("--queries", "many", "from 2"),
        ("--graph-cells", -3, "from 0"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "compare", "report"])
def test_options_out_of_range(
    store: atlas.CountStore, run: Run, command: str, option: str, value: object, expected: str
) -> None:
    told = run(command, store.path, "--embedding", "z", option, value, "--out", "x", code=2)
    assert f"argument {option}: {value} is out of range; expected a whole number" in told
    assert expected in told


@pytest.mark.parametrize(
    "option",
    [
        "evaluate --json",
        "evaluate --csv",
        "compare --json",
        "compare --csv",
        "compare --scib",
        "report --out",
    ],
)
@pytest.mark.parametrize("where", ["no/folder.svg", "folder.svg"])
def test_outputs_are_tried_before_anything_is_measured(
    store: atlas.CountStore,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    where: str,
) -> None:
    command, option = option.split()
    for name in ("evaluate_embedding", "compare_embeddings"):
        monkeypatch.setattr(results, name, lambda *_, **__: pytest.fail("it was measured"))
    (tmp_path / "folder.svg").mkdir()
    embeddings = ("z", "y") if command == "compare" else ("z",)
    told = run(command, store.path, "--embedding", *embeddings, option, tmp_path / where, code=2)
    assert "The file cannot be written" in told
    assert "no folder" in told if "/" in where else "a folder of this name" in told
    assert f"path: {tmp_path / where}" in told


def test_a_report_of_cells_at_one_place(store: atlas.CountStore, run: Run, tmp_path: Path) -> None:
    store.write_embedding("flat", np.ones((200, 5), np.float32), {})
    out = tmp_path / "report.html"
    run("report", store.path, "--embedding", "flat", "--out", out)
    text = out.read_text()
    assert "drawn by principal components" in text
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text).lower().split()
