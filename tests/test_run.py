"""Whole runs: the run folder, the metrics, the weights, the command line, bad input."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import grpo
import grpo_ladder
import grpo_scheduler

ROOT = Path(__file__).resolve().parents[1]
SMALL: dict[str, Any] = {
    "num_steps": 2, "prompts_per_step": 4, "num_generations": 4, "eval_samples": 16, "eval_every": 0, "save_every": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The closing report is a program of its own with its own tests; here it would only cost time."""
    real = subprocess.run

    def run(command: Any, *args: Any, **kwargs: Any) -> Any:
        return None if "report.py" in str(command) else real(command, *args, **kwargs)

    monkeypatch.setattr(grpo.subprocess, "run", run)


def small(tmp_path: Path, **changes: Any) -> grpo.Config:
    return grpo.Config(**(SMALL | {"run_dir": str(tmp_path)} | changes))


def read(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def only_run(tmp_path: Path) -> Path:
    (run,) = tmp_path.iterdir()
    return run


# What a run leaves


def test_run_folder_tells_everything(tmp_path: Path) -> None:
    config = small(tmp_path)
    results = grpo.main(config)
    run = only_run(tmp_path)
    assert re.fullmatch(r"grpo__arithmetic__tiny_policy__1__\d{8}-\d{6}-\d{3}", run.name)
    assert json.loads((run / "config.json").read_text()) == json.loads(json.dumps(dataclasses.asdict(config)))
    environment = json.loads((run / "environment.json").read_text())
    assert re.match(r"[0-9a-f]{40}", environment["commit"])
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
    assert (run / "grpo.py").read_text() == (ROOT / "grpo.py").read_text()
    metrics = read(run, "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2]
    assert results["eval/accuracy"] == metrics[-1]["eval/accuracy"]
    assert results["eval/accuracy_before"] == metrics[0]["eval/accuracy"]
    assert all(json.loads(json.dumps(value)) == value for m in metrics for value in m.values())  # NaN != NaN
    records = read(run, "completions.jsonl")
    assert [sum(r["split"] == split for r in records) for split in ("eval", "train")] == [2 * 2 * 16, 2 * 2 * 4]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_000001", "step_000002"]


def test_training_moves_every_parameter(tmp_path: Path) -> None:
    grpo.main(small(tmp_path))
    before, after = weights(ROOT / "tiny_policy"), weights(only_run(tmp_path) / "checkpoints" / "step_000002")
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before)


def test_same_seed_same_run_and_another_seed_another(tmp_path: Path) -> None:
    def rewards(seed: int, folder: str) -> list[dict[str, Any]]:
        grpo.main(small(tmp_path / folder, seed=seed, save_every=0))
        return [
            {key: value for key, value in m.items() if not key.startswith(("time/", "perf/"))}
            for m in read(only_run(tmp_path / folder), "metrics.jsonl")
        ]

    first = rewards(1, "a")
    assert first == rewards(1, "b")
    assert first[1:] != rewards(2, "c")[1:]


@pytest.mark.parametrize("size", [1, 3, 7])
def test_micro_batches_do_not_change_the_gradient(size: int, tokenizer: Any, policy: Any) -> None:
    """In float64, with ragged lengths: every parameter's summed gradient, and so the norm, is that of one batch."""
    config = grpo.Config(num_generations=4, max_completion_length=6, learning_rate=0.0)
    prompts = [[5, 6, 7], [8, 9], [10]]
    batch = grpo.rollout(
        policy, prompts, num_generations=4, max_completion_length=6, temperature=1.0, eos_ids=[512],
        noise=grpo.uniform_noise(0, "test", 0, 12, 6),
    )  # fmt: skip
    advantages = grpo.group_advantages(torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 2, 5]), 4).double()
    parameters = list(policy.parameters())
    gradients = []
    for micro_batch_size in (100, size):
        settings = dataclasses.replace(config, micro_batch_size=micro_batch_size, max_grad_norm=0.0)
        optimizer = torch.optim.AdamW(parameters, lr=0.0)
        learner = grpo.Learner(settings, {}, policy, tokenizer, [512], parameters, optimizer, None)
        grpo.update(learner, prompts, batch, advantages, batch.completion_mask)
        gradients.append([p.grad.clone() for p in parameters])
    for one, many in zip(*gradients, strict=True):
        assert torch.allclose(one, many, rtol=1e-9, atol=1e-13)


