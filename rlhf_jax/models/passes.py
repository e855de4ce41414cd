"""One pass of a trunk for `prepare` and `loss`: where a batch gives one update, in one piece, both read the same rows with the same parameters.

`prepare`'s pass keeps what its gradient needs; the loss, in the place of a pass of its own, takes the outcome and goes back through that one. So what
is held fixed during the gradient stays data (law 3), and costs no second pass. The step asks for it (train.step).
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax

from rlhf_jax.types import Array, PyTree


@jax.custom_vjp
def _linked(params: PyTree, hidden: Array, pullback: PyTree) -> Array:
    """`hidden`, whose gradient goes to `params` through `pullback`."""
    return hidden


def _forward(params: PyTree, hidden: Array, pullback: PyTree) -> tuple[Array, PyTree]:
    return hidden, pullback


def _backward(pullback: PyTree, cotangent: Array) -> tuple[PyTree, None, None]:
    return (*pullback(cotangent), None, None)


_linked.defvjp(_forward, _backward)


class Passes:
    """The passes of one batch, by network and rows. Rows are the same where their tokens are the same array, not an equal one.

    Args:
      params: what the update starts from, by network.
    """

    def __init__(self, params: PyTree) -> None:
        self._before, self._within = params, None
        self._kept: dict[tuple[str, int], tuple[Array, Array, PyTree]] = {}

    def within(self, params: PyTree) -> Passes:
        """For the loss.

        Args:
          params: those that are differentiated; they have the values of the ones before.
        """
        chex.assert_trees_all_equal_shapes(params, self._before)
        self._within = params
        return self

    def hidden(self, name: str, own: PyTree, tokens: Array, trunk: Callable[[PyTree], Array]) -> Array:
        """`trunk(own)`, computed before or, if it was, not again.

        Args:
          name: the network.
          own: its trained parameters, as the caller has them; others than the batch's own are passed through.
          tokens: [B, T], which rows.
          trunk: a function of `own`, the same whenever it is asked for with these rows.
        """
        chex.assert_rank(tokens, 2)
        kept = self._kept.get((name, id(tokens)))
        if self._within is not None and own is self._within.get(name):
            return trunk(own) if kept is None else _linked(own, *kept[1:])
        if self._within is None and own is self._before.get(name):
            if kept is None:  # the tokens are kept too, so that no other array takes their id
                kept = self._kept[name, id(tokens)] = tokens, *jax.vjp(trunk, own)
            return kept[1]
        return trunk(own)
