"""When a rollout is drawn and what is trained on with it: config.schedule, read and checked in plain Python before JAX starts up.

All zeros is synchronous RL: a rollout is drawn with the weights that it trains, and every one is trained on once. Nothing here depends on the clock:
the rollout of iteration i is drawn with the weights of iteration max(0, i − ahead), however long anything takes (law 7).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from absl import logging

from rlhf_jax.errors import UserError
from rlhf_jax.objectives import Objective


@dataclasses.dataclass(frozen=True)
class Schedule:
    """config.schedule."""

    ahead: int = 0  # iterations between the weights that draw a rollout and the update that trains on it
    refill: int = 0  # further rounds of sampling, at most, in the place of groups whose scores are all the same; 0 = these groups stay
    replay: float = 0.0  # share of a batch's rows that are earlier ones, [0, 1)
    capacity: int = 0  # rows that are kept for it, the newest
    refresh: int = 0  # iterations after which the policy becomes the reference, again and again; 0 = never
    critic_only: int = 0  # first iterations, in which the critic trains and the policy stands still

    @property
    def staged(self) -> bool:
        """Whether rollouts wait between sampling and update, so that no one program does both."""
        return self.ahead > 0 or self.refill > 0 or self.replay > 0


def of(config: Mapping[str, Any]) -> Schedule:
    """The run's schedule; offline there is none."""
    return Schedule(**config.get("schedule", {}))


def replayed_rows(config: Mapping[str, Any]) -> int:
    """Rows of a batch that are earlier ones."""
    return round(of(config).replay * config["run"]["batch_size"])


def check(c: Mapping[str, Any], objective: Objective) -> None:
    """Refuses what the schedule cannot do with this objective and data.

    Args:
      c: conformed, of an online run.
      objective: bound.

    Raises:
      UserError: with the key and the remedy.
    """
    plan, run, sampling = of(c), c["run"], c["sampling"]
    if run["steps"]:
        check_length(c, run["steps"])
    _check_correction(plan, objective)
    _check_old_logps(plan, sampling)
    if "ptx" in c and (plan.refill or plan.replay):
        key = "refill" if plan.refill else "replay"
        raise UserError(f"config.schedule.{key}: the rows of config.ptx go with the prompts of their batch, which it would mix: set it to 0")
    if plan.refill:
        if "reward" not in objective.needs:
            raise UserError(f"config.schedule.refill = {plan.refill}: {objective.name} reads no score, so no group has equal ones: set it to 0")
        if sampling["group_size"] < 2:
            raise UserError(f"config.schedule.refill = {plan.refill}: a group of config.sampling.group_size = 1 has one score: sample 2 or more each")
        if run["data_epochs"]:
            raise UserError(f"config.schedule.refill = {plan.refill}: how many prompts an iteration takes is not known beforehand, so "
                            "config.run.data_epochs says nothing: set it to 0 and config.run.steps instead")
    _check_replay(plan, c)
    if plan.refresh and c["reference_from"] != "init":
        raise UserError(f"config.schedule.refresh = {plan.refresh}: the reference becomes the policy, so it must have been one: set "
                        f"config.reference_from = 'init' (it is {c['reference_from']!r})")
    if plan.refresh and "teacher" in objective.needs:
        raise UserError(f"config.schedule.refresh = {plan.refresh}: {objective.name} learns from its reference, which would become the learner: "
                        "set it to 0")
    if plan.critic_only and c["critic"]["kind"] != "separate":
        raise UserError(f"config.schedule.critic_only = {plan.critic_only}: there is no critic apart from the policy: set config.critic.kind = "
                        "'separate', or critic_only = 0")


def check_length(c: Mapping[str, Any], steps: int) -> None:
    """Refuses what a run of so many iterations would end before: by `check` where config.run.steps says how many, else once the data is read.

    Args:
      c: conformed; offline there is nothing to refuse.
      steps: of the run.

    Raises:
      UserError: with the key and the remedy.
    """
    plan, run = of(c), c["run"]
    length = f"config.run.steps = {steps}" if run["steps"] else f"config.run.data_epochs = {run['data_epochs']:g}, which are {steps} steps,"
    for key, what in (("ahead", "be drawn by its first weights alone"), ("refresh", "never see its reference move"),
                      ("critic_only", "never train its policy")):
        if (value := getattr(plan, key)) >= steps and value:
            raise UserError(f"config.schedule.{key} = {value}: a run of {length} would {what}; choose less than {steps}")


def _check_old_logps(plan: Schedule, sampling: Mapping[str, Any]) -> None:
    """The sampler's log-probs are those of the weights, and of the cache, that drew; old ones are those before the update."""
    if sampling["old_logps"] != "sampler":
        return
    for key, value in (("ahead", plan.ahead), ("replay", plan.replay)):
        if value:
            raise UserError(f"config.sampling.old_logps = 'sampler' with config.schedule.{key} = {value}: rollouts are drawn by older weights, whose "
                            "log-probs would pass for the policy's own, and no correction would weigh anything; choose 'trainer'")
    if sampling["cache"] != "same":
        raise UserError(f"config.sampling.old_logps = 'sampler' with config.sampling.cache = {sampling['cache']!r}: the sampler's log-probs are the "
                        "trainer's only where it keeps keys and values as precisely; choose 'trainer', or cache = 'same'")


def _check_correction(plan: Schedule, objective: Objective) -> None:
    """Old samples are weighed by old/sampler, or the user is told what is taken for what."""
    key = "ahead" if plan.ahead else "replay" if plan.replay else ""
    if not key:
        return
    value = getattr(plan, key)
    if objective.hyperparameters.get("correction") == "none":
        raise UserError(f"config.objective.correction = 'none' with config.schedule.{key} = {value}: rollouts are drawn by older weights, and the "
                        "gradient would be biased without a word; weigh them, e.g. by correction = 'token_truncate'")
    if "correction" not in objective.hyperparameters:
        logging.warning("config.schedule.%s = %s: %s has no importance correction and takes the samples of older weights for the policy's own", key,
                        value, objective.name)


def _check_replay(plan: Schedule, c: Mapping[str, Any]) -> None:
    size, group, rows = c["run"]["batch_size"], c["sampling"]["group_size"], replayed_rows(c)
    if (plan.replay > 0) != (plan.capacity > 0):
        raise UserError(f"config.schedule.replay = {plan.replay:g} and config.schedule.capacity = {plan.capacity}: set both, or neither")
    if not plan.replay:
        return
    if abs(plan.replay * size - rows) > 1e-6 * size or rows % group or not 0 < rows < size:
        raise UserError(f"config.schedule.replay = {plan.replay:g} of config.run.batch_size = {size} is {plan.replay * size:g} rows: choose a share "
                        f"that leaves and makes whole groups of config.sampling.group_size = {group}")
    if plan.capacity % group or plan.capacity < rows:
        raise UserError(f"config.schedule.capacity = {plan.capacity}: choose a multiple of config.sampling.group_size = {group}, at least the {rows} "
                        "rows that are replayed at once")
