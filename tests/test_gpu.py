"""What the owner of a GPU runs to see that all of the GPU path is right: `uv run pytest -m gpu`, in five minutes.

Without CUDA the same tests run on the pretended device of tests/cuda.py, apart from those of memory. That is no run on
a GPU: it shows neither speed nor memory, nor what CUDA's kernels compute.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo
import grpo_overfit_max_gpu
from tests.conftest import random_model
from tests.cuda import pretended_cuda
from tests.test_run import only_run, read

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("device", "no_report")]
REAL = torch.cuda.is_available()
ROOT = Path(__file__).resolve().parents[1]
GROUPS, LENGTH, TEMPERATURE = 16, 12, 1.0
GIB = 2**30


@pytest.fixture
def device() -> Iterator[None]:
    """The GPU, or else a pretended one."""
    with contextlib.nullcontext() if REAL else pretended_cuda():
        yield


def tiny(dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    policy: Any = AutoModelForCausalLM.from_pretrained(ROOT / "tiny_policy", dtype=dtype).eval()
    return policy.cuda()


def step_of(tokenizer: Any, prompts: int = 32) -> tuple[list[list[int]], Tensor]:
    config = grpo.Config(prompts_per_step=prompts)
    problems = grpo.problems_of_step(grpo.load_problems(config)[0], 1, config)
    noise = grpo.uniform_noise(1, "test", 0, prompts * GROUPS, LENGTH)
    return grpo.tokenize_prompts(tokenizer, problems, config), noise


def sample(policy: Any, prompts: list[list[int]], noise: Tensor | None, **changes: Any) -> grpo.Rollout:
    settings: dict[str, Any] = {"num_generations": GROUPS, "max_completion_length": LENGTH, "eos_ids": [512]}
    return grpo.rollout(policy, prompts, noise=noise, **(settings | {"temperature": TEMPERATURE} | changes))


def score(policy: Any, prompts: list[list[int]], batch: grpo.Rollout) -> Tensor:
    index = torch.arange(len(batch.completion_ids), device="cuda") // GROUPS
    tokens = batch.completion_ids, batch.completion_mask
    return grpo.completion_logprobs(policy, prompts, *tokens, prompt_index=index, temperature=TEMPERATURE)


@pytest.mark.parametrize("family", ["Qwen2", "Llama", "GPTNeoX", "Mistral"])
def test_captured_steps_equal_eager_ones(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where rounding changes no token; Mistral has a sliding window, which is not captured."""
    changes = {"sliding_window": 8} if family == "Mistral" else {}
    policy, captured, graph = random_model(family, **changes).double().cuda(), [0], torch.cuda.graph

    def counted(*given: Any, **how: Any) -> Any:
        captured[0] += 1
        return graph(*given, **how)

    monkeypatch.setattr(torch.cuda, "graph", counted)
    prompts = [list(range(3, 3 + n)) for n in (5, 19, 7, 1)]
    # Rows that end soon, late, never; greedy ones; a single token.
    for eos_ids, length, greedy in (([1, 2, 3, 4], 70, False), ([1], 40, False), ([], 24, True), ([1], 1, False)):
        noise = None if greedy else grpo.uniform_noise(1, "test", length, 4 * GROUPS, length)
        settings: dict[str, Any] = {"eos_ids": eos_ids, "max_completion_length": length, "temperature": 0.8}
        captured[0] = 0
        policy._can_compile_fullgraph = True
        fast = sample(policy, prompts, noise, **settings)
        assert length == 1 or (captured[0] > 0) == (family != "Mistral")
        assert captured[0] <= 7  # 64 rows, each time at most half of them
        captured[0] = 0
        policy._can_compile_fullgraph = False
        slow = sample(policy, prompts, noise, **settings)
        assert captured[0] == 0
        on_cpu = sample(policy.cpu(), prompts, noise, **settings)
        policy.cuda()
        for other in (slow, on_cpu):
            assert torch.equal(fast.completion_ids.cpu(), other.completion_ids.cpu())
            assert torch.equal(fast.completion_mask.cpu(), other.completion_mask.cpu())
            assert (fast.logprobs.cpu() - other.logprobs.cpu()).abs().max() < 1e-5
            assert (fast.entropy.cpu() - other.entropy.cpu()).abs().max() < 1e-5


def test_bf16_scores_agree_with_the_samplers(tokenizer: Any) -> None:
    policy, (prompts, noise) = tiny(torch.bfloat16), step_of(tokenizer, 64)
    batch = sample(policy, prompts, noise)
    with torch.no_grad():
        gap = (score(policy, prompts, batch) - batch.logprobs)[batch.completion_mask].abs()
    assert batch.logprobs.dtype == torch.float32
    assert gap.mean() < 0.005
    assert gap.max() < 0.5


