"""The embedded policies: how they are made; of the tiny one its tokenizer, its size, what it was taught."""

import random
import unicodedata
from pathlib import Path
from typing import Any
from unittest import mock

import make_reasoning
import make_scheduler
import make_tiny
import pytest
import torch

import grpo
from rewards import accuracy_reward, format_reward
from tests.conftest import tiny_policy

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = [
    "What is 4?", "Ünï\u0301 漢字 🙂 \x00\x7f \t\r\n  tail ", "<think>4 + 4 = 8</think>", "1,0.5% \\boxed{3/4} # 18",
]  # fmt: skip


def test_auto_tokenizer_is_the_one_that_was_trained(tokenizer: Any) -> None:
    """AutoTokenizer rebuilds a Qwen2Tokenizer from the files: it must cut texts as make_tiny.py's own object did."""
    tasks = make_tiny.load_tasks()
    examples = [(task, problem) for task in tasks for problem in tasks[task][0][:1500]]
    texts = ["".join(make_tiny.render(*example, tagged)) for example in examples for tagged in (False, True)]
    made = make_tiny.make_tokenizer(texts)
    assert all(made(text).input_ids == tokenizer(text).input_ids for text in texts[::50] + TEXTS)
    # Any text survives (up to Unicode normalization), and digits stand alone.
    assert all(tokenizer.decode(tokenizer(text).input_ids) == unicodedata.normalize("NFC", text) for text in TEXTS)
    assert tokenizer.convert_ids_to_tokens(tokenizer("147+3").input_ids) == ["1", "4", "7", "+", "3"]


def test_supervised_prompts_are_the_chat_template(tokenizer: Any) -> None:
    problem = {"question": "What is 12 + 34?", "answer": "46"}
    for tagged, system_prompt in ((False, None), (True, grpo.TAG_PROMPT)):
        prompt, completion = make_tiny.render("arithmetic", problem, tagged)
        (ids,) = grpo.tokenize_prompts(tokenizer, [problem], grpo.Config(system_prompt=system_prompt))
        assert ids == tokenizer(prompt, add_special_tokens=False).input_ids
        assert tokenizer(completion, add_special_tokens=False).input_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("task", make_tiny.BANDS)
def test_supervised_examples_are_correct(task: str) -> None:
    """Both forms earn the full reward."""
    for problem in random.Random(0).choices(make_tiny.load_tasks()[task][0], k=200):
        for tagged in (False, True):
            text = make_tiny.render(task, problem, tagged)[1].removesuffix("<|im_end|>")
            assert accuracy_reward([text], answer=[problem["answer"]]) == [1.0], text
            assert format_reward([text]) == [float(tagged)]


def test_train_draws_only_train_problems(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    """Two steps of the supervised loop itself, watched."""
    tasks = make_tiny.load_tasks()
    monkeypatch.setattr(make_tiny, "MAX_STEPS", 2)
    torch.manual_seed(0)
    watched = mock.patch.object(make_tiny, "render", wraps=make_tiny.render)
    with watched as render, pytest.raises(SystemExit, match="band"):
        make_tiny.train(make_tiny.make_model(tokenizer), tokenizer, tasks, random.Random(0))
    drawn = [call.args[1]["question"] for call in render.call_args_list]
    assert len(drawn) == 2 * make_tiny.BATCH_SIZE
    assert not set(drawn) & {p["question"] for _, held_out in tasks.values() for p in held_out}


def test_levels_leave_something_to_elicit(tokenizer: Any) -> None:
    """Arithmetic at 0.3 to 0.6 sampled and at most 0.7 greedy, every other task at most at 0.9 sampled."""
    policy = tiny_policy(torch.float32)
    for task, (train, held_out) in make_tiny.load_tasks().items():
        problems = (held_out or train)[:256]
        sampled = make_tiny.measure(policy, tokenizer, problems, 4)["pass@1"]
        assert 0.2 < sampled <= 0.9, task
        if task == "arithmetic":
            assert 0.3 <= sampled <= 0.6
            assert make_tiny.measure(policy, tokenizer, problems, 1, greedy=True)["pass@1"] <= 0.7


@pytest.mark.parametrize("program", [make_tiny, make_reasoning, make_scheduler])
def test_weights_are_not_overwritten_unasked(program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They would be only after minutes of training, so it is refused at once."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(SystemExit, match="2"):
        program.main(program.Options(out=str(tmp_path)))
    assert "--overwrite" in capsys.readouterr().err
    assert (Path(program.Options().out) / "model.safetensors").exists()
    assert make_tiny.make_folder(str(tmp_path), overwrite=True) == tmp_path
