"""GLSCL with its pre-training heads: one forward computes every objective asked for, on shared passes.

Each distinct input is encoded once (vision: complete, 80 % removed, 30 % replaced; text: complete, masked for
MLM, 40 % masked) and fused in at most five passes: matching, MLM, (a) removed vision with complete text, (b)
complete vision with masked text, (c) replaced vision with complete text. What no objective asked for is not
computed.

Shape legend: B samples, T text tokens, F frames, P patches of a frame, D width, E projection width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function
from transformers.models.roberta.modeling_roberta import RobertaLayer
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from model.configuration import OBJECTIVES, GLSCLConfig
from model.contrast import ContrastiveFeatures, contrastive_terms
from model.fusion import CrossAttention, FusionPass, SelfAttention
from model.gather import sum_over_workers, world_size
from model.glscl import valid_tokens
from model.heads import MaskedLanguageHead
from model.masking import PretrainingMasks, hard_partners
from model.matching import GLSCLMatchingModel
from model.objectives import (
    GlobalCounts,
    exchange_counts,
    group_info_nce,
    in_full_precision,
    masked_language_loss,
    matching_loss,
    mean_over_all,
)
from model.vision import VisionBlock


@dataclass
class GLSCLPreTrainingOutput(ModelOutput):
    """A step's result.

    Args:
        loss: scalar to call ``backward`` on. With several workers its mean over them is the weighted sum of
            ``losses``, and the mean of the gradients is the gradient of that.
        losses: per objective the detached value over all workers, unweighted.
        metrics: detached values over all workers: ``temperature``, ``itm_accuracy``, ``mlm_accuracy``.
        partial: of a call for one :class:`StepPart`, instead of ``losses`` and ``metrics``.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    metrics: dict[str, Tensor] | None = None
    partial: PartialStep | None = None


@dataclass(frozen=True)
class StepPart:
    """What a forward over one part of a worker's batch has to know, see :mod:`model.cached`.

    Args:
        counts: of the whole step, all workers and all parts.
        gradients: of the weighted contrastive losses by this part's features; None: compute the features.
    """

    counts: GlobalCounts
    gradients: ContrastiveFeatures | None


@dataclass(frozen=True)
class PartialStep:
    """What one part gives to the step: its features, or (detached, of this worker) terms and right answers."""

    features: ContrastiveFeatures | None = None
    terms: dict[str, Tensor] | None = None
    right: dict[str, Tensor] | None = None


class GLSCLForPreTraining(GLSCLMatchingModel):
    """The five objectives ITC, ITM, MLM, MGSC and MLTC on one backbone."""

    def __init__(self, config: GLSCLConfig) -> None:
        super().__init__(config)
        self.language_head = MaskedLanguageHead(config)
        self.post_init()

    def compile_blocks(self) -> None:
        """``torch.compile`` every block of the three encoders (not the whole: its control flow follows the batch).

        Parameter names stay. Blocks of one kind share their compiled code; sizes that change (text length) are
        compiled as dynamic ones after the second.
        """
        kinds = (VisionBlock, RobertaLayer, SelfAttention, CrossAttention)
        for module in self.modules():
            if isinstance(module, kinds):
                module.compile()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        masks: PretrainingMasks,
        valid: Tensor,
        objectives: Mapping[str, float],
        group_size: int,
        part: StepPart | None = None,
    ) -> GLSCLPreTrainingOutput:
        """Compute the objectives named in ``objectives`` (name -> weight) and their weighted sum.

        Args:
            input_ids, attention_mask: [B, T].
            pixel_values: [B, F, 3, height, width], uint8 or float in 0..1.
            masks: from :func:`model.masking.draw_masks`, on the device of the inputs.
            valid: [B] bool; the other samples enter no loss and serve as no negative.
            objectives: weights, keys from ``OBJECTIVES``.
            group_size: consecutive samples among which MLTC of vision finds its negatives and ITM, with
                ``config.hard_negatives``, its wrong images.
            part: this is one of several parts of the worker's batch; :mod:`model.cached` passes it.

        Every worker must bring batches of the same B, F and resolution; T may differ.

        Raises:
            ValueError: unknown objective, none at all, or a batch that does not divide into groups.
        """
        unknown = sorted(set(objectives) - set(OBJECTIVES))
        if unknown or not objectives:
            raise ValueError(f"objectives {unknown or '(none)'}: choose from {', '.join(OBJECTIVES)}")
        if len(input_ids) % group_size:
            raise ValueError(f"a batch of {len(input_ids)} does not divide into groups of {group_size}")
        if self.config.hard_negatives and "itm" in objectives and "itc" not in objectives:
            raise ValueError("hard negatives of ITM are drawn by ITC similarity: they need the objective itc")
        wanted = set(objectives)
        chosen = select_tokens(self.config, masks, valid, pixel_values.shape[1], wanted)
        counts = part.counts if part is not None else exchange_counts(valid, *chosen.numbers())
        step = _Step(self, valid_tokens(attention_mask), masks, valid, wanted, chosen, counts, group_size)
        step.encode(input_ids, pixel_values)
        step.fuse()
        features = step.features()
        if part is not None and part.gradients is None:
            return GLSCLPreTrainingOutput(partial=PartialStep(features=features.detached()))
        terms = step.local_terms()
        if part is not None:
            assert part.gradients is not None
            loss = weighted_sum(objectives, terms, step.zero) + features.dot(part.gradients)
            detached = {name: term.detach() for name, term in terms.items()}
            return GLSCLPreTrainingOutput(loss=loss, partial=PartialStep(terms=detached, right=step.right))
        terms = added(terms, contrastive_terms(self.config, features, valid, counts))
        losses, metrics = report(objectives, terms, step.right, counts, features.temperature)
        return GLSCLPreTrainingOutput(
            loss=weighted_sum(objectives, terms, step.zero), losses=losses, metrics=metrics
        )


