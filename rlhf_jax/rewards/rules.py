"""Rules that a program can check, as reward functions on text: `(prompts, responses, references, *, parameters) -> scores`.

`config.reward_fn = "rules.numeric"` takes a rule with the parameters' defaults; an entry of `config.rewards` sets them. References are the prompt
file's `reference` objects. A rule that needs a field which a row's reference lacks fails on that row (config.reward_failure), instead of calling
the response wrong. Parameters are refused when a rule is called with a senseless one, on no rows too, which is how a config is checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rlhf_jax.rewards import code_run, math_answer
from rlhf_jax.rewards.host import Failed

Score = float | Failed
NAMES = ("brevity", "code", "exact_match", "format", "length", "math", "numeric", "regex", "repetition", "think_format")


def brevity(prompts: Sequence[Any], responses: Sequence[str], references: Sequence[Any]) -> list[float]:
    """1 / (1 + characters / 16): 1 for an empty response, ½ at 16 characters.

    Args:
      prompts: messages of each row, unused.
      responses: text of each row.
      references: unused.
    """
    return [1.0 / (1.0 + len(response) / 16.0) for response in responses]


def exact_match(
    prompts: Sequence[Any], responses: Sequence[str], references: Sequence[Any], *, field: str = "answer", extract: str = "whole",
    ignore_case: bool = False,
) -> list[Score]:
    """1 where the response's answer, stripped, is the reference's, else 0.

    Args:
      prompts: messages of each row, unused.
      responses: text of each row.
      references: `{field: str}` of each row, from the prompt file's `reference` field.
      field: the reference's entry.
      extract: where the answer stands: whole, boxed, tag, hash, last_number, auto (rewards.math_answer.extract).
      ignore_case: upper and lower case are the same.
    """
    _among("extract", extract, math_answer.EXTRACTIONS)
    plain: Callable[[str], str] = (lambda text: text.strip().casefold()) if ignore_case else str.strip

    def judge(response: str, wanted: Any) -> Score:
        given = math_answer.extract(response, extract)
        return float(given is not None and plain(given) == plain(str(wanted)))

    return _against(field, responses, references, judge)


def numeric(
    prompts: Sequence[Any], responses: Sequence[str], references: Sequence[Any], *, field: str = "answer", extract: str = "auto",
    tolerance: float = 1e-6, percent: str = "hundredth",
) -> list[Score]:
    """1 where the response's number is the reference's, else 0. Read are 1,234.5, 1e-3, 3/4, 1 1/2, 12 %, $5, also in LaTeX; not sums left to do.
    Of an answer with words, such as `18 dollars`, its last number counts; with extract = whole it must be a number and nothing else.

    Args:
      prompts: messages of each row, unused.
      responses: text of each row.
      references: `{field: number or text}` of each row; a text may go through `extract`'s "auto" itself, as GSM8K's "… #### 72" does.
      field: the reference's entry.
      extract: where the number stands: whole, boxed, tag, hash, last_number, auto.
      tolerance: relative to the reference, absolute where that is 0; 0 = exactly.
      percent: hundredth (50% is 0.5) or ignore (50% is 50).
    """
    _among("extract", extract, math_answer.EXTRACTIONS)
    _among("percent", percent, ("hundredth", "ignore"))
    _at_least("tolerance", tolerance, 0.0)
    if tolerance == float("inf"):
        raise ValueError(f"tolerance = {tolerance!r}: must be finite, or every number is right")

    def number(text: str | None, read: Callable[[str], Any] = math_answer.as_number) -> Any:
        return None if text is None else read(text.replace("\\%", "%").replace("%", "") if percent == "ignore" else text)

    def judge(response: str, wanted: Any) -> Score:
        target = number(str(wanted))
        if target is None:
            target = number(math_answer.extract(str(wanted), "auto"))
        if target is None:
            return Failed(f"the reference's {field} = {wanted!r} is no number")
        given = number(math_answer.extract(response, extract), math_answer.as_number if extract == "whole" else math_answer.number_in)
        return float(given is not None and abs(given - target) <= math_answer.Fraction(tolerance) * (abs(target) or 1))

    return _against(field, responses, references, judge)


def math(
    prompts: Sequence[Any], responses: Sequence[str], references: Sequence[Any], *, field: str = "answer", extract: str = "auto",
) -> list[Score]:
    """1 where the response's answer is mathematically the reference's, else 0: fractions, decimals, surds, sets, intervals, equations, LaTeX.

    Args:
      prompts: messages of each row, unused.
      responses: text of each row.
      references: `{field: text}` of each row; of a text with a `\\boxed{…}` the box's content.
      field: the reference's entry.
      extract: where the answer stands: whole, boxed, tag, hash, last_number, auto.

    An answer that leaves arithmetic to do which the reference has done is wrong: `7 + 5` is not 12. See rewards.math_answer for what is read.
    """
    _among("extract", extract, math_answer.EXTRACTIONS)

    def judge(response: str, wanted: Any) -> Score:
        given = math_answer.extract(response, extract)
        boxed = math_answer.extract(str(wanted), "boxed")
        return float(given is not None and math_answer.same(given, str(wanted) if boxed is None else boxed, finished=True))

    return _against(field, responses, references, judge)


def regex(
    prompts: Sequence[Any], responses: Sequence[str], references: Sequence[Any], *, pattern: str = "", field: str = "pattern", whole: bool = False,
) -> list[Score]:
    """1 where a regular expression matches the response, else 0.

    Args:
      prompts: messages of each row, unused.
      responses: text of each row.
      references: `{field: pattern}` of each row, read where `pattern` is empty.
      pattern: Python's syntax; "." matches the end of a line too.
      field: the reference's entry.
      whole: the whole response must match, else any part of it.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL) if pattern else None
    except re.error as error:
        raise ValueError(f"pattern = {pattern!r} is no regular expression: {error}") from error

    def judge(response: str, wanted: Any) -> Score:
        try:
            use = compiled or re.compile(str(wanted), re.DOTALL)
        except re.error as error:
            return Failed(f"the reference's {field} = {wanted!r} is no regular expression: {error}")
        return float(bool(use.fullmatch(response) if whole else use.search(response)))

    if compiled is not None:
        return [judge(response, None) for response in responses]
    return _against(field, responses, references, judge)


