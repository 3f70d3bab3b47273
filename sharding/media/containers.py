"""The containers of clips: which one it is, its video stream, and whether bytes of it are missing.

Decoders hide what is lost: they show the frames that are left. So what a container says of its own structure is
checked where it says anything:

=========  ===============================================================================================
mp4        every frame of the index, every ``moof`` and every ``mdat`` behind one lies within the file
matroska   the segment, where its size is written
mpegts     whole packets, in the order of their counters; a counter may jump where a recording begins
avi, flv   chunks and tags lie within the file
ogg        pages follow each other by number, to the last one
=========  ===============================================================================================

A transport stream or live webm that is cut between two packets is a shorter recording: nothing in it tells.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from sharding.errors import BadData
from sharding.media.untrusted import refuse_large

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp", b"sidx", b"moof", b"uuid", b"pnot",
                    b"emsg", b"prft"})  # fmt: skip
_PICTURES = frozenset({"mjpeg", "png", "bmp", "gif", "webp", "tiff", "jpeg2000"})
_TS_PACKET = 188
_SYNC = 0x47
_IN_A_ROW = 10


def container_format(data: bytes) -> str:
    """The demuxer for these bytes, named from their first ones.

    Not left to FFmpeg's probing, which would also accept playlists, and those make it open other files and
    addresses.
    """
    head = data[:16]
    if head[4:8] in _BOXES:
        return "mp4"
    if head[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    if head[:4] == b"GIF8":
        return "gif"
    if head[:4] == b"OggS":
        return "ogg"
    if head[:3] == b"FLV":
        return "flv"
    if head[:1] == b"G" or _ts_layout(data) is not None:
        return "mpegts"
    raise BadData(
        "decode-failed", "not a clip of a known container (mp4, webm, mkv, avi, ogg, flv, ts, gif, webp)"
    )


def is_animation(data: bytes) -> bool:
    """Whether PIL reads it."""
    return container_format(data) in ("webp", "gif")


def open_clip(data: bytes) -> InputContainer:
    """The clip, its header read."""
    import av

    return av.open(io.BytesIO(data), mode="r", format=container_format(data))


def video_stream(container: InputContainer, max_pixels: int) -> VideoStream:
    """The stream that players show: the default one, or the first, of those that are not a cover picture.

    Raises:
        BadData: ``decode-failed``: there is none; ``too-many-pixels``.
    """
    from av.stream import Disposition

    pictures = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not streams:
        raise BadData("decode-failed", "the file has no video stream")
    # A cover that is not marked as one lies beside a stream that is no picture, or has more frames than one.
    moving = [stream for stream in streams if stream.name not in _PICTURES and stream.frames != 1] or streams
    stream = next((stream for stream in moving if stream.disposition & Disposition.default), moving[0])
    if stream.codec_context is None:
        raise BadData("decode-failed", "no decoder is known for the video stream")
    refuse_large(stream.codec_context.width, stream.codec_context.height, max_pixels)
    # One thread: loader processes and tasks already fill the cores, and threaded decoders have dead-locked.
    stream.codec_context.thread_count = 1
    return stream


def refuse_cut(data: bytes, stream: VideoStream) -> None:
    """Raises ``BadData("decode-failed")`` where bytes are missing from the file; see above for how that is known.

    Also where a recording is joined to another whose pictures come under another number, since FFmpeg would leave
    them out. Before packets are read: PyAV stumbles over streams that appear in the middle.
    """
    kind = container_format(data)
    if kind == "mp4":
        _refuse_cut_mp4(data, stream)
    elif kind == "mpegts":
        _refuse_cut_transport_stream(data, stream.id)
    elif kind in _CHECKS:
        _CHECKS[kind](data)


def _ts_layout(data: bytes) -> tuple[int, int] | None:
    """Where the first packet of a transport stream begins, and bytes from one to the next: of discs and cameras
    (m2ts) 4 come before each packet, of broadcasts 16 may come after it.
    """
    for first, size in ((0, _TS_PACKET), (4, 192), (0, 204)):
        places = [first + size * number for number in range(4) if first + size * number < len(data)]
        if len(places) > 1 and all(data[place] == _SYNC for place in places):
            return first, size
    return None


def _missing(what: str) -> BadData:
    return BadData("decode-failed", f"{what}: the clip is cut or broken")


def _refuse_cut_mp4(data: bytes, stream: VideoStream) -> None:
    last = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    if last > len(data):
        raise _missing(f"its frames end at byte {last} of {len(data)}")
    fragments = False
    for kind, _, end in _boxes(data, 0, len(data)):
        fragments = fragments or kind == b"moof"
        if fragments and end > len(data) and kind in (b"moof", b"mdat"):
            raise _missing(f"its box {kind.decode()} ends at byte {end} of {len(data)}")


def _boxes(data: bytes, place: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, where its payload begins, where it ends) of the boxes between two places."""
    while place + 8 <= stop:
        size, kind = struct.unpack_from(">I4s", data, place)
        body = place + 8
        if size == 1 and place + 16 <= stop:
            size, body = struct.unpack_from(">Q", data, place + 8)[0], place + 16
        if size < body - place:
            return  # the last box, to the end of the file, or bytes behind the last one
        yield kind, body, place + size
        place += size


