"""``glscl align``: a picture of which regions the words of a caption attend to."""

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console

from pipeline.export.source import open_model
from sharding.errors import BadData, UserError
from sharding.media import MAX_PIXELS, animation, container_format, decode_image, decode_video, decoding
from sharding.storage import open_storage
from sharding.storage_file import write_file


def align(
    image: str,
    caption: str,
    model_address: str,
    out: Path,
    console: Console,
    *,
    resolution: int | None = None,
    frames: int = 4,
) -> None:
    """Draw the attention maps of ``caption`` over ``image`` into the PNG file ``out``.

    Args:
        image: address of an image, or of a clip of which ``frames`` frames are taken.
        model_address: see :func:`pipeline.export.source.open_model`.
        resolution: side of what the model sees, pixels; default: the model's own.

    Raises:
        UserError: the image cannot be read, the caption has no word, no such model, or one that has no room for
            the resolution or the frames; ``out`` cannot be written.
    """
    from transformers.utils import logging

    from model import GLSCLImageProcessor, GLSCLProcessor, word_maps
    from pipeline.alignment.picture import draw_alignment

    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: the picture is a PNG file, name it so (.png)")
    pictures, is_clip = read_pictures(image, frames)
    logging.disable_progress_bar()  # of loading weights
    model, processor = open_model(model_address)
    config = model.config
    if resolution is not None:
        if resolution < config.patch_size or resolution % config.patch_size:
            raise UserError(
                f"--resolution {resolution}: must be a multiple of the model's patch size, {config.patch_size}"
            )
        processor = GLSCLProcessor(GLSCLImageProcessor(resolution), processor.tokenizer)
    if is_clip and frames > config.max_frames:
        raise UserError(f"--frames {frames}: the model takes {config.max_frames} at most")
    try:
        maps = word_maps(model, processor, pictures if is_clip else pictures[0], caption)
    except ValueError as error:
        raise UserError(str(error)) from None
    picture = io.BytesIO()
    draw_alignment(pictures, maps, caption).save(picture, "PNG")
    try:
        write_file(out, [picture.getvalue()])
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    rows, columns = maps.global_map.shape[-2:]
    count = len(maps.words)
    text = f"{out}: {count} {'word' if count == 1 else 'words'} over {rows} x {columns} patches"
    if maps.unread:
        text += f"\nthe model reads {config.max_text_length} tokens; not read: {maps.unread}"
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def read_pictures(address: str, frames: int) -> tuple[np.ndarray, bool]:
    """An image uint8 [1, height, width, 3], or ``frames`` frames of a clip; and whether it is a clip.

    Raises:
        UserError: there is none, or it cannot be decoded; names the address.
    """
    place = open_storage(address)
    local = place.local_path("")
    try:
        if local is not None:
            data = local.read_bytes()
        else:
            folder, _, name = address.rstrip("/").rpartition("/")
            data = open_storage(folder).read_bytes(name)
        if _is_clip(data):
            return decode_video(data, frames), True
        return decode_image(data)[None], False
    except FileNotFoundError:
        raise UserError(f"{address}: there is no such file") from None
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"{address}: {error.strerror}") from None
    except BadData as error:
        raise UserError(f"{address} is no image or clip that can be read: {error.detail}") from None


def _is_clip(data: bytes) -> bool:
    try:
        kind = container_format(data)
    except BadData:
        return False
    if kind not in ("webp", "gif"):
        return True
    with decoding():
        return len(list(islice(animation(data, MAX_PIXELS), 2))) > 1
