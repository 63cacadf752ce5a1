"""What a run may go on from: never a damaged or foreign checkpoint, never afresh over what is there, nothing renamed
before it is certain."""

import json
import shutil

import pytest

from ldm.checkpoint.safety import MANIFEST, write_manifest
from ldm.errors import CheckpointError, ConfigError, LdmError, ModelError
from ldm.training.checkpoints import reading, state
from ldm.training.checkpoints.begin import to_resume
from ldm.training.settings import FinetuneSettings, changed
from tests.training.toy import toy_settings, train_toy


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("resuming") / "run"
    train_toy(run, decay_from=1)
    return run


@pytest.fixture
def run(whole, tmp_path):
    """A finished run of twelve steps, with checkpoints at 9 and 12."""
    return shutil.copytree(whole, tmp_path / "run")


def end_of(run):
    return (run / "checkpoints" / "step-00000012" / state.WEIGHTS).read_bytes()


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def damage(folder):
    content = bytearray((folder / state.WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / state.WEIGHTS).write_bytes(content)


def rewrite(folder, **changes):
    """state.json with these, vouched for by the manifest."""
    about = json.loads((folder / state.ABOUT).read_text())
    about = {name: value for name, value in {**about, **changes}.items() if value is not None}
    (folder / state.ABOUT).write_text(json.dumps(about))
    write_manifest(folder)


def test_after_all_checkpoints_were_set_aside_no_command_begins_anew(run):
    for folder in state.checkpoints(run):
        damage(folder)
    for resume in ("latest", "latest", None, "best"):
        with pytest.raises(LdmError) as error:
            train_toy(run, resume, decay_from=1)
        assert not isinstance(error.value, ConfigError) and error.value.exit_code == 2
        if resume == "latest":
            assert "no checkpoint is whole" in str(error.value)
    assert names(run) == ["corrupt-step-00000009", "corrupt-step-00000012"]


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_leads_to_the_same_bits(run, whole, capsys):
    damage(run / "checkpoints" / "step-00000012")
    train_toy(run, "latest", decay_from=1)
    assert "set aside as corrupt-step-00000012" in capsys.readouterr().err
    assert names(run) == ["corrupt-step-00000012", "step-00000009", "step-00000012"] and end_of(run) == end_of(whole)


def test_a_checkpoint_without_its_manifest_is_damaged_too(run):
    for folder in state.checkpoints(run):
        (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        train_toy(run, "latest", decay_from=1)


def test_a_second_damaged_checkpoint_of_a_step_has_a_name_of_its_own(run):
    shutil.copytree(run / "checkpoints" / "step-00000012", run / "checkpoints" / "corrupt-step-00000012")
    damage(run / "checkpoints" / "step-00000012")
    assert reading.newest(run).name == "step-00000009"
    assert "corrupt-step-00000012-2" in names(run)


def test_newer_checkpoints_keep_their_names_until_the_chosen_one_is_taken(run):
    chosen, before = run / "checkpoints" / "step-00000009", names(run)
    with pytest.raises(CheckpointError, match="batch_size: 4 → 5"):
        train_toy(run, str(chosen), decay_from=1, batch_size=5)
    with pytest.raises(CheckpointError, match="not those of this network"):
        train_toy(run, str(chosen), decay_from=1, lora=True)
    damage(chosen)
    with pytest.raises(ModelError, match="does not match"):
        train_toy(run, str(chosen), decay_from=1)
    assert names(run) == before


def test_going_back_twice_loses_nothing(run, whole):
    chosen = run / "checkpoints" / "step-00000009"
    for _ in range(2):
        train_toy(run, str(chosen), decay_from=1)
        assert end_of(run) == end_of(whole)
    assert names(run) == ["later-step-00000012", "later-step-00000012-2", "step-00000009", "step-00000012"]


def test_looking_renames_and_removes_nothing(run, capsys):
    (run / ".tmp-1-left").write_text("x")
    damage(run / "checkpoints" / "step-00000012")
    before = names(run)
    found = to_resume(toy_settings(decay_from=1), run, "latest", (), look=True)
    assert found.name == "step-00000009" and names(run) == before and (run / ".tmp-1-left").exists()
    assert "step-00000012" in capsys.readouterr().err


@pytest.mark.parametrize("later", [True, False], ids=["later steps", "earlier steps"])
def test_another_runs_checkpoint_is_not_resumed_into_a_folder_with_a_run(run, tmp_path, later):
    other = shutil.copytree(run, tmp_path / "other")
    mine, theirs = ("step-00000012", "step-00000009") if later else ("step-00000009", "step-00000012")
    shutil.rmtree(run / "checkpoints" / theirs)
    before = names(run)
    with pytest.raises(CheckpointError, match=r"already holds a run, and .* is a checkpoint of another"):
        train_toy(run, str(other / "checkpoints" / theirs), decay_from=1)
    assert names(run) == before == [mine]


def test_another_runs_checkpoint_is_not_resumed_over_a_finished_model(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    shutil.rmtree(run / "checkpoints")
    (run / "settings.json").touch()
    (run / "model").mkdir(exist_ok=True)
    with pytest.raises(CheckpointError, match="already holds a run that is finished"):
        train_toy(run, str(other / "checkpoints" / "step-00000009"), decay_from=1)


def test_another_runs_checkpoint_is_resumed_into_a_new_folder(run, tmp_path):
    train_toy(tmp_path / "new", str(run / "checkpoints" / "step-00000009"), decay_from=1)
    assert names(tmp_path / "new") == ["step-00000012"]


def test_a_finished_run_without_checkpoints_is_not_overwritten(run):
    shutil.rmtree(run / "checkpoints")
    before = (run / "model" / "weights.txt").read_bytes()
    for resume in (None, "latest"):
        with pytest.raises(CheckpointError, match=r"already holds a run that is finished \(model\)"):
            train_toy(run, resume, seed=1)
    assert (run / "model" / "weights.txt").read_bytes() == before


def test_a_checkpoint_of_another_format_names_both(run):
    for folder in state.checkpoints(run):
        rewrite(folder, format=2)
    for resume in ("latest", str(state.checkpoints(run)[-1])):
        with pytest.raises(CheckpointError, match="has format 2, this version reads 1"):
            train_toy(run, resume, decay_from=1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"format": 1}', "state.json is damaged: step"),
        ("[1]", "is no checkpoint of ldm"),
        ("[" * 100_000, "is no checkpoint of ldm"),
        (None, "is no checkpoint of ldm"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused_in_one_line(content, said, run):
    folder = run / "checkpoints" / "step-00000012"
    (folder / state.ABOUT).unlink()
    if content is not None:
        (folder / state.ABOUT).write_text(content)
    with pytest.raises(CheckpointError, match=said):
        train_toy(run, str(folder), decay_from=1)


def test_values_of_another_kind_are_named(run):
    folder = run / "checkpoints" / "step-00000012"
    for name, value in (("settings", []), ("losses", 1), ("environment", None), ("inputs", "x"), ("scaler", 2)):
        kept = (folder / state.ABOUT).read_text()
        (folder / state.ABOUT).write_text(json.dumps({**json.loads(kept), name: value}))
        with pytest.raises(CheckpointError, match=f"damaged: {name}"):
            train_toy(run, str(folder), decay_from=1)
        (folder / state.ABOUT).write_text(kept)


def test_what_no_manifest_vouches_for_is_refused(run):
    folder = run / "checkpoints" / "step-00000012"
    content = (folder / state.WEIGHTS).read_bytes()
    (folder / state.WEIGHTS).write_bytes(content[:-1000])
    write_manifest(folder)
    with pytest.raises(CheckpointError, match=r"state.safetensors: cannot be read"):
        train_toy(run, str(folder), decay_from=1)
    (folder / state.WEIGHTS).unlink()
    write_manifest(folder)
    with pytest.raises(CheckpointError, match=r"does not list state\.safetensors"):
        train_toy(run, str(folder), decay_from=1)
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="has no manifest"):
        train_toy(run, str(folder), decay_from=1)


def test_a_name_that_may_differ_is_one_that_there_is(run):
    with pytest.raises(
        ConfigError, match=r"allow_changed: unknown setting 'bach_size'; did you mean 'batch_size'"
    ) as error:
        train_toy(run, "latest", ("bach_size",), batch_size=5)
    assert error.value.exit_code == 2
    train_toy(run, "latest", ("batch_size", "model", "data", "prior", "init"), decay_from=1, batch_size=5)


def test_two_ways_to_write_a_folder_are_no_change(tmp_path, monkeypatch):
    from ldm.training.settings import FinetuneData

    monkeypatch.chdir(tmp_path)
    common = {"steps": 1, "batch_size": 1, "learning_rate": 1.0}
    old = {**common, "model": "tiny", "data": {"folder": "pics"}}
    same = FinetuneSettings(**common, model="./tiny/", data=FinetuneData(folder=f"{tmp_path}/pics/"))
    assert changed(old, same) == {}
    other = FinetuneSettings(**common, model="tiny2", data=FinetuneData(folder="pics2/"))
    assert changed(old, other).keys() == {"model", "data"}
