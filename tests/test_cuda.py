"""Every script whole on a pretended CUDA device, and what that device refuses; tests/cuda.py says what it can tell."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import grpo
import grpo_ablations
import grpo_ladder
import grpo_overfit
import grpo_overfit_max_gpu
import grpo_reasoning
import grpo_scheduler
from tests import test_run
from tests.conftest import Patch, random_model
from tests.cuda import REAL, Graph, any_cuda, pretended_cuda
from tests.test_overfit import SCRIPTS, code
from tests.test_run import only_run, read

pytestmark = pytest.mark.usefixtures("one_thread", "no_report")
SMALL = test_run.SMALL | {"num_steps": 4, "eval_samples": 8, "save_every": 2, "warmup_steps": 2}


def start(script: ModuleType, config: Any) -> None:
    """A whole run. The overfitting scripts miss their target, which is code 6."""
    with any_cuda():
        assert code(script, config) == (6 if script in SCRIPTS else 0)


def started(script: ModuleType, folder: Path, **changes: Any) -> tuple[Any, Path]:
    """Settings and folder of a short run: it is finished, evaluated before and after, learnt and used its graphs."""
    config = script.Config(**(SMALL | {"run_dir": str(folder)} | changes))
    start(script, config)
    assert REAL or sum(graph.replays for graph in Graph.captured) > 2 * len(Graph.captured) > 0
    run = only_run(folder)
    assert '"device": "NVIDIA' in (run / "environment.json").read_text()
    rows = read(run)
    assert [row["step"] for row in rows] == list(range(config.num_steps + 1))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert any(row["train/grad_norm"] > 0 for row in rows[1:])
    assert max(row["train/logprob_gap_mean"] for row in rows[1:]) < 0.005
    assert all(any(key.endswith("_sampled") for key in row) for row in (rows[0], rows[-1]))
    weights = saved(run)  # other programs find ordinary bf16 weights on the CPU
    before = transformers.AutoModelForCausalLM.from_pretrained(Path(grpo.__file__).parent / config.model)
    assert all(weight.dtype == torch.bfloat16 and weight.device.type == "cpu" for weight in weights)
    assert any((old.bfloat16() != new).any() for old, new in zip(before.parameters(), weights, strict=True))
    return config, run


def saved(run: Path) -> list[Tensor]:
    folder = max((run / "checkpoints").glob("step_*"))
    return list(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").parameters())


def resumed(script: ModuleType, config: Any, run: Path) -> Path:
    """A copy of the run that goes on from the checkpoint before the last."""
    folder = Path(shutil.copytree(run, run.with_name("copy")))
    shutil.rmtree(max((folder / "checkpoints").glob("step_*")))
    start(script, dataclasses.replace(config, resume=str(folder)))
    return folder


def test_grpo_resumes_as_if_it_had_not_ended(tmp_path: Path) -> None:
    config, run = started(grpo, tmp_path, mask_truncated_completions=True, num_iterations=2, eval_every=2)
    again = resumed(grpo, config, run)
    for name in ("metrics", "completions"):
        assert read(again, name) == read(run, name)
    assert all(map(torch.equal, saved(again), saved(run)))


def test_micro_batches_are_halved_and_the_hardware_is_measured(tmp_path: Path, monkeypatch: Patch) -> None:
    """No more than four of the update's rows fit; what fitted is kept, and the resumed run starts with it."""
    score = grpo_overfit_max_gpu.completion_logprobs

    def hungry(policy: Any, prompts: Any, ids: Tensor, *given: Any, **how: Any) -> Tensor:
        if len(ids) > 4:
            torch.empty(2**40, dtype=torch.uint8, device="cuda")
        return score(policy, prompts, ids, *given, **how)

    monkeypatch.setattr(grpo_overfit_max_gpu, "completion_logprobs", hungry)
    config, run = started(grpo_overfit_max_gpu, tmp_path, num_samples=20, num_steps=3, save_every=1)
    for folder in (run, resumed(grpo_overfit_max_gpu, config, run)):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for row in rows[1:]:
            assert row["perf/micro_batch_size"] in (3, 4)
            assert 0 < row["perf/mfu"] < 1
            assert 0 <= row["gpu/utilization"] <= 100
            assert row["gpu/memory_gb"] > 0


@pytest.mark.parametrize(("script", "changes"), [
    (grpo_ablations, {"loss_type": "bnpo", "scale_rewards": True, "beta": 0.1, "num_iterations": 2}),
    (grpo_ladder, {"task": "counting"}), (grpo_scheduler, {}),
    (grpo_overfit, {"num_samples": 20, "gradient_checkpointing": True}),
    (grpo_reasoning, {"max_completion_length": 24, "num_generations": 16}),
])  # fmt: skip
def test_the_other_scripts_run_whole(tmp_path: Path, script: ModuleType, changes: dict[str, Any]) -> None:
    started(script, tmp_path, **({"num_steps": 2} | changes))


def test_rewards_rise_in_bf16(tmp_path: Path) -> None:
    """From a half to nearly all, as they do on a CPU."""
    sizes: dict[str, Any] = {"num_steps": 15, "prompts_per_step": 12, "num_generations": 16}
    _, run = started(grpo, tmp_path, task="simple_math", lr_schedule="constant", **sizes)
    rewards = [row["train/reward"] for row in read(run)[1:]]
    assert sum(rewards[:3]) / 3 < 1.6
    assert sum(rewards[-3:]) / 3 > 1.8


