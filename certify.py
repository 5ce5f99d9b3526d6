"""Stage 3: certify the smoothed classifier g(x) = argmax_c P[f(x + N(0, sigma^2 I)) = c] (Cohen et al. 2019).

    python certify.py --sigma 0.25                             # digits, two CPU cores: about a minute
    python certify.py --sigma 0.25 --images mine.png           # your own pictures
    torchrun --nproc_per_node=8 -- certify.py --sigma 0.5 --recipe imagenet-base --n 10000
    python certify.py --sigma 0.5 --recipe cifar10 --shard 0/16      # one job of an array of 16
    python certify.py --sigma 0.5 --recipe cifar10 --sequential      # same guarantee, a fraction of the draws
    python certify.py --sigma 0.5 --classifier mine.py:f --dataset cifar10 --data-path data  # any network
    python certify.py --sigma 0.5 --checkpoint a.pt b.pt c.pt --consensus 2 --out runs/three  # an ensemble
    python certify.py --sigma 0.5 --denoiser pretrain.pt --checkpoint clean.pt --out runs/denoised
    python certify.py --report runs/*/certify_sigma_*.tsv --plot curves.png --published cifar10

    from certify import certify
    for index, x in enumerate(images):                                                       # x: (C, H, W)
        prediction, radius = certify(classifier, x, sigma=0.25, n0=100, n=100_000, alpha=0.001, index=index)

This file works alone: only for checkpoints of pretrain.py and finetune.py it needs model.py beside it.

(torchrun's own flags end at the --: it would take --n for one of them.)

What a row of the result says: with probability at least 1 - alpha over the noise drawn for that image, either
g abstained or g answers `predict` on every x + d with |d|_2 < radius. To have all m rows true at once with
1 - alpha, run with --alpha alpha/m. The theorem is about f exactly as it is run here: same dtype, same
device, eval mode; deploy that. The noise is pseudo-random, and in the default mode it is floating-point noise
standing for real numbers, as in all published work; --sound removes the second assumption. The label is never
looked at until prediction and radius are final.

Same settings, same rows: the result for an image depends on (seed, image index, settings) alone, not on the
number of processes, their order, or interruptions. Bit for bit that holds on one type of CPU; on GPUs the
kernel that is chosen may depend on the batch and the device, so that a logit's last bits, and so a few counts
in 100 000, may differ.

Axes:  B noisy copies   C channels   H W pixels
"""

import argparse
import atexit
import contextlib
import dataclasses
import functools
import gc
import glob
import gzip
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import sys
import textwrap
import time
import traceback
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import brentq
from scipy.special import betaincc, betaln
from scipy.stats import beta, binom, binomtest, norm

ABSTAIN = -1
BOUNDS = ("one-sided", "two-sided")
CHUNK = 100                # noise is always drawn for so many copies at once: other splits give other numbers

# ----------------------------------------------------------------------------------------------------------
# Recipes
# ----------------------------------------------------------------------------------------------------------

DEFAULTS = dict(                    # what no recipe changes
    classifier=None,
    consensus=0,                    # the mean of all logits
    denoiser=None,
    n0=100,                         # noisy copies that select the class
    alpha=0.001,                    # chance that an image's certificate is wrong
    seed=0,
    max=None,                       # images
    shard="0/1",
    bound="one-sided",              # p_b = 1 - p_a, as in published tables
    sequential=False,
    boundary_tolerance=0.0,
    sound=False,
    any_sigma=False,
    images=None,
    batch=None,                     # 400 copies; of large images on a CPU 100
    device="auto",
    dtype="auto",
    compile=None,
    overwrite=False,
)
ANY = dict(                         # any classifier
    dataset="digits",
    data_path=None,
    image_size=None,
    n=100_000,                      # noisy copies that estimate its probability
    skip=1,                         # certify every SKIP-th test image
    radii=(0.0, 0.25, 0.5, 0.75, 1.0),
)
IMAGENET = dict(                    # as in the paper
    ANY,
    dataset="folder",
    n=10_000,
    skip=50,
    radii=(0.0, 0.5, 1.0, 1.5, 2.0, 3.0),
)
FASHION = dict(
    ANY,
    dataset="fashion-mnist",
    n=10_000,
    skip=20,
    radii=(0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
)
RECIPES = {                         # by the recipe with which the checkpoint was made
    "digits": dict(ANY, n=10_000, skip=3, radii=(0.0, 0.25, 0.5, 0.75)),
    "fashion": FASHION,
    "mnist": dict(FASHION, dataset="mnist"),
    "cifar10": dict(ANY, dataset="cifar10", skip=20),                  # every 20th, as Cohen
    "cifar10-transfer": dict(ANY, dataset="cifar10"),                  # all, as in the paper
    "imagenet-base": IMAGENET,
    "imagenet-large": IMAGENET,
    "imagenet-huge": IMAGENET,
    "other": ANY,
}
SHAPES = {                          # (size, channels), for --classifier
    "digits": (8, 1),
    "mnist": (28, 1),
    "fashion-mnist": (28, 1),
    "cifar10": (32, 3),
    "folder": (224, 3),
}
MAY_CHANGE = {"data_path", "out", "checkpoint", "classifier", "denoiser", "overwrite"}    # in a continued run


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------


def parse(argv):
    """(settings, checkpoints): what the flags say, else the checkpoint's data set, else the recipe."""
    parser = new_parser(__doc__, DEFAULTS | RECIPES["digits"])
    count = number(int, least=1)
    at_least_0 = number(float, least=0)
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--sigma", type=number(float, above=0),
                        help="standard deviation of the noise, pixels in [0, 1]")
    parser.add_argument("--checkpoint", nargs="+",
                        help="fine-tuned classifier; the logits of several are averaged")
    parser.add_argument("--classifier",
                        help="FILE.py:NAME, a callable from (B, C, H, W) in [0, 1] to logits, instead")
    parser.add_argument("--consensus", type=number(int, least=0),
                        help="K: where the first K checkpoints agree, spare the others; 0: always average")
    parser.add_argument("--denoiser",
                        help="checkpoint of pretrain.py --no-norm-pix that denoises what is classified")
    parser.add_argument("--recipe", choices=RECIPES, help="data set, n, radii")
    parser.add_argument("--dataset", choices=DATASETS)
    parser.add_argument("--data-path", help="where the data set lies")
    parser.add_argument("--image-size", type=count, help="side of the images, pixels")
    parser.add_argument("--n0", type=count, help="noisy copies that select the class")
    parser.add_argument("--n", type=count,
                        help="noisy copies that estimate its probability; at most, if --sequential")
    parser.add_argument("--alpha", type=number(float, above=0, below=1), help="chance of a wrong certificate")
    parser.add_argument("--skip", type=count, help="certify every SKIP-th test image")
    parser.add_argument("--max", type=count, help="certify at most so many")
    parser.add_argument("--shard",
                        help="I/K: certify the I-th of K parts (from 0), for job arrays")
    parser.add_argument("--radii", type=at_least_0, nargs="+",
                        help="radii of the table, and that --sequential settles")
    parser.add_argument("--bound", choices=(*BOUNDS, "both"),
                        help="one-sided: p_b = 1 - p_a; two-sided: from the rivals' counts; both: in reports")
    parser.add_argument("--sequential", action=switch,
                        help="stop drawing once the radii of the table are settled")
    parser.add_argument("--boundary-tolerance", type=at_least_0,
                        help="let --sequential stop this near a radius")
    parser.add_argument("--sound", action=switch,
                        help="integer noise: sound in floating point; images on their grid")
    parser.add_argument("--any-sigma", action=switch, help="allow another sigma than the one fine-tuned for")
    parser.add_argument("--images", nargs="+", help="certify these pictures and print the outcome")
    parser.add_argument("--report", nargs="+", help="print the table of these TSVs, ours or others'")
    parser.add_argument("--label", nargs="+", help="names of the report's folders, or of its files")
    parser.add_argument("--format", choices=("text", "markdown", "csv"), help="of the report")
    parser.add_argument("--plot", help="draw the report's curves into this file")
    parser.add_argument("--published", choices=PUBLISHED, help="mark published results in the plot")
    parser.add_argument("--batch", type=count, help=f"copies in a pass, a multiple or a divisor of {CHUNK}")
    add_run_flags(parser)
    given = vars(parser.parse_args(argv))

    if "report" in given:
        radii = RECIPES[given.get("recipe", "digits")]["radii"]
        report = dict(radii=radii, bound="one-sided", format="text", plot=None, published=None, label=None)
        return argparse.Namespace(**report | given), []
    require("sigma" in given, "--sigma is needed")
    require(given.get("bound") != "both", "--bound both is for --report: a run keeps what both bounds need")
    for flag in ("plot", "label", "format", "published"):
        require(flag not in given, f"--{flag} needs --report")
    require(not ("classifier" in given and "checkpoint" in given), "either --checkpoint or --classifier")

    # The checkpoints say for what they were made.
    sigma = given["sigma"]
    out = given.get("out", f"runs/{given.get('recipe', 'digits')}")
    files = []
    if "classifier" not in given:
        files = given.get("checkpoint", [f"{out}/finetune_sigma_{sigma:g}.pt"])
    checkpoints = read_classifiers(files, sigma, given.get("any_sigma", False), "denoiser" in given)
    data, recipe = {}, "other" if "classifier" in given else "digits"
    if checkpoints:
        data = checkpoints[0]["data"]
        recipe = checkpoints[0]["settings"].get("recipe", recipe)
    recipe = given.get("recipe", recipe)
    inherited = {key: data[key] for key in ("dataset", "data_path", "image_size") if key in data}
    for key in {"dataset", "image_size"} & inherited.keys():
        require(given.get(key, data[key]) == data[key],
                f"--{key.replace('_', '-')} {given.get(key)} contradicts {files[0]}: {data[key]}")
    if "classifier" in given and "out" not in given and "recipe" not in given:
        out = f"runs/{Path(given['classifier'].split(':')[0]).stem}"

    named = dict(recipe=recipe, checkpoint=files, out=out)
    args = argparse.Namespace(**DEFAULTS | RECIPES.get(recipe, ANY) | inherited | named | given)
    size, channels = SHAPES[args.dataset]
    args.image_size = data.get("image_size", args.image_size or size)
    args.channels = data.get("channels", channels)
    check(args)
    return args, checkpoints


