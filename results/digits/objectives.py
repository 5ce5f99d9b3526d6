"""Every objective on the digits: three sigmas and seeds, equal epochs and time -> objectives.jsonl.

    OMP_NUM_THREADS=1 python results/digits/objectives.py --workers 2        # in the root
    python results/digits/objectives.py --table         # the table, objectives.png of what is there

One pre-training (results/digits/pretrain.pt), and an MAE made here, are fine-tuned by each
objective. First the hyperparameters are chosen: seed 0, sigma 0.5, by the average certified radius
(two-sided) of the held-out training images; what tuning.jsonl has is not tried again. Then every
run is certified on each third test image, as certify.py does it by default. Equal time: as many
epochs as take the processor time of consistency's 10. Last, a denoiser before a clean classifier,
and ensembles of the three seeds, with and without a consensus of two.

Runs are pieces that resume: what is finished lies in runs/objectives and is not done again. Times
are of the processor. Rows keep the flags that made them.
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

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import certify
import finetune
import pretrain

HERE = Path(os.path.relpath(Path(__file__).parent))            # rows name no folder of ours
TUNING = HERE / "tuning.jsonl"
RESULT = HERE / "objectives.jsonl"
RUNS = Path("runs/objectives")
DMAE = HERE / "pretrain.pt"
MAE = RUNS / "mae" / "pretrain.pt"
SIGMAS = (0.25, 0.5, 1.0)
SEEDS = (0, 1, 2)
N, N0, ALPHA = 1_000, 100, 0.001         # no radius is above 2.46 sigma
RADII = (0.0, 0.25, 0.5, 1.0, 1.5)
EPOCHS = 10                              # a sixth of the recipe's: all this is an hour on two cores
BATCH = 400
ORDER = ("part", "objective", "init", "sigma", "seed", "command")

OBJECTIVES = {                           # finetune.py's name, and what is not tried
    "gaussian": ("gaussian", {}),
    "consistency": ("consistency", {}),
    "smoothadv": ("extras/smoothadv.py:smoothadv", dict(copies=2, steps=4)),
    "macer": ("extras/macer.py:macer", dict(copies=8)),
    "smoothmix": ("extras/smoothmix.py:smoothmix", {}),
}
TRIED = {                                # at sigma 0.5
    "consistency": [dict(lam=lam) for lam in (2, 5, 10, 20)],
    "smoothadv": [dict(warmup=1, eps=eps) for eps in (0.25, 0.5, 1.0)],
    "macer": [dict(lam=lam) for lam in (1, 4, 16)],
    "smoothmix": [
        dict(warmup=1, step=step, eta=eta) for step in (0.25, 0.5) for eta in (1, 5)
    ],
}
LENGTHS = ("eps", "step")                # scaled with sigma afterwards


# --------------------------------------------------------------------------------------------------
# Training, in processes of their own
# --------------------------------------------------------------------------------------------------


def flags_of(objective, tried, sigma, seed, init=DMAE, epochs=EPOCHS):
    """The flags of finetune.py for an objective with the arguments `tried` at sigma 0.5."""
    name, arguments = OBJECTIVES[objective]
    scale = sigma / 0.5
    scaled = {key: value * scale if key in LENGTHS else value for key, value in tried.items()}
    words = [f"{key}={value}" for key, value in (arguments | scaled).items()]
    if words:
        words.insert(0, "--objective-args")
    warmup = min(5, epochs // 4)
    schedule = f"--epochs {epochs} --warmup-epochs {warmup} --save-every {epochs}"
    start = f"--sigma {sigma:g} --objective {name} --init {init} --seed {seed}"
    return " ".join([start, schedule, *words])


def train(job):
    """Train (name, flags): writes RUNS/name, and its processor seconds beside it."""
    name, flags = job
    torch.set_num_threads(1)
    out = RUNS / name
    clock = out / "seconds"
    if clock.exists():
        return name
    out.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    stage = pretrain if name == "mae" else finetune
    with (
        open(out / "output", "a") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            stage.main([*flags.split(), "--out", str(out), "--device", "cpu"])
        except SystemExit as error:                            # a pool would wait for ever
            raise RuntimeError(f"{name} failed, see {out}/output") from error
    clock.write_text(f"{time.process_time() - started:.1f}")
    return name


def train_all(jobs, workers):
    """Yield the name of each of the jobs {name: flags} when it is trained; the longest first."""
    slow = ("macer", "smoothmix", "smoothadv")

    def place(job):
        return next((i for i, word in enumerate(slow) if word in job[0]), len(slow))

    first = sorted(jobs.items(), key=place)
    start = time.time()
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=1) as pool:
        for done, name in enumerate(pool.imap_unordered(train, first, chunksize=1), 1):
            print(f"{done}/{len(jobs)} trained, {time.time() - start:.0f} s: {name}", flush=True)
            yield name


def seconds_of(name):
    return float((RUNS / name / "seconds").read_text())


# --------------------------------------------------------------------------------------------------
# Certification
# --------------------------------------------------------------------------------------------------


def rebuild(file, device):
    """The network of a checkpoint of finetune.py."""
    return certify.rebuild(finetune.read_checkpoint(file, "finetune"), file).eval().to(device)


def plug(place, files):
    """A --classifier of extras/, of these checkpoints."""
    os.environ["CHECKPOINTS"] = ":".join(map(str, files))
    return certify.open_plug(place, "--classifier")[0]


def measure(classifier, images, index, sigma, device):
    """By both bounds: ACR, certified accuracies, each image's radius (wrong or abstained: 0)."""
    these = ((i, images.items[i][0].to(device) / images.white) for i in index)
    trials = [*certify.certify_all(classifier, these, sigma, N0, N, ALPHA, batch=BATCH)]
    found = {}
    for bound in certify.BOUNDS:
        certified = []
        for i, _, top, _, _, bounds in sorted(trials, key=lambda trial: trial[0]):
            predict, radius = certify.certificate(top, *bounds[bound], sigma)
            certified.append((radius, predict == images.labels[i]))
        radius, right = np.array(certified).T
        found[bound] = dict(
            acr=round(float((radius * right).mean()), 4),
            certified={f"{r:g}": round(float((right * (radius >= r)).mean()), 4) for r in RADII},
            radii=[round(one, 4) for one in (radius * right).tolist()],
        )
    return found


