"""`ldm finetune`: its words and everybody else's, what it prints, and that the printed command asks for the same."""

import json
import shlex
from pathlib import Path

import pytest
import torch

import ldm
from ldm import config
from ldm.cli import build_parser, main, parse
from ldm.errors import ConfigError
from ldm.training.finetuning.command import PLACES, read_arguments, resolve_settings
from ldm.training.finetuning.options import (
    ALIASES,
    FOREIGN_SWITCHES,
    IDLE,
    KEYS,
    OPTIONS,
    REFUSED,
    nest,
    parse_overrides,
    resolve_aliases,
)
from ldm.training.loop.optimizers import learning_rate
from ldm.training.settings import FinetuneSettings, Settings, as_dict
from tests.training.conftest import threads
from tests.training.finetune_cases import pictures, settings_of

QUICK = ["steps=1", "batch_size=2", "resolution=32", "samples=0", "device=cpu", "save_every=9", "validate_every=9"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("data") / "pictures", 4)


def asked(words):
    """The settings' keys that a command line asks for."""
    from ldm.cli.finetune import given_options

    return resolve_aliases(given_options(parse(["finetune", "x", "-o", "y", *words])))


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


def test_every_word_of_the_tables_is_an_option():
    """With a value or as a switch, under both spellings; a refused one says what to do instead."""
    parser, _ = build_parser()
    for word in {*ALIASES, *REFUSED, *IDLE}:
        alone = word in FOREIGN_SWITCHES or (word in ALIASES and ALIASES[word].name == "text_encoder")
        for option in (f"--{word}", f"--{word.replace('_', '-')}"):
            args = vars(parser.parse_args(["finetune", "-o", "y", option, *([] if alone else ["1"]), "-q"]))
            assert args[f"option_{word}"] in ("true", "1", ["1"]), word
        if word in ALIASES:
            assert ALIASES[word].name in {**KEYS, **ALIASES}
        elif word in REFUSED:
            assert REFUSED[word][1]


THEIRS = Path(__file__).parent / "theirs.txt"  # the options of diffusers' and kohya's scripts, with kinds and defaults


def test_every_option_of_their_scripts_is_known():
    """In the list a line is an option, the scripts' default ("switch": none is said) and its script."""
    rows = [line.split("\t") for line in THEIRS.read_text().splitlines() if not line.startswith("#")]
    assert len(rows) > 250
    known = {*KEYS, *ALIASES, *REFUSED, *IDLE, *PLACES.values(), "resume"}
    assert not [name for name, _, _ in rows if name not in known]
    for name, default, _ in rows:
        if name in REFUSED:
            assert (default == "switch") == (name in FOREIGN_SWITCHES), name
        if name in REFUSED and default not in ("switch", "None") and len(REFUSED[name][0]) > 1:
            assert resolve_aliases({name: json.loads(default)}) == {}, name


@pytest.mark.parametrize("word", ["cache_latents", "use_ema", "random_flip", "text_encoder", "enable_bucket", "v2"])
def test_a_switch_takes_no_data_for_its_value(word, monkeypatch):
    for said, value in (([], "true"), (["false"], "false"), (["True"], "True")):
        args = parse(["finetune", f"--{word}", *said, "pics", "-o", "r"])
        assert args.data == "pics" and getattr(args, f"option_{word}") == value
    args = parse(["finetune", f"--{word}=false", "pics", "-o", "r", "--dry-run", "steps=3"])
    assert (args.data, getattr(args, f"option_{word}"), args.overrides) == ("pics", "false", ["steps=3"])
    assert parse(["finetune", "pics", "-o", "r", f"--{word}"]).data == "pics"


def test_one_place_is_not_said_twice_in_two_ways(capsys):
    assert main(["finetune", "x", "-o", "a", "--output_dir", "b"]) == 2
    assert "--output_dir b: a was given before" in capsys.readouterr().err
    assert main(["finetune", "x", "-o", "a", "--resume", "best", "--resume_from_checkpoint", "latest"]) == 2
    assert "best was given before" in capsys.readouterr().err
    assert parse(["finetune", "x", "-o", "a", "--output_dir", "a"]).output == "a"


