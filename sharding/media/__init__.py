"""Images and clips: from untrusted bytes to arrays, and to the bytes a shard stores.

Everything here is bounded by what the header says before pixels are decoded, opens only the formats it names (a
playlist or a PostScript file never reaches a decoder), and raises ``BadData`` for whatever a decoder cannot read.
The same input gives the same output bytes: one encoder thread, no time stamps.

==================  ===================================================================================
``config``          the ``image`` and ``video`` blocks of the YAML
``info``            what is known of an image or clip, and its stored form
``untrusted``       the limits, and what decoders raise, as ``BadData``
``images``          probing, decoding, encoding of images
``stills``          opening an image of any format: what its header says, its pixels as browsers show them
``png``, ``gif``    the chunks of PNG that decide the picture; frames of GIF on a transparent canvas
``formats``         formats by their first bytes, those that are refused by name among them
``colour``          any colour mode to 8-bit sRGB
``hdr``             HDR and wide-gamut colours to sRGB
``containers``      the containers of clips: their video stream, and whether bytes are missing
``stills``          opening an image of any format; ``png`` and ``gif`` read theirs themselves
``formats``         formats by their first bytes
``single_frame``    telling still images from clips
``picture``         a decoded frame as a player shows it
``video``           reading clips: which frames are shown, and when
``transcode``       clips to H.264
``frames``          images taken from clips
``thumbnails``      small pictures for people
``worker``          what runs of all this in the decoding process (``sharding.guard``)
==================  ===================================================================================

Light to import: the names below come with their decoders at first use, since the command line validates the
configuration before it starts anything.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sharding.media.containers import container_format
    from sharding.media.images import decode_image, encode_image, probe_image
    from sharding.media.info import Encoded, MediaInfo
    from sharding.media.untrusted import MAX_PIXELS, decoding
    from sharding.media.video import animation, decode_video, probe_video

__all__ = [
    "MAX_PIXELS",
    "Encoded",
    "MediaInfo",
    "animation",
    "container_format",
    "decode_image",
    "decode_video",
    "decoding",
    "encode_image",
    "probe_image",
    "probe_video",
]

_HOME = {
    **dict.fromkeys(("MAX_PIXELS", "decoding"), "untrusted"),
    **dict.fromkeys(("Encoded", "MediaInfo"), "info"),
    **dict.fromkeys(("decode_image", "encode_image", "probe_image"), "images"),
    "container_format": "containers",
    **dict.fromkeys(("animation", "decode_video", "probe_video"), "video"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
