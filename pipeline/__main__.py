"""``python -m pipeline`` is ``glscl``."""

from pipeline.cli import main

main()
