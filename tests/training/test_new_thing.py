"""A thing that the default model cannot know, learned from 24 pictures with nothing said but where they are.

`pytest -m slow tests/training/test_new_thing.py` takes a quarter of an hour on two cores alone.
"""

import time

import pytest
from invented import THING, WiderJudge, prompts, write_pictures

import ldm
from ldm import images
from ldm.evaluation.lists import open_list
from ldm.pipeline import Pipeline

OLD = 50  # prompts of what the model knew before, of the list to tune with


def drawn(asked, lora=None):
    pipe = Pipeline([p.text for p in asked], lora=lora)
    return list(pipe.generate(seed=[1 + i for i in range(len(asked))]))


def right(judge, pictures, asked):
    verdicts = [judge(picture) for picture in pictures]
    return sum(v.guesses[0].lookalike_class == p.objects[0].lookalike_class for v, p in zip(verdicts, asked))


@pytest.mark.slow
def test_a_new_thing_is_learned_and_nothing_forgotten(tmp_path, capsys):
    judge, new, old = WiderJudge(), prompts(20), open_list("tuning")[1][:OLD]
    assert all(THING not in p.objects and len(p.objects) == 1 for p in old)
    began = time.monotonic()
    lora = ldm.finetune(write_pictures(tmp_path / "set"), tmp_path / "zorbel")
    minutes = (time.monotonic() - began) / 60
    found = {}
    for name, weights in (("before", None), ("after", lora)):
        for kind, asked in (("new", new), ("old", old)):
            pictures = drawn(asked, weights)
            images.grid(pictures, columns=10).save(tmp_path / f"{kind}-{name}.png")
            found[kind, name] = right(judge, pictures, asked)
    with capsys.disabled():
        told = ", ".join(f"{kind} {name}: {count}" for (kind, name), count in found.items())
        print(f"\n{told}; {minutes:.1f} minutes; pictures in {tmp_path}")
    assert minutes <= 15
    assert found["new", "before"] <= 1 and found["new", "after"] >= 12
    assert found["old", "after"] >= found["old", "before"] - 3
