"""The worked example of a user's own experiment: its rewards, its problems, its policy, and a run."""

import dataclasses
import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

import grpo_scheduler
from grpo_scheduler import Config, chronological_reward, format_reward, main, optimum, score_reward, split_problems

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tiny_policy"))

import make_scheduler  # noqa: E402

# A 0-3, B 2-4!, C 4-5, D 3-7. The best is A and D with 3 + 4 hours; B counts double.
EVENTS = [["A", 0, 3, 3], ["B", 2, 4, 4], ["C", 4, 5, 1], ["D", 3, 7, 4]]
GRADES = {  # text: format, chronological, score
    "A D": (1, 1, 1),
    "D A": (1, 0, 1),
    "A": (1, 1, 3 / 7),
    " B C \n": (1, 1, 5 / 7),  # 2 hours that count double, and 1
    "A B": (1, 1, 0),  # both have hour 2
    "C B": (1, 0, 5 / 7),
    "<think>A 0-3, then D</think><answer>A D</answer>": (1, 1, 1),
    "<answer>A</answer> no: <answer>A D</answer>": (1, 1, 1),
    "A D D": (0, 0, 0),
    "A  D": (0, 0, 0),
    "A, D": (0, 0, 0),
    "A E": (0, 0, 0),
    "a d": (0, 0, 0),
    "AD": (0, 0, 0),
    "": (0, 0, 0),
    "<answer></answer>": (0, 0, 0),
}


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


def problems() -> list[dict[str, Any]]:
    return grpo_scheduler.scheduling()


# Rewards


@pytest.mark.parametrize("text", GRADES)
def test_rewards_by_hand(text: str) -> None:
    assert grade(text, EVENTS, "A D") == GRADES[text]
    assert grade([{"role": "assistant", "content": text}], EVENTS, "A D") == GRADES[text]


def test_rewards_are_in_the_order_of_the_completions() -> None:
    data: dict[str, Any] = {"completions": list(GRADES), "events": [EVENTS] * len(GRADES)}
    scores = score_reward(answer=["A D"] * len(GRADES), **data)
    assert [*zip(format_reward(**data), chronological_reward(**data), scores, strict=True)] == list(GRADES.values())


@given(st.text() | st.lists(st.sampled_from(["A", "B", "C", "D", "E", " ", "<answer>", "</answer>"])).map("".join))
def test_rewards_take_any_text(text: str) -> None:
    formatted, chronological, score = grade(text, EVENTS, "A D")
    assert formatted in (0, 1)
    assert chronological in (0, 1)
    assert 0 <= score <= 1
    assert formatted or not (chronological or score)


def test_rewards_take_long_texts_in_linear_time() -> None:
    """A quadratic one would take hours."""
    for text in ("A " * 10**6, "<answer>" * 10**6, " " * 10**6 + "A D"):
        assert 0 <= sum(grade(text, EVENTS, "A D")) <= 3


# Problems


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
    assert (train, held_out) == split_problems(problems())
    assert len(train) > 10000
    assert len(held_out) > 1000


