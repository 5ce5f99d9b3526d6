"""Stage 2: fine-tune the encoder as the base classifier f of a smoothed classifier (DMAE, section 3.2).

    python finetune.py --sigma 0.25                            # digits, two CPU cores: half a minute
    python finetune.py --sigma 0.5 --recipe cifar10            # one GPU
    python finetune.py --sigma 0.5 --objective smoothadv --out runs/smoothadv --init runs/digits/pretrain.pt
    torchrun --nproc_per_node=8 finetune.py --sigma 0.25 --recipe imagenet-base --init dmae_base.pth
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 finetune.py ...
    python finetune.py --sigma 0.25 --linear-probe --init runs/digits/pretrain.pt --out runs/probe
    python finetune.py --sigma 0.25 --init scratch --out runs/scratch   # no pre-training, for comparison
    python finetune.py --sigma 0.25 --export vit.pt            # the finished classifier, for timm

f learns to classify x + N(0, sigma^2 I). The decoder is dropped; data set, sizes, mean and std come from the
pre-training checkpoint (RUN/pretrain.pt unless --init names one). The best model on held-out training images,
by majority vote over noisy copies, becomes RUN/finetune_sigma_S.pt; the test images are looked at once, at
the end. Killed at any moment, the same command goes on from its last checkpoint and ends with the same bits.

Axes:  B images   C channels   H W pixels   m noisy copies of each image
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
import re
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as T
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

# ----------------------------------------------------------------------------------------------------------
# Recipes
# ----------------------------------------------------------------------------------------------------------

DEFAULTS = dict(                           # what no recipe changes
    objective="consistency",
    copies=None,                           # noisy copies of an image; None: 2 with consistency, else 1
    attack_eps=None,                       # SmoothAdv: radius of the ball, pixels in [0, 1]
    attack_step=None,                      # SmoothMix: length of a step of the ascent
    attack_steps=None,
    smoothmix_eta=None,
    macer_lambda=None,
    macer_beta=None,
    macer_gamma=None,
    objective_warmup=0,                    # epochs: eps and eta rise; MACER's lambda is 0
    linear_probe=False,
    labels_per_class=None,                 # all of them
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
    export=None,
    dry_run=False,
)
PAPER = dict(                              # section 4.2 and appendix: ImageNet, ViT-B
    dataset="folder",
    data_path="data/imagenet",             # with train/ and val/ class folders
    image_size=224,                        # resolution at which the noise is added
    normalisation="imagenet",
    holdout=10_000,                        # training images kept for model selection
    augment="rand-augment",                # random resized crop 0.08-1, flip, RandAugment(2, 9 of 10)
    erasing=0.25,                          # chance of erasing a rectangle (with black)
    mixup=0.8,                             # Beta parameter; mixup or cutmix, one of them, for every batch
    cutmix=1.0,
    label_smoothing=0.1,
    consistency=2.0,                       # lambda of Jeong & Shin 2020; 0: off
    consistency_eta=None,                  # None: 0.5 for sigma < 1, 0.1 from there on
    epochs=100,
    warmup_epochs=5,
    batch=1024,                            # effective, over all processes and accumulated micro-batches
    device_batch=128,                      # at most, per process: 17 GiB for ViT-B in bf16 (counted)
    base_lr=5e-4,                          # lr = base_lr * batch / 256
    min_lr=1e-6,
    layer_decay=0.65,
    weight_decay=0.05,
    drop_path=0.1,
    vote_every=10,                         # epochs
    log_every=20,                          # steps
    save_every=500,                        # steps
)
SMALL = dict(                              # ours: images of at most 64 pixels
    data_path="data",
    augment="shift-flip",                  # by up to an eighth of the side
    erasing=0.0,
    mixup=0.0,
    cutmix=0.0,
    label_smoothing=0.1,
    consistency=2.0,
    consistency_eta=None,
    batch=256,
    device_batch=256,
    base_lr=1e-3,
    min_lr=1e-6,
    layer_decay=0.75,
    weight_decay=0.05,
    drop_path=0.1,
    vote_every=10,
    log_every=50,
    save_every=500,
)
FASHION = dict(                            # for two CPU cores; chosen on held-out images
    SMALL,
    dataset="fashion-mnist",
    model="vit_fashion",
    image_size=28,
    normalisation="fashion-mnist",
    holdout=0.05,
    augment="none",                        # shifts by up to three pixels, with flips, made it much worse
    consistency=5.0,                       # Jeong & Shin's on MNIST; 2 and 10 give no larger radius
    epochs=8,
    warmup_epochs=1,
    base_lr=3e-3,
)
RECIPES = {
    "digits": dict(                        # chosen on held-out training images
        SMALL,
        dataset="digits",
        data_path=None,
        model="vit_digits",
        image_size=8,
        normalisation="digits",
        holdout=0.1,
        augment="none",
        epochs=60,
        warmup_epochs=5,
        batch=128,
        device_batch=128,
        base_lr=8e-3,
        drop_path=0.0,
        save_every=200,
    ),
    "fashion": FASHION,
    "mnist": dict(FASHION, dataset="mnist", normalisation="mnist"),
    "cifar10": dict(                       # a small ViT on one GPU
        SMALL,
        dataset="cifar10",
        model="vit_cifar_small",
        image_size=32,
        normalisation="cifar10",
        holdout=0.04,
        consistency=5.0,
        epochs=50,
        warmup_epochs=5,
    ),
    "cifar10-transfer": dict(          # paper, section 4.3: ViT-B from ImageNet, continued on CIFAR-10 or not
        PAPER,
        dataset="cifar10",
        data_path="data",
        model="vit_base_patch16",
        image_size=32,
        model_size=224,                    # the model resizes
        normalisation="cifar10",
        holdout=0.04,
        augment="flip",
        erasing=0.0,
        mixup=0.0,
        cutmix=0.0,
        epochs=50,
        batch=256,
    ),
    "imagenet-base": dict(PAPER, model="vit_base_patch16"),
    "imagenet-large": dict(
        PAPER,
        model="vit_large_patch16",
        epochs=50,
        base_lr=1e-3,
        layer_decay=0.75,
        drop_path=0.2,
        consistency=0.0,
    ),
    "imagenet-huge": dict(                 # not in the paper's tables
        PAPER,
        model="vit_huge_patch14",
        epochs=50,
        base_lr=1e-3,
        layer_decay=0.75,
        drop_path=0.3,
        consistency=0.0,
    ),
}
PROBE = dict(                        # the linear probe, section 4.4 and appendix: what it changes in a recipe
    augment="resized-crop",
    erasing=0.0,
    mixup=0.0,
    cutmix=0.0,
    label_smoothing=0.0,
    consistency=0.0,
    epochs=90,
    warmup_epochs=10,
    batch=16384,
    device_batch=512,                      # the BatchNorm's statistics are those of a device batch
    base_lr=0.1,
    min_lr=0.0,
    weight_decay=0.0,
    drop_path=0.0,
)
PROBES = {                                 # of recipes other than ImageNet's
    "digits": dict(PROBE, augment="none", epochs=60, warmup_epochs=5, batch=128, base_lr=20.0),
    "fashion": dict(PROBE, augment="none", epochs=8, warmup_epochs=1, batch=1024, base_lr=5.0),
    "mnist": dict(PROBE, augment="none", epochs=8, warmup_epochs=1, batch=1024, base_lr=5.0),
    "cifar10": dict(PROBE, augment="shift-flip", epochs=50, batch=1024),
    "cifar10-transfer": dict(PROBE, augment="flip", epochs=50, batch=1024),
}

# What an objective changes. A triple has the values for sigma 0.25, 0.5 and 1; the nearest sigma's is taken.
# The values are the papers' on CIFAR-10. Ours are the recipe's epochs, optimizer and label smoothing (the
# papers have none, nor has MACER's loss here), and MACER's wait of a third of the epochs at every sigma.
ATTACKS = dict(consistency=0.0, mixup=0.0, cutmix=0.0, objective_warmup=10)
OBJECTIVES = {
    "gaussian": dict(consistency=0.0),
    "consistency": dict(),                 # lambda is the recipe's
    "smoothadv": dict(
        ATTACKS,
        copies=(4, 8, 2),
        attack_eps=(255 / 256, 1.0, 2.0),
        attack_steps=10,
    ),
    "macer": dict(
        ATTACKS,
        copies=16,
        macer_lambda=(12.0, 4.0, 12.0),
        macer_beta=16.0,
        macer_gamma=8.0,
        objective_warmup=None,             # a third of the epochs
        label_smoothing=0.0,
    ),
    "smoothmix": dict(
        ATTACKS,
        copies=2,
        attack_step=(0.5, 1.0, 2.0),
        attack_steps=4,
        smoothmix_eta=5.0,
    ),
}
MNIST_OBJECTIVES = {                       # as in the papers on MNIST
    "smoothadv": dict(copies=4, attack_eps=255 / 256, attack_steps=10),
    "macer": dict(macer_lambda=(16.0, 16.0, 6.0)),
    "smoothmix": dict(copies=4, attack_step=1.0, attack_steps=(3, 4, 8), smoothmix_eta=1.0),
}
IMAGENET_OBJECTIVES = {                    # SmoothAdv's paper
    "smoothadv": dict(copies=1, attack_eps=(1.0, 255 / 256, 2.0), attack_steps=1),
}
RECIPE_OBJECTIVES = {                      # and in these recipes
    "digits": {                            # ours, chosen on held-out images at sigma 0.5 (results/digits)
        "smoothadv": dict(copies=2, attack_eps=(0.25, 0.5, 1.0), attack_steps=4),
        "macer": dict(copies=8, macer_lambda=1.0),
        "smoothmix": dict(copies=2, attack_step=(0.25, 0.5, 1.0), attack_steps=4),
    },
    "fashion": MNIST_OBJECTIVES,
    "mnist": MNIST_OBJECTIVES,
    "imagenet-base": IMAGENET_OBJECTIVES,
    "imagenet-large": IMAGENET_OBJECTIVES,
    "imagenet-huge": IMAGENET_OBJECTIVES,
}
ITS_FLAGS = {                              # which not every objective has
    objective: values.keys() - {"consistency", "mixup", "cutmix", "copies", "label_smoothing"}
    for objective, values in OBJECTIVES.items()
}
INHERITED = ("dataset", "data_path", "image_size", "normalisation", "holdout", "model", "model_size")
MAY_CHANGE = {                             # when a run is continued
    "data_path", "out", "init", "device", "device_batch", "workers", "compile", "overwrite", "dry_run",
    "recompute", "export",
}


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------


def parse(argv):
    """The settings: what flags say, else what the pre-training checkpoint was made with, else the recipe."""
    parser = new_parser(__doc__, DEFAULTS | RECIPES["digits"])
    count = number(int, least=1)
    at_least_0 = number(float, least=0)
    above_0 = number(float, above=0)
    share = number(float, least=0, below=1)
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--recipe", choices=RECIPES, help="data, model and all hyperparameters")
    parser.add_argument("--sigma", type=at_least_0, required=True,
                        help="standard deviation of the noise, pixels in [0, 1]")
    parser.add_argument("--init",
                        help="pre-trained weights (ours, the published DMAE's, MAE's, timm's), or scratch")
    parser.add_argument("--holdout", type=number(float, above=0),
                        help="training images for model selection: share or number")
    parser.add_argument("--labels-per-class", type=count, help="train on this many images of each class")
    kinds = ("none", "shift", "flip", "shift-flip", "resized-crop", "rand-augment")
    parser.add_argument("--augment", choices=kinds, help="the last two are for pictures from files")
    parser.add_argument("--erasing", type=share, help="chance of erasing a rectangle of a picture")
    parser.add_argument("--mixup", type=at_least_0, help="mixup's Beta parameter; 0: off")
    parser.add_argument("--cutmix", type=at_least_0, help="cutmix's Beta parameter; 0: off")
    parser.add_argument("--linear-probe", action=switch, help="a linear classifier on the frozen class token")
    parser.add_argument("--objective", choices=OBJECTIVES,
                        help="what is minimised; each has defaults of its own for what follows")
    parser.add_argument("--label-smoothing", type=share, help="label smoothing")
    parser.add_argument("--consistency", type=at_least_0,
                        help="weight lambda of the consistency term, with any objective; 0: off")
    parser.add_argument("--consistency-eta", type=at_least_0,
                        help="weight of its entropy; None: 0.5 for sigma < 1, else 0.1")
    parser.add_argument("--copies", type=count, help="noisy copies of each image in a step")
    parser.add_argument("--attack-eps", type=above_0, help="smoothadv: L2 radius of the attack")
    parser.add_argument("--attack-step", type=above_0, help="smoothmix: L2 length of a step of the attack")
    parser.add_argument("--attack-steps", type=count, help="smoothadv, smoothmix: steps of the attack")
    parser.add_argument("--smoothmix-eta", type=at_least_0, help="weight of the mixed images")
    parser.add_argument("--macer-lambda", type=at_least_0, help="weight of the radius")
    parser.add_argument("--macer-beta", type=above_0, help="inverse temperature of the radius's scores")
    parser.add_argument("--macer-gamma", type=above_0, help="the hinge's margin")
    parser.add_argument("--objective-warmup", type=at_least_0,
                        help="epochs in which eps or eta rises; macer: without the radius")
    parser.add_argument("--drop-path", type=share, help="stochastic depth of the last block")
    parser.add_argument("--min-lr", type=at_least_0, help="learning rate at the end")
    parser.add_argument("--layer-decay", type=number(float, above=0),
                        help="learning-rate factor from a layer to the one below")
    parser.add_argument("--vote-every", type=count,
                        help="epochs between majority votes, which select the model")
    parser.add_argument("--export", help="write the finished classifier to this file, for timm, and end")
    add_training_flags(parser)
    add_run_flags(parser)
    given = vars(parser.parse_args(argv))

    out = given.get("out", f"runs/{given.get('recipe', 'digits')}")
    init = given.get("init", f"{out}/pretrain.pt")
    made_with = {}
    if init != "scratch":
        require("init" in given or Path(init).exists(),
                f"there is no {init}: run pretrain.py first, or give --init FILE or scratch")
        checkpoint = read_checkpoint(init)
        if checkpoint.get("kind") == "pretrain":
            made_with = checkpoint.get("settings", {})
    recipe = given.get("recipe", made_with.get("recipe", "digits"))
    require(recipe in RECIPES, f"{init} was made with an unknown recipe, {recipe!r}: name a --recipe")
    values = DEFAULTS | RECIPES[recipe]
    if given.get("linear_probe"):
        values |= PROBES.get(recipe, PROBE)
    values |= objective_values(given, recipe)
    if made_with.get("recipe") == recipe:                              # else its weights move to other data
        for key in made_with.keys() & {*INHERITED}:
            values[key] = made_with[key]
            require(key in ("data_path", "holdout") or given.get(key, made_with[key]) == made_with[key],
                    f"--{key.replace('_', '-')} {given.get(key)} contradicts {init}, which was made with "
                    f"{made_with[key]} (to transfer it to other data, name another --recipe)")
    named = dict(recipe=recipe, init=init, out=f"runs/{recipe}")
    args = argparse.Namespace(**values | named | given)
    if args.consistency_eta is None:
        args.consistency_eta = 0.5 if args.sigma < 1 else 0.1
    if args.copies is None:
        args.copies = 2 if args.consistency else 1
    if args.objective_warmup is None:
        args.objective_warmup = args.epochs / 3
    if "objective_warmup" not in given and args.objective != "macer":
        args.objective_warmup = min(args.objective_warmup, args.epochs / 5)            # of short runs a fifth
    check_objective(args, given)
    return args


def check_objective(args, given):
    """Refuse flags that the objective has no use for, and those that make it another one."""
    for flag in {flag for flags in ITS_FLAGS.values() for flag in flags} & given.keys():
        require(flag in ITS_FLAGS[args.objective],
                f"--{flag.replace('_', '-')} means nothing to --objective {args.objective}")
    require(not ITS_FLAGS[args.objective] or not (args.mixup or args.cutmix),
            f"--objective {args.objective} needs images of one class: not --mixup, not --cutmix")
    require(args.objective != "macer" or not args.label_smoothing,
            "--objective macer has no --label-smoothing")
    require(given.get("objective") != "consistency" or args.consistency,
            "--objective consistency needs a --consistency above 0; without it, it is gaussian")
    require(not args.consistency or args.copies > 1, "--consistency needs --copies 2 or more")
    require(args.objective_warmup < args.epochs or args.objective_warmup == 0,
            f"--objective-warmup {args.objective_warmup:g} is not over before the end, epoch {args.epochs:g}")


def objective_values(given, recipe):
    """What the objective changes in the recipe at the given sigma. (Without noise all copies are alike.)"""
    objective = given.get("objective", DEFAULTS["objective"] if given["sigma"] > 0 else "gaussian")
    values = OBJECTIVES[objective] | RECIPE_OBJECTIVES.get(recipe, {}).get(objective, {})
    nearest = min(range(3), key=lambda i: abs(given["sigma"] - (0.25, 0.5, 1.0)[i]))
    chosen = {name: value[nearest] if isinstance(value, tuple) else value for name, value in values.items()}
    return dict(chosen, objective=objective)


# ----------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------


def make_augment(kind, images, erasing):
    """The augmentation called `kind`: of batches in memory, or (the last two) of pictures from files."""
    if kind == "none":
        return None
    from_files = images.files is not None
    require((kind in ("resized-crop", "rand-augment")) == from_files,
            f"--augment {kind} is for pictures of {'at most' if from_files else 'more than'} 64 pixels")
    if not from_files:
        return shift_and_flip(images.size // 8 if "shift" in kind else 0, "flip" in kind)
    steps = [ResizedCrop(images.size), v2.RandomHorizontalFlip()]
    if kind == "rand-augment":
        steps.append(v2.RandAugment(num_ops=2, magnitude=27))         # 27 of 30: the paper's (timm's) 9 of 10
    return v2.Compose([*steps, v2.RandomErasing(erasing)])


def make_mix(mixup, cutmix, classes):
    """(images, labels) -> (images, targets (B, classes)): mixup or cutmix, where their parameter is not 0."""
    mixes = []
    if mixup:
        mixes.append(v2.MixUp(alpha=mixup, num_classes=classes))
    if cutmix:
        mixes.append(v2.CutMix(alpha=cutmix, num_classes=classes))
    if mixes:
        return v2.RandomChoice(mixes)
    return lambda images, labels: (images, F.one_hot(labels, classes).to(images))


def few_labels(train, labels, classes, count, seed):
    """`count` of the images `train` (m,) of each class, chosen by the seed, over and over up to m."""
    order = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed_of(seed)))]
    chosen = torch.cat([order[labels[order] == label][:count] for label in range(classes)])
    return chosen.repeat(math.ceil(len(train) / len(chosen)))[:len(train)]


# ----------------------------------------------------------------------------------------------------------
# Objectives
#
# Pure functions of clean images x (B, C, H, W) in [0, 1], targets (B, classes), which are shares of classes,
# and noise (m, B, C, H, W), already times sigma. logits_of(x, noise) returns the logits (m, B, classes) of
# f(x + noise_i). Noise is an argument since an attack and the loss that follows it see the same draws.
# ----------------------------------------------------------------------------------------------------------


def cross_entropy(logits, targets, smoothing=0.0):
    """mean_i CE(f(x + e_i), y) over the m copies and the images (Cohen et al. 2019): training with noise.

    logits (m, B, classes), targets (B, classes); smoothing is that of the labels.
    """
    every, target = logits.flatten(0, 1), targets.repeat(len(logits), 1)             # mB classes, mB classes
    return F.cross_entropy(every, target, label_smoothing=smoothing)


def log_smoothed(logits):
    """log F (B, classes), F = mean_i softmax(f(x + e_i)) the smoothed scores; logits (m, B, classes)."""
    return logits.log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits))


def consistency_loss(logits, lam, eta):
    """Jeong & Shin 2020 (arXiv 2006.04062): lam * mean_i KL(F || F_i) + eta * H(F), averaged over images.

    logits (m, B, classes) of m noisy copies of each image; F_i are their softmax outputs and F is the mean
    of them.
    """
    log_each = logits.log_softmax(dim=-1)                                            # m B classes
    log_mean = log_smoothed(logits)                                                  # B classes
    mean = log_mean.exp()                                                            # B classes
    divergence = (mean * (log_mean - log_each)).sum(dim=-1).mean()
    entropy = -(mean * log_mean).sum(dim=-1).mean()
    return lam * divergence + eta * entropy


def norms(images):
    """The L2 norm of each image, (B, 1, 1, 1)."""
    return images.flatten(1).norm(dim=1)[:, None, None, None]


def directions(images, otherwise):
    """Each image (B, C, H, W) over its L2 norm, however small that is; where it is zero, `otherwise`'s."""
    largest = images.flatten(1).abs().amax(dim=1)[:, None, None, None]
    images = torch.where(largest > 0, images / largest, otherwise)       # its square does not underflow
    return images / norms(images).clamp(min=torch.finfo(images.dtype).tiny)


