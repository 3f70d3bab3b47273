"""GLSCL's backbone: both encoders, the way into the fusion space, and the fusion encoder.

Shape legend: B samples, T text tokens, F frames, P patches of a frame, D width, E projection width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from model.attention import IMPLEMENTATIONS, Trace
from model.configuration import GLSCLConfig
from model.fusion import FusionEncoder, FusionPass
from model.heads import Pooler, Temperature
from model.parameters import parameter_groups
from model.text import TextEncoder
from model.vision import VisionEncoder


class TextFeatures(NamedTuple):
    """A text before fusion: ``states`` [B, T, D] in the fusion space, ``embedding`` [B, E] of unit length."""

    states: Tensor
    embedding: Tensor


class VisionFeatures(NamedTuple):
    """Frames before fusion: ``states`` [B, F + F*P, D] in the fusion space, unit ``embedding`` [B, E]."""

    states: Tensor
    embedding: Tensor


@dataclass
class GLSCLModelOutput(ModelOutput):
    """Fused states and, where asked for, everything on the way to them.

    V is F + F*P, the class tokens first and then the patches frame by frame; H heads. Hidden states are None
    unless ``output_hidden_states``, attentions unless ``output_attentions``. In attention weights the last two
    dimensions are queries and keys; they are taken before dropout and each query's sum to 1.

    Args:
        text_states: [B, T, D] of the last fusion layer's text stream.
        vision_states: [B, V, D] of its vision stream.
        pooled: [B, 2D] text pooled, then vision pooled.
        text_hidden_states: ``text_layers`` + 1 of [B, T, D], the text encoder's embeddings and layers.
        vision_hidden_states: ``vision_layers`` + 1 of [B, V, D], the vision encoder's input to its first block
            and its blocks (``ln_post`` not applied).
        fused_text_hidden_states: ``fusion_layers`` + 1 of [B, T, D], the text stream's input and layers.
        fused_vision_hidden_states: ``fusion_layers`` + 1 of [B, V, D], the same of the vision stream.
        text_attentions: ``text_layers`` of [B, H, T, T].
        vision_attentions: ``vision_layers`` of [B, H, V, V]; zero from a patch to another frame.
        fused_text_attentions: ``fusion_layers`` of [B, H, T, T], the text stream's self-attention.
        fused_vision_attentions: ``fusion_layers`` of [B, H, V, V], the same of the vision stream.
        text_cross_attentions: ``fusion_layers`` of [B, H, T, V], the text stream onto vision.
        vision_cross_attentions: ``fusion_layers`` of [B, H, V, T], the vision stream onto text.
    """

    text_states: Tensor | None = None
    vision_states: Tensor | None = None
    pooled: Tensor | None = None
    text_hidden_states: tuple[Tensor, ...] | None = None
    vision_hidden_states: tuple[Tensor, ...] | None = None
    fused_text_hidden_states: tuple[Tensor, ...] | None = None
    fused_vision_hidden_states: tuple[Tensor, ...] | None = None
    text_attentions: tuple[Tensor, ...] | None = None
    vision_attentions: tuple[Tensor, ...] | None = None
    fused_text_attentions: tuple[Tensor, ...] | None = None
    fused_vision_attentions: tuple[Tensor, ...] | None = None
    text_cross_attentions: tuple[Tensor, ...] | None = None
    vision_cross_attentions: tuple[Tensor, ...] | None = None


class GLSCLPreTrainedModel(PreTrainedModel):
    """What all GLSCL models share: configuration, initialisation, attention, activation checkpointing."""

    config_class = GLSCLConfig
    base_model_prefix = "glscl"
    main_input_name = "pixel_values"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("VisionBlock", "RobertaLayer", "SelfAttention", "CrossAttention")
    #: One folder serves all classes, so heads that a class does not have are no surprise in it.
    _keys_to_ignore_on_load_unexpected = (
        r"^(text|vision)_projection\.",
        r"^temperature\.",
        r"^(matching|language)_head\.",
        r"^rank_output\.",
        r"^(vqa|nlvr2)_classifier\.",
    )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, VisionEncoder):
            for parameter in (module.class_embedding, module.position_embedding, module.mask_token):
                init.normal_(parameter, mean=0.0, std=std)
            init.zeros_(module.temporal_embedding)
        elif isinstance(module, Temperature):
            init.constant_(module.value, self.config.temperature_init)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        if attn_implementation not in (None, *IMPLEMENTATIONS):
            raise ValueError(
                f"attn_implementation {attn_implementation!r}: GLSCL has {' and '.join(IMPLEMENTATIONS)}"
            )
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers. Any GLSCL folder opens as any class: what the folder lacks is initialised.

        Where the released code starts a task's own parameters from pre-trained ones, so does this: see
        ``start_from_pretraining`` of the class.
        """
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        model.start_from_pretraining(set(info["missing_keys"]))
        return (model, info) if output_loading_info else model

    def start_from_pretraining(self, missing: set[str]) -> None:
        """Called after loading with the parameters that the folder did not have; here nothing is to be done."""

    def get_output_embeddings(self) -> nn.Linear | None:
        """The MLM decoder; None for a model without MLM. It is not tied to the input embeddings."""
        head = getattr(self, "language_head", None)
        return None if head is None else head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.language_head.decoder = new_embeddings

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """As in transformers; the MLM decoder follows.

        Raises:
            ValueError: ``<mask>`` would be cut off.
        """
        if new_num_tokens is not None and new_num_tokens <= self.config.mask_token_id:
            raise ValueError(
                f"a vocabulary of {new_num_tokens} tokens would lose <mask>, which is {self.config.mask_token_id}"
            )
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def resize_images(self, image_size: int) -> None:
        """Make ``image_size`` the model's own: the position embedding is interpolated (bicubic) once and for all.

        Images of that size are encoded as before, where it was interpolated for each; what is trained from here on
        are the positions of the new grid, as in the released code.

        Raises:
            ValueError: a size that is no multiple of the patch.
        """
        if image_size % self.config.patch_size:
            raise ValueError(f"an image size of {image_size} is no multiple of {self.config.patch_size}")
        if image_size != self.config.image_size:
            for module in self.modules():
                if isinstance(module, VisionEncoder):
                    module.resize_positions(image_size)
            self.config.image_size = image_size

    def parameter_groups(
        self,
        base_lr: float,
        weight_decay: float,
        fusion_multiplier: float = 5.0,
        head_multiplier: float = 5.0,
    ) -> list[dict[str, Any]]:
        """Optimizer groups of the paper's recipe, see :func:`model.parameters.parameter_groups`."""
        return parameter_groups(self, base_lr, weight_decay, fusion_multiplier, head_multiplier)

    def _asked_for(
        self, output_attentions: bool | None, output_hidden_states: bool | None
    ) -> tuple[bool, bool]:
        """What a call asks to see, attentions and hidden states; None: as the configuration says."""
        config = self.config
        return (
            bool(config.output_attentions if output_attentions is None else output_attentions),
            bool(config.output_hidden_states if output_hidden_states is None else output_hidden_states),
        )


