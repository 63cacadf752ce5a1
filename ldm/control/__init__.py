"""Conditions for ControlNets, made of an image without any network: edges, lines, colours, flat regions.

Each kind is a function of an RGB image that gives an RGB image of its size; the same image gives the same bits.
"""

from collections.abc import Callable

from PIL import Image

from ldm.control.colours import blur, palette, segmentation, tile
from ldm.control.edges import edges, lineart, soft_edges
from ldm.errors import ConfigError, nearest

__all__ = ["ALIASES", "GREY", "KINDS", "condition_of"]

KINDS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "edges": edges,
    "soft-edges": soft_edges,
    "lineart": lineart,
    "palette": palette,
    "tile": tile,
    "blur": blur,
    "segmentation": segmentation,
}
GREY = ("edges", "soft-edges", "lineart")  # whose three channels are equal
ALIASES = {"canny": "edges", "softedge": "soft-edges", "line-art": "lineart", "color": "palette", "colour": "palette"}
ALIASES |= {"gaussian": "blur", "seg": "segmentation"}


def condition_of(kind: str, image: Image.Image) -> Image.Image:
    """The condition of a kind, of an RGB image. Raises ConfigError for an unknown kind."""
    name = ALIASES.get(kind, kind)
    if name not in KINDS:
        raise ConfigError(f"unknown kind of control {kind!r:.80}", hint=nearest(kind, [*KINDS, *ALIASES]))
    return KINDS[name](image)
