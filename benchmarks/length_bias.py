"""The expected gradient of a toy policy, exactly: what GRPO's two divisions do to tokens that decide nothing.

    uv run benchmarks/length_bias.py      # writes docs/length_bias.png, prints the numbers; seconds

The toy policy first answers, right or wrong, and so decides the reward. Then it goes on for a while: after each token
it stops or adds another one. Nothing depends on this tail. All groups of G completions are enumerated. The gradients
of the project's own loss, with the project's own advantages, are summed with the probabilities of the groups, in
float64. An unbiased gradient with respect to the tail is zero.
"""

import argparse
import itertools
import sys
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import grpo_ablations  # noqa: E402

LENGTH = 5  # L: the answer, and a tail of at most four tokens
STARTS = (0.5, 0.0, 0.0)


def completions(policy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs (n, L) of the tokens of every completion, their mask (n, L), and whether it is right (n,).

    policy (3,): logits of a right answer, of stopping after a right one, of stopping after a wrong one. A completion
    that has L tokens is cut there.
    """
    rows, masks, rights = [], [], []
    for right in (True, False):
        answer = torch.nn.functional.logsigmoid(policy[0] if right else -policy[0])
        stop = torch.nn.functional.logsigmoid(policy[1] if right else policy[2])
        go_on = torch.nn.functional.logsigmoid(-policy[1] if right else -policy[2])
        for tail in range(1, LENGTH):
            for stops in (True, False) if tail == LENGTH - 1 else (True,):
                tokens = [answer, *[go_on] * (tail - 1), stop if stops else go_on]
                rows.append(torch.stack(tokens + [torch.zeros_like(answer)] * (LENGTH - len(tokens))))
                masks.append([True] * len(tokens) + [False] * (LENGTH - len(tokens)))
                rights.append(right)
    return torch.stack(rows), torch.tensor(masks), torch.tensor(rights)


def expected_gradient(loss_type: str, scale_rewards: bool, num_generations: int = 3) -> Tensor:
    """The gradient (3,) of the loss, in expectation over all groups: of the answer, the tail of a right and of a wrong
    one. Its negative is the direction in which a step moves the policy."""
    policy = torch.tensor(STARTS, dtype=torch.float64, requires_grad=True)
    logprobs, mask, right = completions(policy)
    probs = logprobs.detach().sum(-1).exp()
    total = torch.zeros((), dtype=torch.float64)
    for group in itertools.product(range(len(probs)), repeat=num_generations):
        rows = list(group)
        advantages = grpo_ablations.group_advantages(right[rows].double(), num_generations, scale_rewards)
        loss = grpo_ablations.dr_grpo_loss(
            logprobs[rows], logprobs[rows].detach(), advantages, mask[rows], num_completions=num_generations,
            max_completion_length=LENGTH, loss_type=loss_type)  # fmt: skip
        total = total + probs[rows].prod() * loss
    (gradient,) = torch.autograd.grad(total, policy)
    return gradient


def group_weights(num_generations: int, scale_rewards: bool) -> list[float]:
    """Mean |advantage| of a group in which 0, 1, ..., G of its G completions are right."""
    weights = []
    for right in range(num_generations + 1):
        rewards = torch.tensor([1.0] * right + [0.0] * (num_generations - right), dtype=torch.float64)
        weights.append(grpo_ablations.group_advantages(rewards, num_generations, scale_rewards).abs().mean().item())
    return weights


LOSSES = {
    "Dr GRPO": ("dr_grpo", False), "divided by length": ("grpo", False),
    "divided by std": ("dr_grpo", True), "GRPO (both)": ("grpo", True),
}  # fmt: skip


def main() -> None:
    """Prints the table and draws the picture."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    print("| loss | towards the right answer | towards stopping when right | towards stopping when wrong |")
    print("|---|--:|--:|--:|")
    for place, (name, (loss_type, scale)) in enumerate(LOSSES.items()):
        step = -expected_gradient(loss_type, scale).round(decimals=12) + 0.0  # without -0.0
        print(f"| {name} | {step[0]:.4f} | {step[1]:.4f} | {step[2]:.4f} |")
        left.bar([place - 0.2, place + 0.2], step[1:].tolist(), width=0.35, color=["#0072b2", "#d55e00"])
    left.axhline(0, color="black", linewidth=0.8)
    left.set_xticks(range(len(LOSSES)), LOSSES, fontsize=8)
    left.set_title("Expected push towards stopping, after the reward is decided", fontsize=10)
    left.set_ylabel("minus the expected gradient", fontsize=9)
    left.plot([], [], color="#0072b2", linewidth=6, label="after a right answer")
    left.plot([], [], color="#d55e00", linewidth=6, label="after a wrong answer")
    left.legend(frameon=False, fontsize=8)
    for name, scale in (("rewards - mean", False), ("divided by the group's std", True)):
        weights = group_weights(16, scale)
        right.plot(range(17), [w / weights[8] for w in weights], marker="o", markersize=3, label=name)
    right.set_title("Weight of a group of 16, by how many are right", fontsize=10)
    right.set_xlabel("right completions in the group", fontsize=9)
    right.set_ylabel("mean |advantage|, half right = 1", fontsize=9)
    right.legend(frameon=False, fontsize=8)
    figure.savefig(ROOT / "docs" / "length_bias.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    main()