def test_dropping_zero_advantage_completions_changes_nothing(
    tokenizer: Any, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all rows kept (the code path of beta > 0, at a beta too small to matter) the gradient is the same."""
    prompts = [[5, 6, 7], [8, 9], [10]]
    batch = grpo.rollout(
        policy, prompts, num_generations=4, max_completion_length=6, temperature=1.0, eos_ids=[512],
        noise=grpo.uniform_noise(0, "test", 0, 12, 6),
    )  # fmt: skip
    advantages = grpo.group_advantages(torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 2, 5]), 4).double()
    parameters = list(policy.parameters())
    scored = []
    real = grpo.completion_logprobs

    def count(*args: Any, **kwargs: Any) -> torch.Tensor:
        scored.append(len(args[2]))
        return real(*args, **kwargs)

    monkeypatch.setattr(grpo, "completion_logprobs", count)
    gradients = []
    for beta in (0.0, 1e-300):
        config = grpo.Config(num_generations=4, max_completion_length=6, max_grad_norm=0.0, beta=beta)
        optimizer = torch.optim.AdamW(parameters, lr=0.0)
        learner = grpo.Learner(config, {}, policy, tokenizer, [512], parameters, optimizer, policy if beta else None)
        grpo.update(learner, prompts, batch, advantages, batch.completion_mask)
        gradients.append([p.grad.clone() for p in parameters])
    assert scored == [7, 12, 12]  # 4 equal rewards, and one that is its group's mean
    for few, every in zip(*gradients, strict=True):
        assert torch.allclose(few, every, rtol=1e-9, atol=1e-13)


def test_a_step_without_signal_still_calls_the_optimizer_with_zero_gradients(tokenizer: Any, policy: Any) -> None:
    prompts = [[5, 6, 7]]
    batch = grpo.rollout(
        policy, prompts, num_generations=4, max_completion_length=6, temperature=1.0, eos_ids=[512],
        noise=grpo.uniform_noise(0, "test", 0, 4, 6),
    )  # fmt: skip
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1.0)
    config = grpo.Config(num_generations=4, max_completion_length=6)
    learner = grpo.Learner(config, {}, policy, tokenizer, [512], parameters, optimizer, None)
    metrics = grpo.update(learner, prompts, batch, torch.zeros(4), batch.completion_mask)
    assert metrics.pop("time/update_s") > 0
    assert metrics == {"train/loss": 0.0, "train/grad_norm": 0.0}
    assert all(optimizer.state[p]["step"] == 1 for p in parameters)
    assert all((p.grad == 0).all() for p in parameters)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "grpo", "scale_rewards": True},
        {"loss_type": "bnpo", "num_iterations": 2, "mask_truncated_completions": True, "max_completion_length": 3},
        {"beta": 0.04, "lr_schedule": "cosine", "warmup_steps": 1, "weight_decay": 0.1},
        {"num_epochs": 1, "task": "simple_math", "rewards": ("accuracy=2.0", "format=0.5", "reasoning=0.5")},
    ],
)
def test_ablations_run(changes: dict[str, Any], tmp_path: Path) -> None:
    results = grpo.main(small(tmp_path, **changes))
    assert ("train/kl" in results) == ("beta" in changes)
    assert ("train/clip_ratio" in results) == ("num_iterations" in changes)
    assert ("eval/accuracy" in results) == (changes.get("task") != "simple_math")
    assert ("eval/train_subset_accuracy" in results) == (changes.get("task") == "simple_math")
    if "task" in changes:
        assert results["train/epoch"] >= 1
        assert {"rewards/accuracy/mean", "rewards/format/mean", "rewards/reasoning/mean"} <= results.keys()


@pytest.mark.parametrize("task", grpo_ladder.TASKS)
def test_every_rung_of_the_ladder_runs(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = grpo_ladder.main(grpo_ladder.Config(**SMALL, run_dir=str(tmp_path), task=task))
    assert 0 <= results["eval/accuracy"] <= 1
    assert results["completions/parsed_ratio"] > 0.5


def test_whole_ladder_ends_with_a_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results = grpo_ladder.main(grpo_ladder.Config(**SMALL, run_dir=str(tmp_path)))
    output = capfd.readouterr().out
    for task in grpo_ladder.TASKS:
        names = ("accuracy_before", "accuracy", "accuracy_sampled")
        assert re.search(rf"^{task} +" + " ".join(rf"{name} \d\.\d{{3}}" for name in names), output, re.MULTILINE)
        assert f"{task}/eval/accuracy" in results
    assert len(list(tmp_path.iterdir())) == 6


# Metrics


def table_keys() -> set[str]:
    """Keys of the README's table of metrics."""
    section = (ROOT / "README.md").read_text().split("## Metrics", 1)[1].split("\n## ", 1)[0]
    return {
        key
        for line in section.splitlines()
        if line.startswith("| `")
        for key in re.findall(r"`([^`]+)`", line.split("|")[1])
    }


def test_metrics_are_those_of_the_readme(tmp_path: Path) -> None:
    """Every key that a run logs is in the table; every key of the table is logged by one of these runs, on a GPU by
    grpo_overfit_max_gpu.py (tests/test_overfit.py), or by grpo_scheduler.py."""
    logged: set[str] = set()
    line = json.dumps({"question": "What is 12 + 34?", "answer": "#### 46"})
    (tmp_path / "test.jsonl").write_text(line + "\n")
    questions = [{"question": f"What is {a} + 11?", "answer": str(a + 11)} for a in range(10, 210)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    files: dict[str, Any] = {
        "dataset_path": str(tmp_path / "train.jsonl"),
        "test_path": str(tmp_path / "test.jsonl"),
        "task": "gsm8k",
    }
    runs: list[dict[str, Any]] = [{"beta": 0.1, "num_iterations": 2} | files, {"task": "simple_math"}]
    for i, changes in enumerate(runs):
        grpo.main(small(tmp_path / str(i), **changes))
        logged |= {key for m in read(only_run(tmp_path / str(i)), "metrics.jsonl") for key in m} - {"step"}
    logged = {re.sub(r"^rewards/\w+/mean$", "rewards/{name}/mean", key) for key in logged}
    sizes = {"num_steps": 1, "prompts_per_step": 4, "num_generations": 4, "eval_samples": 4}
    grpo_scheduler.main(grpo_scheduler.Config(**sizes, run_dir=str(tmp_path / "scheduler")))  # type: ignore[arg-type]
    rows = read(only_run(tmp_path / "scheduler"), "metrics.jsonl")
    its = {re.sub(r"rewards/\w+/mean$", "rewards/{name}/mean", key) for row in rows for key in row} - {"step"}
    on_a_gpu, on_a_test_split = {"gpu/utilization", "gpu/memory_gb", "perf/mfu"}, {"test/rewards/{name}/mean"}
    assert its - logged == {"eval/rewards/{name}/mean"}
    assert logged | its == table_keys() - on_a_gpu - on_a_test_split


def wandb_history(store: Path) -> list[dict[str, Any]]:
    """The rows logged to an offline run: protocol buffers in a LevelDB log, blocks of 32 KiB after a 7-byte header."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts, rows = store.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # what is left of a block is padding
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record: Any = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


@pytest.mark.slow
def test_offline_wandb_run_holds_every_key(tmp_path: Path) -> None:
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    flags = ["--track", "--log-completions", "--num-steps", "2", "--prompts-per-step", "4", "--eval-samples", "16"]
    command = [sys.executable, str(ROOT / "grpo.py"), "--preset", "tiny", "--run-dir", str(tmp_path), *flags]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    run = only_run(tmp_path)
    (store,) = run.glob("wandb/offline-run-*/run-*.wandb")
    history = {row["_step"]: row for row in wandb_history(store)}
    metrics = read(run, "metrics.jsonl")
    assert list(history) == [m["step"] for m in metrics] == [0, 1, 2]
    for line in metrics:
        row = history[line.pop("step")]
        assert {key: row[key] for key in line} == line
    assert any(key.startswith("completions/table") for key in history[2])


# The command line


def cli(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "grpo.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment})


def test_command_line_run(tmp_path: Path) -> None:
    flags = ["--num-steps", "1", "--prompts-per-step", "2", "--eval-samples", "8", "--run-dir", str(tmp_path)]
    done = cli("--preset", "tiny", *flags, "--rewards", "accuracy=1.0", "format=0.25")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("preset tiny")
    assert "8 held-out problems" in done.stdout
    config = json.loads((only_run(tmp_path) / "config.json").read_text())
    assert config["rewards"] == ["accuracy=1.0", "format=0.25"]


def test_help_shows_the_values_in_force() -> None:
    tiny, qwen = cli("--help", COLUMNS="200"), cli("--preset", "qwen", "--help", COLUMNS="200")
    assert tiny.returncode == qwen.returncode == 0
    assert "tiny_policy" in tiny.stdout
    assert "Qwen/Qwen2-0.5B-Instruct" in qwen.stdout
    assert "Traceback" not in tiny.stderr


# Bad input: one line, cause and cure, exit code 2


def bad(config: grpo.Config, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        grpo.main(config)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"task": "algebra"}, ["algebra", "--task", "arithmetic, simple_math, gsm8k"]),
        ({"num_generations": 1}, ["--num-generations", "2"]),
        ({"micro_batch_size": 0}, ["--micro-batch-size", "1"]),
        ({"prompts_per_step": 0}, ["--prompts-per-step"]),
        ({"temperature": 0.0}, ["--temperature"]),
        ({"temperature": float("nan")}, ["--temperature"]),
        ({"learning_rate": -1.0}, ["--learning-rate"]),
        ({"learning_rate": float("inf")}, ["--learning-rate"]),
        ({"task": "gsm8k", "dataset_path": "nowhere.jsonl"}, ["nowhere.jsonl", "--dataset-path"]),
        ({"dataset_path": "nowhere.jsonl"}, ["--task gsm8k"]),
        ({"rewards": ("beauty=1.0",)}, ["beauty", "--rewards"]),
        ({"rewards": ("accuracy",)}, ["accuracy", "--rewards"]),
        ({"rewards": ("no.such.module:reward=1.0",)}, ["no.such.module", "--rewards"]),
        ({"rewards": ()}, ["--rewards"]),
    ],
)
def test_bad_settings_are_refused_before_a_model_is_loaded(
    changes: dict[str, Any], names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(grpo, "load_pretrained", never)
    error = bad(small(tmp_path, **changes), capsys)
    assert all(name in error for name in names), error
    assert not list(tmp_path.iterdir())


def test_model_without_chat_template(tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(tmp_path / "model")
    tokenizer.chat_template = template
    assert "--prompt-format plain" in bad(small(tmp_path, model=str(tmp_path / "model")), capsys)


def test_hub_unreachable_names_the_tiny_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--preset tiny" in bad(small(tmp_path, model="Qwen/Qwen2-0.5B-Instruct"), capsys)


def test_prompt_longer_than_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--max-prompt-length" in bad(small(tmp_path, max_prompt_length=5), capsys)


def test_track_without_a_login(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = small(tmp_path / "runs", track=True)
    assert "wandb login" in bad(config, capsys)
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\nlogin user\npassword {'0' * 40}\n")
    (tmp_path / "netrc").chmod(0o600)
    grpo.check_config(config)


@pytest.mark.parametrize("flags", [["--no-such-flag"], ["--preset", "huge"], ["--num-steps", "many"]])
def test_wrong_flags_are_refused(flags: list[str]) -> None:
    done = cli(*flags)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_divergence_ends_the_run_with_its_own_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        grpo.main(small(tmp_path, learning_rate=1e30, max_grad_norm=0.0, num_steps=4, warmup_steps=0))
    assert caught.value.code == 4
    assert "lower --learning-rate, there is no good checkpoint" in capsys.readouterr().err
    assert len(read(only_run(tmp_path), "bad_batch_000002.jsonl")) == 16
    with pytest.raises(SystemExit):
        grpo.main(
            small(tmp_path / "b", learning_rate=1e30, max_grad_norm=0.0, num_steps=4, warmup_steps=0, save_every=1)
        )
    assert "lower --learning-rate, there is no good checkpoint" in capsys.readouterr().err  # that of step 1 is broken


CAUSES: dict[str, tuple[list[str], dict[str, Any]]] = {  # what is asked with which answer, and the settings
    "solved already": (["What is 2 + 2?"], {"temperature": 0.001}),
    "100% of the completions never stop; check --prompt-format": (["What is 20 + 20?"], {"max_completion_length": 1}),
    "never stop; raise --max-completion-length": (
        ["Repeat: red blue green gold"] * 2 + ["How many words: red"],
        {"max_completion_length": 3, "temperature": 0.001},
    ),
    "no answer can be parsed": (["Repeat: red blue", "Repeat: snow tree lake"], {"temperature": 0.001}),
    "answers are found but wrong": (["What is 20 + 20?", "What is 31 + 25?"], {}),
}  # fmt: skip


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("abort", [True, False])
def test_a_run_that_cannot_learn_says_why(
    cause: str, abort: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, settings = CAUSES[cause]
    answer = "4" if cause == "solved already" else "777"
    lines = [json.dumps({"question": question, "answer": answer}) for question in questions]
    (tmp_path / "problems.jsonl").write_text("\n".join(lines))
    settings = settings | {
        "task": "gsm8k",
        "dataset_path": str(tmp_path / "problems.jsonl"),
        "num_steps": 4,
        "patience": 2,
    }
    config = small(tmp_path / "runs", **settings, abort_on_no_signal=abort)
    if abort:
        with pytest.raises(SystemExit) as caught:
            grpo.main(config)
        assert caught.value.code == 3
    else:
        grpo.main(config)
    steps = read(only_run(tmp_path / "runs"), "metrics.jsonl")
    assert all(step["train/frac_reward_zero_std"] == 1 for step in steps[1:])
    assert len(steps) == (3 if abort else 5)
    assert "eval/train_subset_accuracy" in steps[-1]
    assert (only_run(tmp_path / "runs") / "checkpoints" / f"step_{2 if abort else 4:06d}").is_dir()
    output = capsys.readouterr()
    assert re.search(rf"^step 0: .*{re.escape(cause)}", output.out, re.MULTILINE)
    assert re.search(rf"step 2: .*{re.escape(cause)}", output.err if abort else output.out)


# Other models


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "GPTNeoX"])
def test_other_families_train_unchanged(family: str, tmp_path: Path, tokenizer: Any, make_model: Any) -> None:
    """With the tiny tokenizer less its template, and pad == eos."""
    model = make_model(family, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    template, pad = tokenizer.chat_template, tokenizer.pad_token
    tokenizer.chat_template, tokenizer.pad_token = None, tokenizer.eos_token
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tokenizer.chat_template, tokenizer.pad_token = template, pad
    config = small(tmp_path / "runs", model=str(tmp_path / "model"), prompt_format="plain", rewards=("length=1.0",))
    grpo.reward_module.length_reward = lambda completion_ids, **_: [len(ids) + ids[0] / 9 for ids in completion_ids]  # type: ignore[attr-defined]
    try:
        results = grpo.main(config)
    finally:
        del grpo.reward_module.length_reward  # type: ignore[attr-defined]
    assert results["train/grad_norm"] > 0
    assert results["train/logprob_gap_max"] < 1e-4


@pytest.mark.parametrize(
    "feature", [{"final_logit_softcapping": 0.01}, {"attn_logit_softcapping": 0.01}, {"sliding_window": 64}]
)
def test_a_model_with_more_than_plain_attention_and_head_is_refused(
    feature: dict[str, float], tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    shape |= {"final_logit_softcapping": None, "attn_logit_softcapping": None, "initializer_range": 0.3}
    Gemma2ForCausalLM(Gemma2Config(**shape | feature)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert "caps its logits, has a head with a bias" in bad(
        small(tmp_path / "runs", model=str(tmp_path / "model")), capsys
    )


def test_a_model_whose_attention_cannot_be_replaced_is_refused(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-Neo swallows what it does not know, so its log-probs would be wrong without a word."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    shape: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "attention_types": [[["global"], 2]], "num_heads": 4}
    GPTNeoForCausalLM(GPTNeoConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert "cannot be replaced" in bad(small(tmp_path / "runs", model=str(tmp_path / "model")), capsys)


@pytest.mark.slow
def test_real_qwen_tokenizer_and_gsm8k(tmp_path: Path, gsm8k: Path, qwen: Path) -> None:
    config = dataclasses.replace(
        grpo.PRESETS["qwen"], model=str(qwen), task="gsm8k", dataset_path=str(gsm8k / "train.jsonl"),
        num_steps=2, prompts_per_step=2, num_generations=2, max_completion_length=8, eval_samples=2, save_every=0,
        run_dir=str(tmp_path),
    )  # fmt: skip
    results = grpo.main(config)
    assert results["completions/clipped_ratio"] == 1.0
    assert 11.0 < results["train/entropy"] < 11.93  # near ln 151,936 = 11.93: random weights