def format(
    prompts: Sequence[Any], responses: Sequence[str], references: Sequence[Any], *, tags: tuple[str, ...] = ("think", "answer"),
    partial: bool = False,
) -> list[float]:
    """1 where the response is `<think>…</think><answer>…</answer>` and nothing else, each tag once and not empty, else 0.

    Args:
      prompts: messages of each row, unused.
      responses: text of each row.
      references: unused.
      tags: the parts in their order.
      partial: where the whole is not right, half of the share of tags that open and close exactly once, instead of 0.
    """
    names = not isinstance(tags, str) and all(isinstance(tag, str) and re.fullmatch(r"[\w-]+", tag) for tag in tags)
    if not names or not tags or len(set(tags)) < len(tags):
        raise ValueError(f"tags = {tags!r}: must be different names, e.g. ('think', 'answer')")

    def judge(response: str) -> float:
        single = [response.count(f"<{tag}>") == response.count(f"</{tag}>") == 1 for tag in tags]
        rest, shaped = response, all(single)
        for tag in tags if shaped else ():
            before, _, rest = rest.partition(f"<{tag}>")
            inner, closing, rest = rest.partition(f"</{tag}>")
            shaped = shaped and not before.strip() and bool(inner.strip()) and bool(closing)
        if shaped and not rest.strip():
            return 1.0
        return 0.5 * sum(single) / len(single) if partial else 0.0

    return [judge(response) for response in responses]


def think_format(prompts: Sequence[Any], responses: Sequence[str], references: Sequence[Any]) -> list[float]:
    """1 where the response is one `<think>…</think>` and then anything without another opening tag, else 0.

    Args:
      prompts: messages of each row, unused.
      responses: text of each row.
      references: unused.
    """
    return [float(text.startswith("<think>") and text.count("<think>") == 1 and "</think>" in text) for text in responses]


def length(
    prompts: Sequence[Any], responses: Sequence[str], references: Sequence[Any], *, low: int = 0, high: int = 0, slack: int = 0,
    unit: str = "characters",
) -> list[float]:
    """1 where the length is within [low, high], falling in a straight line to 0 at `slack` beyond; low = high is a target.

    Args:
      prompts: messages of each row, unused.
      responses: text of each row.
      references: unused.
      low: units.
      high: units; 0 = no upper limit.
      slack: units beyond the limits at which nothing is left; 0 = at once.
      unit: characters or words.
    """
    _among("unit", unit, ("characters", "words"))
    for name, value in (("low", low), ("high", high), ("slack", slack)):
        _at_least(name, value, 0)
    if not low and not high:
        raise ValueError("low = high = 0 limit nothing: set one of them")
    if high and low > high:
        raise ValueError(f"low = {low} exceeds high = {high}")

    def judge(response: str) -> float:
        size = len(response.split()) if unit == "words" else len(response)
        beyond = max(low - size, size - high if high else 0, 0)
        return 1.0 if not beyond else max(0.0, 1.0 - beyond / slack) if slack else 0.0

    return [judge(response) for response in responses]


