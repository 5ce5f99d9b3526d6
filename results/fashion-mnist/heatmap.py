"""Mask ratio and sigma of pre-training: the paper's ablation in small -> heatmap.jsonl, .png.

    OMP_NUM_THREADS=1 python results/fashion-mnist/heatmap.py      # in the root; half an hour
    python results/fashion-mnist/heatmap.py --table                # the table, the picture

Half of the training images are held out. On the other half an encoder is pre-trained for each mask
ratio and sigma, for three epochs, with the loss on all patches, also at sigma 0. A linear probe is
trained on it for two epochs at sigma 0.5. Its average certified radius is that of 100 held-out
images (one-sided, n = 500), the same for all; its accuracy under one draw of the noise that of
3,000. One seed.

One process calls the scripts' main(), one after the other, with the flags that it prints. The probe
is trained as by its command, but no votes are counted: they would take longer than the probe. What
heatmap.jsonl has is not run again; stopped and started again, it goes on (runs/heatmap). Seconds
are the processor's.
"""

import argparse
import functools
import itertools
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "digits"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import tune
from ablation import run, words
from compare import standard_error

import finetune
import pretrain

RUNS = Path("runs/heatmap")
RESULT = Path(__file__).with_name("heatmap.jsonl")
RATIOS = (0.25, 0.5, 0.75, 0.9)
SIGMAS = (0.0, 0.25, 0.5, 1.0)           # of pre-training
SIGMA = 0.5                              # of the probe, and of certification
SHARED = "--recipe fashion --device cpu --dtype fp32"
PRETRAIN = f"{SHARED} --holdout 0.5 --epochs 3 --warmup-epochs 0.5 --save-every 3"
PROBE = f"{SHARED} --sigma {SIGMA} --linear-probe --epochs 2 --warmup-epochs 0.5"
IMAGES, N0, N = 100, 100, 500            # no radius is above 2.21 sigma


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


def plan():
    """(mask ratio, sigma of pre-training), the recipe's first."""
    cells = list(itertools.product(RATIOS, SIGMAS))
    return sorted(cells, key=lambda cell: cell != (0.75, 0.25))


def commands(ratio, sigma):
    """[(script, its run's folder, its flags)]: pre-training and probe."""
    first = RUNS / f"ratio{ratio:g}-sigma{sigma:g}"
    out = RUNS / f"{first.name}-probe"
    return [
        (pretrain, first, f"{PRETRAIN} --mask-ratio {ratio:g} --sigma {sigma:g}"),
        (finetune, out, f"{PROBE} --init {first}/pretrain.pt"),
    ]


def one_draw(model, images, index, args, device):
    """In place of finetune.measure: accuracy under one draw of the noise, of 3,000 images."""
    some = finetune.evenly_spaced(index, 3000)
    return dict(noisy=finetune.accuracy(model, images, some, args.sigma, 1, args, device), vote=0)


def certified_radii(out):
    """Of held-out images, 0 where the answer is wrong or there is none."""
    flags = f"{SHARED} --sigma {SIGMA} --out {out}"
    some = functools.partial(finetune.evenly_spaced, count=IMAGES)
    return [round(radius, 4) for radius in tune.held_out_radii(flags, some, n0=N0, n=N)]


def read_rows():
    return [json.loads(line) for line in RESULT.read_text().splitlines()] if RESULT.exists() else []


def run_all():
    """Run what heatmap.jsonl lacks, and add its rows."""
    for ratio, sigma in plan():
        if (ratio, sigma) in [(row["mask_ratio"], row["sigma"]) for row in read_rows()]:
            continue
        stages = commands(ratio, sigma)
        with mock.patch.object(finetune, "measure", one_draw):
            seconds = [run(*stage) for stage in stages]
        out = stages[1][1]
        log = (out / f"finetune_sigma_{SIGMA:g}.jsonl").read_text().splitlines()
        held_out = [row for row in map(json.loads, log) if row.get("split") == "holdout"][-1]
        radii = certified_radii(out)
        row = dict(
            mask_ratio=ratio,
            sigma=sigma,
            epochs=[3, 2],
            seconds=seconds,
            noisy=held_out["noisy"],
            acr=round(sum(radii) / len(radii), 4),
            radii=radii,
            commands=[words(*stage) for stage in stages],
        )
        with open(RESULT, "a") as file:
            file.write(json.dumps(row) + "\n")


# --------------------------------------------------------------------------------------------------
# Table and picture
# --------------------------------------------------------------------------------------------------


def less(row, other):
    """The mean difference of two rows' radii, paired by image, and its standard error."""
    difference = np.subtract(row["radii"], other["radii"])
    return f"{difference.mean():+.3f} ± {standard_error(difference):.3f}"


def print_table(rows):
    """ACR of each, less that without noise at the same mask ratio, and less the best."""
    found = {(row["mask_ratio"], row["sigma"]): row for row in rows}
    best = max(rows, key=lambda row: row["acr"])
    titles = "mask ratio", "σ of pre-training", "noisy, %", "ACR", "less σ = 0", "less the best"
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for ratio, sigma in itertools.product(RATIOS, SIGMAS):
        if (ratio, sigma) not in found:
            continue
        row, none = found[ratio, sigma], found.get((ratio, 0.0))
        gain = less(row, none) if none and row is not none else ""
        behind = "the best" if row is best else less(row, best)
        print(f"| {ratio:g} | {sigma:g} | {100 * row['noisy']:.1f} | {row['acr']:.3f} | {gain} "
              f"| {behind} |")


def draw(rows, path):
    """The heat map of ACR: mask ratio over the sigma of pre-training."""
    from matplotlib.figure import Figure

    acr = np.full((len(RATIOS), len(SIGMAS)), np.nan)
    for row in rows:
        acr[RATIOS.index(row["mask_ratio"]), SIGMAS.index(row["sigma"])] = row["acr"]
    figure = Figure(figsize=(5.2, 4), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(acr, origin="lower", cmap="viridis", aspect="auto")
    middle = (np.nanmin(acr) + np.nanmax(acr)) / 2
    for (i, j), value in np.ndenumerate(acr):
        if np.isfinite(value):
            colour = "black" if value > middle else "white"
            axes.text(j, i, f"{value:.3f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(SIGMAS)), [f"{sigma:g}" for sigma in SIGMAS])
    axes.set_yticks(range(len(RATIOS)), [f"{100 * ratio:g} %" for ratio in RATIOS])
    axes.set_xlabel("$\\sigma$ of pre-training")
    axes.set_ylabel("mask ratio")
    axes.set_title(f"linear probe at $\\sigma$ = {SIGMA:g}, held-out images", fontsize=10)
    figure.colorbar(picture, label="average certified radius, one-sided")
    figure.savefig(path, dpi=110, facecolor="white")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    if not args.table:
        run_all()
    rows = read_rows()
    print_table(rows)
    draw(rows, RESULT.with_suffix(".png"))


if __name__ == "__main__":
    main()
