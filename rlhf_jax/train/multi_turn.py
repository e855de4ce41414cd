"""Rollouts of several turns: the sampler draws a turn of every row still in play, the environment (envs) answers on the host, and so on.

Every turn prefills the conversation so far, from a few fixed widths and batch sizes, each compiled once: the first turn reads the prompts as a
single-turn rollout does, once per group; the later ones the smallest width that holds the longest row, and rows that are over are left out once
half of them are. A row's tokens are keyed by how many it has drawn so far (law 6), so none of this changes what it says.
Deviation: no KV cache is carried from turn to turn. It would hold holes where rows' turns differ in length, which sliding windows and ring caches
do not allow; a prefill of a prefix costs about as much as the update's forward pass on it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import chex
import jax
import numpy as np

from rlhf_jax import distributed, envs, sampling, sharding
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.records import Message
from rlhf_jax.envs import episodes
from rlhf_jax.errors import UserError
from rlhf_jax.models import Networks
from rlhf_jax.rewards.deadline import call_within
from rlhf_jax.train.assemble import Experiment
from rlhf_jax.train.rewarding import Rows
from rlhf_jax.types import Array, Mean, Prompts, Purpose, PyTree, Rollout

CHUNK = 8  # steps of a turn between two looks at whether every row is done: turns end early


class Episodes:
    """The multi-turn rollouts of a run with config.env.

    Args:
      exp: assembled.
      filters: config.sampling.filters and stop_strings, composed.
      forked: whether later passes compute a group's prompt once, as in train.online.make_rollout.

    Raises:
      UserError: an environment that cannot be made, rejects the data's first row, or replies in a role that the chat template does not know.
    """

    def __init__(self, exp: Experiment, filters: sampling.Filters, *, forked: bool) -> None:
        self._exp, self._filters, self._forked = exp, filters, forked
        section, sample = exp.config["env"], exp.config["sampling"]
        self._failure = exp.config["reward_failure"]
        self._environment = envs.load(section["name"], section["parameters"])
        self._limits = episodes.Limits(section["max_turns"], section["max_tokens"], sample["max_new_tokens"])
        encoder = Encoder(exp.tokenizer, exp.template, max_length=exp.config["data"]["max_length"], prompt_length=None, overlong="error")
        self._language = episodes.Language(encoder)
        self._width = exp.config["data"]["prompt_length"]
        self.widths = tuple(self._width + -(-section["max_tokens"] * i // section["widths"]) for i in range(1, section["widths"] + 1))
        self.sizes = _sizes(exp.config["run"]["batch_size"], section["halvings"], sharding.row_devices(exp.mesh))
        self._traces = 0
        self.failures: Rows = []  # of the last `play`
        self.transcripts: Rows = []
        self._try(encoder)

    def play(self, params: PyTree, frozen: PyTree, prompts: Prompts, key: Array, iteration: Array, data: Any, *, validation: bool = False
             ) -> tuple[Rollout, dict[str, Mean]]:
        """A scored rollout of whole episodes on the mesh, and what the environment counted. Waits for the device.

        Args:
          params, frozen: the networks.
          prompts: [B, P], on the mesh.
          key: [] typed key of the run.
          iteration: [] int32.
          data: the set that the prompts belong to.
          validation: rows come one by one, not in groups; failures and transcripts are not kept.
        """
        chex.assert_rank([prompts.tokens, iteration], [2, 0])
        host, version = jax.device_get(prompts.replace(ptx=None)), int(iteration)
        group = 1 if validation else self._exp.config["sampling"]["group_size"]
        guard = functools.partial(call_within, self._failure["timeout"])
        seed = functools.partial(_seed, self._exp.config["seed"], Purpose.VALIDATION if validation else Purpose.ROLLOUT, version)
        played = episodes.begin(self._environment, host, data.messages, data.reference, seed, guard)
        speak = functools.partial(self._speak, params, frozen, prompts, key, iteration, group)
        episodes.play(self._environment, played, self._language, speak, self._limits, guard)
        self._settle(played, validation)
        failed = self._failure["default"] if self._failure["policy"] == "default" else np.nan
        rolled = episodes.to_rollout(played, self._limits, width=self._width, pad_id=self._exp.tokenizer.pad_id, version=version, failed=failed)
        placed = distributed.to_global(self._prepared(rolled, validation), sharding.row_sharding(self._exp.mesh))
        return placed.replace(ptx=prompts.ptx), self._metrics([episode for episode in played if episode.messages])

    def abstract(self, prompts: Prompts) -> Rollout:
        """The shapes of what `play` returns.

        Args:
          prompts: [B, P], shapes or arrays.
        """
        chex.assert_rank(prompts.tokens, 2)
        batch = prompts.tokens.shape[0]
        none = episodes.to_rollout([], self._limits, width=self._width, pad_id=0, version=0, failed=0.0)
        rolled = jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), self._prepared(none, False))
        return rolled.replace(ptx=prompts.ptx)

    def trace(self, params: PyTree, frozen: PyTree, prompts: Prompts, key: Any, iteration: Any) -> None:
        """Traces the first turn on shapes alone; the arguments are those of `play`."""
        chex.assert_rank(prompts.tokens, 2)
        program = self._program(prompts.tokens.shape, self._exp.config["sampling"]["group_size"])
        program.eval_shape(params, frozen, prompts.replace(ptx=None), None, key, iteration)

    def compilations(self) -> int:
        """How often a turn was traced beyond once for each of its shapes."""
        return max(self._traces - len(self._programs), 0)

    def _prepared(self, rolled: Rollout, validation: bool) -> Rollout:
        """A rollout with what later passes may take over from it: the prompt that a group shares, the sampler's log-probs."""
        options = self._exp.config["sampling"]
        shared = options["group_size"] if self._forked and not validation else 1
        return rolled.replace(seqs=rolled.seqs.replace(prefix=(shared, self._width)),
                              old_logps=rolled.plain_logps if options["old_logps"] == "sampler" else None)

    # --- a turn ---

    def _speak(self, params: PyTree, frozen: PyTree, prompts: Prompts, key: Array, iteration: Array, group: int, live: list[episodes.Episode]
               ) -> list[episodes.Spoken]:
        rows = [episode.number for episode in live]
        first, generated = not any(episode.turns for episode in live), None
        if not first:
            longest = max(len(episode.prompt) + len(episode.tokens) for episode in live)
            width = next(width for width in self.widths if width >= longest)
            size = next(size for size in self.sizes if size >= len(live))
            built = episodes.prefixes(live, rows=size, width=width, pad_id=self._exp.tokenizer.pad_id)
            prompts, generated = distributed.to_global(built, sharding.row_sharding(self._exp.mesh))
            rows, group = list(range(len(live))), 1
        program = self._program(prompts.tokens.shape, group)
        drawn = program(params, frozen, prompts.replace(ptx=None), generated, key, iteration)
        tokens, real, logps, plain, truncated = jax.device_get(drawn)
        return [episodes.Spoken(tokens[b][real[b]], logps[b][real[b]], plain[b][real[b]], not bool(truncated[b])) for b in rows]

    def _program(self, shape: tuple[int, ...], group: int) -> Any:
        if (program := self._programs.get((*shape, group))) is None:
            program = self._programs[(*shape, group)] = sharding.jit(self._turn(shape[1], group), self._exp.mesh)
        return program

    @functools.cached_property
    def _programs(self) -> dict[tuple[int, ...], Any]:
        return {}

    def _turn(self, width: int, group: int) -> Callable[..., Any]:
        exp, options = self._exp, self._exp.config["sampling"]
        settings: dict[str, Any] = dict(
            max_new_tokens=options["max_new_tokens"], temperature=exp.spec.temperature, top_k=options["top_k"], top_p=options["top_p"],
            stop_ids=exp.tokenizer.stop_ids, pad_id=exp.tokenizer.pad_id, filters=self._filters, group_size=group, chunk=CHUNK,
        )

        def turn(params: PyTree, frozen: PyTree, prompts: Prompts, generated: Array | None, key: Array, iteration: Array) -> tuple[Array, ...]:
            self._traces += 1  # the body runs once per trace
            nets = Networks(params, frozen, exp.spec)
            rolled = sampling.generate(nets, prompts, key, iteration=iteration, generated=generated, **settings)
            assert rolled.plain_logps is not None
            new = (rolled.seqs.tokens, rolled.seqs.loss_mask, rolled.sampler_logps, rolled.plain_logps)
            return *(x[:, width:] for x in new), rolled.truncated

        return turn

    # --- what became of it ---

    def _settle(self, played: list[episodes.Episode], validation: bool) -> None:
        """Failures by config.reward_failure, and the conversations for the log."""
        failed = [episode for episode in played if episode.failed]
        name = self._exp.config["env"]["name"]
        if failed and self._failure["policy"] == "raise":
            said = " / ".join(message["content"][:60] for message in failed[0].messages[-2:])
            raise UserError(f"config.env.name = {name!r}: {failed[0].failed}, in an episode that ends with {said!r}; "
                            "correct it, or set config.reward_failure.policy to go on")
        if not validation:
            self.transcripts = [self._transcript(episode) for episode in played]
            self.failures = [{**self.transcripts[episode.number], "row": episode.number, "failed": {name: episode.failed}} for episode in failed]

    def _metrics(self, played: list[episodes.Episode]) -> dict[str, Mean]:
        mean = lambda values: Mean(np.float32(sum(values)), np.float32(len(played)))  # type: ignore[arg-type]  # noqa: E731
        counted = {f"env/{name}": mean(episode.counts.get(name, 0) for episode in played) for name in self._environment.counters}
        return {"rollout/turns": mean(episode.turns for episode in played), "env/failed": mean(bool(episode.failed) for episode in played), **counted}

    def _transcript(self, episode: episodes.Episode) -> dict[str, Any]:
        """An episode as the log shows it: the whole conversation."""
        counts, said = {name: episode.counts.get(name, 0) for name in self._environment.counters}, list(episode.messages) or None
        return {"prompt_id": episode.ids[0], "messages": said, "ended": not episode.truncated, "turns": episode.turns, **counts}

    def _try(self, encoder: Encoder) -> None:
        """The environment's replies under the template, and one row of the data."""
        exp, name = self._exp, self._exp.config["env"]["name"]
        try:
            encoder.reply((Message(role=self._environment.role, content="reply"),))
        except UserError as error:
            raise UserError(f"config.env.name = {name!r} replies as {self._environment.role!r}, which config.data.template = "
                            f"{exp.config['data']['template']!r} does not write ({error}): choose another template, or another role with "
                            "config.env.parameters.role where the environment has one") from None
        for key, data in (("train", exp.train_data), ("valid", exp.valid_data)):
            if data is not None:
                try:
                    self._environment.reset(data.messages(0), data.reference(0), 0)
                except Exception as error:
                    said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                    raise UserError(f"config.data.{key} = {exp.config['data'][key]!r} and config.env.name = {name!r}: {said}") from error


def _seed(run: int, purpose: Purpose, iteration: int, prompt_id: int) -> int:
    """Of the episodes of a prompt: the same for all its samples."""
    return int.from_bytes(hashlib.sha256(f"{run} {purpose.name} {iteration} {prompt_id}".encode()).digest()[:8], "big")


def _sizes(batch: int, halvings: int, devices: int) -> tuple[int, ...]:
    """The batch sizes of later turns, rising: B, B/2 … as far as the devices divide them."""
    found = [batch]
    while len(found) <= halvings and found[0] % (2 * devices) == 0:
        found.insert(0, found[0] // 2)
    return tuple(found)
