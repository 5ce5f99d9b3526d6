"""What one GPU is to measure, in order of value; results/gpu.md says why and for how long.

    python results/gpu.py --minutes 10 --cifar10 D             # in the repository's root
    python results/gpu.py --list                               # the steps, and their commands
    python results/gpu.py --smoke --minutes 30 --cifar10 D     # tiny, on a CPU: does it all run?
    python results/gpu.py --tables results/gpu-CARD            # README.md and pictures again

D: pictures in D/train/CLASS and D/test/CLASS, or torchvision's cifar-10-batches-py. Fashion-MNIST's
four files lie in DATA_PATH/FashionMNIST/raw (--data-path, data).

A step is a few commands that run side by side. It has a limit of time, after which they are killed.
It is finished when its result files are there, and then it is not done again; else the next call
goes on from its checkpoints and rows. Weights lie in runs/gpu, and all else in results/gpu-CARD:
rows, logs, steps.jsonl (seconds, commands, commit), README.md (tables) and pictures. These are
written again after each step, so that an end at any moment loses one step's time at most.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench

import certify

# --------------------------------------------------------------------------------------------------
# The steps
# --------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """Commands that run side by side, the files that they leave, and those that they need."""

    name: str
    limit: int                              # seconds, after which they are killed
    commands: list
    results: list
    needs: list = []
    resumes: bool = True                    # else it starts anew, where all of its limit is left


FULL = dict(
    sigmas=(0.25, 0.5, 1.0),
    benched=("vit_base_patch16", "vit_large_patch16"),
    stages=("certify", "pretrain", "finetune"),
    tiny=("vit_digits", "vit_fashion", "vit_cifar_small"),
    batches=(400, 2000, 10_000),            # of the sweep
    jobs=(1, 2, 4),                         # that share a card
    sharing=("digits-400", "digits-10000", "cifar10-4000"),                  # data set, batch
)
SMOKE = dict(
    sigmas=(0.25,),
    benched=("vit_digits",),
    stages=("finetune",),
    tiny=("vit_digits",),
    batches=(200,),
    jobs=(1, 2),
    sharing=("digits-400",),
)
TINY = "--device cpu --epochs 1 --warmup-epochs 0 --batch 16"
TINY_FLAGS = {                              # what --smoke appends: the last of equal flags holds
    "pretrain.py": TINY,
    "finetune.py": f"{TINY} --save-every 1",
    "certify.py": "--device cpu --batch 100 --n 200 --n0 20 --skip 5 --max 3",
    "tests/bench.py": "--device cpu --dtype fp32 --batch 20 --draws 100 --repeats 1",
}
FAST_TESTS = (                              # ten cases: no other process, no compiled training
    "test_the_networks_products_are_of_the_dtype_and_its_weights_of_fp32",
    "test_pictures_come_through_pinned_memory_as_they_are_on_a_cpu",
    "test_class_folders_go_through_both_stages_with_data_workers",
    "test_the_certifier_counts_on_the_device_what_it_counts_on_a_cpu",
    "test_the_certifier_draws_the_same_noise_again",
)
TESTS = "python -m pytest -m gpu -v --no-header --durations 0"
LEAST = 10                                  # seconds that a step is worth a start
EAGER = "--compile off"                     # compiling takes longer than it saves in two minutes
SMOOTHADV = ("--epochs 24 --objective extras/smoothadv.py:smoothadv "
             "--objective-args eps=0.99609375 copies=2 steps=2")             # eps: 255/256


def pretraining(name, limit, out, flags):
    return Step(name, limit, [f"python pretrain.py --out {out} {flags}"], [f"{out}/pretrain.pt"])


def finetuning(name, limit, home, encoders, sigmas, flags):
    """The same fine-tuning of each encoder at each sigma."""
    commands, results, needs = [], [], []
    for encoder, sigma in itertools.product(encoders, sigmas):
        out, start = f"{home}/{encoder}", ""
        if encoder == "scratch":
            start = "--init scratch --layer-decay 1"
        else:
            needs.append(f"{out}/pretrain.pt")
        commands.append(f"python finetune.py --sigma {sigma:g} --out {out} {flags} {start}".strip())
        results.append(f"{out}/finetune_sigma_{sigma:g}.pt")
    return Step(name, limit, commands, results, needs)


def certifying(name, limit, home, out, encoders, sigmas, n, flags):
    """Certification of each encoder's classifier at each sigma, into out/ENCODER-nN."""
    commands, results, needs = [], [], []
    for encoder, sigma in itertools.product(encoders, sigmas):
        checkpoint = f"{home}/{encoder}/finetune_sigma_{sigma:g}.pt"
        rows = f"{out}/{encoder}-n{n}"
        commands.append(f"python certify.py --sigma {sigma:g} --n {n} --checkpoint {checkpoint} "
                        f"--out {rows} {flags}")
        results.append(f"{rows}/certify_sigma_{sigma:g}.tsv")
        needs.append(checkpoint)
    return Step(name, limit, commands, results, needs)


