"""Limits of untrusted media, and one error for all that decoders raise over them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from sharding.errors import BadData

MAX_PIXELS = 178_956_970 // 2


@contextmanager
def decoding() -> Iterator[None]:
    """Whatever a decoder raises over untrusted bytes becomes ``BadData("decode-failed")``."""
    try:
        yield
    except (BadData, ImportError):
        raise
    except MemoryError as error:
        if not type(error).__module__.startswith("av."):
            raise
        # FFmpeg refuses the size that a broken header asks for, and needs nothing of the kind for the next clip.
        raise BadData("decode-memory", "the clip asks for more memory than there is") from None
    except Image.DecompressionBombError as error:
        raise BadData("too-many-pixels", str(error)) from None
    except Exception as error:  # decoders raise nearly every type over broken bytes
        # Addresses of objects would make the records of two runs differ.
        text = re.sub(r" at 0x[0-9a-fA-F]+", "", f"{type(error).__name__}: {error}")
        raise BadData("decode-failed", text) from error


def refuse_large(width: int, height: int, max_pixels: int) -> None:
    """Raises ``BadData("too-many-pixels")`` where the header tells of more than ``max_pixels``."""
    if width * height > max_pixels:
        raise BadData("too-many-pixels", f"{width}x{height} is more than {max_pixels} pixels")
