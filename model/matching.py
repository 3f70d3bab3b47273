"""What compares texts with images and clips: ITC embeddings and the head that judges a fused pair.

Shape legend: B samples, T text tokens, F frames, P patches of a frame, D width, E projection width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from model.configuration import GLSCLConfig
from model.glscl import GLSCLModel, GLSCLPreTrainedModel, TextFeatures, VisionFeatures, valid_tokens
from model.heads import ContrastiveProjection, MatchingHead, Temperature


class GLSCLMatchingModel(GLSCLPreTrainedModel):
    """The backbone with ITC projections, temperature and ITM head, and the methods that evaluation builds on.

    Encode every text and every picture once (:meth:`encode_text`, :meth:`encode_vision`), compare all by the
    dot product of their embeddings, and let :meth:`match` judge the pairs that are worth a fusion.
    """

    def __init__(self, config: GLSCLConfig) -> None:
        super().__init__(config)
        self.glscl = GLSCLModel(config)
        self.text_projection = ContrastiveProjection(config)
        self.vision_projection = ContrastiveProjection(config)
        self.temperature = Temperature()
        self.matching_head = MatchingHead(config)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> TextFeatures:
        """Encode texts [B, T] for comparison (``embedding``) and for :meth:`match` (``states``)."""
        mask = self.glscl.valid_tokens(input_ids, attention_mask)
        states = self.glscl.text_transform(self.glscl.text_encoder(input_ids, mask))
        embedding = F.normalize(self.text_projection(states[:, :1]), dim=-1)
        return TextFeatures(states + self.glscl.token_type(0, states.device), embedding)

    def encode_vision(self, pixel_values: Tensor) -> VisionFeatures:
        """Encode images or clips [B, F, 3, height, width] likewise."""
        states = self.glscl.vision_transform(self.glscl.vision_encoder(pixel_values)[0])
        embedding = F.normalize(self.vision_projection(states[:, : pixel_values.shape[1]]), dim=-1)
        return VisionFeatures(states + self.glscl.token_type(1, states.device), embedding)

    def match(
        self,
        text_states: Tensor,
        attention_mask: Tensor,
        vision_states: Tensor,
        num_frames: int,
        partner: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, 2] (column 1: it matches) of pairs of ``states`` from the two encode methods.

        ``partner`` [B]: which of the vision inputs each text meets; None: text i meets input i. An input that
        several texts meet is read into the first fusion layer once.
        """
        mask = valid_tokens(attention_mask)
        return self._judge(self.glscl.fuse_classes(text_states, mask, vision_states, num_frames, partner))

    def _judge(self, pooled: Tensor) -> Tensor:
        return self.matching_head(pooled)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Unit ITC embeddings [B, E] of texts [B, T]."""
        return self.encode_text(input_ids, attention_mask).embedding

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Unit ITC embeddings [B, E] of images [B, 1, 3, height, width].

        Raises:
            ValueError: clips of several frames.
        """
        if pixel_values.shape[1] != 1:
            raise ValueError(
                f"{pixel_values.shape[1]} frames: an image has one; clips are for get_video_features"
            )
        return self.encode_vision(pixel_values).embedding

    def get_video_features(self, pixel_values: Tensor) -> Tensor:
        """Unit ITC embeddings [B, E] of clips [B, F, 3, height, width]."""
        return self.encode_vision(pixel_values).embedding
