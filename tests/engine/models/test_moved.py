"""Networks that gigamorph 0.2 recorded in checkpoints and folders by modules that have moved since."""

import pytest

from gigamorph.engine.models.spec import Spec


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("gigamorph.engine.recipes.cae.alexnet:AlexNet", "gigamorph.engine.mammography.recipes.cae.alexnet"),
        ("gigamorph.engine.published.layouts.gmic:GlobalNetwork?a=1", "gigamorph.engine.mammography.layouts.gmic"),
        ("gigamorph.engine.mammography.layouts.gmic:GlobalNetwork", "gigamorph.engine.mammography.layouts.gmic"),
        ("gigamorph.engine.models:lesionnet", "gigamorph.engine.models"),
        ("mine.gigamorph.engine.recipes:net", "mine.gigamorph.engine.recipes"),
    ],
)
def test_modules_of_before_are_found(before: str, now: str) -> None:
    assert Spec.parse(before).kind == now
