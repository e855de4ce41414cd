"""Gold is known to the evaluation and the labeller alone, and is a reward only in the stage that says so: read off every module's syntax tree."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping

import pytest

from tests.house import Module, house, imports, recipes, within

GOLD = "rlhf_jax.rewards.gold"
KNOWS_GOLD = re.compile(r"rlhf_jax\.(eval|synth)(\..*)?|rlhf_jax\.cli\.eval|rlhf_jax\.rewards\.gold|experiments\..*")


def gold_imports(modules: Mapping[str, Module]) -> list[str]:
    """Modules that reach gold without a right to it: by an import, by a string that names it, or through others' imports."""
    found, edges = [], {}
    for module in modules.values():
        names = [name for name, _ in imports(module)]
        edges[module.name] = {_owner(name, modules) for name in names}
        if KNOWS_GOLD.fullmatch(module.name):
            continue
        found += [f"{module.name}:{line} imports {name}" for name, line in imports(module) if within(name, GOLD)]
        found += [f"{module.name}:{node.lineno} reads {ast.unparse(node)}" for node in ast.walk(module.tree)
                  if isinstance(node, ast.Attribute) and node.attr == "gold" and ast.unparse(node.value).endswith("rewards")]
        found += [f"{module.name}:{line} names {text!r}" for text, line in _strings(module) if re.search(r"rewards\s*[.:/]\s*gold", text)]
    for name in modules:
        reached, todo = set(), [name]
        while todo:
            todo += (new := edges.get(todo.pop(), set()) - reached)
            reached |= new
        if GOLD in reached and not KNOWS_GOLD.fullmatch(name):
            found.append(f"{name} reaches {GOLD} through its imports")
    return found


def _owner(name: str, modules: Mapping[str, Module]) -> str:
    """The module that an imported name lives in."""
    while name and name not in modules and name != GOLD:
        name = name.rpartition(".")[0]
    return name


def _strings(module: Module) -> Iterator[tuple[str, int]]:
    """String constants other than docstrings."""
    docs = {id(node.value) for node in ast.walk(module.tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value, node.lineno


def gold_rewards(modules: Mapping[str, Module]) -> list[str]:
    """Configs and experiments that name gold as a reward anywhere but in the stage labelled grpo_gold."""
    found = []
    for module in modules.values():
        parents = {child: node for node in ast.walk(module.tree) for child in ast.iter_child_nodes(node)}
        docs = {id(node.value) for node in ast.walk(module.tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(module.tree):
            if not (isinstance(node, ast.Constant) and isinstance(node.value, str)) or id(node) in docs:
                continue
            as_reward = bool(re.search(r"\bgold\b", node.value)) and _is_reward_fn(node, parents)
            if not as_reward and not re.search(r"rewards\s*[.:/]\s*gold", node.value):
                continue
            where = f"{module.name}:{node.lineno} names {node.value!r}"
            if not as_reward:
                found.append(f"{where}, and not as a reward_fn")
            elif module.name.startswith("configs") or "grpo_gold" not in _scope(node, parents):
                found.append(f"{where}, and not for the stage grpo_gold")
    return found


def _is_reward_fn(node: ast.AST, parents: Mapping[ast.AST, ast.AST]) -> bool:
    """Whether a constant is what some `reward_fn` is set to: a keyword, an assignment, a dict's entry or a command line's flag."""
    if "reward_fn=" in str(getattr(node, "value", "")):
        return True
    while node in parents and not isinstance(node, ast.stmt):
        inner, node = node, parents[node]
        if isinstance(node, ast.keyword):
            return node.arg == "reward_fn"
        if isinstance(node, ast.Dict):
            keys = [ast.unparse(key) for key, value in zip(node.keys, node.values) if key and value is inner]
            return any(key.strip("'\"").endswith("reward_fn") for key in keys)
    return isinstance(node, ast.Assign) and any("reward_fn" in ast.unparse(target) for target in node.targets)


def _scope(node: ast.AST, parents: Mapping[ast.AST, ast.AST]) -> str:
    """Source of the nearest enclosing function, or of the module-level statement."""
    while node in parents and not isinstance(node, (ast.FunctionDef, ast.Module)):
        last, node = node, parents[node]
    return ast.unparse(last if isinstance(node, ast.Module) else node)


def test_gold_is_known_to_the_evaluation_and_the_labeller_alone():
    assert GOLD in house(), "the rule guards a module that is gone"
    assert gold_imports({**house(), **recipes()}) == []


def test_gold_is_a_reward_in_the_stage_that_says_so_alone():
    assert gold_rewards(recipes()) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("rlhf_jax.train.new", "from rlhf_jax.rewards import gold"),
        ("rlhf_jax.train.new", "from rlhf_jax.rewards.gold import GOLD"),
        ("rlhf_jax.train.new", "import rlhf_jax.rewards.gold"),
        ("rlhf_jax.train.new", "from rlhf_jax import rewards\nrewards.gold.sort('', '')"),
        ("rlhf_jax.train.new", "import importlib\nimportlib.import_module('rlhf_jax.rewards.gold')"),
        ("rlhf_jax.train.new", "FUNCTION = 'rlhf_jax.rewards.gold.sort'"),
        ("rlhf_jax.rewards.rules", "from . import gold"),
        ("rlhf_jax.rewards.rules", "from .gold import sort"),
        ("rlhf_jax.data.new", "def f():\n    from rlhf_jax.rewards import gold"),
        ("rlhf_jax.cli.sample", "from rlhf_jax.rewards import gold"),
        ("configs.grpo", "from rlhf_jax.rewards import gold"),
        ("rlhf_jax.train.new", "from rlhf_jax.eval.new import f"),
    ],
)
def test_a_new_path_to_gold_is_caught(name, source):
    others = {**house(), "rlhf_jax.eval.new": Module("rlhf_jax.eval.new", f"from {GOLD} import sort as f")}
    assert gold_imports({**others, name: Module(name, source)}) != gold_imports(others)


@pytest.mark.parametrize(
    ("name", "source", "breaches"),
    [
        ("configs.grpo", "c.reward_fn = 'rlhf_jax.rewards.gold.sort'", 1),
        ("configs.grpo", "c.reward_fn = 'experiments.demo.gold.reward'", 1),
        ("configs.grpo", "c.reward_fn = 'rlhf_jax.rewards.rules.brevity'", 0),
        ("experiments.demo.pipeline", "def grpo(c):\n    c.reward_fn = 'rlhf_jax.rewards.gold.sort'", 1),
        ("experiments.demo.pipeline", "def f(c, stage):\n    if stage == 'grpo_gold':\n        c.reward_fn = 'rlhf_jax.rewards.gold.sort'", 0),
        ("experiments.demo.pipeline", "run('grpo_gold', reward_fn='rlhf_jax.rewards.gold.sort')", 0),
        ("experiments.demo.pipeline", "run('ppo', reward_fn='rlhf_jax.rewards.gold.sort')", 1),
        ("experiments.demo.pipeline", "run('grpo_gold', ['--config.reward_fn=rlhf_jax.rewards.gold.sort'])", 0),
        ("experiments.demo.pipeline", "def grpo_gold():\n    return 'rlhf_jax.rewards.gold.sort'", 1),
    ],
)
def test_gold_as_another_stages_reward_is_caught(name, source, breaches):
    assert len(gold_rewards({name: Module(name, source)})) == breaches
