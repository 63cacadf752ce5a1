"""The text tower's terms beside the contrast: naming, order, and an anchor to the tower that a run began with."""

import json
import math

import pytest
import torch

from ldm.checkpoint.parts import load_text_from
from ldm.data.emoji import held_out, objects
from ldm.data.emoji.labels import label_sizes, mirrored
from ldm.errors import ConfigError
from ldm.nn.readers import WEIGHTS, order_margin, reading_loss
from ldm.training import train
from ldm.training.checkpoints.reading import read_tensors
from ldm.training.command import open_images
from ldm.training.settings import read_settings
from ldm.training.stages.text import Text
from tests.training.conftest import threads

SETTINGS = {
    "stage": "text",
    "steps": 4,
    "batch_size": 4,
    "learning_rate": 0.002,
    "warmup": 1,
    "decay_from": 1.0,
    "ema": 0.5,
    "workers": 0,
    "precision": "fp32",
    "device": "cpu",
    "validation": 8,
    "latent_pool": 256,
    "tokenizer_captions": 50,
    "contrast": 0.3,
    "naming": 1.0,
    "anchor": 0.5,
    "named": 6,
    "mirrored": 3,
    "image_tower": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4},
    "data": {"resolution": 32, "scenes": {"objects": "everyday", "casual": 0.5}},
}


@pytest.fixture
def config(parts, tmp_path):
    path = tmp_path / "text.json"
    path.write_text(json.dumps({**SETTINGS, "image_tower": {**SETTINGS["image_tower"], "patch_size": 1}}))
    return path, [f"vae={parts}", f"init={parts}"]


def opened(settings, out):
    return Text(settings, out, open_images(settings, out))


def test_a_tower_that_names_things_goes_on_from_another_and_resumes_to_the_bit(parts, config, tmp_path):
    path, given = config
    with threads(1):
        train(path, tmp_path / "whole", given)
        train(path, tmp_path / "halves", [*given, "steps=2"])
        train(path, tmp_path / "halves", given, resume="latest")
    last = [tmp_path / run / "checkpoints" / "step-00000004" for run in ("whole", "halves")]
    whole, halves = ((folder / "state.safetensors").read_bytes() for folder in last)
    assert whole == halves
    tensors = read_tensors(last[0])
    assert tensors["ema.readers.layers.object.weight"].abs().sum() > 0
    before, after = load_text_from(parts), load_text_from(tmp_path / "whole" / "model")
    assert before.tokenizer.get_vocab() == after.tokenizer.get_vocab()
    gap = before.encode(["a cat"]).states - after.encode(["a cat"]).states
    assert 1e-4 < gap.abs().mean() < 0.5  # it went on, and from there


def test_the_first_loss_is_that_of_readers_who_know_nothing_and_of_the_same_tower(config, tmp_path):
    path, given = config
    stage = opened(
        read_settings(path, [*given, "contrast=0", "data.scenes.casual=0", "data.scenes.mention=0"]), tmp_path
    )
    told = stage.terms.batch(0)
    loss = stage.terms.loss(stage.module.text, stage.module.readers, told, stage.device)
    sizes = label_sizes()._asdict()
    blank = sum(weight * math.log(sizes[name]) for name, weight in WEIGHTS.items()) + 3 * math.log(2)
    plain = (told.ids[told.rows] == told.plain).all(1)
    assert plain.any() and not plain.all()
    assert blank < loss.item() < blank + 0.5  # "the cat" is not yet "a cat"
    again = stage.terms.batch(0), stage.terms.batch(1)
    assert torch.equal(again[0].ids, told.ids) and not torch.equal(again[1].ids, told.ids)


def test_mirrors_exchange_the_objects_of_combinations_that_training_may_show():
    for index in range(40):
        (one, a), (other, b) = mirrored(5, index)
        assert one != other and sorted(one.replace(",", "").split()) == sorted(other.replace(",", "").split())
        assert (a.first, a.last, a.axis, a.colour) == (b.last, b.first, b.axis, b.colour)
        first, last = objects()[a.first].codepoints, objects()[a.last].codepoints
        side = "above" if a.axis else "left"
        assert not held_out((side, first, last)) and not held_out((side, last, first))
        (_, c), (_, d) = mirrored(5, index, unseen=True)
        first, last, side = objects()[c.first].codepoints, objects()[c.last].codepoints, "above" if c.axis else "left"
        assert held_out((side, first, last)) and held_out((side, last, first)) and c.first == d.last


def test_order_is_right_where_the_readers_believe_in_it():
    labels = torch.tensor([[-100, 0, 2, 5, 0, -100], [-100, 0, 5, 2, 0, -100], [3, 0, -100, -100, -100, 0]])
    told = {name: torch.zeros(3, size) for name, size in label_sizes()._asdict().items()}
    told["first"][0, 2], told["last"][0, 5], told["first"][1, 2] = 1.0, 0.5, 1.0
    assert order_margin(told, labels).tolist() == [1.5, -1.0]
    assert reading_loss(told, labels, order=0.0) < reading_loss(told, labels, order=1.0)


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["init=", "anchor=1"], "anchor: needs init"),
        (["naming=-1"], "naming: must not be negative"),
        (["naming=0", "contrast=0", "anchor=0"], "nothing is trained"),
        (["data.folder=somewhere"], "anchor: needs init, and naming of drawn scenes"),
    ],
)
def test_terms_that_cannot_be_are_refused(overrides, said, config):
    path, given = config
    with pytest.raises(ConfigError, match=said):
        read_settings(path, [*given, *overrides])


def test_another_tower_than_that_of_init_is_refused(parts, config, tmp_path):
    path, given = config
    with pytest.raises(ConfigError, match=r"model\.hidden_size: asks for 48"):
        opened(read_settings(path, [*given, "model={hidden_size: 48}"]), tmp_path)
