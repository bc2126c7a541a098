"""Whole runs: the run folder, the metrics, the gradient, the command line, what is said, what is refused."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import grpo
import grpo_ablations
import grpo_ladder
import grpo_overfit
import grpo_reasoning
import grpo_scheduler
from rewards import extract_answer
from tests.conftest import Capture, Patch, refusal

pytestmark = pytest.mark.usefixtures("one_thread", "no_report")
ROOT = Path(__file__).resolve().parents[1]
SMALL: dict[str, Any] = {
    "num_steps": 2, "prompts_per_step": 4, "num_generations": 4, "eval_samples": 16, "eval_every": 0, "save_every": 0,
}  # fmt: skip


def small(folder: Path, script: ModuleType = grpo, **changes: Any) -> Any:
    return script.Config(**(SMALL | {"run_dir": str(folder)} | changes))


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
    assert (environment["command"][-3:], environment["device"]) == (["--rewards", "accuracy", "format=0.25"], "cpu")
    assert (run / "grpo.py").read_text() == (ROOT / "grpo.py").read_text()
    rows, records = read(run), read(run, "completions")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert ["eval/accuracy" in row for row in rows] == [True, False, False, True]
    assert ["train/reward" in row for row in rows] == [False, True, True, True]
    assert all(value == json.loads(json.dumps(value)) for row in rows for value in row.values())  # NaN != NaN
    assert {record["step"] for record in records if record["split"] == "eval"} == {0, 3}
    assert {record["step"] for record in records if record["split"] == "train"} == {1, 2, 3}
    assert sum(record["split"] == "eval" and record["mode"] == "greedy" for record in records) == 2 * 16
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_checkpoints_load_anywhere_and_hold_what_was_trained(done: Done) -> None:
    folders = sorted((done[1] / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step_000002", "step_000003"]  # two are kept
    load, paths = transformers.AutoModelForCausalLM.from_pretrained, [ROOT / "models" / "tiny", *folders]
    before, second, third = (dict(load(path).named_parameters()) for path in paths)
    assert before.keys() == third.keys()
    for name in before:
        assert (before[name] != third[name]).any()
        assert (second[name] != third[name]).any()
    assert transformers.AutoTokenizer.from_pretrained(folders[1]).chat_template


def test_a_log_gets_lines_with_elapsed_and_remaining_time(done: Done) -> None:
    finished, run = done
    first, warning, *lines = finished.stdout.splitlines()
    assert first.startswith("preset tiny")  # auto, without CUDA
    assert "arithmetic (10679 problems to train on, 16 held out to evaluate)" in first
    assert str(run) in first
    assert warning == "the run ends before its warmup does: lower --warmup-steps"
    steps = [line for line in lines if re.search(r"\b[0-3]/3 \[\d\d:\d\d<(\d\d:\d\d|\?)", line)]
    assert ("eval/accuracy" in steps[0], "train/reward" in steps[1], len(steps)) == (True, True, 4)
    assert sum("of the groups carry signal" in line for line in lines) == 1
    assert "\r" not in finished.stdout + finished.stderr
    assert "step" not in finished.stderr
    assert all(name in "\n".join(lines[-8:]) for name in (str(run), "curve.png", "report.py"))
    assert lines[-1].startswith(f"final: eval/accuracy={read(run)[-1]['eval/accuracy']:.3f} eval/accuracy_low=")


@pytest.mark.parametrize(("preset", "model"), [("auto", "models/tiny"), ("qwen", "Qwen/Qwen2-0.5B-Instruct")])
def test_help_shows_the_values_in_force(preset: str, model: str, capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match=r"^0$"):
        grpo.parse_config(["--preset", preset, "--help"])
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert f"default: {model}" in text
    of_preset = text[text.index("--preset ") : text.index("--task ")]
    assert len(re.findall("default", of_preset.replace("Which defaults", ""))) == 1
    assert f"default: {preset}" in of_preset


def test_presets(monkeypatch: Patch, capsys: Capture) -> None:
    assert "--preset takes auto, tiny, smollm, qwen" in refusal(capsys, grpo.parse_config, ["--preset", "huge"])
    assert grpo.parse_config([]) == grpo.PRESETS["tiny"]
    assert grpo.parse_config(["--preset=qwen", "--seed", "2"]) == dataclasses.replace(grpo.PRESETS["qwen"], seed=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert grpo.parse_config([]) == grpo.PRESETS["qwen"]
    assert grpo.parse_config(["--preset", "tiny"]) == grpo.PRESETS["tiny"] == grpo.Config()


def test_the_ablations_script_with_its_defaults_trains_as_grpo_to_the_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_steps": 3, "num_iterations": 2, "micro_batch_size": 5, "temperature": 1.5}
    runs = []
    for script in (grpo, grpo_ablations):
        folder = tmp_path / script.__name__
        script.main(small(folder, script, mask_truncated_completions=True, **settings))
        runs.append(only_run(folder))
    for name in ("metrics", "completions"):
        for row, more in zip(*(read(run, name) for run in runs), strict=True):
            assert row.items() <= more.items()  # it also logs the lengths of right and of wrong completions
    ours, theirs = (load_file(run / "checkpoints" / "step_000003" / "model.safetensors") for run in runs)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert all(row["train/grad_norm"] > 0 for row in read(runs[0])[1:])


def test_whole_ladder_ends_with_a_table(tmp_path: Path, capfd: Capture) -> None:
    histories = grpo_ladder.main(small(tmp_path, grpo_ladder, num_steps=1))
    output = capfd.readouterr().out
    assert list(histories) == list(grpo_ladder.TASKS)
    for task, (first, last) in histories.items():
        values = first["eval/accuracy"], last["eval/accuracy"], last["eval/accuracy_sampled"]
        names = ("accuracy_before", "accuracy", "accuracy_sampled")
        text = ", ".join(f"{name} {value:.3f}" for name, value in zip(names, values, strict=True))
        assert re.search(rf"^{task} +{text}$", output, re.MULTILINE)
        assert last["completions/parsed_ratio"] > 0.5
    assert len(list(tmp_path.iterdir())) == 6


def test_an_evaluation_depends_neither_on_chunks_nor_on_the_step(policy: Any, tokenizer: Any) -> None:
    """Before and after training is a paired comparison; another split has other noise."""

    def evaluated(prompts_per_step: int, step: int, split: str = "eval") -> tuple[Any, list[Any]]:
        sampling = {"max_completion_length": 12, "temperature": 1.5, "eos_ids": [512]}
        config, functions = small(Path(), prompts_per_step=prompts_per_step), grpo.load_rewards(("accuracy",), {})
        run: Any = SimpleNamespace(config=config, step=step, policy=policy, tokenizer=tokenizer)
        vars(run).update(rewards=functions, sampling=sampling, opening="", num_steps=0)
        metrics, records = grpo.evaluate(run, split, grpo.arithmetic()[:16])
        assert {record["split"] for record in records} == {split}
        return metrics, sorted((r["mode"], r["question"], r["completion"]) for r in records)

    metrics, completions = evaluated(4, 0)
    again, repeated = evaluated(1, 7)
    assert (again, repeated) == (pytest.approx(metrics), completions)
    other = evaluated(4, 0, "test")[1]
    assert (other[:16] == completions[:16], other[16:] == completions[16:]) == (True, False)


def test_every_number_in_a_record_is_a_metric(tmp_path: Path, monkeypatch: Patch) -> None:
    """The mean over a step's records and over an evaluation's sampled ones, a user's own too; None is left out."""
    score, path = grpo.score, tmp_path / "test.jsonl"

    def own_score(*given: Any) -> list[dict[str, Any]]:
        records = score(*given)
        for i, record in enumerate(records):
            record["letters"] = len(record["completion"]) if i % 3 else None
        return records

    monkeypatch.setattr(grpo, "score", own_score)
    path.write_text('{"question": "What is 20 + 7?", "answer": "27"}\n' * 5)
    settings: dict[str, Any] = {"prompts_per_step": 2, "max_completion_length": 3, "temperature": 1.5}
    grpo.main(small(tmp_path, test_path=str(path), rewards=("accuracy", "format=0.5"), **settings))
    every = read(only_run(tmp_path), "completions")
    assert {record["truncated"] for record in every} == {True, False}
    for r in every:
        assert r["extracted"] == extract_answer(r["completion"])
        assert r["terminated_length"] == (None if r["truncated"] else r["length"])
    names = {
        "letters": "letters", "reward": "reward", "right": "accuracy", "parsed": "completions/parsed_ratio",
        "truncated": "completions/clipped_ratio", "length": "completions/mean_length",
        "terminated_length": "completions/mean_terminated_length",
        "rewards/accuracy": "rewards/accuracy/mean", "rewards/format": "rewards/format/mean",
    }  # fmt: skip
    for row, expected in zip(read(only_run(tmp_path)), ("eval", "train", "eval test train"), strict=True):
        logged = [record for record in every if record["step"] == row["step"]]
        splits = {record["split"] for record in logged}
        assert splits == set(expected.split())
        for split in splits:
            records = [r for r in logged if r["split"] == split and r.get("mode") != "greedy"]
            for field, name in names.items():
                key = name if split == "train" and "/" in name else f"{split}/{name}"
                key = f"{split}/accuracy_sampled" if split != "train" and field == "right" else key
                values = [r[field] for r in records if r[field] is not None]
                assert row.get(key) == (pytest.approx(fmean(values)) if values else None)
            entropy = sum(r["entropy"] for r in records) / sum(r["length"] for r in records)
            assert row[f"{split}/entropy"] == pytest.approx(entropy)


