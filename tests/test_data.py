"""Tasks, the split into train and held-out, data files, prompt order, prompts, reward functions by name."""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import grpo
import grpo_ablations
import grpo_ladder
from rewards import accuracy_reward, format_reward, load_rewards
from tests.conftest import Capture, Patch, refusal

pytestmark = pytest.mark.usefixtures("one_thread", "no_report")
TASKS = {name: grpo.TASKS[name] for name in ("arithmetic", "simple_math")} | grpo_ladder.TASKS


def solve(task: str, question: str) -> str:
    """The answer, worked out from the question's text by other means than the generator's."""
    words = question.rstrip("?.").split()
    if task in ("arithmetic", "simple_math"):
        a, sign, b = words[2:]
        return str(int(a) + int(b) if sign == "+" else int(a) - int(b))
    if task == "echo":
        return question.removeprefix("Repeat: ")
    if task == "comparison":
        return "yes" if int(words[1]) > int(words[3].rstrip("?")) else "no"
    if task == "counting":
        return str(len(question.removeprefix("How many words: ").split()))
    if task == "binary":
        return bin(int(words[1]))[2:]
    if task == "pattern":
        letters = [ord(c) - ord("A") for c in question.removeprefix("Which letter is next: ").split()]
        steps = {(b - a) % 26 for a, b in itertools.pairwise(letters)}
        assert len(steps) == 1
        return chr((letters[-1] + steps.pop()) % 26 + ord("A"))
    first, second = (int(word.rstrip(".")) for word in words if word.rstrip(".").isdigit())
    return str(first + second if "gets" in words or "finds" in words else first - second)


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_is_right_and_no_held_out_problem_is_in_train_in_any_word_order(task: str) -> None:
    problems = TASKS[task]()
    assert problems == TASKS[task]()
    assert len({p["question"] for p in problems}) == len(problems)
    answers = [p["answer"] for p in problems]
    assert answers == [solve(task, p["question"]) for p in problems]
    assert accuracy_reward(answers, answer=answers) == [1.0] * len(problems)

    train, held_out = grpo.split_problems(problems)
    if task == "simple_math":
        assert (len(train), len(held_out)) == (12, 0)
        return
    assert len(held_out) >= {"arithmetic": 500}.get(task, 50)
    sides = [{tuple(sorted(p["question"].replace("?", " ?").split())) for p in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert sorted(p["question"] for p in train + held_out) == sorted(p["question"] for p in problems)
    # The order of a file has no say in it.
    for ours, theirs in zip((train, held_out), grpo.split_problems(problems[::-1]), strict=True):
        assert {p["question"] for p in ours} == {p["question"] for p in theirs}


def test_rl_prompts_are_train_prompts_in_permutations() -> None:
    """Two epochs of what the training loop asks for: every train problem once in each, no held-out one."""
    config = grpo.Config(prompts_per_step=1000)
    train, held_out, test = grpo.load_problems(config)
    assert len(held_out) == config.eval_samples
    assert not test
    steps = [grpo.problems_of_step(train, step, config) for step in range(1, 2 * len(train) // 1000 + 2)]
    asked = [p["question"] for problems in steps for p in problems]
    first, second = asked[: len(train)], asked[len(train) : 2 * len(train)]
    assert sorted(first) == sorted(second) == sorted(p["question"] for p in train)
    assert len({*map(tuple, (first, second, [p["question"] for p in train]))}) == 3
    assert not set(asked) & {p["question"] for p in held_out}
    other = grpo.problems_of_step(train, 1, dataclasses.replace(config, seed=2))
    assert [p["question"] for p in other] != asked[:1000]
    # A step of more prompts than there are problems goes through whole epochs.
    many = [p["question"] for p in grpo.problems_of_step(grpo.simple_math(), 1, grpo.Config(prompts_per_step=30))]
    assert (len(set(many[:12])), len(set(many[12:24])), len(many)) == (12, 12, 30)


def test_randomness_is_a_function_of_seed_stream_and_step() -> None:
    def draw(seed: int, stream: str, step: int) -> torch.Tensor:
        return grpo.uniform_noise(seed, stream, step, 200, 3)

    first = draw(1, "sampling", 2)
    torch.manual_seed(5)
    assert torch.equal(first, draw(1, "sampling", 2))
    assert first.dtype == torch.float64
    assert 0 <= first.min() < 0.05 < 0.95 < first.max() < 1
    others = [draw(2, "sampling", 1), draw(1, "eval", 2), draw(12, "sampling", 2), draw(1, "sampling", 22)]
    assert not any(torch.isin(first, other).any() for other in others)


def test_gsm8k_asks_for_the_main_configuration(capsys: Capture, monkeypatch: Patch) -> None:
    asked = []

    def load_dataset(*names: str, split: str) -> Any:
        asked.append((*names, split))
        rows = [{"question": f"{split} {i}", "answer": f"so\n#### {i}"} for i in range(200)]
        return SimpleNamespace(to_list=lambda: rows)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    train, held_out, test = grpo.load_problems(grpo.Config(task="gsm8k"))
    assert sorted(asked) == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train")]
    assert len(train) + len(held_out) == len(test) == 200
    assert all(p["question"].startswith("train") for p in train + held_out)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: 1 / 0)
    assert "--dataset-path" in refusal(capsys, grpo.load_problems, grpo.Config(task="gsm8k"))


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (['{"question": "a", "answer": "1"}', '{"question": "b"}'], "line 2 (KeyError('answer'))"),
        (['{"question": "a", "answer": "1"}', "", "  ", "not json"], "line 4"),  # blank ones are counted
        (['{"answer": "1"}'], "line 1 (KeyError('question'))"), (["[1, 2]"], "line 1"), (["", " "], "is empty"),
        (['{"question": "a", "answer": "#### "}'], "empty gold answer"), (['{"question": 3, "answer": "5"}'], "line 1"),
        (['{"question": "a", "answer": 5.5}'], "line 1"), (['{"question": "a", "answer": null}'], "line 1"),
    ],
)  # fmt: skip
def test_bad_line_is_named(lines: list[str], told: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    error = refusal(capsys, grpo.read_jsonl, str(path))
    assert str(path) in error
    assert told in error


def test_lines_as_they_come(tmp_path: Path) -> None:
    """Blank lines, Windows's ends of lines, whole numbers as answers, further columns, separators within a text."""
    rows = [{"question": "a\u2028b\x85c", "answer": "1", "level": 3}, {"question": "d", "answer": -17}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path = tmp_path / "data.jsonl"
    path.write_bytes(f"\n{lines[0]}\r\n\r\n  \n{lines[1]}".encode())
    assert grpo.read_jsonl(str(path)) == [rows[0], {"question": "d", "answer": "-17"}]


def test_gsm8k_real_files(gsm8k: Path) -> None:
    config = grpo.Config(task="gsm8k", dataset_path=str(gsm8k / "train.jsonl"), test_path=str(gsm8k / "test.jsonl"))
    train, held_out, test = grpo.load_problems(dataclasses.replace(config, eval_samples=0))
    assert len(train) + len(held_out) == 7473
    assert len(test) == 1319
    assert 800 < len(held_out) < 1100
    assert not {p["question"] for p in train} & {p["question"] for p in held_out + test}
    assert grpo.load_problems(config)[1] == held_out[:512]


PROBLEM = {"question": "What is 12 + 34?", "answer": "46"}


def test_chat_prompt_is_the_template_and_a_system_prompt_only_where_one_is_set(tokenizer: Any) -> None:
    def text(**settings: Any) -> str:
        (ids,) = grpo.tokenize_prompts(tokenizer, [PROBLEM], grpo.Config(**settings))
        return tokenizer.decode(ids)

    question = "<|im_start|>user\nWhat is 12 + 34?<|im_end|>\n<|im_start|>assistant\n"
    assert text() == text(system_prompt="") == text(rewards=("accuracy=2.0", "format=0.5")) == question
    assert text(system_prompt="Be brief.") == f"<|im_start|>system\nBe brief.<|im_end|>\n{question}"
    assert text(prompt_format="plain") == "Question: What is 12 + 34?\nAnswer:"
    plain = text(prompt_format="plain", system_prompt="Be brief.")
    assert plain == "Be brief.\n\nQuestion: What is 12 + 34?\nAnswer:"
    assert [preset.system_prompt for preset in grpo.PRESETS.values()] == [
        None,
        "Answer with the number only.",
        grpo.TAG_PROMPT,
    ]


def test_a_prompt_is_never_cut_and_has_a_template(tokenizer: Any, monkeypatch: Patch, capsys: Capture) -> None:
    problems = [PROBLEM, {"question": "What is 12 + 34, please?", "answer": "46"}]
    longest = max(map(len, grpo.tokenize_prompts(tokenizer, problems, grpo.Config())))
    assert grpo.tokenize_prompts(tokenizer, problems, grpo.Config(max_prompt_length=longest))
    given = tokenizer, problems, grpo.Config(max_prompt_length=longest - 1)
    assert f"{longest} tokens: raise --max-prompt-length" in refusal(capsys, grpo.tokenize_prompts, *given)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert "--prompt-format plain" in refusal(capsys, grpo.tokenize_prompts, tokenizer, [PROBLEM], grpo.Config())


def test_rewards_are_found_by_name() -> None:
    """In the script itself, then in rewards.py, then in any module; the weight is 1 if it is not given."""
    from trl.rewards import think_format_reward

    def letters_reward(completions: list[Any], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    specs = ("accuracy", "letters=0.25", "format=-1", "trl.rewards:think_format_reward=1e-1")
    assert load_rewards(specs, {"letters_reward": letters_reward}) == {
        "accuracy": (accuracy_reward, 1.0), "letters": (letters_reward, 0.25), "format": (format_reward, -1.0),
        "think_format_reward": (think_format_reward, 0.1),
    }  # fmt: skip
    # The script's own comes first.
    assert load_rewards(("format",), {"format_reward": letters_reward}) == {"format": (letters_reward, 1.0)}


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("accuracy=nan", "accuracy"), ("format=inf", "format"), ("accuracy=-inf", "accuracy"),
        ("accuracy=much", "much"), ("cleverness=1", "cleverness"), ("no_such_module:reward=1", "no_such_module"),
        ("json:no_such_reward", "no_such"), ("", "ValueError"), ("reasoning", "reasoning: .*twice"),
        ("trl.rewards:half_reward", "half_reward"),  # another function of that name
    ],
)  # fmt: skip
def test_a_reward_that_cannot_be_is_named(
    spec: str, told: str, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setattr("trl.rewards.half_reward", format_reward, raising=False)
    rewards = "reasoning=0.5", f"{__name__}:half_reward", spec
    config = grpo.Config(rewards=rewards, task="simple_math", num_steps=1, run_dir=str(tmp_path / "runs"))
    assert re.search(rf"cannot use --rewards .*{told}", refusal(capsys, grpo.main, config))
    assert not (tmp_path / "runs").exists()


CALLS: list[dict[str, Any]] = []


def half_reward(**columns: Any) -> list[float | None]:
    CALLS.append(columns)
    return [1.0 if i % 2 else None for i in range(len(columns["completions"]))]


def run_on(rows: list[dict[str, Any]], folder: Path, script: ModuleType = grpo, **changes: Any) -> list[dict[str, Any]]:
    """What main returns for a short run on these problems."""
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes = {"num_steps": 1, "prompts_per_step": 2, "num_generations": 3, "max_completion_length": 4} | changes
    CALLS.clear()
    path, runs = str(folder / "data.jsonl"), str(folder / "runs")
    return script.main(script.Config(task="gsm8k", dataset_path=path, run_dir=runs, **sizes))


def test_rewards_are_called_as_trl_calls_them_and_none_does_not_apply(tmp_path: Path) -> None:
    rows = [{"question": f"What is {a} + 1?", "answer": a + 1, "level": a} for a in (2, 3)]
    rewards = ("accuracy=2.0", f"{__name__}:half_reward=0.5", "trl.rewards:think_format_reward")
    metrics = run_on(rows, tmp_path, rewards=rewards, learning_rate=0.0)[-1]
    (call,) = [call for call in CALLS if len(call["completions"]) == 6]
    assert [c[0]["content"] for c in call["prompts"]] == call["question"]
    assert call["level"][:3] == [call["level"][0]] * 3
    assert sorted(call["level"]) == [2] * 3 + [3] * 3
    assert call["answer"] == [str(level + 1) for level in call["level"]]
    assert all(c[0].keys() == {"role", "content"} and c[0]["role"] == "assistant" for c in call["completions"])
    assert all(1 <= len(ids) <= 4 and isinstance(ids[0], int) for ids in call["completion_ids"])
    assert metrics["rewards/half_reward/mean"] == 1.0  # over those that it applies to
    accuracy, thought = metrics["rewards/accuracy/mean"], metrics["rewards/think_format_reward/mean"]
    assert metrics["train/reward"] == pytest.approx(2 * accuracy + 0.25 + thought)


def rare_reward(completions: list[Any], **_: Any) -> list[float | None]:
    """In the first step it judges two of eight completions, and nothing before and after."""
    CALLS.append({"completions": completions})
    first = len(completions) == 8 and sum(len(call["completions"]) == 8 for call in CALLS) == 1
    return [1.0, None, 0.0, *[None] * 5] if first else [None] * len(completions)


@pytest.mark.parametrize("script", [grpo, grpo_ablations])
def test_what_no_reward_judges_is_in_neither_mean_nor_loss(script: ModuleType, tmp_path: Path) -> None:
    """Nor has it a KL. It stays in N. A step in which nothing is judged changes no weight."""
    rows = [{"question": f"What is {a} + 1?", "answer": str(a + 1)} for a in (2, 3)]
    kl = {"beta": 1.0} if script is grpo_ablations else {}
    settings: dict[str, Any] = {"num_generations": 4, "num_steps": 2, "temperature": 2.0, "warmup_steps": 0, **kl}
    run_on(rows, tmp_path, script, rewards=(f"{__name__}:rare_reward",), **settings)
    (run,) = (tmp_path / "runs").iterdir()
    # It is called for NaN and Infinity, which are not JSON.
    strict = json.JSONDecoder(parse_constant=pytest.fail)
    before, first, last = map(strict.decode, (run / "metrics.jsonl").read_text().splitlines())
    records = list(map(strict.decode, (run / "completions.jsonl").read_text().splitlines()))
    trained = [record for record in records if record["split"] == "train"]
    assert [r["reward"] for r in trained] == [r["rewards/rare_reward"] for r in trained] == [1, None, 0, *[None] * 13]
    assert [r["advantage"] for r in trained] == [0.5, 0, -0.5, *[0] * 13]
    assert not any("reward/" in key or key.endswith("/reward") for row in (before, last) for key in row)
    assert first["train/reward"] == first["rewards/rare_reward/mean"] == 0.5
    assert first["train/frac_reward_zero_std"] == 0.5
    length = trained[0]["length"] - trained[2]["length"]
    assert first["train/loss"] == pytest.approx(-0.5 * length / (8 * 4), abs=1e-6)
    assert first["train/grad_norm"] > 0
    assert last["train/loss"] == last["train/grad_norm"] == 0
    assert last["train/frac_all_right"] + last["train/frac_all_wrong"] == last["train/frac_reward_zero_std"] == 1
