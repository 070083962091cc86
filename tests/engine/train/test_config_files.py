"""Configurations as files: what is written is read again, YAML means what TOML means, what cannot be is said."""

import pytest

from gigamorph.engine.config import load_config, parse_config, to_toml
from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.train.config import TrainConfig
from gigamorph.engine.train.options import StageOptions


def test_stages_that_fill_more_than_a_line_are_read_again():
    parts = tuple(f"encoder.blocks.{number}.attention" for number in range(6))
    config = TrainConfig(stages=(StageOptions(2, "head", 1e-2, freeze=parts), StageOptions(5)), timeout=60.0)
    assert parse_config(to_toml(config), TrainConfig, "file") == config


def test_momentum_is_printed_of_the_optimizer_that_takes_it():
    for text, printed, taken in (
        ("", "# momentum =", 0.9),
        ("optimizer.name = 'SGD'", "momentum = 0.9", 0.9),
        ("optimizer = {name = 'sgd', momentum = 0.0}", "momentum = 0.0", 0.0),
    ):
        config = parse_config(text, TrainConfig, "file")
        assert printed in to_toml(config).splitlines() and parse_config(to_toml(config), TrainConfig, "file") == config
        assert config.made_stages(True)[0].momentum == taken


def test_a_single_name_is_a_list_of_one():
    text = "log = 'tensorboard'\nfreeze = 'layer1'\ndata = {task = 'labels', labels = 'cancer'}\n"
    config = parse_config(text + "callbacks = 'my:Own'\nstages = [{epochs = 1, freeze = 'stem'}]", TrainConfig, "file")
    assert config.log == ("tensorboard",) and config.freeze == ("layer1",) and config.data.labels == ("cancer",)
    assert config.callbacks == ("my:Own",) and config.stages[0].freeze == ("stem",)
    with pytest.raises(GigamorphError, match="file: key 'log' is 3, not a list, each of it a text"):
        parse_config("log = 3", TrainConfig, "file")


def test_numbers_in_lists_of_a_yaml_file_are_numbers(tmp_path):
    path = tmp_path / "my.yaml"
    stages = "stages:\n- {epochs: 1, lr: 1e-2, name: null}\n"
    path.write_text(stages + "timeout: 1.5e3\noptimizer: {options: {betas: [9e-1]}}\n")
    config = load_config(path, TrainConfig)
    assert config.stages == (StageOptions(1, lr=0.01),) and config.timeout == 1500
    assert config.optimizer.options == {"betas": [0.9]}


