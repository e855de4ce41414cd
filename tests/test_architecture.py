"""The rules of the house, read off the syntax tree of every module: imports, sizes, docstrings. Who may know gold: test_gold;
asserted shapes: test_assertions.

Each rule is a function from sources to a list of breaches. It is run twice: on the package, where it must find none, and on sources that
break it on purpose, where it must find them.

Imports point downward only. Rooms of one level do not import each other; modules of one folder may.

    | level | rooms                                                                                                             |
    |-------|-------------------------------------------------------------------------------------------------------------------|
    | 0     | errors files                  leaves: they import nothing of ours                                                 |
    | 1     | types runlog                  runlog: the lines of metrics.jsonl                                                  |
    | 2     | ops                                                                                                               |
    | 3     | manifest dotted               the digests of a saved tree; what a config names by a dotted path                   |
    | 4     | objectives models data sharding distributed checkpoint endpoint                                                   |
    | 5     | saved sampling rewards envs   saved: a checkpoint with its model's config and its tokenizer                       |
    | 6     | eval                                                                                                              |
    | 7     | train synth report launch                                                                                         |
    | 8     | compile                                                                                                           |
    | 9     | cli                                                                                                               |
"""

from __future__ import annotations

import ast
from collections.abc import Mapping

import pytest

from tests.house import PACKAGE, PROTOCOL, Function, Module, house, imports, recipes, within

LEVELS = (
    ("errors", "files"),
    ("types", "runlog"),
    ("ops",),
    ("manifest", "dotted"),
    ("objectives", "models", "data", "sharding", "distributed", "checkpoint", "endpoint"),
    ("saved", "sampling", "rewards", "envs"),
    ("eval",),
    ("train", "synth", "report", "launch"),
    ("compile",),
    ("cli",),
)
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}

# A foreign package and the only rooms that may import it; () is nobody.
CONFINED: dict[str, tuple[str, ...]] = {
    "flax.linen": ("models",),
    "flax.core": ("models",),
    "orbax": ("checkpoint", "manifest"),
    "tensorflow": (),
    "experiments": (),
    "tests": (),
    "clu": (),
}
# A room and the foreign packages that it never imports.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "objectives": ("optax",),
    "data": ("jax", "jaxlib", "flax", "optax"),
    "errors": ("jax", "flax", "numpy"),
    "files": ("jax", "flax", "numpy"),
    "ops": ("optax", "flax.linen"),
    "sampling": ("optax", "flax"),
}

FILE_LINES, FUNCTION_LINES = 450, 70


# --- imports ---


def import_breaches(modules: Mapping[str, Module]) -> list[str]:
    """Imports that do not point downward, or that bring a foreign package where it may not be."""
    found = []
    for module in modules.values():
        for name, line in imports(module):
            where = f"{module.name}:{line} imports {name}"
            found += [f"{where}, which only {rooms or 'nobody'} may" for package, rooms in CONFINED.items()
                      if within(name, package) and module.room not in rooms]
            found += [f"{where}, which {module.room} may not" for package in FORBIDDEN.get(module.room, ()) if within(name, package)]
            if not within(name, PACKAGE):
                continue
            target = (name.split(".") + [""])[1]
            if not module.room:
                found.append(f"{where}: the package's __init__ imports nothing")
            elif target not in LEVEL:
                found.append(f"{where}: {target!r} is not in the table of levels")
            elif target != module.room and LEVEL[target] >= LEVEL[module.room]:
                found.append(f"{where}: {target} is not below {module.room}")
    return found


def test_imports_point_downward_and_foreign_packages_stay_in_their_rooms():
    assert import_breaches(house()) == []


def test_every_room_of_the_package_is_in_the_table():
    assert {module.room for module in house().values()} - {""} <= LEVEL.keys()