def ascend(logits_of, x, targets, noise, step, steps, eps=math.inf):
    """Adversarial images (B, C, H, W) against the smoothed scores: `steps` steps of L2 length `step` up J.

    J(x') = -sum_c y_c log F_c(x') is the logarithm of a mean, not the mean of logarithms. After each step the
    pixels are clipped to [0, 1], then the way from x is shortened to eps. SmoothAdv (Salman et al. 2019,
    arXiv 1906.04584): step = 2 eps / steps; SmoothMix (Jeong et al. 2021, arXiv 2111.09277): no eps. Where
    the gradient is zero, the direction is that of the first noise.
    """
    adversarial = x
    for _ in range(steps):
        adversarial = adversarial.detach().requires_grad_()
        loss = -(targets * log_smoothed(logits_of(adversarial, noise))).sum()
        (gradient,) = torch.autograd.grad(loss, adversarial)                         # B C H W
        way = (adversarial.detach() + step * directions(gradient, noise[0])).clamp(0, 1) - x
        length = norms(way)
        adversarial = x + way * torch.where(length > eps, eps / length, 1.0)
    return adversarial.detach()


def macer_loss(logits, targets, sigma, lam, beta, gamma):
    """MACER (Zhai et al. 2020, arXiv 2001.02378): cross-entropy of smoothed scores, a hinge on the radius.

        -log F_y + lam sigma/2 max(gamma - xi, 0) [z is right],    xi = Phi^-1(z_y) - Phi^-1(max_{c != y} z_c)

    z = mean_i softmax(beta f(x + e_i)) are scores at a lower temperature, so that sigma xi / 2 is nearly the
    certified radius. The mean is over all B images. logits (m, B, classes), targets (B, classes) one-hot.

    z is kept 2^-24 away from 0 and 1, where Phi^-1 is infinite: xi is above any gamma of use there.
    """
    cross = -(targets * log_smoothed(logits)).sum(dim=-1)                            # B
    z = log_smoothed(beta * logits).exp()                                            # B classes
    label = targets.argmax(dim=-1, keepdim=True)                                     # B 1
    right = z.argmax(dim=-1, keepdim=True) == label                                  # B 1
    rival = z.scatter(-1, label, 0.0).amax(dim=-1, keepdim=True)                     # B 1
    both = torch.cat([z.gather(-1, label), rival], dim=-1).clamp(2**-24, 1 - 2**-24)
    quantiles = torch.special.ndtri(both)                                            # B 2
    xi = quantiles[:, 0] - quantiles[:, 1]                                           # B
    hinge = sigma / 2 * (gamma - xi).clamp(min=0) * right[:, 0]
    return (cross + lam * hinge).mean()


