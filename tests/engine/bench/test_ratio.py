"""A regression is a ratio, not a time."""

from gigamorph.engine.bench import ratio


def test_a_ratio_far_above_the_saved_one_fails():
    assert ratio.judge("step", 1.29, None, {"step": 1.0}) is None
    assert "the saved ratio is 1.00" in (ratio.judge("step", 1.31, None, {"step": 1.0}) or "")
    assert ratio.judge("step", 9.0, None, {"other": 1.0}) is None


def test_a_limit_holds_whatever_was_saved():
    assert "above the limit of 1.3" in (ratio.judge("step", 1.4, 1.3, {"step": 1.4}) or "")


def test_ratios_are_kept_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(ratio, "SAVED", tmp_path / "ratios.json")
    assert ratio.load() == {}
    ratio.save("b", 1.23456)
    ratio.save("a", 2.0)
    assert list(ratio.load().items()) == [("a", 2.0), ("b", 1.235)]
