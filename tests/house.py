"""The sources of the house as syntax trees, for the tests that hold it to its rules (test_architecture, test_gold, test_assertions)."""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "rlhf_jax"
PROTOCOL = ("loss", "prepare", "init_carry")

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


def modules_in(folder: Path) -> dict[str, Module]:
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
    return modules_in(ROOT / PACKAGE)


@functools.cache
def recipes() -> dict[str, Module]:
    """Configs and experiments."""
    return {**modules_in(ROOT / "configs"), **modules_in(ROOT / "experiments")}


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
        elif isinstance(node, ast.Call) and called(node.func) in ("import_module", "__import__"):
            yield from ((a.value, node.lineno) for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))


def called(node: ast.expr) -> str:
    """The last name of what is called: `chex.assert_rank` → "assert_rank"."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")
