"""--step-cache and presets of guidance intervals: off unless asked for, and labelled in the image's metadata."""

import pytest

from ldm import Pipeline
from ldm.bench import bench
from ldm.cli import main, parse
from ldm.diffusion.guidance import Guidance
from ldm.errors import ConfigError
from ldm.images import read_metadata


def test_images_say_that_they_are_inexact(tiny_folder, tmp_path):
    pipe = Pipeline("a cat", tiny_folder)
    exact, off, reused = (pipe.generate(seed=1, steps=6, step_cache=n) for n in (None, 1, 3))
    assert exact[0].tobytes() == off[0].tobytes() != reused[0].tobytes()
    assert "inexact" not in off.metadata[0] and "step_cache" not in off.metadata[0]
    assert reused.metadata[0]["inexact"] == "deep features are reused: step_cache 3"
    line = ["generate", "a cat", "--model", str(tiny_folder), "--seed", "1", "--steps", "6", "--step-cache", "3"]
    assert main([*line, "-o", str(tmp_path / "a.png")]) == 0
    again = ["generate", "--from", str(tmp_path / "a.png"), "-o", str(tmp_path / "again.png")]
    assert main([*again, "--model", str(tiny_folder)]) == 0
    assert read_metadata(tmp_path / "again.png").ldm["step_cache"] == 3  # drawn again, it is drawn so again
    (tmp_path / "p.txt").write_text("a cat --step_cache 3 --steps 6 --seed 1\n")
    assert main(["render", str(tmp_path / "p.txt"), "-o", str(tmp_path / "out"), "--model", str(tiny_folder)]) == 0
    (png,) = (tmp_path / "out").glob("*.png")
    assert read_metadata(png).ldm["inexact"] == reused.metadata[0]["inexact"]
    with pytest.raises(ConfigError, match="step_cache: 0 is outside 1 to 1000"):
        pipe.generate(step_cache=0)


@pytest.mark.parametrize("prompts", [["a cat", "a dog"], ["a cat", "a [cat|dog]"]])
def test_reused_features_do_not_depend_on_the_rest_of_the_batch(tiny_folder, prompts):
    settings = {"steps": 6, "step_cache": 3, "guidance_interval": (0.2, 0.7)}
    together = Pipeline(prompts, tiny_folder).generate(seed=[1, 2], guidance_scale=[1, 4], **settings)
    for i, (prompt, scale) in enumerate(zip(prompts, (1, 4))):
        (alone,) = Pipeline(prompt, tiny_folder).generate(seed=1 + i, guidance_scale=scale, **settings)
        assert alone.tobytes() == together[i].tobytes()


def test_presets_are_intervals(capsys):
    assert Guidance(interval="half").interval == (0.0, 0.5) and Guidance(sigma_interval="xl").sigma_interval[0] == 0.28
    with pytest.raises(ConfigError, match="guidance_interval: expected two numbers or half, most, got 'hlaf'"):
        Guidance(interval="hlaf")
    assert parse(["generate", "a cat", "--guidance-preset", "most"]).guidance_interval == (0.0, 0.8)
    assert parse(["generate", "--guidance-preset", "xl", "a cat"]).guidance_sigma_interval == (0.28, 5.42)
    assert main(["generate", "a cat", "--guidance-preset", "x"]) == 2
    assert "expected half, most, xl, got 'x'" in capsys.readouterr().err


def test_the_bench_measures_both(tiny_folder):
    (timing,) = bench(["shortcuts"], model=str(tiny_folder), prompts=1, repeats=1, steps=4)
    assert timing.agreement["step_cache 5: distance of 255"] >= timing.agreement["step_cache 2: distance of 255"] > 0
    assert {"guidance half: distance of 255", "guidance xl (sigmas): share of the time"} <= timing.agreement.keys()
    assert "shortcuts" in timing.text()
