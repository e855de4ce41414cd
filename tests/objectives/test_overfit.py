"""Every objective on a tabular policy: training moves the quantity that it is for."""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import objectives
from rlhf_jax.ops.masking import loss_tokens, masked_sum
from rlhf_jax.types import Array, Comparisons, Labelled, Rollout, Sequences, Unpaired
from tests.objectives import tabular
from tests.objectives.settings import V, bound, config, random_batch

RATES: dict[str, float] = {  # where 0.5, for rollouts 5, is too fast or too slow
    "apo_down": 3.0, "online_dpo": 20.0, "online_ipo": 0.05, "xpo": 20.0, "nash_md": 40.0,
    "ppo": 3.0, "rloo": 2.0, "dr_grpo": 10.0,
}
CHANGES: dict[str, dict[str, Any]] = {  # hyper-parameters other than in settings.py
    "online_ipo": {"tau": 0.02}, "xpo": {"alpha": 1e-3}, "nash_md": {"tau": 0.008},
    "ppo": {"kl_coef": 0.01, "entropy_coef": 0.0, "whiten_rewards": False}, "dr_grpo": {"beta": 1e-3, "entropy_coef": 0.0, "length_scale": 1.0},
    "rloo": {"beta": 0.005}, "reinforce": {"beta": 0.005, "entropy_coef": 0.0}, "reinforce_pp": {"beta": 0.005},
}
ELSEWHERE: dict[str, str] = {  # objective → the test of its own that shows what moves, where none of the forms below fits
    **dict.fromkeys(
        ("forward_kl", "reverse_kl", "gkd", "on_policy_gkd", "on_policy_reverse_kl"), "test_supervised.py::test_the_student_becomes_its_teacher"
    ),
    "dft": "test_supervised.py::test_of_two_answers_dft_settles_on_the_commoner_where_sft_keeps_both",
    "ppo_ptx": "test_supervised.py::test_ptx_keeps_the_second_data_set_likely_while_the_score_rises",
    "reward": "test_reward.py::test_overfit_the_accuracy_rises",
    "plackett_luce": "test_rankings.py::test_overfit_an_order_of_four",
}
WANTED = 1  # the token that the reward of a rollout asks for


def start() -> tabular.TabularNets:
    """A policy equal to its reference, a reward that knows nothing, a critic at 0."""
    fake = tabular.nets(np.random.default_rng(5), V, moved=0.0)
    return fake.replace(params={**fake.params, "reward": jnp.zeros(V), "critic": jnp.zeros(V)})


def chosen(name: str) -> Any:
    return objectives.bind(config(name, **CHANGES[name])) if name in CHANGES else bound(name)


@functools.partial(jax.jit, static_argnums=(0, 3))
def train(objective: Any, fake: tabular.TabularNets, batch: Any, steps: int, rate: float) -> tabular.TabularNets:
    """`steps` of gradient descent on one batch, prepared anew each time, as offline training does."""

    def step(carried: Any, _: None) -> Any:
        params, carry = carried
        nets = fake.replace(params=params)
        prepared, carry, _ = objective.prepare(nets, batch, carry, jax.random.key(0))
        grads = jax.grad(lambda p: tabular.value(objective.loss(fake.replace(params=p), prepared, None)[0]))(params)
        return (jax.tree.map(lambda p, g: p - rate * g, params, grads), carry), None

    (params, _), _ = jax.lax.scan(step, (fake.params, objective.init_carry(fake)), None, length=steps)
    return fake.replace(params=params)


def of_type(kind: type) -> list[str]:
    return [name for name in objectives.names() if bound(name).batch_type is kind and name not in ELSEWHERE]


def sums(fake: tabular.TabularNets, seqs: Sequences) -> Array:
    return masked_sum(fake.policy(seqs).logps, loss_tokens(seqs))


