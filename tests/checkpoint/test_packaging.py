"""The wheel carries weights/, configs/ and docs/prompts/; a checkout and an editable install read the checkout's."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ldm.checkpoint import check_model, default_folder, folder, shipped
from ldm.errors import ModelError

ROOT = Path(__file__).parents[2]
BUILD = "import setuptools.build_meta as b, sys; getattr(b, sys.argv[1])('out')"


def test_a_default_install_never_pulls_torchvision():
    """Its wheels need CUDA's libraries; beside a CPU build of torch they break `import transformers`."""
    from importlib.metadata import requires

    needed = [line for line in requires("ldm-pipeline") if "extra ==" not in line]
    names = {re.split(r"[ <>=!~;\[(]", line)[0] for line in needed}
    assert "torch" in names and not names & {"torchvision", "open_clip_torch", "xformers", "timm"}
    assert not any("torchvision" in line for line in needed)
    for name in names - {"torch"}:  # and none of those needs it
        of_it = [line for line in requires(name) or [] if "extra ==" not in line]
        assert not any(line.startswith("torchvision") for line in of_it), name


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, saved):
    """A copy of the checkout with a model and a config of its own."""
    root = tmp_path_factory.mktemp("checkout")
    hidden = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "ldm", root / "ldm", ignore=hidden)
    shutil.copy(ROOT / "pyproject.toml", root)
    shutil.copytree(saved, root / "weights/default")
    (root / "weights/fast").mkdir()
    (root / "weights/fast/pytorch_lora_weights.safetensors").write_text("a few-step LoRA")
    (root / "weights/default/controlnets/edges").mkdir(parents=True)
    (root / "weights/default/controlnets/edges/config.json").write_text("{}")
    (root / "weights/.cache").mkdir()
    (root / "weights/.cache/partial").write_text("not for others")
    (root / "configs/emoji").mkdir(parents=True)
    (root / "configs/emoji/unet.yaml").write_text("steps: 1\n")
    (root / "docs/prompts").mkdir(parents=True)
    (root / "docs/prompts/everyday-30.tsv").write_text("a cat\t1F408\t-\tsingle\t0\n")
    for name in ("README.md", "LICENSE", "NOTICE"):
        (root / name).write_text(name)
    return root


def python(code, folder, *args):
    run = subprocess.run([sys.executable, "-c", code, *args], cwd=folder, check=True, capture_output=True, text=True)
    return run.stdout


def build(checkout, what):
    for old in ("out", "build"):
        shutil.rmtree(checkout / old, ignore_errors=True)
    python(BUILD, checkout, what)
    return next((checkout / "out").iterdir())


def test_the_wheel_holds_the_default_model_and_the_configs(checkout, saved, tmp_path):
    names = zipfile.ZipFile(wheel := build(checkout, "build_wheel")).namelist()
    shipped_names = {name for name in names if name.startswith(("ldm/_weights/", "ldm/_configs/", "ldm/_prompts/"))}
    model = {f"ldm/_weights/default/{p.relative_to(saved).as_posix()}" for p in saved.rglob("*") if p.is_file()}
    others = {"ldm/_configs/emoji/unet.yaml", "ldm/_prompts/everyday-30.tsv"}
    others.add("ldm/_weights/fast/pytorch_lora_weights.safetensors")
    others.add("ldm/_weights/default/controlnets/edges/config.json")
    assert shipped_names == model | others
    assert {"ldm/checkpoint/clip_merges.txt.xz", "ldm/checkpoint/LICENSE-CLIP.txt"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "weights", "configs", "docs"))]

    zipfile.ZipFile(wheel).extractall(tmp_path / "site")  # as pip installs it
    code = "import ldm.checkpoint as c; print(c.check_model('default')); print(c.shipped('configs'))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "site", check=True, capture_output=True, text=True
    )
    assert run.stdout.split() == [str(tmp_path / "site/ldm/_weights/default"), str(tmp_path / "site/ldm/_configs")]


def test_an_editable_install_carries_no_copy(checkout):
    names = zipfile.ZipFile(build(checkout, "build_editable")).namelist()
    assert names and not [name for name in names if "weights/" in name or "_configs" in name]
    code = "from ldm.checkpoint import default_folder as d; print(d())"
    assert python(code, checkout).strip() == str(checkout / "weights/default")


def test_where_the_default_model_is(tmp_path, monkeypatch):
    for name in ("weights", "configs", "docs/prompts"):
        assert shipped(name) == ROOT / name and shipped(name).is_dir()
    monkeypatch.setattr(folder, "PACKAGE", tmp_path / "ldm")
    for act in (default_folder, check_model):
        with pytest.raises(ModelError, match="default model is not there; install the package again"):
            act()
