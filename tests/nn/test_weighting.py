"""Prompts with weights and of any length: chunks, the arithmetic of A1111, and plain prompts' own bits."""

import pytest
import torch

from ldm.checkpoint.vocabulary import clip_tokenizer
from ldm.errors import ConfigError
from ldm.nn.text import ClipText, T5Text, XLText, cut_off, encode_weighted, tokenize
from ldm.nn.text.weighting import chunks_of, weighted
from ldm.prompts import parse

CLASSES = {False: "CLIPTextModel", True: "CLIPTextModelWithProjection"}


def clip(pad_token="<|endoftext|>", projected=False, width=16):
    import transformers

    torch.manual_seed(width)
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    ids = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "projection_dim": 12}
    config = transformers.CLIPTextConfig(**sizes, **ids)
    module = getattr(transformers, CLASSES[projected])(config).eval()
    for name, layer in module.named_modules():
        if name.endswith("final_layer_norm"):  # trained, so that the mean of its states is not nothing
            torch.nn.init.constant_(layer.bias, 0.2)
    return ClipText(module, clip_tokenizer(pad_token))


@pytest.fixture(scope="module")
def text():
    return clip()


@pytest.fixture(scope="module")
def xl(text):
    return XLText(text, clip("!", projected=True, width=24), zero_empty=True)


def tokens(encoder, prompt):
    return tokenize(encoder, None if prompt is None else parse(prompt))


def encoded(encoder, prompts, *settings, **more):
    return encode_weighted(encoder, [tokens(encoder, prompt) for prompt in prompts], *settings, **more)


def chunks(encoder, prompt):
    return chunks_of(encoder, parse(prompt))


def cats(count):
    return " ".join(["cat"] * count)


@pytest.mark.parametrize(
    "prompt, lengths",
    {
        "": [0],
        cats(75): [75],
        cats(76): [75, 1],
        cats(151): [75, 75, 1],
        f"{cats(60)}, {cats(20)}": [61, 20],  # 14 cats after the comma move on with it
        f"{cats(55)}, {cats(20)}": [56, 20],  # the comma is 20 before the end of the chunk
        f"{cats(54)}, {cats(20)}": [75],
        f"{cats(54)}, {cats(21)}": [75, 1],  # 21 before it: too far back
        f"{cats(75)}, {cats(2)}": [75, 3],  # the comma itself is over
        f"{cats(74)}, {cats(2)}": [75, 2],
        f"{cats(30)}, {cats(30)}, {cats(80)}": [62, 75, 5],
        "a cat BREAK a dog": [2, 2],
        "BREAK a cat": [0, 2],
        "a cat BREAK": [2],
        "a BREAK BREAK b": [1, 0, 1],
        f"({cats(70)}:1.2) {cats(10)}": [75, 5],
    }.items(),
)
def test_chunks(text, prompt, lengths):
    assert [len(chunk) for chunk in chunks(text, prompt)] == lengths
    assert tokens(text, prompt).chunks == len(lengths)
    ids = [token for chunk in chunks(text, prompt) for token, _ in chunk]
    assert ids == text.token_ids(prompt.replace("BREAK", "").replace("(", "").replace(":1.2)", ""))


def test_each_token_has_its_pieces_weight(text):
    (chunk,) = chunks(text, r"a ((red:1.3) cat) [\(dog\)]")
    words = [(text.tokenizer.decode([token]).strip(), round(weight, 4)) for token, weight in chunk]
    assert words == [("a", 1), ("red", 1.43), ("cat", 1.1), ("(", 0.9091), ("dog", 0.9091), (")", 0.9091)]


def test_shorter_encoders_look_back_for_a_comma_over_a_smaller_part():
    short = clip()
    short.max_length = 17  # of which 15 are the text's: a comma is near within 4
    assert [len(chunk) for chunk in chunks(short, f"{cats(11)}, {cats(5)}")] == [12, 5]
    assert [len(chunk) for chunk in chunks(short, f"{cats(10)}, {cats(5)}")] == [15, 1]


def test_the_mean_is_restored():
    """The example of the reference: z = [1, 3], weights [1, 2]; the mean of [1, 6] goes from 3.5 back to 2."""
    states, weights = torch.tensor([[[1.0], [3.0]]]), torch.tensor([1.0, 2.0])
    assert torch.allclose(weighted(states, weights, "original").flatten(), torch.tensor([4 / 7, 24 / 7]))
    assert weighted(states, weights, "no_norm").flatten().tolist() == [1.0, 6.0]
    half = weighted(states.half(), weights, "original")
    assert half.dtype == torch.float16 and torch.allclose(half.float().mean(), torch.tensor(2.0), rtol=1e-3)


def test_a_mean_of_rounding_is_not_restored():
    states = torch.tensor([[[1.0, -1.0], [3.0, -3.0 + 2**-22]]])
    weights = torch.tensor([1.0, 2.0])
    for found in (weighted(states, weights, "original"), weighted(states.round(), weights, "original")):
        assert torch.allclose(found, torch.tensor([[[1.0, -1.0], [6.0, -6.0]]]))


