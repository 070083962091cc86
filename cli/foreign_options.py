"""Options of other training programs (timm's script, Ultralytics, the Lightning CLI), mapped to those of `train`."""

from __future__ import annotations

import rich_click as click
from click.exceptions import NoSuchOption

_BATCH = "images are processed one by one; --accumulate N uses N per optimizer step"
_SIZE = "images keep their own size; --downsample R averages R x R pixels"
_OUT = "use --out for the folder of the run"
_CONFIG = "-o {} sets it (docs/training.md)"
_OURS = {
    **dict.fromkeys(("-b", "--batch", "--batch-size"), _BATCH),
    **dict.fromkeys(("--imgsz", "--img-size", "--input-size"), _SIZE),
    **dict.fromkeys(("--output", "--project", "--name", "--experiment", "--default-root-dir"), _OUT),
    **dict.fromkeys(("--amp", "--amp-dtype", "--half"), "use --precision bf16 for mixed precision"),
    **dict.fromkeys(("--opt", "--optimizer"), _CONFIG.format("optimizer.name=sgd")),
    **dict.fromkeys(("--sched", "--scheduler"), _CONFIG.format("schedule.name=cosine")),
    **dict.fromkeys(("--warmup", "--warmup-epochs"), _CONFIG.format("schedule.warmup=0.1")),
    **dict.fromkeys(("--clip-grad", "--gradient-clip-val"), _CONFIG.format("optimizer.clip=1.0")),
    **dict.fromkeys(("--ema", "--model-ema", "--model-ema-decay"), _CONFIG.format("average=0.999")),
    **dict.fromkeys(("--smoothing", "--label-smoothing"), _CONFIG.format("loss.label_smoothing=0.1")),
    "--focal": _CONFIG.format("loss.focal=2"),
    "--momentum": _CONFIG.format("optimizer.momentum=0.9"),
    "--layer-decay": _CONFIG.format("optimizer.layer_decay=0.8"),
    "--pretrained": "use --init timm:NAME for timm's pretrained weights",
    "--in-chans": "use --channels",
    "--num-classes": "the table defines the classes",
    "--max-epochs": "use --epochs",
    "--learning-rate": "use --lr",
    "--logger": "use --log, as in --log tensorboard",
}


class TrainCommand(click.RichCommand):
    """A command that suggests our option for an unknown option of another program."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except NoSuchOption as error:
            ours = _OURS.get(error.option_name.replace("_", "-"))
            if ours is None:
                raise
            raise click.UsageError(f"No such option '{error.option_name}': {ours}", ctx) from error
