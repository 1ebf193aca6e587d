"""Tables of orthologs: which pairs are used, what is said of the others, bad tables."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from atlas.errors import InputError
from atlas.ingest.genes import GeneTable
from atlas.ingest.orthologs import align_orthologs, another_species, read_orthologs

TABLE = """mouse,human
Cd3e,CD3E
Cd4,CD4
Cd4,CD4
H2-K1,HLA-A
H2-K1,HLA-B
Ccl3,CCL3
Ccl4,CCL3
Gm1,
ENSMUSG00000000001.4,ENSG00000000001.9
"""


def _written(folder: Path, text: str) -> Path:
    (folder / "orthologs.csv").write_text(text)
    return folder / "orthologs.csv"


@pytest.mark.parametrize("separator", [",", "\t"])
def test_pairs_that_are_one_to_one_are_used(tmp_path: Path, separator: str) -> None:
    made = read_orthologs(_written(tmp_path, TABLE.replace(",", separator)))
    assert made.pairs == {
        "mouse": "human",  # the header, which names no gene
        "Cd3e": "CD3E",
        "Cd4": "CD4",  # a line that comes twice
        "ENSMUSG00000000001": "ENSG00000000001",
    }
    assert (made.one_to_many, made.many_to_one) == ({"H2-K1"}, {"Ccl3", "Ccl4"})
    names = ["Cd3e", "H2-K1", "Ccl3", "Ccl4", "Gm1", "Gnai3"]
    ids = [None] * 5 + ["ENSMUSG00000000001"]
    found, said = made.renamed(names, ids)
    assert found == ["CD3E", None, None, None, None, "ENSG00000000001"]
    assert said == (
        "orthologs: 2 of 6 genes have a partner of their own; left out: 1 one-to-many, "
        "2 many-to-one, 1 without"
    )


def test_genes_meet_the_table_under_their_partners_names(tmp_path: Path) -> None:
    orthologs = read_orthologs(_written(tmp_path, TABLE))
    table = GeneTable(("CD4", "GNAI3", "Gm1"), (None, "ENSG00000000001", None))
    var = pd.DataFrame(
        {"gene_ids": ["ENSMUSG00000000001.2", None, None, None]},
        index=["Gnai3", "Gm1", "Cd3e", "Cd4"],
    )
    grown, columns, report, _ = align_orthologs(table, var, orthologs, fixed=False)
    # Gm1 is another gene than the table's of that name: it has no partner
    assert columns.tolist() == [1, -1, 3, 0]
    assert grown.names == ("CD4", "GNAI3", "Gm1", "CD3E")
    assert (report.n_by_id, report.n_by_symbol, report.n_new) == (1, 1, 1)
    fixed, columns, _, _ = align_orthologs(table, var, orthologs, fixed=True)
    assert (fixed, columns.tolist()) == (table, [1, -1, -1, 0])


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (None, r"not a table of orthologs\n  found: FileNotFoundError"),
        ("", "not a table of orthologs"),
        ("Cd4\nCd8a\n", r"not a table of orthologs\n  found: ValueError: 1 columns"),
        ("a,b,c\n", r"found: ValueError: 3 columns in the first line\n  expected: two columns"),
        ("a,b\na,b,c\n", r"not a table of orthologs\n  found: ParserError"),
        ("a,x\na,y\n", r"no one-to-one pair\n  found: 2 pairs, all with several partners"),
        ("Gm1,\n,CD4\n", r"no one-to-one pair\n  found: 0 pairs"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str | None, error: str) -> None:
    path = tmp_path / "none.csv" if text is None else _written(tmp_path, text)
    with pytest.raises(InputError, match=error):
        read_orthologs(path)


def test_a_table_of_other_genes_or_the_wrong_way_round(tmp_path: Path) -> None:
    made = read_orthologs(_written(tmp_path, TABLE))
    with pytest.raises(InputError, match="check species and kind of name"):
        made.renamed(["Zeb2", "Xist"], [None, None])
    with pytest.raises(InputError, match="exchange the columns"):
        made.renamed(["CD4", "CD3E"], [None, None])


def test_genes_of_another_species_are_told_by_ids_and_by_case() -> None:
    human = (["CD4", "CD8A", "MS4A1"], [None] * 3)
    mouse = another_species((["Cd4", "Cd8a", "Ms4a1", "Gm1"], [None] * 4), human)
    assert mouse == "names such as Cd4, where the reference has CD4"
    assert another_species((["CD4", "CD8A", "Ms4a1"], []), human) is None
    assert another_species((["A", "B"], []), human) is None
    ids = ([], ["ENSMUSG00000000001"]), (["ENSG00000000001"], [None])
    assert another_species(*ids) == "Ensembl ids ENSMUSG…, where the reference has ENSG…"
    assert another_species(ids[1], ids[1]) is None


def test_few_genes_tell_another_species_too() -> None:
    """Of a panel few are among a model's genes, and of mice hardly one as it stands."""
    human = [f"GENE{i}" for i in range(2000)]
    panel = [f"Gene{i}" for i in range(1950, 2950)]
    told = "names such as Gene1950, where the reference has GENE1950"
    assert another_species((panel, []), (human, [])) == told
    assert another_species((["GENE1", *panel], []), (human, [])) == told
    same = [f"GENE{i}" for i in range(1950, 2950)]
    assert another_species(([*same, "Gene1", "Gene2"], []), (human, [])) is None
    ids = [f"ENSG{i:011d}" for i in range(2950)]
    assert another_species((panel, ids[1950:2950]), (human, ids[:2000])) is None
    mice = [f"ENSMUSG{i:011d}" for i in range(1000)]
    assert "ENSMUSG" in (another_species((same, mice), (human, ids[:2000])) or "")