def test_their_schedules_are_theirs(capsys):
    def rates(steps=100, **words):
        settings = Settings("toy", steps, 1, 1.0, **resolve_aliases(words))
        return [learning_rate(settings, step) for step in range(steps)]

    from diffusers.optimization import get_scheduler

    for name in ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"):
        moved = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
        peer = get_scheduler(name, moved, num_warmup_steps=10, num_training_steps=100)
        expected = []
        for _ in range(100):
            expected.append(peer.get_last_lr()[0])
            moved.step()
            peer.step()
        ours = rates(lr_scheduler=name, lr_warmup_steps=10)
        # of the warm-up they count from 0, so that their first step moves nothing
        assert ours[10:] == pytest.approx(expected[10:], abs=1e-6)
    assert "constant has no warm-up" in capsys.readouterr().err
    assert rates(lr_scheduler="constant", lr_warmup_steps=10)[0] == 1.0
    assert rates(lr_schedule="constant", lr_warmup_steps=10)[0] == 0.1
    assert resolve_aliases({"lr_scheduler": "linear", "decay_from": 0.5})["decay_from"] == 0.5
    for words in ({"lr_num_cycles": 3}, {"lr_scheduler_power": 2.0}):
        with pytest.raises(ConfigError, match="not supported"):
            resolve_aliases(words)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"resolution": "512,512"}, {"data.resolution": 512}),
        ({"resolution": [64, 64]}, {"data.resolution": 64}),
        ({"data": {"cache": False}}, {"data.cache": "off"}),
        ({"cache": Path("a/b")}, {"data.cache": "a/b"}),
        ({"init": Path("a"), "prior": Path("b"), "vae": Path("c")}, {"init": "a", "prior": "b", "vae": "c"}),
        ({"betas": "0.9,0.95"}, {"betas": [0.9, 0.95]}),
        ({"lora_dropout": "0.0", "adam_epsilon": "1e-08", "use_ema": "true", "push_to_hub": "False"}, {}),
        ({"foreach_ema": True, "local_rank": -1}, {}),
        ({"stage": "finetune", "workers": 1, "data": {"workers": 2}}, {"data.workers": 2}),
        (
            {"validation_prompt": "a cat", "num_validation_images": 3},
            {"validation_prompts": ["a cat"] * 3, "samples": 3},
        ),
        ({"validation_prompt": "a cat", "samples": 3}, {"validation_prompts": ["a cat"], "samples": 3}),
    ],
)
def test_what_is_said_in_other_forms(given, found):
    assert resolve_aliases(given) == found


def test_texts_of_the_command_line_are_no_switches():
    assert asked(["data.cache=off"]) == {} and _pairs(["data.cache=off"])
    assert resolve_aliases(dict(_pairs(["data.cache=off", "data.captions=names"]))) == {
        "data.cache": "off",
        "data.captions": "names",
    }
    with pytest.raises(ConfigError, match=r"resolution: is one number of pixels, got '512,768'; give one: each image"):
        asked(["--resolution", "512,768"])
    assert asked(["--sampler", "euler", "--log-every", "3", "--guidance-scale", "2", "--betas", "0.9,0.95"]) == {
        "sampler": "euler",
        "log_every": 3,
        "guidance_scale": 2,
        "betas": [0.9, 0.95],
    }


