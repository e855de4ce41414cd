"""Hyper-parameters that name one of several functions: an estimator, a reduction, a divergence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_jax.errors import UserError, nearest


def named(table: Mapping[str, Any], key: str, value: str) -> Any:
    """The entry of a table that the config names.

    Args:
      table: names and what they stand for.
      key: of config.objective, for the error.
      value: a name.

    Raises:
      UserError: there is no such name.
    """
    if value not in table:
        raise UserError(f"config.objective.{key} is {value!r}, which is none of its values{nearest(value, table)}")
    return table[value]
