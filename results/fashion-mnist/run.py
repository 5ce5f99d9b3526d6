"""DMAE, MAE, no pre-training and LeNet on Fashion-MNIST: trained and certified -> runs.jsonl.

    python results/fashion-mnist/run.py --workers 2 --dtype bf16      # in the repository's root
    python results/fashion-mnist/run.py --time --dtype bf16           # seconds.json: how long a step takes
    python results/fashion-mnist/run.py --table                      # runs.jsonl, tables, accuracy.png of what is there

Every run is a pair of the README's commands, printed as they are begun, with one core each and `--workers` of them side
by side. What is finished is not done again, and what was cut off goes on: everything lies in runs/fashion. The seeds are
those of fine-tuning; DMAE and MAE were pre-trained once. Seconds are those of the logs.
"""

import argparse
import dataclasses
import itertools
import json
import os
import shlex
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
GAUSSIAN = "--consistency 0"
CONSISTENCY = "--consistency 5"                    # the recipe's
FEW = f"{GAUSSIAN} --epochs 3"                     # an epoch has as many steps for few labels as for all of them
SCRATCH_LONGER = f"{GAUSSIAN} --epochs 27"         # as long as 30 of pre-training and 8 of fine-tuning: seconds.json
LENET = "--epochs 60"                              # SGD, a third of them at each rate
OBJECTIVES = {                                     # with fewer copies and steps than in the papers
    "gaussian": "",
    "consistency": "",
    "smoothadv": "--copies 2 --attack-steps 2",
    "macer": "--copies 4",
    "smoothmix": "--copies 2 --attack-steps 2",
}
SHORT = "--epochs 3"                               # for all of OBJECTIVES
SMOOTHADV = "--objective smoothadv --copies 1 --attack-steps 1"      # for a whole run; tuning.jsonl
QUICK = "--n 1000 --skip 20"                       # no radius above 2.46 sigma
FULL = "--n 10000 --skip 20"                       # 3.2 sigma
ENVIRONMENT = dict(OMP_NUM_THREADS="1", MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="2147483647")  # results/speed.md


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
        return f"{self.part}/{self.init}-sigma{self.sigma:g}-seed{self.seed}".replace(" ", "-").replace(",", "")

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
        data = "--data-path data " if self.init == "lenet" else ""                     # which no checkpoint names
        certified = f"python certify.py --recipe fashion {data}{common} {self.certify}"
        if self.init == "lenet":
            file = f"{FOLDER}/lenet.py"
            return (f"python {file} {data}{common} --seed {self.seed} {self.flags}",
                    f"LENET={self.out}/lenet.pt {certified} --classifier {file}:classifier")
        init = "scratch --layer-decay 1" if self.init == "scratch" else RUNS / self.init / "pretrain.pt"
        return (f"python finetune.py --recipe fashion {common} --init {init} --seed {self.seed} {self.flags}", certified)


def plan():
    """All runs, in the order in which they matter."""
    runs = [Run("all labels", init, seed, flags=GAUSSIAN) for seed in SEEDS for init in INITS]
    runs += [Run("100 labels a class", init, seed, flags=f"--labels-per-class 100 {FEW}") for seed in SEEDS for init in INITS]
    for sigma in SIGMAS:
        runs += [Run("recipe", "dmae", sigma=sigma, certify=FULL)]
        runs += [Run("recipe", "lenet", sigma=sigma, flags=f"{CONSISTENCY} {LENET}", certify=FULL)]
    runs += [Run("all labels", "lenet", sigma=sigma, flags=f"{GAUSSIAN} {LENET}") for sigma in SIGMAS]
    runs += [Run("all labels", "dmae", sigma=sigma, flags=GAUSSIAN) for sigma in SIGMAS[1:]]
    runs += [Run("equal time", "scratch", seed, flags=SCRATCH_LONGER) for seed in SEEDS]
    runs += [Run(f"{objective}, three epochs", "dmae", flags=f"--objective {objective} {SHORT} {flags}".strip())
             for objective, flags in OBJECTIVES.items()]
    for seed in SEEDS:
        runs += [Run("10 labels a class", init, seed, flags=f"--labels-per-class 10 {FEW}") for init in INITS]
        runs += [Run("linear probe", init, seed, flags="--linear-probe") for init in INITS]
    for sigma in SIGMAS:
        runs += [Run("smoothadv", "dmae", sigma=sigma, flags=SMOOTHADV)]
        runs += [Run("smoothadv", "lenet", sigma=sigma, flags=f"{SMOOTHADV} {LENET}")]
    return runs


