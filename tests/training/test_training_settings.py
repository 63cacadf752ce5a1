"""Settings: old names and values stay accepted, and every process of a run has the same ones."""

import json
from pathlib import Path

import pytest
import torch

from ldm.errors import ConfigError
from ldm.training.data.samples import EmojiSamples
from ldm.training.distributed import processes
from ldm.training.distributed.checks import check_same_settings
from ldm.training.finetuning.options import resolve_aliases
from ldm.training.settings import FinetuneSettings, as_dict, changed, read_settings
from tests.training.processes import ends_of, start
from tests.training.toy import toy_settings


@pytest.mark.parametrize("override", ["bank=512", "latent_pool=512"])
def test_the_latent_pool_is_still_called_bank_too(override, unet_mapping, tmp_path):
    mapping = {**unet_mapping, "bank": 256}
    del mapping["latent_pool"]
    (tmp_path / "unet.json").write_text(json.dumps(mapping))
    assert read_settings(tmp_path / "unet.json").latent_pool == 256
    settings = read_settings(tmp_path / "unet.json", [override])
    assert settings.latent_pool == 512
    before = {("bank" if name == "latent_pool" else name): value for name, value in as_dict(settings).items()}
    assert changed(before, settings) == {} and changed({**before, "bank": 256}, settings) == {"latent_pool": (256, 512)}


def test_images_as_the_target_of_a_prior_are_still_called_pictures_too():
    assert resolve_aliases({"prior_target": "pictures"}) == {"prior_target": "images"}
    settings = FinetuneSettings(steps=1, batch_size=1, learning_rate=0.1)
    assert changed({**as_dict(settings), "prior_target": "pictures"}, settings) == {}


SPELLINGS = {"fp32": ("float32", "torch.float32", torch.float32, "FP32"), "bf16": ("bfloat16", torch.bfloat16)}
SPELLINGS |= {"fp16": ("float16", "half", "torch.float16")}


@pytest.mark.parametrize(("dtype", "spelling"), [(dtype, word) for dtype in SPELLINGS for word in SPELLINGS[dtype]])
def test_a_dtype_may_be_spelled_as_anybody_does(dtype, spelling, unet_settings):
    for name, key in (("mixed_precision", "precision"), ("save_precision", "save_dtype"), ("cache_dtype", None)):
        assert resolve_aliases({name: spelling}) == {key or "data.cache_dtype": dtype}
    assert resolve_aliases({"data": {"cache_dtype": spelling}}) == {"data.cache_dtype": dtype}
    assert read_settings(unet_settings, [f"precision={spelling}"]).precision == dtype
    with pytest.raises(ConfigError, match="precision: 'float8' is not allowed"):
        read_settings(unet_settings, ["precision=float8"])


def test_processes_with_other_settings_are_refused(tmp_path):
    def work(rank):
        with processes():
            check_same_settings(toy_settings(), Path("run"))
            check_same_settings(toy_settings(seed=rank), Path("run"))

    assert ends_of(start(2, work, log=tmp_path)) == [ConfigError.exit_code] * 2
    said = (tmp_path / "0.txt").read_text()
    assert said == "error: run: process 1 of 2 has other settings than process 0: give all of them\n"
    assert (tmp_path / "1.txt").read_text() == ""


def test_scenes_keep_the_old_names_of_their_settings(unet_mapping, tmp_path):
    """In files, on the command line, and in the settings of a run from before, which can go on."""
    old = {"favourites": ["duck"], "favourites_share": 0.9, "grounds": "any", "jitter": 3}
    new = {"oversampled": ["duck"], "oversampled_share": 0.9, "backgrounds": "any", "jitter": 3, "fixed_layout": 0.5}
    path = tmp_path / "unet.json"
    path.write_text(json.dumps({**unet_mapping, "data": {**unet_mapping["data"], "scenes": old}}))
    settings = read_settings(path, ["data.scenes.still=0.5"])
    assert settings.data.scenes == new
    before = {**as_dict(settings), "data": {**as_dict(settings)["data"], "scenes": {**old, "still": 0.5}}}
    assert changed(before, settings) == {} and EmojiSamples(settings.data, 0).scenes.config.fixed_layout == 0.5
    before["data"]["scenes"]["still"] = 0.4
    assert list(changed(before, settings)) == ["data"]
