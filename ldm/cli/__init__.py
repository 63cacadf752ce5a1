"""The command line: one file a command, each a thin call. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NoReturn

import ldm
from ldm import console
from ldm.cli import connections
from ldm.console import Terminated
from ldm.device import is_out_of_memory
from ldm.errors import ConfigError, LdmError, ResourceError, first_line, nearest, one_line

# Each is a module of this room.
COMMANDS = ("generate", "render", "verify", "finetune", "convert", "inspect", "train", "data", "evaluate", "bench")
COMMANDS += ("doctor", "web", "distill", "preprocess")
TYPED = ("generate", "render")  # are told which of their arguments were given: `args.typed`
EVERYWHERE = (
    (("-q", "--quiet"), "count", "no progress, nothing but warnings and errors"),
    (("-v", "--verbose"), "count", "say more, every connection to other machines included"),
    (("--debug",), "store_true", "show where an error comes from"),
    (("--offline",), "store_true", "never use the network"),
)
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
IN_PYTHON = "HF_HUB_DISABLE_XET"  # else the hub's files come by a library whose connections Python does not see


class Parser(argparse.ArgumentParser):
    """Errors as ConfigError; no abbreviations, so that a misspelt option is never taken for another.

    `switches` are options that stand alone, or have true or false behind them or behind a "=", and take nothing else.
    """

    switches: frozenset[str] = frozenset()

    def __init__(self, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str):
        raise ConfigError(message, hint=f"see `{self.prog} --help`")

    def parse_known_args(self, args=None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._joined(words) if self.switches else words, namespace)

    def _joined(self, words: Sequence[str]) -> list[str]:
        """Each switch with its value behind a "=", so that it takes no other word for it."""
        found: list[str] = []
        for word in words:
            if found and found[-1] in self.switches:
                found[-1] += f"={word}" if (own := word.lower() in ("true", "false")) else "=true"
                if own:
                    continue
            found.append(word)
        if found and found[-1] in self.switches:
            found[-1] += "=true"
        return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ldm` with these arguments and return its exit code: 0 done, 1 a bug, 2 refused before work began, 3 finished
    with named failures, 4 out of disk or memory, 5 stopped part-way, 130 and 143 stopped by a signal."""
    words = list(sys.argv[1:] if argv is None else argv)
    before = console.level
    debug = "--debug" in words
    atexit.register(gc.freeze)  # else Python looks through all objects once more as it ends
    try:
        args = parse(words)
        console.level = -1 if args.quiet else args.verbose
        with _watched(args.offline) if args.offline or args.verbose else nullcontext(), terminate_politely():
            return args.run(args) or 0
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        return _exit_code(error, debug)
    finally:
        console.level = before


