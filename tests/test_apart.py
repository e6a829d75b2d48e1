"""The process with TensorFlow: where it looks for a user's modules."""

import sys
from pathlib import Path

import pytest

from data import apart


def test_the_folder_that_one_is_in_is_looked_at_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert apart.path() == [*(path or str(tmp_path) for path in before), *[str(tmp_path)] * ("" not in before)]
    monkeypatch.syspath_prepend(tmp_path)
    assert apart.path().count(str(tmp_path)) == 1
    assert sys.path[1:] == before
