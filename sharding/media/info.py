"""What is known of an image or clip, and what a shard stores of it. Light to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MediaInfo:
    """Pixels of one frame; number of frames (1 for an image); duration in seconds (0 for an image)."""

    width: int
    height: int
    frames: int = 1
    duration: float = 0.0

    @property
    def animated(self) -> bool:
        """Whether there is more than one picture to be shown in turn."""
        return self.frames > 1

    def facts(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"width": self.width, "height": self.height, "frames": self.frames, "duration": self.duration}

    @classmethod
    def of(cls, facts: dict[str, Any]) -> MediaInfo:
        """From ``facts``."""
        return cls(int(facts["width"]), int(facts["height"]), int(facts["frames"]), float(facts["duration"]))


@dataclass(frozen=True)
class Fingerprint:
    """``phash``: 64 bits as an unsigned int. ``pixels``: 32 hex digits that what has equal pixels shares: SHA-256 of
    mode, size and pixels, or of what an encoder made of them.
    """

    phash: int
    pixels: str


@dataclass(frozen=True)
class Encoded:
    """What a shard stores of one image or clip; ``extension`` without the dot."""

    data: bytes
    extension: str
    info: MediaInfo
    fingerprint: Fingerprint | None = None

    def facts(self) -> dict[str, Any]:
        """All but ``data``, as JSON can hold it: this is how it leaves the decoding process."""
        found = self.fingerprint
        return {
            "extension": self.extension,
            "info": self.info.facts(),
            "fingerprint": None if found is None else [found.phash, found.pixels],
        }

    @classmethod
    def of(cls, facts: dict[str, Any], data: bytes) -> Encoded:
        """From ``facts`` and the data."""
        found = facts["fingerprint"]
        taken = None if found is None else Fingerprint(int(found[0]), str(found[1]))
        return cls(data, str(facts["extension"]), MediaInfo.of(facts["info"]), taken)
