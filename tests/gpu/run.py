"""What the first hour on a GPU runs, on a machine without a network: see docs/gpu.md.

python tests/gpu/run.py collect DIR                     here: wheels for Python 3.12 and the emoji font, for there
python3 tests/gpu/run.py check --carried DIR --out OUT  there: the tests marked gpu, then timings; 9 minutes at most
python3 tests/gpu/run.py train --carried DIR --out OUT  there: the recipe from the shipped weights on; 9 minutes at most
python tests/gpu/run.py join OUT FOLDER                 here: what a training gave back, put together again
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
WHEELS = ("diffusers", "importlib_metadata")  # what a machine with torch, transformers and accelerate lacks
FONT = "NotoColorEmoji.ttf"
PLACES = ("/usr/share/fonts/truetype/noto", "/usr/share/fonts/noto", "/usr/share/fonts")
PART = 15 << 20  # bytes of a file that comes back
EXPORT = 100  # seconds that are kept for the model's export
MOST = 64 << 20  # bytes that are carried there, with the tree


def collect(args: argparse.Namespace) -> int:
    """Fetch the wheels and copy the font into a folder that travels with the tree."""
    args.folder.mkdir(parents=True, exist_ok=True)
    where = ["--python-version", "3.12", "--implementation", "cp", "--platform", "manylinux_2_17_x86_64"]
    what = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", *where]
    subprocess.run([*what, "-d", str(args.folder), *WHEELS], check=True)
    font = args.font or next(path for folder in PLACES if (path := Path(folder) / FONT).exists())
    shutil.copy(font, args.folder / FONT)
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True).stdout
    files = [REPOSITORY / name for name in tracked.decode().split("\0") if name]
    size = sum(path.stat().st_size for path in (*files, *args.folder.iterdir()) if path.is_file())
    print(f"{args.folder}: with the tree {size / 2**20:.1f} of {MOST >> 20} MiB")
    return int(size > MOST)


def environment(args: argparse.Namespace) -> dict[str, str]:
    """That of the programs to run, with what was carried here installed beside the tree, and nothing fetched."""
    paths = [str(REPOSITORY)]
    if args.carried:
        site = args.out / ".site"
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site)]
        subprocess.run([*install, *map(str, args.carried.glob("*.whl"))], check=True)
        paths.append(str(site))
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(paths), "LDM_GPU_TESTS": args.device}


def run(words: list[str], env: dict[str, str], log: Path, seconds: float) -> int:
    """A program with its output on the screen and in a file; SIGTERM after so many seconds, with 60 more to save."""
    with log.open("ab") as handle:
        child = subprocess.Popen(words, env=env, cwd=log.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        timers = [(time.monotonic() + seconds, signal.SIGTERM), (time.monotonic() + seconds + 60, signal.SIGKILL)]
        os.set_blocking(child.stdout.fileno(), False)
        while child.poll() is None:
            if timers and time.monotonic() > timers[0][0]:
                child.send_signal(timers.pop(0)[1])
            _copy(child.stdout, handle)
            time.sleep(0.2)
        _copy(child.stdout, handle)
    return child.returncode


def _copy(source, handle) -> None:
    if text := source.read():
        handle.write(text)
        sys.stdout.buffer.write(text)
        sys.stdout.flush()


def check(args: argparse.Namespace) -> int:
    """The tests, for half of the time at most, then the timings for the rest of it."""
    args.out.mkdir(parents=True, exist_ok=True)
    end, env, tiny = time.monotonic() + 60 * args.minutes - 60, environment(args), ["--tiny"] * args.tiny
    tests = [sys.executable, "-m", "pytest", "-o", "addopts=", "-m", "gpu", "-q", "-rs", "--strict-markers"]
    tests += ["-s", "-p", "no:cacheprovider", str(REPOSITORY / "tests" / "gpu"), *(["-k", "attention"] * args.tiny)]
    failed = run(tests, env, args.out / "tests.log", (end - time.monotonic()) / 2)
    timings = [sys.executable, str(REPOSITORY / "tests" / "gpu" / "timings.py"), str(args.out / "timings.jsonl")]
    slow = run([*timings, "--device", args.device, *tiny], env, args.out / "timings.log", end - time.monotonic())
    shutil.rmtree(args.out / ".site", ignore_errors=True)
    return failed or slow


def train(args: argparse.Namespace) -> int:
    """`ldm train emoji/unet` from the shipped weights, or from what `join` put together, until time is over.

    Then the run is resumed with the steps that it has, which exports its model.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    end, env = time.monotonic() + 60 * args.minutes - 60, environment(args)
    work, weights = args.work or args.out / ".work", args.init or REPOSITORY / "weights" / "default"
    font = args.carried and args.carried / FONT
    words = [sys.executable, "-m", "ldm", "train", "emoji/unet", "-o", str(work), f"device={args.device}"]
    words += [f"{part}={weights}" for part in ("vae", "text", "init")]
    words += [f"batch_size={args.batch_size}", f"workers={args.workers}", *args.overrides]
    words += [f"data.font={font.resolve()}"] if font and font.exists() else []
    resume = ["--resume"] if (work / "checkpoints").is_dir() else []
    code = run([*words, f"steps={args.steps}", *resume], env, args.out / "train.log", end - EXPORT - time.monotonic())
    newest = sorted((work / "checkpoints").glob("step-*"))[-1:]
    if code == 128 + signal.SIGTERM and newest and not args.state:
        done = int(newest[0].name.removeprefix("step-"))
        code = run([*words, f"steps={done}", "--resume"], env, args.out / "train.log", end - time.monotonic())
    for folder in newest if args.state else [work / "model"]:
        if folder.is_dir():
            given_back(folder, args.out)
    for path in [*sorted((work / "samples").glob("*.png"))[-1:], work / "loss.jsonl", work / "scores.jsonl"]:
        if path.is_file():
            shutil.copy(path, args.out)
    for folder in (args.out / ".site", args.out / ".work"):
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if code in (0, 128 + signal.SIGTERM) else code