ON_A_GPU = {"gpu/utilization", "gpu/memory_gb", "perf/mfu", "perf/micro_batch_size", "perf/peak_memory_gb"}


def test_metrics_are_those_of_the_table(tmp_path: Path) -> None:
    """In both directions, but for those of a GPU. In the table {split} is eval, train_subset or test."""
    problems = [json.dumps({"question": f"What is {a} + 11?", "answer": str(a + 11)}) + "\n" for a in range(10, 210)]
    (tmp_path / "train.jsonl").write_text("".join(problems))
    (tmp_path / "test.jsonl").write_text(problems[0])
    files = {"dataset_path": str(tmp_path / "train.jsonl"), "test_path": str(tmp_path / "test.jsonl"), "task": "gsm8k"}
    runs: list[tuple[ModuleType, dict[str, Any]]] = [
        (grpo_ablations, {"beta": 0.1, "num_iterations": 2, **files}), (grpo, {"task": "simple_math"}),
        (grpo_scheduler, {}), (grpo_reasoning, {"num_generations": 16}), (grpo_overfit, {"target_accuracy": 0.0}),
    ]  # fmt: skip
    sampled = re.compile(r"^(eval|train_subset|test)/(?!(train_subset_)?accuracy(_low|_high|_sampled)?$)")
    keys = set()
    for number, (script, changes) in enumerate(runs):
        for row in script.main(small(tmp_path / str(number), script, **changes)):
            keys |= {re.sub(r"rewards/\w+/mean$", "rewards/{name}/mean", sampled.sub("{split}/", key)) for key in row}
    rows = [line.split("|")[1] for line in (ROOT / "docs" / "metrics.md").read_text().splitlines() if line[:3] == "| `"]
    table = {key for row in rows for key in re.findall(r"`([^`]+)`", row)}
    assert keys - {"step"} == table - ON_A_GPU


