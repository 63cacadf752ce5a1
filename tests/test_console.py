"""Bars and lines where they belong, and signals that let a step end."""

import io
import os
import signal
import sys
import threading

import pytest

from ldm import console
from tests.children import in_child, status_of


@pytest.fixture
def level(monkeypatch):
    """A function that sets how much is said, for one test."""
    return lambda value: monkeypatch.setattr(console, "level", value)


@pytest.mark.parametrize(("at", "shown"), [(-1, ["warned"]), (0, ["said", "warned"]), (1, ["said", "more", "warned"])])
def test_what_is_said_at_which_level(at, shown, level, capsys):
    level(at)
    console.say("said")
    console.say("more", verbosity=1)
    console.warn("warned")
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [line.replace("warned", "warning: warned") for line in shown]


def test_inside_of_hushed_no_words_but_each_warning_once(level, capsys):
    level(1)
    with console.hushed():
        console.say("said")
        for text in ("first", "second", "first"):
            console.warn(text)
        assert list(console.progress(range(2), desc="part")) == [0, 1]
    console.say("said after", verbosity=1)
    console.warn("first")
    lines = ["warning: first", "warning: second", "said after", "warning: first"]
    assert capsys.readouterr().err.splitlines() == lines


def test_a_child_that_is_killed_while_it_draws_a_bar_stops_nobody():
    bars = type(console.progress(disable=True))

    def die():
        bars.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    def draw():
        signal.alarm(20)  # ends a child that waits for ever
        return len(list(console.progress(range(3))))

    assert status_of(in_child(die)) == -signal.SIGKILL
    assert status_of(in_child(draw)) == 3


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("terminal", "at", "variable", "disable", "shown"),
    [
        (True, 0, None, False, True),
        (True, -1, None, False, False),
        (True, 0, None, True, False),
        (False, 0, None, False, False),
        (False, 0, "1", False, True),
        (False, 0, "0", False, False),
        (False, -1, "1", False, False),
    ],
)
def test_when_a_bar_is_shown(terminal, at, variable, disable, shown, level, monkeypatch):
    level(at)
    stream = (Terminal if terminal else io.StringIO)()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delenv("LDM_PROGRESS", raising=False)
    if variable:
        monkeypatch.setenv("LDM_PROGRESS", variable)
    assert list(console.progress(range(3), desc="filling", unit="piece", disable=disable)) == [0, 1, 2]
    assert ("filling: 100%" in stream.getvalue()) == shown and bool(stream.getvalue()) == shown


def test_a_bar_goes_on_from_where_it_was_and_counts_bytes(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with console.progress(total=4000, initial=2000, unit="B") as bar:
        bar.update(1000)
        assert bar.n == 3000
    assert "3.00k/4.00k" in sys.stderr.getvalue()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_and_a_second_one_stops(number, capsys):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with console.StopRequest() as stop:
        assert stop.signal is None
        signal.raise_signal(number)
        assert stop.signal == number
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.signal == number
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert capsys.readouterr().err == f"stopping after this step ({number.name}); again to stop at once\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_block_that_need_not_be_finished(number, capsys):
    done = []
    with console.StopRequest() as stop:
        with stop.at_once():
            done.append("before")
            signal.raise_signal(number)
            done.append("after")
        assert stop.signal == number and done == ["before"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert "stopping here" in capsys.readouterr().err
    with console.StopRequest() as stop:
        with stop.at_once():
            done.append("whole")
        signal.raise_signal(number)
        assert stop.signal == number and done == ["before", "whole"]
        with pytest.raises(KeyError), console.StopRequest().at_once():
            raise KeyError


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), console.StopRequest():
        1 / 0  # noqa: B018
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    "error", [RuntimeError("reentrant call inside <_io.BufferedWriter>"), BrokenPipeError(), OSError(5)]
)
def test_a_signal_in_the_middle_of_a_write_or_without_a_terminal_still_only_asks(error, monkeypatch):
    class Busy(io.StringIO):
        def write(self, text):
            raise error

    monkeypatch.setattr(sys, "stderr", Busy())
    with console.StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
    assert stop.signal == signal.SIGTERM


def test_outside_the_main_thread_signals_are_left_alone():
    found, before = [], signal.getsignal(signal.SIGINT)

    def work():
        with console.StopRequest() as stop:
            found.append((stop.signal, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, before)]


def test_a_loop_in_another_process_ends_with_its_unit_of_work():
    reader, writer = os.pipe()

    def work():
        done = 0
        with console.StopRequest() as stop:
            os.write(writer, b"ready")
            while not stop.signal or done < 1000:
                done += 1
        return 128 + stop.signal

    pid = in_child(work)
    os.read(reader, 5)
    os.kill(pid, signal.SIGTERM)
    assert status_of(pid) == 143
    os.close(reader)
    os.close(writer)
