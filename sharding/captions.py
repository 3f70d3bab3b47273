"""The captions of a stored sample, from its JSON and text members: ours, or another program's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

_LINE_END = re.compile(r"\r\n|\n|\r")


class NotText(ValueError):
    """There are captions, but none of them is text."""


def is_text(value: object) -> bool:
    """Whether it is a text that UTF-8 can hold, and so a file, an index and a tokenizer.

    JSON may spell half a surrogate pair ("\\ud83d", of an emoji cut in two), and bytes that are not UTF-8 are read
    as such halves.
    """
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def caption_lines(text: str) -> list[str]:
    """The lines of a text, as its bytes have them: a line separator or form feed within a caption ends no line."""
    return [line for line in _LINE_END.split(text) if line.strip()]


def stored_captions(description: bytes, text: bytes, field: str | None) -> list[str]:
    """The captions, at least one, all of them text; white space in and around them is as stored in a shard of
    ours, and collapsed in another program's.

    Args:
        description: the JSON member (empty: there is none).
        text: the text member (empty: there is none).
        field: None for a shard of ours, whose JSON has the list ``captions``. For another program's shard the
            JSON field that holds a text or a list of texts; where it holds none, each line of the text member is a
            caption.

    Raises:
        NotText: there are some, but none of them is text.
        ValueError: there are none, or the JSON is not valid.
    """
    if field is None:
        value = _json(description)
        captions = value.get("captions") if isinstance(value, dict) else None
        if not isinstance(captions, list) or not captions or not all(map(is_text, captions)):
            raise ValueError("they must be a list of texts")
        return captions
    fault: ValueError | None = None
    found = None
    if description:
        try:
            value = _json(description)
            found = value.get(field) if isinstance(value, dict) else None
        except ValueError as error:  # the text member may be whole
            fault = error
    given = found if isinstance(found, list) else [] if found is None else [found]
    captions = _distinct(caption for caption in given if is_text(caption))
    if not captions:
        try:
            captions = _distinct(caption_lines(text.decode("utf-8-sig")))
        except UnicodeDecodeError as error:
            raise NotText(f"the text member is not UTF-8: {error.reason}") from None
    if captions:
        return captions
    if fault is not None:
        raise fault
    if any(not is_text(caption) for caption in given):
        raise NotText(f"the JSON field {field!r} holds no text that UTF-8 can hold")
    raise ValueError(f"neither the JSON field {field!r} nor the text member has one")


def _json(data: bytes) -> object:
    """The value of a JSON member; ValueError where it is none, whatever its bytes."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def _distinct(texts: Iterable[str]) -> list[str]:
    collapsed = (" ".join(text.split()) for text in texts)
    return list(dict.fromkeys(caption for caption in collapsed if caption))
