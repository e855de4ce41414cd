"""The rollouts of a run whose stages stand apart: drawn by schedule, scored, refilled, mixed with earlier ones, handed to the update.

With `ahead` = k, iteration i first sends off the rollout of iteration i + k, with the weights that it finds, and then trains on its own one, which
iteration i − k sent off; the first k + 1 have the first weights. So no old weights are kept: what k iterations cost in memory are k rollouts, about
25 bytes a slot each (256 rows of 1536 slots: 10 MB). Devices work through their queue while a thread of its own reads the text of what is sampled
already and asks the reward functions, rollout by rollout in their order; the update waits for its own scores alone. What is in flight is state,
`TrainState.online`: a checkpoint holds its tokens, and a run that goes on from it asks the rewards again (so they must be functions of the response,
as at ahead = 0). A refilled batch is scored when it is sampled, since only scores say what it holds: there, nothing overlaps.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax import sharding
from rlhf_jax.train import refill, replay, schedule
from rlhf_jax.train.assemble import Experiment
from rlhf_jax.train.multi_turn import Episodes
from rlhf_jax.train.rewarding import Reading, Rewards, Rows
from rlhf_jax.train.worker import Worker
from rlhf_jax.types import Array, Mean, Prompts, PyTree, Rollout, TrainState, merged

Metrics = dict[str, Mean]
_NOTHING: Metrics = {}


class Online(struct.PyTreeNode, kw_only=True):
    """What online RL keeps from one iteration to the next beside what trains; each part only where the schedule asks for it."""

    cursor: Array | None = None  # [] int32, batches of prompts drawn so far
    pending: tuple[Rollout, ...] = ()  # drawn and not trained on yet, oldest first; `ahead` of them once the first iteration has begun
    memory: replay.Memory | None = None
    reference: PyTree = None  # the policy that the reference now is


class Rollouts:
    """Hands out one scored rollout per iteration.

    Args:
      exp: assembled.
      draw: `(params, frozen, prompts, key, iteration) -> Rollout`, from train.online.make_rollout.
      rewards: None for an objective that reads no score, and for episodes, which have theirs.
      episodes: what plays them, with an environment; `draw` is not asked then.
    """

    def __init__(self, exp: Experiment, draw: Callable[..., Rollout], rewards: Rewards | None, episodes: Episodes | None = None) -> None:
        self._exp, self._rewards, self._episodes, self._plan = exp, rewards, episodes, schedule.of(exp.config)
        self._group = exp.config["sampling"]["group_size"]
        self._where = sharding.row_sharding(exp.mesh)
        whole = sharding.replicated(exp.mesh)
        self.draw = sharding.jit(draw, exp.mesh, out_shardings=self._where)
        self._numbered = sharding.jit(functools.partial(_numbered, draw), exp.mesh, out_shardings=(self._where, whole))
        filled = tuple(self._where if name == "batch" else whole for name in refill.Filled._fields)
        fill = functools.partial(refill.fill, size=self._group)
        self._fill = sharding.jit(lambda *given: tuple(fill(*given)), exp.mesh, out_shardings=filled)
        self._filled = sharding.jit(refill.metrics, exp.mesh)
        mix = functools.partial(replay.mixed, replayed=schedule.replayed_rows(exp.config), size=self._group)
        self._mix = sharding.jit(mix, exp.mesh, out_shardings=(self._where, whole, whole), donate=(0,))
        self._iteration: int | None = None  # known to the host once the first one begins
        self._readings: collections.deque[Future[Reading]] = collections.deque()  # of the first pending ones, in their order
        apart = rewards is not None and not rewards.pure and rewards.detached and self._plan.ahead > 0 and not self._plan.refill
        self._thread = Worker("rewards") if apart else None
        self.failures: Rows = []  # samples that a reward failed on, of what the last `take` scored
        self.fresh: Rollout | None = None  # what the last `take` handed out, without earlier rows

    def close(self) -> None:
        """Lets go of the thread; what it has not begun is dropped."""
        if self._thread is not None:
            self._thread.close()

    # --- the state ---

    @property
    def numbered(self) -> bool:
        """Whether batches of prompts are counted apart from iterations."""
        return self._plan.ahead > 0 or self._plan.refill > 0

    def begin(self, state: TrainState) -> TrainState:
        """The first state, with what the schedule needs beside what trains.

        Args:
          state: before the first iteration.
        """
        chex.assert_rank(state.batch_index, 0)
        abstract = self.abstract(state)
        if abstract is None:
            return state
        shardings = jax.tree.map(lambda x: x.sharding, abstract.replace(pending=()))

        def first(state: TrainState) -> Online:
            made = Online(cursor=jnp.int32(0) if self.numbered else None)
            if abstract.memory is not None:
                made = made.replace(memory=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract.memory))
            return made if abstract.reference is None else made.replace(reference=jax.tree.map(jnp.copy, state.params["policy"]))

        return state.replace(online=sharding.jit(first, self._exp.mesh, out_shardings=shardings)(state))

    def abstract(self, state: TrainState) -> Online | None:
        """The shapes of `TrainState.online` after any iteration, on their shardings; None: there is nothing to keep.

        Args:
          state: its shapes, or itself.
        """
        chex.assert_rank(state.batch_index, 0)
        plan, whole = self._plan, sharding.replicated(self._exp.mesh)
        if not (plan.staged or plan.refresh):
            return None
        online = Online()
        if self.numbered:
            online = online.replace(cursor=sharding.placed(state.batch_index, whole))
        if plan.refresh:
            online = online.replace(reference=jax.tree.map(sharding.placed, state.params["policy"], self._exp.start.shardings.params["policy"]))
        on_rows = lambda tree: jax.tree.map(lambda x: sharding.placed(x, self._where), tree)  # noqa: E731
        drawn = on_rows(self.shapes(state.replace(online=online), scored=plan.refill > 0)) if plan.ahead else None
        if plan.replay:
            memory = jax.eval_shape(functools.partial(replay.empty, capacity=plan.capacity), self.shapes(state.replace(online=online), scored=True))
            online = online.replace(memory=jax.tree.map(lambda x: sharding.placed(x, whole), memory))
        return online.replace(pending=(drawn,) * plan.ahead if drawn is not None else ())

    def shapes(self, state: TrainState, *, scored: bool) -> Rollout:
        """Of one rollout as it is drawn, on the mesh.

        Args:
          state: its shapes.
          scored: with its scores.
        """
        chex.assert_rank(state.batch_index, 0)
        prompts = sharding.global_shapes(self._exp.batch(0), self._exp.mesh)
        drawn = (state.params, self.frozen(state), prompts, state.key, state.batch_index)
        if self._episodes is not None:
            self._episodes.trace(*drawn)
            return self._episodes.abstract(prompts)
        rolled = self.draw.eval_shape(*drawn)
        if scored and self._rewards is not None:
            rolled = self._rewards.shapes(rolled)
        return rolled

    def handed_out(self, state: TrainState) -> Rollout:
        """The shapes of what `take` hands out.

        Args:
          state: its shapes, with those of `abstract`.
        """
        chex.assert_rank(state.batch_index, 0)
        rolled = self.shapes(state, scored=True)
        if state.online is not None and state.online.memory is not None:
            rolled, _, _ = self._mix.eval_shape(state.online.memory, rolled, state.key, state.batch_index)
        return jax.tree.map(lambda x: sharding.placed(x, self._where), rolled)

    def frozen(self, state: TrainState) -> PyTree:
        """The frozen networks, the moving reference among them.

        Args:
          state: the run's.
        """
        chex.assert_rank(state.batch_index, 0)
        moving = state.online is not None and state.online.reference is not None
        return {**self._exp.frozen, "ref": state.online.reference} if moving else self._exp.frozen

    # --- an iteration ---

    def take(self, state: TrainState, batches: Iterator[Prompts]) -> tuple[Rollout, Metrics, Online | None]:
        """What this iteration trains on, its metrics, and what is kept; sends off what is due.

        Args:
          state: at the beginning of the iteration.
          batches: of prompts, from the first that was not drawn.
        """
        chex.assert_rank(state.batch_index, 0)
        if self._iteration is None:
            self._iteration = int(jax.device_get(state.batch_index))
        online, left = state.online or Online(), self._exp.steps - self._iteration
        self._iteration += 1
        cursor, found = online.cursor, _NOTHING
        self.failures = []
        queue = list(online.pending)[:left]  # past the end of the run stand copies
        while len(queue) < min(self._plan.ahead + 1, left):
            rolled, cursor, more = self._issue(state, cursor, batches)
            queue.append(rolled)
            found = merged(found, more)
        self._read_ahead(queue)
        drawn, *rest = queue
        rolled = drawn
        if not self._plan.refill:
            rolled, more = self._scored(state, drawn, self._readings.popleft() if self._readings else None)
            found = merged(found, more)
        self.fresh, memory = rolled, online.memory
        if memory is not None:
            rolled, memory, more = self._mix(memory, rolled, state.key, state.batch_index)
            found = merged(found, more)
        rest += [drawn] * (self._plan.ahead - len(rest))
        return rolled, found, None if state.online is None else online.replace(cursor=cursor, pending=tuple(rest), memory=memory)

    def _issue(self, state: TrainState, cursor: Array | None, batches: Iterator[Prompts]) -> tuple[Rollout, Array | None, Metrics]:
        """A rollout of the present weights; scored where only scores say whether it is one."""
        if self._episodes is not None:
            return self._play(self._episodes, state, cursor, batches)
        if not self._plan.refill:
            return *self._draw(state, cursor, batches), {}
        filled, found = None, _NOTHING
        for _ in range(1 + self._plan.refill):
            rolled, cursor = self._draw(state, cursor, batches)
            rolled, more = self._scored(state, rolled, None)
            filled, found = refill.Filled(*self._fill(filled, rolled)), merged(found, more)
            if int(jax.device_get(filled.groups)) * self._group == filled.batch.truncated.shape[0]:
                break
        assert filled is not None
        return filled.batch, cursor, found | self._filled(filled)

    def _play(self, player: Episodes, state: TrainState, cursor: Array | None, batches: Iterator[Prompts]) -> tuple[Rollout, Array | None, Metrics]:
        """Whole episodes, which are scored as they end; no schedule keeps them waiting (train.config)."""
        rolled, found = player.play(state.params, self.frozen(state), next(batches), state.key, state.batch_index, self._exp.train_data)
        self.failures = player.failures
        return rolled, cursor, found

    def _draw(self, state: TrainState, cursor: Array | None, batches: Iterator[Prompts]) -> tuple[Rollout, Array | None]:
        prompts, frozen = next(batches), self.frozen(state)
        if cursor is None:
            return self.draw(state.params, frozen, prompts, state.key, state.batch_index), None
        return self._numbered(state.params, frozen, prompts, state.key, cursor, state.batch_index)

    def _scored(self, state: TrainState, rolled: Rollout, reading: Future[Reading] | None) -> tuple[Rollout, Metrics]:
        if self._rewards is None:
            return rolled, {}
        found = self._rewards.measure(self.frozen(state), rolled, self._exp.train_data, reading=reading.result() if reading else None)
        failures = self._rewards.failures
        if self._plan.refill:  # rows of a round, which lie elsewhere in the batch, or nowhere
            failures = [{key: value for key, value in failure.items() if key != "row"} for failure in failures]
        self.failures = self.failures + failures
        return found

    def read(self, rolled: Rollout, data: Any) -> Reading | None:
        """What the rewards that read text say of a rollout beside those of `take`, after what they are reading: no two calls ever run at once.

        Args:
          rolled: [B, T].
          data: the set that its prompt ids belong to.

        Returns:
          None where they have no thread of their own: `Rewards.measure` reads by itself then.
        """
        chex.assert_rank(rolled.seqs.tokens, 2)
        if self._thread is None:
            return None
        assert self._rewards is not None
        reading: Reading = self._thread.submit(self._rewards.read, rolled, data).result()
        return reading

    def _read_ahead(self, queue: list[Rollout]) -> None:
        """Sends what is not read yet to the thread."""
        if self._thread is not None:
            assert self._rewards is not None
            for rolled in queue[len(self._readings):]:
                self._readings.append(self._thread.submit(self._rewards.read, rolled, self._exp.train_data))


def _numbered(
    draw: Callable[..., Rollout], params: PyTree, frozen: PyTree, prompts: Prompts, key: Array, cursor: Array, iteration: Array
) -> tuple[Rollout, Array]:
    """A rollout keyed by the number of its batch of prompts, which comes once; its version is the iteration whose weights drew it."""
    rolled = draw(params, frozen, prompts, key, cursor)
    return rolled.replace(version=jnp.full_like(rolled.version, iteration)), cursor + 1
