"""The families of Stable Diffusion and their settings, as in diffusers' folders; recognised by names and shapes.

Nothing here imports torch or reads a file. Sources: the config.json files of stable-diffusion-v1-5,
stable-diffusion-2-1 (and -base), stable-diffusion-xl-base-1.0 and the inpainting models of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ldm.errors import ModelError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """What all models of one family have in common; configs are those of diffusers and transformers."""

    name: str  # sd1, sd2, xl, each with -inpainting where the U-Net takes 9 channels
    title: str
    unet: Config
    vae: Config
    text: Mapping[str, Config]  # component (text_encoder, text_encoder_2) -> its config
    pads: Mapping[str, str]  # component -> the token that its tokenizer pads with
    resolution: int  # pixels of a side
    prediction_type: str | None = "epsilon"  # of a file that does not name it; None: a file must name it

    @property
    def inpainting(self) -> bool:
        return self.unet["in_channels"] == 9

    def configs(self, prediction_type: str, zero_snr: bool = False) -> dict[str, Config]:
        """Component -> settings, `scheduler` included, of a model with this prediction type.

        `zero_snr`: trained down to pure noise, which needs trailing spacing (Lin et al. 2024).
        """
        size, spacing = self.resolution, "trailing" if zero_snr else "leading"
        if self.name == "sd2" and prediction_type == "v_prediction":
            size = 768
        noise = {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr, "timestep_spacing": spacing}
        return {
            "unet": {**self.unet, "sample_size": size // 8},
            "vae": {**self.vae, "sample_size": size},
            **self.text,
            "scheduler": {**SCHEDULER, **noise},
        }


SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
UNET = {  # of 1.x
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention_head_dim": 8,  # the number of heads
    "cross_attention_dim": 768,
    "norm_num_groups": 32,
}
UNET_2 = {**UNET, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
UNET_XL = {
    **UNET_2,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "scaling_factor": 0.18215,
}
VAE_XL = {**VAE, "scaling_factor": 0.13025, "force_upcast": True}
CLIP = {  # what all of them share
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "layer_norm_eps": 1e-05,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}


def _clip(width: int, layers: int, heads: int, activation: str, projection: int, pad: int, **more: Any) -> Config:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "hidden_act": activation, "projection_dim": projection}
    return {**CLIP, **sizes, "pad_token_id": pad, **more}


CLIP_L = _clip(768, 12, 12, "quick_gelu", 768, pad=49407)  # OpenAI's ViT-L/14
OPEN_CLIP_H = _clip(1024, 23, 16, "gelu", 512, pad=0)  # without the last of its 24 layers, which 2.x does not use
OPEN_CLIP_G = _clip(1280, 32, 20, "gelu", 1280, pad=0, architectures=["CLIPTextModelWithProjection"])
END, MARK = "<|endoftext|>", "!"

SD1 = Family("sd1", "Stable Diffusion 1.x", UNET, VAE, {"text_encoder": CLIP_L}, {"text_encoder": END}, 512)
SD2 = Family(
    "sd2", "Stable Diffusion 2.x", UNET_2, VAE, {"text_encoder": OPEN_CLIP_H}, {"text_encoder": MARK}, 512, None
)
XL = Family(
    "xl",
    "Stable Diffusion XL",
    UNET_XL,
    VAE_XL,
    {"text_encoder": CLIP_L, "text_encoder_2": OPEN_CLIP_G},
    {"text_encoder": END, "text_encoder_2": MARK},
    1024,
)


def _inpainting(family: Family) -> Family:
    """The same family with a U-Net that also sees the mask and the masked image."""
    unet = {**family.unet, "in_channels": 9}
    return replace(family, name=f"{family.name}-inpainting", title=f"{family.title} inpainting", unet=unet)


FAMILIES = {f.name: f for base in (SD1, SD2, XL) for f in (base, _inpainting(base))}
CONV_IN = ("input_blocks.0.0.weight", "conv_in.weight")  # of the original code, of diffusers
WHOLE = ("model.diffusion_model.", "unet.", "")  # what stands before the U-Net's names
OTHERS = {  # a part of a name -> what has such names and is none of these
    "lora": "a LoRA, which goes with a model (--lora)",
    "control_model.": "a ControlNet, which goes with a model (--controlnet)",
    "controlnet_cond_embedding.": "a ControlNet, which goes with a model (--controlnet)",
    "ip_adapter.": "an IP-Adapter, which goes with a model (--ip-adapter)",
    "adapter.body.": "a T2I-Adapter, which goes with a model (--controlnet)",
    "joint_blocks.": "a flow transformer of Stable Diffusion 3, which has no U-Net",
    "double_blocks.": "a flow transformer of FLUX, which has no U-Net",
    "emb_params": "a textual inversion, which is not supported",
    "motion_modules.": "AnimateDiff, which is not supported",
    "edm_mean": "Playground 2.5, which is not supported",
    "edm_vpred.": "CosXL, which is not supported",
}
ROOTS = ("alphas_cumprod", "one_minus_alphas_cumprod", "recip_alphas_cumprod", "recipm1_alphas_cumprod")
SCHEDULE_BUFFERS = {  # of the noise schedule, in old files of whole models: computed from its settings instead
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "log_one_minus_alphas_cumprod", "lvlb_weights", "logvar"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    *("scale_factor", "denoiser.sigmas", *(f"sqrt_{name}" for name in ROOTS)),
}
CHANNELS = {5: "a depth model", 7: "an upscaler", 8: "InstructPix2Pix"}


def family_of(shapes: Mapping[str, tuple[int, ...]], where: object = None) -> Family:
    """The family of a model, by its tensors' names (the original ones or diffusers') and shapes.

    The tensors may be the U-Net's alone. Raises ModelError that says what else they are.
    """
    for mark, name in OTHERS.items():
        if any(mark in key for key in shapes):
            raise ModelError(f"is {name}", where=where)
    conv = next((shapes[prefix + name] for prefix in WHOLE for name in CONV_IN if prefix + name in shapes), None)
    keys = (shape for key, shape in shapes.items() if key.endswith("attn2.to_k.weight"))
    width = next((shape[1] for shape in keys if len(shape) == 2), None)
    if conv is None or width is None or len(conv) != 4:
        raise ModelError("holds no U-Net of Stable Diffusion 1.x, 2.x or XL", where=where)
    of_width = [family for family in FAMILIES.values() if family.unet["cross_attention_dim"] == width]
    match = next((family for family in of_width if family.unet["in_channels"] == conv[1]), None)
    if match and conv[0] == match.unet["block_out_channels"][0]:
        return match
    if width == 1280 and conv[0] == 384:
        raise ModelError("is the XL refiner, which is not supported", where=where)
    if of_width and conv[1] in CHANNELS:
        raise ModelError(f"is {CHANNELS[conv[1]]}, which is not supported", where=where)
    what = f"the U-Net (text of width {width}, {conv[1]} channels in, first layer of {conv[0]})"
    raise ModelError(f"{what} is of no known family", where=where, hint="convert it from its diffusers folder")
