"""`ldm convert`: what is written, in which precision, and what is never overwritten."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import ldm
from ldm.checkpoint import load_model
from ldm.checkpoint.safety import read_header
from ldm.cli import main
from ldm.errors import ConfigError, ModelError


def test_folder_to_file_to_folder_by_the_command_line(tiny_folder, tmp_path, capsys):
    file, back = tmp_path / "a.safetensors", tmp_path / "back"
    assert main(["convert", str(tiny_folder), str(file)]) == 0
    assert main(["convert", str(file), str(back), "--dtype", "bf16", "--prediction-type", "epsilon"]) == 0
    assert capsys.readouterr().out.split() == [str(file), str(back)]
    assert json.loads((back / "scheduler/scheduler_config.json").read_text())["prediction_type"] == "epsilon"
    one, other = (load_model(place, "cpu", "fp32").unet.state_dict() for place in (tiny_folder, back))
    assert all(torch.equal(other[name], tensor.bfloat16().float()) for name, tensor in one.items())


def dtypes(path):
    files = [path] if path.is_file() else list(path.rglob("*.safetensors"))
    return {t.dtype for file in files for name, t in read_header(file).tensors.items() if name != "v_pred"} - {"I64"}


def test_weights_keep_their_precision(tiny_folder, tmp_path):
    names = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "float32": "F32", "torch.float16": "F16"}
    for dtype, name in {**names, torch.bfloat16: "BF16"}.items():
        file = ldm.convert(tiny_folder, tmp_path / f"{dtype}.safetensors", dtype)
        assert dtypes(file) <= {name, "F32"} and dtypes(ldm.convert(file, tmp_path / str(dtype))) == {name}
    tensors = load_file(tmp_path / "fp16.safetensors")
    tensors["first_stage_model.decoder.conv_in.bias"] = tensors["first_stage_model.decoder.conv_in.bias"].float()
    save_file(tensors, tmp_path / "mixed.safetensors", read_header(tmp_path / "fp16.safetensors").metadata)
    assert dtypes(ldm.convert(tmp_path / "mixed.safetensors", tmp_path / "mixed")) == {"F32"}


def test_only_a_model_is_overwritten(tiny_folder, tmp_path):
    file = ldm.convert(tiny_folder, tmp_path / "a.safetensors")
    before = file.read_bytes()
    assert ldm.convert(tiny_folder, file).read_bytes() == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("keep me")
    (tmp_path / "text.safetensors").write_text("no model")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "dir.safetensors").mkdir()
    for out, said in {
        "notes": "exists and is no model",
        "text.safetensors": "exists and is no model",
        "other.safetensors": "exists and is no model",
        "dir.safetensors": "is a folder",
        "model.ckpt": "only safetensors is written",
    }.items():
        with pytest.raises(ModelError, match=said):
            ldm.convert(tiny_folder, tmp_path / out)
    with pytest.raises(ModelError, match="is the model itself"):
        ldm.convert(file, file)
    with pytest.raises(ModelError, match="no such model folder"):
        ldm.convert(tmp_path / "none", tmp_path / "b.safetensors")
    with pytest.raises(ConfigError, match="unknown dtype 'fp8'"):
        ldm.convert(file, tmp_path / "b.safetensors", dtype="fp8")
    assert file.read_bytes() == before and not (tmp_path / "b.safetensors").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_write_that_fails_leaves_the_old_file(tiny_folder, tmp_path):
    file = ldm.convert(tiny_folder, tmp_path / "a.safetensors")
    tensors, before = load_file(file), file.read_bytes()
    tensors["model.diffusion_model.out.2.bias"][0] = 1e6  # too large for fp16, found while writing
    save_file(tensors, tmp_path / "large.safetensors", read_header(file).metadata)
    with pytest.raises(ModelError, match="too large for float16"):
        ldm.convert(tmp_path / "large.safetensors", file, dtype="fp16")
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_help_imports_no_torch():
    code = "import sys; from ldm.cli import main; main(['convert', '--help'])\n"
    code += "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "OUT" in done.stdout, done.stderr
