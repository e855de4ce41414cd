r"""Answers that are the same, and answers that are not: tables written by hand, each pair tried in both directions."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.rewards.math_answer import as_number, extract, same

SAME = r"""
1/2                                ~ \frac{1}{2}
0.5                                ~ \dfrac12
\frac12                            ~ \frac{2}{4}
-\frac{1}{3}                       ~ \frac{-1}{3}
$\frac{3}{4}$                      ~ .75
1\frac{1}{2}                       ~ 3/2
2 1/2                              ~ 2.5
\sqrt{8}                           ~ 2\sqrt2
\frac{1}{\sqrt{2}}                 ~ \frac{\sqrt{2}}{2}
\sqrt{2}+\sqrt{3}                  ~ \sqrt{5+2\sqrt{6}}
\sqrt[3]{-8}                       ~ -2
x^2+2x+1                           ~ (x+1)^2
2(x+1)                             ~ 2x+2
3x^2y                              ~ 3yx^2
\frac{x^2-1}{x-1}                  ~ x+1
\sin^2 x+\cos^2 x                  ~ 1
e^{i\pi}                           ~ -1
\log_2 8                           ~ 3
\binom{5}{2}                       ~ 10
5!                                 ~ 120
3\pi                               ~ \pi\cdot3
2^{10}                             ~ 1024
3 \times 10^{8}                    ~ 300000000
10^{-3}                            ~ 0.001
1,234                              ~ 1234
12{,}345                           ~ 12345
\$5.00                             ~ 5
50\%                               ~ 50
50\%                               ~ 0.5
90^\circ                           ~ 90
5\text{ cm}                        ~ 5
5\text{ cm}^2                      ~ 5
\text{Monday}                      ~ monday
(A)                                ~ \text{(A)}
x=5                                ~ 5
f(x)=x^2                           ~ x^2
\{1,2,3\}                          ~ \{3,1,2\}
{1,2}                              ~ \{2, 1\}
\{1,1,2\}                          ~ \{1,2\}
1, 2                               ~ 2,1
1\text{ and }2                     ~ 1, 2
\pm 2                              ~ 2, -2
1\pm\sqrt{2}                       ~ 1+\sqrt2, 1-\sqrt2
(1,2)                              ~ ( 1 , 2 )
\left(\frac{1}{2},3\right)         ~ (0.5,3)
[0,\infty)                         ~ [0, \infty)
(-\infty,1)\cup(2,3]               ~ (2,3]\cup(-\infty,1)
x \in [1,2]                        ~ [1,2]
y=2x+1                             ~ 2x-y+1=0
x>3                                ~ 3<x
-x<-3                              ~ x>3
1<x\le 2                           ~ 2\ge x>1
\begin{pmatrix}1&2\\3&4\end{pmatrix} ~ \begin{bmatrix} 1 & 2 \\ 3 & \frac{8}{2} \end{bmatrix}
1010_2                             ~ 1010_{2}
"""
DIFFERENT = r"""
1/2                                ~ 1/3
0.333                              ~ 1/3
3.14                               ~ \pi
1.4142135                          ~ \sqrt2
-5                                 ~ 5
123456789123456789                 ~ 123456789123456788
(1,2)                              ~ (2,1)
[1,2)                              ~ [1,2]
(1,2)                              ~ \{1,2\}
(1,234)                            ~ 1234
1,2                                ~ 1,2,2
x>3                                ~ x<3
x>3                                ~ x\ge3
y=x                                ~ y=2x
x+1                                ~ y+1
\sqrt{x^2}                         ~ x
x                                  ~ 5
no                                 ~ on
cat                                ~ act
\infty                             ~ -\infty
10                                 ~ 1000_2
1/0                                ~ 2/0
\begin{pmatrix}1&2\end{pmatrix}    ~ \begin{pmatrix}1\\2\end{pmatrix}
"""


def pairs(text: str) -> list[tuple[str, ...]]:
    return [tuple(part.strip() for part in line.split("~")) for line in text.strip().split("\n")]


@pytest.mark.parametrize(("first", "second"), pairs(SAME))
def test_same(first: str, second: str) -> None:
    assert same(first, second) and same(second, first)


@pytest.mark.parametrize(("first", "second"), [*pairs(DIFFERENT), ("5", ""), ("", "5"), ("", "")])
def test_different(first: str, second: str) -> None:
    assert not same(first, second) and not same(second, first)


@pytest.mark.parametrize(
    ("answer", "reference", "accepted"),
    [
        ("7+5", "12", False), ("24/2", "12", False), ("2^{10}", "1024", False), (r"\sqrt{4}", "2", False), (r"\{1+1\}", r"\{2\}", False),
        ("12", "7+5", True), (r"3\times10^8", "300000000", True), ("2/4", "1/2", True), (r"1\frac12", "3/2", True), (r"50\%", "0.5", True),
        (r"1+\sqrt2", r"\sqrt2+1", True), ("-(-3)", "3", True), ("2x+3x", "5x", True),
    ],
)
def test_an_answer_that_repeats_the_question_is_none(answer: str, reference: str, accepted: bool) -> None:
    assert same(answer, reference) and same(answer, reference, finished=True) == accepted


@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
@settings(max_examples=60, deadline=None)
def test_fractions_are_compared_exactly(x: Fraction, y: Fraction) -> None:
    latex = lambda z: rf"{'-' if z < 0 else ''}\frac{{{abs(z.numerator) * 3}}}{{{z.denominator * 3}}}"  # noqa: E731
    assert same(latex(x), str(x)) and same(latex(x), str(y)) == (x == y)


@given(st.text(alphabet="0123456789+-*/^(){}[]\\frac sqrtx,=<|!%π.", max_size=60))
@settings(max_examples=300, deadline=None)
def test_no_text_breaks_it(text: str) -> None:
    extract(text, "auto")
    as_number(text)
    assert same(text, "7") == same("7", text)


@pytest.mark.parametrize("text", ["9^{9^{9^{9}}}", "9^{99999999}", "(" * 400 + ")" * 400, "1000!^{1000!}", "((((2^{999})^{999})^{999})^{999})",
                                  "x" * 10**6,
                                  r"\sqrt" * 80 + "2", "1/" * 200 + "1", "\\boxed{" * 5000, "-" * 400 + "1", "<answer>" * 20000,
                                  "answer is" + "\n" * 10**5, "1," * 10**5, "{" * 10**5])
def test_hostile_answers_take_no_time(text: str) -> None:
    begun = time.perf_counter()
    assert not same(text, "7")
    extract(text, "auto")
    assert time.perf_counter() - begun < 2.0


@pytest.mark.parametrize(
    ("text", "value"),
    [("1,234.5", "2469/2"), ("-3/4", "-3/4"), ("1 1/2", "3/2"), ("12%", "3/25"), ("$5", "5"), ("2e-3", "1/500"), (r"\frac{1}{3}", "1/3"), ("−7",
     "-7"),
     ("0.1", "1/10"), ("abc", None), ("2+2", None), ("24/2", None), ("1e999999", None), ("x", None), ("", None), ("1/0", None), (r"\pi", None)],
)
def test_numbers(text: str, value: str | None) -> None:
    assert as_number(text) == (None if value is None else Fraction(value))


@pytest.mark.parametrize(
    ("text", "how", "answer"),
    [
        (" 7\n", "whole", "7"), (r"so \boxed{\frac{1}{2}} and \boxed{3}", "boxed", "3"), (r"\boxed{\{1\}}", "boxed", r"\{1\}"), ("none",
        "boxed", None),
        (r"\boxed{1", "boxed", None), ("x <answer> 4 </answer>", "tag", "4"), ("<answer>1</answer><answer>2</answer>", "tag", "2"), ("4",
        "tag", None),
        ("work\n#### 1,072\n", "hash", "1,072"), ("it is 5 and 1,234.50.", "last_number", "1,234.50"), ("at $18", "last_number", "$18"),
        ("-.5 m", "last_number", "-.5"), ("none", "last_number", None), ("The answer is 42.", "auto", "42"), ("Answer: 3.5. Good", "auto", "3.5"),
        ("first\nb 12\nthen 13% now", "auto", "13%"), (r"<answer>\boxed{9}</answer>", "auto", "9"), (r"\boxed{1} so the answer is 2", "auto", "1"),
    ],
)
def test_extraction(text: str, how: str, answer: str | None) -> None:
    assert extract(text, how) == answer