def test_the_options_are_settings_and_the_help_has_both_tables(capsys):
    fields = {word for group in OPTIONS.values() for word in group}
    assert fields <= set(KEYS)
    assert main(["finetune", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--lora-rank N" in shown and "gradient_accumulation_steps" in shown and "--rank" not in shown
    assert "--lora_rank" not in shown and "continue from the latest, best or this one" in shown


def resolved(data, out, model=None, **options):
    return resolve_settings(read_arguments(data, out, model, **options))


def repeated(err, data):
    """The settings that the printed command asks for."""
    from ldm.cli.finetune import given_options

    printed = err.split("the command with all settings:\n")[1].splitlines()[0]
    command = shlex.split(printed)
    assert command[:2] == ["ldm", "finetune"] and "null" not in printed.replace("--snr-gamma null", "")
    args = parse(command[1:])
    found = {**resolve_aliases(given_options(args)), **resolve_aliases(dict(_pairs(args.overrides)))}
    return command, as_dict(config.build(FinetuneSettings, nest({**found, "data.folder": str(data)})))


def test_the_printed_command_asks_for_the_same(data, tiny_folder, tmp_path, capsys):
    words = {"lora_rank": 2, "targets": ["to_q", "to_k"], "text_encoder": True, "flip": 0.25, "betas": (0.9, 0.95)}
    words |= {"validation_prompts": ["it's a cat", "--steps"], "snr_gamma": None, "square": True, "epochs": 3}
    words |= {"learning_rate": 1.23456789e-4, "workers": 2}
    settings, _ = resolved(data, tmp_path / "a run", tiny_folder, device="cpu", **words)
    command, again = repeated(capsys.readouterr().err, data)
    assert str(tmp_path / "a run") in command and again == as_dict(settings) and "1e-05" not in command


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_printed_command_of_a_settings_file_asks_for_the_same(kind, data, tiny_folder, tmp_path, capsys):
    first, out = tmp_path / "first", tmp_path / "run"
    settings, _ = resolved(data, first, tiny_folder, device="cpu", train=kind, workers=2)
    capsys.readouterr()
    (tmp_path / "settings.json").write_text(json.dumps(as_dict(settings)))
    again, _ = resolved(None, out, config=tmp_path / "settings.json")
    assert as_dict(again) == as_dict(settings)
    command, asked_for = repeated(capsys.readouterr().err, data)
    assert asked_for == as_dict(settings)
    resolved(None, out, config=tmp_path / "settings.json", workers=3)
    words = command[3 + 2 :]
    assert main(["finetune", str(data), "-o", str(out), *words, "--dry-run"]) == 0


def _pairs(words):
    return parse_overrides(words).items()


def test_a_dry_run_tells_counts_settings_time_and_memory(data, tiny_folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["finetune", str(data), "-o", str(out), "--model", str(tiny_folder), "--dry-run", *QUICK]) == 0
    shown = capsys.readouterr()
    for told in (
        "4 found: 4 used",
        "lora_rank: 32",
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
        words = [
            "--output_dir",
            str(out),
            "--resume_from_checkpoint",
            "latest",
            "--max_train_steps",
            "2",
            "--allow-changed",
            "steps",
        ]
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"out": 5}, "out: expected a path, got 5"),
        ({"out": True}, "out: expected a path, got True"),
        ({"out": None}, "out: is needed"),
        ({"config": {}}, "config: expected a settings file, got {}"),
        ({"resume": 5}, "resume: expected a path, got 5"),
        ({"allow_changed": 5}, "allow_changed: expected texts, got 5"),
        ({"overrides": {"seed": 4}}, "overrides: expected texts"),
        ({"output_dir": "b"}, "out and output_dir are the same, and differ"),
        ({"resume": "best", "resume_from_checkpoint": "latest"}, "resume and resume_from_checkpoint are the same"),
    ],
)
def test_what_python_gives_of_another_kind_is_refused(words, said, data, tmp_path):
    with pytest.raises(ConfigError, match=said):
        ldm.finetune(data, **{"out": "a", **words})


def test_places_have_their_names_too(data, tiny_folder, tmp_path, capsys):
    common = {"model": tiny_folder, "dry_run": True, "overrides": "seed=4"}
    asked_for = dict(word.split("=") for word in QUICK)
    asked_for = {name: int(value) if value.isdecimal() else value for name, value in asked_for.items()}
    ldm.finetune(data, output_dir=tmp_path / "a", resume_from_checkpoint=True, **common, **asked_for)
    assert str(tmp_path / "a") in capsys.readouterr().err
    (tmp_path / "run.json").write_text(json.dumps({"output_dir": str(tmp_path / "b"), "lora_rank": 3}))
    ldm.finetune(data, config=tmp_path / "run.json", resume=False, **common, **asked_for)
    told = capsys.readouterr().err
    assert str(tmp_path / "b") in told and "lora_rank: 3" in told and "seed: 4" in told