def testing(name, limit, which, runs):
    result = f"{runs}/{name}.xml"
    return Step(name, limit, [f"{TESTS} {which} --junitxml {result}"], [result], resumes=False)


def benching(name, limit, flags, out):
    result = f"{out}/bench/{name}.json"
    command = f"python tests/bench.py --dtype bf16 {flags} --json {result}"
    return Step(name, limit, [command], [result], resumes=False)


def sharing(place, jobs, home, out):
    """Jobs side by side that share the images of one run: draws a second of a card."""
    dataset, batch = place.split("-")
    flags, checkpoint = "--max 40 --n 50000", f"{home}/dmae/finetune_sigma_0.25.pt"
    if dataset == "digits":
        flags, checkpoint = "--n 100000", "results/digits/finetune_sigma_0.25.pt"
    rows = f"{out}/jobs/{place}-{jobs}"
    command = (f"python certify.py --sigma 0.25 --checkpoint {checkpoint} --out {rows} "
               f"--batch {batch} {flags} {EAGER} --shard")
    commands = [f"{command} {job}/{jobs}" for job in range(jobs)]
    result = f"{rows}/certify_sigma_0.25.tsv"
    return Step(f"jobs-{place}-{jobs}", 120, commands, [result], [checkpoint], resumes=False)


def plan(runs, out, cifar10, data_path, smoke=False):
    """All steps, in the order of their value."""
    few = SMOKE if smoke else FULL
    sigmas = few["sigmas"]
    tests = [f"tests/test_gpu.py::{name}" for name in FAST_TESTS]
    steps = [testing("tests-fast", 180, " ".join(tests), runs)]

    # CIFAR-10. The limits: what is estimated in gpu.md, and half of it more.
    where = f"--recipe cifar10 --data-path {shlex.quote(cifar10)}"
    data = where
    if Path(cifar10, "train").is_dir():
        where += " --dataset folder"
        data = f"{where} --normalisation cifar10"
    if smoke:
        data += " --model vit_cifar_tiny"
    home, rows = f"{runs}/cifar10", f"{out}/cifar10"
    before = f"{data} --epochs 50 {EAGER}"
    after = f"{data} --epochs 20 --warmup-epochs 3 {EAGER}"
    cohens = f"{where} --batch 4000"                           # every 20th test image: the recipe's
    others = ("mae", "scratch")
    steps += [
        pretraining("cifar10-pretrain", 200, f"{home}/dmae", before),
        finetuning("cifar10-finetune", 400, home, ["dmae"], sigmas, after),
        certifying("cifar10-certify", 200, home, rows, ["dmae"], sigmas, 10_000,
                   f"{cohens} {EAGER}"),
    ]
    for sigma in sigmas:
        name = f"cifar10-certify-n100000-{sigma:g}"
        steps.append(certifying(name, 600, home, rows, ["dmae"], [sigma], 100_000, cohens))
    steps += [
        pretraining("cifar10-mae-pretrain", 200, f"{home}/mae",
                    f"{before} --sigma 0 --loss-on dropped"),
        finetuning("cifar10-others-finetune", 300, home, others, [0.25], after),
        certifying("cifar10-others-certify", 150, home, rows, others, [0.25], 10_000,
                   f"{cohens} {EAGER}"),
    ]

    # Speed: large networks; what a batch of 400 costs the small ones.
    for model, stage in itertools.product(few["benched"], few["stages"]):
        flags = f"--model {model} --stage {stage} --draws 4000 --repeats 3"
        steps.append(benching(f"{model}-{stage}", 120, flags, out))
    for batch in few["batches"]:
        flags = f"--model {' '.join(few['tiny'])} --stage certify --batch {batch} --draws 40000"
        steps.append(benching(f"batch-{batch}", 150, f"{flags} --repeats 3", out))

    # Fashion-MNIST, SmoothAdv.
    where = f"--recipe fashion --data-path {shlex.quote(data_path)}"
    fashion, rows = f"{runs}/fashion-mnist", f"{out}/fashion-mnist"
    steps += [
        pretraining("fashion-pretrain", 200, f"{fashion}/dmae", f"{where} {EAGER}"),
        finetuning("fashion-finetune", 500, fashion, ["dmae"], sigmas,
                   f"{where} {EAGER} {SMOOTHADV}"),
    ]
    for sigma in sigmas:
        steps.append(certifying(f"fashion-certify-{sigma:g}", 400, fashion, rows, ["dmae"], [sigma],
                                100_000, f"{where} --skip 10 --batch 10000"))

    # Several processes on one card; the slow tests.
    for place, jobs in itertools.product(few["sharing"], few["jobs"]):
        steps.append(sharing(place, jobs, home, out))
    rest = " ".join(f"--deselect {test}" for test in tests)
    steps.append(testing("tests-rest", 400, f"tests/test_gpu.py {rest}", runs))
    return [tiny(step) for step in steps] if smoke else steps


