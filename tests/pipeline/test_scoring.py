"""Promises of the ITC scorer: the model's own similarity, of the best caption, by weights that name the dataset."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from model import GLSCLConfig, GLSCLForPreTraining, GLSCLProcessor
from pipeline.config import parse_job
from pipeline.export.folder import export
from pipeline.export.source import open_model
from pipeline.scoring import ITC, find_scorer, scorers_of
from sharding.config import PrepareConfig
from sharding.errors import UserError
from sharding.filters.config import ScoreFilter
from sharding.index import read_index
from sharding.media import decode_image, decode_video
from sharding.media.config import VideoConfig
from sharding.media.transcode import transcode_video
from sharding.prepare import prepare
from sharding.scoring import ScoredSample
from sharding.storage import open_storage
from tests.fixtures.jobs import MODEL, tiny_job
from tests.pipeline.trained_run import make_trained_run

CLIPS = Path(__file__).parents[2] / "pipeline/demo/corpus/clips"


def _save_model(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = GLSCLConfig.preset(MODEL["preset"], **MODEL["overrides"])
    GLSCLForPreTraining(config).save_pretrained(folder)
    GLSCLProcessor.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return _save_model(tmp_path_factory.mktemp("model"), seed=1)


def _png(seed: int) -> bytes:
    sink = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), np.uint8)
    Image.fromarray(pixels).resize((48, 40), Image.Resampling.NEAREST).save(sink, "PNG")
    return sink.getvalue()


def _block(model: Path | str, **values) -> ScoreFilter:
    return ScoreFilter(kind="score", model=str(model), **values)


def test_a_score_is_the_cosine_of_the_best_caption(model):
    samples = [
        ScoredSample(_png(1), "png", ["a red square", "something else"]),
        ScoredSample(_png(2), "png", ["blue"]),
        ScoredSample(_png(3), "png", ["a", "much longer caption about a green thing", "b"]),
    ]
    scores = find_scorer(str(model))(_block(model)).score(samples)
    whole, processor = open_model(str(model), heads=True)
    with torch.inference_mode():
        for sample, score in zip(samples, scores, strict=True):
            inputs = processor(images=Image.fromarray(decode_image(sample.media)), text=sample.captions)
            image = whole.get_image_features(inputs["pixel_values"])
            texts = whole.get_text_features(inputs["input_ids"], inputs["attention_mask"])
            assert score == pytest.approx((texts @ image[0]).max().item(), abs=1e-5)


def test_a_score_does_not_depend_on_what_else_is_in_the_batch(model):
    scorer = find_scorer(str(model))(_block(model))
    samples = [ScoredSample(_png(n), "png", [f"caption {n} " * (n + 1)]) for n in range(9)]
    alone = [scorer.score([sample])[0] for sample in samples]
    assert scorer.score(samples) == pytest.approx(alone, abs=1e-5)


def test_a_clip_is_scored_by_its_frames(model):
    clip = transcode_video(next(CLIPS.glob("*.mp4")).read_bytes(), VideoConfig(resize=40)).data
    score = find_scorer(str(model), frames=2)(_block(model, frames=2)).score(
        [ScoredSample(clip, "mp4", ["a moving thing"])]
    )[0]
    whole, processor = open_model(str(model), heads=True)
    with torch.inference_mode():
        inputs = processor(videos=decode_video(clip, 2), text=["a moving thing"])
        clips = whole.get_video_features(inputs["pixel_values"])
        texts = whole.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    assert score == pytest.approx((texts @ clips[0]).item(), abs=1e-5)


def test_weights_name_the_scorer_wherever_they_lie(model, tmp_path):
    other = _save_model(tmp_path / "other", seed=2)
    copy = _save_model(tmp_path / "copy", seed=1)
    weights = find_scorer(str(model)).weights
    assert find_scorer(str(copy)).weights == weights
    assert find_scorer(str(other)).weights != weights


def test_a_checkpoint_scores_as_its_export_does_and_a_run_is_pinned_to_its_newest(tmp_path):
    trained = make_trained_run(tmp_path, model=MODEL)
    for step in (4, 8):
        trained.checkpoint(step, tmp_path / "scratch")
    by_run = find_scorer(trained.run.url)
    assert by_run.address == trained.run.url_of("checkpoints/step-00000008")
    assert find_scorer(trained.run.url_of("checkpoints/step-00000004")).weights != by_run.weights
    export(by_run.address, tmp_path / "exported", Console(quiet=True))
    exported = find_scorer(str(tmp_path / "exported"))
    assert exported.weights == by_run.weights
    samples = [ScoredSample(_png(1), "png", ["x"])]
    block = _block("/nowhere")
    assert by_run(block).score(samples) == exported(block).score(samples)
    trained.checkpoint(12, tmp_path / "scratch")
    assert by_run(block).score(samples) == exported(block).score(samples)


def test_weights_that_change_under_a_job_stop_it(tmp_path):
    folder = _save_model(tmp_path / "model", seed=1)
    factory = find_scorer(str(folder))
    _save_model(folder, seed=2)
    with pytest.raises(UserError, match="changed: its weights"):
        factory(_block(folder))


def test_mistakes_end_in_one_line(model, tmp_path):
    with pytest.raises(UserError, match="is no run"):
        find_scorer(str(tmp_path))
    with pytest.raises(UserError, match=r"frames: got 17; .* takes \d+ at most"):
        find_scorer(str(model), frames=17)
    tree = tiny_job("/data/raw", tmp_path / "storage")
    tree["datasets"]["emoji"]["filters"] = [{"kind": "score", "min": 0.1}]
    with pytest.raises(UserError, match=r"datasets\.emoji, filter score: give model"):
        parse_job(tree, "job.yaml")


@pytest.mark.slow
def test_a_dataset_is_filtered_by_score_and_records_it(model, tmp_path, ray_session):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02d}.png").write_bytes(_png(number))
        (folder / f"{number:02d}.txt").write_text(f"caption {number}\nanother {number}\n")

    def config(**limits) -> PrepareConfig:
        block = {"kind": "score", "model": str(model), "batch": 4} | limits
        values = {
            "source": {"kind": "folder", "path": str(folder)},
            "modality": "image",
            "image": {"format": "png"},
            "filters": [block],
            "samples_per_shard": 5,
        }
        return PrepareConfig.model_validate(values)

    storage = open_storage(tmp_path / "out")

    def make(dataset: PrepareConfig):
        return prepare("pairs", dataset, storage, in_flight=1, scorers=scorers_of(dataset))

    def rows(prepared) -> dict[str, float]:
        tables = [
            read_index(storage.at(prepared.path).read_bytes(one.index)) for one in prepared.manifest.shards
        ]
        return {row["source"]: row["score"] for table in tables for row in table.to_pylist()}

    everything = make(config())
    scores = rows(everything)
    assert everything.manifest.counts.kept == 12
    recorded = everything.manifest.configuration["filters"][0]
    assert (recorded["model"], recorded["weights"]) == (None, find_scorer(str(model)).weights)
    scorer = find_scorer(str(model))(_block(model))
    expected = {
        f"{n:02d}.png": scorer.score([ScoredSample(_png(n), "png", [f"caption {n}", f"another {n}"])])[0]
        for n in range(12)
    }
    assert scores == pytest.approx(expected, abs=2e-4)
    middle = float(np.median(list(scores.values())))
    better = make(config(min=middle))
    assert better.path != everything.path
    assert rows(better) == {name: score for name, score in scores.items() if score >= middle}
    assert better.manifest.counts.dropped == {"score-too-low": 12 - better.manifest.counts.kept}


def test_the_scorer_is_asked_for_where_the_filter_is(model):
    values = {"source": {"kind": "folder", "path": "/x"}, "modality": "image"}
    assert scorers_of(PrepareConfig.model_validate(values)) == {}
    values["filters"] = [{"kind": "score", "model": str(model)}]
    assert list(scorers_of(PrepareConfig.model_validate(values))) == [ITC]
