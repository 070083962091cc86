"""Results with a row of every kind, and a file as benchmarks/gpu.py writes it. All figures are made up."""

from gigamorph.engine.bench.results import (
    NOT_RUN,
    OK,
    OUT_OF_MEMORY,
    BenchTask,
    Check,
    KernelRow,
    LimitRow,
    Results,
    StepRow,
    Try,
)

TASK = BenchTask("resnet18", (1, 3, 1000, 2000))


def everything() -> Results:
    check = Check("stock", 1e-7, 2e-5, ("conv1.weight", 3e-5), 0.0, 2)
    return Results(
        "gigamorph bench step",
        {"torch": "2.13.0", "commit": "abc", "gpu": None},
        {"gb_per_s": 20.0},
        [
            StepRow(
                TASK,
                "gigamorph",
                seconds=[2.0, 1.0, 4.0],
                peak_bytes=600_000_000,
                check=check,
                settings={"tile": [512, 512]},
                roofline_seconds=1.0,
            ),
            StepRow(TASK, "stock", OUT_OF_MEMORY, "killed", cap_bytes=10**9),
            StepRow(TASK, "compile", NOT_RUN, "no GPU"),
        ],
        [LimitRow(TASK, "stock", 10**9, side=900, too_large=960, predicted_side=1000, tries=[Try(900, OK, 9, 1.0)])],
        [KernelRow("conv", "bf16", 2e9, 1e6, {"ours": 0.5, "cudnn": 0.6})],
    )


def gpu_file() -> dict:
    """As benchmarks/gpu.py writes it."""
    step = {
        "model": "resnet18",
        "training": True,
        "side": 64,
        "seconds": [0.2, 0.1, 0.3],
        "peak_bytes": 1000,
        "left_bytes": 100,
        "image_bytes": 400,
        "nvml_bytes": 700,
        "warm_up_seconds": 1.0,
        "loss": 1.0,
        "gradient": 2.0,
    }
    return {
        "ceilings": {"machine": {"gpu": "some GPU", "torch": "2"}, "ceilings": {"gb_per_s": 4e3, "tflop_per_s": 7e2}},
        "checks": {},
        "tiles": {},
        "skipped": [],
        "seconds": {},
        "ops": {
            "3x3 forward": {"flops": 7e11, "bytes": 4e6, "ms": {"ours": 2.0, "cudnn": 3.0}},
            "1x1 forward": {"flops": 1.0, "bytes": 1.0, "ms": {"cudnn": 3.0}, "failed": {"ours": "no"}},
        },
        "steps": {
            "resnet18 train 64 ours": step | {"tile": [32, 32], "planned_bytes": 520},
            "resnet18 train 64 eager": step | {"gradient": 2.2},
            "resnet18 train 64 channels_last": step,
            "resnet18 train 64 compile": {"error": "out of memory", "message": "tried to allocate"},
            "resnet18_live train 64 ours": step,
            "choices": {"choices": []},
        },
    }
