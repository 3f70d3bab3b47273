"""The ``glscl`` command's way in, under a name that no folder of a user's has.

``pipeline`` and ``cluster`` are names that a folder of ``PYTHONPATH`` may have too: here the path is set right before
any package is imported.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def main() -> None:
    """Runs ``pipeline.cli``, which ends the process."""
    sys.path.insert(0, HERE)
    from cluster import import_path

    sys.path.remove(HERE)
    import_path.leave_current_folder_out()
    other = import_path.shadowed()
    if other is not None:
        sys.stderr.write(
            f"error: {other} has the name of a package of glscl and stands before it on Python's path: "
            "take its folder out of PYTHONPATH, or rename it\n"
        )
        sys.exit(2)
    from pipeline.cli import main as command

    command()


if __name__ == "__main__":
    main()
