"""open_clip's own text towers from their safetensors files; needs the extra `open-clip`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoint.safety import read_tensors
from ldm.errors import ModelError, nearest

if TYPE_CHECKING:
    import torch

    from ldm.nn.text import OpenClipText

SIZES = ("context_length", "vocab_size", "width", "heads", "layers")  # the settings of a plain causal tower


def load_open_clip(
    name: str, weights: str | Path, device: torch.device | str, dtype: torch.dtype, left_out: int = 1
) -> OpenClipText:
    """The text tower of an open_clip model ("ViT-H-14", …) from a safetensors file of the whole model or the tower.

    Stable Diffusion 2.x takes ViT-H-14 with `left_out` 1; XL takes ViT-bigG-14 with 0, as the second of XLText. The
    image tower is ignored. Raises ModelError: open_clip is not installed, no such model, another kind of tower,
    weights that do not fit.
    """
    from ldm.nn.text import OpenClipText
    from ldm.nn.weights import load_weights, on_meta

    open_clip, config = _config(name)
    text, weights = config["text_cfg"], Path(weights)
    if not set(text) <= set(SIZES):
        raise ModelError(f"{name} has another kind of text tower ({', '.join(sorted(set(text) - set(SIZES)))})")
    act = open_clip.transformer.QuickGELU if config.get("quick_gelu") else open_clip.transformer.nn.GELU

    def build() -> Any:
        return open_clip.transformer.TextTransformer(**text, output_dim=config["embed_dim"], act_layer=act)

    import torch

    with torch.device("meta"):
        names = {f"{prefix}{key}": key for key in build().state_dict() for prefix in ("", "text.")}
    state, _ = read_tensors(weights, dtype, device, names=names)
    tower = load_weights(on_meta(build), {names[key]: tensor for key, tensor in state.items()}, weights)
    tower.attn_mask = tower.build_causal_mask().to(device)  # not in the file
    return OpenClipText(tower.requires_grad_(False), open_clip.SimpleTokenizer(), left_out)


def _config(name: str) -> tuple[Any, dict[str, Any]]:
    try:
        import open_clip
    except ImportError as error:
        what = f"open_clip cannot be imported ({error})"
        raise ModelError(what, hint="pip install 'ldm-pipeline[open-clip]', and a torchvision for this torch") from None
    config = open_clip.get_model_config(name)
    if config is None:
        raise ModelError(f"open_clip knows no model {name!r}", hint=nearest(name, open_clip.list_models()))
    return open_clip, config
