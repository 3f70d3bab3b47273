"""Retrieval between captions and images or clips, fine-tuned: ranking the true text above wrong ones, and ITC.

Shape legend: B samples, N candidate texts of a sample, T text tokens, F frames, D width, E projection width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from model.configuration import GLSCLConfig
from model.fine_tuning import all_or, mean_of_valid
from model.gather import gather
from model.glscl import GLSCLModelOutput, given
from model.matching import GLSCLMatchingModel
from model.objectives import global_info_nce, in_full_precision


@dataclass
class GLSCLImageTextRetrievalOutput(ModelOutput):
    """Candidates ranked.

    Args:
        loss: ``rank_loss`` + ``itc_weight`` * ``itc_loss``.
        rank_loss: scalar, cross-entropy of the true text against the other candidates.
        itc_loss: scalar, InfoNCE of true texts and images over the global batch, both directions summed.
        rank_logits: [B, N].
        text_embeds: [B, N, E] unit ITC embeddings of the candidates.
        vision_embeds: [B, E] unit ITC embeddings of the images or clips.
        model_output: the backbone's output for the B*N pairs, candidates of a sample one after another, with
            what was asked to be seen; None when nothing was.
    """

    loss: Tensor | None = None
    rank_loss: Tensor | None = None
    itc_loss: Tensor | None = None
    rank_logits: Tensor | None = None
    text_embeds: Tensor | None = None
    vision_embeds: Tensor | None = None
    model_output: GLSCLModelOutput | None = None


class GLSCLForImageTextRetrieval(GLSCLMatchingModel):
    """A rank head, one logit on ``cls_feats``, trained together with ITC.

    The ITM head is kept, frozen, as in the released code: the rank head starts from it, and a saved folder
    opens as ``GLSCLForPreTraining`` with it. :meth:`match` judges by the rank head: column 0 of its logits is
    zero, so that the difference of the columns is the rank logit.
    """

    def __init__(self, config: GLSCLConfig) -> None:
        super().__init__(config)
        self.matching_head.requires_grad_(False)
        self.rank_output = nn.Linear(2 * config.hidden_size, 1)
        self.post_init()

    def start_from_pretraining(self, missing: set[str]) -> None:
        """Without a rank head in the folder, but an ITM head: copy its row 1, "matches".

        Row 1 as it is, as in the released code, not its difference to row 0. Called by ``from_pretrained``.
        """
        self.matching_head.requires_grad_(False)  # loading made its parameters anew
        if "rank_output.weight" in missing and "matching_head.classifier.weight" not in missing:
            with torch.no_grad():
                self.rank_output.weight.copy_(self.matching_head.classifier.weight[1:])
                self.rank_output.bias.copy_(self.matching_head.classifier.bias[1:])

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        itc_weight: float = 0.5,
        valid: Tensor | None = None,
        return_loss: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> GLSCLImageTextRetrievalOutput:
        """Rank candidate texts for images or clips.

        Args:
            input_ids, attention_mask: [B, N, T], the candidates of each sample, the true text first (the paper
                takes 15 random texts besides).
            pixel_values: [B, F, 3, height, width], encoded once for all candidates.
            itc_weight: of the contrastive loss; the paper's is 0.5 for images and 1.0 for clips.
            valid: [B] bool, samples that count in the losses and serve as negatives; None: all. Without any
                the losses are zero.
            return_loss: compute the losses. All workers of a process group must then bring batches of one size.
            output_attentions, output_hidden_states: see :class:`GLSCLModel`; images are then encoded once for
                each candidate.

        Raises:
            ValueError: as :class:`GLSCLModel`, or texts that are not [B, N, T].
        """
        pixel_values = given(pixel_values)
        if input_ids.ndim != 3 or len(input_ids) != len(pixel_values):
            raise ValueError(
                f"input_ids of shape {tuple(input_ids.shape)}: they must be [samples, candidates, tokens] for "
                f"{len(pixel_values)} samples, the true text first"
            )
        backbone, (batch, candidates) = self.glscl, input_ids.shape[:2]
        attentions, hidden_states = self._asked_for(output_attentions, output_hidden_states)
        texts = input_ids.flatten(0, 1)
        mask = backbone.valid_tokens(texts, None if attention_mask is None else attention_mask.flatten(0, 1))
        text = backbone.text_transform(backbone.text_encoder(texts, mask))
        vision = backbone.vision_transform(backbone.vision_encoder(pixel_values)[0])
        frames = pixel_values.shape[1]
        text_embeds = self.text_projection(text[:, :1]).unflatten(0, (batch, candidates))
        vision_embeds = self.vision_projection(vision[:, :frames])
        seen = None
        if attentions or hidden_states:
            seen = backbone(
                texts,
                mask,
                pixel_values.repeat_interleave(candidates, dim=0),
                output_attentions=attentions,
                output_hidden_states=hidden_states,
                return_dict=True,
            )
            pooled = seen.pooled
        else:
            pooled = backbone.fuse_classes(
                text + backbone.token_type(0, text.device),
                mask,
                vision + backbone.token_type(1, text.device),
                frames,
                partner=torch.arange(batch, device=text.device).repeat_interleave(candidates),
            )
        logits = self.rank_output(pooled).view(batch, candidates)
        loss = rank_loss = itc_loss = None
        if return_loss:
            valid = all_or(valid, batch, logits.device)
            true = torch.zeros(batch, dtype=torch.long, device=logits.device)
            rank_loss = mean_of_valid(
                F.cross_entropy(in_full_precision(logits), true, reduction="none"), valid
            )
            itc_loss = self._itc(text_embeds[:, 0], vision_embeds, valid)
            loss = rank_loss + itc_weight * itc_loss
        return GLSCLImageTextRetrievalOutput(
            loss=loss,
            rank_loss=rank_loss,
            itc_loss=itc_loss,
            rank_logits=logits,
            text_embeds=F.normalize(text_embeds, dim=-1),
            vision_embeds=F.normalize(vision_embeds, dim=-1),
            model_output=seen,
        )

    def _itc(self, text: Tensor, vision: Tensor, valid: Tensor) -> Tensor:
        all_valid = gather(valid.long()).bool()  # gloo gathers no booleans
        count = int(all_valid.sum())
        return global_info_nce(text[:, None], vision[:, None], self.temperature(), valid, all_valid, count)

    def _judge(self, pooled: Tensor) -> Tensor:
        rank = self.rank_output(pooled)
        return torch.cat([torch.zeros_like(rank), rank], dim=-1)
