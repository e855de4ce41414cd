"""Preference pairs: values by hand, special cases that are another objective, and what each loss pushes to."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import objectives
from rlhf_jax.errors import UserError
from rlhf_jax.objectives import _pairs
from rlhf_jax.objectives.apo_down import apo_down_loss
from rlhf_jax.objectives.apo_zero import apo_zero_loss
from rlhf_jax.objectives.bco_pair import bco_pair_loss
from rlhf_jax.objectives.cdpo import cdpo_loss
from rlhf_jax.objectives.discopop import discopop_loss
from rlhf_jax.objectives.dpo import dpo_loss
from rlhf_jax.objectives.exo import exo_loss
from rlhf_jax.objectives.hinge import hinge_loss
from rlhf_jax.objectives.ipo import ipo_loss
from rlhf_jax.objectives.ld_dpo import length_weights
from rlhf_jax.objectives.nca import nca_loss
from rlhf_jax.objectives.orpo import odds_ratio_loss
from rlhf_jax.objectives.r_dpo import r_dpo_loss
from rlhf_jax.objectives.robust_dpo import robust_dpo_loss
from rlhf_jax.objectives.rpo import mean_nll
from rlhf_jax.objectives.simpo import simpo_loss
from rlhf_jax.objectives.sppo import sppo_loss
from rlhf_jax.objectives.wpo import wpo_weights
from rlhf_jax.types import Comparisons
from tests import reference
from tests.objectives import tabular
from tests.objectives.settings import CONFIGS, V, bound, config
from tests.reference.numeric import gradient

LOG2 = math.log(2)
# (loss, its value and its slopes by the log-ratios of y_w and y_l where both are 0)
AT_REFERENCE = {
    "dpo": (lambda w, l: dpo_loss(w, l, beta=0.4), LOG2, (-0.2, 0.2)),
    "cdpo": (lambda w, l: cdpo_loss(w, l, beta=0.4, epsilon=0.1), LOG2, (-0.16, 0.16)),
    "robust_dpo": (lambda w, l: robust_dpo_loss(w, l, beta=0.4, epsilon=0.1), LOG2, (-0.25, 0.25)),
    "ipo": (lambda w, l: ipo_loss(w, l, tau=0.25), 4.0, (-4.0, 4.0)),
    "hinge": (lambda w, l: hinge_loss(w, l, beta=0.4), 1.0, (-0.4, 0.4)),
    "exo": (lambda w, l: exo_loss(w, l, beta=0.4, epsilon=0.1), -LOG2 - 0.5 * math.log(0.09), (-0.1 * math.log(9), 0.1 * math.log(9))),
    "nca": (lambda w, l: nca_loss(w, l, beta=0.4), 2 * LOG2, (-0.1, 0.1)),
    "sppo": (lambda w, l: sppo_loss(w, l, eta=4.0), 8.0, (-4.0, 4.0)),
    "apo_zero": (lambda w, l: apo_zero_loss(w, l, beta=0.4), 1.0, (-0.1, 0.1)),
    "apo_down": (lambda w, l: apo_down_loss(w, l, beta=0.4), 1.0, (0.0, 0.1)),
    "discopop": (lambda w, l: discopop_loss(w, l, beta=0.4, tau=0.5), 0.5 + 0.5 * LOG2, (-0.3 + 0.2 * (1 - LOG2), 0.3 - 0.2 * (1 - LOG2))),
    "bco_pair": (lambda w, l: bco_pair_loss(w, l, jnp.zeros_like(w), beta=0.4), 2 * LOG2, (-0.2, 0.2)),
    "r_dpo": (lambda w, l: r_dpo_loss(w, l, jnp.zeros_like(w), beta=0.4, alpha=1.0), LOG2, (-0.2, 0.2)),
    "odds_ratio": (lambda w, l: odds_ratio_loss(w - LOG2, l - LOG2), LOG2, (-1.0, 1.0)),  # at p = ½ the log odds rise twice as fast as log p
}


@pytest.mark.parametrize("name", AT_REFERENCE)
def test_where_policy_and_reference_are_equal(name: str) -> None:
    loss, value, slopes = AT_REFERENCE[name]
    zero = jnp.zeros(1)
    got, found = jax.value_and_grad(lambda pair: loss(*pair).sum())((zero, zero))
    np.testing.assert_allclose(got, value, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate(found), slopes, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", AT_REFERENCE)
@pytest.mark.parametrize("far", [50.0, -50.0, 2000.0, -2000.0])
def test_far_from_the_reference_values_and_slopes_are_finite(name: str, far: float) -> None:
    loss = AT_REFERENCE[name][0]
    for pair in ((far, 0.0), (0.0, far), (far, far), (far, -far)):
        found = jax.value_and_grad(lambda pair: loss(*pair).sum())(tuple(jnp.full(1, x) for x in pair))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found)), pair


W, L = jnp.asarray([0.7, -2.0, 3.0]), jnp.asarray([-0.1, 1.0, 2.5])


def test_without_flips_the_losses_for_noisy_labels_are_dpo() -> None:
    expected = dpo_loss(W, L, beta=0.5)
    for loss in (cdpo_loss, robust_dpo_loss):
        np.testing.assert_allclose(loss(W, L, beta=0.5, epsilon=0.0), expected, rtol=1e-6)


def test_robust_dpo_on_flipped_labels_is_dpo_on_clean_ones_in_expectation() -> None:
    kept, flipped = robust_dpo_loss(W, L, beta=0.5, epsilon=0.2), robust_dpo_loss(L, W, beta=0.5, epsilon=0.2)
    np.testing.assert_allclose(0.8 * kept + 0.2 * flipped, dpo_loss(W, L, beta=0.5), rtol=1e-5)


@pytest.mark.parametrize("loss", [cdpo_loss, exo_loss])
def test_the_best_margin_is_that_of_the_smoothed_label(loss: Any) -> None:
    best = jnp.full(1, math.log(0.9 / 0.1) / 0.5)  # σ(h) = 1 − ε
    value, slope = jax.value_and_grad(lambda w: loss(w, jnp.zeros(1), beta=0.5, epsilon=0.1).sum())(best)
    np.testing.assert_allclose(slope, 0.0, atol=1e-6)
    entropy = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    np.testing.assert_allclose(value, entropy if loss is cdpo_loss else 0.0, rtol=1e-5, atol=1e-6)


def test_discopop_is_logistic_on_one_side_and_exponential_on_the_other() -> None:
    far = discopop_loss(jnp.asarray([20.0, -20.0]), jnp.zeros(2), beta=0.5, tau=0.05)
    np.testing.assert_allclose(far, [math.exp(-10.0), math.log1p(math.exp(10.0))], rtol=1e-5)


def test_discopop_has_a_minimum_on_the_wrong_side_of_0() -> None:
    """At h = −2.3714 τ, where the paper finds it; with a wide passage it has none."""
    def slope(h: float, tau: float) -> float:
        return float(jax.grad(lambda w: discopop_loss(w, jnp.zeros(1), beta=1.0, tau=tau).sum())(jnp.full(1, h))[0])

    assert slope(0.0, 0.05) > 0.5 and abs(slope(-2.3714 * 0.05, 0.05)) < 1e-3
    assert max(slope(h, 0.4) for h in np.linspace(-2, 2, 9)) < 0


def test_apo_down_lowers_a_chosen_response_that_is_above_the_reference_and_apo_zero_raises_it() -> None:
    slopes = [jax.grad(lambda w, f=f: f(w, jnp.full(1, -2.0), beta=1.0).sum())(jnp.full(1, 0.5)) for f in (apo_down_loss, apo_zero_loss)]
    assert slopes[0] > 0 > slopes[1]


def test_a_hinge_lets_go_of_a_wide_margin() -> None:
    np.testing.assert_allclose(jax.grad(lambda w: hinge_loss(w, L, beta=0.5).sum())(L + 2.1), 0.0)


def test_simpo_asks_for_a_margin() -> None:
    np.testing.assert_allclose(simpo_loss(jnp.zeros(1), jnp.full(1, -0.55), beta=2.5, gamma=1.375), LOG2, rtol=1e-6)


def test_orpo_by_hand() -> None:
    p, q = 0.8, 0.5  # odds 4 and 1
    np.testing.assert_allclose(odds_ratio_loss(jnp.log(jnp.full(1, p)), jnp.log(jnp.full(1, q))), -math.log(4 / 5), rtol=1e-5)


def test_tokens_beyond_the_shorter_response_weigh_alpha() -> None:
    mask = jnp.asarray([[[0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0]], [[0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]], bool)
    weights = jnp.where(mask, length_weights(mask, alpha=0.25), 0.0)
    np.testing.assert_allclose(weights, [[[0, 1, 1, 0, 0.25, 0.25], [0, 0, 1, 1, 0, 0]], [[0] * 6, [0.25, 0.25, 0, 0, 0, 0]]])


def test_wpo_weighs_by_how_likely_the_policy_writes_the_pair() -> None:
    """Uniform over V tokens every response has weight 1; of two tokens with ¾ and ¼, a token has p / (p² + q²)."""
    mask = jnp.ones((1, 2, 3), bool).at[0, 1, 1:].set(False)
    uniform = wpo_weights(jnp.full((1, 2, 3), -math.log(7)), jnp.full((1, 2, 3), -math.log(7)), mask, weight_max=math.inf)
    np.testing.assert_allclose(uniform, 1.0, rtol=1e-6)
    logps = jnp.log(jnp.asarray([[[0.75, 0.75, 0.75], [0.25, 9.0, 9.0]]]))
    squares = jnp.full((1, 2, 3), math.log(0.625))
    np.testing.assert_allclose(wpo_weights(logps, squares, mask, weight_max=math.inf), 1.2 * 0.4, rtol=1e-5)
    np.testing.assert_allclose(wpo_weights(logps, squares, mask, weight_max=0.3), 0.3, rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda x: wpo_weights(x, squares, mask, weight_max=math.inf).sum())(logps), 0.0)


def test_mean_nll() -> None:
    mask = jnp.asarray([[1, 0, 1], [0, 0, 0]], bool)
    np.testing.assert_allclose(mean_nll(jnp.asarray([[-1.0, -9.0, -2.0], [-1.0, -1.0, -1.0]]), mask), [1.5, 0.0])


# --- whole objectives ---


def pairs(seed: int = 0) -> tuple[tabular.TabularNets, Comparisons]:
    rng = np.random.default_rng(seed)
    fake = tabular.nets(rng, V)
    return fake, tabular.with_reference(fake, tabular.comparisons(rng, 4, 8, V, filler=True))


def value(objective: dict[str, Any], fake: tabular.TabularNets, batch: Comparisons) -> jax.Array:
    chosen = objectives.bind(objective)
    batch, _, _ = chosen.prepare(fake, batch, chosen.init_carry(fake), jax.random.key(0))
    return tabular.value(chosen.loss(fake, batch, None)[0])


SAME = [
    (config("f_dpo", beta=0.3, divergence="reverse_kl"), config("dpo", beta=0.3)),
    (config("f_dpo", beta=0.3, divergence="alpha", alpha=1.0), config("f_dpo", beta=0.3, divergence="forward_kl")),
    (config("ld_dpo", beta=0.3, alpha=1.0), config("dpo", beta=0.3)),
    (config("r_dpo", beta=0.3, alpha=0.0), config("dpo", beta=0.3)),
    (config("rpo", beta=0.3, alpha=0.0), config("dpo", beta=0.3)),
    (config("beta_dpo", beta=0.3, alpha=0.0, keep=1.0), config("dpo", beta=0.3)),
    (config("tr_dpo", beta=0.3), config("dpo", beta=0.3)),
    (config("mpo", beta=0.3, preference_weight=1.0, quality_weight=0.0, generation_weight=0.5), config("rpo", beta=0.3, alpha=0.5)),
    (config("mpo", beta=0.3, preference_weight=0.0, quality_weight=1.0, generation_weight=0.0), config("bco_pair", beta=0.3)),
    (config("alphapo", alpha=0.0, gamma=1.0), config("simpo", gamma=1.0)),
]


@pytest.mark.parametrize(("one", "other"), SAME, ids=lambda c: c["name"])
def test_special_cases(one: dict[str, Any], other: dict[str, Any]) -> None:
    fake, batch = pairs()
    np.testing.assert_allclose(value(one, fake, batch), value(other, fake, batch), rtol=1e-5)


@pytest.mark.parametrize("objective", [
    config("ipo", reduction="mean"), config("f_dpo", divergence="jensen_shannon"), config("f_dpo", divergence="forward_kl"),
    config("cpo", nll="mean"), config("wpo", weight_max=math.inf), config("alphapo", alpha=0.25),
], ids=lambda c: "-".join(map(str, c.values())))
def test_other_options_against_numpy(objective: dict[str, Any]) -> None:
    fake, batch = pairs(1)
    (tables, ref), numpy = tabular.float64(fake), tabular.as_numpy(batch)
    case = reference.Case(old=tables, at=tables, ref=ref, batch=numpy, h=objective, carry={})
    np.testing.assert_allclose(value(objective, fake, batch), reference.find(objective["name"])(tables, case), rtol=1e-5)


def test_orpos_likelihood_over_all_tokens() -> None:
    """The head runs at every position, wherever the data pipeline would have it run: the prompt's log-probs are no zeros."""
    objective = config("orpo", nll_over="all")
    rng, chosen = np.random.default_rng(2), objectives.bind(objective)
    fake, batch = tabular.nets(rng, V), tabular.comparisons(rng, 5, 8, V, filler=True)
    batch = batch.replace(seqs=batch.seqs.replace(loss_positions=jnp.full((5, 2, 1), 7, jnp.int32)))
    got, slopes = tabular.objective(chosen, fake, batch)
    (tables, ref), numpy = tabular.float64(fake), tabular.as_numpy(batch)
    case = reference.Case(old=tables, at=tables, ref=ref, batch=numpy, h=objective, carry={})
    slow = lambda table: reference.find("orpo")({**tables, "policy": table}, case)  # noqa: E731
    np.testing.assert_allclose(got, slow(tables["policy"]), rtol=1e-5)
    np.testing.assert_allclose(slopes["policy"], gradient(slow, tables["policy"]), rtol=2e-3, atol=2e-5)
    segments = numpy.seqs.segment_ids[:-1, 0]
    count = tabular.loss(chosen, fake, batch)[0]["nll"].count
    assert count == (segments != 0).sum() - len(segments) > tabular.loss(bound("orpo"), fake, batch)[0]["nll"].count


