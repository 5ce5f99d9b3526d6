"""What the recipe was chosen by: short trainings, judged on held-out images -> tuning.jsonl.

    python results/fashion-mnist/tune.py --dtype bf16         # after run.py's pre-training
    python results/fashion-mnist/tune.py --table              # what is there, as a table

Accuracy under one draw of the noise (sigma 0.5) is that of all 3,000 held-out images, the majority
vote over 100 draws that of 1,000, the average certified radius (one-sided, n = 1,000) that of 250.
A trial that is in tuning.jsonl, by its name, is not run again; one that was cut off goes on:
runs/fashion has the weights. The rows without commands are of the trials that came first, by hand.
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
SHAPES = {                                         # changes of vit_fashion
    "patch-7": {},
    "patch-4": dict(patch_size=4),
    "width-192": dict(dim=192),
}
FIVE = "--epochs 5 --warmup-epochs 1"              # of pre-training, for each of these


def short(what, flags=run.GAUSSIAN, init="dmae"):
    return what, run.Run(f"{what}, three epochs", init, flags=f"{run.SHORT} {flags}")


def probe(init, lr):
    flags = f"--linear-probe --epochs 2 --warmup-epochs 0.5 --base-lr {lr}"
    one = run.Run(f"probe, learning rate {lr}", init, flags=flags)
    return f"probe of {init}, learning rate {lr}", one


def trials():
    """(what differs from the recipe, Run): three Gaussian epochs, where nothing else is said."""
    planned = {run.key_of(vars(one)): one for one in run.plan()}
    rows = []
    for objective in run.OBJECTIVES:
        rows.append((objective, planned[f"{objective}, three epochs", "dmae", 0.5, 0]))
    for steps in (1, 2):
        flags = f"{run.SMOOTHADV} copies=1 steps={steps}"
        rows.append(short(f"smoothadv, one copy, {steps} steps", flags))
    rows += [probe("mae", lr) for lr in (1, 5, 20, 80)]
    rows.append(("8 epochs", planned["all labels", "dmae", 0.5, 0]))
    rows.append(("24 epochs", run.Run("24 epochs", "dmae", flags=f"{run.GAUSSIAN} --epochs 24")))
    for decay in (0.6, 0.9, 1):
        rows.append(short(f"layer decay {decay}", f"{run.GAUSSIAN} --layer-decay {decay}"))
    for lr in (0.0015, 0.006):
        rows.append(short(f"learning rate {lr}", f"{run.GAUSSIAN} --base-lr {lr}"))
    for lam in (2, 10):
        rows.append(short(f"consistency {lam}", f"--objective-args lam={lam}"))
    for name in SHAPES:
        rows.append(short(f"{name}, 5 epochs of pre-training", init=name))
    return rows


def reshape(command, change):
    """The command with vit_fashion changed, as a command again."""
    script, *flags = command.split()[1:]
    stage = script.removesuffix(".py")
    changed = f'model.SIZES["vit_fashion"].update({json.dumps(change)})'
    return f"python -c 'import model, {stage}; {changed}; {stage}.main({json.dumps(flags)})'"


def train(one, shared):
    """[commands], all of them run."""
    commands = [one.commands(shared)[0]]
    if one.init in SHAPES:
        out = run.RUNS / one.init
        first = f"python pretrain.py --recipe fashion --out {out} {shared} {FIVE}"
        commands = [reshape(command, SHAPES[one.init]) for command in (first, *commands)]
    run.execute(commands, one.out, threading.Event())
    return commands


def held_out_radii(flags, choose, **how):
    """Of the images choose(held_out), by certify.py's flags; 0 where wrong or without an answer."""
    args, checkpoint = certify.parse(flags.split())
    device = torch.device("cpu")
    f = certify.open_classifier(args, checkpoint, device)
    data = checkpoint["data"]
    where = (args.dataset, args.data_path)
    images = certify.open_images(*where, True, args.size, data["channels"], device)
    _, held_out = finetune.hold_out(len(images.labels), data["holdout"])
    radii = []
    for i in choose(held_out).tolist():
        pixels, label = images.items[i]
        x = pixels / images.white                                            # C H W
        prediction, radius = certify.certify(f, x, args.sigma, index=i, **how)
        radii.append(radius * (prediction == int(label)))
    return radii


def held_out_acr(one, dtype):
    """Average certified radius of every 12th of the held-out images."""
    flags = f"--recipe fashion --sigma {one.sigma:g} --out {one.out} --device cpu --dtype {dtype}"
    radii = held_out_radii(flags, lambda held_out: held_out[::EVERY], n=1000)
    return sum(radii) / len(radii)


def run_trials(dtype):
    """Train and judge what RESULT lacks."""
    known = {row.get("what") for row in run.read_rows(RESULT)}
    for what, one in trials():
        if what in known:
            continue
        commands = train(one, f"--device cpu --dtype {dtype}")
        found = run.last_row(one.out, one.stem, "holdout")
        held_out = dict(noisy=found["noisy"], vote=found["vote"])
        held_out["acr"] = round(held_out_acr(one, dtype), 4)
        with open(RESULT, "a") as file:
            row = dict(what=what, held_out=held_out, commands=commands)
            file.write(json.dumps(row) + "\n")


def print_table():
    print("| what | accuracy under noise, % | majority vote, % | ACR |\n|---|---|---|---|")
    rows = {row.get("what"): row["held_out"] for row in run.read_rows(RESULT)}
    for what, _ in trials():
        if what in rows:
            noisy, vote, acr = (rows[what][key] for key in ("noisy", "vote", "acr"))
            print(f"| {what} | {100 * noisy:.1f} | {100 * vote:.1f} | {acr:.3f} |")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if not args.table:
        run_trials(args.dtype)
    print_table()


if __name__ == "__main__":
    main()
