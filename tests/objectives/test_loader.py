"""The loader: names, dotted paths, and one clear sentence for each mistake."""

from __future__ import annotations

import pathlib
import sys
import textwrap

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from rlhf_jax import objectives
from rlhf_jax.errors import UserError
from rlhf_jax.types import Comparisons, Rollout, Sequences
from tests.objectives import tabular
from tests.objectives.settings import CONFIGS

USERS = '''
from __future__ import annotations
import chex
import jax
from rlhf_jax.ops.masking import loss_tokens, masked_mean
from rlhf_jax.types import Array, Comparisons, Mean

def simpo_loss(chosen: Array, rejected: Array, *, beta: float, gamma: float) -> Array:
    chex.assert_equal_shape([chosen, rejected])
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) - gamma)

def loss(nets, batch: Comparisons, keys, *, beta, gamma):
    logps = nets.policy(batch.seqs, keys).logps
    chosen, rejected = masked_mean(logps, loss_tokens(batch.seqs)).T
    return {"simpo": Mean.of(simpo_loss(chosen, rejected, beta=beta, gamma=gamma), batch.real)}, {}
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes modules into a package of the current directory, which is not on the path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    written = []

    def write(name: str, text: str) -> str:
        (tmp_path / "theirs" / f"{name}.py").write_text(textwrap.dedent(text))
        written.append(f"theirs.{name}")
        return f"theirs.{name}"

    yield write
    for name in [*written, "theirs"]:
        sys.modules.pop(name, None)


def test_names_are_the_files_of_the_folder():
    folder = pathlib.Path(objectives.__file__).parent
    assert objectives.names() == sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    assert {"dpo", "grpo", "lm", "ppo", "reward", "sft"} <= set(objectives.names())


@pytest.mark.parametrize("name, batch_type", [("sft", Sequences), ("lm", Sequences), ("reward", Comparisons), ("dpo", Comparisons),
                                              ("ppo", Rollout), ("grpo", Rollout)])
def test_bind_reads_the_batch_type_from_the_annotation(name, batch_type):
    bound = objectives.bind(CONFIGS[name])
    assert bound.name == name and bound.batch_type is batch_type
    assert dict(bound.hyperparameters) == {k: v for k, v in CONFIGS[name].items() if k != "name"}
    assert isinstance(hash(bound), int)


def test_bind_takes_a_config_dict():
    assert objectives.bind(ml_collections.ConfigDict({"name": "dpo", "beta": 0.1})).hyperparameters["beta"] == 0.1


def test_missing_functions_are_the_identity():
    bound = objectives.bind({"name": "dpo", "beta": 0.1})
    batch = object()
    assert bound.init_carry(None) == {}
    assert bound.prepare(None, batch, {"a": 1}, None) == (batch, {"a": 1}, {})


def test_a_module_of_the_users_own(module):
    path = module("simpo", USERS)
    bound = objectives.bind({"name": path, "beta": 2, "gamma": 0.5})
    assert bound.batch_type is Comparisons and bound.hyperparameters["beta"] == 2.0 and isinstance(bound.hyperparameters["beta"], float)
    rng = np.random.default_rng(0)
    terms, _ = bound.loss(tabular.nets(rng, 5), tabular.comparisons(rng, 4, 8, 5), None)
    assert jnp.isfinite(terms["simpo"].compute()) and float(terms["simpo"].count) == 4
    with pytest.raises(UserError, match=r"config\.objective\.gamma is 'x': it must be a float"):  # typed by simpo_loss, not by loss
        objectives.bind({"name": path, "beta": 2.0, "gamma": "x"})
    assert str(module) not in sys.path


@pytest.mark.parametrize("config, sentence", [
    ({"name": "dop", "beta": 0.1}, r"config\.objective\.name is 'dop'.*did you mean 'dpo'"),
    ({"name": "zzzzz"}, r"legal names are .*dpo, .*grpo, .*sft"),
    ({"beta": 0.1}, r"config\.objective\.name is None"),
    ({"name": "no.such.module"}, r"no module 'no'"),
    ({"name": "rlhf_jax.errors"}, r"without a function `loss"),
    ({"name": "dpo", "bta": 0.1}, r"^config\.objective\.bta is not a hyper-parameter of dpo \(did you mean 'beta'\?\)$"),
    ({"name": "dpo"}, r"config\.objective lacks beta"),
    ({"name": "ppo", "clip": 0.2}, r"lacks correction, .*entropy_coef, gamma, kl_coef"),
    ({"name": "dpo", "beta": "0.1"}, r"config\.objective\.beta is '0\.1': it must be a float"),
    ({"name": "dpo", "beta": True}, r"beta is True: it must be a float"),
    ({"name": "dpo", "beta": None}, r"beta is None: it must be a float"),
    ({"name": "dpo", "beta": float("nan")}, r"beta is nan"),
    ({**CONFIGS["ppo"], "whiten_rewards": 1}, r"whiten_rewards is 1: it must be a bool"),
    ({"name": "dpo", "beta": -0.1}, r"^config\.objective\.beta = -0\.1: dpo needs it in \[1e-06, inf\]$"),
    ({**CONFIGS["grpo"], "kl_in": "rewards"}, r"^config\.objective\.kl_in is 'rewards', which is none of its values \(did you mean 'reward'\?\)$"),
    ({**CONFIGS["ppo"], "kl_estimator": 3}, r"kl_estimator is 3: it must be a str"),
])
def test_mistakes_are_one_clear_sentence(config, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        objectives.bind(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text, sentence", [
    ("def loss(nets, batch, keys): ...", "annotate `batch`"),
    ("def loss(nets, data, keys): ...", r"loss takes \(nets, data, keys, …\), but it must take \(nets, batch, keys"),
    ("def loss(nets, batch: dict, keys, *, beta=0.1): ...", "gives beta a default"),
    ("def loss(nets, batch: dict, keys, **rest): ...", "must take"),
    ("def loss(nets, batch: dict, keys): ...\ndef prepare(nets, batch, carry): ...", "prepare takes"),
])
def test_a_module_that_breaks_the_protocol(module, text, sentence):
    with pytest.raises(UserError, match=sentence):
        objectives.bind({"name": module("broken", text)})


def test_an_error_inside_a_users_module_keeps_its_own_message(module):
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        objectives.load(module("needy", "import not_installed_anywhere"))


def test_annotations_that_only_a_type_checker_sees_do_no_harm(module):
    path = module("checked", """
        from __future__ import annotations
        from typing import TYPE_CHECKING
        from rlhf_jax.types import Sequences
        if TYPE_CHECKING:
            from somewhere import Nets
        def loss(nets: Nets, batch: Sequences, keys, *, beta: float, mode: str | None): ...
    """)
    bound = objectives.bind({"name": path, "beta": 1, "mode": None})
    assert bound.batch_type is Sequences
    with pytest.raises(UserError, match="beta is 'x'"):
        objectives.bind({"name": path, "beta": "x", "mode": None})


def test_ranges_of_a_users_own(module):
    path = module("ranged", """
        from rlhf_jax.types import Sequences
        RANGES = {"beta": (0, 1), "mode": ("soft", "hard"), "kind": {"wide": abs}}
        def loss(nets, batch: Sequences, keys, *, beta, mode, kind): ...
    """)
    good = {"name": path, "beta": 1, "mode": "hard", "kind": "wide"}
    assert dict(objectives.bind(good).hyperparameters) == {key: value for key, value in good.items() if key != "name"}
    for key, value, sentence in [("beta", 1.5, r"beta = 1\.5: .* needs it in \[0, 1\]"), ("kind", 2, "kind is 2, .* legal names are wide"),
                                 ("mode", "none", "mode is 'none', .* legal names are hard, soft"), ("mode", ["hard"], r"mode is \['hard'\]")]:
        with pytest.raises(UserError, match=sentence):
            objectives.bind({**good, key: value})


def test_prepare_sees_the_batch_first_so_its_annotation_wins(module):
    path = module("own_batch", """
        from __future__ import annotations
        from flax import struct
        from rlhf_jax.types import Rollout
        class Mine(struct.PyTreeNode):
            rollout: Rollout
        def prepare(nets, batch: Rollout, carry, key):
            return Mine(rollout=batch), carry, {}
        def loss(nets, batch: Mine, keys): ...
    """)
    assert objectives.bind({"name": path}).batch_type is Rollout
