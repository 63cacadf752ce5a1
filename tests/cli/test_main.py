"""The command line's frame: help without heavy imports, one-line errors, exit codes."""

import os
import signal
import subprocess
import sys

import pytest

from ldm import console
from ldm.cli import COMMANDS, generate, main

HEAVY = ("torch", "diffusers", "transformers", "datasets", "numpy", "accelerate")


@pytest.mark.parametrize("line", [f"main({arguments!r})" for arguments in (["--help"], ["generate", "--help"])] + [""])
def test_help_imports_nothing_heavy(line):
    code = f"import sys, ldm\nif {line!r}:\n    from ldm.cli import main\n    assert {line or 0} == 0\n"
    code += f"print(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""
    assert ("usage: ldm" in done.stdout) == bool(line)


def test_help_explains_itself(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)
    assert main(["generate", "--help"]) == 0
    out = capsys.readouterr().out
    assert 'ldm generate "a cat"' in out and "cfg_scale = guidance_scale" in out
    for option in ("-o", "-n", "--seed", "--steps", "--guidance-scale", "--negative-prompt", "--sampler", "--width"):
        assert option in out
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        assert "examples:" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == main(["generate", "--version"]) == 0
    assert set(capsys.readouterr().out.split("\n")) == {"ldm 0.1.0", ""}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["genrate", "a cat"], "unknown command 'genrate'; did you mean 'generate'?"),
        (["generate", "a cat", "--stpes", "3"], "unknown option --stpes; did you mean '--steps'?"),
        (["generate", "a cat", "--step=3"], "unknown option --step; did you mean '--steps'?"),
        (["generate", "a", "cat"], "put a text of several words in quotes"),
        (["generate"], "there is no prompt"),
        (["generate", "a cat", "--steps", "many"], "invalid int value: 'many'"),
        (["train", "emoji/unet"], "required: -o/--output"),
        (["data"], "required: WHAT"),
        (["data", "emoij", "-o", "x"], "invalid choice: 'emoij'"),
    ],
)
def test_bad_command_lines_are_one_line_and_exit_2(words, message, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")


def test_no_command_shows_the_help(capsys):
    assert main([]) == 2
    assert "usage: ldm" in capsys.readouterr().err


def failing(error):
    def run(args):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ZeroDivisionError("division\nby zero"), 1, "internal error: ZeroDivisionError: division by zero"),
        (KeyboardInterrupt(), 130, "stopped (Ctrl-C)"),
    ],
)
def test_exit_codes(error, code, message, monkeypatch, capsys):
    monkeypatch.setattr(generate, "run", failing(error))
    assert main(["generate", "a cat"]) == code
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1
    assert main(["generate", "a cat", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_sigterm_unwinds_and_exits_143(monkeypatch, capsys):
    cleaned = []

    def run(args):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(generate, "run", run)
    assert main(["generate", "a cat"]) == 143
    assert cleaned and signal.getsignal(signal.SIGTERM) == before
    assert capsys.readouterr().err == "stopped (SIGTERM)\n"


@pytest.mark.parametrize(
    ("words", "level"), [(["-q"], -1), ([], 0), (["-v"], 1), (["-vv"], 2), (["--quiet"], -1), (["-q", "-v"], -1)]
)
def test_verbosity_before_and_after_the_command(words, level, monkeypatch):
    seen = []
    monkeypatch.setattr(generate, "run", lambda args: seen.append(console.level))
    assert main([*words, "generate", "a cat"]) == main(["generate", "a cat", *words]) == 0
    assert seen == [level, level] and console.level == 0


def test_offline_reaches_every_library(monkeypatch):
    from ldm.cli import OFFLINE

    for name in OFFLINE:
        monkeypatch.setenv(name, "0")
    seen = []
    monkeypatch.setattr(generate, "run", lambda args: seen.extend(os.environ[name] for name in OFFLINE))
    main(["generate", "a cat", "--offline"])
    assert seen == ["1"] * len(OFFLINE)
    assert [os.environ[name] for name in OFFLINE] == ["0"] * len(OFFLINE)  # the next command may ask again
