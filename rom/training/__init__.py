"""Training: text and batches, the n-gram to beat, optimiser groups, checkpoints, and a loop that knows no model."""