def smoothmix_loss(logits, logits_mixed, targets, mu, eta):
    """SmoothMix (Jeong et al. 2021, arXiv 2111.09277): half-way to an adversarial image, f should be unsure.

        eta mean_i KL(y_mix || softmax f(x_mix + e_i)) [F is right],   y_mix = (1 - mu) F(x) + mu / classes

    x_mix = (1 - mu) x + mu x~ with x~ of ascend() and mu (B,) uniform in [0, 1/2]. logits and logits_mixed
    (m, B, classes) are those of x and of x_mix under the same noise. Gradients reach F(x), too. The mean is
    over all B images.
    """
    log_mean = log_smoothed(logits)                                                  # B classes
    right = log_mean.argmax(dim=-1) == targets.argmax(dim=-1)                        # B
    mu = mu[:, None]
    mixed = (1 - mu) * log_mean.exp() + mu / logits.shape[-1]                        # B classes
    log_mixed = mixed.clamp(min=torch.finfo(mixed.dtype).tiny).log()
    divergence = (mixed * (log_mixed - logits_mixed.log_softmax(dim=-1))).sum(dim=-1)     # m B
    return eta * (divergence.mean(dim=0) * right).mean()


def noisy_logits(network, dtype):
    """logits_of for the objectives: the network on x + noise, in bf16 if that is the dtype."""

    def logits_of(x, noise):
        noisy = rearrange(x + noise, "m b c h w -> (m b) c h w")
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bf16"):
            logits = network(noisy)
        return rearrange(logits.to(x.dtype), "(m b) k -> m b k", m=len(noise))       # m B classes

    return logits_of


