"""Who does the work of an ingest: threads, processes of this machine, or a dask cluster.

Blocks are begun one at a time, as workers become free, so that what is read and not yet written
stays within the budget. dask's scheduler of threads takes a whole graph at once and runs it on a
``ThreadPoolExecutor``; here that executor is used as such, and in its place the one that
``distributed`` gives for processes and clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Any, Self, TypeVar

from atlas.errors import AtlasError, StoreError
from atlas.store.parallel import resolve_threads
from atlas.store.statistics import connect

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Workers to be used in a ``with`` statement.

    Parameters
    ----------
    scheduler
        ``None`` or ``"threads"``: as many threads as this process may use cores. ``"processes"``: a
        dask cluster of as many processes, for as long as it is used. Otherwise the address of a
        dask scheduler, whose workers see the same files.

    Attributes
    ----------
    number
        How many tasks run at once.
    local
        Whether tasks run in this process, so that they share its objects.
    address
        Of the dask scheduler; None for threads.

    Raises
    ------
    ConfigError
        None answers at the address.
    """

    def __init__(self, scheduler: str | None = None) -> None:
        self._stack = ExitStack()
        self.local = scheduler in (None, "threads")
        self.number = resolve_threads(None)
        self.address: str | None = None
        self._client: Any = None
        self._executor: Executor
        if self.local:
            self._executor = ThreadPoolExecutor(self.number, thread_name_prefix="atlas-ingest")
            return
        self.address = scheduler
        if scheduler == "processes":
            from dask.distributed import LocalCluster  # takes a second, and is seldom needed

            cluster = LocalCluster(
                n_workers=self.number, threads_per_worker=1, dashboard_address=None
            )
            self.address = str(self._stack.enter_context(cluster).scheduler_address)
        assert self.address is not None  # processes have one now, and so has a cluster
        try:
            client = self._stack.enter_context(connect(self.address))
        except BaseException:
            self._stack.close()
            raise
        self.number = max(1, sum(client.nthreads().values()))
        self._client = client
        self._executor = client.get_executor(pure=False)

    def run(
        self, function: Callable[[Item], Result], items: Iterable[Item], at_once: int | None = None
    ) -> Iterator[Result]:
        """Apply a function to each item; yields results as they come, in any order.

        Items are drawn one at a time by the calling thread, as workers become free; one lies ready
        where all workers may be at work, so that none waits while results are taken. After an error
        or an interrupt nothing is begun any more, and what has begun has ended.

        Parameters
        ----------
        at_once
            How many items may be at work, at most; all workers by default.
        """
        limit = self.number + 1 if at_once is None or at_once >= self.number else at_once
        running: set[Future[Result]] = set()
        try:
            for item in items:
                running.add(self._executor.submit(function, item))
                if len(running) >= limit:
                    yield from self._finished(running)
            while running:
                yield from self._finished(running)
        finally:
            for future in running:
                future.cancel()
            wait(running)

    def _finished(self, running: set[Future[Result]]) -> Iterator[Result]:
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            running.remove(future)
            try:
                yield future.result()
            except (AtlasError, OSError, MemoryError):
                raise
            except Exception as error:
                if self.local:
                    raise
                raise StoreError(
                    "A worker of the dask scheduler failed",
                    found=f"{type(error).__name__}: {error}",
                    expected="workers that import this version of atlas and see the files by the "
                    "same paths",
                    do="look at the log of the workers, or leave out --scheduler",
                ) from error

    def everywhere(self, function: Callable[[], None]) -> None:
        """Call a function in every other process."""
        if self._client is not None:
            self._client.run(function)

    def close(self) -> None:
        """Let the workers go."""
        self._executor.shutdown(wait=True)
        self._stack.close()

    def __enter__(self) -> Self:
        """Use them in a ``with`` statement."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Let them go."""
        self.close()
