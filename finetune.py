"""Stage 2: fine-tune the encoder as the base classifier f of a smoothed one (DMAE, section 3.2).

    python finetune.py --sigma 0.25                            # digits, two CPU cores: a minute
    python finetune.py --sigma 0.5 --recipe cifar10            # one GPU
    torchrun --nproc_per_node=8 finetune.py --sigma 0.25 --recipe imagenet-base --init dmae_base.pth
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        finetune.py --sigma 0.25 --recipe imagenet-base
    python finetune.py --sigma 0.25 --linear-probe --init runs/digits/pretrain.pt --out runs/probe
    python finetune.py --sigma 0.25 --init scratch --out runs/scratch            # no pre-training
    python finetune.py --sigma 0.5 --objective extras/smoothadv.py:smoothadv --out runs/smoothadv \\
        --init runs/digits/pretrain.pt --objective-args copies=2 eps=0.5 steps=4

f learns to classify x + N(0, sigma^2 I). The decoder is dropped; data set, sizes, mean and std come
from the pre-training checkpoint (RUN/pretrain.pt unless --init names one). The best model on
held-out training images, by majority vote over noisy copies, becomes RUN/finetune_sigma_S.pt; the
test images are looked at once, at the end. Killed at any moment, the same command goes on from its
last checkpoint and ends with the same bits.

The weights have timm's names: VisionTransformer(global_pool="avg", ...).load_state_dict(
torch.load(FILE)["model"]) takes them; its images are normalised before ("config": mean, std).

Axes:  B images   C channels   H W pixels   m noisy copies of each image

Read down to the first ruler of equal signs: the rest is plumbing.
"""

import argparse
import ast
import atexit
import contextlib
import copy
import functools
import hashlib
import inspect
import json
import math
import os
import re
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import filelock
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from model import (
    NORMALISATION,
    SIZES,
    build_vit,
    decays,
    learning_rate,
    load_encoder,
    load_weights,
    read_checkpoint,
)

# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------

