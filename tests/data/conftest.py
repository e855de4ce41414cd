"""A byte tokenizer, and files written from rows."""

import json
import pathlib

import pytest

from rlhf_jax.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tok():
    return Tokenizer.byte_level()


@pytest.fixture
def jsonl(tmp_path):
    """Writes rows (objects, or raw bytes per line) and returns the path."""

    def write(rows, name="rows.jsonl", ending=b"\n", start=b""):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path = pathlib.Path(tmp_path, name)
        path.write_bytes(start + b"".join(line + ending for line in lines))
        return str(path)

    return write
