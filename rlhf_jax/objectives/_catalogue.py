"""The objectives as a reader meets them: each module's docstring, needs and hyper-parameters, as entries, a table and README.md.

A module says everything once: its docstring has a title line, the equation, and the paragraphs `Use:`, `See:` and `Deviation:`; `NEEDS`,
`DEFAULTS` and `RANGES` are constants; what a hyper-parameter means stands under Args of a function that takes it. So nothing here goes stale:
`python -m rlhf_jax.objectives._catalogue` rewrites the tables of README.md, and a test compares them.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pathlib
import re
import textwrap
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from rlhf_jax import objectives
from rlhf_jax.types import Comparisons, Labelled, Rollout, Sequences, Unpaired

README = pathlib.Path(__file__).with_name("README.md")
BEGIN, END = "<!-- tables: python -m rlhf_jax.objectives._catalogue -->", "<!-- end of tables -->"
FAMILIES = {  # by the batch that an objective trains on
    Sequences: "Token rows: demonstrations, text, distillation",
    Comparisons: "Preferences: pairs and rankings",
    Unpaired: "Single responses, good or bad",
    Labelled: "Rated responses and steps",
    Rollout: "Online: samples of the policy",
}
NEED_WORDS = {
    "reference": "reference", "teacher": "teacher", "critic": "critic", "reward": "score", "group": "samples in groups", "pairs": "pairs of samples",
    "ptx": "second data set",
}
LINE = 150  # characters of the overview's second lines, which end in … where there is more to say
_LABELS = ("Use", "See", "Deviation")


@dataclasses.dataclass(frozen=True)
class Hyperparameter:
    """One key of `config.objective`."""

    name: str
    default: Any
    range: tuple[float, float] | None  # None: none is stated, or it has names
    names: tuple[str, ...]  # its legal values where it is a string
    meaning: str
    family: bool = False  # the default is the one that the modules of its family share

    @property
    def legal(self) -> str:
        """The range or the names as text, empty where there are none."""
        if self.names:
            return f"one of {', '.join(self.names)}"
        low, high = self.range or (-math.inf, math.inf)
        if math.isfinite(low) and math.isfinite(high):
            return f"[{low:g}, {high:g}]"
        return f"≥ {low:g}" if math.isfinite(low) else f"≤ {high:g}" if math.isfinite(high) else ""

    @property
    def characteristic(self) -> bool:
        """Whether the default tells the objective from its family: it is not the family's, and switches nothing off."""
        return not self.family and bool(self.default) and self.default not in ("none", math.inf)


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a module says of its objective."""

    name: str
    title: str
    equation: str  # lines, not indented
    use: str
    see: str
    deviation: str
    batch_type: type
    needs: Mapping[str, str]  # need → the hyper-parameter that lifts it at 0, or ""
    hyperparameters: tuple[Hyperparameter, ...]

    @property
    def need_words(self) -> str:
        """The needs as text."""
        words = [NEED_WORDS[need] + (f" (if {key} ≠ 0)" if key else "") for need, key in self.needs.items()]
        return ", ".join(words) or "–"

    @property
    def paper(self) -> str:
        """The first citation alone."""
        return re.split(r"(?<=\))[,;.]|; ", self.see, maxsplit=1)[0].rstrip(".")

    @property
    def gist(self) -> str:
        """The paper without equation numbers, the needs with the defaults, and the defaults that tell the objective from its family."""
        paper = re.sub(r"^(.*?\d{4}).*?( \(arXiv:[\d.]+\)).*$", r"\1\2", self.paper)
        default = {h.name: h.default for h in self.hyperparameters}
        needs = ", ".join(NEED_WORDS[need] for need, key in self.needs.items() if not key or default.get(key, True))
        defaults = ", ".join(f"{h.name} = {h.default!r}" for h in self.hyperparameters if h.characteristic)
        return "; ".join(part for part in (paper, needs and f"needs {needs}", defaults) if part)


def entry(name: str) -> Entry:
    """An objective's entry.

    Args:
      name: a built-in objective or the dotted path of a module.

    Raises:
      UserError: there is no such objective.
      ValueError: its docstring lacks a part.
    """
    module = objectives.load(name)
    title, equation, said = _parts(name, inspect.cleandoc(module.__doc__ or ""))
    functions = {kind: getattr(module, kind) for kind in objectives.POSITIONAL if hasattr(module, kind)}
    meanings = _meanings(module)
    return Entry(
        name=name, title=title, equation=equation, use=said["Use"], see=said["See"], deviation=said["Deviation"],
        batch_type=objectives._batch_type(name, functions), needs=getattr(module, "NEEDS", {}),
        hyperparameters=tuple(_hyperparameter(module, key, meanings.get(key, "")) for key in getattr(module, "DEFAULTS", {})),
    )


def _hyperparameter(module: ModuleType, name: str, meaning: str) -> Hyperparameter:
    default, legal = module.DEFAULTS[name], getattr(module, "RANGES", {}).get(name)
    names = tuple(legal) if isinstance(default, str) and legal is not None else ()
    family = any(name in shared and shared[name] == default for shared in _family_defaults(module))
    return Hyperparameter(name, default, None if names else legal, names, meaning, family)


def _family_defaults(module: ModuleType) -> list[Mapping[str, Any]]:
    """DEFAULTS of the `_`-modules that a module imports whole."""
    siblings = [m for m in vars(module).values() if inspect.ismodule(m) and m.__name__.startswith(f"{objectives.__name__}._")]
    return [getattr(m, "DEFAULTS", {}) for m in siblings]


def entries() -> list[Entry]:
    """Every built-in objective, by family and name."""
    order = list(FAMILIES)
    return sorted((entry(name) for name in objectives.names()), key=lambda e: (order.index(e.batch_type), e.name))


def _parts(name: str, text: str) -> tuple[str, str, dict[str, str]]:
    """(title, equation, the labelled paragraphs) of a module's docstring."""
    head, *blocks = re.split(r"\n\s*\n", text)
    equation = "\n".join(textwrap.dedent(block) for block in blocks if block.startswith("    "))
    tail = "\n".join(block for block in blocks if not block.startswith("    "))
    pieces = re.split(rf"^({'|'.join(_LABELS)}): ", tail, flags=re.MULTILINE)
    said = {label: " ".join(words.split()) for label, words in zip(pieces[1::2], pieces[2::2])}
    if missing := [label for label in _LABELS if label not in said]:
        raise ValueError(f"objective {name}: the module's docstring lacks {', '.join(missing)}: "
                         "it needs a title, an equation, Use:, See: and Deviation:")
    return " ".join(head.split()).rstrip("."), equation, said


