"""Updates that were interrupted and not gone on with: told of, and removed when asked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from living_helpers import KEYS, files_of, update
from workflows_helpers import study as make_study

import atlas
from atlas.cli import main
from atlas.errors import LockedError, StoreError
from atlas.store import manifest as manifests
from atlas.workflows import living, unfinished


def interrupted(store: Path, source: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Begin an update by Ctrl-C after the study was ingested."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(living, "extend_reference", stop)
        with pytest.raises(KeyboardInterrupt):
            update(store, source, **options)


def states_and_data(store: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(store).items() if not name.startswith(".update")}


def test_the_commands_name_it_and_remove_it(
    living_folder: Path,
    living_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store, query = str(living_store), str(living_folder / "q.h5ad")
    line = ["update", store, query, "--study", "kang", "--model", "scvi", "--batch-key", "batch"]
    line += ["--max-epochs", "1", "--threads", "1", "--device", "cpu"]
    for command in (["history", store], ["info", store]):
        assert main(command) == 0
        assert "unfinished" not in capsys.readouterr().out

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before = states_and_data(living_store)
    with monkeypatch.context() as patch:
        patch.setattr(living, "extend_reference", stop)
        patch.setattr(sys, "argv", ["atlas", *line, "--fresh"])
        assert main([*line, "--fresh"]) == 130
    capsys.readouterr()
    for command in (["history", store], ["info", store]):
        assert main(command) == 0
        out = capsys.readouterr().out
        assert "unfinished update by kang, model scvi: begun 20" in out
        assert " MB\n" in out
        assert f"\n  go on: atlas {' '.join(line)}\n" in out  # --fresh would start anew
        assert f"\n  or be rid of it: atlas drop {store} kang --unfinished\n" in out
    assert main(["history", store, "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["unfinished"]
    assert (one["study"], one["goes_on"], one["running"]) == ("kang", True, False)
    assert one["n_bytes"] > 10_000
    assert main(["info", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unfinished"] == [one]

    assert main(["drop", store, "kang"]) == 2
    assert "was interrupted: --unfinished removes" in capsys.readouterr().err
    assert main(["drop", store, "kang", "--unfinished", "--purge"]) == 2
    assert "in no state of the store" in capsys.readouterr().err
    assert main(["drop", store, "kang", "--unfinished"]) == 0
    assert "kang: what an update begun 20" in capsys.readouterr().out
    assert files_of(living_store) == before
    assert main(["drop", store, "kang", "--unfinished"]) == 2
    assert "no unfinished update of this study\n  found: kang" in capsys.readouterr().err
    assert main(line) == 0
    assert "going on" not in capsys.readouterr().out


def test_the_command_that_is_told_goes_on(
    living_folder: Path, living_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(living_store, living_folder / "q.h5ad", monkeypatch)
    (one,) = atlas.unfinished_updates(atlas.open_store(living_store))
    assert one.goes_on
    assert update(living_store, living_folder / "q.h5ad").notes == (
        "going on with the update that was interrupted",
    )
    assert atlas.unfinished_updates(atlas.open_store(living_store)) == ()


def test_one_at_work_is_told_as_such_and_stays(
    living_folder: Path, living_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def look(*arguments: Any, **options: Any) -> Any:
        seen.extend(atlas.unfinished_updates(atlas.open_store(living_store)))
        with pytest.raises(LockedError, match="update kang"):
            atlas.discard_update(living_store, "kang")
        return measure(*arguments, **options)

    measure = living.measure_drift
    monkeypatch.setattr(living, "measure_drift", look)
    update(living_store, living_folder / "q.h5ad")
    (one,) = seen
    assert (one.running, one.goes_on) == (True, False)
    assert one.do == (f"it is at work now: process {os.getpid()} on {os.uname().nodename}",)
    assert atlas.open_store(living_store).studies[-1] == "kang"


def test_a_killed_one_is_not_at_work(
    living_folder: Path, living_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(living_store, living_folder / "q.h5ad", monkeypatch)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    who = {"host": os.uname().nodename, "since": "now", "action": "update kang"}
    for pid, running in ((gone.pid, False), (os.getpid(), True)):
        (living_store / "writer.json").write_text(json.dumps({**who, "pid": pid}))
        (one,) = atlas.unfinished_updates(atlas.open_store(living_store))
        assert one.running == running
    for damaged in ("", "[]", '{"host": 3}'):
        (living_store / "writer.json").write_text(damaged)
        assert manifests.who_writes(living_store) is None


def test_it_is_said_where_the_same_command_does_not_go_on(
    living_folder: Path, living_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told() -> str:
        (one,) = atlas.unfinished_updates(atlas.open_store(living_store))
        assert not one.goes_on
        return one.do[0]

    query = Path(shutil.copy(living_folder / "q.h5ad", living_store.parent))
    interrupted(living_store, make_study(3, 200, range(60)), monkeypatch)
    assert "an AnnData in memory" in told()
    interrupted(living_store, query, monkeypatch)
    os.utime(query, (0, 0))
    assert "its input has changed since" in told()
    query.unlink()
    assert "its input has changed since" in told()
    atlas.open_store(living_store).record_genes(["gene1", "gene2"], "given", 2)
    assert "the store has changed since" in told()

    # A study of that name that was ingested meanwhile is none of its business.
    atlas.open_store(living_store).append(living_folder / "q.h5ad", study="kang", **KEYS)
    assert "a study of this name is in the store" in told()
    before = states_and_data(living_store)
    assert atlas.discard_update(living_store, "kang").study == "kang"
    assert files_of(living_store) == before
    assert atlas.open_store(living_store).studies[-1] == "kang"


def test_a_removal_that_was_killed_is_no_update_to_go_on_with(
    living_folder: Path, living_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(work: Path) -> None:
        shutil.rmtree(work / "store" / "studies")
        raise KeyboardInterrupt

    interrupted(living_store, living_folder / "q.h5ad", monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "shutil", SimpleNamespace(rmtree=killed))
        with pytest.raises(KeyboardInterrupt):
            atlas.discard_update(living_store, "kang")
    (one,) = atlas.unfinished_updates(atlas.open_store(living_store))
    assert (one.model, one.goes_on) == (None, False)
    assert update(living_store, living_folder / "q.h5ad").notes == ()
    assert atlas.verify(living_store).whole


def test_room_that_it_shares_with_the_store_is_not_its_own(
    living_folder: Path, living_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(living_store, living_folder / "q.h5ad", monkeypatch)
    (one,) = atlas.unfinished_updates(atlas.open_store(living_store))
    files = [path for path in one.path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert one.n_bytes == sum(path.stat().st_size for path in files)
    largest = max(files, key=lambda path: path.stat().st_size)
    os.link(largest, living_store.parent / "another")
    (again,) = atlas.unfinished_updates(atlas.open_store(living_store))
    assert again.n_bytes == one.n_bytes - largest.stat().st_size


def test_no_other_folder_is_removed(living_store: Path) -> None:
    elsewhere = living_store.parent / "elsewhere"
    elsewhere.mkdir()
    (living_store / ".update-linked").symlink_to(elsewhere)
    for study in ("linked", "../manifests", ""):
        with pytest.raises(StoreError, match=r"no unfinished update[\s\S]*there are none"):
            atlas.discard_update(living_store, study)
    assert elsewhere.is_dir()
