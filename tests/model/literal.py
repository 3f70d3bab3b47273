"""GLSCL's losses as their description reads: one sample, one pass, one objective at a time.

Slow on purpose and independent of ``model/``'s code: texts are never padded, attention is spelt out, frames
and samples are loops. It only shares the parameters (by name) with the model under test.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GLSCLConfig
from tests.model.small import Batch


class Literal:
    """The model as a set of formulas over named parameters."""

    def __init__(self, config: GLSCLConfig, parameters: Mapping[str, Tensor]) -> None:
        self.c = config
        self.p = parameters

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.p[f"{name}.weight"].T
        return y + self.p[f"{name}.bias"] if f"{name}.bias" in self.p else y

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)
        return scaled * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def attention(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
        heads, out = self.c.num_attention_heads, []
        size = q.shape[-1] // heads
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = q[:, part] @ k[:, part].T / size**0.5
            if allowed is not None:
                scores = scores.masked_fill(~allowed, -torch.inf)
            out.append(torch.softmax(scores, -1) @ v[:, part])
        return torch.cat(out, -1)

    def text(self, ids: Tensor) -> Tensor:
        """Tokens [n] without padding -> [n, D]."""
        root = "glscl.text_encoder.roberta"
        x = self.p[f"{root}.embeddings.word_embeddings.weight"][ids]
        positions = torch.arange(len(ids)) + self.c.pad_token_id + 1
        x = x + self.p[f"{root}.embeddings.position_embeddings.weight"][positions]
        x = x + self.p[f"{root}.embeddings.token_type_embeddings.weight"][0]
        x = self.norm(f"{root}.embeddings.LayerNorm", x, 1e-5)
        for i in range(self.c.text_layers):
            name = f"{root}.encoder.layer.{i}"
            q, k, v = (self.linear(f"{name}.attention.self.{n}", x) for n in ("query", "key", "value"))
            attended = self.linear(f"{name}.attention.output.dense", self.attention(q, k, v))
            x = self.norm(f"{name}.attention.output.LayerNorm", x + attended, 1e-5)
            hidden = F.gelu(self.linear(f"{name}.intermediate.dense", x))
            x = self.norm(f"{name}.output.LayerNorm", x + self.linear(f"{name}.output.dense", hidden), 1e-5)
        return self.linear("glscl.text_transform", x)

    def vision(self, frames: Tensor, kept: Tensor | None = None, replaced: Tensor | None = None) -> Tensor:
        """Frames [F, 3, H, W] -> [F + F*P', D], class tokens first."""
        root, side = "glscl.vision_encoder", self.c.patch_size
        grid = self.c.image_size // side
        mean, std = (
            torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (self.c.image_mean, self.c.image_std)
        )
        tokens, owner = [], []
        for f, frame in enumerate(frames):
            picture = (frame.double() / 255 - mean) / std
            rows = [self.p[f"{root}.class_embedding"] + self.p[f"{root}.position_embedding"][0]]
            for place in range(grid * grid):
                if kept is not None and place not in kept:
                    continue
                y, x = divmod(place, grid)
                patch = picture[:, y * side : (y + 1) * side, x * side : (x + 1) * side].flatten()
                embedded = self.linear(f"{root}.patch_embedding", patch)
                if replaced is not None and place in replaced:
                    embedded = self.p[f"{root}.mask_token"]
                rows.append(embedded + self.p[f"{root}.position_embedding"][1 + place])
            if len(frames) > 1:
                rows = [row + self.p[f"{root}.temporal_embedding"][f] for row in rows]
            tokens += rows
            owner += [f] * len(rows)
        x, owner_of = torch.stack(tokens), torch.tensor(owner)
        per_frame = len(tokens) // len(frames)
        is_class = torch.arange(len(tokens)) % per_frame == 0
        allowed = (owner_of[:, None] == owner_of[None]) | is_class[:, None]
        x = self.norm(f"{root}.ln_pre", x, 1e-5)
        for i in range(self.c.vision_layers):
            name = f"{root}.blocks.{i}"
            q, k, v = self.linear(f"{name}.qkv", self.norm(f"{name}.ln_1", x, 1e-5)).chunk(3, -1)
            x = x + self.linear(f"{name}.out_proj", self.attention(q, k, v, allowed))
            hidden = self.linear(f"{name}.fc", self.norm(f"{name}.ln_2", x, 1e-5))
            x = x + self.linear(f"{name}.proj", hidden * torch.sigmoid(1.702 * hidden))
        x = self.norm(f"{root}.ln_post", x, 1e-5)
        return self.linear("glscl.vision_transform", torch.cat([x[is_class], x[~is_class]]))

    def fuse(self, text: Tensor, vision: Tensor) -> tuple[Tensor, Tensor]:
        types = self.p["glscl.token_type_embedding.weight"]
        text, vision = text + types[0], vision + types[1]
        for i in range(self.c.fusion_layers):
            text, vision = self.co_layer("text", i, text, vision), self.co_layer("vision", i, vision, text)
        return text, vision

    def co_layer(self, stream: str, i: int, x: Tensor, other: Tensor) -> Tensor:
        eps, root = 1e-12, f"glscl.fusion.{stream}_stream"
        name = f"{root}.self_attention.{i}"
        k, v = self.linear(f"{name}.key_value", x).chunk(2, -1)
        attended = self.attention(self.linear(f"{name}.query", x), k, v)
        x = self.norm(f"{name}.norm", x + self.linear(f"{name}.output", attended), eps)
        name = f"{root}.cross_attention.{i}"
        k, v = self.linear(f"{name}.key_value", other).chunk(2, -1)
        attended = self.attention(self.linear(f"{name}.query", x), k, v)
        x = self.norm(f"{name}.norm", x + self.linear(f"{name}.output", attended), eps)
        hidden = F.gelu(self.linear(f"{name}.intermediate", x))
        return self.norm(f"{name}.feed_forward_norm", x + self.linear(f"{name}.feed_forward", hidden), eps)

    def both_ways(self, first: list[Tensor], second: list[Tensor], temperature: Tensor | float) -> Tensor:
        """InfoNCE, both directions summed; zero without rows."""
        if not first:
            return torch.zeros((), dtype=torch.float64)
        a, b = torch.stack(first), torch.stack(second)
        a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
        sims = a @ b.T / temperature
        there = -torch.log_softmax(sims, 1).diagonal().mean()
        return there - torch.log_softmax(sims, 0).diagonal().mean()

    def losses(self, batch: Batch, group_size: int) -> dict[str, Tensor]:
        frames = batch.pixel_values.shape[1]
        samples = [i for i in range(len(batch.valid)) if batch.valid[i]]
        lengths = batch.attention_mask.sum(1).tolist()
        m = batch.masks

        def text(ids: Tensor, i: int) -> Tensor:
            return self.text(ids[i, : lengths[i]])

        losses = {"itc": self.itc(batch, samples, text), "itm": torch.zeros((), dtype=torch.float64)}
        losses["mlm"] = losses["itm"]
        if samples:
            scores = []
            for i in samples:
                fused = self.fuse(text(batch.input_ids, i), self.vision(batch.pixel_values[m.itm_partner[i]]))
                pooled = [
                    torch.tanh(self.linear("glscl.text_pooler.dense", fused[0][0])),
                    torch.tanh(self.linear("glscl.vision_pooler.dense", fused[1][:frames].mean(0))),
                ]
                logits = self.linear("matching_head.classifier", torch.cat(pooled))
                scores.append(-torch.log_softmax(logits, 0)[m.itm_labels[i]])
            losses["itm"] = torch.stack(scores).mean()
        words = []
        for i in samples:
            fused = self.fuse(text(m.mlm_input_ids, i), self.vision(batch.pixel_values[i]))[0]
            for t in range(lengths[i]):
                if m.mlm_labels[i, t] >= 0:
                    hidden = F.gelu(self.linear("language_head.dense", fused[t]))
                    logits = self.linear(
                        "language_head.decoder", self.norm("language_head.norm", hidden, 1e-12)
                    )
                    words.append(-torch.log_softmax(logits, 0)[m.mlm_labels[i, t]])
        if words:
            losses["mlm"] = torch.stack(words).mean()
        losses["mgsc"], losses["mltc"] = self.completion(batch, samples, text, group_size)
        return losses

    def itc(self, batch: Batch, samples: list[int], text) -> Tensor:  # type: ignore[no-untyped-def]
        frames = batch.pixel_values.shape[1]

        def project(name: str, x: Tensor) -> Tensor:
            hidden = self.norm(f"{name}.norm", self.linear(f"{name}.dense", x), 1e-5)
            return self.linear(f"{name}.out", F.gelu(hidden))

        texts = [project("text_projection", text(batch.input_ids, i)[0]) for i in samples]
        visions = [
            project("vision_projection", self.vision(batch.pixel_values[i])[:frames].mean(0)) for i in samples
        ]
        return self.both_ways(texts, visions, self.p["temperature.value"])

    def completion(self, batch: Batch, samples: list[int], text, group_size: int) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        m, frames, patches = batch.masks, batch.pixel_values.shape[1], self.c.num_patches
        temperature = self.c.completion_temperature
        a, b, c = {}, {}, {}
        for i in samples:
            complete, pixels = text(batch.input_ids, i), batch.pixel_values[i]
            a[i] = self.fuse(complete, self.vision(pixels, kept=m.kept_patches[i]))
            b[i] = self.fuse(text(m.completion_input_ids, i), self.vision(pixels))
            c[i] = self.fuse(complete, self.vision(pixels, replaced=m.replaced_patches[i]))[1]
        mgsc = self.both_ways(
            [b[i][0][0] for i in samples], [a[i][0][0].detach() for i in samples], temperature
        )
        for f in range(frames):
            of_frame = self.both_ways(
                [a[i][1][f] for i in samples], [b[i][1][f].detach() for i in samples], temperature
            )
            mgsc = mgsc + of_frame / frames
        if frames > 1 and not self.c.mltc_on_video:
            return mgsc, torch.zeros((), dtype=torch.float64)
        masked = [
            (i, t)
            for i in samples
            for t in range(len(m.completion_positions[i]))
            if m.completion_positions[i, t]
        ]
        mltc = self.both_ways(
            [b[i][0][t] for i, t in masked], [a[i][0][t].detach() for i, t in masked], temperature
        )
        weighted, tokens = torch.zeros((), dtype=torch.float64), 0
        for start in range(0, len(batch.valid), group_size):
            rows = [
                (i, frames + f * patches + int(place))
                for i in range(start, start + group_size)
                if i in samples
                for f in range(frames)
                for place in m.replaced_patches[i]
            ]
            term = self.both_ways(
                [c[i][r] for i, r in rows], [b[i][1][r].detach() for i, r in rows], temperature
            )
            weighted, tokens = weighted + term * len(rows), tokens + len(rows)
        return mgsc, mltc + weighted / max(tokens, 1)
