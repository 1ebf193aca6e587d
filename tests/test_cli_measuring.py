"""`atlas evaluate`, `compare`, `report` and `baseline`: what they print, write and refuse."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from anndata import AnnData

import atlas
from atlas.cli import main
from atlas.cli.parser import build_parser
from atlas.evaluation.index import Kind
from atlas.evaluation.measures import NO_BEFORE, NO_INDIVIDUAL
from atlas.workflows import results

MakeStudy = Callable[..., AnnData]
Run = Callable[..., str]


@pytest.fixture
def store(tmp_path: Path, make_study: MakeStudy) -> atlas.CountStore:
    """200 cells of two batches and two labels, with an embedding `z` and another, `y`.

    They have two dimensions, so that a report draws them as they are and needs no UMAP.
    """
    made = atlas.create_store(tmp_path / "s.atlas")
    made.append(make_study(200), study="one", batch_key="batch", label_key="cell_type")
    rng = np.random.default_rng(0)
    for name in ("z", "y"):
        z = rng.standard_normal((200, 2)) + made.obs_codes["label"][:, None]
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
    out, compared = tmp_path / "report.html", tmp_path / "compared.csv"
    run("report", store.path, "--embedding", "flat", "--out", out)
    text = out.read_text()
    assert "drawn by principal components" in text
    note = "all cells lie at one place"
    assert f"<li>{note} (Batch mixing" in text
    assert f"note: {note} (Batch mixing" in run("evaluate", store.path, "--embedding", "flat")
    told = run("compare", store.path, "--embedding", "flat", "z", "--csv", compared)
    assert f"note of flat: {note} (Batch mixing" in told
    assert "note of z" not in told
    with compared.open() as file:
        rows = [row for row in csv.DictReader(file) if row["name"] == "bras" and not row["less"]]
    notes = {row["embedding"]: row["note"] for row in rows}
    assert notes == {"flat": note, "z": ""}
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text).lower().split()


def _keep_index(store: atlas.CountStore, name: str, kind: Kind, folder: Path) -> None:
    z = store.embedding(name)
    index = atlas.NeighborIndex.build(z, kind=kind, recall_target=0.5).save(folder)
    store.extend_embedding(name, "one", z, {}, index=index)


def test_every_figure_is_told_with_k_cells_interval_and_what_searched(
    store: atlas.CountStore, run: Run, tmp_path: Path
) -> None:
    told = run(
        "evaluate", store.path, "--embedding", "z", "--json", tmp_path / "m.json", "--queries", 150
    )
    measures = json.loads((tmp_path / "m.json").read_text())["measures"]
    lines = told.splitlines()
    for measure in measures:
        k = "" if measure["k"] is None else f" (k {measure['k']})"
        if measure["value"] is None:
            assert re.search(rf"not measured: .*{re.escape(measure['title'] + k)}", told)
            assert measure["skipped"] in told
            continue
        (line,) = [
            line
            for line in lines
            if line.startswith(measure["title"] + k + " ") and f" {measure['unit']} " in line
        ]
        assert f"{measure['value']:.4f} ± {measure['standard_error']:.4f}" in line
        assert f"{measure['low']:.4f} to {measure['high']:.4f}" in line
        assert re.search(rf" {measure['n']:,}(  [a-z])?$", line)
        if measure["backend"] is not None:
            (way,) = [x for x in lines if x.startswith(f"  {line[-1]}: ")]
            assert measure["backend"] in way
            assert (measure["recall"] == 1) == ("exact: recall 1" in way)
    assert f"not measured: kNN purity (k 15); k-means conservation ({NO_INDIVIDUAL})" in told
    assert f"not measured: PCR comparison ({NO_BEFORE})" in told


def test_k_of_the_entropy(store: atlas.CountStore, run: Run, tmp_path: Path) -> None:
    base = (store.path, "--embedding", "z")
    told = run("evaluate", *base, "--k", 10, 30, "--json", tmp_path / "m.json")
    found = json.loads((tmp_path / "m.json").read_text())
    names = [m["name"] for m in found["measures"] if m["name"].startswith("mixing_entropy_k")]
    assert names == ["mixing_entropy_k10", "mixing_entropy_k30"]
    assert "Batch mixing, entropy (k 30)" in told
    assert "Batch mixing, entropy (k 50)" not in told
    assert {m["k"] for m in found["groups"] if m["name"].startswith("mixing_entropy_k")} == {10, 30}
    assert "(k 30)" in run("compare", store.path, "--embedding", "z", "y", "--k", 30)
    run("report", *base, "--k", 30, "--out", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    share = atlas.evaluate(store, embedding="z", k=[30])["mixing_share_of_ceiling_k30"].value
    assert f"Batches are mixed to {share:.1%}" in text
    for wrong in (9, 501, "x"):
        assert "10 to 500" in run("evaluate", *base, "--k", 20, wrong, code=2)


def test_what_searches_is_named_and_told(store: atlas.CountStore, run: Run, tmp_path: Path) -> None:
    base = (store.path, "--embedding", "z")
    assert "no index is kept with the embedding 'z'" in run(
        "evaluate", *base, "--backend", "index", code=2
    )
    assert "torch, cpu, exact: recall 1" in run("evaluate", *base, "--backend", "torch")
    _keep_index(store, "z", "exact", tmp_path / "exact")
    assert "torch, cpu, exact: recall 1" in run("evaluate", *base)  # the index that is kept
    _keep_index(store, "z", "hnsw", tmp_path / "hnsw")
    told = run("evaluate", *base)
    assert "HNSW" not in told
    told = run("evaluate", *base, "--backend", "index")
    assert re.search(r"faiss HNSW, CPU, efSearch \d+, recall (0|1)\.\d{4}", told)
    run("report", *base, "--backend", "index", "--out", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "Searched approximately, with the recall that was measured: Batch mixing" in text
    assert "All neighbours whose recall is told were searched exactly" not in text
    run("report", *base, "--backend", "faiss", "--out", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "Searched approximately" not in text
    assert "All neighbours whose recall is told were searched exactly" in text
    assert "faiss flat, CPU, exact: recall 1" in text


def test_compare_tells_the_values_too(store: atlas.CountStore, run: Run, tmp_path: Path) -> None:
    told = run("compare", store.path, "--embedding", "z", "y", "--csv", tmp_path / "c.csv")
    found = atlas.compare(store, ["z", "y"])
    entropy = [found.metrics[name]["mixing_entropy_k50"] for name in ("z", "y")]
    values = " +".join(f"{m.value:.4f} ± {m.standard_error:.4f}" for m in entropy)
    assert re.search(rf"Batch mixing, entropy \(k 50\), nats +{values} +200  a\n", told)
    assert f"not measured: PCR comparison ({NO_BEFORE})" in told
    assert "z less y" in told
    with (tmp_path / "c.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name, measure in zip(("z", "y"), entropy, strict=True):
        (row,) = [
            row
            for row in rows
            if (row["name"], row["embedding"], row["less"]) == ("mixing_entropy_k50", name, "")
        ]
        assert float(row["value"]) == measure.value
    assert [row["skipped"] for row in rows if row["name"] == "pcr_comparison"] == [NO_BEFORE] * 2


def test_report_has_tables_by_batch_and_label(
    store: atlas.CountStore, run: Run, tmp_path: Path
) -> None:
    run("report", store.path, "--embedding", "z", "--out", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    tables = re.findall(r"<details class=\"groups\">.*?</details>", text, flags=re.DOTALL)
    assert ["By batch: 2" in tables[0], "By label: 2" in tables[1]] == [True, True]
    for measure in atlas.evaluate(store, embedding="z").groups:
        kind, _, name = str(measure.of).partition(" ")
        table = tables[("batch", "label").index(kind)]
        (row,) = re.findall(rf"<th scope=\"row\">{re.escape(name)}</th>.*?</tr>", table)
        if measure.value is None:
            assert str(measure.skipped) in row
        else:
            assert f"{measure.value:.3f}" in row


def test_embeddings_of_the_batches_and_before_are_found_in_the_store(
    store: atlas.CountStore, run: Run, tmp_path: Path
) -> None:
    base = (store.path, "--embedding", "z")
    atlas.select_genes(store, n=20)
    run("baseline", store.path)
    run("baseline", store.path, "--per-batch")
    told = run("evaluate", *base)
    assert "kNN purity and k-means conservation: beside pca_batch" in told
    assert "PCR comparison: beside pca" in told
    store = atlas.open_store(store.path)
    named = atlas.evaluate(store, embedding="z", individual="pca_batch", before="pca")
    found = atlas.evaluate(store, embedding="z")
    assert found.to_json() == named.to_json()
    assert found["purity_k15"].value is not None
    # other batches: PCA of the batches that were is not of these
    rows = ["row,lane"]
    rows += [f"cell{i},{'x' if i % 3 else 'y'}" for i in range(200)]
    (tmp_path / "lanes.csv").write_text("\n".join(rows))
    run("annotate", store.path, tmp_path / "lanes.csv", "--batch-key", "lane")
    told = run("evaluate", *base)
    assert f"not measured: kNN purity (k 15); k-means conservation ({NO_INDIVIDUAL})" in told
    told = run("evaluate", *base, "--individual", "pca_batch", code=2)
    assert "'pca_batch' is of other batches than those that the cells have now" in told


def test_embeddings_of_each_batch_alone_are_none_of_all_cells(
    store: atlas.CountStore, run: Run, tmp_path: Path
) -> None:
    atlas.select_genes(store, n=20)
    run("baseline", store.path, "--per-batch")
    run("baseline", store.path)
    path = store.path
    for arguments in (
        ("evaluate", path, "--embedding", "pca_batch"),
        ("evaluate", path, "--embedding", "z", "--before", "pca_batch"),
        ("compare", path, "--embedding", "z", "pca_batch"),
        ("report", path, "--embedding", "pca_batch", "--out", tmp_path / "r.html"),
    ):
        told = run(*arguments, code=2)
        assert "'pca_batch' embeds each batch on its own" in told
        assert "--individual pca_batch" in told
    with pytest.warns(UserWarning, match="'pca' embeds all cells together"):
        atlas.evaluate(atlas.open_store(path), embedding="z", individual="pca")


def test_a_stale_baseline_says_how_to_make_it_again(
    store: atlas.CountStore, run: Run, make_study: MakeStudy
) -> None:
    atlas.select_genes(store, n=20)
    run("baseline", store.path, "--per-batch")
    run("baseline", store.path)
    atlas.open_store(store.path).append(
        make_study(50, seed=1, prefix="o"), study="two", batch_key="batch"
    )
    told = run("evaluate", store.path, "--embedding", "pca", code=2)
    assert f"atlas baseline {store.path} --method pca --name pca`" in told
    told = run("compare", store.path, "--embedding", "pca_batch", "z", code=2)
    assert "embeds each batch on its own" in told
    told = run("evaluate", store.path, "--embedding", "z", code=2)
    assert "atlas embed RUN" in told


@pytest.mark.parametrize("command", ["evaluate", "compare", "report", "baseline"])
def test_help_explains_every_option(command: str) -> None:
    subparsers = next(a for a in build_parser()._actions if a.choices and "evaluate" in a.choices)
    sub = subparsers.choices[command]  # type: ignore[index, call-overload]
    assert [action.dest for action in sub._actions if not action.help] == []
    assert "pca_batch" in sub.format_help()