def repetition(
    prompts: Sequence[Any], responses: Sequence[str], references: Sequence[Any], *, n: int = 3, unit: str = "words",
) -> list[float]:
    """−(1 − different n-grams / n-grams): 0 where none is repeated, near −1 where all are one; 0 for a response shorter than n.

    Args:
      prompts: messages of each row, unused.
      responses: text of each row.
      references: unused.
      n: units in a row, ≥ 1.
      unit: characters or words.
    """
    _among("unit", unit, ("characters", "words"))
    _at_least("n", n, 1)

    def judge(response: str) -> float:
        items: Sequence[str] = response.split() if unit == "words" else response
        grams = [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
        return len(set(grams)) / len(grams) - 1.0 if grams else 0.0

    return [judge(response) for response in responses]


def code(
    prompts: Sequence[Any], responses: Sequence[str], references: Sequence[Any], *, field: str = "tests", partial: bool = False, seconds: float = 5.0,
    memory: int = 512, file: int = 16, processes: int = 16, workers: int = 2,
) -> list[Score]:
    """1 where the response's Python program passes its tests in the sandbox (rewards.code_run), else 0. What the sandbox holds depends on the system.

    Args:
      prompts: messages of each row, unused.
      responses: text of each row; its last fenced block is the program, or all of it.
      references: `{field: …}` of each row: `[{"input": …, "output": …}, …]` for a program that reads standard input, or assertions, a text or a list.
      field: the reference's entry.
      partial: the share of tests passed, instead of 0 where one fails.
      seconds: wall-clock limit of one run, > 0.
      memory: MiB of address space.
      file: MiB of a file.
      processes: processes and threads.
      workers: programs that run at once, ≥ 1.
    """
    limits = code_run.Limits(seconds=seconds, memory=memory, file=file, processes=processes)
    _at_least("workers", workers, 1)
    _check_sandbox(limits)  # an error here, once, is no model's fault

    def judge(response: str, tests: Any) -> Score:
        source = code_run.program(response)
        tests = [tests] if isinstance(tests, str) else tests
        if not isinstance(tests, list) or not tests:
            return Failed(f"the reference's {field} = {tests!r}: must be a text, or a list of tests")
        if all(isinstance(test, str) for test in tests):
            passed = code_run.assertions_passed(source, tests, limits=limits)
        elif all(isinstance(test, dict) and {"input", "output"} <= test.keys() for test in tests):
            passed = code_run.outputs_passed(source, [(str(test["input"]), str(test["output"])) for test in tests], limits=limits, to_the_end=partial)
        else:
            return Failed(f"the reference's {field} holds {tests[0]!r}: must be assertions, or objects with input and output")
        return sum(passed) / len(passed) if partial else float(all(passed))

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda pair: _against(field, [pair[0]], [pair[1]], judge)[0], zip(responses, references, strict=True)))


def _check_sandbox(limits: code_run.Limits) -> None:
    """Refuses limits within which no program runs, on a system where some do."""
    try:
        code_run.fences()
    except code_run.NoSandbox as error:
        raise ValueError(f"name = 'rules.code': {error}") from error
    try:
        code_run.fences(limits)
    except code_run.NoSandbox as error:
        said = str(error).rpartition("\n")[2]
        raise ValueError(f"memory = {limits.memory}, file = {limits.file}, processes = {limits.processes}: not even a small program runs within "
                         f"these limits ({said}); choose others") from error


def _against(field: str, responses: Sequence[str], references: Sequence[Any], judge: Callable[[str, Any], Score]) -> list[Score]:
    """`judge(response, reference[field])` of each row; a row whose reference has no such field fails."""
    scores: list[Score] = []
    for response, reference in zip(responses, references, strict=True):
        if not isinstance(reference, dict) or field not in reference:
            scores.append(Failed(f"the row's reference {reference!r} has no {field!r}; write it into the prompt file"))
        else:
            scores.append(judge(response, reference[field]))
    return scores


def _among(name: str, value: str, legal: Sequence[str]) -> None:
    if value not in legal:
        raise ValueError(f"{name} = {value!r}: must be one of {', '.join(legal)}")


def _at_least(name: str, value: float, low: float) -> None:
    if not value >= low:
        raise ValueError(f"{name} = {value!r}: must be at least {low}")
