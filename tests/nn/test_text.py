"""Text to Conditioning: CLIP's encoder and tokenizer, pooling, truncation, and what any encoder's result can do."""

import pytest
import torch

from ldm.errors import ConfigError, ModelError
from ldm.nn.clip import train_tokenizer
from ldm.nn.text import ClipText, Conditioning, known_words

CAPTIONS = ["a cat on a red card", "two dogs on blue", "a dog and a cat", "a red house"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS, 700, 12)


def make(tokenizer, projected=False, **change):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    limits = {"vocab_size": len(tokenizer), "max_position_embeddings": 12, "projection_dim": 20}
    torch.manual_seed(0)
    config = CLIPTextConfig(**{**sizes, **ids, **limits, **change})
    return ClipText((CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval(), tokenizer)


@pytest.fixture(scope="module")
def text(tokenizer):
    return make(tokenizer)


def test_states_and_pooled_are_the_models(text, tokenizer):
    texts = ["a cat", "a red house on blue", "", "a cat"]
    with torch.no_grad():
        expected = text.model(text.tokenize(texts))
    cond = text.encode(texts)
    assert len(cond) == 4 and cond.mask is None and not cond.states.requires_grad
    assert torch.allclose(cond.states, expected.last_hidden_state, atol=1e-5)
    ends = (text.tokenize(texts) == tokenizer.eos_token_id).int().argmax(-1)  # the first end, not position 0
    assert torch.all(ends > 0)
    assert torch.allclose(cond.pooled, cond.states[torch.arange(4), ends])
    assert torch.equal(cond.states[0], cond.states[3])


def test_projection_gives_the_pooled_text(tokenizer):
    projected = make(tokenizer, projected=True)
    cond = projected.encode(["a cat", "two dogs"])
    with torch.no_grad():
        expected = projected.model(projected.tokenize(["a cat", "two dogs"])).text_embeds
    assert cond.states.shape == (2, 12, 32) and cond.pooled.shape == (2, 20)
    assert torch.allclose(cond.pooled, expected, atol=1e-5)


def test_bits_do_not_depend_on_the_other_texts(text):
    texts = ["a cat", "two dogs", "a red house", "blue", "a dog and a cat"]
    together = text.encode(texts)
    for i, one in enumerate(texts):
        assert torch.equal(text.encode([one]).states[0], together.states[i])


@pytest.mark.parametrize("projected", [False, True])
def test_clip_skip_takes_an_earlier_layer_through_the_final_norm(tokenizer, projected):
    text = make(tokenizer, projected=projected)
    tower = getattr(text.model, "text_model", text.model)
    with torch.no_grad():
        hidden = text.model(text.tokenize(["a cat"]), output_hidden_states=True).hidden_states
        expected = tower.final_layer_norm(hidden[-3])
    assert torch.allclose(text.encode(["a cat"], clip_skip=2).states, expected, atol=1e-6)
    for skip in (3, -1):
        with pytest.raises(ConfigError, match="3 layers"):
            text.encode(["a cat"], clip_skip=skip)


def test_a_wrong_end_token_is_refused(tokenizer):
    with pytest.raises(ModelError, match=f"set eos_token_id to {tokenizer.eos_token_id}"):
        make(tokenizer, eos_token_id=49407)
    assert make(tokenizer, eos_token_id=2).encode(["a cat"]).pooled.shape == (
        1,
        32,
    )  # right: the end has the highest id
    with pytest.raises(ModelError, match="tokens, the text encoder only 40"):
        make(tokenizer, vocab_size=40, eos_token_id=39)


def test_what_is_cut_off_is_told(text):
    words = " ".join(["cat"] * 10)
    assert text.truncated(words) == ""
    assert text.truncated(f"{words} a red house") == "a red house"
    assert text.tokenize([f"{words} a red house"]).shape == (1, 12)


def test_unknown_words_are_told_once(text):
    assert text.unknown_words("a Cat, two zebras and a zebras house") == []  # without a list of words none is known
    told = ClipText(text.model, text.tokenizer, known_words(["A cat and 2 dogs!", "two houses"]))
    assert told.words == {"a", "cat", "and", "2", "dogs", "two", "houses"}
    assert told.unknown_words("a Cat, two zebras and 7 zebras house ★") == ["zebras", "7", "house", "★"]
    old = ClipText(text.model, text.tokenizer, frozenset({"a", "cat"}))  # a list that was made before numbers counted
    assert old.unknown_words("a cat 7 ★") == ["★"]


def test_threads_share_a_tokenizer(text):
    """A fast tokenizer keeps its padding as state, which a call without padding takes away."""
    from concurrent.futures import ThreadPoolExecutor

    def use(i):
        return text.tokenize(["a cat"] * (i % 3 + 1)).shape if i % 2 else text.truncated("cat " * 40)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(use, range(400)))
    assert all(shape == (i % 3 + 1, 12) for i, shape in enumerate(found) if i % 2)


def test_nothing_to_encode_is_refused(text):
    with pytest.raises(ConfigError, match="no text"):
        text.encode([])


def test_conditioning_slices_joins_and_moves():
    a = Conditioning(torch.randn(2, 3, 4), torch.randn(2, 5))
    b = Conditioning(torch.randn(1, 3, 4), torch.randn(1, 5))
    both = Conditioning.cat([a, b])
    assert len(both) == 3 and both.mask is None
    assert torch.equal(both[1:].states, torch.cat([a.states[1:], b.states]))
    assert torch.equal(both[[2, 2]].pooled, b.pooled.repeat(2, 1))
    assert both[0].states.shape == (1, 3, 4)
    masked = Conditioning(a.states, None, torch.ones(2, 3, dtype=torch.bool)).to("cpu", torch.bfloat16)
    assert masked.states.dtype == torch.bfloat16 and masked.mask.dtype == torch.bool


def test_longer_and_shorter_texts_join_under_a_mask():
    a, b = Conditioning(torch.randn(1, 3, 4)), Conditioning(torch.randn(1, 5, 4))
    both = Conditioning.cat([a, b])
    assert both.mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert torch.equal(both.states[0, :3], a.states[0]) and not both.states[0, 3:].any()
    for wrong in (Conditioning(torch.randn(1, 3, 6)), Conditioning(torch.randn(1, 3, 4), torch.randn(1, 2))):
        with pytest.raises(ModelError):
            Conditioning.cat([a, wrong])
