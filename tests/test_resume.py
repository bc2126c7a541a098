"""Nothing is lost: a run that is killed, stopped or struck by a fault goes on as if it had not been.
Runs are `grpo.py` as a program, in processes forked from one that has imported everything, so that they begin at once.
"""

import errno
import fcntl
import json
import multiprocessing
import os
import pty
import re
import runpy
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import grpo
import rewards
from tests.conftest import Capture, Patch, refusal
from tests.test_run import only_run, read

ROOT = Path(__file__).resolve().parents[1]
SIZES: dict[str, Any] = {
    "preset": "tiny", "task": "simple_math", "rewards": "tests.test_resume:graded=2.0", "num_steps": 12,
    "prompts_per_step": 4, "num_generations": 4, "eval_samples": 12, "eval_every": 4, "save_every": 3,
    "warmup_steps": 2, "temperature": 1.5, "num_iterations": 2, "lr_schedule": "constant",
}  # fmt: skip
Strike = tuple[str, int, str]  # place, optimizer steps that were taken by then, what happens: a key of ACTS or signals
NEVER: Strike = ("", 0, "")

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["grpo", "transformers.models.qwen2.modeling_qwen2", "tests.test_resume"])
STARTING = Lock()
strike = NEVER
updates = 0
factors: list[float] = []  # of the next loss


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def fill_disk() -> None:
    """From now on a text that is written breaks off, as on a full disk."""
    real = Path.open

    def full(path: Path, mode: str = "r", *given: Any, **how: Any) -> Any:
        if "r" not in mode:
            with real(path, mode, *given, **how) as file:
                file.write('{"step": ')
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, mode, *given, **how)

    pytest.MonkeyPatch().setattr(Path, "open", full)


ACTS: dict[str, Callable[[], Any]] = {
    "error": lambda: 1 // 0, "memory": out_of_memory, "wait": lambda: time.sleep(600), "fill disk": fill_disk,
    "nan": lambda: factors.append(torch.nan),
}  # fmt: skip


def reached(place: str) -> None:
    """Strikes, once, if this is the place and the time."""
    global strike
    if strike[:2] == (place, updates):
        act, strike = strike[2], NEVER
        if act in ACTS:
            ACTS[act]()
        else:
            for name in act.split():
                os.kill(os.getpid(), signal.Signals[name])


