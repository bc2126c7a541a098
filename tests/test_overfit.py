"""The overfitting scripts: what they train and evaluate on, how they end, memory."""

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import grpo
import grpo_overfit
import grpo_overfit_max_gpu
from tests import test_run
from tests.conftest import Capture, Patch, random_model, refusal, to_float64
from tests.test_run import only_run, read

pytestmark = pytest.mark.usefixtures("one_thread", "no_report")
SCRIPTS = [grpo_overfit, grpo_overfit_max_gpu]
SUBSET = "eval/train_subset_accuracy"
SMALL = test_run.SMALL | {"num_samples": 8, "eval_samples": 8, "num_epochs": 1}


def small(script: ModuleType, folder: Path, **changes: Any) -> Any:
    return script.Config(**(SMALL | {"run_dir": str(folder)} | changes))


def code(script: ModuleType, config: Any) -> int:
    """Exit code of a run."""
    try:
        script.main(config)
    except SystemExit as error:
        return int(error.code or 0)
    return 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_subset_is_fixed_and_apart_from_what_is_held_out(script: ModuleType) -> None:
    subset, held_out, _ = script.load_problems(script.Config(seed=1))
    assert (subset, held_out, []) == script.load_problems(script.Config(seed=2, num_generations=8))
    questions = {p["question"] for p in subset}
    assert len(questions) == 100
    assert 100 < len(held_out) <= 200
    assert not questions & {p["question"] for p in held_out}
    assert 30 < sum("coins" in question for question in questions) < 70  # sums and word problems alike
    assert script.load_problems(script.Config(num_samples=10))[0] == subset[:10]


def test_held_out_problems_of_a_file_are_those_of_the_main_script(gsm8k: Path) -> None:
    """So a model trained by one script was never trained on what the other evaluates."""
    settings: dict[str, Any] = {"task": "gsm8k", "dataset_path": str(gsm8k / "train.jsonl"), "eval_samples": 0}
    subset, held_out, _ = grpo_overfit.load_problems(grpo_overfit.Config(**settings))
    train, main_held_out, _ = grpo.load_problems(grpo.Config(**settings))
    assert (subset, held_out) == (train[:100], main_held_out)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_stops_where_the_target_is_reached(script: ModuleType, tmp_path: Path, capfd: Capture) -> None:
    sizes = {"num_samples": 6, "prompts_per_step": 6, "num_generations": 16, "num_epochs": 200, "eval_every": 5}
    config = small(script, tmp_path, **sizes)
    history = script.main(config)
    run = only_run(tmp_path)
    metrics, records = read(run), read(run, "completions")
    assert all(row.items() <= whole.items() for row, whole in zip(metrics, history, strict=True))
    evaluated = [m for m in metrics if SUBSET in m]
    assert [m[SUBSET] == 1 for m in evaluated] == [False] * (len(evaluated) - 1) + [True]
    last = metrics[-1]["step"]
    assert 0 < last < 200
    assert {r["split"] for r in records} == {"train", "eval", "train_subset"}
    overfitted = {r["question"] for r in records if r["split"] == "train_subset"}
    assert overfitted == {p["question"] for p in script.load_problems(config)[0]}
    assert len([r for r in records if r["split"] == "eval" and r["step"] == last]) == 2 * 8
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step_{last:06d}"]
    verdict, final = capfd.readouterr().out.splitlines()[-2:]
    assert verdict == "passed: 1.000 of the 6 problems are right"
    assert final.startswith("final: eval/accuracy=")
    assert script.main(dataclasses.replace(config, resume=str(run))) == history  # it says so again and takes no step
    assert capfd.readouterr().out.splitlines()[-2:] == [verdict, final]
    assert read(run) == metrics


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missed_target_has_its_own_exit_code(script: ModuleType, tmp_path: Path, capfd: Capture) -> None:
    """No reward is earned, so no step has a gradient. Nothing is lost."""
    assert code(script, small(script, tmp_path, rewards=("format",))) == 6
    run = only_run(tmp_path)
    output, errors = capfd.readouterr()
    assert output.splitlines()[-2] == f"failed: {read(run)[-1][SUBSET]:.3f} of the 8 problems are right"
    assert errors == "error: target 1.0 missed: try a lower --learning-rate\n"
    assert (run / "checkpoints" / "step_000002" / "model.safetensors").is_file()


