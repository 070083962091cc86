"""A run goes on only with what it was begun to learn: the outputs of its network mean that, and nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest
from training import Images, make_data

from gigamorph.engine.errors import DataError
from gigamorph.engine.parallel.process_group import ProcessGroup
from gigamorph.engine.train.data import Data
from gigamorph.engine.train.fit import fit
from gigamorph.engine.train.options import TrainOptions
from gigamorph.engine.train.record import make_record, require_same
from gigamorph.engine.train.target import Target

OPTIONS = TrainOptions(model="training:normed", epochs=1, accumulate=3)


def labelled(target: Target) -> Data:
    """Images with two labels besides their class."""

    def part(images):
        numbered = enumerate(images.records)
        return Images([replace(r, labels={"a": float(r.label), "b": float(n % 2)}) for n, r in numbered])

    data = make_data()
    parts = {name: part(images) for name, images in data.parts.items()}
    return replace(data, **parts, classes=target.names, target=target)


REFUSED = [
    (
        Target(("b", "a"), "numbers", (1.0, 0.5), (1.0, 0.5)),
        r"started with target names \['a', 'b'\], not \['b', 'a'\]",
    ),
    (Target(("a", "b"), "labels"), "started with target kind numbers, not labels"),
    (Target(("a", "b"), "numbers", (1.0, 0.5), (1.0, 0.6)), r"their standard deviation\) \[1.0, 0.5\], not"),
    (Target(("a", "b"), "numbers", (1.0, 0.5), (1.0, 0.5), "mean"), "started with target views None, not mean"),
]


def test_a_run_goes_on_with_its_own_labels_alone(tmp_path):
    begun = Target(("a", "b"), "numbers", (1.0, 0.5), (1.0, 0.5))
    fit(labelled(begun), OPTIONS, tmp_path)
    for now, message in REFUSED:
        with pytest.raises(DataError, match=message):
            fit(labelled(now), replace(OPTIONS, epochs=2), tmp_path, resume=True)
    rounded = replace(begun, center=(1.0 + 1e-15, 0.5))  # as of a sum in another order
    fit(labelled(rounded), replace(OPTIONS, epochs=2), tmp_path, resume=True)
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 3


def test_a_run_goes_on_only_with_the_values_of_its_labels(tmp_path):
    data = labelled(Target(("a", "b"), "labels"))
    fit(data, OPTIONS, tmp_path)
    first, *others = data.train.records
    mended = Images([replace(first, labels={**first.labels, "b": 1 - first.labels["b"]}), *others])
    with pytest.raises(
        DataError, match="was started with different labels or frames of the same images; resume with the same table"
    ):
        fit(replace(data, train=mended), replace(OPTIONS, epochs=2), tmp_path, resume=True)
    unused = Images([replace(first, labels={**first.labels, "c": 1.0}), *others])
    fit(replace(data, train=unused), replace(OPTIONS, epochs=2), tmp_path, resume=True)


@pytest.mark.parametrize(
    ("change", "flip", "views"),
    [
        ({"white": 60000}, False, None),
        ({"chest_wall": "right"}, "auto", None),
        ({"laterality": "R"}, "auto", None),
        ({"exam_id": "other"}, False, "mean"),
    ],
)
def test_a_run_goes_on_only_with_images_that_are_read_alike(change, flip, views):
    """And are of the same exams; what has no part in it, another laterality or exam, may be told otherwise."""
    target = Target(("a", "b"), "labels", views=views)

    def record(told, flip=flip, target=target):
        data = replace(labelled(target), preprocessing={"flip": flip}, target=target)
        first, *others = (replace(r, exam_id="one", patient_id="p") for r in data.train.records)
        return make_record(
            replace(data, train=Images([replace(first, **told), *others])), OPTIONS, ProcessGroup.here(False)
        )

    require_same(record({}), record({}), Path("last.ckpt"))
    with pytest.raises(DataError, match="was started with different sides, white levels"):
        require_same(record({}), record(change), Path("last.ckpt"))
    unread = [{"laterality": "R"}, {"exam_id": "other"}]
    alone = Target(("a", "b"), "labels")
    for told in unread:
        require_same(record({}, False, alone), record(told, False, alone), Path("last.ckpt"))