def refuse_unshown_edits(data: bytes, stream: VideoStream) -> None:
    """Raises ``BadData("unsupported-edit-list")`` where FFmpeg would show other than the edit list of an mp4 says.

    That is where nothing is to be shown between two parts, or a part at another speed.
    """
    if container_format(data) != "mp4":
        return
    for kind, begin, end in _boxes(data, 0, len(data)):
        if kind == b"moov":
            for track, body, stop in _boxes(data, begin, min(end, len(data))):
                if track == b"trak":
                    _refuse_unshown(data, body, min(stop, len(data)), stream.id)


def _refuse_unshown(data: bytes, begin: int, end: int, track: int) -> None:
    inside = {kind: (body, min(stop, end)) for kind, body, stop in _boxes(data, begin, end)}
    if b"tkhd" not in inside or b"edts" not in inside:
        return
    header = inside[b"tkhd"][0]
    number = data[header + (20 if data[header] == 1 else 12) :][:4]
    lists = [body for kind, body, _ in _boxes(data, *inside[b"edts"]) if kind == b"elst"]
    if int.from_bytes(number, "big") != track or not lists:
        return
    entry = struct.Struct(">Qqhh" if data[lists[0]] == 1 else ">Iihh")
    first = lists[0] + 8
    count = int.from_bytes(data[first - 4 : first], "big")
    stop = min(first + count * entry.size, inside[b"edts"][1])
    whole = first + (stop - first) // entry.size * entry.size
    for place, (_, time, rate, part) in enumerate(entry.iter_unpack(data[first:whole])):
        if (time == -1 and place > 0) or (time != -1 and (rate not in (0, 1) or part != 0)):
            what = "a pause" if time == -1 else f"a part at {rate + part / 65536:g} times its speed"
            raise BadData("unsupported-edit-list", f"the clip's edit list has {what}")


def _refuse_cut_transport_stream(data: bytes, pid: int) -> None:
    """Checks the packets of the pictures, whose number is ``pid``."""
    first, size = _ts_layout(data) or (0, _TS_PACKET)
    whole = len(data) // size
    if len(data) % size and any(data[whole * size :]):
        raise _missing(f"{len(data) % size} bytes are left behind its last whole packet")
    packets = np.frombuffer(data, np.uint8, whole * size).reshape(whole, size)[:, first:]
    damaged = (packets[:, 0] != _SYNC) | (packets[:, 1] & 0x80 != 0)
    if damaged.any():
        raise _missing(f"the packet at byte {int(damaged.argmax()) * size} is damaged")
    pids = (packets[:, 1] & 0x1F).astype(np.int32) << 8 | packets[:, 2]
    filled = packets[:, 3] & 0x10 != 0
    counted = np.flatnonzero((pids == pid) & filled)
    if not len(counted):
        raise _missing("it has no packets of pictures")
    # Pictures of another program come between those of this one; those of a joined recording, many in a row.
    starts = _picture_starts(packets, filled)
    starts = starts[pids[starts] != pid]
    between = np.searchsorted(counted, starts)
    in_a_row = np.bincount(between, minlength=len(counted) + 1)
    if in_a_row.max() >= _IN_A_ROW:
        where = int(starts[np.argmax(in_a_row[between])]) * size
        raise BadData("decode-failed", f"at byte {where} pictures of a joined recording have another number")
    _refuse_gaps(packets, pids, counted, size)


