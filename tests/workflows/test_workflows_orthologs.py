"""A query of another species: by a table of orthologs, and not without one."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anndata import AnnData
from living_helpers import KEYS, SMALL, train_small
from workflows_helpers import study as make_study

import atlas
from atlas.cli import main
from atlas.errors import InputError, ModelError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``s.atlas`` with a model kept, its run, and a table of orthologs of 58 of its 60 genes."""
    folder = tmp_path_factory.mktemp("orthologs")
    store = atlas.create_store(folder / "s.atlas")
    for i in (1, 2):
        store.append(_named(make_study(i, 300, range(60)), str.upper), study=f"r_{i}", **KEYS)
    atlas.keep(store, train_small(store, folder / "run"), device="cpu")
    pairs = [f"mm{i},GENE{i}" for i in range(58)] + ["mm58,GENE58", "mm58,GENE59"]
    (folder / "orthologs.csv").write_text("\n".join(["mouse,human", *pairs]))
    return folder


def _named(cells: AnnData, name: Any) -> AnnData:
    cells.var_names = [name(gene) for gene in cells.var_names]
    return cells


def _mouse() -> AnnData:
    return _named(make_study(3, 200, range(60)), lambda gene: gene.replace("gene", "mm"))


def _human() -> AnnData:
    return _named(make_study(3, 200, range(58)), str.upper)


def test_a_store_of_another_species_extends_as_if_it_were_of_the_same(
    made: Path, tmp_path: Path
) -> None:
    models, embeddings = [], []
    for name, cells, options in (
        ("human", _human(), {}),
        ("mouse", _mouse(), {"orthologs": made / "orthologs.csv"}),
    ):
        store = atlas.create_store(tmp_path / name)
        store.append(cells, study="query", **KEYS)
        model = atlas.extend_reference(
            made / "run", store, out=tmp_path / f"{name}_run", max_epochs=2, **SMALL, **options
        )
        models.append(model)
        # what is kept of the table with the model is enough to embed by it
        again = atlas.load_model(tmp_path / f"{name}_run")
        assert again.surgery == model.surgery
        embeddings.append(atlas.embed(again, store, device="cpu"))
    human, mouse = models
    assert human.surgery[0].orthologs == ()
    assert len(mouse.surgery[0].orthologs) == 58
    assert mouse.surgery[0].orthologs[0] == ("mm0", "GENE0")
    np.testing.assert_array_equal(human.presence, mouse.presence)
    assert mouse.presence[-1].sum() == 58
    for name, value in human.module.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), mouse.module.state_dict()[name].numpy())
    np.testing.assert_array_equal(*embeddings)
    # and the reference is still found by its own names
    own = atlas.open_store(made / "s.atlas")
    z = atlas.embed(mouse, own, name=None, device="cpu")
    np.testing.assert_array_equal(z, own.embedding("scvi"))


def test_an_update_by_another_species(made: Path, tmp_path: Path) -> None:
    found = []
    for cells, options in ((_human(), {}), (_mouse(), {"orthologs": made / "orthologs.csv"})):
        path = shutil.copytree(made / "s.atlas", tmp_path / f"{len(found)}.atlas")
        report = atlas.update(
            path, cells, study="q", model="scvi", ingest={**KEYS, **options}, max_epochs=1, **SMALL
        )
        store = atlas.open_store(path)
        found.append((store.embedding("scvi"), store.var.index.tolist(), report.notes))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]  # no gene of the mouse under its own name
    assert found[1][2] == (
        "orthologs: 58 of 60 genes have a partner of their own; left out: 1 one-to-many, "
        "0 many-to-one, 1 without",
    )


def test_another_species_without_a_table_is_refused(made: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(made / "s.atlas", tmp_path / "s.atlas"))
    cells = _named(make_study(3, 200, range(60)), str.title)  # Gene0 for GENE0
    with pytest.raises(InputError, match=r"no gene in common[\s\S]*--orthologs TABLE"):
        atlas.update(path, cells, study="q", model="scvi", ingest=KEYS, **SMALL)
    some = _named(make_study(3, 200, range(60)), str.title)
    some.var_names = ["GENE0", *some.var_names[1:]]
    with pytest.raises(
        ModelError, match=r"another species[\s\S]*such as Gene1, where [\s\S]*--orthologs TABLE"
    ):
        atlas.update(path, some, study="q", model="scvi", ingest=KEYS, force=True, **SMALL)
    assert not list(path.glob(".update-*"))
    assert atlas.open_store(path).studies == ("r_1", "r_2")
    with pytest.raises(InputError, match="not a table of orthologs"):
        atlas.update(
            path, cells, study="q", model="scvi", ingest={**KEYS, "orthologs": "none.csv"}, **SMALL
        )


