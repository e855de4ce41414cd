"""What a run hands on: the averaged parameters that validation judged; and that no two uses of the run's key meet."""

import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.sampling import row_keys
from rlhf_jax.saved import load_source
from rlhf_jax.train.loop import train
from rlhf_jax.train.optimizer import EmaState, evaluation_params, params_ema
from rlhf_jax.types import Purpose
from tests.train.runs import metrics, tiny


def test_best_and_init_from_carry_the_average(tmp_path: pathlib.Path) -> None:
    config = tiny("sft", {"optimizer.ema_decay": 0.9, "optimizer.lr": 0.02, "validation.every": 4, "validation.batches": 0})
    train(config, str(tmp_path / "run"))
    judged = next(line["eval/loss/nll"] for line in metrics(tmp_path / "run") if "eval/loss/nll" in line)
    latest = load_source(str(tmp_path / "run"), "x").params
    best = load_source(str(tmp_path / "run" / "best"), "x").params
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, latest, best)))
    again = tiny("sft", {"init_from": str(tmp_path / "run"), "optimizer.lr": 1e-12, "run.steps": 1, "validation.every": 1, "validation.batches": 0})
    train(again, str(tmp_path / "again"))
    measured = next(line["eval/loss/nll"] for line in metrics(tmp_path / "again") if "eval/loss/nll" in line)
    assert measured == pytest.approx(judged, rel=1e-5)
    # Without the average the same run hands on other parameters.
    train(tiny("sft", {"optimizer.lr": 0.02}), str(tmp_path / "plain"))
    plain = load_source(str(tmp_path / "plain"), "x").params
    assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, latest, plain)))


def test_an_average_of_bfloat16_parameters_moves() -> None:
    ema = params_ema(0.999)
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    state = ema.init(params)
    for _ in range(1000):
        _, state = ema.update({"w": jnp.zeros(3, jnp.bfloat16)}, state, {"w": jnp.full(3, 2.0, jnp.bfloat16)})
    assert isinstance(state, EmaState)
    np.testing.assert_allclose(state.ema["w"], 2 - 0.999**1000, rtol=1e-4)
    assert evaluation_params(params, state)["w"].dtype == jnp.bfloat16


def test_finite_gradients_with_a_non_finite_update_are_skipped(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_jax.train import optimizer

    real = optax.adamw

    def explodes(*args, **options):
        inner = real(*args, **options)
        return optax.GradientTransformation(inner.init, lambda g, s, p=None: (jax.tree.map(lambda x: x * jnp.nan, g), inner.update(g, s, p)[1]))

    monkeypatch.setattr(optimizer.optax, "adamw", explodes)
    with pytest.raises(UserError, match="none of the 4 updates was applied"):
        train(tiny("sft"), str(tmp_path / "run"))
    kept = load_source(str(tmp_path / "run"), "x").params
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept))


def test_no_two_uses_of_the_runs_key_meet() -> None:
    key = jax.random.key(0)
    rows = row_keys(key, 1, jnp.arange(8), jnp.arange(8))
    seen = {tuple(np.asarray(jax.random.key_data(k)).tolist()) for k in rows}
    for purpose, a, b in itertools.product([p for p in Purpose if p is not Purpose.ROLLOUT], range(8), range(8)):
        other = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, purpose), a), b)
        assert tuple(np.asarray(jax.random.key_data(other)).tolist()) not in seen
    assert len(set(Purpose)) == 7


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("dpo", {"objective.beta": -1.0}, "config.objective.beta"),
        ("ppo", {"objective.lam": 7.0}, "config.objective.lam"),
        ("ppo", {"objective.clip": -0.2}, "config.objective.clip"),
        ("grpo", {"sampling.group_size": 1}, "config.sampling.group_size"),
        ("ppo", {"critic.kind": "shared", "critic.init_from": "nowhere"}, "config.critic.init_from"),
        ("sft", {"optimizer.b1": 1.0}, "config.optimizer.b1"),
        ("sft", {"model.rope_theta": 0.0}, "config.model.rope_theta"),
        ("sft", {"model.norm_eps": -1.0}, "config.model.norm_eps"),
    ],
)
def test_values_out_of_range_are_refused(name, changes, said, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        train(tiny(name, changes), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_that_died_before_its_first_checkpoint_leaves_the_folder_free(tmp_path: pathlib.Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": {"hidden": 10**9}}))
    assert train(tiny("sft"), str(tmp_path / "run")).step == 4


def test_the_control_tokens_of_a_foreign_tokenizer_are_remembered(tmp_path: pathlib.Path) -> None:
    from rlhf_jax.data.tokenizer import Tokenizer

    path = tmp_path / "tokenizer.json"
    Tokenizer.byte_level().save(path)
    path.write_text(path.read_text().replace("<|end|>", "</s>").replace("<|pad|>", "<unk>"))
    changes = {"tokenizer.kind": "file", "tokenizer.path": str(path), "tokenizer.end": "</s>", "tokenizer.pad": "<unk>"}
    (tmp_path / "template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    train(tiny("sft", {**changes, "data.template": str(tmp_path / "template.jinja")}), str(tmp_path / "run"))
    source = load_source(str(tmp_path / "run"), "x")
    assert (source.tokenizer.end, source.tokenizer.pad) == ("</s>", "<unk>")
    again = {"init_from": str(tmp_path / "run"), "tokenizer.kind": "inherit", "data.template": str(tmp_path / "template.jinja")}
    assert train(tiny("sft", again), str(tmp_path / "again")).step == 4
