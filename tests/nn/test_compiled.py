"""A compiled U-Net: as the plain one within rounding, and with the same bits in every batch."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ldm.nn.compiled import KEPT, CompiledUNet, code_folder
from ldm.nn.unet import UNet, UNetConfig, doubled

CONFIG = UNetConfig(
    block_out_channels=(32, 64),
    layers_per_block=1,
    transformer_layers=(0, 1),
    num_heads=(4, 4),
    cross_attention_dim=32,
    norm_num_groups=8,
    addition_embed_type="text",
    addition_embed_type_num_heads=4,
)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(KEPT, str(tmp_path / "code"))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet(CONFIG).eval()


def inputs(rows, side=8):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(7, 4, side, side, generator=draw)[:rows]
    states = torch.randn(7, 5, 32, generator=draw)[:rows]
    return x, torch.full((rows,), 500.0), states


def check(unet, compiled):
    whole = compiled(*inputs(7))
    with torch.no_grad():
        plain = unet(*inputs(7))
    assert plain.std() > 0.1 and (whole - plain).abs().max() < 1e-4 * plain.abs().max()
    for rows in (1, 2, 4, 5):
        assert torch.equal(compiled(*inputs(rows)), whole[:rows]), rows
    x, t, states = inputs(3)
    assert torch.equal(compiled(x[1:], t[1:], states[1:]), whole[1:3])  # each in the other place of its two


def test_the_graph_is_whole_and_pairs_give_the_same_bits_in_any_batch(unet, capsys):
    """Traced, and run by PyTorch's own kernels: what the compiler is given."""
    compiled = CompiledUNet(unet, backend="eager")
    check(unet, compiled)
    said = capsys.readouterr().err
    assert said.count("compiling the network for latents of 8x8") == 1 and str(code_folder()) in said
    perturbed = compiled(*inputs(2), perturb=torch.tensor([False, True]), perturb_in=("mid",))
    assert torch.equal(perturbed[0], compiled(*inputs(2))[0]) and not torch.equal(perturbed, compiled(*inputs(2)))


@pytest.mark.slow
def test_compiled_code_agrees_and_gives_the_same_bits_in_any_batch(unet):
    check(unet, CompiledUNet(unet))
    torch.compiler.reset()
    torch.manual_seed(1)
    other = UNet(CONFIG).eval()
    check(other, CompiledUNet(other))  # other weights than those of the code in the folder


def test_compiled_code_never_interpolates_and_its_doubling_has_the_same_gradient(unet):
    """Of `interpolate` in bf16 torch 2.13 compiles a gradient of zero on a CPU, so none may be in the graph."""
    graphs = []

    def look(graph, _inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    torch.compile(unet, backend=look)(*inputs(2))
    torch.compiler.reset()
    torch.compile(unet, backend=look)(*inputs(2, side=7))
    assert "conv2d" in "".join(graphs) and "interpolate" not in "".join(graphs)
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    for size in ((8, 10), (7, 9), (7, 10)):
        want, found = F.interpolate(x, size=size, mode="nearest"), doubled(x, size)
        assert torch.equal(found, want)
        weights = torch.randn_like(want)
        one, other = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, want))
        assert torch.allclose(one, other, atol=1e-6)
    for length in range(1, 200):
        row = torch.arange(length, dtype=torch.float32).view(1, 1, 1, length)
        for size in ((1, 2 * length - 1), (2, 2 * length)):
            assert torch.equal(doubled(row, size), F.interpolate(row, size=size, mode="nearest"))


@pytest.mark.slow
def test_gradients_of_compiled_code_in_bf16_are_the_plain_ones():
    """Of every weight, those of the inner levels above all: with `interpolate` they were zero, and nobody saw it."""
    torch.manual_seed(0)
    net = UNet(CONFIG).train()
    found = []
    for forward in (net, torch.compile(net)):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            made = forward(*inputs(4, side=16))
        made.float().square().mean().backward()
        found.append({name: p.grad for name, p in net.named_parameters() if not name.endswith("k_proj.bias")})
    plain, compiled = found  # the gradient of that bias is 0 in exact numbers
    assert all((compiled[name] - grad).norm() < 0.1 * grad.norm() for name, grad in plain.items())


CODE = """
import sys, torch
from torch._dynamo.utils import counters
from ldm import Pipeline
pipe = Pipeline("a cat", sys.argv[1], device="cpu", compile=sys.argv[2] == "compiled")
images = pipe.generate(seed=3, num_images=3, num_inference_steps=3, batch_size=int(sys.argv[3]))
torch.save([__import__("numpy").asarray(image) for image in images], sys.argv[4])
found = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
print(int(found > 0), images.metadata[0].get("compile"))
"""


@pytest.mark.slow
def test_another_process_finds_the_code_and_draws_the_same_bits(tiny_folder, tmp_path):
    def drawn(*words):
        out = tmp_path / "images.pt"
        command = [sys.executable, "-c", CODE, str(tiny_folder), *words, str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.split(), torch.load(out, weights_only=False)

    (found, told), first = drawn("compiled", "3")
    assert found == "0" and told == "True"
    (found, _), again = drawn("compiled", "1")
    assert found == "1" and all((a == b).all() for a, b in zip(first, again))
    (_, told), plain = drawn("plain", "3")
    assert told == "None" and max(abs(a.astype(int) - b).max() for a, b in zip(first, plain)) <= 1
