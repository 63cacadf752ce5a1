"""diffusers' pipelines of SD3 and FLUX at a small width, with random weights, for tests of ours."""

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.test_families_folders import text_encoder
from tests.checkpoint.test_t5 import encoder as t5_encoder
from tests.checkpoint.test_t5 import tokenizer as t5_tokenizer
from tests.comparing.inputs import random_vae

KINDS = ("sd3", "sd35", "sd3_without_t5", "flux_dev", "flux_schnell")
TOKENS, SIDE, CHANNELS = 12, 64, 16  # of T5, pixels, of the latents
WIDTH, POOLED = 96, 24  # of T5's states, of a projected text
SHIFTS = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}


def vae(**settings):
    plain = {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": CHANNELS}
    return random_vae(**{**plain, "scaling_factor": 1.5305, "shift_factor": 0.0609, **settings})


def transformer(kind, standard=False):
    """`standard`: of heads and widths from whose shapes all settings can be told."""
    import diffusers

    common = {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 192 if standard else WIDTH}
    torch.manual_seed(1)
    if kind.startswith("flux"):
        made = diffusers.FluxTransformer2DModel(
            **common,
            in_channels=4 * CHANNELS,
            num_single_layers=2,
            attention_head_dim=32 if standard else 16,
            pooled_projection_dim=64 if standard else 32,
            axes_dims_rope=(4, 14, 14) if standard else (4, 6, 6),
            guidance_embeds=kind == "flux_dev",
        )
    else:
        new = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if kind == "sd35" else {}
        made = diffusers.SD3Transformer2DModel(
            **common,
            **new,
            attention_head_dim=64 if standard else 16,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            caption_projection_dim=128 if standard else 32,
            pooled_projection_dim=192 if standard else 2 * POOLED,
            sample_size=128 if standard else 16,
            pos_embed_max_size=24,
        )
    for name, tensor in made.named_parameters():
        if tensor.ndim > 1:
            tensor.data *= 3 if "norm" in name or "embed" in name else 2
    return made.eval()


def scheduler(kind):
    import diffusers

    if kind == "flux_dev":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **SHIFTS)
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0 if kind == "flux_schnell" else 3.0)


def standard_clip(act, width, projected):
    """A random CLIP with its own vocabulary and heads of 64, as the published ones, and its tokenizer."""
    import transformers

    from ldm.checkpoint.vocabulary import clip_tokenizer

    torch.manual_seed(width)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": width // 64}
    ids = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 0 if act == "gelu" else 49407}
    config = transformers.CLIPTextConfig(
        vocab_size=49408, num_hidden_layers=2, hidden_act=act, projection_dim=width, **sizes, **ids
    )
    made = (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config).eval()
    if projected:
        made.text_projection.weight.data.copy_(torch.eye(width) * (2 if act == "gelu" else 1))  # CLIP-L's is dropped
    return made, clip_tokenizer("!" if act == "gelu" else "<|endoftext|>")


def build_standard(kind):
    """As `build`, of sizes from which single files without settings can be read."""
    import diffusers

    flux = kind.startswith("flux")
    first, tokenizer = standard_clip("quick_gelu", 64, projected=not flux)
    t5, words, network = t5_encoder(192), t5_tokenizer(TOKENS), transformer(kind, standard=True)
    sizes = {"block_out_channels": [32, 32], "norm_num_groups": 32, "sample_size": 1024}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    if flux:
        coder = vae(**sizes, **blocks, scaling_factor=0.3611, shift_factor=0.1159)
        return diffusers.FluxPipeline(scheduler(kind), coder, first, tokenizer, t5, words, network)
    texts = (first, tokenizer, *standard_clip("gelu", 128, projected=True), t5, words)
    return diffusers.StableDiffusion3Pipeline(network, scheduler(kind), vae(**sizes, **blocks), *texts)


def build(kind):
    """diffusers' own pipeline of a kind."""
    import diffusers

    first, tokenizer = text_encoder("quick_gelu", 32, 2, projected=not kind.startswith("flux"))
    t5, t5_words = (None, None) if kind == "sd3_without_t5" else (t5_encoder(WIDTH), t5_tokenizer(TOKENS))
    if kind.startswith("flux"):
        made = diffusers.FluxPipeline(scheduler(kind), vae(), first, tokenizer, t5, t5_words, transformer(kind))
    else:
        second, tokenizer_2 = text_encoder("gelu", 48, 3, projected=True)
        tokenizer_2.pad_token = "!"
        texts = (first, tokenizer, second, tokenizer_2, t5, t5_words)
        made = diffusers.StableDiffusion3Pipeline(transformer(kind), scheduler(kind), vae(), *texts)
    made.set_progress_bar_config(disable=True)
    return made


def inside(file, prefix):
    """A file's tensors whose names begin like this, without that beginning."""
    return {key.removeprefix(prefix): tensor for key, tensor in load_file(file).items() if key.startswith(prefix)}


def written_apart(whole, folder, root):
    """(transformer, VAE, [CLIP-L, T5, the tokenizer's folder]) of a single file of FLUX, as people have them."""
    prefixes = {"flux1-dev": "model.diffusion_model.", "ae": "vae."}
    prefixes |= {"clip_l": "text_encoders.clip_l.transformer.", "t5xxl_fp16": "text_encoders.t5xxl.transformer."}
    for name, prefix in prefixes.items():
        save_file(inside(whole, prefix), root / f"{name}.safetensors")
    flux, vae, clip, t5 = (root / f"{name}.safetensors" for name in prefixes)
    return flux, vae, [clip, t5, folder / "tokenizer_2"]


def packed(latents):
    """Latents (B, C, h, w) as FluxPipeline takes them, with its packing written out: (B, h w / 4, 4 C)."""
    height, width = latents.shape[-2:]
    squares = [latents[:, :, i : i + 2, j : j + 2] for i in range(0, height, 2) for j in range(0, width, 2)]
    return torch.stack([square.flatten(1) for square in squares], dim=1)
