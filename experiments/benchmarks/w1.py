"""Workload W1, one phase per process: prints one JSON line with the median seconds of a step.

Llama shape, hidden 256, 4 layers, 8 query / 4 kv heads, head_dim 32, mlp 688, vocabulary 8192, untied, float32 (7.1 M parameters). Training:
8 × 256 tokens (128 prompt + 128 response), pairwise objectives 8 pairs; AdamW, no clipping. Generate: 16 prompts of 64, 128 new tokens,
temperature 1. PPO and GRPO iteration: 16 rollouts, prompt 64, 64 new tokens, one epoch, KL to a reference (GRPO also without); GRPO in groups of 4;
the reward is the share of even token ids, in the program; old log-probs are those of the update's own pass. The step
computes gradient norm and entropy metrics besides; what a peer computes beyond that is its own.

    python experiments/benchmarks/w1.py --phase dpo --steps 16
"""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from rlhf_jax import distributed, objectives, sampling, sharding
from rlhf_jax.cli.main import script
from rlhf_jax.models import ModelConfig, Networks, NetworkSpec, transformer
from rlhf_jax.train import online
from rlhf_jax.train import optimizer as optimizers
from rlhf_jax.train.step import make_step
from rlhf_jax.types import Comparisons, Prompts, Sequences, TrainState

ONLINE = ("ppo", "grpo", "grpo_no_reference")
PHASES = ("sft", "reward", "dpo", "generate", *ONLINE)
WARM = 3
VOCAB, PROMPT, TOKENS = 8192, 128, 256
NEVER_STOP = (VOCAB - 1,)

flags.DEFINE_enum("phase", "sft", PHASES, "what to time")
flags.DEFINE_integer("steps", 16, "timed and warm-up steps")

OPTIMIZER = dict(
    name="adamw", lr=1e-4, schedule="constant", warmup_steps=0, end_lr_ratio=1.0, b1=0.9, b2=0.999, eps=1e-8, muon_beta=0.95,
    weight_decay=0.0, clip_norm=0.0, ema_decay=0.0, moment_dtype="float32",
)
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": dict(name="sft", label_smoothing=0.0, z_loss=0.0),
    "reward": dict(name="reward", center_coef=0.0),
    "dpo": dict(name="dpo", beta=0.1),
    "ppo": {"name": "ppo", **objectives.load("ppo").DEFAULTS, "missing_eos_penalty": 0.0},
    "grpo": {"name": "grpo", **objectives.load("grpo").DEFAULTS, "missing_eos_penalty": 0.0},
    "grpo_no_reference": {"name": "grpo", **objectives.load("grpo").DEFAULTS, "missing_eos_penalty": 0.0, "beta": 0.0},
}


def model(*outputs: str) -> ModelConfig:
    """W1's network."""
    return ModelConfig(
        vocab_size=VOCAB, hidden=256, layers=4, heads=8, kv_heads=4, head_dim=32, mlp=688, context=1024, rope_theta=1e4, norm_eps=1e-5,
        tied=False, dropout=0.0, param_dtype="float32", compute_dtype="float32", scan_layers=False, remat="none", logits_chunk=0,
        outputs=outputs,
    )


def rows(*lead: int) -> Sequences:
    """Random rows whose last TOKENS − PROMPT tokens are trained on."""
    shape = (*lead, TOKENS)
    at = np.broadcast_to(np.arange(PROMPT, TOKENS, dtype=np.int32), (*lead, TOKENS - PROMPT))
    return Sequences(
        tokens=jnp.asarray(np.random.default_rng(0).integers(4, VOCAB - 1, shape), jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32), shape), segment_ids=jnp.ones(shape, jnp.int32),
        loss_mask=jnp.broadcast_to(jnp.arange(TOKENS) >= PROMPT, shape), loss_positions=jnp.asarray(at),
    )


def prompts(batch: int, group: int) -> Prompts:
    """`batch` rows of 64 prompt tokens, `group` rows per prompt."""
    drawn = np.random.default_rng(1).integers(4, VOCAB - 1, (batch // group, 64)).repeat(group, 0)
    return Prompts(
        tokens=jnp.asarray(drawn, jnp.int32), positions=jnp.broadcast_to(jnp.arange(64, dtype=jnp.int32), drawn.shape),
        segment_ids=jnp.ones(drawn.shape, jnp.int32), prompt_ids=jnp.arange(batch, dtype=jnp.int32) // group,
        sample_ids=jnp.arange(batch, dtype=jnp.int32) % group, group_ids=jnp.arange(batch, dtype=jnp.int32) // group,
    )


def build(phase: str) -> tuple[Callable[[Any], Any], Any]:
    """A function that does one step of `phase` on its own last result, and what to start it with."""
    mesh = distributed.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=1)
    key = jax.random.key(0)
    network = "reward" if phase == "reward" else "policy"
    configs = {network: model("score" if network == "reward" else "lm")}
    if phase == "ppo":
        configs["critic"] = model("value")
    spec = NetworkSpec(**configs)
    params = {name: transformer.init(config, jax.random.fold_in(key, i)) for i, (name, config) in enumerate(configs.items())}
    if phase == "generate":
        run = sharding.jit(
            lambda p, key: sampling.generate(Networks(p, {}, spec), prompts(16, 1), key, iteration=0, max_new_tokens=128, temperature=1.0,
                                             top_k=0, top_p=1.0, stop_ids=NEVER_STOP, pad_id=0), mesh)
        return lambda _: run(params, key), None
    frozen = {"ref": jax.tree.map(jnp.copy, params["policy"])} if phase in ("dpo", "ppo", "grpo") else {}
    objective, group = objectives.bind(OBJECTIVES[phase]), 1 if phase == "ppo" else 4
    tx, rate = optimizers.build(OPTIMIZER, 1000)
    carry = objective.init_carry(Networks(params, frozen, spec))
    state = jax.jit(lambda p: TrainState(step=jnp.int32(0), batch_index=jnp.int32(0), params=p, opt_state=tx.init(p), key=key, carry=carry))(params)
    step = make_step(objective, spec, tx, rate, microbatches=1, epochs=1, minibatches=1)
    if phase in ONLINE:
        options = {"max_new_tokens": 64, "top_k": 0, "top_p": 1.0, "slots": 0, "old_logps": "trainer"}
        rollout = online.make_rollout(spec, options, stop_ids=NEVER_STOP, pad_id=0, group_size=group)
        step = online.fuse(rollout, lambda p, f, r: (r.replace(scores=((r.seqs.tokens % 2 == 0) & r.seqs.loss_mask).mean(-1) * 2), {}), step)
        batch: Any = prompts(16, group)
    else:
        batch = rows(8) if phase == "sft" else Comparisons(seqs=rows(8, 2))
    jitted = sharding.jit(step, mesh, donate=(0,))
    return lambda state: jitted(state, frozen, batch)[0], state


def main(_: list[str]) -> None:
    """Times the phase."""
    start = time.time()
    run, value = build(flags.FLAGS.phase)
    times = []
    for _step in range(flags.FLAGS.steps):
        before = time.perf_counter()
        value = jax.block_until_ready(run(value))
        times.append(time.perf_counter() - before)
    print(json.dumps({
        "phase": flags.FLAGS.phase, "median_s": round(statistics.median(times[WARM:]), 4), "min_s": round(min(times[WARM:]), 4),
        "first_s": round(times[0], 2), "n": len(times) - WARM, "startup_s": round(time.time() - start - sum(times[1:]), 2),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "jax": jax.__version__,
    }))


if __name__ == "__main__":
    script(main)