@pytest.mark.parametrize("given", [[float("nan")], [float("inf")], [1.0] * 3, [1.0] * 40])
def test_a_reward_that_cannot_be_used_is_named(given: Any, tmp_path: Path, monkeypatch: Patch) -> None:
    """It is not finite, or there are too few, or too many; the trial with two completions, at the start, is passed."""

    def graded(completions: list[Any], **_: Any) -> list[float]:
        return [0.0] * 2 if len(completions) == 2 else given * (len(completions) if len(given) == 1 else 1)

    monkeypatch.setattr(grpo, "graded_reward", graded, raising=False)
    with pytest.raises(ValueError, match="graded"):
        grpo.main(small(tmp_path, rewards=("graded",), task="simple_math"))


@pytest.mark.parametrize(("answer", "limit", "cause"), [
    ("40", 1, "100% of the completions never stop; check --prompt-format"), ("777", 12, "found but wrong"),
])  # fmt: skip
def test_a_run_that_cannot_learn_says_why(answer: str, limit: int, cause: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"question": "What is 20 + 20?", "answer": answer}))
    row = grpo.main(small(tmp_path, task="gsm8k", dataset_path=str(path), max_completion_length=limit))[-1]
    assert row["train/loss"] == row["train/grad_norm"] == 0
    assert ("completions/mean_terminated_length" in row) == (limit > 1)
    texts = [r["completion"] for r in read(only_run(tmp_path), "completions") if r["split"] == "train"]
    assert texts[:8] != texts[8:]  # the same policy and problem in both steps, but other noise
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "of the groups carry signal" in line]
    assert re.search(rf"\b0% of the groups carry signal.*{re.escape(cause)}", said)