def _meanings(module: ModuleType) -> dict[str, str]:
    """What the keyword-only arguments of a module's own and imported functions mean, by their Args; the module's own win."""
    functions = [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__.startswith("rlhf_jax.")]
    meanings: dict[str, str] = {}
    homes = {f.__module__ for f in functions if f.__module__.startswith(f"{objectives.__name__}.")} - {module.__name__}
    for home in sorted(homes):  # a sibling's `loss` is explained where it is written
        meanings |= _meanings(importlib.import_module(home))
    for function in sorted(functions, key=lambda f: f.__module__ == module.__name__):
        meanings |= _arguments(function)
    for sibling in [m for m in vars(module).values() if inspect.ismodule(m) and m.__name__.startswith(f"{objectives.__name__}.")]:
        meanings = _meanings(sibling) | meanings
    return meanings


def _arguments(function: Callable[..., Any]) -> dict[str, str]:
    """{argument: meaning} of the Args section of a docstring, keyword-only arguments alone."""
    keywords = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    _, _, after = inspect.cleandoc(function.__doc__ or "").partition("\nArgs:\n")
    section = re.split(r"\n\S", after, maxsplit=1)[0]
    found: dict[str, str] = {}
    for item in re.split(r"\n(?=  \S)", section):
        names, colon, meaning = item.strip().partition(": ")
        if colon:
            found |= {name.strip(): " ".join(meaning.split()) for name in names.split(",") if name.strip() in keywords}
    return found


# --- for the terminal ---


def overview() -> str:
    """All objectives by family, two lines each: what it is, and its gist."""
    every = entries()
    width = max(len(e.name) for e in every)
    lines = []
    for kind, family in FAMILIES.items():
        rows = [e for e in every if e.batch_type is kind]
        if rows:
            lines += ["", family]
        for e in rows:
            lines += [f"  {e.name:<{width}}  {_after_colon(e.title)}", f"  {'':<{width}}  {textwrap.shorten(e.gist, LINE, placeholder=' …')}"]
    return "\n".join(lines[1:])


def card(e: Entry) -> str:
    """One objective in full, with its hyper-parameters.

    Args:
      e: from `entry`.
    """
    wrap = lambda label, text: textwrap.fill(f"{label}: {text}", 110, subsequent_indent="  ")  # noqa: E731
    lines = [e.title, "", textwrap.indent(e.equation, "    "), "", wrap("Use", e.use), wrap("See", e.see), wrap("Deviation", e.deviation)]
    lines += [wrap("Trains on", FAMILIES.get(e.batch_type, e.batch_type.__name__)), wrap("Needs", e.need_words)]
    if e.hyperparameters:
        lines += ["", "Hyper-parameters, config.objective.…"]
    for h in e.hyperparameters:
        legal = f", {h.legal}" if h.legal else ""
        lines.append(textwrap.fill(f"  {h.name} = {h.default!r}{legal}: {h.meaning}", 110, subsequent_indent="      "))
    return "\n".join(lines)


# --- for README.md ---


def tables() -> str:
    """Markdown tables of all objectives, one per family."""
    blocks, every = [], entries()
    for kind, family in FAMILIES.items():
        rows = [e for e in every if e.batch_type is kind]
        if rows:
            head = "| objective | equation | paper | needs | defaults | use it to | deviation |\n|---|---|---|---|---|---|---|"
            blocks.append("\n".join([f"### {family}", "", head, *(_row(e) for e in rows)]))
    return "\n\n".join(blocks)


def _row(e: Entry) -> str:
    equation = "<br>".join(f"<code>{re.sub(' {2,}', ' ', line.strip())}</code>" for line in e.equation.splitlines() if line.strip())
    defaults = ", ".join(f"{h.name} = {h.default!r}" for h in e.hyperparameters) or "–"
    paper = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", e.paper)
    cells = [f"[`{e.name}`]({e.name}.py)<br>{_after_colon(e.title)}", equation, paper, e.need_words, defaults, e.use, e.deviation]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _after_colon(title: str) -> str:
    return title.partition(": ")[2] or title


def page(text: str) -> str:
    """`text` of README.md with its tables made anew.

    Args:
      text: the file's, with both markers.
    """
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


if __name__ == "__main__":
    module = importlib.import_module("rlhf_jax.objectives._catalogue")  # under its own name, not as __main__
    README.write_text(module.page(README.read_text(encoding="utf-8")), encoding="utf-8")
