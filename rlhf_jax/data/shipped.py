"""Where the package's own sample files and the machine's cache are."""

from __future__ import annotations

import os
import pathlib

from rlhf_jax.errors import UserError, nearest


def sample_file(kind: str) -> str:
    """Path of a small JSONL file that ships with the package: what every config's `:tiny` trains on.

    Args:
      kind: one of `records.KINDS`.
    """
    folder = pathlib.Path(__file__).parent / "samples"
    path = folder / f"{kind}.jsonl"
    if not path.exists():
        raise UserError(f"sample file {kind!r} does not exist{nearest(kind, [p.stem for p in folder.glob('*.jsonl')])}")
    return str(path)


def default_cache() -> str:
    """Folder of prepared data: $XDG_CACHE_HOME/rlhf_jax/data, or ~/.cache/rlhf_jax/data."""
    return str(pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "rlhf_jax" / "data")
