"""Saved networks asked again: the same numbers as from the networks themselves, shared programs, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.eval import compare
from rlhf_jax.eval.generation import check_prompts, shares
from rlhf_jax.eval.models import Policy, RewardModel
from rlhf_jax.models import ModelConfig, Networks, NetworkSpec, layout, transformer
from rlhf_jax.ops import masking
from rlhf_jax.saved import Source
from rlhf_jax.types import Comparisons, Prompts, Sequences


def _source(network: str, scan: bool = False, seed: int = 0) -> Source:
    config = ModelConfig(
        vocab_size=264, hidden=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=32, context=24, rope_theta=1e4, norm_eps=1e-6, tied=False,
        dropout=0.0, param_dtype="float32", compute_dtype="float32", scan_layers=scan, remat="none", logits_chunk=0,
        outputs=("lm", "value") if network == "policy" else ("score",),
    )
    params = layout.to_canonical(transformer.init(config, jax.random.key(seed)))
    return Source("here", "/here", network, config, jax.tree.map(np.asarray, params), {}, Tokenizer.byte_level(), None)


def _prompts(rows: int = 4, width: int = 6) -> Prompts:
    rng = np.random.default_rng(0)
    segments = np.ones((rows, width), np.int32)
    segments[1, :3] = 0
    positions = np.maximum(segments.cumsum(1) - 1, 0).astype(np.int32)
    ids = np.arange(rows, dtype=np.int32)
    return Prompts(tokens=rng.integers(0, 256, (rows, width)).astype(np.int32), positions=positions, segment_ids=segments, prompt_ids=ids,
                   sample_ids=np.zeros_like(ids), group_ids=ids)


@pytest.mark.parametrize("scan", [False, True])
def test_a_policy_samples_and_reads_its_own_log_probs(scan):
    policy = Policy(_source("policy", scan), "--checkpoint")
    rolled = policy.generate(_prompts(), seed=3, max_new_tokens=5, temperature=0.7)
    assert rolled.seqs.tokens.shape == (4, 11)
    read = policy.logps(rolled.seqs, temperature=0.7)
    np.testing.assert_allclose(np.where(rolled.seqs.loss_mask, read, 0), rolled.sampler_logps, atol=1e-4)
    again = policy.generate(_prompts(), seed=3, max_new_tokens=5, temperature=0.7)
    assert (again.seqs.tokens == rolled.seqs.tokens).all()
    other = policy.generate(_prompts(), seed=4, max_new_tokens=5, temperature=0.7)
    assert (other.seqs.tokens != rolled.seqs.tokens).any()


def test_the_heads_that_are_not_asked_for_are_left_out():
    policy = Policy(_source("policy"), "--checkpoint")
    assert "value_head" not in policy.params["ends"] and policy.config.outputs == ("lm",)


def test_reward_scores_are_read_at_each_branchs_last_real_token():
    source = _source("reward")
    model = RewardModel(source, "--checkpoint")
    rng = np.random.default_rng(1)
    segments = np.ones((3, 2, 8), np.int32)
    segments[0, 1, 5:] = 0
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), segments.shape) * segments
    seqs = Sequences(tokens=rng.integers(0, 256, segments.shape).astype(np.int32), positions=positions, segment_ids=segments,
                     loss_mask=segments.astype(bool))
    found = model.scores(Comparisons(seqs=seqs))
    nets = Networks({"reward": jax.tree.map(jnp.asarray, source.params)}, {}, NetworkSpec(reward=source.config))
    for b in range(3):
        for k in range(2):
            one = jax.tree.map(lambda x: jnp.asarray(x[b : b + 1, k, : segments[b, k].sum()]), seqs)  # noqa: B023
            wanted = masking.at_last_real(nets.reward(one).scores, one.segment_ids)[0]
            np.testing.assert_allclose(found[b, k], wanted, rtol=1e-5, atol=1e-6)


def test_the_wrong_network_and_too_long_a_row_are_refused():
    with pytest.raises(UserError, match=r"--judge = 'here' is a policy checkpoint"):
        RewardModel(_source("policy"), "--judge")
    with pytest.raises(UserError, match="is a reward checkpoint"):
        Policy(_source("reward"), "--checkpoint")
    with pytest.raises(UserError, match=r"context of 24"):
        Policy(_source("policy"), "--checkpoint").generate(_prompts(), seed=0, max_new_tokens=30, temperature=1.0)


class _Set:
    """Four prompts, `samples` rows each."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def eval_batches(self):
        one = _prompts()
        rows = jax.tree.map(lambda x: np.repeat(x, self.samples, 0), one)
        yield rows.replace(sample_ids=np.tile(np.arange(self.samples, dtype=np.int32), 4))

    def messages(self, prompt_id):
        return [{"role": "user", "content": f"prompt {prompt_id}"}]

    def __len__(self):
        return 4


