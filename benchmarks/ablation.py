"""The paper's claim in miniature: does semantic completion help, at equal data, steps and seeds?

    python -m benchmarks.ablation --seeds 3 --steps 400 --jobs 2
    python -m benchmarks.ablation --data emoji --batch 96 --seeds 3 --jobs 2

Three ways to pre-train the same small GLSCL: ITC + ITM + MLM; with MGSC too; with MGSC and MLTC. On made-up scenes
(``docs/scenes.md``) each is measured on scenes of held-out pairs of objects: zero-shot retrieval, VQA after
fine-tuning, and the alignment of words with regions (ALIGN-BENCH's scores), by the same code that evaluates
checkpoints. On the demo's emoji, few pictures seen often, it is retrieval of the held-out ones alone.

A run is a process of one thread; what a run found is kept in ``--out``, so that the command goes on where it was
stopped. Steps are equal, not time: completion makes a step dearer (the table says by how much).

Differences are paired: the same item (a caption, a question, an image) under the same seed; their 95 % intervals
draw items and seeds (both with replacement), since three seeds are a sample too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torchvision.transforms.v2 import functional as F

from cluster.config import ClusterConfig
from cluster.session import session
from model import (
    GLSCLConfig,
    GLSCLForPreTraining,
    GLSCLForVisualQuestionAnswering,
    GLSCLProcessor,
    draw_masks,
)
from pipeline.evaluation.result import Family, TaskResult
from pipeline.evaluation.tasks.alignment import task as alignment
from pipeline.evaluation.tasks.alignment.config import AlignmentTask
from pipeline.evaluation.tasks.base import TaskContext
from pipeline.evaluation.tasks.pictures import ImageAddress, ImageReader
from pipeline.evaluation.tasks.retrieval import task as retrieval
from pipeline.evaluation.tasks.retrieval.config import RetrievalTask
from pipeline.evaluation.tasks.vqa import task as vqa
from pipeline.evaluation.tasks.vqa.answers import frequent_answers, soft_scores
from pipeline.evaluation.tasks.vqa.config import VQATask
from pipeline.evaluation.tasks.vqa.data import Question, VQAData, load_questions
from pipeline.fine_tuning.examples import ExampleTable
from pipeline.fine_tuning.vqa import question_examples
from pipeline.scenes.command import BUNDLED, write_scenes
from pipeline.scenes.request import Request
from sharding.decoding import decode_image
from sharding.manifest import load_manifest
from sharding.prepare import PrepareConfig, prepare
from sharding.reader import ShardReader
from sharding.scenes.config import SceneRules
from sharding.scenes.generator import Scenes, largest_side
from sharding.scenes.objects import open_objects
from sharding.seeds import derive_seed, generator
from sharding.storage import Storage, open_storage

EMOJI = BUNDLED.with_name("images.jsonl")  # of the demo
BASE = {"itc": 0.5, "itm": 1.0, "mlm": 1.0}  # the paper's weights
#: What is compared: the objectives of completion that each way adds.
WAYS: dict[str, tuple[str, ...]] = {"itc+itm+mlm": (), "+ mgsc": ("mgsc",), "+ mgsc + mltc": ("mgsc", "mltc")}
#: Metrics of the table, by the data that they are measured on.
METRICS = {
    "scenes": ("t2i_R1", "i2t_R1", "t2i_rerank_R1", "accuracy", "global_pixel", "local_pixel"),
    "emoji": ("t2i_R1", "i2t_R1", "t2i_R10", "i2t_R10", "t2i_rerank_R1"),
}
_DATASET = "dataset.txt"  # in the folder of the data: where the held-out pairs lie, as shards


@dataclass(frozen=True)
class Setting:
    """Everything that all runs have in common. What changes a number is here."""

    data: str = "scenes"  # or "emoji"
    steps: int = 400
    completion_from: int = 0  # the step from which completion is learnt: before it, all ways are the first
    mgsc: float = 1.0  # weights, the paper's
    mltc: float = 0.2
    completion_ratio: float = 0.4  # of the tokens masked for completion
    removal_ratio: float = 0.8  # of the patches removed for MGSC
    batch: int = 64
    learning_rate: float = 1.5e-3
    side: int = 64
    patch: int = 16
    width: int = 96
    layers: int = 2
    vocabulary: int = 16
    train: int = 3000
    held_out: int = 300
    vqa_images: int = 1000
    vqa_steps: int = 150
    vqa_batch: int = 64

    @property
    def rules(self) -> SceneRules:
        """Of the scenes; the split is set by whoever uses them."""
        return SceneRules(
            width=self.side, height=self.side, vocabulary=self.vocabulary, most_kinds=2, most_alike=3
        )

    @property
    def config(self) -> GLSCLConfig:
        """Of the model."""
        return GLSCLConfig.preset(
            "tiny",
            image_size=self.side,
            patch_size=self.patch,
            hidden_size=self.width,
            num_attention_heads=self.width // 32,
            intermediate_size=4 * self.width,
            vision_layers=self.layers,
            text_layers=self.layers,
            fusion_layers=self.layers,
            projection_size=self.width,
            completion_ratio=self.completion_ratio,
            removal_ratio=self.removal_ratio,
        )

    def objectives(self, way: str, step: int) -> dict[str, float]:
        """What ``way`` learns at ``step``, by weight."""
        completing = WAYS[way] if step >= self.completion_from else ()
        return BASE | {name: {"mgsc": self.mgsc, "mltc": self.mltc}[name] for name in completing}

    @property
    def digest(self) -> str:
        """Names the folder of its runs."""
        text = json.dumps({"setting": asdict(self), "ways": WAYS}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each way")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--against",
        nargs="+",
        choices=list(WAYS)[1:],
        default=list(WAYS)[1:],
        help="ways that the first is compared with (default: all)",
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument(
        "--out", type=Path, default=Path("glscl-ablation"), help="folder for data and results"
    )
    for field in fields(Setting):
        choices = list(METRICS) if field.name == "data" else None
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            choices=choices,
        )
    parser.add_argument("--run", nargs=2, metavar=("WAY", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    setting = Setting(**{field.name: getattr(arguments, field.name) for field in fields(Setting)})
    folder = arguments.out / setting.digest
    if arguments.run is not None:
        torch.set_num_threads(1)
        _run(setting, folder, arguments.run[0], int(arguments.run[1]))
        return
    console = Console(width=None if sys.stdout.isatty() else 130)
    folder.mkdir(parents=True, exist_ok=True)
    make_data(setting, folder, console)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    wanted = [(way, seed) for seed in seeds for way in (next(iter(WAYS)), *arguments.against)]
    _run_all(wanted, folder, arguments.jobs, console)
    console.print(f"setting: {asdict(setting)}", highlight=False)
    records = {(way, seed): _read(folder, way, seed) for way, seed in wanted}
    console.print(table(records, seeds, METRICS[setting.data]))


# The data, the same for all runs.


def make_data(setting: Setting, folder: Path, console: Console) -> None:
    """What is evaluated on: retrieval as shards, the rest in official formats. What is there is kept."""
    storage = open_storage(folder / "data")
    source = _emoji_source() if setting.data == "emoji" else _scenes_source(setting, storage, console)
    if storage.exists(_DATASET):
        return
    config = PrepareConfig.model_validate(
        {"modality": "image", "source": source, "image": {"format": "keep"}}
    )
    with session(ClusterConfig(num_cpus=2), workers=0):
        prepared = prepare("held-out", config, storage, in_flight=2)
    storage.write_bytes(_DATASET, prepared.path.encode())


def _emoji_source() -> dict[str, Any]:
    return {
        "kind": "table",
        "path": str(EMOJI),
        "path_column": "path",
        "caption_column": "caption",
        "where": {"split": "held-out"},
    }


def _scenes_source(setting: Setting, storage: Storage, console: Console) -> dict[str, Any]:
    request = Request(
        objects=str(BUNDLED),
        splits={"train": setting.vqa_images, "test": setting.held_out},
        tasks=("retrieval", "vqa", "alignment"),
        rules=setting.rules,
    )
    write_scenes(storage, request, console)
    return {
        "kind": "karpathy",
        "path": storage.url_of("retrieval/dataset_scenes.json"),
        "images": storage.url_of("retrieval/images"),
        "split": "test",
    }


def _training_pairs(setting: Setting) -> tuple[torch.Tensor, list[list[str]]]:
    """uint8 [N, 1, 3, S, S] and the captions of each."""
    return _training_emoji(setting) if setting.data == "emoji" else _training_scenes(setting)


def _training_emoji(setting: Setting) -> tuple[torch.Tensor, list[list[str]]]:
    rows = [row for row in map(json.loads, EMOJI.read_text().splitlines()) if row["split"] == "train"]
    size = (setting.side, setting.side)
    pixels = torch.stack(
        [
            F.resize(
                torch.from_numpy(decode_image((EMOJI.parent / row["path"]).read_bytes())).permute(2, 0, 1),
                size,
            )
            for row in rows
        ]
    )
    return pixels[:, None], [row["captions"] for row in rows]


def _training_scenes(setting: Setting) -> tuple[torch.Tensor, list[list[str]]]:
    rules = setting.rules
    scenes = Scenes(rules, open_objects(str(BUNDLED), open_storage("."), largest_side(rules)))
    pixels = np.empty((setting.train, 1, 3, setting.side, setting.side), np.uint8)
    captions = []
    for number in range(setting.train):
        scene = scenes.scene(number)
        pixels[number, 0] = scene.image().transpose(2, 0, 1)
        captions.append([caption.text for caption in scenes.captions(scene)])
    return torch.from_numpy(pixels), captions


# One run: pre-train, evaluate, fine-tune on questions, evaluate.


def _run(setting: Setting, folder: Path, way: str, seed: int) -> None:
    began, cpu = time.monotonic(), time.process_time()
    model = GLSCLForPreTraining(_seeded(setting.config, seed))
    processor = GLSCLProcessor.from_config(model.config)
    _pre_train(model, processor, setting, way, seed)
    trained = time.process_time() - cpu
    storage = open_storage(folder / "data")
    families = [*_retrieval(model.eval(), processor, storage, seed)]
    if setting.data == "scenes":
        families += _alignment(model, processor, storage, seed)
        families += _questions(model, processor, storage, setting, seed, folder / f"model-{_name(way, seed)}")
    record = {
        "way": way,
        "seed": seed,
        "cpu_s": trained,
        "seconds": time.monotonic() - began,
        "metrics": {
            name: {"keys": family.keys, "values": one.values.tolist()}
            for family in families
            for name, one in family.metrics.items()
            if name in METRICS[setting.data]
        },
    }
    partial = folder / f"{_name(way, seed)}.partial"
    partial.write_text(json.dumps(record))
    os.replace(partial, folder / f"{_name(way, seed)}.json")


def _seeded(config: GLSCLConfig, seed: int) -> GLSCLConfig:
    torch.manual_seed(derive_seed(seed, "initialisation"))
    return config


def _pre_train(
    model: GLSCLForPreTraining,
    processor: GLSCLProcessor,
    setting: Setting,
    way: str,
    seed: int,
) -> None:
    """Every way sees the same scenes, captions and masks at the same step."""
    pixels, captions = _training_pairs(setting)
    patches = (setting.side // setting.patch) ** 2
    valid = torch.ones(setting.batch, dtype=torch.bool)
    optimizer = torch.optim.AdamW(
        model.parameter_groups(setting.learning_rate, 0.05, fusion_multiplier=1.0, head_multiplier=1.0),
        betas=(0.9, 0.98),
    )
    for step in _steps(optimizer, setting.steps):
        draws = generator(derive_seed(seed, "batch", step))
        chosen = draws.permutation(len(captions))[: setting.batch]
        text = processor.tokenize([captions[i][int(draws.integers(len(captions[i])))] for i in chosen])
        masks = draw_masks(
            model.config,
            text["input_ids"],
            text["attention_mask"],
            text["word_ids"],
            valid,
            [derive_seed(seed, "masks", step, place) for place in range(setting.batch)],
            setting.batch,
            patches,
        )
        torch.manual_seed(derive_seed(seed, "dropout", step))
        output = model(
            input_ids=text["input_ids"],
            attention_mask=text["attention_mask"],
            pixel_values=pixels[chosen],
            masks=masks,
            valid=valid,
            objectives=setting.objectives(way, step),
            group_size=setting.batch,
        )
        _update(model, optimizer, output.loss)


def _retrieval(
    model: GLSCLForPreTraining, processor: GLSCLProcessor, storage: Storage, seed: int
) -> Sequence[Family]:
    dataset = storage.at(storage.read_bytes(_DATASET).decode())
    reader = ShardReader(dataset, load_manifest(dataset))
    context = TaskContext(model, processor, storage, reader, seed)
    return retrieval.evaluate(
        context, RetrievalTask(name="retrieval", dataset="held-out", rerank=20)
    ).families


def _alignment(
    model: GLSCLForPreTraining, processor: GLSCLProcessor, storage: Storage, seed: int
) -> Sequence[Family]:
    context = TaskContext(model, processor, storage, None, seed)
    task = AlignmentTask(name="alignment", annotations="alignment/test.pkl", images="alignment/test/images")
    return alignment.evaluate(context, task).families


def _questions(
    pretrained: GLSCLForPreTraining,
    processor: GLSCLProcessor,
    storage: Storage,
    setting: Setting,
    seed: int,
    weights: Path,
) -> list[Family]:
    """Fine-tunes on the questions about other scenes, answers those about the held-out ones."""
    train = _vqa_data("train", "train2014")
    task = VQATask(name="vqa", data=_vqa_data("test", "test2015"), train=[train])
    questions = load_questions(storage, train)
    answers = frequent_answers(questions)
    pretrained.save_pretrained(weights)
    torch.manual_seed(derive_seed(seed, "vqa-initialisation"))
    model = GLSCLForVisualQuestionAnswering.from_pretrained(weights, id2label=dict(enumerate(answers)))
    table = ExampleTable(question_examples([questions], answers))
    model.begin_with_prior(torch.from_numpy(table.scores(len(answers))), len(table))
    _fine_tune(model.train(), processor, storage, setting, questions, answers, seed)
    result: TaskResult = vqa.evaluate_vqa(model.eval(), processor, storage, task, answers, seed)
    return result.families


def _vqa_data(split: str, subtype: str) -> VQAData:
    return VQAData(
        questions=f"vqa/v2_OpenEnded_mscoco_{subtype}_questions.json",
        annotations=f"vqa/v2_mscoco_{subtype}_annotations.json",
        images=f"vqa/{subtype}",
    )


def _fine_tune(
    model: GLSCLForVisualQuestionAnswering,
    processor: GLSCLProcessor,
    storage: Storage,
    setting: Setting,
    questions: Sequence[Question],
    answers: Sequence[str],
    seed: int,
) -> None:
    numbers = {answer: number for number, answer in enumerate(answers)}
    reader, pictures = ImageReader(storage), dict[ImageAddress, torch.Tensor]()

    def picture(question: Question) -> torch.Tensor:
        if question.image not in pictures:
            pictures[question.image] = processor.video(reader.pixels(question.image)[None])
        return pictures[question.image]

    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate / 2, weight_decay=0.05)
    for step in _steps(optimizer, setting.vqa_steps):
        draws = generator(derive_seed(seed, "vqa-batch", step))
        batch = [questions[i] for i in draws.integers(len(questions), size=setting.vqa_batch)]
        text = processor.tokenize([question.question for question in batch])
        labels = torch.zeros(len(batch), len(answers))
        for row, question in enumerate(batch):
            for answer, score in soft_scores(question.answers or ()).items():
                if answer in numbers:
                    labels[row, numbers[answer]] = score
        torch.manual_seed(derive_seed(seed, "vqa-dropout", step))
        output = model(
            input_ids=text["input_ids"],
            attention_mask=text["attention_mask"],
            pixel_values=torch.stack([picture(question) for question in batch]),
            labels=labels,
        )
        _update(model, optimizer, output.loss)


def _steps(optimizer: torch.optim.Optimizer, steps: int) -> Iterator[int]:
    """Step numbers, with linear warm-up over a tenth and linear decay."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        scale = min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps), 1.0)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * scale
        yield step


