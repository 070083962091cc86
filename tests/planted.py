"""Faults of the kind that a careful programmer makes, planted one at a time: does the suite notice?

    python tests/planted.py                   plant each fault, run the tests that should catch it, print a table
    python tests/planted.py --only NAME       one fault (may be given several times)
    python tests/planted.py --list            the table of faults
    python tests/planted.py --json FILE       where results are kept; a run that stopped goes on from there

A fault is planted in a copy of the working tree, never in the tree itself. It is caught if a named test fails, and
passes again when the fault is taken out. A fault that only breaks an import or the collection of tests does not count.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 600
"""Seconds that the tests of one fault may take."""
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+?::.+?)(?: - (.*))?$", re.MULTILINE)
_NO_SHRINKING = """
_phases = [phase for phase in hypothesis.Phase if phase.name in ("explicit", "generate")]
hypothesis.settings.register_profile("planted", derandomize=True, deadline=None, phases=_phases)
hypothesis.settings.load_profile("planted")
"""
_BROKEN = ("ImportError", "ModuleNotFoundError", "SyntaxError", "NameError", "IndentationError")


class Fault(NamedTuple):
    """A fault.

    Attributes:
        file: where it is planted.
        right: the text that is there, once.
        wrong: what is put in its place.
        tests: the files that should catch it, or single tests of files that take long.
        sees: what a user would see.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: str
    sees: str


