"""What the owner of a GPU runs to see that all of the GPU path is right: `uv run pytest -m gpu`, in five minutes.
Without CUDA the same tests run on the pretended device of tests/cuda.py, apart from those of memory. That is no run on
a GPU: it shows neither speed nor memory, nor what CUDA's kernels compute.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import grpo
from tests.conftest import random_model
from tests.cuda import REAL, any_cuda
from tests.test_cuda import (  # noqa: F401
    test_micro_batches_are_halved_and_the_hardware_is_measured,
    test_rewards_rise_in_bf16,
    test_the_other_scripts_run_whole,
)
from tests.test_rollout import (  # noqa: F401
    test_captured_steps_give_the_same_tokens,
    test_few_shapes_are_captured_each_after_a_step_that_runs,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_thread", "no_report")]
GROUPS, GIB = 16, 2**30


def tiny(dtype: torch.dtype) -> Any:
    return grpo.load_policy(grpo.Config(), torch.device("cuda")).to(dtype)


def gradient(policy: Any, prompts: list[list[int]], batch: grpo.Rollout, parts: int) -> Tensor:
    """As the optimizer would see it, of log-probs with the same random weights each time."""
    masters, size = grpo.make_masters(policy), len(batch.completion_ids)
    weights = torch.randn(size, generator=torch.Generator().manual_seed(1)).cuda()
    for rows in torch.arange(size, device="cuda").chunk(parts):
        given: dict[str, Any] = {"prompt_index": rows // GROUPS, "temperature": 1.0}
        tokens = batch.completion_ids[rows], batch.completion_mask[rows]
        logprobs = grpo.completion_logprobs(policy, prompts, *tokens, **given)
        (logprobs.sum(-1) * weights[rows]).sum().backward()
    return torch.cat([master.grad.flatten() for master in masters])


def test_gradients_of_bf16_point_where_those_of_float32_do(tokenizer: Any) -> None:
    config = grpo.Config(prompts_per_step=32)
    prompts = grpo.tokenize_prompts(tokenizer, grpo.load_problems(config)[0][:32], config)
    settings: dict[str, Any] = {"num_generations": GROUPS, "max_completion_length": 12, "eos_ids": [512]}
    noise = grpo.uniform_noise(1, "test", 0, 32 * GROUPS, 12)
    with any_cuda():
        batch = grpo.rollout(tiny(torch.bfloat16), prompts, noise=noise, temperature=1.0, **settings)
        expected = gradient(tiny(torch.float32), prompts, batch, 1)
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