def test_configs_and_experiments_break_no_confinement():
    found = []
    for module in recipes().values():
        found += [f"{module.name}:{line} imports {name}" for name, line in imports(module)
                  if within(name, "tensorflow") or within(name, "flax.linen") or within(name, "orbax")]
    assert found == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("rlhf_jax.ops.new", "from rlhf_jax.models import ModelConfig"),
        ("rlhf_jax.ops.new", "import rlhf_jax.train.step as s"),
        ("rlhf_jax.types", "from rlhf_jax.ops import masking"),
        ("rlhf_jax.errors", "from rlhf_jax.types import Array"),
        ("rlhf_jax.objectives.new", "from rlhf_jax.models.networks import Networks"),
        ("rlhf_jax.objectives.new", "def f():\n    from rlhf_jax import sharding"),
        ("rlhf_jax.objectives.new", "from ..data import batches"),
        ("rlhf_jax.objectives.new", "import optax"),
        ("rlhf_jax.objectives.new", "from flax import linen as nn"),
        ("rlhf_jax.models.new", "from rlhf_jax.data.tokenizer import Tokenizer"),
        ("rlhf_jax.sampling.new", "from rlhf_jax.rewards import learned"),
        ("rlhf_jax.rewards.new", "from rlhf_jax.eval import statistics"),
        ("rlhf_jax.eval.new", "from rlhf_jax.train import step"),
        ("rlhf_jax.synth.new", "from rlhf_jax.train import step"),
        ("rlhf_jax.train.new", "from rlhf_jax.cli.main import run"),
        ("rlhf_jax.train.new", "import flax.linen"),
        ("rlhf_jax.train.new", "import importlib\nimportlib.import_module('rlhf_jax.cli.main')"),
        ("rlhf_jax.train.new", "from orbax import checkpoint"),
        ("rlhf_jax.manifest", "from rlhf_jax import checkpoint"),
        ("rlhf_jax.data.new", "import jax.numpy as jnp"),
        ("rlhf_jax.data.new", "import tensorflow as tf"),
        ("rlhf_jax.cli.new", "from experiments.demo import pipeline"),
        ("rlhf_jax.cli.new", "from rlhf_jax.unheard import of"),
    ],
)
def test_a_forbidden_import_is_caught(name, source):
    assert len(import_breaches({name: Module(name, source)})) >= 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("rlhf_jax.objectives.new", "from rlhf_jax.objectives._pairs import f\nfrom rlhf_jax.ops import kl\nimport jax, chex"),
        ("rlhf_jax.checkpoint", "from rlhf_jax import manifest\nimport orbax.checkpoint as ocp"),
        ("rlhf_jax.data.new", "from rlhf_jax.types import Sequences\nimport numpy, tensorflow_datasets"),
        ("rlhf_jax.models.new", "import flax.linen as nn\nfrom . import layout"),
        ("rlhf_jax.rewards.new", "from rlhf_jax.data.encode import Encoder"),
    ],
)
def test_a_legal_import_is_let_through(name, source):
    assert import_breaches({name: Module(name, source)}) == []


# --- sizes and docstrings ---


def oversized(modules: Mapping[str, Module]) -> list[str]:
    """Files and functions longer than a reader holds in mind."""
    found = []
    for module in modules.values():
        lines = module.source.count("\n")
        found += [f"{module.name} has {lines} lines"] if lines > FILE_LINES else []
        for node in ast.walk(module.tree):
            if isinstance(node, Function) and (length := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES:
                found.append(f"{module.name}.{node.name} has {length} lines")
    return found


def undocumented(modules: Mapping[str, Module]) -> list[str]:
    """Modules, public classes and public functions without a docstring. The protocol's functions are documented once, in `objectives`."""
    found = []
    for module in modules.values():
        if module.tree.body and not ast.get_docstring(module.tree):
            found.append(module.name)
        for node in module.tree.body:
            public = isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node) and not (module.room == "objectives" and node.name in PROTOCOL):
                found.append(f"{module.name}.{node.name}")
    return found


def test_files_and_functions_stay_small():
    experiments = {name: module for name, module in recipes().items() if name.startswith("experiments")}  # a config is one flat list
    assert oversized({**house(), **experiments}) == []


def test_every_module_and_public_function_has_a_docstring():
    assert undocumented(house()) == []


def test_a_long_file_a_long_function_and_a_missing_docstring_are_caught():
    long_function = "def f():\n" + "    x = 1\n" * FUNCTION_LINES
    source = long_function + "x = 1\n" * FILE_LINES
    assert len(oversized({"rlhf_jax.ops.new": Module("rlhf_jax.ops.new", source)})) == 2
    assert undocumented({"rlhf_jax.ops.new": Module("rlhf_jax.ops.new", source)}) == ["rlhf_jax.ops.new", "rlhf_jax.ops.new.f"]
    documented = '"""Doc."""\n\ndef f():\n    """Doc."""\n\ndef _g():\n    pass\n'
    assert undocumented({"rlhf_jax.ops.new": Module("rlhf_jax.ops.new", documented)}) == []
