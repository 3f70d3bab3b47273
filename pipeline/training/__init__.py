"""The training run: batches, schedule, loop, checkpoints, health. ``loop.train`` is what each worker runs."""
