"""Parts lent to a device while they work, attention chosen for one pipeline: same pictures, nobody's model changes."""

import gc
import threading
import weakref
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from ldm.checkpoint import load_model
from ldm.errors import ConfigError, ModelError
from ldm.nn import offload
from ldm.nn.offload import at_work
from ldm.nn.unet import Attention
from ldm.pipeline import Pipeline
from ldm.pipeline.placement import Placement
from tests.flow_models import build

FAST = {"num_inference_steps": 3, "sampler": "euler", "seed": 7}
META = torch.device("meta")  # a device that is no place: what is lent there is seen by where its weights are


def pixels(images):
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def tensors(part):
    modules = [part] if isinstance(part, torch.nn.Module) else getattr(part, "modules", None) or [part.module]
    return [t for module in modules for t in (*module.parameters(), *module.buffers())]


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(tiny_folder, "cpu", "fp32")


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """What is there before these tests is left out of garbage collections, which take seconds with it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("part", ["unet", "vae", "text"])
def test_what_is_lent_is_a_copy_that_goes_and_leaves_the_part_as_it_is(model, part):
    own = getattr(model, part)
    before = [(id(t), t.data_ptr()) for t in tensors(own)]
    with at_work(own, META) as lent:
        assert type(lent) is type(own) and lent is not own
        assert {t.device for t in tensors(lent)} == {META} and {t.device.type for t in tensors(own)} == {"cpu"}
        assert [t.shape for t in tensors(lent)] == [t.shape for t in tensors(own)]
        gone = [weakref.ref(t) for t in tensors(lent)]
    del lent
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)
    assert [(id(t), t.data_ptr()) for t in tensors(own)] == before
    with Placement(torch.device("cpu"), False, "auto").on(own) as lent:
        assert lent is own
    with at_work(own, torch.device("cpu")) as lent:  # there already: the same memory
        assert [t.data_ptr() for t in tensors(lent)] == [pointer for _, pointer in before]


def test_xls_two_text_encoders_are_lent_together(model):
    class Both:
        def __init__(self):
            self.first, self.second = model.text, model.text

        @property
        def modules(self):
            return (*self.first.modules, *self.second.modules)

    both = Both()
    with at_work(both, META) as lent:
        assert {t.device for t in tensors(lent)} == {META}
        assert lent.first.tokenizer is model.text.tokenizer
    assert both.first is model.text


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1.0}, {"batch_size": 1}])
def test_pictures_with_offload_are_the_same_bits(settings, tiny_folder, model, capsys):
    prompts = ["a cat", "a red dog"]
    plain = Pipeline(prompts, model=tiny_folder, device="cpu", dtype="fp32")
    lent = Pipeline(prompts, model=tiny_folder, device="cpu", dtype="fp32", offload=True)
    assert "offload saves nothing on a CPU" in capsys.readouterr().err
    before = [id(t) for part in (model.unet, model.vae, model.text) for t in tensors(part)]
    first, second = plain.generate(**FAST, **settings), lent.generate(**FAST, **settings)
    assert (pixels(first) == pixels(second)).all()
    assert [record["offload"] for record in (first.metadata[0], second.metadata[0])] == [False, True]
    assert [id(t) for part in (model.unet, model.vae, model.text) for t in tensors(part)] == before


def test_each_part_is_away_while_another_works(tiny_folder):
    """Copies of networks beside the shared ones are counted at every step: only the U-Net's is there."""
    pipe, seen = Pipeline("a cat", model=tiny_folder, device="cpu", dtype="fp32", offload=True), []

    def networks():
        gc.collect()
        counts = Counter(type(o).__name__ for o in gc.get_objects())
        return [counts[kind] for kind in ("UNet", "AutoencoderKL", "CLIPTextModel")]

    pipe.generate(**FAST)
    before = networks()
    pipe.generate(callback=lambda i, x, x0: seen.append(networks()), **FAST)
    assert seen == [[before[0] + 1, *before[1:]]] * 3 and networks() == before


