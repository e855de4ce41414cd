"""Every file in configs/: its preset and its `:tiny` are legal, and one whole step of each traces on shapes alone, nothing allocated."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from rlhf_jax import envs, objectives
from rlhf_jax.cli.configs import load_config
from rlhf_jax.data import sample_file
from rlhf_jax.errors import UserError
from rlhf_jax.models import transformer
from rlhf_jax.train import online
from rlhf_jax.train.assemble import Experiment, Start, assemble
from rlhf_jax.train.config import check
from rlhf_jax.train.metric_names import is_standard
from rlhf_jax.train.programs import Programs
from rlhf_jax.train.step import make_step
from rlhf_jax.types import Prompts
from tests.train.runs import CACHE, CONFIGS

FILES = sorted(CONFIGS.glob("*.py"))
VARIANTS = ("", "tiny", "demo")
NAMES = [path.stem for path in FILES]


def filled(config: ConfigDict, workdir: pathlib.Path) -> ConfigDict:
    """The config with sample files, and a folder, where a preset leaves a path to its user."""
    environment = config.env.name if "env" in config else ""
    for key in ("train", "valid"):
        config.data[key] = config.data[key] or (envs.sample_file(environment) if environment else sample_file(config.data.kind))
    config.data.cache = str(CACHE)
    if config.tokenizer.kind == "inherit":
        config.init_from = config.init_from or str(workdir)
    if config.tokenizer.kind == "file":
        config.tokenizer.path = str(workdir)
    needs = objectives.bind(config.objective.to_dict()).needs
    if config.data.kind == "prompt" and "reward" in needs and not config.reward_fn and not config.rewards and not environment:
        config.reward_from = config.reward_from or str(workdir)
    if needs & {"reference", "teacher"}:
        config.reference_from = config.reference_from or "init"
    if "ptx" in needs:
        config.ptx.train = config.ptx.train or sample_file(config.ptx.kind)
    return config


def problems(path: pathlib.Path, workdir: pathlib.Path) -> list[str]:
    """What is wrong with a config file: variants that are missing or illegal, and unknown ones that are not refused."""
    found = []
    for variant in ("", "tiny"):
        try:
            check(filled(load_config(f"{path}:{variant}"), workdir))
        except UserError as error:
            found.append(f"{path.name}:{variant}: {error}")
    try:
        load_config(f"{path}:no_such_variant")
        found.append(f"{path.name} takes any variant for its preset")
    except UserError as error:
        if "no_such_variant" not in str(error):
            found.append(f"{path.name} does not name the unknown variant: {error}")
    return found


def test_there_is_a_config_per_objective() -> None:
    trained = {path.stem: load_config(str(path)).objective.name for path in FILES}
    assert {name for name in objectives.names() if trained.get(name) != name} == set()


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_config_is_legal(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert problems(path, tmp_path) == []


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_docstring_is_the_launch_command(path: pathlib.Path) -> None:
    said = path.read_text().split('"""')[1]
    assert f"rlhf-jax train --config configs/{path.name} " in said
    assert f"rlhf-jax train --config configs/{path.name}:tiny " in said


