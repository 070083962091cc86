import numpy as np
import pytest
import torch

from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.evaluate import odds
from gigamorph.engine.models.outputs import Head, Outputs

HEADS = Outputs((Head(("cancer",), "sigmoid", 1, "cancer"), Head(("A", "B", "C", "D"), "softmax", 4, "density")))


def test_several_heads_have_names_and_probabilities_of_their_own():
    assert HEADS.names == ["cancer", "density_A", "density_B", "density_C", "density_D"] and not HEADS.exclusive
    values = torch.tensor([[0.5, 1.0, -2.0, 3.0, 0.0], [-80.0, 0.0, 0.0, 90.0, 0.0]], dtype=torch.float64)
    found = torch.sigmoid(HEADS.log_odds(values))
    wanted = torch.cat([values[:, :1].sigmoid(), values[:, 1:].softmax(1)], 1)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    assert Outputs.from_json(HEADS.to_json()) == HEADS


@pytest.mark.parametrize("columns", [2, 5])
def test_a_softmax_is_what_it_was(columns):
    values = torch.randn(3, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs = Outputs.of("softmax", columns)
    np.testing.assert_allclose(outputs.log_odds(values).numpy(), odds.of_logits(values.numpy()), rtol=1e-12)
    assert outputs.exclusive and outputs.names == [str(i) for i in range(columns)]


def test_one_sigmoid_is_two_classes_and_several_are_labels():
    one = Outputs.of("sigmoid", 1)
    assert one.names == ["0", "1"] and one.exclusive and one.columns == 1
    assert one.log_odds(torch.tensor([[3.0]])).tolist() == [[-3.0, 3.0]]
    three = Outputs.of("sigmoid", 3, ("a", "b", "c"))
    assert not three.exclusive and three.log_odds(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[1.0, 2.0, 3.0]]
    given = Outputs((Head(("x", "y"), "probability", 2),))
    assert torch.sigmoid(given.log_odds(torch.tensor([[0.25, 0.5]]))).tolist() == [[0.25, 0.5]]
    assert not given.exclusive


def test_names_that_do_not_fit_are_refused():
    with pytest.raises(GigamorphError, match=r"3 names .* do not fit 2 outputs"):
        Outputs.of("softmax", 2, ("a", "b", "c"))
    with pytest.raises(GigamorphError, match="softmax of a single output is always 1"):
        Outputs.of("softmax", 1, ("a",))
    with pytest.raises(GigamorphError, match="'tanh' must be one of softmax, sigmoid"):
        Outputs.of("tanh", 1, ("a",))


def test_networks_of_exams_side_by_side_are_averaged_after_their_views_are_combined():
    """Of numbers each with the mean and spread of its own training images."""
    rows = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # views, 2 x (2 + 1)
    classes = Outputs.of("softmax", 2, ("a", "b"))
    one = Outputs(classes.heads, views="attention")
    two = Outputs(classes.heads, views="attention", members=(one, one))
    each = [one.log_odds(one.together(part)).sigmoid() for part in (rows[:, :3], rows[:, 3:])]
    assert torch.sigmoid(two.log_odds(two.together(rows))).allclose((each[0] + each[1]) / 2, atol=1e-15)
    alone = [one.log_odds(part).sigmoid() for part in (rows[:, :3], rows[:, 3:])]
    assert torch.sigmoid(two.log_odds(rows)).allclose((alone[0] + alone[1]) / 2, atol=1e-15)
    heads = [Head(("x",), "number", 1, center=(c,), spread=(s,)) for c, s in ((10.0, 2.0), (30.0, 5.0))]
    numbers = [Outputs((head,), views="mean") for head in heads]
    both = Outputs((heads[0],), views="mean", members=tuple(numbers))
    values = torch.tensor([[1.0, 0.0], [3.0, 2.0]], dtype=torch.float64)
    assert both.log_odds(both.together(values)).item() == ((10 + 2 * 2) + (30 + 5 * 1)) / 2
