"""<lora:name:0.8> in prompts."""

import re

import pytest

from ldm.errors import ConfigError
from ldm.prompts import LoraTag, take_loras


@pytest.mark.parametrize(
    ("prompt", "text", "tags"),
    [
        ("a cat", "a cat", []),
        ("  a  cat ", "  a  cat ", []),
        ("a <lora:red:0.8> cat", "a cat", [("red", 0.8)]),
        ("<lora:red>a cat<lora:my style v1.2:-1>", "a cat", [("red", 1.0), ("my style v1.2", -1.0)]),
        ("<lora:red:1>\n<lora:red:.5>", "", [("red", 1.0), ("red", 0.5)]),
        ("a <b> lora:x", "a <b> lora:x", []),
        ("a cat <Lora:red:1>< lyco :blue:0.5>", "a cat", [("red", 1.0), ("blue", 0.5)]),
        ("<lora:red:0.8:0.8>", "", [("red", 0.8)]),
        ("<lora:red:te=0.5:unet=0.5>", "", [("red", 0.5)]),
        ("<lora:red:0.5:0.8>", "", [("red", 0.8, 0.5)]),  # as A1111: text encoder, U-Net
        ("<lora:red:te=0.5:unet=1>", "", [("red", 1.0, 0.5)]),
        ("<lora:red:0.5:unet=0>", "", [("red", 0.0, 0.5)]),
        ("<lora:red:te=0.5>", "", [("red", 0.5)]),
        ("<lora:red:unet=0.5>", "", [("red", 0.5, 1.0)]),
        ("x <3 and a <note: this>", "x <3 and a <note: this>", []),
    ],
)
def test_tags_are_taken_out(prompt, text, tags):
    assert take_loras(prompt) == (text, tuple(LoraTag(*tag) for tag in tags))


@pytest.mark.parametrize(
    "tag",
    [
        "<lora:>",
        "<lora::1>",
        "<lora:x:>",
        "<lora:x:much>",
        "<lora:x:nan>",
        "<lora:x:dyn=1>",
        "<lora:x:1:1:8>",
        "<lora:x:1:te=>",
    ],
)
def test_a_tag_without_a_name_or_a_number_is_refused(tag):
    with pytest.raises(ConfigError, match=r"prompt\[2\]: .* has no name or no number; write <lora:name:0.8>"):
        take_loras(f"a {tag} cat", "prompt[2]")


@pytest.mark.parametrize("prompt", ["a <lora:x", "a <lora:x:1 <b> cat", "<lora:x><lora:y"])
def test_a_tag_that_is_not_closed_is_refused(prompt):
    with pytest.raises(ConfigError, match="not closed"):
        take_loras(prompt)


@pytest.mark.parametrize(
    ("tag", "why"),
    [
        ("<hypernet:x:1>", "hypernetworks are not supported"),
        ("<Embedding:x:1>", "textual inversion"),
        ("<lycoris:x:1>", "write <lora:name:0.8>"),
        ("<random:a,b>", "write {a|b}"),
    ],
)
def test_tags_of_other_networks_are_refused_by_name(tag, why):
    with pytest.raises(ConfigError, match=re.escape(why)):
        take_loras(f"a cat {tag}")