# --------------------------------------------------------------------------------------------------
# Tuning
# --------------------------------------------------------------------------------------------------


def read_rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def tune(workers, device):
    """({objective: its best arguments}, the best of the others than consistency).

    By held-out training images. Everything that was tried goes to tuning.jsonl.
    """
    known = [(row["objective"], row["arguments"]) for row in read_rows(TUNING)]
    jobs = {}
    for objective, variants in TRIED.items():
        for i, tried in enumerate(variants):
            if (objective, tried) not in known:
                jobs[f"tune-{objective}-{i}"] = objective, tried
    flags = {name: flags_of(*job, 0.5, 0) for name, job in jobs.items()}
    list(train_all(flags, workers))

    images = finetune.open_images("digits", "", True, 8, 1, torch.device("cpu"))
    _, held_out = finetune.hold_out(len(images.labels), 0.1)
    for name, (objective, tried) in jobs.items():
        classifier = rebuild(RUNS / name / "finetune_sigma_0.5.pt", device)
        found = measure(classifier, images, held_out.tolist(), 0.5, device)["two-sided"]
        row = dict(
            objective=objective,
            arguments=tried,
            flags=flags[name],
            held_out_acr=found["acr"],
            certified=found["certified"],
            seconds=seconds_of(name),
        )
        with open(TUNING, "a") as file:
            file.write(json.dumps(row) + "\n")

    best = {"gaussian": (0, {})}
    for row in read_rows(TUNING):
        if row["held_out_acr"] > best.get(row["objective"], (0, {}))[0]:
            best[row["objective"]] = row["held_out_acr"], row["arguments"]
    others = [(acr, objective) for objective, (acr, _) in best.items()
              if objective != "consistency"]
    return {objective: arguments for objective, (_, arguments) in best.items()}, max(others)[1]


# --------------------------------------------------------------------------------------------------
# Table and picture
# --------------------------------------------------------------------------------------------------


def groups_of(rows):
    """{(part, objective, init, sigma): rows of its seeds}."""
    groups = {}
    for row in rows:
        name = row["objective"]
        if row["part"] == "ensemble":
            consensus = "consensus" in row["command"]
            name += ", consensus of 2" if consensus else ", ensemble of 3"
        groups.setdefault((row["part"], name, row["init"], row["sigma"]), []).append(row)
    return groups


def mean_and_spread(values):
    """Mean, and standard deviation over the seeds where there are several."""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def labels_of_images():
    """Of the images that are certified."""
    return finetune.open_images("digits", "", False, 8, 1, torch.device("cpu")).labels[::3].numpy()


