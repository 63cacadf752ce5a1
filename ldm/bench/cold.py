"""From a cold start to an image on disk, against importing the libraries that every such tool needs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ldm.bench.timing import Timing, alternate
from ldm.errors import LdmError

IMPORTS = "from diffusers import AutoencoderKL; from transformers import CLIPTextModel"


def cold(repeats: int = 5, model: str = "default") -> Timing:
    """Time `ldm generate "a cat"` in a new process, in alternation with bare imports. Raises LdmError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "a-cat.png"
        draw = [sys.executable, "-m", "ldm", "generate", "a cat", "--seed", "1", "--model", model, "-o", str(out), "-q"]
        sides = {"ldm generate": lambda: _run(draw), "imports alone": lambda: _run([sys.executable, "-c", IMPORTS])}
        seconds = alternate(sides, repeats)
        if not out.stat().st_size:
            raise LdmError("wrote no image", where="ldm generate")
    return Timing("cold", seconds, {"model": model, "imports": IMPORTS})


def _run(command: list[str]) -> None:
    """Run a command. Raises LdmError with the last line of its errors."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or ["without a message"])[-1]
        raise LdmError(f"ended with {done.returncode} ({last_line})", where=" ".join(command[1:4]))
