"""Compare what two commits make of the same inputs: images, LoRAs and trained weights, to the bit.

    python tests/compare_commits.py 71f1d71 HEAD                 both in worktrees of a temporary folder, then compared
    python tests/compare_commits.py 71f1d71 HEAD --quick --only generate,render
    python tests/compare_commits.py make CHECKOUT OUT            one of them, kept: CHECKOUT is a folder or a commit
    python tests/compare_commits.py compare OUT_A OUT_B

The cases are those of the folder `comparing`; its `run.py` runs old and new code alike in a process of its own, on one
thread, in fp32. Both get the same inputs (`comparing/inputs.py`): tiny random models, and the default model of
commit 71f1d71 unless --model names a folder. Compared are decoded pixels of images, tensors of .safetensors files,
losses and scores of runs, keys of rendered images, and the names of all these files. Exit code 1 where any differs.
Bits belong to a machine and its libraries: compare only what was made on one.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT, CASES = HERE.parent, HERE / "comparing"
REFERENCE = "71f1d71"  # whose weights/default is the default model of the inputs
SECTIONS = ("generate", "render", "finetune", "train")
IMAGES = (".png", ".jpg", ".webp")
LOGS = ("loss.jsonl", "scores.jsonl")
MANIFEST = "manifest.jsonl"
PASSED_OVER = ("cache",)  # folders of runs that no one reads but the run
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
OFFLINE = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")


# Making


def git(*words: str) -> bytes:
    return subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True).stdout


@contextlib.contextmanager
def checked_out(place: str) -> Iterator[Path]:
    """A folder with the code of `place`: that folder itself, or a worktree of that commit, removed at the end."""
    if Path(place, "ldm").is_dir():
        yield Path(place).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="ldm-commit-") as folder:
        tree = Path(folder, "tree")
        git("worktree", "add", "--quiet", "--detach", str(tree), place)
        try:
            compiled = [sys.executable, "-m", "compileall", "-q", str(tree / "ldm")]  # once for all processes
            subprocess.run(compiled, check=True)
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def make_inputs(folder: Path, model: Path | None) -> Path:
    """The inputs in `folder`, made where they are not there yet."""
    if folder.is_dir():
        return folder.resolve()
    print(f"making the inputs in {folder}", flush=True)
    with tempfile.TemporaryDirectory() as unpacked:
        if model is None:
            data = git("archive", REFERENCE, "weights/default")
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                archive.extractall(unpacked, filter="data")
            model = Path(unpacked, "weights/default")
        program = f"import sys; from pathlib import Path; sys.path.insert(0, {str(CASES)!r})\n"
        program += "from inputs import make_inputs; make_inputs(Path(sys.argv[1]), Path(sys.argv[2]))"
        half = folder.with_name(f"{folder.name}-half")
        shutil.rmtree(half, ignore_errors=True)
        run = [sys.executable, "-P", "-c", program, str(half), str(model)]
        subprocess.run(run, check=True, env={**os.environ, **ONE_THREAD, **OFFLINE})
    half.rename(folder)
    return folder.resolve()


def make(place: str, out: Path, inputs: Path, sections: Sequence[str], quick: bool, cases: Sequence[str] = ()) -> Path:
    """Run all cases of `sections` on the code at `place` and keep what they make in `out`."""
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with checked_out(place) as tree:
        env = {**os.environ, **ONE_THREAD, **OFFLINE, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        check = f"import ldm, pathlib; assert pathlib.Path(ldm.__file__).is_relative_to({str(tree)!r}), ldm.__file__"
        subprocess.run([sys.executable, "-P", "-c", check], check=True, env=env)
        for section in sections:
            if not cases:
                shutil.rmtree(out / section, ignore_errors=True)
            began, log = time.monotonic(), out / f"{section}.log"
            words = [section, str(inputs), str(out), *(["--quick"] if quick else [])]
            words += [word for name in cases for word in ("--case", name)]
            with log.open("wb") as handle:
                run = [sys.executable, "-P", str(CASES / "run.py"), *words]
                ended = subprocess.run(run, env=env, stdout=handle, stderr=subprocess.STDOUT).returncode
            errors = len(list(out.glob(f"{section}/*/error.txt")))
            told = f", exit code {ended}" * bool(ended) + f", {errors} errors: {log}" * bool(errors)
            print(f"{place}: {section} in {time.monotonic() - began:.0f} s{told}", flush=True)
            if ended:
                raise SystemExit(f"{log} says why")
    (out / "about.json").write_text(json.dumps({**machine(), "inputs": digest_of(inputs)}, indent=1))
    return out


def machine() -> dict[str, str]:
    """What bits depend on beside the code."""
    import diffusers
    import torch
    import transformers

    versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
    return {**versions, "machine": platform.platform(), "cpu": torch.backends.cpu.get_cpu_capability()}


def digest_of(inputs: Path) -> str:
    """Of the inputs' place (paths are a part of what some seeds are drawn from) and of all their files."""
    found = hashlib.sha256(str(inputs).encode())
    for path in sorted(path for path in inputs.rglob("*") if path.is_file()):
        found.update(str(path.relative_to(inputs)).encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


# Comparing


@dataclass
class Row:
    """One case compared."""

    name: str
    files: int = 0  # that are equal in both
    faults: list[str] = field(default_factory=list)


def compared(path: Path) -> bool:
    name = path.name
    kept = path.suffix in (*IMAGES, ".safetensors") or name in LOGS or name == "error.txt"
    return (kept or name.startswith("manifest")) and path.suffix != ".json" and path.is_file()


def files_of(folder: Path) -> dict[str, Path]:
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if compared(path)}
    return {name: path for name, path in found.items() if not set(PASSED_OVER) & set(Path(name).parts)}


