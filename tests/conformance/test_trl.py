"""Our maths on TRL's inputs gives TRL's losses and gradients. See vectors/trl/README.md for how the vectors were made."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives.dpo import dpo_loss
from rlhf_jax.objectives.grpo import grpo_loss, kl_penalty
from rlhf_jax.objectives.ppo import token_rewards
from rlhf_jax.objectives.reward import bradley_terry_loss, centring_loss
from rlhf_jax.objectives.sft import nll_loss
from rlhf_jax.ops import vocab
from rlhf_jax.ops.advantages import gae, group_advantages
from rlhf_jax.ops.kl import exp_ratio, k3
from rlhf_jax.ops.masking import masked_mean, masked_moments, masked_sum, whiten
from rlhf_jax.ops.policy_gradient import clipped_surrogate, clipped_value_loss, value_is_clipped
from rlhf_jax.types import Mean

FOLDER = pathlib.Path(__file__).parent / "vectors" / "trl"


def vectors(name):
    return {k: jnp.asarray(v) for k, v in np.load(FOLDER / f"{name}.npz").items()}


def check(f, x, stored, case, mask=None):
    """Value and gradient. With a mask, TRL's gradient is compared there: where it gets log-probs that were zeroed beforehand, it sums over
    all of them, so that a slope shows on entries which are constants."""
    value, slope = jax.jit(jax.value_and_grad(f))(x)
    expected = stored[f"grad/{case}"].reshape(slope.shape)
    np.testing.assert_allclose(value, stored[f"loss/{case}"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(slope, expected if mask is None else jnp.where(mask, expected, 0.0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case, count", [("nll__nNone", None), ("nll__n37", 37)])
def test_sft(case, count):
    v = vectors("sft")
    mask = v["labels"][:, 1:] != -100
    check(lambda x: Mean.of(nll_loss(x), mask).total / (count or mask.sum()), v["logps"], v, case, mask)


@pytest.mark.parametrize("case, beta", [("sigmoid", 0.1), ("sigmoid__beta0.5", 0.5)])
def test_dpo(case, beta):
    v = vectors("dpo")
    mask = v["completion_mask"][:, 1:] != 0

    def f(logps):
        ratios = masked_sum(logps - v["ref_logps"], mask)
        return dpo_loss(ratios[:6], ratios[6:], beta=beta).mean()

    check(f, v["policy_logps"], v, case, mask)


@pytest.mark.parametrize("case, margin, center_coef", [
    ("plain", 0, 0.0), ("margin", 1, 0.0), ("center0.01", 0, 0.01), ("margin_center0.5", 1, 0.5),
])
def test_reward(case, margin, center_coef):
    v = vectors("reward")

    def f(r):
        losses = bradley_terry_loss(r[:6], r[6:], margin * v["margin"])
        return (losses + centring_loss(r[:6], r[6:], center_coef=center_coef)).mean()

    check(f, v["rewards"], v, case)


def surrogate(v, x):
    return grpo_loss(x - v["old_logps"], jnp.broadcast_to(v["advantages"][:, None], x.shape), v["mask"] != 0, clip_low=0.2, clip_high=0.2)


def test_grpo():
    v = vectors("grpo")
    check(lambda x: surrogate(v, x).mean(), v["new_logps"], v, "grpo")


def test_grpo_with_the_kl_penalty():
    """TRL weights k3 by the ratio (`use_bias_correction_kl`), DeepSeekMath and we do not; the weight is put on here."""
    v = vectors("grpo")

    def f(x):
        weighted = exp_ratio(x - v["old_logps"]) * k3(x - v["ref_logps"])
        return (surrogate(v, x) + 0.04 * masked_mean(weighted, v["mask"] != 0)).mean()

    check(f, v["new_logps"], v, "grpo__beta0.04")


def test_the_kl_penalty_without_bias_correction():
    """TRL stores this case per token only (DAPO's normalisation): one row per token gives it from the same function."""
    v = vectors("grpo")
    mask = v["mask"] != 0

    def f(x):
        advantages = jnp.broadcast_to(v["advantages"][:, None], x.shape)
        policy = clipped_surrogate(x - v["old_logps"], advantages, clip_low=0.2, clip_high=0.2)
        per_token = kl_penalty((x - v["ref_logps"]).reshape(-1, 1), mask.reshape(-1, 1), beta=0.04).reshape(x.shape)
        return Mean.of(policy + per_token, mask).compute()

    check(f, v["new_logps"], v, "dapo__beta0.04_no_bias_corr")


def test_group_advantages():
    v = vectors("grpo_advantages")
    scores = v["rewards"] @ v["reward_weights"].astype(jnp.float32)
    got = group_advantages(scores, jnp.arange(12) // 4, jnp.ones(12, bool), eps=1e-4)
    np.testing.assert_allclose(got, v["adv/group__sum_then_normalize"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case, clip, value_clip, value_coef", [
    ("default", 0.2, 0.2, 0.1), ("wide", 10.0, 10.0, 0.5), ("tight", 0.05, 0.05, 1.0),
])
def test_ppo_loss(case, clip, value_clip, value_coef):
    v = vectors("old_ppo_loss")
    mask, value_mask = ~v["padding_mask"], ~v["padding_mask_p1"]

    def parts(logps, values):
        policy = clipped_surrogate(logps - v["old_logprobs"], v["advantages"], clip_low=clip, clip_high=clip)
        value = clipped_value_loss(values, v["values"], v["returns"], clip=value_clip)
        return Mean.of(policy, mask).compute(), Mean.of(value, value_mask).compute()

    def total(logps, values):
        policy, value = parts(logps, values)
        return policy + value_coef * value

    # TRL zeroes predicted values behind the end before the loss; here the mask does that.
    at = v["new_logprobs"], v["vpred"]
    for got, name in zip(jax.jit(parts)(*at), ("pg_loss", "vf_loss")):
        np.testing.assert_allclose(got, v[f"{name}/{case}"], rtol=1e-5, atol=1e-7)
    value, slopes = jax.jit(jax.value_and_grad(total, (0, 1)))(*at)
    np.testing.assert_allclose(value, v[f"loss/{case}"], rtol=1e-5, atol=1e-7)
    for got, name in zip(slopes, ("grad_new", "grad_vpred")):
        np.testing.assert_allclose(got, v[f"{name}/{case}"], rtol=1e-4, atol=1e-6)
    clipped = value_is_clipped(at[1], v["values"], v["returns"], clip=value_clip)
    np.testing.assert_allclose(Mean.of(clipped, value_mask).compute(), v[f"vf_clipfrac/{case}"], rtol=1e-5)


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0)])
def test_ppo_rewards_and_gae(whitened, gamma, lam):
    """TRL scores one slot behind the last token where there is room, and masks rewards and advantages differently; we place the score
    on the last slot of a mask, so TRL's longer mask gives its rewards."""
    v = vectors("old_ppo_gae")
    case = f"k1_whiten{int(whitened)}_g{gamma}_l{lam}"
    longer, mask = ~v["padding_mask_p1"], ~v["padding_mask"]
    log_ratios = jnp.where(mask, v["logprobs"] - v["ref_logprobs"], 0.0)
    rewards = token_rewards(v["scores"], log_ratios, longer, jnp.float32(0.05))
    if whitened:
        rewards = whiten(rewards, longer, keep_mean=True)
    np.testing.assert_allclose(rewards, v[f"rewards/{case}"], rtol=1e-4, atol=1e-5)
    advantages, returns = gae(rewards, v["values"], longer, gamma=gamma, lam=lam)
    np.testing.assert_allclose(returns, jnp.where(longer, v[f"returns/{case}"], 0.0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(whiten(advantages, mask, keep_mean=False), v[f"advantages/{case}"], rtol=1e-4, atol=1e-5)


def test_masked_statistics():
    v = vectors("old_masked_stats")
    mean, variance = masked_moments(v["x"], v["mask"])
    np.testing.assert_allclose(mean, v["mean"], rtol=1e-5)
    np.testing.assert_allclose(variance, v["var"], rtol=1e-5)
    for keep_mean, name in ((False, "whiten"), (True, "whiten_noshift")):
        got = whiten(v["x"], v["mask"], keep_mean=keep_mean)
        np.testing.assert_allclose(got, jnp.where(v["mask"], v[name], 0.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case, temperature, bias", [("plain", 1.0, False), ("temp0.7", 0.7, False), ("bias", 1.0, True)])
def test_vocabulary_readings(case, temperature, bias):
    v = vectors("logprobs")

    def logits(hidden, weight):
        return (hidden @ weight.T + bias * v["bias"][None]) / temperature

    def total(hidden, weight):
        z = logits(hidden, weight)
        return vocab.logps(z, v["targets"]).sum() + 0.1 * vocab.entropy(z, v["targets"]).sum()

    z = logits(v["hidden"], v["weight"])
    np.testing.assert_allclose(vocab.logps(z, v["targets"]), v[f"{case}/log_probs"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(vocab.entropy(z, v["targets"]), v[f"{case}/entropy"], rtol=1e-4, atol=1e-5)
    for got, name in zip(jax.jit(jax.grad(total, (0, 1)))(v["hidden"], v["weight"]), ("grad_h", "grad_w")):
        np.testing.assert_allclose(got, v[f"{case}/{name}"], rtol=1e-3, atol=1e-5)