def collapsed(row, labels):
    """Whether it answers one class, whatever the image.

    It is right on all images of a class, and on no other. Its ACR is that class's share of the
    images, times the largest radius that the draws can prove: no measure of what was learnt.
    """
    right = np.array(row["two-sided"]["radii"]) > 0
    return any(np.array_equal(right, labels == label) for label in set(labels.tolist()))


def print_table(rows):
    labels = labels_of_images()
    print("| part | objective | encoder | σ | epochs | seconds | ACR, one-sided | ACR, two-sided "
          "| r = 0 | 0.25 | 0.5 | 1 |")
    print("|---" * 12 + "|")
    for (part, name, init, sigma), same in groups_of(rows).items():
        acr = [mean_and_spread([row[bound]["acr"] for row in same]) for bound in certify.BOUNDS]
        certified = [row["one-sided"]["certified"] for row in same]
        shares = [statistics.fmean(at[r] for at in certified) for r in ("0", "0.25", "0.5", "1")]
        at = [f"{100 * share:.1f}" for share in shares]
        epochs = statistics.fmean(row["epochs"] for row in same)
        seconds = [row["seconds"] for row in same if "seconds" in row]
        taken = f"{statistics.fmean(seconds):.0f}" if seconds else ""
        if all(collapsed(row, labels) for row in same):
            name += ", one class"
        cells = [part, name, init, f"{sigma:g}", f"{epochs:.0f}", taken, *acr, *at]
        print(f"| {' | '.join(cells)} |")


def paired(rows, others):
    """The mean difference of the radii (two-sided, means over the seeds), its error over images."""
    ours, theirs = ([row["two-sided"]["radii"] for row in some] for some in (rows, others))
    difference = np.mean(ours, axis=0) - np.mean(theirs, axis=0)
    return difference.mean(), difference.std(ddof=1) / len(difference) ** 0.5


def print_differences(rows):
    """Each group less Gaussian training, less consistency, of ten epochs, and less DMAE's start."""
    labels, groups = labels_of_images(), groups_of(rows)
    print("| part | objective | encoder | σ | less Gaussian | less consistency | less DMAE's |")
    print("|---" * 7 + "|")
    for (part, name, init, sigma), same in groups.items():
        cells = [part, name, init, f"{sigma:g}"]
        for base in ("gaussian", "consistency", name.split(",")[0]):
            others = groups.get(("equal epochs", base, "dmae", sigma), [])
            if not others or others is same:
                cells.append("")
            elif any(collapsed(row, labels) for row in [*same, *others]):
                cells.append("one class")
            else:
                cells.append("{:+.3f} ± {:.3f}".format(*paired(same, others)))
        print(f"| {' | '.join(cells)} |")


