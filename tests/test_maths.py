"""Advantages, loss, log-probs, masters and micro-batches against numbers worked out by hand and plain, slow code."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import grpo
import grpo_ablations
from tests.conftest import random_model, to_float64

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("Qwen2", "Llama", "Qwen3", "GPTNeoX")
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]


def ragged_batch(seed: int = 0) -> grpo.Rollout:
    """Four completions of each of PROMPTS, of 1 to 6 tokens; the first two of a prompt are equal. Two end with the
    token that fills up the others, as where pad is EOS."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([3, 3, 1, 6, 6, 6, 2, 1, 4, 4, 5, 1])
    mask = torch.arange(6) < lengths[:, None]
    ids = torch.randint(2, 90, (12, 6), generator=generator)
    ids[1::4] = ids[::4]
    ids[[2, 10], [0, 4]] = 0
    zeros = torch.zeros(12, 6)
    return grpo.Rollout(ids * mask, mask, zeros, zeros)


def scores(policy: Any, batch: grpo.Rollout, temperature: float = 0.7) -> Tensor:
    index = torch.arange(3).repeat_interleave(4)
    tokens = batch.completion_ids, batch.completion_mask
    return grpo.completion_logprobs(policy, PROMPTS, *tokens, prompt_index=index, temperature=temperature)


@pytest.mark.parametrize("script", [grpo, grpo_ablations])
def test_advantages_by_hand(script: Any) -> None:
    """NaN, of a completion that is not judged, is in no mean. With one or none judged, nothing can be compared."""
    none = math.nan
    rewards = torch.tensor([1.0, 0, 0, 1, 3, 0, 1, 0, 1, none, 0, none, none, none, 2, none, none, none, none, none])
    expected = torch.tensor([0.5, -0.5, -0.5, 0.5, 2.0, -1.0, 0.0, -1.0, 0.5, 0.0, -0.5] + [0.0] * 9)
    assert torch.equal(script.group_advantages(rewards, 4), expected)
    scaled = grpo_ablations.group_advantages(torch.tensor([1.0, 0, none, none, 3, none]), 3, scale_rewards=True)
    std = math.sqrt(0.5)  # unbiased: sum of squares 0.5 over 1
    assert scaled.tolist() == pytest.approx([0.5 / (std + 1e-4), -0.5 / (std + 1e-4), 0, 0, 0, 0])
    # The mean of 48 times 0.1 is not 0.1 in floating point: that must not become a signal.
    assert not script.group_advantages(torch.full((48,), 0.1), 48).any()


@pytest.mark.parametrize("script", [grpo, grpo_ablations])
def test_loss_by_hand_with_clipping_both_ways(script: Any) -> None:
    """A = 1: ratio 1.5 is cut to 1.2, ratio 0.5 stays; A = -1: ratio 0.5 is cut to 0.8, ratio 1.5 stays."""
    logprobs = torch.tensor([[math.log(1.5), math.log(0.5), 9.0]] * 2, requires_grad=True)
    mask = torch.tensor([[True, True, False]] * 2)
    given = logprobs, torch.zeros(2, 3), torch.tensor([1.0, -1.0]), mask
    value = script.dr_grpo_loss(*given, num_completions=2, max_completion_length=4)
    assert value.item() == pytest.approx(-((1.2 + 0.5) - (1.5 + 0.8)) / 8)
    value.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.flatten().tolist() == pytest.approx([0.0, -0.5 / 8, 0.0, 1.5 / 8, 0.0, 0.0])
    wide = script.dr_grpo_loss(*given, num_completions=2, max_completion_length=4, epsilon=0.4)
    assert wide.item() == pytest.approx(-((1.4 + 0.5) - (1.5 + 0.6)) / 8)
    with pytest.raises(ValueError, match="dr_grpo, grpo or bnpo"):
        grpo_ablations.dr_grpo_loss(*given, num_completions=2, max_completion_length=4, loss_type="ppo")


