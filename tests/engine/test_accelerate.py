"""`accelerate` from the outside: it behaves as the network it was made from, in everything that people do with one."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from ddp_worker import steps
from exactness import LIMIT, assert_exact, errors, named, randomize, step, step_errors
from processes import in_processes
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import Accelerated, GigamorphError, TileEvent, UnsupportedError, accelerate
from gigamorph.engine.errors import ChangedError


class VectorOp(nn.Module):
    """A residual network with everything that has state: convolutions, BatchNorm, a head."""

    def __init__(self, classes: int = 3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.head = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.pool(F.relu(x + self.block(x)))
        return self.head(x.mean((2, 3)))

    def features(self) -> int:
        return self.head.in_features


def vector(seed: int = 0) -> VectorOp:
    torch.manual_seed(seed)
    return randomize(VectorOp(), seed).double().eval()  # pyright: ignore


def image(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape or (2, 1, 37, 29), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def worst(expected: dict, got: dict) -> float:
    return max(errors(expected, got).values())


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


# -- the module ---------------------------------------------------------------------------------------------------


def test_same_parameters_and_keys():
    model = vector()
    fast = accelerate(model, tile=16)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert [(n, id(p)) for n, p in fast.named_parameters()] == [(n, id(p)) for n, p in model.named_parameters()]
    assert [n for n, _ in fast.named_buffers()] == [n for n, _ in model.named_buffers()]
    assert [n for n, _ in fast.named_modules()] == [n for n, _ in model.named_modules()]
    assert fast.features() == 4 and fast.head is model.head


def test_load_state_dict():
    model, other = vector(0), vector(1)
    fast = accelerate(model, tile=16)
    fast.load_state_dict(other.state_dict())
    assert worst(named([other(image())]), named([fast(image())])) <= LIMIT


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how):
    fast = accelerate(vector(), tile=16, halos="host", batch_norm="frozen")
    before = fast(image())
    if how == "deepcopy":
        twin = copy.deepcopy(fast)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(fast))
    else:
        file = io.BytesIO()
        torch.save(fast, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert isinstance(twin, Accelerated)
    assert (twin.tile, twin.halos, twin.batch_norm) == (fast.tile, fast.halos, fast.batch_norm)
    with torch.no_grad():
        twin.head.weight.add_(1)
    assert torch.equal(fast(image()), before)
    assert not torch.equal(twin(image()), before)
    twin(image()).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert all(p.grad is None for p in fast.parameters())


def test_to():
    model = vector()
    fast = accelerate(model, tile=16).to(torch.float32)
    assert next(fast.parameters()).dtype == torch.float32
    assert fast(image().float()).dtype == torch.float32
    assert fast.to(torch.float64)(image()).dtype == torch.float64


def test_twice():
    with pytest.raises(GigamorphError, match="already accelerated"):
        accelerate(accelerate(vector()))


def test_frozen_batch_norm():
    model = vector()
    reference = copy.deepcopy(model)
    fast = accelerate(model.train(), tile=16, batch_norm="frozen").train()
    assert fast.training and fast.stem.training and not fast.stem[1].training
    before = {k: v.clone() for k, v in fast.state_dict().items()}
    assert not [n for n, e in step_errors(step(reference.eval(), image()), step(fast, image())).items() if e > LIMIT]
    assert all(torch.equal(v, before[k]) for k, v in fast.state_dict().items())
    fast.eval()
    assert not fast.training and not fast.stem.training
    fast.train()
    assert not fast.block[1].training, "train() must not thaw"


def test_modes_are_not_mixed_up():
    """Programs are remembered per size and mode; a change of mode must not use the other mode's program."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1)).double()
    fast = accelerate(model, tile=8)
    x = image()
    fast.train()
    assert not torch.equal(fast(x), fast(x))
    fast.eval()
    assert torch.equal(fast(x), fast(x))


def test_several_sizes_with_one_module():
    fast, model = accelerate(vector(), tile=16), vector()
    for shape in ((1, 1, 37, 29), (2, 1, 16, 16), (1, 1, 5, 61), (1, 1, 37, 29)):
        assert worst(named([model(image(*shape))]), named([fast(image(*shape))])) <= LIMIT


