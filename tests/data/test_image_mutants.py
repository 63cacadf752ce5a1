"""Faults C 22-24: whatever is wrong with an image's bytes, one line says so, within a second and 200 MB."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).with_name("image_mutants.py")


def damage(count, seed):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(COMMAND), str(count), str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check(said, count):
    assert sum(said["outcomes"].values()) == count and len(said["formats"]) == 9
    assert said["outcomes"]["read"] > count * 0.1  # most damage is small
    assert set(said["outcomes"]) > {"is damaged or cut short", "is no image", "is of a kind that is not read"}


def test_a_thousand_mutants_of_nine_formats_raise_nothing_but_our_error():
    check(damage(1000, 0), 1000)


@pytest.mark.slow
def test_many_mutants_of_nine_formats_raise_nothing_but_our_error():
    """50,000; LDM_MUTANTS=200000 for more."""
    count = int(os.environ.get("LDM_MUTANTS", "50000"))
    check(damage(count, 1), count)