def test_gradient_of_the_kl_term_is_that_of_the_reverse_kl() -> None:
    """KL(p, q) = log 2 / 4 has the gradient p * (log(p / q) - KL) in the logits. Without the ratio as a factor the term
    would have p - q, the gradient of KL(q, p)."""
    p, q = torch.tensor([[0.5], [0.25], [0.25]]), torch.tensor([[0.25], [0.25], [0.5]])  # of three tokens
    logits = p.log().requires_grad_()
    logprobs = logits.log_softmax(0)
    # All tokens as three completions; p in place of the mask gives each its probability as weight.
    given: dict[str, Any] = {"num_completions": 1, "max_completion_length": 1, "beta": 2.0, "ref_logprobs": q.log()}
    value = grpo_ablations.dr_grpo_loss(logprobs, logprobs.detach(), torch.zeros(3), p, **given)
    assert value.item() == pytest.approx(2 * math.log(2) / 4)
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient[:, 0].tolist() == pytest.approx([2 * math.log(2) * part for part in (3 / 8, -1 / 16, -5 / 16)])


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_gradient_equal_plain_concatenation(family: str) -> None:
    """Shared prompts, padding and completions that are scored once give the gradient of one forward a row."""
    policy, batch = to_float64(random_model(family)), ragged_batch()
    weights = torch.rand(12, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)  # equal rows': not
    shared = scores(policy, batch)
    (shared * weights).sum().backward()
    ours = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    total: Any = 0.0
    for i, (row, mask) in enumerate(zip(batch.completion_ids, batch.completion_mask, strict=True)):
        prompt, tokens = PROMPTS[i // 4], row[mask]  # one row, without cache or padding
        logits = policy(torch.tensor([prompt + tokens.tolist()]), use_cache=False).logits[0, len(prompt) - 1 : -1] / 0.7
        plain = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        assert torch.allclose(shared[i][mask], plain, rtol=1e-9, atol=1e-12)
        total = total + (plain * weights[i][mask]).sum()
    assert not shared[~batch.completion_mask].any()
    total.backward()
    for gradient, parameter in zip(ours, policy.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, rtol=1e-9, atol=1e-12)


def test_a_prompt_is_computed_once_and_equal_completions_too() -> None:
    policy, seen = random_model("Qwen2"), []
    policy.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    batch = ragged_batch()
    scores(policy, batch)
    assert seen == [(3, 5), (9, 5)]  # three prompts; the nine different of twelve completions, without last tokens
    seen.clear()
    rows = torch.tensor([8, 9, 11])  # of the third prompt, of one token: the others do not matter
    tokens = batch.completion_ids[rows], batch.completion_mask[rows]
    grpo.completion_logprobs(policy, PROMPTS, *tokens, prompt_index=torch.tensor([2, 2, 2]), temperature=1.0)
    assert seen == [(1, 1), (2, 3)]


def test_gradient_adds_in_one_order(policy: Any) -> None:
    """On a CPU the backward pass of x[index] lets several threads add at once, and its last bits are left to chance."""
    nodes: list[Any] = [scores(policy, ragged_batch()).grad_fn]
    for node in nodes:  # grows while it is walked
        nodes += [after for after, _ in node.next_functions if after is not None and after not in nodes]
    assert "IndexSelectBackward0" in {type(node).__name__ for node in nodes}
    # A mask names each place once; indices may repeat, and add to one place several times.
    indices = [index for node in nodes if type(node).__name__ == "IndexBackward0" for index in node._saved_indices]
    assert all(index.dtype == torch.bool for index in indices)


def test_logits_are_never_held_for_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are computed for a chunk at a time, and for the backward pass anew instead of being kept."""
    monkeypatch.setattr(grpo, "LOGITS_AT_ONCE", 8 * 96)
    with mock.patch.object(grpo, "scaled_logits", wraps=grpo.scaled_logits) as watched:
        logprobs = scores(random_model("Qwen2"), ragged_batch())
        forward = [len(call.args[1]) for call in watched.call_args_list]
        assert max(forward) == 8
        assert len(forward) > 3
        logprobs.sum().backward()
    assert sorted(len(call.args[1]) for call in watched.call_args_list) == sorted(forward * 2)


def test_micro_batches_hold_what_has_a_gradient_in_order_of_length() -> None:
    batch = ragged_batch()  # the longest of the groups have 6, 6 and 5 tokens
    batch.completion_mask[3, 4:] = False  # now 4, 6 and 5
    advantages = torch.tensor([1.0, -1, 0, 0, 0, 0, 0, 0, 2, -1, -1, 0])
    mask = batch.completion_mask.clone()
    mask[9] = False  # truncated, and left out of the loss

    def rows(size: int, **settings: Any) -> list[list[int]]:
        script: Any = grpo_ablations if settings else grpo
        config = script.Config(num_generations=4, micro_batch_size=size, **settings)
        return [part.tolist() for part in script.micro_batches(batch, advantages, mask, config)]

    assert rows(2) == rows(2, beta=0.0) == [[0, 1], [8, 10]]
    assert rows(100) == [[0, 1, 8, 10]]
    # With a KL term each row has a gradient, unless it is left out of the loss.
    assert rows(5, beta=0.1) == [[0, 1, 2, 3, 8], [10, 11, 4, 5, 6], [7]]
    advantages[:] = 0
    assert rows(2) == []


def test_masters_sum_the_gradients_of_micro_batches_in_float32() -> None:
    """bf16 weights, as on a GPU: what one backward pass gives is rounded to bf16, the sum of several is not."""
    policy, twin, own = random_model("Qwen2").bfloat16(), random_model("Qwen2").bfloat16(), random_model("Qwen2")
    batch, masters = ragged_batch(), grpo.make_masters(policy)
    assert all(a is b for a, b in zip(grpo.make_masters(own), own.parameters(), strict=True))  # float32 as it is
    assert all(torch.equal(m.bfloat16(), p) for m, p in zip(masters, policy.parameters(), strict=True))
    expected = [torch.zeros_like(master) for master in masters]
    for rows in torch.arange(12).chunk(3):
        for model in (policy, twin):
            given = model, PROMPTS, batch.completion_ids[rows], batch.completion_mask[rows]
            grpo.completion_logprobs(*given, prompt_index=rows // 4, temperature=1.0).sum().backward()
        for total, weight in zip(expected, twin.parameters(), strict=True):
            total += weight.grad.float()
            weight.grad = None
    assert all(torch.equal(master.grad, total) for master, total in zip(masters, expected, strict=True))
    assert all(weight.grad is None for weight in policy.parameters())
    # bf16's own sum would have lost some of it.
    assert not all(torch.equal(total.bfloat16().float(), total) for total in expected)


def test_learning_rate_by_hand() -> None:
    """Two steps of warmup, then from the peak towards zero, which step 11 would reach."""

    def rates(schedule: Any, *steps: int) -> list[float]:
        config = grpo.Config(learning_rate=8.0, warmup_steps=2, lr_schedule=schedule)
        return [grpo.learning_rate(step, 10, config) for step in steps]

    assert rates("constant", 1, 2, 3, 10) == pytest.approx([4, 8, 8, 8])
    assert rates("linear", 1, 2, 3, 7, 10) == pytest.approx([4, 8, 8, 4, 1])
    assert rates("cosine", 1, 2, 3, 7) == pytest.approx([4, 8, 8, 4])
    assert rates("cosine", 10) == pytest.approx([4 * (1 + math.cos(math.pi * 7 / 8))])
