"""A fine-tuning's step: which losses and accuracies are told, and dropout that a restart repeats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cluster.workers import WorkerContext
from model import GLSCLForImageTextRetrieval, GLSCLForNLVR2, GLSCLForVisualQuestionAnswering
from pipeline.fine_tuning import learner
from pipeline.fine_tuning.examples import FineTuningBatch
from pipeline.fine_tuning.learner import FineTuner, FineTuningSubject, Material, model_class, open_training
from pipeline.training.learner import Losses, Part
from pipeline.training.loading import Slot
from tests.pipeline.fine_tuning.material import NAMES, make_run, vqa_task

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Engine:
    """Stands for DeepSpeed's: the model itself, and what was gone back from."""

    def __init__(self, model: Any) -> None:
        self.model, self.losses = model, []

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.model(*inputs, **options)

    def backward(self, loss: torch.Tensor) -> None:
        self.losses.append(loss)
        loss.backward()


@pytest.fixture
def tuner(tmp_path: Path) -> FineTuner:
    run = make_run(tmp_path)
    task = vqa_task(run.storage, workers=1)
    material = Material(run.storage, {}, run.run.at("fine-tuning/test"))
    subject = FineTuningSubject(
        task, task.fine_tune.course(48), 3, material, run.run, run.checkpoint, "builtin"
    )
    return FineTuner(
        subject, open_training(task, material), WorkerContext(0, 1, 0, 1, 0, CPU), tmp_path / "scratch"
    )


def batch_of(scores: list[float], valid: list[bool]) -> FineTuningBatch:
    """Four questions of which answer 1 is as right as ``scores`` say, and no other is."""
    labels = torch.zeros(4, len(NAMES))
    labels[:, 1] = torch.tensor(scores)
    return FineTuningBatch(
        valid=torch.tensor(valid),
        keys=["a", "b", "c", "d"],
        slots=[Slot("train", 0, row, 0) for row in range(4)],
        causes=[None] * 4,
        input_ids=torch.tensor([[0, 20, 21, 2]] * 4),
        attention_mask=torch.ones(4, 4, dtype=torch.long),
        pixel_values=torch.zeros(4, 1, 3, 24, 24, dtype=torch.uint8),
        labels=labels,
    )


def always_answers(model: GLSCLForVisualQuestionAnswering, answer: int) -> None:
    with torch.no_grad():
        model.vqa_classifier[3].weight.zero_()
        model.vqa_classifier[3].bias.fill_(-1.0)
        model.vqa_classifier[3].bias[answer] = 1.0


def test_the_loss_is_that_of_the_valid_samples_and_the_accuracy_their_score(tuner: FineTuner) -> None:
    model = tuner.build_model()
    assert isinstance(model, GLSCLForVisualQuestionAnswering)
    assert model.training
    assert model.config.image_size == 24
    assert [model.config.id2label[number] for number in range(4)] == sorted(NAMES)
    always_answers(model, 1)
    engine = Engine(model)
    batch = batch_of([1.0, 0.5, 0.25, 1.0], [True, True, True, False])
    found: Losses = tuner.forward_backward(
        engine, tuner._subject.course.stages[0], batch, Part(step=4, number=0)
    )
    logits = torch.tensor([-1.0, 1.0, -1.0, -1.0]).expand(3, 4)
    assert batch.labels is not None
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels[:3], reduction="none")
    assert float(found.losses["vqa"]) == pytest.approx(float(wanted.sum(dim=1).mean()), rel=1e-5)
    assert float(found.metrics["accuracy"]) == pytest.approx((1.0 + 0.5 + 0.25) / 3)
    assert float(engine.losses[0].detach()) == pytest.approx(float(found.losses["vqa"]))
    assert model.vqa_classifier[3].weight.grad is not None


