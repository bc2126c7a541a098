"""Every answer form in both directions, and what holds for any text at all."""

import json
import os
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st

from rewards import (
    MAX_EQUATIONS,
    MAX_NUMBER_CHARS,
    Completion,
    accuracy_reward,
    answers_match,
    completion_text,
    extract_answer,
    format_reward,
    is_parsed,
    likely_cause,
    reasoning_reward,
    signal_line,
    wilson_interval,
)

# Time is benchmarks/reward_time.py's; a busy machine must not fail a test.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# What a policy may write around an answer; each of them must accept the right answer and reject the wrong one.
FORMS = {
    "answer block": "<think>2 and 3</think><answer>{}</answer>",
    "answer block over lines": "<answer>\n{}\n</answer>",
    "last answer block": "<answer>71</answer> no, <answer>{}</answer> is it, not 72",
    "answer block before an unclosed one": "<answer>{}</answer> or <answer>71",
    "answer block before boxed": r"<answer>{}</answer> \boxed{{71}} #### 71",
    "boxed": r"So it is $\boxed{{{}}}$, out of 71.",
    "last boxed": r"\boxed{{71}} and then \boxed{{{}}}",
    "boxed in boxed": r"\boxed{{71 \boxed{{{}}}}}",
    "boxed among stray braces": r"{{ }} }} {{ \{{ \boxed{{{}}} }}",
    "boxed before an unclosed one": r"\boxed{{{}}} or \boxed{{71",
    "boxed before hashes": "\\boxed{{{}}}\n#### 71",
    "hashes": "There are 70 of 71.\n#### {}",
    "last hashes": "#### 71\n#### {}\nThat was 72.",
    "hashes before a phrase": "The answer is 71\n#### {}",
    "phrase": "There are 71. The answer is {}. I checked it 2 times!",
    "last phrase": "The answer is 71. No, THE  ANSWER IS {}\nwhich is more than 70",
    "phrase with final and a colon": "Therefore the final answer is:\n\n{}",
    "plain": "{}",
}
TEXT_FORMS = {name: form for name, form in FORMS.items() if name != "plain"} | {
    "plain": " {}\n",
    "plain behind a thought": "<think>is it 71?</think>\n{}",
    "plain behind a thought that the prompt opened": "is it 71?</think> {}",
}

# (predicted, gold): equal
EQUAL = [
    ("18", "18"), ("1,000", "1000"), ("1000", "1,000"), ("1,234,567.5", "1234567.5"), ("$18", "18"), (r"\$18", "18"),
    ("$ 18", "18"), ("€18", "18"), ("18", "$18"), ("18.0", "18"), ("18.", "18"), (".5", "0.5"), ("3/4", "0.75"),
    ("0.75", "3/4"), ("6/8", "3/4"), ("1,000/4", "250"), (r"\frac{3}{4}", "0.75"), (r"-\dfrac{ 3 }{4}", "-0.75"),
    (r"\frac{-3}{4}", "-3/4"), ("-3", "-3"), ("\u22123", "-3"), ("\u20133", "-3"), ("-$3", "-3"), ("$-3", "-3"),
    ("+3", "3"), ("-0", "0"), ("50%", "50"), (r"50\%", "50"), ("50 %", "50"), ("50", "50%"), ("18 dollars", "18"),
    ("18 dollars.", "18"), ("5 apples.", "5"), ("18 km/h", "18"), ("18km/h", "18"), ("18 m2", "18"), ("18 m^2", "18"),
    ("18 m²", "18"), ("a 10th", "10"), ("The total is 18", "18"), ("**18**", "18"), ("(18)", "18"), ("x = 18", "18"),
    ("x_1 = 18", "18"), (r"\text{18}", "18"), (r"18\text{ km}", "18"), ("1{,}000", "1000"), (r"\boxed{18}", "18"),
    ("00100101", "100101"), ("100101", "00100101"), ("0.1", "1/10"),
    ("0.30000000000000000000000000001", "0.30000000000000000000000000001"), ("72", "24 #### 24\n#### 72 "),
    ("Yes", "yes"), (" K.\n", "k"), ("mango tiger river", "Mango Tiger River."), (r"\text{yes}", "yes"),
    ("yes 5", "Yes 5"), ("18 dollars", "18 dollars"), ("no", "Is it? #### no"), ("...", "..."), (".", "."),
    ("1,00", "1,00"), ("1/0", "1/0"), ("9" * 5000, "9" * 5000), ("9" * MAX_NUMBER_CHARS, "9" * MAX_NUMBER_CHARS + "."),
]  # fmt: skip

