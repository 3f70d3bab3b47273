"""Fine-tuning a checkpoint for a task, by the training's own loop, before the task evaluates it.

``config`` is the block of the YAML (light: it imports no torch), ``launch`` runs it from within an evaluation, and
each kind of task has a file that says what its examples, its model and its losses are.
"""
