"""A store of counts: many studies, one gene table, one row order, every state kept.

Rows are ordered study by study as appended, and within a study by a 64-bit hash of (study, row
name); ``obs``, minibatches, embeddings, labels and exports all follow that order. A
:class:`CountStore` sees the state it was opened at; what it writes itself it sees at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from atlas.config import Profile
from atlas.errors import StoreError
from atlas.store import annotate, embeddings, models
from atlas.store import manifest as manifests
from atlas.store.append import (
    DEFAULT_MEMORY,
    AppendReport,
    Request,
    Source,
    append_study,
)
from atlas.store.drop import DropReport, drop_study
from atlas.store.findings import VerifyReport
from atlas.store.schema import GeneSelection, Manifest
from atlas.store.state import StoreState
from atlas.store.verify import verify_state


class CountStore(StoreState):
    """Raw counts of many studies on disk; opened with :func:`open_store`.

    How it is read is in :class:`atlas.store.state.StoreState`; here is what changes it.
    """

    def write_embedding(
        self, name: str, z: npt.NDArray[np.float32], details: Mapping[str, Any]
    ) -> None:
        """Keep an embedding with the store; one of the same name is replaced (its history stays).

        Parameters
        ----------
        name
            Letters, digits, ``._-``.
        z
            float32, (n_obs, n_latent), finite, in the order of the store.
        details
            How it was made, plain JSON.
        """
        self.see(embeddings.write(self.path, self.manifest, name, z, details))

    def extend_embedding(
        self,
        name: str,
        study: str,
        z: npt.NDArray[np.float32],
        details: Mapping[str, Any],
        *,
        index: str | PathLike[str] | None = None,
    ) -> None:
        """Give an embedding the rows of one study; those of the others stay, byte for byte.

        Parameters
        ----------
        name, study
            Of an embedding kept with the store, and of the study.
        z
            float32, (n_obs of the study, n_latent).
        details
            How it was made, plain JSON.
        index
            Folder of an index of all rows as they are then, which is copied; without one the
            embedding has none.
        """
        self.embedding_details(name)  # there is one
        n_obs = self.study(study).entry.n_obs
        if len(z) != n_obs:
            raise StoreError(
                "The embedding does not fit the study",
                found=f"shape {z.shape}",
                expected=f"({n_obs}, n_latent)",
                path=self.path,
            )
        action = f"embed {name} of {study}"
        with manifests.writer(self.path, action) as newest:
            changes = embeddings.put(
                self.path,
                newest,
                name,
                {study: z},
                details,
                keep=True,
                index=None if index is None else Path(index),
            )
            state = manifests.commit(self.path, newest, action, **changes)
        self.see(state)

    def write_model(
        self,
        name: str,
        folder: str | PathLike[str],
        record: Mapping[str, Any],
        *,
        after: int | None,
        embedding: Mapping[str, npt.NDArray[np.float32]] | None = None,
        details: Mapping[str, Any] | None = None,
        index: str | PathLike[str] | None = None,
    ) -> int:
        """Keep a trained model as the next version of a name, and its embedding in the same step.

        Parameters
        ----------
        name
            Letters, digits, ``._-``; of the embedding too.
        folder
            Holds ``model.json`` and ``weights.safetensors``, which are copied.
        record
            Where it came from, plain JSON.
        after
            The newest version there is, or None: another one since is an error.
        embedding
            Rows of some studies, float32 (n_obs, n_latent) each; other studies keep theirs.
        details
            How the embedding was made, plain JSON.
        index
            Folder of an index of all rows of the embedding, which is copied.

        Returns
        -------
        int
            The version.
        """
        action = f"keep {name} {1 if after is None else after + 1}"
        with manifests.writer(self.path, action) as newest:
            there = newest.models[name].version if name in newest.models else None
            if there != after:
                raise StoreError(
                    "Another version of the model was kept meanwhile",
                    found=f"{name} {there}",
                    expected=f"{name} {after}",
                    do="run the command again",
                    path=self.path,
                )
            files = {file: Path(folder) / file for file in models.FILES}
            entry = models.write(self.path, newest, name, files, record)
            changes: dict[str, Any] = {"models": {**newest.models, name: entry}}
            if embedding is not None:
                changes |= embeddings.put(
                    self.path,
                    newest,
                    name,
                    embedding,
                    details or {},
                    keep=True,
                    index=None if index is None else Path(index),
                )
            state = manifests.commit(self.path, newest, action, **changes)
        self.see(state)
        return entry.version

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
        transpose: bool = False,
        gene_lengths: str | PathLike[str] | None = None,
        measurement: str | None = None,
        obs_filter: str | None = None,
        keep_layers: Sequence[str] = (),
        prefix_rows: bool = False,
        genes_of_all: bool = False,
        memory: str | int = DEFAULT_MEMORY,
        scheduler: str | None = None,
        fresh: bool = False,
        progress: bool = False,
        orthologs: str | PathLike[str] | None = None,
    ) -> AppendReport:
        """Append a study; it is there whole afterwards, or not at all.

        After Ctrl-C or a kill the same call goes on where it was, if its inputs are files.

        Parameters
        ----------
        source
            An ``.h5ad``, 10x ``.h5`` or ``.loom`` file, an AnnData in Zarr, a 10x folder
            (``matrix.mtx``), a Visium folder, a table in text, or a SOMA experiment, all read in
            blocks; or an AnnData. Or several, whose rows follow one another. Several have the same
            genes, in any order.
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
        transpose
            Of a table in text: there is a gene on each line, not a cell.
        gene_lengths
            A CSV or TSV of genes and lengths, for counts of whole transcripts (Smart-seq2): they
            are divided by the relative length of their gene, and the integer part is kept (scANVI,
            Xu et al. 2021, Online Methods, "Normalization of SmartSeq2 data").
        measurement, obs_filter
            Of a SOMA experiment: which measurement, and which cells, e.g. ``"tissue == 'lung'"``.
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
        orthologs
            Of a study of another species: a CSV or TSV of its genes and the store's. One-to-one
            pairs are used; other genes are left out (:mod:`atlas.ingest.orthologs`).

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
            transpose,
            None if gene_lengths is None else str(gene_lengths),
            measurement,
            obs_filter,
            tuple(keep_layers),
            prefix_rows,
            genes_of_all,
            memory,
            scheduler,
            fresh,
            progress,
            None if orthologs is None else str(orthologs),
        )
        state, report = append_study(self.path, source, request)
        self.see(state)
        return report

    def annotate(
        self,
        table: annotate.Table,
        *,
        study: str | None = None,
        batch_key: str | None = None,
        label_key: str | None = None,
        unlabeled: str = "Unknown",
    ) -> annotate.AnnotateReport:
        """Add or correct obs columns of cells; older states keep the values they had.

        Cells that are not in the table keep what they had; a new column is missing there.

        Parameters
        ----------
        table
            Indexed by row name, a column for each obs column; or a CSV or TSV file whose first
            column is the row names. A missing value makes the cell's value missing. Where studies
            have row names in common, a column ``atlas_study`` names the study of each.
        study
            The study whose cells they are; all when None.
        batch_key, label_key
            An obs column, new or not, that becomes the batch or the label of all cells of the
            studies that have cells in the table. Training on other codes is another training: a
            run that was begun cannot be resumed, and projections are written anew.
        unlabeled
            The value that stands for no label, besides missing and empty ones.

        Raises
        ------
        InputError, MissingColumnError, StoreError, LockedError
            Row names are unknown, given twice or of several studies; a column is reserved or would
            mix types; there is no such study; another process writes. Nothing is written then.
        """
        request = annotate.Request(study, batch_key, label_key, unlabeled)
        state, report = annotate.annotate(self.path, table, request)
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
            Remove the older states that hold the study, its files, and versions of models that no
            other state names. These states cannot be opened afterwards; a study that was dropped
            before can be purged too.

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
        StoreError
            It was opened by URL.
        """
        if self.url is not None:
            raise StoreError(
                "A store by URL is verified where it is",
                found="a copy of a part of it",
                do="run atlas verify there; what is read from here is checked as it comes",
                path=self.url,
            )
        report = verify_state(self.path, self.manifest, progress=progress, threads=threads)
        report.raise_first()
        return report

    def see(self, state: Manifest) -> None:
        """Look at another state of the same store."""
        for name in set(vars(self)) - {"path", "manifest"}:
            self.__dict__.pop(name, None)  # what was cached of the state before
        self.manifest = state
