"""Nothing is lost: a run that was killed or stopped goes on as if it had not been; faults, put in on purpose."""

import ast
import importlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import grpo
import grpo_overfit
import grpo_overfit_max_gpu
from tests.test_processes import launch
from tests.test_run import wandb_history

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS: dict[str, ModuleType] = {"grpo": grpo, "grpo_overfit": grpo_overfit}
SIZES: dict[str, Any] = {
    "prompts_per_step": 4, "num_generations": 4, "eval_samples": 12, "eval_every": 4, "save_every": 3,
    "warmup_steps": 2, "patience": 0,
}  # fmt: skip
STEPS: dict[str, dict[str, Any]] = {
    "grpo": {"num_steps": 12},
    "grpo_overfit": {"num_samples": 12, "num_epochs": 4, "learning_rate": 1e-5},  # 12 steps, the target out of reach
}
END = {"grpo": 0, "grpo_overfit": 6}  # exit code of a run that was not interrupted
Straight = dict[str, Path]


def for_these_tests(script: Any) -> None:
    """Without pictures, which take longer than these runs; steps slow enough to be struck before the last one."""
    run, step = subprocess.run, script.train_step

    def slow_step(*given: Any) -> Any:
        time.sleep(0.02)
        return step(*given)

    script.subprocess.run = lambda command, **how: None if "report.py" in str(command) else run(command, **how)
    script.train_step = slow_step


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """With more, these small sizes take longer, and much longer when the machine has other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **how: None if "report.py" in str(command) else real(command, **how)
    )


# A run in a process of its own, forked from one that has imported everything, so that it begins at once

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["grpo", "grpo_overfit", "transformers.models.qwen2.modeling_qwen2", "tests.test_resume"])


def command_line(script: str, arguments: list[str], output: Path) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    module = importlib.import_module(script)
    for_these_tests(module)
    torch.set_num_threads(1)
    module.main(module.parse_config(arguments))


def flags(script: str, folder: Path, **changes: Any) -> list[str]:
    settings = SIZES | STEPS[script] | {"preset": "tiny", "run_dir": str(folder)} | changes
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def start(script: str, arguments: list[str], output: Path) -> Any:
    process = FORKS.Process(target=command_line, args=(script, arguments, output))
    process.start()
    return process


def finish(process: Any, output: Path) -> tuple[int, str]:
    process.join(300)
    assert process.exitcode is not None, output.read_text()
    return process.exitcode, output.read_text()


def only_run(folder: Path) -> Path:
    (run,) = folder.glob("*__*")
    return run


def lines(run: Path, name: str = "metrics") -> list[dict[str, Any]]:
    """What was logged, apart from times."""
    rows = [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(("time/", "perf/"))} for row in rows]


def weights(run: Path, step: int = 12) -> bytes:
    return (run / "checkpoints" / f"step_{step:06d}" / "model.safetensors").read_bytes()


def same(run: Path, straight: Path) -> None:
    """Nothing tells the two runs apart but their times."""
    assert weights(run) == weights(straight)
    assert lines(run) == lines(straight)
    assert lines(run, "completions") == lines(straight, "completions")
    ours, theirs = (torch.load(r / "checkpoints/step_000012/trainer.pt", weights_only=True) for r in (run, straight))
    for key, state in theirs["optimizer"]["state"].items():
        assert all(torch.equal(value, ours["optimizer"]["state"][key][name]) for name, value in state.items())
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith("partial")] == []


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """An uninterrupted run of each script."""
    runs = {}
    for script, end in END.items():
        folder = tmp_path_factory.mktemp("straight")
        process = start(script, flags(script, folder), folder / "output")
        code, output = finish(process, folder / "output")
        assert code == end, output
        runs[script] = only_run(folder)
    return runs


def wait_until(process: Any, true: Callable[[], bool]) -> None:
    while not true():
        assert process.is_alive()
        time.sleep(0.001)


def strike(folder: Path, process: Any, number: int, seed: int, step: int | None = None, begun: int = 1) -> None:
    """Sends a signal when a step, a random one if none is given, has been logged, and a random part of one longer.

    begun: how many processes have worked in this folder, this one included. Where an earlier one logged that step, the
    signal waits for the first step of this one: sooner it might come before anything waits for signals.
    """
    draw = random.Random(seed)
    step, delay = draw.randrange(9) if step is None else step, draw.uniform(0, 0.05)
    print(f"seed {seed}: {signal.Signals(number).name} {delay:.3f} s after step {step}")
    output = folder / "output"

    def beginnings() -> list[str]:
        found = r"run folder: .*?(?:, going on after step (\d+))?\n"
        return re.findall(found, output.read_text()) if output.exists() else []

    def logged() -> int:
        return sum(len(path.read_bytes().splitlines()) for path in folder.glob("*/metrics.jsonl"))

    wait_until(process, lambda: len(beginnings()) == begun)  # by now the lines from where it goes on have been cut off
    last = max(step, int(beginnings()[-1] or 0))
    wait_until(process, lambda: logged() > last)
    time.sleep(delay)
    os.kill(process.pid, number)


def resume(script: str, folder: Path, expected: Path) -> str:
    """The newest run of a folder, to its end; returns what it printed."""
    process = start(script, ["--resume", "latest", "--run-dir", str(folder)], folder / "resumed")
    code, output = finish(process, folder / "resumed")
    assert code == END[script], output
    same(only_run(folder), expected)
    return output


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_killed_run_resumes_to_the_bit(script: str, seed: int, straight: Straight, tmp_path: Path) -> None:
    process = start(script, flags(script, tmp_path), tmp_path / "output")
    strike(tmp_path, process, signal.SIGKILL, seed)
    code, output = finish(process, tmp_path / "output")
    assert code == -signal.SIGKILL, output
    resume(script, tmp_path, straight[script])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_stopped_run_resumes_to_the_bit(script: str, number: int, straight: Straight, tmp_path: Path) -> None:
    """It saves and prints the command that continues."""
    process = start(script, flags(script, tmp_path), tmp_path / "output")
    strike(tmp_path, process, number, seed=int(number))
    code, output = finish(process, tmp_path / "output")
    assert code == 128 + number, output
    assert "Traceback" not in output
    run = only_run(tmp_path)
    assert output.splitlines()[-1] == f"saved; to continue: uv run {script}.py --resume {run}"
    assert len(lines(run)) < 13
    resume(script, tmp_path, straight[script])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_struck_again_and_again_resumes_to_the_bit(
    script: str, number: int, straight: Straight, tmp_path: Path
) -> None:
    """At six random moments, each time resumed, and at last while a checkpoint is being written."""
    steps = sorted(random.Random(int(number)).sample(range(9), 6))
    for begun, step in enumerate([*steps, None], start=1):
        again = ["--resume", "latest", "--run-dir", str(tmp_path)]
        process = start(script, again if begun > 1 else flags(script, tmp_path), tmp_path / "output")
        if step is None:
            wait_until(process, lambda: any(tmp_path.glob("*/checkpoints/partial/model.safetensors")))
            os.kill(process.pid, number)
        else:
            strike(tmp_path, process, number, begun + 2, step, begun)
        code, output = finish(process, tmp_path / "output")
        assert code == (-number if number == signal.SIGKILL else 128 + number), output
    assert number != signal.SIGKILL or (only_run(tmp_path) / "checkpoints" / "partial").exists()
    resume(script, tmp_path, straight[script])


@pytest.mark.slow
def test_the_command_line_resumes_to_the_bit(tmp_path: Path) -> None:
    """As a user would, with as many threads as torch takes, and through `uv run`'s kind of process group."""
    for folder in (tmp_path / "a", tmp_path / "b"):
        command = [sys.executable, str(ROOT / "grpo.py"), *flags("grpo", folder, prompts_per_step=32)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 7") and folder.name == "b":
                os.killpg(process.pid, signal.SIGINT)
        assert process.wait() == (130 if folder.name == "b" else 0)
    resumed = subprocess.Popen([sys.executable, str(ROOT / "grpo.py"), "--resume", str(only_run(tmp_path / "b"))])
    assert resumed.wait() == 0
    same(only_run(tmp_path / "b"), only_run(tmp_path / "a"))


@pytest.fixture(scope="module")
def straight_with_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    done = launch(2, str(ROOT / "grpo.py"), *flags("grpo", folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return only_run(folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_two_processes_resume_to_the_bit(number: int, straight_with_two: Path, tmp_path: Path) -> None:
    source = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import grpo
step = grpo.train_step
def struck(learner, train, number, num_steps):
    result = step(learner, train, number, num_steps)
    if number == 8 and os.environ["RANK"] == "1":  # not the one that saves
        os.kill(os.getpid(), {int(number)})
    return result
grpo.train_step = struck
grpo.__file__ = {str(ROOT / "grpo.py")!r}
grpo.main(grpo.parse_config(sys.argv[1:]))
"""
    (tmp_path / "struck.py").write_text(source)
    done = launch(2, str(tmp_path / "struck.py"), *flags("grpo", tmp_path / "b"))
    assert done.returncode != 0
    run = only_run(tmp_path / "b")
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    # Of one that was killed, the other may find that it is gone and save, or be ended by the launcher before it can.
    assert saved[-1] == "step_000008" or (saved[-1] == "step_000006" and number == signal.SIGKILL)
    done = launch(2, str(ROOT / "grpo.py"), "--resume", str(run))
    assert done.returncode == 0, done.stderr[-3000:]
    same(run, straight_with_two)


# In this process, where a signal or a fault can be put at one place


def settings(script: ModuleType, folder: Path, **changes: Any) -> Any:
    return script.Config(**(SIZES | STEPS[script.__name__] | {"run_dir": str(folder)} | changes))


def run_main(config: Any, script: ModuleType = grpo) -> int:
    try:
        script.main(config)
    except SystemExit as error:
        return int(str(error.code))
    return 0


PLACES = [
    ("grpo", "rollout", 9), ("grpo", "completion_logprobs", 5), ("grpo", "evaluate", 1), ("grpo", "evaluate", 2),
    ("grpo", "write_rows", 7), ("grpo", "save_checkpoint", 2), ("grpo", "gather", 60), ("grpo_overfit", "evaluate", 3),
]  # fmt: skip


@pytest.mark.parametrize(("name", "function", "call"), PLACES)
def test_a_signal_anywhere_loses_nothing(
    name: str, function: str, call: int, straight: Straight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = SCRIPTS[name]
    real, calls = getattr(script, function), []

    def interrupted(*given: Any, **how: Any) -> Any:
        result = real(*given, **how)
        calls.append(function)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(script, function, interrupted)
        assert run_main(settings(script, tmp_path), script) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    run = only_run(tmp_path)
    assert run_main(settings(script, tmp_path, resume=str(run)), script) == END[name]
    same(run, straight[name])


def test_a_step_whose_update_has_begun_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = torch.optim.AdamW.step

    def interrupted(self: Any, *given: Any) -> Any:
        if self.param_groups[0]["lr"] > 0:  # not in the preflight
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    assert run_main(settings(grpo, tmp_path)) == 128 + signal.SIGTERM
    state = torch.load(only_run(tmp_path) / "checkpoints" / "step_000001" / "trainer.pt", weights_only=True)
    done = json.loads(state["done"])
    assert done[0] == 1
    assert done[1]["train/grad_norm"] > 0


SLOW_SAVE = """
import os, signal, sys, time
import grpo
save, folder = grpo.save_checkpoint, sys.argv[1]
def slow(learner):
    save(learner)
    if learner.done[0] == 2:  # the one that the signal asks for
        os.kill(os.getpid(), signal.SIGINT)  # at once, as a launcher sends it again
        print("still here", flush=True)
        time.sleep(0.4)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(600)
evaluate = grpo.evaluate
def struck(learner, problems, key):
    if learner.done[0] == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return evaluate(learner, problems, key)
grpo.save_checkpoint, grpo.evaluate = slow, struck
grpo.main(grpo.Config(run_dir=folder, num_steps=4, save_every=1, eval_every=2, eval_samples=8, prompts_per_step=2))
"""


def test_what_was_not_foreseen_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the eighth rollout, after the preflight's and two evaluations; then one in a changed policy."""
    rollout, save_checkpoint, calls = grpo.rollout, grpo.save_checkpoint, []

    def broken(*given: Any, **how: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:
            raise ZeroDivisionError
        return rollout(*given, **how)

    def save(learner: Any) -> None:
        os.kill(os.getpid(), signal.SIGHUP)  # a signal now must not keep it from being saved
        save_checkpoint(learner)

    monkeypatch.setattr(grpo, "rollout", broken)
    monkeypatch.setattr(grpo, "save_checkpoint", save)
    with pytest.raises(ZeroDivisionError):
        grpo.main(settings(grpo, tmp_path / "rollout", save_every=0))
    assert (only_run(tmp_path / "rollout") / "checkpoints" / "step_000004").is_dir()
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: self.param_groups[0]["lr"] > 0 and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        grpo.main(settings(grpo, tmp_path / "update", save_every=0))
    assert not (only_run(tmp_path / "update") / "checkpoints").exists()


def test_a_terminal_that_is_gone_ends_no_run(
    straight: Straight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a log on a full disk."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Gone())
        patch.setattr(sys, "stderr", Gone())
        assert run_main(settings(grpo, tmp_path)) == 0
        assert run_main(settings(grpo, tmp_path, task="none")) == 2
    same(only_run(tmp_path), straight["grpo"])


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW_SAVE, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 130, done.stderr
    assert "still here" in done.stdout
    assert "to continue" not in done.stdout  # it did not wait
    assert run_main(grpo.Config(**recorded(only_run(tmp_path)), resume="latest")) == 0


def recorded(run: Path) -> dict[str, Any]:
    config = json.loads((run / "config.json").read_text())
    del config["resume"]
    return config | {"rewards": tuple(config["rewards"])}


def test_a_signal_that_was_ignored_stays_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nohup does that to SIGHUP."""
    evaluate = grpo.evaluate

    def struck(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGHUP)
        return evaluate(*given)

    monkeypatch.setattr(grpo, "evaluate", struck)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_main(settings(grpo, tmp_path, num_steps=1)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_before_training_is_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "grpo.py"), "--preset", "tiny", "--run-dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("preset tiny")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


# What a resumed run takes up, and what it refuses


@pytest.fixture
def finished(straight: Straight, tmp_path: Path) -> Path:
    """A copy of the uninterrupted run."""
    return Path(shutil.copytree(straight["grpo"], tmp_path / straight["grpo"].name))


def test_a_finished_run_stays_what_it_is(finished: Path, straight: Straight, tmp_path: Path) -> None:
    results = grpo.main(settings(grpo, tmp_path, resume=str(finished)))
    same(finished, straight["grpo"])
    rows = lines(finished)
    assert results["eval/accuracy_before"] == rows[0]["eval/accuracy"]
    assert results["train/reward"] == rows[12]["train/reward"]
    assert results["train/loss"] == rows[12]["train/loss"]
    assert "step" not in results


def overwrite(path: Path) -> None:
    """A few bytes in the middle: it can still be loaded."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(random.Random(0).randbytes(1000))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "half of trainer.pt": lambda folder: os.truncate(folder / "trainer.pt", 1000),
    "half of model.safetensors": lambda folder: os.truncate(folder / "model.safetensors", 100_000),
    "other bytes in trainer.pt": lambda folder: overwrite(folder / "trainer.pt"),
    "other bytes in model.safetensors": lambda folder: overwrite(folder / "model.safetensors"),
    "no trainer.pt": lambda folder: (folder / "trainer.pt").unlink(),
    "no checksum": lambda folder: (folder / "checksum").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    damage: str, finished: Path, straight: Straight, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[damage](finished / "checkpoints" / "step_000012")
    assert run_main(settings(grpo, tmp_path, resume="latest")) == 0
    assert "step_000012' is damaged: taking the one before" in capsys.readouterr().out
    same(finished, straight["grpo"])
    assert len(list((finished / "checkpoints").glob("damaged_step_000012_*"))) == 1


def test_nothing_is_thrown_away_if_every_checkpoint_is_damaged(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in finished.glob("checkpoints/*/trainer.pt"):
        path.write_bytes(b"")
    before = (finished / "metrics.jsonl").read_bytes()
    assert run_main(settings(grpo, tmp_path, resume="latest")) == 2
    assert "every checkpoint in" in capsys.readouterr().err
    assert (finished / "metrics.jsonl").read_bytes() == before
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["step_000009", "step_000012"]


def test_a_missing_tokenizer_does_no_harm_to_a_resumed_run_and_is_named_elsewhere(
    finished: Path, straight: Straight, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = finished / "checkpoints" / "step_000012"
    for path in checkpoint.glob("*token*"):
        path.unlink()
    assert run_main(settings(grpo, tmp_path, resume="latest")) == 0
    same(finished, straight["grpo"])
    capsys.readouterr()
    assert run_main(settings(grpo, tmp_path, model=str(checkpoint))) == 2
    error = capsys.readouterr().err
    assert f"'{checkpoint}' has no tokenizer files" in error
    assert error.count("\n") == 1


def test_a_line_that_was_cut_short_is_mended(finished: Path, straight: Straight, tmp_path: Path) -> None:
    shutil.rmtree(finished / "checkpoints" / "step_000012")
    for name in ("metrics", "completions"):
        path = finished / f"{name}.jsonl"
        path.write_bytes(path.read_bytes()[:-20])
    assert run_main(settings(grpo, tmp_path, resume="latest")) == 0
    same(finished, straight["grpo"])


def test_a_run_killed_before_its_first_checkpoint_begins_anew(
    finished: Path, straight: Straight, tmp_path: Path
) -> None:
    shutil.rmtree(finished / "checkpoints")
    assert run_main(settings(grpo, tmp_path, resume="latest")) == 0
    same(finished, straight["grpo"])


def test_more_steps_go_on_where_the_schedule_does_not_depend_on_them(tmp_path: Path) -> None:
    longer = {"lr_schedule": "constant", "num_iterations": 2}
    assert run_main(settings(grpo, tmp_path / "a", **longer)) == 0
    assert run_main(settings(grpo, tmp_path / "b", **longer, num_steps=7)) == 0
    run = only_run(tmp_path / "b")
    assert run_main(settings(grpo, tmp_path / "b", **longer, resume=str(run))) == 0
    same(run, only_run(tmp_path / "a"))
    assert json.loads((run / "config.json").read_text())["num_steps"] == 12  # a second resume takes it from there
    assert run_main(settings(grpo, tmp_path / "b", **longer, resume=str(run), num_steps=3)) == 0  # it has done more
    assert len(lines(run)) == 13


@pytest.mark.parametrize(
    ("changes", "difference"),
    [({"num_steps": 13}, "num_steps 12 -> 13"), ({"learning_rate": 1.0}, "learning_rate 0.0003 -> 1.0"),
     ({"rewards": ("format=1.0",)}, "rewards ['accuracy=2.0'] -> ['format=1.0']"), ({"seed": 2, "beta": 1.0},
     "beta 0.0 -> 1.0, seed 1 -> 2")],
)  # fmt: skip
def test_other_maths_is_refused(
    changes: dict[str, Any], difference: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert run_main(settings(grpo, tmp_path, resume="latest", **changes)) == 2
    error = capsys.readouterr().err
    assert error.endswith(f"leave these as they were: {difference}\n")
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_the_recorded_settings_are_the_defaults(finished: Path, tmp_path: Path) -> None:
    config = grpo.parse_config(["--resume", "latest", "--run-dir", str(tmp_path), "--save-every", "5"])
    assert config == settings(grpo, tmp_path, resume=str(finished), save_every=5)


def test_the_newest_run_of_this_script_is_taken(finished: Path, tmp_path: Path) -> None:
    stem = finished.name.rsplit("__", 1)[0]
    newer = Path(shutil.copytree(finished, tmp_path / f"{stem}__20990101-000000-000"))
    other = Path(shutil.copytree(finished, tmp_path / "grpo_x__arithmetic__tiny_policy__1__20990201-000000-000"))
    (other / "grpo.py").rename(other / "grpo_x.py")
    assert grpo.find_run(grpo.Config(resume="latest", run_dir=str(tmp_path))) == newer


def test_another_preset_is_refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = grpo.parse_config(["--resume", "latest", "--run-dir", str(tmp_path), "--preset", "qwen"])
    assert run_main(config) == 2
    assert capsys.readouterr().err.endswith("leave these as they were: preset tiny -> qwen\n")


def test_a_run_folder_is_never_taken_from_another_run(
    finished: Path, straight: Straight, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs that begin in the same millisecond."""
    stamp = finished.name.rsplit("__", 1)[1]
    monkeypatch.setattr(grpo.time, "strftime", lambda *_: stamp[:-4])
    monkeypatch.setattr(grpo.time, "time_ns", lambda: int(stamp[-3:]) * 10**6)
    with pytest.raises(SystemExit):
        grpo.make_run_folder(settings(grpo, finished.parent), torch.device("cpu"))
    assert "FileExistsError" in capsys.readouterr().err
    same(finished, straight["grpo"])


@pytest.mark.parametrize("name", ["latest", "nowhere", "{other}"])
def test_no_run_to_resume(name: str, straight: Straight, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = name.format(other=straight["grpo_overfit"])
    assert run_main(settings(grpo, tmp_path, resume=name)) == 2
    assert "is no run folder of grpo.py" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["grpo.py", "grpo_ladder.py", "grpo_overfit.py", "grpo_overfit_max_gpu.py"])
def test_what_may_change_on_resume_is_what_the_settings_call_speed(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text())
    (config,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    speed = set()
    for field, text in zip(config.body, config.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and "[speed]" in ast.unparse(text):
            speed.add(ast.unparse(field.target))
    assert speed == importlib.import_module(name.removesuffix(".py")).SPEED


def test_two_runs_in_one_folder(
    finished: Path, straight: Straight, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = grpo.lock(finished)
    assert run_main(settings(grpo, tmp_path, resume="latest")) == 2
    assert capsys.readouterr().err == f"error: process {os.getpid()} works in '{finished}': wait for it, or stop it\n"
    same(finished, straight["grpo"])
    held.close()
    assert run_main(settings(grpo, tmp_path, resume="latest")) == 0


def test_old_checkpoints_go(straight: Straight, tmp_path: Path) -> None:
    names = sorted(path.name for path in (straight["grpo"] / "checkpoints").iterdir())
    assert names == ["step_000009", "step_000012"]
    assert run_main(settings(grpo, tmp_path, keep_checkpoints=0)) == 0
    assert len(list((only_run(tmp_path) / "checkpoints").iterdir())) == 4
    shorter = settings(grpo, tmp_path / "b", keep_checkpoints=1, num_steps=4)
    assert run_main(shorter) == 0
    assert [path.name for path in (only_run(tmp_path / "b") / "checkpoints").iterdir()] == ["step_000004"]


def test_wandb_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Ended at step 5, then at step 4, neither time saved, then stopped at step 7, then not: the same W&B run."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train_step, save_checkpoint = grpo.train_step, grpo.save_checkpoint
    for end, code in ((5, 1), (4, 1), (7, 143), (99, 0)):

        def struck(learner: Any, train: Any, step: int, num_steps: int, end: int = end, code: int = code) -> Any:
            if step == end and code == 1:
                monkeypatch.setattr(grpo, "save_checkpoint", lambda _: None)
                raise RuntimeError
            if step == end:
                os.kill(os.getpid(), signal.SIGTERM)
            return train_step(learner, train, step, num_steps)

        monkeypatch.setattr(grpo, "train_step", struck)
        monkeypatch.setattr(grpo, "save_checkpoint", save_checkpoint)
        config = settings(grpo, tmp_path, track=True, resume="latest" if any(tmp_path.iterdir()) else "")
        if code == 1:
            with pytest.raises(RuntimeError):
                grpo.main(config)
        else:
            assert run_main(config) == code
    assert "Traceback" not in capfd.readouterr().err
    stores = sorted(only_run(tmp_path).glob("wandb/offline-run-*/run-*.wandb"))
    told = [[row["_step"] for row in wandb_history(store)] for store in stores]
    assert told == [[0, 1, 2, 3, 4], [], [5, 6], [7, 8, 9, 10, 11, 12]]
    assert len({store.name for store in stores}) == 1


# Faults


def test_a_full_disk_keeps_the_last_good_checkpoint(
    straight: Straight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands for the full disk: weights do not fit."""
    save, soft = grpo.save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(learner: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000 if learner.done[0] >= 6 else soft[0], soft[1]))
        save(learner)

    monkeypatch.setattr(grpo, "save_checkpoint", full)
    try:
        assert run_main(settings(grpo, tmp_path)) == 5
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    error = capsys.readouterr().err
    assert "free space" in error
    assert error.count("\n") == 1
    run = only_run(tmp_path)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000003"]
    monkeypatch.setattr(grpo, "save_checkpoint", save)
    assert run_main(settings(grpo, tmp_path, resume="latest")) == 0
    same(run, straight["grpo"])


@pytest.mark.parametrize("moment", ["log", "make_run_folder"])
def test_a_disk_too_full_for_the_log(
    moment: str, straight: Straight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, soft, calls = getattr(grpo, moment), resource.getrlimit(resource.RLIMIT_FSIZE), []

    def full(*given: Any) -> Any:
        calls.append(moment)
        if len(calls) == (8 if moment == "log" else 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, soft[1]))
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(grpo, moment, full)
        try:
            assert run_main(settings(grpo, tmp_path)) == 5
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert "free space" in capsys.readouterr().err
    if moment == "log":
        assert run_main(settings(grpo, tmp_path, resume="latest")) == 0
        same(only_run(tmp_path), straight["grpo"])


def test_steps_that_are_not_finite_are_not_applied(
    straight: Straight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From step 5 on no loss is finite: after three such steps it is left as it was after step 4."""
    train_step, loss = grpo.train_step, grpo.dr_grpo_loss
    at = [0]

    def counted(learner: Any, train: Any, step: int, num_steps: int) -> Any:
        at[0] = step
        return train_step(learner, train, step, num_steps)

    def poisoned(*given: Any, **how: Any) -> torch.Tensor:
        return loss(*given, **how) * (float("nan") if at[0] >= 5 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(grpo, "train_step", counted)
        patch.setattr(grpo, "dr_grpo_loss", poisoned)
        assert run_main(settings(grpo, tmp_path)) == 4
    run = only_run(tmp_path)
    output, errors = capsys.readouterr()
    assert [f"step {step}: its loss or gradient is not finite" in output for step in range(4, 9)] == [
        *(False, True, True, True, False)
    ]
    assert "3 such steps in a row" in errors
    assert f"--model {run}/checkpoints/step_000004, the last good checkpoint" in errors
    rows = lines(run)
    assert [row["step"] for row in rows if "train/grad_norm" not in row] == [0, 5, 6]
    for step in (5, 6, 7):
        assert len(lines(run, f"bad_batch_{step:06d}")) == 16
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_000003", "step_000004"]
    assert weights(run, 4) != weights(run, 3)
    assert run_main(settings(grpo, tmp_path, resume="latest")) == 0
    same(run, straight["grpo"])


def test_a_bad_second_iteration_takes_the_first_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(grpo, tmp_path / "a", num_iterations=2, lr_schedule="constant", num_steps=2)
    assert run_main(config) == 0
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def infinite(parameters: Any, limit: float) -> torch.Tensor:
        calls.append(1)
        return torch.tensor(torch.inf) if len(calls) >= 8 and len(calls) % 2 == 0 else clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", infinite)
    longer = settings(grpo, tmp_path / "b", num_iterations=2, lr_schedule="constant", save_every=0)
    assert run_main(longer) == 4
    assert "step_000002" in capsys.readouterr().err
    one, two = (
        torch.load(only_run(tmp_path / name) / "checkpoints/step_000002/trainer.pt", weights_only=True) for name in "ab"
    )
    assert all(torch.equal(a, b) for a, b in zip(one["masters"], two["masters"], strict=True))
    for key, values in one["optimizer"]["state"].items():
        assert all(torch.equal(value, two["optimizer"]["state"][key][name]) for name, value in values.items())
    assert weights(only_run(tmp_path / "a"), 2) == weights(only_run(tmp_path / "b"), 2)


def test_one_bad_step_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinite gradient under a finite loss in step 2, after the preflight and step 1; the steps after it learn."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def infinite(parameters: Any, limit: float) -> torch.Tensor:
        calls.append(1)
        return torch.tensor(torch.inf) if len(calls) == 3 else clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", infinite)
    train_step, sums = grpo.train_step, []

    def watched(learner: Any, *given: Any) -> Any:
        result = train_step(learner, *given)
        sums.append(sum(p.double().sum().item() for p in learner.masters))
        return result

    monkeypatch.setattr(grpo, "train_step", watched)
    config = settings(grpo, tmp_path, num_steps=3, save_every=1, keep_checkpoints=0, max_bad_steps=2)
    assert run_main(config) == 0
    run = only_run(tmp_path)
    assert [row["step"] for row in lines(run) if "train/grad_norm" not in row] == [0, 2]
    assert sums[0] == sums[1] != sums[2]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_000001", "step_000003"]


def broken_reward(completions: list[Any], **_: Any) -> list[float]:
    calls.append(1)
    if len(calls) > 9:
        raise ZeroDivisionError
    return [float(len(text[0]["content"])) for text in completions]


calls: list[int] = []


def test_a_failing_reward_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(grpo, tmp_path, rewards=("tests.test_resume:broken_reward=1.0",), save_every=0)
    calls.clear()
    assert run_main(config) == 7
    output, errors = capsys.readouterr()
    assert "reward 'broken_reward' failed with ZeroDivisionError" in errors
    run = only_run(tmp_path)
    assert f"{run}/failed_batch.jsonl" in errors
    assert {"question", "answer", "completion"} <= lines(run, "failed_batch")[0].keys()
    last = lines(run)[-1]["step"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{last:06d}"]
    assert f"--resume {run}" in output


def test_the_micro_batch_in_force_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = grpo_overfit_max_gpu
    sizes = SIZES | STEPS["grpo_overfit"] | {"run_dir": str(tmp_path), "num_epochs": 1}
    learners, make, score = [], script.make_learner, script.completion_logprobs

    def remember(*given: Any) -> Any:
        learners.append(make(*given))
        return learners[-1]

    def small(policy: Any, prompts: Any, ids: Any, *given: Any, **how: Any) -> Any:
        if len(ids) > 3:
            raise torch.OutOfMemoryError
        return score(policy, prompts, ids, *given, **how)

    monkeypatch.setattr(script, "make_learner", remember)
    monkeypatch.setattr(script, "completion_logprobs", small)
    assert run_main(script.Config(**sizes), script) == 6
    size = learners[-1].micro_batch_size
    assert 0 < size <= 3
    assert run_main(script.Config(**sizes, resume="latest"), script) == 6
    assert learners[-1].micro_batch_size == size


# Text from outside

NASTY = "\x1b[2J\x00\r\n\u2028<script>alert(1)</script>\u202e \\boxed{"


def test_what_a_policy_writes_breaks_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grpo.log(tmp_path, None, 3, {"train/reward": 1.0}, [{"completion": NASTY}, {"completion": "next"}], [])
    text = (tmp_path / "completions.jsonl").read_bytes()
    assert text.count(b"\n") == len(text.decode("ascii").splitlines()) == 2
    assert lines(tmp_path, "completions") == [{"step": 3, "completion": NASTY}, {"step": 3, "completion": "next"}]
    problem = {"question": NASTY, "answer": "1", "completion_ids": 3}  # a column with the name of an argument
    functions = grpo.load_rewards(("accuracy=1.0",))
    assert grpo.compute_rewards(functions, [problem], ["1"], [[1]], tmp_path)["reward"] == [1.0]
    with pytest.raises(SystemExit):
        grpo.compute_rewards(
            {"none": (lambda **_: [], 1.0)}, [{"question": NASTY, "answer": "1"}], [NASTY], [[1]], tmp_path
        )
    error = capsys.readouterr().err
    assert error.removesuffix("\n").isprintable()


def test_what_a_policy_writes_breaks_no_wandb_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(dir=tmp_path) as tracker:
        rows = [{"completion": NASTY, "right": False}]
        grpo.log(tmp_path, tracker, 0, {"train/reward": 1.0}, rows, rows)
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/completions/*.json")
    assert json.loads(table.read_text())["data"] == [[0, NASTY, "False"]]


def test_half_a_surrogate_pair_is_refused_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": "1 + 1", "answer": "2"}, {"question": "\ud800", "answer": "2"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as caught:
        grpo.read_jsonl(str(tmp_path / "data.jsonl"))
    assert caught.value.code == 2
    assert "line 2" in capsys.readouterr().err


def test_a_checkpoint_runs_no_code(finished: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "pwned"),)

    folder = finished / "checkpoints" / "step_000012"
    torch.save({"done": Payload()}, folder / "trainer.pt")
    (folder / "checksum").write_text(grpo.checksum(folder))  # who can write the one can write the other
    with pytest.raises(pickle.UnpicklingError):
        grpo.main(settings(grpo, tmp_path, resume="latest"))
    assert not (tmp_path / "pwned").exists()
