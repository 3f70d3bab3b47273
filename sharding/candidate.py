"""One input on its way into a shard: captions, filters, encoding. Pure: bytes in, a sample or a cause out."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field

from sharding.config import PrepareConfig
from sharding.errors import BadData
from sharding.filters.build import build_filters
from sharding.media import Encoded, MediaInfo, encode_image, probe_image, probe_video
from sharding.sources.fetch import Fetched, public_address
from sharding.sources.folder import parse_sidecar
from sharding.transcode import ClipLimits, transcode_video


@dataclass(frozen=True)
class Candidate:
    """A sample that passed the filters of single inputs; ``captions_dropped`` counts by cause."""

    media: Encoded
    captions: list[str]
    sha256: str
    source: str
    captions_dropped: dict[str, int] = field(default_factory=dict)


class Examiner:
    """Makes candidates by one dataset's configuration."""

    def __init__(self, config: PrepareConfig) -> None:
        self._config = config
        self._filters = build_filters(config.filters)
        clip = config.clip
        self._limits = ClipLimits(
            resize=clip.resize,
            fps=clip.fps,
            max_frames=clip.max_frames,
            max_duration_s=clip.max_duration_s,
            keyframe_interval=clip.keyframe_interval,
            crf=clip.crf,
            max_bytes=int(clip.max_mb * 2**20),
            max_pixels=clip.max_pixels,
        )

    def examine(self, fetched: Fetched) -> Candidate:
        """The candidate made of a fetched input. The cheap questions come first: captions, header, pixels.

        Raises:
            BadData: the input is broken or filtered out; the cause says why.
        """
        if fetched.fault is not None:
            raise fetched.fault
        if not fetched.media:
            raise BadData("decode-failed", "the file is empty")
        captions, dropped = self._captions(fetched)
        self._filters.check_header(self._probe(fetched.media))
        encoded = self._encode(fetched.media)
        self._filters.check_stored(encoded, captions)
        digest = hashlib.sha256(fetched.media).hexdigest()
        return Candidate(encoded, captions, digest, public_address(fetched.input.address), dropped)

    def _captions(self, fetched: Fetched) -> tuple[list[str], dict[str, int]]:
        texts, not_text = fetched.input.captions, fetched.input.not_text
        if fetched.sidecar is not None and fetched.input.sidecar is not None:
            suffix = fetched.input.sidecar[fetched.input.sidecar.rindex(".") :]
            texts, not_text = parse_sidecar(fetched.sidecar, suffix)
        dropped = Counter({"caption-not-text": not_text} if not_text else {})
        kept: list[str] = []
        captions = [" ".join(text.split()) for text in texts]
        self._filters.check_texts(captions)
        for caption in captions:
            cause = self._filters.objection(caption)
            if cause is not None:
                dropped[cause] += 1
            elif caption not in kept:
                kept.append(caption)
        if not kept:
            cause = next(iter(dropped), "caption-empty")
            raise BadData(cause, f"none of {len(texts) + not_text} captions can be used")
        return kept, dict(sorted(dropped.items()))

    def _probe(self, data: bytes) -> MediaInfo:
        if self._config.modality == "image":
            return probe_image(data, self._config.picture.max_pixels)
        return probe_video(data, self._config.clip.max_pixels)

    def _encode(self, data: bytes) -> Encoded:
        if self._config.modality == "video":
            return transcode_video(data, self._limits)
        picture = self._config.picture
        return encode_image(
            data,
            resize=picture.resize,
            image_format=picture.format,
            quality=picture.quality,
            alpha=picture.alpha,
            max_pixels=picture.max_pixels,
        )
