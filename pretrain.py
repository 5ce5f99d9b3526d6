"""Stage 1: pre-train a denoising masked autoencoder (DMAE, section 3.2): x + noise -> mask -> reconstruct x.

    python pretrain.py                                         # digits, two CPU cores: about a minute
    python pretrain.py --recipe cifar10                        # one GPU
    torchrun --nproc_per_node=8 pretrain.py --recipe imagenet-base --data-path /data/imagenet
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 pretrain.py ...
    python pretrain.py --sigma 0 --loss-on dropped --out runs/mae      # the plain MAE, for comparison

A recipe sets data, model and every hyperparameter; any other flag overrides one. The result is
RUN/pretrain.pt, with a log (pretrain.jsonl) and two pictures beside it. Killed at any moment, the same
command goes on from its last checkpoint and ends with the same bits.

Axes:  B images   C channels   H W pixels   N patches   P patch side
"""

import argparse
import atexit
import contextlib
import dataclasses
import functools
import glob
import gzip
import hashlib
import json
import math
import os
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, repeat
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as T
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

# ----------------------------------------------------------------------------------------------------------
# Recipes
# ----------------------------------------------------------------------------------------------------------

DEFAULTS = dict(                           # what no recipe changes
    init=None,                             # checkpoint to start from
    seed=0,
    model_size=None,                       # the model sees images at their own resolution
    clip_grad=None,                        # largest norm of the gradient
    device="auto",
    dtype="auto",
    compile=None,
    deterministic=False,
    recompute=False,
    workers=None,                          # per process; None: one for each of its cores but one
    overwrite=False,
    dry_run=False,
)
PAPER = dict(                              # section 4.1 and appendix: ImageNet
    dataset="folder",
    data_path="data/imagenet",             # with train/ and val/ class folders
    image_size=224,                        # resolution at which the noise is added
    normalisation="imagenet",
    holdout=10_000,                        # training images kept for the pictures and for model selection
    augment="resized-crop",                # random resized crop 0.2-1 (bicubic) and flip
    sigma=0.25,                            # noise of the corrupted input, in units of [0, 1] pixels
    mask_ratio=0.75,
    loss_on="all",                         # all patches: DMAE; dropped: MAE
    norm_pix=True,                         # targets standardised patch by patch
    batch=4096,                            # effective, over all processes and accumulated micro-batches
    device_batch=512,                      # at most, per process: 42 GiB for ViT-L in bf16 (counted)
    base_lr=1.5e-4,                        # lr = base_lr * batch / 256
    weight_decay=0.05,
    log_every=5,                           # steps
    save_every=100,                        # steps
)
FASHION = dict(                            # ours, for two CPU cores; chosen on held-out images
    dataset="fashion-mnist",
    data_path="data",
    model="vit_fashion",
    image_size=28,
    normalisation="fashion-mnist",
    holdout=0.05,
    augment="flip",                        # shifts by up to three pixels did not help
    sigma=0.25,
    mask_ratio=0.75,
    loss_on="all",
    norm_pix=False,
    batch=256,
    device_batch=256,
    epochs=30,
    warmup_epochs=2,
    base_lr=2e-3,
    weight_decay=0.05,
    log_every=50,
    save_every=500,
)
RECIPES = {
    "digits": dict(                        # ours, chosen on held-out training images
        dataset="digits",
        data_path=None,
        model="vit_digits",
        image_size=8,
        normalisation="digits",
        holdout=0.1,
        augment="none",                    # shifts by one pixel of eight made it worse
        sigma=0.25,
        mask_ratio=0.25,
        loss_on="all",
        norm_pix=False,
        batch=128,
        device_batch=128,
        epochs=150,
        warmup_epochs=10,
        base_lr=8e-3,
        weight_decay=0.05,
        log_every=50,
        save_every=500,
    ),
    "fashion": FASHION,
    "mnist": dict(FASHION, dataset="mnist", normalisation="mnist", augment="none"),
    "cifar10": dict(                       # ours: a small ViT from nothing on one GPU
        dataset="cifar10",
        data_path="data",
        model="vit_cifar_small",
        image_size=32,
        normalisation="cifar10",
        holdout=0.04,
        augment="shift-flip",              # by up to four pixels
        sigma=0.25,
        mask_ratio=0.75,
        loss_on="all",
        norm_pix=True,
        batch=512,
        device_batch=512,
        epochs=200,
        warmup_epochs=10,
        base_lr=5e-4,
        weight_decay=0.05,
        log_every=50,
        save_every=1000,
    ),
    "cifar10-transfer": dict(              # paper, section 4.3: continued from ImageNet (--init CHECKPOINT)
        PAPER,
        dataset="cifar10",
        data_path="data",
        model="vit_base_patch16",
        image_size=32,
        model_size=224,                    # the model resizes
        normalisation="cifar10",
        holdout=0.04,
        augment="flip",
        batch=512,
        epochs=50,
        warmup_epochs=10,
        base_lr=5e-5,
    ),
    "imagenet-base": dict(PAPER, model="vit_base_patch16", epochs=1100, warmup_epochs=40),
    "imagenet-large": dict(PAPER, model="vit_large_patch16", epochs=1600, warmup_epochs=40),
    # ViT-H is in the published code, but not in the paper's tables.
    "imagenet-huge": dict(
        PAPER,
        model="vit_huge_patch14",
        epochs=1600,
        warmup_epochs=40,
        device_batch=256,                  # 44 GiB
    ),
}
MAY_CHANGE = {                             # when a run is continued
    "data_path", "out", "init", "device", "device_batch", "workers", "compile", "overwrite", "dry_run",
    "recompute",
}


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------


