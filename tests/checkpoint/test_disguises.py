"""A pickle that would write a file, in every disguise that it is met in: refused in one line, not run, hardly read."""

import contextlib
import io
import json
import pickle
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from ldm.checkpoint import check_model, load_model
from ldm.checkpoint.lora import read_lora
from ldm.errors import ModelError

SIZE = 1 << 22  # bytes that each payload is filled up to, so that reading it would show


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, marker):
        self.marker = Path(marker)

    def __reduce__(self):
        return Path.touch, (self.marker,)


def filled(content):
    return content + bytes(SIZE - len(content))


def raw(marker, protocol):
    return filled(pickle.dumps(Payload(marker), protocol))


def legacy(marker):
    """As torch.save wrote before its zip form: a magic number, then pickles."""
    file = io.BytesIO()
    torch.save(Payload(marker), file, _use_new_zipfile_serialization=False)
    return filled(file.getvalue())


def zipped(marker):
    file = io.BytesIO()
    torch.save({"a": Payload(marker), "b": torch.zeros(SIZE // 4)}, file)
    return file.getvalue()


def tarred(marker):
    file, content = io.BytesIO(), raw(marker, 2)
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("pickle")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def after_a_header(marker):
    """A sound, empty safetensors file in front."""
    return struct.pack("<Q", 2) + b"{}" + raw(marker, 4)


def before_a_zip(marker):
    """A sound safetensors file with one tensor, and a zip archive at its end, where zip readers look first."""
    table = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    file = io.BytesIO(struct.pack("<Q", len(table)) + table + b"1")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/data.pkl", raw(marker, 2))
    return file.getvalue()


DISGUISES = {  # name of the file: its content
    "zip.ckpt": zipped,
    "zip.safetensors": zipped,
    "legacy.pt": legacy,
    "legacy.safetensors": legacy,
    "tar.safetensors": tarred,
    "protocol-0.safetensors": lambda marker: raw(marker, 0),
    "protocol-2.bin": lambda marker: raw(marker, 2),
    "protocol-3.pth": lambda marker: raw(marker, 3),
    "protocol-4.pkl": lambda marker: raw(marker, 4),
    "protocol-5.SafeTensors": lambda marker: raw(marker, 5),
    "after-a-header.safetensors": after_a_header,
    "before-a-zip.SAFETENSORS": before_a_zip,
}


def bytes_read():
    """Of this process so far; asking costs some hundred itself."""
    return int(Path("/proc/self/io").read_text().split()[1])


def in_place_of(name, content, folder):
    """The tiny model's folder with its U-Net's weights replaced; index and manifest are gone."""
    for path in (folder / "unet").glob("diffusion*"):
        path.unlink()
    (folder / "manifest.json").unlink()
    (folder / "unet" / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("make", [zipped, legacy, lambda marker: raw(marker, 2), lambda marker: raw(marker, 5)])
def test_the_payload_would_run(make, tmp_path):
    """Otherwise the tests below would prove nothing."""
    with contextlib.suppress(RuntimeError):  # not a file of torch's, it says afterwards
        torch.load(io.BytesIO(make(tmp_path / "ran")), weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", DISGUISES)
def test_a_disguised_pickle_is_refused_by_whatever_takes_files(name, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / name
    path.write_bytes(DISGUISES[name](marker))
    acts = {
        "check": lambda: check_model(path),
        "load": lambda: load_model(path, "cpu", "fp32"),
        "lora": lambda: read_lora(path),
    }
    for act, do in acts.items():
        with pytest.raises(ModelError):  # imports are read too, the first time
            do()
        before = bytes_read()
        with pytest.raises(ModelError) as error:
            do()
        read = bytes_read() - before
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        assert read < 4096 + 1024, act
    assert not marker.exists()


def test_a_disguised_pickle_is_refused_as_a_vae(saved, tmp_path):
    for name, make in DISGUISES.items():
        (tmp_path / name).write_bytes(make(tmp_path / "ran"))
        with pytest.raises(ModelError) as error:
            load_model(saved, "cpu", "fp32", vae=tmp_path / name)
        assert "\n" not in str(error.value) and name in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.bin"]
)
@pytest.mark.parametrize("make", [zipped, legacy])
def test_a_pickle_in_a_model_folder_is_refused(name, make, copied, tmp_path):
    folder = in_place_of(name, make(tmp_path / "ran"), copied)
    for act in (check_model, load_model):
        before = bytes_read()
        with pytest.raises(ModelError, match="pickle") as error:
            act(folder)
        assert "\n" not in str(error.value) and bytes_read() - before < SIZE // 8  # the folder's settings
    assert not (tmp_path / "ran").exists()


def test_a_link_and_an_index_do_not_lead_to_a_pickle(copied, tmp_path):
    (tmp_path / "payload.ckpt").write_bytes(zipped(tmp_path / "ran"))
    folder = in_place_of("payload.ckpt", zipped(tmp_path / "ran"), copied)
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "payload.ckpt"}}))
    with pytest.raises(ModelError, match="no safetensors file"):
        load_model(folder, "cpu", "fp32")
    index.unlink()
    (folder / "unet/diffusion_pytorch_model.safetensors").symlink_to(tmp_path / "payload.ckpt")
    with pytest.raises(ModelError, match="pickle"):
        load_model(folder, "cpu", "fp32")
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_model_is_not_run(copied, tmp_path):
    """What transformers and diffusers take for custom code, where they are allowed to."""
    (copied / "manifest.json").unlink()
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nclass Model: pass\n"
    for part in ("unet", "text_encoder", "tokenizer", "."):
        (copied / part / "custom.py").write_text(code)
    mapped = {"auto_map": {"AutoModel": "custom.Model", "AutoTokenizer": ["custom.Model", None]}}
    for name in ("text_encoder/config.json", "tokenizer/tokenizer_config.json"):
        path = copied / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **mapped}))
    load_model(copied, "cpu", "fp32")
    index = copied / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "unet": ["custom", "Model"]}))
    with pytest.raises(ModelError, match="unet"):
        load_model(copied, "cpu", "fp32")
    assert not (tmp_path / "ran").exists()
    sources = Path(load_model.__code__.co_filename).parents[1].rglob("*.py")
    assert not [path for path in sources if "trust_remote_code" in path.read_text(encoding="utf-8")]


def test_a_pipe_in_a_files_place_is_refused_not_waited_for(copied, tmp_path):
    import os

    shutil.rmtree(copied / "unet")
    (copied / "unet").mkdir()
    (copied / "manifest.json").unlink()
    os.mkfifo(copied / "unet/diffusion_pytorch_model.safetensors")
    os.mkfifo(copied / "unet/config.json")
    os.mkfifo(tmp_path / "m.safetensors")
    for act, path in (
        (check_model, copied),
        (read_lora, tmp_path / "m.safetensors"),
        (check_model, tmp_path / "m.safetensors"),
    ):
        with pytest.raises(ModelError, match=r"not an ordinary file|no such model"):
            act(path)
