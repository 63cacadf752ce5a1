"""A small tower of open_clip, where that is installed: in the second environment of `.ci/run`."""

from importlib.util import find_spec
from pathlib import Path

import pytest


def fits(package):
    """Whether the compiled part of torchvision loads: it is made for one version and build of torch."""
    import torch

    for file in Path(find_spec(package).origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(file)
        except OSError:
            return False
    return True


def declare_operators():
    """The names that importing torchvision looks up; nothing here calls them."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


if find_spec("open_clip") and not fits("torchvision"):
    LIBRARY = declare_operators()  # lives as long as the tests


@pytest.fixture(scope="session")
def tower():
    """A small random text transformer of open_clip for its own tokenizer."""
    import torch
    from open_clip.transformer import TextTransformer

    torch.manual_seed(0)
    model = TextTransformer(context_length=77, width=32, heads=4, layers=4, output_dim=24).eval()
    model.token_embedding.weight.data.normal_(0, 1)
    model.positional_embedding.data.normal_(0, 0.3)
    return model
