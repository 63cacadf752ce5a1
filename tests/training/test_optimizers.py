"""Muon for matrices and convolutions, AdamW for the rest: what torch's own two do to each."""

import copy

import pytest
import torch
from torch import nn

from ldm.training.optimizers import make_optimizer
from ldm.training.settings import read_settings

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


def test_each_parameter_moves_as_torch_moves_it(net):
    """The peer: the convolution held as a matrix all along, under torch's two optimizers side by side."""
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
