"""Whole runs: the run folder, the metrics, the gradient, the command line, what is said, what is refused."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import grpo
import grpo_ladder
import grpo_reasoning
import grpo_scheduler
from tests.conftest import refusal

pytestmark = pytest.mark.usefixtures("one_thread", "no_report")
ROOT = Path(__file__).resolve().parents[1]
SMALL: dict[str, Any] = {
    "num_steps": 2, "prompts_per_step": 4, "num_generations": 4, "eval_samples": 16, "eval_every": 0, "save_every": 0,
}  # fmt: skip


def small(folder: Path, **changes: Any) -> grpo.Config:
    return grpo.Config(**(SMALL | {"run_dir": str(folder)} | changes))


def only_run(folder: Path) -> Path:
    (run,) = folder.glob("*__*")
    return run


def read(run: Path, name: str = "metrics") -> list[dict[str, Any]]:
    """What was logged, apart from times."""
    rows = [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(("time/", "perf/"))} for row in rows]


Done = tuple[subprocess.CompletedProcess[str], Path]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A run as a user starts it, its output to a log: (what it printed, its folder)."""
    folder = tmp_path_factory.mktemp("runs")
    sizes = ["--num-steps", "3", "--prompts-per-step", "4", "--num-generations", "4", "--eval-samples", "16"]
    sizes += ["--save-every", "1", "--eval-every", "0", "--run-dir", str(folder)]
    command = [sys.executable, str(ROOT / "grpo.py"), *sizes, "--rewards", "accuracy", "format=0.25"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert finished.returncode == 0, finished.stderr
    return finished, only_run(folder)


def test_a_run_folder_tells_everything(done: Done) -> None:
    _, run = done
    assert re.fullmatch(r"grpo__arithmetic__tiny__1__\d{8}-\d{6}-\d{6}", run.name)
    config = json.loads((run / "config.json").read_text())
    assert config.keys() == {field.name for field in dataclasses.fields(grpo.Config)}
    assert (config["preset"], config["num_steps"], config["temperature"]) == ("tiny", 3, 1.0)
    environment = json.loads((run / "environment.json").read_text())
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", environment["commit"])
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
    assert environment["command"][-3:] == ["--rewards", "accuracy", "format=0.25"]
    assert environment["device"] == "cpu"
    assert (run / "grpo.py").read_text() == (ROOT / "grpo.py").read_text()
    rows = read(run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert ["eval/accuracy" in row for row in rows] == [True, False, False, True]
    assert ["train/reward" in row for row in rows] == [False, True, True, True]
    assert all(value == json.loads(json.dumps(value)) for row in rows for value in row.values())  # NaN != NaN
    records = read(run, "completions")
    assert {record["step"] for record in records if record["split"] == "eval"} == {0, 3}
    assert {record["step"] for record in records if record["split"] == "train"} == {1, 2, 3}
    assert sum(record["split"] == "eval" and record["mode"] == "greedy" for record in records) == 2 * 16
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_checkpoints_load_anywhere_and_hold_what_was_trained(done: Done) -> None:
    folders = sorted((done[1] / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step_000002", "step_000003"]  # two are kept
    before, second, third = (
        dict(transformers.AutoModelForCausalLM.from_pretrained(folder).named_parameters())
        for folder in (ROOT / "models" / "tiny", *folders)
    )
    assert before.keys() == third.keys()
    for name in before:
        assert (before[name] != third[name]).any()
        assert (second[name] != third[name]).any()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[1])
    assert tokenizer.chat_template


def test_a_log_gets_lines_with_elapsed_and_remaining_time(done: Done) -> None:
    finished, run = done
    first, *lines = finished.stdout.splitlines()
    assert first.startswith("preset tiny")  # auto, without CUDA
    assert str(run) in first
    steps = [line for line in lines if re.search(r"\b[0-3]/3 \[\d\d:\d\d<(\d\d:\d\d|\?)", line)]
    assert len(steps) == 4
    assert "eval/accuracy" in steps[0]
    assert "train/reward" in steps[1]
    assert sum("of the groups carry signal" in line for line in lines) == 1
    assert "\r" not in finished.stdout + finished.stderr
    assert "step" not in finished.stderr
    assert all(name in "\n".join(lines[-6:]) for name in (str(run), "curve.png", "report.py"))


@pytest.mark.parametrize(("preset", "model"), [("auto", "models/tiny"), ("qwen", "Qwen/Qwen2-0.5B-Instruct")])
def test_help_shows_the_values_in_force(
    preset: str, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        grpo.parse_config(["--preset", preset, "--help"])
    assert caught.value.code == 0
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert f"default: {model}" in text
    of_preset = text[text.index("--preset ") : text.index("--task ")]
    assert len(re.findall("default", of_preset.replace("Which defaults", ""))) == 1
    assert f"default: {preset}" in of_preset


def test_presets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--preset takes auto, tiny, qwen" in refusal(capsys, grpo.parse_config, ["--preset", "huge"])
    assert grpo.parse_config([]) == grpo.PRESETS["tiny"]
    assert grpo.parse_config(["--preset=qwen", "--seed", "2"]) == dataclasses.replace(grpo.PRESETS["qwen"], seed=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert grpo.parse_config([]) == grpo.PRESETS["qwen"]
    assert grpo.parse_config(["--preset", "tiny"]) == grpo.PRESETS["tiny"] == grpo.Config()


def test_whole_ladder_ends_with_a_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results = grpo_ladder.main(grpo_ladder.Config(**(SMALL | {"num_steps": 1}), run_dir=str(tmp_path)))
    output = capfd.readouterr().out
    for task in grpo_ladder.TASKS:
        names = ("accuracy_before", "accuracy", "accuracy_sampled")
        assert re.search(rf"^{task} +" + ", ".join(rf"{name} \d\.\d{{3}}" for name in names), output, re.MULTILINE)
        assert 0 <= results[f"{task}/eval/accuracy"] <= 1
        assert results[f"{task}/completions/parsed_ratio"] > 0.5
    assert len(list(tmp_path.iterdir())) == 6


def test_an_evaluation_depends_neither_on_chunks_nor_on_the_step(policy: Any, tokenizer: Any) -> None:
    """Before and after training is a paired comparison."""

    def evaluated(prompts_per_step: int, step: int) -> tuple[Any, list[Any]]:
        sampling = {"max_completion_length": 12, "temperature": 1.5, "eos_ids": [512]}
        config, functions = small(Path(), prompts_per_step=prompts_per_step), grpo.load_rewards(("accuracy",))
        run: Any = SimpleNamespace(config=config, step=step, policy=policy, tokenizer=tokenizer)
        vars(run).update(rewards=functions, sampling=sampling)
        metrics, records = grpo.evaluate(run, grpo.arithmetic()[:16], "eval/accuracy")
        return metrics, sorted((r["mode"], r["question"], r["completion"]) for r in records)

    assert evaluated(4, 0) == evaluated(1, 7)
    assert evaluated(4, 0)[0].keys() == {f"eval/accuracy{end}" for end in ("", "_sampled", "_low", "_high")}


def table_keys() -> set[str]:
    """Keys of the table of metrics."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    return {key for row in rows for key in re.findall(r"`([^`]+)`", row)}


def test_metrics_are_those_of_the_table(tmp_path: Path) -> None:
    """Every key that a run logs is in the table; every key of the table is logged by one of these runs, on a GPU by
    grpo_overfit_max_gpu.py (tests/test_gpu.py), or by grpo_scheduler.py."""
    problems = [json.dumps({"question": f"What is {a} + 11?", "answer": str(a + 11)}) + "\n" for a in range(10, 210)]
    (tmp_path / "train.jsonl").write_text("".join(problems))
    (tmp_path / "test.jsonl").write_text(problems[0])
    files = {"dataset_path": str(tmp_path / "train.jsonl"), "test_path": str(tmp_path / "test.jsonl"), "task": "gsm8k"}
    grpo.main(small(tmp_path / "a", beta=0.1, num_iterations=2, **files))
    grpo.main(small(tmp_path / "b", task="simple_math"))
    sizes: dict[str, Any] = {"num_steps": 1, "prompts_per_step": 4, "num_generations": 4, "eval_samples": 4}
    grpo_scheduler.main(grpo_scheduler.Config(**sizes, run_dir=str(tmp_path / "c")))
    grpo_reasoning.main(grpo_reasoning.Config(**sizes | {"num_generations": 16}, run_dir=str(tmp_path / "d")))
    keys = {}
    for name in "abcd":
        log = (only_run(tmp_path / name) / "metrics.jsonl").read_text().splitlines()
        logged = {key for line in log for key in json.loads(line)} - {"step"}
        keys[name] = {re.sub(r"rewards/\w+/mean$", "rewards/{name}/mean", key) for key in logged}
    assert keys["c"] - keys["a"] == {"eval/rewards/{name}/mean"}
    elsewhere = {"gpu/utilization", "gpu/memory_gb", "perf/mfu", "perf/micro_batch_size", "test/rewards/{name}/mean"}
    thought = {key for key in table_keys() if key.endswith(("_thinking", "_guessing", "_right", "_wrong"))}
    assert keys["d"] - keys["a"] <= thought
    assert {"train/frac_thinking", "eval/frac_thinking", "train/accuracy_guessing"} <= keys["d"]
    assert keys["a"] | keys["b"] | keys["c"] | thought == table_keys() - elsewhere
    kinds = [("<think>1", False, 1), ("4 + 4 = 8", True, 2), ("8", False, 3), ("7", False, 8)]
    records = [{"completion": text, "right": right, "length": length} for text, right, length in kinds]
    assert list(grpo_reasoning.thought_metrics(records, "x").values()) == [0.5, 0.5, 0, 2, 4]


def graded(completions: list[Any], **_: Any) -> list[float]:
    raise NotImplementedError  # a test puts its own in this place


@pytest.mark.parametrize(
    "given", [[float("nan")], [float("inf")], [1.0] * 3, [1.0] * 40], ids=["nan", "inf", "too few", "too many"]
)
def test_a_reward_that_cannot_be_used_is_named(
    given: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad(completions: list[Any], **_: Any) -> list[float]:
        return given * len(completions) if len(given) == 1 else given

    monkeypatch.setattr(sys.modules[__name__], "graded", bad)
    with pytest.raises(ValueError, match="graded"):
        grpo.main(small(tmp_path, rewards=("tests.test_run:graded",), task="simple_math"))


@pytest.mark.parametrize(
    ("question", "answer", "limit", "cause"),
    [
        ("What is 20 + 20?", "40", 1, "100% of the completions never stop; check --prompt-format"),
        ("What is 20 + 20?", "777", 12, "answers are found but wrong"),
    ],
)
def test_a_run_that_cannot_learn_says_why(
    question: str, answer: str, limit: int, cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "problems.jsonl").write_text(json.dumps({"question": question, "answer": answer}))
    path = str(tmp_path / "problems.jsonl")
    results = grpo.main(small(tmp_path, task="gsm8k", dataset_path=path, max_completion_length=limit))
    assert results["train/loss"] == results["train/grad_norm"] == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "of the groups carry signal" in line]
    assert len(said) == 1
    assert re.search(rf"\b0% of the groups carry signal.*{re.escape(cause)}", said[0])


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"task": "algebra"}, ["algebra", "--task", "arithmetic, simple_math, gsm8k"]),
        ({"num_generations": 1}, ["--num-generations"]),
        ({"temperature": 0.0}, ["temperature"]),
        ({"temperature": float("nan")}, ["temperature"]),
        ({"task": "gsm8k", "dataset_path": "nowhere.jsonl"}, ["nowhere.jsonl"]),
        ({"rewards": ()}, ["--rewards"]),
        ({"run_dir": "{file}"}, ["{file}", "--run-dir"]),
        ({"resume": "{file}"}, ["{file}", "--resume"]),
        ({"USE_FSDP": "true"}, ["FSDP"]),
        ({"USE_DEEPSPEED": "true"}, ["DEEPSPEED"]),
        ({"MIXED_PRECISION": "bf16"}, ["MIXED_PRECISION"]),
    ],
)
def test_bad_settings_are_refused_before_a_model_is_loaded(
    changes: dict[str, Any], names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was loaded")

    for loader in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", never)
    file = tmp_path / "file"
    file.touch()
    settings = {name: str(file) if value == "{file}" else value for name, value in changes.items()}
    for name in [name for name in settings if name.isupper()]:
        monkeypatch.setenv(f"ACCELERATE_{name}", settings.pop(name))
    error = refusal(capsys, grpo.main, small(tmp_path, **settings))
    for name in names:
        assert name.replace("{file}", str(file)) in error
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "./nowhere"}, "there is no folder"),
        ({"model": "Qwen/Qwen2-0.5B-Instruct"}, "--preset tiny"),  # the tests have no network
        ({"max_completion_length": 100_000}, "--max-completion-length"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(capsys, grpo.main, small(tmp_path, task="simple_math", **changes))


def test_tracking_without_a_login_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = small(tmp_path / "runs", track=True, num_generations=4)
    assert "wandb login" in refusal(capsys, grpo.main, config)
    assert not (tmp_path / "runs").exists()
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\nlogin user\npassword {'0' * 40}\n")
    (tmp_path / "netrc").chmod(0o600)
    grpo.check_config(config)  # a login in netrc counts
