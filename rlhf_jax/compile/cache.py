"""Measurements that took a compilation, kept by the hash of what they are of."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

from rlhf_jax.files import write_whole


class Cache:
    """Measurements by the hash of the traced program, its topology and the compiler's version.

    Args:
      folder: where they are kept; None = nowhere.
    """

    def __init__(self, folder: pathlib.Path | None) -> None:
        self._folder = folder

    def get(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gave for this key, now or before.

        Args:
          key: what determines the measurement.
          make: makes it.
        """
        if self._folder is None:
            return make()
        path = self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        found = make()
        self._folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(found))
        return found
