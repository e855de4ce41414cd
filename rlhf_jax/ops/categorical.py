"""One draw per row from a categorical distribution, and its log-prob: by Gumbel noise, or by inverting the distribution function.

Gumbel's argmax needs a random number per token, two fifths of a million of them for 16 rows of 24 000 tokens; inversion needs two per row. It is done
in two levels, so that no [B, V] cumulative sum exists: the sums of about √V blocks are inverted at the first number, the tokens of the block found
at the second, P(token) = P(block) · P(token | block). Blocks are strided (token v lies in block v mod K), which lets a CPU add whole vectors.
A token of probability 0 is never drawn, whatever the rounding: a candidate must have a positive weight besides lying behind the number, and where
rounding leaves no candidate the heaviest is taken. Logits that are NaN give some token of the vocabulary with a log-prob of NaN, which stays
visible in whatever is computed from it. Deviation: a uniform has 23 bits, so blocks lighter than 2⁻²³ of the whole are drawn as
often as that grid says.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.ops import vocab
from rlhf_jax.ops.backends import INVERTING, platform
from rlhf_jax.types import Array

LARGE = 1024  # tokens; below, Gumbel noise costs no more


def method(vocabulary: int, backend: str) -> str:
    """Which draw a sampler uses: "gumbel" or "inversion".

    Args:
      vocabulary: V, tokens.
      backend: of backends.platform().
    """
    return "inversion" if backend in INVERTING and vocabulary >= LARGE else "gumbel"


def draw(keys: Array, logits: Array) -> tuple[Array, Array]:
    """A token per row from softmax(logits), by the method of this backend, and its log-prob.

    Args:
      keys: [B] typed keys.
      logits: [B, V]; −inf is never drawn.

    Returns:
      tokens [B] int32, log-probs [B] float32 nats.
    """
    chex.assert_rank([keys, logits], [1, 2])
    return (inversion if method(logits.shape[-1], platform()) == "inversion" else gumbel)(keys, logits)


def likeliest(logits: Array) -> Array:
    """The first of each row's largest logits, [B] int32.

    An argmax by two plain reductions, which a CPU does in vectors: 16 rows of 8192 in 0.09 ms, where jnp.argmax takes 0.65.

    Args:
      logits: [B, V], no NaN.
    """
    chex.assert_rank(logits, 2)
    places = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
    return jnp.where(logits == logits.max(axis=-1, keepdims=True), places, logits.shape[-1] - 1).min(axis=-1)


def gumbel(keys: Array, logits: Array) -> tuple[Array, Array]:
    """argmax over tokens of logit + Gumbel noise. Arguments and results as of `draw`.

    See: Maddison et al. 2014 (arXiv:1411.0030).
    """
    chex.assert_rank([keys, logits], [1, 2])
    tokens = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    return tokens, vocab.logps(logits, tokens)


def inversion(keys: Array, logits: Array) -> tuple[Array, Array]:
    """`invert` at two uniforms of each row's key. Arguments and results as of `draw`."""
    chex.assert_rank([keys, logits], [1, 2])
    return invert(jax.vmap(lambda key: jax.random.uniform(key, (2,), jnp.float32))(keys), logits)


def invert(uniforms: Array, logits: Array) -> tuple[Array, Array]:
    """The token at which the distribution function, block by block and then inside the block, first exceeds the uniforms; and its log-prob.

    Args:
      uniforms: [B, 2] float32 in [0, 1]; 1 itself gives the heaviest block or token.
      logits: [B, V], at least one of each row finite.

    Returns:
      tokens [B] int32, log-probs [B] float32 nats.

    See: Devroye 1986, Non-Uniform Random Variate Generation, section III.2.
    """
    chex.assert_shape(uniforms, (logits.shape[0], 2))
    logits = logits.astype(jnp.float32)
    batch, vocabulary = logits.shape
    size = 1 << ((vocabulary - 1).bit_length() // 2)  # tokens of a block
    count = -(-vocabulary // size)
    blocks = jnp.pad(logits, ((0, 0), (0, count * size - vocabulary)), constant_values=-jnp.inf).reshape(batch, size, count)
    best = blocks.max(axis=1).max(axis=-1)
    sums = jnp.exp(blocks - best[:, None, None]).sum(axis=1)  # [B, K]
    block = _first_beyond(uniforms[:, 0], sums)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=2)[:, :, 0]
    row = _first_beyond(uniforms[:, 1], jnp.exp(inside - best[:, None]))
    picked = jnp.take_along_axis(inside, row[:, None], axis=1)[:, 0]
    token = jnp.minimum(row * count + block, vocabulary - 1)  # beyond it lies the padding, which only NaN leads to
    return token, picked - best - jnp.log(sums.sum(axis=-1))


def _first_beyond(uniform: Array, weights: Array) -> Array:
    """[B] int32, the first of the positive `weights` [B, K] whose cumulative sum exceeds uniform · total."""
    cumulative = jnp.cumsum(weights, axis=-1)
    # A parallel cumulative sum rounds each entry on its own way: a weight of 0 may seem to add something, hence the first condition.
    candidates = (weights > 0) & (cumulative > uniform[:, None] * cumulative[:, -1:])
    places = jnp.arange(weights.shape[-1], dtype=jnp.int32)[None]
    first = jnp.where(candidates, places, weights.shape[-1]).min(axis=-1)
    return jnp.where(first < weights.shape[-1], first, likeliest(weights))
