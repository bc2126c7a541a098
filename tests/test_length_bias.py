"""The paper's bias, exactly: after the reward is decided, Dr GRPO pushes the policy nowhere, and GRPO does."""

import pytest
from length_bias import expected_gradient, group_weights


@pytest.mark.parametrize(("loss_type", "scale"), [(t, s) for t in ("dr_grpo", "grpo") for s in (False, True)])
def test_only_grpo_has_an_expected_gradient_behind_the_answer(loss_type: str, scale: bool) -> None:
    answer, after_right, after_wrong = expected_gradient(loss_type, scale, 3).tolist()
    assert answer < -0.01  # a step makes the right answer likelier
    if loss_type == "grpo":  # right completions are made shorter, wrong ones longer
        assert after_right < -1e-3 < 1e-3 < after_wrong
    else:
        assert abs(after_right) + abs(after_wrong) < 1e-12


def test_division_by_the_std_gives_nearly_solved_groups_more_weight() -> None:
    plain, scaled = (group_weights(16, scale) for scale in (False, True))
    assert plain[15] / plain[8] == pytest.approx(15 / 64)
    assert scaled[15] / scaled[8] > 2 * plain[15] / plain[8]