def content(path: Path) -> dict[str, object]:
    """What of a file is compared, by name: arrays, numbers and texts."""
    import numpy
    from PIL import Image
    from safetensors.torch import load_file

    if path.suffix in IMAGES:
        with Image.open(path) as image:
            return {"pixels": numpy.array(image)}
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    if path.name == "error.txt":
        return {"error": path.read_text()}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if path.name in LOGS:
        return {f"{line['step']} {name}": value for line in lines for name, value in line.items()}
    return {f"{line.get('path')}": (line.get("key"), line.get("seed"), line.get("status")) for line in lines}


def difference(one: object, other: object) -> str | None:
    """None where both are equal to the bit, else in words how far they are from each other."""
    import torch

    if not hasattr(one, "shape") or not hasattr(other, "shape"):
        return None if one == other else f"{one!r:.90} and {other!r:.90}"
    one, other = torch.as_tensor(one), torch.as_tensor(other)
    if one.dtype != other.dtype or one.shape != other.shape:
        return f"{one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}"
    if torch.equal(one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8)):
        return None
    apart = (one.double() - other.double()).abs()
    return f"max abs difference {apart.max().item():.3g}, {int((apart > 0).sum())} of {apart.numel()} numbers"


def file_faults(one: Path, other: Path) -> str | None:
    """None where the contents of two files are equal."""
    ones, others = content(one), content(other)
    lacking = [f"only in A: {name}" for name in ones.keys() - others.keys()]
    lacking += [f"only in B: {name}" for name in others.keys() - ones.keys()]
    found = [(name, difference(ones[name], others[name])) for name in ones.keys() & others.keys()]
    unequal = [name if fault is None else f"{name}: {fault}" for name, fault in sorted(found) if fault is not None]
    told = [*unequal, *sorted(lacking)]
    return f"{told[0]}{f', and {len(told) - 1} more' if len(told) > 1 else ''}" if told else None


def compare_case(name: str, one: Path, other: Path) -> Row:
    row, ones, others = Row(name), files_of(one), files_of(other)
    for path in sorted(ones.keys() & others.keys()):
        fault = file_faults(ones[path], others[path])
        row.faults += [f"{path}: {fault}"] if fault else []
        row.files += fault is None
    if "error.txt" in ones and "error.txt" in others:
        row.faults.append(f"nothing is compared: {ones['error.txt'].read_text().strip()}")
    lone = {path: others[path] for path in sorted(others.keys() - ones.keys())}
    for path in sorted(ones.keys() - others.keys()):
        twin = next((new for new, file in lone.items() if _same_pixels(ones[path], file)), None)
        lone.pop(twin or "", None)
        row.faults.append(f"{path}: only in A" if twin is None else f"{path}: is {twin} in B, with the same pixels")
    row.faults += [f"{path}: only in B{_error_in(file)}" for path, file in lone.items()]
    return row


