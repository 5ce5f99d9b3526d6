"""DMAE, MAE and no pre-training on Fashion-MNIST: pre-trained, fine-tuned and certified, three seeds -> runs.jsonl.

    python results/fashion-mnist/run.py --workers 2 --dtype bf16      # in the repository's root
    python results/fashion-mnist/run.py --table                      # runs.jsonl and the tables, of what is there

Every run is a pair of the README's commands, printed as they are begun, with one core each and `--workers` of them side
by side. What is finished is not done again, and what was cut off goes on: everything lies in runs/fashion. The seeds are
those of fine-tuning; DMAE and MAE were pre-trained once. Seconds are those of the logs.
"""

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import certify

sys.path.insert(0, str(Path(__file__).resolve().parent))

import compare

RUNS = Path("runs/fashion")
RESULT = Path(__file__).with_name("runs.jsonl")
INITS = ("dmae", "mae", "scratch")
SEEDS = (0, 1, 2)
RADII = (0.0, 0.25, 0.5, 0.75, 1.0)
PRETRAININGS = {"dmae": "", "mae": "--sigma 0 --loss-on dropped"}
GAUSSIAN = "--consistency 0"
FEW = f"{GAUSSIAN} --epochs 3"                     # an epoch has as many steps for few labels as for all of them
EQUAL_TIME = 25                                    # epochs: a step of pre-training takes 0.55 times one of fine-tuning
PROBE = "--linear-probe"
QUICK = "--n 1000 --skip 20"                       # no radius above 2.46 sigma
FULL = "--n 10000 --skip 20"                       # 3.2 sigma


@dataclasses.dataclass
class Run:
    """One fine-tuning and its certification."""

    part: str
    init: str
    seed: int = 0
    sigma: float = 0.5
    flags: str = ""                                # of finetune.py
    certify: str = QUICK

    @property
    def name(self):
        return f"{self.part}/{self.init}-sigma{self.sigma:g}-seed{self.seed}".replace(" ", "-")

    @property
    def out(self):
        return RUNS / self.name

    @property
    def log(self):
        return self.out / f"certify_sigma_{self.sigma:g}.tsv"

    def commands(self, shared):
        init = RUNS / self.init / "pretrain.pt" if self.init in PRETRAININGS else "scratch --layer-decay 1"
        common = f"--recipe fashion --sigma {self.sigma:g} --out {self.out} {shared}"
        return (f"python finetune.py {common} --init {init} --seed {self.seed} {self.flags}",
                f"python certify.py {common} {self.certify}")


def plan():
    """All runs, in the order in which they matter."""
    runs = [Run("all labels", init, seed, flags=GAUSSIAN) for seed in SEEDS for init in INITS]
    runs += [Run("100 labels a class", init, seed, flags=f"--labels-per-class 100 {FEW}") for seed in SEEDS for init in INITS]
    runs += [Run("recipe", "dmae", sigma=sigma, certify=FULL) for sigma in (0.5, 0.25, 1.0)]
    runs += [Run("equal time", "scratch", seed, flags=f"{GAUSSIAN} --epochs {EQUAL_TIME}") for seed in SEEDS]
    runs += [Run("linear probe", init, seed, flags=PROBE) for seed in SEEDS for init in INITS[:2]]
    runs += [Run("10 labels a class", init, seed, flags=f"--labels-per-class 10 {FEW}") for seed in SEEDS for init in INITS]
    return runs


# ----------------------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------------------


def execute(commands, out, failed):
    """Run one command after the other, with one core; their output goes to out/output."""
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for command in commands:
        if failed.is_set():
            return
        words = shlex.split(command)
        print(f"{command}\n", end="", flush=True)
        with open(out / "output", "a") as file:
            status = subprocess.run([sys.executable, *words[1:]], env=environment, stdout=file, stderr=file).returncode
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
        for job in [pool.submit(execute, run.commands(shared), run.out, failed) for run in plan()]:
            job.result()


# ----------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------


def last_row(folder, stem, split=None):
    """The last row of a log, or the last one of the held-out or of the test images."""
    rows = [json.loads(line) for line in (folder / f"{stem}.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("split") == split][-1]


def collect(run):
    """The run as a row of runs.jsonl, or None where it is not finished."""
    stem = f"finetune_sigma_{run.sigma:g}"
    if not run.log.exists():
        return None
    rows = certify.read_rows(run.log)
    settings = json.loads((run.out / f"{stem}.json").read_text())
    test = last_row(run.out, stem, "test")
    before = 0 if run.init == "scratch" else last_row(RUNS / run.init, "pretrain")["time"]
    row = dict(part=run.part, init=run.init, sigma=run.sigma, seed=run.seed, epochs=settings["epochs"],
               labels=settings["labels_per_class"] or "all", seconds_pretraining=round(before),
               seconds=round(last_row(run.out, stem)["time"]), noisy=test["noisy"], vote=test["vote"],
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
    """One line for each part and encoder: means over the seeds, and the ACR's standard deviation."""
    print("| part | encoder | σ | seeds | seconds | ACR, one-sided | two-sided | "
          + " | ".join(f"r = {r:g}" for r in RADII) + " |")
    print("|---" * (7 + len(RADII)) + "|")
    for key in dict.fromkeys((row["part"], row["init"], row["sigma"]) for row in rows):
        part, init, sigma = key
        these = [row for row in rows if (row["part"], row["init"], row["sigma"]) == key]
        seconds = statistics.mean(row["seconds_pretraining"] + row["seconds"] for row in these)
        acr = [mean_and_deviation(row[bound]["acr"] for row in these) for bound in certify.BOUNDS]
        shares = [statistics.mean(row["one-sided"]["certified"][f"{r:g}"] for row in these) for r in RADII]
        cells = [part, init, f"{sigma:g}", len(these), f"{seconds:.0f}", *acr, *(f"{share:.1%}"[:-1] for share in shares)]
        print("| " + " | ".join(map(str, cells)) + " |")


def print_differences(runs, bound="one-sided"):
    """DMAE less the others, image by image: mean over seeds, its standard error over images, and each seed's mean."""
    print(f"\n| part, {bound} | seeds | less | mean difference of the radius | of each seed |\n|---|---|---|---|---|")
    for part in dict.fromkeys(run.part for run in runs):
        for other in INITS[1:]:
            pairs = [(a, b) for a in runs for b in runs if a.part == b.part == part and a.init == "dmae"
                     and b.init == other and a.seed == b.seed and a.sigma == b.sigma]
            if pairs:
                logs = [[certify.read_rows(run.log) for run in pair] for pair in pairs]
                differences = np.stack([compare.by_image(a, b, bound)[2] for a, b in logs])          # seeds images
                error = compare.standard_error(differences.mean(axis=0))
                seeds = ", ".join(f"{one:+.3f}" for one in differences.mean(axis=1))
                print(f"| {part} | {len(pairs)} | {other} | {differences.mean():+.4f} ± {error:.4f} | {seeds} |")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args(argv)
    if not args.table:
        run_all(args.workers, f"--device cpu --dtype {args.dtype}")
    earlier = map(json.loads, RESULT.read_text().splitlines())                     # of runs that lie elsewhere
    rows = {row["commands"][0]: row for row in earlier}
    finished = [(run, row) for run in plan() if (row := collect(run))]
    rows |= {row["commands"][0]: row for _, row in finished}
    RESULT.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    print_table(rows.values())
    print_differences([run for run, _ in finished])


if __name__ == "__main__":
    main()
