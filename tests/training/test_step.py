"""One step: what it shares, keeps, scales and computes again."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from ldm.errors import ConfigError
from ldm.nn.lora import attach, new_updates
from ldm.nn.unet import UNet, UNetConfig
from ldm.training.checkpoints import reading, state
from ldm.training.finetuning.base_model import frozen_dtype
from ldm.training.loop.gradient_checkpointing import checkpoint_gradients
from ldm.training.loop.stage import Stage
from ldm.training.loop.step import ema_copy, prepare, take_step, update_ema
from tests.conftest import tiny_text, tiny_vae
from tests.training.conftest import TINY_UNET
from tests.training.test_survival import ends
from tests.training.toy import Toy, toy_settings, train_toy

CPU = torch.device("cpu")


def unet():
    torch.manual_seed(0)
    return UNet(UNetConfig(in_channels=4, out_channels=4, cross_attention_dim=32, **TINY_UNET)).train()


def backward(network, forward):
    """(gradients by name, the most bytes that autograd keeps for the backward pass)."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(network).square().mean()
    loss.backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return gradients, sum(size for place, size in kept.items() if place not in weights)


def drawn(network):
    torch.manual_seed(1)
    return network(torch.randn(2, 4, 16, 16), torch.tensor([3.0, 700.0]), torch.randn(2, 7, 32))


def reconstructed(network):
    torch.manual_seed(1)
    return network.decode(network.encode(torch.randn(2, 3, 32, 32)).latent_dist.mean).sample


def read(network):
    return network(torch.arange(16)[None]).last_hidden_state


def with_lora(network):
    attach(network, new_updates(network, ["to_q", "to_v", "conv1"], 2, 2.0))
    return network


@pytest.mark.parametrize(
    ("make", "forward"),
    [
        (unet, drawn),
        (lambda: with_lora(unet()), drawn),
        (lambda: tiny_vae().module.requires_grad_(True).train(), reconstructed),
        (lambda: tiny_text().model.requires_grad_(True).train(), read),
    ],
    ids=["unet", "lora", "autoencoder", "text"],
)
def test_gradients_that_are_computed_again_are_the_same_with_less_kept(make, forward):
    plain = make()
    again = copy.deepcopy(plain)
    checkpoint_gradients(again)
    (expected, much), (found, little) = backward(plain, forward), backward(again, forward)
    assert expected.keys() == found.keys() and expected
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-6, atol=1e-6 * float(gradient.abs().max())), name
    assert little < 0.6 * much, (little, much)


def test_what_cannot_be_computed_again_says_so():
    with pytest.raises(ConfigError, match="gradient_checkpointing: Linear cannot do that"):
        checkpoint_gradients(torch.nn.Linear(2, 2))


def test_the_average_shares_what_is_not_trained():
    settings = toy_settings(ema=0.5)
    now = prepare(Toy(settings, lora=True), settings, CPU)
    own, average = dict(now.module.named_parameters()), dict(now.ema.named_parameters())
    for name, parameter in own.items():
        assert (average[name].data_ptr() == parameter.data_ptr()) == (not parameter.requires_grad), name
    assert not now.ema.training and not any(p.requires_grad for p in now.ema.parameters())
    with torch.no_grad():
        own["0.up"].fill_(4.0)
    update_ema(now.ema, now.module, 0.75)
    assert average["0.up"].eq(1.0).all()
    layers = [own["0.layer.weight"].clone(), own["0.layer.weight"]]
    assert torch.equal(*layers)
    assert [name for name in state.trained_names(now.module) if "layer" in name] == []


