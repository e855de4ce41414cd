"""Saved networks to ask: a policy that generates and reads log-probs, a reward model that scores pairs.

Programs are compiled once per architecture and setting and shared by every checkpoint that is asked with them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax import distributed, sampling, sharding
from rlhf_jax.data.encode import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig, Networks, NetworkSpec
from rlhf_jax.ops import masking
from rlhf_jax.rewards.host import Messages, RetokenisedReward
from rlhf_jax.saved import Source, place
from rlhf_jax.types import Array, Comparisons, Prompts, PyTree, Rollout, Sequences

BUCKET = 32  # tokens; rows for a reward model that reads text are padded to multiples of it


def one_device() -> Mesh:
    """The default mesh of an evaluation: one device of this process."""
    return distributed.make_mesh({}, devices=1)


class Policy:
    """A saved policy on a mesh."""

    def __init__(self, source: Source, key: str, mesh: Mesh | None = None) -> None:
        """Places the parameters.

        Args:
          source: from saved.load_source.
          key: the flag or config key that named it, for messages.
          mesh: None takes one device.
        """
        if source.network != "policy":
            raise UserError(f"{key} = {source.path!r} is a {source.network} checkpoint: name a policy's run")
        self.source, self.mesh = source, mesh or one_device()
        self.config = dataclasses.replace(source.config, outputs=("lm",), dropout=0.0)
        self.params = place(source.params, self.config, self.mesh)

    def generate(self, prompts: Prompts, *, seed: int, max_new_tokens: int, temperature: float, top_k: int = 0, top_p: float = 1.0,
                 group_size: int = 1, filters: sampling.Filters = sampling.NONE, slots: int = 0, cache: str = "same") -> Rollout:
        """One completion per row; temperature 0 is greedy. `cache` is one of models.cache.KINDS; other arguments as sampling.generate."""
        if prompts.tokens.shape[1] + max_new_tokens > self.config.context:
            raise UserError(f"prompt slots and new tokens make {prompts.tokens.shape[1]} + {max_new_tokens} tokens, more than the model's "
                            f"context of {self.config.context}: lower max_new_tokens")
        tokenizer = self.source.reader("--checkpoint")
        program = _generate(
            self.config, self.mesh, max_new_tokens, temperature, top_k, top_p, tokenizer.stop_ids, tokenizer.pad_id, group_size,
            filters, slots, cache,
        )
        return program(self.params, self._place(prompts), jax.random.key(seed))

    def logps(self, seqs: Sequences, *, temperature: float, rows: int = 0) -> Array:
        """[B, T] nats, unfiltered, at this temperature; at most `rows` at once, 0 = all."""
        count = seqs.tokens.shape[0]
        chunks = next(count // size for size in range(min(rows or count, count), 0, -1) if count % size == 0)
        return _logps(self.config, self.mesh, temperature, chunks)(self.params, self._place(seqs))

    def _place(self, batch: Any) -> Any:
        rows = sharding.row_devices(self.mesh)
        where = sharding.row_sharding(self.mesh) if jax.tree.leaves(batch)[0].shape[0] % rows == 0 else sharding.replicated(self.mesh)
        return jax.device_put(batch, where)


class RewardModel:
    """A saved reward model on a mesh."""

    def __init__(self, source: Source, key: str, mesh: Mesh | None = None) -> None:
        """Places the parameters; arguments as for `Policy`."""
        if source.network != "reward":
            raise UserError(f"{key} = {source.path!r} is a {source.network} checkpoint: name a reward model's run")
        self.source, self.mesh = source, mesh or one_device()
        self.config = dataclasses.replace(source.config, outputs=("score",), dropout=0.0)
        self.params = place(source.params, self.config, self.mesh)

    def scores(self, pairs: Comparisons) -> np.ndarray:
        """[B, K] scores of the branches, on the host; rows of padding included."""
        return np.asarray(self.row_scores(pairs.seqs))

    def row_scores(self, seqs: Sequences) -> Array:
        """[B] or [B, K] scores at each row's last real token."""
        return _scores(self.config, self.mesh)(self.params, jax.device_put(seqs, sharding.replicated(self.mesh)))


def text_reward(model: RewardModel, key: str) -> Callable[[Sequence[Messages], Sequence[str], Sequence[bool], int], np.ndarray]:
    """`(prompts, responses, whether each ended, rows at once) -> [B] scores`: a reward model that reads text, through its own template.

    Args:
      model: on its devices.
      key: the flag or config key that named it, for messages.
    """
    encoder = Encoder(model.source.reader(key), model.source.layout(key), max_length=model.config.context, prompt_length=None, overlong="truncate")
    score = RetokenisedReward(encoder, model.row_scores, bucket=BUCKET)

    def scores(prompts: Sequence[Messages], responses: Sequence[str], ended: Sequence[bool], rows: int) -> np.ndarray:
        found = []
        for begin in range(0, len(prompts), rows):
            part = slice(begin, begin + rows)
            missing = rows - len(prompts[part])  # rows of every call are as many, so that nothing is compiled anew
            given = [*prompts[part], *[None] * missing], [*responses[part], *[""] * missing], [*ended[part], *[True] * missing]
            found.append(score(*given)[: rows - missing])
        return np.concatenate(found)

    return scores


@functools.lru_cache
def _generate(config: ModelConfig, mesh: Mesh, max_new_tokens: int, temperature: float, top_k: int, top_p: float,
              stop_ids: tuple[int, ...], pad_id: int, group_size: int, filters: sampling.Filters, slots: int,
              cache: str) -> Any:
    def run(params: PyTree, prompts: Prompts, key: Array) -> Rollout:
        chex.assert_rank(prompts.tokens, 2)
        nets = Networks({"policy": params}, {}, NetworkSpec(policy=config, cache=cache))
        return sampling.generate(
            nets, prompts, key, iteration=0, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            stop_ids=stop_ids, pad_id=pad_id, group_size=group_size, filters=filters, slots=slots,
        )

    return sharding.jit(run, mesh)


@functools.lru_cache
def _logps(config: ModelConfig, mesh: Mesh, temperature: float, chunks: int) -> Any:
    spec = NetworkSpec(policy=config, temperature=temperature)
    return sharding.jit(lambda params, seqs: Networks({"policy": params}, {}, spec, chunks).policy(seqs).logps, mesh)


@functools.lru_cache
def _scores(config: ModelConfig, mesh: Mesh) -> Any:
    spec = NetworkSpec(reward=config)

    def run(params: PyTree, seqs: Sequences) -> Array:
        return masking.at_last_real(Networks({"reward": params}, {}, spec).reward(seqs).scores, seqs.segment_ids)

    return sharding.jit(run, mesh)