def parse(argv):
    """The settings: what the flags say, else what the recipe says."""
    parser = new_parser(__doc__, DEFAULTS | RECIPES["digits"])
    at_least_0 = number(float, least=0)
    parser.add_argument("--recipe", choices=RECIPES, help="data, model and all hyperparameters")
    parser.add_argument("--sigma", type=at_least_0,
                        help="standard deviation of the noise, for pixels in [0, 1]")
    parser.add_argument("--mask-ratio", type=number(float, least=0, below=1), help="share of patches dropped")
    parser.add_argument("--loss-on", choices=("all", "dropped"),
                        help="all patches (DMAE) or the dropped ones (MAE)")
    parser.add_argument("--norm-pix", action=argparse.BooleanOptionalAction,
                        help="standardise each target patch")
    parser.add_argument("--init",
                        help="pre-training checkpoint to start from (optimizer and schedule start anew)")
    parser.add_argument("--holdout", type=at_least_0,
                        help="training images kept for pictures: share or number")
    parser.add_argument("--augment", choices=("none", "shift", "flip", "shift-flip", "resized-crop"))
    add_training_flags(parser)
    add_run_flags(parser)
    given = vars(parser.parse_args(argv))

    recipe = given.get("recipe", "digits")
    named = dict(recipe=recipe, out=f"runs/{recipe}")
    args = argparse.Namespace(**DEFAULTS | RECIPES[recipe] | named | given)
    require(args.mask_ratio > 0 or args.loss_on == "all", "--loss-on dropped needs a --mask-ratio above 0")
    return args


# ----------------------------------------------------------------------------------------------------------
# Data, model, optimizer
# ----------------------------------------------------------------------------------------------------------


