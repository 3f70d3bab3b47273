"""What the words of a few held-out captions attend to, as examples for the report."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from model import word_maps
from model.alignment import NoWord
from pipeline.alignment.picture import Panel, alignment_panels
from pipeline.evaluation.result import Example
from pipeline.evaluation.tasks.examples import jpeg
from sharding.decoding import decode_image
from sharding.errors import BadData
from sharding.media import decode_video
from sharding.seeds import derive_seed, generator

if TYPE_CHECKING:
    from model import WordMaps
    from model.glscl import GLSCLPreTrainedModel
    from model.processing import GLSCLProcessor
    from sharding.reader import RawSample, ShardReader

log = logging.getLogger("pipeline.evaluation")

_WORDS = 10  # of a caption
_TRIES = 8  # samples looked at for each that is shown: some cannot be read, some captions have no word
_SIDE, _STRIP = 160, 640  # pixels: a panel's side, and the width that the frames of a clip share
_HOW = "last fusion layer, maximum over heads; each from its lowest attention (dark) to its highest (yellow)"


def attention_examples(
    model: GLSCLPreTrainedModel,
    processor: GLSCLProcessor,
    reader: ShardReader,
    seed: int,
    *,
    count: int = 2,
    frames: int = 4,
    limit: int | None = None,
) -> list[Example]:
    """Maps of ``count`` samples, the same ones for every checkpoint; fewer where there are no more.

    An example has the picture, the map of the whole caption and one of each of its first words; of a clip they are
    strips of ``frames`` frames.

    Args:
        model: of any class, in evaluation mode.
        processor: at the resolution to use.
        reader: of the held-out pairs.
        seed: of the run.
        limit: only the first so many samples of the dataset.
    """
    random = generator(derive_seed(seed, "evaluation.attention", reader.manifest.digest))
    total = min(len(reader), limit or len(reader))
    chosen = random.choice(total, size=min(total, count * _TRIES), replace=False)
    video = reader.manifest.modality == "video"
    found: list[Example] = []
    for number in chosen:
        if len(found) == count:
            break
        try:
            sample = reader.read(*_place(reader, int(number)))
            caption = sample.captions[int(random.integers(len(sample.captions)))]
            pictures = decode_video(sample.media, frames) if video else decode_image(sample.media)[None]
            maps = word_maps(model, processor, pictures if video else pictures[0], caption)
        except (BadData, NoWord) as error:
            log.info("no attention maps of a sample: %s", error)
            continue
        found.append(_example(sample, caption, pictures, maps))
    return found


def _place(reader: ShardReader, number: int) -> tuple[int, int]:
    """(shard, row) of the sample that is ``number`` in the dataset."""
    for shard, record in enumerate(reader.manifest.shards):
        if number < record.samples:
            return shard, number
        number -= record.samples
    raise IndexError(number)


def _example(sample: RawSample, caption: str, pictures: np.ndarray, maps: WordMaps) -> Example:
    side = min(_SIDE, _STRIP // len(pictures))
    panels = alignment_panels(pictures, maps, side)[: 2 + _WORDS]
    lines = [("sample", sample.key), ("maps", _HOW)]
    if len(maps.words) > _WORDS:
        lines.append(("words", f"the first {_WORDS} of {len(maps.words)}"))
    if maps.unread:
        lines.append(("not read", maps.unread))
    return Example(
        f"“{caption.strip()}”", None, [(_strip(panel), _caption(panel)) for panel in panels], lines
    )


def _caption(panel: Panel) -> str:
    return f"{panel.word}, {panel.note}" if panel.note else panel.word


def _strip(panel: Panel) -> bytes:
    """The panel's frames side by side, as JPEG."""
    return jpeg(Image.fromarray(np.concatenate([np.asarray(frame) for frame in panel.frames], axis=1)))
