"""Stage 1: pre-train a denoising masked autoencoder (DMAE, section 3.2).

    x + noise  ->  mask  ->  reconstruct x

    python pretrain.py                                         # digits, two CPU cores: a minute
    python pretrain.py --recipe cifar10                        # one GPU
    torchrun --nproc_per_node=8 pretrain.py --recipe imagenet-base --data-path /data/imagenet
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        pretrain.py --recipe imagenet-base
    python pretrain.py --sigma 0 --loss-on dropped --out runs/mae        # the plain MAE

A recipe sets data, model and every hyperparameter; any other flag overrides one. The result is
RUN/pretrain.pt, with its settings (.json), its log (.jsonl) and a picture beside it. Killed at any
moment, the same command goes on from its last checkpoint and ends with the same bits.

Axes:  B images   C channels   H W pixels   N patches   P patch side

Read down to the first ruler of equal signs: the rest is plumbing.
"""

import argparse
import atexit
import contextlib
import copy
import functools
import json
import math
import os
import sys
import time
from collections import namedtuple
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import repeat
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import InterpolationMode, v2
from torchvision.utils import save_image
from tqdm import tqdm

from model import (
    NORMALISATION,
    SIZES,
    build_dmae,
    decays,
    learning_rate,
    load_autoencoder,
    load_weights,
    patchify,
    read_checkpoint,
    unpatchify,
)

# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------

FLAGS = {                               # name: (value in the recipe digits, what it is, *choices)
    "recipe": ("digits", "data, model and all hyperparameters", "digits", "fashion", "mnist",
               "cifar10", "cifar10-transfer", "imagenet-base", "imagenet-large", "imagenet-huge"),
    "dataset": ("digits", "folder: a folder for each class in DATA_PATH/train and DATA_PATH/val",
                "digits", "mnist", "fashion-mnist", "cifar10", "folder"),
    "size": (8, "side of a folder's pictures, pixels; the noise is added at this resolution"),
    "normalisation": ("", "whose mean and deviation; '': the data set's, a folder's: imagenet",
                      "", *NORMALISATION),
    "holdout": (0.1, "training images kept for pictures and finetune.py, share or number; 0: none"),
    "augment": ("none", "resized-crop is for pictures of more than 64 pixels, the others for fewer",
                "none", "shift", "flip", "shift-flip", "resized-crop"),
    "model": ("vit_digits", "the network's size", *SIZES),
    "init": ("", "weights to start from; optimizer and schedule start anew"),
    "sigma": (0.25, "standard deviation of the noise, for pixels in [0, 1]; 0: no noise"),
    "mask_ratio": (0.25, "share of patches dropped, below 1; 0: none"),
    "loss_on": ("all", "all patches (DMAE) or the dropped ones (MAE)", "all", "dropped"),
    "norm_pix": (False, "standardise each target patch by its own mean and variance"),
    "batch": (128, "images of a step, over all processes and accumulated micro-batches"),
    "epochs": (150, "passes over the training images"),
    "warmup_epochs": (10.0, "epochs of linear warm-up; 0: none"),
    "base_lr": (8e-3, "learning rate per 256 images of the batch"),
    "weight_decay": (0.05, "AdamW's; 0: none"),
    "save_every": (50, "epochs between checkpoints"),
    "seed": (0, "of everything random; 0: a seed like any other"),
    "dtype": ("auto", "auto: bf16 on GPUs that have it, else fp32", "auto", "fp32", "bf16"),
}
RUN_FLAGS = {                           # how to run: these may change when a run goes on
    "out": ("", "run directory; '': runs/RECIPE"),
    "data_path": ("data", "where the data set lies"),
    "device": ("auto", "where to run", "auto", "cpu", "cuda", "mps"),
    "device_batch": (128, "most images of a process at a time; the rest accumulates"),
    "workers": (8, "processes that read pictures, for each process; 0: none"),
    "compile": ("auto", "torch.compile; auto: on GPUs", "auto", "on", "off"),
}
PAPER = dict(                           # section 4.1 and appendix: ImageNet
    dataset="folder",
    data_path="data/imagenet",
    size=224,
    holdout=10_000,
    augment="resized-crop",             # scale 0.2 to 1, bicubic, and flip
    mask_ratio=0.75,
    norm_pix=True,
    batch=4096,
    device_batch=512,                   # 42 GiB for ViT-L in bf16 (counted)
    warmup_epochs=40.0,
    base_lr=1.5e-4,
    save_every=1,
)
FASHION = dict(                         # ours, for two CPU cores; chosen on held-out images
    dataset="fashion-mnist",
    size=28,
    model="vit_fashion",
    holdout=0.05,
    augment="flip",                     # shifts by up to three pixels did not help
    mask_ratio=0.75,
    batch=256,
    device_batch=256,
    epochs=30,
    warmup_epochs=2.0,
    base_lr=2e-3,
    save_every=2,
)
RECIPES = {                             # what differs from the recipe digits
    "digits": dict(),                   # ours, chosen on held-out images; shifts made it worse
    "fashion": FASHION,
    "mnist": dict(FASHION, dataset="mnist", augment="none"),
    "cifar10": dict(                    # ours: a small ViT from nothing on one GPU
        dataset="cifar10",
        size=32,
        model="vit_cifar_small",
        holdout=0.04,
        augment="shift-flip",           # by up to four pixels
        mask_ratio=0.75,
        norm_pix=True,
        batch=512,
        device_batch=512,
        epochs=200,
        base_lr=5e-4,
        save_every=10,
    ),
    "cifar10-transfer": dict(           # section 4.3: continued from ImageNet, --init CHECKPOINT
        PAPER,
        dataset="cifar10",
        data_path="data",
        size=32,
        model="vit_base_patch16",       # it resizes to 224
        holdout=0.04,
        augment="flip",
        batch=512,
        epochs=50,
        warmup_epochs=10.0,
        base_lr=5e-5,
    ),
    "imagenet-base": dict(PAPER, model="vit_base_patch16", epochs=1100),
    "imagenet-large": dict(PAPER, model="vit_large_patch16", epochs=1600),
    # ViT-H is in the published code, but not in the paper's tables; 256 images take 44 GiB.
    "imagenet-huge": dict(PAPER, model="vit_huge_patch14", epochs=1600, device_batch=256),
}


