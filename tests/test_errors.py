"""Messages of failures: one line, and names of files as they are."""

import pytest

from ldm.cli import generate, main
from ldm.errors import Interrupted, LdmError, ModelError, nearest, one_line


def test_a_message_keeps_the_spaces_of_a_file_name():
    error = ModelError("no such  file", where="models/my  best \t model ", hint="did you mean 'a  b'?")
    assert str(error) == "models/my  best \t model : no such  file; did you mean 'a  b'?"


def test_a_message_is_one_line_whatever_it_is_made_of():
    error = LdmError("cannot be\n   read:\r\n\n  bad\u2028 header ", where="a\nb", hint="try\nagain")
    assert str(error) == "a b: cannot be read: bad header; try again"
    assert one_line("\n\n") == "" and one_line(" a  b \n") == "a  b"


def test_hint_has_its_old_name_too():
    old, new = LdmError("w", todo="x"), LdmError("w", hint="x")
    assert str(old) == str(new) == "w; x" and old.hint == old.todo == new.hint == new.todo == "x"


def test_interrupted_ends_with_the_number_of_its_signal():
    error = Interrupted(15, "stopped", where="runs/a", hint="go on with --resume")
    assert error.exit_code == 143 and str(error) == "runs/a: stopped; go on with --resume"


@pytest.mark.parametrize("error", [ModelError("no such file", where="my  model"), OSError(2, "gone", "my  model")])
def test_the_command_line_keeps_the_spaces_of_a_file_name(error, monkeypatch, capsys):
    def run(_args):
        raise error

    monkeypatch.setattr(generate, "run", run)
    main(["generate", "a cat"])
    assert "my  model" in capsys.readouterr().err


def test_nearest_names_the_closest_or_all():
    assert nearest("eular", ["euler", "heun"]) == "did you mean 'euler'?"
    assert nearest("xyz", ["euler", "heun"]) == "choose from: euler, heun"
