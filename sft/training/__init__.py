"""The training run: layout, model, memory, ranks, checkpoints, log."""
