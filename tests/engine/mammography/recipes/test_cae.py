"""Zero-bias auto-encoders: published shapes, homogeneity, adjoint decoders; the recipe on files, killed and resumed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from killed import killed_at

from gigamorph.engine.config import parse_config
from gigamorph.engine.datasets.tables import Record, write_table
from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.evaluate.read import read_cases
from gigamorph.engine.evaluate.roc import auc
from gigamorph.engine.mammography.recipes import default_text
from gigamorph.engine.mammography.recipes.cae import CaeConfig, train
from gigamorph.engine.mammography.recipes.cae.autoencoder import MODES, ConvAutoEncoder, Stack
from gigamorph.engine.mammography.recipes.cae.svm import fit_svm, measure_svm
from gigamorph.engine.mammography.recipes.cae.train import Reconstruction, fit_stack
from gigamorph.engine.mammography.recipes.features import UpTo
from gigamorph.engine.models import create_model
from gigamorph.engine.train.run import Run

SMALL = CaeConfig(
    weights="random",
    model="resnet18",
    layer="layer1",
    channels=1,
    mean=(0.5,),
    std=(0.25,),
    resize=(32, 24),
    code_channels=(6,),
    epochs=2,
    batch_size=3,
)


def test_published_structure():
    with torch.device("meta"):
        layer = ConvAutoEncoder(256, 4096)
        net = create_model(CaeConfig().model, 1000, 3)
        maps = UpTo(net, CaeConfig().layer)(torch.empty(2, 3, 227, 227))
    # 3 x 3 filters 256 -> 4096 and back, and a bias for each output.
    assert sum(p.numel() for p in layer.parameters()) == 2 * 9 * 256 * 4096 + 4096 + 256 == 18_878_720
    assert sum(p.numel() for p in net.parameters()) == 61_100_840  # AlexNet
    assert maps.shape == (2, 256, 6, 6)
    code, _ = layer.encode(maps)
    assert code.shape == (2, 4096, 3, 3)


def test_config_file_holds_the_defaults():
    assert parse_config(default_text("cae"), CaeConfig, "cae.toml") == CaeConfig()


def test_stacked_codes_halve_the_maps():
    stack, x = Stack(5, (7, 4), feature="code"), torch.randn(1, 5, 36, 28)
    assert stack(x, 1).shape == (1, 7, 18, 14) and stack(x).shape == (1, 4, 9, 7)
    assert Stack(5, (7, 4), feature="reconstruction")(x).shape == x.shape


# ------------------------------------------------------------------------------------------------------- homogeneity


@given(
    st.sampled_from(["zero_bias_encode", "trec", "tlin"]),
    st.sampled_from(["code", "reconstruction"]),
    st.integers(1, 2),
    st.integers(4, 9),
    st.integers(4, 9),
    st.integers(-20, 20),
    st.booleans(),
)
def test_zero_bias_encoding_is_positively_homogeneous_to_the_last_bit(mode, feature, depth, height, width, power, tied):
    torch.manual_seed(height * 100 + width)
    stack = Stack(3, (5,) * depth, feature=feature, mode=mode, tied=tied).double()
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter)  # biases too, where the mode trains with them
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    # A power of two is exact in every product and sum.
    assert torch.equal(stack(x * 2.0**power), stack(x) * 2.0**power)
    torch.testing.assert_close(stack(x * 1.7), stack(x) * 1.7, rtol=1e-12, atol=1e-12)
    assert stack(x).abs().max() > 0


def test_bias_and_threshold_are_not_homogeneous():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6).double()
    biased = ConvAutoEncoder(3, 5, mode="relu_bias").double()
    torch.nn.init.normal_(biased.bias)
    assert not torch.allclose(biased.encode(2 * x)[0], 2 * biased.encode(x)[0])
    for mode in ("trec", "tlin"):
        layer = ConvAutoEncoder(3, 5, mode=mode).double()
        assert not torch.allclose(layer.encode(2 * x, training=True)[0], 2 * layer.encode(x, training=True)[0])
        assert torch.allclose(layer.encode(2 * x)[0], 2 * layer.encode(x)[0])


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_tied_decoder_is_the_adjoint_of_the_encoder(kernel):
    torch.manual_seed(0)
    layer = ConvAutoEncoder(3, 5, kernel, mode="tlin", tied=True, pool=1).double()
    x, y = torch.randn(2, 3, 7, 6).double(), torch.randn(2, 5, 7, 6).double()
    code, places = layer.encode(x)
    assert places is None
    torch.testing.assert_close((code * y).sum(), (x * layer.decode(y, None, (7, 6))).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(7, 5), (6, 4), (4, 9)])
def test_reconstruction_has_the_size_of_the_maps(mode, size):
    layer, x = ConvAutoEncoder(3, 5, mode=mode), torch.randn(2, 3, *size)
    assert layer(x).shape == x.shape
    with pytest.raises(GigamorphError, match="smaller than the pooling"):
        layer.encode(torch.randn(2, 3, 1, 4))


def test_greedy_layers_get_no_gradient_from_above():
    stack = Stack(3, (5, 5), feature="reconstruction")
    stack.layer_loss(torch.rand(2, 3, 6, 6), 1).backward()
    assert all(p.grad is None for p in stack.layers[0].parameters())
    assert stack.layers[1].weight.grad.abs().sum() > 0


def test_error_falls_below_that_of_the_best_linear_code_of_fewer_values():
    torch.manual_seed(0)
    basis = torch.randn(4, 6).clamp(min=0)
    maps = torch.einsum("nkhw,kc->nchw", torch.rand(64, 4, 4, 4), basis)
    rows = maps.permute(0, 2, 3, 1).reshape(-1, 6)
    two = torch.linalg.svdvals(rows - rows.mean(0))[2:].square().sum() / rows.numel()
    stack = Stack(6, (16,), feature="code", pool=1, kernel=1)
    optimizer = torch.optim.Adam(stack.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        loss = stack.joint_loss(maps)
        loss.backward()
        optimizer.step()
    assert loss < two


def test_unknown_settings_are_refused():
    for bad in ({"mode": "relu"}, {"kernel": 2}, {"pool": 0}):
        with pytest.raises(GigamorphError):
            ConvAutoEncoder(3, 5, **bad)
    with pytest.raises(GigamorphError, match="feature"):
        Stack(3, (5,), feature="maps")
    with pytest.raises(GigamorphError, match="several sizes"):
        CaeConfig(resize=())


# ------------------------------------------------------------------------------------------------------------- SVMs


def test_svm_of_classes_with_gaps_and_choice_of_c():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 2, 3], 20)
    features = rng.normal(size=(60, 4)) + 3 * labels[:, None]
    patients = np.arange(60) // 2
    model = fit_svm(features, labels, patients, kernel="linear", c=(0.01, 1.0), folds=3)
    found = measure_svm(model, features, labels)
    assert found["accuracy"] > 0.9 and found["auc"] > 0.95 and found["c"] in (0.01, 1.0)
    with pytest.raises(DataError, match="only one class"):
        fit_svm(features, np.zeros(60), patients, kernel="linear", c=(1.0,))
    with pytest.raises(DataError, match="30 patients cannot be split into 40 folds"):
        fit_svm(features, labels, patients, kernel="linear", c=(0.1, 1.0), folds=40)
    with pytest.raises(DataError, match="fold 1 of 2 has training images of only one class"):
        fit_svm(features[:40], labels[:40], (labels[:40] > 0) * 7, kernel="linear", c=(0.1, 1.0), folds=2)


# ------------------------------------------------------------------------------------------------------- the recipe


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    records = []
    for index in range(12):
        path = folder / f"{index}.npy"
        values = rng.random((40, 30)) * 0.5
        values[10:20, 10:20] += 0.4 * (index % 2)
        np.save(path, values.astype(np.float32))
        records.append(
            Record(path, index % 2, f"P{index // 2 * 2 + index % 2}", ("train", "train", "test")[index // 4])
        )
    return write_table(folder / "table.csv", records, ["0", "1"])


def _stack(folder, name="last.ckpt"):
    return torch.load(folder / name, weights_only=True)["state_dict"]


@pytest.mark.parametrize("training", ["joint", "greedy"])
def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(table, tmp_path, training):
    config = replace(SMALL, training=training, code_channels=(6, 6), feature="reconstruction")
    whole = train(table, config, Run(tmp_path / "whole", seed=3))
    parts = [""] if training == "joint" else ["layer_1", "layer_2"]
    with killed_at(Reconstruction, 6 * len(parts) - 1):
        train(table, config, Run(tmp_path / "cut", seed=3))
    resumed = train(table, config, Run(tmp_path / "cut", seed=3, resume=True))
    for part in parts:
        first, second = _stack(tmp_path / "whole" / part), _stack(tmp_path / "cut" / part)
        assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert resumed == whole == json.loads((tmp_path / "cut" / "metrics.json").read_text())
    card = (tmp_path / "cut" / "model_card.md").read_text()
    assert "# Model card: cae" in card and "SVM | image |" in card and str(tmp_path) not in card
    assert {"raw_linear", "raw_rbf", "cae_linear", "cae_rbf"} <= set(whole) and set(whole["cae_rbf"]) == {"test"}
    for kernel in ("linear", "rbf"):
        cases = read_cases(tmp_path / "cut" / f"test_{kernel}.csv")
        assert len(cases.names) == 4 and not cases.probable
        assert auc(cases.truth[:, 0], cases.scores[:, 0]) == whole[f"cae_{kernel}"]["test"]["auc"]
    stored = np.load(tmp_path / "whole" / "features.npz")
    assert stored["features"].shape == (12, 64 * 8 * 6) and list(stored["splits"][-4:]) == ["test"] * 4


def test_the_epoch_of_the_smallest_training_error_is_kept(tmp_path, monkeypatch):
    """The second of three, whose error is made the smallest; not the last."""
    honest, weights = Reconstruction.loss, []

    def loss(self, batch):
        weights.append([p.detach().clone() for p in self.module.parameters()])
        return honest(self, batch) * (3.0, 1.0, 2.0)[len(weights) - 1]

    monkeypatch.setattr(Reconstruction, "loss", loss)
    maps = np.random.default_rng(0).random((8, 3, 6, 6)).astype(np.float32)
    config = replace(SMALL, epochs=3, batch_size=8, lr=1e-2)
    stack = fit_stack(maps, config, Run(tmp_path))
    kept, third = list(stack.parameters()), weights[2]  # what the third epoch begins with is what the second left
    assert len(weights) == 3 and all(torch.equal(a, b) for a, b in zip(kept, third, strict=True))
    assert not all(torch.equal(a, _stack(tmp_path)[f"net.{n}"]) for n, a in stack.state_dict().items())


def test_native_resolution_with_a_pyramid(table, tmp_path):
    config = replace(SMALL, resize=(), pyramid=(1, 2), svm=("linear",), epochs=1)
    train(table, config, Run(tmp_path, seed=3, memory_budget=2**28))
    assert np.load(tmp_path / "features.npz")["features"].shape == (12, 6 * 5)


def test_two_steps_on_real_images(real_data, tmp_path):
    mammograms = sorted((real_data / "dicom").glob("mg_*.dcm"))[:2]
    records = [Record(path, index, f"P{index}", "train") for index, path in enumerate(mammograms)]
    records += [Record(real_data / "nih_chest_xray.png", 1, "P2", "test")]
    table = write_table(tmp_path / "real.csv", records, ["0", "1"])
    config = replace(CaeConfig(), weights="random", code_channels=(16,), epochs=2, batch_size=2)
    metrics = train(table, config, Run(tmp_path / "run", seed=0, memory_budget=2**30))
    assert metrics["images"] == {"train": 2, "val": 0, "test": 1}
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 3


def test_an_unlabelled_folder_is_taken_without_its_masks(table, tmp_path):
    for number, name in enumerate(("a.npy", "b.npy", "a_mask.npy", "masks/b.npy")):
        (tmp_path / "pool" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "pool" / name, np.roll(np.load(table.parent / "0.npy"), number + 1))
    said = []
    config = replace(SMALL, unlabelled=str(tmp_path / "pool"), svm=("linear",))
    train(table, config, Run(tmp_path / "run", say=said.append))
    assert [text.partition(": ")[2][:22] for text in said if "masks" in text] == ["2 masks are left out, "]
    assert len(list((tmp_path / "run" / "maps").rglob("*.npy"))) == 12 + 2


def test_bad_input_is_told_in_one_line(table, tmp_path):
    text = table.read_text()

    def refused(message, text=text, error=DataError, config=SMALL, **settings):
        bad = table.parent / "bad.csv"
        bad.write_text(text)
        with pytest.raises(error, match=message) as caught:
            train(bad, config, Run(tmp_path / "bad", **settings))
        assert "\n" not in str(caught.value)

    refused("patient P0 is in train and test", text.replace("P8,test", "P0,test"))
    one = "\n".join(line.replace(",1,", ",0,") if ",train" in line else line for line in text.splitlines())
    refused("training images have only one class", one)
    pool = table.parent / "pool.csv"
    pool.write_text("image_path,patient_id\n8.npy,P8\n")
    refused("patient P8 is in the val or test split", config=replace(SMALL, unlabelled=str(pool)))
    folder = table.parent / "pool"
    folder.mkdir()
    (folder / "copy.npy").symlink_to(table.parent / "8.npy")
    refused("copy.npy is in the val or test split", config=replace(SMALL, unlabelled=str(folder)))
    assert not (tmp_path / "bad").exists()
    refused(
        "stage 'joint', epoch 1, step .*: the loss is (nan|inf)", error=GigamorphError, config=replace(SMALL, lr=1e30)
    )
    assert (tmp_path / "bad" / "recipe.json").exists() and list((tmp_path / "bad" / "maps").rglob("*.npy"))
    refused("was begun with lr = .* in its configuration, not 0.001", error=GigamorphError, resume=True)


def test_unlabelled_pool(table, tmp_path):
    pool = table.parent / "pool2.csv"
    pool.write_text("image_path,patient_id\n0.npy,P0\n1.npy,P1\n")
    config = replace(SMALL, unlabelled=str(pool), svm=("linear",))
    train(table, config, Run(tmp_path / "run"))
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 3
