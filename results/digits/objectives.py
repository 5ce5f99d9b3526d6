"""Every objective on the digits: three sigmas, three seeds, equal epochs and equal time -> objectives.jsonl, a row a run.

    OMP_NUM_THREADS=1 python results/digits/objectives.py --workers 2          # in the repository's root

One pre-training (results/digits/pretrain.pt), and an MAE made here, are fine-tuned by each objective. First the
hyperparameters are chosen: seed 0, sigma 0.5, by the average certified radius (two-sided) of the held-out training images;
tuning.jsonl keeps what was tried. Then every run is certified on each third test image, as certify.py does it by default.
Equal time: as many epochs as take the processor time of consistency's 10. Last, a denoiser before a clean classifier, and
ensembles of the three seeds, with and without a consensus of two.

    python results/digits/objectives.py --table                                 # the table and objectives.png of what is there

Runs are pieces that resume: what is finished lies in runs/objectives and is not done again. Times are of the processor.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import certify
import finetune
import pretrain

HERE = Path(os.path.relpath(Path(__file__).parent))            # commands in the rows name no folder of ours
RUNS = Path("runs/objectives")
DMAE = HERE / "pretrain.pt"
MAE = RUNS / "mae" / "pretrain.pt"
SIGMAS = (0.25, 0.5, 1.0)
SEEDS = (0, 1, 2)
N, N0, ALPHA = 1_000, 100, 0.001              # no radius is above 2.46 sigma
RADII = (0.0, 0.25, 0.5, 1.0, 1.5)
EPOCHS = 10                                  # a sixth of the recipe's, so that all of this is an hour on two cores
BATCH = 400
ORDER = ("part", "objective", "init", "sigma", "seed", "command")

TRIED = {                                    # at sigma 0.5; a length that is tried is scaled with sigma afterwards
    "consistency": [f"--consistency {lam}" for lam in (2, 5, 10, 20)],
    "smoothadv": [f"--objective-warmup 1 --attack-eps {eps}" for eps in (0.25, 0.5, 1.0)],
    "macer": [f"--macer-lambda {lam}" for lam in (1, 4, 16)],
    "smoothmix": [f"--objective-warmup 1 --attack-step {step} --smoothmix-eta {eta}"
                  for step in (0.25, 0.5) for eta in (1, 5)],
}
LENGTHS = ("--attack-eps", "--attack-step")


# ----------------------------------------------------------------------------------------------------------
# Training, in processes of their own
# ----------------------------------------------------------------------------------------------------------


def train(job):
    """Fine-tune (name, flags): writes RUNS/name, and its processor seconds beside it."""
    name, flags = job
    torch.set_num_threads(1)
    out = RUNS / name
    clock = out / "seconds"
    if clock.exists():
        return name
    out.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    stage = pretrain if name == "mae" else finetune
    with open(out / "output", "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            stage.main([*flags.split(), "--out", str(out), "--device", "cpu", "--overwrite"])
        except SystemExit as error:                                  # a pool would wait for ever
            raise RuntimeError(f"{name} failed, see {out}/output") from error
    clock.write_text(f"{time.process_time() - started:.1f}")
    return name


def train_all(jobs, workers):
    """Yield the name of each of the jobs {name: flags} when it is trained; the longest are begun first."""
    order = ("macer", "smoothmix", "smoothadv")
    first = sorted(jobs.items(), key=lambda job: next((i for i, word in enumerate(order) if word in job[0]), 9))
    start = time.time()
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=1) as pool:
        for done, name in enumerate(pool.imap_unordered(train, first, chunksize=1), 1):
            print(f"{done}/{len(jobs)} trained, {time.time() - start:.0f} s: {name}", flush=True)
            yield name


def seconds_of(name):
    return float((RUNS / name / "seconds").read_text())


# ----------------------------------------------------------------------------------------------------------
# Certification
# ----------------------------------------------------------------------------------------------------------


def open_classifier(checkpoints, device, flags=""):
    """The classifier that certify.py makes of these checkpoints."""
    argv = ["--any-sigma", "--sigma", "1", "--no-compile", "--dtype", "fp32", "--checkpoint", *map(str, checkpoints)]
    args, opened = certify.parse([*argv, *flags.split()])
    return certify.open_classifier(args, opened, device)


def measure(classifier, images, index, sigma, device):
    """ACR and certified accuracies by both bounds, and the radius of each image (wrong or abstained: 0)."""
    rule = certify.FixedN(N, ALPHA)
    these = ((i, (images.pixels[i] / images.levels).to(device)) for i in index)
    trials = certify.certify_all(classifier, these, certify.GaussianNoise(sigma), N0, rule, 0, BATCH)
    trials = sorted(trials, key=lambda trial: trial.index)
    found = {}
    for bound in certify.BOUNDS:
        rows = []
        for trial in trials:
            predict, radius = trial.certificate(sigma, bound)
            right = int(predict == images.labels[trial.index])
            rows.append(dict(predict=predict, radius=radius, correct=right, alpha=ALPHA, sigma=sigma, time="0:00:00"))
        one = certify.Summary(rows, bound)
        at = {f"{r:g}": round(one.accuracy(r), 4) for r in RADII}
        radii = [round(row["radius"] * row["correct"], 4) for row in rows]
        found[bound] = dict(acr=round(float(one.acr), 4), certified=at, radii=radii)
    return found


# ----------------------------------------------------------------------------------------------------------
# The three parts
# ----------------------------------------------------------------------------------------------------------


def command(objective, sigma, seed, flags, init=DMAE, epochs=None):
    epochs = epochs or EPOCHS
    return (f"--sigma {sigma:g} --objective {objective} --init {init} --seed {seed} --epochs {epochs} "
            f"--warmup-epochs {min(5, epochs // 4)} --vote-every {epochs} {flags}")


def scaled(flags, sigma):
    """The flags tried at sigma 0.5, their lengths in proportion to another sigma."""
    words = flags.split()
    for place, word in enumerate(words):
        if word in LENGTHS:
            words[place + 1] = f"{float(words[place + 1]) * sigma / 0.5:g}"
    return " ".join(words)


def tune(workers, device):
    """({objective: its best flags}, the best of the others than consistency), on held-out training images.

    Everything that was tried goes to tuning.jsonl.
    """
    jobs = {f"tune-{objective}-{i}": (objective, flags)
            for objective, variants in TRIED.items() for i, flags in enumerate(variants)}
    list(train_all({name: command(objective, 0.5, 0, flags) for name, (objective, flags) in jobs.items()}, workers))
    images = finetune.open_images("digits", None, True, 8, 1)
    _, held_out = finetune.hold_out(images, 0.1)
    log = HERE / "tuning.jsonl"
    if not log.exists():
        rows = []
        for name, (objective, flags) in jobs.items():
            classifier = open_classifier([RUNS / name / "finetune_sigma_0.5.pt"], device)
            found = measure(classifier, images, held_out.tolist(), 0.5, device)["two-sided"]
            rows.append(dict(objective=objective, flags=flags, held_out_acr=found["acr"], certified=found["certified"],
                             seconds=seconds_of(name)))
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    best = {}
    for row in map(json.loads, log.read_text().splitlines()):
        if row["held_out_acr"] > best.get(row["objective"], (0, ""))[0]:
            best[row["objective"]] = (row["held_out_acr"], row["flags"])
    strongest = max((acr, objective) for objective, (acr, _) in best.items() if objective != "consistency")[1]
    return {"gaussian": "", **{objective: flags for objective, (_, flags) in best.items()}}, strongest


# ----------------------------------------------------------------------------------------------------------
# Table and picture
# ----------------------------------------------------------------------------------------------------------


def groups_of(rows):
    """{(part, objective, init, sigma): rows of its seeds}."""
    groups = {}
    for row in rows:
        name = row["objective"]
        if row["part"] == "ensemble":
            name += ", consensus of 2" if "--consensus" in row["command"] else ", ensemble of 3"
        groups.setdefault((row["part"], name, row["init"], row["sigma"]), []).append(row)
    return groups


def mean_and_spread(values):
    """Mean, and standard deviation over the seeds where there are several."""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def print_table(rows):
    print("| part | objective | encoder | σ | epochs | seconds | ACR, one-sided | ACR, two-sided | r = 0 | 0.25 | 0.5 | 1 |")
    print("|---" * 12 + "|")
    for (part, name, init, sigma), same in groups_of(rows).items():
        acr = [mean_and_spread([row[bound]["acr"] for row in same]) for bound in certify.BOUNDS]
        at = [f"{100 * statistics.fmean(row['one-sided']['certified'][r] for row in same):.1f}"
              for r in ("0", "0.25", "0.5", "1")]
        epochs = statistics.fmean(row["epochs"] for row in same)
        seconds = [row["seconds"] for row in same if "seconds" in row]
        taken = f"{statistics.fmean(seconds):.0f}" if seconds else ""
        print(f"| {part} | {name} | {init} | {sigma:g} | {epochs:.0f} | {taken} | {' | '.join(acr + at)} |")


def draw(rows, path):
    """ACR (two-sided) over the processor seconds of fine-tuning: a mark for each method, its seeds small."""
    from matplotlib.figure import Figure

    colours = dict(gaussian="0.4", consistency="#0072b2", smoothadv="#d55e00", macer="#009e73", smoothmix="#cc79a7")
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for axis, sigma in zip(figure.subplots(1, 3), SIGMAS, strict=True):
        for (part, name, init, at), same in groups_of(rows).items():
            if at != sigma or init != "dmae" or part not in ("equal epochs", "equal time"):
                continue
            seconds = [row["seconds"] for row in same]
            acr = [row["two-sided"]["acr"] for row in same]
            centre = (statistics.fmean(seconds), statistics.fmean(acr))
            mark = "o" if part == "equal epochs" else "s"
            axis.plot(seconds, acr, mark, color=colours[name], markersize=3, alpha=0.6)
            axis.plot(*centre, mark, color=colours[name], markersize=9, label=name if mark == "o" else None)
        axis.set(title=f"$\\sigma$ = {sigma:g}", xlabel="fine-tuning, processor seconds")
        axis.margins(x=0.4)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("average certified radius, two-sided")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle("circles: equal epochs; squares: the time of consistency; large: mean of three seeds", fontsize=10)
    figure.savefig(path, dpi=110, facecolor="white")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes that train")
    parser.add_argument("--table", action="store_true", help="print the table, draw the picture, and end")
    args = parser.parse_args(argv)
    if args.table:
        rows = [json.loads(line) for line in (HERE / "objectives.jsonl").read_text().splitlines()]
        print_table(rows)
        draw(rows, HERE / "objectives.png")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    os.environ["OMP_NUM_THREADS"] = "1"

    list(train_all({"mae": "--sigma 0 --loss-on dropped --mask-ratio 0.5"}, 1))
    best, strongest = tune(args.workers, device)
    print(best, strongest, flush=True)

    test = finetune.open_images("digits", None, False, 8, 1)
    index = list(range(0, len(test), 3))
    rows = []

    def add(row, classifier, sigma):
        rows.append(row | measure(classifier, test, index, sigma, device))
        ordered = sorted(rows, key=lambda row: [str(row.get(key)) for key in ORDER])
        (HERE / "objectives.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ordered))

    def train_and_certify(jobs):
        for name in train_all({name: job["command"] for name, job in jobs.items()}, args.workers):
            job = jobs[name] | dict(seconds=seconds_of(name))
            if name != "clean":
                result = RUNS / name / f"finetune_sigma_{job['sigma']:g}.pt"
                add(job, open_classifier([result], device), job["sigma"])

    # Equal epochs: all objectives from DMAE; at sigma 0.5 three of them from MAE and from nothing, too.
    inits = {"dmae": DMAE, "mae": MAE, "scratch": "scratch"}
    jobs = {}
    for seed in SEEDS:
        for sigma in SIGMAS:
            for objective, flags in best.items():
                for init, file in inits.items():
                    among = sigma == 0.5 and objective in ("gaussian", "consistency", strongest)
                    if init == "dmae" or among:
                        jobs[f"{objective}-{init}-{sigma:g}-{seed}"] = dict(
                            part="equal epochs", objective=objective, init=init, sigma=sigma, seed=seed, epochs=EPOCHS,
                            command=command(objective, sigma, seed, scaled(flags, sigma), file))
    clean = dict(part="denoised", objective="denoise, then classify", init="dmae", sigma=0.0, seed=0, epochs=EPOCHS,
                 command=command("gaussian", 0, 0, ""))
    train_and_certify(jobs | dict(clean=clean))

    # Equal time: the processor time of consistency's epochs.
    timed = {}
    for seed in SEEDS:
        for sigma in SIGMAS:
            budget = seconds_of(f"consistency-dmae-{sigma:g}-{seed}")
            for objective in best:
                if objective == "consistency":
                    continue
                taken = seconds_of(f"{objective}-dmae-{sigma:g}-{seed}")
                epochs = max(2, round(EPOCHS * budget / taken))
                timed[f"{objective}-timed-{sigma:g}-{seed}"] = dict(
                    part="equal time", objective=objective, init="dmae", sigma=sigma, seed=seed, epochs=epochs,
                    command=command(objective, sigma, seed, scaled(best[objective], sigma), DMAE, epochs))
    train_and_certify(timed)

    # The clean classifier behind the denoiser, and ensembles of the three seeds.
    for sigma in SIGMAS:
        flags = f"--denoiser {DMAE}"
        row = clean | dict(sigma=sigma, command=f"{clean['command']}; certify.py {flags}")
        add(row, open_classifier([RUNS / "clean" / "finetune_sigma_0.pt"], device, flags), sigma)
    for sigma in SIGMAS:
        files = [RUNS / f"{strongest}-dmae-{sigma:g}-{seed}" / f"finetune_sigma_{sigma:g}.pt" for seed in SEEDS]
        for flags in ("", "--consensus 2"):
            row = dict(part="ensemble", objective=strongest, init="dmae", sigma=sigma, epochs=EPOCHS,
                       command=f"certify.py --checkpoint (three seeds) {flags}".strip())
            add(row, open_classifier(files, device, flags), sigma)
    print(f"{len(rows)} rows", flush=True)


if __name__ == "__main__":
    main()
