"""Where the wall time of a run went, over all its attempts.

records      what workers and driver leave in the run's storage
accounting   from records to seconds by cause: pure functions
table        for people, and for MLflow
devices      what a device can do: peak rates and memory
utilisation  MFU: counted FLOPs against that peak
"""
