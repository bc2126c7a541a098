"""Every answer form in both directions, what holds for any text at all, and what TRL's signature asks for."""

import contextlib
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings, strategies as st

import grpo
import rewards
from rewards import (
    MAX_EQUATIONS,
    MAX_NUMBER_CHARS,
    accuracy_reward,
    answers_match,
    extract_answer,
    format_reward,
    is_parsed,
    reasoning_reward,
)

# Time is benchmarks/reward_time.py's; a busy machine must not fail a test.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

ANSWERS = (Path(__file__).parents[1] / "docs" / "answers.md").read_text(encoding="utf-8")
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

LONG = "9" * MAX_NUMBER_CHARS
# (predicted, gold), which the page cannot show; most pairs are there.
EQUAL = [("\u22123", "-3"), ("\u20133", "-3"), ("72", "24 #### 24\n#### 72 "), (" K.\n", "k"), ("1\xa0000", "1000"),
         ("9" * 5000, "9" * 5000), (LONG, LONG + ".")]  # fmt: skip
UNEQUAL = [(None, "18"), ("", "18"), ("", "."), ("9" * 5000, "9" * 4999), (LONG + "9", LONG)]


def test_answers_match() -> None:
    assert [pair for pair in EQUAL if not answers_match(*pair)] == []
    assert [pair for pair in UNEQUAL if answers_match(*pair)] == []


