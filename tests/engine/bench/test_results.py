"""The format of results: what is written is read, whatever benchmark of this project wrote it."""

import json
from dataclasses import replace

import pytest
from bench_results import everything, gpu_file

from gigamorph.engine.bench.read import read
from gigamorph.engine.bench.results import OK, OUT_OF_MEMORY, WRONG, BenchTask
from gigamorph.engine.errors import DataError


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "results.json"
    written = everything()
    written.write(path)
    assert read(path) == written
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_rates_follow_from_what_was_measured():
    row, failed, _ = everything().steps
    assert row.task.megapixels == 2.0 and row.median_seconds == 2.0 and row.spread == 1.5
    assert (row.mpx_per_s, row.bytes_per_pixel, row.roofline_share) == (1.0, 300.0, 0.5)
    assert (failed.mpx_per_s, failed.bytes_per_pixel, failed.roofline_share, failed.spread) == (None,) * 4
    assert everything().limits[0].agreement == pytest.approx(0.81)
    # 2 GFLOP at 1 TFLOP/s take 2 ms, 1 MB at 1 GB/s 1 ms.
    assert everything().kernels[0].floor_ms({"tflop_per_s": 1.0, "gb_per_s": 1.0}) == 2.0


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "gigamorph-bench 0"}'])
def test_anything_else_is_refused_by_name(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"other\.json"):
        read(path)


def test_results_of_the_gpu_script_are_read_by_the_same_reader(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(gpu_file()))
    found = read(path)
    ours, eager, last, compiled, live = found.steps
    assert ours.task == BenchTask("resnet18", (1, 1, 64, 64), True, "frozen", "bf16", "cuda")
    assert (ours.peer, ours.status, ours.peak_bytes, ours.predicted_bytes) == ("gigamorph", OK, 500, 520)
    assert live.task == replace(ours.task, batch_norm="live")
    assert ours.nvml_bytes == 700
    assert ours.median_seconds == 0.2 and ours.check is not None and ours.check.gradients == 0
    assert eager.status == WRONG and "1.0e-01" in (eager.reason or "")
    assert last.check is None and (compiled.status, compiled.reason) == (OUT_OF_MEMORY, "tried to allocate")
    assert found.kernels[0].ms["ours"] == 2.0 and found.kernels[1].reason == "ours: no"
    assert found.provenance["gpu"] == "some GPU" and found.ceilings["gb_per_s"] == 4e3


def test_a_step_on_a_gpu_that_differs_from_stock_is_wrong(tmp_path):
    step = {"seconds": [1.0], "warm_up_seconds": 1.0, "peak_bytes": 10, "left_bytes": 0, "image_bytes": 1}
    steps = {
        "resnet18 train 64 ours": {**step, "loss": 1.0},
        "resnet18 train 64 channels_last": {**step, "loss": 2.0},
    }
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"ceilings": {}, "checks": {}, "ops": {}, "skipped": [], "steps": steps}))
    found = {row.peer: (row.status, row.reason) for row in read(path).steps}
    assert found["channels-last"] == ("ok", None)
    assert found["gigamorph"] == ("wrong", "loss or gradients differ from channels-last's by 5.0e-01")
