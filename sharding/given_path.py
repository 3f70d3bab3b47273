"""Paths and urls that a job's file gives: marked as such, so that a job sent to a cluster can be looked over.

A relative path is that of the folder in which the command was called, or is below the job's storage; ``~`` is the
caller's home. Neither means the same on another machine. A field that holds a path has one of the types below (a test
looks at all fields of a job), and validating with ``context=SENT`` refuses what another machine would understand
otherwise. Light to import.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationInfo

#: Context of a validation: the job is to run on other machines than this one.
SENT = {"sent": True}


def means_the_same_everywhere(path: str) -> bool:
    """Whether a path or url does not depend on where, and by whom, it is read."""
    return path.startswith("/") or "://" in path


def _refuse_relative(value: Any, info: ValidationInfo) -> Any:
    if info.context == SENT:
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) and not means_the_same_everywhere(one):
                raise ValueError(
                    f"got {one!r}; a job sent to a cluster needs an absolute path (of a folder that all its machines "
                    "have) or s3://"
                )
    return value


IS_GIVEN_PATH = BeforeValidator(_refuse_relative)
GivenPath = Annotated[str, IS_GIVEN_PATH]
GivenPaths = Annotated[str | list[str], IS_GIVEN_PATH]
