"""What keeps a training healthy, one concern a file.

::

    config      the ``health`` block of the YAML
    samples     unreadable samples: counted, and the run ends above a share
    monitor     each step judged, the same on every worker: updated, skipped, rolled back, or the run's end
    updates     an optimizer step made or dropped, under any ZeRO stage
    spikes      is a loss far above those before it?
    windows     steps that a rollback leaves out, kept with the run
    stragglers  which worker is the slowest
    phases      what a worker is doing, for the
    watchdog    which tells of a worker that has stopped, and where
    memory      what to change when memory does not suffice
"""
