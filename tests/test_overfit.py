"""The overfitting scripts: what they train and evaluate on, how they end, memory."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import grpo
import grpo_overfit
import grpo_overfit_max_gpu
from tests.conftest import random_model, to_float64

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [grpo_overfit, grpo_overfit_max_gpu]
SMALL: dict[str, Any] = {
    "num_samples": 8, "prompts_per_step": 4, "num_generations": 4, "eval_samples": 8, "num_epochs": 1, "eval_every": 0,
    "micro_batch_size": 16,
}  # fmt: skip


def small(script: ModuleType, folder: Path, **changes: Any) -> Any:
    return script.Config(**(SMALL | {"run_dir": str(folder)} | changes))


def read(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def only_run(folder: Path) -> Path:
    (run,) = folder.iterdir()
    return run


def code(script: ModuleType, config: Any) -> int:
    """Exit code of a run."""
    try:
        script.main(config)
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def cli(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / script), *flags], capture_output=True, text=True)


# What is trained on and evaluated


@pytest.mark.parametrize("script", SCRIPTS)
def test_subset_is_fixed_and_apart_from_what_is_held_out(script: ModuleType) -> None:
    subset, held_out = script.load_problems(script.Config(seed=1))
    assert (subset, held_out) == script.load_problems(script.Config(seed=2, num_generations=8))
    questions = {p["question"] for p in subset}
    assert len(questions) == 100
    assert 100 < len(held_out) <= 200
    assert not questions & {p["question"] for p in held_out}
    stories = sum("coins" in question for question in questions)
    assert 30 < stories < 70  # sums and word problems alike
    fewer, _ = script.load_problems(script.Config(num_samples=10))
    assert fewer == subset[:10]


def test_held_out_problems_of_a_file_are_those_of_the_main_script(gsm8k: Path) -> None:
    """So a model trained by one script was never trained on what the other evaluates."""
    path = str(gsm8k / "train.jsonl")
    subset, held_out = grpo_overfit.load_problems(grpo_overfit.Config(task="gsm8k", dataset_path=path, eval_samples=0))
    train, main_held_out, _ = grpo.load_problems(grpo.Config(task="gsm8k", dataset_path=path, eval_samples=0))
    assert (subset, held_out) == (train[:100], main_held_out)


def test_a_data_set_alone_says_that_the_task_is_gsm8k(tmp_path: Path) -> None:
    questions = [{"question": f"What is {a} + 11?", "answer": f"#### {a + 11}"} for a in range(10, 60)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    config = small(grpo_overfit, tmp_path / "runs", dataset_path=str(tmp_path / "train.jsonl"), target_accuracy=0.0)
    grpo_overfit.main(config)
    run = only_run(tmp_path / "runs")
    assert run.name.startswith("grpo_overfit__gsm8k__tiny_policy__1__")
    assert json.loads((run / "config.json").read_text())["task"] == "gsm8k"
    records = read(run, "completions.jsonl")
    assert {r["split"] for r in records} == {"eval/train_subset"}  # under 100 problems nothing is held out
    assert "eval/accuracy" not in read(run, "metrics.jsonl")[0]


# How a run ends


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_stops_where_the_target_is_reached(
    script: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes = {"num_samples": 6, "prompts_per_step": 6, "num_generations": 16, "micro_batch_size": 96}
    config = small(script, tmp_path, **sizes, num_epochs=200, eval_every=5, patience=0)
    results = script.main(config)
    run = only_run(tmp_path)
    metrics, records = read(run, "metrics.jsonl"), read(run, "completions.jsonl")
    evaluated = [m for m in metrics if "eval/train_subset_accuracy" in m]
    assert metrics[0]["eval/train_subset_accuracy"] < 1
    assert [m["eval/train_subset_accuracy"] == 1 for m in evaluated] == [False] * (len(evaluated) - 1) + [True]
    assert 0 < metrics[-1]["step"] < 200
    sampled = [r for r in records if r["split"] == "eval/train_subset" and r["mode"] == "sampled" and r["step"] == 0]
    assert metrics[0]["eval/reward"] == pytest.approx(sum(r["reward"] for r in sampled) / 6)  # the target's
    assert results["eval/train_subset_accuracy"] == 1
    assert results["eval/train_subset_accuracy_before"] == metrics[0]["eval/train_subset_accuracy"]
    assert results["eval/accuracy"] == metrics[-1]["eval/accuracy"]
    assert {r["split"]: sum(o["split"] == r["split"] for o in records) // len(evaluated) for r in records} == {
        "eval/train_subset": 2 * 6,
        "eval": 2 * 8,
        "train": 2 * 16 * metrics[-1]["step"] // len(evaluated),
    }
    output = capfd.readouterr().out
    assert output.splitlines()[-1] == "passed: 1.000 of the 6 problems are right"
    assert "6 training problems" in output
    assert "8 held-out problems" in output
    assert (run / "curve.png").stat().st_size > 10_000
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step_{metrics[-1]['step']:06d}"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missed_target_has_its_own_exit_code_and_loses_nothing(
    script: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert code(script, small(script, tmp_path, learning_rate=0.0)) == 6
    run = only_run(tmp_path)
    output, errors = capfd.readouterr()
    reached = read(run, "metrics.jsonl")[-1]["eval/train_subset_accuracy"]
    assert output.splitlines()[-1] == f"failed: {reached:.3f} of the 8 problems are right"
    assert errors == "error: target 1.0 missed: try more --num-generations or a lower --learning-rate\n"
    assert (run / "checkpoints" / "step_000002" / "model.safetensors").is_file()
    assert (run / "curve.png").is_file()


def test_a_target_reached_before_training_needs_none(tmp_path: Path) -> None:
    assert code(grpo_overfit, small(grpo_overfit, tmp_path, target_accuracy=0.1)) == 0
    assert [m["step"] for m in read(only_run(tmp_path), "metrics.jsonl")] == [0]


def test_a_solved_subset_is_a_success_also_with_abort_on_no_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every group all right: the evaluation that the lack of signal brings on finds the target reached."""
    monkeypatch.setattr(
        grpo_overfit.reward_module, "accuracy_reward", lambda completions, **_: [1.0] * len(completions)
    )
    evaluate, calls = grpo_overfit.evaluate, []

    def not_yet(learner: Any, problems: Any, key: str) -> Any:
        metrics, records = evaluate(learner, problems, key)
        calls.append(key)
        return (metrics if len(calls) > 2 else metrics | {key: 0.5}), records

    monkeypatch.setattr(grpo_overfit, "evaluate", not_yet)
    config = small(grpo_overfit, tmp_path, num_epochs=10, patience=2, abort_on_no_signal=True)
    assert code(grpo_overfit, config) == 0
    assert read(only_run(tmp_path), "metrics.jsonl")[-1]["step"] == 2
    assert "solved already" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 10**6}, "problems are not held out: set --num-samples between 1 and 10"),
        ({"num_samples": 0}, "set --num-samples between 1 and"),
        ({"target_accuracy": 1.5}, "target_accuracy is 1.5: set --target-accuracy to 1 or less"),
        ({"target_accuracy": float("nan")}, "target_accuracy is nan: set --target-accuracy"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0: set --micro-batch-size to 1 or more"),
        (
            {"dataset_path": "nowhere.jsonl"},
            "cannot read 'nowhere.jsonl' (No such file or directory): check --dataset-path",
        ),
        ({"task": "arithmetic"}, "unknown task 'arithmetic': --task takes one of mixed, gsm8k"),
    ],
)
def test_bad_input_is_one_line(
    script: ModuleType, changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code(script, small(script, tmp_path / "runs", **changes)) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_bad_input_on_the_command_line(tmp_path: Path) -> None:
    done = cli("grpo_overfit.py", "--preset", "tiny", "--run-dir", str(tmp_path / "runs"), "--num-samples", "1000000")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert cli("grpo_overfit_max_gpu.py", "--micro-batch-size", "some").returncode == 2


# Gradient checkpointing


def gradient(script: ModuleType, model: Any, tokenizer: Any, rows: int, length: int, **settings: Any) -> list[Any]:
    """The summed gradient of one step over completions of this length, whose advantages are given."""
    policy = model.eval()
    device = torch.device("cpu")
    config = script.Config(learning_rate=0.0, max_grad_norm=0.0, num_generations=rows, **settings)
    with mock.patch.object(script, "load_policy", return_value=policy):
        learner = script.make_learner(config, {}, tokenizer, device)
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(2, policy.config.vocab_size, (rows, length), generator=source)
    batch = script.Rollout(ids, torch.ones(rows, length, dtype=torch.bool), torch.zeros(rows, length), torch.ones(1))
    advantages = torch.linspace(-1, 1, rows, dtype=learner.masters[0].dtype)
    script.update(learner, [[3, 4, 5]], batch, advantages, batch.completion_mask)
    assert all(p.grad is None for p in policy.parameters() if p.dtype == torch.bfloat16)
    return [master.grad for master in learner.masters]


@pytest.mark.parametrize("family", ["Qwen2", "GPTNeoX", "OPT"])
def test_gradient_checkpointing_changes_no_gradient(family: str, tokenizer: Any) -> None:
    """Dropout is 0.5 in the models' configurations and must not wake in the layers' train mode; OPT's layers have it in
    code of their own."""
    dropout: dict[str, Any] = {
        "OPT": {"dropout": 0.5, "ffn_dim": 48, "word_embed_proj_dim": 32},
        "GPTNeoX": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
        "Qwen2": {"attention_dropout": 0.5},
    }
    plain, checkpointed = (
        gradient(grpo_overfit, random_model(family, **dropout[family]).double(), tokenizer, 6, 9, **flags)
        for flags in ({}, {"gradient_checkpointing": True})
    )
    assert max(g.abs().max().item() for g in plain) > 1e-4
    for one, other in zip(plain, checkpointed, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-13)


def test_the_policy_samples_without_checkpointing_after_an_update(tokenizer: Any) -> None:
    model = random_model("Qwen2")
    gradient(grpo_overfit, model, tokenizer, 6, 9, gradient_checkpointing=True)
    assert not any(module.training for module in model.modules())


MEASURE = r"""
import os, re
from transformers import AutoTokenizer
import grpo_overfit
from tests.conftest import random_model, to_float64
from tests.test_overfit import gradient

def peak() -> int:  # of this program alone, unlike getrusage's, which a child inherits
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])

model = random_model("Qwen2", hidden_size=256, intermediate_size=1024, num_hidden_layers=8)
tokenizer = AutoTokenizer.from_pretrained("tiny_policy")
for flag in (False, True):
    if not os.fork():  # each in a process of its own
        before = peak()
        gradient(grpo_overfit, model, tokenizer, 32, 64, gradient_checkpointing=flag)
        print(peak() - before, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_gradient_checkpointing_needs_less_memory() -> None:
    """By how much the peak of resident memory grows over an update of 2,048 tokens."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # its threads do not outlive a fork
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    kept, checkpointed = map(int, done.stdout.split())
    assert 0 < checkpointed < 0.6 * kept


# The GPU's memory


class Memory:
    """A policy's scoring on a GPU in which only so many completions fit."""

    def __init__(self, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room, self.tried = room, list[int]()
        self.score = grpo_overfit_max_gpu.completion_logprobs
        monkeypatch.setattr(grpo_overfit_max_gpu, "completion_logprobs", self)

    def __call__(self, policy: Any, prompts: Any, ids: Any, mask: Any, **how: Any) -> Any:
        self.tried.append(len(ids))
        if len(ids) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.score(policy, prompts, ids, mask, **how)


def test_a_micro_batch_that_does_not_fit_is_halved_and_the_gradient_is_the_same(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"prompts_per_step": 1, "num_iterations": 2, "micro_batch_size": "auto"}
    script = grpo_overfit_max_gpu
    whole = gradient(script, to_float64(random_model("Qwen2")), tokenizer, 12, 9, **settings)
    memory = Memory(4, monkeypatch)
    halved = gradient(script, to_float64(random_model("Qwen2")), tokenizer, 12, 9, **settings)
    assert memory.tried == [12, 6] + 2 * [3, 3, 3, 3]  # halved twice, and remembered by the second update
    for one, other in zip(whole, halved, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-13)
    assert capsys.readouterr().out.splitlines()[-1].endswith("--micro-batch-size 3 from here on")


def test_the_micro_batch_in_force_outlives_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script = grpo_overfit_max_gpu
    sizes: dict[str, Any] = {
        "num_samples": 8,
        "prompts_per_step": 8,
        "num_generations": 8,
        "num_epochs": 3,
        "micro_batch_size": "auto",
    }
    sizes |= {"learning_rate": 1e-5}
    assert code(script, small(script, tmp_path / "a", **sizes)) == 6
    memory = Memory(9, monkeypatch)
    assert code(script, small(script, tmp_path / "b", **sizes)) == 6
    assert [size for size in memory.tried if size > 9] == [64, 32, 16]  # in the preflight, and never again
    assert capfd.readouterr().out.count("from here on") == 3
    runs = [read(only_run(tmp_path / name), "metrics.jsonl") for name in "ab"]
    for one, other in zip(*runs, strict=True):
        assert one.get("train/reward") == other.get("train/reward")
        assert one.get("train/grad_norm", 0) == pytest.approx(other.get("train/grad_norm", 0), rel=1e-4)


def test_a_failed_backward_pass_leaves_nothing_behind(tokenizer: Any) -> None:
    """In bf16, as on a GPU: memory ends in the middle of a backward pass, when some weights have their gradient."""
    script = grpo_overfit_max_gpu
    update, metrics, gradients = script.update, [], []
    failures: list[torch.Tensor] = []

    def fail_once(grad: torch.Tensor) -> None:
        if not failures:
            failures.append(grad)
            raise torch.OutOfMemoryError("CUDA out of memory")

    def keep(*given: Any) -> None:
        metrics.append(update(*given))

    with mock.patch.object(script, "update", keep):
        for size, hook in (("auto", fail_once), (4, lambda grad: None)):
            model = random_model("Qwen2", num_hidden_layers=3).bfloat16()
            model.model.layers[1].mlp.down_proj.weight.register_hook(hook)
            settings = {"prompts_per_step": 1, "num_iterations": 2, "micro_batch_size": size}
            gradients.append(gradient(script, model, tokenizer, 8, 9, **settings))
    assert len(failures) == 1
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
    time_apart = {"time/update_s": 0}
    assert metrics[0] | time_apart == metrics[1] | time_apart  # nothing is counted twice
    assert "train/clip_ratio" in metrics[0]


def test_one_completion_that_does_not_fit_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Memory(0, monkeypatch)
    assert code(grpo_overfit_max_gpu, small(grpo_overfit_max_gpu, tmp_path, micro_batch_size="auto")) == 8
    assert capsys.readouterr().err == (
        "error: one completion does not fit: --gradient-checkpointing or a lower --max-completion-length\n"
    )


def test_the_first_guess_follows_memory_and_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2-0.5B's shape on 80 GB: what its full completions need, measured, is most of the memory and not more."""
    script = grpo_overfit_max_gpu
    shape = {"num_hidden_layers": 24, "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14}
    policy: Any = SimpleNamespace(device=torch.device("cuda"), num_parameters=lambda: 494_032_768)
    policy.config = SimpleNamespace(**shape, num_key_value_heads=2)
    for name, value in {
        "mem_get_info": (70 * 10**9, 85 * 10**9),
        "memory_reserved": 9 * 10**9,
        "memory_allocated": 2 * 10**9,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    config = script.PRESETS["qwen"]
    guess = script.guess_micro_batch_size(config, policy)
    measured = 59_200  # bytes a token and layer in bf16
    assert 52e9 < guess * (1024 + 512 / 16) * 24 * measured < 62e9
    shorter = dataclasses.replace(config, max_completion_length=512)
    assert script.guess_micro_batch_size(shorter, policy) == pytest.approx(2.0 * guess, rel=0.1)
    checkpointed = dataclasses.replace(config, gradient_checkpointing=True)
    assert script.guess_micro_batch_size(checkpointed, policy) > 10 * guess
    assert script.guess_micro_batch_size(dataclasses.replace(config, micro_batch_size=5), policy) == 5
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 85 * 10**9))
    assert script.guess_micro_batch_size(config, policy) == 1
    policy.config = SimpleNamespace(num_hidden_layers=2, hidden_size=64, num_attention_heads=4)  # GPT-2 names no other
    assert script.guess_micro_batch_size(config, policy) >= 1
    policy.device = torch.device("cpu")
    assert script.guess_micro_batch_size(config, policy) == 64 * 16


# FLOPs


def test_gradient_flops_by_hand() -> None:
    """One layer, hidden 4, 2 heads of 2, feed-forward 6, 8 words: 64 + 72 weights and 12 of norms, and a head of 32."""
    sizes = {"hidden_size": 4, "intermediate_size": 6, "num_attention_heads": 2, "num_hidden_layers": 1}
    policy = random_model("Llama", vocab_size=8, num_key_value_heads=2, **sizes)
    body, head, pair = 4 * 16 + 3 * 24 + 3 * 4, 32, 2 * 4
    prompts, lengths, index = [[1, 2, 3], [4]], torch.tensor([2, 5]), torch.tensor([0, 0])
    expected = body * (3 + 1 + 4) + head * 7 + pair * (9 / 2 + 1 * 3.5 + 4 * 5)  # the second prompt has no row
    assert grpo_overfit_max_gpu.gradient_flops(policy, prompts, lengths, index) == 6 * expected


def test_gradient_flops_are_about_those_of_the_update() -> None:
    """Against a count of the products that torch does; these include padding in attention and the logits twice."""
    from torch.utils.flop_counter import FlopCounterMode

    policy = random_model("Qwen2", hidden_size=64, intermediate_size=256, num_hidden_layers=4)
    ids, prompts = torch.randint(2, 96, (6, 24), generator=torch.Generator().manual_seed(0)), [[3] * 16, [4] * 16]
    index = torch.tensor([0, 0, 0, 1, 1, 1])
    with FlopCounterMode(display=False) as counter:
        logprobs = grpo_overfit_max_gpu.completion_logprobs(
            policy, prompts, ids, torch.ones_like(ids).bool(), prompt_index=index, temperature=1.0
        )
        logprobs.sum().backward()
    counted = grpo_overfit_max_gpu.gradient_flops(policy, prompts, torch.full((6,), 24), index)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_without_a_gpu_the_max_script_says_what_is_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    config = small(grpo_overfit_max_gpu, tmp_path, micro_batch_size="auto")
    assert code(grpo_overfit_max_gpu, config) == 6
    assert "micro-batches of 16 completions; no GPU, so gpu/* and perf/mfu are left out" in capfd.readouterr().out
    keys = {key for m in read(only_run(tmp_path), "metrics.jsonl") for key in m}
    assert not keys & {"gpu/utilization", "gpu/memory_gb", "perf/mfu"}
    assert json.loads((only_run(tmp_path) / "config.json").read_text())["micro_batch_size"] == "auto"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_hardware_is_measured(tmp_path: Path) -> None:
    code(grpo_overfit_max_gpu, small(grpo_overfit_max_gpu, tmp_path, micro_batch_size="auto"))
    for step in read(only_run(tmp_path), "metrics.jsonl")[1:]:
        assert 0 <= step["gpu/utilization"] <= 100
        assert step["gpu/memory_gb"] > 0
        assert 0 <= step.get("perf/mfu", 0) < 1


# Whole runs


@pytest.mark.slow
def test_the_tiny_preset_overfits_its_problems(tmp_path: Path) -> None:
    """Thirty of them; README has the hundred of the default, with three seeds."""
    sizes = ["--num-samples", "30", "--prompts-per-step", "30", "--eval-samples", "32"]
    done = cli("grpo_overfit.py", "--preset", "tiny", "--run-dir", str(tmp_path), *sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = read(only_run(tmp_path), "metrics.jsonl")
    assert metrics[0]["eval/train_subset_accuracy"] < 0.7
    assert metrics[-1]["eval/train_subset_accuracy"] == 1.0


@pytest.mark.slow
def test_qwens_shape_on_gsm8k(tmp_path: Path, gsm8k: Path, qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real tokenizer, template and problems: two steps."""
    monkeypatch.setattr(grpo_overfit_max_gpu, "save_checkpoint", lambda learner: None)  # 2 GB
    problems = (gsm8k / "train.jsonl").read_text().splitlines(keepends=True)[:300]
    (tmp_path / "train.jsonl").write_text("".join(problems))
    config = dataclasses.replace(
        grpo_overfit_max_gpu.PRESETS["qwen"], model=str(qwen), dataset_path=str(tmp_path / "train.jsonl"),
        num_samples=4, prompts_per_step=2, num_epochs=1, num_generations=2, max_completion_length=8, eval_samples=2,
        run_dir=str(tmp_path / "runs"),
    )  # fmt: skip
    assert code(grpo_overfit_max_gpu, config) == 6  # random weights
    metrics = read(only_run(tmp_path / "runs"), "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2]
    assert 11.0 < metrics[-1]["train/entropy"] < 11.93  # near ln 151,936 = 11.93
    assert os.path.getsize(only_run(tmp_path / "runs") / "curve.png") > 10_000
