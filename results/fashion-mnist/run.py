"""DMAE, MAE, no pre-training and LeNet on Fashion-MNIST: trained and certified -> runs.jsonl.

    python results/fashion-mnist/run.py --workers 2 --dtype bf16      # in the repository's root
    python results/fashion-mnist/run.py --time --dtype bf16           # seconds.json: of a step
    python results/fashion-mnist/run.py --table            # runs.jsonl, tables, accuracy.png

Every run is a pair of the README's commands, printed as they are begun, with one core each and
`--workers` of them side by side. What is finished is not done again, and what was cut off goes on:
everything lies in runs/fashion. The seeds are those of fine-tuning; DMAE and MAE were pre-trained
once. Seconds are those of the logs. A row of runs.jsonl is that of a part, an encoder, a sigma and
a seed, and keeps the commands that made it.
"""

import argparse
import dataclasses
import itertools
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import certify

sys.path.insert(0, str(Path(__file__).resolve().parent))

import compare

FOLDER = "results/fashion-mnist"
RUNS = Path("runs/fashion")
RESULT = Path(__file__).with_name("runs.jsonl")
SECONDS = Path(__file__).with_name("seconds.json")
INITS = ("dmae", "mae", "scratch")
SIGMAS = (0.5, 0.25, 1.0)
SEEDS = (0, 1, 2)
RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
PRETRAININGS = {"dmae": "", "mae": "--sigma 0 --loss-on dropped"}
GAUSSIAN = "--objective gaussian"                  # the recipe's is consistency
FEW = f"{GAUSSIAN} --epochs 3"                     # as many steps with few labels as with all
SCRATCH_LONGER = f"{GAUSSIAN} --epochs 27"         # as long as both stages: seconds.json
FEW_LONGER = f"{GAUSSIAN} --epochs 22 --save-every 2"      # likewise; votes select the epoch
LENET = "--epochs 60"                              # SGD, a third of them at each rate
SMOOTHADV = "--objective extras/smoothadv.py:smoothadv --objective-args eps=0.99609375"    # 255/256
MACER = "--objective extras/macer.py:macer --objective-args lam=16.0"
SMOOTHMIX = "--objective extras/smoothmix.py:smoothmix --objective-args step=1.0 eta=1.0"
SHORT = "--epochs 3"                               # for all of these, with fewer copies and steps
OBJECTIVES = {                                     # than in the papers
    "gaussian": GAUSSIAN,
    "consistency": "",
    "smoothadv": f"{SMOOTHADV} copies=2 steps=2",
    "macer": f"{MACER} copies=4",
    "smoothmix": f"{SMOOTHMIX} copies=2 steps=2",
}
ONE_STEP = f"{SMOOTHADV} copies=1 steps=1"         # for a whole run; tuning.jsonl
QUICK = "--n 1000 --skip 20"                       # no radius above 2.46 sigma
FULL = "--n 10000 --skip 20"                       # 3.2 sigma
ENVIRONMENT = dict(                                # results/speed.md
    OMP_NUM_THREADS="1",
    MALLOC_MMAP_MAX_="0",
    MALLOC_TRIM_THRESHOLD_="2147483647",
)


@dataclasses.dataclass
class Run:
    """One classifier, DMAE, MAE, scratch or LeNet, and its certification."""

    part: str
    init: str
    seed: int = 0
    sigma: float = 0.5
    flags: str = ""                                # of finetune.py or lenet.py
    certify: str = QUICK

    @property
    def name(self):
        name = f"{self.part}/{self.init}-sigma{self.sigma:g}-seed{self.seed}"
        return name.replace(" ", "-").replace(",", "")

    @property
    def out(self):
        return RUNS / self.name

    @property
    def log(self):
        return self.out / f"certify_sigma_{self.sigma:g}.tsv"

    @property
    def stem(self):
        """Of training's settings and log."""
        return "lenet" if self.init == "lenet" else f"finetune_sigma_{self.sigma:g}"

    def commands(self, shared):
        common = f"--sigma {self.sigma:g} --out {self.out} {shared}"
        certified = f"python certify.py --recipe fashion {common} {self.certify}"
        if self.init == "lenet":
            file = f"{FOLDER}/lenet.py"
            trained = f"python {file} {common} --seed {self.seed} {self.flags}"
            network = f"--classifier {file}:classifier"
            return trained, f"LENET={self.out}/lenet.pt {certified} {network}"
        init = f"--init {RUNS / self.init}/pretrain.pt"
        if self.init == "scratch":
            init = "--init scratch --layer-decay 1"
        stage = f"python finetune.py --recipe fashion {common}"
        return f"{stage} {init} --seed {self.seed} {self.flags}", certified


