"""What would be lost, or would fail after all training, is refused before; what is only odd is said in one line."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ldm.cli import main
from ldm.errors import ConfigError, ModelError
from ldm.training.finetuning.base_model import chosen_layers
from tests.checkpoint.lora_cases import pair
from tests.training.finetune_cases import QUICK, pictures, resolved, run

SHORT = {name: value for name, value in QUICK.items() if name not in ("lora_rank", "targets")}
LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_"
# said -> what the answer has in it
REFUSED = {
    "--lora-rank 100000000": "lora_rank: 100000000 is more than any of these layers has: at most 128, that of ",
    "--name pytorch_lora_weights": "name: pytorch_lora_weights is the name of diffusers' file",
    f"--name {'a' * 250}": "is too long for the name of a file",
    "--output_dir {root}/PyTorch_LoRA_weights": "out: PyTorch_LoRA_weights is the name of diffusers' file",
    f"-o {{root}}/{'b' * 250}": "is too long for the name of a file",
    "--resolution -64": "resolution: must be 1 to 8192 pixels, got -64",
    "--resolution 64,32": "give one: each image gets a bucket of its own shape",
    "--lr_scheduler adafactor": "'adafactor' is not allowed; choose from: constant, linear, cosine",
    "--lr_num_cycles 3": "restarts are not supported",
    "--optimizer_args weight_decay=0.1 betas=.9,.99": "with weight_decay=X and betas=[X,X]",
    "--hub_model_id me/mine": "nothing is ever uploaded",
    "--adam_epsilon 1e-6": "adam_epsilon is not supported; the optimizers are adamw",
    "--network_dropout 0.1": "network_dropout is not supported; dropout and limits",
    "--deepspeed": "DeepSpeed is not supported",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("data") / "pictures", 4)


@pytest.mark.parametrize("words", REFUSED)
def test_it_is_refused_before_work(words, data, tiny_folder, tmp_path, capsys):
    split = words.format(root=tmp_path).split(" ")
    place = [] if split[0] in ("-o", "--output_dir") else ["-o", str(tmp_path / "run")]
    given = [f"{k}={v}" for k, v in SHORT.items() if k not in split[0] and not (k == "lr_schedule" and "lr_" in words)]
    assert main(["finetune", str(data), *place, "--model", str(tiny_folder), *split, *given]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and REFUSED[words] in error
    assert not list(tmp_path.iterdir())


def test_the_highest_rank_is_that_of_the_fullest_layer():
    shapes = {"unet": {"a.to_q": (8, 12), "b.to_q": (4, 100), "c.conv1": (6, 4, 3, 3)}}
    assert chosen_layers(shapes, ["to_q"], 8) == {"unet": ["a.to_q", "b.to_q"]}
    with pytest.raises(ConfigError, match=r"at most 8, that of a\.to_q"):
        chosen_layers(shapes, ["all"], 9)
    assert chosen_layers(shapes, ["conv1"], 6)
    with pytest.raises(ConfigError, match=r"at most 6, that of c\.conv1"):
        chosen_layers(shapes, ["conv1"], 7)


def test_a_lora_of_two_kinds_in_one_part_is_refused(data, tiny_folder, tmp_path):
    mixed = {**pair(f"{LAYER}q"), **pair(f"{LAYER}k"), f"{LAYER}k.lora_magnitude_vector": torch.ones(32)}
    save_file(mixed, tmp_path / "mixed.safetensors")
    with pytest.raises(ModelError, match="has LoRA and DoRA layers in its unet"):
        run(data, tmp_path / "run", tiny_folder, init=tmp_path / "mixed.safetensors", lora_rank=None, targets=None)
    assert not (tmp_path / "run").exists()


def test_an_alpha_that_is_nowhere_is_said(data, tiny_folder, tmp_path, capsys):
    save_file({k: v for k, v in pair(f"{LAYER}q").items() if "alpha" not in k}, tmp_path / "bare.safetensors")
    resolved(data, tmp_path / "run", tiny_folder, init=str(tmp_path / "bare.safetensors"))
    assert "bare.safetensors: 1 layers have no alpha; the rank is taken for it" in capsys.readouterr().err


def test_a_validation_prompt_that_is_cut_is_said_once(data, tiny_folder, tmp_path, capsys):
    words = {"validation_prompt": ["a cat " * 60 + "zebra", "a cat"], "num_validation_images": 2}
    run(data, tmp_path / "run", tiny_folder, **{**QUICK, **words, "samples": None, "steps": 1, "sample_steps": 1})
    lines = [line for line in capsys.readouterr().err.splitlines() if "validation prompt" in line]
    assert len(lines) == 1 and "is not seen by the text encoder" in lines[0] and "zebra" in lines[0]
    drawn = json.loads((tmp_path / "run" / "settings.json").read_text())["validation_prompts"]
    assert [len(prompt) > 10 for prompt in drawn] == [True, True, False, False]