def _update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


# All runs, and what they say together.


def _name(way: str, seed: int) -> str:
    return f"{list(WAYS).index(way)}-seed{seed}"


def _run_all(wanted: Sequence[tuple[str, int]], folder: Path, jobs: int, console: Console) -> None:
    missing = [(way, seed) for way, seed in wanted if not (folder / f"{_name(way, seed)}.json").exists()]
    running: list[tuple[subprocess.Popen[bytes], str, int]] = []
    command = [sys.executable, "-m", "benchmarks.ablation", *sys.argv[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        while missing or running:
            while missing and len(running) < jobs:
                way, seed = missing.pop(0)
                with (folder / f"{_name(way, seed)}.log").open("wb") as log:
                    process = subprocess.Popen(
                        [*command, "--run", way, str(seed)], env=environment, stdout=log, stderr=log
                    )
                running.append((process, way, seed))
            time.sleep(1.0)
            for process, way, seed in [one for one in running if one[0].poll() is not None]:
                running = [one for one in running if one[0] is not process]
                if process.returncode:
                    log_file = folder / f"{_name(way, seed)}.log"
                    raise RuntimeError(f"{way}, seed {seed} failed; see {log_file}")
                record = _read(folder, way, seed)
                console.print(f"{way}, seed {seed}: {record['seconds']:.0f} s", highlight=False)
    finally:
        for process, *_ in running:
            process.kill()


def _read(folder: Path, way: str, seed: int) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / f"{_name(way, seed)}.json").read_text())
    return record


