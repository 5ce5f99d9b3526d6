"""DMAE, MAE and no pre-training on the digits, three seeds of everything -> comparison.jsonl.

    OMP_NUM_THREADS=1 python results/digits/compare.py         # in the root; half an hour on a core

DMAE and MAE differ in noise, mask ratio and loss at once: no row says which of the three it is.
ablation.py takes them apart.

One process calls the scripts' main(), one after the other, with the flags that it prints, and
collects the last row of each log: that of the test images. Stopped and started again, it goes on:
after Ctrl-C with the seconds so far, after a kill without those of the run that was cut short.
Times are of the processor, since other programs on the machine change those less than the clock's.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
import finetune
import pretrain

SIGMA, SEEDS = 0.25, (0, 1, 2)
RUNS = Path("runs/compare")
RESULT = Path(__file__).with_name("comparison.jsonl")
PRETRAIN = {"dmae": "", "mae": "--sigma 0 --loss-on dropped --mask-ratio 0.5 "}
FEW = "--epochs 10"
TASKS = {                                # what comes after: (its row's part, head, ...), flags
    "all": (dict(part="comparison", labels="all", head="fine-tuned", consistency=2.0), FEW),
    "ten": (dict(part="comparison", labels=10, head="fine-tuned", consistency=2.0),
            f"{FEW} --labels-per-class 10"),
    "probe": (dict(part="comparison", labels="all", head="linear probe", consistency=0.0),
              "--linear-probe --save-every 20"),
    "ce": (dict(part="consistency", labels="all", head="fine-tuned", consistency=0.0),
           f"{FEW} --objective gaussian"),
}
EQUAL_TIME = dict(part="equal time", labels="all", head="fine-tuned", consistency=2.0)


def run(script, name, flags):
    """A run of a stage, done now or earlier.

    Returns its command, its processor seconds, its epochs, and its log's last row.
    """
    out = RUNS / name
    argv = f"{flags} --out {out}".split()
    command, clock = f"python {script.__name__}.py {' '.join(argv)}", out / "seconds"
    print(f"\n{command}", flush=True)
    finished = [file for file in out.glob("*.pt") if ".last" not in file.name]
    if not finished:
        started = time.process_time()
        spent = float(clock.read_text()) if clock.exists() else 0.0
        try:
            script.main(argv)
        finally:
            clock.write_text(f"{spent + time.process_time() - started:.1f}")
    (log,) = out.glob("*.jsonl")
    last = json.loads(log.read_text().splitlines()[-1])
    epochs = json.loads(log.with_suffix(".json").read_text())["epochs"]
    return command, float(clock.read_text()), epochs, last


class Posterior(torch.nn.Module):
    """log P[class | noisy image] if the clean one is a training image, each as likely."""

    def __init__(self, images, labels, sigma):
        super().__init__()
        self.images = images.flatten(1)
        self.labels = labels
        self.sigma = sigma

    def forward(self, noisy):
        squares = torch.cdist(noisy.flatten(1), self.images).square()
        weights = (-squares / (2 * self.sigma**2)).softmax(dim=1)
        return torch.zeros(len(noisy), 10).index_add(1, self.labels, weights).log()


def posterior(labels, seed):
    """Its accuracies on the test images: clean, under one draw of the noise, and by 100 votes."""
    device = torch.device("cpu")
    images, test = (
        finetune.open_images("digits", "", train, 8, 1, device) for train in (True, False)
    )
    train, _ = finetune.hold_out(len(images.labels), 0.1)
    if labels != "all":                                                      # each of them once
        train = finetune.few_labels(train, images.labels, labels, seed)[:10 * labels]
    pixels, answers = images.items[train]
    model = Posterior(pixels / images.white, answers, SIGMA)

    right = dict(clean=0, noisy=0, vote=0)
    for start in range(0, len(test.labels), 250):
        pixels, answers = test.items[start:start + 250]
        x = pixels / test.white                                              # B C H W
        torch.manual_seed(finetune.seed_of(seed, start, 0))
        noise = torch.randn_like(x)
        votes = torch.zeros(len(x), 10)
        for _ in range(20):
            copies = x + SIGMA * torch.randn(5, *x.shape)                    # m B C H W
            for noisy in copies:
                votes += F.one_hot(model(noisy).argmax(dim=1), 10)           # B classes
        right["clean"] += int((model(x).argmax(dim=1) == answers).sum())
        right["noisy"] += int((model(x + SIGMA * noise).argmax(dim=1) == answers).sum())
        right["vote"] += int((votes.argmax(dim=1) == answers).sum())
    return {name: round(count / len(test.labels), 6) for name, count in right.items()}


def compare():
    """Yield the rows of comparison.jsonl."""
    for seed in SEEDS:
        before = {"scratch": ("", 0.0, "scratch")}
        for init, flags in PRETRAIN.items():
            command, seconds, *_ = run(pretrain, f"{init}-{seed}", f"{flags}--seed {seed}")
            before[init] = command, seconds, RUNS / f"{init}-{seed}" / "pretrain.pt"

        def tune(task, init, what, flags, seed=seed, before=before):
            pretrain_command, pretrain_seconds, file = before[init]
            flags = f"--sigma {SIGMA} --init {file} --seed {seed} {flags}"
            command, seconds, epochs, last = run(finetune, f"{task}-{init}-{seed}", flags)
            return dict(
                part=what["part"],
                init=init,
                labels=what["labels"],
                head=what["head"],
                consistency=what["consistency"],
                seed=seed,
                epochs=epochs,
                pretrain_seconds=pretrain_seconds,
                finetune_seconds=seconds,
                clean=last["clean"],
                noisy=last["noisy"],
                vote=last["vote"],
                pretrain_command=pretrain_command,
                command=command,
            )

        for task, what in TASKS.items():
            for init in before if task != "ce" else ["dmae"]:
                row = tune(task, init, *what)
                yield row
                if (task, init) == ("all", "scratch"):
                    epochs = 10 + round(10 * before["dmae"][1] / row["finetune_seconds"])

        # From scratch, for as long as DMAE's two stages took together.
        yield tune("equal", "scratch", EQUAL_TIME, f"--epochs {epochs}")
        for labels in ("all", 10):
            none = dict(epochs=0, pretrain_seconds=0.0, finetune_seconds=0.0)
            yield dict(
                part="posterior",
                init="none",
                labels=labels,
                head="Bayes posterior",
                consistency=0.0,
                seed=seed,
                **none,
                **posterior(labels, seed),
                pretrain_command="",
                command="python results/digits/compare.py",
            )


if __name__ == "__main__":
    RESULT.write_text("".join(json.dumps(row) + "\n" for row in compare()))
