"""Runs our functions on vectors of another implementation and compares: one line per case.

A folder of vectors holds `.npz` and `.json` files; README.md and manifest.json beside them are for people. `cases/NAME.py` knows the file
`NAME.npz` (or `.json`): `cases(vectors)` gives every case that it finds there with a function that yields its `Comparison`s. Names and options
are read from the file's keys, never listed, so that other vectors of the same layout run too. A key with a slash holds a result ("loss/…",
"grad/…"): one that nobody compared is a failure, and so is a file that nobody knows. What we deliberately do otherwise raises `Deviation`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import pathlib
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

DOCUMENTS = ("manifest",)
RTOL, ATOL_GRADIENT = 1e-5, 1e-6


class Deviation(Exception):
    """Raised for a case that we deliberately compute otherwise; the message is the reason."""


class NoFunction(Exception):
    """Raised for a case that no function of ours covers."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One number or array of ours beside theirs; equal within |a − b| ≤ atol + rtol |b|."""

    what: str
    got: Any
    expected: Any
    rtol: float = RTOL
    atol: float = 1e-7

    def error(self) -> float:
        """The largest |a − b| / (atol + rtol |b|); above 1 is a failure, and NaN is infinite unless both are NaN."""
        got, expected = np.asarray(self.got, np.float64), np.asarray(self.expected, np.float64)
        if got.shape != expected.shape:
            return float("inf")
        both = np.isnan(got) & np.isnan(expected)
        with np.errstate(invalid="ignore"):
            off = np.where(both | (got == expected), 0.0, np.abs(got - expected) / (self.atol + self.rtol * np.abs(expected)))
        return float(np.max(np.where(np.isnan(off), np.inf, off), initial=0.0))


def slope(got: Any, expected: Any, mask: Any = None) -> Comparison:
    """A gradient, within 1e-6. With a mask, where it is set: a stub that zeroes log-probs beforehand shows slopes on constants.

    Args:
      got, expected: of one size.
      mask: of that size, bool.
    """
    got = np.asarray(got, np.float64)
    expected = np.asarray(expected, np.float64).reshape(got.shape)
    if mask is not None:
        got, expected = np.where(mask, got, 0.0), np.where(mask, expected, 0.0)
    return Comparison("gradient", got, expected, rtol=RTOL, atol=ATOL_GRADIENT)


class Vectors(Mapping[str, np.ndarray]):
    """The arrays of a file by key; it remembers which ones were read."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._arrays, self.read = dict(arrays), set[str]()

    def __getitem__(self, key: str) -> Any:
        value = self._arrays[key]
        self.read.add(key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __contains__(self, key: object) -> bool:
        return key in self._arrays

    def named(self, prefix: str) -> list[str]:
        """What follows `prefix` in the keys that start with it, in the file's order."""
        return [key[len(prefix) :] for key in self._arrays if key.startswith(prefix)]


@dataclasses.dataclass(frozen=True)
class Line:
    """The outcome of a case."""

    file: str
    case: str
    status: str  # ok | FAILED | deviation
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.status:<9} {self.file}: {self.case}" + (f"  {self.detail}" if self.detail else "")


def options(name: str, words: Iterable[str]) -> tuple[str, dict[str, str]]:
    """("dapo", {"beta": "0.04", "no_bias_corr": ""}) of "dapo__beta0.04_no_bias_corr": each option is a word and the number after it.

    Args:
      name: `<loss>__<option><value>_<option><value>…`.
      words: the options that the caller knows.

    Raises:
      NoFunction: an option that is none of them.
    """
    loss, _, rest = name.partition("__")
    found: dict[str, str] = {}
    known = "|".join(sorted(map(re.escape, words), key=len, reverse=True))
    while rest:
        match = re.match(rf"({known})(-?[\d.]+(?:e-?\d+)?)?(?:_+|$)", rest)
        if match is None:
            raise NoFunction(f"option {rest!r} of {name!r}; known are {', '.join(sorted(words))}")
        found[match[1]], rest = match[2] or "", rest[match.end() :]
    return loss, found


def load(path: pathlib.Path) -> Vectors:
    """A file's arrays.

    Args:
      path: .npz or .json.
    """
    if path.suffix == ".json":
        return Vectors(json.loads(path.read_text(encoding="utf-8")))
    with np.load(path) as archive:
        return Vectors({key: archive[key] for key in archive.files})


def run_file(path: pathlib.Path) -> list[Line]:
    """The outcome of every case of a file.

    Args:
      path: .npz or .json.
    """
    file, vectors = path.name, load(path)
    name = "_own" if "objective" in vectors else path.stem
    if importlib.util.find_spec(f"tests.conformance.cases.{name}") is None:
        return [Line(file, "*", "FAILED", f"no function: tests/conformance/cases has no {name}.py")]
    module = importlib.import_module(f"tests.conformance.cases.{name}")
    lines = [_outcome(file, case, compare) for case, compare in module.cases(vectors)]
    left = [key for key in vectors if "/" in key and key not in vectors.read]
    return lines + [Line(file, key, "FAILED", "no function: nothing of ours computes this") for key in left]


def _outcome(file: str, case: str, compare: Any) -> Line:
    """Runs one case; whatever it raises is its outcome."""
    try:
        comparisons = list(compare())
    except Deviation as reason:
        return Line(file, case, "deviation", str(reason))
    except NoFunction as reason:
        return Line(file, case, "FAILED", f"no function: {reason}")
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Line(file, case, "FAILED", f"{type(error).__name__}: {error} ({pathlib.Path(where.filename).name}:{where.lineno})")
    if not comparisons:
        return Line(file, case, "FAILED", "nothing was compared")
    bad = [c for c in comparisons if not c.error() <= 1.0]
    if bad:
        return Line(file, case, "FAILED", "; ".join(f"{c.what} off by {c.error():.3g} × its tolerance" for c in bad))
    return Line(file, case, "ok", ", ".join(c.what for c in comparisons))


def run(folder: pathlib.Path) -> list[Line]:
    """The outcome of every case of every file of a folder, by file name.

    Args:
      folder: of vectors.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in (".npz", ".json") and path.stem not in DOCUMENTS)
    return [line for path in files for line in run_file(path)]
