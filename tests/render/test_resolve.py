"""What a line's settings become."""

import json
import shutil

import pytest

from ldm.errors import ConfigError, ModelError
from ldm.pipeline import Pipeline
from ldm.render.jobs.resolve import Resolver


def test_settings_are_those_of_generate(tiny_folder):
    asked = {"num_inference_steps": 2, "sampler": "euler", "spacing": "karras", "guidance_rescale": 0.5}
    settings, hashes = Resolver()({"prompt": "a cat", "seed": 3, "model": str(tiny_folder), **asked})
    (record,) = Pipeline("a cat", model=tiny_folder).generate(seed=3, **asked).metadata
    assert {name: record[name] for name in settings if name != "model"} == {
        name: value for name, value in settings.items() if name != "model"
    }
    assert hashes == {"model": record["model_hash"]} and json.loads(json.dumps(settings)) == settings


def test_what_changes_nothing_is_left_out(tiny_folder):
    resolve, line = Resolver(), {"prompt": "a", "seed": 1, "model": str(tiny_folder)}
    plain = resolve(line)
    neutral = {"guidance": "cfg", "clip_skip": 0, "emphasis": "original", "eta": None, "guidance_rescale": 0.0}
    assert resolve({**line, **neutral, "negative_prompt": "", "guidance_scale": 6, "height": 32}) == plain
    assert resolve({**line, "dtype": "auto"}) == plain
    assert resolve({**line, "dtype": "fp32"})[0] == {**plain[0], "dtype": "fp32"}  # asked for: another image


def test_resolved_settings_resolve_to_themselves(tiny_folder):
    resolve = Resolver()
    line = {"prompt": "a", "seed": 1, "model": str(tiny_folder), "sampler": "lcm", "guidance": "pag", "pag_scale": 2.0}
    settings, _ = resolve(line)
    assert resolve(settings)[0] == settings
    engine, call = resolve.drawable(settings)
    assert engine.info.path == tiny_folder.resolve() and call.sampler == "lcm" and call.guidance.pag_scale == 2.0


def test_another_vae_is_in_the_hashes(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder / "vae", tmp_path / "vae")
    resolve, line = Resolver(), {"prompt": "a", "seed": 1, "model": str(tiny_folder)}
    _, plain = resolve(line)
    settings, hashes = resolve({**line, "vae": str(tmp_path / "vae")})
    assert settings["vae"] == str(tmp_path / "vae") and hashes["model"] != plain["model"] and len(hashes["vae"]) == 64


def test_what_a_run_draws_by_is_in_settings_and_key(tiny_folder):
    line = {"prompt": "a", "seed": 1, "model": str(tiny_folder)}
    (plain, hashes), (other, same) = (Resolver(prediction_type=word)(line) for word in (None, "v_prediction"))
    assert other == {**plain, "prediction_type": "v_prediction"} and same == hashes
    assert Resolver(prediction_type="v_prediction")(other)[0] == other
    assert Resolver(allow_unapplied=True, attention="sdpa")(line) == (plain, hashes)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"width": 33}, "use 32 or 40"),
        ({"sampler": "heun_flow"}, "heun_flow is for flow models"),
        ({"num_inference_steps": 5, "timesteps": (9.0, 1.0)}, "timesteps"),
        ({"prompt": "a (cat:x:y) [a:b:c:d"}, None),
        ({"prompt": "a" + "(" * 200}, "nested more than"),
        ({"prompt": "<lora:x> cat"}, "no folder to look in"),
        ({"negative_prompt": "<lora:x>"}, "belongs into the prompt"),
        ({"image": "x.png"}, "no such image"),
        ({"tiling": True}, "is not supported in prompt files"),
        ({"model": "nowhere"}, "no such model folder"),
        ({"eta": 0.5, "sampler": "euler"}, "takes no eta"),
    ],
)
def test_what_cannot_be_drawn_is_named(tiny_folder, asked, message):
    resolve, line = Resolver(), {"prompt": "a", "seed": 1, "model": str(tiny_folder), **asked}
    if message is None:
        assert resolve(line)[0]["prompt"] == asked["prompt"]
        return
    for _ in range(2):  # remembered or not
        with pytest.raises((ConfigError, ModelError), match=message):
            resolve(line)
