"""Trains on Cloud TPU: `rlhf-jax launch [start|status|logs|stop]`. `--dry-run` prints the plan, every file and every command, and does nothing.

  rlhf-jax launch --backend queued --config configs/ppo.py --config.data.train=gs://B/prompts.jsonl --config.init_from=gs://B/runs/sft \\
    --config.reward_from=gs://B/runs/reward --config.mesh.multihost=True --topology v5e:4x4 --spot --name ppo-1 --project P --zone us-west4-a \\
    --workdir gs://B/runs/ppo-1 --dry-run
  rlhf-jax launch --backend queued --experiment demo --topology v5e:1x1 --name demo-1 --project P --zone us-west4-a --workdir gs://B/demo-1
  rlhf-jax launch logs --backend queued --name ppo-1 --project P --zone us-west4-a --workdir gs://B/runs/ppo-1

`start`, the default, stays and watches: it asks for new machines after a preemption and deletes them at the end. Interrupted, it leaves them; the
same command with the same --name and --workdir goes on. Exit codes: 0 done, 2 a mistake, 75 preempted too often, 1 crashed. See
rlhf_jax/launch/README.md.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

from absl import flags

from rlhf_jax.cli.configs import define_config, loaded_config
from rlhf_jax.errors import UserError, nearest
from rlhf_jax.launch import planning, topologies
from rlhf_jax.launch.plan import as_json, as_text
from rlhf_jax.launch.request import TREE, Request, checked_here, parse_secrets
from rlhf_jax.launch.runner import Runner

FLAGS_HELP = {
    "--backend queued|tpu-vm|xpk|sky": "queued resources, plain TPU VMs, Kubernetes by xpk, or SkyPilot",
    "--config FILE[:VARIANT]": "what to train, with --config.SECTION.KEY=VALUE as in `train`; or",
    "--experiment NAME": "run the whole experiments/NAME/pipeline.py on one host, its folder kept in the bucket",
    "--pipeline-flag=--FLAG=VALUE": "passed to the pipeline; repeat it",
    "--topology v5e:4x4": "generation and shape in chips: v4:2x2x4, v5e:4x4, v5p:4x4x4, v6e:16x16 …",
    "--slices N": "of that topology (default 1; more with queued and xpk)",
    "--[no]spot": "preemptible machines (default on demand)",
    "--name NAME": "of the machines and of the run (RUN_ID), the same at every restart",
    "--workdir gs://BUCKET/PATH": "the run's folder, the same at every restart; launch/ in it holds code, logs and outcomes",
    "--project P, --zone Z": "of Google Cloud",
    "--service-account EMAIL": "of the machines (default the project's)",
    "--runtime-version V": "software of the TPU VMs (default the one for JAX on that generation)",
    "--cluster C, --image I": "of xpk: the GKE cluster, and the base image (default python:3.12)",
    "--code tree|REQUIREMENT": "what runs: the working tree, packed (default), or what pip installs, e.g. git+https://github.com/ME/REPO@REF",
    "--secret VARIABLE=NAME": "an environment variable from the secret NAME in Secret Manager, never the value (with sky: --secret VARIABLE, read "
                              "where sky is called); repeat it",
    "--max-restarts N": "after crashes (default 5)",
    "--max-preemptions N": "(default 100)",
    "--[no]keep": "leave the machines up at the end",
    "--[no]detach": "end when the machines are asked for; nothing then replaces or deletes them but `launch stop`",
    "--[no]live": "`launch logs`: read on the machines, not in the bucket",
    "--plan-dir DIR": "where the plan's files are written (default runs/launch/NAME)",
    "--[no]dry-run": "print the plan and do nothing",
    "--[no]json": "print it as JSON",
}
OPERANDS = 1

define_config()
flags.DEFINE_enum("backend", None, list(planning.BACKENDS), "what makes the machines")
flags.DEFINE_string("topology", "", "generation and shape")
flags.DEFINE_integer("slices", 1, "of that topology")
flags.DEFINE_string("name", "", "of machines and run")
flags.DEFINE_string("workdir", "", "the run's folder")
flags.DEFINE_string("experiment", "", "pipeline to run")
flags.DEFINE_multi_string("pipeline-flag", [], "passed to the pipeline")
flags.DEFINE_string("code", TREE, "what runs")
flags.DEFINE_multi_string("secret", [], "VARIABLE=NAME")
flags.DEFINE_integer("max-restarts", 5, "after crashes")
flags.DEFINE_integer("max-preemptions", 100, "preemptions")
flags.DEFINE_string("plan-dir", "", "where files are written")
for _name in ("project", "zone", "service-account", "runtime-version", "cluster", "image"):
    flags.DEFINE_string(_name, "", "see FLAGS_HELP")
for _name in ("spot", "keep", "detach", "live", "dry-run", "json"):
    flags.DEFINE_bool(_name, False, "see FLAGS_HELP")


def main(operands: list[str]) -> int:
    """Runs the command on parsed flags."""
    options = flags.FLAGS
    action = operands[0] if operands else "start"
    if action not in planning.ACTIONS:
        raise UserError(f"launch {action!r} is no action{nearest(action, planning.ACTIONS)}")
    if options.backend is None:
        raise UserError(f"--backend is missing: {', '.join(planning.BACKENDS)}")
    if not options.name:
        raise UserError("--name is missing: name the run, e.g. --name ppo-1")
    if action == "start":
        if not options.topology:
            raise UserError("--topology is missing: generation and shape in chips, e.g. --topology v5e:4x4")
        plan = planning.start(_request(options.topology), _config(), detach=options.detach)
    else:
        plan = planning.act(_request(options.topology or "v5e:1x1"), action, live=options.live)  # a run that is there needs none
    if options["dry-run"].value:
        print(as_json(plan) if options.json else as_text(plan), end="")
        return 0
    return Runner(plan).run()


def _request(topology: str) -> Request:
    """The flags, parsed."""
    given: dict[str, Any] = flags.FLAGS.flag_values_dict()
    same = ("backend", "name", "slices", "workdir", "project", "zone", "spot", "code", "image", "cluster", "experiment", "keep")
    return Request(
        **{name: given[name] for name in same}, topology=topologies.parse(topology), root=os.curdir, runtime=given["runtime-version"],
        service_account=given["service-account"], secrets=parse_secrets(given["secret"]), max_restarts=given["max-restarts"],
        max_preemptions=given["max-preemptions"], pipeline_flags=tuple(given["pipeline-flag"]),
        folder=given["plan-dir"] or f"runs/launch/{given['name']}",
    )


def _config() -> dict[str, Any] | None:
    """The checked config, or None for an experiment."""
    from rlhf_jax.train.config import check, plain

    options = flags.FLAGS
    if options.experiment:
        if options.config is not None:
            raise UserError(f"--experiment {options.experiment!r} and --config: a pipeline names its own configs; give one of the two")
        known = {path.parent.name for path in pathlib.Path("experiments").glob("*/pipeline.py")}
        if options.experiment not in known:
            raise UserError(f"--experiment {options.experiment!r}: experiments/ has no such folder with a pipeline.py"
                            f"{nearest(options.experiment, known)}")
        return None
    return checked_here(plain(loaded_config()), check)
