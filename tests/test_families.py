"""Every family that trains does so on the log-probs of its own plain forward pass; the others are refused."""

from typing import Any

import pytest
import torch

import grpo
from tests.conftest import Capture, random_model, refusal

pytestmark = pytest.mark.usefixtures("one_thread")
# Longer and shorter than the windows and the blocks of 8 tokens below.
PROMPTS = [list(range(5, 17)), [20, 21, 22], list(range(30, 37))]
GROUPS, LENGTH, TEMPERATURE = 3, 12, 0.8
CONFIG = grpo.Config(max_completion_length=LENGTH, temperature=TEMPERATURE)
# Name: configuration, and what differs from `random_model`'s shape.
SIZES: dict[str, Any] = {"head_dim": 8, "sliding_window": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in (
        "Llama", "Qwen2", "Phi", "Phi3", "GPTNeoX", "Olmo2", "SmolLM3", "StableLm", "Nemotron")},
    "Mistral": ("Mistral", {"sliding_window": None}), "Mistral, window": ("Mistral", {"sliding_window": 8}),
    "Qwen2, window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "Qwen3": ("Qwen3", {"head_dim": 8}), "Gemma": ("Gemma", {"head_dim": 8}), "GLM-4": ("Glm4", {"head_dim": 8}),
    "Gemma 2, caps": ("Gemma2", SIZES | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "Gemma 3": ("Gemma3Text", SIZES | {"tie_word_embeddings": False}), "Cohere": ("Cohere", {"logit_scale": 0.3}),
    "GPT-2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "OPT": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}), "Starcoder2": ("Starcoder2", {"sliding_window": 8}),
    "Granite": ("Granite", {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "Falcon": ("Falcon", {"new_decoder_architecture": False, "alibi": False}),
    "LFM2": ("Lfm2", {"block_ff_dim": 48, "layer_types": ["conv", "full_attention"]}),
}  # fmt: skip
MAMBA2 = {"num_heads": 8, "head_dim": 8, "state_size": 8, "expand": 2, "n_groups": 1, "chunk_size": 8}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "Mamba2": ("Mamba2", MAMBA2), "RecurrentGemma": ("RecurrentGemma", {}),
    "Mamba": ("Mamba", {}), "Jamba": ("Jamba", {}),  # raise, as do the next: their masks do not fit a static cache
    "Falcon, alibi": ("Falcon", {"alibi": True}), "BLOOM": ("Bloom", {"n_layer": 2, "n_head": 4}),
}  # fmt: skip


def build(name: str, weights: float | None = 0.4) -> Any:
    """A model with weights so large that what goes wrong shows, or with the family's own (None)."""
    family, changes = {**FAMILIES, **REFUSED}[name]
    policy = random_model(family, **changes)
    for parameter in policy.parameters():
        # Biases too, a head's for instance, which are zero at first; but not the gains of norms.
        if weights and (parameter.dim() > 1 or not parameter.any()):
            parameter.data.normal_(0, weights)
    return policy


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_scored_as_by_its_plain_forward_pass(name: str) -> None:
    policy = build(name)
    grpo.check_policy(policy, PROMPTS, CONFIG)
    policy.zero_grad()
    sampling: dict[str, Any] = {"num_generations": GROUPS, "max_completion_length": LENGTH, "eos_ids": [1, 2, 3]}
    noise = grpo.uniform_noise(1, "test", 0, 9, LENGTH)
    batch = grpo.rollout(policy, PROMPTS, temperature=TEMPERATURE, noise=noise, **sampling)
    mask, index = batch.completion_mask, torch.arange(9) // GROUPS
    tokens = batch.completion_ids, mask
    scored = grpo.completion_logprobs(policy, PROMPTS, *tokens, prompt_index=index, temperature=TEMPERATURE)
    scored.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in policy.parameters())
    assert sum(float(p.grad.abs().sum()) for p in policy.parameters() if p.grad is not None) > 1

    policy.set_attn_implementation("eager")
    plain = torch.zeros_like(scored)
    for i in range(9):
        prompt, row = PROMPTS[i // GROUPS], batch.completion_ids[i][mask[i]]
        ids = torch.cat([torch.tensor(prompt), row])[None]  # alone, without padding
        with torch.no_grad():
            logits = policy(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float() / TEMPERATURE
        plain[i, : len(row)] = logits.log_softmax(-1).gather(-1, row[:, None])[:, 0]
    assert plain[mask].min() < -2  # what was sampled was not certain
    assert (scored - plain).abs().max() < 1e-4
    assert (batch.logprobs - plain).abs().max() < 1e-4


@pytest.mark.parametrize("name", REFUSED)
def test_another_family_is_refused_in_one_line(name: str, capsys: Capture) -> None:
    """Also with the weights that the family begins with, which are small."""
    for weights in (0.4, None):
        policy = build(name, weights)
        assert type(policy).__name__ in refusal(capsys, grpo.check_policy, policy, PROMPTS, CONFIG)


def test_positions_that_end_too_early_and_nan_weights_are_refused(capsys: Capture) -> None:
    policy = build("Qwen2")
    longest = list(range(90)) * 3
    grpo.check_policy(policy, [longest[: 256 - LENGTH], [3]], CONFIG)
    refused = refusal(capsys, grpo.check_policy, policy, [[3], longest[: 257 - LENGTH]], CONFIG)
    assert "256 positions, not 257" in refused
    policy.lm_head.weight.data.fill_(torch.nan)
    refusal(capsys, grpo.check_policy, policy, PROMPTS, CONFIG)


def test_what_goes_wrong_only_far_behind_is_seen(capsys: Capture) -> None:
    """The longest prompt is checked at the end of the longest text of the run, and the shortest with its padding."""
    policy = build("Qwen2")
    forward = policy.base_model.forward

    def broken(*given: Any, **how: Any) -> Any:
        if how["position_ids"] is not None:  # the plain forward pass counts for itself
            how["position_ids"] = how["position_ids"] % 40
        return forward(*given, **how)

    policy.base_model.forward = broken
    grpo.check_policy(policy, PROMPTS, CONFIG)
    refusal(capsys, grpo.check_policy, policy, PROMPTS, grpo.Config(max_completion_length=64))
