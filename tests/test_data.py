"""Tasks, the split into train and held-out, data files, prompt order, prompts, reward functions by name."""

import copy
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
    assert (len(held_out), test) == (config.eval_samples, [])
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


GOOD = b'{"question": "a", "answer": "1"}'
BAD_LINES = [
    b'{"question": "b"}', b'{"answer": "1"}', b"not json", b"[1, 2]", b'"a"', b"[" * 100_000, "\ufeff".encode("utf-16"),
    b'{"question": "a", "answer": ""}', b'{"question": 3, "answer": "5"}',
    b'{"question": "\\ud800", "answer": "1"}', b'{"question": "a", "answer": "\\udfff"}', GOOD[:-1] + b', "level": 3}',
    '{"question": "\xe9", "answer": "1"}'.encode("latin-1"), '{"question": "a", "answer": "1"}'.encode("utf-16"),
    *(b'{"question": "a", "answer": %s}' % value for value in (b"true", b"null", b"NaN", b"[1]", b'{"a": 1}')),
    b'{"question": ["a"], "answer": "1"}',
]  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_line_is_named_without_the_internals_of_python(line: bytes, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join([GOOD, b"", b"  ", line]))  # blank ones are counted
    error = refusal(capsys, grpo.read_jsonl, str(path))
    assert error.startswith(f'error: {path}, line 4: it must be {{"question": "text", "answer": "text"}} in UTF-8')
    assert "Error" not in error


def test_lines_as_they_come(tmp_path: Path, capsys: Capture) -> None:
    """A mark before UTF-8, blank lines, Windows's ends of lines, numbers as answers, separators within a text."""
    texts = ['{"question": "a\u2028b\x85c", "level": 3, "answer": ' + answer for answer in ('"1"}', "-17}", "3.0}")]
    path = tmp_path / "data.jsonl"
    path.write_bytes(f"\ufeff{texts[0]}\r\n\r\n  \n{texts[1]}\n\ufeff{texts[2]}".encode())
    rows = [{"question": "a\u2028b\x85c", "level": 3, "answer": answer} for answer in ("1", "-17", "3.0")]
    assert grpo.read_jsonl(str(path)) == rows
    path.write_text("\n \n")
    assert "is empty" in refusal(capsys, grpo.read_jsonl, str(path))


def test_problems_that_are_all_alike_are_refused(capsys: Capture) -> None:
    """Whichever side of the split they are on: 0 + 1 would be held out. Fewer than 100 are never split."""
    for number in (0, 1, 2, 3):
        orders = [f"What is {number} + 1?", f"What is 1 + {number}?"]
        problems = [{"question": orders[i % 2], "answer": str(number + 1)} for i in range(120)]
        assert "alike" in refusal(capsys, grpo.split_problems, problems)
        assert len(grpo.split_problems(problems[:99])[0]) == 99
    many = [{"question": f"What is {i % 5 + 1} + 1?", "answer": str(i % 5 + 2)} for i in range(500)]
    assert list(map(len, grpo.split_problems(many))) == [500, 0]  # only the first line of a run says so


def test_gsm8k_real_files(gsm8k: Path) -> None:
    config = grpo.Config(task="gsm8k", dataset_path=str(gsm8k / "train.jsonl"), test_path=str(gsm8k / "test.jsonl"))
    train, held_out, test = grpo.load_problems(dataclasses.replace(config, eval_samples=0))
    assert (len(train) + len(held_out), len(test)) == (7473, 1319)
    assert 800 < len(held_out) < 1100
    assert not {p["question"] for p in train} & {p["question"] for p in held_out + test}
    assert grpo.load_problems(config)[1] == held_out[:512]


PROBLEM, PLAIN = {"question": "What is 12 + 34?", "answer": "46"}, "Question: What is 12 + 34?\nAnswer:"


def test_chat_prompt_is_the_template_and_a_system_prompt_where_one_is_set(
    tokenizer: Any, monkeypatch: Patch, capsys: Capture
) -> None:
    def text(**settings: Any) -> str:
        (ids,) = grpo.tokenize_prompts(tokenizer, [PROBLEM], grpo.Config(**settings))
        return tokenizer.decode(ids)

    question = "<|im_start|>user\nWhat is 12 + 34?<|im_end|>\n<|im_start|>assistant\n"
    assert text() == text(rewards=("accuracy=2.0", "format=0.5")) == question
    assert text(system_prompt="Be brief.") == f"<|im_start|>system\nBe brief.<|im_end|>\n{question}"
    # An empty system message is a message: without one the templates of Qwen2.5 and SmolLM2 put their own.
    assert text(system_prompt="") == f"<|im_start|>system\n<|im_end|>\n{question}"
    assert text(prompt_format="plain") == text(prompt_format="plain", system_prompt="") == PLAIN
    assert text(prompt_format="plain", system_prompt="Be brief.") == f"Be brief.\n\n{PLAIN}"
    systems = [preset.system_prompt for preset in grpo.PRESETS.values()]
    assert systems == [None, "Answer with the number only.", grpo.TAG_PROMPT]
    thinking = "{% if enable_thinking is false %}<think></think>{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + thinking)
    assert text(chat_template_kwargs='{"enable_thinking": true}') == text() == question
    assert text(chat_template_kwargs='{"enable_thinking": false}') == f"{question}<think></think>"
    for kwargs in ("{", "[1]", "3"):
        config = grpo.Config(chat_template_kwargs=kwargs)
        assert "check --system-prompt, --chat-template-kwargs" in refusal(capsys, grpo.render, tokenizer, [], config)


