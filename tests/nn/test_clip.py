"""The small CLIP: its loss against a plain loop, its tokenizer in transformers, its pooling, and that it learns."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F

from ldm.nn.clip import SmallClip, contrastive_loss, recall_at_1, same_rows, train_tokenizer

CAPTIONS = [
    f"{article} {size} {thing}{place}"
    for article in ("a", "one")
    for size in ("big", "small", "shiny")
    for thing in ("cat", "dog", "guitar", "pineapple", "Crème brûlée")
    for place in ("", " on a red ground", ", left of a kitty", " on a blue ground", " and 3 balloons")
]
VOCABULARY, LENGTH = 640, 16
UNSEEN = [
    "zebra",
    "Ünïcödé ÆØÅ",
    "a 🐈 on a 🟥",
    "猫と犬",
    "it's 100% \t odd…\n",
    "",
    "C++ & <|html|>",
    "x" * 300,
    "𝔘𝔫𝔦",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS, VOCABULARY, LENGTH)


def tiny_clip(tokenizer, seed=0):
    torch.manual_seed(seed)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**small, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    return SmallClip(text, {**small, "num_channels": 4, "image_size": 8, "patch_size": 4})


def tokens_of(tokenizer, captions):
    rows = tokenizer(captions, padding="max_length", truncation=True, max_length=LENGTH)
    return torch.tensor(rows["input_ids"])


# the loss


def plain_loss(text, image, scale, captions):
    """Figure 3 of the paper, pair by pair; other pairs of the same caption are no negatives."""
    total = 0.0
    for anchors, others in ((text, image), (image, text)):
        for i, anchor in enumerate(anchors):
            rivals = [j for j in range(len(others)) if j == i or captions[j] != captions[i]]
            scores = [scale * float(anchor @ others[j]) for j in rivals]
            top = max(scores)
            total += top + math.log(sum(math.exp(s - top) for s in scores)) - scores[rivals.index(i)]
    return total / (2 * len(text))


@pytest.mark.parametrize("captions", ["abcdef", "aabcda", "aaaaaa", "abbabb", "a"])
def test_contrastive_loss_equals_a_plain_loop(captions):
    generator = torch.Generator().manual_seed(len(set(captions)))
    text, image = (F.normalize(torch.randn(len(captions), 5, generator=generator).double(), dim=-1) for _ in range(2))
    tokens = torch.tensor([[1, ord(c), 2] for c in captions])
    loss = contrastive_loss(text, image, torch.tensor(7.0), same_rows(tokens))
    assert loss.item() == pytest.approx(plain_loss(text, image, 7.0, captions), abs=1e-9)


def test_equal_captions_do_not_push_each_other_away():
    """Without the mask two pictures of one caption have an irreducible loss of log 2; with it none, and no gradient."""
    text = torch.eye(4)[[0, 0, 1, 1]].requires_grad_()
    image = torch.eye(4)[[0, 0, 1, 1]].requires_grad_()
    same = same_rows(torch.tensor([[0], [0], [1], [1]]))
    scale = torch.tensor(100.0)
    loss = contrastive_loss(text, image, scale, same)
    loss.backward()
    assert loss.item() < 1e-6 and text.grad.abs().max() < 1e-6 and image.grad.isfinite().all()
    alone = contrastive_loss(text, image, scale, torch.eye(4, dtype=torch.bool))
    assert alone.item() == pytest.approx(math.log(2), abs=1e-6)


def test_same_rows():
    assert same_rows(torch.tensor([[1, 2], [1, 3], [1, 2]])).tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


def test_recall_at_1():
    eye = torch.eye(4)
    assert recall_at_1(eye, eye) == (1.0, 1.0)
    assert recall_at_1(eye, eye[[1, 0, 2, 3]]) == (0.5, 0.5)
    assert recall_at_1(eye, eye[[0, 0, 2, 3]]) == (0.75, 0.75)
    generator = torch.Generator().manual_seed(0)
    text, image = (F.normalize(torch.randn(30, 3, generator=generator), dim=-1) for _ in range(2))
    forward = sum(max(range(30), key=lambda j: float(text[i] @ image[j])) == i for i in range(30)) / 30
    backward = sum(max(range(30), key=lambda j: float(text[j] @ image[i])) == i for i in range(30)) / 30
    assert recall_at_1(text, image) == pytest.approx((forward, backward))
    assert recall_at_1(eye[:1], eye[:1]) == (1.0, 1.0)


# the tokenizer


def test_tokenizer_knows_its_captions_word_by_word(tokenizer):
    assert len(tokenizer) <= VOCABULARY
    assert tokenizer.model_max_length == LENGTH
    for word in ("cat", "dog", "red", "ground", "kitty", "small", "balloons"):
        assert len(tokenizer.tokenize(word)) == 1
    ids = tokenizer("a cat").input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id and len(ids) == 4
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id}) == 2
    assert tokenizer.eos_token_id != 2  # for which transformers pools at the highest id instead


@pytest.mark.parametrize("text", [*CAPTIONS[::7], *UNSEEN])
def test_nothing_is_lost_in_tokens(text, tokenizer):
    """Every byte has a token, so that unseen words, emoji and other scripts come back; only case and spaces go."""
    ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
    assert tokenizer.eos_token_id not in ids and tokenizer.bos_token_id not in ids
    back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert "".join(back.split()) == "".join(text.lower().split())


def test_training_a_tokenizer_again_gives_the_same(tokenizer):
    again = train_tokenizer(list(CAPTIONS), VOCABULARY, LENGTH)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert [again(t).input_ids for t in CAPTIONS] == [tokenizer(t).input_ids for t in CAPTIONS]


def test_the_smallest_vocabulary_is_bytes_alone():
    smallest = train_tokenizer(CAPTIONS, 514, LENGTH)
    assert len(smallest) == 514
    assert len(smallest.tokenize("cat")) == 3


@pytest.mark.parametrize("kept", ["all", "vocab.json and merges.txt"])
def test_written_tokenizer_gives_the_same_ids_in_transformers(kept, tokenizer, tmp_path):
    from transformers import CLIPTokenizer

    from ldm.checkpoint.save import write_tokenizer

    write_tokenizer(tokenizer, tmp_path / "all")
    folder = tmp_path / "all"
    if kept != "all":
        folder = tmp_path / "old"
        folder.mkdir()
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(tmp_path / "all" / name, folder / name)
    loaded = CLIPTokenizer.from_pretrained(folder)
    for text in [*CAPTIONS, *UNSEEN]:
        assert loaded(text, verbose=False).input_ids == tokenizer(text, verbose=False).input_ids
    assert (loaded.bos_token_id, loaded.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    if kept == "all":
        assert loaded.model_max_length == LENGTH and loaded.pad_token_id == tokenizer.pad_token_id


# the towers


def test_pooling_is_at_the_end_of_the_text(tokenizer):
    clip = tiny_clip(tokenizer).eval()
    tokens = tokens_of(tokenizer, ["a big cat"])
    end = tokens[0].tolist().index(tokenizer.eos_token_id)
    assert end == 4
    with torch.no_grad():
        base = clip.embed_text(tokens)
        for position in range(LENGTH):
            if position == end:
                continue
            changed = tokens.clone()
            changed[0, position] = tokenizer.convert_tokens_to_ids("dog</w>")
            moved = (clip.embed_text(changed) - base).abs().max().item()
            assert moved > 1e-4 if position < end else moved == 0, position
        states = clip.text(input_ids=tokens).last_hidden_state
        projected = F.normalize(clip.text.text_projection(states[:, end]), dim=-1)
    assert torch.allclose(projected, base, atol=1e-6)


def test_embeddings_are_unit_vectors_of_one_space(tokenizer):
    clip = tiny_clip(tokenizer)
    text, image = clip.embed_text(tokens_of(tokenizer, CAPTIONS[:3])), clip.embed_image(torch.randn(3, 4, 8, 8))
    assert text.shape == image.shape == (3, 128)
    for embedded in (text, image):
        assert torch.allclose(embedded.norm(dim=-1), torch.ones(3), atol=1e-5)


def test_learns_sixty_four_random_pairs(tokenizer):
    clip = tiny_clip(tokenizer)
    tokens = tokens_of(tokenizer, CAPTIONS[:64])
    latents = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(clip.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = clip(tokens, latents)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert 3 < losses[0] < 8 and losses[-1] < 0.3 * losses[0]
    with torch.no_grad():
        assert min(recall_at_1(clip.embed_text(tokens), clip.embed_image(latents))) > 0.7
    assert all(p.grad is not None and p.grad.isfinite().all() for p in clip.parameters())


def test_temperature_is_bounded(tokenizer):
    clip = tiny_clip(tokenizer)
    tokens, latents = tokens_of(tokenizer, CAPTIONS[:4]), torch.randn(4, 4, 8, 8)
    clip.logit_scale.data.fill_(math.log(100))
    at_most = clip(tokens, latents).item()
    clip.logit_scale.data.fill_(50.0)
    assert clip(tokens, latents).item() == pytest.approx(at_most, rel=1e-5)
