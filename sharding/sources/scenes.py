"""Scenes as a source: listed by number, composed in the tasks that store them.

A listing costs what its numbers cost: no picture is opened. What identifies it are the rules, the table of objects
and the names and sizes of its pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from sharding.manifest import Modality
from sharding.names import Skipped
from sharding.scenes.captions import texts
from sharding.scenes.generator import Scenes, encode_clip, encode_png, largest_side
from sharding.scenes.objects import Objects, open_objects
from sharding.sources.base import Hasher, Input, feed, folder_and_name
from sharding.sources.config import ScenesSource
from sharding.storage import Storage

_CLIPS, _IMAGES = "clip/", "scene/"


class ScenesListing:
    """The first ``count`` scenes of a split, in order; clips, where the source is of videos."""

    def __init__(self, config: ScenesSource, modality: Modality, storage: Storage) -> None:
        self._config, self._modality, self._storage = config, modality, storage
        self.skipped = Skipped()  # nothing is listed

    @property
    def base(self) -> str:
        return self._storage.resolve(folder_and_name(self._config.objects)[0]).url

    def inputs(self, hasher: Hasher) -> Iterator[Input]:
        """See ``Source``. Media and captions are made in the tasks: ``SceneMedia``."""
        config = self._config
        objects = _open(config, self._storage)
        Scenes(config.rules, objects)  # says before anything starts where objects are too few
        feed(hasher, objects.digest, config.rules.model_dump(mode="json"), self._modality)
        for number in range(config.count):
            address = (
                f"{_CLIPS}{number:06d}.mp4" if self._modality == "video" else f"{_IMAGES}{number:06d}.png"
            )
            feed(hasher, address)
            yield Input(address=address)


class SceneMedia:
    """Makes the media and captions of listed scenes. Pictures of objects stay in memory for the next tasks."""

    def __init__(self, config: ScenesSource, storage: Storage) -> None:
        # The table is read again by every task, so that a process never goes on with an old one.
        digest = _open(config, storage).digest
        self._fps = config.fps
        self._scenes = _scenes(config.model_dump_json(), storage, digest)

    def read(self, item: Input) -> tuple[Input, bytes]:
        """The input with its captions, and its media: PNG, or H.264 in mp4."""
        folder, _, name = item.address.rpartition("/")
        number = int(name.partition(".")[0])
        if f"{folder}/" == _CLIPS:
            scene = self._scenes.clip(number)
            media = encode_clip(scene, self._fps)
        else:
            assert f"{folder}/" == _IMAGES, item.address
            scene = self._scenes.scene(number)
            media = encode_png(scene.image())
        return replace(item, captions=texts(self._scenes.captions(scene))), media


@lru_cache(maxsize=2)
def _scenes(configuration: str, storage: Storage, digest: str) -> Scenes:
    config = ScenesSource.model_validate_json(configuration)
    return Scenes(config.rules, _open(config, storage))


def _open(config: ScenesSource, storage: Storage) -> Objects:
    return open_objects(config.objects, storage, largest_side(config.rules))
