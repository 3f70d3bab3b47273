"""The downstream tasks, a folder each.

``config`` is the task's block of the YAML (light: it imports no torch), ``task`` evaluates a checkpoint by it.
"""
