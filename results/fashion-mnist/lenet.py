"""LeNet, the network of the randomized smoothing literature on MNIST, by finetune.py's objectives.

    python results/fashion-mnist/lenet.py --sigma 0.5 --objective gaussian --out runs/lenet/gaussian
    python results/fashion-mnist/lenet.py --sigma 0.5 --out runs/lenet/smoothmix --epochs 90 \\
        --objective extras/smoothmix.py:smoothmix --objective-args copies=4 step=1.0 eta=1.0
    LENET=runs/lenet/gaussian/lenet.pt python certify.py --sigma 0.5 --recipe fashion \\
        --classifier results/fashion-mnist/lenet.py:classifier --out runs/lenet/gaussian

Data, held-out images, augmentation, batch, order of the images and noise are those of `finetune.py
--recipe fashion`, and so are the objectives: they are functions of any f(x, noise). finetune.py's
flags are taken here, too, but for those of its network and its schedule. Network and optimizer are
the literature's: SGD with momentum 0.9, weight decay 1e-4, learning rate 0.01, a tenth of it from a
third of the epochs on, a hundredth from two thirds on.

The last epoch's weights become OUT/lenet.pt. Killed at any moment, the same command goes on from
the last epoch. Give each network an --out of its own: certify.py refuses to go on with other
weights.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import certify
import finetune

RECIPE = ["--recipe", "fashion", "--init", "scratch", "--dtype", "fp32", "--epochs", "30",
          "--base-lr", "0.01", "--weight-decay", "1e-4"]
NOT_TAKEN = {                              # flags of finetune.py that mean nothing here
    "init", "size", "normalisation", "model", "drop_path", "layer_decay", "linear_probe", "min_lr",
    "warmup_epochs", "save_every", "compile", "device_batch", "workers",
}
TAKEN = {name: about for name, about in (finetune.FLAGS | finetune.RUN_FLAGS).items()
         if name not in NOT_TAKEN}


class LeNet(nn.Sequential):
    """(B, 1, 28, 28) in [0, 1] -> logits (B, classes). There is no normalisation layer.

    Channels lie last in memory, which is faster on CPUs.
    """

    def __init__(self, classes=10):
        super().__init__(
            nn.Conv2d(1, 20, 5),                                       # B 20 24 24
            nn.ReLU(),
            nn.MaxPool2d(2),                                           # B 20 12 12
            nn.Conv2d(20, 50, 5),                                      # B 50 8 8
            nn.ReLU(),
            nn.MaxPool2d(2),                                           # B 50 4 4
            nn.Flatten(),                                              # B 800
            nn.Linear(800, 500),
            nn.ReLU(),
            nn.Linear(500, classes),
        )
        self.to(memory_format=torch.channels_last)


def read(file):
    """The network of a file lenet.pt, in eval mode."""
    weights = torch.load(file, map_location="cpu", weights_only=True)["model"]
    network = LeNet(classes=len(weights["9.bias"]))
    network.load_state_dict(weights)
    return network.eval()


NETWORK = read(os.environ["LENET"]) if __name__ != "__main__" and "LENET" in os.environ else None


def classifier(z):
    """For certify.py --classifier: the network that the environment variable LENET named."""
    if NETWORK is None:
        certify.refuse("the environment variable LENET names no lenet.pt")
    return NETWORK.to(z.device)(z)


def parse(argv):
    """finetune.py's settings for this run, and those of them that mean something here."""
    finetune.read_flags(__doc__, TAKEN, argv)
    args = finetune.parse([*RECIPE, *argv])
    return args, {name: getattr(args, name) for name in [*TAKEN, "objective_sha256"]}


def rate_at(step, steps, peak):
    """The learning rate: a tenth of it from each third of the steps to the next."""
    return peak * 0.1 ** (3 * step // steps)


def resume(last, network, optimizer):
    """Go on from the last epoch's file, if there is one: the log so far."""
    if not last.exists():
        return []
    state = torch.load(last, map_location="cpu", weights_only=True)
    network.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    print(f"continuing {last} after epoch {state['log'][-1]['epoch']}")
    return state["log"]


def train(args, settings):
    """Train LeNet and write OUT/lenet.pt."""
    if finetune.WORLD > 1:
        finetune.refuse("LeNet is trained by one process")
    device, args.dtype = finetune.pick_device(args.device, args.dtype)
    settings["dtype"] = args.dtype
    objective, _ = finetune.open_objective(args.objective)

    # Data: as finetune.py has them.
    images, _, index, held_out = finetune.open_data(args, device)
    augment = finetune.make_augment(args.augment, images, args.erasing)
    mix = finetune.make_mix(args.mixup, args.cutmix, len(images.classes))
    _, _, steps = finetune.plan(args.batch, args.batch, len(index))        # of an epoch

    # The network as the f that objectives take, and its optimizer.
    torch.manual_seed(args.seed)
    network = LeNet(len(images.classes)).to(device)
    f = finetune.noisy_logits(network, args.dtype)
    peak = args.base_lr * args.batch / 256
    decay = args.weight_decay
    optimizer = torch.optim.SGD(network.parameters(), lr=peak, momentum=0.9, weight_decay=decay)

    stem = f"{args.out}/lenet"
    last, result = Path(f"{stem}.last.pt"), Path(f"{stem}.pt")
    with finetune.run_directory(stem, settings):
        if result.exists():
            print(f"{result} is done; use another --out to do it again")
            return
        log = resume(last, network, optimizer)
        seconds = log[-1]["seconds"] if log else 0.0
        for epoch in range(len(log), args.epochs):
            order = finetune.micro_batches(index, args.batch, args.batch, epoch, args.seed)
            batches = finetune.load_batches(images, order, device, augment, args.seed, epoch)
            began = time.perf_counter()
            total = 0.0
            for step, (x, labels) in enumerate(batches, epoch * steps):    # B 1 28 28, B
                optimizer.param_groups[0]["lr"] = rate_at(step, args.epochs * steps, peak)
                torch.manual_seed(finetune.seed_of(args.seed, step, 0, 0))
                x, targets = mix(x, labels)                                # B 1 28 28, B classes
                when = (step / steps, args.epochs)
                loss = objective(f, x, targets, args.sigma, *when, **args.objective_args)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                total += loss.detach()
            loss = finetune.mean_loss(total, epoch + 1) / steps            # waits for the device
            seconds += time.perf_counter() - began

            clean, noisy = (
                finetune.accuracy(network, images, held_out, sigma, 1, args, device)
                for sigma in (0.0, args.sigma)
            )
            row = dict(step=(epoch + 1) * steps, epoch=epoch + 1, loss=loss)
            log.append(row | dict(seconds=round(seconds, 2), clean=clean, noisy=noisy))
            print("  ".join(f"{key} {value:.4g}" for key, value in log[-1].items()), flush=True)
            rest = dict(optimizer=optimizer.state_dict(), log=log)
            finetune.save(last, network.state_dict(), **rest)

        rows = "".join(f"{json.dumps(row)}\n" for row in log)
        finetune.write(f"{stem}.jsonl", lambda file: file.write(rows.encode()))
        finetune.save(result, network.state_dict(), settings=settings, log=log)
        last.unlink()
        print(f"wrote {result} after {seconds:.0f} s of training")


def main(argv=None):
    with finetune.one_line_errors():
        train(*parse(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
