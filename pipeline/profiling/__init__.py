"""A few steps of a job under torch's profiler, with a range for each phase.

ranges    names for what the model and the engine do
worker    what runs on the workers: some steps that leave nothing behind
phases    the table, read from the trace
command   `glscl profile`
"""
