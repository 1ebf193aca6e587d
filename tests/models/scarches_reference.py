"""Print what scArches' own trVAE gives for the network of ``test_models_trvae.py``.

Not a test: it runs in an environment that has scArches (0.6.1 was taken) and nothing of Atlas.
Weights and counts are formulas, so that both sides can make them.
"""

from __future__ import annotations

import importlib
import json

import anndata
import numpy as np
import torch

N_CELLS, N_GENES, N_BATCH, HIDDEN, LATENT = 14, 9, 3, 6, 3


def waves(shape: tuple[int, ...], step: float) -> torch.Tensor:
    """Numbers between -1 and 1 that nothing draws."""
    size = int(np.prod(shape))
    return torch.sin(step * torch.arange(1, size + 1, dtype=torch.float64)).view(shape).float()


def main() -> None:
    """Print the terms by likelihood and place of the discrepancy."""
    anndata.read = anndata.read_h5ad  # which scArches 0.6.1 still imports
    peer = importlib.import_module("scarches.models.trvae.trvae")
    counts = (10 * waves((N_CELLS, N_GENES), 0.7)).round().clamp(min=0)
    counts[3] *= 1000
    batch = torch.arange(N_CELLS) % N_BATCH
    terms = {}
    for likelihood in ("nb", "zinb"):
        for place in ("y", "z"):
            model = peer.trVAE(
                N_GENES,
                ["a", "b", "c"],
                hidden_layer_sizes=[HIDDEN, HIDDEN],
                latent_dim=LATENT,
                dr_rate=0.0,
                use_mmd=True,
                mmd_on=place,
                recon_loss=likelihood,
            )
            with torch.no_grad():
                for i, (_, weight) in enumerate(sorted(model.named_parameters())):
                    weight.copy_(waves(tuple(weight.shape), 0.9 + 0.1 * i))
            model.sampling = lambda mean, log_variance: mean
            out = model(counts, batch, sizefactor=counts.sum(1))
            terms[f"{likelihood} {place}"] = [x.item() for x in out]
    print(json.dumps(terms, indent=1))


if __name__ == "__main__":
    main()
