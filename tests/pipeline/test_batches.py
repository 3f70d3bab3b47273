"""Batches are a function of the job and the step: not of the number of workers, nor of where a run resumed."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from cluster.workers import WorkerContext
from model import GLSCLForPreTraining, backward_in_parts
from pipeline.config import JobConfig, parse_job
from pipeline.training import pretraining
from pipeline.training.batches import Batch, StageSampler, stage_loader
from pipeline.training.consumption import RETRACTED, ConsumptionRecorder, StepRecord
from pipeline.training.data_order import draw_mixture
from pipeline.training.engine import model_config
from sharding.prepare import prepare
from sharding.reader import ShardReader
from sharding.storage import open_storage
from tests.fixtures.jobs import tiny_job

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def job(raw_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    return parse_job(tiny_job(raw_corpus, tmp_path_factory.mktemp("batches") / "storage"), "test")


@pytest.fixture(scope="module")
def readers(job: JobConfig, ray_session: None) -> dict[str, ShardReader]:
    storage = open_storage(job.storage)
    found = {}
    for name in ("emoji", "clips"):
        prepared = prepare(name, job.datasets[name], storage, in_flight=2)
        found[name] = ShardReader(storage.at(prepared.path), prepared.manifest)
    return found


def batches(
    job: JobConfig,
    readers: dict[str, ShardReader],
    stage: int = 0,
    *,
    start: int = 0,
    worker: int = 0,
    workers: int = 1,
) -> list[Batch]:
    loader = stage_loader(
        job.train.stages[stage],
        job.train,
        readers,
        model_config(job.model),
        tokenizer="builtin",
        seed=job.seed,
        start_step=start,
        worker=worker,
        workers=workers,
    )
    return list(loader)


def assert_same(first: Batch, second: Batch) -> None:
    assert (first.keys, first.slots, first.causes) == (second.keys, second.slots, second.causes)
    assert torch.equal(first.pixel_values, second.pixel_values)
    assert torch.equal(first.input_ids, second.input_ids)
    assert torch.equal(first.valid, second.valid)
    for name, tensor in vars(first.masks).items():
        assert torch.equal(tensor, getattr(second.masks, name)), name


def test_two_workers_together_hold_the_batch_of_one(job: JobConfig, readers: dict[str, ShardReader]) -> None:
    whole = batches(job, readers)
    parts = [batches(job, readers, worker=worker, workers=2) for worker in range(2)]
    assert len(whole) == 8
    for batch, first, second in zip(whole, *parts, strict=True):
        assert batch.keys == first.keys + second.keys
        assert torch.equal(batch.pixel_values, torch.cat([first.pixel_values, second.pixel_values]))
        kept = torch.cat([first.masks.kept_patches, second.masks.kept_patches])
        assert torch.equal(batch.masks.kept_patches, kept)
        # Partners stay inside a lane's group, so that a worker's local numbers are the whole batch's, shifted.
        partners = torch.cat([first.masks.itm_partner, second.masks.itm_partner + len(first.keys)])
        assert torch.equal(batch.masks.itm_partner, partners)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_resumed_stage_gives_the_rest_of_the_same_batches(
    job: JobConfig, readers: dict[str, ShardReader], stage: int
) -> None:
    whole = batches(job, readers, stage)
    for start in range(1, len(whole)):
        rest = batches(job, readers, stage, start=start)
        assert len(rest) == len(whole) - start
        assert_same(rest[0], whole[start])


def test_an_epoch_shows_each_sample_once_and_the_tail_is_masked(
    job: JobConfig, readers: dict[str, ShardReader]
) -> None:
    samples = readers["emoji"].manifest.samples
    assert samples == 40
    epoch = batches(job, readers)[:3]  # 40 samples in batches of 16: the third is half empty
    seen = Counter(
        key for batch in epoch for key, valid in zip(batch.keys, batch.valid, strict=True) if valid
    )
    assert len(seen) == samples
    assert set(seen.values()) == {1}
    assert sum(int((~batch.valid).sum()) for batch in epoch) == 3 * 16 - samples
    assert not any(batch.bad for batch in epoch)


def test_accumulation_cuts_the_same_global_batch_into_contrastive_batches(
    job: JobConfig, readers: dict[str, ShardReader]
) -> None:
    whole = batches(job, readers)
    halved = job.model_copy(update={"train": job.train.model_copy(update={"accumulation": 2})})
    parts = batches(halved, readers)
    assert len(parts) == 2 * len(whole)
    assert parts[0].group_size == whole[0].group_size // 2
    for number, batch in enumerate(whole):
        both = parts[2 * number].keys + parts[2 * number + 1].keys
        assert sorted(both) == sorted(batch.keys)


def test_the_parts_of_a_batch_make_up_its_loss(job: JobConfig, readers: dict[str, ShardReader]) -> None:
    model = GLSCLForPreTraining(model_config(job.model)).double().eval()
    weights = {str(name): weight for name, weight in job.train.stages[0].objectives.items()}
    batch = batches(job, readers)[2]  # half empty
    whole = model(**batch.model_inputs(), objectives=weights)
    got = backward_in_parts(
        model,
        lambda loss: loss.backward(),
        batch.parts(4),
        config=model.config,
        objectives=weights,
        group_size=batch.group_size,
        reseed=lambda part: None,
    )
    assert got.losses.keys() == whole.losses.keys()
    for name, value in whole.losses.items():
        torch.testing.assert_close(got.losses[name], value)


def test_a_batch_is_of_one_modality_and_a_clip_has_its_frames(
    job: JobConfig, readers: dict[str, ShardReader]
) -> None:
    stage = job.train.stages[1]
    picks = draw_mixture(job.seed, stage.name, stage.steps, stage.mixture)
    assert set(picks) == {"emoji", "clips"}
    frames = {"emoji": 1, "clips": 2}
    for name, batch in zip(picks, batches(job, readers, 1), strict=True):
        assert batch.pixel_values.shape == (16, frames[name], 3, 32, 32)
        assert batch.pixel_values.dtype == torch.uint8


def test_text_is_trimmed_to_the_longest_of_the_batch(job: JobConfig, readers: dict[str, ShardReader]) -> None:
    for batch in batches(job, readers)[:2]:
        assert batch.input_ids.shape[1] == int(batch.attention_mask.sum(dim=1).max())


def test_an_unreadable_sample_keeps_its_slot_masked_and_counted(
    job: JobConfig, readers: dict[str, ShardReader], tmp_path: Path
) -> None:
    dataset = readers["emoji"].dataset
    local = tmp_path / "copy"
    for file in dataset.list():
        (local / file.path).parent.mkdir(parents=True, exist_ok=True)
        dataset.download(file.path, local / file.path)
    tar = local / "000000.tar"
    data = bytearray(tar.read_bytes())
    middle = data.index(b"RIFF") + 60  # inside the first picture
    data[middle] ^= 0xFF
    tar.write_bytes(bytes(data))
    broken = {"emoji": ShardReader(open_storage(local), readers["emoji"].manifest)}
    epoch = batches(job, broken)[:3]
    bad = sum((batch.bad for batch in epoch), Counter())
    assert bad == {"checksum-mismatch": 1}
    good = batches(job, readers)[:3]
    for batch, reference in zip(epoch, good, strict=True):
        assert len(batch.keys) == len(reference.keys)
        assert int(reference.valid.sum()) - int(batch.valid.sum()) == batch.bad.total()


def test_a_retracted_sample_keeps_its_slot_masked_and_is_not_bad(
    job: JobConfig, readers: dict[str, ShardReader]
) -> None:
    good = batches(job, readers)[:3]
    keys = [good[0].keys[0], good[1].keys[5]]
    manifest = readers["emoji"].manifest.model_copy(update={"dropped_keys": keys})
    epoch = batches(job, {"emoji": ShardReader(readers["emoji"].dataset, manifest)})[:3]
    for batch, reference in zip(epoch, good, strict=True):
        assert batch.slots == reference.slots, "all others stay in their places"
        hidden = torch.tensor([key in keys for key in reference.keys])
        assert torch.equal(batch.valid, reference.valid & ~hidden)
        assert not batch.bad
    causes = Counter(cause for batch in epoch for cause in batch.causes)
    assert causes == {RETRACTED: 2, None: 3 * 16 - 2}


def test_what_the_ledger_notes_is_what_the_batches_hold(
    job: JobConfig, readers: dict[str, ShardReader]
) -> None:
    """The real loader's batches: those of a resumed stage and of two workers add up to those of the whole."""
    shards = {name: reader.manifest.shards_digest for name, reader in readers.items()}

    def noted(start: int, worker: int = 0, workers: int = 1) -> list[StepRecord]:
        recorder = ConsumptionRecorder(readers["emoji"].dataset, shards, None)
        for step, batch in enumerate(
            batches(job, readers, 1, start=start, worker=worker, workers=workers), start + 1
        ):
            recorder.add(step, batch)
        return recorder._steps

    whole = noted(0)
    assert noted(2) == whole[2:]
    for record, first, second in zip(whole, noted(0, 0, 2), noted(0, 1, 2), strict=True):
        assert record.trained > 0
        assert (record.step, record.dataset, record.epoch) == (first.step, first.dataset, first.epoch)
        assert record.digest == (first.digest + second.digest) % 2**128
        assert (record.trained, record.empty) == (first.trained + second.trained, first.empty + second.empty)