def tiny(step):
    commands = []
    for command in step.commands:
        script = command.split()[1]
        commands.append(f"{command} {TINY_FLAGS.get(script, '')}".strip())
    return step._replace(commands=commands)


# --------------------------------------------------------------------------------------------------
# Running
# --------------------------------------------------------------------------------------------------


def missing(files):
    return [file for file in files if not Path(file).exists()]


def execute(step, limit, logs):
    """Run a step's commands, and kill what runs after `limit` seconds.

    Returns an exit status for each of them, None for one that was killed.
    """
    for file in step.results:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        for part in [] if step.resumes else certify.parts_of(Path(file)):
            part.unlink()                                      # rows of another time: no measure
    logs.mkdir(parents=True, exist_ok=True)
    end, jobs, finished = time.monotonic() + limit, [], []
    with contextlib.ExitStack() as stack:
        try:
            for i, command in enumerate(step.commands):
                log = stack.enter_context(open(logs / f"{step.name}-{i}.log", "a"))
                print(f"$ {command}", file=log, flush=True)
                line = [sys.executable, *shlex.split(command)[1:]]
                jobs.append(subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT,
                                             start_new_session=True))
            for job in jobs:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    job.wait(max(0, end - time.monotonic()))
            finished = [job.poll() for job in jobs]
        finally:
            for job in jobs:
                if job.poll() is None:
                    os.killpg(job.pid, signal.SIGKILL)         # and what it started
                    job.wait()
    return finished


def run(steps, seconds, runs, out, about):
    """Do what is not finished and fits, in order. A row of steps.jsonl for each step begun."""
    end = time.monotonic() + seconds
    for step in steps:
        left = end - time.monotonic()
        if not missing(step.results):
            print(f"{step.name}: finished before", flush=True)
            continue
        if missing(step.needs):
            print(f"{step.name}: waits for {missing(step.needs)[0]}", flush=True)
            continue
        if left < (LEAST if step.resumes else step.limit):
            print(f"{step.name}: no time", flush=True)
            continue
        print(f"{step.name}: {min(step.limit, left):.0f} s at most", *step.commands, sep="\n  ",
              flush=True)
        start = time.monotonic()
        statuses = execute(step, min(step.limit, left), out / "logs")
        row = dict(
            step=step.name,
            seconds=round(time.monotonic() - start, 1),
            finished=not missing(step.results),
            statuses=statuses,                                 # null: killed at the limit
            **about,
            commands=step.commands,
        )
        print(f"{step.name}: {outcome(row)} after {row['seconds']} s", flush=True)
        with open(out / "steps.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        collect(runs, out)
        try:
            write_tables(out)
        except Exception:                                      # the next step does not need them
            traceback.print_exc()


def outcome(row):
    if None in row["statuses"]:
        return "killed at its limit"
    failed = [status for status in row["statuses"] if status]
    if failed or not row["finished"]:
        return f"ended with status {max(failed, default=0)}"
    return "finished"


def collect(runs, out):
    """Bring settings, logs and pictures of training; leave out locks."""
    for file in Path(runs).rglob("*.*"):
        if file.suffix in (".json", ".jsonl", ".png"):
            copy = out / file.relative_to(runs)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    for lock in out.rglob(".*.lock*"):
        lock.unlink()


# --------------------------------------------------------------------------------------------------
# Tables: of what is in the folder, and nothing else
# --------------------------------------------------------------------------------------------------


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]


def table(*rows):
    """Markdown; the first row is the head."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def steps_table(out):
    rows = [("step", "end", "seconds", "commit", "torch")]
    for row in read_lines(out / "steps.jsonl"):
        rows.append((row["step"], outcome(row), row["seconds"], row["commit"], row["torch"]))
    return table(*rows)


def training_table(folder):
    """Accuracy on test images, and the seconds of each network's training."""
    rows = [("encoder", "sigma", "epochs", "clean", "one draw", "majority of 100 draws",
             "seconds of fine-tuning")]
    for log in sorted(folder.glob("*/finetune_sigma_*.jsonl")):
        settings = json.loads(log.with_suffix(".json").read_text())
        for row in read_lines(log):
            if row.get("split") == "test":
                shares = [f"{row[key]:.1%}" for key in ("clean", "noisy", "vote")]
                rows.append((log.parent.name, f"{settings['sigma']:g}", settings["epochs"], *shares,
                             round(row["time"])))
    return table(*rows)