# (predicted, gold): not equal
UNEQUAL = [
    (None, "18"), ("", "18"), ("18", "81"), ("18", "-18"), ("-18", "18"), ("$18", "1.8"), ("18.01", "18"),
    ("1,000", "1"), ("3/4", "3"), ("3/4", "4"), ("50%", "0.5"), ("0.30000000000000000000000000001", "0.3"),
    ("0.3333333333333333", "1/3"), ("17 or 18", "18"), ("18 or 17", "18"), ("17, 18", "18"), ("17,18", "18"),
    ("17,18", "1718"), ("1 000", "1000"), ("1 1/2", "1.5"), ("18 18", "18"), ("18 = 18", "18"), ("3*6 = 18", "18"),
    ("3 / 4", "0.75"), ("10-12", "12"), ("10-12", "-12"), ("2:30", "30"), ("1,00", "1"), ("1,00", "100"),
    ("1,00", "1.00"), ("1,0000", "10000"), ("1000,000", "1000000"), ("0,500", "500"), ("1.2.3", "1.2"),
    ("1/2/3", "0.5"), ("1/0", "1"), ("1/0", "0"), ("1e5", "1"), ("1e5", "100000"), ("1e999", "1"), ("5^2", "5"),
    ("5^n", "5"), ("5²", "5"), ("5x3", "5"), ("2½", "2"), ("\u0663", "3"), ("5\u0663", "5"), ("18万", "18"),
    ("18_000", "18"), (r"1\frac{1}{2}", "5.5"), (r"\frac{1}{2}5", "1/25"), (r"\frac{1}{0}", "0"),
    (r"5\text{5}", "55"), ("nan", "0"), ("inf", "0"), ("eighteen", "18"), ("x2", "2"), ("9" * 5000, "9" * 4999),
    ("18", "18 dollars"), ("100", "1,00"), ("9" * MAX_NUMBER_CHARS + "9", "9" * MAX_NUMBER_CHARS),
    ("yes", "no"), ("yes 5", "yes"), ("yes", "yes 5"), ("5", "yes 5"),
    ("mango tiger", "mango tiger river"), ("mangotiger river", "mango tiger river"), ("", "."),
]  # fmt: skip

# text, what extract_answer makes of it
EXTRACTED = [
    ("", None), ("no number", None), ("m2 of x1", None), ("The price is -$3, or 50%.", "50"),
    ("it fell to -$3.", "-$3"), ("from 10-12", "12"), ("Left:\n- 18 eggs", "18"), ("we saw 5^2", "5^2"),
    ("so ...18", "18"), ("<answer></answer> 18", None), ("<answer> \n </answer> 18", None),
    ("<answer>17</answer><answer></answer>", None), (r"\boxed{} #### 18", None), (r"\boxed{17} \boxed{ }", None),
    ("18\n####", None), ("####\n18", None), ("It is 18. The answer is", None), ("The answer is . So 18", None),
    ("<answer>none</answer> 18", "none"), ("<answer>17 or 18</answer>", "17 or 18"), ("<answer>18", "18"),
    ("<answer>17 or 18", "18"), ("<answer>17<answer>18", "18"), ("18</answer>", "18"),
    ("</answer>17<answer> 18", "18"), ("<answer>17<answer>18</answer>", "18"), ("<answer>18</answer></answer>", "18"),
    ("<answer>17</answer", "17"), ("<Answer>17</Answer> 18", "18"), (r"\boxed{18", "18"),
    (r"\boxed{\frac{3}{4}}", r"\frac{3}{4}"), (r"\boxed{17\}", "17"), (r"\boxed {18}, not 17", "18"),
    (r"as \frac{3}{4}", "3/4"), ("#### 18 apples\n17", "18 apples"), ("The answer is 1.5. Not 2.", "1.5"),
    ("The answer is 17? No, 18.", "17? No, 18"), ("The answer isn't 17 but 18", "18"),
    ("bathe answer is no, 18", "18"),
]  # fmt: skip


def test_answers_match() -> None:
    assert [pair for pair in EQUAL if not answers_match(*pair)] == []
    assert [pair for pair in UNEQUAL if answers_match(*pair)] == []


