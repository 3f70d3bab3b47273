"""The model card: README.md of an exported folder, in the form that the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from pipeline.evaluation.ledger import Outcome
from pipeline.export.facts import Data, Facts, Stage

_DIRECTIONS = (("t2i", "caption → picture", "images"), ("i2t", "picture → caption", "texts"))

_IMPORT = """\
The classes are those of the GLSCL pipeline's package `model`; importing one, or `model.auto`, also
makes `AutoModel` and `AutoProcessor` know them. In this folder:

```python
from PIL import Image
from transformers import AutoProcessor

from model import {architecture}

glscl = {architecture}.from_pretrained(".")
processor = AutoProcessor.from_pretrained(".")

"""

_CAPTIONS = """\
inputs = processor(images=Image.open("photo.jpg"), text=["a red balloon", "two dogs in the snow"])
texts = glscl.get_text_features(inputs["input_ids"], inputs["attention_mask"])
image = glscl.get_image_features(inputs["pixel_values"])
print((image @ texts.T / glscl.temperature()).softmax(dim=-1))  # which caption is it?
```

`get_video_features` embeds clips (`processor(videos=...)`, up to {max_frames} frames), `glscl.match` judges single
pairs.
"""

_USE = {
    "GLSCLForPreTraining": _CAPTIONS
    + """\
`GLSCLModel.from_pretrained(".")` is the backbone alone. `glscl align PHOTO "CAPTION" --model .` draws which
regions the words of a caption attend to.
""",
    "GLSCLForVisualQuestionAnswering": """\
