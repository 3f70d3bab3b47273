"""GLSCL with its pre-training heads: one forward computes every objective asked for, on shared passes.

Each distinct input is encoded once (vision: complete, 80 % removed, 30 % replaced; text: complete, masked for
MLM, 40 % masked) and fused in at most five passes: matching, MLM, (a) removed vision with complete text, (b)
complete vision with masked text, (c) replaced vision with complete text. What no objective asked for is not
computed.

Shape legend: B samples, T text tokens, F frames, P patches of a frame, D width, E projection width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from model.configuration import OBJECTIVES, GLSCLConfig
from model.fusion import FusionPass
from model.gather import sum_over_workers, world_size
from model.glscl import valid_tokens
from model.heads import MaskedLanguageHead
from model.masking import PretrainingMasks
from model.matching import GLSCLMatchingModel
from model.objectives import (
    GlobalCounts,
    exchange_counts,
    global_info_nce,
    group_info_nce,
    masked_language_loss,
    matching_loss,
    mean_over_all,
    token_completion_loss,
)


@dataclass
class GLSCLPreTrainingOutput(ModelOutput):
    """A step's result.

    Args:
        loss: scalar to call ``backward`` on. With several workers its mean over them is the weighted sum of
            ``losses``, and the mean of the gradients is the gradient of that.
        losses: per objective the detached value over all workers, unweighted.
        metrics: detached values over all workers: ``temperature``, ``itm_accuracy``, ``mlm_accuracy``.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    metrics: dict[str, Tensor] | None = None


class GLSCLForPreTraining(GLSCLMatchingModel):
    """The five objectives ITC, ITM, MLM, MGSC and MLTC on one backbone."""

    def __init__(self, config: GLSCLConfig) -> None:
        super().__init__(config)
        self.language_head = MaskedLanguageHead(config)
        self.post_init()

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
    ) -> GLSCLPreTrainingOutput:
        """Compute the objectives named in ``objectives`` (name -> weight) and their weighted sum.

        Args:
            input_ids, attention_mask: [B, T].
            pixel_values: [B, F, 3, height, width], uint8 or float in 0..1.
            masks: from :func:`model.masking.draw_masks`, on the device of the inputs.
            valid: [B] bool; the other samples enter no loss and serve as no negative.
            objectives: weights, keys from ``OBJECTIVES``.
            group_size: consecutive samples among which MLTC of vision finds its negatives.

        Every worker must bring batches of the same B, F and resolution; T may differ.

        Raises:
            ValueError: unknown objective, none at all, or a batch that does not divide into groups.
        """
        unknown = sorted(set(objectives) - set(OBJECTIVES))
        if unknown or not objectives:
            raise ValueError(f"objectives {unknown or '(none)'}: choose from {', '.join(OBJECTIVES)}")
        if len(input_ids) % group_size:
            raise ValueError(f"a batch of {len(input_ids)} does not divide into groups of {group_size}")
        step = _Step(self, valid_tokens(attention_mask), pixel_values.shape[1], masks, valid, set(objectives))
        step.encode(input_ids, pixel_values)
        step.fuse()
        terms = step.terms(group_size)
        loss = sum((weight * terms[name] for name, weight in objectives.items()), start=step.zero)
        losses, metrics = step.report(terms)
        return GLSCLPreTrainingOutput(loss=loss, losses=losses, metrics=metrics)