@pytest.mark.parametrize(("text", "expected"), EXTRACTED)
def test_extract_answer(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


# What may stand between the numbers of a list. Not a point or a slash, which make one number of two (`18.0`, `3/4`),
# nor what ends a form.
SEPARATORS = [
    *[" ", "  ", "\t", ",", ", ", ";", "; ", ":", "|", " | ", " or ", " and ", ", or ", " to ", " / ", "-", " - "],
    *["=", " = ", "+", "*", " * ", "..", "?", "!", "_", "x", "^", "%", "% ", "$", " $", "&", "<", " < ", "(", ")("],
    *[r"\,", r"\ ", r"\quad ", r"\text{ or }", r"\\", "{,}", "<br>", "][", "\0", "\xa0", "\u200b", "\u2013", "\u3001"],
]  # fmt: skip
LINE_SEPARATORS = ["\n", ",\n", "\n- ", "\r\n", "\\\\\n"]  # in a block only: other forms end with their line


@pytest.mark.parametrize("form", [form for name, form in FORMS.items() if name != "plain"])
def test_a_list_of_numbers_in_an_explicit_form_earns_nothing(form: str) -> None:
    in_block = form.partition("{}")[2].lstrip().startswith(("</answer>", "}}"))
    for separator in SEPARATORS + LINE_SEPARATORS * in_block:
        for numbers in (["17", "18"], ["-3", "0.50", "7"], ["18", "18"], ["1", "24", "567"]):
            text = form.format(separator.join(numbers))
            assert accuracy_reward([text] * len(numbers), numbers) == [0.0] * len(numbers), text
            assert not is_parsed(text, "18"), text


@pytest.mark.parametrize("form", TEXT_FORMS.values(), ids=TEXT_FORMS)
@pytest.mark.parametrize(("gold", "wrong"), [("yes", "no"), ("K", "L"), ("mango tiger river", "mango river tiger")])
def test_each_form_accepts_the_right_and_rejects_the_wrong_text(form: str, gold: str, wrong: str) -> None:
    texts = [form.format(gold), form.format(gold.upper()), form.format(wrong), form.format(f"{gold} {wrong}")]
    assert accuracy_reward(texts, [gold] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_text_gold_takes_no_stray_word_or_number() -> None:
    texts = ["yes, 5", "5", "I say yes", "<answer>yes", "<think>yes", "<think>yes</think>", "<answer></answer>yes"]
    assert accuracy_reward(texts, ["yes"] * len(texts)) == [0.0] * len(texts)


@pytest.mark.parametrize("gold", ["", " \n", "####", "48 + 24 = 72\n#### "])
def test_empty_gold_answer_raises(gold: str) -> None:
    for function in (answers_match, is_parsed, lambda text, gold: accuracy_reward([text], [gold])):
        with pytest.raises(ValueError, match=r"empty gold answer .*: give the row .* or drop the row"):
            function("72", gold)
    with pytest.raises(ValueError, match="shorter"):
        accuracy_reward(["1", "2"], ["1"])


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("<answer>17</answer>", "18", True), ("it may be 17", "18", True), ("17 or 19", "18", True),
        ("<answer>17 or 19</answer>", "18", False), ("<answer>many</answer>", "18", False),
        ("<answer></answer> 17", "18", False), ("<answer>1,00</answer>", "18", False), ("many", "18", False),
        ("", "18", False), ("no", "yes", True), ("<answer>no</answer>", "yes", True),
        ("<answer> </answer> no", "yes", False), ("<think>no</think> ", "yes", False), ("<think>no", "yes", False),
        (" ", "yes", False), ("9" * MAX_NUMBER_CHARS + "9", "5", False),
    ],
)  # fmt: skip
def test_is_parsed(text: str, gold: str, expected: bool) -> None:
    assert is_parsed(text, gold) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>b</answer>", 1.0), (" \n<think>\na\n</think>\n\n<answer>\nb\n</answer>\n", 1.0),
        ("<think>a < b > c</think><answer><b>d</b></answer>", 1.0), ("", 0.0), ("b", 0.0), ("<think>a</think>", 0.0),
        ("<answer>b</answer>", 0.0), ("<answer>b</answer><think>a</think>", 0.0),
        ("<think></think><answer>b</answer>", 0.0), ("<think> \n</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer></answer>", 0.0), ("<think>a</think><answer>\t</answer>", 0.0),
        ("so <think>a</think><answer>b</answer>", 0.0), ("<think>a</think> so <answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer> so", 0.0), ("<think>a</think><answer>b</answer><answer>b</answer>", 0.0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.0), ("<think>a</think><answer>b</answer>" * 2, 0.0),
        ("<think>a<answer>b</answer></think>", 0.0), ("<think>a<answer>c</answer></think><answer>b</answer>", 0.0),
        ("<think><think>a</think></think><answer>b</answer>", 0.0),
        ("<think>a</think><answer><answer>b</answer></answer>", 0.0), ("<think>a</think><answer>b", 0.0),
        ("<think>a<answer>b</answer>", 0.0), ("a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</think>", 0.0), ("<Think>a</Think><Answer>b</Answer>", 0.0),
    ],
)  # fmt: skip
def test_format_reward(text: str, expected: float) -> None:
    assert format_reward([text]) == [expected]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("12 * 3 = 36", 1), ("48/2 = 24", 1), ("$5 + $3 = $8", 1), (r"\$5 + \$3 = \$8", 1),
        ("48/2 = <<48/2=24>>24 clips", 1), ("3 x 4 = 12 and 3 \u00d7 5 = 15", 2),
        (r"\( 3 \times 4 = 12 \), 12 \div 4 = 3, 3 \cdot 5 = 15", 3), ("1,000 + 1 = 1,001", 1), ("20 * .5 = 10.0", 1),
        ("-5 + 3 = -2", 1), ("5 - 8 = \u22123", 1), ("100 - 50 - 30 = 20", 1), ("2 + 3 * 4 = 14", 1),
        ("2 + 3 * 4 = 20", 0), ("12 - 6 / 2 = 9", 1), ("24 = 48 / 2", 1), ("2*3+4 = 6+4 = 10", 1),
        ("x = 12 * 3 = 36.", 1), ("**12 * 3 = 36**", 1), ("- 12 * 3 = 36\n- 36 + 2 = 38\n* 38 / 2 = 19", 3),
        ("1. 12 * 3 = 36", 1), ("1 / 4 = 0.25", 1), ("8 / 4 = 2, 4 / 8 = 0.5", 2), ("12 * 3 = 36 " * 50, 1),
        ("12 * 3 = 36, 12*3=36, 12.0 * $3 = 36, 3 * 12 = 36", 1), ("4 + 3 = 7, 3 + 4 = 7, 3 - -4 = 7", 1),
        ("5 - 3 = 2, 5-3=2, -3 + 5 = 2", 1), ("I think step by step and I calculate. " * 20, 0), ("1 2 3 + 4 * =", 0),
        ("1 = 1", 0), ("36 = 36 = 36", 0), ("5 + 0 = 5, 0 + 5 = 5, 5 - 0 = 5, 5 * 0 = 0, 0 / 5 = 0", 0),
        ("5 * 1 = 5, 1 * 5 = 5, 5 / 1 = 5, 2 + 3 * 1 = 5", 0), ("1 + 2 = 3, 5 - 1 = 4, 5 / 5 = 1, 5 - 5 = 0", 4),
        ("4 + 3 = 3 + 4", 0), ("12 * 3 = 35", 0), ("10 / 3 = 3.33", 0), ("5 + 3 = 8 + 2 = 10", 0),
        ("1 / 0 = 1, 5 / 0 = 0", 0), ("12 * 3 = 36.5, 12 * 3 = 365, 12 * 3 = 36,5", 0), ("5 + 2 = 7,000", 0),
        ("(1 + 2) * 3 + 4 = 7", 0), ("(1+2)*3+4=7", 0), ("2x + 3 + 4 = 7", 0), ("3 + 4 = 7 * (2)", 0),
        ("3 + 4 = 7^2", 0), ("3 + 4 = 7e5", 0), ("25 + 25 = 50%", 0), ("20% * 5 + 2 = 7", 0), ("1,02 + 3 = 5", 0),
        ("9.1.3 + 4 = 5.3", 0), ("x2 + 3 = 5", 0), ("(8)-5 + 8 = 3", 0), ("2 ** 3 = 8", 0), ("2 + 3\n= 5", 0),
        ("\u0663 + \u0664 = \u0667", 0),
    ],
)  # fmt: skip
def test_reasoning_reward(text: str, steps: int) -> None:
    assert reasoning_reward([text]) == [pytest.approx(min(steps / 3, 1.0))]