def test_a_loss_that_is_not_finite_is_handed_on_as_it_is_for_the_whole_step_to_be_judged(
    tuner: FineTuner,
) -> None:
    model = tuner.build_model()
    with torch.no_grad():
        model.vqa_classifier[3].bias.fill_(float("nan"))
    engine = Engine(model)
    found = tuner.forward_backward(
        engine, tuner._subject.course.stages[0], batch_of([1.0] * 4, [True] * 4), Part(4, 0)
    )
    assert not torch.isfinite(found.losses["vqa"])
    assert len(engine.losses) == 1


def test_dropout_is_a_function_of_seed_step_and_part(tuner: FineTuner) -> None:
    model = tuner.build_model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    stage, batch = tuner._subject.course.stages[0], batch_of([1.0] * 4, [True] * 4)

    def loss(part: Part) -> float:
        torch.rand(7)  # whatever was drawn before
        return float(tuner.forward_backward(Engine(model), stage, batch, part).losses["vqa"])

    assert loss(Part(4, 0)) == loss(Part(4, 0))
    assert len({loss(Part(4, 0)), loss(Part(5, 0)), loss(Part(4, 1))}) == 3


def test_the_new_head_is_the_same_on_every_worker(tuner: FineTuner) -> None:
    torch.manual_seed(1)
    first = tuner.build_model().state_dict()
    torch.manual_seed(2)
    for name, tensor in tuner.build_model().state_dict().items():
        assert torch.equal(tensor, first[name]), name


def test_a_new_answer_head_begins_with_how_often_answers_are_right_and_a_trained_one_as_it_is(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path)
    run.storage.write_json("answers.json", ["fist", "lamp", "heart"])
    task = vqa_task(run.storage).model_copy(update={"answer2id": "answers.json"})
    training = open_training(task, Material(run.storage, {}, run.run.at("fine-tuning/test")))
    model = training.load_model(tmp_path / "model")
    assert isinstance(model, GLSCLForVisualQuestionAnswering)
    bias = model.vqa_classifier[3].bias
    # 24 questions have an answer of these three: half of them each of two, none the lamp.
    torch.testing.assert_close(bias.detach().sigmoid(), torch.tensor([12.5, 0.5, 12.5]) / 25)
    with torch.no_grad():
        bias.fill_(7.0)
    model.save_pretrained(tmp_path / "trained")
    again = training.load_model(tmp_path / "trained")
    assert isinstance(again, GLSCLForVisualQuestionAnswering)
    assert again.vqa_classifier[3].bias.tolist() == [7.0] * 3


@pytest.mark.parametrize("processes", [0, 1])
def test_it_imports_ahead_what_its_loader_processes_need_and_lets_others_go_first(
    processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    task = vqa_task(run.storage, workers=1, loader_processes=processes)
    subject = FineTuningSubject(
        task,
        task.fine_tune.course(48),
        3,
        Material(run.storage, {}, run.run.at("fine-tuning/test")),
        run.run,
        run.checkpoint,
        "builtin",
    )
    ahead: set[str] = set()
    steps: list[int] = []
    monkeypatch.setattr(learner, "import_ahead", lambda *modules: ahead.update(modules))
    monkeypatch.setattr(learner.os, "nice", lambda more: steps.append(more) or sum(steps))  # not this process
    tuner = subject.learner(WorkerContext(0, 1, 0, 1, 0, CPU), tmp_path / "scratch")
    assert sum(steps) > 0
    tuner.build_model()
    loader = tuner.loader(subject.course.stages[0], 0)
    assert ahead == (
        {type(loader.dataset).__module__, type(loader.collate_fn).__module__} if processes else set()
    )


def test_each_kind_has_its_own_model() -> None:
    found = {kind: model_class(kind) for kind in ("vqa", "nlvr2", "retrieval")}
    assert found == {
        "vqa": GLSCLForVisualQuestionAnswering,
        "nlvr2": GLSCLForNLVR2,
        "retrieval": GLSCLForImageTextRetrieval,
    }
