"""Steps, samples, epochs, tokens and bytes of a job, from its configuration and, where they exist, its shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config import JobConfig
from pipeline.runs import read_record, run_path
from pipeline.training.data_order import draw_mixture
from pipeline.training.prefetch import bytes_needed
from sharding.errors import UserError
from sharding.manifest import MANIFEST_PATH, Manifest, load_manifest
from sharding.prepare import PrepareConfig
from sharding.prepared import PreparedConfig
from sharding.storage import Storage

if TYPE_CHECKING:
    from pipeline.training.config import StageBlock

# Where there are no shards yet; rules of thumb, and said to be: bytes of a pixel of an image, and of a clip's frame.
_IMAGE, _FRAME = 0.3, 0.03
_ASPECT = 4 / 3


@dataclass(frozen=True)
class Data:
    """One dataset that is trained on.

    Attributes:
        shown: samples shown over the run, repeated ones included.
        sample_bytes: of one sample in its shard.
        samples: of an epoch; None: not known before it is prepared.
        where: its address; None: there are no shards, and ``sample_bytes`` is a rule of thumb.
        remote: whether it lies on this machine.
    """

    name: str
    modality: str
    shown: int
    sample_bytes: float
    samples: int | None = None
    where: str | None = None
    remote: bool = True

    @property
    def epochs(self) -> float | None:
        """How often each sample is shown."""
        return self.shown / self.samples if self.samples else None

    @property
    def egress(self) -> float:
        """Bytes read from the storage over the run, where nothing is cached."""
        return self.shown * self.sample_bytes


def datasets(job: JobConfig, storage: Storage) -> tuple[dict[str, Data], dict[str, Manifest]]:
    """Each dataset that some stage trains on, and the manifests of those that are there."""
    shown: Counter[str] = Counter()
    for stage in job.train.stages:
        for name, steps in steps_by_dataset(job, stage).items():
            shown[name] += steps * (stage.global_batch or job.train.global_batch)
    found, manifests = {}, {}
    record = read_record(storage.at(run_path(job))) or {}
    for name, number in shown.items():
        config = job.datasets[name]
        place = _place(name, config, storage, record.get("datasets", {}))
        if place is None:
            assert isinstance(config, PrepareConfig)
            found[name] = Data(name, config.modality, number, _rule_of_thumb(config))
            continue
        manifest = load_manifest(place)
        manifests[name] = manifest
        size = sum(shard.bytes for shard in manifest.shards) / max(1, manifest.samples)
        found[name] = Data(
            name,
            manifest.modality,
            number,
            size,
            samples=manifest.samples,
            where=place.url,
            remote=place.local_path("") is None,
        )
    return found, manifests


def steps_by_dataset(job: JobConfig, stage: StageBlock) -> Counter[str]:
    """How many of a stage's steps each dataset gets, as they will be drawn."""
    return Counter(draw_mixture(job.seed, stage.name, stage.steps, stage.mixture))


def cache_needed(job: JobConfig, manifests: Mapping[str, Manifest], workers_on_node: int) -> int:
    """Bytes that ``train.cache_mb`` needs at least on a node; 0 where no manifest is known."""
    return bytes_needed(job.train, dict(manifests), workers_on_node)


def _place(
    name: str, config: PrepareConfig | PreparedConfig, storage: Storage, known: Mapping[str, str]
) -> Storage | None:
    """Where a dataset's shards are: as the run has recorded it, as the job says, or made of this configuration."""
    if isinstance(config, PreparedConfig):
        place = storage.resolve(config.prepared)
        if not place.exists(MANIFEST_PATH):
            raise UserError(
                f"datasets.{name}: {place.url} has no {MANIFEST_PATH} yet (glscl shards index {place.url})"
            )
        return place
    if name in known:
        return storage.resolve(known[name])
    for file in storage.list("datasets"):
        folder, _, base = file.path.rpartition("/")
        if base == MANIFEST_PATH and folder.startswith(f"datasets/{name}-"):
            place = storage.at(folder)
            if load_manifest(place).configuration == config.identity():
                return place
    return None


def _rule_of_thumb(config: PrepareConfig) -> float:
    if config.modality == "image":
        side = config.picture.resize or 512
        return side * side * _ASPECT * _IMAGE
    side, clip = config.clip.resize or 512, config.clip
    return side * side * _ASPECT * _FRAME * min(clip.max_frames, int((clip.fps or 25) * clip.clip_s))