def test_reasoning_reward_is_bounded() -> None:
    steps = [f"{i} + {i} = {2 * i}" for i in range(2, 50)]
    assert reasoning_reward(["\n".join(steps[:n]) for n in range(5)] + ["\n".join(steps)]) == [
        pytest.approx(reward) for reward in (0, 1 / 3, 2 / 3, 1, 1, 1)
    ]
    assert reasoning_reward(["2 + 2 = 5 " * MAX_EQUATIONS + "2 + 2 = 4"]) == [0.0]
    assert reasoning_reward(["2 * " * 100 + f"2 = {2**101}"]) == [0.0]


def test_completion_text() -> None:
    assert completion_text("a <b>") == "a <b>"
    assert completion_text([]) == ""
    assert completion_text([{"role": "assistant", "content": "a"}]) == "a"
    assert completion_text([{"content": "a"}]) == "a"
    assert completion_text([{"role": "assistant", "content": None}]) == ""
    parts: list[dict[str, str]] = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert completion_text([{"role": "assistant", "content": parts}]) == "ab"
    conversation: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "17"},
        {"role": "assistant", "content": "It is"},
        {"role": "assistant", "content": "18"},
    ]
    assert completion_text(conversation) == "It is\n18"


MARKUP = [
    *["<answer>", "</answer>", "<think>", "</think>", r"\boxed{", "{", "}", "#### ", "the answer is ", "\\"],
    *["\n", " ", ".", ",", "-", "$", "%", "/", "=", "+", "*", "^", "(", ")", "1", "0", "12", "1,000", "3/4", "x"],
    *["yes", r"\frac{", r"\text{", "\u0663", "²", "½", "\u2212", "\0", "\ud800", "1e999", "nan"],
]
any_text = st.one_of(
    st.text(st.characters()),  # every code point, lone surrogates too
    st.lists(st.sampled_from(MARKUP), max_size=30).map("".join),
)