def test_force_is_for_few_genes_of_the_same_species(made: Path, tmp_path: Path) -> None:
    """Of a small panel few genes are alike but for their case, and one is the same."""
    cells = make_study(3, 200, range(60))
    cells.var_names = ["GENE59"] + [f"Gene{i}" if i < 20 else f"Rik{i}" for i in range(59)]
    path = Path(shutil.copytree(made / "s.atlas", tmp_path / "s.atlas"))
    told = r"another species[\s\S]*such as Gene0, where the reference has GENE0[\s\S]*--orthologs"
    few: dict[str, Any] = {**SMALL, "max_epochs": 1, "force": True}
    with pytest.raises(ModelError, match=told):
        atlas.update(path, cells, study="q", model="scvi", ingest=KEYS, **few)
    assert atlas.open_store(path).studies == ("r_1", "r_2")
    own = atlas.create_store(tmp_path / "own.atlas")
    own.append(cells, study="q", **KEYS)
    with pytest.raises(ModelError, match=told):
        atlas.extend_reference(made / "run", own, out=tmp_path / "run", **few)
    unlike = _mouse()  # no name is alike, and the one that the store has is not the model's
    unlike.var_names = ["Rik20", *unlike.var_names[1:]]
    own.append(unlike, study="unlike", **KEYS)
    with pytest.raises(
        ModelError, match=r"none of the model's genes[\s\S]*unlike has 0% of 60[\s\S]*--orthologs"
    ):
        atlas.extend_reference(made / "run", own, ["unlike"], out=tmp_path / "run", **few)
    assert not (tmp_path / "run").exists()
    same = make_study(3, 200, range(60))
    same.var_names = [f"GENE{i}" if i < 20 else f"OTHER{i}" for i in range(60)]
    with pytest.warns(UserWarning, match="q has 33% of 60"):
        atlas.update(path, same, study="q", model="scvi", ingest=KEYS, **few)


def test_ids_of_another_species_are_refused_though_the_names_are_the_same(
    made: Path, tmp_path: Path
) -> None:
    """Names of the genes are capitals, as those of man are; their ids are those of mice."""
    reference = atlas.load_model(made / "run")
    reference = dataclasses.replace(reference, gene_ids=tuple(f"ENSG{i:011d}" for i in range(60)))
    cells = _named(make_study(3, 200, range(60)), str.upper)
    cells.var["gene_ids"] = [f"ENSMUSG{i:011d}" for i in range(60)]
    store = atlas.create_store(tmp_path / "s.atlas")
    store.append(cells, study="q", **KEYS)
    with pytest.raises(ModelError, match=r"found: Ensembl ids ENSMUSG…, where .* has ENSG…"):
        atlas.extend_reference(reference, store, out=tmp_path / "run", **SMALL)


def test_a_table_that_is_kept_with_the_model_is_enough(made: Path, tmp_path: Path) -> None:
    """For a further study of that species, whose genes are alike but for their case."""
    table = tmp_path / "table.csv"
    table.write_text("\n".join(f"Gene{i},GENE{i}" for i in range(60)))
    store = atlas.create_store(tmp_path / "s.atlas")
    few: dict[str, Any] = {**SMALL, "max_epochs": 1}
    store.append(_named(make_study(3, 200, range(60)), str.title), study="one", **KEYS)
    one = atlas.extend_reference(made / "run", store, out=tmp_path / "one", orthologs=table, **few)
    store.append(_named(make_study(4, 200, range(60)), str.title), study="two", **KEYS)
    two = atlas.extend_reference(one, store, out=tmp_path / "two", **few)
    assert two.presence[-1].all()
    with pytest.raises(ModelError, match="another species"):
        atlas.extend_reference(made / "run", store, ["two"], out=tmp_path / "no", **few)


def test_the_option_of_the_commands(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(made / "s.atlas", tmp_path / "s.atlas"))
    _mouse().write_h5ad(tmp_path / "q.h5ad")
    keys = ["--study", "q", "--batch-key", "batch"]
    few = ["--max-epochs", "1", "--threads", "1", "--device", "cpu"]
    table = ["--orthologs", str(made / "orthologs.csv")]
    said = "58 of 60 genes have a partner of their own"
    query, run = str(tmp_path / "q.h5ad"), str(tmp_path / "run")
    assert main(["update", str(path), query, "--model", "scvi", *keys, *few]) == 2
    assert "--orthologs TABLE" in capsys.readouterr().err
    assert main(["update", str(path), query, "--model", "scvi", *keys, *few, *table]) == 0
    assert said in capsys.readouterr().out
    assert main(["ingest", str(tmp_path / "mouse"), query, *keys]) == 0
    extend = ["extend", str(made / "run"), str(tmp_path / "mouse"), "--out", run, *few]
    assert main([*extend, *table]) == 0
    assert "58 of 60 genes are orthologs' counts" in capsys.readouterr().out
    other = Path(shutil.copytree(made / "s.atlas", tmp_path / "other.atlas"))
    assert main(["ingest", str(other), query, *keys, *table]) == 0
    assert said in capsys.readouterr().out
