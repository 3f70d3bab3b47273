"""Recall is what a slow, plain count says it is, whatever the model, the batch size and the bad samples."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from model import GLSCLConfig, GLSCLForPreTraining, GLSCLProcessor
from pipeline.evaluation.result import TaskResult
from pipeline.evaluation.tasks.base import TaskContext
from pipeline.evaluation.tasks.retrieval import gallery, ranking
from pipeline.evaluation.tasks.retrieval.config import RetrievalTask
from pipeline.evaluation.tasks.retrieval.gallery import Gallery
from pipeline.evaluation.tasks.retrieval.pairs import Pairs
from pipeline.evaluation.tasks.retrieval.ranking import (
    chance,
    ranks_of,
    recall,
    reranked,
    search,
    shortlist,
)
from pipeline.evaluation.tasks.retrieval.states import TextStates
from pipeline.evaluation.tasks.retrieval.task import evaluate
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


def owned_problem(queries: int, candidates: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with many ties, and the owners of queries and candidates: three queries to one candidate's owner."""
    scores, _ = random_problem(queries, candidates, seed)
    return scores, torch.arange(queries) // 3, torch.arange(candidates)


def test_reranking_reorders_the_shortlist_and_nothing_else() -> None:
    scores, query_owner, owner = owned_problem(50, 40, 1)
    k = 8
    found = search(lambda part: scores[part], query_owner, owner, k, TIE)
    assert found.shortlist.shape == (50, k)
    new = torch.randn(50, k, generator=torch.Generator().manual_seed(2))
    listed = owner[found.shortlist] == query_owner[:, None]
    after = reranked(found, new, query_owner, owner, TIE)
    assert 0 < listed.any(1).sum() < 50
    for q in range(50):
        assert after.shortlist[q].tolist() == found.shortlist[q][new[q].argsort(descending=True)].tolist()
        assert after.scores[q].tolist() == sorted(new[q].tolist(), reverse=True)
        if listed[q].any():
            assert after.ranks[q] == plain_rank(new[q].tolist(), listed[q].tolist())
            assert after.ranks[q] <= k
        else:
            assert after.ranks[q] == found.ranks[q]
            assert after.ranks[q] > k


def test_a_search_in_blocks_finds_what_one_in_one_piece_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, query_owner, owner = owned_problem(50, 40, 4)
    whole = search(lambda part: scores[part], query_owner, owner, 8, TIE)
    sizes: list[int] = []
    monkeypatch.setattr(ranking, "_SCORES", 7 * 40)

    def rows(part: slice) -> Tensor:
        sizes.append(len(scores[part]))
        return scores[part]

    parts = search(rows, query_owner, owner, 8, TIE)
    assert sizes == [7] * 7 + [1]
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))
    positive = query_owner[:, None] == owner[None]
    assert torch.equal(whole.ranks, ranks_of(scores, positive, TIE))
    assert torch.equal(whole.shortlist, shortlist(scores, positive, 8, TIE))
    assert torch.equal(whole.scores, scores.gather(1, whole.shortlist))


def test_chance_is_what_random_ranks_give() -> None:
    generator = torch.Generator().manual_seed(3)
    positives = torch.tensor([1, 3, 5])
    hits = torch.zeros(3)
    for _ in range(4000):
        for q, n in enumerate(positives.tolist()):
            hits[q] += bool((torch.randperm(40, generator=generator)[:10] < n).any())
    assert chance(positives, 40, 10) == pytest.approx(float((hits / 4000).mean()), abs=0.02)
    assert chance(torch.ones(7), 100, 10) == pytest.approx(0.1)
    assert chance(torch.ones(7), 100, 1) == pytest.approx(0.01)
    assert chance(torch.ones(7), 5, 10) == 1.0


def test_recall_counts_shares() -> None:
    metrics = {name: one.value for name, one in recall(torch.tensor([1, 2, 6, 11]), "t2i").items()}
    assert metrics == {"t2i_R1": 0.25, "t2i_R5": 0.5, "t2i_R10": 0.75, "t2i_median_rank": 4.0}