# What may stand between the numbers of a list. Not a point or a slash, which make one number of two (`18.0`, `3/4`),
# nor what ends a form.
SEPARATORS = [
    *[" ", "  ", "\t", ",", ", ", ";", "; ", ":", "|", " | ", " or ", " and ", ", or ", " to ", " / ", "-", " - "],
    *["=", " = ", "+", "*", " * ", "..", "?", "!", "_", "x", "%", "% ", "$", " $", "&", "<", " < ", "(", ")("],
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


def test_a_gold_answer_matches_itself_or_is_refused() -> None:
    golds = re.findall(r"^\| `.*?` \| `(.*?)` \|", ANSWERS, re.MULTILINE)
    for gold in {*golds, r"\begin{pmatrix}1\\2\end{pmatrix}", "A D", "2024-01-02", r"x \in (1,2)", "?", "\\"}:
        assert accuracy_reward([gold], [gold]) == [1.0]
    for gold in ("<think>yes", "a</think>", "<think>5</think>"):
        with pytest.raises(ValueError, match=r"empty gold answer|nothing can match the gold answer .* of 'How"):
            rewards.load_rewards(["accuracy"], {}, [PROBLEM, {"question": "How many?", "answer": gold}])
    for gold in ("", " \n", "####", "48 + 24 = 72\n#### ", r"\boxed{}"):
        for function in (answers_match, is_parsed, lambda text, gold: accuracy_reward([text], [gold])):
            with pytest.raises(ValueError, match=r"empty gold answer .*: give the row .* or drop the row"):
                function("72", gold)
    with pytest.raises(ValueError, match="shorter"):
        accuracy_reward(["1", "2"], ["1"])


def test_answers_are_read_as_the_page_says() -> None:
    """Also in a thread, where math-verify's own time limit would raise."""
    rows = [line.split("|")[1:-1] for line in ANSWERS.splitlines() if line.startswith("| `")]
    found = [[cell.strip(" `").replace("\\n", "\n") for cell in row] for row in rows]
    assert len(found) > 80

    def read(text: str, gold: str) -> list[str]:
        (record,) = rewards.grade({}, [{"question": "", "answer": gold}], [text], [[]])
        return [record["extracted"] or "nothing", "yes" if record["right"] else "no"]

    with ThreadPoolExecutor(1) as pool:
        assert [row for row in found if pool.submit(read, row[0], row[1]).result() != row[2:]] == []


def test_latex_that_takes_long_is_wrong() -> None:
    began = time.monotonic()
    for latex in ("(a+b+c+d+e+f+g)^{99}", "9^{9^{9}}", "((9^{99})^{99})^{99}", "999999999!", "9^999999999"):
        assert accuracy_reward([rf"\boxed{{{latex}}}"] * 2, [r"\sqrt{2}+x", "7"]) == [0.0, 0.0]
    assert time.monotonic() - began < 120
    assert accuracy_reward([r"\boxed{x+\sqrt2}"], [r"\sqrt{2}+x"]) == [1.0]


MODEL = torch.nn.Linear(1, 1)
PROBLEM = {"question": "What is 1 + 1?", "answer": "2", "level": 3}


async def slow_reward(completions: list[Any], level: list[int], **_: Any) -> list[float]:
    return [float(x) for x in level]


def bare_reward(completions: list[Any]) -> list[float | None]:
    return [float(len(completion[0]["content"])) for completion in completions]


def logging_reward(completions: list[Any], trainer_state: Any, log_metric: Any, log_extra: Any) -> list[float]:
    log_metric("words", 2.5)
    log_extra("first", [completion[0]["content"][:1] for completion in completions])
    return [trainer_state.global_step / 4] * len(completions)


def test_trl_signatures() -> None:
    """`async def`, no **kwargs, and TRL's trainer_state, log_metric and log_extra."""
    names = [f"{__name__}:{name}_reward" for name in ("slow", "bare", "logging")]
    records = rewards.grade(
        rewards.load_rewards(names, {}, [PROBLEM]), [PROBLEM] * 2, ["It is 2", ""], [[1], [1]], step=1
    )
    assert [record["reward"] for record in records] == [3 + 7 + 0.25, 3 + 0 + 0.25]
    assert [(record["words"], record["first"]) for record in records] == [(2.5, "I"), (2.5, "")]


@pytest.mark.parametrize(
    ("name", "told"),
    [("needs", "solution"), ("few", "must give 2"), ("text", "could not convert"), ("org/name", "a model is none"),
     (f"{__name__}:MODEL", "MODEL: .*a model is none")],
)  # fmt: skip
def test_a_reward_that_cannot_be_called_is_refused_at_once(name: str, told: str) -> None:
    script: dict[str, Any] = {"needs_reward": lambda completions, solution: [0.0] * 2, "few_reward": lambda **_: [1.0]}
    with pytest.raises((ValueError, TypeError), match=told):
        rewards.load_rewards([name], script | {"text_reward": lambda **_: ["good"] * 2}, [PROBLEM])


def test_is_parsed() -> None:
    number = ["<answer>17</answer>", "it may be 17", "17 or 19"], ["<answer>17 or 19</answer>", "<answer>many</answer>",
              "<answer></answer> 17", "<answer>1,00</answer>", "many", "", "9" * MAX_NUMBER_CHARS + "9"]  # fmt: skip
    text = ["no", "<answer>no</answer>"], ["<answer> </answer> no", "<think>no</think> ", "<think>no", " "]
    for gold, (parsed, unparsed) in (("18", number), ("yes", text)):
        assert [is_parsed(text, gold) for text in parsed + unparsed] == [True] * len(parsed) + [False] * len(unparsed)


FORMATTED = "<think>a</think><answer>b</answer>"
UNFORMATTED = [
    *["", "b", "<think>a</think>", "<answer>b</answer>", "<answer>b</answer><think>a</think>", "so " + FORMATTED],
    *["<think></think><answer>b</answer>", "<think> \n</think><answer>b</answer>", "<think>a</think><answer></answer>"],
    *["<think>a</think><answer>\t</answer>", "<think>a</think> so <answer>b</answer>", FORMATTED + " so"],
    FORMATTED * 2,
    *[FORMATTED + "<answer>b</answer>", "<think>a</think>" + FORMATTED, "<think>a<answer>b</answer></think>"],
    *["<think>a<answer>c</answer></think><answer>b</answer>", "<think><think>a</think></think><answer>b</answer>"],
    *["<think>a</think><answer><answer>b</answer></answer>", "<think>a</think><answer>b", "<think>a<answer>b</answer>"],
    *["a</think><answer>b</answer>", "<think>a</think><answer>b</think>", "<Think>a</Think><Answer>b</Answer>"],
]


def test_format_reward() -> None:
    formatted = [FORMATTED, " \n<think>\na\n</think>\n\n<answer>\nb\n</answer>\n"]
    formatted += ["<think>a < b > c</think><answer><b>d</b></answer>"]
    assert format_reward(formatted) == [1.0] * 3
    assert [text for text in UNFORMATTED if format_reward([text]) != [0.0]] == []


def test_a_think_block_that_the_prompt_opened_is_whole() -> None:
    tokenizer = SimpleNamespace(batch_decode=lambda *_, **__: ["a</think><answer>2</answer>"])
    run = SimpleNamespace(
        tokenizer=tokenizer, rewards=rewards.load_rewards(["format", "accuracy"], {}), step=0, num_steps=1
    )
    run.sampling = {"eos_ids": [7]}
    batch: Any = SimpleNamespace(
        completion_mask=torch.ones(1, 1).int(), completion_ids=torch.ones(1, 1), entropy=torch.ones(1, 1)
    )
    for run.opening, reward in (("<think>", 2.0), ("", 1.0)):
        assert [record["reward"] for record in grpo.score(run, [PROBLEM], batch)] == [reward]


STEPS = {  # how many calculations each text shows
    0: ["2 + 3 * 4 = 20", "I think step by step and I calculate. " * 20, "1 2 3 + 4 * =", "1 = 1", "36 = 36 = 36",
        "5 + 0 = 5, 0 + 5 = 5, 5 - 0 = 5, 5 * 0 = 0, 0 / 5 = 0", "5 * 1 = 5, 1 * 5 = 5, 5 / 1 = 5, 2 + 3 * 1 = 5",
        "4 + 3 = 3 + 4", "12 * 3 = 35", "10 / 3 = 3.33", "5 + 3 = 8 + 2 = 10", "1 / 0 = 1, 5 / 0 = 0",
        "12 * 3 = 36.5, 12 * 3 = 365, 12 * 3 = 36,5", "5 + 2 = 7,000", "(1 + 2) * 3 + 4 = 7", "(1+2)*3+4=7",
        "2x + 3 + 4 = 7", "3 + 4 = 7 * (2)", "3 + 4 = 7^2", "3 + 4 = 7e5", "25 + 25 = 50%", "20% * 5 + 2 = 7",
        "1,02 + 3 = 5", "9.1.3 + 4 = 5.3", "x2 + 3 = 5", "(8)-5 + 8 = 3", "2 ** 3 = 8", "2 + 3\n= 5",
        "\u0663 + \u0664 = \u0667"],
    1: ["12 * 3 = 36", "48/2 = 24", "$5 + $3 = $8", r"\$5 + \$3 = \$8", "48/2 = <<48/2=24>>24 clips",
        "1,000 + 1 = 1,001", "20 * .5 = 10.0", "-5 + 3 = -2", "5 - 8 = \u22123", "100 - 50 - 30 = 20",
        "2 + 3 * 4 = 14", "12 - 6 / 2 = 9", "24 = 48 / 2", "2*3+4 = 6+4 = 10", "x = 12 * 3 = 36.", "**12 * 3 = 36**",
        "1. 12 * 3 = 36", "1 / 4 = 0.25", "12 * 3 = 36 " * 50, "12 * 3 = 36, 12*3=36, 12.0 * $3 = 36, 3 * 12 = 36",
        "4 + 3 = 7, 3 + 4 = 7, 3 - -4 = 7", "5 - 3 = 2, 5-3=2, -3 + 5 = 2"],
    2: ["3 x 4 = 12 and 3 \u00d7 5 = 15", "8 / 4 = 2, 4 / 8 = 0.5"],
    3: [r"\( 3 \times 4 = 12 \), 12 \div 4 = 3, 3 \cdot 5 = 15", "- 12 * 3 = 36\n- 36 + 2 = 38\n* 38 / 2 = 19"],
    4: ["1 + 2 = 3, 5 - 1 = 4, 5 / 5 = 1, 5 - 5 = 0"],
}  # fmt: skip


def test_reasoning_reward() -> None:
    for steps, texts in STEPS.items():
        assert [text for text in texts if reasoning_reward([text]) != [pytest.approx(min(steps / 3, 1.0))]] == []
    equations = [f"{i} + {i} = {2 * i}\n" for i in range(2, 50)]
    assert reasoning_reward(["".join(equations[:n]) for n in (0, 2, 4, 48)]) == [0, pytest.approx(2 / 3), 1, 1]
    assert reasoning_reward(["2 + 2 = 5 " * MAX_EQUATIONS + "2 + 2 = 4", "2 * " * 100 + f"2 = {2**101}"]) == [0.0] * 2


def test_completion_text() -> None:
    said = {"role": "assistant", "content": "a"}
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    tool: list[dict[str, Any]] = [{"role": "assistant", "content": None}, {"role": "tool", "content": "17"}]
    assert [rewards.completion_text(text) for text in ("a <b>", [], [said], [{"content": "a"}])] == [
        "a <b>",
        "",
        "a",
        "a",
    ]
    assert rewards.completion_text([*tool, said, {"role": "assistant", "content": parts}]) == "a\nab"


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
@example("", r"\text{}")
@example("9" * 5000, "9" * 5000)
@example("\ud800", "\ud800")
def test_total_on_any_text(text: str, gold: str) -> None:
    """What every function owes to any text: no exception, a finite number in its range, the same from messages."""
    answer = extract_answer(text)
    assert answer is None or (answer and answer == answer.strip() and len(answer) <= len(text))
    completions: list[rewards.Completion] = [text, [{"role": "assistant", "content": text}]]
    assert format_reward(completions) in ([0.0] * 2, [1.0] * 2)
    reasoned = reasoning_reward(completions)
    assert 0.0 <= reasoned[0] == reasoned[1] <= 1.0  # false for nan
    try:
        accurate = accuracy_reward(completions, [gold] * 2)
    except ValueError as error:
        assert "empty gold answer" in str(error)  # noqa: PT017
    else:
        assert accurate in ([0.0] * 2, [1.0] * 2)
        assert accurate[0] <= is_parsed(text, gold)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (29, 29, 0.8830, 1.0)],
)
def test_wilson_interval(right: int, count: int, low: float, high: float) -> None:
    """The first three are Newcombe's (1998), method 3."""
    assert rewards.wilson_interval(right, count) == pytest.approx((low, high), abs=5e-5)
    for ends in (rewards.wilson_interval(0, 10**13), rewards.wilson_interval(10**13, 10**13)):
        assert 0.0 <= ends[0] < ends[1] <= 1.0


