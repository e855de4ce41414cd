"""The standard names of what is logged, each with its meaning and unit; every metric of a built-in objective is among them."""

from __future__ import annotations

import fnmatch

METRICS: dict[str, str] = {
    "loss": "the objective, Σ of its terms [nats, or the objective's own unit]",
    "loss/*": "one term of the objective, its coefficient included [nats, or the objective's own unit]",
    "objective/kl": "KL of the policy from the reference, KL(π ‖ ref): mean over the policy's responses of Σ log π/ref over tokens [nats]",
    "objective/kl_from_reference": "KL of the reference from the policy, KL(ref ‖ π), token by token where the policy goes: mean over the policy's "
                                   "responses of Σ 1 − r + r log r over tokens, r = ref/π [nats]",
    "objective/kl_coef": "weight of the KL penalty [reward per nat]",
    "objective/beta": "inverse temperature of the implicit reward, where it moves [reward per nat]",
    "objective/entropy": "entropy of the policy per response token; its collapse is GRPO's known failure [nats]",
    "objective/score": "reward of a completion before any KL penalty [reward]",
    "objective/score_std": "standard deviation of the scores over the batch [reward]",
    "objective/opponent_score": "reward of a completion that the opponent drew (reference, mixture), before any penalty [reward]",
    "objective/preference": "preference for the policy's sample over the opponent's; where it is a verdict, a tie counts one half [0,1]",
    "objective/non_score_reward": "KL penalty in the reward, Σ over tokens [reward]",
    "objective/rlhf_reward": "score plus KL penalty [reward]",
    "policy/ratio_p99": "probability ratio new/old, 99th percentile over the tokens of all updates, at most 7 % of its logarithm too high; ≥ 1 [1]",
    "policy/ratio_max": "probability ratio new/old, largest over the tokens of all updates, at most 7 % of its logarithm too high; ≥ 1 [1]",
    "policy/clip_frac": "fraction of tokens (RLOO: of responses, whose ratio is their sequence's) whose ratio was clipped [0,1]",
    "policy/clip_frac_low": "fraction of tokens, or responses, whose ratio was clipped for being too small [0,1]",
    "policy/clip_frac_high": "fraction of tokens, or responses, whose ratio was clipped for being too large [0,1]",
    "policy/approx_kl": "KL(old ‖ new) estimated on the rollout's tokens [nats per token]",
    "policy/pair_weight": "weight of a pair, how far the policy would write both responses itself, mean over pairs [1]",
    "policy/correction_mean": "importance correction old/sampler, mean over tokens [1]",
    "policy/correction_max": "importance correction old/sampler, largest over tokens [1]",
    "policy/correction_frac": "fraction of tokens whose importance correction was capped or masked [0,1]",
    "policy/off_policy_frac": "fraction of tokens in rows left out because the policy has moved too far from their sampler [0,1]",
    "value/clip_frac": "fraction of tokens whose value update was clipped [0,1]",
    "value/explained_variance": "1 − Var(return − value) / Var(return); 1 is perfect, 0 a constant guess [≤ 1]",
    "reward/chosen": "reward, implicit or learned, of the preferred branch [reward]",
    "reward/rejected": "reward, implicit or learned, of the other branch [reward]",
    "reward/margin": "reward of the preferred branch minus the other's; of single responses, distance from the baseline on the right side [reward]",
    "reward/accuracy": "fraction of comparisons ranked right, or of single responses on the right side of the baseline [0,1]",
    "reward/step_accuracy": "fraction of labelled steps whose verdict is right [0,1]",
    "reward/error": "|reward − rating|, mean over responses [rating]",
    "reward/baseline": "what the rewards of single responses are compared with: KTO's β z, BCO's δ [reward]",
    "reward/mean": "reward over all completions [reward]",
    "reward/std": "standard deviation of the rewards [reward]",
    "reward/failed": "share of the completions on which a reward failed; config.reward_failure says what becomes of them [0,1]",
    "reward/*": "one component of the reward, by name [reward]",
    "logps/chosen": "log-prob of the preferred branch, Σ over tokens; it may fall while the margin grows [nats]",
    "logps/rejected": "log-prob of the other branch, Σ over tokens [nats]",
    "logps/accuracy": "share of pairs whose better response is the likelier one, Σ log π(y_w) > Σ log π(y_l), ties one half [0,1]",
    "logps/mean": "log-prob per trained token [nats]",
    "optimizer/lr": "learning rate [1]",
    "optimizer/grad_norm": "global norm of the gradient before clipping [1]",
    "optimizer/skipped": "share of this batch's updates skipped because a gradient or an update was not finite [1]",
    "optimizer/empty": "share of this batch's updates left out because none of their rows trains anything: filler, or no score [1]",
    "optimizer/nonfinite_run": "updates skipped in a row up to now [updates]",
    "rollout/length": "response tokens per completion [tokens]",
    "rollout/truncated": "fraction of completions without a stop token [0,1]",
    "rollout/zero_variance_groups": "fraction of groups whose rewards are all equal and give no gradient [0,1]",
    "rollout/filtered_groups": "fraction of groups left out because the reward gave all their samples the same score [0,1]",
    "rollout/rounds": "rounds of sampling for a batch, with config.schedule.refill; logged, as the next four, when it was sampled [rounds]",
    "rollout/dropped_groups": "share of the sampled groups that were dropped because all their scores are the same [0,1]",
    "rollout/surplus_groups": "share of the sampled groups that were dropped because the batch was full [0,1]",
    "rollout/filler_rows": "share of the batch's rows that are filler because the rounds were used up [0,1]",
    "rollout/sampled_score": "score over all that was sampled, dropped groups included; objective/score is that of the batch [reward]",
    "rollout/replayed": "share of the batch's rows that are earlier ones [0,1]",
    "rollout/ties": "fraction of pairs of samples whose scores are equal and give no gradient [0,1]",
    "rollout/unscored": "fraction of completions whose reward is unknown; they give no gradient [0,1]",
    "rollout/staleness": "age of the weights that sampled, iteration − version, mean over rows [iterations]",
    "rollout/logp_gap_mean": "|sampler − trainer log-prob|, both unfiltered and at one temperature, mean over tokens; with older samples also what "
                             "the policy has moved since [nats]",
    "rollout/logp_gap_p99": "the same, 99th percentile over tokens, at most 7 % too high [nats]",
    "rollout/logp_gap_max": "the same, largest over tokens [nats]",
    "rollout/turns": "turns of the policy per episode [turns]",
    "env/tool_calls": "tool calls that were tried, per episode [calls]",
    "env/tool_errors": "tool calls that were tried and gave no result, per episode [calls]",
    "env/malformed_calls": "what opened a tool call and was none, or named no tool, per episode [calls]",
    "env/failed": "share of the episodes on which the environment failed; config.reward_failure says what becomes of them [0,1]",
    "env/*": "what an environment counts, per episode, by name [1]",
    "data/tokens": "real tokens in the batch [tokens]",
    "data/loss_tokens": "tokens in the batch under its loss mask [tokens]",
    "data/padding": "fraction of the batch's slots that are padding [0,1]",
    "eval/*": "a measurement on held-out data; after eval/ stands what is measured [its unit]",
}


def describe(name: str) -> str | None:
    """Meaning and unit of a metric, None for a name outside the table (which is legal). `eval/` before a name means: on held-out data."""
    if name in METRICS:
        return METRICS[name]
    if name.startswith("eval/") and (meaning := describe(name.removeprefix("eval/"))):
        return f"on held-out data: {meaning}"
    patterns = [pattern for pattern in METRICS if "*" in pattern and fnmatch.fnmatchcase(name, pattern)]
    return METRICS[max(patterns, key=len)] if patterns else None


def is_standard(name: str) -> bool:
    """Whether the table describes `name`; every metric of a built-in objective is standard."""
    return describe(name) is not None