def plan():
    """All runs, in the order in which they matter."""
    runs = [Run("all labels", init, seed, flags=GAUSSIAN) for seed in SEEDS for init in INITS]
    few = f"--labels-per-class 100 {FEW}"
    runs += [Run("100 labels a class", init, seed, flags=few) for seed in SEEDS for init in INITS]
    for sigma in SIGMAS:
        runs += [Run("recipe", "dmae", sigma=sigma, certify=FULL)]
        runs += [Run("recipe", "lenet", sigma=sigma, flags=LENET, certify=FULL)]
    gaussian = f"{GAUSSIAN} {LENET}"
    runs += [Run("all labels", "lenet", sigma=sigma, flags=gaussian) for sigma in SIGMAS]
    runs += [Run("all labels", "dmae", sigma=sigma, flags=GAUSSIAN) for sigma in SIGMAS[1:]]
    runs += [Run("equal time", "scratch", seed, flags=SCRATCH_LONGER) for seed in SEEDS]
    for objective, flags in OBJECTIVES.items():
        runs += [Run(f"{objective}, three epochs", "dmae", flags=f"{SHORT} {flags}".strip())]
    few = f"--labels-per-class 10 {FEW}"
    for seed in SEEDS:
        runs += [Run("10 labels a class", init, seed, flags=few) for init in INITS]
        runs += [Run("linear probe", init, seed, flags="--linear-probe") for init in INITS]
    for sigma in SIGMAS:
        runs += [Run("smoothadv", "dmae", sigma=sigma, flags=ONE_STEP)]
        runs += [Run("smoothadv", "lenet", sigma=sigma, flags=f"{ONE_STEP} {LENET}")]
    for count in (10, 100):
        part = f"{count} labels a class, equal time"
        few = f"--labels-per-class {count} {FEW_LONGER}"
        runs += [Run(part, "scratch", seed, flags=few) for seed in SEEDS]
    return runs


# --------------------------------------------------------------------------------------------------
# Running
# --------------------------------------------------------------------------------------------------


def execute(commands, out, failed):
    """Run one command after the other, with one core; their output goes to out/output."""
    out.mkdir(parents=True, exist_ok=True)
    for command in commands:
        if failed.is_set():
            return
        variables, _, words = command.rpartition("python ")    # LENET=file python ...
        named = dict(pair.split("=") for pair in variables.split())
        how = dict(env=os.environ | ENVIRONMENT | named)
        print(f"{command}\n", end="", flush=True)
        with open(out / "output", "a") as file:
            line = [sys.executable, *shlex.split(words)]
            status = subprocess.run(line, stdout=file, stderr=file, **how).returncode
        if status:
            failed.set()
            raise SystemExit(f"exit status {status}, see {out}/output: {command}")


def run_all(workers, shared):
    """Pre-train twice, then everything else."""
    failed = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        first = []
        for init, flags in PRETRAININGS.items():
            out = RUNS / init
            command = f"python pretrain.py --recipe fashion --out {out} {shared} {flags}"
            first.append(pool.submit(execute, [command], out, failed))
        for job in first:
            job.result()
        rest = [run for run in plan() if not run.log.exists()]
        jobs = [pool.submit(execute, run.commands(shared), run.out, failed) for run in rest]
        for job in jobs:
            job.result()


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------


