"""`ldm finetune`: its words and everybody else's, what it prints, and that the printed command asks for the same."""

import json
import shlex

import pytest

import ldm
from ldm import config
from ldm.cli import main, parse
from ldm.training.aliases import ALIASES, KEYS, OPTIONS, REFUSED, canonical, nested
from ldm.training.finetuning import prepared
from ldm.training.settings import FinetuneSettings, as_dict
from tests.training.conftest import threads
from tests.training.finetune_cases import pictures, settings_of

QUICK = ["steps=1", "batch_size=2", "resolution=32", "samples=0", "device=cpu", "save_every=9", "validate_every=9"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("data") / "pictures", 4)


def asked(words):
    """The settings' keys that a command line asks for."""
    from ldm.cli.finetune import given_words

    return canonical(given_words(parse(["finetune", "x", "-o", "y", *words])))


def test_ours_and_theirs_mean_the_same():
    ours = ["--model", "m", "--lora-rank", "8", "--lora-alpha", "4", "--batch-size", "2", "--accumulation", "4"]
    ours += ["--learning-rate", "1e-4", "--steps", "500", "--warmup", "10", "--resolution", "512", "--flip", "0.5"]
    ours += ["--precision", "bf16", "--snr-gamma", "5", "--caption-dropout", "0.1", "--validation-prompts", "a cat"]
    diffusers = ["--pretrained_model_name_or_path", "m", "--rank", "8", "--lora_alpha=4", "--train_batch_size", "2"]
    diffusers += ["--gradient_accumulation_steps", "4", "--learning_rate=1e-4", "--max_train_steps", "500"]
    diffusers += ["--lr_warmup_steps", "10", "--resolution", "512", "--random_flip", "--mixed_precision", "bf16"]
    diffusers += [
        "--snr_gamma",
        "5.0",
        "--proportion_empty_prompts",
        "0.1",
        "--validation_prompt",
        "a cat",
        "--use_ema",
    ]
    kohya = ["--pretrained_model_name_or_path", "m", "--network_dim", "8", "--network_alpha", "4"]
    kohya += ["--train_batch_size", "2", "--gradient_accumulation_steps", "4", "--unet_lr", "1e-4"]
    kohya += ["--max_train_steps", "500", "--lr_warmup_steps", "10", "--resolution", "512", "--flip_aug"]
    kohya += ["--mixed_precision", "bf16", "--min_snr_gamma", "5", "--caption_dropout_rate", "0.1"]
    kohya += ["--cache_latents", "--network_module", "networks.lora", "--caption_extension", ".txt"]
    kohya += ["--validation-prompt", "a cat"]
    assert asked(ours) == asked(diffusers) == asked(kohya)


@pytest.mark.parametrize("word", [*ALIASES, *REFUSED])
def test_every_word_of_the_tables_is_an_option(word):
    """With a value or as a switch, under both spellings; a refused one says what to do instead."""
    switch = word in ALIASES and (ALIASES[word].switch is not None or ALIASES[word].word == "text_encoder")
    for option in (f"--{word}", f"--{word.replace('_', '-')}"):
        args = vars(parse(["finetune", "x", "-o", "y", option, *([] if switch else ["1"])]))
        assert args[f"word_{word}"] in (True, "1", ["1"])
    if word in ALIASES:
        assert ALIASES[word].word in {**KEYS, **ALIASES}
    else:
        assert REFUSED[word][1]


def test_the_options_are_settings_and_the_help_has_both_tables(capsys):
    fields = {word for group in OPTIONS.values() for word in group}
    assert fields <= set(KEYS)
    assert main(["finetune", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--lora-rank N" in shown and "gradient_accumulation_steps" in shown and "--rank" not in shown
    assert "--lora_rank" not in shown


def test_the_printed_command_asks_for_the_same(data, tiny_folder, tmp_path, capsys):
    words = {"lora_rank": 2, "targets": ["to_q", "to_k"], "text_encoder": True, "flip": 0.25, "betas": (0.9, 0.95)}
    words |= {"validation_prompts": ["it's a cat", "--steps"], "snr_gamma": None, "square": True, "epochs": 3}
    settings, _ = prepared(data, tmp_path / "a run", tiny_folder, device="cpu", **words)
    printed = capsys.readouterr().err.split("with all settings said:\n")[1].splitlines()[0]
    command = shlex.split(printed)
    assert command[:2] == ["ldm", "finetune"] and str(tmp_path / "a run") in command
    from ldm.cli.finetune import given_words

    args = parse(command[1:])
    found = {**canonical(given_words(args)), **canonical(dict(_pairs(args.overrides)))}
    again = config.build(FinetuneSettings, nested({**found, "data.folder": str(data)}))
    assert as_dict(again) == as_dict(settings)


def _pairs(words):
    from ldm.training.aliases import assigned

    return assigned(words).items()


def test_a_dry_run_tells_counts_settings_time_and_memory(data, tiny_folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["finetune", str(data), "-o", str(out), "--model", str(tiny_folder), "--dry-run", *QUICK]) == 0
    shown = capsys.readouterr()
    for told in (
        "4 found: 4 used",
        "lora_rank: 16",
        "a red cat",
        "time: about",
        "memory: ",
        "disk: ",
        "MB a checkpoint",
    ):
        assert told in shown.err, told
    assert shown.out == "" and not out.exists()


def test_a_run_is_used_at_once_and_goes_on(data, tiny_folder, tmp_path, capsys):
    out, model = tmp_path / "mine", ["--model", str(tiny_folder)]
    with threads(1):
        assert main(["finetune", str(data), "-o", str(out), *model, "--lora-rank", "2", *QUICK]) == 0
        assert capsys.readouterr().out.strip() == str(out)
        assert (
            main(["generate", "a cat", *model, "--lora", str(out), "-o", str(tmp_path / "x.png"), "--steps", "1"]) == 0
        )
        assert (tmp_path / "x.png").is_file()
        assert main(["finetune", str(data), "-o", str(out), *model, *QUICK]) == 2
        assert "already holds a run" in capsys.readouterr().err
        words = ["--output_dir", str(out), "--resume_from_checkpoint", "latest", "--max_train_steps", "2"]
        assert main(["finetune", *words]) == 0
    assert settings_of(out).steps == 2 and settings_of(out).lora_rank == 2 and settings_of(out).batch_size == 2


def test_resuming_where_there_is_nothing_is_a_fresh_start(data, tiny_folder, tmp_path, capsys):
    with threads(1):
        words = ["-o", str(tmp_path / "run"), "--model", str(tiny_folder), "--resume", *QUICK]
        assert main(["finetune", str(data), *words]) == 0
    assert "nothing to resume, starting from the beginning" in capsys.readouterr().err


def test_settings_of_a_run_are_a_config(data, tiny_folder, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    with threads(1):
        assert (
            main(["finetune", str(data), "-o", str(first), "--model", str(tiny_folder), "--train", "full", *QUICK]) == 0
        )
        assert main(["finetune", "-o", str(second), "--config", str(first / "settings.json"), "seed=1"]) == 0
    one, other = (json.loads((out / "settings.json").read_text()) for out in (first, second))
    assert {key for key in one if one[key] != other[key]} == {"seed"}


def test_public_name():
    from ldm.training import finetune

    assert ldm.finetune is finetune and "finetune" in dir(ldm)
