"""Retrieval, re-ranked by the matching head: our evaluation against the loop of the released code, on the same pairs.

    python -m benchmarks.retrieval                                          # tiny, 5,000 pictures x 25,000 captions
    python -m benchmarks.retrieval --preset base --size 224 --images 16 --rerank all --loop 16 --together 16

Pictures are emoji on noise (``benchmarks/pictures.py``), JPEGs in memory; five captions each, of as many words as
those of COCO. The model is not trained, so its embeddings would send every caption to the same few pictures: after
they are computed, random ones take their place, and the shortlists spread over everything. That is the worst case for
sharing a picture's states among its captions; what a picture, a caption or a pair costs does not depend on it.

Our side is the evaluation's own code from the first picture to the ranks. The released code takes every picture
through its vision encoder again for every caption, pads captions to the limit and fuses all tokens through all layers
(``benchmarks/literal.py`` computes that), over all pairs; here over the pairs of our shortlists. Timed on a random
part of them, half before our pairs are scored and half after, and multiplied:

- *pair at a time*: encoders and fusion for each pair alone;
- *captions together*: one picture, repeated, with 64 captions in one pass, as the released code has them;
- *kept states, pair at a time*: our model, both encoders run once, each pair fused alone.

CPU seconds are those of this process; on a machine that others use too they say more than the seconds on the clock.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.literal import LiteralStep
from benchmarks.pictures import pictures
from benchmarks.step import CAPTIONS as SENTENCES
from benchmarks.step import reset_peak, resident
from model import GLSCLConfig, GLSCLForPreTraining, GLSCLProcessor
from pipeline.evaluation.tasks.base import TaskContext
from pipeline.evaluation.tasks.retrieval.config import RetrievalTask
from pipeline.evaluation.tasks.retrieval.gallery import Gallery
from pipeline.evaluation.tasks.retrieval.pairs import Pairs
from pipeline.evaluation.tasks.retrieval.task import by_matching, by_similarity, pairs_to_judge
from sharding.decoding import decode_image
from sharding.errors import BadData
from sharding.reader import RawSample
from sharding.seeds import derive_seed, generator
from sharding.storage import open_storage

CAPTIONS = 5
PAIR, BATCH, KEPT = "pair at a time", "captions together", "kept states, pair at a time"


@dataclass
class Spent:
    """Seconds on the clock and of the CPU, and how often."""

    wall: float = 0.0
    cpu: float = 0.0
    pairs: int = 0

    def time(self, call: Callable[[], Any], pairs: int = 0) -> Any:
        """The result of ``call``, whose time is added."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        self.pairs += pairs
        return result


@dataclass
class Measured:
    """What a run found."""

    parts: dict[str, Spent] = field(default_factory=dict)
    loops: dict[str, Spent] = field(default_factory=dict)
    pairs: int = 0
    tokens: float = 0.0
    difference: float = 0.0
    peak_gib: float = 0.0

    def part(self, name: str) -> Spent:
        return self.parts.setdefault(name, Spent())


class Corpus:
    """Pictures and captions in memory, behind the interface of ``sharding.reader.ShardReader``."""

    def __init__(self, count: int, side: int) -> None:
        sizes = (side + side // 4, side + side // 2)
        words = sorted({word for caption in SENTENCES for word in caption.split()})
        self.samples = [
            RawSample(f"{number:06d}", data, "jpg", _captions(number, words), side, side, 1, 0.0)
            for number, (data, _) in enumerate(pictures(count, sizes))
        ]
        self.manifest = SimpleNamespace(modality="image", shards=[SimpleNamespace(samples=count)])
        self.dataset = SimpleNamespace(url="memory://pictures")

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, _shard: int, row: int) -> RawSample:
        return self.samples[row]

    def read_many(self, places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, RawSample | BadData]]:
        yield from ((number, self.read(*place)) for number, place in enumerate(places))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="tiny", choices=["tiny", "base"])
    parser.add_argument("--size", type=int, help="pixels; default: the preset's")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rerank", default="16", help="candidates of each query, or all")
    parser.add_argument("--cache-mb", type=int, default=512)
    parser.add_argument("--loop", type=int, default=64, help="pairs on which each loop is timed")
    parser.add_argument("--batches", type=int, default=2, help="passes of captions together that are timed")
    parser.add_argument("--together", type=int, default=64, help="captions in such a pass")
    parser.add_argument("--threads", type=int, default=1, help="an evaluation on the CPU has one")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = {"image_size": arguments.size} if arguments.size else {}
    config = GLSCLConfig.preset(arguments.preset, **sizes)
    torch.manual_seed(0)
    model = GLSCLForPreTraining(config).eval()
    corpus = Corpus(arguments.images, config.image_size)
    rerank: Any = arguments.rerank if arguments.rerank == "all" else int(arguments.rerank)
    task = RetrievalTask(name="retrieval", dataset="pictures", rerank=rerank, cache_mb=arguments.cache_mb)
    with torch.inference_mode():
        measured = measure(model, corpus, task, arguments)
    print_table(arguments, config, measured)