@contextmanager
def _watched(offline: bool) -> Iterator[None]:
    """Connections are told, or refused; then the libraries that ask hubs are told not to, until the command ends."""
    before = {name: os.environ.get(name) for name in (*OFFLINE, IN_PYTHON)}
    connections.watch(offline)
    os.environ[IN_PYTHON] = "1"
    if offline:
        os.environ.update(dict.fromkeys(OFFLINE, "1"))
    try:
        yield
    finally:
        connections.rest()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _exit_code(error: BaseException, debug: bool) -> int:
    """What a command returns that ended by `error`, which is shown."""
    if isinstance(error, SystemExit):  # --help, --version
        return int(error.code or 0)
    if isinstance(error, Terminated):
        return _report("stopped (SIGTERM)", debug, 128 + signal.SIGTERM)
    if isinstance(error, KeyboardInterrupt):
        return _report("stopped (Ctrl-C)", debug, 128 + signal.SIGINT)
    if isinstance(error, LdmError):
        return _report(f"error: {error}", debug, error.exit_code)
    if is_out_of_memory(error):
        return _report(f"error: out of memory ({first_line(error)})", debug, ResourceError.exit_code)
    if isinstance(error, BrokenPipeError):  # the reader of stdout went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    what = one_line(f"{type(error).__name__}: {error}")
    return _report(f"internal error: {what} (a bug; --debug shows where)", debug, 1)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of one command. Raises ConfigError, with the nearest name for what is misspelt."""
    first = next((word for word in words if not word.startswith("-")), None)
    parser, commands = build_parser([first] if first in COMMANDS else COMMANDS)
    if first not in COMMANDS and not (first is None and set(words) & {"-h", "--help", "--version"}):
        _no_command(first, parser)
    args, unknown = parser.parse_known_args(list(words))
    if hasattr(args, "overrides"):  # KEY=VALUE may stand after options too
        args.overrides += [word for word in unknown if _is_override(word)]
        unknown = [word for word in unknown if not _is_override(word)]
    if unknown:
        _refuse(unknown[0], commands[first])
    if first in TYPED:
        args.typed = _typed(parser, commands[first], words)
    return args


def _typed(parser: Parser, command: Parser, words: Sequence[str]) -> frozenset[str]:
    """The names of a command's arguments that `words` give, at their default values too; its defaults are gone then."""
    for action in command._actions:
        action.default = argparse.SUPPRESS
    return frozenset(vars(parser.parse_known_args(list(words))[0]))


def _no_command(word: str | None, parser: Parser) -> NoReturn:
    if word is None:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    raise ConfigError(f"unknown command {word!r}", hint=f'{nearest(word, COMMANDS)} (ldm generate "a cat" draws)')


def _is_override(word: str) -> bool:
    return "=" in word and not word.startswith("-")


def build_parser(names: Sequence[str] = COMMANDS) -> tuple[Parser, dict[str, Parser]]:
    """The parser of everything, and the parser of each of these commands."""
    epilog = "`ldm COMMAND --help` explains one command."
    parser = Parser(prog="ldm", description=ldm.__doc__, epilog=epilog, parents=[common_options()])
    parser.set_defaults(quiet=0, verbose=0, debug=False, offline=False)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    commands = {}
    for name in names:
        module = importlib.import_module(f"ldm.cli.{name}")
        text, _, examples = module.__doc__.partition("\n\n")
        shown = {"help": text.rstrip("."), "description": text, "epilog": examples.strip()}
        commands[name] = subparsers.add_parser(name, **shown, parents=[common_options()])
        module.add_arguments(commands[name])
        commands[name].set_defaults(run=module.run)
    return parser, commands


def common_options() -> Parser:
    """What every command takes, before and after its name (a parser of its own each time: defaults are shared)."""
    common = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    add = common.add_argument_group("everywhere").add_argument
    for names, action, text in EVERYWHERE:
        add(*names, action=action, help=text)
    add("--version", action="version", version=f"ldm {ldm.__version__}")
    return common


def _refuse(word: str, parser: Parser) -> NoReturn:
    if not word.startswith("-"):
        raise ConfigError(f"unexpected argument {word!r}", hint="put a text of several words in quotes")
    options = [option for action in parser._actions for option in action.option_strings]
    raise ConfigError(f"unknown option {word.split('=')[0]}", hint=nearest(word.split("=")[0], options))


def _report(line: str, debug: bool, code: int) -> int:
    if console.level == console.SILENT:  # another process of the run says it
        return code
    if debug:
        traceback.print_exc()
    print(line, file=sys.stderr, flush=True)
    return code


@contextmanager
def terminate_politely() -> Iterator[None]:
    """While active, SIGTERM unwinds as Ctrl-C does, so that temporary files go and finished work is kept."""
    here = threading.current_thread() is threading.main_thread()
    old = signal.signal(signal.SIGTERM, _terminate) if here else None
    try:
        yield
    finally:
        if here:
            signal.signal(signal.SIGTERM, old)


def _terminate(_number: int, _frame: object) -> None:
    raise Terminated