def read_rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def last_row(folder, stem, split=None):
    """The last row of a log, or the last one of the held-out or of the test images."""
    rows = read_rows(folder / f"{stem}.jsonl")
    return [row for row in rows if row.get("split") == split][-1]


def of_pretraining(run, key):
    """Its last "step" or "time"; 0 for a network without."""
    if run.init not in PRETRAININGS:
        return 0
    return last_row(RUNS / run.init, "pretrain")[key]


def seconds_of(time):
    """Of a TSV's time, h:mm:ss.ffffff."""
    hours, minutes, seconds = time.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def key_of(row):
    """What a row of runs.jsonl is of."""
    return row["part"], row["init"], row["sigma"], row["seed"]


def collect(run):
    """The run as a row of runs.jsonl, or None where it is not finished."""
    if not run.log.exists():
        return None
    images = certify.read_log(run.log)
    settings = json.loads((run.out / f"{run.stem}.json").read_text())
    lenet = run.init == "lenet"                                # which has no test row
    held_out = last_row(run.out, run.stem, None if lenet else "holdout")
    test = dict(noisy=None) if lenet else last_row(run.out, run.stem, "test")
    row = dict(
        part=run.part,
        init=run.init,
        sigma=run.sigma,
        seed=run.seed,
        epochs=settings["epochs"],
        labels=settings["labels_per_class"] or "all",
        seconds_pretraining=round(of_pretraining(run, "time")),
        seconds=round(last_row(run.out, run.stem)["seconds" if lenet else "time"]),
        held_out=held_out["noisy"],
        noisy=test["noisy"],
        vote=test.get("vote"),
        seconds_certifying=round(sum(map(seconds_of, images["time"]))),
        n=int(images["n"].max()),
        images=len(images),
    )
    for bound in certify.BOUNDS:
        curve = certify.read_curve(run.log, bound)
        shares = {f"{r:g}": round(certify.certified_accuracy(curve, r), 4) for r in RADII}
        row[bound] = dict(acr=round(float(curve.acr), 4), certified=shares)
    return row | dict(commands=run.commands(""))


def mean_and_deviation(values):
    values = list(values)
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def print_table(rows):
    """A line for each part, encoder, sigma and n: means over the seeds, and ACR's deviation."""
    radii = " | ".join(f"r = {r:g}" for r in RADII)
    print(f"| part | encoder | σ | seeds | n | ACR, one-sided | two-sided | {radii} |")
    print("|---" * (7 + len(RADII)) + "|")
    groups = {}
    for row in rows:
        groups.setdefault((row["part"], row["init"], row["sigma"], row["n"]), []).append(row)
    for (part, init, sigma, n), these in groups.items():
        acr = [mean_and_deviation(row[bound]["acr"] for row in these) for bound in certify.BOUNDS]
        if any("halves" in row["two-sided"] for row in these):
            acr[1] += " *"                                     # see the README
        certified = [row["one-sided"]["certified"] for row in these]
        shares = [statistics.mean(at[f"{r:g}"] for at in certified) for r in RADII]
        shares = [f"{share:.1%}"[:-1] for share in shares]
        cells = [part, init, f"{sigma:g}", len(these), f"{n:,}", *acr, *shares]
        print("| " + " | ".join(map(str, cells)) + " |")
    hours = [sum(row[key] for row in rows) / 3600 for key in ("seconds", "seconds_certifying")]
    print(f"\nfine-tuning and LeNet: {hours[0]:.1f} hours of a core; certification: {hours[1]:.1f}")


