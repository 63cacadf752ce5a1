"""SD3 and FLUX in files without settings: which one it is, and every setting, told by names and shapes. No torch.

Sources of what shapes do not tell: the config.json files of stable-diffusion-3-medium, 3.5-large and FLUX.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ldm.checkpoint.families import CLIP, VAE
from ldm.checkpoint.single import leftovers
from ldm.checkpoint.single.names import FLUX_VAE, UNET, flow_texts, text_prefix
from ldm.checkpoint.single.names import VAE as SD_VAE
from ldm.checkpoint.single.vae_sizes import vae_sizes
from ldm.errors import ModelError
from ldm.nn.mmdit_config import FLUX, SD3

Shapes = Mapping[str, tuple[int, ...]]
HEAD = 64  # channels of a head, in SD3 without norms of queries and keys, and in CLIP
SAMPLE_SIZE = 128  # latents of a side in the training of SD3
OTHERS = {  # a part of a name -> a relative of FLUX with other blocks
    "distilled_guidance_layer.": "Chroma",
    "double_stream_modulation_img.": "FLUX.2",
    "individual_token_refiner.": "HunyuanVideo",
    "controlnet_": "a ControlNet of FLUX",
    "pos_embed_input.": "a ControlNet of SD3",
}
NAMED_ALIKE = "holds a flow transformer alone, by diffusers' names"
NOISE = {  # shifts of the noise levels: SD3's, FLUX.1-dev's (which depends on the size), FLUX.1-schnell's
    "sd3": {"shift": 3.0},
    "dev": {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
    "schnell": {"shift": 1.0},
}
NOISE["dev"] |= {"base_image_seq_len": 256, "max_image_seq_len": 4096}
LATENTS = {True: {"scaling_factor": 0.3611, "shift_factor": 0.1159}}  # of FLUX's VAE
LATENTS[False] = {"scaling_factor": 1.5305, "shift_factor": 0.0609}  # of SD3's
SIXTEEN = {**VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": True}
PADS = {"clip_l": "<|endoftext|>", "clip_g": "!"}


def flow_configs(shapes: Shapes, where: object) -> dict[str, dict[str, Any]] | None:
    """Component -> config.json of SD3 or FLUX by its original names, of the text encoders those that are there.

    The VAE's is there without its tensors too. None where the file is neither. Raises ModelError for their relatives,
    for quantised weights and for a transformer that is not whole.
    """
    prefix = UNET if any(key.startswith(UNET) for key in shapes) else ""
    inside = {key[len(prefix) :]: shape for key, shape in shapes.items() if key.startswith(prefix)}
    flux = any(key.startswith("double_blocks.0.") for key in inside)
    if not flux and not any(key.startswith("joint_blocks.0.") for key in inside):
        if any(
            re.match(r"(transformer\.)?(single_)?transformer_blocks\.0\.attn\.add_q_proj\.w", key) for key in inside
        ):
            raise ModelError(NAMED_ALIKE, where=where, hint="give the model's folder")
        return None
    if other := next((name for mark, name in OTHERS.items() if any(mark in key for key in inside)), None):
        raise ModelError(f"is {other}, which is not supported", where=where)
    leftovers.check_quantised(tuple(shapes), where)
    try:
        transformer = _flux(inside) if flux else _sd3(inside)
    except (LookupError, ValueError) as error:
        what = f"its transformer ({'FLUX' if flux else 'Stable Diffusion 3'}) is not whole: no {error}"
        raise ModelError(what, where=where, hint="get the file again") from None
    kind = "sd3" if not flux else "dev" if transformer["guidance_embeds"] else "schnell"
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, **NOISE[kind]}
    configs = {"transformer": transformer, "vae": _vae(shapes, flux, where), "scheduler": scheduler}
    for part, short in flow_texts(flux).items():
        of_part = {key.removeprefix(text_prefix(short)): shape for key, shape in shapes.items() if f".{short}." in key}
        if found := text_config(of_part, where):
            configs[part] = for_flow(found, short, flux)
    return configs


def _flux(shapes: Shapes) -> dict[str, Any]:
    head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    axes = (head // 8, head * 7 // 16, head * 7 // 16)
    if sum(axes) != head or any(axis % 2 for axis in axes):
        raise ValueError(f"positions for heads of {head} channels")
    return {
        "_class_name": FLUX,
        "patch_size": 1,
        "in_channels": shapes["img_in.weight"][1],
        "out_channels": shapes["final_layer.linear.weight"][0],
        "num_layers": _count("double_blocks", shapes),
        "num_single_layers": _count("single_blocks", shapes),
        "attention_head_dim": head,
        "num_attention_heads": shapes["img_in.weight"][0] // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": list(axes),
    }


def _sd3(shapes: Shapes) -> dict[str, Any]:
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    head = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight", (HEAD,))[0]
    layers = _count("joint_blocks", shapes)
    return {
        "_class_name": SD3,
        "sample_size": SAMPLE_SIZE,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "num_layers": layers,
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": width,
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": round(shapes["pos_embed"][1] ** 0.5),
        "dual_attention_layers": [i for i in range(layers) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes],
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in shapes else None,
    }


def _count(stem: str, shapes: Shapes) -> int:
    """How many blocks there are."""
    return len({key.split(".")[1] for key in shapes if key.startswith(f"{stem}.")})


def _vae(shapes: Shapes, flux: bool, where: object) -> dict[str, Any]:
    """The settings of the autoencoder in the file; without one those that the family's has."""
    for prefix in (SD_VAE, FLUX_VAE):
        inside = {key[len(prefix) :]: shape for key, shape in shapes.items() if key.startswith(prefix)}
        if inside:
            return {**vae_sizes(inside, where), **LATENTS[flux], "force_upcast": True}
    return {**SIXTEEN, **LATENTS[flux]}