class GLSCLModel(GLSCLPreTrainedModel):
    """Text and vision encoder, fusion encoder and poolers, without heads.

    ``get_text_features``, ``get_image_features`` and ``get_video_features`` need the ITC projections and are
    methods of the classes that have them, ``GLSCLForPreTraining`` and ``GLSCLForImageTextRetrieval``.
    """

    def __init__(self, config: GLSCLConfig) -> None:
        super().__init__(config)
        self.text_encoder = TextEncoder(config)
        self.vision_encoder = VisionEncoder(config)
        self.text_transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.vision_transform = nn.Linear(config.hidden_size, config.hidden_size)
        # 0 text, 1 vision, 2 the second image of a pair (NLVR2)
        self.token_type_embedding = nn.Embedding(3, config.hidden_size)
        self.fusion = FusionEncoder(config)
        self.text_pooler = Pooler(config)
        self.vision_pooler = Pooler(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_encoder.roberta.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.text_encoder.roberta.set_input_embeddings(value)
        self.text_encoder.roberta.config.vocab_size = value.num_embeddings

    def token_type(self, kind: int, device: torch.device) -> Tensor:
        """Token-type embedding [1, D] of ``kind`` (through the module, so that ZeRO-3 sees the access)."""
        return self.token_type_embedding(torch.full((1,), kind, device=device))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        image_type: int = 1,
    ) -> GLSCLModelOutput:
        """Fuse texts with images or clips, pair by pair.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 1 where there is a token; None: everywhere but on padding.
            pixel_values: [B, F, 3, height, width], uint8 or float in 0..1, not normalised (the model does it).
            output_attentions: return attention weights. They are computed eagerly for this call whatever
                ``attn_implementation`` is (transformers' own models return none under ``sdpa``).
            output_hidden_states: return the states of all layers.
            image_type: token type of the vision input; 2 for the second image of an NLVR2 pair.
            return_dict: False returns the tuple of what is not None.

        Raises:
            ValueError: no pixels, numbers of texts and images that differ, sizes the model has no room for.
        """
        pixel_values = given(pixel_values)
        mask = self.valid_tokens(input_ids, attention_mask)
        attentions, hidden_states = self._asked_for(output_attentions, output_hidden_states)
        if attentions or hidden_states:
            return self._traced(input_ids, mask, pixel_values, attentions, hidden_states, image_type)
        text = self.embed_text(input_ids, mask)
        vision = self.embed_vision(pixel_values, image_type)
        fused_text, fused_vision = self.fuse(text, mask, vision)
        pooled = self.pool(fused_text[:, :1], fused_vision[:, : pixel_values.shape[1]])
        return GLSCLModelOutput(text_states=fused_text, vision_states=fused_vision, pooled=pooled)

    def class_features(
        self, input_ids: Tensor, attention_mask: Tensor | None, pixel_values: Tensor | None
    ) -> Tensor:
        """``cls_feats`` [B, 2D], the ``pooled`` of :meth:`forward`, without computing the rest of it."""
        pixel_values = given(pixel_values)
        mask = self.valid_tokens(input_ids, attention_mask)
        text, vision = self.embed_text(input_ids, mask), self.embed_vision(pixel_values)
        return self.fuse_classes(text, mask, vision, pixel_values.shape[1])

    def _traced(
        self,
        input_ids: Tensor,
        mask: Tensor,
        pixel_values: Tensor,
        attentions: bool,
        hidden_states: bool,
        image_type: int,
    ) -> GLSCLModelOutput:
        text, vision, fused_text, fused_vision = (Trace(attentions) for _ in range(4))
        states = self.text_transform(self.text_encoder(input_ids, mask, text)) + self.token_type(
            0, mask.device
        )
        pixels = self.vision_transform(self.vision_encoder(pixel_values, trace=vision)[0])
        pixels = pixels + self.token_type(image_type, mask.device)
        _same_number(states, pixels)
        states, pixels = self.fusion.trace(states, mask, pixels, fused_text, fused_vision)

        def kept(states: list[Tensor], wanted: bool) -> tuple[Tensor, ...] | None:
            return tuple(states) if wanted else None

        return GLSCLModelOutput(
            text_states=states,
            vision_states=pixels,
            pooled=self.pool(states[:, :1], pixels[:, : pixel_values.shape[1]]),
            text_hidden_states=kept(text.hidden_states, hidden_states),
            vision_hidden_states=kept(vision.hidden_states, hidden_states),
            fused_text_hidden_states=kept(fused_text.hidden_states, hidden_states),
            fused_vision_hidden_states=kept(fused_vision.hidden_states, hidden_states),
            text_attentions=kept(text.attentions, attentions),
            vision_attentions=kept(vision.attentions, attentions),
            fused_text_attentions=kept(fused_text.attentions, attentions),
            fused_vision_attentions=kept(fused_vision.attentions, attentions),
            text_cross_attentions=kept(fused_text.cross_attentions, attentions),
            vision_cross_attentions=kept(fused_vision.cross_attentions, attentions),
        )

    def valid_tokens(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """See :func:`valid_tokens`; without a mask every token but padding counts."""
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)} for input_ids of {tuple(input_ids.shape)}"
            )
        return valid_tokens(attention_mask)

    def embed_text(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Texts [B, T] on their way into fusion [B, T, D], token type added."""
        return self.text_transform(self.text_encoder(input_ids, mask)) + self.token_type(0, mask.device)

    def embed_vision(self, pixel_values: Tensor, image_type: int = 1) -> Tensor:
        """Images or clips on their way into fusion [B, V, D], token type ``image_type`` added."""
        states = self.vision_transform(self.vision_encoder(pixel_values)[0])
        return states + self.token_type(image_type, states.device)

    def fuse(
        self,
        text: Tensor,
        mask: Tensor,
        vision: Tensor,
        text_rows: Tensor | None = None,
        vision_rows: Tensor | None = None,
        partner: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One fused pass over states with token types; all rows come back, or ``*_rows`` [B, R].

        ``partner`` [B]: which of the vision inputs each text meets; None: text i meets input i.
        """
        batch = len(text)
        if partner is None:
            _same_number(text, vision)

        def every(states: Tensor) -> Tensor:
            return torch.arange(states.shape[1], device=states.device).expand(batch, -1)

        wanted = FusionPass(
            text=0,
            vision=0,
            partner=partner,
            text_rows=every(text) if text_rows is None else text_rows,
            vision_rows=every(vision) if vision_rows is None else vision_rows,
        )
        ((fused_text, fused_vision),) = self.fusion([text], mask, [vision], [wanted])
        assert fused_text is not None
        assert fused_vision is not None
        return fused_text, fused_vision

    def fuse_classes(
        self, text: Tensor, mask: Tensor, vision: Tensor, frames: int, partner: Tensor | None = None
    ) -> Tensor:
        """``cls_feats`` [B, 2D] of one fused pass: the last layer runs for the class tokens only."""
        first = torch.zeros(len(text), 1, dtype=torch.long, device=text.device)
        classes = torch.arange(frames, device=text.device).expand(len(text), -1)
        return self.pool(*self.fuse(text, mask, vision, first, classes, partner))

    def pool(self, text_class: Tensor, vision_classes: Tensor) -> Tensor:
        """Fused class tokens [B, 1, D] and [B, F, D] -> ``cls_feats`` [B, 2D]."""
        return torch.cat([self.text_pooler(text_class), self.vision_pooler(vision_classes)], dim=-1)


def valid_tokens(attention_mask: Tensor) -> Tensor:
    """[B, T] bool; the first token always counts, or an all-padding text's attention would be undefined."""
    if attention_mask.ndim != 2 or not attention_mask.shape[1]:
        raise ValueError(
            f"texts of shape {tuple(attention_mask.shape)}: they must be [texts, tokens], one at least"
        )
    mask = attention_mask.bool().clone()
    mask[:, 0] = True
    return mask


def given(pixel_values: Tensor | None) -> Tensor:
    """The pixels, which every model needs: they are optional only because they come after the mask."""
    if pixel_values is None:
        raise ValueError("pixel_values is missing: GLSCL fuses texts with images or clips")
    return pixel_values


def _same_number(text: Tensor, vision: Tensor) -> None:
    if len(text) != len(vision):
        raise ValueError(f"{len(text)} texts for {len(vision)} images or clips: they are fused pair by pair")
