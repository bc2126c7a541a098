"""Advantages, loss, log-probs and sampler against numbers worked out by hand and against plain, slow code."""

import math
from typing import Any

import pytest
import torch

import grpo
from tests.conftest import to_float64

FAMILIES = ("Qwen2", "Llama", "Qwen3", "GPTNeoX")
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]


def noise(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


def sample(
    policy: Any, prompts: list[list[int]] = PROMPTS, generations: int = 4, length: int = 6, **changes: Any
) -> Any:
    settings: dict[str, Any] = {"temperature": 0.7, "eos_ids": [1], "noise": noise(len(prompts) * generations, length)}
    return grpo.rollout(
        policy, prompts, num_generations=generations, max_completion_length=length, **(settings | changes)
    )


def plain_logprobs(policy: Any, prompt: list[int], completion: list[int], temperature: float) -> torch.Tensor:
    """One row, one forward over prompt + completion by transformers' own attention, no cache, no padding."""
    policy.set_attn_implementation("sdpa")  # scripts put theirs in its place
    logits = policy(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


# Advantages


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.0])
    expected = torch.tensor([0.5, -0.5, -0.5, 0.5, 1.5, -0.5, -0.5, -0.5])
    assert torch.equal(grpo.group_advantages(rewards, 4), expected)


def test_scaled_advantages_by_hand() -> None:
    advantages = grpo.group_advantages(torch.tensor([1.0, 0.0]), 2, scale_rewards=True)
    std = math.sqrt(0.5)  # unbiased: sum of squares 0.5 over 1
    assert advantages.tolist() == pytest.approx([0.5 / (std + 1e-4), -0.5 / (std + 1e-4)])


@pytest.mark.parametrize("value", [0.0, 0.1, 2.3])
@pytest.mark.parametrize("scale", [False, True])
def test_equal_rewards_have_exactly_zero_advantage(value: float, scale: bool) -> None:
    """The mean of 48 times 0.1 is not 0.1 in floating point: that must not become a signal."""
    assert torch.equal(grpo.group_advantages(torch.full((48,), value), 48, scale), torch.zeros(48))


# Loss


def loss(logprobs: Any, old: Any, advantages: Any, mask: Any, **changes: Any) -> float:
    settings: dict[str, Any] = {"num_completions": 2, "max_completion_length": 4}
    logprobs, old, advantages = (torch.tensor(x, dtype=torch.float64) for x in (logprobs, old, advantages))
    if "ref_logprobs" in changes:
        changes["ref_logprobs"] = torch.tensor(changes["ref_logprobs"], dtype=torch.float64)
    return grpo.dr_grpo_loss(logprobs, old, advantages, torch.tensor(mask), **(settings | changes)).item()


LOG = math.log
MASK = [[True, True, False], [True, False, False]]


def test_loss_by_hand_on_policy() -> None:
    """Ratio 1 everywhere: -(2 tokens * 0.5 - 1 token * 0.5) over N * L = 8; bnpo over 3 tokens; grpo per completion."""
    zeros = [[0.0] * 3] * 2
    assert loss(zeros, zeros, [0.5, -0.5], MASK) == pytest.approx(-0.5 / 8)
    assert loss(zeros, zeros, [0.5, -0.5], MASK, loss_type="bnpo") == pytest.approx(-0.5 / 3)
    assert loss(zeros, zeros, [0.5, -0.5], MASK, loss_type="bnpo", num_tokens=10) == pytest.approx(-0.5 / 10)
    assert loss(zeros, zeros, [0.5, -0.25], MASK, loss_type="grpo") == pytest.approx(-(0.5 - 0.25) / 2)


def test_loss_by_hand_with_clipping_both_ways() -> None:
    """A = 1: ratio 1.5 is cut to 1.2, ratio 0.5 stays; A = -1: ratio 0.5 is cut to 0.8, ratio 1.5 stays."""
    moved = [[LOG(1.5), LOG(0.5)], [LOG(1.5), LOG(0.5)]]
    zeros, everything = [[0.0] * 2] * 2, [[True, True]] * 2
    expected = -((1.2 + 0.5) - (1.5 + 0.8)) / 8
    assert loss(moved, zeros, [1.0, -1.0], everything) == pytest.approx(expected)