@pytest.mark.parametrize("path", FILES, ids=NAMES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_differ_in_values_only(path: pathlib.Path, variant: str) -> None:
    """No variant adds or drops a key, and none changes a value's type."""
    config, preset = (dict(_leaves(load_config(f"{path}:{name}"))) for name in (variant, ""))
    assert config.keys() == preset.keys()
    assert {key for key in config if type(config[key]) is not type(preset[key])} == set()


def _leaves(config: ConfigDict, prefix: str = "") -> Any:
    for key, value in config.items():
        yield from _leaves(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [(prefix + key, value)]


WITHOUT_TINY = '''
from ml_collections import ConfigDict
def get_config(arg=""):
    c = ConfigDict({values})
    if arg:
        raise ValueError(f"mine.py:{{arg}}: there are no variants")
    return c
'''


def test_a_config_without_tiny_is_found(tmp_path: pathlib.Path) -> None:
    values = load_config(f"{CONFIGS / 'sft.py'}:tiny").to_dict()
    path = tmp_path / "mine.py"
    path.write_text(WITHOUT_TINY.format(values=values))
    (problem,) = problems(path, tmp_path)
    assert "mine.py:tiny" in problem and "no variants" in problem

    path.write_text(path.read_text().replace("if arg:", 'if arg and arg != "tiny":'))
    assert problems(path, tmp_path) == []
    path.write_text(path.read_text().replace("'batch_size': 4", "'batch_size': 5"))
    assert [problem.split(":")[1] for problem in problems(path, tmp_path)] == ["", "tiny"]
    path.write_text(path.read_text().replace("'batch_size': 5", "'batch_size': 4").replace('if arg and arg != "tiny":', "if False:"))
    assert problems(path, tmp_path) == ["mine.py takes any variant for its preset"]


def test_unknown_variant() -> None:
    with pytest.raises(UserError, match=r"sft\.py:huge.*the variants are tiny"):
        load_config(f"{CONFIGS / 'sft.py'}:huge")


def test_sft_preset_is_common_practice() -> None:
    c = load_config(str(CONFIGS / "sft.py"))
    assert 1e-5 <= c.optimizer.lr <= 5e-5
    assert 32 <= c.run.batch_size <= 256
    assert c.run.steps == 0 and 1 <= c.run.data_epochs <= 3
    assert 100 <= c.optimizer.warmup_steps <= 1000
    assert c.optimizer.clip_norm == 1.0
    assert (c.optimizer.name, c.optimizer.weight_decay) == ("adamw", 0.01)
    assert c.model.context == c.data.max_length == 2048


# --- one step on shapes alone ---


def _abstract(path: pathlib.Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """The assembled experiment with every frozen array a shape: the preset's networks, from scratch, on bytes."""
    config = load_config(f"{path}:{variant}")
    config.tokenizer.kind = "byte"
    if config.data.kind == "prompt" and "reward" in objectives.bind(config.objective.to_dict()).needs and not config.env.name:
        config.reward_fn, config.rewards, config.reward_normalise = "rlhf_jax.rewards.rules.brevity", (), False
    original = Start.frozen
    monkeypatch.setattr(Start, "frozen", lambda self, **how: jax.eval_shape(functools.partial(original, self, **how)))
    monkeypatch.setattr(Start, "state", lambda self: pytest.fail("a state was allocated"))
    checked, objective = check(filled(config, path))
    return assemble(checked, objective)


def _parameters(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# These differ from a base in little, and tests of objectives run each one's loss: CI traces those with plumbing of their own, `:tiny` alone.
OWN_PLUMBING = ("kto", "plackett_luce", "process_reward", "ppo_ptx", "nash_md", "online_dpo", "gkd", "tr_dpo", "grpo_guess", "grpo_rules")
DERIVED = [path for path in FILES if "like(__file__" in path.read_text()]


def _slow(path: pathlib.Path, variant: str) -> Any:
    return pytest.mark.slow if path in DERIVED and not (variant and path.stem in OWN_PLUMBING) else ()


@pytest.mark.parametrize(
    ("path", "variant"),
    [pytest.param(path, variant, id=f"{path.stem}-{variant}", marks=_slow(path, variant)) for path in FILES for variant in ("", "tiny")],
)
def test_step_traces(path: pathlib.Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exp = _abstract(path, variant, monkeypatch)
    networks = exp.start.abstract.params
    sizes = {name: _parameters(tree) for name, tree in networks.items()}
    for size in sizes.values():
        assert 5e4 < size < 2e5 if variant else 7e8 < size < 1.2e9, sizes
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(exp.frozen))
    measured = Programs(exp).trace()
    validation = exp.config["validation"]
    assert validation["metric"] in measured
    assert all(is_standard(name) for name in measured)

    state, metrics = _step(exp)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), exp.start.abstract)
    assert all(is_standard(name) for name in metrics), sorted(metrics)
    assert any(name.startswith("loss/") for name in metrics)


def _step(exp: Experiment) -> tuple[Any, dict[str, Any]]:
    """One step under eval_shape; for prompts the fused iteration, with a reward model of the policy's size where there is a reward."""
    run = exp.config["run"]
    step = make_step(
        exp.objective, exp.spec, exp.optimizer, exp.rate, microbatches=run["microbatches"], epochs=run["epochs"], minibatches=run["minibatches"]
    )
    host = exp.batch(0)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), host)
    if not isinstance(host, Prompts):
        return jax.eval_shape(step, exp.start.abstract, exp.frozen, batch)
    assert exp.spec.policy is not None
    reward = dataclasses.replace(exp.spec.policy, outputs=("score",))
    frozen = {**exp.frozen, "reward": jax.eval_shape(functools.partial(transformer.init, reward), jax.random.key(0))}
    spec = dataclasses.replace(exp.spec, reward=reward)
    rollout = online.make_rollout(spec, exp.config["sampling"], stop_ids=(exp.tokenizer.end_id,), pad_id=exp.tokenizer.pad_id)
    fused = online.fuse(rollout, online.make_score(spec, 0.5, 2.0) if exp.scored else None, step)
    state, metrics, rolled = jax.eval_shape(fused, exp.start.abstract, frozen, batch)
    rows, new = exp.config["run"]["batch_size"], exp.config["sampling"]["max_new_tokens"]
    assert rolled.seqs.tokens.shape == (rows, exp.config["data"]["prompt_length"] + new)
    assert rolled.scores == (jax.ShapeDtypeStruct((rows,), jnp.float32) if exp.scored else None)
    return state, metrics
