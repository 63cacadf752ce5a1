"""`--dry-run` refuses what the run would, tells what it would do, and changes nothing."""

import json
import shutil

import pytest

from ldm.errors import CheckpointError, ConfigError
from ldm.training import finetune, train
from ldm.training.checkpoints import reading
from tests.training.conftest import threads
from tests.training.finetune_cases import pictures, run


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_folder):
    """The pictures, one of them with a caption that is too long, and a run of three steps on them."""
    root = tmp_path_factory.mktemp("dry")
    data = pictures(root / "pictures", 4)
    (data / "3.txt").write_text("a red cat " * 40 + "and a zebra")
    run(data, root / "run", tiny_folder)
    return data, root / "run"


def tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_it_tells_the_steps_that_are_left_and_the_captions_that_are_cut(done, tiny_folder, capsys):
    data, out = done
    before = tree(out)
    run(data, out, tiny_folder, resume="latest", dry_run=True, steps=5)
    said = capsys.readouterr().err
    assert "would resume step-00000003: 2 of 5 steps are left" in said and " for 2 steps of " in said
    assert "3.png loses" in said and "4 images to train on" in said
    run(data, out, tiny_folder, resume="latest", dry_run=True)
    said = capsys.readouterr().err
    assert "0 of 3 steps are left" in said and "time: about" not in said
    assert tree(out) == before


def test_it_refuses_what_the_run_refuses(done, tiny_folder, tmp_path):
    data, out = done[0], shutil.copytree(done[1], tmp_path / "run")
    for words, kind, said in (
        ({}, CheckpointError, "already holds a run"),
        ({"resume": "latest", "lora_rank": 4}, CheckpointError, r"settings changed \(lora_rank: 2 → 4\)"),
        ({"resume": "latest", "allow_changed": ["lora_rnak"]}, ConfigError, "did you mean 'lora_rank'"),
        ({"resume": str(out / "checkpoints" / "step-9")}, CheckpointError, "no such checkpoint"),
    ):
        with pytest.raises(kind, match=said):
            run(data, out, tiny_folder, dry_run=True, **words)
    (out / "checkpoints" / "step-00000003" / "manifest.json").unlink()
    before = tree(out)
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        run(data, out, tiny_folder, dry_run=True, resume="latest")
    assert tree(out) == before


def test_a_run_goes_on_by_its_folder_alone(done, tmp_path, capsys):
    """Whose checkpoints are damaged it says so; that was killed before it had one it begins."""
    out = shutil.copytree(done[1], tmp_path / "run")
    (out / "checkpoints" / "step-00000003" / "manifest.json").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no checkpoint is whole"):
            finetune(out=out, resume="latest")
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(CheckpointError, match=r"already holds a run that is finished \(pytorch_lora_weights"):
        finetune(out=out, resume="latest")
    for path in out.glob("*.safetensors"):
        path.unlink()
    with threads(1):
        finetune(out=out, resume="latest")
    assert "nothing to resume, starting from the beginning" in capsys.readouterr().err
    theirs, ours = (reading.read_tensors(folder / "checkpoints" / "step-00000003") for folder in (done[1], out))
    assert all((theirs[name] == value).all() for name, value in ours.items())


def test_the_other_stages_are_compared_too(unet_settings, tmp_path, one_thread):
    out = tmp_path / "run"
    train(unet_settings, out, ["steps=3"])
    with pytest.raises(CheckpointError, match="already holds a run"):
        train(unet_settings, out, dry_run=True)
    with pytest.raises(CheckpointError, match="seed: 0 → 1"):
        train(unet_settings, out, ["steps=6", "seed=1"], resume="latest", dry_run=True)
    assert train(unet_settings, out, ["steps=6"], resume="latest", dry_run=True) == out / "model"
    assert json.loads((out / "settings.json").read_text())["steps"] == 3
