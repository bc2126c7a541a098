"""Several processes under `accelerate launch` (gloo, CPU) do what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import grpo

ROOT = Path(__file__).resolve().parents[1]
WORKER = """
import dataclasses, sys, time
import torch
import grpo
from tests.conftest import to_float64

sizes = {"prompts_per_step": 5, "num_generations": 4, "micro_batch_size": 3}
config = grpo.Config(**sizes, max_grad_norm=0.0)
device = grpo.start_processes(config)
tokenizer = grpo.load_pretrained("AutoTokenizer", config)
learner = grpo.make_learner(config, grpo.load_rewards(config.rewards), tokenizer, device)
assert (torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1) == int(sys.argv[2])
learner.policy = to_float64(learner.policy)
learner.masters = list(learner.policy.parameters())
learner.optimizer = torch.optim.AdamW(learner.masters, lr=0.0)
train, held_out, _ = grpo.load_problems(config)
results = {}
for loss_type in ("dr_grpo", "bnpo"):
    learner.config = dataclasses.replace(config, loss_type=loss_type)
    metrics, records = grpo.train_step(learner, train, 3, 10)
    grads = [p.grad.clone() for p in learner.masters]
    results[loss_type] = {"grads": grads, "metrics": metrics, "records": records}
evaluated, rows = grpo.evaluate(learner, held_out[:7], "eval/accuracy")
if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
    torch.save(results | {"evaluated": evaluated, "rows": rows}, sys.argv[1])
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    time.sleep(0.5)  # as the scripts do
"""


def launch(processes: int, script: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable]
    if processes > 1:  # --multi_gpu is what starts torchrun; without a GPU the script itself takes the CPU and gloo
        flags = [
            "--multi_gpu",
            "--num_processes",
            str(processes),
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
        ]
        command += ["-m", "accelerate.commands.launch", *flags, "--main_process_port", str(29500 + os.getpid() % 500)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, script, *arguments], capture_output=True, text=True, cwd=cwd, env=environment)


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if not key.startswith(("time/", "perf/"))}


@pytest.mark.slow
def test_gradient_metrics_and_noise_do_not_depend_on_the_processes(tmp_path: Path) -> None:
    """Five prompts over two processes, unevenly, in float64."""
    (tmp_path / "worker.py").write_text(WORKER)
    results = []
    for processes in (1, 2):
        done = launch(processes, str(tmp_path / "worker.py"), str(tmp_path / str(processes)), str(processes))
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(torch.load(tmp_path / str(processes), weights_only=True))
    one, two = results
    for loss_type in ("dr_grpo", "bnpo"):
        a, b = one[loss_type], two[loss_type]
        assert [r["completion"] for r in a["records"]] == [r["completion"] for r in b["records"]]
        assert without_times(a["metrics"]) == pytest.approx(without_times(b["metrics"]), rel=1e-9, abs=1e-12)
        assert a["metrics"]["train/grad_norm"] > 0
        for ours, theirs in zip(a["grads"], b["grads"], strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-13)
    assert one["evaluated"] == pytest.approx(two["evaluated"])
    assert [(r["mode"], r["question"], r["completion"]) for r in one["rows"] if r["mode"] == "sampled"] == [
        (r["mode"], r["question"], r["completion"]) for r in two["rows"] if r["mode"] == "sampled"
    ]


@pytest.mark.slow
def test_a_whole_run_writes_once(tmp_path: Path) -> None:
    flags = ["--num-steps", "2", "--prompts-per-step", "4", "--num-generations", "4", "--eval-samples", "8"]
    lines = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        done = launch(processes, str(ROOT / "grpo.py"), "--preset", "tiny", "--run-dir", str(folder), *flags)
        assert done.returncode == 0, done.stderr[-3000:]
        (run,) = folder.iterdir()
        assert done.stdout.count("preset tiny") == 1
        lines.append([without_times(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()])
    assert [m["step"] for m in lines[1]] == [0, 1, 2]
    for one, two in zip(*lines, strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_a_run_that_fails_at_its_end_is_whole(tmp_path: Path) -> None:
    """The launcher ends all processes when one exits: none may do so before the first has written everything."""
    flags = ["--learning-rate", "0.0", "--prompts-per-step", "4", "--num-generations", "2", "--eval-samples", "8"]
    flags += ["--num-epochs", "1", "--num-samples", "8"]
    done = launch(2, str(ROOT / "grpo_overfit.py"), "--preset", "tiny", "--run-dir", str(tmp_path), *flags)
    assert done.returncode != 0
    assert "error: target 1.0 missed" in done.stderr
    (run,) = tmp_path.iterdir()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert (run / "checkpoints" / "step_000002" / "tokenizer.json").is_file()
    assert (run / "curve.png").is_file()


@pytest.mark.slow
def test_more_processes_than_prompts_are_refused_once(tmp_path: Path) -> None:
    flags = ["--prompts-per-step", "1", "--run-dir", str(tmp_path)]
    done = launch(2, str(ROOT / "grpo.py"), "--preset", "tiny", *flags)
    assert done.returncode != 0
    assert done.stderr.count("raise --prompts-per-step") == 1


def test_a_second_machine_has_the_run_folder_that_it_needs(tmp_path: Path) -> None:
    """The first one makes it; a process elsewhere may yet have a batch to write that failed there alone."""
    grpo.write_rows(tmp_path / "runs" / "run" / "failed_batch.jsonl", [{"a": 1}])
    assert (tmp_path / "runs" / "run" / "failed_batch.jsonl").read_text() == '{"a": 1}\n'


@pytest.mark.parametrize(
    "variable",
    [("ACCELERATE_USE_FSDP", "true"), ("ACCELERATE_USE_DEEPSPEED", "true"), ("ACCELERATE_MIXED_PRECISION", "bf16")],
)
def test_what_would_change_the_maths_is_refused(
    variable: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import grpo

    monkeypatch.setenv(*variable)
    with pytest.raises(SystemExit) as caught:
        grpo.start_processes(grpo.Config())
    assert caught.value.code == 2
    assert "launch without them" in capsys.readouterr().err