def test_clipped_tokens_have_no_gradient() -> None:
    logprobs = torch.tensor([[LOG(1.5), LOG(0.5)], [LOG(1.5), LOG(0.5)]], requires_grad=True)
    mask = torch.ones(2, 2, dtype=torch.bool)
    grpo.dr_grpo_loss(
        logprobs, torch.zeros(2, 2), torch.tensor([1.0, -1.0]), mask, num_completions=2, max_completion_length=4
    ).backward()
    assert logprobs.grad is not None
    assert logprobs.grad.flatten().tolist() == pytest.approx([0.0, -0.5 / 8, 1.5 / 8, 0.0])


def test_kl_by_hand() -> None:
    """k3 at ref - logprobs = ln 2: 2 - ln 2 - 1."""
    value = loss([[0.0], [0.0]], [[0.0], [0.0]], [0.0, 0.0], [[True], [True]], beta=0.1,
                 ref_logprobs=[[LOG(2)], [0.0]])  # fmt: skip
    assert value == pytest.approx(0.1 * (2 - LOG(2) - 1) / 8)


def test_unknown_loss_type_is_named() -> None:
    with pytest.raises(ValueError, match="dr_grpo, grpo or bnpo"):
        loss([[0.0]], [[0.0]], [0.0], [[True]], loss_type="ppo")


# Sampler


def test_sampler_at_both_ends() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    for u, token in ((0.0, 1), (0.4999, 1), (0.5, 3), (1 - 2**-24, 3), (1 - 2**-53, 3)):
        assert grpo.sample_tokens(logits.softmax(-1), torch.tensor([u], dtype=torch.float64)).item() == token


@pytest.mark.parametrize("vocab_size", [7, 151_936])
def test_sampler_passes_a_chi_square_test(vocab_size: int) -> None:
    """64 bins of about equal probability; the 99.9 % quantile of chi-square with 63 degrees of freedom is 103.4."""
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(1, vocab_size, generator=generator)
    probabilities = logits.softmax(-1)[0].double()
    draws = 20_000 if vocab_size < 1000 else 4_000
    uniform = torch.rand(draws, generator=generator)
    tokens = torch.cat([grpo.sample_tokens(logits.softmax(-1).expand(len(u), -1), u) for u in uniform.split(100)])
    bins = min(64, vocab_size)
    label = (
        (probabilities.cumsum(0) * bins).long().clamp(max=bins - 1) if vocab_size > bins else torch.arange(vocab_size)
    )
    expected = torch.zeros(bins, dtype=torch.float64).index_add(0, label, probabilities) * draws
    observed = torch.bincount(label[tokens], minlength=bins)
    limit = {7: 22.46, 64: 103.4}[bins]
    assert ((observed - expected) ** 2 / expected).sum().item() < limit