def graded(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Accuracy and the last digit: something to learn in every step, of 16 completions. An evaluation has 12."""
    reached("reward" if len(completions) == 16 else "evaluation")
    right = rewards.accuracy_reward(completions, answer)
    last = [completion[0]["content"][-1:] for completion in completions]
    return [score + 0.1 * "0123456789".find(digit) for score, digit in zip(right, last, strict=True)]


def after(place: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **how: Any) -> Any:
        reached(place)
        return real(*args, **how)

    return call


def set_up(given: Strike) -> None:
    """Puts the strike into the public parts of torch and transformers that every script has to use."""
    global strike
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

    strike = given
    step, backward, run = torch.optim.AdamW.step, torch.Tensor.backward, subprocess.run

    def counted(*args: Any, **how: Any) -> None:
        global updates
        step(*args, **how)
        updates += 1

    patch = pytest.MonkeyPatch()
    # The first forward pass after an update without evaluation is that of the next rollout.
    patch.setattr(Qwen2Model, "forward", after("rollout", Qwen2Model.forward))
    patch.setattr(torch.Tensor, "backward", after("update", lambda x: backward(x * factors.pop() if factors else x)))
    patch.setattr(torch.optim.AdamW, "step", after("optimizer", counted))
    patch.setattr(torch, "save", after("saving", torch.save))
    # Without the closing report, a program of its own, which takes longer than these runs.
    patch.setattr(subprocess, "run", lambda command, **how: "report.py" in str(command) or run(command, **how))


def command_line(script: str, arguments: list[str], output: Path, given: Strike, ignored: list[int]) -> None:
    # In a session of its own: the first terminal that it opens is the one that controls it.
    os.setsid()
    file = os.open(output, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    set_up(given)
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def start(arguments: list[str], output: Path, given: Strike = NEVER, ignored: Any = (), script: str = "grpo.py") -> Any:
    process = FORKS.Process(target=command_line, args=(script, arguments, output, given, ignored))
    with STARTING:
        process.start()
    return process


def exit_code(process: Any) -> int:
    """Its exit code, which would be lost if a thread that starts a process read it at the same time."""
    assert wait([process.sentinel], 120)
    with STARTING:
        process.join()
    return process.exitcode


def run(arguments: list[str], output: Path, *given: Any, code: int = 0, **how: Any) -> str:
    """What was printed by a run that ended with this exit code."""
    output.unlink(missing_ok=True)
    ended, text = exit_code(start(arguments, output, *given, **how)), output.read_text()
    assert ended == code, text
    return text


def flags(folder: Path, **changes: Any) -> list[str]:
    settings = SIZES | {"run_dir": str(folder)} | changes
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value is not None]


def latest(folder: Path) -> list[str]:
    return ["--resume", "latest", "--run-dir", str(folder)]


def checkpoints(folder: Path) -> list[int]:
    """Steps. What a killed process left of a checkpoint that it was writing does not count."""
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step_*"))


def tensors(folder: Path, step: int = 12) -> list[torch.Tensor]:
    """All that is trained: weights and the optimizer's state."""
    checkpoint = folder / "checkpoints" / f"step_{step:06d}"
    state = torch.load(checkpoint / "trainer.pt", weights_only=True)["optimizer"]["state"]
    moments = [value for _, values in sorted(state.items()) for _, value in sorted(values.items())]
    return [value for _, value in sorted(load_file(checkpoint / "model.safetensors").items())] + moments


def same_tensors(folder: Path, straight: Path) -> None:
    ours, theirs = tensors(folder), tensors(straight)
    assert len(ours) == len(theirs) > 50
    assert all(map(torch.equal, ours, theirs))


def same(folder: Path, straight: Path, lost: int = -1) -> None:
    """Nothing tells the two runs apart but their times, and the metrics of training in the step that is lost."""
    same_tensors(folder, straight)
    for name in ("metrics", "completions"):
        rows, expected = ([row for row in read(run, name) if row["step"] != lost] for run in (folder, straight))
        assert rows == expected
    if lost >= 0:
        evaluated, whole = (read(run)[lost] for run in (folder, straight))
        assert len(evaluated) > 3
        assert evaluated.items() <= whole.items()
    assert checkpoints(folder) == checkpoints(straight)
    assert checkpoints(folder)[-2:] == [9, 12]
    assert not list(folder.rglob("*partial*"))


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    run(flags(folder), folder / "output")
    assert all(row["train/grad_norm"] > 0 for row in read(only_run(folder))[1:])
    return only_run(folder)


@pytest.fixture
def finished(straight: Path, tmp_path: Path) -> Path:
    """A copy of the run that nothing happened to."""
    return Path(shutil.copytree(straight, tmp_path / straight.name))


# Two updates a step. What happens; exit code; newest checkpoint then.
STRIKES: list[tuple[Strike, int, int]] = [
    (("optimizer", 1, "SIGKILL"), -9, 0), (("rollout", 10, "SIGKILL"), -9, 4), (("update", 14, "SIGKILL"), -9, 6),
    (("evaluation", 16, "SIGKILL"), -9, 6), (("saving", 12, "SIGKILL"), -9, 4),
    (("update", 14, "SIGINT SIGINT"), -2, 6), (("update", 9, "SIGTERM"), 143, 5), (("update", 9, "error"), 1, 4),
    (("reward", 14, "error"), 1, 7), (("optimizer", 14, "error"), 1, 6), (("evaluation", 24, "error"), 1, 12),
    (("rollout", 10, "memory"), 1, 5), (("update", 14, "nan"), 1, 7), (("update", 9, "nan"), 1, 4),
    (("saving", 12, "fill disk"), 1, 4), (("reward", 14, "fill disk"), 1, 6),  # while a step is logged
]  # fmt: skip
for sent in ("SIGINT", "SIGTERM", "SIGHUP"):
    for place, taken, saved in (("rollout", 10, 6), ("update", 14, 8), ("evaluation", 8, 4), ("saving", 12, 6)):
        STRIKES.append(((place, taken, sent), 128 + signal.Signals[sent], saved))
CASES = {"{2} in {0} after {1} updates".format(*case[0]): case for case in STRIKES}


def strike_and_resume(folder: Path, given: Strike, code: int) -> tuple[str, list[int]]:
    """What it printed and the checkpoints it left, before it went on to its end."""
    output = run(flags(folder), folder / "output", given, code=code)
    left = checkpoints(only_run(folder))
    assert code < 0 or not list(folder.rglob("*partial*"))  # only what is killed leaves half a checkpoint
    told = re.search(r"to continue: uv run grpo.py (.*)$", output, re.MULTILINE)
    run(shlex.split(told[1]) if told else latest(folder), folder / "resumed")
    return output, left


@pytest.fixture(scope="module", autouse=True)
def struck(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The cases that were asked for, which run in the background while the other tests do."""
    specs = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    cases = [spec.params["case"] for spec in specs if "case" in spec.params]
    with ThreadPoolExecutor(2) as pool:
        folders = {case: tmp_path_factory.mktemp("struck") for case in cases}
        yield {case: (folders[case], pool.submit(strike_and_resume, folders[case], *CASES[case][:2])) for case in cases}


OVERFIT: dict[str, Any] = {"task": None, "num_steps": None, "num_samples": 12, "num_epochs": 4}
VARIANTS: dict[str, tuple[dict[str, Any], int]] = {  # settings; exit code of a run that nothing happens to
    "grpo_ablations.py": ({"beta": 0.1, "loss_type": "grpo"}, 0), "grpo_ladder.py": ({"task": "echo"}, 0),
    "grpo_overfit.py": (OVERFIT, 6), "grpo_overfit_max_gpu.py": (OVERFIT, 6),
}  # fmt: skip


@pytest.mark.parametrize("script", VARIANTS)
def test_the_other_scripts_go_on_to_the_bit(script: str, tmp_path: Path) -> None:
    changes, end = VARIANTS[script]
    changes = changes | {"rewards": None, "learning_rate": 1e-5}  # too low for a target to be met
    whole, halved = tmp_path / "a", tmp_path / "b"
    run(flags(whole, **changes), tmp_path / "1", script=script, code=end)
    run(flags(halved, **changes), tmp_path / "2", ("update", 14, "SIGTERM"), script=script, code=143)
    assert checkpoints(only_run(halved))[-2:] == [6, 8]
    run(latest(halved), tmp_path / "3", script=script, code=end)
    same(only_run(halved), only_run(whole))


def test_sources_that_were_edited_are_said_and_kept(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    """And --preset auto is the run's own."""
    for name in ("grpo.py", "rewards.py"):
        (finished / name).write_text("as it was")
    config = grpo.parse_config([*latest(tmp_path), "--preset", "auto"])
    assert config.preset == "tiny"
    grpo.main(config)
    assert "changed after step 12: grpo.py, rewards.py" in capsys.readouterr().out.splitlines()
    for name in ("grpo", "rewards"):
        assert (finished / f"{name}.py").read_text() == "as it was"
        assert (finished / f"{name}_after_step_12.py").read_text() == (ROOT / f"{name}.py").read_text()


def test_out_of_memory_goes_on_with_a_smaller_micro_batch(straight: Path, tmp_path: Path) -> None:
    """The gradient is the same to rounding."""
    output = run(flags(tmp_path), tmp_path / "output", ("update", 14, "memory"), code=1)
    assert re.search(r"^out of memory: .*--micro-batch-size", output, re.MULTILINE)
    assert checkpoints(only_run(tmp_path))[-2:] == [6, 7]
    run([*latest(tmp_path), "--micro-batch-size", "3"], tmp_path / "resumed")
    for one, other in zip(read(only_run(tmp_path)), read(straight), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("ignored", [[], [signal.SIGHUP]])
def test_a_terminal_that_is_closed(ignored: list[int], straight: Path, tmp_path: Path) -> None:
    """It shows a bar; when it goes, the step is saved, and the run ends at its next print."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # 24 lines of 80 characters
    process = start(flags(tmp_path), Path(os.ttyname(slave)), ignored=ignored)
    seen = b""
    while not re.search(rb"\| [5-7]/12 \[\d\d:\d\d<\d\d:\d\d", seen):
        seen += os.read(master, 1000)
    os.close(slave)
    os.close(master)
    assert exit_code(process) != 0
    assert 5 <= checkpoints(only_run(tmp_path))[-1] < 12
    run(latest(tmp_path), tmp_path / "resumed")
    same(only_run(tmp_path), straight)


def test_a_finished_run_says_so(finished: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    before = snapshot(finished)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: 1 / 0)
    results, rows = grpo.main(grpo.parse_config(latest(tmp_path))), read(finished)
    assert "this run is finished" in capsys.readouterr().out
    assert len(results) == 13
    assert rows[12].items() <= results[12].items()
    changed = [path.name for path, text in snapshot(finished).items() if before.get(path) != text]
    assert changed in ([], ["config.json"])  # --run-dir is another


def test_what_changes_only_speed_may_change(straight: Path, tmp_path: Path) -> None:
    run(flags(tmp_path), tmp_path / "output", ("update", 14, "SIGKILL"), code=-9)
    others = ["--micro-batch-size", "16", "--eval-every", "5", "--save-every", "2", "--track", "--log-completions"]
    run([*latest(tmp_path), *others], tmp_path / "resumed")
    folder = only_run(tmp_path)
    same_tensors(folder, straight)
    assert [row["step"] for row in read(folder) if "eval/train_subset_accuracy" in row] == [0, 4, 10, 12]
    assert checkpoints(folder)[-2:] == [10, 12]
    assert json.loads((folder / "config.json").read_text())["eval_every"] == 5  # as it stands from now on


def test_more_steps_go_on_where_the_schedule_does_not_depend_on_them(straight: Path, tmp_path: Path) -> None:
    run(flags(tmp_path, num_steps=9, eval_every=3), tmp_path / "output")
    run([*latest(tmp_path), "--num-steps", "12"], tmp_path / "resumed")
    same_tensors(only_run(tmp_path), straight)
    assert [row["step"] for row in read(only_run(tmp_path))] == list(range(13))


KEPT = {"preset": "qwen", "task": "arithmetic", "model": "gpt2", "dataset_path": "{}", "test_path": "{}"}


@pytest.mark.parametrize("name", KEPT)
def test_what_a_run_keeps_is_refused(name: str, finished: Path, tmp_path: Path, capsys: Capture) -> None:
    before = snapshot(finished)
    (tmp_path / "problems.jsonl").write_text(json.dumps({"question": "What is 1 + 1?", "answer": "2"}))
    changed = [f"--{name.replace('_', '-')}", KEPT[name].format(tmp_path / "problems.jsonl")]
    assert f"another {name}" in refusal(capsys, grpo.main, grpo.parse_config([*latest(tmp_path), *changed]))
    assert snapshot(finished) == before


def test_other_flags_are_taken_said_and_recorded(straight: Path, tmp_path: Path) -> None:
    """A lower learning rate after a step that was not finite, for instance."""
    run(flags(tmp_path), tmp_path / "output", ("update", 14, "nan"), code=1)
    changes = ["--learning-rate", "1e-6", "--rewards", "accuracy=1.0", "--seed", "2", "--num-steps", "9"]
    output = run([*latest(tmp_path), *changes], tmp_path / "resumed")
    folder = only_run(tmp_path)
    (line,) = (folder / "changes.txt").read_text().splitlines()
    assert line in output.splitlines()
    assert line.startswith("changed after step 7: ")
    for name, before, now in (("learning_rate", 3e-4, 1e-6), ("seed", 1, 2), ("num_steps", 12, 9)):
        assert f"{name} from {before} to {now}" in line
        assert json.loads((folder / "config.json").read_text())[name] == now
    assert [row["train/learning_rate"] for row in read(folder)[7:]] == [3e-4, 1e-6, 1e-6]
    assert read(folder)[:8] == read(straight)[:8]


@pytest.mark.parametrize("text", ['{"task": "arith', "[]", '{"rewards": [], "no_such_setting": 1}', ""])
def test_what_is_no_run_folder_is_refused(text: str, finished: Path, tmp_path: Path, capsys: Capture) -> None:
    (finished / "config.json").write_text(text)
    for arguments in (["--resume", str(finished)], latest(tmp_path)):
        assert "is no run folder of grpo.py" in refusal(capsys, grpo.parse_config, arguments)
        (finished / "grpo.py").unlink(missing_ok=True)  # another script's


def test_the_newest_run_of_this_script_is_taken(finished: Path, tmp_path: Path) -> None:
    stem = finished.name.rsplit("__", 1)[0]
    newer = Path(shutil.copytree(finished, tmp_path / f"{stem.replace('__1', '__0')}__20990101-000000-000"))
    other = Path(shutil.copytree(finished, tmp_path / "grpo_x__arithmetic__tiny__1__20990201-000000-000"))
    (other / "grpo.py").rename(other / "grpo_x.py")
    config = grpo.parse_config([*latest(tmp_path), "--save-every", "5"])
    assert (config.resume, config.save_every, config.eval_every) == (str(newer), 5, 4)


def test_two_processes_in_one_run_folder(straight: Path, tmp_path: Path) -> None:
    first = start(flags(tmp_path), tmp_path / "first", ("rollout", 10, "wait"))
    while sum(len(path.read_bytes().splitlines()) for path in tmp_path.glob("*/metrics.jsonl")) < 6:
        assert first.is_alive(), (tmp_path / "first").read_text()
        time.sleep(0.01)
    before = snapshot(only_run(tmp_path))
    code = exit_code(start([*latest(tmp_path), "--save-every", "1"], tmp_path / "second"))
    first.kill()
    first.join()
    assert code == 2
    assert re.search(r"^error: another process.*\n\Z", (tmp_path / "second").read_text(), re.MULTILINE)
    assert snapshot(only_run(tmp_path)) == before
    run(latest(tmp_path), tmp_path / "resumed")  # what the dead process held is free
    same(only_run(tmp_path), straight)


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_struck_goes_on_to_the_bit(case: str, struck: dict[str, Any], straight: Path) -> None:
    folder, future = struck[case]
    output, left = future.result()
    (place, taken, act), _, saved = CASES[case]
    assert max(left, default=0) == saved, output
    same(only_run(folder), straight, lost=12 if taken == 24 else -1)  # in the last evaluation
    ends = {"error": "ZeroDivisionError: ", "memory": r"torch\.OutOfMemoryError: ", "nan": "FloatingPointError: "}
    assert ("Traceback" in output) == (act in ends)
    assert ("to continue: uv run grpo.py --resume" in output) == (act not in ("SIGKILL", "SIGINT SIGINT"))
    assert ("--micro-batch-size" in output) == (act == "memory")
    assert ("with a lower --learning-rate" in output) == (act == "nan")
    if act in ends:
        assert re.search(rf"^{ends[act]}.*\n\Z", output, re.MULTILINE)
    if act == "fill disk":
        (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert re.fullmatch(r"error: cannot .*No space left on device.*: make room on the disk .*", error)
        assert left == {"saving": [3, 4], "reward": [4, 6]}[place]
    if (place, act) == ("reward", "error"):
        assert re.search(r"test_resume.py\", line \d+, in graded", output)
