"""Whether batches can be told from labels: what no model can take apart, said before training."""

from __future__ import annotations

import numpy as np
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score

from atlas.evaluation.codes import Categories

_SHARE = 0.9


def confounding(batches: Categories, labels: Categories) -> str | None:
    """Warn where the batch tells the label.

    Among labeled cells in batches that have any, the share of the labels' entropy that the batch
    explains, I(batch; label) / H(label) (Theil's U). At 0.9 and more a model cannot tell the batch
    effect from the difference between types, and removing one removes the other.

    Parameters
    ----------
    batches, labels
        Batch and label of every cell.

    Returns
    -------
    str or None
        The warning, with the share and the batches of a single label; None where there is no cause.
    """
    labeled = (labels.codes >= 0) & (batches.codes >= 0)
    batch, label = batches.codes[labeled], labels.codes[labeled]
    if len(np.unique(batch)) < 2 or len(np.unique(label)) < 2:
        return None
    share = float(mutual_info_score(batch, label) / entropy(np.bincount(label)))
    if share < _SHARE:
        return None
    single = [
        name for i, name in enumerate(batches.names) if len(np.unique(label[batch == i])) == 1
    ]
    return (
        f"the batch tells the label: it explains {share:.0%} of the labels' entropy, and "
        f"{len(single)} of {len(np.unique(batch))} labeled batches hold one label only"
        f"{' (' + ', '.join(single[:5]) + ')' if single else ''}. Batch effects and differences "
        "between types cannot be told apart; consider a coarser --batch-key."
    )
