"""Slow float64 NumPy, written from the papers: what the package is compared with."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Everything of one objective's evaluation but the tables that are differentiated. Tables are those of tests/objectives/tabular.py."""

    old: Mapping[str, np.ndarray]  # tables when `prepare` ran
    at: Mapping[str, np.ndarray]  # tables at the point of evaluation, held fixed: for what a loss detaches
    ref: np.ndarray  # the reference's table
    batch: Any  # as the data pipeline built it, NumPy leaves
    h: Mapping[str, Any]  # hyper-parameters
    carry: Any  # the objective's state before this batch, NumPy leaves


Reference = Callable[[Mapping[str, np.ndarray], Case], float]


def find(name: str) -> Reference:
    """The slow version of an objective: the function of that name in one of this folder's modules.

    It takes (tables to differentiate, Case) and returns Σ_terms total / count.
    """
    for module in pkgutil.iter_modules(__path__):
        loaded = importlib.import_module(f"{__name__}.{module.name}")
        function = getattr(loaded, name, None)
        if callable(function) and getattr(function, "__module__", "") == loaded.__name__ and module.name.startswith("of_"):
            return function
    raise LookupError(f"tests/reference/of_*.py: no function {name}(tables, case)")