inputs = processor(images=Image.open("photo.jpg"), text="what colour is the balloon?")
logits = glscl(**inputs).logits  # one for each of {answers:,} answers
print(glscl.config.id2label[int(logits.argmax())])
```
""",
    "GLSCLForNLVR2": """\
left_and_right = [Image.open("left.jpg"), Image.open("right.jpg")]
inputs = processor(videos=[left_and_right], text="both pictures show a balloon")
print(glscl(**inputs).logits.softmax(dim=-1)[0, 1])  # how likely is it true of the two?
```
""",
    "GLSCLForImageTextRetrieval": _CAPTIONS,
}

#: Of a recipe, what decides the weights.
_RECIPE = (
    *("learning_rate", "fusion_multiplier", "head_multiplier", "weight_decay", "global_batch", "resolution"),
    *("dataset", "negatives", "itc_weight", "precision"),
)


def model_card(facts: Facts) -> str:
    """The card as Markdown with YAML in front."""
    step = facts.checkpoint.step
    sections = [
        f"---\n{_front_matter(facts)}---",
        f"# {facts.run}, step {step}{_for_a_task(facts)}",
        _introduction(facts),
        "## Use",
        _use(facts),
        "## Evaluation",
        _evaluation(facts.outcomes),
        "## Data",
        _data(facts.data),
        *(() if facts.fine_tuned is None else ("## Fine-tuning", _fine_tuning(facts.fine_tuned))),
        "## Training" if facts.fine_tuned is None else "## Pre-training",
        _training(facts),
        "## Provenance",
        _provenance(facts),
        "## Licence",
        _licence(facts),
    ]
    return "\n\n".join(sections) + "\n"


def _for_a_task(facts: Facts) -> str:
    return "" if facts.fine_tuned is None else f", fine-tuned for {facts.fine_tuned['task']}"


def _use(facts: Facts) -> str:
    config = facts.config
    text = _IMPORT.format(architecture=facts.architecture) + _USE[facts.architecture].format(
        max_frames=config.max_frames, answers=config.num_labels
    )
    return text.rstrip()


def _fine_tuning(record: Mapping[str, Any]) -> str:
    recipe = record["recipe"]
    items = {"task": f"`{record['task']}`, version {record['task_version']}", "steps": f"{record['steps']:,}"}
    items |= {name.replace("_", " "): f"{recipe[name]}" for name in _RECIPE if recipe.get(name) is not None}
    items |= {"augmentation": _augmentation(recipe["augmentation"]), "seed": str(record["seed"])}
    items |= {"data": f"digest `{record['data'][:16]}`"}
    return "Of the pre-trained checkpoint named below.\n\n" + _list(items)


def _front_matter(facts: Facts) -> str:
    content: dict[str, Any] = {"library_name": "glscl-pipeline"}
    if facts.license is not None:
        content["license"] = facts.license
    content["tags"] = [
        "glscl",
        "vision-language",
        "image-text-retrieval",
        *_video_tag(facts),
        "arxiv:2306.07096",
    ]
    results = [result for outcome in facts.outcomes if (result := _result(outcome)) is not None]
    if results:
        content["model-index"] = [{"name": facts.run, "results": results}]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _video_tag(facts: Facts) -> list[str]:
    clips = any(data.training and data.manifest and data.manifest.modality == "video" for data in facts.data)
    return ["video-text-retrieval"] if clips else []


def _result(outcome: Outcome) -> dict[str, Any] | None:
    """As the hub lists results; None for an evaluation that failed."""
    metrics = [
        {"type": name, "name": name, "value": value}
        for name, value in outcome.metrics.items()
        if not name.startswith(("candidates_", "skipped"))
    ]
    if not metrics:
        return None
    kind = "retrieval" if _is_retrieval(outcome) else outcome.task
    dataset = outcome.dataset["name"]
    return {
        "task": {"type": kind, "name": outcome.task},
        "dataset": {"type": dataset, "name": dataset, "revision": outcome.dataset["digest"]},
        "metrics": metrics,
    }


def _is_retrieval(outcome: Outcome) -> bool:
    return "t2i_R10" in outcome.metrics


def _introduction(facts: Facts) -> str:
    config = facts.config
    seen = [data.manifest.modality for data in facts.data if data.training and data.manifest]
    media = [name for kind, name in (("image", "images"), ("video", "clips")) if kind in seen]
    what = " and ".join(media) or "images or clips"
    return (
        f"GLSCL (Global and Local Semantic Completion Learning, [arXiv 2306.07096](https://arxiv.org/abs/2306.07096)) "
        f"pre-trained on captioned {what}: {config.vision_layers} vision, {config.text_layers} text and "
        f"{config.fusion_layers} fusion layers of width {config.hidden_size}, {facts.parameters / 1e6:.1f} million "
        f"parameters in fp32, pictures of {config.image_size} x {config.image_size} pixels in patches of "
        f"{config.patch_size}, texts of up to {config.max_text_length} tokens."
    )


def _evaluation(outcomes: Sequence[Outcome]) -> str:
    if not outcomes:
        return "This checkpoint has not been evaluated."
    parts = []
    retrieval = [one for one in outcomes if _is_retrieval(one)]
    if retrieval:
        head = ["task", "data", "asked by", "R@1", "R@5", "R@10", "chance R@10", "median rank"]
        head += ["re-ranked R@1", "R@5", "R@10", "candidates"]
        rows = [_retrieval_row(one, *way) for one in retrieval for way in _DIRECTIONS]
        parts.append(
            "Zero-shot retrieval on pairs of the data named below. Ranks are by the cosine of the embeddings, "
            "re-ranked: the first of them once more by the matching head. Chance is what random ranks give.\n\n"
            + _table(head, rows, right=range(3, len(head)))
        )
    for one in outcomes:
        if one.metrics and not _is_retrieval(one):
            rows = [[name, f"{value:.4f}"] for name, value in one.metrics.items()]
            parts.append(
                f"`{one.task}` on `{one.dataset['name']}`:\n\n" + _table(["metric", "value"], rows, right=[1])
            )
    skipped = {one.task: int(one.metrics.get("skipped", 0)) for one in outcomes}
    parts += [f"`{task}`: {count} unreadable samples left out." for task, count in skipped.items() if count]
    parts += [f"The evaluation `{one.task}` failed." for one in outcomes if one.cause is not None]
    return "\n\n".join(parts)


def _retrieval_row(outcome: Outcome, way: str, asked_by: str, candidates: str) -> list[str]:
    metrics = outcome.metrics

    def share(name: str) -> str:
        value = metrics.get(f"{way}_{name}")
        return "–" if value is None else f"{100 * value:.1f} %"

    rank, count = metrics.get(f"{way}_median_rank"), metrics.get(f"candidates_{candidates}")
    return [
        f"`{outcome.task}`",
        f"`{outcome.dataset['name']}`",
        asked_by,
        *(share(name) for name in ("R1", "R5", "R10", "chance_R10")),
        "–" if rank is None else f"{rank:g}",
        *(share(f"rerank_{name}") for name in ("R1", "R5", "R10")),
        "–" if count is None else f"{count:.0f}",
    ]


def _data(data: Sequence[Data]) -> str:
    head = ["dataset", "for", "medium", "source", "read", "kept", "dropped", "digest"]
    rows = []
    for one in data:
        uses = [name for name in ("training", "evaluation") if getattr(one, name)]
        row = [f"`{one.name}`", " and ".join(uses)]
        if one.manifest is None:
            row += ["not recorded: the dataset is gone", *["–"] * 4]
        else:
            counts = one.manifest.counts
            dropped = ", ".join(f"{cause} {number:,}" for cause, number in counts.dropped.items() if number)
            kind = one.manifest.configuration.get("source", {}).get("kind", "–")
            row += [one.manifest.modality, kind, f"{counts.read:,}", f"{counts.kept:,}", dropped or "none"]
        rows.append([*row, f"`{one.digest[:16]}`"])
    return _table(head, rows, right=[4, 5])


def _training(facts: Facts) -> str:
    head = [
        "stage",
        "steps",
        "mixture",
        "objectives (weight)",
        "side, pixels",
        "frames of a clip",
        "global batch",
    ]
    rows = [
        [
            f"`{stage.name}`",
            f"{stage.done}" if stage.done == stage.steps else f"{stage.done} of {stage.steps}",
            _shares(stage.mixture),
            ", ".join(f"{name} {weight:g}" for name, weight in stage.objectives.items()),
            str(stage.resolution),
            str(stage.frames),
            str(stage.global_batch),
        ]
        for stage in facts.stages
    ]
    train = facts.train
    batches = list(dict.fromkeys(str(stage.accumulation) for stage in facts.stages))
    items = {
        "optimizer": f"AdamW, betas {train['betas'][0]:g} and {train['betas'][1]:g}, eps {train['eps']:g}, "
        f"weight decay {train['weight_decay']:g}, gradients {_clipping(train['clipping'])}",
        "learning rate": f"{train['learning_rate']:g} for the encoders, x {train['fusion_multiplier']:g} for fusion, "
        f"x {train['head_multiplier']:g} for the heads; {_schedule(train['schedule'], facts.shared_steps)}"
        f"{''.join(map(_own_rate, facts.stages))}",
        "precision": f"{facts.precision}; DeepSpeed ZeRO stage {facts.zero_stage} on {facts.workers} workers, "
        f"{' or '.join(batches)} contrastive batches a step",
        "augmentation": "; ".join(
            f"`{stage.name}`: {_augmentation(stage.augmentation)}" for stage in facts.stages
        ),
        "seed": str(facts.seed),
        "begun with": ", ".join(f"`{name}`" for name in facts.begun_with) or "weights drawn at random",
    }
    bad = {cause: count for cause, count in facts.checkpoint.record.get("bad_samples", {}).items() if count}
    if bad:
        items["unreadable samples"] = ", ".join(f"{cause} {count:,}" for cause, count in bad.items())
    return _table(head, rows, right=[1, 4, 5, 6]) + "\n\n" + _list(items)


def _schedule(schedule: dict[str, Any], steps: int) -> str:
    decay = "constant" if schedule["decay"] == "constant" else f"{schedule['decay']} decay"
    return f"warm-up over {100 * schedule['warmup']:g} % of {steps} steps, then {decay}"


def _own_rate(stage: Stage) -> str:
    """What a stage has of its own, of peak and schedule; empty: it goes by those of the run."""
    own = [] if stage.learning_rate is None else [f"{stage.learning_rate:g} for the encoders"]
    own += [] if stage.schedule is None else [_schedule(stage.schedule, stage.steps)]
    return f"; `{stage.name}`: {', '.join(own)}" if own else ""


def _clipping(limit: float | None) -> str:
    return "not clipped" if limit is None else f"clipped to norm {limit:g}"


def _shares(mixture: Mapping[str, float]) -> str:
    total = sum(mixture.values())
    return ", ".join(f"`{name}` {100 * weight / total:.3g} %" for name, weight in mixture.items())


def _augmentation(values: Mapping[str, Any]) -> str:
    parts = []
    if values["crop"] < 1:
        parts.append(f"random crops of at least {100 * values['crop']:g} %")
    if values["flip"] > 0:
        parts.append(f"mirrored with probability {values['flip']:g}")
    if values["rand_augment"]:
        parts.append("RandAugment")
    return ", ".join(parts) or "none (resize and centre crop)"


def _provenance(facts: Facts) -> str:
    checkpoint = facts.checkpoint
    items = {
        "checkpoint": f"step {checkpoint.step} of {facts.steps}, digest `{checkpoint.digest}`",
        **{f"`{name}`": f"sha256 `{digest}`" for name, digest in facts.weights.items()},
        "code": "; then ".join(_code(start) for start in facts.code) or "not recorded",
    }
    return _list(items)


def _code(environment: Mapping[str, str]) -> str:
    commit = environment.get("mlflow.source.git.commit")
    changed = " with changes that are not committed" if environment.get("git.modified") == "true" else ""
    versions = {
        name.removeprefix("version."): version
        for name, version in environment.items()
        if name.startswith("version.")
    }
    with_ = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{f'commit `{commit}`{changed}' if commit else 'no commit recorded'} ({with_})"


def _licence(facts: Facts) -> str:
    if facts.license is not None:
        return f"`{facts.license}`, as stated by whoever exported this folder."
    return (
        "None is stated. What may be done with these weights depends on the data they were trained on and on the "
        "weights the training began with; name it as `license:` at the top of this file before the folder is published."
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    numbers = set(right)
    rule = ["---:" if column in numbers else "---" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def _list(items: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in items.items())