@pytest.mark.parametrize("key", ["ipo.reduction", "cpo.nll", "f_dpo.divergence", "orpo.nll_over"])
def test_an_unknown_option_is_named(key: str) -> None:
    name, option = key.split(".")
    with pytest.raises(UserError, match=rf"^config\.objective\.{option} is 'none', which is none of its values; legal names are \w+, "):
        objectives.bind(config(name, **{option: "none"}))


PAIRS = [name for name in CONFIGS if bound(name).batch_type is Comparisons and not bound(name).data]


@pytest.mark.parametrize("name", PAIRS)
def test_three_branches_are_refused(name: str) -> None:
    rng = np.random.default_rng(0)
    fake, chosen = tabular.nets(rng, V), bound(name)
    three = tabular.with_reference(fake, Comparisons(seqs=tabular.sequences(rng, (4, 3, 8), V)))
    with pytest.raises(AssertionError):
        chosen.loss(fake, chosen.prepare(fake, three, chosen.init_carry(fake), jax.random.key(0))[0], None)


def test_which_response_is_the_likelier_one_needs_no_reference() -> None:
    """Rows: the better one, the other, a tie, filler."""
    _, batch = pairs()
    logps, rewards = jnp.asarray([[-1.0, -2.0], [-3.0, -2.5], [-1.0, -1.0], [-1.0, -2.0]]), jnp.asarray([[0.0, 1.0]] * 4)
    metrics = _pairs.pair_metrics(logps, rewards, batch)
    assert not batch.real[-1]
    assert (float(metrics["logps/accuracy"].compute()), float(metrics["reward/accuracy"].compute())) == (0.5, 0.0)


