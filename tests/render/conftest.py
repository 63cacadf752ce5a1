"""A spy on what is drawn, for the tests of rendering."""

import pytest
from render_cases import Spy


@pytest.fixture
def spy(tmp_path, monkeypatch):
    return Spy(tmp_path / "batches.jsonl").install(monkeypatch)