# ----------------------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------------------


def execute(commands, out, failed):
    """Run one command after the other, with one core; their output goes to out/output."""
    out.mkdir(parents=True, exist_ok=True)
    for command in commands:
        if failed.is_set():
            return
        variables, _, words = command.rpartition("python ")                              # LENET=file python ...
        environment = os.environ | ENVIRONMENT | dict(pair.split("=") for pair in variables.split())
        print(f"{command}\n", end="", flush=True)
        with open(out / "output", "a") as file:
            status = subprocess.run([sys.executable, *shlex.split(words)], env=environment, stdout=file,
                                    stderr=file).returncode
        if status:
            failed.set()
            raise SystemExit(f"exit status {status}, see {out}/output: {command}")


def run_all(workers, shared):
    """Pre-train twice, then everything else."""
    failed = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        first = [pool.submit(execute, [f"python pretrain.py --recipe fashion --out {RUNS / init} {shared} {flags}"],
                             RUNS / init, failed) for init, flags in PRETRAININGS.items()]
        for job in first:
            job.result()
        rest = [run for run in plan() if not run.log.exists()]
        for job in [pool.submit(execute, run.commands(shared), run.out, failed) for run in rest]:
            job.result()


# ----------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------


def read_log(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def last_row(folder, stem, split=None):
    """The last row of a log, or the last one of the held-out or of the test images."""
    return [row for row in read_log(folder / f"{stem}.jsonl") if row.get("split") == split][-1]


def of_pretraining(run, key):
    """Its last "step" or "time"; 0 for a network without."""
    return last_row(RUNS / run.init, "pretrain")[key] if run.init in PRETRAININGS else 0


def collect(run):
    """The run as a row of runs.jsonl, or None where it is not finished."""
    if not run.log.exists():
        return None
    rows = certify.read_rows(run.log)
    settings = json.loads((run.out / f"{run.stem}.json").read_text())
    lenet = run.init == "lenet"                                                        # which has no test row
    held_out, test = (last_row(run.out, run.stem, None if lenet else split) for split in ("holdout", "test"))
    row = dict(part=run.part, init=run.init, sigma=run.sigma, seed=run.seed, epochs=settings["epochs"],
               labels=settings["labels_per_class"] or "all", seconds_pretraining=round(of_pretraining(run, "time")),
               seconds=round(last_row(run.out, run.stem)["seconds" if lenet else "time"]), held_out=held_out["noisy"],
               noisy=None if lenet else test["noisy"], vote=test.get("vote"),
               seconds_certifying=round(sum(certify.seconds_of(row["time"]) for row in rows)),
               n=max(row["n"] for row in rows), images=len(rows))
    for bound in certify.BOUNDS:
        summary = certify.Summary(rows, bound)
        row[bound] = dict(acr=round(float(summary.acr), 4),
                          certified={f"{r:g}": round(summary.accuracy(r), 4) for r in RADII})
    return row | dict(commands=run.commands(""))


def mean_and_deviation(values):
    values = list(values)
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def print_table(rows):
    """One line for each part, encoder and sigma: means over the seeds, and the ACR's standard deviation."""
    print("| part | encoder | σ | seeds | n | ACR, one-sided | two-sided | "
          + " | ".join(f"r = {r:g}" for r in RADII) + " |")
    print("|---" * (7 + len(RADII)) + "|")
    for key in dict.fromkeys((row["part"], row["init"], row["sigma"], row["n"]) for row in rows):
        part, init, sigma, n = key
        these = [row for row in rows if (row["part"], row["init"], row["sigma"], row["n"]) == key]
        acr = [mean_and_deviation(row[bound]["acr"] for row in these) for bound in certify.BOUNDS]
        shares = [statistics.mean(row["one-sided"]["certified"][f"{r:g}"] for row in these) for r in RADII]
        cells = [part, init, f"{sigma:g}", len(these), f"{n:,}", *acr, *(f"{share:.1%}"[:-1] for share in shares)]
        print("| " + " | ".join(map(str, cells)) + " |")
    hours = [sum(row[key] for row in rows) / 3600 for key in ("seconds", "seconds_certifying")]
    print(f"\nfine-tuning and LeNet: {hours[0]:.1f} hours of a core; certification: {hours[1]:.1f}")


def print_differences(runs, bound="one-sided"):
    """DMAE less the others, image by image: mean over seeds, its standard error over images, and each seed's mean."""
    print(f"\n| part, {bound} | σ | seeds | less | mean difference of the radius | of each seed |")
    print("|---|---|---|---|---|---|")
    for part, sigma in dict.fromkeys((run.part, run.sigma) for run in runs):
        ours = "all labels" if part == "equal time" else part                          # DMAE's 8 epochs
        for other in (*INITS[1:], "lenet"):
            pairs = [(a, b) for a in runs for b in runs if (a.part, a.init, b.part, b.init) == (ours, "dmae", part, other)
                     and a.seed == b.seed and a.sigma == b.sigma == sigma]
            if pairs:
                logs = [[certify.read_rows(run.log) for run in pair] for pair in pairs]
                differences = np.stack([compare.by_image(a, b, bound)[2] for a, b in logs])          # seeds images
                error = compare.standard_error(differences.mean(axis=0))
                seeds = ", ".join(f"{one:+.3f}" for one in differences.mean(axis=1))
                print(f"| {part} | {sigma:g} | {len(pairs)} | {other} | {differences.mean():+.4f} ± {error:.4f} | {seeds} |")


def time_steps(shared):
    """Seconds of a step with the Gaussian objective: pre-training, fine-tuning, LeNet -> seconds.json.

    The median over an epoch's pieces of 20 steps; LeNet logs the epoch alone.
    """
    short = f"--epochs 1 --overwrite {shared}"
    stages = [                                         # its name, its log's, its command
        ("pretrain", "pretrain", f"python pretrain.py --recipe fashion --log-every 20 --out {RUNS}/time {short}"),
        ("finetune", "finetune_sigma_0.5", "python finetune.py --recipe fashion --sigma 0.5 --init scratch "
         f"--layer-decay 1 --log-every 20 --warmup-epochs 0 {GAUSSIAN} --out {RUNS}/time {short}"),
        ("lenet", "lenet", f"python {FOLDER}/lenet.py --data-path data --sigma 0.5 {GAUSSIAN} --out {RUNS}/time {short}"),
    ]
    execute([command for _, _, command in stages], RUNS / "time", threading.Event())
    seconds = {}
    for stage, file, _ in stages:
        rows = [row for row in read_log(RUNS / "time" / f"{file}.jsonl") if "loss" in row]
        places = [(0, 0)] + [(row["step"], row.get("time", row.get("seconds"))) for row in rows]
        each = [(later - now) / (end - begin) for (begin, now), (end, later) in itertools.pairwise(places)]
        seconds[stage] = round(statistics.median(each), 4)
    SECONDS.write_text(json.dumps(seconds) + "\n")


def draw(path):
    """Held-out accuracy under noise over the minutes of training's steps, pre-training first: seed 0, sigma 0.5."""
    seconds = json.loads(SECONDS.read_text())
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for run in plan():
        if (run.part, run.sigma, run.seed) in (("all labels", 0.5, 0), ("equal time", 0.5, 0)) and run.log.exists():
            before = of_pretraining(run, "step") * seconds["pretrain"]
            rows = [row for row in read_log(run.out / f"{run.stem}.jsonl") if "noisy" in row and row.get("split") != "test"]
            step = seconds["lenet" if run.init == "lenet" else "finetune"]
            minutes = [(before + row["step"] * step) / 60 for row in rows]
            axes.plot(minutes, [100 * row["noisy"] for row in rows], marker=".", label=f"{run.init}, {len(rows)} epochs")
    axes.set(xlabel="minutes of training, with pre-training", ylabel="% right under noise, held out", ylim=(70, None))
    axes.legend()
    figure.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    rows = {row["commands"][0]: row for row in read_log(RESULT)}                   # those that lie elsewhere, too
    finished = [(run, row) for run in plan() if (row := collect(run))]
    rows |= {row["commands"][0]: row for _, row in finished}
    RESULT.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    print_table(rows.values())
    print_differences([run for run, _ in finished])
    if finished:
        draw(RESULT.with_name("accuracy.png"))


if __name__ == "__main__":
    main()
