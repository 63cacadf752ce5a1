"""How long the ways through the house are: functions, files and lines that run from a command to its result.

    python tests/trace_paths.py [generate] [finetune] [render] [--list]

generate  `ldm generate "a cat" --steps 2`: also the frames from the command to the U-Net
finetune  `ldm finetune` of a tiny model on eight images, two steps, to the saved LoRA
render    `ldm render` of a file with one line, to its PNG

"lines" are those of the functions of ldm that are entered, in any thread; a function inside another one counts once.
What imports run (modules, class bodies, and what these call) is not counted. "own files" and "own lines" are what is
to be read for a way by itself: the whole files that it meets of its rooms, of its command, and of config, console and
files. --list names files and functions, those with the most lines first. Exit code 1 where a bar is missed.

Frames are those on the stack at the first call of UNet.forward, from ldm.cli's main to that call, both counted; without
lambdas, comprehensions and generator expressions.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "ldm"
NETWORK = (str(PACKAGE / "nn/unet.py"), "UNet.forward")
START = (str(PACKAGE / "cli/__init__.py"), "main")
INLINE = ("<lambda>", "<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")
# way -> {what is counted: the most that it may be}
BARS = {
    "generate": {"frames": 9, "files": 40, "lines": 2400},
    "finetune": {"own lines": 5500},
    "render": {"own lines": 2600},
}
OWN = ("config", "settings_files", "console", "files")  # and these rooms:
ROOMS = {"generate": ("pipeline",), "finetune": ("training", "data"), "render": ("render",)}
FIGURES = ("frames", "functions", "files", "lines", "own files", "own lines")


# Tracing


class Trace:
    """Writes down every function of the package that is entered while it is on, and the first stack at the network."""

    def __init__(self) -> None:
        self.entered: set[CodeType] = set()
        self.seen: set[CodeType] = set()  # of other packages too, or entered before
        self.stack: list[str] = []

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or code in self.seen:
            return
        if not code.co_filename.startswith(str(PACKAGE)):
            self.seen.add(code)
        elif not _importing(frame):
            self.seen.add(code)
            self.entered.add(code)
            if (code.co_filename, code.co_qualname) == NETWORK:
                self.stack = stack_of(frame)

    def __enter__(self) -> Trace:
        threading.setprofile(self)
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)


def _importing(frame: FrameType | None) -> bool:
    """Whether the frame belongs to an import: a module or a class body of the package is being run above it."""
    while frame is not None:
        code = frame.f_code
        body = not code.co_flags & inspect.CO_OPTIMIZED  # of a module or a class
        if body and code.co_filename.startswith(str(PACKAGE)):
            return True
        frame = frame.f_back
    return False


def stack_of(frame: FrameType) -> list[str]:
    """The functions of the package from the command to this frame, outermost first."""
    found: list[str] = []
    current: FrameType | None = frame
    while current is not None:
        code = current.f_code
        if code.co_filename.startswith(str(PACKAGE)) and code.co_name not in INLINE:
            found.append(f"{Path(code.co_filename).relative_to(PACKAGE)}: {code.co_qualname}")
        if (code.co_filename, code.co_name) == START:
            return found[::-1]
        current = current.f_back
    raise SystemExit("the U-Net was not called from ldm.cli's main")


# Counting


@dataclass(frozen=True)
class Function:
    file: str  # in the package
    name: str
    lines: frozenset[int]


def functions_of(entered: Iterable[CodeType]) -> list[Function]:
    """Entered functions with the lines of their source, decorators included."""
    spans: dict[str, dict[int, ast.AST]] = {}
    found = []
    for code in entered:
        path = code.co_filename
        if code.co_name in INLINE or not os.path.isfile(path):
            continue
        if path not in spans:
            spans[path] = _spans(Path(path))
        node = spans[path].get(code.co_firstlineno)
        if node is not None:
            lines = frozenset(range(code.co_firstlineno, node.end_lineno + 1))
            found.append(Function(str(Path(path).relative_to(PACKAGE)), code.co_qualname, lines))
    return found


def _spans(path: Path) -> dict[int, ast.AST]:
    """The function that begins at a line, its decorators included."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found[min([node.lineno, *(one.lineno for one in node.decorator_list)])] = node
    return found


