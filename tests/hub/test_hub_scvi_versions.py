"""Models that versions 1.0 to 1.3 of scvi-tools saved, and the latent space they gave.

``saved/`` was written by each of them (numpy 2.4, torch 2.13): two epochs on 60 simulated cells of
30 genes (``counts.npy``; batches a and b, ``batch.npy``), then ``model.save(folder)``; ``z.npy`` is
its ``get_latent_representation()``. The version installed is tested in ``test_hub_scvi.py``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import atlas
from atlas.models import Inputs

SAVED = Path(__file__).parent / "saved"


@pytest.mark.parametrize("version", ["1.0.4", "1.1.6", "1.2.2", "1.3.3"])
@pytest.mark.parametrize("kind", ["scvi", "scanvi"])
def test_the_latent_space_is_theirs(kind, version):
    model = atlas.import_scvi(SAVED / f"{kind}-{version}")
    assert model.batches == ("a", "b")
    assert model.genes == tuple(f"gene{i}" for i in range(30))
    counts, batch = np.load(SAVED / "counts.npy"), np.load(SAVED / "batch.npy")
    cells = torch.from_numpy(counts.astype(np.float32)), torch.from_numpy(batch)
    z = model.embed(Inputs(*cells)).numpy()
    expected = np.load(SAVED / f"{kind}-{version}" / "z.npy")
    np.testing.assert_allclose(z, expected, atol=1e-5)