@dataclass(frozen=True)
class ChosenTokens:
    """The masked text tokens of this worker that enter a loss.

    Args:
        labels: [B, T] int64, token to be predicted by MLM, -100 elsewhere.
        positions: [B, T] bool, tokens to be completed by MLTC.
        local: whether MLTC is computed at all.
    """

    labels: Tensor
    positions: Tensor
    local: bool

    def numbers(self) -> tuple[Tensor, Tensor]:
        """How many tokens MLM predicts and MLTC completes."""
        return (self.labels >= 0).sum(), self.positions.sum()


def select_tokens(
    config: GLSCLConfig, masks: PretrainingMasks, valid: Tensor, frames: int, wanted: Collection[str]
) -> ChosenTokens:
    """Of the masked tokens those of valid samples, for the objectives that are wanted."""
    # The paper completes local tokens of images only.
    local = "mltc" in wanted and (frames == 1 or config.mltc_on_video)
    labels = masks.mlm_labels.masked_fill(~valid[:, None], -100)
    positions = masks.completion_positions & valid[:, None]
    return ChosenTokens(
        labels if "mlm" in wanted else torch.full_like(labels, -100),
        positions if local else torch.zeros_like(positions),
        local,
    )


def added(terms: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Terms by objective, summed where both have one (MLTC's halves)."""
    total = dict(terms)
    for name, term in more.items():
        total[name] = total[name] + term if name in total else term
    return total


def weighted_sum(objectives: Mapping[str, float], terms: Mapping[str, Tensor], zero: Tensor) -> Tensor:
    """The scalar that is minimised."""
    return sum((objectives[name] * term for name, term in terms.items()), start=zero)


def report(
    objectives: Mapping[str, float],
    terms: Mapping[str, Tensor],
    right: Mapping[str, Tensor],
    counts: GlobalCounts,
    temperature: Tensor | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and metrics over all workers, in one reduction."""
    counted = {"itm": counts.samples, "mlm": counts.mlm_tokens}
    names = [name for name in OBJECTIVES if name in objectives]
    values = [in_full_precision(terms[name]) for name in names]
    accuracies = [mean_over_all(number.to(values[0].dtype), counted[name]) for name, number in right.items()]
    means = sum_over_workers(torch.stack([*values, *accuracies])) / world_size()
    losses = dict(zip(names, means[: len(names)], strict=True))
    metrics = {f"{name}_accuracy": mean for name, mean in zip(right, means[len(names) :], strict=True)}
    if temperature is not None:
        metrics["temperature"] = temperature.detach()[0]
    return losses, metrics


class _Step:
    """One forward: which inputs are needed, their states, the rows read after fusion, the terms."""

    def __init__(
        self,
        model: GLSCLForPreTraining,
        mask: Tensor,
        masks: PretrainingMasks,
        valid: Tensor,
        wanted: set[str],
        chosen: ChosenTokens,
        counts: GlobalCounts,
        group_size: int,
    ) -> None:
        self.model, self.mask, self.masks, self.valid = model, mask, masks, valid
        self.wanted, self.counts = wanted, counts
        self.labels, self.positions, self.local = chosen.labels, chosen.positions, chosen.local
        self.completing = self.local or "mgsc" in wanted
        self.partner_group = group_size
        # The released code compares the patches of the whole local batch.
        self.patch_group = len(valid) if model.config.reference_gather else group_size
        self.texts: dict[str, Tensor] = {}
        self.visions: dict[str, Tensor] = {}
        self.fused: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self.right: dict[str, Tensor] = {}

    def encode(self, input_ids: Tensor, pixel_values: Tensor) -> None:
        """Every distinct input once: texts in one batch, complete and replaced vision in one batch."""
        backbone, masks = self.model.glscl, self.masks
        self.frames = pixel_values.shape[1]
        texts = {"complete": input_ids}
        if "mlm" in self.wanted:
            texts["mlm"] = masks.mlm_input_ids
        if self.completing:
            texts["masked"] = masks.completion_input_ids
        encoded = backbone.text_encoder(torch.cat(list(texts.values())), self.mask.repeat(len(texts), 1))
        states = backbone.text_transform(encoded)
        text_classes = states[: len(input_ids), :1]
        with_type = states + backbone.token_type(0, states.device)
        self.texts = dict(zip(texts, with_type.chunk(len(texts)), strict=True))

        kept = masks.kept_patches if self.completing else None
        replaced = masks.replaced_patches if self.local else None
        complete, removed, swapped = backbone.vision_encoder(pixel_values, kept, replaced)
        complete = backbone.vision_transform(complete)
        vision_classes = complete[:, : self.frames]
        if "itc" in self.wanted:
            self.text = self.model.text_projection(text_classes)
            self.vision = self.model.vision_projection(vision_classes)
            self.temperature = self.model.temperature()
        vision_type = backbone.token_type(1, states.device)
        self.visions["complete"] = complete + vision_type
        if removed is not None:
            self.visions["removed"] = backbone.vision_transform(removed) + vision_type
        if swapped is not None:
            self.visions["replaced"] = backbone.vision_transform(swapped) + vision_type
        self.zero = states.new_zeros((), dtype=torch.promote_types(states.dtype, torch.float32))

    def fuse(self) -> None:
        """The fused passes that the wanted objectives read, each for the rows they read."""
        wanted, batch, device = self.wanted, len(self.valid), self.valid.device
        first = torch.zeros(batch, 1, dtype=torch.long, device=device)
        classes = torch.arange(self.frames, device=device).expand(batch, -1)
        # (text, vision, partner, text rows, vision rows) by name of the pass
        plan: dict[str, tuple[str, str, Tensor | None, Tensor | None, Tensor | None]] = {}
        if "itm" in wanted:
            plan["itm"] = ("complete", "complete", self._partner(), first, classes)
        if "mlm" in wanted:
            rows, self.mlm_real = _padded_rows(self.labels >= 0)
            self.mlm_rows = rows
            plan["mlm"] = ("mlm", "complete", None, rows, None)
        if self.completing:
            rows = first
            if self.local:
                text_rows, self.text_real = _padded_rows(self.positions)
                rows = torch.cat([first, text_rows], dim=1)
                patches = self._replaced_rows()
            mgsc = "mgsc" in wanted
            plan["a"] = ("complete", "removed", None, rows, classes if mgsc else None)
            both = torch.cat([classes, patches], dim=1) if self.local else classes
            plan["b"] = ("masked", "complete", None, rows, both)
            if self.local:
                plan["c"] = ("complete", "replaced", None, None, patches)
        if not plan:
            return
        texts = [name for name in self.texts if any(entry[0] == name for entry in plan.values())]
        visions = [name for name in self.visions if any(entry[1] == name for entry in plan.values())]
        passes = [FusionPass(texts.index(t), visions.index(v), *rest) for t, v, *rest in plan.values()]
        results = self.model.glscl.fusion(
            [self.texts[name] for name in texts], self.mask, [self.visions[name] for name in visions], passes
        )
        self.fused = dict(zip(plan, results, strict=True))

    def _replaced_rows(self) -> Tensor:
        """Vision rows of the replaced patches, frame by frame [B, F * M]."""
        replaced = self.masks.replaced_patches
        patches = (self.visions["complete"].shape[1] - self.frames) // self.frames
        offsets = self.frames + torch.arange(self.frames, device=replaced.device) * patches
        return (replaced[:, None] + offsets[:, None]).flatten(1)

    def _partner(self) -> Tensor:
        """[B] whose image each text meets in ITM."""
        if not self.model.config.hard_negatives:
            return self.masks.itm_partner
        text, vision = (F.normalize(in_full_precision(x.detach()), dim=-1) for x in (self.text, self.vision))
        similarity = text @ vision.T / self.temperature.detach()
        return hard_partners(similarity, self.masks, self.valid, self.partner_group)

    def features(self) -> ContrastiveFeatures:
        """What is compared with all workers, in full precision."""
        found: dict[str, Tensor] = {}
        if "itc" in self.wanted:
            found |= {"text": self.text[:, None], "vision": self.vision[:, None]}
            found["temperature"] = self.temperature
        if self.completing:
            (text_a, vision_a), (text_b, vision_b) = self.fused["a"], self.fused["b"]
            assert text_a is not None
            assert text_b is not None
            assert vision_b is not None
            if "mgsc" in self.wanted:
                assert vision_a is not None
                found |= {"global_text": text_b[:, :1], "global_vision": vision_a}
                found["global_text_target"] = text_a[:, :1].detach()
                found["global_vision_target"] = vision_b[:, : self.frames].detach()
            if self.local:
                found["local_text"] = text_b[:, 1:][self.text_real]
                found["local_text_target"] = text_a[:, 1:][self.text_real].detach()
        return ContrastiveFeatures(**{name: in_full_precision(value) for name, value in found.items()})

    def local_terms(self) -> dict[str, Tensor]:
        """The scaled terms that compare with no other worker; MLTC's is that of vision."""
        terms: dict[str, Tensor] = {}
        if "itm" in self.wanted:
            with record_function("objective itm"):
                text, vision = self.fused["itm"]
                logits = self.model.matching_head(self.model.glscl.pool(text, vision))  # type: ignore[arg-type]
                labels = self.masks.itm_labels
                terms["itm"], self.right["itm"] = matching_loss(
                    logits, labels, self.valid, self.counts.samples
                )
        if "mlm" in self.wanted:
            with record_function("objective mlm"):
                states = self.fused["mlm"][0]
                assert states is not None
                labels = self.labels.gather(1, self.mlm_rows)[self.mlm_real]
                logits = self.model.language_head(states[self.mlm_real])
                terms["mlm"], self.right["mlm"] = masked_language_loss(logits, labels, self.counts.mlm_tokens)
        if "mltc" in self.wanted:
            with record_function("objective mltc"):
                terms["mltc"] = self._patch_completion() if self.local else self.zero
        return terms

    def _patch_completion(self) -> Tensor:
        vision_b, vision_c = self.fused["b"][1], self.fused["c"][1]
        assert vision_b is not None
        assert vision_c is not None
        tokens, width = vision_c.shape[1:]
        shape = (-1, self.patch_group * tokens, width)
        return group_info_nce(
            vision_c.reshape(shape),
            vision_b[:, self.frames :].detach().reshape(shape),
            self.model.config.completion_temperature,
            self.valid[:, None].expand(-1, tokens).reshape(-1, self.patch_group * tokens),
            self.counts.samples * tokens,
        )


def _padded_rows(flags: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of each row's true flags [B, R], padded to the most, and which are real [B, R]."""
    counts = flags.sum(dim=1)
    most = max(1, int(counts.max()))
    rows = torch.argsort((~flags).to(torch.uint8), dim=1, stable=True)[:, :most]
    return rows, torch.arange(most, device=flags.device) < counts[:, None]