def test_identical_responses_have_no_margin() -> None:
    fake, batch = pairs()
    twice = batch.replace(seqs=jax.tree.map(lambda x: jnp.stack([x[:, 0], x[:, 0]], axis=1), batch.seqs))
    for name in ("dpo", "simpo", "orpo", "alphapo", "ld_dpo", "wpo", "bco_pair", "f_dpo"):
        chosen = bound(name)
        prepared = chosen.prepare(fake, twice, chosen.init_carry(fake), jax.random.key(0))[0]
        assert float(chosen.loss(fake, prepared, None)[1]["reward/margin"].compute()) == 0.0, name


@pytest.mark.parametrize("call", [
    lambda: cdpo_loss(jnp.ones(3), jnp.ones(1), beta=0.1, epsilon=0.1),
    lambda: ipo_loss(jnp.ones((3, 1)), jnp.ones((3, 1)), tau=0.1),
    lambda: bco_pair_loss(jnp.ones(3), jnp.ones(3), jnp.ones(()), beta=0.1),
    lambda: r_dpo_loss(jnp.ones(3), jnp.ones(3), jnp.ones((3, 2)), beta=0.1, alpha=0.1),
    lambda: length_weights(jnp.ones((3, 3, 4), bool), alpha=0.1),
    lambda: wpo_weights(jnp.ones((3, 2, 4)), jnp.ones((3, 2, 1)), jnp.ones((3, 2, 4), bool), weight_max=1.0),
    lambda: mean_nll(jnp.ones(3), jnp.ones(3, bool)),
    lambda: _pairs.pair_metrics(jnp.ones((4, 2)), jnp.ones(4), pairs()[1]),
])
def test_wrong_shapes_are_refused(call: Any) -> None:
    with pytest.raises(AssertionError):
        call()