def certified_table(folder, recipe):
    """What certify.py --report prints; the one-sided curves go into a picture beside the rows."""
    files = sorted(folder.glob("*/certify_sigma_*.tsv"))
    labels = list(dict.fromkeys(file.parent.name for file in files))
    certify.plot(folder / "curves.png", certify.read_curves(files, labels, "one-sided"))
    curves = certify.read_curves(files, labels)
    return certify.table(curves, certify.RECIPES[recipe]["radii"])


def seconds_of(time):
    """Of a TSV's time, h:mm:ss.ffffff."""
    hours, minutes, seconds = time.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def draws_per_second(tsv, jobs):
    """The sum of the rates of jobs that ran side by side: job I has rows I, I + jobs, ..."""
    rows, n0 = certify.read_log(tsv), json.loads(tsv.with_suffix(".json").read_text())["n0"]
    rate = 0
    for job in range(jobs):
        mine = rows[job::jobs]
        rate += (mine["n"] + n0).sum() / sum(map(seconds_of, mine["time"]))
    return rate


def jobs_table(out):
    """Without start and compilation: the seconds are those of the rows."""
    rows = []
    for tsv in out.glob("jobs/*/*.tsv"):
        dataset, batch, jobs = tsv.parent.name.split("-")
        rows.append((dataset, int(batch), int(jobs), draws_per_second(tsv, int(jobs))))
    found = [(*row[:3], f"{row[3]:,.0f}") for row in sorted(rows)]
    return table(("classifier", "batch", "jobs side by side", "draws/s of all"), *found)


def write_tables(out):
    """README.md of the folder."""
    parts = [f"# {out.name}", "Written by `python results/gpu.py`; the commands of each step are "
             "in steps.jsonl, and over its output in logs/."]
    if (out / "steps.jsonl").exists():
        parts += ["## Steps", steps_table(out)]
    for name, recipe in (("cifar10", "cifar10"), ("fashion-mnist", "fashion")):
        if any(out.glob(f"{name}/*/finetune_sigma_*.jsonl")):
            parts += [f"## {name}: accuracy on test images", training_table(out / name)]
        if any(out.glob(f"{name}/*/certify_sigma_*.tsv")):
            parts += [f"## {name}: certified accuracy, %", certified_table(out / name, recipe),
                      f"![certified accuracy over the radius, one-sided]({name}/curves.png)"]
    benched = [json.loads(file.read_text()) for file in sorted(out.glob("bench/*.json"))]
    if benched:
        parts += ["## Speed", "<!-- begin bench -->\n<!-- end bench -->"]
    if any(out.glob("jobs/*/*.tsv")):
        parts += ["## Several processes on one card", jobs_table(out)]
    (out / "README.md").write_text("\n\n".join(parts) + "\n")
    if benched:
        head = "\n\n".join(each["machine"] for each in benched)
        rows = [row for each in benched for row in each["rows"]]
        bench.write_table(out / "README.md", "bench", head, rows)


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def commit():
    """The commit's short name, with a "+" where files differ from it; "" where git knows none."""
    line = ["git", "describe", "--always", "--exclude", "*", "--dirty=+"]
    return subprocess.run(line, capture_output=True, text=True).stdout.strip()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--minutes", type=float, default=10, help="do what fits, and kill what runs then")
    add("--cifar10", default="data", help="class folders of pictures, or torchvision's files")
    add("--data-path", default="data", help="where Fashion-MNIST's files lie")
    add("--runs", help="for weights [runs/gpu]")
    add("--results", help="for all else [results/gpu-CARD]")
    add("--commit", help="of this copy of the repository, where git does not know it")
    add("--list", action="store_true", help="print the steps, and end")
    add("--tables", metavar="DIR", help="write the tables of DIR again, and end")
    add("--smoke", action="store_true", help="on a CPU, with an epoch and a few draws")
    args = parser.parse_args(argv)
    if args.tables:
        return write_tables(Path(args.tables))

    card, runs, place = "CARD", "runs/gpu", "results"
    if args.smoke:
        card, runs, place = "cpu", "runs/gpu-smoke/runs", "runs/gpu-smoke"
    elif torch.cuda.is_available():
        card = torch.cuda.get_device_name()
    elif not args.list:
        parser.error("there is no GPU; --smoke is for CPUs")
    runs = args.runs or runs
    out = Path(args.results or f"{place}/gpu-{re.sub(r'[^A-Za-z0-9.]+', '-', card)}")
    steps = plan(runs, out, args.cifar10, args.data_path, args.smoke)
    if args.list:
        for step in steps:
            state = "" if missing(step.results) else ", finished"
            print(f"{step.name}: {step.limit} s at most{state}", *step.commands, sep="\n  ")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))    # its commands end, too
    about = dict(card=card, torch=torch.__version__, commit=args.commit or commit())
    run(steps, 60 * args.minutes, runs, out, about)


if __name__ == "__main__":
    main()