@pytest.mark.parametrize("name", ELSEWHERE)
def test_elsewhere_is_a_test_of_the_objective(name: str) -> None:
    """It exists, is not marked slow, and its file names the objective."""
    file, _, function = ELSEWHERE[name].partition("::")
    module = importlib.import_module(f"tests.objectives.{file.removesuffix('.py')}")
    found = getattr(module, function)
    assert callable(found) and not any(mark.name == "slow" for mark in getattr(found, "pytestmark", []))
    assert name in objectives.names() and f'"{name}"' in inspect.getsource(module)


@pytest.mark.parametrize("name", of_type(Sequences))
def test_supervised_raises_the_likelihood_of_its_tokens(name: str) -> None:
    fake, batch = start(), random_batch(Sequences, np.random.default_rng(6), packed=False)
    batch = tabular.with_reference(fake, batch)
    after = train(chosen(name), fake, batch, 200, RATES.get(name, 0.5))
    assert float(sums(after, batch).sum()) > float(sums(fake, batch).sum()) + 5.0


@pytest.mark.parametrize("name", of_type(Comparisons))
def test_pairs_are_told_apart(name: str) -> None:
    fake, batch = start(), tabular.comparisons(np.random.default_rng(7), 8, 10, V, margin=False)
    batch = tabular.with_reference(fake, batch)
    objective = chosen(name)

    def measured(nets: tabular.TabularNets) -> dict[str, Any]:
        prepared, _, metrics = tabular.prepare(objective, nets, batch)
        return metrics | tabular.loss(objective, nets, prepared)[1]

    before = measured(fake)
    after = train(objective, fake, batch, 300, RATES.get(name, 0.5))
    metrics = measured(after)
    assert float(metrics["reward/margin"].compute()) > float(before["reward/margin"].compute()) + 0.05
    assert float(metrics["reward/accuracy"].compute()) > 0.8


@pytest.mark.parametrize("name", of_type(Unpaired))
def test_the_desirable_becomes_likelier_than_the_undesirable(name: str) -> None:
    fake, batch = start(), tabular.unpaired(np.random.default_rng(8), 8, 10, V)
    batch = tabular.with_reference(fake, batch)
    after = train(chosen(name), fake, batch, 300, RATES.get(name, 0.5))
    gained = np.asarray(sums(after, batch.seqs) - sums(fake, batch.seqs))
    good = np.asarray(batch.desirable)
    assert gained[good].mean() > gained[~good].mean() + 0.5


@pytest.mark.parametrize("name", of_type(Labelled))
def test_the_loss_on_labels_falls(name: str) -> None:
    fake, batch = start(), tabular.labelled(np.random.default_rng(9), 8, 10, V)
    objective = chosen(name)
    after = train(objective, fake, batch, 300, RATES.get(name, 0.05))
    loss = [float(tabular.value(tabular.loss(objective, nets, batch)[0])) for nets in (fake, after)]
    assert loss[1] < 0.8 * loss[0]


@pytest.mark.parametrize("name", of_type(Rollout))
def test_the_score_of_fresh_samples_rises(name: str) -> None:
    """The score is the fraction of tokens that are WANTED."""
    objective, fake = chosen(name), start()

    @jax.jit
    def iterate(params: Any, carry: Any, key: Array) -> Any:
        nets = fake.replace(params=params)
        seqs = tabular.sample(nets, key, 64, 6)
        score = (seqs.tokens[:, 1:] == WANTED).mean(-1).astype(jnp.float32)
        batch = tabular.scored(seqs, score, group=4)
        batch = batch.replace(sampler_logps=nets.policy(seqs).logps)
        batch = tabular.with_reference(fake, batch)
        batch, carry, _ = objective.prepare(nets, batch, carry, key)
        grads = jax.grad(lambda p: tabular.value(objective.loss(fake.replace(params=p), batch, None)[0]))(params)
        return jax.tree.map(lambda p, g: p - RATES.get(name, 5.0) * g, params, grads), carry, score.mean()

    params, carry, scores = fake.params, objective.init_carry(fake), []
    for step in range(30):
        params, carry, score = iterate(params, carry, jax.random.key(step))
        scores.append(float(score))
    assert np.mean(scores[-5:]) > np.mean(scores[:2]) + 0.2, scores
