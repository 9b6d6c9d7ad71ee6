"""Training: data, the trainer core, checkpoints, reports."""
