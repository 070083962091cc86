import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.models import create_model
from gigamorph.engine.models.spec import Spec

values = st.one_of(
    st.integers(-(10**6), 10**6),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.none(),
    st.tuples(st.integers(0, 999), st.integers(0, 999)),
    st.text(max_size=8),
)
names = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)


@given(st.dictionaries(names, values, max_size=4))
def test_a_spec_is_what_its_text_says(arguments):
    spec = Spec("timm", "resnet18.a1_in1k", arguments)
    assert Spec.parse(str(spec)) == spec


def test_words_numbers_and_text():
    spec = Spec.parse("timm:net?in_chans=1&global_pool=max&rate=2.5e-1&a=true&b=None&size=(512,384)&c=%26")
    assert spec.arguments == {
        "in_chans": 1,
        "global_pool": "max",
        "rate": 0.25,
        "a": True,
        "b": None,
        "size": (512, 384),
        "c": "&",
    }


@pytest.mark.parametrize("text", ["timm:net?in_chans", "net?=3", "net?a=1&a=2", "net?a=1&", "m:f?2x=1"])
def test_what_is_no_argument_is_named(text):
    with pytest.raises(GigamorphError, match="is not a valid argument, or is given twice"):
        Spec.parse(text)


def test_arguments_reach_timm_factories_and_our_own(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    network = create_model("timm:test_resnet?in_chans=1&global_pool=max", 3, 3)
    assert network(torch.zeros(1, 1, 64, 64)).shape == (1, 3) and network.global_pool.pool_type == "max"
    assert create_model("resnet18?width=8", 2, 1).conv1.out_channels == 8
    (tmp_path / "spec_nets.py").write_text(
        "import torch\ndef net(num_classes, width=4): return torch.nn.Linear(width, num_classes)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert create_model("spec_nets:net?width=7", 5).in_features == 7
    for spec in ("timm:test_resnet?colour=1", "resnet18?colour=1", "spec_nets:net?colour=1"):
        with pytest.raises(GigamorphError, match="colour"):
            create_model(spec)


@pytest.mark.parametrize("spec", ["timm:hf-hub:timm/resnet18.a1_in1k", "timm:resnet18?pretrained=true"])
def test_nothing_is_downloaded(spec):
    pytest.importorskip("timm")
    with pytest.raises(GigamorphError, match="would be downloaded"):
        create_model(spec)