def _same_pixels(one: Path, other: Path) -> bool:
    return one.suffix == other.suffix and one.suffix in IMAGES and file_faults(one, other) is None


def _error_in(path: Path) -> str:
    return f" ({path.read_text().strip():.300})" if path.name == "error.txt" else ""


def compare(one: Path, other: Path, sections: Sequence[str], listed: bool = False) -> int:
    """Print what differs, and with `listed` what is equal too; 1 where anything differs, else 0."""
    abouts = [json.loads((out / "about.json").read_text()) for out in (one, other)]
    for name in abouts[0]:
        if abouts[0][name] != abouts[1].get(name):
            print(f"not comparable: {name} is {abouts[0][name]} in A, {abouts[1].get(name)} in B")
            return 1
    rows = []
    for section in sections:
        cases = [{path.name for path in (out / section).glob("*") if path.is_dir()} for out in (one, other)]
        if not all(cases):
            print(f"{section}: not made of both, not compared")
            continue
        names = sorted(cases[0] & cases[1])
        found = [compare_case(f"{section}/{name}", one / section / name, other / section / name) for name in names]
        rows += found
        good = sum(not row.faults for row in found)
        print(f"{section}: {good} of {len(found)} cases equal, {sum(row.files for row in found)} files")
        if alone := sorted(cases[0] ^ cases[1]):
            print(f"{section}: {len(alone)} cases are there once and not compared: {', '.join(alone):.200}")
    for row in rows if listed else [row for row in rows if row.faults]:
        print(f"{'DIFFERS' if row.faults else 'equal':8}{row.name:44}{row.files:4} files equal")
        for fault in row.faults[:8]:
            print(f"{'':12}{fault}")
        if len(row.faults) > 8:
            print(f"{'':12}and {len(row.faults) - 8} more")
    bad = [row.name for row in rows if row.faults or not row.files]
    print(f"{len(rows) - len(bad)} of {len(rows)} cases equal, {sum(row.files for row in rows)} files")
    return 1 if bad or not rows else 0


# The command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="A B | make CHECKOUT OUT | compare OUT_A OUT_B")
    parser.add_argument("--work", type=Path, help="where inputs and both results are kept (a temporary folder)")
    parser.add_argument("--inputs", type=Path, help="the inputs, made where they are not there (beside OUT)")
    parser.add_argument("--model", type=Path, help=f"the default model's folder (that of {REFERENCE})")
    parser.add_argument("--quick", action="store_true", help="a part of the cases")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections with commas between")
    parser.add_argument("--case", action="append", default=[], help="only this case, for looking into it")
    parser.add_argument("--list", action="store_true", help="name the cases that are equal too")
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder")
    args = parser.parse_args()
    sections = args.only.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"--only: {', '.join(unknown)} is none of {', '.join(SECTIONS)}")
    if args.words[0] == "compare" and len(args.words) == 3:
        return compare(Path(args.words[1]), Path(args.words[2]), sections, args.list)
    if args.words[0] == "make" and len(args.words) == 3:
        out = Path(args.words[2])
        out.parent.mkdir(parents=True, exist_ok=True)
        inputs = make_inputs(args.inputs or out.parent / "inputs", args.model)
        make(args.words[1], out, inputs, sections, args.quick, args.case)
        return 0
    if len(args.words) != 2:
        parser.error("give two commits, or make CHECKOUT OUT, or compare OUT_A OUT_B")
    return make_both(args, sections)


def make_both(args: argparse.Namespace, sections: Sequence[str]) -> int:
    work = args.work or Path(tempfile.mkdtemp(prefix="ldm-commits-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        inputs = make_inputs(args.inputs or work / "inputs", args.model)
        outs = [work / letter for letter in "ab"]
        for place, out in zip(args.words, outs):
            make(place, out, inputs, sections, args.quick, args.case)
        return compare(*outs, sections, args.list)
    finally:
        if args.work is None and not args.keep:
            shutil.rmtree(work)
        else:
            print(f"kept: {work}")


if __name__ == "__main__":
    sys.exit(main())