def _picture_starts(packets: np.ndarray, filled: np.ndarray) -> np.ndarray:
    """Places of the packets in which a packetised stream of pictures (0xE0 to 0xEF) begins anew."""
    places = np.flatnonzero((packets[:, 1] & 0x40 != 0) & filled)
    adapted = packets[places, 3] & 0x20 != 0
    payload = 4 + np.where(adapted, 1 + packets[places, 4].astype(np.int32), 0)
    fits = payload + 4 <= _TS_PACKET
    places, payload = places[fits], payload[fits]
    head = [packets[places, payload + number] for number in range(4)]
    return places[(head[0] == 0) & (head[1] == 0) & (head[2] == 1) & (head[3] & 0xF0 == 0xE0)]


def _refuse_gaps(packets: np.ndarray, pids: np.ndarray, counted: np.ndarray, size: int) -> None:
    """Counters of the packets at ``counted`` (4 bits) go up by one, but where a recording is joined to another.

    There a programme table comes before the next picture, and that picture can be decoded without another.
    """
    counters = packets[counted, 3] & 0x0F
    for place in (np.flatnonzero(counters[1:] != (counters[:-1] + 1) % 16) + 1).tolist():
        before, here = int(counted[place - 1]), int(counted[place])
        flags = int(packets[here, 5]) if packets[here, 3] & 0x20 and packets[here, 4] else 0
        discontinuity, random_access = flags & 0x80, flags & 0x40
        repeated = counters[place] == counters[place - 1] and np.array_equal(packets[before], packets[here])
        begins = packets[here, 1] & 0x40 and random_access and (pids[before:here] == 0).any()
        if not (discontinuity or repeated or begins):
            raise _missing(f"packets are missing before byte {here * size}")


def _refuse_cut_matroska(data: bytes) -> None:
    place = 0
    while place + 12 <= len(data):
        found = _vint(data, place, keep_marker=True)
        length = _vint(data, found[1]) if found is not None else None
        if found is None or length is None:
            return
        size, body = length
        if found[0] == 0x18538067:  # Segment
            unknown = size == (1 << 7 * (body - found[1])) - 1
            if not unknown and body + size > len(data):
                raise _missing(f"its segment ends at byte {body + size} of {len(data)}")
            return
        place = body + size


def _vint(data: bytes, place: int, keep_marker: bool = False) -> tuple[int, int] | None:
    """An EBML number and where it ends."""
    if place >= len(data) or not data[place]:
        return None
    width = 9 - data[place].bit_length()
    if place + width > len(data):
        return None
    value = int.from_bytes(data[place : place + width], "big")
    return (value if keep_marker else value & ((1 << 7 * width) - 1)), place + width


def _refuse_cut_avi(data: bytes) -> None:
    place = 0
    while data[place : place + 4] == b"RIFF" and place + 8 <= len(data):
        end = place + 8 + int.from_bytes(data[place + 4 : place + 8], "little")
        if end > len(data) + 1:  # a padding byte is often left out
            raise _missing(f"its chunk RIFF ends at byte {end} of {len(data)}")
        place = end + end % 2


def _refuse_cut_flv(data: bytes) -> None:
    place = int.from_bytes(data[5:9], "big") + 4
    while place < len(data) and any(data[place : place + 11]):
        end = place + 11 + int.from_bytes(data[place + 1 : place + 4], "big")
        if data[place] & 0x1F not in (8, 9, 18) or end > len(data):
            raise _missing(f"its tag at byte {place} is cut or damaged")
        place = end + 4


def _refuse_cut_ogg(data: bytes) -> None:
    place, numbers, ended = 0, dict[bytes, int](), set[bytes]()
    while place < len(data) and any(data[place : place + 27]):
        segments = data[place + 26] if place + 27 <= len(data) else 0
        lengths = data[place + 27 : place + 27 + segments]
        end = place + 27 + segments + sum(lengths)
        if data[place : place + 4] != b"OggS" or end > len(data):
            raise _missing(f"its page at byte {place} is cut or damaged")
        serial, number = (
            data[place + 14 : place + 18],
            int.from_bytes(data[place + 18 : place + 22], "little"),
        )
        if serial in numbers and number != numbers[serial] + 1:
            raise _missing(f"pages are missing before byte {place}")
        numbers[serial] = number
        if data[place + 5] & 4:
            ended.add(serial)
        place = end
    if len(ended) < len(numbers):
        raise _missing("its last page is missing")


_CHECKS = {
    "matroska": _refuse_cut_matroska,
    "avi": _refuse_cut_avi,
    "flv": _refuse_cut_flv,
    "ogg": _refuse_cut_ogg,
}