def gradient(policy: Any, prompts: list[list[int]], batch: grpo.Rollout, parts: int) -> Tensor:
    """As the optimizer would see it, of log-probs with the same random weights each time."""
    masters, size = grpo.make_masters(policy), len(batch.completion_ids)
    weights = torch.randn(size, generator=torch.Generator().manual_seed(1)).cuda()
    for rows in torch.arange(size, device="cuda").chunk(parts):
        given: dict[str, Any] = {"prompt_index": rows // GROUPS, "temperature": TEMPERATURE}
        tokens = batch.completion_ids[rows], batch.completion_mask[rows]
        logprobs = grpo.completion_logprobs(policy, prompts, *tokens, **given)
        (logprobs.sum(-1) * weights[rows]).sum().backward()
    return torch.cat([master.grad.flatten() for master in masters])


def test_gradients_of_bf16_point_where_those_of_float32_do(tokenizer: Any) -> None:
    prompts, noise = step_of(tokenizer)
    batch = sample(tiny(torch.bfloat16), prompts, noise)
    expected = gradient(tiny(torch.float32), prompts, batch, 1)
    assert expected.norm() > 0
    for parts in (1, 8):
        found = gradient(tiny(torch.bfloat16), prompts, batch, parts)
        assert found.dtype == torch.float32
        assert torch.cosine_similarity(found, expected, dim=0) > 0.99
        assert (found.norm() / expected.norm()).item() == pytest.approx(1, abs=0.05)


@pytest.mark.skipif(not REAL, reason="a pretended device cannot tell memory")
def test_logits_are_never_held_for_all_tokens() -> None:
    """256 x 128 tokens of 151,936 logits would be 20 GB in float32; chunks and the weights' gradients are a few."""
    policy = random_model("Qwen2", vocab_size=151_936).bfloat16().cuda()
    ids = torch.randint(2, 151_936, (256, 128), device="cuda")
    mask, index = torch.ones_like(ids).bool(), torch.arange(256, device="cuda") // 16
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    prompts = [[2 + i, 3, 4] for i in range(16)]
    logprobs = grpo.completion_logprobs(policy, prompts, ids, mask, prompt_index=index, temperature=1.0)
    assert torch.cuda.memory_allocated() - before < GIB  # kept for the backward pass
    logprobs.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 6 * GIB
    assert logprobs.isfinite().all()


def test_what_runs_out_of_memory_goes_on_in_smaller_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the update that do not fit on the card, from the third step on."""
    sizes: dict[str, Any] = {"num_steps": 4, "prompts_per_step": 16, "eval_samples": 64, "micro_batch_size": 64}
    config = grpo.Config(**sizes, save_every=0, warmup_steps=2, run_dir=str(tmp_path))
    steps, loss, score = [0], grpo.group_advantages, grpo.completion_logprobs

    def counted(*given: Any) -> Tensor:
        steps[0] += 1
        return loss(*given)

    def hungry(policy: Any, prompts: Any, ids: Tensor, *given: Any, **how: Any) -> Tensor:
        if steps[0] >= 3 and len(ids) > 16:
            torch.empty(1024 * GIB, dtype=torch.uint8, device="cuda")  # CUDA's own error
        return score(policy, prompts, ids, *given, **how)

    monkeypatch.setattr(grpo, "group_advantages", counted)
    monkeypatch.setattr(grpo, "completion_logprobs", hungry)
    with pytest.raises((torch.OutOfMemoryError, SystemExit)):
        grpo.main(config)
    run = only_run(tmp_path)
    assert max(path.name for path in (run / "checkpoints").iterdir()) == "step_000002"
    grpo.main(dataclasses.replace(config, resume=str(run), micro_batch_size=16))
    assert [row["step"] for row in read(run)] == [0, 1, 2, 3, 4]


def test_a_short_run_learns(tmp_path: Path) -> None:
    """The README's first command with half the prompts, on bf16 weights."""
    sizes: dict[str, Any] = {"num_steps": 60, "prompts_per_step": 32, "eval_every": 0, "warmup_steps": 20}
    grpo.main(dataclasses.replace(grpo.Config(), **sizes, run_dir=str(tmp_path)))
    rows = read(only_run(tmp_path))
    assert rows[-1]["eval/accuracy_sampled"] > rows[0]["eval/accuracy_sampled"] + 0.05
    assert max(row.get("train/logprob_gap_mean", 0) for row in rows) < 0.005


def test_metrics_of_the_hardware(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"num_samples": 8, "prompts_per_step": 4, "num_generations": 4, "eval_samples": 8}
    config = grpo_overfit_max_gpu.Config(**sizes, learning_rate=0.0, num_epochs=1, run_dir=str(tmp_path))
    with contextlib.suppress(SystemExit):  # its target is missed
        grpo_overfit_max_gpu.main(config)
    metrics = json.loads((only_run(tmp_path) / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= metrics["gpu/utilization"] <= 100
    assert metrics["gpu/memory_gb"] > 0
    assert metrics["perf/peak_memory_gb"] > 0
