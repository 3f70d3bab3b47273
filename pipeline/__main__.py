"""``python -m pipeline`` is ``glscl``."""

from glscl_pipeline import main

main()
