"""The settings of the flow transformers SD3, SD3.5 and FLUX.1, and their way from and to diffusers' config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm.errors import ConfigError, ModelError, nearest

SD3, FLUX = "SD3Transformer2DModel", "FluxTransformer2DModel"
PACK = 2  # FLUX: its files count the channels of PACK x PACK latents that are packed into one token
# What diffusers assumes where a config.json says nothing.
DEFAULTS: dict[str, dict[str, Any]] = {
    SD3: {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 18,
        "attention_head_dim": 64,
        "num_attention_heads": 18,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1152,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 96,
        "dual_attention_layers": (),
        "qk_norm": None,
    },
    FLUX: {
        "patch_size": 1,
        "in_channels": 64,
        "out_channels": None,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": False,
        "axes_dims_rope": (16, 56, 56),
    },
}
SAME = (  # of the same name and meaning in both families' files and here
    "num_layers",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "pooled_projection_dim",
)
POSITIVE = (*SAME, "in_channels", "out_channels", "patch_size")


@dataclass(frozen=True)
class MMDiTConfig:
    """SD3-medium unless told otherwise. Raises ConfigError for values that contradict each other."""

    in_channels: int = 16  # of the latents that a caller gives, before they are cut into patches
    out_channels: int = 16
    patch_size: int = 2  # latents of patch_size x patch_size are one token
    num_layers: int = 24  # joint blocks: image and text have weights of their own, and attend to each other
    num_single_layers: int = 0  # FLUX: blocks after them in which both share all weights
    attention_head_dim: int = 64
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096  # D, the width of the text's states
    pooled_projection_dim: int = 2048  # P, the width of the pooled text
    qk_norm: bool = False  # RMS norms of queries and keys, per head (SD3.5, FLUX)
    dual_attention_layers: tuple[int, ...] = ()  # joint blocks with a second attention, of the image to itself (SD3.5)
    pos_embed_max_size: int = 192  # SD3: learned positions of so many patches by so many
    sample_size: int = 128  # SD3: latent height and width of the training, the unit of a new network's positions
    axes_dims_rope: tuple[int, ...] = ()  # FLUX: channels of a head that turn with 0, row, column; (): SD3
    guidance_embeds: bool = False  # FLUX.1-dev: the scale of the guidance is an input

    def __post_init__(self) -> None:
        for field in POSITIVE:
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} has to be at least 1, got {getattr(self, field)}")
        strange = [i for i in self.dual_attention_layers if not 0 <= i < self.num_layers]
        if strange:
            raise ConfigError(f"dual_attention_layers has {strange[0]}, but there are {self.num_layers} layers")
        if self.is_flux:
            self._check_flux()
        else:
            self._check_sd3()

    def _check_flux(self) -> None:
        axes, head = self.axes_dims_rope, self.attention_head_dim
        if len(axes) != 3 or sum(axes) != head or any(axis < 2 or axis % 2 for axis in axes):
            raise ConfigError(f"axes_dims_rope has to be three even numbers whose sum is {head}, got {axes}")
        if not self.qk_norm or self.dual_attention_layers or self.patch_size != PACK:
            raise ConfigError(f"axes_dims_rope needs qk_norm, patch_size {PACK} and no dual_attention_layers")

    def _check_sd3(self) -> None:
        if self.num_single_layers or self.guidance_embeds:
            raise ConfigError("num_single_layers and guidance_embeds need axes_dims_rope (FLUX)")
        if self.width % 4:
            raise ConfigError(f"attention_head_dim * num_attention_heads has to be a multiple of 4, got {self.width}")
        if self.pos_embed_max_size < 1 or self.sample_size < self.patch_size:
            raise ConfigError("pos_embed_max_size has to be at least 1, sample_size at least patch_size")

    @property
    def is_flux(self) -> bool:
        """Whether positions turn queries and keys (FLUX), or are added to the patches (SD3)."""
        return bool(self.axes_dims_rope)

    @property
    def width(self) -> int:
        return self.attention_head_dim * self.num_attention_heads

    @property
    def text_width(self) -> int:
        """Of the text's states."""
        return self.joint_attention_dim

    @property
    def pooled_width(self) -> int:
        """Of the pooled text."""
        return self.pooled_projection_dim

    @property
    def takes_sizes(self) -> bool:
        """Whether sizes are an input: of U-Nets alone."""
        return False

    @property
    def embeds_guidance(self) -> bool:
        """Whether the scale of the guidance is an input."""
        return self.guidance_embeds

    def check_attention_layers(self, layers: tuple[str, ...]) -> None:
        """Raise ConfigError: perturbed attention is for U-Nets."""
        raise ConfigError("pag is for U-Nets, and this model is a flow transformer", where="guidance")

    def check_size(self, height: int, width: int) -> None:
        """Raise ConfigError where latents of this size have more patches a side than there are learned positions."""
        most = self.pos_embed_max_size * self.patch_size
        if not self.is_flux and max(height, width) > most:
            raise ConfigError(f"latents of {height}x{width} are larger than the {most}x{most} that this model draws")

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any], where: object = None) -> MMDiTConfig:
        """From the config.json of an SD3Transformer2DModel or a FluxTransformer2DModel.

        Raises ModelError that names the class, or every setting whose value is not supported; ConfigError for
        contradictions.
        """
        kind = str(config.get("_class_name"))
        if kind not in DEFAULTS:
            hint = nearest(kind, list(DEFAULTS))
            raise ModelError(f"'{kind:.80}' is no flow transformer that is supported", where=where, hint=hint)
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        read = {**DEFAULTS[kind], **given}
        wrong = [key for key, value in given.items() if key not in DEFAULTS[kind] and value]
        wrong += _unsupported(kind, read)
        if wrong:
            values = ", ".join(f"{key} = {read[key]!r}" for key in wrong)
            raise ModelError(f"the transformer has settings that are not supported: {values}", where=where)
        same = {key: read[key] for key in SAME}
        channels, out = read["in_channels"], read["out_channels"] or read["in_channels"]
        if kind == FLUX:
            return cls(
                in_channels=channels // PACK**2,
                out_channels=out // PACK**2,
                num_single_layers=read["num_single_layers"],
                qk_norm=True,
                axes_dims_rope=tuple(read["axes_dims_rope"]),
                guidance_embeds=bool(read["guidance_embeds"]),
                **same,
            )
        return cls(
            in_channels=channels,
            out_channels=out,
            patch_size=read["patch_size"],
            qk_norm=read["qk_norm"] == "rms_norm",
            dual_attention_layers=tuple(read["dual_attention_layers"] or ()),
            pos_embed_max_size=read["pos_embed_max_size"],
            sample_size=read["sample_size"],
            **same,
        )

    def to_diffusers(self) -> dict[str, Any]:
        """The config.json of the transformer with the same weights in diffusers."""
        same = {key: getattr(self, key) for key in SAME}
        if self.is_flux:
            return {
                "_class_name": FLUX,
                "patch_size": 1,
                "in_channels": self.in_channels * PACK**2,
                "out_channels": self.out_channels * PACK**2,
                "num_single_layers": self.num_single_layers,
                "axes_dims_rope": list(self.axes_dims_rope),
                "guidance_embeds": self.guidance_embeds,
                **same,
            }
        return {
            "_class_name": SD3,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "patch_size": self.patch_size,
            "caption_projection_dim": self.width,
            "qk_norm": "rms_norm" if self.qk_norm else None,
            "dual_attention_layers": list(self.dual_attention_layers),
            "pos_embed_max_size": self.pos_embed_max_size,
            "sample_size": self.sample_size,
            **same,
        }


def _unsupported(kind: str, read: Mapping[str, Any]) -> list[str]:
    """The settings of a file whose values no network here has."""
    if kind == FLUX:
        packed = [key for key in ("in_channels", "out_channels") if (read[key] or 0) % PACK**2]
        return packed + ["patch_size"] * (read["patch_size"] != 1)
    width = read["attention_head_dim"] * read["num_attention_heads"]
    wrong = ["qk_norm"] * (read["qk_norm"] not in (None, "rms_norm"))
    wrong += ["caption_projection_dim"] * (read["caption_projection_dim"] != width)
    return wrong + ["pos_embed_max_size"] * (not read["pos_embed_max_size"])