def table(
    records: dict[tuple[str, int], dict[str, Any]], seeds: Sequence[int], metrics: Sequence[str]
) -> Table:
    """A row a metric: the mean of each way over its seeds, and its paired difference from the first way."""
    first, *others = dict.fromkeys(way for way, _ in records)
    shown = Table("metric", "items", first, title=f"{len(seeds)} seeds, held-out data", title_justify="left")
    for way in others:
        shown.add_column(way)
        shown.add_column("difference [95 %]")
    for metric in metrics:
        values = {
            way: np.array([records[way, seed]["metrics"][metric]["values"] for seed in seeds])
            for way in (first, *others)
        }
        cells = [metric, str(values[first].shape[1]), f"{100 * values[first].mean():.1f}"]
        for way in others:
            low, high = interval(values[way] - values[first])
            change = 100 * (values[way] - values[first]).mean()
            cells += [
                f"{100 * values[way].mean():.1f}",
                f"{change:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]",
            ]
        shown.add_row(*cells)
    cost = {way: np.mean([records[way, seed]["cpu_s"] for seed in seeds]) for way in (first, *others)}
    cells = ["CPU s of pre-training", "", f"{cost[first]:.0f}"]
    for way in others:
        cells += [f"{cost[way]:.0f}", f"x {cost[way] / cost[first]:.2f}"]
    shown.add_row(*cells)
    return shown


def interval(differences: np.ndarray, resamples: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean of ``differences`` [seeds, items], drawing seeds and items."""
    random = generator(derive_seed(0, "ablation"))
    seeds, items = differences.shape
    means = np.empty(resamples)
    for number in range(resamples):
        rows = random.integers(seeds, size=seeds)
        columns = random.integers(items, size=items)
        means[number] = differences[rows].mean(axis=0)[columns].mean()
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


if __name__ == "__main__":
    main()
