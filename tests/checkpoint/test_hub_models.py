"""Models by their name on the hub: from the cache without a network, or one line that says what to do."""

import shutil

import pytest

from ldm.checkpoint import check_model, load_model
from ldm.checkpoint.hub import is_hub_id
from ldm.errors import ModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub's library, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def test_what_is_not_cached_is_named_with_the_cache_and_what_to_do(cache):
    for act in (check_model, load_model):
        with pytest.raises(ModelError, match=r"repository someone/model .*hf download someone/model") as error:
            act("someone/model")
        assert str(cache) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_cached_model_loads_and_is_pinned_to_its_commit(cache, saved, revision):
    repository = cache / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    shutil.copytree(saved, repository / "snapshots" / COMMIT)
    name = f"someone/model{revision}"
    assert check_model(name).name == COMMIT
    model = load_model(name, "cpu", "fp32")
    assert model.path.name == COMMIT and model.name == name


def test_what_can_only_be_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    names = {"owner/name": True, "owner/name@v1.0": True, "runs/missing": False, "./owner/name": False}
    names |= {"name": False, "a/b/c": False, "/a/b": False, "~/m": False, "owner/m.ckpt": False, "../a": False}
    assert {name: is_hub_id(name) for name in names} == names
