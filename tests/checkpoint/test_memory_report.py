"""What weights take and where: as many bytes as the parts, and the blocks that are lent, really have."""

import pytest
from safetensors.torch import load_file

from ldm.checkpoint import load_model, save_model
from ldm.checkpoint.inspect import inspect
from ldm.checkpoint.inspect_text import as_text
from ldm.checkpoint.memory import memory_lines, memory_of, weight_shapes
from ldm.files import format_bytes
from ldm.pipeline import engine as engines
from ldm.pipeline.engine import Engine
from tests.flow_models import build
from tests.nn.make_fixtures import read

PARTS = ("unet", "vae", "text_encoder")


def test_flux_at_full_width():
    clip, t5 = {"a": (123_060_480,)}, {"a": (4_762_310_656,)}
    found = memory_of({"transformer": read("flux_dev"), "text_encoder": clip, "text_encoder_2": t5})
    assert found["parts"]["transformer"] == 2 * 11_901_408_320
    assert found["block"] == 2 * 339_831_296  # a double block; single ones have 141,591,808 numbers
    assert found["around"] == 2 * 64_124_992
    texts = 2 * (123_060_480 + 4_762_310_656)
    assert found["device"]["offload"] == 2 * 11_901_408_320
    assert found["device"]["offload_blocks"] == texts > found["block"] + found["around"]
    alone = memory_of({"transformer": read("flux_dev")})["device"]
    assert alone["offload_blocks"] == found["block"] + found["around"]


@pytest.mark.parametrize("kind", ["sd35", "flux_dev"])
def test_the_report_is_what_the_networks_have(kind, tmp_path, capsys):
    build(kind).save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs", "cpu", "fp32", cache=False)
    folder = save_model(model, tmp_path / "folder", dtype="fp32")
    info = inspect(folder)
    memory = info["memory"]
    network = model.unet
    every = [*network.transformer_blocks, *network.single_transformer_blocks]
    sizes = [
        sum(tensor.nbytes for tensor in (*block.parameters(), *block.buffers())) // 2 for block in every
    ]  # 16 bits
    whole = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers())) // 2
    assert memory["block"] == max(sizes) and memory["around"] == whole - sum(sizes)
    assert memory["parts"]["transformer"] == whole and memory["device"]["all"] == sum(memory["parts"].values())
    assert "--offload-blocks" in as_text(info) and "main memory" in as_text(info)
    assert "memory" not in inspect("default")
    assert memory == memory_of(weight_shapes(folder))
    Engine(folder, device="cpu", dtype="bf16", offload="blocks").load()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("memory: ")]
    (reported,) = (text for head, text in memory_lines(memory) if head == "  --offload-blocks")
    assert said == [f"memory: weights in bf16, {reported}"]


def test_offloading_tells_the_memory_once_before_it_loads(tiny_folder, capsys, monkeypatch):
    monkeypatch.setattr(engines, "load_model", lambda *given, **more: capsys.readouterr())
    engine = Engine(tiny_folder, device="cpu", dtype="fp32", offload=True)
    capsys.readouterr()
    said, again = engine.load().err, engine.load().err
    shapes = {part: load_file(next((tiny_folder / part).glob("*.safetensors"))) for part in PARTS}
    sizes = {part: sum(tensor.nbytes for tensor in found.values()) for part, found in shapes.items()}
    at_once, total = (format_bytes(size) for size in (max(sizes.values()), sum(sizes.values())))
    assert said == f"memory: weights in fp32, {at_once} on the GPU at once, {total} in main memory\n" and again == ""
    Engine(tiny_folder, device="cpu", dtype="fp32").load()
    assert capsys.readouterr().err == ""