def test_likely_cause() -> None:
    for used, shares, told in [
        (["accuracy"], (0.6, 1.0, 0.9), "harder"), (["accuracy"], (0.0, 0.0, 1.0), "template"),
        (["accuracy"], (0.0, 0.0, 0.9), "--max-completion-length"), (["accuracy"], (0.0, 0.9, 0.0), "are found"),
        (["accuracy", "format"], (0.0, 0.4, 0.5), "no answer can be parsed"), (["half"], (0.0, 0.9, 0.9), "never stop"),
        (["half"], (1.0, 1.0, 0.0), "^half is the same"), (["half", "format"], (0.0, 0.0, 0.0), r"^half \+ format"),
    ]:  # fmt: skip
        assert re.search(told, rewards.likely_cause(*shares, used))


def test_lost_signal_is_told_once() -> None:
    first, row = {"step": 0.0}, {"train/frac_reward_zero_std": 0.0, "train/frac_all_right": 1.0}
    row |= {"completions/parsed_ratio": 1.0, "completions/clipped_ratio": 0.0}
    flat = row | {"train/frac_reward_zero_std": 1.0}
    assert rewards.signal_line([first, row]) == "before training 100% of the groups carry signal"
    assert rewards.signal_line([first, flat]).endswith("signal: the task is solved; take a harder --task")
    assert rewards.signal_line([first, flat], ["same"]).endswith("change --rewards or the prompt")
    few = row | {"train/frac_reward_zero_std": 0.9, "train/accuracy": 0.1}
    assert rewards.signal_line([first, few], size=2).endswith("signal, with 16 --num-generations at most 81%")
    assert rewards.signal_line([first, few], ["half"], 2) == "before training 10% of the groups carry signal"
    history, said = [first, *[row] * 10], []
    for _ in range(30):
        history.append(flat)
        said.append(bool(rewards.signal_line(history)))
    assert [i for i, line in enumerate(said) if line] == [19]
    assert rewards.signal_line([first, *[row] * 40]) == rewards.signal_line([first, *[flat] * 40]) == ""


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
    assert accuracy_reward([text] * 2, ["yes", r"\sqrt{2}"]) == [0.0] * 2
    with contextlib.suppress(ValueError):  # it is no gold answer
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