def test_plan_of_a_norm_before_its_convolution():
    """Such a norm is not folded (DenseNet, pre-activation ResNets)."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1))
    assert accelerate(model.eval(), tile=16).plan_for((1, 1, 33, 33)).tile == (16, 16)


def test_progress():
    events: list[TileEvent] = []
    fast = accelerate(vector(), tile=16)
    fast.on_tile = events.append
    fast(image()).sum().backward()
    assert [(e.phase, e.done, e.total) for e in events] == [
        (phase, done, 6) for phase in ("forward", "backward") for done in range(1, 7)
    ]
    assert sum(e.pixels for e in events) == 2 * 2 * 37 * 29


# -- gradients ----------------------------------------------------------------------------------------------------


def test_gradients_are_accumulated():
    model = vector()
    fast = accelerate(copy.deepcopy(model), tile=16)
    for seed in range(3):
        for network in (model, fast):
            network(image(2, 1, 37, 29, seed=seed)).square().sum().backward()
    assert worst(gradients(model), gradients(fast)) <= LIMIT


def test_no_grad_keeps_nothing():
    fast = accelerate(vector(), tile=16)
    with torch.no_grad():
        result = fast(image().requires_grad_())
    assert not result.requires_grad
    with torch.inference_mode():
        assert torch.equal(fast(image()), result)


def test_gradient_of_the_image_alone():
    model = vector().requires_grad_(False)
    fast = accelerate(copy.deepcopy(model), tile=16)
    x, twin = image().requires_grad_(), image().requires_grad_()
    model(x).square().sum().backward()
    fast(twin).square().sum().backward()
    assert worst({"image": x.grad}, {"image": twin.grad}) <= LIMIT
    assert all(p.grad is None for p in fast.parameters())


@pytest.mark.parametrize("trained", [["head"], ["block", "head"], ["stem.1"], ["stem.0"], []])
def test_partly_frozen(trained):
    model = vector()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(name.startswith(part) for part in trained))
    fast = accelerate(copy.deepcopy(model), tile=16)
    if not trained:
        assert not fast(image()).requires_grad
        return
    for network in (model, fast):
        network(image()).square().sum().backward()
    assert worst(gradients(model), gradients(fast)) <= LIMIT
    for name, parameter in fast.named_parameters():
        assert (parameter.grad is not None) == any(name.startswith(part) for part in trained)


def test_thawing_later():
    fast, model = accelerate(vector().requires_grad_(False), tile=16), vector()
    fast(image())
    fast.requires_grad_(True)
    for network in (model, fast):
        network(image()).square().sum().backward()
    assert worst(gradients(model), gradients(fast)) <= LIMIT


@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), torch.optim.AdamW])
def test_optimizer_steps(optimizer):
    model = vector()
    fast = accelerate(copy.deepcopy(model), tile=16)
    losses = []
    for network in (model, fast):
        rule, curve = optimizer(network.parameters()), []
        for seed in range(3):
            rule.zero_grad()
            loss = F.cross_entropy(network(image(2, 1, 37, 29, seed=seed)), torch.tensor([0, 2]))
            loss.backward()
            rule.step()
            curve.append(loss.detach())
        losses.append(curve)
    assert worst(named(losses[0]), named(losses[1])) <= 1e-11  # three steps of Adam divide by small gradients
    assert worst(dict(model.named_parameters()), dict(fast.named_parameters())) <= 1e-9


def test_weights_changed_before_backward():
    fast = accelerate(vector(), tile=16)
    loss = fast(image()).sum()
    with torch.no_grad():
        fast.stem[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("name", ["stem.0.weight", "stem.1.weight"])
def test_weights_replaced_before_backward(name, live):
    """PyTorch counts no change of theirs. The convolution may be folded with its norm, and the weight be frozen."""
    fast = accelerate(vector().train(live), tile=16)
    weight = fast.get_parameter(name).requires_grad_(live)
    before = weight.data
    loss = fast(image()).sum()
    weight.data = 2 * before
    with pytest.raises(ChangedError, match=r"shape \[.*\] was replaced .* after the forward"):
        loss.backward()
    weight.data = before
    fast(image()).sum().backward()


def test_image_changed_before_backward():
    fast, x = accelerate(vector(), tile=16), image()
    loss = fast(x).sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_two_forwards_before_backward():
    model = vector()
    fast = accelerate(copy.deepcopy(model), tile=16)
    for network in (model, fast):
        (network(image()) * network(image(1, 1, 20, 50, seed=2))).sum().backward()
    assert worst(gradients(model), gradients(fast)) <= LIMIT


def test_retain_graph():
    model = vector()
    fast = accelerate(copy.deepcopy(model), tile=16)
    for network in (model, fast):
        loss = network(image()).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert worst(gradients(model), gradients(fast)) <= LIMIT
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_second_derivatives_are_refused():
    fast, x = accelerate(vector(), tile=16), image().requires_grad_()
    (grad,) = torch.autograd.grad(fast(x).square().sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivatives"):
        grad.sum().backward()


def test_only_some_outputs_used():
    class Two(VectorOp):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.pool(self.stem(x))
            return {"map": self.block(y), "logits": self.head(y.mean((2, 3))), "peak": y.amax((2, 3))}

    for key in ("map", "logits", "peak"):
        model = randomize(Two()).double().eval()
        fast = accelerate(copy.deepcopy(model), tile=16)
        for network in (model, fast):
            network(image())[key].square().sum().backward()
        assert worst(gradients(model), gradients(fast)) <= LIMIT


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu()).mean((2, 3))

    assert_exact(Tied().double(), image(1, 2, 19, 23), tile=7)


def test_computed_weights():
    """Weight standardisation and layer scales are small ops: ordinary autograd goes through them."""

    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            w = self.weight
            w = F.batch_norm(w.reshape(1, w.shape[0], -1), None, None, training=True, momentum=0.0).reshape_as(w)
            return F.conv2d(x, w, self.bias, padding=1)

    model = nn.Sequential(Standardised(2, 4, 3), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 3, 3)))
    assert_exact(nn.Sequential(model, nn.AdaptiveAvgPool2d(1)).double(), image(1, 2, 19, 23), tile=7)


# -- autocast -----------------------------------------------------------------------------------------------------


def test_gradients_under_autocast_are_not_rounded():
    """Weights are cast once for all tiles, and their gradients summed in float32: that is what the parameters get."""
    net = accelerate(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), tile=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = net(torch.randn(1, 1, 40, 40))
    output.float().sum().backward()
    grad = net[0].weight.grad
    assert grad.dtype == torch.float32 and not torch.equal(grad, grad.bfloat16().float())


def test_autocast():
    model = vector().float()
    fast = accelerate(copy.deepcopy(model), tile=16)
    results = []
    for network in (model, fast):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = network(image().float())
        assert output.dtype == torch.bfloat16
        output.float().square().sum().backward()
        results.append(output)
    assert torch.allclose(results[0], results[1], atol=0.05)
    for name, parameter in fast.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        expected = model.get_parameter(name).grad
        assert expected is not None
        assert torch.allclose(parameter.grad, expected, atol=0.05 * expected.abs().max().item() + 1e-3), name


# -- pixel sources ------------------------------------------------------------------------------------------------


class Source:
    """A pixel source that remembers what was read."""

    def __init__(self, height: int, width: int, seed: int = 0):
        self.pixels = torch.randn(1, height, width, generator=torch.Generator().manual_seed(seed))
        self.shape = (1, height, width)
        self.name = f"source {seed}"
        self.largest = 0

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        self.largest = max(self.largest, (bottom - top) * (right - left))
        return self.pixels[:, top:bottom, left:right].clone()


@pytest.mark.parametrize("sizes", [[(37, 29)], [(37, 29), (37, 29)], [(37, 29), (20, 50), (8, 8)]])
def test_pixel_sources(sizes):
    model = vector()
    fast = accelerate(copy.deepcopy(model), tile=16)
    sources = [Source(h, w, i) for i, (h, w) in enumerate(sizes)]
    stock = torch.cat([model(source.pixels[None].double()) for source in sources])
    tiled = fast(sources if len(sources) > 1 else sources[0])
    stock.square().sum().backward()
    tiled.square().sum().backward()
    assert worst(named([stock.detach()]), named([tiled.detach()])) <= LIMIT
    assert worst(gradients(model), gradients(fast)) <= LIMIT
    assert all(0 < source.largest <= 18 * 18 for source in sources), "sources are read tile by tile"


def test_not_an_image():
    with pytest.raises(GigamorphError, match="pixel source"):
        accelerate(vector())("image.png")


# -- the company it keeps -----------------------------------------------------------------------------------------


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, network: nn.Module):
            super().__init__()
            self.network = network

        def training_step(self, batch):
            x, y = batch
            return F.cross_entropy(self.network(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data = torch.utils.data.TensorDataset(
        torch.cat([image(1, 1, 37, 29, seed=i) for i in range(4)]), torch.tensor([0, 1, 2, 0])
    )
    weights = []
    for network in (vector(), accelerate(vector(), tile=16, batch_norm="frozen")):
        trainer = lightning.Trainer(
            max_steps=2,
            accelerator="cpu",
            precision="64-true",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        module = Module(network)
        if not isinstance(network, Accelerated):
            network.stem[1].eval(), network.block[1].eval()
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
        assert trainer.global_step == 2
        weights.append({k: v.clone() for k, v in network.state_dict().items() if v.is_floating_point()})
    assert worst(weights[0], weights[1]) <= 1e-11


def test_two_processes_with_ddp(tmp_path):
    [[(first, alone), (second, _)]] = in_processes(2, tmp_path, [(steps,)])
    assert worst(first, second) == 0
    assert worst(alone, first) <= LIMIT


def test_frozen_layers_stay_frozen() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1)).train()
    model[1].eval()
    net = accelerate(model, tile=16)
    assert net.training and not model[1].training
    before = model[1].running_mean.clone()
    net(torch.randn(1, 1, 40, 40))
    assert torch.equal(before, model[1].running_mean)


def test_the_former_name_of_the_fallback_works_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match='fallback="whole" is now fallback="untiled"'):
        net = accelerate(nn.Conv2d(1, 2, 3), fallback="whole")
    assert net._settings.fallback == "untiled"
    with pytest.raises(GigamorphError, match=r'fallback must be "untiled" or None, not .all.'):
        accelerate(nn.Conv2d(1, 2, 3), fallback="all")
