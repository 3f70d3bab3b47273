"""The configuration of GLSCL: sizes, masking ratios and the presets ``tiny`` and ``base``."""

from __future__ import annotations

import difflib
import math
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

#: Answers of the usual VQAv2 vocabulary.
VQA_ANSWERS = 3129

#: Names of the pre-training objectives, in the order in which they are reported.
OBJECTIVES: tuple[str, ...] = ("itc", "itm", "mlm", "mgsc", "mltc")


class ModelConfigurationError(ValueError):
    """A configuration that describes no model; the message names the field and what would be right."""


class GLSCLConfig(PreTrainedConfig):
    r"""Everything that decides the shapes and the masking of a GLSCL model.

    The defaults are the paper's (RoBERTa-base, CLIP ViT-B/16 with 11 blocks, six fusion layers).

    Args:
        image_size: side of a training image in pixels, a multiple of ``patch_size``. Other sizes are accepted
            at
            run time: the position embedding is then interpolated (bicubic).
        max_frames: most frames a video may have (rows of the temporal embedding).
        hidden_size, num_attention_heads, intermediate_size: of all three encoders.
        vision_layers, text_layers, fusion_layers: blocks of each encoder.
        max_text_length: longest token sequence, ``<s>`` and ``</s>`` included.
        projection_size: width of the ITC embeddings.
        hidden_dropout, attention_dropout: of the text and the fusion encoder (CLIP's vision encoder has
            none).
        temperature_init: first value of the learnable ITC temperature.
        completion_temperature: fixed temperature of MGSC and MLTC.
        mlm_ratio, completion_ratio: share of words masked for MLM, of tokens for semantic completion.
        removal_ratio, replacement_ratio: share of patches removed (MGSC) and replaced (MLTC).
        mltc_on_video: compute MLTC for videos too. The paper's does it for images only; a batch of videos
            then has an MLTC term of zero.
        hard_negatives: draw the wrong images of ITM by ITC similarity among the sample's group (beyond the
            paper, which draws them at random); needs the ITC objective.
        reference_gather: compute contrastive gradients as the released code does, for comparison: features of
            other workers get no gradient from this worker's loss, and MLTC of vision finds its negatives in
            the whole local batch. Gradients then depend on the number of workers.
        id2label, num_labels: the answers of the VQA head, or how many there are; without either VQAv2's 3129.
    """

    model_type = "glscl"

    image_size: int = 288
    patch_size: int = 16
    max_frames: int = 8
    vocab_size: int = 50265
    max_text_length: int = 50
    max_position_embeddings: int = 514
    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    vision_layers: int = 11
    text_layers: int = 12
    fusion_layers: int = 6
    projection_size: int = 512
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_eps: float = 1e-5
    fusion_layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    temperature_init: float = 0.07
    completion_temperature: float = 0.03
    mlm_ratio: float = 0.15
    completion_ratio: float = 0.4
    removal_ratio: float = 0.8
    replacement_ratio: float = 0.3
    mltc_on_video: bool = False
    hard_negatives: bool = False
    reference_gather: bool = False
    bos_token_id: int = 0
    pad_token_id: int = 1
    eos_token_id: int = 2
    unk_token_id: int = 3
    mask_token_id: int = 50264
    image_mean: tuple[float, ...] | list[float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] | list[float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name, kind in GLSCLConfig.__annotations__.items():
            setattr(self, name, _CHECKED.get(kind, _three_numbers)(name, getattr(self, name)))
        self._check()

    def _check(self) -> None:
        for name in _SIZES:
            if not 1 <= getattr(self, name) <= _LARGEST_SIZE:
                raise ModelConfigurationError(
                    f"model.{name} is {getattr(self, name)}: it must be a whole number above 0 "
                    f"and at most {_LARGEST_SIZE}"
                )
        if self.image_size % self.patch_size:
            raise ModelConfigurationError(
                f"model.image_size {self.image_size} is not a multiple of model.patch_size {self.patch_size}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ModelConfigurationError(
                f"model.hidden_size {self.hidden_size} is not a multiple of "
                f"model.num_attention_heads {self.num_attention_heads}"
            )
        for name in ("mlm_ratio", "completion_ratio", "removal_ratio", "replacement_ratio"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise ModelConfigurationError(f"model.{name} is {value!r}: it must lie between 0 and 1")
        for name in ("hidden_dropout", "attention_dropout"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ModelConfigurationError(f"model.{name} is {value!r}: it must be at least 0 and below 1")
        for name in _POSITIVE:
            value = getattr(self, name)
            if not all(one > 0 for one in (value if isinstance(value, list) else [value])):
                raise ModelConfigurationError(f"model.{name} is {value!r}: it must be above 0")
        for name in ("bos_token_id", "pad_token_id", "eos_token_id", "unk_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ModelConfigurationError(
                    f"model.{name} {getattr(self, name)} lies outside the vocabulary of {self.vocab_size}"
                )
        if self.max_position_embeddings < self.max_text_length + self.pad_token_id + 1:
            raise ModelConfigurationError(
                f"model.max_position_embeddings {self.max_position_embeddings} is too small for "
                f"model.max_text_length {self.max_text_length} (positions begin at pad_token_id + 1)"
            )
        if not 3 < self.mask_token_id < self.vocab_size:
            raise ModelConfigurationError(
                f"model.mask_token_id {self.mask_token_id} lies outside the vocabulary of {self.vocab_size}"
            )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GLSCLConfig:
        """The configuration called ``name`` (``tiny`` or ``base``), with single fields replaced.

        ``tiny`` trains on two CPU cores; its vocabulary is the shipped one cut to the first merges, because
        at width 192 two tables of 50265 rows would be four fifths of the model. A ``vocab_size`` given
        without a ``mask_token_id`` puts ``<mask>`` on the last row, where RoBERTa has it.

        Raises:
            ModelConfigurationError: unknown preset or field.
        """
        if name not in _PRESETS:
            raise ModelConfigurationError(
                f"model preset {name!r} is unknown: choose one of {sorted(_PRESETS)}"
            )
        known = {field.name for field in fields(cls)}
        for key in overrides:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f", did you mean {near[0]!r}?" if near else ""
                raise ModelConfigurationError(f"model.{key} is not a field of the model configuration{hint}")
        values = {**_PRESETS[name], **overrides}
        if "vocab_size" in overrides and "mask_token_id" not in overrides:
            values["mask_token_id"] = _whole("vocab_size", values["vocab_size"]) - 1
        return cls(**values)

    @classmethod
    def own_fields(cls) -> tuple[str, ...]:
        """The fields that describe GLSCL: those above, without what transformers gives every configuration."""
        return tuple(GLSCLConfig.__annotations__)

    @property
    def num_labels(self) -> int:
        """Answers of the VQA head (NLVR2 always has two): those of ``id2label``, else ``VQA_ANSWERS``."""
        return VQA_ANSWERS if self.id2label is None else len(self.id2label)

    @num_labels.setter
    def num_labels(self, value: int) -> None:
        if not isinstance(value, int) or value < 1:
            raise ModelConfigurationError(f"model.num_labels is {value!r}: it must be a whole number above 0")
        if value != self.num_labels:
            self.id2label = {number: f"LABEL_{number}" for number in range(value)}
            self.label2id = {label: number for number, label in self.id2label.items()}

    def to_diff_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds; answers are written whenever there are any, transformers' default two too."""
        values = super().to_diff_dict()
        for name in ("id2label", "label2id"):
            values.pop(name, None)
            if (labels := getattr(self, name)) is not None:
                values[name] = dict(labels)
        return values

    @property
    def num_patches(self) -> int:
        """Patches of one frame at ``image_size``."""
        return (self.image_size // self.patch_size) ** 2


#: No width, count or side is larger: sizes of tensors stay far from what 64 bits can hold.
_LARGEST_SIZE = 2**20

_SIZES = (
    *("image_size", "patch_size", "max_frames", "vocab_size", "max_text_length", "max_position_embeddings"),
    *("hidden_size", "num_attention_heads", "intermediate_size"),
    *("vision_layers", "text_layers", "fusion_layers", "projection_size"),
)
_POSITIVE = (
    *("layer_norm_eps", "fusion_layer_norm_eps", "initializer_range"),
    *("temperature_init", "completion_temperature", "image_std"),
)


def _refuse(name: str, value: Any, what: str) -> ModelConfigurationError:
    shown = repr(value)
    return ModelConfigurationError(
        f"model.{name} is {shown if len(shown) <= 60 else shown[:57] + '...'}: it must be {what}"
    )


def _whole(name: str, value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 1e3
    if isinstance(value, bool) or not isinstance(value, int):
        raise _refuse(name, value, "a whole number, without quotes and separators")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refuse(name, value, "a number, without quotes (0.00001 or 1e-05)")
    if not math.isfinite(value):
        raise _refuse(name, value, "a finite number")
    return float(value)


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refuse(name, value, "true or false, without quotes")
    return value


def _three_numbers(name: str, value: Any) -> list[float]:
    """A list, not a tuple: JSON has no tuples, and a reloaded configuration equals the saved one."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise _refuse(name, value, "a list of three numbers, one for each colour")
    return [_number(name, one) for one in value]


_CHECKED = {"int": _whole, "float": _number, "bool": _switch}

_PRESETS: dict[str, dict[str, Any]] = {
    "base": {},
    "tiny": {
        "image_size": 64,
        "patch_size": 8,
        "vocab_size": 8192,
        "mask_token_id": 8191,
        "hidden_size": 192,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "vision_layers": 4,
        "text_layers": 3,
        "fusion_layers": 2,
        "projection_size": 128,
        "max_position_embeddings": 64,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # The paper's 0.02 belongs to width 768, most of it loaded; from scratch at this width signals fade with it.
        "initializer_range": 0.06,
    },
}