def print_differences(runs, bound="one-sided"):
    """DMAE less the others, image by image.

    The mean over seeds, its standard error over images, and each seed's mean.
    """
    print(f"\n| part, {bound} | σ | seeds | less | mean difference of the radius | of each seed |")
    print("|---|---|---|---|---|---|")
    found = {key_of(vars(run)): run for run in runs}
    for part, sigma in dict.fromkeys((run.part, run.sigma) for run in runs):
        ours = part.removesuffix(", equal time")               # DMAE's few epochs
        if part == "equal time":
            ours = "all labels"
        for other in (*INITS[1:], "lenet"):
            differences = []
            for seed in SEEDS:
                keys = (ours, "dmae", sigma, seed), (part, other, sigma, seed)
                pair = [found.get(key) for key in keys]
                if all(pair):
                    logs = [certify.read_log(run.log) for run in pair]
                    differences.append(compare.paired(*logs, bound)[0])
            if differences:
                error = compare.standard_error(np.mean(differences, axis=0))
                seeds = ", ".join(f"{one.mean():+.3f}" for one in differences)
                print(f"| {part} | {sigma:g} | {len(differences)} | {other} "
                      f"| {np.mean(differences):+.4f} ± {error:.4f} | {seeds} |")


def time_steps(shared):
    """Seconds of a step with the Gaussian objective: pre-training, fine-tuning, LeNet.

    The median over three epochs, without their evaluations -> seconds.json.
    """
    out = RUNS / "time"
    shutil.rmtree(out, ignore_errors=True)
    stage = f"--epochs 3 --save-every 3 --warmup-epochs 0 --out {out} {shared}"
    scratch = "--sigma 0.5 --init scratch --layer-decay 1"
    stages = [                                     # its name, its log's, its command
        ("pretrain", "pretrain", f"python pretrain.py --recipe fashion {stage}"),
        ("finetune", "finetune_sigma_0.5",
         f"python finetune.py --recipe fashion {scratch} {GAUSSIAN} {stage}"),
        ("lenet", "lenet",
         f"python {FOLDER}/lenet.py --sigma 0.5 {GAUSSIAN} --epochs 3 --out {out} {shared}"),
    ]
    execute([command for _, _, command in stages], out, threading.Event())
    seconds = {}
    for stage, file, _ in stages:
        rows = [row for row in read_rows(out / f"{file}.jsonl") if "loss" in row]
        places = [(row["step"], row.get("time", row.get("seconds"))) for row in rows]
        pieces = itertools.pairwise([(0, 0), *places])
        each = [(later - now) / (end - begin) for (begin, now), (end, later) in pieces]
        seconds[stage] = round(statistics.median(each), 4)
    SECONDS.write_text(json.dumps(seconds) + "\n")


def draw(path):
    """Held-out accuracy under noise over the minutes of training's steps, pre-training first.

    Of seed 0 at sigma 0.5.
    """
    seconds = json.loads(SECONDS.read_text())
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for run in plan():
        if run.part not in ("all labels", "equal time") or (run.sigma, run.seed) != (0.5, 0):
            continue
        if not run.log.exists():
            continue
        before = of_pretraining(run, "step") * seconds["pretrain"]
        rows = read_rows(run.out / f"{run.stem}.jsonl")
        rows = [row for row in rows if "noisy" in row and row.get("split") != "test"]
        step = seconds["lenet" if run.init == "lenet" else "finetune"]
        minutes = [(before + row["step"] * step) / 60 for row in rows]
        accuracy = [100 * row["noisy"] for row in rows]
        label = f"{run.init}, {rows[-1]['epoch']:g} epochs"
        axes.plot(minutes, accuracy, marker=".", label=label)
    axes.set_xlabel("minutes of training, with pre-training")
    axes.set_ylabel("% right under noise, held out")
    axes.set_ylim(70, None)
    axes.legend()
    figure.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--time", action="store_true", help="time each stage's steps, and end")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    shared = f"--device cpu --dtype {args.dtype}"
    if args.time:
        return time_steps(shared)
    if not args.table:
        run_all(args.workers, shared)
    rows = {key_of(row): row for row in read_rows(RESULT)}     # those that lie elsewhere, too
    finished = [(run, row) for run in plan() if (row := collect(run))]
    rows |= {key_of(row): row for _, row in finished}
    RESULT.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    print_table(rows.values())
    print_differences([run for run, _ in finished])
    if finished:
        draw(RESULT.with_name("accuracy.png"))


if __name__ == "__main__":
    main()