def test_a_whole_network_has_an_average_of_its_own():
    network = unet()
    places = {p.data_ptr() for p in network.parameters()}
    assert not places & {p.data_ptr() for p in ema_copy(network).parameters()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batches_are_made_under_the_precision_of_their_step(precision, tmp_path):
    """As the first runs had it, whose bits go on: captions are encoded there."""
    seen = []

    class Watching(Toy):
        def batches(self, first_step):
            for batch in super().batches(first_step):
                seen.append(torch.is_autocast_enabled("cpu"))
                yield batch

    train_toy(tmp_path / "run", kind=Watching, precision=precision, steps=3)
    assert seen == [precision == "bf16"] * 3


def scaled(scale):
    """A state whose gradients are taken times `scale`, as fp16 has it on CUDA."""
    settings = toy_settings(precision="fp16", optimizer="sgd", learning_rate=1.0, warmup=0, clip=1e9)
    stage: Stage = Toy(settings)
    now = prepare(stage, settings, CPU)
    now.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    return settings, stage, now


def test_scaled_gradients_move_the_weights_as_those_that_are_not():
    moved = []
    for scale in (1.0, 1024.0):
        settings, stage, now = scaled(scale)
        assert math.isfinite(take_step(stage, now, settings, stage.batches(0)).loss)
        moved.append(now.tensors())
    assert all(torch.allclose(value, moved[1][name], atol=1e-2) for name, value in moved[0].items())
    assert moved[0].keys() == moved[1].keys()


def test_gradients_that_overflow_are_left_out_and_the_scale_is_halved():
    settings, stage, now = scaled(2.0**127)
    before = {name: p.detach().clone() for name, p in now.module.named_parameters()}
    done = take_step(stage, now, settings, stage.batches(0))
    assert math.isfinite(done.loss) and not done.bad and now.step == 1
    assert all(torch.equal(p, before[name]) for name, p in now.module.named_parameters())
    assert now.scaler.get_scale() == 2.0**126


def test_the_scale_goes_on_where_it_was(tmp_path):
    def stop(step, micro):
        if step == 7:
            raise KeyboardInterrupt

    train_toy(tmp_path / "whole", precision="fp16")
    with pytest.raises(KeyboardInterrupt):
        train_toy(tmp_path / "halves", precision="fp16", inside=stop)
    about = reading.read_about(state.checkpoints(tmp_path / "halves")[-1])
    assert about["scaler"]["scale"] == 32768.0  # 65536 was too much for one of the first gradients
    train_toy(tmp_path / "halves", "latest", precision="fp16")
    assert ends(tmp_path / "halves") == ends(tmp_path / "whole")
    last = [reading.read_about(state.checkpoints(tmp_path / run)[-1])["scaler"] for run in ("whole", "halves")]
    assert last[0] == last[1]


def test_without_an_average_none_is_kept(tmp_path):
    """With ema=0 the weights themselves are what is drawn, scored and exported; a resumed run keeps its bits."""
    now = prepare(Toy(toy_settings(ema=0.0)), toy_settings(ema=0.0), CPU)
    pairs = list(zip(now.ema.parameters(), now.module.parameters()))
    assert all(one.data_ptr() == other.data_ptr() for one, other in pairs)
    assert not now.ema.training and now.module.training
    assert not any(one.requires_grad for one, _ in pairs) and all(other.requires_grad for _, other in pairs)
    train_toy(tmp_path / "whole", ema=0.0)
    train_toy(tmp_path / "run", ema=0.0, steps=6, decay_from=1)
    train_toy(tmp_path / "run", "latest", ema=0.0)
    tensors = [reading.read_tensors(state.checkpoints(tmp_path / name)[-1]) for name in ("whole", "run")]
    assert all((tensors[0][name] == tensors[1][name]).all() for name in tensors[0])
    assert all((tensors[0][f"ema.{name[6:]}"] == value).all() for name, value in tensors[0].items() if "model." in name)


def test_a_run_that_drops_its_average_goes_on_from_the_weights(tmp_path):
    train_toy(tmp_path / "run", ema=0.9, steps=6)
    tensors = reading.read_tensors(state.checkpoints(tmp_path / "run")[-1])
    now = prepare(Toy(toy_settings(ema=0.0)), toy_settings(ema=0.0), CPU)
    reading.restore_state(now, tensors, 6)
    assert all((value == tensors[f"model.{name}"]).all() for name, value in now.module.state_dict().items())


@pytest.mark.parametrize(
    ("train", "precision", "device", "kept"),
    [
        ("lora", "auto", "cuda", torch.bfloat16),
        ("dora", "fp16", "cuda", torch.float16),
        ("lora", "fp32", "cuda", torch.float32),
        ("full", "auto", "cuda", torch.float32),  # which is trained
        ("lora", "bf16", "cpu", torch.float32),  # bits of CPUs stay
    ],
)
def test_what_a_lora_keeps_its_frozen_base_in(train, precision, device, kept, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    settings = SimpleNamespace(train=train, precision=precision)
    assert frozen_dtype(settings, torch.device(device)) is kept


@pytest.mark.parametrize("training", [True, False])
def test_an_update_of_a_base_in_16_bits(training):
    """Its answer and its gradients are those on the fp32 base, as exactly as autocast computes."""
    found = []
    for kept in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64)).to(kept)
        attach(network, new_updates(network, ["0", "2"], 4, 4.0, generator=torch.Generator().manual_seed(1)))
        for layer in (network[0], network[2]):
            torch.nn.init.normal_(layer.up, std=0.02)
        with torch.autocast("cpu", torch.bfloat16):
            out = network.train(training)(torch.randn(8, 64)).float()
        gradient = torch.autograd.grad(out.square().mean(), network[0].up)[0]
        assert gradient.dtype == torch.float32
        found.append((out, gradient))
    for ours, expected in zip(*reversed(found)):
        assert (ours - expected).norm() < 0.02 * expected.norm()