@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_input_is_one_line(script: ModuleType, tmp_path: Path, capsys: Capture) -> None:
    messages: dict[tuple[str, Any], str] = {
        ("num_samples", 10**6): "set --num-samples between 1 and 10", ("num_samples", 0): "set --num-samples",
        ("target_accuracy", 1.5): "target_accuracy is 1.5: it must be at most 1",
        ("target_accuracy", float("nan")): "target_accuracy is nan", ("micro_batch_size", 0): "micro_batch_size is 0",
        ("task", "scheduling"): "unknown task 'scheduling'", ("micro_batch_size", -1): "micro_batch_size is -1",
    }  # fmt: skip
    for (name, value), message in messages.items():
        assert message in refusal(capsys, script.main, small(script, tmp_path / "runs", **{name: value}))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("family", ["Qwen2", "GPTNeoX", "OPT"])
def test_gradient_checkpointing_keeps_less_and_changes_no_gradient(family: str, tmp_path: Path) -> None:
    """Dropout is 0.5 in the models' configurations and must not wake; OPT's layers have it in code of their own."""
    dropout: dict[str, Any] = {
        "OPT": {"dropout": 0.5, "ffn_dim": 48, "word_embed_proj_dim": 32}, "Qwen2": {"attention_dropout": 0.5},
        "GPTNeoX": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    }  # fmt: skip
    random_model(family, num_hidden_layers=8, **dropout[family]).save_pretrained(tmp_path)
    ids = torch.randint(2, 96, (6, 32), generator=torch.Generator().manual_seed(0))
    mask, index = torch.arange(32) < torch.tensor([32, 3, 5, 1, 32, 7])[:, None], torch.arange(6) // 2
    gradients, kept = [], []
    for flag in (False, True):
        config = grpo_overfit.Config(model=str(tmp_path), gradient_checkpointing=flag)
        model = to_float64(grpo_overfit.load_policy(config, torch.device("cpu")))
        sizes: list[int] = []

        def keep(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        given: dict[str, Any] = {"prompt_index": index, "temperature": 0.7}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            values = grpo_overfit.completion_logprobs(model, [[3, 4, 5], [6, 7], [8]], ids, mask, **given)
        kept.append(sum(sizes))
        (values * torch.linspace(-1, 1, 6)[:, None]).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert 0 < kept[1] < 0.3 * kept[0]
    assert max(g.abs().max().item() for g in gradients[0]) > 0.1
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_a_run_with_gradient_checkpointing_is_the_same_run(tmp_path: Path) -> None:
    """It samples from the same policy after each update."""
    config = small(grpo_overfit, tmp_path / "a", max_grad_norm=0.0)
    assert code(grpo_overfit, config) == 6
    flags = {"gradient_checkpointing": True, "run_dir": str(tmp_path / "b")}
    assert code(grpo_overfit, dataclasses.replace(config, **flags)) == 6
    for one, other in zip(*(read(only_run(tmp_path / name))[1:] for name in "ab"), strict=True):
        assert one["train/reward"] == other["train/reward"]
        assert one["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=1e-4)


def limit_memory(room: int, monkeypatch: Patch) -> list[int]:
    """Scores as on a GPU in which only so many completions fit; the list tells how many were tried each time."""
    tried, real = list[int](), grpo_overfit_max_gpu.completion_logprobs

    def score(policy: Any, prompts: Any, ids: Any, mask: Any, **how: Any) -> Any:
        tried.append(len(ids))
        if len(ids) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(policy, prompts, ids, mask, **how)

    monkeypatch.setattr(grpo_overfit_max_gpu, "completion_logprobs", score)
    return tried


def unequal(completions: list[Any], **_: Any) -> list[float]:
    """A reward with which every completion has a gradient."""
    return [float(i) for i in range(len(completions))]


def test_what_does_not_fit_is_halved_and_remembered(tmp_path: Path, monkeypatch: Patch, capfd: Capture) -> None:
    script = grpo_overfit_max_gpu
    sizes: dict[str, Any] = {"prompts_per_step": 8, "num_epochs": 2, "rewards": (f"{__name__}:unequal",)}
    assert code(script, small(script, tmp_path / "a", **sizes)) == 6
    tried = limit_memory(5, monkeypatch)
    config = small(script, tmp_path / "b", **sizes)
    assert code(script, config) == 6
    assert [size for size in tried if size > 5] == [32, 16, 8]  # in the first step, and never again
    assert capfd.readouterr().out.count("from here on") == 3
    run = only_run(tmp_path / "b")
    assert '"perf/micro_batch_size": 4' in (run / "metrics.jsonl").read_text()
    for one, other in zip(read(only_run(tmp_path / "a"))[1:], read(run)[1:], strict=True):
        assert one["train/accuracy"] == other["train/accuracy"]
        assert one["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=1e-4)
    assert json.loads((run / "config.json").read_text())["micro_batch_size"] == "auto"
    tried.clear()  # a resumed run starts with it
    assert code(script, dataclasses.replace(config, resume=str(run), num_epochs=3)) == 6
    assert max(tried) == 4


def test_a_failed_backward_pass_leaves_nothing_behind(tmp_path: Path, monkeypatch: Patch) -> None:
    """Memory ends within the second backward pass, when some weights have their gradient."""
    script = grpo_overfit_max_gpu
    load, calls = script.load_policy, [0]

    def fail_once(grad: torch.Tensor) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def load_policy(config: Any, device: torch.device) -> Any:
        policy = load(config, device)
        if config.micro_batch_size == 8:
            policy.model.layers[1].mlp.down_proj.weight.register_hook(fail_once)
        return policy

    monkeypatch.setattr(script, "load_policy", load_policy)
    for size in (8, 4):
        code(script, small(script, tmp_path / str(size), num_generations=8, num_iterations=2, micro_batch_size=size))
    assert calls[0] > 10
    runs = [read(only_run(tmp_path / size)) for size in ("8", "4")]
    assert runs[0] == runs[1]
    assert "train/clip_ratio" in runs[0][-1]


def test_one_completion_that_does_not_fit_ends_the_run(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(grpo_overfit_max_gpu, "check_policy", lambda *_: None)
    limit_memory(0, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError, match="one completion does not fit: --gradient-checkpointing, "):
        grpo_overfit_max_gpu.main(small(grpo_overfit_max_gpu, tmp_path))
    assert "out of memory: take a lower --micro-batch-size" in capsys.readouterr().out


def test_gradient_flops_by_hand() -> None:
    """One layer, hidden 4, 2 heads of 2, feed-forward 6, 8 words: 64 + 72 weights and 12 of norms, and a head of 32."""
    sizes = {"hidden_size": 4, "intermediate_size": 6, "num_attention_heads": 2, "num_hidden_layers": 1}
    policy = random_model("Llama", vocab_size=8, num_key_value_heads=2, **sizes)
    body, head, pair = 4 * 16 + 3 * 24 + 3 * 4, 32, 2 * 4
    prompts, lengths, index = [[1, 2, 3], [4]], torch.tensor([2, 5]), torch.tensor([0, 0])
    expected = body * (3 + 1 + 4) + head * 7 + pair * (9 / 2 + 1 * 3.5 + 4 * 5)  # the second prompt has no row
    assert grpo_overfit_max_gpu.gradient_flops(policy, prompts, lengths, index) == 6 * expected
