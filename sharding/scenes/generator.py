"""Scenes by number: everything is a pure function of the rules, the objects and the number."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from sharding.media.config import VideoConfig
from sharding.scenes.captions import Caption, captions
from sharding.scenes.config import SceneRules
from sharding.scenes.layout import LONGEST, Layout, place_clip, place_picture
from sharding.scenes.objects import Objects, open_objects
from sharding.scenes.plans import Plan, Planner
from sharding.scenes.questions import Question, questions
from sharding.scenes.scene import Scene
from sharding.scenes.statements import draft
from sharding.storage import Storage

# Nothing of a scene is lost that a training shard would show.
_CLIP = VideoConfig(crf=18)


@dataclass(frozen=True)
class Statement:
    """A sentence and two (left, right) pairs of images; ``labels``: true of one pair, false of the other."""

    number: int
    text: str
    pairs: tuple[tuple[Scene, Scene], tuple[Scene, Scene]]
    labels: tuple[bool, bool]


class Scenes:
    """All scenes of one split.

    Args:
        objects: opened with ``side`` of at least ``largest_side(rules)``.

    Raises:
        UserError: the objects are too few for the split.
    """

    def __init__(self, rules: SceneRules, objects: Objects) -> None:
        self.rules, self.objects = rules, objects
        self._planner = Planner(rules, objects)
        self.vocabulary = self._planner.vocabulary

    def scene(self, number: int) -> Scene:
        """The image of this number."""
        return self._pictured(number, self._planner.picture(number), "layout", number)

    def clip(self, number: int) -> Scene:
        """The clip of this number."""
        plan, rules = self._planner.clip(number), self.rules
        rng = self._planner.rng("clip-layout", number)
        layout = place_clip(plan, self.objects, rules.width, rules.height, rules.frames, rng)
        return self._scene(number, plan, layout)

    def portrait(self, kind: int, number: int) -> Scene:
        """An image of one object of this kind, for classification; the number counts the kind's images."""
        plan = self._planner.single(kind, self._planner.rng("portrait", kind, number), alone=True)
        return self._pictured(number, plan, "portrait-layout", kind, number)

    def statement(self, number: int) -> Statement:
        """The statement of this number, with a pair of which it is true and one of which it is false."""
        drafted = draft(self._planner, number)
        first_true = bool(self._planner.rng("label", number).random() < 0.5)
        pairs = []
        for place, plans in enumerate((drafted.true, drafted.false)):
            left, right = (
                self._pictured(number, plan, "pair-layout", number, place, side)
                for side, plan in enumerate(plans)
            )
            assert drafted.holds(left, right) == (place == 0), drafted.text
            pairs.append((left, right))
        ordered = (pairs[0], pairs[1]) if first_true else (pairs[1], pairs[0])
        return Statement(number, drafted.text, ordered, (first_true, not first_true))

    def captions(self, scene: Scene) -> list[Caption]:
        """Sentences about a scene or clip of this split; the first says all there is to say."""
        return captions(scene, self._planner.rng("captions", scene.frames, scene.number))

    def questions(self, scene: Scene) -> list[Question]:
        """All questions about a scene or clip of this split, in shuffled order."""
        rng = self._planner.rng("questions", scene.frames, scene.number)
        return questions(scene, self.vocabulary, rng)

    def annotations(self, scene: Scene, question: Question, dissent: float) -> list[str]:
        """What ten people answer; see ``Question.annotations``."""
        rng = self._planner.rng("annotators", scene.frames, scene.number, question.text)
        return question.annotations(dissent, rng)

    def _pictured(self, number: int, plan: Plan, purpose: str, *keys: int) -> Scene:
        rng = self._planner.rng(purpose, *keys)
        layout = place_picture(plan, self.objects, self.rules.width, self.rules.height, rng)
        return self._scene(number, plan, layout)

    def _scene(self, number: int, plan: Plan, layout: Layout) -> Scene:
        kinds = tuple(self.objects.kinds[group.kind] for group in plan.groups)
        return Scene(number, plan, layout, kinds)


def largest_side(rules: SceneRules) -> int:
    """Pixels along the longer side of the largest object that a scene can show."""
    return round(LONGEST * min(rules.width, rules.height)) + 1


def open_scenes(rules: SceneRules, objects: str, storage: Storage) -> Scenes:
    """The scenes of the table of objects at a url; ``storage`` lends its S3 options.

    Raises:
        UserError: see ``open_objects`` and ``Scenes``.
    """
    return Scenes(rules, open_objects(objects, storage, largest_side(rules)))


def encode_clip(scene: Scene, fps: float) -> bytes:
    """The clip as H.264 in mp4, by the encoder of the shards."""
    from sharding.media.transcode import encode_h264

    frames = (scene.image(frame) for frame in range(scene.frames))
    return encode_h264(frames, Fraction(fps).limit_denominator(1001), _CLIP).data


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG of uint8 [H, W, 3]."""
    import io

    from PIL import Image

    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG", compress_level=3)
    return sink.getvalue()
