"""The worked example of a user's own experiment: its rewards, its problems, its policy, and a run."""

import dataclasses
import functools
import itertools
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

import grpo_scheduler
from grpo_scheduler import Config, chronological_reward, format_reward, main, optimum, score_reward, split_problems
from tests.test_run import only_run, read

ROOT = Path(__file__).resolve().parents[1]
# A 0-3, B 2-4!, C 4-5, D 3-7. The best is A and D with 3 + 4 hours; B counts double.
EVENTS = [["A", 0, 3, 3], ["B", 2, 4, 4], ["C", 4, 5, 1], ["D", 3, 7, 4]]
GRADES = {  # text: format, chronological, score
    "A D": (1, 1, 1), "D A": (1, 0, 1),
    " B C \n": (1, 1, 5 / 7),  # 2 hours that count double, and 1
    "A B": (1, 1, 0),  # both have hour 2
    "<think>A 0-3, then D</think><answer>A D</answer>": (1, 1, 1),
    "<answer>A</answer> no: <answer>A D</answer>": (1, 1, 1),
    "A D D": (0, 0, 0), "A, D": (0, 0, 0), "": (0, 0, 0), "<answer></answer>": (0, 0, 0),
}  # fmt: skip


def grade(text: Any, events: list[list], answer: str) -> tuple[float, ...]:
    """What the three rewards give, with the columns of TRL that they do not need."""
    data: dict[str, Any] = {"completions": [text], "events": [events], "answer": [answer], "prompts": ["?"]}
    return tuple(reward(**data)[0] for reward in (format_reward, chronological_reward, score_reward))


def brute_force(events: list[list]) -> tuple[int, set[str]]:
    """The most hours that count, and all schedules that have them."""
    found: dict[str, int] = {"": 0}
    for size in range(1, len(events) + 1):
        for picked in itertools.combinations(sorted(events, key=lambda e: e[1]), size):
            if all(a[2] <= b[1] or b[2] <= a[1] for a, b in itertools.combinations(picked, 2)):
                found[" ".join(e[0] for e in picked)] = sum(e[3] for e in picked)
    most = max(found.values())
    return most, {text for text, count in found.items() if count == most}


problems = functools.cache(grpo_scheduler.scheduling)


@pytest.mark.parametrize("text", GRADES)
def test_rewards_by_hand(text: str) -> None:
    assert grade(text, EVENTS, "A D") == GRADES[text]
    assert grade([{"role": "assistant", "content": text}], EVENTS, "A D") == GRADES[text]
    every: dict[str, Any] = {"completions": list(GRADES), "events": [EVENTS] * len(GRADES)}
    assert format_reward(**every) == [grades[0] for grades in GRADES.values()]
    assert score_reward(answer=["A D"] * len(GRADES), **every) == [grades[2] for grades in GRADES.values()]


@given(st.text() | st.lists(st.sampled_from(["A", "B", "C", "D", "E", " ", "<answer>", "</answer>"])).map("".join))
def test_rewards_take_any_text(text: str) -> None:
    formatted, chronological, score = grade(text, EVENTS, "A D")
    assert formatted in (0, 1)
    assert chronological in (0, 1)
    assert 0 <= score <= 1
    assert formatted or not (chronological or score)


def test_rewards_take_long_texts_in_linear_time() -> None:
    for text in ("A " * 10**6, "<answer>" * 10**6, " " * 10**6 + "A D"):  # a quadratic one would take hours
        assert 0 <= sum(grade(text, EVENTS, "A D")) <= 3


def test_dynamic_programming_finds_what_brute_force_finds() -> None:
    rng = random.Random(0)
    for _ in range(300):
        spans = [sorted(rng.sample(range(10), 2)) for _ in range(rng.randint(1, 6))]
        events: list = [["ABCDEF"[i], s, e, (e - s) * rng.choice((1, 2))] for i, (s, e) in enumerate(spans)]
        most, schedules = brute_force(events)
        assert sorted(optimum(events)) == sorted(schedules)
        assert all(grade(text, events, text) == (1, 1, 1) for text in schedules)
        assert score_reward(["A"], [optimum(events)[0]], [events]) == [events[0][3] / most]


def test_problems_say_in_words_what_their_events_say() -> None:
    for problem in problems()[:500]:
        parsed = re.findall(r"([A-F]) (\d)-(\d)(!?)", problem["question"])
        assert ", ".join(f"{name} {start}-{end}{mark}" for name, start, end, mark in parsed) == problem["question"]
        counts = [[n, int(s), int(e), (int(e) - int(s)) * (2 if mark else 1)] for n, s, e, mark in parsed]
        assert counts == problem["events"]
        assert 4 <= len(counts) <= 6
        assert all(0 <= s < e <= 9 and e - s <= 4 for _, s, e, _ in counts)
        assert brute_force(problem["events"])[1] == {problem["answer"]}  # one best schedule


def test_no_day_is_trained_on_and_held_out() -> None:
    """Nor are the same events under other letters."""
    train, held_out = split_problems(problems())
    days = [{str(sorted(event[1:] for event in p["events"])) for p in side} for side in (train, held_out)]
    assert not days[0] & days[1]
    assert (train, held_out) == split_problems(grpo_scheduler.scheduling())
    assert len(train) > 10000
    assert len(held_out) > 1000


def test_the_page_shows_code_and_flags_that_exist() -> None:
    page, script = ((ROOT / name).read_text() for name in ("docs/your_own_experiment.md", "grpo_scheduler.py"))
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) >= 3
    for block in blocks:
        for part in block.strip("\n").split("\n\n\n"):
            assert f"\n{part}\n" in script, part
    named = {flag.replace("-", "_") for flag in re.findall(r"(?<![\w-])--([a-z][a-z-]+)", page)} - {"help"}
    assert len(named) > 10
    assert named <= {field.name for field in dataclasses.fields(Config)}


def test_a_short_run_weighs_the_rewards_of_a_policy_that_knows_the_form(tmp_path: Path, one_thread: None) -> None:
    config = Config(num_steps=1, prompts_per_step=4, num_generations=4, eval_samples=128, run_dir=str(tmp_path))
    before, _ = main(config)
    assert before["eval/rewards/format/mean"] > 0.85  # the policy knows the form, and chooses poorly
    assert 0.4 < before["eval/rewards/score/mean"] < 0.6
    for r in read(only_run(tmp_path), "completions"):
        weighted = 0.2 * r["rewards/format"] + 0.2 * r["rewards/chronological"] + r["rewards/score"]
        assert r["reward"] == pytest.approx(weighted)