BAD_SETTINGS: dict[str, list[str]] = {
    "--task=algebra": ["algebra", "--task", "arithmetic, simple_math, gsm8k"], "--rewards": ["--rewards"],
    "--num-generations=1": ["--num-generations"], "--task=gsm8k --dataset-path=no.jsonl": ["no.jsonl"],
    "--run-dir={file}": ["{file}", "--run-dir"], "--resume={file}": ["{file}", "--resume"],
    "--resume=": ["no run folder", "--resume"],
    **{f"--chat-template-kwargs={text}": ["chat template", "--chat-template-kwargs"] for text in ("{{", "[1]", "3")},
    **{f"--{words.replace(' is ', '=')}": [words] for words in (
        "temperature is 0", "micro_batch_size is 0", "temperature is nan", "beta is inf", "beta is -1", "epsilon is -1",
        "learning_rate is -0.001", "eval_samples is -3", "num_epochs is -1", "save_every is -1", "warmup_steps is -5")},
}  # fmt: skip


@pytest.mark.parametrize("flags", BAD_SETTINGS)
def test_bad_settings_are_refused_at_once(flags: str, tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    loader = transformers.AutoModelForCausalLM
    monkeypatch.setattr(loader, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    given = flags.format(file=tmp_path / "file").split()
    error = refusal(capsys, lambda: grpo_ablations.main(grpo_ablations.parse_config(given)))
    assert all(name.format(file=tmp_path / "file") in error for name in BAD_SETTINGS[flags])
    assert {*Path().rglob("*")} <= {Path("file"), Path("runs")}  # no run folder


def test_handlers_of_signals_are_put_back(tmp_path: Path, monkeypatch: Patch) -> None:
    """After a run that is finished, and after one that an exception ends."""
    numbers, score = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), grpo.score
    before = list(map(signal.getsignal, numbers))
    during: list[Any] = []

    def fail_at_last(*given: Any) -> Any:
        during.extend(map(signal.getsignal, numbers))
        return score(*given) if len(during) < 9 * 3 else 1 / 0

    monkeypatch.setattr(grpo, "score", fail_at_last)
    grpo.main(small(tmp_path))
    assert list(map(signal.getsignal, numbers)) == before
    with pytest.raises(ZeroDivisionError):
        grpo.main(small(tmp_path))
    assert list(map(signal.getsignal, numbers)) == before
    assert not any(handler in before for handler in during)


def test_scripts_start_where_there_is_no_sighup_and_no_resource(monkeypatch: Patch) -> None:
    """On Windows."""
    monkeypatch.delattr(signal, "SIGHUP")
    run: Any = SimpleNamespace(signals=[])
    with ExitStack() as stack:
        grpo.record_signals(run, stack)
        signal.raise_signal(signal.SIGTERM)
    assert run.signals == [signal.SIGTERM]
    assert not [path.name for path in ROOT.glob("grpo*.py") if re.search("import resource", path.read_text())]


BEST: dict[str, tuple[int, list[float], list[int], int]] = {  # --save-every; accuracy in steps 0 to 6; kept; best
    "in between": (2, [0.5, 0.8, 0.6, 0.7, 0.6, 0.7, 0.8], [1, 4, 6], 1), "no": (0, [0, 0, 1, 0, 0, 0, 0], [3, 6], 0),
    "last": (1, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [5, 6], 6), "before training": (1, [0.5] * 7, [5, 6], 0),
    "only that": (100, [0.5, 0.6, 0.3, 0.3, 0.3, 0.3, 0.3], [1, 3, 6], 1),
}  # fmt: skip


@pytest.mark.parametrize("name", BEST)
def test_the_best_checkpoint_is_kept_and_named(name: str, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """Over an interruption too: the run ends after three steps, and goes on to six."""
    save_every, accuracies, kept, best = BEST[name]
    values = iter(accuracies)
    monkeypatch.setattr(grpo, "evaluate", lambda *_: ({"eval/accuracy": next(values)}, []))
    settings: dict[str, Any] = {"eval_every": 1, "save_every": save_every, "num_steps": 3}
    grpo.main(small(tmp_path, **settings))
    run = only_run(tmp_path)
    capsys.readouterr()
    grpo.main(small(tmp_path, **settings | {"num_steps": 6, "resume": str(run)}))
    assert [int(path.name[5:]) for path in sorted((run / "checkpoints").iterdir())] == kept
    *lines, final = capsys.readouterr().out.splitlines()
    assert final == f"final: eval/accuracy={accuracies[6]:.3f}"
    named = [line for line in lines if line.startswith("best evaluation: ")]
    assert named == ([f"best evaluation: {run}/checkpoints/step_{best:06d}"] if best else [])


def test_room_for_checkpoints_is_checked_before_training(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """For four, of which those that are there already need no more."""
    config = small(tmp_path, save_every=1)
    size = 16 * sum(weight.numel() for weight in grpo.load_policy(config, torch.device("cpu")).parameters())
    capsys.readouterr()  # a bar, while the weights are loaded
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3 * size))
    assert "make room on the disk" in refusal(capsys, grpo.main, config)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", lambda *_: Path("/dev/full").write_bytes(b"no room"))
        assert "make room on the disk" in refusal(capsys, grpo.main, config)
    assert os.listdir(tmp_path) == []
    grpo.main(small(tmp_path))  # with --save-every 0 there is only one
    again = dataclasses.replace(config, resume=str(only_run(tmp_path)), num_steps=3)
    assert "make room on the disk" in refusal(capsys, grpo.main, again)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3 * size + 1))
    assert len(grpo.main(again)) == 4


