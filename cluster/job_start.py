"""The first thing that a submitted job runs on the cluster: looks whether the Python there can run glscl.

The job is to run with the Python that runs Ray there, whatever ``python`` is on the machine's PATH, if any is: Ray
calls :func:`begin_process` in each process of the job, also in the one that starts the job's command, and the command
begins with what it notes. Where the job has ``cluster.environment.pip``, that is the Python of Ray's virtual
environment. Runs on older versions of Python, and without any package, so that it can say what is missing.
"""

import importlib.util
import json
import os
import runpy
import sys

PYTHON_VARIABLE = "GLSCL_PYTHON"
#: {"python": [3, 11], "modules": {module: package}, "arguments": [...], "variables": {...}}
SUBMISSION = "submission.json"


def begin_process() -> None:
    """Called by Ray in each process of the job, before its first task."""
    os.environ[PYTHON_VARIABLE] = sys.executable
    try:
        from cluster.loopback import ask_loopback_directly
    except SyntaxError:  # an old Python: main() says so
        return
    ask_loopback_directly()


def fault(python: "list[int]", modules: "dict[str, str]") -> "str | None":
    """What keeps this Python from running glscl, in one line; None where nothing does.

    Args:
        python: the version (3, 11) that the code is for.
        modules: what is imported, with the package that brings it.
    """
    here = "%s (Python %s)" % (sys.executable, ".".join(map(str, sys.version_info[:3])))  # noqa: UP031
    wanted = ".".join(str(number) for number in python)
    if list(sys.version_info[:2]) != list(python):
        return f"{here} runs this job, and the code is for Python {wanted}: start the cluster with Python {wanted}"
    lacking = sorted({package for name, package in modules.items() if importlib.util.find_spec(name) is None})
    if lacking:
        return (
            f"{here} runs this job and lacks {', '.join(lacking)}: install them there, start the cluster with the "
            "Python that has them, or name them in cluster.environment.pip"
        )
    return None


def main() -> None:
    """Runs ``glscl`` with the arguments that were sent; exit code 2 and one line where this Python cannot."""
    with open(SUBMISSION, encoding="utf-8") as file:
        submission = json.load(file)
    found = fault(submission["python"], submission["modules"])
    if found is not None:
        sys.stderr.write(f"error: {found}\n")
        sys.exit(2)
    os.environ.update(submission["variables"])
    sys.argv = ["glscl", *submission["arguments"]]
    runpy.run_module("glscl_pipeline", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