def test_loader_processes_give_the_same_batches(job: JobConfig, readers: dict[str, ShardReader]) -> None:
    one = job.model_copy(update={"train": job.train.model_copy(update={"loader_processes": 1})})
    for with_process, without in zip(
        batches(one, readers, start=6), batches(job, readers, start=6), strict=True
    ):
        assert_same(with_process, without)


@pytest.mark.parametrize("processes", [0, 1])
def test_a_training_imports_ahead_what_its_loader_processes_need(
    job: JobConfig,
    readers: dict[str, ShardReader],
    processes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ahead: set[str] = set()
    monkeypatch.setattr(pretraining, "import_ahead", lambda *modules: ahead.update(modules))
    train = job.train.model_copy(update={"loader_processes": processes})
    subject = pretraining.PretrainingSubject(
        job.model_copy(update={"train": train}),
        {name: reader.dataset.url for name, reader in readers.items()},
    )
    learner = subject.learner(WorkerContext(0, 1, 0, 1, 0, torch.device("cpu")), tmp_path)
    loader = learner.loader(job.train.stages[0], 0)
    assert ahead == (
        {type(loader.dataset).__module__, type(loader.collate_fn).__module__} if processes else set()
    )


def test_the_sampler_knows_its_length(job: JobConfig, readers: dict[str, ShardReader]) -> None:
    manifests = {name: reader.manifest for name, reader in readers.items()}
    sampler = StageSampler(
        job.train.stages[0], job.train, manifests, seed=7, start_step=3, worker=1, workers=2
    )
    assert len(sampler) == len(list(sampler)) == 5
    assert sampler.group_size == 4
