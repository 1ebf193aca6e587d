from __future__ import annotations

import json
from pathlib import Path

import pytest

from atlas.errors import InputError
from atlas.ingest.genes import GeneTable
from atlas.signatures import Aliases, Signature, read_signatures, resolve

PAPER = """\
# Xu et al. 2021
CD4 Regulatory: GITR+ CTLA4+ FOXP3+ CD25+ S100A4- CD45- CD8B-

CD8 Naive: CD8B+, CCR7+, CD4−   # a typeset minus
"""
EXPECTED = (
    Signature("CD4 Regulatory", ("GITR", "CTLA4", "FOXP3", "CD25"), ("S100A4", "CD45", "CD8B")),
    Signature("CD8 Naive", ("CD8B", "CCR7"), ("CD4",)),
)
REGULATORY = ["GITR+", "CTLA4+", "FOXP3+", "CD25+", "S100A4-", "CD45-", "CD8B-"]


def test_text_tabs_json_and_python_say_the_same(tmp_path: Path) -> None:
    forms = {
        "a.txt": PAPER,
        "b.tsv": "CD4 Regulatory\t" + "\t".join(REGULATORY) + "\nCD8 Naive:\tCD8B+ CCR7+ CD4-\n",
        "c.json": json.dumps({"CD4 Regulatory": REGULATORY, "CD8 Naive": "CD8B+ CCR7+ CD4-"}),
        "d.json": json.dumps(
            {s.name: {"positive": s.positive, "negative": s.negative} for s in EXPECTED}
        ),
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        assert read_signatures(tmp_path / name) == EXPECTED, name
    assert read_signatures(EXPECTED) == EXPECTED
    assert read_signatures({s.name: f"{s.positive[0]}+" for s in EXPECTED})[1].positive == ("CD8B",)


def test_names_with_dashes_and_colons_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "s.txt"
    path.write_text("T cell: naive: HLA-DRA- NKX2-5+\n")
    assert read_signatures(path) == (Signature("T cell: naive", ("NKX2-5",), ("HLA-DRA",)),)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("s.txt", "", "There are no signatures"),
        ("s.txt", "CD4 CCR7+", "A line is no signature\n  found: line 1: CD4 CCR7"),
        ("s.txt", "a: CCR7+ CD4", "Genes of the signature 'a' have no sign\n  found: CD4"),
        ("s.txt", "a: CCR7-", "'a' has no positive gene"),
        ("s.txt", "a:", "'a' has no positive gene"),
        ("s.txt", "a: CD4+ CD8A+ CD4-", "'a' has a gene twice\n  found: CD4"),
        ("s.txt", "a: CD4+\na: CD8A+", "cannot be told apart by name\n  found: 'a'"),
        ("s.txt", ": CD4+", "cannot be told apart by name\n  found: ''"),
        ("s.txt", "a/b: CD4+", "without '/'"),
        ("s.json", "{", "The signatures are no JSON"),
        ("s.json", "[]", "no JSON object"),
        ("s.json", '{"a": "CD4+", "a": "CD8A+"}', "Names are given twice\n  found: a"),
        ("s.json", '{"a": 3}', "The signature 'a' cannot be understood"),
        ("s.json", '{"a": {"positive": ["CD4"], "up": []}}', "cannot be understood"),
        ("absent.txt", None, "The signatures cannot be read"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as error:
        read_signatures(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def _table(*names: str, ids: tuple[str | None, ...] | None = None) -> GeneTable:
    return GeneTable(names, ids or (None,) * len(names))


def test_aliases_of_the_paper() -> None:
    table = _table("TNFRSF18", "IL2RA", "PTPRC", "CD8B", "FOXP3")
    found = resolve(["GITR", "CD25", "CD45", "CD8b", "Foxp3"], table, Aliases.shipped())
    assert [found[k].name for k in found] == ["TNFRSF18", "IL2RA", "PTPRC", "CD8B", "FOXP3"]
    assert [found[k].position for k in found] == [0, 1, 2, 3, 4]


def test_a_store_may_have_the_other_name_or_the_case_of_a_mouse() -> None:
    table = _table("CD25", "Cd8b1", "Tnfrsf18")
    found = resolve(["IL2RA", "CD8B", "GITR"], table, Aliases.shipped())
    assert [gene.position for gene in found.values()] == [0, 1, 2]


def test_the_first_that_finds_something_decides() -> None:
    # CD8B2 is a name of CD8B, and not asked for where CD8B is there itself
    assert resolve(["CD8B"], _table("CD8B2", "CD8B"), Aliases.shipped())["CD8B"].position == 1
    assert resolve(["CD8B"], _table("CD8B2", "X"), Aliases.shipped())["CD8B"].position == 0
    table = _table("foxp3", "FOXP3", "b", ids=(None, None, "ENSG00000049768"))
    assert resolve(["FOXP3"], table, Aliases.shipped())["FOXP3"].position == 1
    assert (
        resolve(["ENSG00000049768.16"], table, Aliases.shipped())["ENSG00000049768.16"].name == "b"
    )
    assert resolve(["GITR"], table, Aliases.shipped())["GITR"].name is None


def test_a_name_of_two_genes_is_refused_and_a_table_settles_it(tmp_path: Path) -> None:
    table = _table("FCGR3A", "FCGR3B")
    with pytest.raises(
        InputError, match=r"'CD16' may be several genes of the store\n.*FCGR3A, FCG"
    ):
        resolve(["CD16"], table, Aliases.shipped())
    assert resolve(["CD16"], _table("FCGR3A"), Aliases.shipped())["CD16"].position == 0
    own = tmp_path / "aliases.csv"
    own.write_text("alias,symbol # of my lab\nCD16,FCGR3B\n")
    both = Aliases.read(own).over(Aliases.shipped())
    assert resolve(["CD16"], table, both)["CD16"].name == "FCGR3B"
    assert resolve(["GITR"], _table("TNFRSF18"), both)["GITR"].position == 0
    with pytest.raises(InputError, match="may be several"):
        resolve(["Foxp3"], _table("foxp3", "FOXP3"), both)


@pytest.mark.parametrize(
    ("text", "message"),
    [("GITR\n", "has one name only\n  found: line 1: GITR"), (None, "cannot be read")],
)
def test_wrong_tables_of_aliases(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "t.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        Aliases.read(tmp_path / "t.txt")


def test_no_shipped_alias_is_a_gene_of_its_own_but_as_declared(real_data) -> None:  # type: ignore[no-untyped-def]
    """Against gene names of a real annotation: an alias that is another gene's symbol misleads."""
    import anndata

    names = set(anndata.read_h5ad(real_data("kang_ifnb_pbmc.h5ad"), backed="r").var_names)
    shipped = Aliases.shipped()
    taken = {
        alias
        for alias, group in shipped.groups.items()
        if alias in names and len(group & names) > 1
    }
    assert taken == set()
    known = ["CD3E", "CD14", "MS4A1", "NKG7", "FCGR3A", "TNFRSF18"]
    assert len(resolve(known, GeneTable(tuple(sorted(names)), (None,) * len(names)), shipped)) == 6