@pytest.mark.skipif(REAL, reason="where CUDA is, grpo.py does not run on a CPU")
@pytest.mark.parametrize("kind", ["captured", "not captured", "sliding window"])
def test_the_same_tokens_as_on_a_cpu(tmp_path: Path, monkeypatch: Patch, kind: str) -> None:
    """In float32 and before training, greedy and sampled; two kinds of policy cannot be captured."""

    def load_policy(config: Any, device: Any) -> Any:
        if kind == "sliding window":
            return random_model("Mistral", vocab_size=515, sliding_window=8, initializer_range=0.2).to(device)
        policy: Any = transformers.AutoModelForCausalLM.from_pretrained(Path(grpo.__file__).parent / config.model)
        policy._can_compile_fullgraph = kind == "captured"
        return policy.to(device).eval()

    monkeypatch.setattr(grpo, "load_policy", load_policy)
    configs = [grpo.Config(**(SMALL | {"num_steps": 1, "run_dir": str(tmp_path / name)})) for name in ("cpu", "cuda")]
    grpo.main(configs[0])
    start(grpo, configs[1])
    assert bool(Graph.captured) == (kind == "captured")
    expected, found = (read(only_run(Path(config.run_dir)), "completions") for config in configs)
    assert len(found) == len(expected) == 2 * 2 * 8 + 8
    for one, other in zip(expected, found, strict=True):
        if one["step"] == 0:
            assert {**other, "entropy": 0} == {**one, "entropy": 0}
            assert other["entropy"] == pytest.approx(one["entropy"], rel=1e-3)


def cuda(*values: float) -> Tensor:
    return torch.tensor(values, device="cuda")


MIXED: dict[str, Callable[[], Any]] = {
    "noise that was not moved": lambda: torch.rand(3, 5)[cuda(0, 2), 2],
    "a missing .cpu()": lambda: torch.ones(2) < cuda(1, 2),
    "zeros without a device": lambda: torch.cat([cuda(1), torch.zeros(2)]),
    "a total without a device": lambda: torch.tensor(0.0).add_(cuda(1).sum()),
    "values without a device": lambda: cuda(1).index_put_((cuda(0),), torch.arange(1)),
}


@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_two_devices_do_not_meet(name: str) -> None:
    with pretended_cuda(), pytest.raises(RuntimeError, match="on the same device"):
        MIXED[name]()


def test_what_cuda_allows() -> None:
    x = torch.arange(6.0).view(2, 3)
    with pretended_cuda():
        y = x.to("cuda:0")
        assert (y.device, y.is_cuda, x.device) == (torch.device("cuda:0"), True, torch.device("cpu"))
        assert y.cuda() is y.to("cuda")
        assert (y * torch.tensor(2.0) + 1).tolist() == [[1, 3, 5], [7, 9, 11]]
        assert y[torch.tensor([1])].tolist() == [[3, 4, 5]]
        y[:, 0] = 7
        assert y.cpu().equal(torch.tensor([[7.0, 1, 2], [7, 4, 5]]))
        x.copy_(y)
        assert (x[0, 0].item(), y[y > 4].sum().item()) == (7, 19)
        with pytest.raises(TypeError, match="numpy"):
            y.numpy()
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**40, device="cuda")
        model = random_model("Qwen2", tie_word_embeddings=True).cuda()
        assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(RuntimeError, match="outside"):
        y + 1


def test_a_graph_repeats_its_operators_in_the_same_memory() -> None:
    with pretended_cuda():
        x, count = cuda(1.0, 2), torch.zeros(1, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            count.add_(1)
            double = x * 2
        assert (count.item(), double.isnan().all().item()) == (0, True)  # a capture runs nothing
        for value in (5.0, 7.0):
            x.fill_(value)
            graph.replay()
            assert double.tolist() == [2 * value] * 2
        x = cuda(0, 0)  # other memory, which the graph does not read
        graph.replay()
        assert (count.item(), double.tolist()) == (3, [14, 14])


UNCAPTURABLE: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0].item(), "unique": lambda x: x.unique(dim=0), "to the CPU": lambda x: x.cpu(),
    "mask": lambda x: x[x > 0], "mask, written": lambda x: x.index_put_((x > 0,), x[0]),
    "from the CPU": lambda x: torch.tensor([1.0], device="cuda"), "synchronize": lambda x: torch.cuda.synchronize(),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCAPTURABLE)
def test_what_waits_for_the_gpu_is_not_captured(name: str, monkeypatch: Patch) -> None:
    """Nor is it in the policy's step, where it is allowed as long as that is not captured."""
    policy, step = random_model("Qwen2"), grpo.hidden_states

    def hidden_states(*given: Any) -> Tensor:
        UNCAPTURABLE[name](torch.ones(2, device="cuda"))
        return step(*given)

    monkeypatch.setattr(grpo, "hidden_states", hidden_states)
    given: dict[str, Any] = {"num_generations": 2, "max_completion_length": 3, "temperature": 1.0, "eos_ids": []}
    with pretended_cuda():
        policy.cuda()._can_compile_fullgraph = False
        grpo.rollout(policy, [[3, 4]], noise=torch.rand(2, 3), **given)
        policy._can_compile_fullgraph = True
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            grpo.rollout(policy, [[3, 4]], noise=torch.rand(2, 3), **given)
