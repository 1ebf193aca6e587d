"""What several tests need: real counts where they lie, and small made-up studies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

import atlas  # noqa: F401  (before torch: it asks OpenMP's waiting threads to sleep)

ROOT = Path(__file__).parents[1]
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    """Remove compiled kernels that are older than a source: numba looks at the caller's alone."""
    if hasattr(config, "workerinput"):
        return
    sources = [p for name in ("atlas", "loaders") for p in (ROOT / name).rglob("*.py")]
    newest = max(p.stat().st_mtime for p in sources)
    for kernel in {p for source in sources for p in source.parent.glob("__pycache__/*.nb[ci]")}:
        if kernel.stat().st_mtime < newest:
            kernel.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """Path of a file of real counts; the test skips where it is absent."""

    def find(name: str) -> Path:
        path = SHARED_DATA / name
        if not path.is_file():
            pytest.skip(f"real counts are not here: {path}")
        return path

    return find


@pytest.fixture(scope="session")
def object_store() -> Iterator[Any]:
    """An S3 server on loopback, with credentials in the environment: ``object_store.py``."""
    pytest.importorskip("obstore", reason="the extra remote is not installed")
    pytest.importorskip("moto", reason="moto is not installed")
    from object_store import CREDENTIALS, shared

    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        yield shared()


@pytest.fixture
def make_study() -> Callable[..., AnnData]:
    """Make a small study of Poisson counts, with batches, labels and some oddities."""

    def make(
        n: int = 60, genes: list[str] | int = 30, seed: int = 0, prefix: str = "cell"
    ) -> AnnData:
        rng = np.random.default_rng(seed)
        names = [f"gene{i}" for i in range(genes)] if isinstance(genes, int) else genes
        counts = rng.poisson(rng.gamma(0.5, 2, len(names)), (n, len(names)))
        counts[rng.integers(n)] = 0  # an empty cell
        obs = pd.DataFrame(
            {
                "batch": pd.Categorical(rng.choice(["a", "b"], n)),
                "lane": rng.integers(0, 2, n).astype(str),
                "cell_type": pd.Categorical(rng.choice(["T", "B", "Unknown"], n)),
                "score": rng.normal(size=n),
            },
            index=[f"{prefix}{i}" for i in range(n)],
        )
        adata = AnnData(X=sp.csr_matrix(counts.astype(np.float32)), obs=obs)
        adata.var_names = names
        adata.obsm["X_pca"] = rng.normal(size=(n, 3)).astype(np.float32)
        return adata

    return make
