"""Several processes under `accelerate launch` (gloo, CPU) do what one does, and end together."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.test_run import only_run, read

ROOT = Path(__file__).resolve().parents[1]
# Several runs, one after another in the same processes. Five prompts do not divide evenly.
WORKER = """
import json, os, signal, subprocess, sys
import torch
import grpo, grpo_ablations, grpo_overfit

subprocess_run = subprocess.run
subprocess.run = lambda command, **how: None if "report.py" in str(command) else subprocess_run(command, **how)
rank = int(os.environ.get("RANK", 0))
assert int(os.environ.get("WORLD_SIZE", 1)) == int(sys.argv[2])
folder = sys.argv[1]
sizes = {"task": "simple_math", "prompts_per_step": 5, "num_generations": 4, "micro_batch_size": 3, "num_steps": 4,
         "temperature": 1.5, "eval_every": 2, "save_every": 0}
backward, step = torch.Tensor.backward, torch.optim.AdamW.step
gradients, fault, ends = [], [], {}

def remember(self, *given, **how):
    gradients.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
    return step(self, *given, **how)

def struck(loss, *given, **how):
    if fault == ["signal"] and len(gradients) == 2 and rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    if fault == ["raise", rank, len(gradients)]:
        raise ValueError("as a reward function may raise")
    backward(loss * torch.nan if fault == ["nan"] and len(gradients) == 2 and rank == 1 else loss, *given, **how)

def save(*given):
    if fault == ["full"]:
        raise OSError("No space left on device")
    return torch_save(*given)

torch_save, torch.save = torch.save, save
torch.optim.AdamW.step, torch.Tensor.backward = remember, struck
for name, changes, at_fault in (
    ("dr_grpo", {}, []), ("bnpo", {"loss_type": "bnpo", "num_iterations": 2, "beta": 0.04}, []),
    ("signal", {}, ["signal"]), ("signal", {"resume": "latest"}, []), ("nan", {}, ["nan"]),
    ("raise", {}, ["raise", 1, 2]), ("raise", {"resume": "latest"}, ["raise", 0, 1]),
    ("refused", {"max_completion_length": 10**6}, []), ("full", {"task": "mixed", "target_accuracy": 0.0}, ["full"]),
):
    if sys.argv[2] == "1" and name not in ("dr_grpo", "bnpo"):
        continue
    fault, code = at_fault, 0
    gradients.clear()
    script = {"bnpo": grpo_ablations, "full": grpo_overfit}.get(name, grpo)
    try:
        script.main(script.Config(**{**sizes, "run_dir": f"{folder}/{name}", **changes}))
    except SystemExit as error:
        code = error.code
    except Exception as error:
        code = type(error).__name__
    ends.setdefault(name, []).append(code)
    if rank == 0 and name in ("dr_grpo", "bnpo"):
        torch.save(gradients, f"{folder}/{name}.pt")
with open(f"{folder}/ends{rank}.json", "w") as file:
    json.dump(ends, file)
grpo.PartialState().destroy_process_group()
"""


def launch(processes: int, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable]
    if processes > 1:  # --multi_gpu is what starts torchrun; without a GPU the script itself takes the CPU and gloo
        flags = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
        flags += ["--dynamo_backend", "no", "--main_process_port", str(29500 + os.getpid() % 500)]
        command += ["-m", "accelerate.commands.launch", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, script, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment,
                          timeout=300)  # fmt: skip


def close(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """The same, but for the rounding of numbers."""
    near = {key: pytest.approx(v, rel=1e-3, abs=1e-4) if isinstance(v, float) else v for key, v in row.items()}
    return other == near


def completions(run: Path) -> list[dict[str, Any]]:
    """Each process logs its own part of an evaluation, greedy before sampled."""
    return sorted(read(run, "completions"), key=lambda row: (row["step"], row["split"], row.get("mode", "")))


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What the worker's runs left in one process, and in two."""
    folders = []
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp("processes")
        (folder / "worker.py").write_text(WORKER)
        done = launch(processes, str(folder / "worker.py"), str(folder), str(processes))
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("preset tiny") == (2 if processes == 1 else 9)
        folders.append(folder)
    return folders


@pytest.mark.parametrize("name", ["dr_grpo", "bnpo"])
def test_two_processes_do_what_one_does(name: str, one_and_two: list[Path]) -> None:
    """The same completions and metrics; the same gradients and weights to rounding."""
    one, two = (only_run(folder / name) for folder in one_and_two)
    assert [row["step"] for row in read(two)] == [0, 1, 2, 3, 4]
    assert all(close(row, other) for row, other in zip(read(one), read(two), strict=True))
    assert all(close(row, other) for row, other in zip(completions(one), completions(two), strict=True))
    ours, theirs = (torch.load(folder / f"{name}.pt", weights_only=True) for folder in one_and_two)
    assert len(ours) == len(theirs) == (4 if name == "dr_grpo" else 8)
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert a.norm() > 0
        assert (a - b).norm() < 1e-5 * a.norm()


ENDS: dict[str, list[Any]] = {  # exit codes and exceptions of process 0 and of process 1
    "signal": [[143, 0]] * 2, "nan": [["FloatingPointError"]] * 2, "refused": [[2]] * 2,
    "raise": [["OtherProcessFailedError", "ValueError"], ["ValueError", "OtherProcessFailedError"]],
    "full": [[1], ["OtherProcessFailedError"]],
}  # fmt: skip
KEPT = {"signal": [3, 4], "nan": [2], "raise": [2, 3], "full": []}  # steps of the checkpoints


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_one_process_ends_all(name: str, one_and_two: list[Path]) -> None:
    """The failed process lives on, as under NCCL, where the others would wait for it until they are killed."""
    folder = one_and_two[1]
    assert [json.loads((folder / f"ends{rank}.json").read_text())[name] for rank in (0, 1)] == ENDS[name]
    if name == "refused":
        assert os.listdir(folder / name) == []
    else:
        checkpoints = (only_run(folder / name) / "checkpoints").glob("*")
        assert sorted(path.name for path in checkpoints) == [f"step_{step:06d}" for step in KEPT[name]]


def test_after_a_signal_to_one_process_the_run_goes_on_to_the_bit(one_and_two: list[Path]) -> None:
    run, straight = (only_run(one_and_two[1] / name) for name in ("signal", "dr_grpo"))
    ours, theirs = (load_file(r / "checkpoints" / "step_000004" / "model.safetensors") for r in (run, straight))
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    assert read(run) == read(straight)
    assert read(run, "completions") == read(straight, "completions")
