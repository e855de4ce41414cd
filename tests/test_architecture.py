"""The rules of the house, read off the syntax tree of every module: imports, who may know gold, asserted shapes, sizes, docstrings.

Each rule is a function from sources to a list of breaches. It is run twice: on the package, where it must find none, and on sources that
break it on purpose, where it must find them.

Imports point downward only. Rooms of one level do not import each other; modules of one folder may.

    | level | rooms                                                                                                             |
    |-------|-------------------------------------------------------------------------------------------------------------------|
    | 0     | errors files                  leaves: they import nothing of ours                                                 |
    | 1     | types                                                                                                             |
    | 2     | ops                                                                                                               |
    | 3     | manifest                      the digests of a saved tree; below its one user, checkpoint                         |
    | 4     | objectives models data sharding distributed checkpoint endpoint                                                   |
    | 5     | saved sampling rewards envs   saved: a checkpoint with its model's config and its tokenizer                       |
    | 6     | eval                                                                                                              |
    | 7     | train synth report launch                                                                                         |
    | 8     | cli                                                                                                               |
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "rlhf_jax"
LEVELS = (
    ("errors", "files"),
    ("types",),
    ("ops",),
    ("manifest",),
    ("objectives", "models", "data", "sharding", "distributed", "checkpoint", "endpoint"),
    ("saved", "sampling", "rewards", "envs"),
    ("eval",),
    ("train", "synth", "report", "launch"),
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

GOLD = "rlhf_jax.rewards.gold"
KNOWS_GOLD = re.compile(r"rlhf_jax\.(eval|synth)(\..*)?|rlhf_jax\.cli\.eval|rlhf_jax\.rewards\.gold|experiments\..*")
ASSERTED = ("ops", "objectives", "models", "sampling", "train")
ARRAY_TYPES = {"Array", "Sequences", "Comparisons", "Prompts", "Rollout", "Unpaired", "Labelled"}
PROTOCOL = ("loss", "prepare", "init_carry")
FILE_LINES, FUNCTION_LINES = 450, 70

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True)
class Module:
    """One source file under its dotted name."""

    name: str
    source: str
    is_package: bool = False

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def room(self) -> str:
        """The second part of `rlhf_jax.<room>.…`; empty for the package's own `__init__`."""
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 else ""


def _modules(folder: Path) -> dict[str, Module]:
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if package else parts)
        found[name] = Module(name, path.read_text(), package)
    return found


@functools.cache
def house() -> dict[str, Module]:
    """Every module of the package."""
    return _modules(ROOT / PACKAGE)


@functools.cache
def recipes() -> dict[str, Module]:
    """Configs and experiments."""
    return {**_modules(ROOT / "configs"), **_modules(ROOT / "experiments")}


def imports(module: Module) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything imported, at any depth of the file, relative imports made absolute.

    `from a import b` yields `a.b`: whether b is a module or a name in one does not matter to a rule on prefixes.
    """
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.name.split(".")
                parts = parts[: len(parts) - node.level + module.is_package]
                base = ".".join([*parts, *([base] if base else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node.func) in ("import_module", "__import__"):
            yield from ((a.value, node.lineno) for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))


def _called(node: ast.expr) -> str:
    """The last name of what is called: `chex.assert_rank` → "assert_rank"."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


# --- imports ---


def import_breaches(modules: Mapping[str, Module]) -> list[str]:
    """Imports that do not point downward, or that bring a foreign package where it may not be."""
    found = []
    for module in modules.values():
        for name, line in imports(module):
            where = f"{module.name}:{line} imports {name}"
            found += [f"{where}, which only {rooms or 'nobody'} may" for package, rooms in CONFINED.items()
                      if _within(name, package) and module.room not in rooms]
            found += [f"{where}, which {module.room} may not" for package in FORBIDDEN.get(module.room, ()) if _within(name, package)]
            if not _within(name, PACKAGE):
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
                  if _within(name, "tensorflow") or _within(name, "flax.linen") or _within(name, "orbax")]
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


