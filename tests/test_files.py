"""A file stands whole under its name, or not at all."""

from __future__ import annotations

import pathlib

import pytest

from rlhf_jax.files import whole, write_whole


def test_a_block_that_fails_leaves_what_was_there(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_whole(path, "before\n")
    with pytest.raises(ZeroDivisionError), whole(path) as stream:
        stream.write("half")
        assert path.read_text() == "before\n", "nobody sees what is not done"
        raise ZeroDivisionError
    assert path.read_text() == "before\n" and [found.name for found in path.parent.iterdir()] == ["file.txt"]


def test_a_block_that_ends_well_replaces_it(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file.txt"
    write_whole(path, "before\n")
    with whole(path) as stream:
        stream.write("ä\n")
    assert path.read_bytes() == "ä\n".encode() and len(list(tmp_path.iterdir())) == 1