class MemoryReader:
    """Samples in memory behind the interface of ``sharding.reader.ShardReader``."""

    def __init__(self, samples: list[RawSample | BadData], modality: str = "image") -> None:
        self.samples, self.reads, self.batches = samples, 0, list[int]()
        half = len(samples) // 2
        self.manifest = SimpleNamespace(
            modality=modality,
            digest="0" * 64,
            shards=[SimpleNamespace(samples=half), SimpleNamespace(samples=len(samples) - half)],
        )
        self.dataset = SimpleNamespace(url="memory://held-out")

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, shard: int, row: int) -> RawSample:
        self.reads += 1
        sample = self.samples[shard * (len(self.samples) // 2) + row]
        if isinstance(sample, BadData):
            raise sample
        return sample

    def read_many(self, places: list[tuple[int, int]]) -> Iterator[tuple[int, RawSample | BadData]]:
        self.batches.append(len(places))
        for number in reversed(range(len(places))):  # in any order, as they come
            try:
                yield number, self.read(*places[number])
            except BadData as error:
                yield number, error


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


def result(model: Any, processor: Any, reader: MemoryReader, seed: int = 0, **options: Any) -> TaskResult:
    options = {"name": "t", "dataset": "d", "rerank": 4, **options}
    context = TaskContext(model, processor, open_storage("/nowhere"), cast(Any, reader), seed)
    return evaluate(context, RetrievalTask(**options))


def run(model: Any, processor: Any, reader: MemoryReader, **options: Any) -> dict[str, float]:
    return result(model, processor, reader, **options).metrics


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
    every = pair_at_a_time(model, processor, reader, 25)
    assert every != expected
    assert any(
        expected[f"t2i_{name}"] != expected[f"t2i_rerank_{name}"] for name in ("R1", "R5", "median_rank")
    )
    for batch_size in (1, 5, 64):
        metrics = run(model, processor, reader, batch_size=batch_size)
        assert {name: metrics[name] for name in expected} == expected
    exact = run(model, processor, reader, rerank="all")
    assert {name: exact[name] for name in every} == every
    assert (metrics["candidates_images"], metrics["candidates_texts"]) == (13, 25)
    for k in (1, 5, 10):
        assert metrics[f"t2i_chance_R{k}"] == pytest.approx(k / 13)
        assert k / 25 < metrics[f"i2t_chance_R{k}"] <= 1  # pictures have two captions, most of them


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every number that an evaluation computes: embeddings, then the log-odds of the pairs."""
    numbers: list[Tensor] = []
    score = Pairs.score

    def watched(self: Pairs, gallery: Gallery) -> Tensor:
        numbers.extend((gallery.image_embeddings, gallery.text_embeddings, score(self, gallery)))
        return numbers[-1]

    monkeypatch.setattr(Pairs, "score", watched)
    return numbers


@pytest.mark.parametrize("rerank", [4, "all"])
def test_every_number_is_the_same_to_the_last_digit_whatever_the_batch_size(
    model: GLSCLForPreTraining, processor: GLSCLProcessor, scored: list[Tensor], rerank: int | str
) -> None:
    reader = corpus(37)
    reader.samples[20] = BadData("checksum-mismatch", "000000.tar, key s20")
    found = [
        result(model, processor, reader, rerank=rerank, batch_size=size, bad_limit=0.1) for size in (64, 1, 5)
    ]
    assert set(reader.batches) == {37, 1, 5, 2}
    assert len(scored) == 9
    for number in range(3):
        assert torch.equal(scored[number], scored[3 + number])
        assert torch.equal(scored[number], scored[6 + number])
    images, texts, pairs = (len(one) for one in scored[:3])
    assert (images, texts) == (36, 70)
    assert len(scored[2].unique()) > 0.99 * pairs
    assert pairs == images * texts if rerank == "all" else 4 * texts < pairs <= 4 * (texts + images)
    assert found[0].metrics == found[1].metrics == found[2].metrics
    assert found[0].examples == found[1].examples == found[2].examples


@pytest.mark.parametrize("rerank", [16, "all"])
def test_states_that_do_not_fit_are_encoded_again_with_the_same_numbers(
    model: GLSCLForPreTraining,
    processor: GLSCLProcessor,
    scored: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    rerank: int | str,
) -> None:
    reader = corpus(75)
    held: list[int] = []
    encoded = {"encode_text": 0, "encode_vision": 0}
    gather = TextStates.gather

    def watched(self: TextStates, places: Tensor) -> tuple[Tensor, Tensor]:
        held.append(self._states.nbytes)
        return gather(self, places)

    def counted(name: str) -> Callable[..., Any]:
        encode = getattr(model, name)

        def call(*arguments: Tensor) -> Any:
            encoded[name] += 1
            return encode(*arguments)

        return call

    monkeypatch.setattr(TextStates, "gather", watched)
    for name in encoded:
        monkeypatch.setattr(model, name, counted(name))
    expected = run(model, processor, reader, rerank=rerank)
    assert encoded == {"encode_text": 5, "encode_vision": 3}  # blocks of 150 captions and 75 pictures
    assert run(model, processor, reader, rerank=rerank, cache_mb=1) == expected
    assert all(torch.equal(*both) for both in zip(scored[:3], scored[3:], strict=True))
    assert encoded["encode_text"] > 5 + 5 + 2 * 2
    assert encoded["encode_vision"] == 3 + 3 + 1  # two blocks are kept
    assert max(held) > held[-1]
    assert held[-1] <= 0.75 * 2**20


def test_bad_samples_are_counted_and_passed_over_within_the_limit(
    model: GLSCLForPreTraining, processor: GLSCLProcessor
) -> None:
    reader = corpus(12)
    good = MemoryReader([sample for n, sample in enumerate(reader.samples) if n not in (3, 7)])
    reader.samples[3] = RawSample("s3", b"no picture", "png", ["a", "b"], 1, 1, 1, 0.0)
    reader.samples[7] = BadData("checksum-mismatch", "000000.tar, key s7")
    metrics = run(model, processor, reader, bad_limit=0.2)
    assert metrics.pop("skipped") == 2
    expected = run(model, processor, good)
    assert expected.pop("skipped") == 0
    assert metrics == expected
    with pytest.raises(BadDataLimit, match=r"memory://held-out.*checksum-mismatch: 1"):
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
    monkeypatch.setattr(gallery, "decode_video", lambda data, count: frames[data][:count])
    metrics = run(model, processor, MemoryReader(samples, "video"), frames=3, limit=4)
    assert metrics["candidates_images"] == 4
    assert metrics["t2i_R10"] == metrics["t2i_chance_R10"] == 1.0


def test_the_version_of_a_task_changes_with_what_changes_its_numbers() -> None:
    task = RetrievalTask(name="a", dataset="d")
    assert task.version("x") == task.model_copy(update={"batch_size": 3, "name": "b"}).version("x")
    assert task.version("x") != task.version("y")
    assert task.version("x") != task.model_copy(update={"limit": 10}).version("x")


def test_the_examples_are_the_first_of_a_drawn_order_with_what_they_found(
    model: GLSCLForPreTraining, processor: GLSCLProcessor
) -> None:
    reader = corpus(40)
    one = result(model, processor, reader, rerank="all")
    assert one.examples == result(model, processor, reader, rerank="all").examples
    assert one.examples != result(model, processor, reader, rerank="all", seed=1).examples
    captions = {caption: s.key for s in reader.samples if isinstance(s, RawSample) for caption in s.captions}
    asked = [example for example in one.examples if example.right is not None]
    assert one.examples[: len(asked)] == asked
    assert len(one.examples) == len(asked) + 2  # attention maps, neither right nor wrong
    for family, mark in zip(one.families, ("“", "captions of"), strict=True):
        rights = [example.right for example in asked if example.title.startswith(mark)]
        hits = int(family.metrics[f"{family.name}_rerank_R1"].values.sum())
        assert rights == [True] * min(3, hits) + [False] * 3
    for example in asked:
        for data, _ in example.pictures:
            thumbnail = Image.open(io.BytesIO(data))
            assert thumbnail.format == "JPEG"
            assert max(thumbnail.size) <= 160
        if caption := captions.get(example.title.strip("“”")):  # asks for a picture
            labels = [label for _, label in example.pictures]
            (true,) = [label for label in labels if " true" in label]
            (rank,) = [int(text) for name, text in example.lines if name.startswith("rank")]
            assert true.startswith(f"{rank}. true")
            assert example.lines[-1] == ("its key", caption)
            assert len(labels) == (5 if rank <= 5 else 6)
            assert (rank == 1) == example.right
        else:
            shown = [text.rsplit(" (", 1)[0] for name, text in example.lines[:-1] if name[0].isdigit()]
            assert len(shown) in (5, 6)
            assert all(text in captions for text in shown[:5])
            own = [name.split(".")[0] for name, _ in example.lines if name.endswith("true")]
            assert example.lines[-1] == ("rank of its best caption", own[0])
    assert any("matches with 0." in label for _, label in one.examples[0].pictures)