FAULTS = (
    # -- kernels ---------------------------------------------------------------------------------------------------
    Fault(
        "moments-of-a-cut-tile",
        "kernels/moments.py",
        "    away = tl.where(inside[:, None], y - mean[None, :], 0.0)\n",
        "    away = y - mean[None, :]\n",
        "tests/kernels/test_conv2d.py tests/kernels/test_moments.py",
        "BatchNorm's variance after a fused convolution is too large where the pixels do not fill the last block.",
    ),
    Fault(
        "pool-gradient-without-dilation",
        "kernels/pool.py",
        "i = a + (p - r * DIL_H) // STRIDE_H",
        "i = a + (p - r) // STRIDE_H",
        "tests/kernels/test_pool.py",
        "Gradients of a dilated max-pooling arrive at the wrong rows.",
    ),
    Fault(
        "layer-norm-eps-outside-the-root",
        "kernels/layer_norm.py",
        "    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + EPS)[:, None]\n",
        "    rstd = (1.0 / (tl.sqrt(tl.sum(centred * centred, 1) / C) + EPS))[:, None]\n",
        "tests/kernels/test_layer_norm.py",
        "LayerNorm of nearly constant channels is scaled otherwise than by PyTorch.",
    ),
    Fault(
        "group-norm-count-of-one-channel",
        "kernels/batch_norm.py",
        "count = (mean, rstd, weight, bias, a, b, plus), s.pixels * together\n",
        "count = (mean, rstd, weight, bias, a, b, plus), s.pixels\n",
        "tests/kernels/test_live_norm.py",
        "GroupNorm's gradient on a GPU is wrong by what its statistics contribute.",
    ),
    Fault(
        "depthwise-tap-beyond-the-filter",
        "kernels/depthwise_kernels.py",
        "mask=wanted & (r0 + r < F.R), other=0.0",
        "mask=wanted, other=0.0",
        "tests/kernels/test_depthwise.py::test_values",
        "A depthwise filter of more rows than are held at once is read beyond its end.",
    ),
    Fault(
        "winograd-residual-in-any-memory-order",
        "kernels/winograd.py",
        "    residual = None if residual is None else _in_rows(residual)\n",
        "",
        "tests/kernels/test_winograd.py::test_a_residual_in_another_memory_order",
        "A fused residual that is not channels-last in memory is read as if it were.",
    ),
    # -- capture ---------------------------------------------------------------------------------------------------
    Fault(
        "permute-not-inverted",
        "engine/capture/aliases.py",
        "lambda _p, c: (c, tuple(dims.index(d) for d in range(len(dims))))",
        "lambda _p, c: (c, tuple(dims))",
        "tests/engine/capture/test_recording.py",
        "An in-place write to a permuted view lands with its axes exchanged, where the order is not its own inverse.",
    ),
    Fault(
        "late-hook-not-guarded",
        "engine/capture/dynamo.py",
        '"skip_nnmodule_hook_guards": False,',
        '"skip_nnmodule_hook_guards": True,',
        "tests/engine/capture/test_module_hooks.py",
        "A forward hook that is registered after the first call is ignored.",
    ),
    # -- lowering --------------------------------------------------------------------------------------------------
    Fault(
        "padding-counted-in-average",
        "engine/lowering/geometry.py",
        "(-self.pad, self.size_in + self.pad) if padding else (0, self.size_in)\n",
        "(-self.pad, self.size_in + self.pad) if padding else (0, self.size_in + self.pad)\n",
        "tests/engine/lowering/test_ops.py",
        "Average pooling with count_include_pad=False is too small along the lower and right border.",
    ),
    Fault(
        "running-variance-biased",
        "engine/lowering/ops/norms.py",
        "return env[total_mean], env[total_var] * env[correction]\n",
        "return env[total_mean], env[total_var]\n",
        "tests/engine/lowering/test_statistics.py",
        "The running variance of BatchNorm lacks Bessel's correction: another network in eval mode.",
    ),
    Fault(
        "batch-variance-with-bessel",
        "engine/lowering/ops/norms.py",
        "variances.mean(1) + means.var(1, correction=0), means.new_full((), pixels)\n",
        "variances.mean(1) + means.var(1), means.new_full((), pixels)\n",
        "tests/engine/lowering/test_statistics.py",
        "BatchNorm of a batch of several images normalises by a variance that is too large.",
    ),
    Fault(
        "align-corners-ignored",
        "engine/lowering/ops/resample.py",
        'for name in ("mode", "align_corners", "antialias")}',
        'for name in ("mode", "antialias")}',
        "tests/engine/lowering/test_resample.py",
        "Upsampling with align_corners=True gives the values of align_corners=False.",
    ),
    Fault(
        "symmetric-border-off-by-one",
        "engine/lowering/geometry.py",
        "return 2 * last + 1 - i if i > last else i\n",
        "return 2 * last - i if i > last else i\n",
        "tests/engine/lowering/test_geometry.py tests/engine/lowering/test_joined.py",
        "A map that is joined to its mirror image repeats the wrong row at the far border.",
    ),
    Fault(
        "ignore-index-not-counted-out",
        "engine/lowering/ops/losses.py",
        "        counts_label = labels != ignored\n",
        "        counts_label = labels >= 0\n",
        "tests/engine/test_dense.py",
        "The mean loss of masks with ignore_index=255 divides by the ignored pixels too.",
    ),
    Fault(
        "folded-weights-stale",
        "engine/lowering/folding.py",
        "        return Scaled.apply(env[self.weight], scale), offset  # pyright: ignore[reportReturnType]\n",
        "        made = Scaled.apply(env[self.weight], scale), offset\n"
        '        return made if torch.is_grad_enabled() else vars(self).setdefault("made", made)\n',
        "tests/engine/lowering/test_folding.py",
        "After load_state_dict an accelerated network in eval mode predicts with the former weights.",
    ),
    Fault(
        "adaptive-pool-checks-rows-only",
        "engine/lowering/ops/grids.py",
        "if size[0] % count[0] == size[1] % count[1] == 0:",
        "if size[0] % count[0] == 0:",
        "tests/engine/lowering/test_grids.py::test_a_fine_grid_that_divides_the_rows_alone",
        "A fine adaptive pooling whose cells divide the height alone cuts the width wrongly.",
    ),
    # -- planning --------------------------------------------------------------------------------------------------
    Fault(
        "gradient-map-not-estimated",
        "engine/planning/lifetimes.py",
        "        grad = there & self.grown & (times <= self.last)\n        gone",
        "        grad = there & self.grown & (times < self.last)\n        gone",
        "tests/engine/planning/test_strategy.py::test_what_lives_is_counted tests/engine/planning/test_bounds.py",
        "The predicted peak leaves out the gradients of stored maps, and the budget is exceeded.",
    ),
    Fault(
        "heaviest-tile-transposed",
        "engine/planning/simulate.py",
        "divmod(int(tile_weights(tiled).argmax()), tiled.cols.steps)",
        "divmod(int(tile_weights(tiled).argmax()), tiled.rows.steps)",
        "tests/engine/planning/test_simulate.py",
        "The plan of an image that is not square measures the wrong tile, or fails.",
    ),
    Fault(
        "memory-of-inference-for-training",
        "engine/planning/call_memory.py",
        "return op.func, tuple(told), str(form), op.mutated != (), autocast, training\n",
        "return op.func, tuple(told), str(form), op.mutated != (), autocast\n",
        "tests/engine/planning/test_call_memory.py",
        "A plan of training after one of inference leaves out what autograd saves of calls on whole maps.",
    ),
    # -- tiling ----------------------------------------------------------------------------------------------------
    Fault(
        "zeros-below-a-max-pooling",
        "engine/tiling/halos.py",
        "cut(out, self.axes, (height - bottom, height, 0, width)).fill_(self.fill)",
        "cut(out, self.axes, (height - bottom, height, 0, width)).zero_()",
        "tests/engine/tiling/test_halos.py tests/engine/tiling/test_scan_edges.py",
        "Max-pooling of negative values gives 0 along the lower border.",
    ),
    Fault(
        "variance-over-tiles-with-bessel",
        "engine/tiling/reduce.py",
        "(self.deviations / self.seen).to(self.dtype)",
        "(self.deviations / max(self.seen - 1, 1)).to(self.dtype)",
        "tests/engine/tiling/test_reduce.py tests/engine/lowering/test_statistics.py",
        "Norms in training mode normalise by the unbiased variance, which PyTorch does not.",
    ),
    Fault(
        "sums-in-half-precision",
        "engine/tiling/reduce.py",
        "        return block.sum(dims, keepdim=True, dtype=torch.float32)\n",
        "        return block.sum(dims, keepdim=True)\n",
        "tests/engine/tiling/test_reduce.py",
        "Global pooling under bf16 autocast rounds each tile's sum to eight bits.",
    ),
    Fault(
        "dropout-mask-of-another-tile",
        "engine/tiling/scan.py",
        "torch.manual_seed((seed + i * self.tiled.cols.steps + j) % 2**63)",
        "torch.manual_seed((seed + i * self.tiled.rows.steps + j) % 2**63)",
        "tests/engine/tiling/test_dropout.py",
        "On images with more columns than rows of tiles several tiles share one dropout mask.",
    ),
    Fault(
        "decimal-gigabytes-as-binary",
        "engine/tiling/memory.py",
        '"g": 10**9,',
        '"g": 2**30,',
        "tests/engine/tiling/test_memory.py",
        "memory_budget='8GB' allows 7 % more than that.",
    ),
    Fault(
        "first-maximum-by-order-of-tiles",
        "engine/tiling/grid.py",
        "better = (part > total) | ((part == total) & (note < places)) | (part",
        "better = (part > total) | (part",
        "tests/engine/lowering/test_grids.py::test_functions",
        "The gradient of adaptive_max_pool2d goes to another of several equal pixels than in PyTorch.",
    ),
    Fault(
        "half-a-map-remains",
        "engine/files.py",
        "            temporary.unlink()\n",
        "            pass\n",
        "tests/engine/test_dense.py::test_a_map_that_fails_leaves_no_file_or_the_earlier_one",
        "write_map that fails leaves an incomplete file.",
    ),
    # -- execution -------------------------------------------------------------------------------------------------
    Fault(
        "other-numbers-in-a-second-computation",
        "engine/execution/checkpoint.py",
        "        torch.set_rng_state(ctx.random_state[0])\n",
        "",
        "tests/engine/tiling/test_dropout.py",
        "A network with dropout whose maps are computed again cannot be trained: its numbers are not drawn again.",
    ),
    Fault(
        "retained-graph-freed",
        "engine/execution/stage_function.py",
        "        count, last = len(ctx.sources), not keeps_graph()\n",
        "        count, last = len(ctx.sources), True\n",
        "tests/engine/planning/test_keys_elsewhere.py",
        "The second backward of a graph that is kept by retain_graph=True fails or lacks gradients.",
    ),
    # -- cuda_graphs -----------------------------------------------------------------------------------------------
    Fault(
        "average-at-the-border-replayed",
        "engine/cuda_graphs/signature.py",
        '_AT_BORDERS = frozenset({"avg_pool2d", "circular"})',
        '_AT_BORDERS = frozenset({"circular"})',
        "tests/engine/cuda_graphs/test_replay.py::test_counts_of_an_average_pooling_are_not_captured",
        "On a GPU replayed border tiles of an average pooling divide by counts that were copied from the host.",
    ),
    # -- module ----------------------------------------------------------------------------------------------------
    Fault(
        "weights-replaced-after-the-forward",
        "engine/module/first_order.py",
        "        refuse_moved(ctx.memory)\n",
        "",
        "tests/engine/test_accelerate.py::test_weights_replaced_before_backward",
        "After p.data = other between forward and backward, gradients are silently those of the new weights.",
    ),
    # -- parallel --------------------------------------------------------------------------------------------------
    Fault(
        "pooled-means-unweighted",
        "engine/parallel/processes.py",
        "    total = (shares * means).sum(0)\n",
        "    total = means.mean(0)\n",
        "tests/engine/execution/test_several_sizes.py",
        "BatchNorm over images of several sizes takes the mean of their means, not of their pixels.",
    ),
    # -- images ----------------------------------------------------------------------------------------------------
    Fault(
        "window-without-its-half",
        "engine/images/grayscale.py",
        "        center, width = center - 0.5, width - 1\n",
        "        width = width - 1\n",
        "tests/engine/images/test_dicom.py",
        "A LINEAR window of a DICOM file is half a grey value off.",
    ),
    Fault(
        "rescale-slope-dropped",
        "engine/images/grayscale.py",
        "    return stored * slope + intercept, [f",
        "    return stored + intercept, [f",
        "tests/engine/images/test_dicom.py",
        "A window is applied to stored values instead of rescaled ones.",
    ),
    Fault(
        "left-and-right-exchanged",
        "engine/images/header.py",
        '    if row == "A" and column in ("R", "FR"):\n        return "L"\n    return "R" if row == "P"',
        '    if row == "A" and column in ("R", "FR"):\n        return "R"\n    return "L" if row == "P"',
        "tests/engine/images/test_header.py tests/engine/images/test_dicom.py",
        "A mammogram that names its side by PatientOrientation alone is taken for the other breast.",
    ),
    Fault(
        "file-read-without-its-lock",
        "engine/images/rawfile.py",
        "        with reading(self.path), self._lock:\n",
        "        with reading(self.path):\n",
        "tests/engine/images/test_rawfile.py",
        "Threads that read regions of one .npy file get pixels of each other's position.",
    ),
    # -- datasets --------------------------------------------------------------------------------------------------
    Fault(
        "split-seed-ignored",
        "engine/datasets/splits.py",
        "np.random.default_rng([seed, label + 1])",
        "np.random.default_rng(label + 1)",
        "tests/engine/datasets/test_splits.py",
        "Splits are the same for every --seed.",
    ),
    Fault(
        "leak-in-a-given-split",
        "engine/datasets/splits.py",
        "    check_leaks(records)\n    return list(records)\n",
        "    return list(records)\n",
        "tests/engine/datasets/test_splits.py",
        "A table whose own split has a patient in train and test is accepted.",
    ),
    Fault(
        "same-augmentation-every-epoch",
        "engine/datasets/augment.py",
        "    draw = _Draw(seed, epoch, index)\n",
        "    draw = _Draw(seed, index)\n",
        "tests/engine/datasets/test_augment.py",
        "Each image is augmented once and for all: every epoch sees the same variation.",
    ),
    Fault(
        "mask-not-flipped",
        "engine/datasets/masks.py",
        "return PickedMask(mask, rows[:: -1 if image.up_down else 1], columns[",
        "return PickedMask(mask, rows, columns[",
        "tests/engine/datasets/test_masks.py",
        "Of an image that augmentation turns upside down, the mask stays as it was.",
    ),
    Fault(
        "frames-taken-for-repeated-rows",
        "engine/datasets/check.py",
        "            if (record.path, record.frame) == (first.path, first.frame):\n",
        "            if record.path == first.path:\n",
        "tests/engine/datasets/test_index_check.py::test_frames_with_the_same_pixels_are_not_one_row_twice",
        "data check reports two frames with the same pixels as one row that occurs twice.",
    ),
    # -- models ----------------------------------------------------------------------------------------------------
    Fault(
        "attention-along-the-wrong-axis",
        "engine/models/outputs.py",
        "(torch.softmax(rows[:, -1:], 0) * rows[:, :-1])",
        "(torch.softmax(rows[:, -1:], 1) * rows[:, :-1])",
        "tests/engine/models/test_views.py",
        "With --views attention all views count the same, and exams of more views have larger logits.",
    ),
    Fault(
        "parts-of-one-storage-taken-for-tied",
        "engine/models/weights.py",
        "found.setdefault((place, value.storage_offset(), value.shape, value.stride()), [])",
        "found.setdefault((place, value.shape, value.stride()), [])",
        "tests/engine/models/test_weights.py",
        "Weights of a network whose parameters are parts of one flat tensor cannot be loaded.",
    ),
    # -- morph -----------------------------------------------------------------------------------------------------
    Fault(
        "second-moment-not-squared",
        "engine/morph/optimizer.py",
        "shares.to(moment.device, moment.dtype) ** power",
        "shares.to(moment.device, moment.dtype)",
        "tests/engine/morph/test_optimizer.py",
        "Adam's second moments of a widened network are too large, so its first steps are too small.",
    ),
    Fault(
        "noise-not-scaled",
        "engine/morph/splits.py",
        "parts = _add_noise(parts, noise * deviation, generator)\n",
        "parts = _add_noise(parts, noise, generator)\n",
        "tests/engine/morph/test_splits.py",
        "widen(noise=0.1) adds noise of deviation 0.1 whatever the weights are, which drowns small ones.",
    ),
    # -- train -----------------------------------------------------------------------------------------------------
    Fault(
        "biases-decay",
        "engine/train/optimizers.py",
        "(p.ndim > 1 and n not in undecayed) == decay",
        "(n not in undecayed) == decay",
        "tests/engine/train/test_optimizers.py",
        "Weight decay pulls biases and norms to zero.",
    ),
    Fault(
        "schedule-by-epoch",
        "engine/train/module.py",
        "share = self._factor(self.state.within * self._steps + self._step)\n",
        "share = self._factor(self.state.within * self._steps)\n",
        "tests/engine/train/test_stages.py",
        "The learning rate changes once an epoch, not at each step; a warm-up of one epoch never rises.",
    ),
    Fault(
        "short-step-not-averaged",
        "engine/train/module.py",
        "        return loss if together == size else loss * (size / together)\n",
        "        return loss\n",
        "tests/engine/train/test_stages.py",
        "The last step of an epoch, of fewer images than accumulate, has gradients that are too small.",
    ),
    Fault(
        "average-before-the-step",
        "engine/train/module.py",
        "        super().optimizer_step(*args, **kwargs)\n        if self.average is not None:\n"
        "            self.average.update()\n",
        "        if self.average is not None:\n            self.average.update()\n"
        "        super().optimizer_step(*args, **kwargs)\n",
        "tests/engine/train/test_stages.py",
        "The averaged weights lag one step behind.",
    ),
    Fault(
        "resume-repeats-batches",
        "engine/train/module.py",
        "        batches = range(state.batch, self.total)\n",
        "        batches = range(self.total)\n",
        "tests/engine/train/test_stages.py",
        "A run that is resumed within an epoch learns from the images of its beginning twice.",
    ),
    Fault(
        "spread-within-images",
        "engine/train/pixels.py",
        "np.mean(squares, 0) - mean**2, 0))\n",
        "np.mean(squares, 0) - np.mean(np.square(means), 0), 0))\n",
        "tests/cli/test_train_config.py::test_mean_and_std_of_the_training_images",
        "--std auto leaves out how images differ from each other in brightness.",
    ),
    Fault(
        "spread-of-numbers-with-bessel",
        "engine/train/target.py",
        "np.nanmean(values, 0), np.nanstd(values, 0)\n",
        "np.nanmean(values, 0), np.nanstd(values, 0, ddof=1)\n",
        "tests/engine/train/test_target.py",
        "Numbers are learnt in other units than their standard deviation over the training images.",
    ),
    Fault(
        "axes-of-a-map-exchanged",
        "engine/train/explanation.py",
        "Affine.scale(self.source.shape[-1] / width, self.source.shape[-2] / height)",
        "Affine.scale(self.source.shape[-2] / height, self.source.shape[-1] / width)",
        "tests/engine/train/test_heatmap.py tests/engine/explain/test_maps.py",
        "The heat map of an image that is not square lies at the wrong place.",
    ),
    Fault(
        "dice-of-empty-masks",
        "engine/train/mask_target.py",
        "return np.where(given + own > 0, 2 * both / (given + own), np.nan)\n",
        "return np.where(given + own > 0, 2 * both / (given + own), 0.0)\n",
        "tests/engine/train/test_masks.py",
        "Images in which a class rightly is nowhere pull its mean Dice down.",
    ),
    Fault(
        "mean-error-over-all-numbers-at-once",
        "engine/train/metrics.py",
        "return float(np.nanmean(np.nanmean(np.abs(truth - [p.log_odds for p in predictions]), 0)))",
        "return float(np.nanmean(np.abs(truth - [p.log_odds for p in predictions])))",
        "tests/engine/train/test_metrics.py",
        "val_mae weights a number by how many images have it, so another epoch is the best.",
    ),
    # -- predict ---------------------------------------------------------------------------------------------------
    Fault(
        "last-breasts-dropped",
        "engine/predict/tables.py",
        "            batch = []\n    yield from merged(batch, classes)\n",
        "            batch = []\n",
        "tests/engine/predict/test_run.py",
        "breasts.csv and exams.csv lack all rows after the last full batch.",
    ),
    Fault(
        "not-called-at-the-threshold",
        "engine/evaluate/recalibration.py",
        "return log_odds[self.number] >= self(self.threshold)",
        "return log_odds[self.number] > self(self.threshold)",
        "tests/cli/test_train_predict.py::test_a_calibration_is_applied_to_probabilities_calls_and_pictures",
        "The image that the threshold was chosen at is not called.",
    ),
    Fault(
        "ignored-pixels-count-as-predicted",
        "engine/predict/masks.py",
        "counts[1] += np.bincount(values[judged], minlength=classes)",
        "counts[1] += np.bincount(values.ravel(), minlength=classes)",
        "tests/engine/predict/test_mask_counts.py",
        "Dice in predictions.csv is too low where a mask has ignored pixels.",
    ),
    # -- explain ---------------------------------------------------------------------------------------------------
    Fault(
        "marks-half-a-cell-off",
        "engine/explain/maps.py",
        "np.array(ndimage.center_of_mass(peaks > 0, peaks, labels)) + 0.5\n",
        "np.array(ndimage.center_of_mass(peaks > 0, peaks, labels))\n",
        "tests/engine/explain/test_maps.py",
        "Marks lie half a cell, 16 pixels for a ResNet, above and to the left of what they mark.",
    ),
    # -- evaluate --------------------------------------------------------------------------------------------------
    Fault(
        "ties-count-as-wins",
        "engine/evaluate/roc.py",
        "together = rankdata(np.concatenate([positives, negatives]))\n",
        'together = rankdata(np.concatenate([positives, negatives]), method="max")\n',
        "tests/engine/evaluate/test_roc.py",
        "DeLong's test takes a positive and a negative with equal scores as ranked rightly.",
    ),
    Fault(
        "bootstrap-error-biased",
        "engine/evaluate/bootstrap.py",
        "float(defined.std(ddof=1))",
        "float(defined.std())",
        "tests/engine/evaluate/test_bootstrap.py",
        "Standard errors from few resamples are too small.",
    ),
    Fault(
        "interval-of-ninety-percent",
        "engine/evaluate/bootstrap.py",
        "np.quantile(defined, [0.025, 0.975])",
        "np.quantile(defined, [0.05, 0.95])",
        "tests/engine/evaluate/test_bootstrap.py",
        "Intervals that are called 95 % cover 90 %.",
    ),
    Fault(
        "bootstrap-seed-ignored",
        "engine/evaluate/bootstrap.py",
        "        random = np.random.default_rng(self._seed)\n",
        "        random = np.random.default_rng(0)\n",
        "tests/engine/evaluate/test_bootstrap.py",
        "gigamorph eval --seed changes nothing.",
    ),
    Fault(
        "froc-per-lesion",
        "engine/evaluate/froc.py",
        "    images = np.maximum(weights.sum(1), 1)[:, None]\n",
        "    images = np.maximum(lesions, 1)\n",
        "tests/engine/evaluate/test_froc.py",
        "False marks are given per lesion instead of per image.",
    ),
    Fault(
        "sensitivity-and-specificity-exchanged",
        "engine/evaluate/report.py",
        '("sensitivity_at_specificity", "specificity", "sensitivity"),',
        '("sensitivity_at_specificity", "sensitivity", "specificity"),',
        "tests/engine/evaluate/test_evaluate.py",
        "The report calls a sensitivity at 90 % specificity a specificity at 90 % sensitivity.",
    ),
    # -- report ----------------------------------------------------------------------------------------------------
    Fault(
        "column-with-a-gap-omitted",
        "engine/report/page.py",
        "if any(str(row[name]) for row in rows)]",
        "if all(str(row[name]) for row in rows)]",
        "tests/engine/report/test_page.py",
        "A report omits a column because one of its cells is empty.",
    ),
    # -- recipes ---------------------------------------------------------------------------------------------------
    Fault(
        "recipe-split-ignores-its-seed",
        "engine/mammography/recipes/splits.py",
        "found = assign_splits(records, fractions=config.fractions, seed=run.seed)\n",
        "found = assign_splits(records, fractions=config.fractions)\n",
        "tests/engine/mammography/recipes/test_splits.py",
        "Repeats of a recipe with several seeds all measure on the same test patients.",
    ),
    Fault(
        "lower-layers-learn",
        "engine/mammography/recipes/cae/autoencoder.py",
        "        with torch.no_grad():\n            below = self(x, index)\n",
        "        below = self(x, index)\n",
        "tests/engine/mammography/recipes/test_cae.py",
        "Greedy training of an auto-encoder also moves the layers below, which should stay as they are.",
    ),
    Fault(
        "same-patches-in-every-image",
        "engine/mammography/recipes/end2end/images.py",
        "rng = np.random.default_rng([seed, number])",
        "rng = np.random.default_rng(seed)",
        "tests/engine/mammography/recipes/test_end2end_sampler.py",
        "All images of end2end draw their patches with the same random numbers.",
    ),
    # -- published, view, bench, cli -------------------------------------------------------------------------------
    Fault(
        "widened-image-out-of-place",
        "engine/published/images.py",
        "x0=-left * across - before, ",
        "x0=-left * across, ",
        "tests/engine/published/test_images.py",
        "Heat maps of a published network that widens narrow images are shifted to the right.",
    ),
    Fault(
        "dark-borders",
        "engine/mammography/view/pyramid.py",
        "        sizes = np.diff(np.append(starts, pixels.shape[axis])).astype(np.float32)\n",
        "        sizes = np.full(len(starts), factor, np.float32)\n",
        "tests/engine/mammography/view/test_view.py",
        "The viewer darkens the last row and column of an image whose sides the scale does not divide.",
    ),
    Fault(
        "nan-is-no-difference",
        "engine/bench/check.py",
        "        if error is not None and not error <= bound:\n",
        "        if error is not None and error > bound:\n",
        "tests/engine/bench/test_check.py",
        "A benchmark of a peer that computes NaN is reported as right.",
    ),
    Fault(
        "first-budget-for-the-least",
        "cli/table.py",
        "        least = min(enough, key=lambda row: row.budget)\n",
        "        least = enough[0]\n",
        "tests/cli/test_plan.py",
        "gigamorph plan recommends the largest budget as the least that is enough.",
    ),
    Fault(
        "outline-margin-at-full-scale",
        "engine/mammography/view/pyramid.py",
        "        beyond = _LINE * factor\n",
        "        beyond = _LINE\n",
        "tests/engine/mammography/view/test_masks.py",
        "Outlines of masks are thinner where tiles of the viewer meet, when zoomed out.",
    ),
    Fault(
        "rate-counts-earlier-images",
        "cli/runner.py",
        "rate = (progress.image - self._first) / max(now - self._began, 1e-9)",
        "rate = progress.image / max(now - self._began, 1e-9)",
        "tests/cli/test_progress.py",
        "predict --resume --json counts images of the earlier run in its rate, so seconds_left is too small.",
    ),
    Fault(
        "named-last-layer-ignored",
        "cli/morph.py",
        '            own.setdefault("at", _last_layer(parent.network))\n',
        '            own["at"] = _last_layer(parent.network)\n',
        "tests/cli/test_morph.py::test_errors_are_one_line_and_nothing_is_written",
        "gigamorph morph head --at NAME grows the last layer instead of the named one.",
    ),
)