class _Step:
    """One forward: which inputs are needed, their states, the rows read after fusion, the terms."""

    def __init__(
        self,
        model: GLSCLForPreTraining,
        mask: Tensor,
        frames: int,
        masks: PretrainingMasks,
        valid: Tensor,
        wanted: set[str],
    ) -> None:
        self.model, self.mask, self.frames, self.masks, self.valid, self.wanted = (
            model,
            mask,
            frames,
            masks,
            valid,
            wanted,
        )
        # The paper completes local tokens of images only.
        self.local = "mltc" in wanted and (frames == 1 or model.config.mltc_on_video)
        self.completing = self.local or "mgsc" in wanted
        labels = masks.mlm_labels.masked_fill(~valid[:, None], -100)
        self.labels = labels if "mlm" in wanted else torch.full_like(labels, -100)
        positions = masks.completion_positions & valid[:, None]
        self.positions = positions if self.local else torch.zeros_like(positions)
        self.counts: GlobalCounts = exchange_counts(valid, (self.labels >= 0).sum(), self.positions.sum())
        self.texts: dict[str, Tensor] = {}
        self.visions: dict[str, Tensor] = {}
        self.fused: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self.right: dict[str, Tensor] = {}

    def encode(self, input_ids: Tensor, pixel_values: Tensor) -> None:
        """Every distinct input once: texts in one batch, complete and replaced vision in one batch."""
        backbone, masks = self.model.glscl, self.masks
        texts = {"complete": input_ids}
        if "mlm" in self.wanted:
            texts["mlm"] = masks.mlm_input_ids
        if self.completing:
            texts["masked"] = masks.completion_input_ids
        encoded = backbone.text_encoder(torch.cat(list(texts.values())), self.mask.repeat(len(texts), 1))
        states = backbone.text_transform(encoded)
        self.text_classes = states[: len(input_ids), :1]
        with_type = states + backbone.token_type(0, states.device)
        self.texts = dict(zip(texts, with_type.chunk(len(texts)), strict=True))

        kept = masks.kept_patches if self.completing else None
        replaced = masks.replaced_patches if self.local else None
        complete, removed, swapped = backbone.vision_encoder(pixel_values, kept, replaced)
        complete = backbone.vision_transform(complete)
        self.vision_classes = complete[:, : self.frames]
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
            plan["itm"] = ("complete", "complete", self.masks.itm_partner, first, classes)
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

    def terms(self, group_size: int) -> dict[str, Tensor]:
        """The scaled loss of each wanted objective."""
        terms: dict[str, Tensor] = {}
        if "itc" in self.wanted:
            terms["itc"] = self._itc()
        if "itm" in self.wanted:
            text, vision = self.fused["itm"]
            logits = self.model.matching_head(self.model.glscl.pool(text, vision))  # type: ignore[arg-type]
            labels = self.masks.itm_labels
            terms["itm"], self.right["itm"] = matching_loss(logits, labels, self.valid, self.counts.samples)
        if "mlm" in self.wanted:
            states = self.fused["mlm"][0]
            assert states is not None
            labels = self.labels.gather(1, self.mlm_rows)[self.mlm_real]
            logits = self.model.language_head(states[self.mlm_real])
            terms["mlm"], self.right["mlm"] = masked_language_loss(logits, labels, self.counts.mlm_tokens)
        if "mgsc" in self.wanted:
            terms["mgsc"] = self._mgsc()
        if "mltc" in self.wanted:
            terms["mltc"] = self._mltc(group_size) if self.local else self.zero
        return terms

    def _itc(self) -> Tensor:
        text = self.model.text_projection(self.text_classes)
        vision = self.model.vision_projection(self.vision_classes)
        counts = self.counts
        return global_info_nce(
            text[:, None], vision[:, None], self.model.temperature(), self.valid, counts.valid, counts.samples
        )

    def _mgsc(self) -> Tensor:
        (text_a, vision_a), (text_b, vision_b) = self.fused["a"], self.fused["b"]
        assert text_a is not None
        assert text_b is not None
        assert vision_a is not None
        assert vision_b is not None
        temperature, counts = self.model.config.completion_temperature, self.counts
        target = vision_b[:, : self.frames].detach()
        rest = (temperature, self.valid, counts.valid, counts.samples)
        return global_info_nce(vision_a, target, *rest) + global_info_nce(
            text_b[:, :1], text_a[:, :1].detach(), *rest
        )

    def _mltc(self, group_size: int) -> Tensor:
        text_a, (text_b, vision_b), vision_c = self.fused["a"][0], self.fused["b"], self.fused["c"][1]
        assert text_a is not None
        assert text_b is not None
        assert vision_b is not None
        assert vision_c is not None
        temperature = self.model.config.completion_temperature
        completed, target = text_b[:, 1:][self.text_real], text_a[:, 1:][self.text_real].detach()
        of_text = token_completion_loss(completed, target, temperature, self.counts)
        tokens, width = vision_c.shape[1:]
        shape = (-1, group_size * tokens, width)
        valid = self.valid[:, None].expand(-1, tokens).reshape(-1, group_size * tokens)
        of_vision = group_info_nce(
            vision_c.reshape(shape),
            vision_b[:, self.frames :].detach().reshape(shape),
            temperature,
            valid,
            self.counts.samples * tokens,
        )
        return of_text + of_vision

    def report(self, terms: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values over all workers, in one reduction."""
        count = {"itm": self.counts.samples, "mlm": self.counts.mlm_tokens}
        accuracies = [
            mean_over_all(right.to(self.zero.dtype), count[name]) for name, right in self.right.items()
        ]
        values = sum_over_workers(torch.stack([*terms.values(), *accuracies])) / world_size()
        losses = dict(zip(terms, values[: len(terms)], strict=True))
        metrics = {
            f"{name}_accuracy": value for name, value in zip(self.right, values[len(terms) :], strict=True)
        }
        if "itc" in self.wanted:
            metrics["temperature"] = self.model.temperature().detach()[0]
        return losses, metrics


def _padded_rows(flags: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of each row's true flags [B, R], padded to the most, and which are real [B, R]."""
    counts = flags.sum(dim=1)
    most = max(1, int(counts.max()))
    rows = torch.argsort((~flags).to(torch.uint8), dim=1, stable=True)[:, :most]
    return rows, torch.arange(most, device=flags.device) < counts[:, None]
