"""What Ray says in many lines, and in colours, is told in one line that has the cause."""

from __future__ import annotations

import platform
from unittest import mock

import pytest
import ray

from cluster import session
from cluster.config import ClusterConfig
from cluster.errors import ClusterError, cause_of, in_one_line

#: As Ray 2.60 gives it where a worker of a group does not come up (shortened at the dots).
GROUP = (
    "\x1b[36mray::RayTrainWorker.run_train_fn()\x1b[39m (pid=530, ip=127.0.0.1, actor_id=7cea42, repr=<ray...>)\n"
    "           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^\n"
    '  File "/x/ray/train/v2/_internal/util.py", line 138, in get\n    return ray.get(self._ref)\n'
    "           ^^^^^^^^^^^^^^^^^^\n"
    "ray.exceptions.RaySystemError: System error: Net() takes no arguments\n"
    "traceback: Traceback (most recent call last):\n          ^^^^^^\n"
    '  File "/home/me/model.py", line 12, in boom\n    raise TypeError("Net() takes no arguments")\n'
    "TypeError: Net() takes no arguments"
)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (GROUP, "TypeError: Net() takes no arguments"),
        (GROUP + "\nof any kind\n", "TypeError: Net() takes no arguments"),
        (
            "The actor died because of an error raised in its creation task, \x1b[36mray::Controller.__init__()"
            '\x1b[39m (pid=1)\n  File "/x/y.py", line 3, in __init__\n    import pipeline\n'
            "ImportError: cannot import name 'loop'\n",
            "ImportError: cannot import name 'loop'",
        ),
        (
            "The actor died unexpectedly before finishing this task.\n\tclass_name: C\n",
            "The actor died unexpectedly",
        ),
        ("\x1b[31mplain\x1b[0m", "plain"),
    ],
)
def test_the_cause_is_kept_of_what_ray_says(text: str, cause: str) -> None:
    assert cause_of(RuntimeError(text)).startswith(cause)
    assert "\x1b" not in cause_of(RuntimeError(text))


def test_an_error_that_says_nothing_is_named_by_its_type() -> None:
    assert cause_of(KeyError()) == "KeyError()"
    assert in_one_line(TimeoutError()) == "TimeoutError()"


def joined(refusal: Exception) -> str:
    with mock.patch.object(ray, "init", side_effect=refusal), pytest.raises(ClusterError) as told:
        session._connect(ClusterConfig(address="auto"), "auto")
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (("2.60.0", "3.12.4"), (ray.__version__, platform.python_version())),
        (("2.9.3", platform.python_version()), (ray.__version__, platform.python_version())),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_cluster_of_other_versions_is_told_with_both(
    theirs: tuple[str, str], ours: tuple[str, str], swapped: bool
) -> None:
    first, second = (ours, theirs) if swapped else (theirs, ours)
    said = "Version mismatch: The {} was started with:\n    Ray: {}\n    Python: {}\n"
    told = joined(
        RuntimeError(said.format("cluster", *first) + said.format("process on node 1.2.3.4", *second))
    )
    assert (
        f"it runs Python {theirs[1]} and Ray {theirs[0]}, this is Python {ours[1]} and Ray {ours[0]}" in told
    )
    assert f"start the cluster with Python {ours[1]} and Ray {ours[0]}, or glscl with" in told


def test_other_refusals_keep_all_that_they_say() -> None:
    told = joined(ConnectionError("Could not find any running Ray instance.\nPlease specify the one."))
    assert told.endswith("at auto: Could not find any running Ray instance. Please specify the one.")
