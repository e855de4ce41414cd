"""Running mean and variance of a stream that comes in batches: what an objective keeps in its carry from one batch to the next.

Merging is exact, as if all values had come at once, whatever the sizes of the batches.

See: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances", eq. 2.1.
Deviation: a stream without values has mean 0, variance 1 and a count of 1e-24, not 0, so that nothing divides by zero.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.types import Array


class RunningMoments(struct.PyTreeNode, kw_only=True):
    """Moments of all values so far; three scalars."""

    mean: Array  # [] float32
    var: Array  # [] float32, the population's (divided by n)
    count: Array  # [] float32

    @classmethod
    def empty(cls) -> RunningMoments:
        """The moments before the first value."""
        return cls(mean=jnp.float32(0.0), var=jnp.float32(1.0), count=jnp.float32(1e-24))

    @property
    def std(self) -> Array:
        """Unbiased standard deviation (n − 1), [] float32; 1 before the second value."""
        chex.assert_rank([self.var, self.count], 0)
        known = self.count > 1.5
        return jnp.where(known, jnp.sqrt(self.var * self.count / jnp.where(known, self.count - 1.0, 1.0)), 1.0)


def update(moments: RunningMoments, values: Array, mask: Array) -> RunningMoments:
    """The moments with a batch's values merged in; unchanged where the mask is empty. Nothing is differentiated.

    Args:
      moments: of the values so far.
      values: any shape; may hold anything where masked.
      mask: same shape, bool.
    """
    chex.assert_equal_shape([values, mask])
    values = jax.lax.stop_gradient(jnp.where(mask, values, 0.0).astype(jnp.float32))
    fresh = mask.sum().astype(jnp.float32)
    mean = values.sum() / jnp.maximum(fresh, 1.0)
    squares = jnp.where(mask, jnp.square(values - mean), 0.0).sum()
    count, gap = moments.count + fresh, mean - moments.mean
    spread = moments.var * moments.count + jnp.square(gap) * moments.count * (fresh / count) + squares
    return RunningMoments(mean=moments.mean + gap * (fresh / count), var=spread / count, count=count)
