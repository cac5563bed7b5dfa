"""Training: the trainer, a step of it, evaluation, checkpoints, the log."""
