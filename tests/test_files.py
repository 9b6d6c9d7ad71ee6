"""Files written in place of others."""

import os
import stat

import pytest

from rom import files


def test_the_new_file_takes_the_place_of_the_old(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with files.replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


def test_the_old_file_can_stay_under_another_name(tmp_path):
    path, previous = tmp_path / "a.json", tmp_path / "b.json"
    for text in ("first", "second"):
        with files.replacing(path, previous) as partial:
            partial.write_text(text)
    assert (path.read_text(), previous.read_text()) == ("second", "first")


def test_a_failure_leaves_everything_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), files.replacing(path, tmp_path / "b.json") as partial:
        partial.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_leftovers_of_a_killed_process_are_written_over(tmp_path):
    (tmp_path / "a.json.partial").write_text("a long leftover")
    with files.replacing(tmp_path / "a.json") as partial:
        partial.write_text("new")
    assert (tmp_path / "a.json").read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


def test_permissions_follow_the_umask(tmp_path):
    """Whatever the writer does: safetensors makes its own file, readable by its owner alone."""
    before = os.umask(0o027)
    try:
        with files.replacing(tmp_path / "a.json") as partial:
            partial.unlink()
            partial.touch(mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640


def test_documented_example(tmp_path):
    import doctest
    from pathlib import Path

    import rom

    failed, attempted = doctest.testmod(files, extraglobs={"rom": rom, "Path": Path, "folder": tmp_path})
    assert failed == 0 and attempted == 1
