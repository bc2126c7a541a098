"""SmolLM2-135M-Instruct, a language model that others trained, as far as models/get_smollm2.py could fetch it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import grpo
from tests.conftest import ROOT

FOLDER = ROOT / "models" / "SmolLM2-135M-Instruct"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the model: uv run models/get_smollm2.py")
SIZES = {"num-steps": 2, "prompts-per-step": 2, "num-generations": 3, "max-completion-length": 8, "eval-samples": 3}
SMALL = [f"--{name}={size}" for name, size in SIZES.items()]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any, list[list[int]]]:
    """The policy, its tokenizer, and three prompts of different lengths."""
    from transformers import AutoTokenizer

    config = grpo.parse_config(["--preset", "smollm"])
    tokenizer = grpo.load_pretrained(AutoTokenizer, config)
    questions = [{"question": text} for text in ("What is 2 + 3?", "Name the capital of France.", "Why?")]
    prompts = grpo.tokenize_prompts(tokenizer, questions, config)
    return grpo.load_policy(config, torch.device("cpu")), tokenizer, prompts


def test_log_probs_are_those_of_the_models_plain_forward_pass(loaded: tuple[Any, Any, list[list[int]]]) -> None:
    policy, tokenizer, prompts = loaded
    noise = grpo.uniform_noise(1, "test", 0, 6, 12)
    batch = grpo.rollout(policy, prompts, num_generations=2, max_completion_length=12, temperature=0.8,
                         eos_ids=[tokenizer.eos_token_id], noise=noise)  # fmt: skip
    mask, index = batch.completion_mask, torch.arange(6) // 2
    scored = grpo.completion_logprobs(policy, prompts, batch.completion_ids, mask, prompt_index=index, temperature=0.8)
    for i, row in enumerate(batch.completion_ids):
        ids = row[mask[i]]
        text = torch.tensor([prompts[i // 2] + ids.tolist()])
        logits = policy(text).logits.detach()[0, -len(ids) - 1 : -1] / 0.8
        plain = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        assert (scored[i][mask[i]] - plain).abs().max() < 1e-4
        assert (batch.logprobs[i][mask[i]] - plain).abs().max() < 1e-4


def test_greedy_rollout_is_what_generate_gives(loaded: tuple[Any, Any, list[list[int]]]) -> None:
    policy, tokenizer, prompts = loaded
    batch = grpo.rollout(policy, prompts, num_generations=1, max_completion_length=16, temperature=1.0, noise=None,
                         eos_ids=[tokenizer.eos_token_id])  # fmt: skip
    for prompt, row, mask in zip(prompts, batch.completion_ids, batch.completion_mask, strict=True):
        expected = policy.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16)[0, len(prompt) :]
        assert row[mask].tolist() == expected.tolist()


def length_reward(completions: list[Any], **_: Any) -> list[float]:
    """Differs within almost every group, so that there is something to learn."""
    return [float(len(completion[0]["content"])) for completion in completions]


@pytest.mark.usefixtures("no_report")
def test_two_steps_of_the_preset(tmp_path: Path) -> None:
    flags = ["--rewards", "tests.test_real_model:length_reward=0.1", "--run-dir", str(tmp_path)]
    history = grpo.main(grpo.parse_config(["--preset", "smollm", *SMALL, *flags]))
    for row in history[1:]:
        assert row["train/frac_reward_zero_std"] < 1
        assert row["train/logprob_gap_max"] < 1e-4
        assert row["train/grad_norm"] > 0
    shutil.rmtree(tmp_path)  # two gigabytes
