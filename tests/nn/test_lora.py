"""Low-rank updates against PEFT's own layers, and what merging must not change."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.errors import ConfigError, ModelError
from ldm.nn.lora import (
    LoraLayer,
    LowRank,
    attach,
    clone_shared_weights,
    folded,
    layers_of,
    meant,
    merge,
    merged,
    new_updates,
    unmerge,
    updates_of,
    without_updates,
)
from ldm.nn.unet import UNet, UNetConfig

LAYERS = {
    "linear": (lambda: nn.Linear(12, 20), (5, 7, 12)),
    "no bias": (lambda: nn.Linear(12, 20, bias=False), (5, 7, 12)),
    "conv": (lambda: nn.Conv2d(6, 10, 3, padding=1), (2, 6, 8, 8)),
    "halving": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1), (2, 6, 9, 9)),
    "pointwise": (lambda: nn.Conv2d(6, 10, 1), (2, 6, 8, 8)),
}


MANY = ("attention", "transformer", "all-linear", "all")


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def theirs_and_update(name, dora, factor=1.0):
    """PEFT's layer with random weights, its scale times `factor`; the network without it; the same update as ours."""
    torch.manual_seed(3)
    base = Net(LAYERS[name][0]())
    kept = Net(LAYERS[name][0]())
    kept.load_state_dict(base.state_dict())
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=["layer"], use_dora=dora)
    model = peft.get_peft_model(base, config)
    layer = model.base_model.model.layer
    for parameter in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        nn.init.normal_(parameter, std=0.5)
    magnitude = None
    if dora:
        vector = layer.lora_magnitude_vector["default"].weight
        vector.data *= torch.rand_like(vector) + 0.5
        magnitude = vector.detach().flatten()
    layer.set_scale("default", factor)
    update = LowRank(layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach(), 7, magnitude)
    return model, kept, update


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", LAYERS)
def test_merged_and_applied_equal_pefts_layer(name, dora):
    model, net, update = theirs_and_update(name, dora)
    x = torch.randn(LAYERS[name][1])
    expected = model.eval()(x)
    plain = net(x)
    assert (expected - plain).abs().max() > 0.1
    kept = merge(net, {"layer": [(update, 1.0)]})
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)
    unmerge(net, kept)
    assert torch.equal(net(x), plain)
    attach(net, {"layer": update})
    torch.testing.assert_close(net.train()(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(net.eval()(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("factor", [1.0015, 0.9985, 1.006])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_magnitude_near_the_norm_counts_in_bf16_as_in_the_merged_weight(factor, autocast):
    """Rounded to bf16, whose numbers are 0.008 apart above 1, the first two are 1 and the last is 1.0078."""
    torch.manual_seed(0)
    layer, x = nn.Linear(96, 512), torch.randn(256, 96)
    down, up = torch.randn(4, 96) * 0.05, torch.randn(512, 4) * 0.02
    whole = layer.weight.detach() + up @ down
    update = LowRank(down, up, 4.0, factor * whole.norm(dim=1))
    plain = F.linear(x, whole)
    adapted = LoraLayer(layer if autocast else copy.deepcopy(layer).bfloat16(), update).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = adapted(x if autocast else x.bfloat16())
    assert found.dtype == torch.bfloat16
    change = found.detach().double() - F.linear(x, whole, layer.bias)
    measured = 1 + (change * plain).sum() / plain.square().sum()  # by least squares: rounding is no part of it
    assert measured.item() == pytest.approx(factor, abs=2e-4)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("factor", [0.5, -0.7])
def test_a_factor_scales_as_pefts_adapter_weight_does_where_that_is_asked_for(dora, factor):
    model, net, update = theirs_and_update("linear", dora, factor)
    weight = merged(net.layer.weight, [(update, factor)], dora="peft")
    x = torch.randn(5, 12)
    torch.testing.assert_close(nn.functional.linear(x, weight, net.layer.bias), model.eval()(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("factor", [0.5, 1e-6, -1.0])
def test_a_dora_is_linear_in_its_factor(factor):
    """As A1111 and ComfyUI have it: continuous at 0, and -1 goes the other way."""
    _, net, update = theirs_and_update("linear", dora=True)
    weight = net.layer.weight
    whole = merged(weight, [(update, 1.0)]) - weight
    torch.testing.assert_close(merged(weight, [(update, factor)]), weight + factor * whole)


def test_factor_zero_is_off_for_dora_too():
    _, net, update = theirs_and_update("linear", dora=True)
    assert torch.equal(merged(net.layer.weight, [(update, 0.0)]), net.layer.weight)


@pytest.mark.parametrize("name", ["linear", "halving"])
def test_gradients_of_dora_equal_pefts(name):
    model, net, update = theirs_and_update(name, dora=True)
    attach(net, {"layer": update})
    x = torch.randn(LAYERS[name][1])
    for network in (model, net):
        network.train()(x).square().sum().backward()
    layer, ours = model.base_model.model.layer, net.layer
    theirs = (layer.lora_A["default"], layer.lora_B["default"], layer.lora_magnitude_vector["default"])
    for their, own in zip(theirs, (ours.down, ours.up, ours.magnitude)):
        grad = their.weight.grad.reshape(own.shape)
        torch.testing.assert_close(own.grad, grad, atol=1e-4 * grad.abs().max().item(), rtol=1e-4)
    assert [n for n, p in net.named_parameters() if p.requires_grad] == ["layer.down", "layer.up", "layer.magnitude"]
    assert ours.layer.weight.grad is None


def test_several_add_up_and_take_each_other_away():
    weight, one, other = torch.randn(20, 12), *(theirs_and_update("linear", False)[2] for _ in range(2))
    other = LowRank(other.down.flip(0), other.up, 2.0)
    both = merged(weight, [(one, 0.8), (other, -0.3)])
    expected = weight + 0.8 * 7 / 4 * one.up @ one.down - 0.3 * 2 / 4 * other.up @ other.down
    torch.testing.assert_close(both, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged(weight, [(one, 0.8), (one, -0.8)]), weight, atol=1e-5, rtol=1e-5)


def test_half_precision_is_rounded_once():
    weight, update = torch.randn(20, 12).bfloat16(), theirs_and_update("linear", False)[2]
    exact = weight.float() + 7 / 4 * update.up @ update.down
    assert torch.equal(merged(weight, [(update, 1.0)]), exact.bfloat16())


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    config = UNetConfig(
        block_out_channels=(32, 64),
        layers_per_block=1,
        transformer_layers=(1, 0),
        num_heads=(4, 4),
        cross_attention_dim=16,
        norm_num_groups=8,
    )
    return UNet(config).eval().requires_grad_(False)


TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.0.proj", "linear_1"]


def strong(unet, dora=False):
    found = new_updates(unet, TARGETS, 3, 5.0, dora, torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    return {n: LowRank(u.down, torch.randn_like(u.up), u.alpha, u.magnitude) for n, u in found.items()}


def inputs(batch):
    generator = torch.Generator().manual_seed(4)
    x, states = (torch.randn(shape, generator=generator) for shape in ((5, 4, 8, 8), (5, 6, 16)))
    return x[:batch], torch.arange(5)[:batch] * 100, states[:batch]


def test_a_copy_shares_what_it_does_not_change_and_leaves_the_first_alone(unet):
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    out = unet(*inputs(2))
    copied = clone_shared_weights(unet)
    assert torch.equal(copied(*inputs(2)), out)
    updates = strong(unet)
    merge(copied, {name: [(update, 1.0)] for name, update in updates.items()})
    theirs, own = dict(copied.named_parameters()), dict(unet.named_parameters())
    changed = {name for name in own if own[name].data_ptr() != theirs[name].data_ptr()}
    assert changed == {f"{name}.weight" for name in updates} and 10 < len(changed) < len(own) / 2
    assert (copied(*inputs(2)) - out).abs().max() > 0.05
    copied.to(torch.float64)
    assert torch.equal(unet(*inputs(2)), out)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_image_keeps_its_bits_in_every_batch_and_evaluated_while_training(unet, dora):
    updates = strong(unet, dora)
    copied, trained = clone_shared_weights(unet), clone_shared_weights(unet)
    merge(copied, {name: [(update, 1.0)] for name, update in updates.items()})
    whole = copied(*inputs(5))
    attach(trained, updates)
    for batch in (1, 2, 3):
        assert torch.equal(copied(*inputs(batch)), whole[:batch])
        assert torch.equal(trained.eval()(*inputs(batch)), whole[:batch])
    torch.testing.assert_close(trained.train()(*inputs(5)), whole, atol=1e-4, rtol=1e-4)


def test_training_starts_at_the_model_and_reaches_only_the_targets(unet):
    copied = clone_shared_weights(unet)
    attach(copied, new_updates(unet, ["attn2.to_q"], 2, 2.0))
    x, timesteps, states = inputs(2)
    target = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    assert torch.equal(copied.train()(x, timesteps, states), unet.train()(x, timesteps, states))
    unet.eval()
    parameters = [p for p in copied.parameters() if p.requires_grad]
    assert len(parameters) == 2 * len(updates_of(copied)) == 2 * 4
    optimizer, losses = torch.optim.Adam(parameters, 0.1), []
    for _ in range(10):
        loss = (copied(x, timesteps, states) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]
    merge(again := clone_shared_weights(unet), {name: [(update, 1.0)] for name, update in updates_of(copied).items()})
    assert torch.equal(again(x, timesteps, states), copied.eval()(x, timesteps, states))


@pytest.mark.parametrize("dora", [False, True])
def test_without_its_updates_it_is_the_model(unet, dora):
    attach(adapted := clone_shared_weights(unet).train(), strong(unet, dora))
    adapted.train()
    with torch.no_grad():
        expected, changed = unet.train()(*inputs(2)), adapted(*inputs(2))
        with without_updates(adapted):
            assert torch.equal(adapted(*inputs(2)), expected)
        assert torch.equal(adapted(*inputs(2)), changed) and not torch.allclose(changed, expected, rtol=0.01)
    unet.eval()


def test_names_that_are_no_layer_are_refused(unet):
    with pytest.raises(ConfigError, match="no layer named 'to_x'; did you mean 'to_"):
        new_updates(unet, ["to_q", "to_x", "norm1"], 2, 2.0)
    with pytest.raises(ModelError, match="no layer down"):
        attach(clone_shared_weights(unet), {"down": next(iter(strong(unet).values()))})


def test_words_for_many_layers(unet):
    shapes = {name: layer.weight.shape for name, layer in layers_of(unet).items()}
    attention, transformer, linear, everything = (meant(shapes, [w]) for w in MANY)
    assert {name.split(".attn")[1][1:] for name in attention} == {".to_q", ".to_k", ".to_v", ".to_out.0"}
    assert set(attention) < set(transformer) < set(everything) == set(shapes)
    assert any("ff.net" in name for name in transformer) and all(len(shapes[name]) == 2 for name in linear)
    assert meant(shapes, ["to_q", "attention"]) == attention


@pytest.mark.parametrize("dora", [False, True])
def test_folding_gives_plain_layers_with_the_same_answer(unet, dora):
    adapted = clone_shared_weights(unet)
    attach(adapted, new_updates(adapted, ["all"], 2, 3.0, dora, torch.Generator().manual_seed(1)))
    for parameter in [p for p in adapted.parameters() if p.requires_grad]:
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    plain = folded(adapted.train())
    assert plain.state_dict().keys() == unet.state_dict().keys() and not plain.training and adapted.training
    x, t, states = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 16)
    with torch.no_grad():
        assert torch.equal(plain(x, t, states), adapted.eval()(x, t, states))
    norm = "conv_norm_out.weight"
    assert plain.get_parameter(norm).data_ptr() == unet.get_parameter(norm).data_ptr()
