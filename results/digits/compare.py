"""DMAE, MAE and no pre-training on the digits, three seeds of everything -> comparison.jsonl (a row per run).

    OMP_NUM_THREADS=1 python results/digits/compare.py                  # in the repository's root; half an hour on one core

One process calls the scripts' main(), one after the other, with the flags that it prints, and collects the last row of
each log: that of the test images. Stopped and started again, it goes on: after Ctrl-C with the seconds so far, after a
kill without those of the run that was cut short. Times are of the processor, since other programs on the machine change
those less than the clock's.
"""

import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import finetune
import pretrain

SIGMA, RUNS, RESULT = 0.25, Path("runs/compare"), Path(__file__).with_name("comparison.jsonl")
PRETRAIN = {"dmae": "", "mae": "--sigma 0 --loss-on dropped --mask-ratio 0.5 "}
TASKS = {                                # what is trained after it: (part, head, labels, consistency, flags)
    "all": ("comparison", "fine-tuned", "all", 2.0, "--epochs 10"),
    "ten": ("comparison", "fine-tuned", 10, 2.0, "--epochs 10 --labels-per-class 10"),
    "probe": ("comparison", "linear probe", "all", 0.0, "--linear-probe --vote-every 20"),
    "ce": ("consistency", "fine-tuned", "all", 0.0, "--epochs 10 --consistency 0"),
}


def run(script, name, flags):
    """(its command, its processor seconds, its epochs, its log's last row) of a run of a stage, done now or earlier."""
    out = RUNS / name
    argv = f"{flags} --out {out}".split()
    command, clock = f"python {script.__name__}.py {' '.join(argv)}", out / "seconds"
    print(f"\n{command}", flush=True)
    if not any(file.name.count(".last") == 0 for file in out.glob("*.pt")):
        started, spent = time.process_time(), float(clock.read_text()) if clock.exists() else 0.0
        try:
            script.main(argv)
        finally:
            clock.write_text(f"{spent + time.process_time() - started:.1f}")
    (log,) = out.glob("*.jsonl")
    last = json.loads(log.read_text().splitlines()[-1])
    epochs = json.loads(log.with_suffix(".json").read_text())["epochs"]
    return command, float(clock.read_text()), epochs, last


class Posterior(torch.nn.Module):
    """log P[class | noisy image] if the clean one is one of the training images, each as likely as the other."""

    def __init__(self, images, labels, sigma):
        super().__init__()
        self.images, self.labels, self.sigma = images.flatten(1), labels, sigma

    def forward(self, noisy):
        weights = (-torch.cdist(noisy.flatten(1), self.images).square() / (2 * self.sigma**2)).softmax(dim=1)
        return torch.zeros(len(noisy), 10).index_add(1, self.labels, weights).log()


def posterior(labels, seed):
    images = finetune.open_images("digits", None, train=True, size=8, channels=1)
    test = finetune.open_images("digits", None, train=False, size=8, channels=1)
    train, _ = finetune.hold_out(images, 0.1)
    if labels != "all":
        train = finetune.few_labels(train, images.labels, 10, labels, seed)[:10 * labels]            # each of them once
    model = Posterior(images.pixels[train] / images.levels, images.labels[train], SIGMA)
    everything = torch.arange(len(test))
    found = finetune.evaluate(model, test, everything, SIGMA, 100, 250, seed, 0, 1, torch.device("cpu"))
    return dict(zip(("clean", "noisy", "vote"), found, strict=True))


def compare():
    for seed in range(3):
        before = {"scratch": ("", 0.0, "scratch")}
        for init, flags in PRETRAIN.items():
            command, seconds, *_ = run(pretrain, f"{init}-{seed}", f"{flags}--seed {seed}")
            before[init] = command, seconds, RUNS / f"{init}-{seed}" / "pretrain.pt"

        def tune(task, init, part, head, labels, consistency, flags, seed=seed, before=before):
            command, seconds, epochs, last = run(finetune, f"{task}-{init}-{seed}",
                                                 f"--sigma {SIGMA} --init {before[init][2]} --seed {seed} {flags}")
            return dict(part=part, init=init, labels=labels, head=head, consistency=consistency, seed=seed,
                        epochs=epochs, pretrain_seconds=before[init][1], finetune_seconds=seconds,
                        **{key: last[key] for key in ("clean", "noisy", "vote")}, pretrain_command=before[init][0],
                        command=command)

        for task, what in TASKS.items():
            for init in before if task != "ce" else ["dmae"]:
                yield (row := tune(task, init, *what))
                if (task, init) == ("all", "scratch"):
                    epochs = 10 + round(10 * before["dmae"][1] / row["finetune_seconds"])
        # from scratch, for as long as DMAE's two stages took together
        yield tune("equal", "scratch", "equal time", "fine-tuned", "all", 2.0, f"--epochs {epochs}")
        for labels in ("all", 10):
            yield dict(part="posterior", init="none", labels=labels, head="Bayes posterior", consistency=0.0, seed=seed,
                       epochs=0, pretrain_seconds=0.0, finetune_seconds=0.0, **posterior(labels, seed), pretrain_command="",
                       command="python results/digits/compare.py")


if __name__ == "__main__":
    RESULT.write_text("".join(json.dumps(row) + "\n" for row in compare()))
