"""The released model as formulas over the released names, one sample at a time; no code of ``model/``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GLSCLConfig
from tests.model.importers.sources import roberta


class ReleasedModel:
    """Formulas over a state dict in float64; ``video`` adds the temporal embedding to every frame."""

    def __init__(self, config: GLSCLConfig, state: Mapping[str, Tensor], video: bool) -> None:
        self.c, self.s, self.video = config, state, video
        prefix = "text_transformer."
        self.roberta = roberta(config).roberta
        text = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        text = {name: t for name, t in text.items() if not name.startswith("pooler.")}
        self.roberta.load_state_dict(text)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.s[f"{name}.weight"], self.s[f"{name}.bias"])

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.s[f"{name}.weight"], self.s[f"{name}.bias"], eps)

    def vision(self, frames: Tensor, root: str = "vision_transformer.visual.") -> Tensor:
        """uint8 [F, 3, H, W] -> [F + F*P, D], class tokens first."""
        mean, std = (
            torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (self.c.image_mean, self.c.image_std)
        )
        pixels = (frames.double() / 255 - mean) / std
        x = F.conv2d(pixels, self.s[f"{root}conv1.weight"], stride=self.c.patch_size).flatten(2).mT
        classes = self.s[f"{root}class_embedding"].expand(len(x), 1, -1)
        x = torch.cat([classes, x], 1) + self.s[f"{root}positional_embedding"]
        if self.video:
            x = x + self.s[f"{root}temporal_embed"][0, : len(x), None]
        x = self.norm(f"{root}ln_pre", x, 1e-5)
        for number in range(self.c.vision_layers):
            block = f"{root}transformer.resblocks.{number}."
            y = self.norm(f"{block}ln_1", x, 1e-5)
            attended = [self.attend(block, y[:, 0], y.flatten(0, 1))[:, None]]
            attended.append(torch.stack([self.attend(block, frame[1:], frame) for frame in y]))
            x = x + torch.cat(attended, 1)
            hidden = self.linear(f"{block}mlp.c_fc", self.norm(f"{block}ln_2", x, 1e-5))
            x = x + self.linear(f"{block}mlp.c_proj", hidden * torch.sigmoid(1.702 * hidden))
        x = self.norm(f"{root}ln_post", x, 1e-5)
        return torch.cat([x[:, 0], x[:, 1:].flatten(0, 1)])

    def attend(self, block: str, query: Tensor, context: Tensor) -> Tensor:
        """torch's own attention over packed weights, as CLIP uses it."""
        weights = [self.s[f"{block}attn.in_proj_weight"], self.s[f"{block}attn.in_proj_bias"], None, None]
        out = [self.s[f"{block}attn.out_proj.weight"], self.s[f"{block}attn.out_proj.bias"]]
        heads, width = self.c.num_attention_heads, self.c.hidden_size
        return F.multi_head_attention_forward(
            query,
            context,
            context,
            width,
            heads,
            *weights,
            False,
            0.0,
            *out,
            training=False,
            need_weights=False,
        )[0]

    def fused(self, ids: Tensor, frames: Tensor, image_type: int = 1) -> tuple[Tensor, Tensor]:
        """ids [n] without padding, frames [F, 3, H, W] -> states [n, D] and [F + F*P, D]."""
        types = self.s["token_type_embeddings.weight"]
        text, vision = self.unimodal(ids, frames)
        text, vision = text + types[0], vision + types[image_type]
        for number in range(self.c.fusion_layers):
            text, vision = (
                self.layer(f"cross_modal_text_layers.{number}.", text, vision),
                self.layer(f"cross_modal_image_layers.{number}.", vision, text),
            )
        return text, vision

    def unimodal(self, ids: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        text = self.roberta(ids[None]).last_hidden_state[0]
        return (
            self.linear("cross_modal_text_transform", text),
            self.linear("cross_modal_image_transform", self.vision(frames)),
        )

    def layer(self, root: str, x: Tensor, other: Tensor) -> Tensor:
        for kind, context in (("attention", x), ("crossattention", other)):
            q = self.linear(f"{root}{kind}.self.query", x)
            k = self.linear(f"{root}{kind}.self.key", context)
            v = self.linear(f"{root}{kind}.self.value", context)
            q, k, v = (t.unflatten(-1, (self.c.num_attention_heads, -1)).transpose(0, 1) for t in (q, k, v))
            weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
            attended = self.linear(f"{root}{kind}.output.dense", (weights @ v).transpose(0, 1).flatten(1))
            x = self.norm(f"{root}{kind}.output.LayerNorm", x + attended, 1e-12)
        hidden = self.linear(f"{root}output.dense", F.gelu(self.linear(f"{root}intermediate.dense", x)))
        return self.norm(f"{root}output.LayerNorm", x + hidden, 1e-12)

    def pooled(self, ids: Tensor, frames: Tensor, image_type: int = 1) -> Tensor:
        """``cls_feats`` [2D]."""
        text, vision = self.fused(ids, frames, image_type)
        return torch.cat(
            [
                torch.tanh(self.linear("cross_modal_text_pooler.dense", text[0])),
                torch.tanh(self.linear("cross_modal_image_pooler.dense", vision[: len(frames)].mean(0))),
            ]
        )

    def matching(self, ids: Tensor, frames: Tensor) -> Tensor:
        return self.linear("itm_score.fc", self.pooled(ids, frames))

    def rank(self, ids: Tensor, frames: Tensor) -> Tensor:
        """[1], the logit of the fine-tuned retrieval head."""
        return self.linear("rank_output", self.pooled(ids, frames))

    def answers(self, ids: Tensor, frames: Tensor) -> Tensor:
        """[answers] logits of VQA."""
        return self.classifier("vqa_classifier", self.pooled(ids, frames))

    def judgement(self, ids: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """[2] logits of NLVR2 for images [3, H, W]; the right one has token type 2."""
        pair = [self.pooled(ids, left[None]), self.pooled(ids, right[None], image_type=2)]
        return self.classifier("nlvr2_classifier", torch.cat(pair))

    def classifier(self, name: str, x: Tensor) -> Tensor:
        hidden = F.gelu(self.norm(f"{name}.1", self.linear(f"{name}.0", x), 1e-5))
        return self.linear(f"{name}.3", hidden)

    def words(self, ids: Tensor, frames: Tensor) -> Tensor:
        hidden = F.gelu(self.linear("mlm_score.transform.dense", self.fused(ids, frames)[0]))
        hidden = self.norm("mlm_score.transform.LayerNorm", hidden, 1e-12)
        return hidden @ self.s["mlm_score.decoder.weight"].T + self.s["mlm_score.bias"]

    def embeddings(self, ids: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        text, vision = self.unimodal(ids, frames)
        projected = []
        for head, x in (("language_proj", text[0]), ("vision_proj", vision[: len(frames)].mean(0))):
            hidden = F.gelu(self.norm(f"{head}.1", self.linear(f"{head}.0", x), 1e-5))
            projected.append(F.normalize(self.linear(f"{head}.3", hidden), dim=-1))
        return projected[0], projected[1]