def test_problems_come_from_a_file_as_well(tmp_path: Path) -> None:
    for name, rows in (("train", problems()[:8]), ("test", problems()[8:12])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(dataset_path=str(tmp_path / "train.jsonl"), test_path=str(tmp_path / "test.jsonl"))
    train, held_out, test = grpo_scheduler.load_problems(config)
    assert (len(train), held_out, test) == (8, [], problems()[8:12])
    with pytest.raises(SystemExit):
        grpo_scheduler.load_problems(Config(test_path=str(tmp_path / "test.jsonl")))


# The policy


def test_demonstrations_are_mostly_well_formed_and_seldom_the_best() -> None:
    rng, train = random.Random(0), split_problems(problems())[0][:2000]
    grades = [grade(make_scheduler.demonstrate(p, rng), p["events"], p["answer"]) for p in train]
    formatted, chronological, score = (fmean(values) for values in zip(*grades, strict=True))
    assert 0.93 < formatted < 0.97
    assert 0.88 < chronological < 0.94
    assert 0.5 < score < 0.75
    assert fmean(values[2] == 1 for values in grades) < 0.3


def test_demonstrations_are_of_training_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of the supervised loop itself, watched; nothing is saved."""
    shown: list[str] = []
    real = make_scheduler.demonstrate

    def record(problem: dict, rng: random.Random) -> str:
        shown.append(problem["question"])
        return real(problem, rng)

    monkeypatch.setattr(make_scheduler, "demonstrate", record)
    monkeypatch.setattr(make_scheduler, "STEPS", 2)
    monkeypatch.setattr(make_scheduler, "save", lambda model: None)
    threads = torch.get_num_threads()
    make_scheduler.main()
    torch.set_num_threads(threads)
    assert len(shown) == 2 * make_scheduler.BATCH_SIZE
    assert not set(shown) & {p["question"] for p in split_problems(problems())[1]}


@pytest.fixture(scope="module")
def answers() -> list[tuple[str, dict[str, Any]]]:
    """The policy's greedy answer to each of 256 held-out problems."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, held_out = ROOT / "tiny_policy" / "scheduler", split_problems(problems())[1][:256]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = grpo_scheduler.tokenize_prompts(tokenizer, held_out, Config())
    batch = grpo_scheduler.rollout(
        policy, prompts, num_generations=1, max_completion_length=12, temperature=1.0,
        eos_ids=[tokenizer.eos_token_id], noise=None,
    )  # fmt: skip
    ids = [row[mask] for row, mask in zip(batch.completion_ids, batch.completion_mask, strict=True)]
    return list(zip(tokenizer.batch_decode(ids, skip_special_tokens=True), held_out, strict=True))


def test_policy_knows_the_format_and_leaves_room_for_a_better_score(answers: list[tuple[str, dict[str, Any]]]) -> None:
    grades = [grade(text, p["events"], p["answer"]) for text, p in answers]
    formatted, _, score = (fmean(values) for values in zip(*grades, strict=True))
    assert formatted > 0.9
    assert 0.4 < score < 0.8


def test_policy_is_small_and_shares_the_tiny_policys_tokenizer() -> None:
    folder = ROOT / "tiny_policy" / "scheduler"
    assert (folder / "model.safetensors").stat().st_size < 2.3e6
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (ROOT / "tiny_policy" / name).read_bytes()


# The script


def changed_lines() -> list[str]:
    done = subprocess.run(["diff", "grpo.py", "grpo_scheduler.py"], cwd=ROOT, capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if line[0] in "<>"]


def test_the_difference_is_at_most_120_lines() -> None:
    assert 0 < len(changed_lines()) <= 120


def test_a_short_run_measures_every_reward_on_held_out_problems(tmp_path: Path) -> None:
    config = Config(num_steps=2, prompts_per_step=4, num_generations=4, eval_samples=16, run_dir=str(tmp_path))
    results = main(config)
    (run,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    last = [r for r in rows if r["split"] == "eval" and r["mode"] == "sampled" and r["step"] == 2]
    assert len(last) == 16
    for name in ("format", "chronological", "score"):
        assert results[f"eval/rewards/{name}/mean"] == pytest.approx(fmean(r[f"rewards/{name}"] for r in last))
        assert 0 <= results[f"rewards/{name}/mean"] <= 1
    weighted = [0.2 * r["rewards/format"] + 0.2 * r["rewards/chronological"] + r["rewards/score"] for r in last]
    assert results["eval/reward"] == pytest.approx(fmean(weighted))


def test_command_line_finds_the_rewards_in_the_script_itself(tmp_path: Path) -> None:
    flags = ["--preset", "tiny", "--num-steps", "0", "--eval-samples", "8", "--run-dir", str(tmp_path)]
    command = [sys.executable, str(ROOT / "grpo_scheduler.py"), *flags, "--rewards", "score=1.0", "no_such=1.0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no_such=1.0" in done.stderr
    done = subprocess.run([*command[:-1]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "eval/rewards/score/mean" in done.stdout


def test_the_page_shows_code_and_flags_that_exist() -> None:
    page, script = ((ROOT / name).read_text() for name in ("docs/your_own_experiment.md", "grpo_scheduler.py"))
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) >= 4
    for block in blocks:
        for part in block.strip("\n").split("\n\n\n"):
            assert f"\n{part}\n" in script, part
    named = {flag.replace("-", "_") for flag in re.findall(r"(?<![\w-])--([a-z][a-z-]+)", page)} - {"help"}
    assert len(named) > 10
    assert named <= {field.name for field in dataclasses.fields(Config)}


@pytest.mark.slow
def test_the_score_rises(tmp_path: Path) -> None:
    """A quarter of the tiny preset's steps; docs/your_own_experiment.md has all of them, with three seeds."""
    results = main(Config(num_steps=100, eval_every=0, save_every=0, run_dir=str(tmp_path)))
    assert results["eval/rewards/score/mean"] > results["eval/rewards/score/mean_before"] + 0.15
