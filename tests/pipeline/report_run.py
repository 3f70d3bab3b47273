"""A run's outcomes and examples as a report is given them: numbers made up by rule, pictures real (emoji)."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from model import WordMaps
from pipeline.alignment.picture import alignment_panels
from pipeline.evaluation.ledger import Outcome
from pipeline.evaluation.report.headlines import KINDS
from pipeline.evaluation.result import Example
from sharding.decoding import decode_image
from sharding.media import decode_video

CORPUS = Path(__file__).resolve().parents[2] / "pipeline/demo/corpus"
STEPS = (120, 240, 360, 440, 480)


def outcome(
    step: int,
    task: str,
    kind: str,
    metrics: Mapping[str, float] | None = None,
    *,
    facts: Mapping[str, float] | None = None,
    cause: str | None = None,
    width: float = 0.05,
) -> Outcome:
    """A finished evaluation: ``metrics`` with intervals ``width`` below and above; or failed for ``cause``."""
    metrics, facts = metrics or {}, facts or {}
    return Outcome(
        checkpoint={
            "path": f"checkpoints/step-{step:08d}",
            "digest": hashlib.sha256(str(step).encode()).hexdigest(),
            "step": step,
            "stage": int(step > 360) + int(step > 440),
        },
        task=task,
        version="1-0123abcd",
        dataset={"name": f"{task}-held-out", "digest": hashlib.sha256(task.encode()).hexdigest()},
        started=1_760_000_000.0 + step,
        finished=1_760_000_042.0 + step,
        attempt=3 if cause else 1,
        kind=kind,
        metrics={} if cause else {**metrics, **facts},
        intervals={name: (max(0.0, value - width), value + width * 1.25) for name, value in metrics.items()},
        cause=cause,
    )


def retrieval(step: int, task: str, recall: float, candidates: int, width: float) -> Outcome:
    """All recalls follow from ``recall``, that at 10 of captions asking for pictures."""
    metrics = {}
    for way, factor in (("t2i", 1.0), ("i2t", 0.93)):
        for name, share in (("", 1.0), ("_rerank", 1.07)):
            value = recall * factor * share
            metrics |= {
                f"{way}{name}_R1": value / 3,
                f"{way}{name}_R5": value * 0.7,
                f"{way}{name}_R10": value,
            }
            metrics[f"{way}{name}_median_rank"] = round(1 + candidates * (1 - value) / 4)
    facts = {
        **{f"{way}_chance_R{k}": min(1.0, k / candidates) for way in ("t2i", "i2t") for k in (1, 5, 10)},
        "candidates_images": float(candidates),
        "candidates_texts": float(candidates),
        "skipped": 0.0,
    }
    return outcome(step, task, "retrieval", metrics, facts=facts, width=width)


def whole_run() -> list[Outcome]:
    """Tasks of every kind, and of one that no part of the report knows; two evaluations failed."""
    found = []
    for step in STEPS:
        grown = step / (step + 300)
        found += [
            retrieval(step, "images", 0.05 + 0.4 * grown, 250, 0.04),
            retrieval(step, "clips", 0.5 + 0.45 * grown, 30, 0.13),
            named(step, "emoji-classes", "classification", 0.1 + 0.5 * grown),
            named(step, "scenes-align", "alignment", 0.12 + 0.2 * grown),
            outcome(
                step, "words", "spelling", {"letters_right": 0.2 + 0.3 * grown, "words_right": 0.1 * grown}
            ),
        ]
        if step == STEPS[-1]:
            found.append(named(step, "scenes-vqa", "vqa", 0.45))
        cause = "image-missing: <img src=x> of test1-12-0 is not in the folder s3://bucket/nlvr2/images"
        failed = step in STEPS[1:3]
        found.append(
            outcome(step, "scenes-nlvr2", "nlvr2", cause=cause)
            if failed
            else named(step, "scenes-nlvr2", "nlvr2", 0.47 + 0.2 * grown)
        )
    return found


def named(step: int, task: str, kind: str, value: float) -> Outcome:
    """The headlines of ``kind``, each a little above the one before, and baselines at a quarter of the first."""
    metrics = {
        headline.metric: value * (1 + 0.15 * place) for place, headline in enumerate(KINDS[kind].headlines)
    }
    facts = {headline.baseline: value / 4 for headline in KINDS[kind].headlines if headline.baseline}
    facts |= {name: 100.0 for name, _ in KINDS[kind].counts}
    return outcome(step, task, kind, metrics, facts=facts)


def emoji(number: int) -> tuple[np.ndarray, str]:
    """A picture of the demo's corpus, uint8 [H, W, 3], and its caption."""
    rows = (CORPUS / "images.jsonl").read_text().splitlines()
    row = json.loads(rows[number * 37 % len(rows)])
    return decode_image((CORPUS / row["path"]).read_bytes()), row["caption"]


def clip() -> np.ndarray:
    """Four frames of a clip, uint8 [4, H, W, 3]."""
    return decode_video(sorted((CORPUS / "clips").glob("*.mp4"))[0].read_bytes(), 4)


def jpeg(pixels: np.ndarray, side: int = 112) -> bytes:
    """Small."""
    target = io.BytesIO()
    picture = Image.fromarray(pixels)
    picture.thumbnail((side * 8, side))
    picture.save(target, "JPEG", quality=85)
    return target.getvalue()


def examples(outcome: Outcome) -> Sequence[Example]:
    """What a task of the kind would have to show."""
    if outcome.kind == "retrieval":
        queries = [_query(number, right=number % 2 == 0) for number in range(4)]
        return [*queries, _maps(clip() if outcome.task == "clips" else emoji(3)[0][None])]
    if outcome.kind in ("vqa", "nlvr2", "classification"):
        count = 2 if outcome.kind == "nlvr2" else 1
        return [_answer(number, outcome.kind, count) for number in range(5)]
    return []


def _query(number: int, *, right: bool) -> Example:
    found = [emoji(number * 5 + place) for place in range(5)]
    place = 0 if right else 3
    captions = [f"{1 + n}.  {0.83 - 0.07 * n:.2f}{'  ✓ true' if n == place else ''}" for n in range(5)]
    pictures = [(jpeg(pixels), note) for (pixels, _), note in zip(found, captions, strict=True)]
    lines = [("rank", str(1 + place)), ("ITM", f"{2.31 - place:.2f}")]
    return Example(f"“{found[place][1]}”", right, pictures, lines)


def _answer(number: int, kind: str, count: int) -> Example:
    shown = [emoji(number * 3 + n + 1) for n in range(count)]
    asked = {"vqa": "How many balloons are there?", "nlvr2": "There are two red things in the left image."}
    lines = [("answer", "two (0.93)"), ("true", "two" if number % 2 else "three, 3")]
    pictures = [(jpeg(pixels), caption) for pixels, caption in shown]
    return Example(asked.get(kind, shown[0][1]), bool(number % 2), pictures, lines)


def _maps(frames: np.ndarray) -> Example:
    words = ("a", "happy", "face", "with", "a", "large", "red", "hat")
    torch.manual_seed(5)
    shape = (4, 4) if len(frames) == 1 else (len(frames), 4, 4)
    maps = WordMaps(
        words, tuple((0, 1) for _ in words), torch.rand(len(words), *shape), torch.rand(shape), ""
    )
    drawn = [
        (jpeg(np.concatenate([np.asarray(f) for f in p.frames], axis=1), 96), p.word)
        for p in alignment_panels(frames, maps, 96)
    ]
    return Example("“a happy face with a large red hat”", None, drawn, [("layer", "last fusion layer")])
