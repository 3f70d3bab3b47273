"""What a run trains on, by simulating whole runs: over restarts, workers, epochs, stages, mixtures, retractions."""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
import pytest

from pipeline.training.batches import Slot, StageSampler
from pipeline.training.config import StageBlock, TrainBlock, divisors
from pipeline.training.data_order import DataOrder, draw_mixture
from sharding.manifest import Counts, Manifest, Modality, ShardRecord

SEED = 5


def manifest_of(name: str, shards: list[int], *, modality: Modality = "image") -> Manifest:
    records = [
        ShardRecord(name=f"{i:06d}", samples=n, bytes=1, sha256=f"{name}{i}", index_bytes=1, index_sha256="")
        for i, n in enumerate(shards)
    ]
    return Manifest(
        name=name,
        modality=modality,
        configuration={},
        configuration_digest="",
        source={},
        shards=records,
        counts=Counts(),
    )


def train_block(
    lanes: int, accumulation: int, window: int, stages: list[tuple[int, int, dict[str, float]]]
) -> TrainBlock:
    """Stages as (steps, samples of each lane in a contrastive batch, mixture)."""
    unit = lanes * accumulation
    blocks = [
        StageBlock(name=f"s{i}", steps=steps, mixture=mixture, global_batch=max(2, unit * group))
        for i, (steps, group, mixture) in enumerate(stages)
    ]
    return TrainBlock(
        lanes=lanes,
        global_batch=blocks[0].global_batch or 0,
        accumulation=accumulation,
        shuffle_window=window,
        stages=blocks,
    )


def stage_batches(
    train: TrainBlock, data: dict[str, Manifest], stage: int, start: int, workers: int
) -> list[list[Slot]]:
    """The contrastive batches from a restart on, the parts of all workers together; all take the same steps."""
    samplers = [
        StageSampler(
            train.stages[stage], train, data, seed=SEED, start_step=start, worker=worker, workers=workers
        )
        for worker in range(workers)
    ]
    parts = [list(sampler) for sampler in samplers]
    assert {len(part) for part in parts} == {len(samplers[0])}
    return [[slot for part in batch for slot in part] for batch in zip(*parts, strict=True)]


def undisturbed(train: TrainBlock, data: dict[str, Manifest]) -> list[list[list[Slot]]]:
    """By stage, batch and slot, of one worker."""
    return [stage_batches(train, data, number, 0, 1) for number in range(len(train.stages))]


def assert_each_sample_once_an_epoch(run: list[list[list[Slot]]], manifests: dict[str, Manifest]) -> int:
    """Also that epochs follow each other, and only the last one of a dataset is unfinished; number of whole ones."""
    seen: dict[str, dict[int, Counter[tuple[int, int]]]] = defaultdict(lambda: defaultdict(Counter))
    for slot in itertools.chain.from_iterable(itertools.chain.from_iterable(run)):
        seen[slot.dataset][slot.epoch]  # also an epoch of which only empty slots were shown
        if slot.row >= 0:
            assert max(seen[slot.dataset]) == slot.epoch, "an epoch goes on after the next has begun"
            seen[slot.dataset][slot.epoch][slot.shard, slot.row] += 1
    whole = 0
    for name, epochs in seen.items():
        everything = {(s, r) for s, shard in enumerate(manifests[name].shards) for r in range(shard.samples)}
        assert sorted(epochs) == list(range(len(epochs)))
        for epoch, samples in epochs.items():
            assert set(samples.values()) <= {1}
            if epoch < len(epochs) - 1:
                assert samples.keys() == everything
                whole += 1
            assert samples.keys() <= everything
    return whole


GRID = list(  # of (lanes, accumulation), windows, stages
    itertools.product(
        [(1, 1), (2, 1), (2, 2), (3, 1), (4, 1), (4, 2), (6, 1), (6, 2), (8, 1), (12, 1)],
        [1, 2, 3, 64],
        [
            [(9, 1, {"a": 1.0})],
            [(4, 2, {"a": 1.0}), (5, 1, {"a": 1.0}), (6, 3, {"a": 1.0})],
            [(6, 1, {"a": 2.0, "v": 1.0}), (7, 2, {"v": 1.0, "a": 1.0, "b": 1.0})],
        ],
    )
)
SMALL = {
    "a": manifest_of("a", [3, 1, 4]),
    "b": manifest_of("b", [2, 2]),
    "v": manifest_of("v", [5], modality="video"),
}


@pytest.mark.parametrize(("shape", "window", "stages"), GRID)
def test_every_restart_with_every_number_of_workers_gives_the_rest_of_the_same_run(
    shape: tuple[int, int], window: int, stages: list[tuple[int, int, dict[str, float]]]
) -> None:
    train, data = train_block(*shape, window, stages), SMALL
    run = undisturbed(train, data)
    assert_each_sample_once_an_epoch(run, SMALL)
    for number, stage in enumerate(train.stages):
        for start, workers in itertools.product(range(stage.steps + 1), divisors(train.lanes)):
            rest = stage_batches(train, data, number, start, workers)
            assert rest == run[number][start * train.accumulation :], (number, start, workers)