def test_a_policy_against_itself_ties_and_has_no_distance():
    policy = Policy(_source("policy"), "--checkpoint")
    gold = lambda prompt, response: (len(response) % 5) / 4  # noqa: E731
    ours = compare.evaluate(policy, policy, _Set(1), _Set(3), gold, max_new_tokens=5, temperature=1.0, seed=0)
    assert ours.golds().shape == (4, 3) and len(ours.greedy) == 4
    row = compare.row(ours, ours)
    assert row["win_vs_sft"] == 0.5 and row["seq_kl"] == 0.0
    assert row["win_ci95"][0] <= 0.5 <= row["win_ci95"][1]
    assert compare.row(ours, None)["win_vs_sft"] is None
    other = Policy(_source("policy", seed=1), "--checkpoint")
    moved = compare.evaluate(other, policy, _Set(1), _Set(3), gold, max_new_tokens=5, temperature=1.0, seed=0)
    assert compare.row(moved, ours)["seq_kl"] > 0


@pytest.mark.parametrize(("samples", "rows", "wanted"), [
    (4, 0, (4, 0)), (4, 8, (4, 8)), (4, 6, (4, 4)), (4, 3, (2, 2)), (100, 64, (50, 50)), (7, 5, (1, 5)), (1, 64, (1, 64)),
])
def test_samples_of_a_prompt_go_into_the_rows_at_once(samples, rows, wanted):
    assert shares(samples, rows) == wanted


def test_a_prompts_samples_share_its_prefill_and_no_kl_is_measured_against_nobody(monkeypatch):
    """The same samples, drawn in groups and not, a few rows at once and all; the groups reach the sampler."""
    policy, asked = Policy(_source("policy"), "--checkpoint"), []
    original = Policy.generate
    monkeypatch.setattr(Policy, "generate", lambda self, prompts, **how: asked.append(how) or original(self, prompts, **how))
    gold = lambda prompt, response: len(response) / 10  # noqa: E731
    how = {"max_new_tokens": 5, "temperature": 1.0, "seed": 0}
    plain = compare.evaluate(policy, policy, _Set(1), _Set(4), gold, **how)
    assert [one.get("group_size", 1) for one in asked] == [1, 1] and compare.row(plain, None)["seq_kl"] == 0.0
    for rows, group, slots in ((0, 4, 0), (3, 2, 2)):
        asked.clear()
        found = compare.evaluate(policy, None, _Set(1), _Set(4), gold, samples=4, rows=rows, **how)
        assert [one.get("group_size", 1) for one in asked] == [1, group] and [one["slots"] for one in asked] == [rows, slots]
        assert [record["response"] for record in found.sampled] == [record["response"] for record in plain.sampled]
        assert "seq_kl" not in found.sampled[0] and compare.row(found, None)["seq_kl"] is None


def test_the_best_of_several_is_what_the_scores_say():
    records = [{"prompt_id": p, "sample_id": s, "gold": float(10 * p + s)} for p in range(3) for s in range(4)]
    ours = compare.Evaluation([], records)
    row = compare.best_row(ours, np.array([0, 3, 1, 2, 9, 1, 1, 1, 0, 0, 5, 0.0]), ours)
    assert row["gold_best"] == (1 + 10 + 22) / 3 and row["best_of"] == 4 and row["kl_bound"] == pytest.approx(np.log(4) - 0.75)
    assert row["win_best"] == pytest.approx(np.mean([1.5 / 4, 0.5 / 4, 2.5 / 4])) and "win_best" not in compare.best_row(ours, np.zeros(12), None)


def test_what_a_gold_cannot_read_is_refused_beforehand():
    def gold(prompt, response):
        if prompt == "prompt 2":
            raise ValueError("no question")
        return 0.0

    class Silent(_Set):
        def messages(self, prompt_id):
            return [{"role": "system", "content": "s"}] if prompt_id == 3 else super().messages(prompt_id)

    with pytest.raises(UserError, match=r"--gold = 'g' does not fit --data = 'f', whose prompt 3 it cannot read \(no question\)"):
        check_prompts(_Set(1), gold, "f", "--gold = 'g'")
    with pytest.raises(UserError, match=r"--data = 'f': prompt 4 has no message of the user's"):
        check_prompts(Silent(1), lambda prompt, response: 0.0, "f", "--gold = 'g'")
    check_prompts(_Set(1), lambda prompt, response: 0.0, "f", "--gold = 'g'")
