"""end2end: what each stage trains, decays, and is stopped by."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from gigamorph.engine.config import parse_config
from gigamorph.engine.datasets.tables import Record
from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.evaluate import odds
from gigamorph.engine.mammography.recipes import default_text
from gigamorph.engine.mammography.recipes.classify import cross_entropy
from gigamorph.engine.mammography.recipes.end2end.config import End2EndConfig, Model
from gigamorph.engine.mammography.recipes.end2end.network import PatchNet, convert, features
from gigamorph.engine.mammography.recipes.end2end.train import PatchTask, _patch_key
from gigamorph.engine.train.optimizers import make_optimizer
from gigamorph.engine.train.stages import freeze, trainable_names
from gigamorph.engine.train.target import Target


def test_stage_tables_by_name():
    """The 46 top layers of Keras' ResNet-50 are block 4f, stage 5 and the head."""
    config = End2EndConfig()
    with torch.device("meta"):
        patch = PatchNet(features("resnet50", 3), 2048)
        whole = convert(patch, config.models[0])
    head, top, both = (set(trainable_names(patch, stage)) for stage in config.patch)
    assert head == {"head.1.weight", "head.1.bias"}
    blocks = {".".join(name.split(".")[1:3]) for name in top - head}
    assert blocks == {"layer3.5", "layer4.0", "layer4.1", "layer4.2"}
    convs = [
        m
        for n, m in patch.named_modules()
        if isinstance(m, torch.nn.Conv2d) and n.startswith(("features.layer3.5", "features.layer4"))
    ]
    assert len(convs) == 3 + 3 * 3 + 1  # 3 of 4f; 5a to 5c, and 5a's projection
    assert both == {name for name, _ in patch.named_parameters()}
    first, second = (set(trainable_names(whole, stage)) for stage in config.whole)
    assert first == {name for name in second if name.startswith(("top.", "head."))} and first < second
    assert [(s.lr, s.epochs) for s in config.patch] == [(1e-3, 3), (1e-4, 10), (1e-5, 37)]
    assert [(s.lr, s.epochs) for s in config.whole] == [(1e-4, 30), (1e-5, 20)]


@pytest.mark.parametrize(
    ("stages", "published"), [("patch", [1e-2, 1e-4, 1e-4]), ("whole", [1e-3, 1e-2]), ("transfer", [1e-2])]
)
def test_decay_is_twice_the_l2_of_keras_and_none_is_on_the_backbone(stages, published):
    """Keras' penalty is lambda w^2, whose gradient is 2 lambda w; torch's Adam adds weight_decay w."""
    config = End2EndConfig()
    with torch.device("meta"):
        patch = PatchNet(features("resnet50", 3), 2048)
        net = patch if stages == "patch" else convert(patch, config.models[0])
    named = {parameter: name for name, parameter in net.named_parameters()}
    for stage, penalty in zip(getattr(config, stages), published, strict=True):
        freeze(net, stage)
        for group in make_optimizer(net, stage).param_groups:
            parts = {named[parameter].split(".")[0] for parameter in group["params"]}
            assert not group["weight_decay"] or (group["weight_decay"] == 2 * penalty and "features" not in parts)
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    (penalty * w**2).backward()
    assert w.grad.item() == pytest.approx(stage.weight_decay)


def test_score_chooses_and_the_validation_loss_stops():
    """Accuracy or area choose the epoch; patience goes by the mean cross-entropy."""
    z = torch.tensor([[2.0, 0.0], [0.5, 1.0], [0.0, 3.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1])
    records = [Record(f"{i}.npy", int(label), f"p{i}") for i, label in enumerate(labels)]
    cases = Target(("no", "yes")).cases(records, odds.of_logits(z.numpy()))
    assert cross_entropy(cases) == pytest.approx(F.cross_entropy(z, labels).item())
    three = torch.randn(3, 3, dtype=torch.float64)
    cases = Target(("a", "b", "c")).cases(records, odds.of_logits(three.numpy()))
    assert cross_entropy(cases) == pytest.approx(F.cross_entropy(three, labels).item())
    patches = [(torch.full((1, 4, 4), float(i)), i % 3) for i in range(5)]
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(1, 5))
    score = PatchTask(net, patches, patches, 2).score()
    logits, truth = net(torch.stack([x for x, _ in patches])), torch.tensor([y for _, y in patches])
    assert score.value == (logits.argmax(1) == truth).double().mean()
    assert score.stop == pytest.approx(-F.cross_entropy(logits, truth).item(), rel=1e-5)


def test_patch_stages_of_each_backbone():
    """The 11 top layers of Keras' VGG-16 are its blocks 4 and 5; as in the comment of the configuration."""
    text = default_text("end2end")
    start = text.index("# [[models]]")
    shown = "\n".join(line.removeprefix("# ") for line in text[start:].splitlines() if line.startswith("# "))
    config = parse_config(text[: text.index("[[models]]")] + shown, End2EndConfig, "end2end.toml")
    vgg, hybrid = config.models
    assert [stage.epochs for stage in vgg.patch] == [3, 10, 37] and not hybrid.patch
    assert [block.kind for block in vgg.blocks + hybrid.blocks] == ["vgg", "vgg", "residual", "residual"]
    assert _patch_key(vgg) == _patch_key(hybrid) != _patch_key(Model())
    with pytest.raises(GigamorphError, match="'hybrid': its patch network is that of an earlier model"):
        End2EndConfig(models=(vgg, replace(hybrid, patch=vgg.patch)))
    with torch.device("meta"):
        patch = PatchNet(features(vgg.backbone, 3), 512)
    top = set(trainable_names(patch, vgg.patch[1])) - set(trainable_names(patch, vgg.patch[0]))
    convs = [name for name in top if name.endswith("weight")]
    assert len(convs) == 6 and all(patch.get_parameter(name).shape[0] == 512 for name in convs)
