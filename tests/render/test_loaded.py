"""ldm.render with models that are in memory."""

import dataclasses

import pytest
from render_cases import by_key, pictures

from ldm.checkpoint import load_model
from ldm.errors import ConfigError
from ldm.images import read_metadata
from ldm.render.drawing.runner import render
from ldm.render.jobs.loaded_models import name_of_loaded, weights_hash
from ldm.render.output.lines import read_manifest
from tests.conftest import build_tiny_model

LINES = ["a cat --d 1", "a dog --d 2"]


def test_a_loaded_model_draws_the_jobs_of_its_folder(tiny_folder, tmp_path):
    loaded = load_model(tiny_folder, device="cpu", dtype="fp32")
    first = render(LINES, tmp_path / "out", model=loaded, steps=1)
    assert first.counts["rendered"] == 2
    assert {record["settings"]["model"] for record in read_manifest(tmp_path / "out")} == {str(loaded.path)}
    again = render([*LINES, "a --d 3"], tmp_path / "out", model=str(tiny_folder), steps=1)
    assert again.counts["finished_before"] == 2 and again.counts["rendered"] == 1
    render(LINES, tmp_path / "folder", model=str(tiny_folder), steps=1)
    assert by_key(tmp_path / "folder").items() <= by_key(tmp_path / "out").items()


def test_a_model_made_in_memory_is_known_by_its_weights(tmp_path):
    first = render(LINES, tmp_path / "out", model=build_tiny_model(1), steps=1)
    assert first.counts["rendered"] == 2
    same = render(LINES, tmp_path / "out", model=build_tiny_model(1), steps=1)
    assert same.counts["finished_before"] == 2
    other = render(LINES, tmp_path / "out", model=build_tiny_model(2), steps=1)
    assert other.counts["rendered"] == 2 and len(set(pictures(tmp_path / "out").values())) == 4
    inside = read_metadata(first.paths[0]).ldm
    assert inside["model_hash"] == weights_hash(build_tiny_model(1))
    names = {record["settings"]["model"] for record in read_manifest(tmp_path / "out")}
    assert f"loaded:{inside['model_hash'][:12]}" in names and len(names) == 2


def test_a_changed_model_is_not_taken_for_its_folder(tiny_folder):
    loaded = load_model(tiny_folder, device="cpu", dtype="fp32")
    name, same = name_of_loaded(loaded)
    assert same is loaded and name == str(loaded.path)
    changed = {
        "lora": dataclasses.replace(loaded, info={"lora": [{"name": "red"}]}),
        "schedule": dataclasses.replace(loaded, schedule=dataclasses.replace(loaded.schedule, spacing="leading")),
        "hash": dataclasses.replace(loaded, hash="0" * 64),
    }
    for what, model in changed.items():
        name, found = name_of_loaded(model)
        assert name.startswith("loaded:") and found.hash not in (loaded.hash, model.hash), what
        assert found.unet is loaded.unet
    assert weights_hash(changed["schedule"]) != weights_hash(loaded)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"model": 3}, "expected a name, a path or a loaded model, got int"),
        ({"ray": "auto"}, "a loaded model stays in its process"),
        ({"vae": "vae"}, "a loaded model has its VAE already"),
        ({"dtype": "bf16"}, "the given model is loaded in fp32"),
    ],
)
def test_what_does_not_go_with_a_loaded_model(tmp_path, words, message):
    words = {"model": build_tiny_model(), **words}
    with pytest.raises(ConfigError, match=message):
        render(LINES, tmp_path / "out", steps=1, **words)
    assert not (tmp_path / "out").exists()
