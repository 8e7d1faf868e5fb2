"""In what order: configs joined, everything built once, batch to optimizer, checkpoints, metrics."""
