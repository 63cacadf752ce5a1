"""Muon for matrices and convolutions, AdamW for the rest: what torch's own two do to each; SGD, 8 bits, adapters."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from ldm.errors import ConfigError
from ldm.nn.lora import attach, new_updates
from ldm.training.checkpoints.reading import read_tensors, restore_state
from ldm.training.checkpoints.state import TrainState, save
from ldm.training.loop import muon
from ldm.training.loop.optimizers import checkpoint_bytes, make_optimizer
from ldm.training.loop.step import clip_gradients, ema_copy
from ldm.training.settings import read_settings
from tests.training.toy import toy_settings

SETTINGS = read_settings("emoji/unet", ["vae=x", "text=x", "learning_rate=1e-3", "weight_decay=0.1"])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 12, 3)
        self.norm = nn.GroupNorm(2, 12)
        self.linear = nn.Linear(12, 5)

    def forward(self, x):
        return self.linear(self.norm(self.conv(self.conv_in(x))).mean((2, 3)))


def stepped(net, optimizer, steps=3):
    for step in range(steps):
        torch.manual_seed(step)
        net(torch.randn(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def net():
    torch.manual_seed(7)
    return Net()


def test_each_parameter_moves_as_torch_moves_it(net, monkeypatch):
    """The peer: the convolution held as a matrix all along, under torch's two optimizers side by side."""
    monkeypatch.setattr(muon, "fast_bf16", lambda device: True)  # the iteration in bf16, as torch has it
    other = copy.deepcopy(net)
    matrix = nn.Parameter(other.conv.weight.detach().flatten(1).clone())
    rest = [p for n, p in other.named_parameters() if n not in ("conv.weight", "linear.weight")]
    peers = [
        torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True),
        torch.optim.Muon([matrix, other.linear.weight], 1e-3, 0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    stepped(net, make_optimizer(SETTINGS, net, torch.device("cpu")))
    for step in range(3):
        torch.manual_seed(step)
        other.conv.weight.data.copy_(matrix.data.view_as(other.conv.weight))
        other(torch.randn(4, 3, 8, 8)).square().sum().backward()
        matrix.grad = other.conv.weight.grad.flatten(1)
        for peer in peers:
            peer.step()
        other.zero_grad()
    other.conv.weight.data.copy_(matrix.data.view_as(other.conv.weight))
    for (name, ours), theirs in zip(net.named_parameters(), other.parameters()):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("shape", [(12, 72), (40, 16), (24, 24)])
def test_the_iteration_in_fp32_is_that_in_bf16_without_its_rounding(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    exact, rounded = (muon.orthogonalized(matrix[None], dtype)[0].float() for dtype in (torch.float32, torch.bfloat16))
    assert (exact - rounded).norm() < 0.02 * exact.norm()
    values, (u, _, v) = torch.linalg.svdvals(exact), torch.linalg.svd(matrix, full_matrices=False)
    assert values.min() > 0.6 and values.max() < 1.25
    assert (exact - u @ torch.diag((u.T @ exact @ v.T).diagonal()) @ v).norm() < 1e-4  # the same singular vectors


def test_layout_in_memory_changes_nothing(net):
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    one, other = (make_optimizer(SETTINGS, n, torch.device("cpu")) for n in (net, last))
    stepped(net, one)
    stepped(last, other)
    momentum, same = one.state[net.conv.weight]["momentum_buffer"], other.state[last.conv.weight]["momentum_buffer"]
    assert momentum.shape == net.conv.weight.shape and torch.allclose(momentum, same, atol=1e-5)
    assert torch.allclose(net.conv.weight, last.conv.weight, atol=1e-4)


def test_learning_rate_is_one(net):
    optimizer, before = make_optimizer(SETTINGS, net, torch.device("cpu")), copy.deepcopy(net)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    stepped(net, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters()))


def test_sgd_is_the_gradient_alone(net):
    other = copy.deepcopy(net)
    settings = read_settings("emoji/unet", ["vae=x", "text=x", "optimizer=sgd", "weight_decay=0", "learning_rate=0.01"])
    stepped(net, make_optimizer(settings, net, torch.device("cpu")), steps=1)
    torch.manual_seed(0)
    other(torch.randn(4, 3, 8, 8)).square().sum().backward()
    for ours, theirs in zip(net.parameters(), other.parameters()):
        assert torch.allclose(ours, theirs.detach() - 0.01 * theirs.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dora", [False, True])
def test_muon_moves_the_matrices_of_adapters(dora, net):
    attach(net, new_updates(net, ["conv", "linear"], 2, 2.0, dora))
    optimizer, before = make_optimizer(SETTINGS, net, torch.device("cpu")), copy.deepcopy(net)
    matrices = {id(p) for p in optimizer.param_groups[0]["params"]}
    named = {name for name, p in net.named_parameters() if id(p) in matrices}
    assert named == {f"{layer}.{part}" for layer in ("conv", "linear") for part in ("down", "up")}
    stepped(net, optimizer)
    for (name, now), old in zip(net.named_parameters(), before.parameters()):
        assert torch.equal(now, old) != now.requires_grad, name


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd"])
def test_a_text_encoder_moves_at_its_own_rate_by_its_own_clip(optimizer, net):
    """The peer: the text encoder alone, under AdamW (or SGD) with that rate as the learning rate."""
    settings = replace(SETTINGS, optimizer=optimizer, text_rate=3e-4, clip=0.1, warmup=0)
    both = nn.ModuleDict({"unet": net, "text": nn.Linear(4, 3)})
    alone = copy.deepcopy(both["text"])
    ours = make_optimizer(settings, both, torch.device("cpu"))
    kind = torch.optim.SGD if optimizer == "sgd" else partial(torch.optim.AdamW, betas=(0.9, 0.99), fused=True)
    theirs = kind(alone.parameters(), lr=3e-4, weight_decay=0.1)
    for step in range(2):
        for group in ours.param_groups:
            group["lr"] = settings.learning_rate * group.get("scale", 1.0)
        torch.manual_seed(step)
        x, y = torch.randn(4, 3, 8, 8), torch.randn(5, 4)
        (1e4 * both["unet"](x).square().sum() + both["text"](y).square().sum()).backward()
        alone(y).square().sum().backward()
        clip_gradients(both, settings)
        nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
        for one in (ours, theirs):
            one.step()
            one.zero_grad()
    for mine, peer in zip(both["text"].parameters(), alone.parameters()):
        assert torch.allclose(mine, peer, rtol=1e-6, atol=1e-8)


def test_nothing_to_train_is_refused(net):
    net.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing of Net is trained"):
        make_optimizer(SETTINGS, net, torch.device("cpu"))
    net.norm.requires_grad_(True)
    with pytest.raises(ConfigError, match="muon moves matrices"):
        make_optimizer(SETTINGS, net, torch.device("cpu"))


def test_eight_bits_go_on_from_a_checkpoint(tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = toy_settings(optimizer="adamw8bit")
    states = []
    for halved in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 100), nn.SiLU(), nn.Linear(100, 64))
        now = TrainState(net, ema_copy(net), make_optimizer(settings, net, torch.device("cpu")))
        for step in range(4):
            if step == 2:
                assert now.tensors()["optimizer.0.weight.state1"].dtype == torch.uint8
                written = save(now, tmp_path / str(halved), {})
                size = sum(value.nbytes for value in now.tensors().values())
                assert abs(checkpoint_bytes(settings, net) - size) < 100
                if halved:
                    now = TrainState(net, ema_copy(net), make_optimizer(settings, net, torch.device("cpu")))
                    for p in net.parameters():
                        p.data.zero_()
                    restore_state(now, read_tensors(written), 2)
            torch.manual_seed(step)
            net(torch.randn(8, 64)).square().sum().backward()
            now.optimizer.step()
            now.optimizer.zero_grad()
        states.append(now.tensors())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
