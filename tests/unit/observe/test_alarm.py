"""The alarm: it rings for collapse and for dead experts, and keeps still for all that only looks like them."""

from __future__ import annotations

import numpy as np
import pytest
from routing_cases import EVEN, NAMES, report

from moemm.config.schema import RouterConfig, RouterLossConfig
from moemm.observe.alarm import LINES, PATIENCE, RoutingAlarm
from moemm.observe.routing import RouterReport, RoutingNames
from moemm.train.routing import balance_advice, few_are_wanted

# image has collapsed in layer 1; audio still uses every expert there, so that none is dead.
COLLAPSED = report([[[392, 4, 4, 0], [100] * 4], [[100] * 4, [400, 0, 0, 0]]])
# No token chooses routed_3 in layer 1.
DEAD = report([[[140, 130, 130, 0], [140, 130, 130, 0]], [[100] * 4, [400, 0, 0, 0]]])


def alarm(**options: bool) -> RoutingAlarm:
    return RoutingAlarm(NAMES, advice="raise x (now 1)", **options)


def lines(the_alarm: RoutingAlarm, found: RouterReport, times: int) -> list[str]:
    return [line for _ in range(times) for line in the_alarm.check(found)]


def test_collapse_is_told_once_with_names_figures_and_advice() -> None:
    the_alarm = alarm()
    assert lines(the_alarm, COLLAPSED, PATIENCE - 1) == []
    (line,) = the_alarm.check(COLLAPSED)
    for part in ("layer 1", "image", "routed_0", "98%", "4 experts allowed", "evenness 0.08", "raise x (now 1)"):
        assert part in line, part
    assert lines(the_alarm, COLLAPSED, 20) == []


def test_it_recovers_in_silence_and_may_be_told_again() -> None:
    the_alarm = alarm()
    assert len(lines(the_alarm, COLLAPSED, PATIENCE)) == 1
    assert lines(the_alarm, EVEN, 3) == []
    assert len(lines(the_alarm, COLLAPSED, PATIENCE)) == 1


def test_a_good_report_in_between_begins_the_count_anew() -> None:
    the_alarm = alarm()
    for _ in range(3):
        assert lines(the_alarm, COLLAPSED, PATIENCE - 1) == [] and the_alarm.check(EVEN) == []


def test_dead_expert() -> None:
    (line,) = lines(alarm(), DEAD, 3 * PATIENCE)
    for part in ("layer 1", "routed_3", "image, audio", "would be 200", "raise x", "smaller count"):
        assert part in line, part


@pytest.mark.parametrize(
    "still",
    [
        EVEN,  # layer 3: audio has one allowed expert, which takes all of its tokens
        report([[[220, 90, 60, 30], [100] * 4], [[100] * 4, [400, 0, 0, 0]]]),  # uneven, as specialists are
        report([[[400, 400, 0, 0], [0, 0, 400, 400]], [[200] * 4, [400, 0, 0, 0]]], tokens=[600, 600]),
    ],
    ids=["even", "uneven", "halves"],
)
def test_no_false_alarm(still: RouterReport) -> None:
    assert lines(alarm(), still, 5 * PATIENCE) == []


def test_two_choices_a_token_are_not_collapse_but_their_collapse_is() -> None:
    two = report([[[200, 200, 100, 100], [150] * 4], [[150] * 4, [300, 0, 0, 0]]], tokens=[300, 300])
    assert lines(alarm(), two, 5 * PATIENCE) == []
    collapsed = report([[[300, 299, 1, 0], [150] * 4], [[150] * 4, [300, 0, 0, 0]]], tokens=[300, 300])
    assert len(lines(alarm(), collapsed, PATIENCE)) == 1


def test_few_tokens_are_added_up_before_they_are_judged() -> None:
    few = report([[[8, 0, 0, 0], [2] * 4], [[2] * 4, [8, 0, 0, 0]]])
    the_alarm = alarm()
    # 64 choices for each of 4 experts: 32 reports of 8 make one finding.
    assert lines(the_alarm, few, 32 * PATIENCE - 1) == []
    assert len(the_alarm.check(few)) == 1


def test_a_modality_without_tokens_is_not_judged() -> None:
    absent = report([[[0] * 4, [100] * 4], [[0] * 4, [400, 0, 0, 0]]], tokens=[0, 400])
    dead_in_layer_3 = lines(alarm(), absent, 3 * PATIENCE)
    assert dead_in_layer_3 == [], "image alone may use the other experts of layer 3, and is not there"


def test_collapse_that_is_wanted() -> None:
    assert lines(alarm(collapse=False), COLLAPSED, 2 * PATIENCE) == []
    assert len(lines(alarm(collapse=False), DEAD, 2 * PATIENCE)) == 1


def test_many_findings_at_once_are_counted() -> None:
    rows = tuple(f"m{number}" for number in range(9))
    names = RoutingNames(layers=(0,), rows=rows, experts=("a", "b"), allowed_LME=np.ones((1, 9, 2), bool))
    the_alarm = RoutingAlarm(names, advice="x")
    # Every other modality on its own side: nothing is dead, all nine have collapsed.
    found = report([[[500, 1] if number % 2 else [1, 500] for number in range(9)]])
    told = lines(the_alarm, found, PATIENCE)
    assert len(told) == LINES + 1 and "6 more findings" in told[-1]


def test_models_without_a_router_have_nothing_to_tell() -> None:
    assert RoutingAlarm(None, advice="x").check(None) == []
    assert alarm().check(None) == []


def test_advice_names_the_key_and_its_value() -> None:
    assert balance_advice(RouterConfig()) == "raise model.router.losses.balance (now 0.01)"
    assert balance_advice(RouterConfig(kind="sigmoid", bias_rate=1e-3)).startswith(
        "raise model.router.bias_rate (now 0.001)"
    )


def test_when_few_experts_are_wanted() -> None:
    assert not few_are_wanted(RouterConfig())
    assert few_are_wanted(RouterConfig(kind="combination"))
    assert few_are_wanted(RouterConfig(losses=RouterLossConfig(mutual_information=0.1)))