def read_ours(file, stage, wanted):
    """The checkpoint of that stage in `file`; "data", about its images, has all that is wanted."""
    try:
        from model import read_checkpoint
    except ModuleNotFoundError as error:
        if error.name != "model":
            raise
        raise ValueError("checkpoints need model.py beside certify.py; or name a --classifier") from None
    checkpoint = read_checkpoint(file, stage)
    data = checkpoint["data"]
    require(isinstance(data, dict) and {*wanted} <= data.keys(), f"{file} names no data set")
    return checkpoint


def read_classifiers(files, sigma, any_sigma, denoised=False):
    """The checkpoints of finetune.py in `files`; they must be for this sigma and for the same images.

    What is denoised before may go to a classifier of clean images, too.
    """
    wanted = ("dataset", "image_size", "channels", "classes")
    checkpoints = [read_ours(file, "finetune", wanted) for file in files]
    may_be = {sigma, 0} if denoised else {sigma}
    for file, checkpoint in zip(files, checkpoints, strict=True):
        data, tuned = checkpoint["data"], checkpoint.get("sigma")
        first = checkpoints[0]["data"]
        require(any_sigma or tuned in may_be,
                f"{file} was fine-tuned for sigma {tuned}, not {sigma:g}: certify at that, or --any-sigma")
        other = [key for key in wanted if data[key] != first[key]]
        require(not other, f"{file} and {files[0]} differ in {', '.join(other)}")
    return checkpoints


def check(args):
    """Refuse what cannot work; leave out radii that --sequential could never settle."""
    shard = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    require(shard and int(shard[1]) < int(shard[2]),
            f"--shard must be I/K with I from 0 to K - 1, not {args.shard}")
    check_batch(args.batch or CHUNK)
    require(args.consensus <= len(args.checkpoint),
            f"--consensus {args.consensus} needs so many --checkpoint files, not {len(args.checkpoint)}")
    last_alpha = args.alpha / 2 if args.sequential else args.alpha
    last_alpha = last_alpha / 2 if args.bound == "two-sided" else last_alpha
    most = certified_radius(lower_confidence_bound(args.n, args.n, last_alpha), args.sigma)
    least_n = math.floor(-math.log2(last_alpha)) + 1                   # alpha^(1/n) > 1/2
    require(most > 0,
            f"n = {args.n} copies can only abstain at alpha = {args.alpha:g}: --n {least_n} or more")
    reachable = [r for r in args.radii if r < most]
    if args.sequential and len(reachable) < len(args.radii):
        print(f"radii above {most:.3f} cannot be reached with n = {args.n}: left out", file=sys.stderr)
        args.radii = reachable


# ----------------------------------------------------------------------------------------------------------
# CERTIFY and PREDICT
# ----------------------------------------------------------------------------------------------------------


def lower_confidence_bound(k, n, alpha):
    """Clopper-Pearson: p with P[p <= P(success)] >= 1 - alpha, after k successes in n independent trials.

    The alpha quantile of Beta(k, n - k + 1); 0 when k = 0, alpha^(1/n) when k = n. (Clopper & Pearson 1934;
    Cohen 2019, section 3.2.2, LowerConfBound.)
    """
    if k == 0:
        return 0.0
    return float(beta.ppf(alpha, k, n - k + 1))


def upper_confidence_bound(k, n, alpha):
    """Clopper-Pearson from above: p with P[P(success) <= p] >= 1 - alpha, after k successes in n trials.

    The 1 - alpha quantile of Beta(k + 1, n - k); 1 when k = n, 1 - alpha^(1/n) when k = 0.
    """
    if k == n:
        return 1.0
    return float(beta.isf(alpha, k + 1, n - k))


def rivals_of(counts, top, n):
    """(the largest count of another class than `top`, the number of other classes).

    A copy of the n that is missing from `counts` (classes,) could be anybody's: it counts for every rival.
    """
    others = [int(count) for c, count in enumerate(counts) if c != top]
    missing = n - sum(others) - int(counts[top])
    return max(others, default=0) + missing, len(others)


def two_sided_bounds(counts, top, n, alpha):
    """(p_a, p_b): p_a <= P[f = top], and P[f = c] <= p_b for all other c, both with probability 1 - alpha.

    Half of alpha is for the top class, half for its rivals, of which p_b has to cover one alone: the
    likeliest, c*. That is one class, whatever the counts turn out to be, and its count is at most the
    largest; the bound grows with the count, so p_b >= the Clopper-Pearson bound of c* >= P[f = c*]. No union
    over the rivals is needed. And p_b <= 1 - p_a in any case. (Cohen 2019, theorem 1, takes such a pair.
    Simultaneous bounds with a union over classes: Jia et al. 2020, arXiv 1912.09899.)
    """
    runner_up, rivals = rivals_of(counts, top, n)
    p_a = lower_confidence_bound(int(counts[top]), n, alpha / 2)
    if rivals == 0:
        return p_a, 1 - p_a
    p_b = upper_confidence_bound(runner_up, n, alpha / 2)
    return p_a, min(p_b, 1 - p_a)


def certified_radius(p_a, sigma, p_b=None):
    """sigma/2 (Phi^-1(p_a) - Phi^-1(p_b)), or sigma Phi^-1(p_a) with p_b = 1 - p_a (theorem 1).

    p_a: lower bound of the top class's probability; p_b: upper bound of any other's. The radius is in
    pixels' units.
    """
    if p_b is None:
        p_b = 1 - p_a
    return max(0.0, float(sigma / 2 * (norm.ppf(p_a) - norm.ppf(p_b))))


def round_down(radius):
    """To 6 decimals, and below the true value even if `radius` carries an error of 1e-9."""
    return max(0.0, math.floor((radius - 1e-9) * 1e6) / 1e6)


def generator_for(seed, index, phase, device):
    """The random stream of one (image, phase): 0 selects, 1 estimates, 2 predicts.

    Injective into 32 bits for one seed, since the CPU generator looks at no more: two images never share
    their noise.
    """
    key = 4 * index + phase
    require(0 <= key < 2**32, f"the image index must be from 0 to {2**30 - 1}, not {index}")
    require(0 <= seed < 2**32, f"the seed must be from 0 to {2**32 - 1}, not {seed}")
    for word in (seed, 0x9E3779B9):                               # each line is a bijection of 32-bit numbers
        key = (key + word * 0x85EBCA6B) % 2**32
        key = (key ^ (key >> 16)) * 0x7FEB352D % 2**32
        key = (key ^ (key >> 15)) * 0x846CA68B % 2**32
        key ^= key >> 16
    return torch.Generator(device).manual_seed(key)


def logits_of(output, copies):
    """The logits (B, classes) in what a network returns: it, .logits, ["logits"], or a tuple's first."""
    if isinstance(output, dict):
        output = output.get("logits", output)
    output = getattr(output, "logits", output)
    if isinstance(output, tuple | list) and output:
        output = output[0]
    shape = tuple(getattr(output, "shape", ()))
    while len(shape) > 2 and shape[-1] == 1:
        output, shape = output.squeeze(-1), shape[:-1]
    if not isinstance(output, torch.Tensor) or len(shape) != 2 or len(output) != copies:
        found = f"a {type(output).__name__}" + (f" of shape {shape}" if shape else "")
        raise ValueError(f"the classifier must return logits of shape ({copies}, classes), not {found}")
    if shape[1] == 1:
        raise ValueError("the classifier returns a single logit, so that every image would be of class 0; "
                         "of a binary score s make torch.cat([-s, s], dim=1)")
    return output


def answers_of(logits):
    """(classes (B,), which of them may be used (B,)). Of equal logits the first class wins; so f is a
    function.

    A copy whose largest logit is NaN or infinite has no answer; minus infinity masks a class.
    """
    largest, answers = logits.max(dim=1)
    return answers, largest.isfinite()


def refuse_unusable(unusable, copies, image):
    if unusable:
        raise RunError(f"image {image}: {unusable} of {copies} noisy copies got NaN or infinite logits; no "
                       "certificate can rest on them (try fp32)")


def check_batch(batch):
    if batch % CHUNK and CHUNK % batch:
        raise ValueError(f"batch (--batch) must be a multiple or a divisor of {CHUNK}, not {batch}")


