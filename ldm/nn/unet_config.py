"""The settings of the U-Net, and their way from and to diffusers' config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ldm.errors import ConfigError, ModelError, nearest

# What UNet2DConditionModel can do beside this, and the one value of each that is supported: its default.
FIXED: dict[str, Any] = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
}
# What diffusers assumes where a config.json says nothing.
DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 1280,
    "use_linear_projection": False,
    "upcast_attention": False,
    "norm_num_groups": 32,
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
    "time_cond_proj_dim": None,
}
SAME = (  # of the same name and meaning on both sides
    "sample_size",
    "in_channels",
    "out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "norm_num_groups",
    "addition_embed_type",
    "addition_embed_type_num_heads",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    "time_cond_proj_dim",
)
DOWN, CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"


@dataclass(frozen=True)
class UNetConfig:
    """Stable Diffusion 1.5 unless told otherwise. Raises ConfigError for values that contradict each other."""

    in_channels: int = 4  # 9 for inpainting: latents, mask, latents of the masked image
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # per level, from the highest resolution down
    layers_per_block: int = 2  # resnets per level on the way down; one more on the way up
    transformer_layers: tuple[int, ...] = (1, 1, 1, 0)  # per level; 0 = no attention (XL: 0, 2, 10)
    mid_transformer_layers: int = 1  # in the middle, with the last level's number of heads (XL: 10)
    num_heads: tuple[int, ...] = (8, 8, 8, 8)  # per level; diffusers calls this attention_head_dim
    cross_attention_dim: int = 768  # D, the width of the text's states
    use_linear_projection: bool = False  # proj_in, proj_out: 1x1 convolution (1.x) or linear (2.x, XL)
    norm_num_groups: int = 32
    addition_embed_type: str | None = None  # added to the time embedding: "text_time" (XL), "text" (states, pooled)
    addition_embed_type_num_heads: int = 64  # heads of the pooling of "text"
    addition_time_embed_dim: int | None = None  # "text_time": width of each of the six sizes (XL: 256)
    projection_class_embeddings_input_dim: int | None = None  # "text_time": 6 * that + pooled width (XL: 2816)
    time_cond_proj_dim: int | None = None  # LCM: width of the guidance scale's embedding, an input beside the timestep
    upcast_attention: bool = False  # kept for other programs: softmax sums in fp32 here in any case
    sample_size: int | None = None  # latent height and width it was trained for; diffusers' default image size

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for field in ("transformer_layers", "num_heads"):
            if len(getattr(self, field)) != levels:
                raise ConfigError(f"{field} has {len(getattr(self, field))} levels, block_out_channels {levels}")
        self._check_positive()
        for level, width in enumerate(self.block_out_channels):
            if width % self.norm_num_groups:
                what = f"{width} is not a multiple of norm_num_groups {self.norm_num_groups}"
                raise ConfigError(f"block_out_channels: {what}")
            attends = self.transformer_layers[level] or level == levels - 1  # the middle has the last level's heads
            if attends and width % self.num_heads[level]:
                raise ConfigError(f"block_out_channels: {width} is not a multiple of num_heads {self.num_heads[level]}")
        if self.transformer_layers[-1] not in (0, self.mid_transformer_layers):
            raise ConfigError("mid_transformer_layers has to equal the last of transformer_layers where that is not 0")
        told = self.time_cond_proj_dim
        if told is not None and (told < 4 or told % 2):
            raise ConfigError(f"time_cond_proj_dim has to be an even number from 4 on, got {told}")
        if self.addition_embed_type is not None:
            self._check_addition(self.addition_embed_type)

    def _check_positive(self) -> None:
        for field in ("in_channels", "out_channels", "layers_per_block", "mid_transformer_layers", "norm_num_groups"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} has to be at least 1, got {getattr(self, field)}")
        if not self.block_out_channels or min(*self.block_out_channels, *self.num_heads, self.cross_attention_dim) < 1:
            raise ConfigError("block_out_channels, num_heads and cross_attention_dim have to be at least 1")
        if min(self.transformer_layers) < 0:
            raise ConfigError(f"transformer_layers must not be negative, got {self.transformer_layers}")

    def _check_addition(self, kind: str) -> None:
        heads, width, known = self.addition_embed_type_num_heads, self.cross_attention_dim, ("text", "text_time")
        if kind not in known:
            raise ConfigError(f"addition_embed_type '{kind}' is not supported", hint=nearest(kind, known))
        if kind == "text" and (heads < 1 or width % heads):
            raise ConfigError(f"cross_attention_dim {width} is not a multiple of addition_embed_type_num_heads {heads}")
        needed = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
        if kind == "text_time" and not all(getattr(self, field) for field in needed):
            raise ConfigError(f"addition_embed_type 'text_time' needs {' and '.join(needed)}")

    @property
    def text_width(self) -> int:
        """Of the text's states."""
        return self.cross_attention_dim

    @property
    def pooled_width(self) -> int | None:
        """Of the pooled text; None where it is no input."""
        if self.addition_embed_type != "text_time":
            return None
        return (self.projection_class_embeddings_input_dim or 0) - 6 * (self.addition_time_embed_dim or 0)

    @property
    def takes_sizes(self) -> bool:
        """Whether original size, crop and target size are inputs (XL)."""
        return self.addition_embed_type == "text_time"

    @property
    def embeds_guidance(self) -> bool:
        """Whether the scale of the guidance is an input."""
        return self.time_cond_proj_dim is not None

    @property
    def attention_levels(self) -> tuple[str, ...]:
        """Where there is self-attention, in the order of the network: down.0, …, mid, up.0, …"""
        down = self.transformer_layers
        sides = [[f"{side}.{i}" for i, n in enumerate(c) if n] for side, c in (("down", down), ("up", down[::-1]))]
        return (*sides[0], "mid", *sides[1])

    def check_attention_layers(self, names: Iterable[str]) -> None:
        """Raise ConfigError for a name that is none of `attention_levels`."""
        for name in set(names).difference(self.attention_levels):
            hint = f"choose from: {', '.join(self.attention_levels)}"
            raise ConfigError(f"no self-attention in {name!r:.80} of this model", where="pag_layers", hint=hint)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any], where: object = None) -> UNetConfig:
        """From the config.json of a UNet2DConditionModel.

        Raises ModelError that names every setting whose value is not supported, ConfigError for contradictions.
        """
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        read = {**DEFAULTS, **given}
        wrong = [key for key, value in given.items() if key in FIXED and value != FIXED[key] and (value or FIXED[key])]
        wrong += [key for key, value in given.items() if key not in FIXED and key not in DEFAULTS and value]
        down, up, levels = list(read["down_block_types"]), list(read["up_block_types"]), len(read["block_out_channels"])
        wrong += ["down_block_types"] * (len(down) != levels or not set(down) <= {DOWN, CROSS_DOWN})
        wrong += ["up_block_types"] * (up != _mirrored(down))
        wrong += ["addition_embed_type"] * (read["addition_embed_type"] not in (None, "text", "text_time"))
        for key in ("layers_per_block", "cross_attention_dim", "sample_size"):
            read[key] = _one_value(read[key])
            wrong += [key] * isinstance(read[key], (list, tuple))
        layers = _per_level(read["transformer_layers_per_block"], levels)
        wrong += ["transformer_layers_per_block"] * any(not isinstance(count, int) for count in layers)
        if wrong:
            values = ", ".join(f"{key} = {read[key]!r}" for key in wrong)
            raise ModelError(f"the U-Net has settings that are not supported: {values}", where=where)
        return cls(
            block_out_channels=tuple(read["block_out_channels"]),
            transformer_layers=tuple(count if kind == CROSS_DOWN else 0 for count, kind in zip(layers, down)),
            mid_transformer_layers=layers[-1],
            num_heads=_per_level(read["attention_head_dim"], levels),
            use_linear_projection=bool(read["use_linear_projection"]),
            upcast_attention=bool(read["upcast_attention"]),
            **{key: read[key] for key in SAME},
        )

    def to_diffusers(self) -> dict[str, Any]:
        """The config.json of a UNet2DConditionModel with the same weights."""
        down = [CROSS_DOWN if layers else DOWN for layers in self.transformer_layers]
        layers = [layers or 1 for layers in self.transformer_layers[:-1]] + [self.mid_transformer_layers]
        return {
            "_class_name": "UNet2DConditionModel",
            **FIXED,
            **{key: getattr(self, key) for key in SAME},
            "use_linear_projection": self.use_linear_projection,
            "upcast_attention": self.upcast_attention,
            "block_out_channels": list(self.block_out_channels),
            "down_block_types": down,
            "up_block_types": _mirrored(down),
            "transformer_layers_per_block": _one_value(layers),
            "attention_head_dim": _one_value(list(self.num_heads)),
        }


def _mirrored(down: list[str]) -> list[str]:
    return [str(kind).replace("Down", "Up") for kind in reversed(down)]


def _one_value(value: Any) -> Any:
    """[8, 8, 8] -> 8; all else as it is."""
    return value[0] if isinstance(value, (list, tuple)) and len(set(map(str, value))) == 1 else value


def _per_level(value: Any, levels: int) -> tuple:
    return (value,) * levels if isinstance(value, int) else tuple(value)