# Rollout and log-probs, for every family


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_sampled_is_what_is_scored(family: str, make_model: Any) -> None:
    policy = make_model(family)
    batch = sample(policy)
    index = torch.arange(len(PROMPTS)).repeat_interleave(4)
    scored = grpo.completion_logprobs(
        policy, PROMPTS, batch.completion_ids, batch.completion_mask, prompt_index=index, temperature=0.7
    )
    assert torch.allclose(scored, batch.logprobs, atol=1e-4)
    for i, prompt in enumerate(PROMPTS):
        row, mask = batch.completion_ids[4 * i], batch.completion_mask[4 * i]
        expected = plain_logprobs(policy, prompt, row[mask].tolist(), 0.7)
        assert torch.allclose(scored[4 * i][mask], expected, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_equals_plain_concatenation(family: str, make_model: Any) -> None:
    """Packed prompts and rows give the gradient of one forward a row."""
    policy = to_float64(make_model(family))
    batch = sample(policy)
    for tensor in (batch.completion_ids, batch.completion_mask):
        tensor[1::4] = tensor[::4]  # equal completions of a prompt, which are scored once, with unequal weights
    index = torch.arange(len(PROMPTS)).repeat_interleave(4)
    weights = noise(12, 6, seed=5).double()
    shared = grpo.completion_logprobs(
        policy, PROMPTS, batch.completion_ids, batch.completion_mask, prompt_index=index, temperature=0.7
    )
    (shared * weights).sum().backward()
    ours = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    total: Any = 0.0
    for i, (row, mask) in enumerate(zip(batch.completion_ids, batch.completion_mask, strict=True)):
        total = total + (plain_logprobs(policy, PROMPTS[index[i]], row[mask].tolist(), 0.7) * weights[i][mask]).sum()
    total.backward()
    for gradient, parameter in zip(ours, policy.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, rtol=1e-9, atol=1e-12)


def test_gradient_adds_in_one_order(policy: Any) -> None:
    """On a CPU the backward pass of x[index] lets several threads add at once, and its last bits are left to chance."""
    batch = sample(policy)
    index = torch.arange(3).repeat_interleave(4)
    score: dict[str, Any] = {"prompt_index": index, "temperature": 0.7}
    logprobs = grpo.completion_logprobs(policy, PROMPTS, batch.completion_ids, batch.completion_mask, **score)
    nodes: list[Any] = [logprobs.grad_fn]
    for node in nodes:  # grows while it is walked
        nodes += [after for after, _ in node.next_functions if after is not None and after not in nodes]
    names = {type(node).__name__ for node in nodes}
    assert "IndexSelectBackward0" in names
    assert "IndexBackward0" not in names


def test_padding_changes_nothing(policy: Any) -> None:
    batch = sample(policy, eos_ids=[512])
    index = torch.arange(3).repeat_interleave(4)
    score: dict[str, Any] = {"prompt_index": index, "temperature": 0.7}
    short = grpo.completion_logprobs(policy, PROMPTS, batch.completion_ids, batch.completion_mask, **score)
    ids = torch.nn.functional.pad(batch.completion_ids, (0, 5), value=3)
    mask = torch.nn.functional.pad(batch.completion_mask, (0, 5), value=False)
    long = grpo.completion_logprobs(policy, PROMPTS, ids, mask, **score)
    assert torch.equal(long[:, :6], short)
    assert torch.equal(long[:, 6:], torch.zeros(12, 5))


def test_entropy_is_that_of_the_sampling_distribution(policy: Any) -> None:
    batch = sample(policy, prompts=PROMPTS[:1], generations=2, length=1)
    policy.set_attn_implementation("sdpa")
    p = (policy(torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.7).softmax(-1)
    assert batch.entropy.flatten().tolist() == pytest.approx([-(p * p.log()).sum().item()] * 2, rel=1e-5)


def test_rollout_does_not_depend_on_what_shares_its_batch(policy: Any) -> None:
    together = sample(policy, eos_ids=[512])
    for i in range(len(PROMPTS)):
        alone = sample(policy, prompts=PROMPTS[i : i + 1], eos_ids=[512], noise=noise(12, 6)[4 * i : 4 * i + 4])
        assert torch.equal(alone.completion_ids, together.completion_ids[4 * i : 4 * i + 4])


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(family: str, make_model: Any) -> None:
    policy = make_model(family)
    ours = sample(policy, generations=1, length=12, noise=None)
    policy.set_attn_implementation("sdpa")
    for i, prompt in enumerate(PROMPTS):
        theirs = policy.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=1, pad_token_id=0
        )
        assert ours.completion_ids[i][ours.completion_mask[i]].tolist() == theirs[0, len(prompt) :].tolist()


def test_generation_config_does_not_reach_sampling(policy: Any) -> None:
    plain = sample(policy)
    for name, value in {"top_k": 1, "top_p": 0.1, "temperature": 0.01, "repetition_penalty": 2.0}.items():
        setattr(policy.generation_config, name, value)
    assert torch.equal(sample(policy).completion_ids, plain.completion_ids)


def test_the_rollout_draws_at_the_temperature(make_model: Any) -> None:
    policy = make_model("Qwen2", vocab_size=7, initializer_range=0.5)
    draws = 20_000
    batch = sample(policy, [[2, 3, 4]], draws, 1, temperature=0.5, eos_ids=[], noise=noise(draws, 1))
    policy.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = (policy(torch.tensor([[2, 3, 4]])).logits[0, -1] / 0.5).softmax(-1) * draws
    found = batch.completion_ids.flatten().bincount(minlength=7)
    assert ((found - expected) ** 2 / expected).sum() < 22.46  # chi-square, 6 degrees of freedom, p = 0.001


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_calls_of_the_policy_stay_right(family: str, make_model: Any) -> None:
    """After a rollout the policy runs on our attention; its own forward and generate must not notice."""
    ours, theirs = make_model(family), make_model(family)
    sample(ours)
    ids, mask = torch.randint(2, 96, (3, 9), generator=torch.Generator().manual_seed(1)), torch.ones(3, 9).long()
    mask[0, :4] = mask[1, :1] = 0  # left padding
    with torch.no_grad():
        for given in ({}, {"attention_mask": mask}):
            same = (ours(ids, **given).logits - theirs(ids, **given).logits).abs()
            assert same[mask.bool()].max() < 1e-5
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **settings), theirs.generate(ids, **settings))