def test_runs_with_many_restarts_and_resizes_show_each_sample_once_an_epoch() -> None:
    """Drawn runs: at each restart some steps are lost and done again, with another number of workers."""
    draw, whole, resumed_after_first_epoch = random.Random(2024), 0, 0
    for case in range(150):
        manifests = {
            name: manifest_of(name, [draw.randint(1, 12) for _ in range(draw.randint(1, 7))])
            for name in ("a", "b", "v")[: draw.randint(1, 3)]
        }
        lanes, accumulation = draw.choice((1, 2, 3, 4, 6, 8)), draw.choice((1, 1, 2))
        stages = [
            (
                draw.randint(1, 25),
                draw.randint(1, 3),
                {
                    name: draw.uniform(0.5, 2)
                    for name in draw.sample(sorted(manifests), draw.randint(1, len(manifests)))
                },
            )
            for _ in range(draw.randint(1, 4))
        ]
        train, data = (
            train_block(lanes, accumulation, draw.choice((1, 2, 5, 64)), stages),
            manifests,
        )
        run: list[list[list[Slot]]] = []
        for number, stage in enumerate(train.stages):
            done: list[list[Slot]] = []
            for _ in range(
                draw.randint(0, 3)
            ):  # killed so often; the newest checkpoint lies some steps before
                start = len(done) // accumulation
                part = stage_batches(train, data, number, start, draw.choice(divisors(lanes)))
                kept = draw.randint(0, stage.steps - start)
                done += part[: kept * accumulation]
                resumed_after_first_epoch += any(slot.epoch for batch in done for slot in batch)
            start = len(done) // accumulation
            done += stage_batches(train, data, number, start, draw.choice(divisors(lanes)))
            run.append(done)
        assert run == undisturbed(train, data), case
        whole += assert_each_sample_once_an_epoch(run, manifests)
    assert whole > 300
    assert resumed_after_first_epoch > 30


def test_an_epoch_goes_on_over_stages_so_that_no_sample_falls_behind() -> None:
    stages = [(1, 2, {"a": 1.0}), (1, 1, {"a": 1.0}), (2, 3, {"a": 1.0}), (9, 1, {"a": 1.0})]
    manifests = {"a": manifest_of("a", [16, 9, 17])}
    train = train_block(3, 1, 8, stages)
    shown: Counter[tuple[int, int]] = Counter()
    everything = [(s, r) for s, shard in enumerate(manifests["a"].shards) for r in range(shard.samples)]
    for batch in itertools.chain.from_iterable(undisturbed(train, manifests)):
        shown.update((slot.shard, slot.row) for slot in batch if slot.row >= 0)
        times = [shown[sample] for sample in everything]
        assert max(times) - min(times) <= 1
    assert max(shown.values()) == 2


def test_the_drawn_example_of_the_module_is_what_the_order_gives() -> None:
    train = train_block(2, 1, 1, [(2, 2, {"a": 1.0}), (3, 4, {"a": 1.0})])
    order = DataOrder(train, {"a": manifest_of("a", [20])}, SEED)
    steps = [step for stage in train.stages for step in order.stage(stage)]
    assert [(step.epoch, step.taken, step.position) for step in steps] == [
        (0, 0, 0), (0, 0, 1), (0, 4, 0), (0, 4, 1), (1, 0, 0),
    ]  # fmt: skip
    assert [int((order.slots(step)[:, 0] < 0).sum()) for step in steps] == [0, 0, 0, 4, 0]


def test_a_retraction_leaves_every_other_sample_in_its_place() -> None:
    train = train_block(4, 1, 3, [(12, 1, {"a": 1.0})])
    retracted = {"a": SMALL["a"].model_copy(update={"dropped_keys": ["000001-000000", "000002-000003"]})}
    assert retracted["a"].digest != SMALL["a"].digest
    assert undisturbed(train, retracted) == undisturbed(train, SMALL)


def test_other_shards_and_other_seeds_have_another_order() -> None:
    train = train_block(1, 1, 64, [(8, 8, {"a": 1.0})])

    def slots(manifest: Manifest, seed: int = SEED) -> np.ndarray:
        order = DataOrder(train, {"a": manifest}, seed)
        return np.stack([order.slots(step) for step in order.stage(train.stages[0])])

    plain = slots(manifest_of("a", [30, 34]))
    for other in (slots(manifest_of("b", [30, 34])), slots(manifest_of("a", [30, 34]), SEED + 1)):
        assert (plain != other).any(axis=2).mean() > 0.8


def test_the_mixture_follows_its_weights_and_does_not_depend_on_the_number_of_steps() -> None:
    counts = Counter(draw_mixture(1, "stage", 4000, {"a": 3, "b": 1}))
    assert counts["a"] / 4000 == pytest.approx(0.75, abs=0.03)
    assert (
        draw_mixture(1, "stage", 50, {"a": 3, "b": 1}) == draw_mixture(1, "stage", 80, {"a": 3, "b": 1})[:50]
    )
    assert set(draw_mixture(1, "stage", 50, {"a": 3})) == {"a"}


def test_the_draws_of_a_run_that_was_started_with_an_earlier_release_stay() -> None:
    assert "".join(draw_mixture(7, "s", 24, {"a": 1, "b": 2, "c": 1})) == "abccaaccbbaccbbbccbbaaac"


def test_a_step_in_the_middle_of_a_run_costs_no_look_at_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: the manifest's shards are gone through once, and its digest is taken once."""
    walks = 0

    class Counting(list[ShardRecord]):
        def __iter__(self) -> Iterator[ShardRecord]:
            nonlocal walks
            walks += 1
            return super().__iter__()

    manifest = manifest_of("a", [10_000_000] * 50)
    train = train_block(4, 1, 64, [(400_000, 64, {"a": 1.0})])
    assert manifest.shards_digest  # as a resume has asked for it before
    manifest = manifest.model_copy()
    manifest.__dict__["shards"] = Counting(manifest.shards)
    sampler = StageSampler(
        train.stages[0],
        train,
        {"a": manifest},
        seed=SEED,
        start_step=399_000,
        worker=1,
        workers=2,
    )
    before = walks
    batches = list(itertools.islice(sampler, 500))
    assert len({slot for batch in batches for slot in batch}) == 500 * 128
    assert walks - before == 0
    assert before <= 3
