"""Lightning with its defaults, on an accelerated network and on the network itself: the same numbers.

Validation, test and prediction run under `torch.inference_mode`; weights are averaged by callbacks and by
`torch.optim.swa_utils`, whose copies and statistics are those of the network.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exactness import errors, named
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import swa_utils
from torch.utils.data import DataLoader, TensorDataset

from gigamorph import Accelerated, accelerate

lightning = pytest.importorskip("lightning")
callbacks = pytest.importorskip("lightning.pytorch.callbacks")
LIMIT = 1e-12


class Net(nn.Module):
    """With live BatchNorm, one of which averages all batches."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=None))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.body(x)).relu().mean((2, 3)))


class Module(lightning.LightningModule):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.losses = network, []

    def loss(self, batch: Any, name: str) -> Tensor:
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.losses.append(loss.detach())
        self.log(name, loss)
        return loss

    def training_step(self, batch: Any) -> Tensor:
        return self.loss(batch, "train")

    def validation_step(self, batch: Any) -> None:
        self.loss(batch, "val")

    def test_step(self, batch: Any) -> None:
        self.loss(batch, "test")

    def predict_step(self, batch: Any) -> Tensor:
        return self.network(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def data() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 1, 37, 29, dtype=torch.float64, generator=generator)
    return DataLoader(TensorDataset(images, torch.tensor([0, 1, 2, 0, 1, 2])), batch_size=2)


def both() -> list[nn.Module]:
    torch.manual_seed(0)
    network = Net().double()
    return [network, accelerate(copy.deepcopy(network), tile=16)]


def agree(results: list[dict[str, Any]]) -> None:
    found = errors(*results)  # pyright: ignore[reportArgumentType]
    assert not {name: error for name, error in found.items() if not error <= LIMIT}


def trained(network: nn.Module, tmp_path: Any, **options: Any) -> dict[str, Tensor]:
    """All that fit, validate, test and predict give and leave."""
    module = Module(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            accelerator="cpu",
            precision="64-true",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            **{"max_epochs": 2, **options},
        )
        trainer.fit(module, data(), data())
        trainer.validate(module, data())
        trainer.test(module, data())
        predicted = trainer.predict(module, data())
    assert isinstance(network, Accelerated) == isinstance(module.network, Accelerated)
    assert all(t.is_inference() for t in predicted)
    state = {name: t.clone() for name, t in module.network.state_dict().items()}
    return named([*module.losses, *predicted]) | state  # pyright: ignore[reportReturnType]


CALLBACKS: dict[str, Callable[[], list[Any]]] = {
    "none": list,
    "EMA": lambda: [callbacks.EMAWeightAveraging(decay=0.8)],
    "averages": lambda: [callbacks.WeightAveraging(use_buffers=True)],
    "SWA": lambda: [callbacks.StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1, annealing_epochs=1)],
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_fit_validate_test_predict(name, tmp_path):
    epochs = 3 if name == "SWA" else 2
    agree([trained(n, tmp_path, callbacks=CALLBACKS[name](), max_epochs=epochs) for n in both()])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("training", [False, True])
def test_inference_mode(mode, training):
    """Outputs are inference tensors, running statistics change in training mode, and training goes on behind it."""
    results = []
    for network in both():
        network.train(training)
        with mode():
            out = network(data().dataset.tensors[0])
            assert out.is_inference() == (mode is torch.inference_mode)
            x = data().dataset.tensors[0] * 1  # an inference tensor itself
            again = network(x)
        loss = F.cross_entropy(network(data().dataset.tensors[0]), data().dataset.tensors[1])
        grads = torch.autograd.grad(loss, list(network.parameters()))
        results.append(named([out, again, loss.detach(), *grads]) | dict(network.named_buffers()))
    agree(results)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_model(use_buffers):
    """Its copy computes with the averaged weights, and `update_bn` gives it the statistics of the data."""
    results = []
    for network in both():
        average = swa_utils.AveragedModel(
            network, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.7), use_buffers=use_buffers
        )
        optimizer = torch.optim.SGD(network.parameters(), 0.05)
        for x, y in data():
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
            average.update_parameters(network)
        assert type(average.module) is type(network)
        first = average.eval()(x)
        swa_utils.update_bn(data(), average.train())
        state = {name: t.clone() for name, t in average.state_dict().items()}
        results.append(named([first, average.eval()(x)]) | state)
    agree(results)


@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_without_a_fit_before(what, tmp_path):
    """The network is recorded in inference mode."""
    results = []
    for network in both():
        module = Module(network)
        trainer = lightning.Trainer(
            accelerator="cpu", precision="64-true", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
        )
        found = getattr(trainer, what)(module, data())
        results.append(named([*module.losses, *(found if what == "predict" else ())]))
    agree(results)


@pytest.mark.parametrize("trained", [False, True])
def test_update_bn_of_the_network_itself(trained):
    """It takes the momentum away and gives it back; what was recorded with another one is not used."""
    results, images = [], data().dataset.tensors[0][:2]
    for network in both():
        for mode in (torch.enable_grad, torch.no_grad) if trained else ():
            with mode():
                network(images)
        swa_utils.update_bn(data(), network)
        averaged = {f"averaged {name}": b.clone() for name, b in network.named_buffers()}
        with torch.no_grad():
            network(images)
        results.append({**averaged, **dict(network.named_buffers())})
    agree(results)
