"""The cases that `run.py` makes: functions of (inputs, the case's folder), under their section and name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Case = Callable[[Path, Path], None]  # (inputs, the case's folder)
CASES: dict[str, dict[str, Case]] = {"generate": {}, "render": {}, "finetune": {}, "train": {}}
QUICK: set[tuple[str, str]] = set()  # (section, case): made with --quick too
FP32 = ("--device", "cpu", "--dtype", "fp32", "-q")


def case(section: str, quick: bool = False, name: str = "") -> Callable[[Case], Case]:
    """Adds a function as a case under its name."""

    def add(function: Case) -> Case:
        CASES[section][name or function.__name__] = function
        if quick:
            QUICK.add((section, name or function.__name__))
        return function

    return add


def command(*words: object, code: int = 0) -> None:
    """`ldm WORDS` in this process. Raises RuntimeError for another exit code."""
    from ldm.cli import main

    found = main([str(word) for word in words])
    if found != code:
        raise RuntimeError(f"exit code {found}, expected {code}: ldm {' '.join(map(str, words))}")