FLAGS = {                               # name: (value in the recipe digits, what it is, *choices)
    "recipe": ("digits", "data, model and all hyperparameters", "digits", "fashion", "mnist",
               "cifar10", "cifar10-transfer", "imagenet-base", "imagenet-large", "imagenet-huge"),
    "sigma": (0.25, "standard deviation of the noise, for pixels in [0, 1]; needed; 0: no noise"),
    "dataset": ("digits", "folder: a folder for each class in DATA_PATH/train and DATA_PATH/val",
                "digits", "mnist", "fashion-mnist", "cifar10", "folder"),
    "size": (8, "side of a folder's pictures, pixels; the noise is added at this resolution"),
    "normalisation": ("", "whose mean and deviation; '': the data set's, a folder's: imagenet",
                      "", *NORMALISATION),
    "holdout": (0.1, "training images kept for model selection, share or number"),
    "labels_per_class": (0, "train on so many images of each class; 0: all"),
    "augment": ("none", "the last two are for pictures of over 64 pixels, the others for fewer",
                "none", "shift", "flip", "shift-flip", "resized-crop", "rand-augment"),
    "erasing": (0.0, "chance of a black rectangle in a picture of more than 64 pixels; 0: none"),
    "mixup": (0.0, "mixup's Beta parameter; 0: off"),
    "cutmix": (0.0, "cutmix's Beta parameter; 0: off"),
    "model": ("vit_digits", "the network's size", *SIZES),
    "init": ("", "pre-trained weights (ours, the authors', MAE's, timm's), or scratch; "
             "'': RUN/pretrain.pt"),
    "linear_probe": (False, "train a linear classifier on the frozen class token"),
    "objective": ("consistency", "what is minimised: gaussian, consistency or FILE.py:NAME"),
    "objective_args": (("lam=2.0",), "NAME=VALUE ... in place of the objective's own"),
    "batch": (128, "images of a step, over all processes and accumulated micro-batches"),
    "epochs": (60, "passes over the training images"),
    "warmup_epochs": (5.0, "epochs of linear warm-up; 0: none"),
    "base_lr": (8e-3, "learning rate per 256 images of the batch"),
    "min_lr": (1e-6, "learning rate at the end; 0: none"),
    "layer_decay": (0.75, "learning-rate factor from a layer to the one below"),
    "weight_decay": (0.05, "AdamW's; 0: none"),
    "drop_path": (0.0, "stochastic depth of the last block; 0: none"),
    "save_every": (10, "epochs between checkpoints, and between votes, which select the model"),
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
PAPER = dict(                           # section 4.2 and appendix: ImageNet, ViT-B
    dataset="folder",
    data_path="data/imagenet",
    size=224,
    holdout=10_000,
    augment="rand-augment",             # resized crop 0.08 to 1, flip, RandAugment(2, 9 of 10)
    erasing=0.25,
    mixup=0.8,                          # mixup or cutmix, one of them, for every batch
    cutmix=1.0,
    batch=1024,
    device_batch=128,                   # 17 GiB for ViT-B in bf16 (counted)
    epochs=100,
    base_lr=5e-4,
    layer_decay=0.65,
    drop_path=0.1,
    save_every=1,
)
LARGE = dict(
    PAPER,
    objective="gaussian",
    objective_args=(),
    epochs=50,
    base_lr=1e-3,
    layer_decay=0.75,
)
FASHION = dict(                         # ours, for two CPU cores; chosen on held-out images
    dataset="fashion-mnist",
    size=28,
    model="vit_fashion",
    holdout=0.05,                       # shifts by up to three pixels, with flips: much worse
    objective_args=("lam=5.0",),        # Jeong & Shin's on MNIST; 2 and 10 give no larger radius
    batch=256,
    device_batch=256,
    epochs=8,
    warmup_epochs=1.0,
    base_lr=3e-3,
    drop_path=0.1,
)
RECIPES = {                             # what differs from the recipe digits
    "digits": dict(),                   # ours, chosen on held-out images
    "fashion": FASHION,
    "mnist": dict(FASHION, dataset="mnist"),
    "cifar10": dict(                    # ours: a small ViT on one GPU
        dataset="cifar10",
        size=32,
        model="vit_cifar_small",
        holdout=0.04,
        augment="shift-flip",           # by up to four pixels
        objective_args=("lam=5.0",),
        batch=256,
        device_batch=256,
        epochs=50,
        base_lr=1e-3,
        drop_path=0.1,
    ),
    "cifar10-transfer": dict(           # section 4.3: ViT-B from ImageNet, continued or not
        PAPER,
        dataset="cifar10",
        data_path="data",
        size=32,
        model="vit_base_patch16",       # it resizes to 224
        holdout=0.04,
        augment="flip",
        erasing=0.0,
        mixup=0.0,
        cutmix=0.0,
        batch=256,
        epochs=50,
    ),
    "imagenet-base": dict(PAPER, model="vit_base_patch16"),
    "imagenet-large": dict(LARGE, model="vit_large_patch16", drop_path=0.2),
    "imagenet-huge": dict(LARGE, model="vit_huge_patch14", drop_path=0.3),       # not in its tables
}
PROBE = dict(                           # section 4.4 and appendix: what --linear-probe changes
    augment="resized-crop",
    erasing=0.0,
    mixup=0.0,
    cutmix=0.0,
    objective="gaussian",
    objective_args=("label_smoothing=0.0",),
    epochs=90,
    warmup_epochs=10.0,
    batch=16384,
    device_batch=512,                   # the BatchNorm's statistics are those of a device batch
    base_lr=0.1,
    min_lr=0.0,
    weight_decay=0.0,
    drop_path=0.0,
)
SMALL_PROBE = dict(PROBE, augment="none", batch=1024, epochs=8, warmup_epochs=1.0, base_lr=5.0)
PROBES = {                              # of recipes other than ImageNet's
    "digits": dict(PROBE, augment="none", batch=128, epochs=60, warmup_epochs=5.0, base_lr=20.0),
    "fashion": SMALL_PROBE,
    "mnist": SMALL_PROBE,
    "cifar10": dict(PROBE, augment="shift-flip", batch=1024, epochs=50),
    "cifar10-transfer": dict(PROBE, augment="flip", batch=1024, epochs=50),
}
INHERITED = ("dataset", "size", "model", "normalisation", "data_path", "holdout")


def parse(argv):
    """The settings: what flags say, else the pre-training checkpoint, else the recipe."""
    given = read_flags(__doc__, FLAGS | RUN_FLAGS, argv)
    if "sigma" not in given:
        refuse("--sigma is needed")
    out = given.get("out", f"runs/{given.get('recipe', 'digits')}")
    init = given.get("init", f"{out}/pretrain.pt")
    if "init" not in given and not Path(init).exists():
        refuse(f"there is no {init}: run pretrain.py first, or give --init FILE or scratch")
    made_with = {}
    checkpoint = read_checkpoint(init) if init != "scratch" else {}
    if checkpoint.get("kind") == "pretrain":
        made_with = checkpoint["settings"] | {"size": checkpoint["data"]["image_size"]}

    # The recipe, unless the checkpoint was made by it: then data and model are the checkpoint's.
    recipe = given.get("recipe", made_with.get("recipe", "digits"))
    values = {name: value for name, (value, *_) in (FLAGS | RUN_FLAGS).items()} | RECIPES[recipe]
    if given.get("linear_probe"):
        values |= PROBES.get(recipe, PROBE)
    if made_with.get("recipe") == recipe:
        values |= {key: made_with[key] for key in INHERITED if key in made_with}
        for key in INHERITED[:4]:
            if given.get(key, values[key]) != values[key]:
                refuse(f"--{key} {given[key]} contradicts {init}, made with {values[key]} (to "
                       "transfer it to other data, name another --recipe)")
    check_dataset(given, values)
    objective = given.get("objective", values["objective"] if given["sigma"] else "gaussian")
    own = values["objective_args"] if objective == values["objective"] else ()
    values |= {"out": f"runs/{recipe}"} | given
    values |= {"recipe": recipe, "init": init, "objective": objective}
    args = argparse.Namespace(**values)

    # A recipe's objective_args are for its own objective.
    words = [*own, *given.get("objective_args", ())]
    function, args.objective_sha256 = open_objective(objective)
    args.objective_args = hyperparameters(function, args.sigma, words)
    return args


# --------------------------------------------------------------------------------------------------
# Objectives: loss = objective(f, x, targets, sigma, epoch, epochs, **hyperparameters)
#
# x (B, C, H, W) in [0, 1], targets (B, classes) shares of classes, epoch a float, from 0.
# f(x, noise) are the logits (m, B, classes) of f(x + noise_i), noise (m, B, C, H, W). It is called
# once a step, so that DDP can follow; f.frozen(x, noise) as often as an attack needs. The noise is
# drawn first, and after everything else that is random: an attack and the loss see the same draws.
# A hyperparameter that depends on sigma is a triple, for sigma = 0.25, 0.5 and 1.
# --------------------------------------------------------------------------------------------------


def cross_entropy(logits, targets, smoothing=0.0):
    """mean_i CE(f(x + e_i), y) over the m copies and the images (Cohen et al. 2019).

    logits (m, B, classes), targets (B, classes); smoothing is that of the labels.
    (notebook 04, (4.3))
    """
    every = logits.flatten(0, 1)                                             # mB classes
    return F.cross_entropy(every, targets.repeat(len(logits), 1), label_smoothing=smoothing)


def log_smoothed(logits):
    """log F of F = mean_i softmax(f(x + e_i)); (m, B, K) -> (B, K) (notebook 06, (6.2))."""
    return logits.log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits))


