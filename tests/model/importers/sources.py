"""State dicts with the names and shapes of each source, filled with noise."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForMaskedLM

from model import GLSCLConfig

Shapes = dict[str, tuple[int, ...]]


def noise(shapes: Shapes, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Noise in the given shapes: around 1 for the weights of norms, around 0 for all else."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        values = 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        is_norm = name.endswith("weight") and len(shape) == 1
        state[name] = (values + 1 if is_norm else values).to(dtype)
    return state


def on_meta(shapes: Shapes) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _modules(names: Iterable[str], rows: int, *columns: int) -> Shapes:
    shapes: Shapes = {}
    for name in names:
        shapes |= {f"{name}.weight": (rows, *columns), f"{name}.bias": (rows,)}
    return shapes


def openai_visual(config: GLSCLConfig, blocks: int, grid: int, prefix: str = "visual.") -> Shapes:
    """OpenAI's vision transformer without its projection."""
    width, wide, side = config.hidden_size, config.intermediate_size, config.patch_size
    shapes: Shapes = {
        f"{prefix}class_embedding": (width,),
        f"{prefix}positional_embedding": (1 + grid * grid, width),
        f"{prefix}conv1.weight": (width, 3, side, side),
        **_modules([f"{prefix}ln_pre", f"{prefix}ln_post"], width),
    }
    for number in range(blocks):
        block = f"{prefix}transformer.resblocks.{number}."
        shapes |= {
            f"{block}attn.in_proj_weight": (3 * width, width),
            f"{block}attn.in_proj_bias": (3 * width,),
        }
        shapes |= _modules([f"{block}attn.out_proj"], width, width)
        shapes |= _modules([f"{block}ln_1", f"{block}ln_2"], width)
        shapes |= _modules([f"{block}mlp.c_fc"], wide, width)
        shapes |= _modules([f"{block}mlp.c_proj"], width, wide)
    return shapes


def openai_clip(config: GLSCLConfig, blocks: int, grid: int) -> Shapes:
    """The whole of OpenAI's CLIP, with a text tower of one block."""
    width = config.hidden_size
    text = {
        "positional_embedding": (7, 8),
        "text_projection": (8, 8),
        "logit_scale": (),
        "token_embedding.weight": (11, 8),
        "ln_final.weight": (8,),
        "transformer.resblocks.0.attn.in_proj_weight": (24, 8),
    }
    return {**openai_visual(config, blocks, grid), "visual.proj": (width, 8), **text}


def roberta(config: GLSCLConfig, **overrides: int) -> RobertaForMaskedLM:
    """transformers' own model in the sizes of ``config``, of noise, in float64."""
    sizes = {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.text_layers,
        "max_position_embeddings": config.max_position_embeddings,
        **overrides,
    }
    theirs = RobertaForMaskedLM(
        RobertaConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            type_vocab_size=1,
            pad_token_id=config.pad_token_id,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            layer_norm_eps=1e-5,
            **sizes,
        )
    )
    theirs = theirs.double().eval()
    shapes = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    theirs.load_state_dict(noise(shapes, seed=3), strict=False)
    return theirs


def released(config: GLSCLConfig, video: bool, token_types: int = 2) -> Shapes:
    """A released pre-training checkpoint in the sizes of ``config``."""
    width, wide = config.hidden_size, config.intermediate_size
    visual = "vision_transformer.visual."
    shapes = openai_visual(config, config.vision_layers, config.image_size // config.patch_size, visual)
    shapes |= (
        {f"{visual}temporal_embed": (1, 8, width)} if video else {f"{visual}visual_mask_token": (1, width)}
    )
    shapes |= {
        "vision_transformer.mask_token": (1, 1, 8),
        "vision_transformer.decoder_pos_embed": (1, 5, 8),
        "vision_transformer.decoder_blocks.0.attn.qkv.weight": (24, 8),
    }
    text = "text_transformer."
    shapes |= {
        f"{text}embeddings.word_embeddings.weight": (config.vocab_size, width),
        f"{text}embeddings.position_embeddings.weight": (config.max_position_embeddings, width),
        f"{text}embeddings.token_type_embeddings.weight": (1, width),
        **_modules([f"{text}embeddings.LayerNorm"], width),
        **_modules([f"{text}pooler.dense"], width, width),
    }
    attention = ("self.query", "self.key", "self.value", "output.dense")
    for number in range(config.text_layers):
        layer = f"{text}encoder.layer.{number}."
        shapes |= _modules([f"{layer}attention.{name}" for name in attention], width, width)
        shapes |= _modules([f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"], width)
        shapes |= _modules([f"{layer}intermediate.dense"], wide, width)
        shapes |= _modules([f"{layer}output.dense"], width, wide)
    for stream in ("text", "image"):
        for number in range(config.fusion_layers):
            layer = f"cross_modal_{stream}_layers.{number}."
            for kind in ("attention", "crossattention"):
                shapes |= _modules([f"{layer}{kind}.{name}" for name in attention], width, width)
                shapes |= _modules([f"{layer}{kind}.output.LayerNorm"], width)
            shapes |= _modules([f"{layer}output.LayerNorm"], width)
            shapes |= _modules([f"{layer}intermediate.dense"], wide, width)
            shapes |= _modules([f"{layer}output.dense"], width, wide)
        shapes |= _modules(
            [f"cross_modal_{stream}_transform", f"cross_modal_{stream}_pooler.dense"], width, width
        )
    for head in ("vision_proj", "language_proj"):
        shapes |= _modules([f"{head}.0"], width, width)
        shapes |= _modules([f"{head}.1"], width)
        shapes |= _modules([f"{head}.3"], config.projection_size, width)
    return shapes | {
        "token_type_embeddings.weight": (token_types, width),
        **_modules(["mlm_score.transform.dense"], width, width),
        **_modules(["mlm_score.transform.LayerNorm"], width),
        "mlm_score.decoder.weight": (config.vocab_size, width),
        "mlm_score.bias": (config.vocab_size,),
        **_modules(["itm_score.fc"], 2, 2 * width),
        "cl_temp": (),
    }


def fine_tuned(config: GLSCLConfig, task: str) -> Shapes:
    """A released checkpoint fine-tuned on ``vqa``, ``nlvr2`` or ``retrieval``: no MLM and no ITM head."""
    width = config.hidden_size
    shapes = released(config, video=False, token_types=3 if task == "nlvr2" else 2)
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith(("mlm_", "itm_"))}
    if task == "retrieval":
        return shapes | _modules(["rank_output"], 1, 2 * width)
    head, inputs, classes = {
        "vqa": ("vqa_classifier", 2 * width, config.num_labels),
        "nlvr2": ("nlvr2_classifier", 4 * width, 2),
    }[task]
    shapes |= _modules([f"{head}.0"], 2 * width, inputs) | _modules([f"{head}.1"], 2 * width)
    return shapes | _modules([f"{head}.3"], classes, 2 * width)


class Tree(nn.Module):
    """A module with given parameters in nested modules, so that it can be saved as TorchScript."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def tree(state: dict[str, Tensor]) -> Tree:
    root = Tree()
    for name, value in state.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, Tree())
            module = module.get_submodule(part)  # type: ignore[assignment]
        if value.is_floating_point():
            module.register_parameter(last, nn.Parameter(value))
        else:
            module.register_buffer(last, value)
    return root
