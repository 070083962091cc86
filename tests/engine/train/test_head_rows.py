"""Fine-tuning a network of the same classes in another order: each row of the last layer goes to its class."""

import copy
import json
import logging
from dataclasses import replace

import pytest
import torch

from gigamorph.engine.errors import DataError
from gigamorph.engine.models import create_model
from gigamorph.engine.models.folder import Description, Preprocessing, write_description
from gigamorph.engine.models.outputs import Outputs
from gigamorph.engine.models.reference import Reference
from gigamorph.engine.models.weights import sha256
from gigamorph.engine.train.network import start_from
from gigamorph.engine.train.target import Target

ABC = Target(("a", "b", "c"))


def network(width: int) -> torch.nn.Module:
    return create_model("training:normed", width, 1)


@pytest.fixture
def began(tmp_path):
    """Of each kind of target a checkpoint as train writes it, and the last layer in it."""

    def write(target):
        torch.manual_seed(1)
        own = network(target.width)
        record = {"classes": list(target.names), "target": target.to_plain()}
        path = tmp_path / "best.ckpt"
        torch.save({"state_dict": {f"net.{k}": v for k, v in own.state_dict().items()}, "gigamorph": record}, path)
        return path, own[9]

    return write


@pytest.mark.parametrize("kind", ["classes", "labels", "numbers"])
def test_rows_go_to_the_classes_of_the_same_name(began, kind):
    measured = {"center": (0.0,) * 3, "spread": (1.0,) * 3} if kind == "numbers" else {}
    path, head = began(Target(("c", "a", "b"), kind, **measured))
    own = network(3)
    start_from(own, path, Target(("a", "b", "c"), kind, **measured))
    assert torch.equal(own[9].weight, head.weight[[1, 2, 0]]) and torch.equal(own[9].bias, head.bias[[1, 2, 0]])
    assert own[9].weight.requires_grad


def test_attention_stays_the_last_row(began):
    path, head = began(Target(("b", "a"), views="attention"))
    own = network(3)
    start_from(own, path, Target(("a", "b"), views="attention"))
    assert torch.equal(own[9].weight, head.weight[[1, 0, 2]])


def test_a_class_that_the_weights_do_not_know_has_a_new_row(began, caplog):
    path, head = began(Target(("c", "a", "d")))
    own = network(3)
    built = own[9].weight.detach().clone()
    with caplog.at_level(logging.WARNING, "gigamorph"):
        start_from(own, path, ABC)
    assert torch.equal(own[9].weight, torch.stack([head.weight[1], built[1], head.weight[0]]))
    assert "has no class b; its rows of the last layer are new" in caplog.text


def test_rows_of_other_classes_keep_their_order_and_are_told(began, caplog):
    path, head = began(Target(("x", "y", "z")))
    own = network(3)
    with caplog.at_level(logging.WARNING, "gigamorph"):
        start_from(own, path, ABC)
    assert torch.equal(own[9].weight, head.weight)
    assert "the last layer of x, y, z initialises that of a, b, c, in this order" in caplog.text


def test_another_order_of_grades_is_refused(began):
    path, _ = began(Target(("low", "middle", "high"), "ordinal"))
    with pytest.raises(
        DataError, match=r'its classes are low < middle < high, not high < .*=\["low", "middle", "high"'
    ):
        start_from(network(2), path, Target(("high", "low", "middle"), "ordinal"))
    start_from(network(2), path, Target(("low", "middle", "high"), "ordinal"))


def test_a_folder_of_an_import_says_its_classes_too(tmp_path):
    from safetensors.torch import save_file

    given = network(3)
    save_file(given.state_dict(), tmp_path / "model.safetensors")
    described = Description("training:normed", Outputs.of("softmax", 3, ("c", "a", "b")), Preprocessing())
    digest = {"weights_sha256": sha256(tmp_path / "model.safetensors")}
    write_description(tmp_path, replace(described, source=digest))
    image, rounded = torch.rand(1, 1, 64, 64), copy.deepcopy(given).float().eval()
    with torch.no_grad():
        Reference(image, rounded(image), given.eval()(image.double())).write(tmp_path)
    assert json.loads((tmp_path / "model.json").read_text())["outputs"][0]["classes"] == ["c", "a", "b"]
    for weights in (tmp_path, tmp_path / "model.safetensors"):
        own = network(3)
        start_from(own, weights, ABC)
        assert torch.equal(own[9].weight, given[9].weight[[1, 2, 0]])  # pyright: ignore[reportIndexIssue]
