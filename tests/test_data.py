"""Tasks, the split into train and held-out, data files, prompt order, rewards as they are called."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import grpo
import grpo_ladder
from rewards import accuracy_reward

TASKS = {name: grpo.TASKS[name] for name in ("arithmetic", "simple_math")} | grpo_ladder.TASKS
ROOT = Path(__file__).resolve().parents[1]


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
def test_every_answer_is_right(task: str) -> None:
    problems = TASKS[task]()
    assert len({p["question"] for p in problems}) == len(problems)
    assert all(p["answer"] == solve(task, p["question"]) for p in problems)
    assert accuracy_reward([p["answer"] for p in problems], answer=[p["answer"] for p in problems]) == [1.0] * len(
        problems
    )


@pytest.mark.parametrize("task", TASKS)
def test_problems_are_the_same_in_every_run(task: str) -> None:
    assert TASKS[task]() == TASKS[task]()


@pytest.mark.parametrize("task", [task for task in TASKS if task != "simple_math"])
def test_held_out_problems_are_not_in_train_also_in_another_word_order(task: str) -> None:
    train, held_out = grpo.split_problems(TASKS[task]())
    assert len(held_out) >= {"arithmetic": 500}.get(task, 50)
    words = [sorted(p["question"].replace("?", " ?").split()) for p in train]
    assert not {tuple(w) for w in words} & {tuple(sorted(p["question"].replace("?", " ?").split())) for p in held_out}


def test_simple_math_is_twelve_problems_without_a_held_out_set() -> None:
    train, held_out = grpo.split_problems(grpo.simple_math())
    assert (len(train), len(held_out)) == (12, 0)


def test_rl_prompts_are_train_prompts() -> None:
    """Two epochs of what the training loop asks for: every train problem twice, no held-out one."""
    config = grpo.Config(prompts_per_step=1000)
    train, held_out, test = grpo.load_problems(config)
    assert len(held_out) == config.eval_samples
    assert not test
    steps = [grpo.problems_of_step(train, step, config) for step in range(1, 2 * len(train) // 1000 + 2)]
    asked = [p["question"] for problems in steps for p in problems][: 2 * len(train)]
    assert sorted(asked) == sorted(2 * [p["question"] for p in train])
    assert asked[: len(train)] != asked[len(train) :]
    assert not set(asked) & {p["question"] for p in held_out}


def test_more_prompts_than_problems_are_whole_epochs() -> None:
    config = grpo.Config(task="simple_math", prompts_per_step=30)
    asked = [p["question"] for p in grpo.problems_of_step(grpo.simple_math(), 1, config)]
    assert len(set(asked[:12])) == len(set(asked[12:24])) == 12
    assert len(asked) == 30


def test_randomness_is_a_function_of_seed_stream_and_step() -> None:
    def draw(seed: int, stream: str, step: int) -> torch.Tensor:
        return grpo.uniform_noise(seed, stream, step, 2, 3)

    assert torch.equal(draw(1, "sampling", 2), draw(1, "sampling", 2))
    others = [draw(2, "sampling", 1), draw(1, "eval", 2), draw(12, "sampling", 2), draw(1, "sampling", 22)]
    assert not any(torch.equal(draw(1, "sampling", 2), other) for other in others)


# GSM8K and its files


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_gsm8k_asks_for_the_main_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*names: str, split: str) -> list[dict[str, str]]:
        asked.append((*names, split))
        return [{"question": f"{split} {i}", "answer": f"so\n#### {i}"} for i in range(200)]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    train, held_out, test = grpo.load_problems(grpo.Config(task="gsm8k"))
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert len(train) + len(held_out) == len(test) == 200
    assert all(p["question"].startswith("train") for p in train + held_out)


def test_hub_unreachable_names_the_cure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*names: str, split: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(SystemExit) as caught:
        grpo.load_problems(grpo.Config(task="gsm8k"))
    assert caught.value.code == 2
    assert "--dataset-path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "number"),
    [
        (['{"question": "a", "answer": "1"}', '{"question": "b"}'], 2),
        (["not json"], 1),
        (["[1, 2]"], 1),
        (['{"question": "a", "answer": "#### "}'], 1),
        (['{"question": "a", "answer": 5}'], 1),
        (['{"question": "a", "answer": "1"}', ""], 2),
    ],
)
def test_bad_line_is_named(lines: list[str], number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "data.jsonl", *lines)
    with pytest.raises(SystemExit) as caught:
        grpo.read_jsonl(str(path))
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert f"{path} line {number}" in error
    assert error.count("\n") == 1


def test_line_separators_inside_a_text_do_not_split_a_line(tmp_path: Path) -> None:
    line = json.dumps({"question": "a\u2028b\x85c", "answer": "1"}, ensure_ascii=False)
    path = tmp_path / "data.jsonl"
    path.write_bytes((line + "\r\n" + line + "\n").encode())
    assert [p["question"] for p in grpo.read_jsonl(str(path))] == ["a\u2028b\x85c"] * 2


def test_gsm8k_real_files(gsm8k: Path) -> None:
    config = grpo.Config(task="gsm8k", dataset_path=str(gsm8k / "train.jsonl"), test_path=str(gsm8k / "test.jsonl"))
    train, held_out, test = grpo.load_problems(dataclasses.replace(config, eval_samples=0))
    assert len(train) + len(held_out) == 7473
    assert len(test) == 1319
    assert 800 < len(held_out) < 1100


# Prompts


def test_chat_prompt_is_the_template_and_the_tag_prompt_only_where_format_is_rewarded(tokenizer: Any) -> None:
    problems = [{"question": "What is 12 + 34?", "answer": "46"}]
    (plain,) = grpo.tokenize_prompts(tokenizer, problems, grpo.Config(rewards=("accuracy=2.0",)))
    assert tokenizer.decode(plain) == "<|im_start|>user\nWhat is 12 + 34?<|im_end|>\n<|im_start|>assistant\n"
    (tagged,) = grpo.tokenize_prompts(tokenizer, problems, grpo.Config(rewards=("accuracy=2.0", "format=0.5")))
    assert tokenizer.decode(tagged).startswith(f"<|im_start|>system\n{grpo.TAG_PROMPT}<|im_end|>\n<|im_start|>user")
    (own,) = grpo.tokenize_prompts(tokenizer, problems, grpo.Config(system_prompt="Be brief."))
    assert "Be brief." in tokenizer.decode(own)


def test_plain_prompt_needs_no_template(tokenizer: Any) -> None:
    (ids,) = grpo.tokenize_prompts(
        tokenizer, [{"question": "1 + 1?", "answer": "2"}], grpo.Config(prompt_format="plain", rewards=("accuracy=1",))
    )
    assert tokenizer.decode(ids) == "Question: 1 + 1?\nAnswer:"


# Rewards as the script calls them


def test_rewards_are_called_as_trl_calls_them_and_none_does_not_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def half(prompts: Any, completions: Any, completion_ids: Any, level: Any, **kwargs: Any) -> list[float | None]:
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, level=level, rest=kwargs)
        return [1.0, None]

    functions: Any = {"half": (half, 0.5), "accuracy": (accuracy_reward, 2.0)}
    problems = [{"question": "q", "answer": "7", "level": 3}] * 2
    columns = grpo.compute_rewards(functions, problems, ["7", "7"], [[1], [2, 3]], Path())
    assert columns == {"reward": [2.5, 2.0], "rewards/half": [1.0, None], "rewards/accuracy": [1.0, 1.0]}
    assert seen["prompts"] == [[{"role": "user", "content": "q"}]] * 2
    assert seen["completions"] == [[{"role": "assistant", "content": "7"}]] * 2
    assert seen["ids"] == [[1], [2, 3]]
    assert seen["level"] == [3, 3]
    assert seen["rest"]["answer"] == ["7", "7"]


@pytest.mark.parametrize("values", [[1.0], [1.0, float("nan")], [float("inf"), 0.0], None, ["good", "bad"]])
def test_a_bad_reward_function_is_named(values: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    functions: Any = {"broken": (lambda **kwargs: values, 1.0)}
    problems = [{"question": "q", "answer": "7"}] * 2
    with pytest.raises(SystemExit) as caught:
        grpo.compute_rewards(functions, problems, ["first", "sec\x1b[2Jond"], [[1], [2]], tmp_path)
    assert caught.value.code == 7
    error = capsys.readouterr().err
    second = values and len(values) == 2 and values[0] == 1.0
    assert "'broken'" in error
    assert (r"'sec\x1b[2Jond'" if second else "'first'") in error  # the one that is to blame, in a harmless form
    rows = [json.loads(line) for line in (tmp_path / "failed_batch.jsonl").read_text().splitlines()]
    assert rows == [{"question": "q", "answer": "7", "completion": text} for text in ("first", "sec\x1b[2Jond")]


def test_a_reward_from_trl_works(tokenizer: Any) -> None:
    functions = grpo.load_rewards(("accuracy=2.0", "trl.rewards:think_format_reward=0.5"))
    texts = ["<think>1 + 1 = 2</think>2", "3"]
    columns = grpo.compute_rewards(functions, [{"question": "1 + 1?", "answer": "2"}] * 2, texts, [[1], [2]], Path())
    assert columns["reward"] == [2.5, 0.0]