# --- gold ---


def gold_imports(modules: Mapping[str, Module]) -> list[str]:
    """Modules that reach gold without a right to it: by an import, by a string that names it, or through others' imports."""
    found, edges = [], {}
    for module in modules.values():
        names = [name for name, _ in imports(module)]
        edges[module.name] = {_owner(name, modules) for name in names}
        if KNOWS_GOLD.fullmatch(module.name):
            continue
        found += [f"{module.name}:{line} imports {name}" for name, line in imports(module) if _within(name, GOLD)]
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


# --- shape assertions ---


def _body(function: Function) -> list[ast.stmt]:
    """The statements after the docstring and after guards of the form `if …: raise …`, which refuse a user's mistake."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    while body and isinstance(body[0], ast.If) and isinstance(body[0].body[-1], ast.Raise) and not body[0].orelse:
        body = body[1:]
    return body


def _asserts(statement: ast.stmt) -> bool:
    """Whether a statement is a call `chex.assert_…(…)`."""
    call = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(call, ast.Call) and ast.unparse(call.func).startswith("chex.assert_")


def _opens(function: Function, module: Module) -> bool:
    """Whether a function opens with a chex assertion, or calls a `_check…` helper of its module that does, in its first statement."""
    body = _body(function)
    if not body:
        return False
    if _asserts(body[0]):
        return True
    helpers = {f.name: f for f in module.tree.body if isinstance(f, Function) and f.name.startswith("_check")}
    calls = {_called(node.func) for node in ast.walk(body[0]) if isinstance(node, ast.Call)} if not _nests(body[0]) else set()
    return any(_asserts(_body(helpers[name])[0]) for name in calls & helpers.keys())


def _nests(statement: ast.stmt) -> bool:
    return any(isinstance(node, (ast.FunctionDef, ast.Lambda)) for node in ast.walk(statement))


def takes_arrays(function: Function) -> bool:
    """Whether a parameter or the result is annotated with an array or a batch of them, optional or in a tuple too.

    A function that returns functions, or maps names to arrays, has no shape of its own to assert.
    """
    arguments = function.args
    hints = [a.annotation for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs) if a.annotation] + [function.returns]
    for hint in hints:
        source = ast.unparse(hint) if hint is not None else ""
        if not re.search(r"\b(Callable|Mapping|dict|Iterator|type)\b", source) and set(re.findall(r"\w+", source)) & ARRAY_TYPES:
            return True
    return False


def _public_functions(module: Module) -> Iterator[Function]:
    """Module-level functions, and methods of classes that are no Linen modules; names without an underscore."""
    for node in module.tree.body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        if isinstance(node, Function):
            yield node
        elif not any("nn.Module" in ast.unparse(base) for base in node.bases):
            yield from (f for f in node.body if isinstance(f, Function) and not f.name.startswith("_"))


def _imported(module: Module) -> dict[str, str]:
    """Local names of what is imported from the package: {"loss_tokens": "rlhf_jax.ops.masking.loss_tokens", …}."""
    names = {}
    for node in module.tree.body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _delegates(function: Function, module: Module, modules: Mapping[str, Module]) -> bool:
    """Whether the first statement hands the batch to a function of ops or objectives that opens with an assertion."""
    body, known = _body(function), _imported(module)
    for node in ast.walk(body[0]) if body and not _nests(body[0]) else ():
        if isinstance(node, ast.Call) and any("batch" in re.findall(r"\w+", ast.unparse(argument)) for argument in node.args):
            owner, _, name = known.get(_called(node.func), f"{module.name}.{_called(node.func)}").rpartition(".")
            if owner in modules and owner.split(".")[1] in ("ops", "objectives"):
                home = modules[owner]
                if any(isinstance(f, Function) and f.name == name and _opens(f, home) for f in home.tree.body):
                    return True
    return False


def unasserted(modules: Mapping[str, Module]) -> list[str]:
    """Public array functions that do not open with a chex assertion.

    `loss` and `prepare` of an objective, whose arrays all sit in `batch`, may instead hand it in their first statement to a function of
    ops or objectives that does (`mask = loss_tokens(batch.seqs)`); `init_carry` is given no array.
    """
    found = []
    for module in modules.values():
        if module.room not in ASSERTED:
            continue
        for function in _public_functions(module):
            protocol = module.room == "objectives" and function.name in PROTOCOL
            if protocol and function.name == "init_carry":
                continue
            if not (protocol or takes_arrays(function)) or _opens(function, module):
                continue
            if not (protocol and _delegates(function, module, modules)):
                found.append(f"{module.name}.{function.name}:{function.lineno}")
    return found


def test_public_array_functions_open_with_a_shape_assertion():
    assert unasserted(house()) == []


def test_the_rule_on_assertions_sees_most_of_the_maths():
    seen = {room: sum(takes_arrays(f) for m in house().values() if m.room == room for f in _public_functions(m)) for room in ASSERTED}
    assert seen["ops"] >= 25 and seen["objectives"] >= 20 and seen["models"] >= 15 and seen["sampling"] >= 3 and seen["train"] >= 1, seen


GOOD = 'def f(x: Array) -> Array:\n    """Doc."""\n    chex.assert_rank(x, 2)\n    return x'
HELPED = GOOD.replace("chex.assert_rank(x, 2)\n    return x", "return _check(x)") + "\n\ndef _check(x):\n"


@pytest.mark.parametrize(
    ("source", "caught"),
    [
        (GOOD, 0),
        (GOOD.replace("    chex.assert_rank(x, 2)\n", ""), 1),
        (GOOD.replace("chex.assert_rank(x, 2)\n    return x", "y = 2 * x\n    chex.assert_rank(y, 2)\n    return y"), 1),
        (GOOD.replace("chex.assert_rank(x, 2)", "if x is None:\n        raise UserError('no')\n    chex.assert_rank(x, 2)"), 0),
        (GOOD.replace("chex.assert_rank(x, 2)", "if x.ndim == 2:\n        chex.assert_rank(x, 2)"), 1),
        (GOOD.replace("chex.assert_rank(x, 2)", "assert x.ndim == 2"), 1),
        (HELPED + "    chex.assert_rank(x, 2)\n    return x", 0),
        (HELPED + "    return x", 1),
        ("def f(seqs: Sequences | None) -> float:\n    return 1.0", 1),
        ("def f(n: int) -> tuple[Array, int]:\n    return g(n), n", 1),
        ("class Nets:\n    def policy(self, seqs: Sequences) -> Any:\n        return 0", 1),
        ("def _f(x: Array) -> Array:\n    return x", 0),
        ("def f(n: int) -> int:\n    return n", 0),
    ],
)
def test_a_function_without_an_assertion_is_caught(source, caught):
    assert len(unasserted({"rlhf_jax.ops.new": Module("rlhf_jax.ops.new", source)})) == caught


@pytest.mark.parametrize(
    ("body", "caught"),
    [
        ("mask = loss_tokens(batch.seqs)\n    return {}, {}", 0),
        ("return {'a': nets.policy(batch).logps}, {}", 1),
        ("logps = nets.policy(batch).logps\n    mask = loss_tokens(batch)\n    return {}, {}", 1),
        ("mask = loss_tokens(other)\n    return {}, {}", 1),
        ("chex.assert_rank(batch.tokens, 2)\n    return {}, {}", 0),
    ],
)
def test_an_objective_that_asserts_nothing_is_caught(body, caught):
    source = f"from rlhf_jax.ops.masking import loss_tokens\n\ndef loss(nets: Any, batch: Sequences, keys: Any):\n    {body}"
    new = Module("rlhf_jax.objectives.new", source)
    masking = house()["rlhf_jax.ops.masking"]
    assert unasserted({masking.name: masking, new.name: new}) == ([f"{new.name}.loss:3"] if caught else [])


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
