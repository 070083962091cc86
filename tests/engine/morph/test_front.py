"""The front for larger images: child(x) against parent(downsample(x)), borders included."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from typing import Any

import pytest
import torch
from exactness import assert_exact, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from morph_networks import half_resnet
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph.engine.errors import MorphError
from gigamorph.engine.models import LesionNet
from gigamorph.engine.models.resnet import BasicBlock, ResNet
from gigamorph.engine.morph.front import front, plan_front
from gigamorph.engine.morph.stem import ImageReaders, find_stem, record, view

LIMIT = 1e-12
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def stem_of(network: nn.Module, example: torch.Tensor) -> ImageReaders:
    return find_stem(network, record(network, tuple(example.shape), example))


class Net(nn.Module):
    """Normalisation, a stem of any geometry, BatchNorm, ReLU and a convolution; gives the map."""

    def __init__(self, channels: int = 1, before: Any = None, **options: Any) -> None:
        super().__init__()
        self.before = before
        self.stem = nn.Conv2d(channels, 6, **{"kernel_size": 3, "stride": 2, "padding": 1, **options})
        self.bn = nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 4, 3, padding=1)
        self.register_buffer("mean", torch.full((1, channels, 1, 1), 0.4))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / 0.3 if self.before is None else self.before(x)
        return self.conv(F.relu(self.bn(self.stem(x))))


def net(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomize(Net(**options)).double().eval()


def error(parent: nn.Module, child: nn.Module, x: Tensor, small: Tensor) -> float:
    with torch.no_grad():
        want, have = parent(small), child(x)
    assert want.shape == have.shape
    return ((want - have).abs().max() / want.abs().max()).item()


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def stems(draw: Any) -> dict[str, Any]:
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    groups = draw(st.sampled_from([1, 1, 2]))
    options = {"kernel_size": kernel, "dilation": draw(pairs), "groups": groups, "bias": draw(st.booleans())}
    padding = draw(st.sampled_from(["number", "number", "same", "valid"]))
    options |= {"stride": 1 if padding == "same" else draw(pairs), "channels": 2 * draw(st.integers(1, 2))}
    options["padding"] = draw(st.tuples(st.integers(0, 4), st.integers(0, 4))) if padding == "number" else padding
    options["padding_mode"] = draw(st.sampled_from(["zeros", "zeros", "circular"]))
    return options


class TestExact:
    @settings(max_examples=30, deadline=None)
    @given(stems(), st.integers(2, 6), st.sampled_from(["fold", "stages"]), st.integers(13, 18), st.integers(13, 18))
    def test_any_stem(self, options: dict[str, Any], r: int, mode: str, height: int, width: int) -> None:
        parent = net(**options)
        stem = stem_of(parent, torch.zeros(1, options["channels"], 13, 13))
        assert stem.convs == ("stem",) and stem.plain == (True,)
        step = plan_front(parent, stem, options["channels"], r, mode, "area", filters=6, act="GELU", seed=0)
        child = step.repeat(copy.deepcopy(parent))
        x = torch.randn(2, options["channels"], r * height, r * width, dtype=torch.float64)
        assert error(parent, child, x, F.avg_pool2d(x, r)) <= LIMIT

    @settings(max_examples=6, deadline=None)
    @given(stems(), st.sampled_from([2, 3, 4]), st.sampled_from(["fold", "stages", "residual", "keep"]))
    def test_front_accepts_what_is_exact(self, options: dict[str, Any], r: int, mode: str) -> None:
        parent = net(**{**options, "dilation": 1})
        _, report = front(parent, torch.zeros(1, options["channels"], 13, 16), r, mode)
        assert report.difference.float64 <= LIMIT

    @pytest.mark.parametrize(
        ("mode", "r"),
        [(mode, r) for mode in ("fold", "residual") for r in (2, 4, 5)]
        + [("stages", r) for r in (2, 3, 4, 6)]
        + [("keep", r) for r in (3, 6)],
    )
    def test_bilinear(self, mode: str, r: int) -> None:
        parent, example = net(), torch.zeros(1, 1, 9, 12, dtype=torch.float64)
        if mode == "stages" and r == 4:
            with pytest.raises(MorphError, match="use mode='fold'"):
                front(parent, example, r, mode, downsample="bilinear")
            return
        child, _ = front(parent, example, r, mode, downsample="bilinear")
        x = torch.randn(2, 1, 9 * r, 12 * r, dtype=torch.float64)
        assert error(parent, child, x, F.interpolate(x, (9, 12), mode="bilinear")) <= LIMIT

    @pytest.mark.parametrize(("mode", "r"), [("residual", 2), ("residual", 7), ("keep", 3), ("keep", 7)])
    def test_antialias_is_kept(self, mode: str, r: int) -> None:
        parent, example = net(), torch.zeros(1, 1, 10, 7, dtype=torch.float64)
        child, report = front(parent, example, r, mode, downsample="antialias")
        x = torch.randn(2, 1, 10 * r, 7 * r, dtype=torch.float64)
        small = F.interpolate(x, (10, 7), mode="bilinear", antialias=True)
        assert error(parent, child, x, small) <= LIMIT
        assert any("the antialias downsampler" in line for line in report.changes)

    @pytest.mark.parametrize("r", [2, 4])
    def test_stored_weights_of_powers_of_two_are_exact(self, r: int) -> None:
        parent = net().float()
        child, _ = front(parent, torch.zeros(1, 1, 12, 12), r, "fold")
        cells = child.stem.weight.detach().double().reshape(6, 1, 3, r, 3, r)
        assert torch.equal(cells.sum((3, 5)), parent.stem.weight.detach().double())

    def test_float32_weights_of_other_factors_are_rounded_once(self) -> None:
        parent = net().float()
        child, _ = front(parent, torch.zeros(1, 1, 12, 12), 3, "fold")
        want = torch.kron(parent.stem.weight.double(), torch.ones(1, 1, 3, 3).double()) / 9
        assert torch.equal(child.stem.weight, want.float())

    @pytest.mark.parametrize("network", [lambda: half_resnet(3, 1, 8), lambda: LesionNet(num_classes=3)])
    @pytest.mark.parametrize("mode", ["fold", "stages", "residual"])
    def test_networks_in_both_modes(self, network: Any, mode: str) -> None:
        torch.manual_seed(0)
        parent = randomize(network()).double()
        child, report = front(parent, torch.zeros(2, 1, 48, 40, dtype=torch.float64), 4, mode)
        assert report.difference.float64_eval <= LIMIT
        assert report.difference.float64_train <= 1e-11
        assert child.training
        if mode == "residual":
            x = torch.randn(3, 1, 192, 160, dtype=torch.float64)
            with torch.no_grad():
                assert torch.equal(child(x), copy.deepcopy(parent)(F.avg_pool2d(x, 4)))

    @pytest.mark.parametrize("mode", ["fold", "stages", "residual", "keep"])
    def test_batch_norm_stays_frozen_where_it_was(self, mode: str) -> None:
        parent = net().train()
        parent.bn.eval()
        child, _ = front(parent, torch.zeros(1, 1, 12, 12, dtype=torch.float64), 2, mode)
        assert child.training and not child.bn.training and not parent.bn.training

    @pytest.mark.parametrize(
        ("name", "parts", "other"),
        [
            ("convnext_atto", "stem stages.0", "residual"),
            ("repvgg_a0", "stem stages.0", "stages"),
            ("tf_mobilenetv3_small_minimal_100", "conv_stem bn1 blocks.0", "stages"),
        ],
    )
    def test_timm(self, name: str, parts: str, other: str) -> None:
        """The first layers of networks, folded, and in one of the other modes."""
        timm = pytest.importorskip("timm")
        torch.manual_seed(0)
        whole = timm.create_model(name, num_classes=5)
        first = OrderedDict((part.replace(".", "_"), whole.get_submodule(part)) for part in parts.split())
        parent = randomize(nn.Sequential(first)).eval()
        for mode, r in (("fold", 2), (other, 4 if other == "stages" else 2)):
            if name.startswith("tf_") and mode == "fold":
                with pytest.raises(MorphError, match="'conv_stem' \\(Conv2dSame\\)"):
                    front(parent, torch.zeros(1, 3, 32, 32), r, mode)
                continue
            _, report = front(parent, torch.zeros(1, 3, 32, 32), r, mode)
            assert report.difference.float64_eval <= LIMIT

    @pytest.mark.slow
    @pytest.mark.skipif("GIGAMORPH_PROGRAMS" not in os.environ, reason="minutes; on request, as for random programs")
    @pytest.mark.parametrize(("r", "mode"), [(2, "fold"), (4, "stages")])
    @pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "efficientnet_b0", "repvgg_a0", "regnetx_002"])
    def test_timm_at_full_size(self, name: str, r: int, mode: str) -> None:
        """Acceptance A5: 2048 x 1536, in both modes, float32 within 8 times the parent's own noise."""
        timm = pytest.importorskip("timm")
        torch.manual_seed(0)
        parent = randomize(timm.create_model(name, num_classes=5, drop_path_rate=0.0)).eval()
        _, report = front(parent, torch.zeros(1, 3, 2048 // r, 1536 // r), r, mode)
        assert report.difference.float64 <= LIMIT and report.difference.noise_ratio <= 8
        print(f"{name}, r = {r}, {mode}: {report.difference}")


class TestScan:
    @pytest.mark.parametrize(("mode", "r"), [("fold", 2), ("stages", 2), ("residual", 2), ("keep", 2), ("stages", 4)])
    def test_tile_scan_is_exact(self, mode: str, r: int) -> None:
        torch.manual_seed(0)
        parent: Any = half_resnet(3, 1, 4)
        parent.layer2, parent.fc = nn.Identity(), nn.Linear(4, 3)
        randomize(parent).double().eval()
        child, _ = front(parent, torch.zeros(1, 1, 32, 48, dtype=torch.float64), r, mode)
        if mode == "residual":
            with torch.no_grad():
                child.conv1.front.gamma.fill_(0.5)  # the branch must count
        assert_exact(child.eval(), torch.randn(1, 1, 36 * r, 44 * r, dtype=torch.float64), tile=(40, 56))

    def test_tile_scan_is_exact_for_bilinear(self) -> None:
        child, _ = front(
            net(before=lambda x: x), torch.zeros(1, 1, 12, 12, dtype=torch.float64), 3, "keep", downsample="bilinear"
        )
        pooled = nn.Sequential(child, nn.AdaptiveAvgPool2d(1)).eval()
        assert_exact(pooled, torch.randn(1, 1, 51, 42, dtype=torch.float64), tile=(16, 16))


class TestTraining:
    def test_new_filters_learn_from_the_first_step(self) -> None:
        child, _ = front(net(), torch.zeros(1, 1, 12, 12, dtype=torch.float64), 4, "stages", filters=5)
        child(torch.randn(2, 1, 48, 48, dtype=torch.float64)).square().mean().backward()
        stem = child.stem.conv.weight
        assert torch.equal(stem[:, 1:], torch.zeros_like(stem[:, 1:]))
        assert (stem.grad.abs().amax((0, 2, 3)) > 0).all()
        for pact in (child.stem.front[1], child.stem.front[3]):
            assert (pact.a.grad[0].abs() > 0).all()  # the channel that carries the image, at a = 0
        assert len({tuple(row.flatten().tolist()) for row in child.stem.front[0].weight}) == 5

    def test_residual_gamma_learns_from_the_first_step(self) -> None:
        child, _ = front(net(), torch.zeros(1, 1, 12, 12, dtype=torch.float64), 4, "residual")
        child(torch.randn(2, 1, 48, 48, dtype=torch.float64)).square().mean().backward()
        assert (child.stem.front.gamma.grad.abs() > 0).all()

    def test_seed_alone_decides_the_filters(self) -> None:
        example = torch.zeros(1, 1, 12, 12, dtype=torch.float64)
        state = torch.random.get_rng_state()
        one, two, other = (front(net(), example, 4, seed=seed)[0].stem.front[0].weight for seed in (1, 1, 2))
        torch.random.set_rng_state(state)
        assert torch.equal(one, two) and not torch.equal(one, other)


class TestReport:
    def test_view_of_resnet(self) -> None:
        """11 pixels behind the first two layers; each 3 x 3 convolution adds twice the stride of its input."""
        whole = ResNet(BasicBlock, (1, 1, 1, 1), 3, 1, width=4)
        _, report = front(whole, torch.zeros(1, 1, 64, 64), 4, "fold", size=(256, 512))
        assert report.before.field == (195, 195) and report.before.stride == (32, 32)
        assert report.after.field == (780, 780) and report.after.stride == (128, 128)
        assert report.before.size == (64, 128) and report.after.size == (256, 512)
        assert "conv 'conv1'" in str(report) and "195 x 195" in str(report)
        _, chain = front(half_resnet(3, 1, 4), torch.zeros(1, 1, 64, 64), 4, "stages")
        assert chain.before.stride == (8, 8) and chain.after.stride == (32, 32)

    def test_activation_memory_is_what_autograd_keeps(self) -> None:
        model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1), nn.Sigmoid())
        # the image, the ReLU's output (once), the sigmoid's output; float32
        assert view(model, (1, 1, 10, 12), torch.zeros(1, 1, 10, 12)).activation_bytes == 4 * 120 * (1 + 4 + 2)

    def test_front_takes_less_than_the_parent_on_the_large_image(self) -> None:
        parent = half_resnet(3, 1, 32)
        _, report = front(parent, torch.zeros(1, 1, 64, 64), 4, "stages", size=(1024, 1024))
        large = view(parent, (1, 1, 1024, 1024), torch.zeros(1))
        assert report.before.activation_bytes < report.after.activation_bytes < large.activation_bytes / 2

    def test_inplace(self) -> None:
        for mode in ("fold", "stages", "residual"):
            model, example = net(), torch.zeros(1, 1, 12, 12, dtype=torch.float64)
            untouched = model.conv.weight
            expected, _ = front(model, example, 4, mode)
            child, _ = front(model, example, 4, mode, inplace=True)
            assert child is model and model.conv.weight is untouched
            for name, tensor in expected.state_dict().items():
                assert torch.equal(tensor, child.state_dict()[name]), name


