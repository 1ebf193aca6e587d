"""One state of a store, as it is read: what it holds, its rows, and views of them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd

from atlas.codecs.remote import remote_of
from atlas.errors import StoreError
from atlas.ingest.genes import GeneTable
from atlas.store import embeddings, models
from atlas.store import manifest as manifests
from atlas.store.arrays import read_array
from atlas.store.schema import Manifest, StudyEntry
from atlas.store.split import Split, split_rows
from atlas.store.tables import join_obs
from atlas.store.view import CountView
from atlas.store.zarr_study import ZarrStudy
from loaders import RowBlock
from loaders.selection import Ints

CODES = ("study", "batch", "label")
"""Names of the integer codes of every row."""


class StoreState:
    """All that is read of a store at one manifest; users hold a :class:`atlas.store.CountStore`.

    It is a :class:`loaders.RowSource` over the whole gene table; :meth:`select` gives one over
    chosen genes.

    Parameters
    ----------
    path
        Folder of the store.
    manifest
        The state to see.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path.absolute()
        self.manifest = manifest

    def __reduce__(self) -> tuple[type[Self], tuple[Path, Manifest]]:
        return type(self), (self.path, self.manifest)  # a worker process opens it anew

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.url or str(self.path)!r}: {self.n_obs:,} cells × "
            f"{self.n_vars:,} genes, {len(self.studies)} studies)"
        )

    # what it holds

    @property
    def n_obs(self) -> int:
        """Cells of all studies."""
        return self.manifest.n_obs

    @property
    def n_vars(self) -> int:
        """Genes of the gene table."""
        return self.manifest.genes.n_vars

    @property
    def studies(self) -> tuple[str, ...]:
        """Names of the studies, as appended; their positions are the ``study`` codes."""
        return tuple(study.name for study in self.manifest.studies)

    @property
    def batches(self) -> tuple[str, ...]:
        """Names of the ``batch`` codes: ``study/batch``, or ``study`` where it is one batch."""
        return self.manifest.batches

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the ``label`` codes; -1 stands for unlabeled."""
        return self.manifest.labels

    @property
    def number(self) -> int:
        """Number of the state: that of its manifest."""
        return self.manifest.number

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Names of the embeddings kept with the store."""
        return tuple(self.manifest.embeddings)

    @property
    def segments(self) -> tuple[int, ...]:
        """Row at which each study starts, and ``n_obs`` at the end."""
        sizes = [study.n_obs for study in self.manifest.studies]
        return tuple(int(n) for n in np.cumsum([0, *sizes]))

    @functools.cached_property
    def gene_table(self) -> GeneTable:
        """Names and Ensembl ids of all genes."""
        return manifests.read_gene_table(self.path, self.manifest)

    @property
    def var(self) -> pd.DataFrame:
        """The gene table: index gene name, column ``gene_id`` (Ensembl id, or missing)."""
        table = self.gene_table
        index = pd.Index(table.names, name="gene", dtype=object)
        return pd.DataFrame({"gene_id": pd.array(table.ids, dtype="string")}, index=index)

    def obs(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Annotations of all cells, in the order of the store.

        Parameters
        ----------
        columns
            The columns to read; all when None. ``atlas_study``, ``atlas_batch`` and ``atlas_label``
            are the training codes by name, unless an input brought a column so named.

        Returns
        -------
        DataFrame
            Indexed by row name; a column that a study does not have is missing there.

        Raises
        ------
        MissingColumnError
            No study has a column asked for.
        """
        frames = [study.obs() for study in self._studies]
        own = {f"atlas_{name}": self._named_codes(name) for name in CODES}
        return join_obs(frames, own, columns, self.path)

    def _named_codes(self, name: str) -> pd.Categorical[Any]:
        names = {"study": self.studies, "batch": self.batches, "label": self.labels}[name]
        return pd.Categorical.from_codes(
            self.obs_codes[name], categories=pd.Index(names, dtype=object)
        )

    @functools.cached_property
    def obs_codes(self) -> Mapping[str, npt.NDArray[np.int32]]:
        """``study``, ``batch`` and ``label`` of every cell, each int32 (n_obs,)."""
        codes = {"study": np.repeat(np.arange(len(self.studies)), np.diff(self.segments))}
        for name in ("batch", "label"):
            codes[name] = self.index_array(name)
        return {name: values.astype(np.int32, copy=False) for name, values in codes.items()}

    def index_array(self, name: str) -> npt.NDArray[Any]:
        """One array of all studies' index parts: ``row_hash``, ``input_position``, ``batch`` …"""
        parts = [self.part_array(study, "index", name) for study in self.manifest.studies]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def part_array(self, study: StudyEntry, part: str, name: str) -> npt.NDArray[Any]:
        """One array of one part of a study, checked against its digest."""
        return read_array(self.path, study.parts[part], name)

    @functools.cached_property
    def _studies(self) -> tuple[ZarrStudy, ...]:
        return tuple(ZarrStudy(self.path, entry) for entry in self.manifest.studies)

    def study(self, name: str) -> ZarrStudy:
        """The reader of one study, in the study's own columns."""
        if name not in self.studies:
            raise StoreError(
                "The store has no such study",
                found=name,
                expected="one of " + ", ".join(self.studies),
                path=self.path,
            )
        return self._studies[self.studies.index(name)]

    # rows

    @functools.cached_property
    def _all_genes(self) -> CountView:
        return self._view(np.arange(self.n_vars))

    def _view(self, positions: npt.NDArray[np.int64]) -> CountView:
        columns = [self.part_array(s, "index", "genes") for s in self.manifest.studies]
        codes = functools.partial(getattr, self, "obs_codes")  # can be pickled
        return CountView(self._studies, columns, positions, self.n_vars, codes)

    @property
    def fingerprint(self) -> str:
        """A digest of rows, columns and their order."""
        return self._all_genes.fingerprint

    def read_rows(self, starts: int | Ints, stops: int | Ints) -> RowBlock:
        """Rows of one study over the whole gene table, one range or several; thread-safe."""
        return self._all_genes.read_rows(starts, stops)

    @property
    def narrow(self) -> bool:
        """Whether columns and counts of all studies fit in uint16."""
        return self._all_genes.narrow

    @property
    def reading(self) -> str:
        """How rows are read, for people."""
        return self._all_genes.reading

    @property
    def reading_threads(self) -> int | None:
        """How many threads should read: more than cores where a network is waited for."""
        return self._all_genes.reading_threads

    @property
    def url(self) -> str | None:
        """Where a store opened by URL comes from; ``path`` is its mirror here."""
        remote = remote_of(self.path / "manifests")
        return None if remote is None else remote.origin.url

    @property
    def read_overhead(self) -> int:
        """Bytes that a read takes besides twice what it returns."""
        return self._all_genes.read_overhead

    def count_values(
        self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Stored values in each range of rows, each of one study: int64, (n_ranges,)."""
        return self._all_genes.count_values(starts, stops)

    def select(self, genes: Sequence[str], *, absent: Collection[str] = ()) -> CountView:
        """The same rows over chosen genes, in the order given.

        Parameters
        ----------
        genes
            Names of the gene table.
        absent
            Those of ``genes`` to take as measured by no study, in the table or not: columns without
            counts.

        Raises
        ------
        StoreError
            A gene is not in the gene table, or is given twice.
        """
        if isinstance(genes, str):
            raise StoreError(
                "Genes are selected by a list of names",
                found=repr(genes),
                expected="a list",
                do=f"select([{genes!r}])",
            )
        genes = [str(gene) for gene in genes]
        twice = [gene for gene, n in Counter(genes).items() if n > 1]
        position = {name: i for i, name in enumerate(self.gene_table.names)}
        position |= dict.fromkeys(absent, -1)
        unknown = [gene for gene in genes if gene not in position]
        if unknown or not genes or twice:
            raise StoreError(
                "These genes cannot be selected",
                found=f"{len(unknown)} of {len(genes)} are not in the store, e.g. "
                + ", ".join(unknown[:5])
                if unknown
                else ("given twice: " + ", ".join(twice[:5]) if twice else "no gene at all"),
                expected="names of the store's gene table, each once",
                do="see `atlas info`, or choose with `atlas genes`",
                path=self.path,
            )
        return self._view(np.array([position[gene] for gene in genes], np.int64))

    def presence(self, genes: Sequence[str] | None = None) -> npt.NDArray[np.bool_]:
        """Which study measured which gene: bool (n_studies, n_genes)."""
        view = self._all_genes if genes is None else self.select(genes)
        return view.presence

    def split(self, validation: float = 0.1, test: float = 0.0) -> Split:
        """Split the cells by their hash: a cell's side does not change when studies are appended.

        Parameters
        ----------
        validation, test
            Shares of the cells held out: the lowest and the highest hashes.
        """
        hashes = [self.part_array(study, "index", "row_hash") for study in self.manifest.studies]
        return split_rows(self.segments, hashes, validation, test)

    # embeddings, and the genes chosen

    def embedding(self, name: str) -> npt.NDArray[np.float32]:
        """An embedding kept with the store: float32 (n_obs, n_latent), in store order.

        Above 256 MiB mapped from a temporary file, as memory need not hold it.
        """
        return embeddings.read(self.path, self.manifest, name)

    def embedding_details(self, name: str) -> dict[str, Any]:
        """How an embedding was made, as given to :meth:`atlas.store.CountStore.write_embedding`."""
        return embeddings.details(self.path, self.manifest, name)

    def index_folder(self, name: str) -> Path | None:
        """Folder of the index of an embedding's neighbours, checked against its digests.

        None where it has none: :func:`atlas.keep` and :func:`atlas.update` make one.
        """
        return embeddings.index_folder(self.path, self.manifest, name)

    @property
    def models(self) -> Mapping[str, int]:
        """Names of the models kept with the store, and the newest version of each."""
        return {name: entry.version for name, entry in self.manifest.models.items()}

    def model_folder(self, name: str, version: int | None = None) -> Path:
        """Folder of a model, checked against its digests; of its newest version when None.

        :func:`atlas.load_model` loads it, and every command takes it for a run folder.
        """
        entry = models.entry_of(self.path, self.manifest, name, version)
        return models.folder_of(self.path, name, entry)

    def model_record(self, name: str, version: int | None = None) -> dict[str, Any]:
        """Where a version of a model came from: ``parent``, ``studies``, ``settings`` …"""
        return models.record(self.path, models.entry_of(self.path, self.manifest, name, version))

    def model_versions(self, name: str) -> tuple[int, ...]:
        """Versions of a model up to this state, rising."""
        return tuple(models.versions(self.path, self.manifest, name))

    @property
    def genes(self) -> tuple[str, ...] | None:
        """The genes chosen to be modelled (:func:`atlas.select_genes`), or None."""
        chosen = self.manifest.gene_selection
        return None if chosen is None else chosen.genes
