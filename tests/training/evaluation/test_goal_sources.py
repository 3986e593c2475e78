"""Goal images in closed loop: what is refused, and episodes in the simulator with each source."""

from types import SimpleNamespace

import pytest

from tests.tiny import tiny_config
from training.evaluation.goal_sources import check_goal_options
from training.evaluation.success import GoalOptions


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {}, "trained with goal images, and there is no source of them: add --goal_source"),
        ({}, {"goal_source": "recorded"}, "recorded needs --goal_dataset"),
        ({}, {"goal_source": "generator"}, "generator needs --goal_generator"),
        ({}, {"goal_source": "none", "goal_dataset": "demos"}, "read with --goal_source recorded alone"),
        (
            {},
            {"goal_source": "recorded", "goal_dataset": "demos", "goal_generator": "pipeline"},
            "--goal_generator is read with --goal_source generator alone",
        ),
        (
            {},
            {"goal_source": "recorded", "goal_dataset": "demos", "goal_background": True},
            "--goal_background is for --goal_source generator",
        ),
        (
            {"objectives": ["action"]},
            {"goal_source": "generator", "goal_generator": "pipeline"},
            "which the checkpoint does not predict: train with the objective progress",
        ),
        (
            {"goal_image": False},
            {"goal_source": "generator", "goal_generator": "pipeline"},
            "takes no goal images",
        ),
        ({"goal_image": False}, {"goal_dataset": "demos"}, "read with --goal_source recorded alone"),
    ],
)
def test_a_goal_source_that_does_not_fit_is_refused_with_the_remedy(fields, options, message):
    with pytest.raises(ValueError, match=message):
        check_goal_options(tiny_config(**{"goal_image": True, **fields}), GoalOptions(**options))


def test_a_policy_without_goals_needs_no_source():
    check_goal_options(tiny_config(), SimpleNamespace(**vars(GoalOptions())))
    check_goal_options(tiny_config(), GoalOptions(goal_source="none"))
