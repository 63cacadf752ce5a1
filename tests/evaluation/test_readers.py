"""Linear readers of a text encoder tell what its states hold, and no more."""

import json

import pytest
import torch

from ldm.cli import main
from ldm.data.emoji.labels import UNSAID, Labels
from ldm.evaluation.readers import fitted, scores, unseen_captions


def made_up(says_order):
    """Mean states that hold two of six things as places of ones, the order in a sign on each where `says_order`."""
    torch.manual_seed(0)
    means, labels = [], []
    for number in range(3000):
        a, b = torch.randperm(6)[:2].tolist()
        x = 0.05 * torch.randn(24)
        if number % 2:
            x[a] += 1.0
            labels.append(Labels(object=a, colour=number % 3, count=0))
        else:
            x[a + 6] += 1.0
            x[b + 6 + 6 * says_order] += 1.0
            labels.append(Labels(colour=number % 3, first=a, last=b, axis=number // 2 % 2))
        x[18 + number % 3] += 1.0
        x[21] += number // 2 % 2
        means.append(x)
    return torch.stack(means), torch.tensor(labels)


@pytest.mark.parametrize("says_order", [True, False])
def test_readers_tell_what_the_states_hold_and_no_more(says_order):
    means, labels = made_up(says_order)
    found = scores(fitted(means[:2600], labels[:2600]), means[2600:], labels[2600:])
    assert found["objects"] == found["colour"] == found["axis"] == 1
    assert found["order"] == 1 if says_order else found["order"] < 0.7


def test_unseen_captions_are_held_out_and_have_mirrors():
    seen, unseen = unseen_captions(400, 3, False), unseen_captions(400, 3)
    assert len(unseen) == 400 and not {text for text, _ in seen} & {text for text, _ in unseen}
    pairs = [labels for _, labels in unseen if labels.first != UNSAID]
    assert len(pairs) == 160
    for one, other in zip(pairs[::2], pairs[1::2]):
        assert (one.first, one.last, one.axis, one.colour) == (other.last, other.first, other.axis, other.colour)


def test_the_command_prints_and_writes_the_scores(tmp_path, capsys):
    assert main(["evaluate", "--text", "-n", "200", "--fit", "300", "-o", str(tmp_path)]) == 0
    out = capsys.readouterr()
    assert "read linearly over 200 unseen captions: objects" in out.out + out.err
    report = json.loads((tmp_path / "text.json").read_text())
    assert report["n"] == 200 and all(0 <= report[name] <= 1 for name in ("objects", "colour", "order"))


def test_too_few_captions_are_refused(capsys):
    assert main(["evaluate", "--text", "-n", "5"]) == 2
    assert "n: must be at least 100" in capsys.readouterr().err
    assert main(["evaluate", "--text", "-n", "0"]) == 2
    assert main(["evaluate", "--text", "--sampler", "euler"]) == 2
    assert "sampler: is for images" in capsys.readouterr().err