def parse(argv):
    """The settings: what the flags say, else what the recipe says."""
    table = FLAGS | RUN_FLAGS
    given = read_flags(__doc__, table, argv)
    recipe = given.get("recipe", "digits")
    values = {name: value for name, (value, *_) in table.items()} | RECIPES[recipe]
    check_dataset(given, values)
    return argparse.Namespace(**values | {"out": f"runs/{recipe}"} | given)


# --------------------------------------------------------------------------------------------------
# Data, model, optimizer
# --------------------------------------------------------------------------------------------------


def make_augment(kind, images):
    """The augmentation called `kind`: of batches in memory, or ("resized-crop") of pictures."""
    if kind == "none":
        return None
    if (kind == "resized-crop") != (images.size > 64):
        refuse(f"--augment {kind} is not for pictures of {images.size} pixels")
    if images.size <= 64:
        how = dict(shift=images.size // 8 if "shift" in kind else 0, flip="flip" in kind)
        return functools.partial(shift_and_flip, **how)
    bicubic = InterpolationMode.BICUBIC
    crop = v2.RandomResizedCrop(images.size, scale=(0.2, 1), interpolation=bicubic)
    return v2.Compose([v2.PILToTensor(), crop, v2.RandomHorizontalFlip()])


def build_model(args, device):
    """The autoencoder, with the weights of --init if there are any, on the device."""
    torch.manual_seed(args.seed)
    pixels = NORMALISATION[args.normalisation or args.dataset.replace("folder", "imagenet")]
    model = build_dmae(args.model, norm_pix=args.norm_pix, loss_on=args.loss_on, **pixels)
    if int(math.prod(model.grid) * (1 - args.mask_ratio)) == 0:
        refuse(f"--mask-ratio {args.mask_ratio} keeps no patch at all")
    if args.init:
        missing, left_over = load_autoencoder(model, args.init)
        say(f"{args.init}: {len(missing)} tensors start anew, {len(left_over)} are left out")
    return model.to(device)


def build_optimizer(model, args):
    """AdamW; the peak learning rate is base_lr * batch / 256 (notebook 03, (3.19), (3.21))."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        dict(params=[p for name, p in trained if decays(name, p)], weight_decay=args.weight_decay),
        dict(params=[p for name, p in trained if not decays(name, p)], weight_decay=0.0),
    ]
    peak = args.base_lr * args.batch / 256
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)


# --------------------------------------------------------------------------------------------------
# The picture
# --------------------------------------------------------------------------------------------------


def reconstruct(model, clean, prediction):
    """Predicted patches as images in [0, 1]; norm-pix is undone (notebook 03, (3.18))."""
    if model.norm_pix:
        patches = patchify(model.prepare(clean), model.patch_size)           # B N P*P*C
        deviation = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        prediction = prediction * deviation + patches.mean(dim=-1, keepdim=True)
    normalised = unpatchify(prediction, model.patch_size, model.grid)        # B C H W
    return (normalised * model.std + model.mean).clamp(0, 1)


@torch.no_grad()
def draw(path, model, clean, args):
    """A column an image: clean; noisy; with patches dropped, too (grey): the input; restored."""
    noise, mask_noise = draw_corruption(clean, model.grid, args.seed)
    _, prediction, mask = model(clean, args.sigma, args.mask_ratio, noise, mask_noise)
    pixels = repeat(mask, "b n -> b n d", d=prediction.shape[-1])            # B N P*P*C
    dropped = unpatchify(pixels, model.patch_size, model.grid)               # B C H W
    dropped = F.interpolate(dropped, clean.shape[-2:])
    noisy = clean + args.sigma * noise
    restored = F.interpolate(reconstruct(model, clean, prediction), clean.shape[-2:])
    rows = torch.cat([clean, noisy, noisy * (1 - dropped) + 0.5 * dropped, restored])
    enlarged = F.interpolate(rows, scale_factor=max(1, 96 // clean.shape[-1]))
    save_image(enlarged, path, nrow=len(clean), padding=4, pad_value=1.0)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def draw_corruption(images, grid, *position):
    """noise (B, C, H, W) ~ N(0, 1), mask_noise (B, N) ~ U(0, 1) of a position in the run."""
    torch.manual_seed(seed_of(*position))
    return torch.randn_like(images), torch.rand(len(images), math.prod(grid), device=images.device)


def train_step(network, optimizer, batches, accumulate, args, step):
    """One optimizer step on the mean loss of `accumulate` micro-batches: this process's part.

    The noise is drawn outside of the network, which may be compiled. (notebook 03, (3.22))
    """
    total = 0.0
    grid = getattr(network, "module", network).grid
    for micro in range(accumulate):
        images, _ = next(batches)                                            # B C H W
        network.require_backward_grad_sync = micro == accumulate - 1         # of DDP
        noise, mask_noise = draw_corruption(images, grid, args.seed, step, micro, RANK)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
            loss, _, _ = network(images, args.sigma, args.mask_ratio, noise, mask_noise)
        (loss / accumulate).backward()
        total = total + loss.detach() / accumulate
    optimizer.step()
    optimizer.zero_grad()
    return total


def pretrain(args):
    """The stage, from the first image to the last checkpoint."""
    device, args.dtype = pick_device(args.device, args.dtype)
    torch.backends.cuda.enable_flash_sdp((device.type, args.dtype) != ("cpu", "bf16"))
    stem = f"{args.out}/pretrain"

    # Data: which images, in which batches.
    channels = SIZES[args.model]["channels"]
    images = open_images(args.dataset, args.data_path, True, args.size, channels, device)
    train, held_out = hold_out(len(images.labels), args.holdout)
    augment = make_augment(args.augment, images)
    device_batch, accumulate, steps = plan(args.batch, args.device_batch, len(train))

    # Network and optimizer.
    model = build_model(args, device)
    optimizer = build_optimizer(model, args)
    peak = optimizer.defaults["lr"]
    network = parallelise(model, args, device)
    say(f"{args.model} on {WORLD} x {device.type} in {args.dtype}; {len(train):,} images; "
        f"{args.epochs} epochs of {steps:,} steps of {WORLD} x {accumulate} x {device_batch}; "
        f"lr {peak:.3g}")

    # Everything that a later stage, or this one after a stop, has to know.
    data = dict(dataset=args.dataset, data_path=args.data_path, image_size=images.size)
    data |= dict(channels=channels, holdout=args.holdout, classes=images.classes)
    about = dict(kind="pretrain", config=model.config, data=data, settings=vars(args))

    with run_directory(stem, vars(args)):
        if Path(f"{stem}.pt").exists():
            say(f"{stem}.pt is done; use another --out to do it again")
            return
        state, started = resume(stem, model, optimizer)
        bar = tqdm(total=args.epochs * steps, desc="pretrain", disable=None if RANK == 0 else True)
        bar.update(state["epoch"] * steps)
        for epoch in range(state["epoch"], args.epochs):
            order = micro_batches(train, args.batch, device_batch, epoch, args.seed)
            batches = load_batches(images, order, device, augment, args.seed, epoch, args.workers)
            total = 0.0
            for step in range(epoch * steps, (epoch + 1) * steps):
                lr = learning_rate(step, bar.total, int(args.warmup_epochs * steps), peak)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                total = total + train_step(network, optimizer, batches, accumulate, args, step)
                bar.update()

            done = epoch + 1
            loss = mean_loss(total / steps, done)
            log(stem, started, step=done * steps, epoch=done, lr=lr, loss=loss)
            if done % args.save_every == 0 or done == args.epochs:
                say(f"epoch {done}/{args.epochs}  loss {loss:.4f}  lr {lr:.2e}")
                if RANK == 0:
                    places = np.linspace(0, len(held_out) - 1, min(10, len(held_out)))
                    shown = [images.items[i][0] for i in held_out[places.astype(int)].tolist()]
                    draw(f"{stem}.png", model, torch.stack(shown).to(device) / images.white, args)
                rest = about | dict(epoch=done, rows=done, optimizer=optimizer.state_dict())
                save(f"{stem}.last.pt", model.state_dict(), **rest)
        bar.close()
        finish(stem, model.state_dict(), started, epoch=args.epochs, **about)


def main(argv=None):
    with one_line_errors():
        pretrain(parse(argv))


# ==================================================================================================
# The same in pretrain.py and finetune.py: processes, the order of the data, log and checkpoints
# ==================================================================================================


def check_dataset(given, values):
    """Other data than those of the recipe that nobody named need a recipe, or a model."""
    named = given.get("dataset", values["dataset"])
    if named != values["dataset"] and not {"recipe", "model"} & given.keys():
        refuse(f"--dataset {named} needs a --recipe or a --model: without, they are for "
               f"{values['dataset']}")


def parallelise(model, args, device):
    """The network to train: compiled in place where wanted; torchrun's processes joined by DDP."""
    if args.compile == "on" or (args.compile == "auto" and device.type == "cuda"):
        model.compile()
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if WORLD > 1 else model


def sum_over_ranks(value):
    """The sum of a number over all processes, on the CPU."""
    total = torch.tensor(value, dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(total)
    return total.item()


def seed_of(*position):
    """A 32-bit seed for a position such as (seed, step, micro-batch, rank)."""
    return int(np.random.SeedSequence([len(position), *position]).generate_state(1)[0])


def generator(seed):
    return torch.Generator().manual_seed(seed)


def hold_out(images, holdout):
    """(indices to train on, indices held out) of so many images; holdout: a share or a number."""
    held = round(holdout * images) if holdout < 1 else int(holdout)
    order = torch.randperm(images, generator=generator(0))
    train, held_out = order[held:].sort().values, order[:held].sort().values
    return train, held_out if held else train


def plan(batch, device_batch, images):
    """(device batch, micro-batches, steps of an epoch): the batch is theirs and the processes'."""
    if batch % WORLD or batch > images:
        refuse(f"a batch of {batch} does not fit {WORLD} processes and {images} training images")
    share = batch // WORLD
    fits = [size for size in range(1, min(share, device_batch) + 1) if share % size == 0]
    return fits[-1], share // fits[-1], images // batch


def micro_batches(index, batch, device_batch, epoch, seed):
    """The images of this process's micro-batches in an epoch; an epoch's rest is left out."""
    order = torch.randperm(len(index), generator=generator(seed_of(seed, epoch)))
    whole = index[order][:len(index) // batch * batch]
    return whole.split(device_batch)[RANK::WORLD]


def shift_and_flip(pixels, uniforms, shift, flip):
    """Pixels (B, C, S, S) moved by up to `shift` each way (borders repeat), half of them flipped.

    What happens to an image is a function of its uniforms (B, 4).
    """
    side = torch.arange(pixels.shape[-1], device=pixels.device)              # S
    offsets = (uniforms[:, :2] * (2 * shift + 1)).long() - shift             # B 2, -shift..shift
    y = (side + offsets[:, :1]).clamp(0, len(side) - 1)                      # B S, source rows
    x = (side + offsets[:, 1:]).clamp(0, len(side) - 1)                      # B S, source columns
    if flip:
        x = torch.where(uniforms[:, 2:3] < 0.5, x.flip(1), x)
    image = torch.arange(len(pixels), device=pixels.device)[:, None, None, None]
    channel = torch.arange(pixels.shape[1], device=pixels.device)[:, None, None]
    return pixels[image, channel, y[:, None, :, None], x[:, None, None, :]]  # B C S S


class Pictures(Dataset):
    """A folder's pictures: what is random in item i is of (seed, epoch, i) alone."""

    def __init__(self, folder, seed, epoch):
        self.folder = folder
        self.seed = seed
        self.epoch = epoch

    def __getitem__(self, i):
        torch.manual_seed(seed_of(self.seed, self.epoch, i))
        return self.folder[i]


def load_batches(images, batches, device, augment=None, seed=0, epoch=0, workers=0):
    """Yield (x (b, C, S, S) in [0, 1], labels (b,)) for each tensor of indices in `batches`.

    It is augment(pixels (b, C, S, S), uniforms (b, 4)) in memory, augment(PIL image) for files.
    """
    if isinstance(images.items, TensorDataset):
        size = len(images.labels)
        if augment:
            uniforms = torch.rand(size, 4, generator=generator(seed_of(seed, epoch, size)))
        for index in batches:
            pixels, labels = images.items[index.to(device)]
            if augment:
                pixels = augment(pixels, uniforms[index].to(device))
            yield pixels / images.white, labels
        return
    folder = copy.copy(images.items)
    folder.transform = augment or folder.transform
    loader = DataLoader(
        Pictures(folder, seed, epoch),
        batch_sampler=[index.tolist() for index in batches],
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    for pixels, labels in loader:
        x = pixels.to(device, non_blocking=True) / images.white
        yield x, labels.to(device, non_blocking=True)


@contextlib.contextmanager
def run_directory(stem, settings):
    """Rank 0 locks the files STEM.* and compares their settings; what it refuses, all refuse."""
    folder, name = os.path.split(stem)
    os.makedirs(folder, exist_ok=True)
    lock = filelock.FileLock(f"{folder}/.{name}.lock", blocking=False)
    problem = None
    try:
        if RANK == 0:
            lock.acquire()
            begin(stem, settings, RUN_FLAGS)
    except (ValueError, OSError) as error:                     # of a lock that is taken, too
        problem = error
    try:
        if sum_over_ranks(problem is not None):
            raise problem or SystemExit(2)
        yield
    finally:
        lock.release()


def mean_loss(loss, epoch):
    """The mean of the processes' losses in an epoch; one that is not finite ends the run."""
    total = sum_over_ranks(float(loss))
    if not math.isfinite(total):
        raise FloatingPointError(f"loss {total} in epoch {epoch}: the last checkpoint stays "
                                 "(try --dtype fp32 or a smaller --base-lr)")
    return total / WORLD


def save(path, weights, **rest):
    """Rank 0 writes a checkpoint; weights that are not finite are refused."""
    if RANK == 0:
        if not math.isfinite(sum(float(value.float().sum()) for value in weights.values())):
            raise FloatingPointError(f"weights are not finite: {path} is not written")
        write(path, lambda file: torch.save({"model": weights, **rest}, file))


def resume(stem, model, optimizer):
    """Go on from STEM.last.pt, if it is there; the log is cut back to its rows.

    Returns what it holds, and when the run began, less its pauses.
    """
    last, log_file = Path(f"{stem}.last.pt"), Path(f"{stem}.jsonl")
    state, rows = dict(epoch=0), []
    if last.exists():
        state = read_checkpoint(last)
        load_weights(model, state["model"], last)
        optimizer.load_state_dict(state["optimizer"])
        say(f"continuing {last} after epoch {state['epoch']}")
        rows = log_file.read_text().splitlines(keepends=True)[:state["rows"]]
    if sum_over_ranks(state["epoch"]) != WORLD * state["epoch"]:
        refuse(f"{last} is not on a disk that all processes share")
    if RANK == 0:
        write(log_file, lambda file: file.write("".join(rows).encode()))
    return state, time.time() - (json.loads(rows[-1])["time"] if rows else 0)


def log(stem, started, **row):
    """Append a row to STEM.jsonl, with the seconds of running."""
    if RANK == 0:
        row["time"] = round(time.time() - started, 3)
        with open(f"{stem}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


def finish(stem, weights, started, **rest):
    """Write the result; there is nothing to resume any more."""
    save(f"{stem}.pt", weights, **rest)
    if RANK == 0:
        Path(f"{stem}.last.pt").unlink(missing_ok=True)
    say(f"wrote {stem}.pt in {time.time() - started:.0f} s")


# ==================================================================================================
# The same in pretrain.py, finetune.py and certify.py: errors, flags, files, images
# ==================================================================================================

RANK = int(os.environ.get("RANK", 0))                          # of this process, of WORLD of them
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))              # on this machine, of LOCAL_WORLD
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
BELOW = dict(mask_ratio=1, erasing=1, drop_path=1, alpha=1, seed=2**32)          # limits of flags
OTHER_NAMES = {"n": ["--N"], "n0": ["--N0"], "max": ["--limit"]}       # that torchrun leaves alone

# items[i]: (pixels uint8 (C, S, S), label), a TensorDataset in memory; white: the largest value.
Images = namedtuple("Images", "items labels classes size white")


@contextlib.contextmanager
def one_line_errors():
    """Wrong use ends in one line and status 2, a run that breaks in one line and status 1."""
    try:
        yield
    except (ValueError, OSError, ArithmeticError) as error:    # not what a user's file raises
        wrong_use = isinstance(error, ValueError | FileNotFoundError)
        if RANK == 0 or not wrong_use:                         # all say alike what is wrong
            sentence = str(error).strip().splitlines()[-1].removeprefix("OSError: ")
            print(f"{Path(__file__).name}: error: {sentence}", file=sys.stderr, flush=True)
        raise SystemExit(2 if wrong_use else 1) from None


class Refusal(ValueError):
    """Wrong use, in one sentence."""


def refuse(sentence):
    raise Refusal(sentence)


def read_flags(doc, flags, argv):
    """{name: value} of the flags given in argv, of a table {name: (value, text, *choices)}.

    A flag has the type of its table's value, a tuple takes several. Numbers are finite and not
    negative, and 0 only where the text says what 0 means.
    """
    parser = argparse.ArgumentParser(description=doc, argument_default=argparse.SUPPRESS)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.allow_abbrev = False
    parser.error = refuse
    for name, (value, text, *choices) in flags.items():
        nargs, one = ("+", value[0]) if isinstance(value, tuple) else (None, value)
        how = dict(type=type(one), nargs=nargs, choices=choices or None)
        if isinstance(value, bool):
            how = dict(action=argparse.BooleanOptionalAction)
        names = [f"--{name.replace('_', '-')}", *OTHER_NAMES.get(name, [])]
        parser.add_argument(*names, dest=name, help=f"{text} [{value}]", **how)

    given = {name: x for name, x in vars(parser.parse_args(argv)).items() if x != ""}
    for name, value in given.items():
        text, limit = flags[name][1], BELOW.get(name, math.inf)
        values = value if isinstance(value, list) else [value]
        for number in [x for x in values if type(x) in (int, float)]:
            if not 0 <= number < limit or (number == 0 and "0:" not in text):
                refuse(f"--{name.replace('_', '-')} cannot be {number} ({text})")
    return given


def pick_device(device, dtype):
    """(device, dtype) of this process; "auto": an accelerator, and bf16 on GPUs that have it."""
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = accelerator.type if accelerator else "cpu"
    if device != "cpu" and torch.get_device_module(device).device_count() < LOCAL_WORLD:
        refuse(f"--device {device}: there are fewer than {LOCAL_WORLD}")
    native = False
    if device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "auto":
        dtype = "bf16" if native else "fp32"
    return torch.device(device, LOCAL_RANK if device != "cpu" else None), dtype


def say(*words):
    """Print, once for all processes."""
    if RANK == 0:
        print(*words, flush=True)


def write(path, save):
    """save(temporary file), then rename: after a kill there is the old file or the new one."""
    with open(f"{path}.tmp", "wb") as file:
        save(file)
    os.replace(f"{path}.tmp", path)


def begin(stem, settings, free):
    """The settings in STEM.json, written at a run's first start; later ones must agree.

    Those named in `free` may differ.
    """
    file, text = Path(f"{stem}.json"), json.dumps(settings, indent=1) + "\n"
    if not file.exists():
        write(file, lambda opened: opened.write(text.encode()))
    earlier, settings = json.loads(file.read_text()), json.loads(text)
    other = []
    for key in sorted({*earlier, *settings} - {*free}):
        if earlier.get(key) != settings.get(key):
            other.append(f"{key} {earlier.get(key)} -> {settings.get(key)}")
    if other:
        refuse(f"{stem} has other settings ({', '.join(other)}): use another --out")
    return earlier


def open_picture(file, channels):
    """A picture file as an upright PIL image with 8 bits a channel, RGB or grey."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as picture:
            if picture.mode[0] in "IF":
                refuse("more than 8 bits a channel")
            ImageOps.exif_transpose(picture, in_place=True)
            return picture.convert("RGB" if channels == 3 else "L")
    except Exception as error:                                 # a damaged file can raise anything
        raise OSError(f"cannot read the image {file}: {error}") from None


def fit(picture, size):
    """The middle of a PIL image, uint8 (C, S, S): shorter side to S 256/224, then S x S of it."""
    from torchvision.transforms.v2 import functional as T

    if picture.size != (size, size):
        picture = T.resize(picture, [round(size * 256 / 224)], T.InterpolationMode.BICUBIC)
        picture = T.center_crop(picture, [size, size])
    return T.pil_to_tensor(picture)


def open_images(dataset, data_path, train, size, channels, device):
    """The training or the test images of a data set; up to 64 pixels in memory.

    digits: scikit-learn's, 8 x 8, 0 to 16; the last 360, by other writers, are the test images.
    mnist, fashion-mnist, cifar10: torchvision's, in data_path; downloaded if they are not there.
    folder: a folder a class in data_path/train and data_path/val or /test, pictures fitted to size.
    """
    white = 255
    if dataset == "digits":
        from sklearn.datasets import load_digits

        digits, white = load_digits(), 16
        part = slice(None, -360) if train else slice(-360, None)
        pixels, labels = torch.tensor(digits.images[part])[:, None], digits.target[part]
        classes = [str(name) for name in digits.target_names]
    elif dataset == "folder":
        from torchvision.datasets import ImageFolder

        names = ("train",) if train else ("val", "test")
        there = [name for name in names if Path(data_path, name).is_dir()]
        root = Path(data_path, there[0] if there else names[0])
        items = ImageFolder(root, functools.partial(fit, size=size))
        items.loader = functools.partial(open_picture, channels=channels)
        folders = {os.path.dirname(file) for file, _ in items.samples}
        if len({os.path.realpath(folder) for folder in folders}) < len(folders):
            refuse(f"{root} reaches a folder twice, by a link")
        labels, classes = torch.tensor(items.targets), items.classes
        if size > 64:
            return Images(items, labels, classes, size, white)
        pixels = torch.stack([pixels for pixels, _ in items])
    else:
        import torchvision

        kinds = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
        source = getattr(torchvision.datasets, kinds[dataset])
        try:
            os.makedirs(data_path, exist_ok=True)
            with filelock.FileLock(f"{data_path}/.{dataset}.lock"):              # one downloads
                part = source(data_path, train, download=True)
        except (RuntimeError, OSError, EOFError) as error:
            refuse(f"{data_path} lacks {dataset}, or has a part of it (delete that); download it "
                   f"elsewhere, since that failed here: {' '.join(str(error).split())}")
        pixels, labels, classes = torch.as_tensor(part.data), part.targets, part.classes
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.movedim(3, 1).contiguous()

    if pixels.shape[1] != channels:
        refuse(f"{dataset} has images of {pixels.shape[1]} channels, the model takes {channels}: "
               "name a --recipe or --model")
    pixels, labels = pixels.to(device, torch.uint8), torch.as_tensor(labels).long()
    items = TensorDataset(pixels, labels.to(device))
    return Images(items, labels, classes, pixels.shape[-1], white)


if __name__ == "__main__":
    main()