def consistency_loss(logits, lam, eta):
    """lam * mean_i KL(F || F_i) + eta * H(F), averaged over images (Jeong & Shin 2020, 2006.04062).

    logits (m, B, classes) of m noisy copies of each image; F_i are their softmax outputs and F is
    the mean of them. (notebook 04, (4.9))
    """
    log_each = logits.log_softmax(dim=-1)                                    # m B classes
    log_mean = log_smoothed(logits)                                          # B classes
    mean = log_mean.exp()                                                    # B classes
    divergence = (mean * (log_mean - log_each)).sum(dim=-1).mean()
    entropy = -(mean * log_mean).sum(dim=-1).mean()
    return lam * divergence + eta * entropy


def gaussian(f, x, targets, sigma, epoch, epochs, copies=1, label_smoothing=0.1):
    """Training with noise alone (Cohen et al. 2019; notebook 04, (4.3))."""
    noise = sigma * torch.randn(copies, *x.shape, device=x.device)           # m B C H W
    return cross_entropy(f(x, noise), targets, label_smoothing)


def consistency(
    f, x, targets, sigma, epoch, epochs,
    copies=2, lam=2.0, eta=(0.5, 0.5, 0.1), label_smoothing=0.1,
):
    """With consistency_loss(), as the paper (section 4.2; notebook 04, (4.3), (4.9))."""
    if copies < 2:
        refuse(f"consistency is of 2 copies or more, not {copies} (else: --objective gaussian)")
    noise = sigma * torch.randn(copies, *x.shape, device=x.device)           # m B C H W
    logits = f(x, noise)                                                     # m B classes
    return cross_entropy(logits, targets, label_smoothing) + consistency_loss(logits, lam, eta)


