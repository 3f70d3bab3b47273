"""Candidates of retrieval: the true caption first, then wrong ones of other samples, drawn by the seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model import GLSCLConfig, GLSCLProcessor
from pipeline.fine_tuning.config import DATA, RetrievalFineTuning
from pipeline.fine_tuning.examples import Collator, FineTuningBatch, Sample
from pipeline.fine_tuning.learner import Material
from pipeline.fine_tuning.retrieval import RetrievalTraining, open_training
from pipeline.training.loading import Slot, StageSampler, batch_loader
from sharding.errors import UserError
from sharding.reader import ShardReader
from sharding.seeds import generator
from sharding.storage import Storage
from tests.pipeline.fine_tuning.material import NAMES, Run, make_run, retrieval_datasets, retrieval_task

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("retrieval"))


@pytest.fixture(scope="module")
def datasets(run: Run, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Storage]:
    return retrieval_datasets(run, tmp_path_factory.mktemp("raw"))


@pytest.fixture
def material(run: Run, datasets: dict[str, Storage], tmp_path: Path) -> Material:
    return Material(run.storage, datasets, run.run.at(f"fine-tuning/{tmp_path.name}"))


def samples(training: RetrievalTraining, epoch: int = 0, seed: int = 3, **recipe: object) -> list[Sample]:
    """Of an epoch, in the order of the dataset, and an empty slot."""
    stage = RetrievalFineTuning(dataset="pairs", resolution=24).course(12).stages[0]
    slots = [
        Slot(DATA, shard, row, epoch)
        for shard, record in enumerate(training.data.shards)
        for row in range(record.samples)
    ]
    return training.dataset(stage, seed).__getitems__([*slots, Slot(DATA, -1, -1, epoch)])


def test_the_true_caption_comes_first_and_no_wrong_one_is_right(material: Material) -> None:
    training = open_training(retrieval_task(), material)
    *found, empty = samples(training)
    assert len(found) == 12
    for sample in found:
        true, *wrong = sample.texts
        assert sample.valid
        assert true.removeprefix("a picture of the ") in NAMES
        assert len(wrong) == 3
        assert true not in wrong, "the captions of two other samples read the same"
    assert (empty.texts, empty.valid, empty.cause) == ([""] * 4, False, None)


def test_wrong_captions_are_of_different_other_samples(material: Material) -> None:
    training = open_training(retrieval_task(), material)
    captions = training._captions
    own = Slot(DATA, 1, 2, 0)
    for seed in range(30):
        wrong = captions.wrong(own, "none of them", 11, generator(seed))
        # Each of the other eleven once: three of each name, but two of its own.
        counts = sorted(wrong.count(f"a picture of the {name}") for name in NAMES)
        assert counts == [2, 3, 3, 3]
        assert wrong != captions.wrong(own, "none of them", 11, generator(seed + 100))
        assert wrong == captions.wrong(own, "none of them", 11, generator(seed))


def test_other_epochs_and_seeds_draw_others_and_the_same_draw_the_same(material: Material) -> None:
    training = open_training(retrieval_task(), material)

    def texts(**options: int) -> list[object]:
        return [sample.texts for sample in samples(training, **options)]

    assert texts() == texts()
    assert len({str(texts()), str(texts(epoch=1)), str(texts(seed=4))}) == 3


def test_a_batch_holds_all_candidates_and_its_pictures(material: Material) -> None:
    task = retrieval_task(steps=2)
    training = open_training(task, material)
    assert task.fine_tune is not None
    course = task.fine_tune.course(12)
    [stage] = course.stages
    sampler = StageSampler(stage, course, {DATA: training.data}, seed=3, start_step=0, worker=0, workers=1)
    processor = GLSCLProcessor.from_config(GLSCLConfig.preset("tiny", vocab_size=400))
    collate = Collator(processor, training.labels, None)
    batch: FineTuningBatch = next(iter(batch_loader(training.dataset(stage, 3), sampler, collate, 0)))
    assert batch.input_ids.shape == (16, 4, batch.input_ids.shape[2])
    assert batch.pixel_values.shape == (16, 1, 3, 24, 24)
    assert batch.labels is None
    assert int(batch.valid.sum()) == 12  # an epoch in one batch, four slots empty
    texts = processor.tokenizer.batch_decode(batch.input_ids[:, 0], skip_special_tokens=True)
    for row in range(16):
        assert bool(batch.valid[row]) == (texts[row] != ""), "the true one is the first"


def test_captions_are_read_once_and_kept(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_training(retrieval_task(), material)
    monkeypatch.setattr(ShardReader, "read_many", lambda *_: pytest.fail("they are there already"))
    again = open_training(retrieval_task(), material)
    slot, draws = Slot(DATA, 0, 0, 0), (generator(1), generator(1))
    assert first._captions.wrong(slot, "", 5, draws[0]) == again._captions.wrong(slot, "", 5, draws[1])


def test_more_negatives_than_samples_and_the_other_modality_are_refused(material: Material) -> None:
    with pytest.raises(UserError, match=r"fine_tune\.negatives: got 12; .* has 12 samples"):
        open_training(retrieval_task(negatives=12), material)
    with pytest.raises(UserError, match=r"fine_tune\.modality: got video; the dataset 'pairs' is of images"):
        open_training(retrieval_task(modality="video"), material)


def test_a_sample_that_cannot_be_read_lends_no_caption(
    material: Material, run: Run, datasets: dict[str, Storage]
) -> None:
    shards = datasets["pairs"]
    whole = shards.read_bytes("000000.tar")
    damaged = bytearray(whole)
    damaged[whole.index(b"a picture of")] ^= 1
    shards.write_bytes("000000.tar", bytes(damaged))
    try:
        training = open_training(retrieval_task(), material)
        assert len(training._captions) == 11
        *found, _ = samples(training)
        assert sum(not sample.valid for sample in found) == 1
        assert {sample.cause for sample in found} == {None, "checksum-mismatch"}
        assert torch.equal(torch.tensor([len(sample.texts) for sample in found]), torch.full((12,), 4))
    finally:
        shards.write_bytes("000000.tar", whole)
