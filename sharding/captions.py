"""The captions of a stored sample, from its JSON and text members: ours, or another program's."""

from __future__ import annotations

import json
from collections.abc import Iterable


def stored_captions(description: bytes, text: bytes, field: str | None) -> list[str]:
    """The captions, at least one; blank space around and inside them is as stored in ours, else collapsed.

    Args:
        description: the JSON member (empty: there is none).
        text: the text member (empty: there is none).
        field: None for a shard of ours, whose JSON has the list ``captions``. For another program's shard the
            JSON field that holds a text or a list of texts; where it holds none, each line of the text member is a
            caption.

    Raises:
        ValueError: there are none, or the JSON is not valid.
    """
    value = json.loads(description.decode("utf-8")) if description or field is None else {}
    if field is None:
        captions = value.get("captions") if isinstance(value, dict) else None
        if (
            not isinstance(captions, list)
            or not captions
            or not all(isinstance(caption, str) for caption in captions)
        ):
            raise ValueError("they must be a list of texts")
        return captions
    found = value.get(field) if isinstance(value, dict) else None
    texts = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    captions = _distinct(caption for caption in texts if isinstance(caption, str))
    captions = captions or _distinct(text.decode("utf-8").splitlines())
    if not captions:
        raise ValueError(f"neither the JSON field {field!r} nor the text member has one")
    return captions


def _distinct(texts: Iterable[str]) -> list[str]:
    collapsed = (" ".join(text.split()) for text in texts)
    return list(dict.fromkeys(caption for caption in collapsed if caption))
