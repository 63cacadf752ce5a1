"""What is said where open_clip is not installed; runs everywhere."""

import sys

import pytest
import torch

from ldm.checkpoint.open_clip import load_open_clip
from ldm.errors import ModelError


def test_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ModelError, match=r"open_clip cannot be imported .*pip install 'ldm-pipeline\[open-clip\]'"):
        load_open_clip("ViT-H-14", tmp_path / "none.safetensors", "cpu", torch.float32)