def test_the_update_computes_on_no_padding(make_model: Any) -> None:
    policy, seen = make_model("Qwen2"), []
    policy.base_model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    ids = torch.arange(2, 32).view(3, 10)  # rows of 10, 1 and 4 tokens; a row's last token is never read
    mask = torch.arange(10) < torch.tensor([[10], [1], [4]])
    index = torch.tensor([0, 0, 2])
    grpo.completion_logprobs(policy, PROMPTS, ids, mask, prompt_index=index, temperature=1.0)
    assert seen == [(1, len(PROMPTS[0]) + len(PROMPTS[2]) + 9 + 0 + 3, 32)]


def test_attention_takes_any_layout_that_a_kernel_gives(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's kernels return (B, T, heads, D) transposed, where the CPU's returns the layout of the queries."""
    expected = sample(policy)
    plain = grpo.scaled_dot_product_attention

    def transposed(*args: Any, **kwargs: Any) -> torch.Tensor:
        return plain(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(grpo, "scaled_dot_product_attention", transposed)
    assert torch.equal(sample(policy).completion_ids, expected.completion_ids)


def test_learning_rate_by_hand() -> None:
    """Two steps of warmup, then from the peak towards zero, which step 11 would reach."""

    def rates(schedule: Any, *steps: int) -> list[float]:
        config = grpo.Config(learning_rate=8.0, warmup_steps=2, lr_schedule=schedule)
        return [grpo.learning_rate(step, 10, config) for step in steps]

    assert rates("constant", 1, 2, 3, 10) == pytest.approx([4, 8, 8, 8])
    assert rates("linear", 1, 2, 3, 7, 10) == pytest.approx([4, 8, 8, 4, 1])
    assert rates("cosine", 1, 2, 3, 7) == pytest.approx([4, 8, 8, 4])
    assert rates("cosine", 10) == pytest.approx([4 * (1 + math.cos(math.pi * 7 / 8))])


# Stop tokens


def test_stop_token_is_in_the_mask_and_what_follows_is_not(make_model: Any) -> None:
    policy = make_model("Qwen2", vocab_size=4)  # four tokens, two of them EOS: about half the draws stop
    batch = sample(policy, prompts=[[2, 3]], generations=64, length=5, eos_ids=[0, 1])
    lengths = batch.completion_mask.sum(-1)
    assert {1, 2, 3, 5} <= set(lengths.tolist())
    for row, mask, n in zip(batch.completion_ids, batch.completion_mask, lengths.tolist(), strict=True):
        assert mask.tolist() == [True] * n + [False] * (5 - n)
        assert all(token in (2, 3) for token in row[: n - 1].tolist())
        assert row[n - 1].item() in (0, 1) or n == 5
        assert row[n:].sum() == 0


def test_stop_token_gets_gradient_also_where_pad_is_eos(make_model: Any) -> None:
    """EOS 0 is also what fills the completions after their end: the mask, not the value, decides."""
    policy = make_model("Qwen2", vocab_size=8, tie_word_embeddings=False)
    ids = torch.tensor([[3, 0, 0, 0]])
    for mask, reaches in (([True, True, False, False], True), ([True, False, False, False], False)):
        policy.zero_grad()
        logprobs = grpo.completion_logprobs(
            policy, [[2]], ids, torch.tensor([mask]), prompt_index=torch.tensor([0]), temperature=1.0
        )
        logprobs[:, 1:].sum().backward()
        assert (policy.lm_head.weight.grad[0].abs().sum().item() > 0) == reaches


# Memory


def test_logits_are_never_held_for_all_tokens(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward keeps no logits for backward, and no single tensor is larger than one chunk of logits."""
    vocab, rows, length = 8192, 4, 16
    policy = make_model("Qwen2", vocab_size=vocab)
    monkeypatch.setattr(grpo, "LOGITS_AT_ONCE", 8 * vocab)
    ids = torch.randint(2, vocab, (rows, length), generator=torch.Generator().manual_seed(0))
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.untyped_storage().nbytes() if tensor.shape[-1:] == (vocab,) else 0)
        return tensor

    largest = [0]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[name-defined,misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if "mm" in str(func) and result.shape[-1] == vocab and result.shape[0] != policy.config.hidden_size:
                largest[0] = max(largest[0], result.shape[0])  # a product that gives logits, not the weight's gradient
            return result

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), Watch():
        logprobs = grpo.completion_logprobs(
            policy, [[2, 3]], ids, torch.ones(rows, length, dtype=torch.bool),
            prompt_index=torch.zeros(rows, dtype=torch.long), temperature=1.0,
        )  # fmt: skip
        forward_kept = sum(kept)
        logprobs.sum().backward()
    assert forward_kept == 0
    assert 0 < largest[0] <= 8
