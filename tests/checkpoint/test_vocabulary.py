"""CLIP's vocabulary as it ships: known ids, both pads, and told apart from other tokenizers."""

import json

import pytest

from ldm.checkpoint.vocabulary import clip_tokenizer, is_clips, merges, vocabulary

KNOWN = {  # as OpenAI's own tokenizer gives them
    "a photo of a cat": [49406, 320, 1125, 539, 320, 2368, 49407],
    "A PHOTO  of\na Cat": [49406, 320, 1125, 539, 320, 2368, 49407],
    "": [49406, 49407],
    "hello world": [49406, 3306, 1002, 49407],
}


def test_known_places_in_the_vocabulary():
    table = vocabulary()
    assert len(table) == 49408 and len(merges()) == 48894
    known = {"!": 0, "a": 64, "!</w>": 256, "a</w>": 320, "in": 512, "the</w>": 518, "jekyll</w>": 49405}
    assert {piece: table[piece] for piece in known} == known
    assert (table["<|startoftext|>"], table["<|endoftext|>"]) == (49406, 49407)
    assert merges()[:3] == (("i", "n"), ("t", "h"), ("a", "n"))


@pytest.mark.parametrize("text", KNOWN)
def test_texts_get_the_ids_that_clip_was_trained_with(text):
    assert clip_tokenizer()(text).input_ids == KNOWN[text]
    assert clip_tokenizer("!")(text).input_ids == KNOWN[text]


def test_the_pad_is_the_end_or_the_first_token():
    padded = {"padding": "max_length", "max_length": 5}
    assert clip_tokenizer()("cat", **padded).input_ids == [49406, 2368, 49407, 49407, 49407]
    assert clip_tokenizer("!")("cat", **padded).input_ids == [49406, 2368, 49407, 0, 0]
    assert clip_tokenizer().model_max_length == 77


def test_another_tokenizer_is_told_apart():
    table = json.loads(clip_tokenizer("!").backend_tokenizer.to_str())
    assert is_clips(json.dumps(table))
    table["model"]["merges"][0], table["model"]["merges"][1] = table["model"]["merges"][1], table["model"]["merges"][0]
    assert not is_clips(json.dumps(table))
    table["model"]["merges"].pop()
    assert not is_clips(json.dumps(table))