def open_objective(name):
    """The objective of that name, or of that FILE.py:NAME, and the file's sha256."""
    built_in = {"gaussian": gaussian, "consistency": consistency}
    if name in built_in:
        return built_in[name], ""
    return open_plug(name, "--objective")


def hyperparameters(objective, sigma, given):
    """{name: value} of the objective's keyword arguments, some replaced by `given`, NAME=VALUE."""
    parameters = inspect.signature(objective).parameters.values()
    values = {p.name: p.default for p in parameters if p.default is not p.empty}
    for word in given:
        name, _, value = word.partition("=")
        if name not in values:
            refuse(f"--objective-args {word}: there are {', '.join(values)}")
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            refuse(f"--objective-args {word}: give NAME=VALUE, a number")
    nearest = min(range(3), key=lambda i: abs(sigma - (0.25, 0.5, 1.0)[i]))
    return {name: value[nearest] if isinstance(value, tuple) else value
            for name, value in values.items()}


def noisy_logits(network, dtype):
    """f for the objectives: logits (m, B, classes) of x + noise, in fp32, computed in `dtype`."""

    def logits_of(network, x, noise):
        noisy = rearrange(x + noise, "m b c h w -> (m b) c h w")
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bf16"):
            logits = network(noisy)
        return rearrange(logits.to(x.dtype), "(m b) k -> m b k", m=len(noise))

    def frozen(x, noise):
        """In eval mode and outside of DDP; gradients reach x and no weight."""
        model = getattr(network, "module", network)
        training = model.training
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        model.eval()
        logits = logits_of(functools.partial(functional_call, model, weights), x, noise)
        model.train(training)
        return logits

    f = functools.partial(logits_of, network)
    f.frozen = frozen
    return f


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


