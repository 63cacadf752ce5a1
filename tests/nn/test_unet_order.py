"""A training that is resumed ends with the bits of one that was not, so no change of the U-Net may move a gradient.

Autograd adds what reaches a tensor from several sides last come, first served: in the reverse of the order in which
the forward pass made them. That order is written down here, as the first runs had it.
"""

import pytest
import torch
import torch.nn.functional as F

from ldm.nn.attention import attention
from ldm.nn.unet import GEGLU, ResnetBlock, TransformerBlock, UNet, UNetConfig
from tests.training.conftest import TINY_UNET


def resnet(self, x, temb):
    h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(temb)[:, :, None, None]
    return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


def geglu(self, x):
    x, gate = self.proj(x).chunk(2, dim=-1)
    return x * F.gelu(gate)


def attend(layer, x, context, mask=None):
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    return layer.to_out[0](attention(q, k, v, layer.num_heads, mask, layer.backend))


def transformer(self, x, states, mask, perturb, cache):
    h = self.norm1(x)
    x = x + attend(self.attn1, h, h)
    x = x + attend(self.attn2, self.norm2(x), states, mask)
    return x + self.ff(self.norm3(x))


def gradients():
    torch.manual_seed(0)
    unet = UNet(UNetConfig(in_channels=4, out_channels=4, cross_attention_dim=32, **TINY_UNET)).train()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, states = torch.randn(3, 4, 16, 16), torch.randn(3, 7, 32)
    unet(x, torch.tensor([3.0, 400.0, 900.0]), states).square().mean().backward()
    return {name: parameter.grad for name, parameter in unet.named_parameters()}


@pytest.mark.parametrize(("kind", "forward"), [(ResnetBlock, resnet), (GEGLU, geglu), (TransformerBlock, transformer)])
def test_gradients_are_summed_in_the_order_of_the_first_runs(kind, forward, monkeypatch):
    found = gradients()
    monkeypatch.setattr(kind, "forward", forward)
    expected = gradients()
    moved = [name for name, gradient in expected.items() if not torch.equal(found[name], gradient)]
    assert not moved, f"a resumed training would end with other bits: {len(moved)} gradients, {moved[0]}, …"