def planted(fault: Fault, text: str) -> str:
    """The text of the fault's file with the fault in it.

    Raises:
        ValueError: the code has moved: what is right is not there exactly once.
    """
    count = text.count(fault.right)
    if count != 1:
        raise ValueError(
            f"{fault.name}: the text to replace occurs {count} times in {fault.file}; the code has moved, so correct "
            "the fault"
        )
    return text.replace(fault.right, fault.wrong)


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of the working tree, with what is tracked and what is new."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        copy = Path(folder) / ROOT.name
        for name in names:
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name)
        if (shared := ROOT.parent / "shared").is_dir():  # real images that some tests read
            (Path(folder) / "shared").symlink_to(shared)
        with (copy / "tests/conftest.py").open("a") as file:  # the least example that fails is not looked for
            file.write(_NO_SHRINKING)
        yield copy


def warm() -> Any:
    """Import what most tests import, once: each run of tests is forked off, and has it already.

    Returns:
        What has to stay as long as tests run.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    if importlib.import_module("torch").cuda.is_available():
        return None  # a process that is forked cannot use it
    settings = runpy.run_path(str(ROOT / "tests/conftest.py"))  # makes torchvision importable, as every run does
    for name in ("lightning.pytorch", "timm", "pydicom", "sklearn.metrics"):
        with suppress(ImportError):
            importlib.import_module(name)
    return settings


def tested(copy: Path, tests: list[str]) -> tuple[int | None, str]:
    """Pytest's exit code (None: it took too long) and what it printed."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            os.chdir(copy)
            os.environ["PYTHONPATH"] = sys.path[0] = str(copy)
            os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=line", *tests]))
        end = time.monotonic() + LONGEST
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return None, ""
            time.sleep(0.1)
        said.seek(0)
        return os.waitstatus_to_exitcode(ended[1]), said.read()