def given_back(folder: Path, out: Path) -> None:
    """A folder as run.tar.00, run.tar.01, … of at most PART bytes each."""
    whole = out / ".run.tar"
    with tarfile.open(whole, "w") as tar:
        tar.add(folder, folder.name)
    with whole.open("rb") as handle:
        for number, part in enumerate(iter(lambda: handle.read(PART), b"")):
            (out / f"run.tar.{number:02d}").write_bytes(part)
    whole.unlink()


def join(args: argparse.Namespace) -> int:
    """Put what came back together again: the folder `model`, or with --state `step-…`."""
    args.folder.mkdir(parents=True, exist_ok=True)
    whole = args.folder / ".run.tar"
    whole.write_bytes(b"".join(path.read_bytes() for path in sorted(args.out.glob("run.tar.*"))))
    with tarfile.open(whole) as tar:
        tar.extractall(args.folder, filter="data")
    whole.unlink()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("collect")
    one.add_argument("folder", type=Path)
    one.add_argument("--font", type=Path, help=f"{FONT}, where it is not installed")
    for name in ("check", "train"):
        one = commands.add_parser(name)
        one.add_argument("--out", type=Path, required=True)
        one.add_argument("--carried", type=Path, help="the folder that `collect` made; left out, nothing is installed")
        one.add_argument("--minutes", type=float, default=9.0)
        one.add_argument("--device", default="cuda")
        if name == "check":
            one.add_argument("--tiny", action="store_true", help="few tests, networks of a few thousand numbers")
            continue
        one.add_argument("--batch-size", type=int, default=256)
        one.add_argument("--steps", type=int, default=20_000)
        one.add_argument("--workers", type=int, default=12)
        one.add_argument("--init", type=Path, help="FOLDER/model that `join` made, in place of the shipped weights")
        one.add_argument("--work", type=Path, help="where the run is, to go on there; a folder that is removed")
        one.add_argument("--state", action="store_true", help="give back the exact state (about 200 MB), not the model")
        one.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    one = commands.add_parser("join")
    one.add_argument("out", type=Path)
    one.add_argument("folder", type=Path)
    args = parser.parse_args()
    for name in ("out", "carried", "folder", "work", "init"):
        if isinstance(getattr(args, name, None), Path):
            setattr(args, name, getattr(args, name).resolve())
    return {"collect": collect, "check": check, "train": train, "join": join}[args.command](args)


if __name__ == "__main__":
    sys.exit(main())