def test_a_json_file_means_what_toml_means(tmp_path):
    path = tmp_path / "my.json"
    path.write_text('{\t"stages": [{"epochs": 1, "lr": 1e-2, "name": null}],\n\t"timeout": 1500}')
    assert load_config(path, TrainConfig) == TrainConfig(stages=(StageOptions(1, lr=0.01),), timeout=1500.0)
    for text, message in (("{", "my.json: is not valid JSON: "), ("[]", "my.json: must be a table of keys and values")):
        path.write_text(text)
        with pytest.raises(GigamorphError, match=message):
            load_config(path, TrainConfig)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "optimizer:\n  clip: null\n", "key 'optimizer.clip' is null; omit it for the default 1.0"),
        ("a.json", '{"epochs": null}', "key 'epochs' is null; omit it for the default 20"),
        ("a.yaml", "epochs: 3\nseed: 1\nepochs: 4\n", "duplicate key 'epochs'; remove one of the two"),
        ("a.yaml", "optimizer: {lr: 1e-3, lr: 1e-2}", "duplicate key 'lr'; remove one of the two"),
        ("a.json", '{"optimizer": {"lr": 1, "lr": 2}}', "duplicate key 'lr'; remove one of the two"),
    ],
)
def test_what_would_be_passed_over_is_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(GigamorphError) as told:
        load_config(tmp_path / name, TrainConfig)
    assert str(told.value) == f"{tmp_path / name}: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patience = 0", "patience must be 1 or more, not 0"),
        ("average = 1.5", "average must be at least 0 and below 1, not 1.5"),
        ("seed = -1", "seed must be at least 0 and below 4294967296, not -1"),
        ("seed = 4294967296", "seed must be at least 0 and below 4294967296, not 4294967296"),
        ("devices = 0", "devices must be 1 or more, not 0"),
        ("timeout = -1", "timeout must be 1 or more, not -1.0"),
        ("schedule.plateau = 0", "schedule.plateau must be 1 or more, not 0"),
        ("schedule.warmup = 1", "schedule.warmup must be at least 0 and below 1, not 1.0"),
        ("optimizer.clip = -1", "optimizer.clip must be 0 or more, not -1.0"),
        ("optimizer.clip = nan", "optimizer.clip must be 0 or more, not nan"),
        ("optimizer.lr = inf", "optimizer.lr must be 0 or more, not inf"),
        ("optimizer.weight_decay = -1", "optimizer.weight_decay must be 0 or more, not -1.0"),
        ("optimizer.momentum = 1", "optimizer.momentum must be at least 0 and below 1, not 1.0"),
        ("optimizer.layer_decay = -1", "optimizer.layer_decay must be 0 or more, not -1.0"),
        ("optimizer.rates = {stem = -1}", "optimizer.rates.stem must be 0 or more, not -1.0"),
        ("loss.focal = nan", "loss.focal must be 0 or more, not nan"),
        ("stages = [{epochs = 0}]", "stages.epochs must be 1 or more, not 0"),
        ("stages = [{epochs = 1, lr = -1}]", "stages.lr must be 0 or more, not -1.0"),
        ("loss.regression = 'huber'", "loss.regression applies only to --task numbers; leave it out"),
        (
            "loss.focal = 2.0\ndata.task = 'numbers'",
            "loss.focal applies only to classes and labels, not to numbers",
        ),
        (
            "loss.class_weights = true\ndata.task = 'numbers'",
            "loss.class_weights applies only to classes and labels, not to numbers",
        ),
        ("data = {task = 'labels', labels = ['a', 'b', 'a']}", "data.labels names 'a' twice; name each once"),
        (
            "data.labels = ['a']",
            "data.labels applies only to --task labels and numbers; leave it out, or set data.task",
        ),
        (
            "data = {task = 'numbers', classes = ['a']}",
            "data.classes applies only to --task classes, ordinal and masks; leave it out, or set data.task",
        ),
        (
            "optimizer = {name = 'rmsprop', momentum = 0.5}",
            "optimizer.momentum applies only to sgd; set the momentum of rmsprop, if any, in optimizer.options",
        ),
        (
            "optimizer.momentum = 0.9",
            "optimizer.momentum applies only to sgd; set the momentum of adamw, if any, in optimizer.options",
        ),
        ("memory_budget = '12x'", "memory size '12x' is invalid; write it like 4GiB, 800MiB or 6GB"),
        ("memory_budget = 0", "memory size must be at least 1 byte, not 0"),
        ("memory_budget = true", "key 'memory_budget' is True, not a whole number or a text"),
        ("data.mean = 'autoo'", "key 'data.mean' is 'autoo', not a number, 'auto' or a list, each of it a number"),
        ("data.mean = [0.1, 'x']", "key 'data.mean[1]' is 'x', not a number"),
        ("device = 'gpu'", "key 'device' is 'gpu'; choose from auto, cpu, cuda"),
        ("batch_norm = 'hot'", "key 'batch_norm' is 'hot'; choose from frozen"),
        ("data.folds = -2", "data.folds must be 2 or more, not -2"),
        ("data.voi = 'bright'", "voi='bright' must be 'auto', 'none', 'minmax', 'window:I' or 'lut:I'"),
        ("data.white = 'abc'", "white level 'abc' must be auto or a positive number, such as 4095 for 12 bits"),
        (
            "data.augment = 'foo=1'",
            "augmentation foo=1: unknown; choose from flip, rotate, scale, shear, translate, elastic, gamma, contrast, "
            "brightness, noise",
        ),
        ("data.std = 0", "mean [0.0] and std [0.0] must be finite numbers, std above 0"),
        ("data.classes = ['no', 'yes', 'no']", "data.classes names 'no' twice; name each once"),
    ],
)
def test_what_is_out_of_range_or_without_effect_is_one_line(text, message):
    with pytest.raises(GigamorphError) as told:
        parse_config(text, TrainConfig, "file")
    assert str(told.value) == f"file: {message}"
