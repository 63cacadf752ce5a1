"""Compiled code whose gradients are wrong is found before it trains anything."""

import re

import pytest
import torch

from ldm.errors import NumericsError
from ldm.training.data import SceneSet
from ldm.training.distributed.alone import Single
from ldm.training.loop.compile_check import check_compiled
from ldm.training.loop.loop import fit
from ldm.training.settings import read_settings
from ldm.training.stages.unet import open_stage
from tests.training.processes import Shared, together, train_shared

WORDS = ["latent_pool=256", "renew=0", "workers=0", "accumulation=1", "weight_floor=0.5", "steps=1", "compile=true"]
THREE = {"steps": 3, "save_every": 3, "validate_every": 3}


def right(graph, _inputs):
    return graph.forward


def wrong(graph, _inputs):
    """Code that loses the gradient of what is upsampled, as torch 2.13 made it."""
    for node in list(graph.graph.nodes):
        if node.op == "call_method" and node.target == "expand" and len(node.args) == 7:
            with graph.graph.inserting_after(node):
                cut = graph.graph.call_method("detach", (node,))
            node.replace_all_uses_with(cut, delete_user_cb=lambda user, cut=cut: user is not cut)
    graph.recompile()
    return graph.forward


@pytest.fixture
def stage(unet_settings, tmp_path):
    settings = read_settings(str(unet_settings), WORDS)
    made = open_stage(settings, tmp_path / "run", SceneSet.of(settings, settings.data))
    made.module.train()
    return made


def compiled(stage, backend):
    torch.compiler.reset()
    stage.network = torch.compile(stage.module, backend=backend)
    return stage


def test_the_check_changes_nothing(stage):
    batch = next(stage.batches(0))
    errors = {name: value.clone() for name, value in stage.tensors.items()}
    weights = [p.detach().clone() for p in stage.module.parameters()]
    code = compiled(stage, right).network
    check_compiled(stage, stage.settings, batch, 0, Single())
    assert stage.network is code and all(p.grad is None for p in stage.module.parameters())
    assert errors and all(torch.equal(stage.tensors[name], value) for name, value in errors.items())
    assert all(torch.equal(p, before) for p, before in zip(stage.module.parameters(), weights))


def test_a_run_with_a_lost_gradient_stops_before_its_first_step(stage, tmp_path):
    said = "compile: the compiled network learns wrongly: its gradient of "
    with pytest.raises(NumericsError, match=said) as found:
        fit(compiled(stage, wrong), stage.settings, tmp_path / "run", None)
    name, length = re.search(r"gradient of (\S+) has length (\S+),", str(found.value)).groups()
    assert float(length) == 0 and not name.startswith("up_blocks.1")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_first_step_that_is_not_finite_is_left_to_the_run(stage):
    batch = next(stage.batches(0))
    batch.latents.fill_(float("nan"))
    check_compiled(compiled(stage, wrong), stage.settings, batch, 0, Single())


def first_layer_lost(graph, inputs):
    """Code that loses the gradient of all before the SiLU."""
    for node in list(graph.graph.nodes):
        if "silu" in str(node.target):
            with graph.graph.inserting_after(node):
                cut = graph.graph.call_method("detach", (node,))
            node.replace_all_uses_with(cut, delete_user_cb=lambda user, cut=cut: user is not cut)
    graph.recompile()
    return graph.forward


class Compiled(Shared):
    """The toy, compiled by `backend`."""

    backend = staticmethod(right)

    def __init__(self, settings, *args):
        super().__init__(settings, *args)
        self.network = torch.compile(self.module, backend=self.backend)

    def loss(self, batch, step, micro):
        self.inside(step, micro)
        return batch.part.mean((self.network(batch.x) - batch.x @ self.map).square().mean(1))


class Wrong(Compiled):
    backend = staticmethod(first_layer_lost)


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_several_processes_with_right_code_go_on(sharded, tmp_path):
    work = lambda rank: train_shared(tmp_path, kind=Compiled, **THREE) and 0  # noqa: E731
    assert together(2, work, sharded) == [0, 0]


def test_several_processes_with_wrong_code_stop_together(tmp_path):
    work = lambda rank: train_shared(tmp_path / "run", kind=Wrong, **THREE) and 0  # noqa: E731
    assert together(2, work, log=tmp_path) == [NumericsError.exit_code] * 2
    assert "learns wrongly: its gradient of 0.weight has length 0, " in (tmp_path / "0.txt").read_text()
    assert (tmp_path / "1.txt").read_text() == ""