@given(any_text, any_text)
@example("", "####")
@example("9" * 5000, "9" * 5000)
@example("\ud800", "\ud800")
def test_total_on_any_text(text: str, gold: str) -> None:
    """What every function owes to any text: no exception, a finite number in its range, the same from messages."""
    answer = extract_answer(text)
    assert answer is None or (answer and answer == answer.strip() and len(answer) <= len(text))
    completions: list[Completion] = [text, [{"role": "assistant", "content": text}]]
    assert format_reward(completions) in ([0.0] * 2, [1.0] * 2)
    reasoned = reasoning_reward(completions)
    assert 0.0 <= reasoned[0] == reasoned[1] <= 1.0  # false for nan
    if gold.rpartition("####")[2].strip():
        accurate = accuracy_reward(completions, [gold] * 2)
        assert accurate in ([0.0] * 2, [1.0] * 2)
        assert accurate[0] <= is_parsed(text, gold)
        assert answers_match(gold.rpartition("####")[2], gold)
    else:
        with pytest.raises(ValueError, match="empty gold answer"):
            accuracy_reward([text], [gold])


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (29, 29, 0.8830, 1.0)],
)
def test_wilson_interval(right: int, count: int, low: float, high: float) -> None:
    """The first three are Newcombe's (1998), method 3."""
    assert wilson_interval(right, count) == pytest.approx((low, high), abs=5e-5)
    for ends in (wilson_interval(0, 10**13), wilson_interval(10**13, 10**13)):
        assert 0.0 <= ends[0] < ends[1] <= 1.0


def test_likely_cause() -> None:
    assert "harder" in likely_cause(0.6, 1.0, 0.9)
    assert "chat template" in likely_cause(0.0, 0.0, 1.0)
    assert "--max-completion-length" in likely_cause(0.0, 0.0, 0.9)
    assert "no answer can be parsed" in likely_cause(0.0, 0.4, 0.5)
    assert "wrong" in likely_cause(0.0, 0.9, 0.0)


