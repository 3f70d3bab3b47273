"""NLVR2: is a sentence true of a pair of images?

Shape legend: B samples, T text tokens, V vision tokens of an image, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from model.configuration import GLSCLConfig
from model.fine_tuning import all_or, classifier, mean_of_valid
from model.fusion import FusionPass
from model.glscl import GLSCLModel, GLSCLModelOutput, GLSCLPreTrainedModel, given
from model.objectives import in_full_precision


@dataclass
class GLSCLNLVR2Output(ModelOutput):
    """Judgements of sentences.

    Args:
        loss: scalar, when ``labels`` were given.
        logits: [B, 2], column 1: the sentence is true.
        first_output, second_output: the backbone's output for the text with the first and with the second image,
            with what was asked to be seen; None when nothing was.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    first_output: GLSCLModelOutput | None = None
    second_output: GLSCLModelOutput | None = None


class GLSCLForNLVR2(GLSCLPreTrainedModel):
    """Linear(4D, 2D) - LayerNorm - GELU - Linear(2) on the ``cls_feats`` of the text with either image.

    The images have the token types 1 and 2.
    """

    def __init__(self, config: GLSCLConfig) -> None:
        super().__init__(config)
        self.glscl = GLSCLModel(config)
        self.nlvr2_classifier = classifier(4 * config.hidden_size, 2 * config.hidden_size, 2)
        self.post_init()

    def start_from_pretraining(self, missing: set[str]) -> None:
        """Without this head in the folder: token type 2, which pre-training never uses, becomes a copy of type 1.

        As the released code does. Called by ``from_pretrained``; a model saved by this class keeps its own.
        """
        if "nlvr2_classifier.0.weight" in missing:
            with torch.no_grad():
                types = self.glscl.token_type_embedding.weight
                types[2] = types[1]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        valid: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> GLSCLNLVR2Output:
        """Judge sentences [B, T] about pairs of images.

        Args:
            input_ids, attention_mask, output_attentions, output_hidden_states: see :class:`GLSCLModel`.
            pixel_values: [B, 2, 3, height, width], uint8 or float in 0..1: the pair, left image first.
            labels: [B] int64, 1 where the sentence is true; the loss is the cross-entropy, averaged over the
                samples of all workers.
            valid: [B] bool, samples that count in the loss; None: all. Without any the loss is zero.

        Raises:
            ValueError: as :class:`GLSCLModel`, or what are no pairs, or labels of another shape.
        """
        pixel_values = given(pixel_values)
        if pixel_values.ndim != 5 or pixel_values.shape[1] != 2 or len(pixel_values) != len(input_ids):
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)} for {len(input_ids)} sentences: they must be "
                "[sentences, 2, 3, height, width]"
            )
        attentions, hidden_states = self._asked_for(output_attentions, output_hidden_states)
        first = second = None
        if attentions or hidden_states:
            first, second = (
                self.glscl(
                    input_ids,
                    attention_mask,
                    pixel_values[:, place : place + 1],
                    output_attentions=attentions,
                    output_hidden_states=hidden_states,
                    return_dict=True,
                    image_type=1 + place,
                )
                for place in range(2)
            )
            pooled = torch.cat([first.pooled, second.pooled], dim=-1)
        else:
            pooled = self._pooled(input_ids, attention_mask, pixel_values)
        logits = self.nlvr2_classifier(pooled)
        loss = None if labels is None else _loss(logits, labels, valid)
        return GLSCLNLVR2Output(loss=loss, logits=logits, first_output=first, second_output=second)

    def _pooled(self, input_ids: Tensor, attention_mask: Tensor | None, pixel_values: Tensor) -> Tensor:
        """Both ``cls_feats`` [B, 4D]: the text encoded once, the images in one batch, the passes sharing both."""
        backbone = self.glscl
        mask = backbone.valid_tokens(input_ids, attention_mask)
        text = backbone.embed_text(input_ids, mask)
        images = backbone.vision_transform(backbone.vision_encoder(pixel_values.flatten(0, 1)[:, None])[0])
        first, second = images.unflatten(0, (-1, 2)).unbind(dim=1)
        first, second = (
            first + backbone.token_type(1, mask.device),
            second + backbone.token_type(2, mask.device),
        )
        row = torch.zeros(len(text), 1, dtype=torch.long, device=mask.device)
        passes = [FusionPass(0, image, None, row, row) for image in range(2)]
        return torch.cat(
            [
                backbone.pool(fused_text, fused_vision)
                for fused_text, fused_vision in backbone.fusion([text], mask, [first, second], passes)
            ],
            dim=-1,
        )


def _loss(logits: Tensor, labels: Tensor, valid: Tensor | None) -> Tensor:
    if labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)}: they must be [{len(logits)}], 0 or 1 for each"
        )
    losses = F.cross_entropy(in_full_precision(logits), labels.long(), reduction="none")
    return mean_of_valid(losses, all_or(valid, len(losses), losses.device))
