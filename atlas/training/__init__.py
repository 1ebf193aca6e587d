"""From minibatches to weights: the loop, the schedule, early stopping, checkpoints."""
