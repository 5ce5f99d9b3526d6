"""What of pre-training matters: noise, mask ratio, loss; 2 x 2 x 2 on the digits -> ablation.jsonl.

    OMP_NUM_THREADS=1 python results/digits/ablation.py        # in the root; half an hour on a core
    python results/digits/ablation.py --table                  # the tables of what is there

DMAE and MAE differ in three settings of pretrain.py: in the noise (--sigma), in the mask ratio, and
in the patches that the loss is of (--loss-on). All eight combinations are pre-trained here, with
three seeds of everything. After each one come the recipe's linear probe, and ten epochs of
fine-tuning with the recipe's consistency. Both are certified on every third test image, one-sided.

One process calls the scripts' main(), one after the other, with the flags that it prints. A
combination, seed and head that ablation.jsonl has is not run again. Stopped and started again, it
goes on: the runs lie in runs/ablation. Seconds are the processor's, without those before a kill.
Seed after seed, so that a cut leaves whole tables.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import certify
import finetune
import pretrain

SIGMA, SEEDS = 0.25, (0, 1, 2)
RUNS = Path("runs/ablation")
RESULT = Path(__file__).with_name("ablation.jsonl")
FACTORS = {                              # pretrain.py's settings: (MAE's side, DMAE's side)
    "noise": (0.0, SIGMA),
    "mask_ratio": (0.75, 0.25),
    "loss_on": ("dropped", "all"),
}
HEADS = {"linear probe": "--linear-probe --save-every 20", "fine-tuned": "--epochs 10"}
QUICK = "--n 1000"                       # no radius above 2.46 sigma
MEASURED = dict(clean="clean", noisy="noisy", vote="vote", acr="ACR")    # and the tables' names
EFFECTS = [(head, name) for head in HEADS for name in ("noisy", "acr")]
LABELS = {
    "noise": "noise, less none",
    "mask_ratio": "mask ratio 25 %, less 75 %",
    "loss_on": "loss on all, less on dropped",
}


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


def cells():
    """The eight combinations of the factors."""
    combinations = itertools.product(*FACTORS.values())
    return [dict(zip(FACTORS, levels, strict=True)) for levels in combinations]


def commands(cell, seed, head):
    """[(script, its run's folder, its flags)]: pre-training, training, certification."""
    name = "-".join(map(str, cell.values())) + f"-{seed}"
    first, out = RUNS / name, RUNS / f"{name}-{head.replace(' ', '-')}"
    noise, ratio, loss = cell.values()
    before = f"--sigma {noise:g} --mask-ratio {ratio} --loss-on {loss} --seed {seed}"
    after = f"--sigma {SIGMA} --init {first}/pretrain.pt --seed {seed} {HEADS[head]}"
    return [
        (pretrain, first, before),
        (finetune, out, after),
        (certify, out, f"--sigma {SIGMA} {QUICK}"),
    ]


def words(script, out, flags):
    return f"python {script.__name__}.py {flags} --out {out}"


def run(script, out, flags):
    """Run a stage, unless it is done; its processor seconds."""
    command, clock = words(script, out, flags), out / f"seconds-{script.__name__}"
    print(f"\n{command}", flush=True)
    if clock.exists():
        return float(clock.read_text())
    started = time.process_time()
    script.main(command.split()[2:])
    spent = time.process_time() - started
    clock.write_text(f"{spent:.1f}")
    return round(spent, 1)


def read_rows():
    return [json.loads(line) for line in RESULT.read_text().splitlines()] if RESULT.exists() else []


def key_of(row):
    return (*(row[factor] for factor in FACTORS), row["seed"], row["head"])


def run_all():
    """Run what ablation.jsonl lacks, and add its rows."""
    for seed, cell, head in itertools.product(SEEDS, cells(), HEADS):
        row = cell | dict(seed=seed, head=head)
        if key_of(row) in map(key_of, read_rows()):
            continue
        stages = commands(cell, seed, head)
        seconds = [run(*stage) for stage in stages]
        first, out = stages[0][1], stages[1][1]
        stem = f"finetune_sigma_{SIGMA:g}"
        files = first / "pretrain.json", out / f"{stem}.json"
        settings = [json.loads(file.read_text()) for file in files]
        last = json.loads((out / f"{stem}.jsonl").read_text().splitlines()[-1])
        curve = certify.read_curve(out / f"certify_sigma_{SIGMA:g}.tsv", "one-sided")
        row |= dict(
            epochs=[one["epochs"] for one in settings],
            seconds=seconds,
            **{name: last[name] for name in MEASURED if name in last},
            acr=round(float(curve.acr), 4),
            commands=[words(*stage) for stage in stages],
        )
        with open(RESULT, "a") as file:
            file.write(json.dumps(row) + "\n")


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------


def shown(values, name, sign=""):
    """Mean and standard deviation, of shares in per cent."""
    scale, digits = (1, 3) if name == "acr" else (100, 1)
    mean = f"{scale * statistics.mean(values):{sign}.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


def mean_of(rows, name, head, seed, **levels):
    """Over the combinations that have these levels of the factors, of one seed."""
    wanted = levels | dict(head=head, seed=seed)
    found = [row[name] for row in rows if wanted.items() <= row.items()]
    assert len(found) == 2 ** (3 - len(levels)), (wanted, len(found))
    return statistics.mean(found)


def print_cells(rows, head, seeds):
    """A line for each combination: means over the seeds, and their deviations."""
    print(f"\n| {head}: noise | mask ratio | loss on | {' | '.join(MEASURED.values())} |")
    print("|---" * (3 + len(MEASURED)) + "|")
    for cell in cells():
        found = []
        for name in MEASURED:
            values = [mean_of(rows, name, head, seed, **cell) for seed in seeds]
            found.append(shown(values, name))
        noise, ratio, loss = cell.values()
        print(f"| {noise or 'none'} | {100 * ratio:.0f} % | {loss} | {' | '.join(found)} |")


def print_effect(rows, label, factor, seeds, **levels):
    """A line: the mean at the factor's second level less that at its first, of each seed.

    They are means over the other factors, or at those levels that are named.
    """
    low, high = FACTORS[factor]
    found = []
    for head, name in EFFECTS:
        effects = []
        for seed in seeds:
            second = mean_of(rows, name, head, seed, **{factor: high}, **levels)
            first = mean_of(rows, name, head, seed, **{factor: low}, **levels)
            effects.append(second - first)
        found.append(shown(effects, name, "+"))
    print(f"| {label} | {' | '.join(found)} |")


def print_table(rows):
    """Each combination, and the effects; seeds that lack combinations do not count."""
    counts = {seed: sum(row["seed"] == seed for row in rows) for seed in SEEDS}
    seeds = [seed for seed, count in counts.items() if count == len(cells()) * len(HEADS)]
    if not seeds:
        print("no seed has all combinations yet")
        return
    for head in HEADS:
        print_cells(rows, head, seeds)

    heading = " | ".join(f"{head}: {MEASURED[name]}" for head, name in EFFECTS)
    print(f"\n| effect, {len(seeds)} seeds | {heading} |")
    print("|---" * (1 + len(EFFECTS)) + "|")
    for factor, label in LABELS.items():
        print_effect(rows, label, factor, seeds)
    for factor in ("mask_ratio", "loss_on"):
        for noise, what in zip(FACTORS["noise"], ("without noise", "with noise"), strict=True):
            print_effect(rows, f"{LABELS[factor]}, {what}", factor, seeds, noise=noise)
    for ratio, loss in itertools.product(FACTORS["mask_ratio"], FACTORS["loss_on"]):
        label = f"{LABELS['noise']}, at {100 * ratio:.0f} %, {loss}"
        print_effect(rows, label, "noise", seeds, mask_ratio=ratio, loss_on=loss)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    if not args.table:
        run_all()
    print_table(read_rows())


if __name__ == "__main__":
    main()