def lines_of(functions: Iterable[Function]) -> Counter[str]:
    """File -> its lines that belong to any of the functions."""
    lines: dict[str, set[int]] = {}
    for function in functions:
        lines.setdefault(function.file, set()).update(function.lines)
    return Counter({file: len(numbers) for file, numbers in lines.items()})


def is_own(way: str, file: Path) -> bool:
    """Whether a file of the package is of the way's rooms, its command, or what is read with any of them."""
    room = file.parts[0].removesuffix(".py")
    return room in (*OWN, *ROOMS[way]) or (room == "cli" and way in (file.stem, *file.parts[1:-1]))


# The ways


def run_traced(words: Sequence[object]) -> Trace:
    """`ldm WORDS` in this process. SystemExit where it fails."""
    from ldm.cli import main

    with Trace() as trace:
        code = main([str(word) for word in words])
    if code:
        raise SystemExit(f"exit code {code}: ldm {' '.join(map(str, words))}")
    return trace


def generate(folder: Path) -> list[object]:
    return ["generate", "a cat", "--steps", 2, "--seed", 1, "-o", folder / "cat.png"]


def finetune(folder: Path) -> list[object]:
    sys.path.insert(0, str(HERE / "comparing"))
    from inputs import write_captioned, write_model

    write_captioned(folder / "captioned")
    write_model("sd", folder / "model")
    words = ["finetune", folder / "captioned", "-o", folder / "run", "--model", folder / "model"]
    return [*words, "--steps", 2, "--resolution", 64]


def render(folder: Path) -> list[object]:
    (folder / "prompts.txt").write_text("a cat\n")
    return ["render", folder / "prompts.txt", "-o", folder / "out", "--steps", 2]


WAYS: dict[str, Callable[[Path], list[object]]] = {"generate": generate, "finetune": finetune, "render": render}


def trace_here(way: str) -> dict[str, Any]:
    """Figures of one way, run in this process."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trace = run_traced(WAYS[way](Path(folder)))
    functions = functions_of(trace.entered)
    by_file = lines_of(functions)
    own = [file for file in by_file if is_own(way, Path(file))]
    longest = sorted(((len(f.lines), f.file, f.name) for f in functions), reverse=True)
    return {
        "frames": len(trace.stack),
        "functions": len(functions),
        "files": len(by_file),
        "lines": sum(by_file.values()),
        "own files": len(own),
        "own lines": sum(len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) for file in own),
        "stack": trace.stack,
        "by file": by_file.most_common(),
        "longest": longest,
    }


def trace_alone(way: str) -> dict[str, Any]:
    """As trace_here, in a process of its own: what was imported or kept before would not be entered again."""
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-P", str(Path(__file__).resolve()), way, "--json"]
    done = subprocess.run(run, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# The command


def show(way: str, found: dict[str, Any], listed: bool) -> bool:
    """Print the figures of a way; whether all its bars are held."""
    held = True
    for name in FIGURES:
        if name == "frames" and way != "generate":
            continue
        most = BARS[way].get(name)
        good = most is None or found[name] <= most
        told = "" if most is None else f"at most {most}: {'held' if good else 'MISSED'}"
        print(f"{way:10}{name:22}{found[name]:6}   {told}".rstrip())
        held = held and good
    if listed:
        print("\nthe stack at the U-Net's first call")
        print("".join(f"{i:4}  {name}\n" for i, name in enumerate(found["stack"], 1)))
        for file, lines in found["by file"]:
            print(f"{lines:6}  {file}")
            print("".join(f"{n:10}  {name}\n" for n, of, name in found["longest"] if of == file), end="")
        print()
    return held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", metavar="generate|finetune|render", help="which ways (all)")
    parser.add_argument(
        "--list", action="store_true", help="name the stack, and every file and function with its lines"
    )
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.ways) - set(WAYS):
        parser.error(f"{', '.join(unknown)} is none of {', '.join(WAYS)}")
    if args.json:
        print(json.dumps(trace_here(args.ways[0])))
        return 0
    held = [show(way, trace_alone(way), args.list) for way in args.ways or WAYS]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
