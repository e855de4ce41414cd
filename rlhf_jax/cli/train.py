"""Trains what a config says, or resumes it: the same command again goes on from the newest intact checkpoint.

  rlhf-jax train --config configs/sft.py --config.data.train=demos.jsonl --workdir runs/sft
  rlhf-jax train --config configs/ppo.py:tiny --config.optimizer.lr=3e-4 --workdir runs/ppo_tiny
"""

from __future__ import annotations

from absl import flags

from rlhf_jax.cli.configs import define_config, loaded_config
from rlhf_jax.errors import DONE, PREEMPTED, UserError

FLAGS_HELP = {
    "--config FILE[:VARIANT]": "a Python file with get_config(variant) -> ConfigDict; configs/ has one per objective, `:tiny` runs anywhere",
    "--config.SECTION.KEY=VALUE": "overrides one value, e.g. --config.optimizer.lr=3e-4; the config file comments every key",
    "--workdir DIR": "where checkpoints, metrics.jsonl, samples.jsonl and TensorBoard logs go; gs:// works",
    "--[no]profile": "write a trace of a few steps to DIR/profile (TensorBoard's or Perfetto's trace viewer opens it)",
}

define_config()
flags.DEFINE_string("workdir", "", "this run's folder")
flags.DEFINE_bool("profile", False, "write a profiler trace")


def main() -> int:
    """Runs the command on parsed flags."""
    config = loaded_config()
    workdir = flags.FLAGS.workdir
    if not workdir:
        raise UserError("--workdir is missing: name a folder for this run, e.g. --workdir runs/sft")
    from rlhf_jax import distributed
    from rlhf_jax.train.loop import train

    result = train(config, workdir, profile=flags.FLAGS.profile)
    best = "" if result.best_step is None else f"; best validation {result.best_value:.6g} at step {result.best_step}"
    if distributed.is_lead():
        print(f"{result.stopped} at step {result.step}{best}; state {result.state_hash[:16]}; everything is in {workdir}")
    return PREEMPTED if result.stopped == "preempted" else DONE
