"""Claims: what a rule says of rows of several seeds."""

import numpy as np
import pytest
from scipy import stats

from gigamorph.engine.mammography.recipes import RECIPES, get_recipe
from gigamorph.engine.mammography.recipes.claims import Effect, Rule, interval, judge, over_seeds


def rows(**columns):
    length = len(next(iter(columns.values())))
    return [{"seed": seed, **{key: values[seed] for key, values in columns.items()}} for seed in range(length)]


def verdict(rule, found):
    holds, lines = judge(rule, found)
    return holds, {line["what"]: line for line in lines}


GOOD = np.linspace(0.8, 0.9, 10)
RULE = Rule((Effect("a", "b"),), (("a", 0.75),))


def test_a_claim_needs_its_interval_its_wins_its_floor_and_room_above():
    holds, lines = verdict(RULE, rows(a=GOOD, b=GOOD - 0.05 - 0.01 * GOOD))
    assert holds and lines["a - b"]["wins"] == 10 and lines["a at least 0.75"]["holds"]
    assert not verdict(RULE, rows(a=GOOD - 0.2, b=GOOD - 0.3))[0]  # below the floor
    assert not verdict(RULE, rows(a=GOOD + 0.14, b=GOOD))[0]  # at the ceiling
    noisy = GOOD + 0.1 * np.array([3, -1, -1, -1, 3, -1, -1, 0.1, -1, 0.2])
    assert not verdict(RULE, rows(a=GOOD, b=noisy))[0]
    # A large mean by few seeds is not enough: seven of ten win.
    few = GOOD - np.array([0.2] * 7 + [-0.001] * 3)
    holds, lines = verdict(RULE, rows(a=GOOD, b=few))
    assert lines["a - b"]["low"] > 0 and lines["a - b"]["wins"] == 7 and not holds
    # What rounding may turn is no win.
    holds, lines = verdict(RULE, rows(a=GOOD, b=GOOD - np.array([0.2] * 7 + [0.004] * 3)))
    assert lines["a - b"]["low"] > 0 and lines["a - b"]["wins"] == 7 and not holds


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("a", [0.9, 0.1])
def test_one_seed_and_two_decide_nothing(seeds, a):
    """Neither that a claim holds nor that it does not."""
    holds, lines = verdict(RULE, rows(a=[a] * seeds, b=[0.2, 0.3][:seeds]))
    assert holds is None
    assert (lines["a - b"]["holds"] is None) == (seeds == 1)  # of one there is no interval


def test_never_against_never_is_no_win():
    """Equal columns: no win, no effect."""
    holds, lines = verdict(RULE, rows(a=GOOD, b=GOOD))
    assert not holds and lines["a - b"]["wins"] == 0


def test_what_is_measured_beside_the_claim():
    rule = Rule((Effect("a", "b"),), (), beside=(Effect("b", "a"),))
    holds, lines = verdict(rule, rows(a=GOOD, b=GOOD - 0.1))
    assert holds and lines["b - a"]["holds"] is None


def test_interval_is_students():
    values = [0.1, 0.3, 0.2, 0.5]
    want = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert interval(values) == pytest.approx(want) and interval([1.0]) is None


def test_rows_of_a_seed_are_averaged_and_chosen():
    found = [{"seed": s, "kind": k, "a": s + (k == "x")} for s in (1, 2) for k in "xyy"]
    assert over_seeds(found, "a") == pytest.approx({1: 4 / 3, 2: 7 / 3})
    assert over_seeds(found, "a", {"kind": "x"}) == {1: 2, 2: 3}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_seven_seeds_are_held_out(name):
    task = get_recipe(name).synthetic
    assert len(set(task.seen) & set(task.held_out)) == 0 and len({*task.seeds}) == 10 and len(task.held_out) >= 7


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_rule_has_a_floor_and_a_difference(name):
    synthetic = get_recipe(name).synthetic
    assert synthetic.rule.effects and synthetic.rule.floors and "interval above 0" in str(synthetic.rule)
    if name == "dvme":  # what attention does is not in the claim
        claimed = {(effect.ours, effect.control) for effect in synthetic.rule.effects}
        assert ("dvme", "no_attention") not in claimed
        assert Effect("dvme", "no_attention") in synthetic.rule.beside
