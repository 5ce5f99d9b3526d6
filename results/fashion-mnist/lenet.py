"""LeNet, the network of the randomized smoothing literature on MNIST, trained with finetune.py's objectives.

    python results/fashion-mnist/lenet.py --sigma 0.5 --objective gaussian --out runs/lenet/gaussian-0.5
    python results/fashion-mnist/lenet.py --sigma 0.5 --objective smoothmix --epochs 90 --seed 1 --out runs/lenet/smoothmix-0.5
    LENET=runs/lenet/gaussian-0.5/lenet.pt python certify.py --sigma 0.5 --recipe fashion --data-path data \\
        --classifier results/fashion-mnist/lenet.py:classifier --out runs/lenet/gaussian-0.5

Data, held-out images, augmentation, batch, order of the images and noise are those of `finetune.py --recipe
fashion`, and so are the objectives with all their hyperparameters. Its flags are taken here, too, but for
those of its network and its schedule. Network and optimizer are the literature's: SGD with momentum 0.9, weight
decay 1e-4, learning rate 0.01, a tenth of it from a third of the epochs on, a hundredth from two thirds on.

The last epoch's weights become OUT/lenet.pt. Killed at any moment, the same command goes on from the last epoch.
Give each network an --out of its own: certify.py refuses to go on with other weights.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import finetune

RECIPE = ["--recipe", "fashion", "--init", "scratch", "--dtype", "fp32", "--epochs", "30", "--base-lr", "0.01",
          "--weight-decay", "1e-4"]
NOT_TAKEN = {                              # flags of finetune.py that mean nothing here
    "init", "image_size", "normalisation", "model", "model_size", "drop_path", "layer_decay", "linear_probe",
    "min_lr", "warmup_epochs", "vote_every", "log_every", "save_every", "compile", "recompute", "dry_run", "export",
}


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
    """The network of a file lenet.pt."""
    weights = torch.load(file, map_location="cpu", weights_only=True)["model"]
    network = LeNet(classes=len(weights["9.bias"]))
    network.load_state_dict(weights)
    return network


# certify.py moves to its device the networks that exist when this file has been imported.
NETWORK = read(os.environ["LENET"]) if __name__ != "__main__" and "LENET" in os.environ else None


def classifier(x):
    """For certify.py --classifier: the network that the environment variable LENET named."""
    finetune.require(NETWORK is not None, "the environment variable LENET names no lenet.pt")
    return NETWORK(x)


def parse(argv):
    """finetune.py's settings for this run, and those of them that mean something here."""
    given = {word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_") for word in argv
             if word.startswith("--")}
    refused = sorted(given & NOT_TAKEN)
    finetune.require(not refused, f"LeNet does not take {', '.join(refused)}")
    args = finetune.parse([*RECIPE, *argv])
    return args, {key: value for key, value in vars(args).items() if key not in NOT_TAKEN}


def rate_at(step, steps, peak):
    """The learning rate: a tenth of it from each third of the steps to the next."""
    return peak * 0.1 ** (3 * step // steps)


def save(path, network, settings, log, **more):
    """Write the weights and how they came about; the log's last row has the seconds and the held-out accuracy."""
    content = dict(model=finetune.copy_of_weights(network), settings=settings, log=log, seconds=log[-1]["seconds"],
                   held_out=log[-1]["noisy"], **more)
    finetune.write_atomically(path, lambda temporary: torch.save(content, temporary))


def resume(last, network, optimizer):
    """Go on from the last epoch's file, if there is one: the log so far."""
    if not last.exists():
        return []
    state = torch.load(last, map_location="cpu", weights_only=True)
    network.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    print(f"continuing {last} after epoch {state['log'][-1]['epoch']:g}")
    return state["log"]


def train(args, settings):
    """Train LeNet and write OUT/lenet.pt."""
    rank, world, device = finetune.start_processes(args.device)
    finetune.require(world == 1, "LeNet is trained by one process")
    finetune.use_deterministic_kernels(args.deterministic)
    settings["dtype"] = args.dtype = finetune.pick_dtype(
        args.dtype, device, finetune.read_settings(f"{args.out}/lenet", args.overwrite),
    )

    images = finetune.open_images(args.dataset, args.data_path, True, 28, 1)
    finetune.keep_small_images(images, device)
    index, held_out = finetune.hold_out(images, args.holdout)
    if args.labels_per_class:
        index = finetune.few_labels(index, images.labels, len(images.classes), args.labels_per_class, args.seed)
    augment = finetune.make_augment(args.augment, images, args.erasing)
    mix = finetune.make_mix(args.mixup, args.cutmix, len(images.classes))
    steps_per_epoch, steps, _ = finetune.count_steps(args, len(index))
    device_batch, micro_batches = finetune.share_batch(args.batch, world, args.device_batch)

    torch.manual_seed(args.seed)
    network = LeNet(len(images.classes)).to(device)
    peak = args.base_lr * args.batch / 256
    optimizer = torch.optim.SGD(network.parameters(), lr=peak, momentum=0.9, weight_decay=args.weight_decay)

    stem = f"{args.out}/lenet"
    last, result = Path(f"{stem}.last.pt"), Path(f"{stem}.pt")
    with finetune.run_directory(stem, settings, finetune.MAY_CHANGE, result, args.overwrite):
        if result.exists():
            print(f"{result} is done; --out elsewhere, or --overwrite to do it again")
            return
        log = resume(last, network, optimizer)
        done = log[-1]["step"] if log else 0
        seconds = log[-1]["seconds"] if log else 0.0
        positions = finetune.training_positions(index, args.batch, device_batch, done, steps, args.seed, rank, world)
        batches = finetune.load_batches(images, positions, device, augment, args.seed)
        while done < steps:
            end = min(done + steps_per_epoch, steps)
            began = time.perf_counter()
            total = 0.0
            for step in range(done, end):
                optimizer.param_groups[0]["lr"] = rate_at(step, steps, peak)
                epoch = step / steps_per_epoch
                loss, _ = finetune.train_step(
                    network, optimizer, batches, mix, images.levels, micro_batches, args, step, epoch, rank,
                )
                total += loss
            loss = float(total) / (end - done)                         # waits for the device
            seconds += time.perf_counter() - began
            if not math.isfinite(loss):
                raise finetune.RunError(f"loss {loss} at step {end}: stopped")
            done = end
            found = finetune.measure(network, images, held_out, False, args, rank, world, device)
            log.append(dict(step=done, epoch=round(done / steps_per_epoch, 4), loss=loss, seconds=round(seconds, 2),
                            clean=found["clean"], noisy=found["noisy"]))
            print("  ".join(f"{key} {value:.4g}" for key, value in log[-1].items()), flush=True)
            save(last, network, settings, log, optimizer=optimizer.state_dict())
        rows = "".join(f"{json.dumps(row)}\n" for row in log)
        finetune.write_atomically(f"{stem}.jsonl", lambda path: path.write_text(rows))
        save(result, network, settings, log)
        last.unlink()
        print(f"wrote {result} after {seconds:.0f} s of training")


def main(argv=None):
    with finetune.one_line_errors():
        train(*parse(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
