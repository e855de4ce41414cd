"""What several files' cases share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.conformance.runner import Comparison, slope


def value_and_slope(f: Callable[[Any], Any], x: Any, loss: Any, gradient: Any, mask: Any = None) -> Iterator[Comparison]:
    """`f(x)` and its gradient beside the stored ones.

    Args:
      f: a scalar function.
      x: where it is evaluated.
      loss, gradient: theirs; a loss that sums to nothing is compared within 1e-7 of it.
      mask: where the gradient counts.
    """
    value, got = jax.jit(jax.value_and_grad(f))(jnp.asarray(x))
    yield Comparison("loss", value, loss)
    yield slope(got, gradient, None if mask is None else np.asarray(mask))