def text_config(shapes: Shapes, where: object) -> dict[str, Any] | None:
    """config.json of the CLIP or T5 text encoder with these tensors (transformers' names); None where it is neither.

    CLIP's lacks what `for_flow` adds. Raises ModelError for one that is not whole.
    """
    try:
        if "shared.weight" in shapes or "encoder.embed_tokens.weight" in shapes:
            return _t5(shapes)
        return _clip(shapes) if "text_model.embeddings.token_embedding.weight" in shapes else None
    except LookupError as error:
        raise ModelError(
            f"its text encoder is not whole (no {error})", where=where, hint="get the file again"
        ) from None


def _clip(shapes: Shapes) -> dict[str, Any]:
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    return {
        **CLIP,
        "vocab_size": vocabulary,
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _layers(shapes, "text_model.encoder.layers."),
        "num_attention_heads": max(width // HEAD, 1),
        "projection_dim": shapes.get("text_projection.weight", (width,))[0],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def for_flow(config: Mapping[str, Any], short: str, flux: bool) -> dict[str, Any]:
    """The config of a text encoder as FLUX or SD3 uses it: as `clip_l`, `clip_g` or `t5xxl`."""
    if short == "t5xxl":
        return dict(config)
    kind = "CLIPTextModel" if flux else "CLIPTextModelWithProjection"
    small = short == "clip_l"
    own = {} if "hidden_act" in config else {"hidden_act": "quick_gelu" if small else "gelu"}
    own |= {} if "pad_token_id" in config else {"pad_token_id": config["eos_token_id"] if small else 0}
    return {**config, **own, "architectures": [kind]}


def _t5(shapes: Shapes) -> dict[str, Any]:
    vocabulary, width = shapes.get("shared.weight") or shapes["encoder.embed_tokens.weight"]
    first = "encoder.block.0.layer"
    buckets, heads = shapes[f"{first}.0.SelfAttention.relative_attention_bias.weight"]
    gated = f"{first}.1.DenseReluDense.wi_0.weight" in shapes
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_model": width,
        "d_kv": shapes[f"{first}.0.SelfAttention.q.weight"][0] // heads,
        "d_ff": shapes[f"{first}.1.DenseReluDense.wi{'_0' * gated}.weight"][0],
        "num_layers": _layers(shapes, "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "vocab_size": vocabulary,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "layer_norm_epsilon": 1e-6,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "is_encoder_decoder": False,
    }


def _layers(shapes: Shapes, stem: str) -> int:
    return len({key[len(stem) :].split(".")[0] for key in shapes if key.startswith(stem)})