def make_augment(kind, images):
    """The augmentation called `kind`: of batches in memory, or ("resized-crop") of pictures from files."""
    if kind == "none":
        return None
    from_files = images.files is not None
    require((kind == "resized-crop") == from_files,
            f"--augment {kind} is for pictures of {'at most' if from_files else 'more than'} 64 pixels")
    if from_files:
        return v2.Compose([ResizedCrop(images.size, scale=(0.2, 1)), v2.RandomHorizontalFlip()])
    return shift_and_flip(images.size // 8 if "shift" in kind else 0, "flip" in kind)


def build_model(args, device):
    """The autoencoder, with the weights of --init if there are any, on the device."""
    torch.manual_seed(args.seed)
    model = build_dmae(
        args.model,
        image_size=args.model_size or args.image_size,
        norm_pix=args.norm_pix,
        loss_on=args.loss_on,
        **NORMALISATION[args.normalisation],
    )
    kept = int(math.prod(model.grid) * (1 - args.mask_ratio))
    require(kept > 0, f"--mask-ratio {args.mask_ratio} keeps no patch at all")
    if args.init:
        missing, left_over = load_autoencoder(model, args.init)
        say(describe_init(args.init, missing, left_over))
    model.recompute_activations = args.recompute
    return model.to(device)


def build_optimizer(model, args):
    """AdamW at the peak learning rate, base_lr * batch / 256; weight decay on matrices alone."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        dict(params=[p for name, p in trained if decays(name, p)], weight_decay=args.weight_decay),
        dict(params=[p for name, p in trained if not decays(name, p)], weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=args.base_lr * args.batch / 256, betas=(0.9, 0.95), fused=True)


# ----------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------


def reconstruct(model, clean, prediction):
    """Predicted patches (B, N, P*P*C) as images in [0, 1]; norm-pix is undone with the clean patches."""
    if model.norm_pix:
        patches = patchify(model.prepare(clean), model.patch_size)                   # B N P*P*C
        deviation = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        prediction = prediction * deviation + patches.mean(dim=-1, keepdim=True)
    normalised = unpatchify(prediction, model.patch_size, model.grid)                # B C H W
    return (normalised * model.std + model.mean).clamp(0, 1)


@torch.no_grad()
def draw_reconstructions(path, model, clean, names, sigma, mask_ratio, seed):
    """A column per image, under its name: clean, noisy, noisy and masked (dropped patches grey), restored."""
    noise, mask_noise = draw_corruption(clean, math.prod(model.grid), seed)
    model.eval()
    _, prediction, mask = model(clean, sigma, mask_ratio, noise, mask_noise)
    model.train()
    pixels = repeat(mask, "b n -> b n d", d=model.patch_size**2 * clean.shape[1])    # B N P*P*C
    dropped = F.interpolate(unpatchify(pixels, model.patch_size, model.grid), clean.shape[-2:])
    noisy = clean + sigma * noise
    rows = {
        "clean": clean,
        f"noise\n$\\sigma$ = {sigma:g}": noisy,
        f"and {mask_ratio:.0%}\ndropped:\nthe input": noisy * (1 - dropped) + 0.5 * dropped,
        "recon-\nstruction": F.interpolate(reconstruct(model, clean, prediction), clean.shape[-2:]),
    }
    figure = Figure(figsize=(len(clean), len(rows)))
    close = dict(wspace=0.06, hspace=0.06)
    axes = figure.subplots(len(rows), len(clean), squeeze=False, gridspec_kw=close)
    for line, (title, images) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=10)
        pictures = rearrange(images.float().cpu().clamp(0, 1), "b c h w -> b h w c").numpy()
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=8)
    figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")


def draw_loss(path, log_file):
    rows = [json.loads(line) for line in Path(log_file).read_text().splitlines()]
    figure = Figure(figsize=(6, 3.6))
    axis = figure.subplots()
    axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], color="#0072b2")
    axis.set(xlabel="optimizer step", ylabel="reconstruction loss\n(mean square, normalised pixels)")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------


def draw_corruption(images, patches, *position):
    """Noise (B, C, H, W) ~ N(0, 1), mask_noise (B, N) ~ U(0, 1) of (seed, step, micro-batch, rank)."""
    torch.manual_seed(seed_of(*position))
    return torch.randn_like(images), torch.rand(len(images), patches, device=images.device)


def reconstruction_loss(network, images, args, *position):
    """The loss of the corruption that belongs to `position`, for clean images (B, C, H, W) in [0, 1]."""
    patches = (args.model_size or args.image_size) // SIZES[args.model]["patch_size"]
    noise, mask_noise = draw_corruption(images, patches**2, *position)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
        loss, _, _ = network(images, args.sigma, args.mask_ratio, noise, mask_noise)
    return loss


def train_step(network, optimizer, batches, levels, micro_batches, args, step, rank):
    """One optimizer step on the mean loss of all micro-batches: (this process's share, gradient's norm)."""
    total = 0.0
    for micro in range(micro_batches):
        pixels, _ = next(batches)                                                    # B C H W
        with accumulating(network, more_to_come=micro < micro_batches - 1):
            loss = reconstruction_loss(network, pixels / levels, args, args.seed, step, micro, rank)
            (loss / micro_batches).backward()
        total = total + loss.detach() / micro_batches
    norm = clip_gradients(network, args.clip_grad)
    optimizer.step()
    optimizer.zero_grad()
    return total, norm


def show_progress(files, model, images, held_out, args, device):
    """The loss so far, and reconstructions of held-out images, as pictures beside the log."""
    shown = evenly_spaced(held_out, 10).tolist()
    clean = torch.stack([images.read(i) for i in shown]).to(device) / images.levels
    draw_loss(f"{files.stem}.loss.png", files.log_file)
    names = [images.classes[images.labels[i]] for i in shown]
    draw_reconstructions(f"{files.stem}.png", model, clean, names, args.sigma, args.mask_ratio, args.seed)


def pretrain(args):
    """The stage, from the first image to the last checkpoint."""
    rank, world, device = start_processes(args.device)
    use_deterministic_kernels(args.deterministic)
    files = RunFiles(f"{args.out}/pretrain")

    # Data: which images, in which batches.
    channels = SIZES[args.model]["channels"]
    images = open_images(args.dataset, args.data_path, True, args.image_size, channels)
    keep_small_images(images, device)
    train, held_out = hold_out(images, args.holdout)
    augment = make_augment(args.augment, images)
    steps_per_epoch, steps, warmup = count_steps(args, len(train))
    device_batch, micro_batches = share_batch(args.batch, world, args.device_batch)

    # Network and optimizer.
    model = build_model(args, device)
    optimizer = build_optimizer(model, args)
    peak = optimizer.defaults["lr"]
    args.dtype = pick_dtype(args.dtype, device, read_settings(files.stem, args.overwrite))
    choose_attention(args, device)
    if args.compile or (args.compile is None and device.type == "cuda"):
        model.compile()
    network = distribute(model) if world > 1 else model
    say(f"{args.model}: {count_trained(model):,} parameters on {world} x {device.type} in {args.dtype}; "
        f"{len(train):,} images; {steps:,} steps of "
        f"{world} x {micro_batches} x {device_batch} = {args.batch}; lr {peak:.3g}")

    # Everything that a later stage, or this one after a stop, has to know.
    settings = vars(args) | {"init_sha256": args.init and sha256(args.init)}
    data = dict(dataset=args.dataset, data_path=args.data_path, image_size=args.image_size, channels=channels,
                holdout=args.holdout, classes=images.classes)
    about = dict(kind="pretrain", config=model.config, data=data, settings=settings)

    def batches_of(start, end):
        positions = training_positions(train, args.batch, device_batch, start, end, args.seed, rank, world)
        return load_batches(images, positions, device, augment, args.seed, args.workers)

    if args.dry_run:
        say(json.dumps(settings, indent=1))
        train_step(network, optimizer, batches_of(0, 1), images.levels, micro_batches, args, 0, rank)
        return

    with run_directory(files.stem, settings, MAY_CHANGE, files.result, args.overwrite):
        if files.result.exists():
            say(f"{files.result} is done; --out elsewhere or --overwrite to do it again")
            return
        start, _ = files.resume(model, optimizer)
        batches = batches_of(start, steps)
        total, counted = 0.0, 0
        bar = tqdm(total=steps, initial=start, desc="pretrain", disable=None if rank == 0 else True)
        for step in range(start, steps):
            lr = learning_rate(step, steps, warmup, peak)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, norm = train_step(
                network, optimizer, batches, images.levels, micro_batches, args, step, rank
            )
            total += loss
            counted += 1
            bar.update()

            done = step + 1
            saving = done % args.save_every == 0 or done == steps
            if saving or done % args.log_every == 0:
                files.log_loss(total / counted, norm, done, steps, steps_per_epoch, lr, bar)
                total, counted = 0.0, 0
            if saving and rank == 0:
                show_progress(files, model, images, held_out, args, device)
                files.save(files.last, model, step=done, optimizer=optimizer.state_dict(), **about)
        bar.close()
        files.finish(model, step=steps, **about)


def main(argv=None):
    with one_line_errors():
        pretrain(parse(argv))


# ==========================================================================================================
# The same in pretrain.py and finetune.py: flags, the order of the data, log and checkpoints
# ==========================================================================================================


def add_training_flags(parser):
    """Data, network and optimizer."""
    count = number(int, least=1)
    share = number(float, least=0)
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--dataset", choices=DATASETS,
                        help="folder: a folder for each class in PATH/train, PATH/val")
    parser.add_argument("--data-path", help="where the data set lies")
    parser.add_argument("--image-size", type=count, help="resolution at which noise is added, in pixels")
    parser.add_argument("--normalisation", choices=NORMALISATION, help="whose mean and standard deviation")
    parser.add_argument("--model", choices=SIZES, help="the network's size")
    parser.add_argument("--model-size", type=count,
                        help="resolution to which the network resizes; None: not at all")
    parser.add_argument("--batch", type=count, help="effective batch, over all processes, images")
    parser.add_argument("--device-batch", type=count, help="largest batch of one process at a time, images")
    parser.add_argument("--epochs", type=number(float, above=0), help="epochs")
    parser.add_argument("--warmup-epochs", type=share, help="epochs of linear warm-up")
    parser.add_argument("--base-lr", type=number(float, above=0),
                        help="learning rate per 256 images of the batch")
    parser.add_argument("--weight-decay", type=share, help="AdamW's")
    parser.add_argument("--clip-grad", type=number(float, above=0),
                        help="scale gradients down to this norm; None: not at all")
    parser.add_argument("--log-every", type=count, help="steps between log rows")
    parser.add_argument("--save-every", type=count, help="steps between checkpoints")
    parser.add_argument("--deterministic", action=switch,
                        help="deterministic kernels only: same bits on a GPU, too")
    parser.add_argument("--recompute", action=switch, help="recompute activations backwards, to save memory")
    parser.add_argument("--workers", type=number(int, least=0),
                        help="processes that read pictures, per process; None: its cores less one")
    parser.add_argument("--dry-run", action=switch, help="print settings and sizes, run one step, and end")


def seed_of(*position):
    """A 32-bit seed for a position such as (seed, step, micro-batch, rank)."""
    return int(np.random.SeedSequence([len(position), *position]).generate_state(1)[0])


@functools.lru_cache(maxsize=2)
def order_of(epoch, size, seed):
    """A permutation of 0..size - 1."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))


@functools.lru_cache(maxsize=2)
def uniforms_of(epoch, size, seed):
    """Four uniform numbers to augment each image with, (size, 4)."""
    return torch.rand(size, 4, generator=torch.Generator().manual_seed(seed_of(seed, epoch, size)))


def training_positions(index, batch, device_batch, start, steps, seed, rank, world):
    """Yield [(epoch, image), ...] for every micro-batch of this rank in steps start..steps - 1.

    Step s takes the next `batch` of the images `index` (m,) in its epoch's order, whatever the number of
    processes, and deals them to the ranks in device batches, one micro-batch after the other. An epoch's
    rest is left out.
    """
    for step in range(start, steps):
        epoch, place = divmod(step, len(index) // batch)
        order = order_of(epoch, len(index), seed)
        share = index[order[place * batch:(place + 1) * batch]].tolist()
        for first in range(rank * device_batch, batch, world * device_batch):
            yield [(epoch, image) for image in share[first:first + device_batch]]


def share_batch(batch, world, largest):
    """(device batch, micro-batches): their product is batch / world, and device batch <= largest."""
    require(batch % world == 0, f"a batch of {batch} cannot be divided by {world} processes")
    share = batch // world
    device_batch = max(size for size in range(1, min(share, largest) + 1) if share % size == 0)
    return device_batch, share // device_batch


def count_steps(args, images):
    """(steps of an epoch, steps in all, steps of warm-up) with so many training images."""
    require(images >= args.batch, f"{images} training images are fewer than one batch of {args.batch}")
    per_epoch = images // args.batch
    steps = int(args.epochs * per_epoch)
    require(steps > 0, f"--epochs {args.epochs:g} makes no step of {args.batch} images")
    return per_epoch, steps, int(args.warmup_epochs * per_epoch)


def shift_and_flip(shift, flip):
    """An augmentation of batches: by up to `shift` pixels each way (borders repeat), and left to right.

    augment(pixels (B, C, S, S), uniforms (B, 4)) -> pixels (B, C, S, S).
    """

    def augment(pixels, uniforms):
        side = torch.arange(pixels.shape[-1], device=pixels.device)                  # S
        offsets = (uniforms[:, :2] * (2 * shift + 1)).long() - shift                 # B 2, -shift..shift
        y = side + offsets[:, :1]                                                    # B S, source rows
        x = side + offsets[:, 1:]                                                    # B S, source columns
        if flip:
            x = torch.where(uniforms[:, 2:3] < 0.5, x.flip(1), x)
        y = y.clamp(0, len(side) - 1)[:, None, :, None]                              # B 1 S 1
        x = x.clamp(0, len(side) - 1)[:, None, None, :]                              # B 1 1 S
        image = torch.arange(len(pixels), device=pixels.device)[:, None, None, None]
        channel = torch.arange(pixels.shape[1], device=pixels.device)[:, None, None]
        return pixels[image, channel, y, x]                                          # B C S S

    return augment


class ResizedCrop(v2.RandomResizedCrop):
    """torchvision's random crop of a PIL image, as uint8 (C, S, S), resized by torch: faster than by PIL."""

    def transform(self, picture, params):
        top, left, height, width = (params[key] for key in ("top", "left", "height", "width"))
        part = T.pil_to_tensor(picture.crop((left, top, left + width, top + height)))
        return F.interpolate(part[None], self.size, mode="bicubic", antialias=True)[0]


class Pictures(torch.utils.data.Dataset):
    """Pictures from files, augmented one by one: item (epoch, i) draws from (seed, epoch, i) alone."""

    def __init__(self, images, augment, seed):
        self.images = images
        self.augment = augment
        self.seed = seed

    def __getitem__(self, position):
        epoch, i = position
        if self.augment is None:
            return self.images.read(i), self.images.labels[i]
        torch.manual_seed(seed_of(self.seed, epoch, i))
        picture = open_picture(self.images.files[i], self.images.channels)
        return self.augment(picture), self.images.labels[i]            # C S S, ()


def keep_quiet(_):
    """Of a data worker: cut off by Ctrl-C, its thread that hands over tensors would print a traceback."""
    sys.excepthook = lambda *_: None


def load_batches(images, positions, device, augment=None, seed=0, workers=None):
    """Yield (pixels (b, C, S, S) uint8, labels (b,)) on `device` for each [(epoch, image), ...] of positions.

    It is augment(pixels (b, C, S, S), uniforms (b, 4)) for images in memory, augment(picture) for files.
    """
    if images.files is not None:
        if workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            workers = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)
        loader = torch.utils.data.DataLoader(
            Pictures(images, augment, seed),
            batch_sampler=positions,
            num_workers=workers,
            worker_init_fn=keep_quiet,
            pin_memory=device.type == "cuda",
        )
        for pixels, labels in loader:
            yield pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        return
    for batch in positions:
        epoch, _ = batch[0]
        index = torch.tensor([i for _, i in batch])
        pixels = images.pixels[index.to(images.pixels.device)].to(device)
        if augment is not None:
            pixels = augment(pixels, uniforms_of(epoch, len(images), seed)[index].to(device))
        yield pixels, images.labels[index].to(device)


def keep_small_images(images, device):
    """Images of at most 64 pixels stay in the device's memory."""
    if images.size <= 64:
        if images.files is not None:
            images.pixels = torch.stack([images.read(i) for i in range(len(images))])
            images.files = None
        images.pixels = images.pixels.to(device)
    return images


def hold_out(images, holdout):
    """(indices to train on, indices held out): a fixed random part, a share below 1 or a number of images."""
    held = round(holdout * len(images)) if holdout < 1 else int(holdout)
    if held == 0:
        return torch.arange(len(images)), torch.arange(len(images))
    require(held < len(images), f"cannot hold out {held} of {len(images)} training images")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return order[held:].sort().values, order[:held].sort().values


def evenly_spaced(index, count):
    """`count` of the images `index`, or all. (The first ones of class folders would be of one class.)"""
    places = torch.linspace(0, len(index) - 1, min(count, len(index)), dtype=torch.float64)
    return index[places.long()]


def use_deterministic_kernels(wanted):
    torch.use_deterministic_algorithms(wanted)
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")    # what cuBLAS asks for


def choose_attention(args, device):
    """Plain attention for bf16 on CPUs: there the fused one's backward is slow at few tokens (torch 2.14)."""
    few = (args.model_size or args.image_size) <= 64
    slow = device.type == "cpu" and args.dtype == "bf16" and few
    torch.backends.cuda.enable_flash_sdp(not slow)                     # of every device, its name aside


def accumulating(network, more_to_come):
    """Inside, while more micro-batches are to come, gradients are not exchanged between processes."""
    if more_to_come and isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return contextlib.nullcontext()


def distribute(model):
    """The model, its gradients averaged over processes; buffers are constants but for BatchNorm's."""
    network = DistributedDataParallel(model, gradient_as_bucket_view=True)
    # Set here, since torch 2.13 has another name for the argument.
    network.broadcast_buffers = any(isinstance(module, torch.nn.BatchNorm1d) for module in model.modules())
    return network


def clip_gradients(network, largest):
    """Scale the gradient down to the norm `largest`; returns the norm that it had, or None if there is no
    limit.
    """
    if largest is None:
        return None
    return torch.nn.utils.clip_grad_norm_(network.parameters(), largest)


def describe_init(file, missing, left_over):
    """What was read from a file of weights, for the terminal."""
    anew, left = (sorted({name.split(".")[0] for name in names}) for names in (missing, left_over))
    return f"{file}: starting anew {', '.join(anew) or 'nothing'}; leaving out {', '.join(left) or 'nothing'}"


def count_trained(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class RunFiles:
    """A run's log NAME.jsonl, NAME.last.pt to resume from, and its result NAME.pt. Rank 0 writes them."""

    def __init__(self, stem):
        self.stem = stem
        self.log_file = Path(f"{stem}.jsonl")
        self.last = Path(f"{stem}.last.pt")
        self.result = Path(f"{stem}.pt")
        self.rows = 0
        self.start = time.time()

    def resume(self, model, optimizer):
        """Go on from .last.pt: (step, all that it holds), or (0, None). The log is cut back to that step."""
        state = None
        rows = []
        if self.last.exists():
            state = read_checkpoint(self.last)
            rows = self.log_file.read_text().splitlines(keepends=True)[:state["rows"]]
        gather([0])                                                    # all have read before rank 0 writes
        if is_rank_zero():
            write_atomically(self.log_file, lambda path: path.write_text("".join(rows)))
        if state is None:
            return 0, None
        self.rows = len(rows)
        if rows:
            self.start = time.time() - json.loads(rows[-1])["time"]
        load_weights(model, state["model"], self.last)
        optimizer.load_state_dict(state["optimizer"])
        say(f"continuing {self.last} after step {state['step']}")
        return state["step"], state

    def log(self, **row):
        """Append a row, with the seconds since the run began (less its pauses), and return it."""
        row["time"] = round(time.time() - self.start, 3)
        self.rows += 1
        if is_rank_zero():
            with open(self.log_file, "a") as file:
                file.write(json.dumps(row) + "\n")
        return row

    def log_loss(self, loss, norm, done, steps, per_epoch, lr, bar):
        """Log the mean of the ranks' losses and, if it is clipped, the gradient's norm in the last step."""
        loss = gather([float(loss)]).mean().item()
        if not math.isfinite(loss):
            raise RunError(f"loss {loss} at step {done} (lr {lr:.3g}): stopped; the last checkpoint stays "
                           "(try --clip-grad 1, --dtype fp32 or a smaller --base-lr)")
        clipped = {} if norm is None else dict(grad_norm=float(norm))
        row = self.log(step=done, epoch=round(done / per_epoch, 4), lr=lr, loss=loss, **clipped)
        bar.set_postfix(loss=f"{loss:.4f}")
        if bar.disable:
            say(f"step {done}/{steps}  loss {loss:.4f}  lr {lr:.2e}  {row['time']:.0f} s")

    def save(self, path, weights, **rest):
        """Write a checkpoint of `weights`, a model or a state dict, unless one of them is not finite."""
        if not is_rank_zero():
            return
        if isinstance(weights, torch.nn.Module):
            weights = copy_of_weights(weights)
        for name, value in weights.items():
            if not value.isfinite().all():
                raise RunError(f"{name} is not finite: nothing saved, what {self.last} holds stays")
        content = {"model": weights, "rows": self.rows, **rest}
        write_atomically(path, lambda temporary: torch.save(content, temporary))

    def finish(self, weights, **rest):
        """Write the result; there is nothing to resume any more."""
        self.save(self.result, weights, **rest)
        if is_rank_zero():
            self.last.unlink(missing_ok=True)
        say(f"wrote {self.result} in {time.time() - self.start:.0f} s")


def copy_of_weights(model):
    """The state dict on the CPU, which later steps do not change."""
    return {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}


# ==========================================================================================================
# The end of what pretrain.py and finetune.py share
# ==========================================================================================================


# ==========================================================================================================
# The same in pretrain.py, finetune.py and certify.py: errors, flags, processes, files, data sets
# ==========================================================================================================

DATASETS = ("digits", "mnist", "fashion-mnist", "cifar10", "folder")
DEBIAN_FASHION = "/usr/share/datasets/fashion-mnist"                   # of the package dataset-fashion-mnist


class RunError(Exception):
    """What broke in the middle of a run, in one sentence."""


def require(condition, sentence):
    if not condition:
        raise ValueError(sentence)


@contextlib.contextmanager
def one_line_errors():
    """An error inside becomes one line; exit status 2 for wrong use (ValueError), 1 for a broken run."""
    script = Path(__file__).name
    try:
        yield
    except (ValueError, RunError, OSError) as error:
        sentence = str(error).strip().splitlines()[-1]              # a data worker's comes with its traceback
        print(f"{script}: error: {sentence.split('RunError: ')[-1]}", file=sys.stderr, flush=True)
        wrong_use = isinstance(error, ValueError | FileNotFoundError)
        raise SystemExit(2 if wrong_use else 1) from None
    except KeyboardInterrupt:
        print(f"{script}: interrupted; the same command continues", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


def new_parser(doc, defaults):
    """An argparse parser that returns the flags that were given alone: recipes hold the defaults."""
    listed = ", ".join(f"{key.replace('_', '-')} {value}" for key, value in defaults.items())
    parser = argparse.ArgumentParser(
        description=doc,
        epilog=textwrap.fill(f"default values, of --recipe digits: {listed}", 100, break_on_hyphens=False),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.suggest_on_error = True                                     # from Python 3.14 on
    parser.error = functools.partial(require, False)                 # one line, without the list of all flags
    return parser


def number(kind, above=-math.inf, least=-math.inf, below=math.inf):
    """An argparse type: an int or a float x with above < x < below and least <= x, never nan or infinite."""

    def number(text):                                              # argparse calls a word an "invalid number"
        value = kind(text)
        if above < value < below and value >= least:
            return value
        limits = {"above": above, "at least": least, "below": below}
        said = [f"{word} {limit:g}" for word, limit in limits.items() if abs(limit) < math.inf]
        raise argparse.ArgumentTypeError(f"must be {' and '.join(said) or 'finite'}, not {text}")

    return number


def add_run_flags(parser):
    """Where and how to run."""
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--out", help="run directory")
    parser.add_argument("--overwrite", action=switch,
                        help="delete this stage's earlier files in the run directory")
    parser.add_argument("--seed", type=number(int, least=0, below=2**32), help="of everything that is random")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), help="where to run")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"),
                        help="auto: bf16 autocast on GPUs that have it natively, else fp32")
    parser.add_argument("--compile", action=switch, help="torch.compile; None: on GPUs")


def is_rank_zero():
    return os.environ.get("RANK", "0") == "0"


def say(*words):
    """Print, once for all processes."""
    if is_rank_zero():
        print(*words, flush=True)


def start_processes(device, timeout=None):
    """(rank, world, device); joins torchrun's process group: gloo for CPU tensors, NCCL for GPUs'."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")).type
    if device != "cpu":
        there = torch.get_device_module(device).device_count()
        require(local_rank < there, f"there is no {device} device for local process {local_rank}")
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    if world > 1 and not dist.is_initialized():
        store, _, _ = next(dist.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
            # torchrun --max-restarts: without a prefix a new life may find the addresses of the dead one.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout, world_size=world, rank=rank, store=store)
        atexit.register(dist.destroy_process_group)
    return rank, world, torch.device(device, local_rank if device == "cuda" else None)


def gather(values):
    """A few numbers of every rank, (numbers, world), on the CPU; also where ranks wait for each other."""
    own = torch.tensor(values, dtype=torch.float64)
    if not dist.is_initialized():
        return own[:, None]
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return torch.stack(parts, dim=1)


def pick_dtype(dtype, device, earlier):
    """"auto": the dtype with which the run began, else bf16 on GPUs that have it natively, else fp32."""
    if dtype != "auto":
        return dtype
    if "dtype" in earlier:
        return earlier["dtype"]
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "fp32"


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path, write):
    """write(temporary path), then rename: after a crash, too, there is the old file or the new one."""
    temporary = Path(f"{path}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:                                         # torch and safetensors have their own
        temporary.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {str(error).splitlines()[0]}") from None


def read_settings(stem, overwrite):
    """The settings of a run that goes on, or {}."""
    file = Path(f"{stem}.json")
    return json.loads(file.read_text()) if file.exists() and not overwrite else {}


def begin_run(lock, stem, settings, may_change, result, overwrite):
    """What rank 0 does first: lock the run, compare its settings with the earlier ones, write them."""
    import filelock

    os.makedirs(os.path.dirname(stem), exist_ok=True)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise ValueError(f"{stem} is in use by another process") from None
    if overwrite:
        for end in (".last.pt", ".pt", ".tsv", ".tsv.part*", ".jsonl", ".json"):
            for file in glob.glob(glob.escape(stem) + end):
                os.remove(file)
    before = read_settings(stem, overwrite)
    settings = json.loads(json.dumps(settings))                        # as it is read back: lists, not tuples
    other = []
    for key in sorted({*before, *settings} - {*may_change}):
        if before and before.get(key) != settings.get(key):
            other.append(f"{key} {before.get(key)} -> {settings.get(key)}")
    require(not other, f"{stem} has other settings ({', '.join(other)}): use another --out, or --overwrite")
    if not result.exists():
        text = json.dumps(settings, indent=1) + "\n"
        write_atomically(f"{stem}.json", lambda path: path.write_text(text))


@contextlib.contextmanager
def run_directory(stem, settings, may_change, result, overwrite):
    """Hold the files `stem`.* for this job: settings lie in `stem`.json, no other job writes to them.

    A run that began with other settings (but for those that `may_change`) is refused, on all ranks. The file
    `result` says, by being there, that the stage is done.
    """
    import filelock

    folder, name = os.path.split(stem)
    lock = filelock.FileLock(f"{folder}/.{name}.lock")
    problem = None
    try:
        if is_rank_zero():
            try:
                begin_run(lock, stem, settings, may_change, result, overwrite)
            except (ValueError, RunError, OSError) as error:
                problem = error
        if gather([problem is not None]).any():
            raise problem or SystemExit(2)                             # rank 0 says why
        yield
    finally:
        lock.release()


@dataclasses.dataclass(eq=False)
class Images:
    """Labelled images, uint8: in memory as `pixels`, or as picture `files`."""

    labels: torch.Tensor                                               # M
    classes: list                                                      # the classes' names
    size: int                                                          # S, pixels
    channels: int                                                      # C
    levels: int                                                        # the value of white
    pixels: torch.Tensor | None = None                                 # M C S S
    files: list | None = None                                          # M

    def __len__(self):
        return len(self.labels)

    def read(self, i):
        if self.pixels is not None:
            return self.pixels[i]                                      # C S S
        return fit(open_picture(self.files[i], self.channels), self.size)


def open_images(dataset, data_path, train, size, channels):
    """The training or the test images of a data set.

    digits: scikit-learn's, 8 x 8, 0 to 16. The last 360, by other writers, are the test images.
    mnist, fashion-mnist: torchvision's, in data_path; downloaded if need be. (Fashion: or Debian's files.)
    cifar10: torchvision's, in data_path; downloaded if need be.
    folder: a folder for each class in data_path/train and in data_path/val or /test.
    """
    if dataset == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        part = slice(None, -360) if train else slice(-360, None)
        pixels = torch.as_tensor(digits.images[part], dtype=torch.uint8)[:, None]
        labels = torch.as_tensor(digits.target[part]).long()
        images = Images(labels, [str(name) for name in digits.target_names], 8, 1, 16, pixels=pixels)

    elif dataset in ("mnist", "fashion-mnist"):
        pixels, labels, classes = open_mnist(dataset, data_path, train)
        images = Images(labels, classes, 28, 1, 255, pixels=pixels[:, None])

    elif dataset == "cifar10":
        from torchvision.datasets import CIFAR10

        part = download(CIFAR10, data_path, train, f"{data_path}/{CIFAR10.base_folder} lacks cifar10")
        pixels = torch.from_numpy(part.data).movedim(3, 1).contiguous()
        images = Images(torch.tensor(part.targets), part.classes, 32, 3, 255, pixels=pixels)

    else:
        from torchvision.datasets import ImageFolder

        require(data_path, "--dataset folder needs a --data-path")
        names = ("train",) if train else ("val", "test")
        roots = [root for root in (Path(data_path, name) for name in names) if root.is_dir()]
        require(roots, f"there is no folder {data_path}/{' or '.join(names)}")
        part = ImageFolder(roots[0])
        files = [file for file, _ in part.samples]
        folders = {os.path.dirname(file) for file in files}
        require(len(folders) == len({os.path.realpath(folder) for folder in folders}),
                f"{data_path} reaches a folder twice (a link's loop?)")
        images = Images(torch.tensor(part.targets), part.classes, size, channels, 255, files=files)

    require((images.size, images.channels) == (size, channels),
            f"{dataset} has images of {images.channels} x {images.size} x {images.size}, the model takes "
            f"{channels} x {size} x {size}")
    return images


def download(source, data_path, train, lacking, other_way=""):
    """torchvision's data set `source`, which one process of a machine downloads into data_path if need be.

    Where that fails, `lacking` says what there is not, and `other_way` how else to get it.
    """
    cause = "another process says why"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            source(data_path, download=True)
        except (RuntimeError, OSError) as error:                       # then the files are missing: see below
            cause = str(error).strip().splitlines()[-1]
    gather([0])                                                        # the others wait for the files
    try:
        return source(data_path, train=train)
    except RuntimeError:
        raise ValueError(f"{lacking}, and the download failed ({cause}): run this once where there is a "
                         f"network, and bring the folder here{other_way}") from None


def open_mnist(dataset, data_path, train):
    """(pixels (M, 28, 28), labels (M,), classes) of MNIST or Fashion-MNIST."""
    from torchvision.datasets import MNIST, FashionMNIST

    require(data_path, f"--dataset {dataset} needs a --data-path")
    fashion = dataset == "fashion-mnist"
    source = FashionMNIST if fashion else MNIST
    folder = Path(data_path, source.__name__, "raw")
    if fashion and not any(folder.glob("*-ubyte")) and os.path.isdir(DEBIAN_FASHION):
        part = f"{DEBIAN_FASHION}/{'train' if train else 't10k'}"
        pixels = read_idx(f"{part}-images-idx3-ubyte.gz")
        labels = read_idx(f"{part}-labels-idx1-ubyte.gz").long()
        say(f"{folder} is empty: {len(labels):,} images are read from {part}-*.gz")
        return pixels, labels, source.classes

    debian = ", or apt-get install dataset-fashion-mnist (Debian, Ubuntu)" if fashion else ""
    part = download(source, data_path, train, f"{folder} lacks {dataset}", debian)
    return part.data, part.targets, source.classes


def read_idx(file):
    """The array of bytes in a gzipped file of MNIST's format: its shape in big-endian words, then content."""
    with gzip.open(file) as stream:
        content = stream.read()
    axes = content[3]
    shape = np.frombuffer(content, ">i4", axes, offset=4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
    return torch.from_numpy(values.reshape(shape).copy())


def open_picture(file, channels):
    """A picture file as an upright PIL image with 8 bits a channel, RGB or grey."""
    from PIL import Image, ImageOps

    mode = "RGB" if channels == 3 else "L"
    try:
        with Image.open(file) as picture:
            if picture.mode[0] in "IF":
                raise ValueError("more than 8 bits per channel")
            ImageOps.exif_transpose(picture, in_place=True)
            picture.load()
            return picture if picture.mode == mode else picture.convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RunError(f"cannot read the image {file}: {error}") from None


def fit(picture, size):
    """The middle of a PIL image as uint8 (C, S, S): shorter side to S 256/224 (bicubic), then S x S of it."""
    from torchvision.transforms.v2 import functional as T

    if picture.size != (size, size):
        picture = T.resize(picture, [round(size * 256 / 224)], T.InterpolationMode.BICUBIC)
        picture = T.center_crop(picture, [size, size])
    return T.pil_to_tensor(picture)


# ==========================================================================================================
# The end of what pretrain.py, finetune.py and certify.py share
# ==========================================================================================================


if __name__ == "__main__":
    main()
