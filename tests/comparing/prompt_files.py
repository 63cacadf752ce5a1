"""What `ldm render` makes of prompt files of every kind."""

from __future__ import annotations

from pathlib import Path

from registry import FP32, case, command


def render(inputs: Path, out: Path, file: str, *words: object, model: str = "sd", code: int = 0) -> None:
    own = ("--model", inputs / "models" / model, "--seed", 3, *FP32)
    command("render", inputs / "prompts" / file, "-o", out, *own, *words, code=code)


@case("render", quick=True)
def plain(inputs: Path, out: Path) -> None:
    """Lines with flags of A1111 and kohya, templates, wildcards, a LoRA's tag; one line is bad."""
    words = ("--wildcards", inputs / "prompts/words", "--lora-dir", inputs / "loras", "--steps", 2)
    render(inputs, out, "plain.txt", *words, "--contact-sheet", "--gallery", code=3)


@case("render", quick=True)
def table(inputs: Path, out: Path) -> None:
    """Rows with images and masks, which take the command's options where they say nothing."""
    render(inputs, out, "table.csv", "--batch-size", 3, "--cfg", 3, "--neg", "blue", "--sampler", "unipc")


@case("render")
def groups(inputs: Path, out: Path) -> None:
    render(inputs, out, "groups.json", "--steps", 3, "--guidance", "apg", "--format", "webp")
    command("render", "--from", out, "-o", out / "again", "--set", "steps=2", *FP32)


@case("render")
def shards(inputs: Path, out: Path) -> None:
    for shard in ("1/2", "2/2"):
        render(inputs, out, "groups.json", "--steps", 2, "--shard", shard)


@case("render")
def default(inputs: Path, out: Path) -> None:
    render(inputs, out, "default.txt", "--steps", 2, "-n", 3, model="default")


@case("render", quick=True)
def grid(inputs: Path, out: Path) -> None:
    axes = ("--grid", "steps=2,3", "--grid", "sampler=euler,DPM++ 2M Karras", "--grid", "prompt=a->the")
    render(inputs, out, "grid.txt", *axes[:4])
    render(inputs, out / "words", "grid.txt", "--steps", 2, *axes[4:], "--grid", "cfg=2-8:3")


@case("render")
def python(inputs: Path, out: Path) -> None:
    """ldm.render with texts and groups of settings."""
    import ldm

    words = {"model": inputs / "models/xl", "device": "cpu", "dtype": "fp32", "steps": 2}
    lines = ["a red cat", {"prompt": "a dog", "seed": 7, "cfg": 3}, "a {red|blue} cat"]
    ldm.render(lines, out, **words, num_images=2, seed=5, hires_scale=1.5)
