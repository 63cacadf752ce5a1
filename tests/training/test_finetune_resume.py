"""A fine-tuning that is killed goes on to the very bits of the one that was not: LoRA and full."""

import itertools
import os
import shutil
import signal

import pytest

from ldm.checkpoint import load_model
from ldm.errors import CheckpointError
from ldm.training.checkpoints import state
from ldm.training.stages.finetune import Finetune
from tests.children import in_child, status_of
from tests.training.finetune_cases import pictures, run
from tests.training.test_resume import final_bytes

FULL = {"train": "full", "learning_rate": 1e-3, "text_encoder": True}
LORA = {"learning_rate": 0.02, "snr_gamma": 5.0}
# Every draw that resuming could get wrong, and saves at other steps than scores.
COMMON = {"steps": 8, "accumulation": 2, "batch_size": 4, "save_every": 2, "validate_every": 3, "log_every": 3}
COMMON |= {"optimizer": "adamw", "lr_schedule": "cosine", "warmup": 2, "ema": 0.8, "noise_offset": 0.05, "flip": 0.5}
COMMON |= {"held_out": 0.3, "samples": 2, "sample_steps": 2, "sampler": "dpmpp_sde", "caption_dropout": 0.3}
COMMON |= {"timesteps": "logit_normal", "export": "best"}


@pytest.fixture(scope="module")
def case(tmp_path_factory, tiny_folder):
    """A function kind -> (function that runs it into a folder, what an uninterrupted run ends with).

    The caches are made once, and everything is imported before a child is forked.
    """
    root = tmp_path_factory.mktemp("kills")
    data, made = pictures(root / "pictures", 10, ((32, 32), (44, 28))), {}

    def get(kind):
        words = {**COMMON, **(FULL if kind == "full" else LORA), "cache": str(root / "cache"), "name": "mine"}

        def go(out, resume=None, **more):
            return run(data, out, tiny_folder, resume=resume, **{**words, **more})

        if kind not in made:
            go(root / f"{kind}-first")
            assert status_of(in_child(lambda: go(root / kind) and 0)) == 0
            made[kind] = final(root / kind)
        return go, made[kind]

    return get


def final(out):
    """All that a run says in the end, its output included."""
    outputs = ("best.json", "mine.safetensors", "pytorch_lora_weights.safetensors", "manifest.json")
    names = [name for name in outputs if (out / name).exists()]
    return final_bytes(out) | {name: (out / name).read_bytes() for name in names}


def killed_at(moment, work):
    """Run `work` in a forked process that is killed at the number-th call of a method of Finetune; its status."""
    method, number = moment

    def work_until_then():
        original, calls = getattr(Finetune, method), itertools.count()

        def killing(*args, **kwargs):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(Finetune, method, killing)
        work()

    return status_of(in_child(work_until_then))


# Each continues where the last checkpoint was: of 8 steps with 2 micro-batches every second step has one.
KILLS = (("open", 0), ("loss", 1), ("loss", 6), ("validate", 0), ("sample_grid", 0), ("loss", 4), ("export", 0))


@pytest.mark.parametrize(
    ("kind", "kills"), [("lora", KILLS), pytest.param("full", KILLS[2:4] + KILLS[-1:], marks=pytest.mark.slow)]
)
def test_kills_at_many_places_change_no_bit(kind, kills, case, tmp_path, one_thread):
    go, uninterrupted = case(kind)
    for moment in kills:
        assert killed_at(moment, lambda: go(tmp_path / "run", resume="latest")) == -signal.SIGKILL, moment
    assert status_of(in_child(lambda: go(tmp_path / "run", resume="latest") and 0)) == 0
    assert final(tmp_path / "run") == uninterrupted
    assert (kind == "full") == ("model/model_index.json" in uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_kill_at_any_step_changes_no_bit(kind, case, tmp_path, one_thread):
    """Each run is killed once: in one of its steps, scores or grids, or in its export."""
    go, uninterrupted = case(kind)
    moments = [("loss", number) for number in range(16)]
    moments += [(method, number) for method in ("validate", "sample_grid") for number in range(4)]
    for moment in [*moments, ("export", 0)]:
        out = tmp_path / "run"
        assert killed_at(moment, lambda: go(out, resume="latest")) == -signal.SIGKILL, moment  # noqa: B023
        assert status_of(in_child(lambda: go(out, resume="latest") and 0)) == 0  # noqa: B023
        assert final(out) == uninterrupted, moment
        shutil.rmtree(out)


def test_what_was_not_said_again_is_as_it_was(case, tmp_path, one_thread):
    """Presets are made for a new run alone; a setting that is said and differs is named."""
    go, _ = case("lora")
    out = tmp_path / "run"
    go(out, steps=3)
    with pytest.raises(CheckpointError, match=r"settings changed \(lora_rank: 2 → 4\)"):
        go(out, resume="latest", lora_rank=4)
    with pytest.raises(CheckpointError, match=r"settings changed \(data: \{'flip': 0.5\} → \{'flip': 0.0\}\)"):
        go(out, resume="latest", flip=0.0)
    go(out, resume="latest", steps=4, flip=0.0, allow_changed=["flip", "steps"])
    assert state.checkpoints(out)[-1].name == "step-00000004"


def test_other_data_or_another_model_is_noticed(tiny_folder, tmp_path, one_thread):
    from ldm.checkpoint import save_model
    from tests.conftest import build_tiny_model

    data, model = pictures(tmp_path / "pictures", 4), shutil.copytree(tiny_folder, tmp_path / "model")
    run(data, tmp_path / "run", model, steps=1)
    (data / "0.txt").write_text("a blue dog")
    with pytest.raises(CheckpointError, match="the data is not the one that this run began with"):
        run(data, tmp_path / "run", model, steps=2, resume="latest")
    (data / "0.txt").write_text("a red cat")
    before = load_model(model, "cpu", "fp32").hash
    save_model(build_tiny_model(seed=1), model, dtype="fp32")
    assert load_model(model, "cpu", "fp32").hash != before
    with pytest.raises(CheckpointError, match="the model is not the one that this run began with"):
        run(data, tmp_path / "run", model, steps=2, resume="latest")
    run(data, tmp_path / "run", model, steps=2, resume="latest", allow_changed=["model"])