def draw(rows, path):
    """ACR (two-sided) over the processor seconds of fine-tuning: a large mark for each method.

    Its seeds are small ones. Runs that answer one class are crosses at the lower edge, at their
    seconds: their ACR is not drawn, and sets no axis.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    labels = labels_of_images()
    colours = dict(
        gaussian="0.4",
        consistency="#0072b2",
        smoothadv="#d55e00",
        macer="#009e73",
        smoothmix="#cc79a7",
    )
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for axis, sigma in zip(figure.subplots(1, 3), SIGMAS, strict=True):
        for (part, name, init, at), same in groups_of(rows).items():
            if at != sigma or init != "dmae" or part not in ("equal epochs", "equal time"):
                continue
            colour, edge = colours[name], axis.get_xaxis_transform()
            one_class = [row["seconds"] for row in same if collapsed(row, labels)]
            axis.plot(one_class, [0.03] * len(one_class), "x", color=colour, transform=edge)
            same = [row for row in same if not collapsed(row, labels)]
            if not same:
                continue
            seconds = [row["seconds"] for row in same]
            acr = [row["two-sided"]["acr"] for row in same]
            centre = statistics.fmean(seconds), statistics.fmean(acr)
            mark = "o" if part == "equal epochs" else "s"
            label = name if mark == "o" else None
            axis.plot(seconds, acr, mark, color=colour, markersize=3, alpha=0.6)
            axis.plot(*centre, mark, color=colour, markersize=9, label=label)
        axis.set(title=f"$\\sigma$ = {sigma:g}", xlabel="fine-tuning, processor seconds")
        axis.margins(x=0.4)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("average certified radius, two-sided")
    marks, names = figure.axes[0].get_legend_handles_labels()
    marks.append(Line2D([], [], color="black", marker="x", linestyle=""))
    names.append("one class\n(ACR not drawn)")
    figure.legend(marks, names, loc="outside right center", frameon=False)
    title = "circles: equal epochs; squares: the time of consistency; large: mean of three seeds"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110, facecolor="white")


# --------------------------------------------------------------------------------------------------
# The parts
# --------------------------------------------------------------------------------------------------


def run_all(workers, device):
    """Train and certify everything -> objectives.jsonl."""
    list(train_all({"mae": "--sigma 0 --loss-on dropped --mask-ratio 0.5"}, 1))
    best, strongest = tune(workers, device)
    print(best, strongest, flush=True)

    test = finetune.open_images("digits", "", False, 8, 1, torch.device("cpu"))
    index = list(range(0, len(test.labels), 3))
    rows = []

    def add(row, classifier):
        rows.append(row | measure(classifier, test, index, row["sigma"], device))
        ordered = sorted(rows, key=lambda row: [str(row.get(key)) for key in ORDER])
        RESULT.write_text("".join(json.dumps(row) + "\n" for row in ordered))

    def file_of(name, sigma):
        return RUNS / name / f"finetune_sigma_{sigma:g}.pt"

    def train_and_certify(jobs):
        for name in train_all({name: job["command"] for name, job in jobs.items()}, workers):
            job = jobs[name] | dict(seconds=seconds_of(name))
            if name != "clean":
                add(job, rebuild(file_of(name, job["sigma"]), device))

    # Equal epochs: all from DMAE; at sigma 0.5 three of them from MAE and from nothing, too.
    inits = {"dmae": DMAE, "mae": MAE, "scratch": "scratch"}
    jobs = {}
    for seed in SEEDS:
        for sigma in SIGMAS:
            for objective, tried in best.items():
                among = sigma == 0.5 and objective in ("gaussian", "consistency", strongest)
                for init in inits if among else ["dmae"]:
                    jobs[f"{objective}-{init}-{sigma:g}-{seed}"] = dict(
                        part="equal epochs",
                        objective=objective,
                        init=init,
                        sigma=sigma,
                        seed=seed,
                        epochs=EPOCHS,
                        command=flags_of(objective, tried, sigma, seed, inits[init]),
                    )
    clean = dict(
        part="denoised",
        objective="denoise, then classify",
        init="dmae",
        sigma=0.0,
        seed=0,
        epochs=EPOCHS,
        command=flags_of("gaussian", {}, 0, 0),
    )
    train_and_certify(jobs | dict(clean=clean))

    # Equal time: the processor time of consistency's epochs.
    timed = {}
    for seed in SEEDS:
        for sigma in SIGMAS:
            budget = seconds_of(f"consistency-dmae-{sigma:g}-{seed}")
            for objective, tried in best.items():
                if objective == "consistency":
                    continue
                taken = seconds_of(f"{objective}-dmae-{sigma:g}-{seed}")
                epochs = max(2, round(EPOCHS * budget / taken))
                timed[f"{objective}-timed-{sigma:g}-{seed}"] = dict(
                    part="equal time",
                    objective=objective,
                    init="dmae",
                    sigma=sigma,
                    seed=seed,
                    epochs=epochs,
                    command=flags_of(objective, tried, sigma, seed, DMAE, epochs),
                )
    train_and_certify(timed)

    # The clean classifier behind the denoiser, and ensembles of the three seeds.
    for sigma in SIGMAS:
        place = "extras/denoise.py:denoised"
        command = f"{clean['command']}; certify.py --classifier {place}"
        row = clean | dict(sigma=sigma, command=command)
        add(row, plug(place, [DMAE, file_of("clean", 0)]))
    for sigma in SIGMAS:
        files = [file_of(f"{strongest}-dmae-{sigma:g}-{seed}", sigma) for seed in SEEDS]
        for name in ("mean", "consensus"):
            place = f"extras/ensemble.py:{name}"
            row = dict(
                part="ensemble",
                objective=strongest,
                init="dmae",
                sigma=sigma,
                epochs=EPOCHS,
                command=f"certify.py --classifier {place} (three seeds)",
            )
            add(row, plug(place, files))
    print(f"{len(rows)} rows", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--workers", type=int, default=2, help="processes that train")
    parser.add_argument("--table", action="store_true", help="the table, the picture, and end")
    args = parser.parse_args(argv)
    if args.table:
        rows = read_rows(RESULT)
        print_table(rows)
        print()
        print_differences(rows)
        draw(rows, HERE / "objectives.png")
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    run_all(args.workers, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    main()
