"""What the recipe was chosen by: short trainings, judged on held-out training images -> tuning.jsonl.

    python results/fashion-mnist/tune.py --dtype bf16          # in the repository's root, after run.py's pre-training
    python results/fashion-mnist/tune.py --table               # what is there, as a table

Accuracy under one draw of the noise (sigma 0.5) is that of all 3,000 held-out images, the majority vote over 100
draws that of 1,000, the average certified radius (one-sided, n = 1,000) that of 250. A trial that is in tuning.jsonl is
not run again, one that was cut off goes on: runs/fashion has the weights. The rows without commands are of the trials
that came first, by hand.
"""

import argparse
import json
import sys
import threading
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import certify
import finetune

sys.path.insert(0, str(Path(__file__).resolve().parent))

import run

RESULT = Path(__file__).with_name("tuning.jsonl")
EVERY = 12                                         # held-out images: 250
SHAPES = {"patch-7": {}, "patch-4": dict(patch_size=4), "width-192": dict(dim=192)}          # vit_fashion's changes
FIVE = "--epochs 5 --warmup-epochs 1"              # of pre-training, for each of these


def short(what, flags, init="dmae"):
    return what, run.Run(f"{what}, three epochs", init, flags=f"{run.GAUSSIAN} {run.SHORT} {flags}".strip())


def probe(init, lr):
    flags = f"--linear-probe --epochs 2 --warmup-epochs 0.5 --base-lr {lr}"
    return f"probe of {init}, learning rate {lr}", run.Run(f"probe, learning rate {lr}", init, flags=flags)


def trials():
    """(what differs from the recipe, Run): the Gaussian objective, three epochs, where nothing else is said."""
    planned = {(one.part, one.init, one.sigma, one.seed): one for one in run.plan()}
    rows = [(objective, planned[f"{objective}, three epochs", "dmae", 0.5, 0]) for objective in run.OBJECTIVES]
    rows += [short(f"smoothadv, one copy, {steps} steps", f"--objective smoothadv --copies 1 --attack-steps {steps}")
             for steps in (1, 2)]
    rows += [probe("mae", lr) for lr in (1, 5, 20, 80)]
    rows += [("8 epochs", planned["all labels", "dmae", 0.5, 0])]
    rows += [("24 epochs", run.Run("24 epochs", "dmae", flags=f"{run.GAUSSIAN} --epochs 24"))]
    rows += [short(f"layer decay {decay}", f"--layer-decay {decay}") for decay in (0.6, 0.9, 1)]
    rows += [short(f"learning rate {lr}", f"--base-lr {lr}") for lr in (0.0015, 0.006)]
    rows += [(f"consistency {weight}", run.Run(f"consistency {weight}, three epochs", "dmae",
                                               flags=f"--consistency {weight} {run.SHORT}")) for weight in (2, 10)]
    rows += [short(f"{name}, 5 epochs of pre-training", "", init=name) for name in SHAPES]
    return rows


def reshape(command, change):
    """The command with vit_fashion changed, as a command again."""
    script, *flags = command.split()[1:]
    stage = script.removesuffix(".py")
    change, flags = json.dumps(change), json.dumps(flags)
    return f"python -c 'import model, {stage}; model.SIZES[\"vit_fashion\"].update({change}); {stage}.main({flags})'"


def train(one, shared):
    """[commands], all of them run."""
    commands = [one.commands(shared)[0]]
    if one.init in SHAPES:
        commands.insert(0, f"python pretrain.py --recipe fashion --out {run.RUNS / one.init} {shared} {FIVE}")
        commands = [reshape(command, SHAPES[one.init]) for command in commands]
    run.execute(commands, one.out, threading.Event())
    return commands


def held_out_acr(one, dtype):
    """Average certified radius of every 12th of the held-out images."""
    args, checkpoints = certify.parse(f"--recipe fashion --sigma {one.sigma:g} --out {one.out} --device cpu "
                                      f"--dtype {dtype}".split())
    classifier = certify.open_classifier(args, checkpoints, torch.device("cpu"))
    images = certify.open_images(args.dataset, args.data_path, True, args.image_size, args.channels)
    _, held_out = finetune.hold_out(images, checkpoints[0]["data"]["holdout"])
    radii = []
    for i in held_out[::EVERY].tolist():
        x = images.read(i) / images.levels                                                   # C H W
        prediction, radius = certify.certify(classifier, x, one.sigma, n=1000, index=i)
        radii.append(radius * (prediction == int(images.labels[i])))
    return sum(radii) / len(radii)


def run_trials(dtype):
    """Train and judge what RESULT lacks."""
    known = {row.get("what") for row in run.read_log(RESULT)}
    for what, one in trials():
        if what in known:
            continue
        commands = train(one, f"--device cpu --dtype {dtype}")
        found = run.last_row(one.out, one.stem, "holdout")
        held_out = dict(noisy=found["noisy"], vote=found["vote"], acr=round(held_out_acr(one, dtype), 4))
        with open(RESULT, "a") as file:
            file.write(json.dumps(dict(what=what, held_out=held_out, commands=commands)) + "\n")


def print_table():
    print("| what | accuracy under noise, % | majority vote, % | ACR |\n|---|---|---|---|")
    rows = {row.get("what"): row["held_out"] for row in run.read_log(RESULT)}
    for what, _ in trials():
        if found := rows.get(what):
            print(f"| {what} | {100 * found['noisy']:.1f} | {100 * found['vote']:.1f} | {found['acr']:.3f} |")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if not args.table:
        run_trials(args.dtype)
    print_table()


if __name__ == "__main__":
    main()
