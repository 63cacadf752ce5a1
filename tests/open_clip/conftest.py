"""A small tower of open_clip, where that is installed: see the second environment in `.ci/run`."""

from importlib import metadata
from importlib.util import find_spec

import pytest


def declare_operators():
    """The names that importing torchvision looks up, where its compiled part is made for another build of torch."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def build_of(package):
    """ "cpu", "cu130", … or "" for the index's own."""
    return metadata.version(package).partition("+")[2]


if find_spec("open_clip") and build_of("torch") != build_of("torchvision"):
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