def test_lost_signal_is_told_once() -> None:
    first = {"step": 0.0}
    row = {"train/reward": 1.0, "train/frac_reward_zero_std": 0.0, "train/frac_all_right": 1.0}
    row |= {"completions/parsed_ratio": 1.0, "completions/clipped_ratio": 0.0}
    flat = row | {"train/frac_reward_zero_std": 1.0}
    assert signal_line([first, row]) == "before training 100% of the groups carry signal"
    assert signal_line([first, flat]).startswith("before training 0% of the groups carry signal: the task is solved")
    history, said = [first, *[row] * 10], []
    for _ in range(30):
        history.append(flat)
        said.append(bool(signal_line(history)))
    assert [i for i, line in enumerate(said) if line] == [19]
    assert signal_line([first, *[row] * 40]) == signal_line([first, *[flat] * 40]) == ""


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4), st.integers(1, 99), st.sampled_from(sorted(FORMS)))
@example(Decimal("1033011406307849740815958.0160"), 7, "plain")  # more digits than a sum of Decimals keeps
def test_numbers_through_every_form(number: Decimal, factor: int, form: str) -> None:
    value = Fraction(number)
    golds = [f"{number:f}", str(value), str(value + Fraction(1, 10_000))]
    latex = rf"{'-' * (value < 0)}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    for written in (f"{number:,f}", f"{value.numerator * factor}/{value.denominator * factor}", latex):
        assert accuracy_reward([FORMS[form].format(written)] * 3, golds) == [1.0, 1.0, 0.0], written


@given(st.integers(2, 999), st.integers(2, 999), st.integers(-5, 5), st.sampled_from("+-*/"))
def test_an_equation_earns_if_and_only_if_it_is_true(left: int, right: int, error: int, operator: str) -> None:
    if operator == "/":
        left *= right  # so that the result is whole
    results = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}
    text = f"so {left} {operator} {right} = {results[operator] + error} and"
    assert reasoning_reward([text, text * 9]) == [pytest.approx((error == 0) / 3)] * 2


# Whatever a policy may loop on, far longer than any completion. Quadratic code does not come back from this, so
# returning is the test.
ADVERSARIAL = [
    *["<answer>", "<answer></answer>", "</answer>", "<think>", "<think></think>", "(", "{", "}", "[", "<", "\\"],
    *["1", "9", "1,", "1,000", ",000", "1.", "1/", "1 ", "1=", "1+", "1 + ", "1+ ", "1  +  ", "1+1=2 ", "1+1=3 "],
    *["=", "+", "-", "- ", "--1", "$", r"\$", "3x", "1%", "1^", "a.", "a ", "the ", "the answer is ", "the final "],
    *["####", "# ", ".", r"\boxed{", r"\boxed{}", r"\boxed", r"\frac{1}{", r"{\frac{", r"{\text{", r"\{", " ", "\n"],
    *["\t", "\0", "\ud800", "\u0663", "²", "½", "0", "<answer>18</answer>", r"\boxed{18}", "{,}", r"\frac{1}{2}"],
    *["2 + 3 = 5\n", "1/0", "5/0 = 1\n", "7/" * 90 + "7 = 1\n", "9" * 4999 + " = 1\n", r"\text{ apples}", "\u2028"],
]  # fmt: skip


@pytest.mark.parametrize("piece", ADVERSARIAL)
def test_linear_time_on_repetition(piece: str) -> None:
    text = piece * (200_000 // len(piece))
    for hostile in (text, f"the final answer is {text}", rf"\boxed{text}", f"5 = {text}"):
        assert accuracy_reward([hostile], ["77"]) == [0.0]
        assert format_reward([hostile]) == [0.0]
        assert reasoning_reward([hostile])[0] <= 1 / 3 + 1e-9
    assert accuracy_reward([text], ["yes"]) == [0.0]
    if text.strip() and not text.endswith("####"):
        assert accuracy_reward(["yes"], [text]) == [0.0]


@pytest.mark.skipif("GSM8K_DIR" not in os.environ, reason="GSM8K_DIR names no folder with GSM8K")
@pytest.mark.parametrize(("split", "size"), [("train", 7473), ("test", 1319)])
def test_gsm8k(split: str, size: int) -> None:
    lines = (Path(os.environ["GSM8K_DIR"]) / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == size
    # Each gold answer is a number: the same value written otherwise is right, another one is wrong.
    finals = [answer.rpartition("####")[2].strip().replace(",", "") for answer in answers]
    assert accuracy_reward(answers, answers) == [1.0] * size
    assert accuracy_reward([f"<answer>{2 * int(final)}/2</answer>" for final in finals], answers) == [1.0] * size
    assert accuracy_reward([f"<answer>{int(final) + 1}</answer>" for final in finals], answers) == [0.0] * size
    assert all(is_parsed(answer, answer) for answer in answers)
    # The reference solutions calculate; those by algebra, in brackets or with percentages earn less.
    assert sum(reasoning_reward(answers)) / size > 0.8
