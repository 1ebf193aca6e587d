"""A store of counts: many studies, one gene table, one row order, every state kept.

Rows are ordered study by study as appended, and within a study by a 64-bit hash of (study, row
name); ``obs``, minibatches, embeddings, labels and exports all follow that order. A
:class:`CountStore` sees the state it was opened at; what it writes itself it sees at once.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from atlas.config import Profile
from atlas.errors import StoreError
from atlas.ingest.genes import GeneTable
from atlas.store import embeddings
from atlas.store import manifest as manifests
from atlas.store.append import (
    DEFAULT_MEMORY,
    AppendReport,
    Request,
    Source,
    append_study,
)
from atlas.store.arrays import read_array
from atlas.store.drop import DropReport, drop_study
from atlas.store.findings import VerifyReport
from atlas.store.schema import GeneSelection, Manifest, StudyEntry
from atlas.store.split import Split, split_rows
from atlas.store.tables import join_obs
from atlas.store.verify import verify_state
from atlas.store.view import CountView
from atlas.store.zarr_study import ZarrStudy
from loaders import RowBlock

CODES = ("study", "batch", "label")
"""Names of the integer codes of every row."""


class CountStore:
    """Raw counts of many studies on disk; opened with :func:`open_store`.

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

    def __reduce__(self) -> tuple[type[CountStore], tuple[Path, Manifest]]:
        return CountStore, (self.path, self.manifest)  # a worker process opens it anew

    def __repr__(self) -> str:
        return (
            f"CountStore({str(self.path)!r}: {self.n_obs:,} cells × {self.n_vars:,} genes, "
            f"{len(self.studies)} studies)"
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

    def read_rows(self, start: int, stop: int) -> RowBlock:
        """Rows of one study over the whole gene table; thread-safe."""
        return self._all_genes.read_rows(start, stop)

    @property
    def narrow(self) -> bool:
        """Whether columns and counts of all studies fit in uint16."""
        return self._all_genes.narrow

    @property
    def reading(self) -> str:
        """How rows are read, for people."""
        return self._all_genes.reading

    @property
    def read_overhead(self) -> int:
        """Bytes that a read takes besides twice what it returns."""
        return self._all_genes.read_overhead

    def count_values(
        self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Stored values in each range of rows, each of one study: int64, (n_ranges,)."""
        return self._all_genes.count_values(starts, stops)

    def select(self, genes: Sequence[str]) -> CountView:
        """The same rows over chosen genes, in the order given.

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
        """An embedding kept with the store: float32 (n_obs, n_latent), in store order."""
        return embeddings.read(self.path, self.manifest, name)

    def embedding_details(self, name: str) -> dict[str, Any]:
        """How an embedding was made, as given to :meth:`write_embedding`."""
        return embeddings.details(self.path, self.manifest, name)

    def write_embedding(
        self, name: str, z: npt.NDArray[np.float32], details: Mapping[str, Any]
    ) -> None:
        """Keep an embedding with the store; one of the same name is replaced (its history stays).

        Parameters
        ----------
        name
            Letters, digits, ``._-``.
        z
            float32, (n_obs, n_latent), in the order of the store.
        details
            How it was made, plain JSON.
        """
        self.see(embeddings.write(self.path, self.manifest, name, z, details))

    @property
    def genes(self) -> tuple[str, ...] | None:
        """The genes chosen to be modelled (:func:`atlas.select_genes`), or None."""
        chosen = self.manifest.gene_selection
        return None if chosen is None else chosen.genes

    def record_genes(self, genes: Iterable[str], flavour: str, n: int) -> None:
        """Record which genes are to be modelled."""
        selection = GeneSelection(flavour, n, tuple(genes))
        self.select(selection.genes)
        recorded = {self.manifest.gene_selection, manifests.read(self.path).gene_selection}
        if recorded == {selection}:
            return
        action = f"choose {len(selection.genes)} genes"
        with manifests.writer(self.path, action) as newest:
            state = manifests.commit(self.path, newest, action, gene_selection=selection)
        self.see(state)

    def append(
        self,
        source: Source | Sequence[Source],
        *,
        study: str,
        batch_key: str | Sequence[str] | None = None,
        label_key: str | None = None,
        unlabeled: str = "Unknown",
        profile: Profile = "fast",
        layer: str | None = None,
        use_raw: bool = False,
        round_counts: bool = False,
        feature_type: str = "Gene Expression",
        keep_layers: Sequence[str] = (),
        prefix_rows: bool = False,
        genes_of_all: bool = False,
        memory: str | int = DEFAULT_MEMORY,
        scheduler: str | None = None,
        fresh: bool = False,
        progress: bool = False,
    ) -> AppendReport:
        """Append a study; it is there whole afterwards, or not at all.

        After Ctrl-C or a kill the same call goes on where it was, if its inputs are files.

        Parameters
        ----------
        source
            An ``.h5ad`` or 10x ``.h5`` file, read in blocks, or an AnnData; or several, whose rows
            follow one another. Several have the same genes, in any order.
        study
            Its name: letters, digits, ``._-``.
        batch_key
            The obs column of the batch; several are combined. Without one the study is one batch.
            ``"file"`` is the file a row came from, where there is no column of that name.
        label_key
            The obs column of the labels.
        unlabeled
            The value that stands for no label, besides missing and empty ones.
        profile
            ``"fast"``, ``"portable"`` (core Zarr codecs only) or ``"small"``.
        layer, use_raw
            Where the counts are, if not in X.
        round_counts
            Round counts with fractions, as some aligners give them.
        feature_type
            The feature type to take from a 10x file.
        keep_layers
            Names of layers to keep beside the counts.
        prefix_rows
            Put the name of its file and a colon before each row name.
        genes_of_all
            Of several inputs whose genes differ keep those that all have; an error otherwise.
        memory
            What rows may take at a time, besides about 200 bytes for each cell: ``"512MB"``.
        scheduler
            Threads when None; ``"processes"``, or the address of a dask scheduler whose workers
            see the same files.
        fresh
            Start anew, even if an earlier call was interrupted.
        progress
            Show rows and cells/s on stderr.

        Raises
        ------
        InputError, CountsError, MissingColumnError
            The source cannot be ingested.
        StudyExistsError, LockedError, StoreError
            The name is taken, another process writes, or writing failed.
        """
        keys = (batch_key,) if isinstance(batch_key, str) else tuple(batch_key or ())
        request = Request(
            study,
            keys,
            label_key,
            unlabeled,
            profile,
            layer,
            use_raw,
            round_counts,
            feature_type,
            tuple(keep_layers),
            prefix_rows,
            genes_of_all,
            memory,
            scheduler,
            fresh,
            progress,
        )
        state, report = append_study(self.path, source, request)
        self.see(state)
        return report

    def drop(self, study: str, *, purge: bool = False) -> DropReport:
        """Commit a state without a study; its name can be appended again.

        Older states can be opened as before, and so its files stay. Names of batches and labels
        stay too, as their codes are for ever, and so do the embeddings of the other studies.

        Parameters
        ----------
        study
            Its name.
        purge
            Remove the older states that hold the study, and its files. These states cannot be
            opened afterwards; a study that was dropped before can be purged too.

        Raises
        ------
        StoreError, LockedError
            There is no such study, another process writes, or writing failed.
        """
        state, report = drop_study(self.path, study, purge=purge)
        self.see(state)
        return report

    def verify(self, *, progress: bool = False, threads: int | None = None) -> VerifyReport:
        """Read all that this state holds and compare it with its checksums.

        :func:`atlas.verify` reports instead of raising, covers every state, and needs no state that
        can be opened.

        Parameters
        ----------
        progress
            Show chunks, bytes a second and the time left on stderr.
        threads
            By default as many as cores.

        Returns
        -------
        VerifyReport
            What was checked.

        Raises
        ------
        CorruptStoreError
            The first thing that is missing or is not what was written, and how many more there are.
        """
        report = verify_state(self.path, self.manifest, progress=progress, threads=threads)
        report.raise_first()
        return report

    def see(self, state: Manifest) -> None:
        """Look at another state of the same store."""
        for name, value in vars(type(self)).items():
            if isinstance(value, functools.cached_property):
                self.__dict__.pop(name, None)
        self.manifest = state