def test_a_data_file_that_was_edited_is_said_and_eval_samples_counts(tmp_path: Path, capsys: Capture) -> None:
    """Also of the training problems, where there are none to hold out."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in grpo.simple_math()))
    config = small(tmp_path, task="gsm8k", dataset_path=str(path), eval_samples=5)
    grpo.main(config)
    run = only_run(tmp_path)
    records = [record for record in read(run, "completions") if record["split"] == "train_subset"]
    assert len(records) == 2 * 2 * 5
    path.write_text(path.read_text().replace('"5"', '"6"', 1))
    capsys.readouterr()
    grpo.main(dataclasses.replace(config, resume=str(run)))
    assert "changed after step 2: problems.sha256" in capsys.readouterr().out.splitlines()


BAD_MODELS: dict[str, dict[str, Any]] = {
    "--preset tiny": {"model": "Qwen/Qwen2-0.5B-Instruct"},  # the tests have no network
    "--max-completion-length": {"max_completion_length": 100_000}, "./nowhere": {"model": "./nowhere"},
}  # fmt: skip


@pytest.mark.parametrize("words", BAD_MODELS)
def test_a_model_that_cannot_be_used_is_refused(words: str, tmp_path: Path, capsys: Capture) -> None:
    """And no run folder is left, which --resume latest would find."""
    assert words in refusal(capsys, grpo.main, small(tmp_path, task="simple_math", **BAD_MODELS[words]))
    assert os.listdir(tmp_path) == []


def test_tracking_without_a_login_is_refused(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for name, value in (("WANDB_MODE", "online"), ("HOME", tmp_path), ("NETRC", tmp_path / "netrc")):
        monkeypatch.setenv(name, str(value))
    config = small(tmp_path / "runs", track=True, num_generations=4)
    assert "wandb login" in refusal(capsys, grpo.main, config)
    assert not (tmp_path / "runs").exists()
    monkeypatch.setenv("WANDB_API_KEY", "too-short")
    assert "WANDB_API_KEY in .env" in refusal(capsys, grpo.main, config)
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\nlogin user\npassword {'0' * 40}\n")
    (tmp_path / "netrc").chmod(0o600)
    grpo.check_config(config)  # a login in netrc counts