class TestStem:
    def test_affine_steps_are_seen_through(self) -> None:
        grey = net(channels=3, before=lambda x: (1 - x.repeat(1, 3, 1, 1)).div_(2)[:, :3])
        stem = stem_of(grey, torch.zeros(1, 1, 12, 12))
        assert stem.convs == ("stem",) and stem.plain == (True,) and not stem.others
        assert stem.before == ("repeat", "rsub", "div", "getitem")
        for mode in ("fold", "stages", "residual"):
            child, _ = front(grey, torch.zeros(1, 1, 12, 12, dtype=torch.float64), 2, mode)
            x = torch.randn(2, 1, 24, 24, dtype=torch.float64)
            assert error(grey, child, x, F.avg_pool2d(x, 2)) <= LIMIT

    @pytest.mark.parametrize(
        "before",
        [
            torch.relu,
            lambda x: x * x,
            lambda x: 1 / (x + 9),
            lambda x: x.flip(3),
            lambda x: x.clamp(-1, 1),
            lambda x: x + torch.arange(12.0, dtype=x.dtype)[: x.shape[-1]],
            lambda x: x.floor_divide(2),
            lambda x: x.div(2, rounding_mode="floor"),
            lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        ],
    )
    def test_other_steps_are_not(self, before: Any) -> None:
        stem = stem_of(net(before=before), torch.zeros(1, 1, 12, 12, dtype=torch.float64))
        assert stem.others and not stem.convs

    def test_front_before_a_network_whose_first_step_is_not_affine(self) -> None:
        parent, example = net(before=torch.tanh), torch.zeros(1, 1, 12, 12, dtype=torch.float64)
        for mode in ("stages", "residual", "keep"):
            child, report = front(parent, example, 4, mode)
            x = torch.randn(2, 1, 48, 48, dtype=torch.float64)
            assert error(parent, child, x, F.avg_pool2d(x, 4)) <= LIMIT
            assert report.step.at == ()
        with pytest.raises(MorphError, match="'tanh' in the model"):
            front(parent, example, 4, "fold")

    def test_two_stems(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Conv2d(1, 3, 5, 2, 2), nn.Conv2d(1, 3, 1, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.a(x) + self.b(x)

        torch.manual_seed(0)
        parent = Two().double()
        child, report = front(parent, torch.zeros(1, 1, 12, 12, dtype=torch.float64), 3, "fold")
        x = torch.randn(2, 1, 36, 36, dtype=torch.float64)
        assert report.stem.convs == ("a", "b")
        assert error(parent, child, x, F.avg_pool2d(x, 3)) <= LIMIT

    def test_a_conv_alone_and_one_that_is_shared(self) -> None:
        torch.manual_seed(0)
        alone = nn.Conv2d(1, 3, 3, padding=1).double()
        x = torch.randn(2, 1, 24, 24, dtype=torch.float64)
        for mode in ("fold", "stages"):
            child, _ = front(alone, torch.zeros(1, 1, 12, 12, dtype=torch.float64), 2, mode)
            assert error(alone, child, x, F.avg_pool2d(x, 2)) <= LIMIT
        conv = nn.Conv2d(1, 1, 3, padding=1).double()
        twice = nn.Sequential(conv, nn.ReLU(), conv)
        with pytest.raises(MorphError, match="module '0'"):
            front(twice, torch.zeros(1, 1, 12, 12, dtype=torch.float64), 2, "fold")


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"r": 1}, "at least 2"),
            ({"r": 2.0}, "at least 2"),
            ({"mode": "stretch"}, "unknown mode='stretch'"),
            ({"downsample": "lanczos"}, "unknown downsample='lanczos'"),
            ({"size": (65, 48)}, "height 65 is not a multiple of r=2.*crop the image to 64 or pad it to 66"),
            ({"size": (64, 47)}, "width 47"),
            ({"mode": "fold", "downsample": "antialias"}, "antialiasing.*overlap.*mode='residual' or 'keep'"),
            ({"mode": "stages", "downsample": "antialias"}, "antialiasing.*overlap"),
            ({"filters": 0}, "filters=0"),
            ({"act": "Dropout"}, "Dropout"),
        ],
    )
    def test_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(MorphError, match=message) as caught:
            front(net(), torch.zeros(1, 1, 12, 12, dtype=torch.float64), **{"r": 2, **arguments})
        assert "\n" not in str(caught.value)

    def test_example(self) -> None:
        with pytest.raises(MorphError, match=r"\(N, C, H, W\)"):
            front(net(), torch.zeros(1, 12, 12), 2)

    @pytest.mark.parametrize("mode", ["reflect", "replicate"])
    def test_mirrored_padding(self, mode: str) -> None:
        parent, example = net(padding_mode=mode), torch.zeros(1, 1, 12, 12, dtype=torch.float64)
        with pytest.raises(MorphError, match=f"module 'stem' has padding_mode='{mode}'"):
            front(parent, example, 2, "fold")
        child, _ = front(parent, example, 2, "stages")  # the small image is there: nothing is folded
        x = torch.randn(2, 1, 24, 24, dtype=torch.float64)
        assert error(parent, child, x, F.avg_pool2d(x, 2)) <= LIMIT

    def test_computed_weight(self) -> None:
        parent = net()
        nn.utils.parametrizations.weight_norm(parent.stem)
        with pytest.raises(MorphError, match=r"module 'stem'.*stored weight"):
            front(parent, torch.zeros(1, 1, 12, 12, dtype=torch.float64), 2, "fold")

    def test_network_that_insists_on_its_size_or_module(self) -> None:
        class Fixed(Net):
            def forward(self, x: Tensor) -> Tensor:
                assert x.shape[-1] == 12, "12 pixels, please"
                return super().forward(x)

        class Nosy(Net):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) + self.stem.out_channels

        example = torch.zeros(1, 1, 12, 12)
        before = copy.deepcopy(Fixed()).state_dict()
        with pytest.raises(MorphError, match="12 pixels, please"):
            front(Fixed(), example, 2)
        with pytest.raises(MorphError, match="out_channels"):
            front(Nosy(), example, 2)
        model = Fixed()
        model.load_state_dict(before)
        with pytest.raises(MorphError):
            front(model, example, 2, inplace=True)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert isinstance(model.stem, nn.Conv2d)

    def test_wrong_child_is_caught(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The check is not for show: a fold with a wrong cell raises."""
        cell = lambda *_: torch.tensor([0.51, 0.49], dtype=torch.float64)  # noqa: E731
        monkeypatch.setattr("gigamorph.engine.morph.front.cell_weights", cell)
        for mode in ("fold", "stages"):
            with pytest.raises(MorphError, match="differs from its parent"):
                front(net(), torch.zeros(1, 1, 12, 12, dtype=torch.float64), 2, mode)