def make_augment(kind, images, erasing):
    """The augmentation called `kind`: of batches in memory, or (the last two) of pictures."""
    if kind == "none":
        return None
    if (kind in ("resized-crop", "rand-augment")) != (images.size > 64):
        refuse(f"--augment {kind} is not for pictures of {images.size} pixels")
    if images.size <= 64:
        how = dict(shift=images.size // 8 if "shift" in kind else 0, flip="flip" in kind)
        return functools.partial(shift_and_flip, **how)
    crop = v2.RandomResizedCrop(images.size, interpolation=InterpolationMode.BICUBIC)
    steps = [v2.PILToTensor(), crop, v2.RandomHorizontalFlip()]
    if kind == "rand-augment":
        steps.append(v2.RandAugment(num_ops=2, magnitude=27))  # of 30: the paper's (timm's) 9 of 10
    return v2.Compose([*steps, v2.RandomErasing(erasing)])


def make_mix(mixup, cutmix, classes):
    """(images, labels) -> (images, targets (B, classes)): mixup or cutmix, where it is not 0."""
    both = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
    mixes = [kind(alpha=alpha, num_classes=classes) for kind, alpha in both if alpha]
    if mixes:
        return v2.RandomChoice(mixes)
    return lambda images, labels: (images, F.one_hot(labels, classes).to(images))


def open_data(args, device):
    """(training images, test images, which to train on, which are held out)."""
    channels = SIZES[args.model]["channels"]
    images, test = (
        open_images(args.dataset, args.data_path, train, args.size, channels, device)
        for train in (True, False)
    )
    if images.classes != test.classes:
        odd = sorted({*images.classes} ^ {*test.classes})
        refuse(f"{args.data_path}: only in one of training and test are {', '.join(odd[:3])}")
    train, held_out = hold_out(len(images.labels), args.holdout)
    if args.labels_per_class:
        train = few_labels(train, images.labels, args.labels_per_class, args.seed)
    return images, test, train, held_out


def few_labels(train, labels, count, seed):
    """`count` of the images `train` (m,) of each class, chosen by the seed, repeated up to m."""
    order = train[torch.randperm(len(train), generator=generator(seed_of(seed)))]
    chosen = torch.cat([order[labels[order] == label][:count] for label in labels.unique()])
    return chosen.repeat(math.ceil(len(train) / len(chosen)))[:len(train)]


# --------------------------------------------------------------------------------------------------
# Model and optimizer
# --------------------------------------------------------------------------------------------------


def build_model(args, classes, device):
    """The classifier with the pre-trained encoder, on the device; a probe trains its head alone."""
    torch.manual_seed(args.seed)
    pixels = NORMALISATION[args.normalisation or args.dataset.replace("folder", "imagenet")]
    probe = dict(pool="cls", probe=True) if args.linear_probe else {}
    model = build_vit(args.model, classes, drop_path=args.drop_path, **probe, **pixels)
    if args.init != "scratch":
        missing, left_over = load_encoder(model, args.init)
        say(f"{args.init}: {len(missing)} tensors start anew, {len(left_over)} are left out")
    if args.linear_probe:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    return model.to(device)


def layer_of(name, depth):
    """0: tokens, positions, patches; N + 1: blocks.N; depth + 1: the rest (notebook 04, (4.4))."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed")):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1


def parameter_groups(model, weight_decay, layer_decay):
    """A group for each layer and decay, with its lr_scale (notebook 04, (4.4))."""
    groups = {}
    depth = len(model.blocks)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, depth)
        decay = weight_decay if decays(name, parameter) else 0.0
        scale = layer_decay ** (depth + 1 - layer)
        new = dict(params=[], weight_decay=decay, lr_scale=scale)
        groups.setdefault((layer, decay > 0), new)["params"].append(parameter)
    return list(groups.values())


class LARS(torch.optim.SGD):
    """Layer-wise adaptive rates (You et al. 2017, arXiv 1708.03888): SGD with momentum 0.9.

    The gradient g of a matrix w, with its weight decay, is scaled by 0.001 |w| / |g|.
    (notebook 04, (4.12))
    """

    def step(self):
        for group in self.param_groups:
            for w in [w for w in group["params"] if w.ndim > 1]:
                w.grad.add_(w.detach(), alpha=group["decay"])
                size, change = w.detach().norm(), w.grad.norm()
                usable = (size > 0) & (change > 0)
                w.grad.mul_(torch.where(usable, 0.001 * size / change, 1.0))
        super().step()


def build_optimizer(model, args):
    """AdamW, or LARS for the linear probe, at the peak learning rate base_lr * batch / 256."""
    groups = parameter_groups(model, args.weight_decay, args.layer_decay)
    peak = args.base_lr * args.batch / 256
    if args.linear_probe:
        groups = [group | dict(decay=group.pop("weight_decay")) for group in groups]
        return LARS(groups, lr=peak, momentum=0.9)
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.999), fused=True)


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(model, images, index, sigma, copies, args, device):
    """The share of images[index] that is right, by majority over `copies` noisy copies of each.

    Blocks of 50 images are dealt to the processes, and their noise depends on (seed, block) alone.
    """
    model.eval()
    starts = range(RANK * 50, len(index), WORLD * 50)
    blocks = [index[start:start + 50] for start in starts]
    right = 0
    batches = load_batches(images, blocks, device, workers=args.workers)
    for start, (x, labels) in zip(starts, batches, strict=True):             # B C H W, B
        torch.manual_seed(seed_of(args.seed, start, 0))
        if copies > 1:
            torch.randn_like(x)                                # `noisy` has this one
        votes = 0
        for first in range(0, copies, 5):                      # five copies of the block at a time
            noise = torch.randn(min(5, copies - first), *x.shape, device=device)      # m B C H W
            noisy = rearrange(x + sigma * noise, "m b c h w -> (m b) c h w")
            with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
                answers = model(noisy).argmax(dim=1)                         # mB
            answers = F.one_hot(answers, len(images.classes))                # mB classes
            votes = votes + rearrange(answers, "(m b) k -> m b k", b=len(x)).sum(dim=0)
        right += (votes.argmax(dim=1) == labels).sum()
    model.train()
    return round(sum_over_ranks(float(right)) / len(index), 6)


def evenly_spaced(index, count):
    """`count` of the images `index`, or all. (The first of class folders would be of one class.)"""
    places = torch.linspace(0, len(index) - 1, min(count, len(index)), dtype=torch.float64)
    return index[places.long()]


def measure(model, images, index, args, device):
    """Accuracies: on clean images, under one draw of noise, and by the vote of 100 noisy copies.

    The vote is certified accuracy at r = 0 but for the confidence; of at most 1000 of the images.
    """
    for buffer in model.buffers() if WORLD > 1 else ():
        dist.broadcast(buffer, 0)                              # a probe's statistics: those saved
    return dict(
        clean=accuracy(model, images, index, 0.0, 1, args, device),
        noisy=accuracy(model, images, index, args.sigma, 1, args, device),
        vote=accuracy(model, images, evenly_spaced(index, 1000), args.sigma, 100, args, device),
    )


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def train_step(network, optimizer, batches, mix, accumulate, objective, args, step, epoch):
    """One optimizer step on the mean loss of `accumulate` micro-batches: this process's part.

    Noise comes after mixup: mixed noisy images would have its deviation times sqrt(l^2 + (1-l)^2).
    (notebook 04, (4.7))
    """
    total = 0.0
    f = noisy_logits(network, args.dtype)
    for micro in range(accumulate):
        x, labels = next(batches)                                            # B C H W, B
        torch.manual_seed(seed_of(args.seed, step, micro, RANK))
        x, targets = mix(x, labels)                                          # B C H W, B classes
        network.require_backward_grad_sync = micro == accumulate - 1         # of DDP
        with users_file(f"--objective {args.objective}"):
            loss = objective(f, x, targets, args.sigma, epoch, args.epochs, **args.objective_args)
        (loss / accumulate).backward()
        total = total + loss.detach() / accumulate
    optimizer.step()
    optimizer.zero_grad()
    return total


def finetune(args):
    """The stage, from the pre-trained encoder to the classifier that is certified."""
    device, args.dtype = pick_device(args.device, args.dtype)
    torch.backends.cuda.enable_flash_sdp((device.type, args.dtype) != ("cpu", "bf16"))
    stem = f"{args.out}/finetune_sigma_{args.sigma:g}"
    objective, args.objective_sha256 = open_objective(args.objective)

    # Data, network, optimizer.
    images, test, train, held_out = open_data(args, device)
    augment = make_augment(args.augment, images, args.erasing)
    mix = make_mix(args.mixup, args.cutmix, len(images.classes))
    device_batch, accumulate, steps = plan(args.batch, args.device_batch, len(train))
    model = build_model(args, len(images.classes), device)
    optimizer = build_optimizer(model, args)
    peak = optimizer.defaults["lr"]
    network = parallelise(model, args, device)
    say(f"{args.model} on {WORLD} x {device.type} in {args.dtype}; {len(train):,} images; "
        f"{args.epochs} epochs of {steps:,} steps of {WORLD} x {accumulate} x {device_batch}; "
        f"lr {peak:.3g}; sigma {args.sigma:g}")

    # Everything that certification, or this stage after a stop, has to know.
    data = dict(dataset=args.dataset, data_path=args.data_path, image_size=images.size)
    data |= dict(channels=model.config["channels"], holdout=args.holdout, classes=images.classes)
    about = dict(kind="finetune", config=model.config, data=data, settings=vars(args))
    about |= dict(sigma=args.sigma)

    with run_directory(stem, vars(args)):
        if Path(f"{stem}.pt").exists():
            say(f"{stem}.pt is done; use another --out to do it again")
            return
        state, started = resume(stem, model, optimizer)
        best = state.get("best")
        bar = tqdm(total=args.epochs * steps, desc="finetune", disable=None if RANK == 0 else True)
        bar.update(state["epoch"] * steps)
        for epoch in range(state["epoch"], args.epochs):
            order = micro_batches(train, args.batch, device_batch, epoch, args.seed)
            batches = load_batches(images, order, device, augment, args.seed, epoch, args.workers)
            total = 0.0
            for step in range(epoch * steps, (epoch + 1) * steps):
                warmup = int(args.warmup_epochs * steps)
                lr = learning_rate(step, bar.total, warmup, peak, args.min_lr)
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["lr_scale"]
                part = (mix, accumulate, objective, args, step, step / steps)
                total = total + train_step(network, optimizer, batches, *part)
                bar.update()

            done = epoch + 1
            loss = mean_loss(total / steps, done)
            log(stem, started, step=done * steps, epoch=done, lr=lr, loss=loss)
            if done % args.save_every == 0 or done == args.epochs:
                found = measure(model, images, held_out, args, device)
                log(stem, started, step=done * steps, epoch=done, split="holdout", **found)
                say(f"epoch {done}/{args.epochs}  loss {loss:.4f}  held out: {found}")
                if best is None or found["vote"] >= best["vote"]:
                    weights = copy.deepcopy(model.state_dict())
                    best = dict(vote=found["vote"], epoch=done, model=weights)
                rows = done + math.ceil(done / args.save_every)          # an epoch's, and a vote's
                rest = about | dict(epoch=done, rows=rows, best=best)
                rest |= dict(optimizer=optimizer.state_dict())
                save(f"{stem}.last.pt", model.state_dict(), **rest)
        bar.close()

        # The kept model meets the test images: once.
        model.load_state_dict(best["model"])
        found = measure(model, test, torch.arange(len(test.labels)), args, device)
        log(stem, started, step=args.epochs * steps, epoch=best["epoch"], split="test", **found)
        say(f"test images, model of epoch {best['epoch']}: {found}")
        finish(stem, best["model"], started, epoch=args.epochs, **about)


def main(argv=None):
    with one_line_errors():
        finetune(parse(argv))


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
# The same in finetune.py and certify.py: what users plug in
# ==================================================================================================


@contextlib.contextmanager
def users_file(place):
    """An error inside keeps its traceback, and ends with a line that says where it was."""
    try:
        yield
    except Refusal:
        raise
    except Exception as error:
        raise RuntimeError(f"in {place}") from error


def open_plug(place, flag):
    """(what FILE.py:NAME names, FILE's sha256), by an import: its folder comes first on the path.

    `from certify import ...` in FILE is the running certify.py; likewise finetune.
    """
    file, _, name = place.rpartition(":")
    if not Path(file).is_file():
        refuse(f"{flag} {place}: there is no such FILE.py:NAME")
    sys.modules.setdefault(Path(__file__).stem, sys.modules[__name__])
    sys.path.insert(0, str(Path(file).resolve().parent))
    source = Path(file).read_bytes()
    module = sys.modules[Path(file).stem] = ModuleType(Path(file).stem)
    module.__file__ = file
    with users_file(f"the import of {file} ({flag})"):
        exec(compile(source, file, "exec"), vars(module))
    found = getattr(module, name, None)
    if not callable(found) or isinstance(found, type):
        refuse(f"{file} has no function {name!r} ({flag} FILE.py:NAME)")
    return found, hashlib.sha256(source).hexdigest()


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