def tried(fault: Fault, copy: Path) -> dict[str, Any]:
    """Plant a fault, run its tests, and take it out again: whether one fails, which, and how long that took."""
    path, began = copy / fault.file, time.monotonic()
    right = path.read_text()
    path.write_text(planted(fault, right))
    try:
        code, said = tested(copy, fault.tests.split())
    finally:
        path.write_text(right)
    found: dict[str, Any] = {"caught": False, "seconds": round(time.monotonic() - began, 1)}
    if code is None:
        return {**found, "why": f"the tests took more than {LONGEST} s"}
    failed = _FAILED.search(said)
    if code != 1 or failed is None:
        return {**found, "why": "all tests pass" if code == 0 else f"pytest ended with {code}: {said[-300:]}"}
    if any(name in (failed[2] or "") for name in _BROKEN):
        return {**found, "why": f"it only breaks the code: {failed[2]}"}
    return {**found, "caught": True, "by": failed[1], "why": failed[2] or ""}


def confirm(known: dict[str, Any], copy: Path) -> None:
    """Run the tests that have failed once more, without any fault: what fails then too has caught nothing."""
    while suspects := [one for one in known.values() if one["caught"] and not one.get("sure")]:
        code, said = tested(copy, list(dict.fromkeys(one["by"] for one in suspects)))
        failed = _FAILED.search(said)
        if code != 0 and (failed is None or failed[1] not in {one["by"] for one in suspects}):
            raise SystemExit(f"the tests that have failed cannot be run without a fault: {said[-1000:]}")
        for one in suspects:
            if code == 0:
                one["sure"] = True
            elif failed is not None and one["by"] == failed[1]:
                one.update(caught=False, why=f"{failed[1]} fails without the fault too")


