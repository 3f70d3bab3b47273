"""Recall is what a slow, plain count says it is, whatever the model, the batch size and the bad samples."""

from __future__ import annotations

import io
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from model import GLSCLConfig, GLSCLForPreTraining, GLSCLProcessor
from pipeline.evaluation.tasks.base import TaskContext
from pipeline.evaluation.tasks.retrieval import task as retrieval
from pipeline.evaluation.tasks.retrieval.config import RetrievalTask
from pipeline.evaluation.tasks.retrieval.ranking import chance, ranks_of, recall, reranked, shortlist
from sharding.errors import BadData, BadDataLimit, UserError
from sharding.reader import RawSample
from sharding.storage import open_storage

TIE = 1e-6


def plain_rank(scores: list[float], positive: list[bool], tie: float = TIE) -> int:
    best = max(score for score, right in zip(scores, positive, strict=True) if right)
    return 1 + sum(not right and score >= best - tie for score, right in zip(scores, positive, strict=True))


def random_problem(queries: int, candidates: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(queries, candidates, generator=generator).round(decimals=1)  # many ties
    positive = torch.rand(queries, candidates, generator=generator) < 0.1
    positive[torch.arange(queries), torch.randint(candidates, (queries,), generator=generator)] = True
    return scores, positive


def test_ranks_are_those_of_a_plain_count() -> None:
    scores, positive = random_problem(40, 30, 0)
    expected = [plain_rank(s, p) for s, p in zip(scores.tolist(), positive.tolist(), strict=True)]
    assert ranks_of(scores, positive, TIE).tolist() == expected


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_a_constant_embedding_is_last_not_first(value: float) -> None:
    scores = torch.full((20, 20), value) + 1e-8 * torch.randn(20, 20)
    ranks = ranks_of(scores, torch.eye(20, dtype=torch.bool), TIE)
    assert ranks.tolist() == [20] * 20


def test_reranking_reorders_the_shortlist_and_nothing_else() -> None:
    scores, positive = random_problem(50, 40, 1)
    k = 8
    chosen = shortlist(scores, positive, k, TIE)
    assert chosen.shape == (50, k)
    new = torch.randn(50, k, generator=torch.Generator().manual_seed(2))
    listed = positive.gather(1, chosen)
    ranks = ranks_of(scores, positive, TIE)
    after = reranked(ranks, new, listed, TIE)
    for q in range(50):
        if listed[q].any():
            assert after[q] == plain_rank(new[q].tolist(), listed[q].tolist())
            assert after[q] <= k
        else:
            assert after[q] == ranks[q]
            assert after[q] > k


def test_chance_is_what_random_ranks_give() -> None:
    generator = torch.Generator().manual_seed(3)
    positives = torch.tensor([1, 3, 5])
    hits = torch.zeros(3)
    for _ in range(4000):
        for q, n in enumerate(positives.tolist()):
            hits[q] += bool((torch.randperm(40, generator=generator)[:10] < n).any())
    assert chance(positives, 40) == pytest.approx(float((hits / 4000).mean()), abs=0.02)
    assert chance(torch.ones(7), 100) == pytest.approx(0.1)
    assert chance(torch.ones(7), 5) == 1.0


def test_recall_counts_shares() -> None:
    metrics = {name: one.value for name, one in recall(torch.tensor([1, 2, 6, 11]), "t2i").items()}
    assert metrics == {"t2i_R1": 0.25, "t2i_R5": 0.5, "t2i_R10": 0.75, "t2i_median_rank": 4.0}


class MemoryReader:
    """Samples in memory behind the interface of ``sharding.reader.ShardReader``."""

    def __init__(self, samples: list[RawSample | BadData], modality: str = "image") -> None:
        self.samples = samples
        half = len(samples) // 2
        self.manifest = SimpleNamespace(
            modality=modality,
            shards=[SimpleNamespace(samples=half), SimpleNamespace(samples=len(samples) - half)],
        )
        self.dataset = SimpleNamespace(url="memory://held-out")

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, shard: int, row: int) -> RawSample:
        sample = self.samples[shard * (len(self.samples) // 2) + row]
        if isinstance(sample, BadData):
            raise sample
        return sample


def picture(seed: int) -> bytes:
    pixels = np.random.Generator(np.random.Philox(key=seed)).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((40, 33), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def corpus(count: int) -> MemoryReader:
    words = ["red", "blue", "small", "apple", "dog", "running", "under a tree", "smiling"]
    samples: list[RawSample | BadData] = []
    for n in range(count):
        captions = [f"{words[n % 8]} {words[(n // 8 + c) % 8]} number {n} {c}" for c in range(1 + n % 3)]
        samples.append(RawSample(f"s{n}", picture(n), "png", captions, 40, 33, 1, 0.0))
    return MemoryReader(samples)


@pytest.fixture(scope="module")
def model() -> Iterator[GLSCLForPreTraining]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # passes this small are slower on several
    torch.manual_seed(0)
    config = GLSCLConfig.preset(
        "tiny", image_size=32, patch_size=16, vision_layers=1, text_layers=1, fusion_layers=1
    )
    model = GLSCLForPreTraining(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # fresh weights hardly tell inputs apart
            parameter.add_(0.1 * torch.randn_like(parameter))
    yield model
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def processor(model: GLSCLForPreTraining) -> GLSCLProcessor:
    return GLSCLProcessor.from_config(model.config)


def run(model: Any, processor: Any, reader: MemoryReader, **options: Any) -> dict[str, float]:
    options = {"name": "t", "dataset": "d", "rerank": 4, **options}
    context = TaskContext(model, processor, open_storage("/nowhere"), cast(Any, reader), seed=0)
    return retrieval.evaluate(context, RetrievalTask(**options)).metrics


def pair_at_a_time(
    model: GLSCLForPreTraining, processor: GLSCLProcessor, reader: MemoryReader, k: int
) -> dict[str, float]:
    """The same numbers by one forward pass per caption, picture and pair."""
    samples = [sample for sample in reader.samples if isinstance(sample, RawSample)]
    owner = torch.tensor([n for n, sample in enumerate(samples) for _ in sample.captions])
    with torch.inference_mode():
        pictures = [
            model.encode_vision(processor.images([np.asarray(Image.open(io.BytesIO(s.media)))]))
            for s in samples
        ]
        tokens = [processor.tokenize([caption]) for s in samples for caption in s.captions]
        texts = [model.encode_text(t["input_ids"], t["attention_mask"]) for t in tokens]
        itc = torch.stack([torch.cat([p.embedding @ t.embedding.T for p in pictures])[:, 0] for t in texts])
        itm = torch.zeros_like(itc)
        for t, text in enumerate(texts):
            for p, vision in enumerate(pictures):
                logits = model.match(text.states, tokens[t]["attention_mask"], vision.states, 1)[0]
                itm[t, p] = logits[1] - logits[0]
    right = owner[:, None] == torch.arange(len(samples))[None, :]
    metrics: dict[str, float] = {}
    for prefix, s, m, positive in (("t2i", itc, itm, right), ("i2t", itc.T, itm.T, right.T)):
        first = [plain_rank(a, b) for a, b in zip(s.tolist(), positive.tolist(), strict=True)]
        second = []
        for q, rank in enumerate(first):
            listed = s[q].argsort(descending=True)[:k]
            on_list = positive[q][listed].tolist()
            second.append(plain_rank(m[q][listed].tolist(), on_list) if any(on_list) else rank)
        measured = recall(torch.tensor(first), prefix) | recall(torch.tensor(second), f"{prefix}_rerank")
        metrics |= {name: one.value for name, one in measured.items()}
    return metrics


def test_batched_retrieval_equals_the_pair_at_a_time_loop(
    model: GLSCLForPreTraining, processor: GLSCLProcessor
) -> None:
    reader = corpus(13)
    expected = pair_at_a_time(model, processor, reader, 4)
    assert any(
        expected[f"t2i_{name}"] != expected[f"t2i_rerank_{name}"] for name in ("R1", "R5", "median_rank")
    )
    for batch_size in (1, 5, 64):
        metrics = run(model, processor, reader, batch_size=batch_size)
        assert {name: metrics[name] for name in expected} == expected
    assert (metrics["candidates_images"], metrics["candidates_texts"]) == (13, 25)
    assert metrics["i2t_chance_R10"] > metrics["t2i_chance_R10"] * 0.5


def test_states_that_do_not_fit_are_encoded_again_with_the_same_numbers(
    model: GLSCLForPreTraining, processor: GLSCLProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = corpus(17)
    expected = run(model, processor, reader, batch_size=3)
    held: list[int] = []
    put = retrieval._StateCache.put

    def watched(self: retrieval._StateCache, *arguments: Any) -> None:
        self.limit = 60_000  # two or three blocks
        put(self, *arguments)
        held.append(self._bytes)

    monkeypatch.setattr(retrieval._StateCache, "put", watched)
    assert run(model, processor, reader, batch_size=3) == expected
    assert max(held) <= 60_000
    assert len(held) > 6 + 11  # more than once each


def test_bad_samples_are_counted_and_passed_over_within_the_limit(
    model: GLSCLForPreTraining, processor: GLSCLProcessor
) -> None:
    reader = corpus(12)
    good = MemoryReader([sample for n, sample in enumerate(reader.samples) if n not in (3, 7)])
    reader.samples[3] = RawSample("s3", b"no picture", "png", ["a", "b"], 1, 1, 1, 0.0)
    reader.samples[7] = BadData("crc-mismatch", "000000.tar, key s7")
    metrics = run(model, processor, reader, bad_limit=0.2)
    assert metrics.pop("skipped") == 2
    expected = run(model, processor, good)
    assert expected.pop("skipped") == 0
    assert metrics == expected
    with pytest.raises(BadDataLimit, match=r"memory://held-out.*crc-mismatch: 1"):
        run(model, processor, reader, bad_limit=0.1)


def test_a_dataset_with_nothing_to_choose_from_is_refused(
    model: GLSCLForPreTraining, processor: GLSCLProcessor
) -> None:
    with pytest.raises(UserError, match="at least two"):
        run(model, processor, corpus(1))


def test_clips_are_searched_by_their_frames(
    model: GLSCLForPreTraining, processor: GLSCLProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = {
        f"{n}".encode(): np.random.default_rng(n).integers(0, 256, (6, 32, 32, 3), np.uint8) for n in range(5)
    }
    samples: list[RawSample | BadData] = [
        RawSample(f"v{n}", f"{n}".encode(), "mp4", [f"clip {n}"], 32, 32, 6, 1.0) for n in range(5)
    ]
    monkeypatch.setattr(retrieval, "decode_video", lambda data, count: frames[data][:count])
    metrics = run(model, processor, MemoryReader(samples, "video"), frames=3, limit=4)
    assert metrics["candidates_images"] == 4
    assert metrics["t2i_R10"] == metrics["t2i_chance_R10"] == 1.0


def test_the_version_of_a_task_changes_with_what_changes_its_numbers() -> None:
    task = RetrievalTask(name="a", dataset="d")
    assert task.version("x") == task.model_copy(update={"batch_size": 3, "name": "b"}).version("x")
    assert task.version("x") != task.version("y")
    assert task.version("x") != task.model_copy(update={"limit": 10}).version("x")
