"""Labels of a study that is added, and the scANVI that is extended by them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from living_helpers import KEYS, SMALL, update
from workflows_helpers import study as make_study

import atlas
from atlas.cli import main
from atlas.workflows import living

MODELS: dict[str, dict[str, Any]] = {"by_name": {"label_key": "cell_type"}, "own": {}}
TOLD = "labels of q are taken from 'ct': from now on the model by_name takes the store's own"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``s.atlas`` with a scANVI of an obs column and one of its own labels, and ``q.h5ad``.

    The query has its labels in ``ct``, type_5 among them and ``none`` for no label.
    """
    folder = tmp_path_factory.mktemp("labels")
    store = atlas.create_store(folder / "s.atlas")
    for i in (1, 2):
        store.append(make_study(i, 300, range(60)), study=f"reference_{i}", **KEYS)
    small: dict[str, Any] = {**SMALL, "max_epochs": 1, "classifier_epochs": 1}
    small |= {"n_hidden": 16, "n_latent": 3, "genes": list(store.var.index)}
    for name, given in MODELS.items():
        atlas.train(store, "scanvi", out=folder / name, **small, **given)
        atlas.keep(store, folder / name, name, device="cpu")
    query = make_study(3, 200, range(60))
    label = query.obs["cell_type"].astype(str)
    query.obs["ct"] = label.replace({"type_4": "type_5", "Unknown": "none"})
    query.obs["cell_type"] = label.where(label != "type_1", "Unknown")
    query.write_h5ad(folder / "both.h5ad")
    del query.obs["cell_type"]
    query.write_h5ad(folder / "q.h5ad")
    return folder


@pytest.fixture
def store(folder: Path, tmp_path: Path) -> Path:
    """A copy to write to."""
    return Path(shutil.copytree(folder / "s.atlas", tmp_path / "s.atlas"))


def command(store: Path, source: Path, model: str, key: str) -> list[str]:
    line = ["update", str(store), str(source), "--study", "q", "--model", model]
    line += ["--batch-key", "batch", "--label-key", key, "--unlabeled", "none"]
    return [*line, "--max-epochs", "1", "--threads", "1", "--device", "cpu"]


@pytest.mark.parametrize("file", ["q.h5ad", "both.h5ad"])
@pytest.mark.parametrize("model", MODELS)
def test_labels_of_another_column_reach_the_model(
    folder: Path, store: Path, model: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(store, folder / file, model, "ct")) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert (TOLD in out) == (model == "by_name")
    assert "new classes: type_5\n" in out
    opened = atlas.open_store(store)
    made = atlas.stored_model(opened, model)
    assert made.surgery[-1].labels == ("type_5",)
    assert made.columns.label is None
    # What is shared by the model's column has the reference's labels, and the study's.
    shipment = atlas.workflows.sharing.prepare_share(opened, made, embedding=model)
    assert shipment.labels is not None
    assert shipment.labels.names == opened.labels


def test_the_models_own_column_stays_it(
    folder: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "cell_type"
    assert main(command(store, folder / "both.h5ad", "by_name", key)) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "from now on" not in out
    assert "new classes" not in out
    made = atlas.stored_model(atlas.open_store(store), "by_name")
    assert made.columns.label == "cell_type"
    assert made.surgery[-1].labels == ()


def test_killed_when_it_was_whole_the_same_command_says_so(
    folder: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Though the model has another column of labels by then."""
    publish = vars(living)["publish"]

    def killed(*args: Any) -> None:
        publish(*args)
        raise KeyboardInterrupt

    line = command(store, folder / "q.h5ad", "by_name", "ct")
    with monkeypatch.context() as patch:
        patch.setattr(living, "publish", killed)
        assert main(line) != 0
    capsys.readouterr()
    assert main(line) == 0, capsys.readouterr().err
    assert "the update was whole already" in capsys.readouterr().out


def test_from_python_they_reach_it_too(folder: Path, store: Path) -> None:
    keys = {"batch_key": "batch", "label_key": "ct"}
    chosen: dict[str, Any] = {"study": "q", "model": "by_name", "ingest": keys, "max_epochs": 1}
    other = Path(shutil.copytree(store, store.parent / "other.atlas"))
    report = update(store, folder / "q.h5ad", **chosen)
    assert any(note.startswith(TOLD) for note in report.notes)
    others = update(other, folder / "q.h5ad", label_key="atlas_label", **chosen)
    for path, made_report in ((store, report), (other, others)):
        made = atlas.stored_model(atlas.open_store(path), "by_name")
        assert set(made.surgery[-1].labels) == {"type_5", "none"}
        assert set(made_report.new_classes) == {"type_5", "none"}
        assert made_report.n_trained == made.surgery[-1].n_trained
        assert made_report.n_trained < made_report.n_parameters
        assert made.columns.label is None