def test_attention_is_the_pipelines_own(tiny_folder, model):
    def pipeline(name):
        return Pipeline("a cat", model=tiny_folder, device="cpu", dtype="fp32", attention=name)

    names, drawn = ["auto", "sdpa", "chunked"], {}
    pipes = {name: pipeline(name) for name in names}
    threads = [threading.Thread(target=lambda n=n: drawn.update({n: pipes[n].generate(**FAST)})) for n in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (pixels(drawn["auto"]) == pixels(drawn["sdpa"])).all()  # auto takes sdpa here
    assert np.abs(pixels(drawn["auto"]) - pixels(drawn["chunked"])).max() <= 1
    assert [drawn[name].metadata[0]["attention"] for name in names] == names
    assert {m.backend for m in model.unet.modules() if isinstance(m, Attention)} == {"auto"}
    own = pipes["chunked"]._engine.placement.model(model)
    assert {m.backend for m in own.unet.modules() if isinstance(m, Attention)} == {"chunked"}
    assert own is pipes["chunked"]._engine.placement.model(model) and own.vae is model.vae
    assert own.unet.conv_in.weight.data_ptr() == model.unet.conv_in.weight.data_ptr()


def test_the_chosen_attention_is_what_runs(tiny_folder, monkeypatch):
    from ldm.nn import attention

    calls, chunked = [], attention.BACKENDS["chunked"]
    monkeypatch.setitem(attention.BACKENDS, "chunked", lambda *args: calls.append(1) or chunked(*args))
    Pipeline("a cat", model=tiny_folder, device="cpu", attention="chunked").generate(**FAST)
    assert calls
    calls.clear()
    Pipeline("a cat", model=tiny_folder, device="cpu").generate(**FAST)
    assert not calls


@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        ({"attention": "chunkd"}, ConfigError, "did you mean 'chunked'"),
        ({"attention": None}, ConfigError, "unknown attention None"),
        ({"offload": "yes"}, ConfigError, "offload: expected True, False or"),
        ({"attention": "xformers", "device": "cpu"}, ModelError, "xformers"),
        ({"compile": "yes"}, ConfigError, "compile"),
        ({"compile": True, "device": "cpu", "offload": True}, ConfigError, "compile: .* leave offload out"),
        ({"backend": "openvno"}, ConfigError, "backend: expected torch or openvino, got 'openvno'"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_read(settings, kind, said):
    with pytest.raises(kind, match=said) as error:
        Pipeline("a cat", model="/nowhere", **settings)
    assert "\n" not in str(error.value)


def test_compile_is_refused_in_one_line_where_it_cannot_be(tiny_folder, tmp_path, monkeypatch):
    build("flux").save_pretrained(tmp_path / "flux")
    with pytest.raises(ConfigError, match="compile: is for a U-Net alone: not for flow transformers"):
        Pipeline("a cat", model=tmp_path / "flux", device="cpu", compile=True)
    with pytest.raises(ConfigError, match="step_cache: compiled code computes all: leave compile out"):
        Pipeline("a cat", model=tiny_folder, device="cpu", compile=True).generate(step_cache=2, **FAST)
    monkeypatch.setenv("CXX", "no-compiler")
    with pytest.raises(ConfigError, match=r"compile: needs a C\+\+ compiler \(no-compiler\); install it"):
        Pipeline("a cat", model="/nowhere", device="cpu", compile=True)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
def test_offload_on_a_gpu_draws_the_same_with_less_of_its_memory(tiny_folder):
    held = {}

    def draw(offload):
        pipe = Pipeline("a cat", model=tiny_folder, device="cuda", dtype="fp32", offload=offload)
        steps = []
        images = pipe.generate(callback=lambda i, x, x0: steps.append(torch.cuda.memory_allocated()), **FAST)
        held[offload] = max(steps)
        return pixels(images)

    draw(True)  # the libraries take their workspaces, 33.6 MB for cuBLAS alone on a Hopper
    before = torch.cuda.memory_allocated()
    lent = draw(True)
    assert torch.cuda.memory_allocated() <= before  # nothing else is left
    assert np.abs(lent - draw(False)).max() <= 1
    assert held[True] < held[False]
    on_cpu = load_model(tiny_folder, "cpu", "fp32")
    given = Pipeline("a cat", model=on_cpu, device="cuda", offload=True).generate(**FAST)
    assert np.abs(pixels(given) - lent).max() <= 1 and on_cpu.device.type == "cpu"


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", ["sdpa", "chunked", "xformers"])
def test_attention_on_a_gpu_draws_the_same(name, tiny_folder):
    if name == "xformers":
        pytest.importorskip("xformers")
    images = [
        Pipeline("a cat", model=tiny_folder, device="cuda", dtype="fp32", attention=one).generate(**FAST)
        for one in ("auto", name)
    ]
    assert np.abs(pixels(images[0]) - pixels(images[1])).max() <= 2


class Watched(offload.BlockLender):
    """A lender that sees whether what it lent before is gone."""

    def __init__(self, device):
        super().__init__(device)
        self.lent = []

    @contextmanager
    def __call__(self, block):
        assert all(earlier() is None for earlier in self.lent)
        with super().__call__(block) as there:
            self.lent.append(weakref.ref(there))
            yield there


@pytest.mark.parametrize("kind", ["sd35", "flux_dev"])
def test_blocks_are_lent_one_at_a_time_and_the_image_stays(kind, tmp_path, monkeypatch):
    build(kind).save_pretrained(tmp_path / kind)
    lenders = []
    monkeypatch.setattr(offload, "BlockLender", lambda device: lenders.append(Watched(device)) or lenders[-1])
    size = {"num_inference_steps": 2, "seed": 1, "height": 64, "width": 64}
    plain, blocks = (
        Pipeline("a red cat", tmp_path / kind, device="cpu", dtype="fp32", offload=how).generate(**size)
        for how in (False, "blocks")
    )
    assert blocks[0].tobytes() == plain[0].tobytes() and blocks.metadata[0]["offload"] == "blocks"
    unet = load_model(tmp_path / kind, "cpu", "fp32").unet
    every = [*unet.transformer_blocks, *unet.single_transformer_blocks]
    sizes = [sum(tensor.nbytes for tensor in tensors(block)) for block in every]
    (lender,) = lenders
    assert max(sizes) <= lender.most <= 1.2 * max(sizes) and lender.placed == 0
    assert len(lender.lent) == size["num_inference_steps"] * len(every)
    lent = offload.with_lent_blocks(unet, META)
    for name, child in lent.named_children():
        expected = torch.device("cpu") if isinstance(child, torch.nn.ModuleList) else META
        assert {t.device for t in tensors(child)} <= {expected}, name
    assert all(t.device.type == "cpu" for t in tensors(unet)) and unet.lend is None
    with pytest.raises(ConfigError, match="offload: blocks of a U-Net"):
        Pipeline("a cat", device="cpu", offload="blocks")