@pytest.mark.parametrize("clip_skip", [0, 1])
@pytest.mark.parametrize("emphasis", ["original", "no_norm"])
def test_emphasis_multiplies_states(text, emphasis, clip_skip):
    plain = text.encode(["a red cat"], clip_skip)
    w = torch.ones(77)
    w[2] = 1.5  # start, a, red
    expected = plain.states * w[:, None]
    if emphasis == "original":
        expected = expected * plain.states.mean() / expected.mean()
    found = encoded(text, ["a (red:1.5) cat"], clip_skip, emphasis)
    assert torch.allclose(found.states, expected, atol=1e-6) and torch.equal(found.pooled, plain.pooled)
    assert not torch.allclose(found.states, plain.states, atol=1e-3)


PLAIN = ["a red cat", "", None, cats(75), "a cat, a dog", "🐱 кошка", "a cat."]


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_plain_prompts_have_the_bits_of_encode(text, xl, clip_skip):
    for encoder in (text, xl, xl.second):
        found, plain = encoded(encoder, PLAIN, clip_skip), encoder.encode(PLAIN, clip_skip)
        assert torch.equal(found.states, plain.states) and torch.equal(found.pooled, plain.pooled)
        assert found.mask is None


def test_escaped_brackets_are_characters(text):
    found = encoded(text, [r"a \(red\) cat"])
    assert torch.equal(found.states, text.encode(["a (red) cat"]).states)


def test_long_prompts_are_their_chunks_and_short_ones_go_on_with_empty_ones(text):
    long, short, empty = "a red cat BREAK (a dog:1.2) BREAK on blue", "a red cat", text.encode([""])
    found = encoded(text, [short, long, short])
    assert found.states.shape == (3, 3 * 77, 16) and found.mask is None
    one, two, three = found.states[1].split(77)
    assert torch.equal(one, text.encode([short]).states[0]) and torch.equal(three, text.encode(["on blue"]).states[0])
    assert torch.equal(two, encoded(text, ["(a dog:1.2)"]).states[0])  # each chunk has its own mean
    assert torch.equal(found.states[0], torch.cat([one, empty.states[0], empty.states[0]]))
    assert torch.equal(found.states[0], found.states[2])
    assert torch.equal(found.pooled, text.encode([short] * 3).pooled)  # the first chunk's
    for i, prompt in enumerate([short, long]):
        alone = encoded(text, [prompt], chunks=3)
        assert torch.equal(alone.states[0], found.states[i])


def test_xl_weights_each_encoder_by_itself(xl):
    found = encoded(xl, ["a (red:1.5) cat BREAK on blue", None], emphasis="original")
    back = [part.without_norm("a red cat", 1) for part in (xl.first, xl.second)]
    w = torch.ones(77)
    w[2] = 1.5
    sides = [side.states * w[:, None] for side in back]
    sides = [side * plain.states.mean() / side.mean() for side, plain in zip(sides, back)]
    assert found.states.shape == (2, 154, 40)
    assert torch.allclose(found.states[:1, :77], torch.cat(sides, -1), atol=1e-6)
    assert torch.equal(found.states[:1, 77:], xl.encode(["on blue"]).states)
    assert torch.equal(found.pooled[:1], xl.encode(["a red cat"]).pooled)
    assert found.states[1].abs().max() == 0 and found.pooled[1].abs().max() == 0


def test_nothing_is_cut_off_a_prompt_that_is_read_in_chunks(text, xl):
    assert [cut_off(encoder, cats(100)) for encoder in (text, xl, xl.second)] == ["", "", ""]


def test_what_is_refused(text, xl):
    with pytest.raises(ConfigError, match="unknown emphasis 'orginal'; did you mean 'original'"):
        encoded(text, ["a"], emphasis="orginal")
    with pytest.raises(ConfigError, match="clip_skip 3 is impossible"):
        encoded(text, ["a"], 3)
    with pytest.raises(ConfigError, match="clip_skip 3 is impossible"):
        encoded(xl, ["a"], 2)
    with pytest.raises(ConfigError, match="no text to encode"):
        encoded(text, [])
    with pytest.raises(ConfigError, match="AND"):
        encoded(text, ["a AND b"])


def test_t5_reads_plain_prompts_and_refuses_emphasis():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    made = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "cat": 3, "(": 4}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=8, **special)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 8}
    t5 = T5Text(T5EncoderModel(T5Config(**sizes, pad_token_id=0, eos_token_id=1)).eval(), tokenizer)
    found, plain = encoded(t5, [r"\( cat", None]), t5.encode(["( cat", None])
    assert torch.equal(found.states, plain.states) and torch.equal(found.mask, plain.mask)
    assert tokens(t5, cats(100)).chunks == 1 and cut_off(t5, cats(7)) == "" and cut_off(t5, cats(9)) == "cat cat"
    for prompt in ("(cat)", "cat BREAK cat"):
        with pytest.raises(ConfigError, match="emphasis and BREAK are CLIP's"):
            encoded(t5, [prompt])