@pytest.mark.parametrize(("limit", "count"), [(0, 2), (17, 2), (18, 1), (21, 1)])
def test_a_prompt_is_never_cut(limit: int, count: int, tokenizer: Any, capsys: Capture) -> None:
    problems = [PROBLEM, {"question": "What is 12 + 34, please?", "answer": "46"}]
    lengths = [len(ids) for ids in grpo.tokenize_prompts(tokenizer, problems, grpo.Config(max_prompt_length=22))]
    assert lengths == [18, 22]
    error = refusal(capsys, grpo.tokenize_prompts, tokenizer, problems, grpo.Config(max_prompt_length=limit))
    assert f"{count} prompts are too long, such as '{problems[-count]['question']}'" in error
    assert "--max-prompt-length within the model's positions" in error


BAD_TEMPLATES = {
    "none": None, "syntax": "{% if %}", "an exception": "{{ raise_exception('not for you') }}", "empty": "{# #}",
    "no system role": "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}",
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_TEMPLATES)
def test_a_chat_template_that_fails_is_refused(kind: str, tokenizer: Any, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", BAD_TEMPLATES[kind])
    error = refusal(capsys, grpo.tokenize_prompts, tokenizer, [PROBLEM], grpo.Config(system_prompt="Be brief."))
    cure = "check --system-prompt, --chat-template-kwargs and --prompt-format"
    assert ("no tokens" if kind == "empty" else cure) in error


def test_completions_end_where_any_of_three_says(tokenizer: Any, capsys: Capture) -> None:
    """The tokenizer's own token, generation_config's, and the one that ends a turn in the chat template."""
    end, pad = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    assert tokenizer.eos_token_id == end
    for ends, ids in ((None, [end]), (7, [7, end]), ([7, 9], [7, 9, end])):
        policy: Any = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ends))
        assert grpo.stop_tokens(policy, tokenizer, grpo.Config()) == ids
    assert capsys.readouterr().out == ""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    assert grpo.stop_tokens(policy, tokenizer, grpo.Config()) == [7, 9, *sorted([end, pad])]
    assert capsys.readouterr().out.startswith("completions also end with <|im_end|>")
    assert grpo.stop_tokens(policy, tokenizer, grpo.Config(prompt_format="plain")) == [7, 9, pad]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} end {% endfor %}"
    assert grpo.stop_tokens(policy, tokenizer, grpo.Config()) == [7, 9, pad]  # those are no special tokens


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
    assert load_rewards(("format",), {"format_reward": letters_reward}) == {"format": (letters_reward, 1.0)}


@pytest.mark.parametrize(("spec", "told"), [
    ("accuracy=nan", "accuracy"), ("format=inf", "format"), ("accuracy=-inf", "accuracy"), ("accuracy=much", "much"),
    ("cleverness=1", "cleverness"), ("no_such_module:reward=1", "no_such_module"), ("json:no_such_reward", "no_such"),
    ("", "ValueError"), ("reasoning", "reasoning: .*twice"),
    ("trl.rewards:half_reward", "half_reward"),  # another function of that name
])  # fmt: skip
def test_a_bad_reward_is_named(spec: str, told: str, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
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
    assert call["level"] in ([2] * 3 + [3] * 3, [3] * 3 + [2] * 3)
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
    strict = json.JSONDecoder(parse_constant=pytest.fail)  # called for NaN and Infinity, which are not JSON
    before, first, last = map(strict.decode, (run / "metrics.jsonl").read_text().splitlines())
    records = list(map(strict.decode, (run / "completions.jsonl").read_text().splitlines()))
    trained = [record for record in records if record["split"] == "train"]
    assert [r["reward"] for r in trained] == [r["rewards/rare_reward"] for r in trained] == [1, None, 0, *[None] * 13]
    assert [r["advantage"] for r in trained] == [0.5, 0, -0.5, *[0] * 13]
    assert not any("reward/" in key or key.endswith("/reward") for row in (before, last) for key in row)
    assert first["train/reward"] == first["rewards/rare_reward/mean"] == first["train/frac_reward_zero_std"] == 0.5
    length = trained[0]["length"] - trained[2]["length"]
    assert first["train/loss"] == pytest.approx(-0.5 * length / (8 * 4), abs=1e-6)
    assert first["train/grad_norm"] > 0
    assert last["train/loss"] == last["train/grad_norm"] == 0
    assert last["train/frac_all_right"] + last["train/frac_all_wrong"] == last["train/frac_reward_zero_std"] == 1