@contextlib.contextmanager
def frozen(model):
    """Inside, the model is in eval mode and its weights have no gradients: an attack moves images alone."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train()


def attack(network, x, targets, noise, args, strength):
    """The adversarial images of SmoothAdv or SmoothMix.

    The attack sees the model inside of DDP, so that no gradients are exchanged.
    """
    model = network.module if isinstance(network, DistributedDataParallel) else network
    eps, step = math.inf, args.attack_step
    if args.objective == "smoothadv":
        eps = strength * args.attack_eps
        step = 2 * eps / args.attack_steps
    with frozen(model):
        return ascend(noisy_logits(model, args.dtype), x, targets, noise, step, args.attack_steps, eps)


def strength_of(objective, epoch, warmup):
    """The share of an objective's eps (SmoothAdv), eta (SmoothMix) or lambda (MACER) in this epoch, from 0.

    The first two rise in steps over the first `warmup` epochs; MACER's lambda is 0 until then.
    """
    if objective == "macer":
        return float(epoch >= warmup)
    return min(1.0, (math.floor(epoch) + 1) / warmup) if warmup else 1.0


def classification_loss(network, x, targets, args, epoch):
    """The objective of the arguments on images x (B, C, H, W) in [0, 1] and targets (B, classes).

    The noise is drawn here, after everything else: mixup of noisy images would scale it by
    sqrt(l^2 + (1 - l)^2). The network is called once, whatever the objective, so that DDP can follow.
    """
    noise = args.sigma * torch.randn(args.copies, *x.shape, device=x.device)         # m B C H W
    strength = strength_of(args.objective, epoch, args.objective_warmup)
    logits_of = noisy_logits(network, args.dtype)

    if args.objective == "macer":
        logits = logits_of(x, noise)                                                 # m B classes
        lam = strength * args.macer_lambda
        loss = macer_loss(logits, targets, args.sigma, lam, args.macer_beta, args.macer_gamma)
    elif args.objective == "smoothmix":
        adversarial = attack(network, x, targets, noise, args, strength)
        mu = torch.rand(len(x), device=x.device) / 2                                 # B
        mixed = torch.lerp(x, adversarial, mu[:, None, None, None])
        both = logits_of(torch.cat([x, mixed]), torch.cat([noise, noise], dim=1))    # m 2B classes
        logits, logits_mixed = both.chunk(2, dim=1)
        loss = cross_entropy(logits, targets, args.label_smoothing)
        loss = loss + smoothmix_loss(logits, logits_mixed, targets, mu, strength * args.smoothmix_eta)
    else:
        if args.objective == "smoothadv":
            x = attack(network, x, targets, noise, args, strength)
        logits = logits_of(x, noise)                                                 # m B classes
        loss = cross_entropy(logits, targets, args.label_smoothing)

    if args.consistency:
        loss = loss + consistency_loss(logits, args.consistency, args.consistency_eta)
    return loss


# ----------------------------------------------------------------------------------------------------------
# Model and optimizer
# ----------------------------------------------------------------------------------------------------------


def build_model(args, classes, device):
    """The classifier with the pre-trained encoder, on the device; a linear probe trains its head alone."""
    torch.manual_seed(args.seed)
    model = build_vit(
        args.model,
        classes,
        image_size=args.model_size or args.image_size,
        pool="cls" if args.linear_probe else "mean",
        probe=args.linear_probe,
        drop_path=args.drop_path,
        **NORMALISATION[args.normalisation],
    )
    if args.init != "scratch":
        missing, left_over = load_encoder(model, args.init)
        say(f"{args.dataset}, {args.model}, {describe_init(args.init, missing, left_over)}")
    if args.linear_probe:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    model.recompute_activations = args.recompute
    return model.to(device)


def layer_of(name, depth):
    """0: class token, positions, patch embedding; N + 1: blocks.N; depth + 1: final norm and head."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed")):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1


