"""`ldm generate` from end to end, in this process, on a tiny model."""

import json
import resource
import shutil
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.checkpoint import load_model, save_model
from ldm.cli import main
from ldm.images import Metadata, encode, read_metadata
from ldm.render.sheets import gallery

FAST = ["--steps", "2", "--sampler", "ddim"]


@pytest.fixture
def generate(tiny_folder, tmp_path, monkeypatch):
    """Runs `ldm generate` in an empty folder and returns its exit code."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return lambda *words, model=tiny_folder: main(["generate", *words, *FAST, "--model", str(model)])


@pytest.fixture
def files(tmp_path):
    """The names in that folder."""
    return lambda: sorted(p.relative_to(tmp_path / "here").as_posix() for p in (tmp_path / "here").rglob("*"))


def test_names_come_from_the_prompt_and_nothing_is_overwritten(generate, files, capsys):
    assert generate("a cat") == 0
    assert files() == ["a-cat.png"]
    assert generate("a cat", "-n", "3", "--seed", "7") == 0
    assert files() == ["a-cat-2.png", "a-cat-3.png", "a-cat-4.png", "a-cat.png"]
    assert capsys.readouterr().out.split() == ["a-cat.png", "a-cat-2.png", "a-cat-3.png", "a-cat-4.png"]
    assert [read_metadata(f"a-cat-{i}.png").ldm["seed"] for i in (2, 3, 4)] == [7, 8, 9]


def test_options_reach_the_picture(generate, files):
    words = ["a dog", "-o", "out/x.webp", "--seed", "3", "--guidance-scale", "2.5", "--negative-prompt", "a cat"]
    assert generate(*words, "--width", "24", "--height", "40", "--dtype", "bf16", "--spacing", "leading", "-q") == 0
    assert files() == ["out", "out/x.webp"]
    with Image.open("out/x.webp") as image:
        assert image.size == (24, 40) and image.format == "WEBP"
    record = read_metadata("out/x.webp").ldm
    expected = {"prompt": "a dog", "negative_prompt": "a cat", "seed": 3, "guidance_scale": 2.5, "sampler": "ddim"}
    expected |= {"num_inference_steps": 2, "width": 24, "height": 40, "dtype": "bf16", "spacing": "leading"}
    assert {name: record[name] for name in expected} == expected


def test_quiet_says_nothing_and_verbose_says_how(generate, capsys):
    assert generate("a cat", "-q") == 0
    assert capsys.readouterr() == ("", "")
    assert generate("a cat", "-v", "--seed", "4", "-n", "2") == 0
    assert capsys.readouterr().err == "2 steps of ddim, cpu in fp32, seeds 4, 5\n"


def test_no_metadata_and_format(generate, files):
    assert generate("a cat", "-o", "d/", "--format", "jpg", "--no-metadata") == 0
    assert files() == ["d", "d/a-cat.jpg"]
    assert read_metadata("d/a-cat.jpg") == Metadata()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sampler", "eular"], "did you mean 'euler'"),
        (["--width", "100"], "use 96 or 104"),
        (["--guidance-scale", "nan"], "guidance_scale: nan is not a finite number"),
        (["--steps", "0"], "num_inference_steps: 0 is outside"),
        (["-n", "0"], "num_images: 0 is outside"),
        (["--seed", "-5"], "seed: -5 is outside"),
        (["--model", "nowhere"], "nowhere: no such model folder"),
        (["--model", "old.ckpt"], "pickle"),
        (["--lora", "x.safetensors:0.5"], "x.safetensors: no such file"),
        (["--from", "old.png"], "no such image"),
        (["--from", "old.ckpt"], "cannot be read as an image"),
        (["--set", "steps=3"], "--set belongs to --from"),
        (["-o", "old.ckpt/x.png"], "is a file, not a folder"),
        (["-o", "x.gif"], "unknown image format '.gif'"),
        (["-o", "/proc/nowhere/x.png"], "choose another folder"),
        (["--device", "gpu"], "unknown device"),
    ],
)
def test_what_cannot_be_done_is_refused_before_weights(words, message, tiny_folder, tmp_path, monkeypatch, capsys):
    def refuse(*_args, **_kwargs):
        raise AssertionError("weights were read")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.ckpt").write_bytes(b"\x80\x02}q\x00.")
    monkeypatch.setattr("ldm.pipeline.engine.load_model", refuse)
    assert main(["generate", "a cat", "--model", str(tiny_folder), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["old.ckpt"]


def test_a_full_disk_is_exit_4_and_leaves_nothing_half_written(generate, files, capsys):
    assert generate("a cat", "--no-metadata") == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        code = generate("a dog")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert code == 4 and "a-dog.png: cannot be written" in error and "internal" not in error
    assert files() == ["a-cat.png"]


def test_nan_is_exit_5_and_no_picture(generate, files, tiny_folder, tmp_path, capsys):
    model = load_model(tiny_folder, device="cpu", dtype="fp32", cache=False)
    with torch.no_grad():
        model.unet.conv_out.weight.fill_(3e38)
    save_model(model, tmp_path / "huge", dtype="fp32")
    assert generate("a cat", model=tmp_path / "huge") == 5
    assert "holds NaN or infinity" in capsys.readouterr().err
    assert files() == []


def test_ctrl_c_keeps_the_finished_pictures(generate, files, monkeypatch, capsys):
    from ldm.pipeline import engine

    batches, decode = [], engine.decode

    def interrupt(vae, latents, *tile):
        batches.append(len(latents))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return decode(vae, latents, *tile)

    monkeypatch.setattr(engine, "decode", interrupt)
    assert generate("a cat", "-n", "5", "--batch-size", "1", "--seed", "1") == 130
    assert files() == ["a-cat-2.png", "a-cat.png"]
    assert capsys.readouterr().err.endswith("stopped (Ctrl-C)\n")
    assert generate("a cat", "--seed", "2", "-o", "again.png") == 0
    with Image.open("again.png") as again, Image.open("a-cat-2.png") as kept:
        assert again.tobytes() == kept.tobytes()


def test_it_runs_outside_the_main_thread(generate, files):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(generate("a cat")))
    thread.start()
    thread.join()
    assert codes == [0] and files() == ["a-cat.png"]


def test_loras_by_file_and_by_tag(generate, tiny_folder, tmp_path, capsys):
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    pair = {f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.ones(32, 2)}
    (tmp_path / "loras").mkdir()
    file = tmp_path / "loras" / "red.safetensors"
    save_file({**pair, f"{layer}.alpha": torch.tensor(4.0)}, file)
    words = ["a <lora:red:-0.5> cat", "-o", "x.png", "--lora-dir", str(tmp_path / "loras")]
    assert generate(*words, "--lora", f"{file}:0.8", "--lora", str(file)) == 0
    told = [(lora["path"], lora["weight"]) for lora in read_metadata("x.png").ldm["lora"]]
    assert told == [(str(file), 0.8), (str(file), 1.0), (str(file), -0.5)]
    save_file({**pair, "unet.nowhere": torch.ones(1)}, file)
    assert generate("a cat", "--lora", str(file)) == 2
    assert "1 of 3 keys match no layer of this model: unet.nowhere" in capsys.readouterr().err
    assert generate("a cat", "--lora", str(file), "--allow-unapplied") == 0
    assert "1 keys are not applied: unet.nowhere" in capsys.readouterr().err
    assert read_metadata("a-cat.png").ldm["allow_unapplied"] is True
    assert generate("--from", "a-cat.png", "-o", "again.png") == 0
    assert pixels("again.png") == pixels("a-cat.png")
    model = ["--model", str(tiny_folder)]
    assert main(["render", "--from", "a-cat.png", "-o", "once/", *model, "--dora-scaling", "peft"]) == 0
    assert main(["render", "--from", "once/", "-o", "twice/"]) == 0 and main(["verify", "twice/"]) == 0
    line = json.loads(Path("twice/manifest.jsonl").read_text())
    assert line["allow_unapplied"] is True and line["settings"]["dora_scaling"] == "peft"
    command = gallery.command({**line["settings"], **gallery.allowed(line)}, "x.png")
    assert command == "ldm generate --from x.png"


def pixels(name):
    with Image.open(name) as image:
        return image.tobytes()


def test_a_picture_is_drawn_again_from_its_file(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny_folder)  # a picture tells the name of its model
    first = ["generate", "a <red>, 'cat'", "--model", "tiny", "--steps", "3", "--sampler", "euler_ancestral"]
    first += ["--spacing", "karras", "--guidance", "apg", "--guidance-scale", "3", "--seed", "7", "--width", "24"]
    assert main([*first, "--negative-prompt", "-a dog", "--dtype", "bf16", "-o", "old.png"]) == 0
    assert main(["generate", "--from", "old.png", "-o", "again.png"]) == 0
    assert pixels("again.png") == pixels("old.png") and capsys.readouterr().err == ""
    assert read_metadata("again.png").ldm == read_metadata("old.png").ldm
    words = ["--from", "old.png", "--set", "steps=4", "--seed", "8", "a dog", "-o", "other.png"]
    assert main(["generate", *words]) == 0
    changed = {"num_inference_steps": 4, "seed": 8, "prompt": "a dog"}
    assert read_metadata("other.png").ldm == {**read_metadata("old.png").ldm, **changed}
    assert main(["generate", "--from", "old.png", "--set", "seed=7,9", "-o", "two/"]) == 0
    assert sorted(read_metadata(path).ldm["seed"] for path in tmp_path.glob("two/*")) == [7, 9]
    capsys.readouterr()
    assert main(["generate", "--from", "old.png", "--dtype", "fp32", "-o", "fp32.png"]) == 0
    assert capsys.readouterr().err == "warning: dtype was bf16, is fp32: the last bits may differ\n"


def test_what_is_typed_wins_over_the_image_at_its_default_too(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = ["--model", str(tiny_folder), "--steps", "3", "--guidance", "apg", "--apg-eta", "0.5", "--seed", "7"]
    old += [
        "--negative-prompt",
        "a dog",
        "--emphasis",
        "no_norm",
        "--dtype",
        "bf16",
        "--sampler",
        "ddim",
        "--eta",
        "0.5",
    ]
    assert main(["generate", "a cat", *old, "--guidance-interval", "0", "0.5", "--width", "24", "-o", "old.png"]) == 0

    def again(*words, model=("--model", str(tiny_folder))):
        assert main(["generate", "--from", "old.png", *words, *model, "-o", "new.png"]) == 0
        return read_metadata("new.png").ldm

    same, was = again(), read_metadata("old.png").ldm
    assert same == was and same["apg_eta"] == 0.5 and again("--guidance", "apg", "--sampler", "ddim") == was
    words = ["--guidance", "cfg", "--negative-prompt", "", "--emphasis", "original", "--dtype", "auto", "-n", "1"]
    now = again(*words)
    expected = {"guidance": "cfg", "negative_prompt": "", "emphasis": "original", "dtype": "fp32"}
    assert {name: now[name] for name in expected} == expected and "apg_eta" not in now
    assert again("--guidance", "pag", "--pag-scale", "2")["pag_scale"] == 2
    now = again("--guidance-preset", "xl", "--sampler", "DPM++ 2M Karras")
    assert (now["sampler"], now["spacing"], now["guidance_sigma_interval"]) == ("dpmpp_2m", "karras", [0.28, 5.42])
    assert "guidance_interval" not in now and now["eta"] is None
    assert again("--set", "sampler=euler")["sampler"] == "euler"
    assert again("--timesteps", "900,500")["timesteps"] == [900, 500]
    shutil.copy("new.png", "old.png")
    now = again("--steps", "2")
    assert now["num_inference_steps"] == 2 and now["timesteps"] is None
    assert again("--steps", "2", model=("--model", "default"))["model"] == "default"


def test_a_picture_of_another_program_is_drawn_as_far_as_it_says(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = "a cat\nSteps: 2, Sampler: Euler a, CFG scale: 3, Seed: 5, Size: 24x32, Model hash: 0123456789, Model: x"
    inside = Metadata(f"{text}, ADetailer model: face, RNG: CPU, Version: v1.9.0")
    (tmp_path / "old.png").write_bytes(encode(Image.new("RGB", (8, 8)), metadata=inside))
    assert main(["generate", "--from", "old.png", "--model", str(tiny_folder), "-o", "new.png"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "warning: not repeated: ADetailer model: face" and "drawn by x (hash 0123456789)" in lines[1]
    record = read_metadata("new.png").ldm
    expected = {"seed": 5, "num_inference_steps": 2, "sampler": "euler_ancestral", "spacing": "linspace", "width": 24}
    assert len(lines) == 2 and {name: record[name] for name in expected} == expected


def test_prompt_and_noise_level_options_reach_the_record(generate, files, capsys):
    options = ["--sigmas", "9,1", "--clip-skip", "1", "--emphasis", "no_norm"]
    assert generate("a (cat:1.3)", "--seed", "1", *options) == 0
    record = read_metadata(files()[0]).ldm
    assert (record["sigmas"], record["clip_skip"], record["emphasis"]) == ([9, 1], 1, "no_norm")
    assert generate("a (cat", "--strict") == 2 and "is not closed" in capsys.readouterr().err
    assert generate("a cat", "--sigmas", "9,x") == 2 and "expected numbers with commas" in capsys.readouterr().err
    assert len(files()) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("--steps 3", "--steps inside the prompt is drawn as text"),
        ("—steps 3", "—steps inside the prompt is drawn as text"),
        ("{red|blue}", "'{red|blue}' is drawn as text: choices and wildcards are for prompt files"),
        ("__my colours__", "'__my colours__' is drawn as text"),
    ],
)
def test_notation_of_prompt_files_inside_a_prompt_is_told(tiny_folder, tmp_path, capsys, text, told):
    words = ["generate", f"a cat {text}", "--model", str(tiny_folder), "--steps", "1", "-o", str(tmp_path / "a.png")]
    assert main(words) == 0
    assert told in capsys.readouterr().err