def _row(name: str, one: dict[str, Any]) -> str:
    word = "caught" if one["caught"] else "MISSED"
    return f"{name:<38} {word}  {one['seconds']:6.1f} s  {one.get('by', one['why'])}"


def main() -> int:
    """Run what the command line asks for; 1 if a fault was missed."""
    parser = argparse.ArgumentParser(description="Plant faults, one at a time, and see whether the tests notice.")
    parser.add_argument("--only", action="append", metavar="NAME", choices=[fault.name for fault in FAULTS])
    parser.add_argument("--list", action="store_true", help="print the faults and end")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep results here, and go on from those that are")
    given = parser.parse_args()
    chosen = [fault for fault in FAULTS if given.only is None or fault.name in given.only]
    if given.list:
        for fault in chosen:
            print(f"{fault.name}\n    {fault.file}: {fault.sees}\n    {fault.tests}")
        return 0
    known: dict[str, Any] = json.loads(given.json.read_text()) if given.json and given.json.exists() else {}

    def keep() -> None:
        if given.json is not None:
            given.json.write_text(json.dumps(known, indent=1) + "\n")

    _settings = warm()
    with copied() as copy:
        for fault in chosen:
            if fault.name not in known or given.only is not None:
                known[fault.name] = tried(fault, copy)
                keep()
            print(_row(fault.name, known[fault.name]), flush=True)
        confirm(known, copy)
        keep()
    caught = sum(known[fault.name]["caught"] for fault in chosen)
    print(f"{caught} of {len(chosen)} faults are caught")
    return int(caught < len(chosen))


def broken(fault: Fault) -> str | None:
    """What keeps a fault from being planted in the working tree, or None."""
    try:
        ast.parse(planted(fault, (ROOT / fault.file).read_text()))
    except (OSError, ValueError, SyntaxError) as error:
        return str(error)
    missing = [name for name in fault.tests.split() if not (ROOT / name.partition("::")[0]).is_file()]
    return f"{fault.name}: there is no {missing[0]}" if missing else None


if __name__ == "__main__":
    sys.exit(main())
