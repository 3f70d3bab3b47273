"""Visual question answering as choosing among frequent answers (VQAv2).

Shape legend: B samples, T text tokens, F frames, D width, A answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from model.configuration import GLSCLConfig
from model.fine_tuning import all_or, classifier, mean_of_valid
from model.glscl import GLSCLModel, GLSCLModelOutput, GLSCLPreTrainedModel
from model.objectives import in_full_precision


@dataclass
class GLSCLVisualQuestionAnsweringOutput(ModelOutput):
    """Answers to questions.

    Args:
        loss: scalar, when ``labels`` were given.
        logits: [B, A], one independent logit for every answer.
        model_output: the backbone's output with what was asked to be seen; None when nothing was.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    model_output: GLSCLModelOutput | None = None


class GLSCLForVisualQuestionAnswering(GLSCLPreTrainedModel):
    """Linear(2D, 2D) - LayerNorm - GELU - Linear(A) on ``cls_feats``.

    A is ``config.num_labels``: 3129 unless given, as ``num_labels`` or by naming the answers in ``id2label``.
    """

    def __init__(self, config: GLSCLConfig) -> None:
        super().__init__(config)
        self.glscl = GLSCLModel(config)
        width = 2 * config.hidden_size
        self.vqa_classifier = classifier(width, width, config.num_labels)
        self.post_init()

    def begin_with_prior(self, right: Tensor, examples: int) -> None:
        """Give a new head the biases that say how often each answer is right, before it has learnt more.

        A loss of A binary terms of which nearly all are 0 is otherwise mostly about how rare answers are: its
        gradients teach nothing else for the first hundreds of steps (Lin et al., "Focal Loss for Dense Object
        Detection", section 3.3, where the same is done).

        Args:
            right: [A], how right each answer is, summed over the examples.
            examples: how many there are. One more is counted, for which every answer is half right: an answer
                that was never right is rare, not impossible.
        """
        if right.shape != (self.config.num_labels,):
            raise ValueError(f"sums of shape {tuple(right.shape)} for {self.config.num_labels} answers")
        output = self.vqa_classifier[3]
        assert isinstance(output, nn.Linear)
        with torch.no_grad():
            output.bias.copy_(torch.logit((right + 0.5) / (examples + 1)))

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
    ) -> GLSCLVisualQuestionAnsweringOutput:
        """Answer questions [B, T] about images [B, F, 3, height, width].

        Args:
            input_ids, attention_mask, pixel_values, output_attentions, output_hidden_states: see
                :class:`GLSCLModel`.
            labels: [B, A] soft scores in 0..1. The loss is the binary cross-entropy summed over the answers
                (its mean, times A) and averaged over the samples of all workers, as the pre-training losses are.
            valid: [B] bool, samples that count in the loss; None: all. Without any the loss is zero.

        Raises:
            ValueError: as :class:`GLSCLModel`, or labels of another shape.
        """
        attentions, hidden_states = self._asked_for(output_attentions, output_hidden_states)
        seen = None
        if attentions or hidden_states:
            seen = self.glscl(
                input_ids,
                attention_mask,
                pixel_values,
                output_attentions=attentions,
                output_hidden_states=hidden_states,
                return_dict=True,
            )
            pooled = seen.pooled
        else:
            pooled = self.glscl.class_features(input_ids, attention_mask, pixel_values)
        logits = self.vqa_classifier(pooled)
        loss = None if labels is None else self._loss(logits, labels, valid)
        return GLSCLVisualQuestionAnsweringOutput(loss=loss, logits=logits, model_output=seen)

    def _loss(self, logits: Tensor, labels: Tensor, valid: Tensor | None) -> Tensor:
        if labels.shape != logits.shape:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)}: they must be soft scores {tuple(logits.shape)} of "
                f"{self.config.num_labels} answers (num_labels)"
            )
        logits = in_full_precision(logits)
        losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").sum(
            dim=1
        )
        return mean_of_valid(losses, all_or(valid, len(losses), losses.device))