@torch.inference_mode()
def count_under_noise(classifier, x, sigma, n, generator, batch=CHUNK, image=0):
    """How often f answers each class on n copies x + sigma N(0, I): int64 (classes,).

    Noise is drawn for CHUNK copies at a time, and f always sees `batch` copies: the counts do not depend on
    n's rest. Half-precision images get their noise in fp32, and f the sum in their own precision.
    """
    check_batch(batch)
    chunks = max(1, batch // CHUNK)
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    how = dict(generator=generator, device=x.device, dtype=precise.dtype)
    counts = unusable = 0
    for first in range(0, n, chunks * CHUNK):
        noise = torch.cat([torch.randn(CHUNK, *x.shape, **how) for _ in range(chunks)])
        noisy = (precise + sigma * noise).to(x.dtype)                                # B C H W
        logits = torch.cat([logits_of(classifier(part), len(part)) for part in noisy.split(batch)])
        answers, usable = answers_of(logits[:n - first])                             # B, B
        counts = counts + answers.bincount(minlength=logits.shape[1])                # classes
        unusable = unusable + (~usable).sum()
    refuse_unusable(int(unusable), n, image)
    return counts.cpu()


def check_arguments(x, sigma, copies, any_range):
    """Refuse what is no image (C, H, W) in [0, 1]; any_range: pixels have other units, and so has sigma."""
    if not sigma > 0 or copies < 1:
        raise ValueError(f"sigma and the numbers of copies must be positive, not {sigma} and {copies}")
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"x must be a tensor of floating-point pixels in [0, 1], not {kind}")
    if x.ndim != 3:
        raise ValueError(f"x must be one image (C, H, W), not of shape {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("x has pixels that are not finite")
    if not any_range and x.min() >= 0 and x.max() > 2:
        raise ValueError(f"x has pixels from {float(x.min()):g} to {float(x.max()):g}, not in [0, 1]: "
                         "divide by 255, or say any_range=True")


def certify(classifier, x, sigma, n0=100, n=100_000, alpha=0.001, seed=0, index=0, batch=CHUNK,
            bound="one-sided", any_range=False):
    """CERTIFY (Cohen 2019, section 3.2.2): (prediction, radius) for one image; (-1, 0.0) is an abstention.

        for index, x in enumerate(images):
            prediction, radius = certify(classifier, x, sigma=0.25, index=index)

    x (C, H, W) in [0, 1], on the device where it is to run. classifier: any callable from (B, C, H, W) to
    logits (B, classes); put it into eval mode before. With probability at least 1 - alpha over the noise,
    g answers `prediction` wherever |d|_2 < radius, in units of pixels. The noise's stream is that of (seed,
    index): GIVE EVERY IMAGE AN INDEX OF ITS OWN, or all share one noise and their certificates fail together.
    bound: "one-sided" (p_b = 1 - p_a, as published) or "two-sided" (p_b from the rivals' counts).
    """
    if bound not in BOUNDS:
        raise ValueError(f"bound must be one of {', '.join(BOUNDS)}, not {bound!r}")
    check_arguments(x, sigma, min(n0, n), any_range)
    # n0 copies choose the class.
    generator = generator_for(seed, index, 0, x.device)
    selection = count_under_noise(classifier, x, sigma, n0, generator, batch, index)
    top = int(selection.numpy().argmax())                              # of equals the first
    # n fresh copies count how often it wins.
    generator = generator_for(seed, index, 1, x.device)
    counts = count_under_noise(classifier, x, sigma, n, generator, batch, index)
    if bound == "two-sided":
        p_a, p_b = two_sided_bounds(counts, top, n, alpha)
    else:
        p_a = lower_confidence_bound(int(counts[top]), n, alpha)
        p_b = 1 - p_a
    if p_a <= p_b:
        return ABSTAIN, 0.0
    return top, round_down(certified_radius(p_a, sigma, p_b))


def predict(classifier, x, sigma, n=100_000, alpha=0.001, seed=0, index=0, batch=CHUNK, any_range=False):
    """PREDICT (Cohen 2019, section 3.2.1): g(x), or -1; wrong with probability <= alpha. As certify()."""
    check_arguments(x, sigma, n, any_range)
    generator = generator_for(seed, index, 2, x.device)
    counts = count_under_noise(classifier, x, sigma, n, generator, batch, index)
    return clear_winner(counts, alpha)


def clear_winner(counts, alpha):
    """The class with the most counts (classes,), or -1 if a binomial test cannot tell the top two apart."""
    order = counts.numpy().argsort(kind="stable")[::-1]
    first, second = int(counts[order[0]]), int(counts[order[1]])
    if binomtest(first, first + second, 0.5).pvalue > alpha:
        return ABSTAIN
    return int(order[0])


# ----------------------------------------------------------------------------------------------------------
# How many copies: n of them, or as many as it takes
# ----------------------------------------------------------------------------------------------------------


def log_e_value(k, n, p):
    """Log of the evidence against P[success] <= p after k successes in n trials, to be looked at any time.

    E = integral over q in (p, 1] of (q/p)^k ((1-q)/(1-p))^(n-k) w(q) dq, w the Beta(1/2, 1/2) density
    restricted to (p, 1]. For each q > p the likelihood ratio is multiplied, at the next trial, by q/p or
    (1-q)/(1-p); if P[success] = s <= p its mean is s q/p + (1-s)(1-q)/(1-p) <= 1, with equality at s = p. So
    the ratio, and its average E, is a non-negative supermartingale that starts at 1, and by Ville's
    inequality P[E ever reaches 1/alpha] <= alpha.
    """
    a, b = 0.5 + k, 0.5 + n - k
    with np.errstate(divide="ignore"):
        posterior = betaln(a, b) + np.log(betaincc(a, b, p))
        prior = betaln(0.5, 0.5) + np.log(betaincc(0.5, 0.5, p))
        return posterior - prior - k * np.log(p) - (n - k) * np.log1p(-p)


def anytime_lower_bound(k, n, alpha):
    """Where log_e_value(k, n, p) crosses log(1/alpha): P[p <= P(success), at all looks] >= 1 - alpha."""
    if k == 0:
        return 0.0                                                     # no evidence

    def excess_of(p):                                                  # falls with p below k / n
        return log_e_value(k, n, p) + math.log(alpha)

    high = min(k / n, math.nextafter(1, 0))
    low = high / 2
    while excess_of(low) < 0:
        low, high = low / 2, low
    return float(brentq(excess_of, low, high, xtol=1e-300, rtol=1e-13)) * (1 - 1e-12)     # on the safe side


class FixedN:
    """Cohen's procedure: one look, after n draws."""

    def __init__(self, n, alpha):
        self.n = n
        self.alpha = alpha

    def next_look(self, drawn):
        return self.n

    def decide(self, counts, top, n, before=None):
        """({bound: (p_a, p_b)}, whether to stop), after n draws that gave these counts (classes,).

        Each pair holds with probability 1 - alpha by itself. `before`: the pairs of the look before.
        """
        p_a = lower_confidence_bound(int(counts[top]), n, self.alpha)
        return {"one-sided": (p_a, 1 - p_a), "two-sided": two_sided_bounds(counts, top, n, self.alpha)}, True


class Sequential:
    """Looks again and again, at most until n draws, and stops when the radii of a table are settled.

    `bound` says whose radius is meant: that of the one-sided or of the two-sided pair (p_a, p_b). Both are
    kept. An image stops when the largest of `radii` is certified; when the next one up

      * is futile: there is an evidence of 100 against so large a radius (this costs no alpha: the bounds hold
        wherever one stops);
      * is out of reach: not even successes in all draws to come would certify it (curtailment);
      * is near enough: the radius is known to lie within `tolerance` of it.

    Half of alpha is spent on the anytime bounds, which hold at all looks at once, so that the best of them
    does; the other half on Clopper-Pearson bounds at n, for the images that get there. So all bounds hold
    with probability 1 - alpha, and images next to a radius of the table are not judged by the looser one.
    (Sequential certification: Horvath et al. 2022, Chen et al. 2022, Voracek 2024; mixture martingales:
    Robbins 1970, Howard et al. 2021.)
    """

    def __init__(self, n, alpha, sigma, radii, tolerance=0.0, bound="one-sided", first=1000, growth=1.1,
                 futility=100.0):
        self.n = n
        self.alpha = alpha
        self.sigma = sigma
        self.radii = sorted({0.0, *radii})
        self.tolerance = tolerance
        self.bound = bound
        self.first = first
        self.growth = growth
        self.futility = futility

    def next_look(self, drawn):
        """How many draws there are at the look after `drawn`: a tenth more, in whole chunks."""
        look = max(self.first, math.ceil(drawn * self.growth))
        return min(self.n, math.ceil(look / CHUNK) * CHUNK)

    def radius(self, p_a, p_b):
        """As certified_radius, but negative where p_a < p_b."""
        return self.sigma / 2 * (norm.ppf(p_a) - norm.ppf(p_b))

    def bounds(self, counts, top, n, before):
        """Both pairs (p_a, p_b) after n draws, not worse than `before`."""
        runner_up, rivals = rivals_of(counts, top, n)
        k, early = int(counts[top]), self.alpha / 2
        one = anytime_lower_bound(k, n, early)
        two = anytime_lower_bound(k, n, early / 2)
        rival = 1.0
        if rivals:
            rival = 1 - anytime_lower_bound(n - runner_up, n, early / 2)
        if before:
            one = max(one, before["one-sided"][0])
            two = max(two, before["two-sided"][0])
            rival = min(rival, before["two-sided"][1])
        if n >= self.n:
            last = self.alpha / 2
            p_a, p_b = two_sided_bounds(counts, top, n, last)
            one = max(one, lower_confidence_bound(k, n, last))
            two, rival = max(two, p_a), min(rival, p_b)
        return {"one-sided": (one, 1 - one), "two-sided": (two, min(rival, 1 - two))}

    def most(self, counts, top, n, bounds):
        """The radius that would be certified if every draw from here to n were a success."""
        still = self.n - n
        counts = [int(count) + still * (c == top) for c, count in enumerate(counts)]
        last, before = self.alpha / 2, bounds[self.bound]
        if self.bound == "one-sided":
            p_a = max(before[0], lower_confidence_bound(counts[top], self.n, last))
            return self.radius(p_a, 1 - p_a)
        p_a, p_b = two_sided_bounds(counts, top, self.n, last)
        p_a = max(before[0], p_a)
        return self.radius(p_a, min(before[1], p_b, 1 - p_a))

    def possible(self, counts, top, n):
        """The largest radius that the probabilities may have, at an evidence of `futility` against more."""
        runner_up, _ = rivals_of(counts, top, n)
        missing = n - sum(int(count) for count in counts)
        p_a = 1 - anytime_lower_bound(n - int(counts[top]) - missing, n, 1 / self.futility)
        if self.bound == "one-sided":
            return self.radius(p_a, 1 - p_a)
        return self.radius(p_a, anytime_lower_bound(runner_up - missing, n, 1 / self.futility))

    def decide(self, counts, top, n, before=None):
        """As FixedN.decide."""
        bounds = self.bounds(counts, top, n, before)
        radius = self.radius(*bounds[self.bound])
        above = [r for r in self.radii if r > radius]
        if n >= self.n or not above:
            return bounds, True
        target = above[0]
        if self.most(counts, top, n, bounds) < target:
            return bounds, True                                        # out of reach
        possible = self.possible(counts, top, n)
        if possible <= target:
            return bounds, True                                        # futile
        near = target - radius <= self.tolerance and possible - target <= self.tolerance
        return bounds, self.tolerance > 0 and near


# ----------------------------------------------------------------------------------------------------------
# Noise
# ----------------------------------------------------------------------------------------------------------


class GaussianNoise:
    """x + sigma N(0, I) in floating point."""

    def __init__(self, sigma):
        self.sigma = sigma

    def admit(self, x):
        """The image, if this noise can be added to it."""
        return x

    def __call__(self, x, generator, out):
        """Fill `out` (CHUNK, C, H, W) with noisy copies of x (C, H, W); returns which copies may count."""
        torch.randn(out.shape, generator=generator, out=out, device=out.device)
        out.mul_(self.sigma).add_(x)
        return True


class GridNoise:
    """round(x + sigma N(0, I)) on the grid 1/levels, exactly: the noise of --sound.

    For x on the grid, rounding x + e is x + round(e): integers, drawn by comparing 53 random bits with a
    table of the rounded Gaussian's cumulative probabilities. f after rounding is a base classifier like any
    other, so the theorem holds without real-number noise; a deployment must round after adding noise, and
    never clip. The table is known to a few units of its last place: a draw that those would decide is not
    counted for c_A. (In substance Voracek & Hein 2023.)
    """

    BITS, SLACK = 53, 64                                         # norm.cdf errs by fewer than 8 units, tested

    def __init__(self, sigma, levels, device):
        self.levels = levels
        self.reach = math.ceil(9 * sigma * levels)                     # P[beyond] < 2^-53
        steps = np.arange(-self.reach, self.reach)
        cumulative = norm.cdf((steps + 0.5) / (sigma * levels))
        table = np.round(cumulative * 2**self.BITS).astype(np.int64)
        self.table = torch.from_numpy(table).to(device)

    def admit(self, x):
        """The image, if it is on the grid."""
        off = (torch.round(x * self.levels) - x * self.levels).abs().max()
        require(off < 1e-3, f"--sound needs images on the grid 1/{self.levels}")
        return x

    def __call__(self, x, generator, out):
        bits = torch.randint(2**self.BITS, out.shape, generator=generator, device=out.device)

        # The entries around each draw: table[place - 1] <= bits < table[place].
        place = torch.searchsorted(self.table, bits, right=True)                     # CHUNK C H W
        below = self.table[(place - 1).clamp(min=0)]
        above = self.table[place.clamp(max=len(self.table) - 1)]
        sure = ((bits - below).abs() > self.SLACK) & ((bits - above).abs() > self.SLACK)

        integers = place - self.reach
        out.copy_((torch.round(x * self.levels) + integers) / self.levels)
        return sure.flatten(1).all(dim=1)                                            # CHUNK


# ----------------------------------------------------------------------------------------------------------
# Many images at once: the same counts as count_under_noise, in fewer and fuller passes
# ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def count_classes(classifier, requests, noise, batch=CHUNK, images=None):
    """How often f answers each class on noisy copies: int64 (len(requests), classes) on the CPU.

    requests: [(x (C, H, W), generator, copies), ...]. The copies of all images share batches, in chunks;
    every batch has the same shape, the last one padded. Counts stay on the device: this function's end is
    its only synchronisation. images: their indices, for messages.
    """
    check_batch(batch)
    x, _, _ = requests[0]

    # Cut every request into chunks.
    chunks = []
    for row, (image, generator, wanted) in enumerate(requests):
        for drawn in range(0, wanted, CHUNK):
            chunks.append((row, image, generator, min(CHUNK, wanted - drawn)))

    # A pass has room for so many chunks. Every copy has an owner: the row of the result where it counts.
    room = max(1, batch // CHUNK)
    precise = torch.promote_types(x.dtype, torch.float32)
    copies = torch.zeros(room * CHUNK, *x.shape, device=x.device, dtype=precise)     # B C H W
    owner = torch.empty(room * CHUNK, dtype=torch.int64, device=x.device)            # B
    nobody = len(requests)
    place = torch.arange(CHUNK, device=x.device)
    counts = None
    for first in range(0, len(chunks), room):
        owner.fill_(nobody)
        for slot, (row, image, generator, wanted) in enumerate(chunks[first:first + room]):
            part = slice(slot * CHUNK, (slot + 1) * CHUNK)
            may_count = noise(image, generator, out=copies[part])
            owner[part] = torch.where((place < wanted) & may_count, row, nobody)
        pieces = copies.to(x.dtype).split(batch)
        try:
            outputs = [classifier(piece) for piece in pieces]
        except ClassifierError as error:
            raise RunError(f"{error} (image {', '.join(map(str, images or []))})") from None
        logits = torch.cat([logits_of(*pair) for pair in zip(outputs, map(len, pieces), strict=True)])
        answers, usable = answers_of(logits)                                         # B, B
        classes = logits.shape[1]
        if counts is None:
            counts = torch.zeros((nobody + 1) * (classes + 1), dtype=torch.int64, device=x.device)
        cell = owner * (classes + 1) + torch.where(usable, answers, classes)         # the last: no answer
        counts.scatter_add_(0, cell, torch.ones_like(cell))
    counts = counts.view(nobody + 1, classes + 1)[:nobody].cpu()
    for row, (_, _, wanted) in enumerate(requests):
        refuse_unusable(int(counts[row, classes]), wanted, images[row] if images else row)
    return counts[:, :classes]


class Trial:
    """One image on its way to a certificate."""

    def __init__(self, index, x, seed):
        self.index = index
        self.x = x                                                     # C H W
        self.select, self.estimate = (generator_for(seed, index, phase, x.device) for phase in (0, 1))
        self.top = None                                                # the class that is certified
        self.n = 0                                                     # draws that estimate
        self.counts = None                                             # how often each class won, (classes,)
        self.bounds = None                                             # {bound: (p_a, p_b)}
        self.done = False
        self.seconds = 0.0

    def request(self, n0, rule):
        """What count_classes is to draw next."""
        if self.top is None:
            return self.x, self.select, n0
        return self.x, self.estimate, rule.next_look(self.n) - self.n

    def absorb(self, counts, rule):
        """Go on with the counts (classes,) of that request."""
        if self.top is None:
            self.top = int(counts.numpy().argmax())                    # of equals the first
            return
        self.counts = counts if self.counts is None else self.counts + counts
        self.n = rule.next_look(self.n)
        self.bounds, self.done = rule.decide(self.counts, self.top, self.n, self.bounds)

    @property
    def k(self):
        """How often the top class won."""
        return int(self.counts[self.top])

    def certificate(self, sigma, bound="one-sided"):
        """(prediction, radius): abstains unless P[f = top] is certain to be the largest, p_a > p_b."""
        p_a, p_b = self.bounds[bound]
        if p_a <= p_b:
            return ABSTAIN, 0.0
        return self.top, round_down(certified_radius(p_a, sigma, p_b))


def certify_all(classifier, images, noise, n0, rule, seed=0, batch=CHUNK):
    """CERTIFY for many images (index, x) at once, with certify()'s counts; yields each Trial when it is done.

    `rule` says how many copies are drawn, and bounds the probability.
    """
    images = iter(images)
    room = max(1, batch // CHUNK)
    if isinstance(rule, Sequential):
        room = max(1, 4 * batch // CHUNK)                              # some stop while others go on
    pool = []
    while True:
        for index, x in itertools.islice(images, room - len(pool)):
            pool.append(Trial(index, noise.admit(x), seed))
        if not pool:
            return
        start = time.time()
        requests = [trial.request(n0, rule) for trial in pool]
        counts = count_classes(classifier, requests, noise, batch, [trial.index for trial in pool])
        taken = (time.time() - start) / sum(copies for _, _, copies in requests)
        for trial, (_, _, copies), row in zip(pool, requests, counts, strict=True):
            trial.seconds += taken * copies
            trial.absorb(row, rule)
        yield from [trial for trial in pool if trial.done]
        pool = [trial for trial in pool if not trial.done]


# ----------------------------------------------------------------------------------------------------------
# Reports
# ----------------------------------------------------------------------------------------------------------

PUBLISHED = {           # certified accuracy in %, best over sigma, at each radius: DMAE's tables 1 and 3
    "imagenet": ((0.5, 1.0, 1.5, 2.0, 3.0), {
        "RS (Cohen 2019)": (49.0, 37.0, 29.0, 19.0, 12.0),
        "SmoothAdv (Salman 2019)": (54.0, 43.0, 37.0, 27.0, 20.0),                  # [1]
        "Consistency (Jeong & Shin 2020)": (50.0, 44.0, 34.0, 24.0, 17.0),
        "MACER (Zhai 2020)": (57.0, 43.0, 31.0, 25.0, 14.0),                        # [2]
        "Boosting (Horvath 2022)": (57.0, 44.6, 38.4, 28.6, 20.2),
        "SmoothMix (Jeong 2021)": (50.0, 43.0, 38.0, 26.0, 17.0),                   # [3]
        "Diffusion + BEiT (Carlini 2022)": (71.1, 54.3, 38.1, 29.5, 13.1),
        "DMAE ViT-B": (69.6, 57.9, 47.8, 35.4, 22.5),
        "DMAE ViT-L": (73.6, 64.6, 53.7, 41.5, 27.5)}),
    "cifar10": ((0.25, 0.5, 0.75, 1.0), {
        "RS (Cohen 2019)": (61.0, 43.0, 32.0, 23.0),
        "SmoothAdv (Salman 2019)": (74.8, 60.8, 47.0, 37.8),                        # [4]
        "Consistency (Jeong & Shin 2020)": (68.8, 58.1, 48.5, 37.8),
        "MACER (Zhai 2020)": (71.0, 59.0, 46.0, 38.0),                              # [2]
        "Boosting (Horvath 2022)": (70.6, 60.4, 52.4, 38.8),
        "SmoothMix (Jeong 2021)": (67.9, 57.9, 47.7, 37.2),
        "Diffusion (Carlini 2022)": (79.3, 65.5, 48.7, 35.5),
        "DMAE ViT-B": (79.2, 64.6, 47.3, 36.1),
        "DMAE ViT-B, continued": (80.8, 67.1, 49.7, 37.7)}),
}
# Rows of other methods are as the DMAE paper prints them. Where the originals differ, draw no conclusion:
# [1] SmoothAdv's own table 1: 56, 45, 38, 28, 20.
# [2] ICLR 2020; the DMAE paper cites it as of 2021.
# [3] 17.0 looks like the value at r = 3.5: logs of SmoothMix have 20.4 at 3.0 and 17.0 at 3.5.
# [4] SmoothAdv's own table 2, with extra data: 80, 62, 52, 38 (pre-trained on ImageNet32), 80, 63, 52, 40
#     (unlabelled images), 81, 63, 52, 37 (both). 74.8 is the accuracy at r = 0 of one of its models without
#     extra data.
COLUMNS = [
    "idx", "label", "predict", "radius", "correct", "time",            # Cohen's
    "count", "n", "sigma", "alpha",                                    # of the class that was selected; draws
    "top", "runner_up", "classes",                                     # that class; largest count of another
    "one_sided", "two_sided",                                          # radius by either bound, -1: abstains
]


def read_rows(path):
    """The complete rows of a TSV, ours or in Cohen's format, as dicts. Right is who predicts the label."""
    whole = ("idx", "label", "predict", "correct", "count", "n", "top", "runner_up", "classes")
    kinds = dict.fromkeys(whole, int) | dict(time=str)
    rows = []
    try:
        lines = Path(path).read_text().split("\n")[:-1]          # what follows the last newline is a torn row
        header = lines[0].split("\t")
        require("radius" in header or header[:3] != COLUMNS[:3], "it has predictions, but no radii")
        require(header[:5] == COLUMNS[:5], "its columns are others")
        for line in lines[1:]:
            cells = zip(header, line.split("\t"), strict=True)
            rows.append({key: kinds.get(key, float)(value) for key, value in cells})
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is not a certification log: {error}") from None
    if "sigma" not in header:
        named = re.findall(r"(?:sigma|noise)_?(\d+(?:\.\d+)?)", str(path))
        require(named, f"{path} does not say its sigma: put it into its path, as in sigma_0.25")
        rows = [dict(row, sigma=float(named[-1]), alpha=0.001) for row in rows]

    # Some published scripts write a running count there.
    wrong = sum(row["correct"] != (row["predict"] == row["label"]) for row in rows)
    if wrong:
        print(f"{path}: the column correct disagrees with predict = label in {wrong} of {len(rows)} rows; "
              "it is not used", file=sys.stderr)
    return [dict(row, correct=int(row["predict"] == row["label"])) for row in rows]


def excess(m, alpha, rho=0.001):
    """q: with probability 1 - rho at most q of m certificates are wrong: a binomial quantile.

    (Cohen 2019, appendix D, bounds the same by Bernstein's inequality.)
    """
    return int(binom.ppf(1 - rho, m, alpha))


def seconds_of(time):
    """Of Cohen's "h:mm:ss.ffffff", "1 day, h:mm:ss", or seconds."""
    units = (1, 60, 3600, 86400)
    parts = re.findall(r"[\d.]+", time)[::-1]
    return sum(float(part) * unit for part, unit in zip(parts, units, strict=False))


def by_bound(row, bound):
    """A row as that bound has it."""
    column = bound.replace("-", "_")
    if column not in row:
        return row                                                     # Cohen's logs are one-sided
    predict = row["top"] if row[column] >= 0 else ABSTAIN
    return dict(row, predict=predict, radius=max(0.0, row[column]), correct=int(predict == row["label"]))


class Summary:
    """The table's numbers for the certificates of one classifier at one sigma."""

    def __init__(self, rows, bound="one-sided", name=""):
        rows = [by_bound(row, bound) for row in rows]
        self.bound = bound
        self.name = name                                               # where sigma alone does not tell
        self.m = len(rows)
        self.alpha = max(row["alpha"] for row in rows)
        self.sigma = rows[0]["sigma"]
        self.radii = np.sort([row["radius"] for row in rows if row["correct"]])
        self.acr = self.radii.sum() / self.m                    # average certified radius; wrong ones count 0
        self.abstained = sum(row["predict"] == ABSTAIN for row in rows) / self.m
        self.seconds = float(np.mean([seconds_of(row["time"]) for row in rows]))
        self.draws = sum(row.get("n", 0) for row in rows)

    def right(self, r):
        """How many are right with radius >= r."""
        return len(self.radii) - int(np.searchsorted(self.radii, r))

    def accuracy(self, r):
        return self.right(r) / self.m

    def guaranteed(self, r, among=1):
        """Lower bound, at 99.9 % for so many summaries at once, of the share on which g is right within r."""
        return max(0, self.right(r) - excess(self.m, self.alpha, 0.001 / among)) / self.m


def settings_of(path):
    """The classifier and the procedure of a TSV, from the JSON beside it; None if there is none."""
    file = Path(path).with_name(Path(path).name.removesuffix(".tsv") + ".json")
    if not file.exists():
        return None
    settings = json.loads(file.read_text())
    of_the_job = {*MAY_CHANGE, "shard", "max", "skip", "radii", "device", "compile", "any_sigma", "recipe"}
    return {key: value for key, value in settings.items() if key not in of_the_job and value is not None}


def merge(logs):
    """{idx: row} of the rows of several logs, or None where two answer an image differently."""
    rows = {}
    for log in logs:
        for row in log:
            same = rows.setdefault(row["idx"], row)
            if any(same[column] != row[column] for column in COLUMNS[:4]):
                return None
    return rows


def curves_of(files):
    """[(sigma, files, rows)]: one entry for each classifier at each sigma.

    Files of one run (shards; the settings beside them are the same) are one curve, whatever rows stand
    twice. Files without settings, Cohen's for instance, are one while they do not contradict each other;
    else each folder is one, or each file.
    """
    logs, groups = {}, {}
    for path in files:
        logs[path] = read_rows(path)
        settings = settings_of(path)
        for sigma in sorted({row["sigma"] for row in logs[path]}):
            groups.setdefault((sigma, json.dumps(settings, sort_keys=True)), []).append(path)

    def rows_of(path, sigma):
        return [row for row in logs[path] if row["sigma"] == sigma]

    curves = []
    for (sigma, settings), members in groups.items():
        ways = [[members]]
        if settings == "null":
            folders = [[path for path in members if Path(path).parent == folder]
                       for folder in dict.fromkeys(Path(path).parent for path in members)]
            ways += [folders, [[path] for path in members]]
        for way in ways:
            merged = [merge([rows_of(path, sigma) for path in part]) for part in way]
            if None not in merged:
                break
        require(None not in merged,
                f"{' and '.join(map(str, members))} are of one run, but contradict each other")
        for part, rows in zip(way, merged, strict=True):
            curves.append((sigma, part, [rows[i] for i in sorted(rows)]))

    # Shards of one set that were certified in different ways must not pass for whole results.
    shards = {}
    for sigma, part, _ in curves:
        for path in part:
            if "_shard_" in Path(path).name:
                shards.setdefault((sigma, Path(path).parent), set()).add(id(part))
    for (sigma, folder), parts in shards.items():
        require(len(parts) == 1, f"the shards in {folder} at sigma {sigma:g} were certified with different "
                "settings (dtype, n, weights, ...): they are not merged")
    return sorted(curves, key=lambda curve: curve[0])


def name_curves(curves, files, labels):
    """A name for each curve: the label of its folder or file, or its folder where sigma does not tell."""
    folders = list(dict.fromkeys(Path(file).parent for file in files))
    firsts = [Path(part[0]) for _, part, _ in curves]
    if labels:
        of_folder = len(labels) == len(folders)
        require(of_folder or len(labels) == len(files),
                f"--label needs a name for each of the {len(folders)} folders "
                f"{', '.join(map(str, folders))}, or of the {len(files)} files")
        named = dict(zip(folders if of_folder else map(Path, files), labels, strict=True))
        return [named[first.parent if of_folder else first] for first in firsts]
    sigmas = [sigma for sigma, _, _ in curves]
    if len({*sigmas}) == len(sigmas):
        return [""] * len(curves)
    names = [first.parent.resolve().name for first in firsts]
    if len({folder.resolve().name for folder in folders}) < len(folders):
        common = os.path.commonpath([folder.resolve() for folder in folders])
        names = [str(first.parent.resolve().relative_to(common)) for first in firsts]
    known = list(zip(sigmas, names, strict=True))
    for i, first in enumerate(firsts):
        if known.count(known[i]) > 1:                                  # several files of one folder
            names[i] = f"{names[i]}/{first.name.removesuffix('.tsv')}"
    return names


def summarise(files, labels=None, bounds=("one-sided",)):
    """A Summary of each curve of the files (curves_of) by each of the bounds.

    They are named by `labels`, or by folder where sigma does not tell.
    """
    curves = curves_of(files)
    require(curves, "there are no rows to report")
    names = name_curves(curves, files, labels)
    summaries = []
    for bound in bounds:
        for name, (_, part, rows) in zip(names, curves, strict=True):
            require(bound == "one-sided" or "two_sided" in rows[0],
                    f"{part[0]} has no counts of other classes: it has the one-sided radius only")
            summaries.append(Summary(rows, bound, name))
    return summaries


def table(summaries, radii, kind="text"):
    """Certified accuracy in % at each radius, for each sigma and the best over them.

    kind: text, markdown or csv.
    """

    def percent(shares):
        return [f"{100 * share:.1f}" for share in shares]

    def title(one, first):
        return " ".join(filter(None, (first, one.name, one.bound if len(bounds) > 1 else "")))

    bounds = {one.bound for one in summaries}
    lines = [["sigma", "images", *(f"r={r:g}" for r in radii), "ACR", "abstain", "s/image"]]
    notes = ["* certified accuracy in % less what the certificates' own errors may add, at 99.9 % confidence"]
    if bounds == {"two-sided"}:
        lines[0][0] = "sigma, two-sided"
    if len(bounds) > 1:
        notes.append("  one-sided: p_b = 1 - p_a, as in published tables; two-sided: p_b from the rivals' "
                     "counts; each holds by itself")
    for one in summaries:
        accuracy = percent(one.accuracy(r) for r in radii)
        others = [f"{one.acr:.3f}", f"{100 * one.abstained:.1f}%", f"{one.seconds:.2f}"]
        lines.append([title(one, f"{one.sigma:g}"), f"{one.m}", *accuracy, *others])
    by_name = {}
    for one in summaries:
        by_name.setdefault((one.name, one.bound), []).append(one)
    envelopes = [group for group in by_name.values() if len(group) > 1]
    for group in envelopes:
        best = percent(max(one.accuracy(r) for one in group) for r in radii)
        lines.append([title(group[0], "best"), "", *best, "", "", ""])
    for one in summaries:
        proven = percent(one.guaranteed(r) for r in radii)
        lines.append([title(one, f"{one.sigma:g}"), "proven*", *proven, "", "", ""])
    for group in envelopes:
        proven = percent(max(one.guaranteed(r, among=len(group)) for one in group) for r in radii)
        lines.append([title(group[0], "best"), "proven*", *proven, "", "", ""])
    if envelopes:
        notes.append("  best: the largest over sigma at each radius, a choice made on these test images; "
                     "proven for all sigmas at once")
    if kind == "csv":
        return "\n".join(",".join(line) for line in lines)

    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    if kind == "markdown":
        rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
        rows = [f"| {' | '.join(line)} |" for line in padded]
        return "\n".join([rows[0], rule, *rows[1:], "", *notes])
    return "\n".join([*("  ".join(line) for line in padded), *notes])


def plot(path, summaries, published=None):
    """Certified accuracy over the radius, with its lower bound; two-sided dashed; the paper's baselines as
    marks.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4))
    axis = figure.subplots()
    kinds = figure.canvas.get_supported_filetypes()
    require(Path(path).suffix[1:] in kinds,
            f"cannot draw {path}: its name must end in one of {', '.join(kinds)}")
    colours = itertools.cycle(("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"))
    colour_of = {}
    for one in summaries:
        curve = (one.sigma, one.name)
        if curve not in colour_of:
            colour_of[curve] = next(colours)
        dashed = one.bound == "two-sided"
        words = (f"$\\sigma$ = {one.sigma:g}", one.name, "two-sided" if dashed else "")
        r = np.linspace(0, max(0.1, *one.radii * 1.02) if len(one.radii) else 0.1, 500)
        accuracy = [100 * one.accuracy(x) for x in r]
        guaranteed = [100 * one.guaranteed(x) for x in r]
        colour, style = colour_of[curve], "--" if dashed else "-"
        axis.plot(r, accuracy, style, color=colour, label=" ".join(filter(None, words)))
        axis.fill_between(r, guaranteed, accuracy, color=colour, alpha=0.1 if dashed else 0.2, linewidth=0)
    if published:
        radii, methods = PUBLISHED[published]
        above = itertools.cycle(("top", "bottom"))                     # of two labels one is below, one above
        for (name, values), mark in zip(methods.items(), "os^vDX*Ph", strict=True):
            if name.startswith("DMAE"):
                axis.plot(radii, values, mark, color="crimson", markersize=8, zorder=3)
                axis.text(radii[-1] * 1.04, values[-1], name, color="crimson", fontsize=9, va=next(above))
            else:
                axis.plot(radii, values, mark, color="0.6", markersize=5, fillstyle="none", label=name)
        axis.text(1.01, 0, "marks: as the DMAE paper prints them;\nwhere the originals differ, see PUBLISHED",
                  fontsize=7, transform=axis.transAxes)
    axis.set(xlabel="certified $\\ell_2$ radius (pixels in [0, 1])", ylabel="certified accuracy (%)")
    axis.set(xlim=(0, None), ylim=(0, 100))
    axis.grid(alpha=0.3)
    if published:
        axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))   # a long list: beside the curves
    else:
        axis.legend(fontsize=9)
    figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")


def report(args):
    summaries = summarise(args.report, args.label, BOUNDS if args.bound == "both" else (args.bound,))
    if args.plot:
        plot(args.plot, summaries, args.published)
    print(table(summaries, args.radii, args.format))


# ----------------------------------------------------------------------------------------------------------
# The base classifier
# ----------------------------------------------------------------------------------------------------------


class Consensus:
    """K-consensus of an ensemble: where its first K networks agree, the others are not asked.

        f(z) = c                              if argmax F_1(z) = ... = argmax F_K(z) = c
        f(z) = argmax (F_1(z) + ... + F_k(z))    elsewhere

    F_l are the logits of network l of k. The theorem holds for it as for any function f; but it is another
    function than the mean of all. (Horvath et al. 2022, arXiv 2106.06946.)

        f = Consensus([net1, net2, net3], 2)
        logits = f(z)                                                  # (B, C, H, W) -> (B, classes)

    Where they agree the logits are network 1's, exactly. The copies in dispute go through the others `pack`
    at a time, the last batch padded: each network sees batches of one shape alone, so what a copy gets does
    not depend on which others are in dispute.
    """

    def __init__(self, networks, first, pack=CHUNK // 4):
        require(1 <= first <= len(networks), f"no consensus of {first} among {len(networks)} networks")
        self.first = networks[:first]
        self.others = networks[first:]
        self.pack = pack
        self.done = 0                                                  # copies x networks, with the padding
        self.most = 0                                                  # what asking all would have taken

    def __call__(self, x):
        logits = torch.stack([network(x) for network in self.first])                 # K B classes
        largest, answers = logits.max(dim=2)                                         # K B, K B
        agree = (answers == answers[0]) & largest.isfinite()                         # K B
        disputed = (~agree.all(dim=0)).nonzero().flatten()                           # D

        result = logits[0].clone()                                                   # B classes
        pack = min(self.pack, len(x))
        for first in range(0, len(disputed), pack):
            copies = disputed[first:first + pack]
            padded = torch.nn.functional.pad(copies, (0, pack - len(copies)))        # copy 0 fills it up
            votes = [*logits[:, padded], *(network(x[padded]) for network in self.others)]
            result[copies] = sum(votes)[:len(copies)]
            self.done += pack * len(self.others)

        self.done += len(x) * len(self.first)
        self.most += len(x) * (len(self.first) + len(self.others))
        return result


def denoise(dmae, z):
    """D(z): noisy images (B, C, S, S) to clean ones in [0, 1], by DMAE with no patch dropped.

        f(z) = argmax_c F(D(z))_c,    D(z) = clip(mean + std * decode(encode(z)))

    So a classifier F of clean images becomes a base classifier f for noisy ones; the certificate is about the
    pixels of z. (Denoised smoothing: Salman et al. 2020, arXiv 2003.01908; with a diffusion model: Carlini et
    al. 2023, arXiv 2206.10550. Here the denoiser is the autoencoder of Wu et al. 2023, arXiv 2210.06983.)

    dmae: model.DenoisingMaskedAutoencoder, trained without norm-pix: with it, the prediction lacks each
    patch's mean and variance. It may work at another size than S; the result has size S.
    """
    from model import unpatchify

    patches = math.prod(dmae.grid)
    in_order = torch.arange(patches, device=z.device).expand(len(z), -1)             # B N
    latent, restore, _ = dmae.encode(z, mask_ratio=0.0, mask_noise=in_order)
    prediction = dmae.decode(latent, restore)                                        # B N P*P*C
    images = unpatchify(prediction, dmae.patch_size, dmae.grid) * dmae.std + dmae.mean
    if images.shape != z.shape:
        images = torch.nn.functional.interpolate(images, z.shape[-2:], mode="bicubic", antialias=True)
    return images.clamp(0, 1)                                                        # B C S S


def diffusion_step(sigma, abar):
    """(t, scale): the step of a diffusion whose noise is that of z = x + sigma N(0, I), x in [0, 1].

    A diffusion takes images 2x - 1 in [-1, 1] to x_t = sqrt(abar_t) (2x - 1) + sqrt(1 - abar_t) N(0, I). In
    those units z has noise 2 sigma, so t is the smallest with

        sqrt((1 - abar_t) / abar_t) >= 2 sigma

    and scale = sqrt(abar_t). abar (T,): the schedule's cumulative products of 1 - beta, falling; t counts
    from 0. (Carlini et al. 2023, arXiv 2206.10550.)
    """
    abar = torch.as_tensor(abar, dtype=torch.float64)
    noise = ((1 - abar) / abar).sqrt()                                               # T
    enough = noise >= 2 * sigma
    require(enough.any(), f"sigma {sigma:g} is above the schedule's largest, {float(noise.max()) / 2:g}")
    t = int(enough.nonzero()[0])
    return t, float(abar[t].sqrt())


def denoise_by_diffusion(model, z, sigma, abar):
    """Noisy images z (B, C, H, W) = x + sigma N(0, I) to clean ones in [0, 1], by one step of a diffusion.

        x_t = sqrt(abar_t) (2z - 1)
        x_0 = clip((x_t - sqrt(1 - abar_t) model(x_t, t)) / sqrt(abar_t))            then (x_0 + 1) / 2

    with t and sqrt(abar_t) of diffusion_step. model: any callable (x_t, t (B,)) -> the predicted noise.
    (Carlini et al. 2023, arXiv 2206.10550.)

    The noise in z, 2 sigma in those units, is a little below that of step t. None is added to make up for it:
    the model sees slightly less noise than it is told. So f is a deterministic function of z, and the
    certificate at sigma holds, as it does for any f. A file for --classifier:

        # mine.py, for: certify.py --sigma 0.5 --classifier mine.py:f --dataset cifar10 --data-path data
        from certify import denoise_by_diffusion
        unet, vit, abar = ...                                          # yours
        def f(z):
            return vit(denoise_by_diffusion(unet, z, 0.5, abar))

    A model that predicts a variance, too, is cut: lambda x_t, t: unet(x_t, t)[:, :3].
    """
    t, scale = diffusion_step(sigma, abar)
    x_t = scale * (2 * z - 1)
    noise = model(x_t, torch.full((len(z),), t, device=z.device))
    x_0 = (x_t - math.sqrt(1 - scale**2) * noise) / scale
    return (x_0.clamp(-1, 1) + 1) / 2


class BaseClassifier:
    """f as it is run: (B, C, H, W) in [0, 1] -> logits (B, classes), in the precision of `dtype`.

    denoise: what is done to the images before, or None. networks: their logits are added, which decides as
    their mean does; or their consensus of so many decides.
    """

    def __init__(self, networks, denoise, consensus, device, dtype):
        self.networks = networks
        self.denoise = denoise
        self.consensus = Consensus(networks, consensus) if consensus else None
        self.autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, dtype == "bf16")

    def __call__(self, x):
        with self.autocast():
            if self.denoise:
                x = self.denoise(x)
            if self.consensus:
                return self.consensus(x)
            return sum(logits_of(network(x), len(x)) for network in self.networks)


def open_classifier(args, checkpoints, device):
    """The base classifier f of the arguments."""
    if args.classifier:
        networks = [load_callable(args.classifier, device)]
    else:
        pairs = zip(checkpoints, args.checkpoint, strict=True)
        networks = [rebuild(*pair).to(device).eval() for pair in pairs]
        if args.compile:
            for network in networks:
                network.compile()
    denoiser = open_denoiser(args, device) if args.denoiser else None
    return BaseClassifier(networks, denoiser, args.consensus, device, args.dtype)


def open_denoiser(args, device):
    """denoise() with the autoencoder of --denoiser, which must be for these images."""
    file = args.denoiser
    wanted = ("dataset", "image_size", "channels")
    checkpoint = read_ours(file, "pretrain", wanted)
    other = [f"{key} {checkpoint['data'][key]}, not {getattr(args, key)}" for key in wanted
             if checkpoint["data"][key] != getattr(args, key)]
    require(not other, f"{file} denoises other images: {'; '.join(other)}")
    dmae = rebuild(checkpoint, file)
    require(not dmae.norm_pix,
            f"{file} was trained with norm-pix and gives no pixels back: pretrain.py --no-norm-pix does")
    require(dmae.loss_on == "all",
            f"{file} never learned to return a patch that it sees: pretrain.py --loss-on all does")
    dmae.to(device).eval()
    denoiser = functools.partial(denoise, dmae)
    return torch.compile(denoiser) if args.compile else denoiser


class ClassifierError(Exception):
    """What went wrong inside a user's classifier, in one sentence."""


def all_networks(known=()):
    """Every torch module of this process whose id() is not known, wherever a closure or a list holds it."""
    modules = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.nn.Module)]
    return [module for module in modules if id(module) not in known]


def hash_of_weights(networks):
    """A sha256 of all their weights, in whatever order they come; None if there are none."""
    hashes = []
    for network in networks:
        for tensor in [*network.parameters(recurse=False), *network.buffers(recurse=False)]:
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            hashes.append(hashlib.sha256(content.numpy()).hexdigest())
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest() if hashes else None


def load_callable(place, device):
    """What FILE.py:NAME names: a callable; the networks that the file makes in eval mode, on the device.

    Its .weights_sha256 tells two runs of one file with other weights apart.
    """
    file, _, name = place.partition(":")
    require(Path(file).is_file(), f"there is no {file} (--classifier FILE.py:NAME)")
    known = {id(network) for network in all_networks()}
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    require(callable(found), f"{file} has no function {name!r} (--classifier FILE.py:NAME)")
    networks = all_networks(known)
    for network in networks:
        if network.training:
            say(f"{file}: a {type(network).__name__} is put into eval mode")
        network.to(device).eval()

    def classifier(x):
        try:
            output = found(x)
        except Exception as error:
            traceback.print_exc()
            sentence = f"{place} failed: {type(error).__name__}: {error}"
            raise ClassifierError(sentence.splitlines()[0]) from None
        if not classifier.called:
            classifier.called = True
            late = [network for network in all_networks(known) if network.training]
            if late:
                raise ClassifierError(f"{place} made a {type(late[-1]).__name__}, in training mode, at its "
                                      "first call: make it where the file is imported")
        return output

    classifier.called = False
    classifier.weights_sha256 = hash_of_weights(networks)
    return classifier


def rebuild(checkpoint, file):
    """The network of a checkpoint: finetune.py's classifier, or pretrain.py's autoencoder."""
    from model import DenoisingMaskedAutoencoder, VisionTransformer, load_weights

    network = DenoisingMaskedAutoencoder if checkpoint.get("kind") == "pretrain" else VisionTransformer
    try:
        model = network(**checkpoint["config"])
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{file} describes no model ({str(error).splitlines()[0]})") from None
    load_weights(model, checkpoint["model"], file)
    return model


# ----------------------------------------------------------------------------------------------------------
# Certification of a data set, and of pictures
# ----------------------------------------------------------------------------------------------------------


def shard_of(args):
    """(I, K) of --shard I/K."""
    part, parts = map(int, args.shard.split("/"))
    return part, parts


def run_stem(args):
    """Where the run's files lie, without their endings."""
    part, parts = shard_of(args)
    return f"{args.out}/certify_sigma_{args.sigma:g}" + (f"_shard_{part}_of_{parts}" if parts > 1 else "")


def merge_parts(parts):
    """{idx: row} of the part files, whatever number of processes wrote them; torn last lines are left out."""
    rows = {}
    for part in parts:
        for line in part.read_text().split("\n")[:-1]:
            if line.count("\t") == len(COLUMNS) - 1:
                rows[int(line.split("\t")[0])] = line
    return rows


def gather_parts(result, first):
    """What earlier processes left, {idx: row}; rank 0 puts it into the part `first`, all go on from there."""
    if is_rank_zero():
        parts = sorted(result.parent.glob(f"{result.name}.part*"))
        lines = [f"{row}\n" for row in merge_parts(parts).values()]
        write_atomically(first, lambda path: path.write_text("".join(lines)))
        for part in parts:
            if part != first:
                part.unlink()
    gather([0])
    finished = merge_parts([first])
    gather([0])                                                    # all have read it before rank 0 adds to it
    return finished


def format_row(trial, label, args):
    """The TSV's row of a finished trial."""
    prediction, radius = trial.certificate(args.sigma, args.bound)
    taken = timedelta(seconds=trial.seconds)
    row = [trial.index, label, prediction, f"{radius:.6f}", int(prediction == label), taken]
    row += [trial.k, trial.n, args.sigma, args.alpha]
    runner_up, rivals = rivals_of(trial.counts, trial.top, trial.n)
    row += [trial.top, runner_up, rivals + 1]
    for bound in BOUNDS:
        prediction, radius = trial.certificate(args.sigma, bound)
        row.append("-1" if prediction == ABSTAIN else f"{radius:.6f}")
    return "\t".join(map(str, row)) + "\n"


class Progress:
    """What the terminal shows while images are certified."""

    def __init__(self, images, args):
        from tqdm import tqdm

        self.images = images
        self.bar = tqdm(total=images, desc="certify", disable=None if is_rank_zero() else True)
        self.shown = [r for r in args.radii if r > 0][:2] or [0.0]
        self.right = [0] * len(self.shown)
        self.n0 = args.n0
        self.done = self.drawn = 0
        self.start = time.time()

    def add(self, trial, correct, radius):
        self.done += 1
        self.drawn += trial.n + self.n0
        for i, r in enumerate(self.shown):
            self.right[i] += correct and radius >= r
        seconds = time.time() - self.start
        shares = zip(self.shown, self.right, strict=True)
        accuracy = [f"r={r:g}: {right / self.done:.1%}" for r, right in shares]
        status = "  ".join([*accuracy, f"{self.drawn / seconds:,.0f} draws/s"])
        self.bar.update()
        self.bar.set_postfix_str(status)
        if self.bar.disable and (self.done % max(1, self.images // 10) == 0 or self.done == self.images):
            left = seconds / self.done * (self.images - self.done)
            say(f"{self.done}/{self.images} images  {status}  {left:.0f} s left")


def finish(result, args):
    """All parts are there: they become one file, sorted."""
    parts = sorted(result.parent.glob(f"{result.name}.part*"))
    rows = merge_parts(parts)
    lines = ["\t".join(COLUMNS), *(rows[i] for i in sorted(rows))]
    write_atomically(result, lambda path: path.write_text("\n".join(lines) + "\n"))
    show(result, args)


def show(result, args):
    """The table and the curve of a finished TSV; what a kill may have left of its parts goes."""
    for part in result.parent.glob(f"{glob.escape(result.name)}.part*"):
        part.unlink()
    summaries = summarise([result], bounds=BOUNDS)
    plot(result.with_name(result.name.removesuffix(".tsv") + ".png"), summaries)
    one = summaries[BOUNDS.index(args.bound)]
    exact = binomtest(one.right(0), one.m).proportion_ci(confidence_level=0.95, method="exact")
    print(table(summaries, args.radii))
    print(f"certified accuracy at r = 0: {one.accuracy(0):.1%} of these {one.m} images "
          f"(exact interval for all images, 95 %: {exact.low:.1%} to {exact.high:.1%})")
    if args.sequential:
        share = one.draws / (one.m * args.n)
        print(f"{one.draws:,} draws, {share:.1%} of n = {args.n:,} an image; images stop when the table's "
              "radii are settled: ACR is a lower bound of that with n draws")


def certify_pictures(args, classifier, classes, rule, noise, device):
    """Certify --images one by one, and print what comes out."""
    size = args.image_size
    try:
        pictures = [open_picture(file, args.channels) for file in args.images]
    except RunError as error:
        raise ValueError(str(error)) from None                         # nothing was done yet
    for index, (file, picture) in enumerate(zip(args.images, pictures, strict=True)):
        if picture.size != (size, size):
            print(f"{file}: resized and cropped to {size} x {size}, the radius is in pixels of that")
        x = fit(picture, size).to(device) / 255
        (trial,) = certify_all(classifier, [(index, x)], noise, args.n0, rule, args.seed, args.batch)
        guess, radius = trial.certificate(args.sigma, args.bound)
        request = x, generator_for(args.seed, index, 2, device), args.n
        vote = clear_winner(count_classes(classifier, [request], noise, args.batch, [index])[0], args.alpha)
        names = {ABSTAIN: "abstains"} | dict(enumerate(classes)) if classes else {ABSTAIN: "abstains"}
        guess, vote = (names.get(c, f"class {c}") for c in (guess, vote))
        sure = f", certified within an l2 radius of {radius:.6f}" if radius else ""
        print(f"{file}: {guess}{sure} (without a radius: {vote})")


def certify_test_images(args, checkpoints, classifier, rule, rank, world, device):
    """Certify every SKIP-th test image, or this job's shard of them, into OUT/certify_sigma_S.tsv."""
    test = open_images(args.dataset, args.data_path, False, args.image_size, args.channels)
    known = checkpoints[0]["data"]["classes"] if checkpoints else test.classes
    require(known == test.classes, f"the checkpoint has other classes than {args.data_path}")
    part, parts = shard_of(args)
    chosen = list(range(0, len(test), args.skip))[:args.max][part::parts]
    require(chosen, f"there is no image to certify in shard {args.shard}")
    noise = GridNoise(args.sigma, test.levels, device) if args.sound else GaussianNoise(args.sigma)

    file, _, function = (args.classifier or "").partition(":")
    hashes = [sha256(path) for path in args.checkpoint or [file]]
    settings = vars(args) | {"sha256": hashes, "function": function}
    settings["denoiser_sha256"] = args.denoiser and sha256(args.denoiser)
    settings["consensus"] = args.consensus or None                     # None: as in runs before there was one
    settings["weights_sha256"] = classifier.networks[0].weights_sha256 if args.classifier else None
    stem = run_stem(args)
    result = Path(f"{stem}.tsv")
    with run_directory(stem, settings, MAY_CHANGE, result, args.overwrite):
        if result.exists():
            say(f"{result} is done; --out elsewhere, or --overwrite to do it again")
            if rank == 0:
                show(result, args)
            return
        finished = gather_parts(result, Path(f"{result}.part0"))
        if finished:
            say(f"continuing after {len(finished)} of {len(chosen)} images")
        start = time.time()
        todo = [i for i in chosen if i not in finished][rank::world]
        progress = Progress(len(todo), args)
        images = ((i, test.read(i).to(device) / test.levels) for i in todo)
        with open(f"{result}.part{rank}", "a") as rows:
            for trial in certify_all(classifier, images, noise, args.n0, rule, args.seed, args.batch):
                prediction, radius = trial.certificate(args.sigma, args.bound)
                label = int(test.labels[trial.index])       # seen here first: prediction and radius are final
                rows.write(format_row(trial, label, args))
                rows.flush()
                progress.add(trial, prediction == label, radius)
        progress.bar.close()
        gather([0])
        if rank == 0:
            finish(result, args)
            print(f"wrote {result} and its picture in {time.time() - start:.0f} s")


def certify_with(args, checkpoints):
    """The stage: open f, choose how many copies are drawn, certify."""
    rank, world, device = start_processes(args.device, timeout=timedelta(days=30))   # ranks end hours apart
    gpu = device.type == "cuda"
    args.device = device.type
    args.batch = args.batch or (4 * CHUNK if gpu or args.image_size <= 64 else CHUNK)
    args.compile = gpu if args.compile is None else args.compile
    args.dtype = pick_dtype(args.dtype, device, read_settings(run_stem(args), args.overwrite))
    classifier = open_classifier(args, checkpoints, device)
    if args.sequential:
        rule = Sequential(args.n, args.alpha, args.sigma, args.radii, args.boundary_tolerance, args.bound)
    else:
        rule = FixedN(args.n, args.alpha)
    if args.images:
        noise = GridNoise(args.sigma, 255, device) if args.sound else GaussianNoise(args.sigma)
        classes = checkpoints[0]["data"]["classes"] if checkpoints else None
        certify_pictures(args, classifier, classes, rule, noise, device)
    else:
        certify_test_images(args, checkpoints, classifier, rule, rank, world, device)
    if args.consensus:
        say_savings(classifier.consensus)


def say_savings(consensus):
    """How much all processes saved; what was done before a resume is not known."""
    done, most = gather([consensus.done, consensus.most]).sum(dim=1).tolist()
    if most:
        say(f"consensus: {most - done:,.0f} of {most:,.0f} network passes over copies saved since this start "
            f"({1 - done / most:.1%})")


def main(argv=None):
    with one_line_errors():
        args, checkpoints = parse(argv)
        if "report" in args:
            report(args)
        else:
            certify_with(args, checkpoints)


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
