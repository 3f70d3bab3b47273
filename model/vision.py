"""The flexible vision encoder: CLIP's ViT for an image, the same weights for the frames of a video.

Shape legend: B samples, F frames, P patches of a frame, K kept and M replaced patches, D width, H heads.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from model.attention import Trace, attend, attend_with_weights, take_rows
from model.configuration import GLSCLConfig

_QUICK_GELU = 1.702


class _QuickGELUIn(nn.Linear):
    """The linear map before QuickGELU, with its factor applied to the weights.

    ``x * sigmoid(1.702 x)`` is ``silu(1.702 x) / 1.702``: scaling the small weights instead of the wide
    activations leaves one pass over them, forward and backward.
    """

    def forward(self, states: Tensor) -> Tensor:
        return F.silu(F.linear(states, self.weight * _QUICK_GELU, self.bias * _QUICK_GELU))


class _QuickGELUOut(nn.Linear):
    """The linear map after it, which takes the factor out again."""

    def forward(self, states: Tensor) -> Tensor:
        return F.linear(states, self.weight * (1 / _QUICK_GELU), self.bias)


class VisionBlock(GradientCheckpointingLayer):
    """A pre-norm CLIP block; class tokens see all frames, patch tokens their own frame."""

    def __init__(self, config: GLSCLConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config, self.heads = config, config.num_attention_heads
        self.ln_1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc = _QuickGELUIn(width, config.intermediate_size)
        self.proj = _QuickGELUOut(config.intermediate_size, width)

    def forward(self, states: Tensor) -> Tensor:
        """``states`` [B, F, 1 + P, D], each frame's class token first; the same shape comes back."""
        query, key, value = self.qkv(self.ln_1(states)).chunk(3, dim=-1)
        states = states + self.out_proj(self._attend(query, key, value))
        return states + self.proj(self.fc(self.ln_2(states)))

    def with_weights(self, states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same on tokens in any order, ``states`` [B, N, D], with the weights [B, H, N, N].

        ``mask`` [N, N] is true where a token (row) may see another; None: everywhere (an image).
        """
        query, key, value = self.qkv(self.ln_1(states)).chunk(3, dim=-1)
        attended, weights = attend_with_weights(query, key, value, self.heads, mask)
        states = states + self.out_proj(attended)
        return states + self.proj(self.fc(self.ln_2(states))), weights

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, frames, tokens, width = query.shape
        kind = self.config._attn_implementation
        if frames == 1:
            return attend(query[:, 0], key[:, 0], value[:, 0], self.heads, implementation=kind)[:, None]
        own = attend(
            query[:, :, 1:].flatten(0, 1),
            key.flatten(0, 1),
            value.flatten(0, 1),
            self.heads,
            implementation=kind,
        )
        patches = own.view(batch, frames, tokens - 1, width)
        classes = attend(
            query[:, :, 0], key.flatten(1, 2), value.flatten(1, 2), self.heads, implementation=kind
        )
        return torch.cat([classes[:, :, None], patches], dim=2)


class VisionEncoder(nn.Module):
    """CLIP's vision transformer with ``ln_post`` on every token and no output projection.

    The temporal embedding is zero at first and is skipped for a single frame, so that an image's states never
    depend on it.
    """

    def __init__(self, config: GLSCLConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, width, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.position_embedding = nn.Parameter(torch.empty(1 + config.num_patches, width))
        self.temporal_embedding = nn.Parameter(torch.empty(config.max_frames, width))
        self.mask_token = nn.Parameter(torch.empty(width))
        self.ln_pre = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.vision_layers))
        self.ln_post = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(
        self,
        pixel_values: Tensor,
        kept_patches: Tensor | None = None,
        replaced_patches: Tensor | None = None,
        trace: Trace | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Encode complete frames and, from the same patch embeddings, their two masked versions.

        Args:
            pixel_values: [B, F, 3, height, width], uint8, or float in 0..1; sides are multiples of the patch.
            kept_patches: [B, K] positions that remain, the same in every frame (the others are removed).
            replaced_patches: [B, M] positions whose embedding becomes the learned mask token, in every frame.
            trace: collects every block's states and, if it wants them, attention weights, tokens in the order of
                the result; a patch's weights onto other frames are zero. Of complete frames only.

        Returns:
            (complete [B, F + F*P, D], removed [B, F + F*K, D] or None, replaced [B, F + F*P, D] or None):
            the F class tokens first, then the patches frame by frame.

        Raises:
            ValueError: not five dimensions, three of them the colours; sides that are no multiple of the patch; or
                more than ``max_frames`` frames.
        """
        assert trace is None or (kept_patches is None and replaced_patches is None)
        patches, grid = self._embed_patches(pixel_values)
        frames = patches.shape[1]
        class_position, patch_position = self._positions(grid, patches.dtype)
        classes = (self.class_embedding + class_position).to(patches.dtype)
        temporal = self.temporal_embedding[:frames, None].to(patches.dtype) if frames > 1 else None

        inputs = [patches + patch_position]
        if replaced_patches is not None:
            replaced = torch.zeros(
                patches.shape[0], patches.shape[2], dtype=torch.bool, device=patches.device
            )
            replaced.scatter_(1, replaced_patches, True)
            masked = torch.where(replaced[:, None, :, None], self.mask_token.to(patches.dtype), patches)
            inputs.append(masked + patch_position)
        complete = self._run(torch.cat(inputs) if len(inputs) > 1 else inputs[0], classes, temporal, trace)
        removed = None
        if kept_patches is not None:
            rows = kept_patches.repeat_interleave(frames, dim=0)
            kept = take_rows(inputs[0].flatten(0, 1), rows).unflatten(0, (-1, frames))
            removed = self._run(kept, classes, temporal)
        if replaced_patches is None:
            return complete, removed, None
        first, second = complete.chunk(2)
        return first, removed, second

    def _embed_patches(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        config, side = self.config, self.config.patch_size
        if pixel_values.ndim != 5 or pixel_values.shape[2] != 3 or not pixel_values.shape[1]:
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)}: they must be [samples, frames, 3, height, width]"
            )
        batch, frames, channels, height, width = pixel_values.shape
        if height % side or width % side:
            raise ValueError(f"frames of {width} x {height} pixels: both sides must be multiples of {side}")
        if frames > config.max_frames:
            raise ValueError(f"{frames} frames, but the model has room for {config.max_frames} (max_frames)")
        grid = (height // side, width // side)
        tiles = pixel_values.view(batch, frames, channels, grid[0], side, grid[1], side)
        # Moved while still uint8: a quarter of the memory traffic.
        tiles = tiles.permute(0, 1, 3, 5, 2, 4, 6).reshape(
            batch, frames, grid[0] * grid[1], channels, side * side
        )
        scale = 1.0 if pixel_values.is_floating_point() else 1 / 255
        working = torch.float64 if self.patch_embedding.weight.dtype == torch.float64 else torch.float32
        mean = torch.tensor(config.image_mean, dtype=working, device=tiles.device)[:, None]
        std = torch.tensor(config.image_std, dtype=working, device=tiles.device)[:, None]
        normalised = (tiles.to(working) * (scale / std)).sub_(mean / std)
        return self.patch_embedding(normalised.flatten(3).to(self.patch_embedding.weight.dtype)), grid

    def _positions(self, grid: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Positions of the class token [D] and of the patches [P, D], bicubic if the grid differs."""
        side = self.config.image_size // self.config.patch_size
        patches = self.position_embedding[1:]
        if grid != (side, side):
            square = patches.T.reshape(1, -1, side, side)
            square = square if square.dtype == torch.float64 else square.float()
            resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
            patches = resized[0].flatten(1).T
        return self.position_embedding[0], patches.to(dtype)

    @torch.no_grad()
    def resize_positions(self, image_size: int) -> None:
        """Give the position embedding the grid of another ``config.image_size``, which the caller then sets."""
        side = image_size // self.config.patch_size
        class_position, patches = self._positions((side, side), self.position_embedding.dtype)
        self.position_embedding = nn.Parameter(torch.cat([class_position[None], patches]))

    def _run(
        self, patches: Tensor, classes: Tensor, temporal: Tensor | None, trace: Trace | None = None
    ) -> Tensor:
        """``patches`` [B, F, P, D] with positions -> [B, F + F*P, D]."""
        batch, frames, _, width = patches.shape
        states = torch.cat([classes.expand(batch, frames, 1, width), patches], dim=2)
        if temporal is not None:
            states = states + temporal
        states = self.ln_pre(states)
        if trace is not None:
            return self._run_traced(states, trace)
        for block in self.blocks:
            states = block(states)
        return _classes_first(self.ln_post(states))

    def _run_traced(self, states: Tensor, trace: Trace) -> Tensor:
        """``states`` [B, F, 1 + P, D] before the first block -> [B, F + F*P, D].

        The tokens are brought into the order of the result before a block's states are noted and taken on from
        there, so that a gradient can be asked of what was noted.
        """
        frames, tokens = states.shape[1:3]
        mask = _who_sees_whom(frames, tokens - 1, states.device) if frames > 1 else None
        ordered = _classes_first(states)
        for block in self.blocks:
            trace.hidden_states.append(ordered)
            if trace.want_attentions:
                ordered, weights = cast(VisionBlock, block).with_weights(ordered, mask)
                trace.attentions.append(weights)
            else:
                ordered = _classes_first(block(_by_frame(ordered, frames)))
        trace.hidden_states.append(ordered)
        return self.ln_post(ordered)


def _classes_first(states: Tensor) -> Tensor:
    """[B, F, 1 + P, D] -> [B, F + F*P, D]: all class tokens, then the patches frame by frame."""
    if states.shape[1] == 1:
        return states[:, 0]
    return torch.cat([states[:, :, 0], states[:, :, 1:].flatten(1, 2)], dim=1)


def _by_frame(states: Tensor, frames: int) -> Tensor:
    """The inverse of :func:`_classes_first`."""
    if frames == 1:
        return states[:, None]
    return torch.cat([states[:, :frames, None], states[:, frames:].unflatten(1, (frames, -1))], dim=2)


def _who_sees_whom(frames: int, patches: int, device: torch.device) -> Tensor:
    """[F + F*P, F + F*P] bool of tokens with the classes first: a class token all, a patch its own frame."""
    frame = torch.arange(frames, device=device)
    owner = torch.cat([frame, frame.repeat_interleave(patches)])
    is_class = torch.arange(len(owner), device=device) < frames
    return is_class[:, None] | (owner[:, None] == owner[None])
