"""Every attention backend against the formula written out, and the sentences for what is absent."""

import pytest
import torch

from ldm.errors import ConfigError, ModelError
from ldm.nn import attention as module
from ldm.nn.attention import BACKENDS, attention

HERE = [name for name in BACKENDS if name != "xformers"]


def formula(q, k, v, heads, mask=None):
    q, k, v = (t.double().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -1e4)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2).float()


@pytest.mark.parametrize("limits", [(1 << 18, 1 << 22), (40, 100), (1, 1)], ids=["whole", "chunks", "single"])
@pytest.mark.parametrize("name", ["auto", *HERE])
def test_backends_equal_the_formula(name, limits, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_SCORES", limits[0])
    monkeypatch.setattr(module, "GROUP_SCORES", limits[1])
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 10, 24), torch.randn(3, 7, 24), torch.randn(3, 7, 24)
    mask = torch.rand(3, 7) > 0.5
    for m in (None, mask):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        reference = [t.clone().requires_grad_() for t in (q, k, v)]
        out, expected = attention(*leaves, 3, m, name), formula(*reference, 3, m)
        assert torch.allclose(out, expected, atol=1e-6)
        weight = torch.randn_like(out)
        for a, b in zip(torch.autograd.grad(out, leaves, weight), torch.autograd.grad(expected, reference, weight)):
            assert torch.allclose(a, b, atol=1e-5)


def test_unknown_backend_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'chunked'"):
        attention(*torch.zeros(3, 1, 2, 4), 2, backend="chunkd")


def test_xformers_absent_is_one_sentence():
    if torch.cuda.is_available():
        pytest.skip("xformers may work here")
    with pytest.raises(ModelError, match="xformers") as error:
        attention(*torch.zeros(3, 1, 2, 4), 2, backend="xformers")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("queries", [1, 2, 3, 4, 5, 7, 35])
@pytest.mark.parametrize("keys", [11, 12, 76, 77, 78, 79])
def test_few_queries_have_the_same_bits_in_every_batch(queries, keys):
    """Which bits differ without care is the machine's: on an AMD Zen 4, those of 1 to 3 queries."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, 192, generator=draw) for tokens in (queries, keys, keys))
    with torch.no_grad():
        (expected,) = attention(q, k, v, 6)
        for n in (2, 8, 34):
            found = attention(*(t.expand(n, -1, -1).contiguous() for t in (q, k, v)), 6)
            assert found.shape == (n, queries, 192) and all(torch.equal(row, expected) for row in found), n


@pytest.mark.parametrize("masked", [False, True])
def test_many_tokens_in_16_bits_go_by_heads_and_have_the_same_bits_in_every_batch(masked, monkeypatch):
    monkeypatch.setattr(module, "MANY_SCORES", 90 * 70)
    monkeypatch.setattr(module, "CHUNK_SCORES", 40 * 70)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, n, 24, generator=draw).to(torch.bfloat16) for n in (90, 70, 70))
    mask = torch.rand(3, 70, generator=draw) > 0.5 if masked else None
    with torch.no_grad():
        together = attention(q, k, v, 3, mask)
        alone = [
            attention(*(t[i : i + 1] for t in (q, k, v)), 3, None if mask is None else mask[i : i + 1])
            for i in range(3)
        ]
        exact = formula(q, k, v, 3, mask)
        fused = attention(q, k, v, 3, mask, "sdpa")
    assert torch.equal(together, torch.cat(alone)) and not torch.equal(together, fused)
    assert together.shape == fused.shape and together.is_contiguous()
    assert (together.float() - exact).norm() < 0.01 * exact.norm()


def test_compiled_code_is_not_of_thousands_of_chunks(monkeypatch):
    q = torch.randn(1, 1024, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    used = []
    for name in ("sdpa", "chunked"):
        plain = BACKENDS[name]
        monkeypatch.setitem(BACKENDS, name, lambda *given, name=name, plain=plain: used.append(name) or plain(*given))
    with torch.no_grad():
        whole = attention(q, q, q, 2)
        monkeypatch.setattr("ldm.nn.attention.is_compiling", lambda: True)
        assert (attention(q, q, q, 2) - whole).abs().max() < 0.02
    assert used == ["chunked", "sdpa"]