def parameter_groups(model, weight_decay, layer_decay):
    """One group for every layer with and without decay; its lr_scale is layer_decay^(depth + 1 - layer)."""
    groups = {}
    depth = len(model.blocks)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, depth)
        decay = weight_decay if decays(name, parameter) else 0.0
        scale = layer_decay ** (depth + 1 - layer)
        group = groups.setdefault((layer, decay > 0), dict(params=[], weight_decay=decay, lr_scale=scale))
        group["params"].append(parameter)
    return list(groups.values())


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv 1708.03888) of SGD with momentum.

    The gradient of a matrix w is scaled by trust * |w| / |gradient + weight_decay * w|; that of a 1-D
    parameter is not.
    """

    def __init__(self, groups, lr, momentum=0.9, trust=0.001):
        super().__init__(groups, dict(lr=lr, momentum=momentum, trust=trust, weight_decay=0.0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                update = w.grad + group["weight_decay"] * w
                if w.ndim > 1:
                    size, change = w.norm(), update.norm()
                    usable = (size > 0) & (change > 0)
                    update = update * torch.where(usable, group["trust"] * size / change, 1.0)
                velocity = self.state[w].setdefault("velocity", torch.zeros_like(w))
                velocity.mul_(group["momentum"]).add_(update)
                w.sub_(group["lr"] * velocity)


def build_optimizer(model, args):
    """AdamW, or LARS for the linear probe, at the peak learning rate base_lr * batch / 256."""
    groups = parameter_groups(model, args.weight_decay, args.layer_decay)
    peak = args.base_lr * args.batch / 256
    if args.linear_probe:
        return LARS(groups, lr=peak)
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.999), fused=True)


# ----------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(model, images, index, sigma, draws, batch, seed, rank, world, device, workers=0):
    """Accuracies on images[index], each image counted once: (clean, noisy, vote).

    clean: on the images as they are; noisy: under one noise draw; vote: of the majority of `draws` noisy
    copies, which is the certified accuracy at r = 0 but for the confidence (None if draws = 0). Blocks of
    `batch` images are dealt to the ranks by stride, and their noise depends on (seed, block) alone.
    """
    model.eval()
    starts = range(rank * batch, len(index), world * batch)
    blocks = [[(0, i) for i in index[start:start + batch].tolist()] for start in starts]
    clean = noisy = voted = unusable = 0
    batches = load_batches(images, blocks, device, workers=workers)
    for start, (pixels, labels) in zip(starts, batches, strict=True):
        x = pixels / images.levels                                                   # B C H W in [0, 1]
        torch.manual_seed(seed_of(seed, start, 0))
        largest, answers = model(x).max(dim=1)                                       # B, B
        unusable += (~largest.isfinite()).sum()
        clean += (answers == labels).sum()
        largest, answers = model(x + sigma * torch.randn_like(x)).max(dim=1)         # B, B
        unusable += (~largest.isfinite()).sum()
        noisy += (answers == labels).sum()
        if draws:
            votes = 0
            for first in range(0, draws, 5):                           # five copies of the block at a time
                noise = torch.randn(min(5, draws - first), *x.shape, device=device)  # m B C H W
                copies = rearrange(x + sigma * noise, "m b c h w -> (m b) c h w")
                largest, answers = model(copies).max(dim=1)                          # mB, mB
                unusable += (~largest.isfinite()).sum()
                answers = F.one_hot(answers, len(images.classes))                    # mB classes
                votes = votes + rearrange(answers, "(m b) k -> m b k", b=len(x)).sum(dim=0)
            voted += (votes.argmax(dim=1) == labels).sum()
    model.train()
    totals = gather([float(clean), float(noisy), float(voted), float(unusable)]).sum(dim=1)
    if totals[3]:
        raise RunError(f"{totals[3]:.0f} images or copies got NaN or infinite logits (try --dtype fp32)")
    clean, noisy, vote = (round(share, 6) for share in (totals[:3] / len(index)).tolist())
    return clean, noisy, vote if draws else None


def measure(model, images, index, voting, args, rank, world, device):
    """evaluate() as a dict; the vote, if `voting`, over 100 noisy copies of at most 1000 of the images."""
    if world > 1:
        for buffer in model.buffers():                       # a probe's statistics: rank 0's, which are saved
            dist.broadcast(buffer, 0)
    how = (args.seed, rank, world, device, args.workers)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
        clean, noisy, vote = evaluate(model, images, index, args.sigma, 0, 50, *how)
        if voting:
            _, _, vote = evaluate(model, images, evenly_spaced(index, 1000), args.sigma, 100, 50, *how)
    return dict(clean=clean, noisy=noisy, vote=vote)


def describe(found):
    return "  ".join(f"{name} {share:.1%}" for name, share in found.items())


# ----------------------------------------------------------------------------------------------------------
# For timm
# ----------------------------------------------------------------------------------------------------------


def export(source, path):
    """Write a fine-tuned classifier for timm's VisionTransformer(**model_args).load_state_dict(state_dict).

    The names are timm's already; a linear probe's BatchNorm is folded into its linear layer. timm's models
    take images that are resized and normalised beforehand: "mean", "std" and "img_size" say how.
    """
    checkpoint = read_checkpoint(source, "finetune")
    config, state = checkpoint["config"], dict(checkpoint["model"])
    if config.get("probe"):
        mean, variance = state.pop("head.0.running_mean"), state.pop("head.0.running_var")
        del state["head.0.num_batches_tracked"]
        weight, bias = state.pop("head.1.weight"), state.pop("head.1.bias")
        state["head.weight"] = weight / (variance + 1e-6).sqrt()
        state["head.bias"] = bias - state["head.weight"] @ mean
    arguments = dict(
        img_size=config["image_size"],
        patch_size=config["patch_size"],
        in_chans=config["channels"],
        num_classes=config["num_classes"],
        embed_dim=config["dim"],
        depth=config["depth"],
        num_heads=config["heads"],
        mlp_ratio=config.get("mlp_ratio", 4.0),
        global_pool="avg" if config.get("pool", "mean") == "mean" else "token",
    )
    content = dict(
        state_dict=state,
        model_args=arguments,
        mean=config["mean"],
        std=config["std"],
        classes=checkpoint["data"]["classes"],
        sigma=checkpoint["sigma"],
    )
    if path.endswith(".safetensors"):
        state = {name: value.contiguous() for name, value in content.pop("state_dict").items()}
        metadata = {key: json.dumps(value) for key, value in content.items()}
        write_atomically(path, lambda temporary: save_file(state, temporary, metadata))
    else:
        write_atomically(path, lambda temporary: torch.save(content, temporary))


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------


def train_step(network, optimizer, batches, mix, levels, micro_batches, args, step, epoch, rank):
    """One optimizer step on the mean loss of all micro-batches: (this process's share, gradient's norm)."""
    total = 0.0
    for micro in range(micro_batches):
        pixels, labels = next(batches)                                               # B C H W, B
        torch.manual_seed(seed_of(args.seed, step, micro, rank))
        images, targets = mix(pixels / levels, labels)                               # B C H W, B classes
        with accumulating(network, more_to_come=micro < micro_batches - 1):
            loss = classification_loss(network, images, targets, args, epoch)
            (loss / micro_batches).backward()
        total = total + loss.detach() / micro_batches
    norm = clip_gradients(network, args.clip_grad)
    optimizer.step()
    optimizer.zero_grad()
    return total, norm


def finetune(args):
    """The stage, from the pre-trained encoder to the classifier that is certified."""
    rank, world, device = start_processes(args.device)
    use_deterministic_kernels(args.deterministic)
    files = RunFiles(f"{args.out}/finetune_sigma_{args.sigma:g}")

    # Data: which images, in which batches.
    channels = SIZES[args.model]["channels"]
    images = open_images(args.dataset, args.data_path, True, args.image_size, channels)
    test = open_images(args.dataset, args.data_path, False, args.image_size, channels)
    require(images.classes == test.classes,
            f"the classes of training and test images differ in {args.data_path}")
    keep_small_images(images, device)
    keep_small_images(test, device)
    train, held_out = hold_out(images, args.holdout)
    labelled = len(train)
    if args.labels_per_class:
        labelled = min(labelled, args.labels_per_class * len(images.classes))
        train = few_labels(train, images.labels, len(images.classes), args.labels_per_class, args.seed)
    augment = make_augment(args.augment, images, args.erasing)
    mix = make_mix(args.mixup, args.cutmix, len(images.classes))
    steps_per_epoch, steps, warmup = count_steps(args, len(train))
    device_batch, micro_batches = share_batch(args.batch, world, args.device_batch)

    # Network and optimizer.
    model = build_model(args, len(images.classes), device)
    optimizer = build_optimizer(model, args)
    peak = optimizer.defaults["lr"]
    args.dtype = pick_dtype(args.dtype, device, read_settings(files.stem, args.overwrite))
    choose_attention(args, device)
    if args.compile or (args.compile is None and device.type == "cuda"):
        model.compile()
    network = distribute(model) if world > 1 else model
    say(f"{args.model}: {count_trained(model):,} parameters on {world} x {device.type} in {args.dtype}; "
        f"{labelled:,} images; {steps:,} steps of {world} x {micro_batches} x {device_batch} = {args.batch}; "
        f"lr {peak:.3g}; sigma {args.sigma:g}")

    # Everything that certification, or this stage after a stop, has to know.
    settings = vars(args) | {"init_sha256": None if args.init == "scratch" else sha256(args.init)}
    if not ITS_FLAGS[args.objective] and args.copies == (2 if args.consistency else 1):
        # As in runs before there were others.
        settings |= dict(objective=None, copies=None, objective_warmup=None)
    data = dict(dataset=args.dataset, data_path=args.data_path, image_size=args.image_size, channels=channels,
                holdout=args.holdout, classes=images.classes)
    about = dict(kind="finetune", config=model.config, data=data, settings=settings, sigma=args.sigma)

    def batches_of(start, end):
        positions = training_positions(train, args.batch, device_batch, start, end, args.seed, rank, world)
        return load_batches(images, positions, device, augment, args.seed, args.workers)

    if args.dry_run:
        say(json.dumps(settings, indent=1))
        train_step(network, optimizer, batches_of(0, 1), mix, images.levels, micro_batches, args, 0, 0, rank)
        return

    with run_directory(files.stem, settings, MAY_CHANGE, files.result, args.overwrite):
        if files.result.exists():
            say(f"{files.result} is done; --out elsewhere, or --overwrite to do it again")
            return
        start, state = files.resume(model, optimizer)
        best = state["best"] if state else None
        batches = batches_of(start, steps)
        total, counted = 0.0, 0
        bar = tqdm(total=steps, initial=start, desc="finetune", disable=None if rank == 0 else True)
        for step in range(start, steps):
            lr = learning_rate(step, steps, warmup, peak, args.min_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            loss, norm = train_step(
                network, optimizer, batches, mix, images.levels, micro_batches, args, step,
                step / steps_per_epoch, rank,
            )
            total += loss
            counted += 1
            bar.update()

            done = step + 1
            epoch = done / steps_per_epoch
            epoch_ends = done % steps_per_epoch == 0 or done == steps
            saving = done % args.save_every == 0 or done == steps
            if saving or epoch_ends or done % args.log_every == 0:
                files.log_loss(total / counted, norm, done, steps, steps_per_epoch, lr, bar)
                total, counted = 0.0, 0
            if epoch_ends:
                voting = done == steps or done % (args.vote_every * steps_per_epoch) == 0
                found = measure(model, images, held_out, voting, args, rank, world, device)
                files.log(step=done, epoch=round(epoch, 4), split="holdout", **found)
                if voting:
                    say(f"held out, epoch {epoch:g}: {describe(found)}")
                if voting and (best is None or found["vote"] >= best["vote"]):
                    best = dict(vote=found["vote"], epoch=epoch, model=copy_of_weights(model))
            if saving:
                files.save(files.last, model, step=done, best=best, optimizer=optimizer.state_dict(), **about)
        bar.close()

        # The kept model meets the test images: once.
        model.load_state_dict(best["model"])
        found = measure(model, test, torch.arange(len(test)), True, args, rank, world, device)
        files.log(step=steps, epoch=best["epoch"], split="test", **found)
        say(f"test images, model of epoch {best['epoch']:g}: {describe(found)}")
        files.finish(best["model"], step=steps, **about)


def main(argv=None):
    with one_line_errors():
        args = parse(argv)
        if args.export:
            export(f"{args.out}/finetune_sigma_{args.sigma:g}.pt", args.export)
            print(f"wrote {args.export}")
        else:
            finetune(args)


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