def measure(
    model: GLSCLForPreTraining, corpus: Corpus, task: RetrievalTask, arguments: argparse.Namespace
) -> Measured:
    """Our evaluation, and the loops before and after its pairs are scored."""
    processor = GLSCLProcessor.from_config(model.config)
    reader, loop, batches = cast(Any, corpus), arguments.loop, arguments.batches
    gallery = Gallery(TaskContext(model, processor, open_storage("/"), reader, seed=0), task)
    measured = Measured(loops={name: Spent() for name in (PAIR, BATCH, KEPT)})
    reset_peak(torch.device("cpu"))
    level = resident("VmRSS")
    measured.part("read, encode").time(gallery.embed)
    gallery.image_embeddings = _random_unit(gallery.image_embeddings, "images")
    gallery.text_embeddings = _random_unit(gallery.text_embeddings, "texts")
    found = measured.part("similarities").time(lambda: by_similarity(gallery))
    pairs = measured.part("similarities").time(lambda: pairs_to_judge(gallery, *found))
    peak = resident("VmHWM")
    chosen = _draw(pairs, gallery, loop)
    loops = _Loops(model, processor, corpus, gallery, arguments.together)
    before = [loops.time(pair, measured.loops) for pair in chosen[: loop // 2]]
    for pair in chosen[: batches - batches // 2]:
        loops.time_batch(pair, measured.loops[BATCH])
    reset_peak(torch.device("cpu"))
    scores = measured.part("pairs").time(lambda: pairs.score(gallery))
    measured.part("ranks").time(lambda: by_matching(gallery, pairs, scores, *found))
    peak = max(peak, resident("VmHWM"))
    after = [loops.time(pair, measured.loops) for pair in chosen[loop // 2 :]]
    for pair in chosen[len(chosen) - batches // 2 :]:
        loops.time_batch(pair, measured.loops[BATCH])
    images, texts = (torch.tensor(column) for column in zip(*chosen, strict=True))
    ours = pairs.pick(scores, images, texts)
    measured.difference = float((torch.tensor(before + after) - ours).abs().max())
    measured.pairs, measured.peak_gib = len(pairs), (peak - level) / 2**20
    measured.tokens = float(gallery.texts.lengths.float().mean())
    return measured


class _Loops:
    """The other ways to score a pair (picture, caption)."""

    def __init__(
        self,
        model: GLSCLForPreTraining,
        processor: GLSCLProcessor,
        corpus: Corpus,
        gallery: Gallery,
        together: int,
    ) -> None:
        self._together = together
        self._model, self._processor, self._corpus, self._gallery = model, processor, corpus, gallery
        self._literal = LiteralStep(model)
        self._draws = generator(derive_seed(0, "benchmark.batches"))

    def time(self, pair: tuple[int, int], spent: dict[str, Spent]) -> float:
        """One pair, each way; its log-odds by the released way."""
        pixels, (ids, mask) = self._pixels(pair[0]), self._padded([pair[1]])
        logits = spent[PAIR].time(lambda: self._released(ids, mask, pixels), 1)
        length = int(mask.sum())
        vision = self._model.encode_vision(pixels)
        text = self._model.encode_text(ids[:, :length], mask[:, :length])
        spent[KEPT].time(lambda: self._model.match(text.states, mask[:, :length], vision.states, 1), 1)
        return float(logits[0, 1] - logits[0, 0])

    def time_batch(self, pair: tuple[int, int], spent: Spent) -> None:
        """A picture with several captions in one pass."""
        texts = self._draws.integers(len(self._gallery.captions), size=self._together).tolist()
        ids, mask = self._padded(texts)
        pixels = self._pixels(pair[0]).expand(self._together, -1, -1, -1, -1)
        spent.time(lambda: self._released(ids, mask, pixels), self._together)

    def _released(self, ids: Tensor, mask: Tensor, pixels: Tensor) -> Tensor:
        text, vision = self._literal.text(ids, mask.bool()), self._literal.vision(pixels[:, 0])
        text, vision = self._literal.fuse(text, mask.bool(), vision)
        return self._model.matching_head(self._model.glscl.pool(text[:, :1], vision[:, :1]))

    def _pixels(self, image: int) -> Tensor:
        return self._processor.images([decode_image(self._corpus.read(0, image).media)])

    def _padded(self, texts: list[int]) -> tuple[Tensor, Tensor]:
        captions = [self._gallery.captions[text] for text in texts]
        tokens = self._processor(text=captions, padding="max_length")
        return tokens["input_ids"], tokens["attention_mask"]


def _draw(pairs: Pairs, gallery: Gallery, count: int) -> list[tuple[int, int]]:
    draws = generator(derive_seed(0, "benchmark.pairs")).choice(len(pairs), size=count, replace=False)
    return [pairs.pair(int(number)) for number in draws]


def _random_unit(like: Tensor, purpose: str) -> Tensor:
    draws = generator(derive_seed(0, "benchmark.embeddings", purpose)).standard_normal(like.shape)
    return torch.nn.functional.normalize(torch.from_numpy(draws).float(), dim=-1)


def _captions(number: int, words: list[str]) -> list[str]:
    """Captions of 10.5 words on average, as COCO's have them, give or take 2.4."""
    draws = generator(derive_seed(0, "benchmark.captions", number))
    counts = np.clip(draws.normal(10.5, 2.4, CAPTIONS).round().astype(int), 6, 30)
    return [" ".join(words[pick] for pick in draws.integers(len(words), size=count)) for count in counts]


def print_table(arguments: argparse.Namespace, config: GLSCLConfig, measured: Measured) -> None:
    """Our side, part by part; then each loop on all pairs, and how many times our time that is."""
    images, texts = arguments.images, CAPTIONS * arguments.images
    table = Table(
        title=f"{arguments.preset}, {config.image_size} px, {images:,} pictures x {texts:,} captions of "
        f"{measured.tokens:.1f} tokens, rerank {arguments.rerank}: {measured.pairs:,} pairs",
        title_justify="left",
    )
    table.add_column("")
    for name in ("seconds", "CPU s", "CPU ms a pair", "x ours (seconds)", "x ours (CPU)"):
        table.add_column(name, justify="right")
    ours = Spent(pairs=measured.pairs)
    for name, part in measured.parts.items():
        table.add_row(name, f"{part.wall:,.1f}", f"{part.cpu:,.1f}")
        ours.wall += part.wall
        ours.cpu += part.cpu
    rows = {"ours": ours}
    for name, loop in measured.loops.items():
        factor = measured.pairs / loop.pairs
        label = f"{arguments.together} {name}" if name == BATCH else name
        rows[f"{label} ({loop.pairs} pairs timed)"] = Spent(
            loop.wall * factor, loop.cpu * factor, measured.pairs
        )
    for name, spent in rows.items():
        table.add_row(
            name,
            f"{spent.wall:,.0f}",
            f"{spent.cpu:,.0f}",
            f"{1000 * spent.cpu / spent.pairs:.2f}",
            f"{spent.wall / ours.wall:.1f}",
            f"{spent.cpu / ours.cpu:.1f}",
        )
    console = Console(width=160)
    console.print(table)
    console.print(
        f"peak memory of ours {measured.peak_gib:.2f} GiB above model and pictures (cache_mb {arguments.cache_mb}); "
        f"log-odds of the timed pairs differ by {measured.difference:.1e} at most"
    )


if __name__ == "__main__":
    main()
