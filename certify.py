"""Stage 3: certify g(x) = argmax_c P[f(x + N(0, sigma^2 I)) = c] (Cohen et al. 2019, 1902.02918).

    python certify.py --sigma 0.25                             # digits, two CPU cores: a minute
    torchrun --nproc_per_node=8 certify.py --sigma 0.5 --recipe imagenet-base --N 10000
    python certify.py --sigma 0.5 --recipe cifar10 --shard 0/16          # one job of an array of 16
    python certify.py --sigma 0.5 --classifier mine.py:f --dataset cifar10       # any network
    python certify.py --sigma 0.5 --procedure extras/sequential.py:sequential    # stops early
    python certify.py --report runs/*/certify_sigma_*.tsv --plot curves.png

    from certify import certify
    for index, x in enumerate(images):                                           # x: (C, H, W)
        prediction, radius = certify(classifier, x, sigma=0.25, index=index)

This file works alone: for checkpoints of finetune.py, only, it needs model.py beside it.

What a row of the result says: with probability at least 1 - alpha over the noise drawn for that
image, either g abstained or g answers `predict` on every x + d with |d|_2 < radius. To have all m
rows true at once with 1 - alpha, run with --alpha alpha/m. The theorem is about f exactly as it is
run here: same dtype, same device, eval mode; deploy that. The noise is pseudo-random, and it is
floating-point noise standing for real numbers, as in all published work
(extras/integer_noise.py removes the second assumption).

Same settings, same rows: the result for an image depends on (seed, image index, settings) alone,
not on the number of processes, their order, or interruptions. Bit for bit that holds on one type
of CPU; on GPUs a logit's last bits, and so a few counts in 100 000, may differ.

Axes:  B noisy copies   C channels   H W pixels

Read down to the first ruler of equal signs: the rest is plumbing.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from collections import namedtuple
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace

import filelock
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import beta, binomtest, norm
from torch.utils.data import TensorDataset

ABSTAIN = -1
BOUNDS = ("one-sided", "two-sided")
CHUNK = 100             # noise is drawn for so many copies at once: other splits give other numbers

# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------

FLAGS = {                               # name: (value in the recipe digits, what it is, *choices)
    "recipe": ("digits", "n, skip and radii; a checkpoint's own unless named", "digits", "fashion",
               "mnist", "cifar10", "cifar10-transfer", "imagenet-base", "imagenet-large",
               "imagenet-huge", "other"),
    "sigma": (0.25, "standard deviation of the noise, pixels in [0, 1]; needed"),
    "procedure": ("fixed_n", "how many copies are drawn: n (Cohen's CERTIFY), or FILE.py:NAME"),
    "dataset": ("digits", "whose test images",
                "digits", "mnist", "fashion-mnist", "cifar10", "folder"),
    "size": (224, "side of a folder's pictures, pixels; a checkpoint has its own"),
    "n0": (100, "noisy copies that select the class"),
    "n": (10_000, "noisy copies that estimate its probability"),
    "alpha": (0.001, "chance that an image's certificate is wrong"),
    "skip": (3, "certify every SKIP-th test image"),
    "max": (0, "certify at most so many images; 0: all"),
    "bound": ("one-sided", "p_b = 1 - p_a, or from the rivals' counts", *BOUNDS),
    "radii": ((0.0, 0.25, 0.5, 0.75), "radii of the table, pixels; 0: accuracy"),
    "seed": (0, "of the noise; 0: a seed like any other"),
    "batch": (0, f"copies in a pass, a multiple or a divisor of {CHUNK}; 0: 400, of images of "
              "over 64 pixels on a CPU 100"),
    "device": ("auto", "where to run", "auto", "cpu", "cuda", "mps"),
    "dtype": ("auto", "auto: bf16 on GPUs that have it, else fp32", "auto", "fp32", "bf16"),
}
RUN_FLAGS = {                           # how to run: these may change when a run goes on
    "out": ("", "run directory; '': runs/RECIPE"),
    "checkpoint": ("", "fine-tuned classifier; '': OUT/finetune_sigma_SIGMA.pt"),
    "classifier": ("", "FILE.py:NAME, a callable from (B, C, H, W) in [0, 1] to logits, instead"),
    "data_path": ("data", "where the data set lies"),
    "compile": ("auto", "torch.compile a checkpoint; auto: on GPUs", "auto", "on", "off"),
    "shard": ("0/1", "I/K: this is job I of K, from 0, that share the images of a run"),
}
REPORT_FLAGS = {
    "report": (("",), "print the table of these TSVs, ours or others', instead"),
    "label": (("",), "names for the report's files, or for their folders"),
    "plot": ("", "draw the report's curves into this file"),
}
ANY = dict(n=100_000, skip=1, radii=(0.0, 0.25, 0.5, 0.75, 1.0))
FASHION = dict(skip=20, radii=(0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0))
IMAGENET = dict(skip=50, radii=(0.0, 0.5, 1.0, 1.5, 2.0, 3.0))           # as in the paper
RECIPES = {                             # what differs from the recipe digits
    "digits": dict(),
    "fashion": dict(FASHION, dataset="fashion-mnist"),
    "mnist": dict(FASHION, dataset="mnist"),
    "cifar10": dict(ANY, dataset="cifar10", skip=20),                    # every 20th, as Cohen
    "cifar10-transfer": dict(ANY, dataset="cifar10"),                    # all, as in the paper
    "imagenet-base": dict(IMAGENET, dataset="folder"),
    "imagenet-large": dict(IMAGENET, dataset="folder"),
    "imagenet-huge": dict(IMAGENET, dataset="folder"),
    "other": ANY,                       # a --classifier
}


def parse(argv):
    """(settings, checkpoint): what the flags say, else the checkpoint, else the recipe."""
    table = FLAGS | RUN_FLAGS | REPORT_FLAGS
    given = read_flags(__doc__, table, argv)
    values = {name: value for name, (value, *_) in table.items()}
    run_only = table.keys() - {*REPORT_FLAGS, "recipe", "radii", "bound"}
    odd = given.keys() & (run_only if "report" in given else REPORT_FLAGS.keys())
    if odd:
        refuse(f"--{min(odd)} {'means nothing to' if 'report' in given else 'needs'} --report")
    if "report" in given:
        radii = RECIPES[given.get("recipe", "digits")].get("radii", values["radii"])
        values |= {"bound": "", "label": (), "radii": radii}
        return argparse.Namespace(**values | given), None
    if "sigma" not in given:
        refuse("--sigma is needed")
    if "classifier" in given and "checkpoint" in given:
        refuse("either --checkpoint or --classifier")

    checkpoint, data, recipe = None, {}, given.get("recipe", "other")
    out = f"runs/{Path(given.get('classifier', '').split(':')[0]).stem}"
    if "classifier" not in given:
        from model import read_checkpoint

        out = given.get("out", f"runs/{given.get('recipe', 'digits')}")
        file = given.setdefault("checkpoint", f"{out}/finetune_sigma_{given['sigma']:g}.pt")
        checkpoint = read_checkpoint(file, "finetune")
        if checkpoint.get("sigma") != given["sigma"]:
            say(f"note: {file} was fine-tuned for sigma {checkpoint.get('sigma')}")
        data = {key: checkpoint["data"][key] for key in ("dataset", "data_path")}
        data["size"] = checkpoint["data"]["image_size"]
        recipe = given.get("recipe", checkpoint["settings"].get("recipe", "digits"))
        for key in ("dataset", "size"):
            if given.get(key, data[key]) != data[key]:
                refuse(f"--{key} {given[key]} contradicts {file}: {data[key]}")
    own = {"recipe": recipe, "out": out}
    args = argparse.Namespace(**values | RECIPES.get(recipe, ANY) | data | own | given)
    if args.batch and args.batch % CHUNK and CHUNK % args.batch:
        refuse(f"--batch must be a multiple or a divisor of {CHUNK}, not {args.batch}")
    shard = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    if not shard or int(shard[1]) >= int(shard[2]):
        refuse(f"--shard must be I/K with I from 0 to K - 1, not {args.shard}")
    return args, checkpoint


# --------------------------------------------------------------------------------------------------
# Bounds and radius
# --------------------------------------------------------------------------------------------------


def lower_confidence_bound(k, n, alpha):
    """p with P[p <= P(success)] >= 1 - alpha, after k successes in n independent trials.

    The alpha quantile of Beta(k, n - k + 1); 0 when k = 0, alpha^(1/n) when k = n. (Clopper &
    Pearson 1934; Cohen 2019, section 3.2.2, LowerConfBound.)
    (notebook 02, (2.3))
    """
    if k == 0:
        return 0.0
    return float(beta.ppf(alpha, k, n - k + 1))


def upper_confidence_bound(k, n, alpha):
    """p with P[P(success) <= p] >= 1 - alpha, after k successes in n independent trials.

    The 1 - alpha quantile of Beta(k + 1, n - k); 1 when k = n, 1 - alpha^(1/n) when k = 0.
    (notebook 02, (2.12))
    """
    if k == n:
        return 1.0
    return float(beta.isf(alpha, k + 1, n - k))


def runner_up_of(counts, top, n):
    """The largest count of another class than `top`. (notebook 02, (2.13))

    A copy of the n that is missing from `counts` (classes,) could be anybody's: it is added.
    """
    others = [int(count) for c, count in enumerate(counts) if c != top]
    return max(others, default=0) + n - sum(map(int, counts))


def two_sided_bounds(counts, top, n, alpha, share=0.9):
    """(p_a, p_b): p_a <= P[f = top], and P[f = c] <= p_b for all other c, both with 1 - alpha.

    A share of alpha is for the top class, the rest for its rivals, of which p_b has to cover one
    alone: the likeliest, c*. That is one class, whatever the counts turn out to be, and its count
    is at most the largest; the bound grows with the count, so p_b >= the Clopper-Pearson bound of
    c* >= P[f = c*]. No union over the rivals is needed. And p_b <= 1 - p_a in any case: where that
    is the smaller, a large share loses least. The share is fixed before the draws. (Cohen 2019,
    theorem 1, takes such a pair. Simultaneous bounds with a union over classes: Jia et al. 2020,
    arXiv 1912.09899.)
    (notebook 02, (2.13))
    """
    p_a = lower_confidence_bound(int(counts[top]), n, share * alpha)
    p_b = upper_confidence_bound(runner_up_of(counts, top, n), n, alpha - share * alpha)
    return p_a, min(p_b, 1 - p_a)


def certified_radius(p_a, sigma, p_b=None):
    """sigma/2 (Phi^-1(p_a) - Phi^-1(p_b)), or sigma Phi^-1(p_a) with p_b = 1 - p_a (theorem 1).

    p_a: lower bound of the top class's probability; p_b: upper bound of any other's. The radius is
    in pixels' units. (notebook 01, (1.6), (1.7))
    """
    if p_b is None:
        p_b = 1 - p_a
    return max(0.0, float(sigma / 2 * (norm.ppf(p_a) - norm.ppf(p_b))))


def round_down(radius):
    """To 6 decimals, and below the true value even if `radius` carries an error of 1e-9."""
    return max(0.0, math.floor((radius - 1e-9) * 1e6) / 1e6)


# --------------------------------------------------------------------------------------------------
# CERTIFY and PREDICT
# --------------------------------------------------------------------------------------------------


def fixed_n(index, x, sigma, n0, n, alpha, seed, radii, bound):
    """CERTIFY (Cohen 2019, section 3.2.2), as a generator that asks for counts.

    It yields (index, x, generator, copies) and is sent int64 counts (classes,) of that many noisy
    copies. In the end it returns (top, counts, n, {bound: (p_a, p_b)}); each pair holds with
    probability 1 - alpha by itself. (notebook 02, (2.5))
    """
    # n0 copies choose the class; of equals the first.
    selection = yield index, x, generator_for(seed, index, 0, x.device), n0
    top = int(selection.numpy().argmax())

    # n fresh copies count how often it wins.
    counts = yield index, x, generator_for(seed, index, 1, x.device), n
    p_a = lower_confidence_bound(int(counts[top]), n, alpha)
    two_sided = two_sided_bounds(counts, top, n, alpha)
    return top, counts, n, {"one-sided": (p_a, 1 - p_a), "two-sided": two_sided}


def certificate(top, p_a, p_b, sigma):
    """(prediction, radius): abstains unless `top` is certain to be the likeliest, p_a > p_b."""
    if p_a > p_b:
        return top, round_down(certified_radius(p_a, sigma, p_b))
    return ABSTAIN, 0.0


def certify(
    classifier, x, sigma, n0=100, n=100_000, alpha=0.001, seed=0, index=0, batch=CHUNK,
    bound="one-sided", any_range=False, procedure=fixed_n, radii=(),
):
    """CERTIFY for one image: (prediction, radius); (-1, 0.0) is an abstention.

        for index, x in enumerate(images):
            prediction, radius = certify(classifier, x, sigma=0.25, index=index)

    x (C, H, W) in [0, 1], on the device where it is to run; any_range: pixels have other units, and
    so has sigma. classifier: any callable from (B, C, H, W) to logits (B, classes), in eval mode.
    With probability at least 1 - alpha over the noise, g answers `prediction` wherever |d|_2 <
    radius. The noise's stream is that of (seed, index): GIVE EVERY IMAGE AN INDEX OF ITS OWN, or
    all share one noise and their certificates fail together. Nor may the image depend on the noise:
    who knows the seed can search for images that are certified falsely (of 6,000 points two were).
    Who serves certificates draws a fresh, secret seed. bound: "one-sided" (p_b = 1 - p_a, as
    published) or "two-sided" (p_b from the rivals' counts). (notebook 02, (2.5))
    """
    if bound not in BOUNDS:
        raise ValueError(f"bound must be one of {', '.join(BOUNDS)}, not {bound!r}")
    check_arguments(classifier, x, sigma, min(n0, n), alpha, any_range)
    how = (sigma, n0, n, alpha, seed, radii, bound, procedure, batch)
    ((_, _, top, _, _, bounds),) = certify_all(classifier, [(index, x)], *how)
    return certificate(top, *bounds[bound], sigma)


def predict(
    classifier, x, sigma, n=100_000, alpha=0.001, seed=0, index=0, batch=CHUNK, any_range=False
):
    """PREDICT (Cohen 2019, 3.2.1): g(x), or -1; wrong with chance <= alpha (notebook 02, (2.6))."""
    check_arguments(classifier, x, sigma, n, alpha, any_range)
    request = index, x, generator_for(seed, index, 2, x.device), n
    return clear_winner(count_under_noise(classifier, [request], sigma, batch)[0], alpha)


def clear_winner(counts, alpha):
    """The class with most counts, or -1 if a binomial test cannot tell (notebook 02, (2.6))."""
    order = counts.numpy().argsort(kind="stable")[::-1]
    first, second = int(counts[order[0]]), int(counts[order[1]])
    if binomtest(first, first + second, 0.5).pvalue > alpha:
        return ABSTAIN
    return int(order[0])


def check_arguments(classifier, x, sigma, copies, alpha, any_range):
    """Refuse what is no image (C, H, W) in [0, 1], no probability, no network in eval mode."""
    if not sigma > 0 or copies < 1 or not 0 < alpha < 1:
        raise ValueError("sigma and the numbers of copies must be positive, and alpha between 0 "
                         f"and 1, not {sigma}, {copies} and {alpha}")
    if getattr(classifier, "training", False):
        raise ValueError("the classifier is in training mode: call its eval()")
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.ndim != 3:
        found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"x must be one image, a float tensor (C, H, W) in [0, 1], not {found}")
    low, high = float(x.min()), float(x.max())
    if not any_range and not (low >= -0.5 and high <= 1.5):
        raise ValueError(f"x has pixels from {low:g} to {high:g}, not in [0, 1]: let f normalise "
                         "them, or say any_range=True")


# --------------------------------------------------------------------------------------------------
# Counting
# --------------------------------------------------------------------------------------------------


def generator_for(seed, index, phase, device):
    """The random stream of (image, phase): 0 selects, 1 estimates, 2 predicts, 3 fingerprints.

    Injective into 32 bits for one seed, since the CPU generator looks at no more: two images never
    share their noise. (notebook 02, (2.8))
    """
    key = 4 * index + phase
    if not 0 <= key < 2**32 or not 0 <= seed < 2**32:
        raise ValueError(f"seed and 4 * index must be from 0 to {2**32 - 1}, not {seed}, {key}")
    for word in (seed, 0x9E3779B9):                  # each line is a bijection of 32-bit numbers
        key = (key + word * 0x85EBCA6B) % 2**32
        key = (key ^ (key >> 16)) * 0x7FEB352D % 2**32
        key = (key ^ (key >> 15)) * 0x846CA68B % 2**32
        key ^= key >> 16
    return torch.Generator(device).manual_seed(key)


def logits_of(output, copies):
    """The logits (B, classes) in what a network returns: it, its .logits, or a tuple's first."""
    output = getattr(output, "logits", output)
    if isinstance(output, tuple | list) and output:
        output = output[0]
    shape = tuple(getattr(output, "shape", ()))
    if not isinstance(output, torch.Tensor) or len(shape) != 2 or len(output) != copies:
        raise ValueError(f"the classifier must return logits of shape ({copies}, classes), not "
                         f"{type(output).__name__} {shape}")
    if shape[1] == 1:
        raise ValueError("the classifier returns a single logit, so that every image would be of "
                         "class 0; of a binary score s make torch.cat([-s, s], dim=1)")
    return output


def votes_of(logits):
    """Logits (B, classes) -> one-hot answers (B, classes + 1); of equals the first class wins.

    The last column is for no answer: the largest logit is NaN or infinite. (Minus infinity masks a
    class.)
    """
    largest, answers = logits.max(dim=1)                                     # B, B
    classes = logits.shape[1]
    return F.one_hot(torch.where(largest.isfinite(), answers, classes), classes + 1)


@torch.no_grad()
def count_under_noise(classifier, requests, sigma, batch=CHUNK):
    """How often f answers each class on noisy copies x + sigma N(0, I): int64 (requests, classes).

    requests: [(index, x (C, H, W), generator, copies), ...]. Noise is drawn for CHUNK copies at a
    time, and f always sees `batch` copies, the last batch padded: so the counts of a request do not
    depend on the others. They stay on the device: the end is the only synchronisation.
    (notebook 01, (1.1))
    """
    if batch % CHUNK and CHUNK % batch:
        raise ValueError(f"batch must be a multiple or a divisor of {CHUNK}, not {batch}")
    chunks = [(row, min(CHUNK, copies - first)) for row, (*_, copies) in enumerate(requests)
              for first in range(0, copies, CHUNK)]

    # A pass has room for so many chunks.
    _, x, _, _ = requests[0]
    room = max(1, batch // CHUNK)
    precise = torch.promote_types(x.dtype, torch.float32)
    noisy = torch.zeros(room * CHUNK, *x.shape, device=x.device, dtype=precise)       # B C H W
    counts = [0] * len(requests)
    for first in range(0, len(chunks), room):
        these = chunks[first:first + room]
        for part, (row, _) in zip(noisy.split(CHUNK), these, strict=False):
            _, image, generator, _ = requests[row]
            torch.randn(part.shape, generator=generator, out=part).mul_(sigma).add_(image)
        pieces = noisy.to(x.dtype).split(batch)
        votes = torch.cat([votes_of(logits_of(classifier(z), len(z))) for z in pieces])
        for part, (row, wanted) in zip(votes.split(CHUNK), these, strict=False):
            counts[row] = counts[row] + part[:wanted].sum(dim=0)
    counts = torch.stack(counts).cpu()                                       # requests classes+1

    for (index, *_, copies), unusable in zip(requests, counts[:, -1].tolist(), strict=True):
        if unusable:
            raise FloatingPointError(f"image {index}: {unusable} of {copies} noisy copies got NaN "
                                     "or infinite logits; no certificate rests on them (try fp32)")
    return counts[:, :-1]


def certify_all(
    classifier, images, sigma, n0, n, alpha, seed=0, radii=(), bound="one-sided",
    procedure=fixed_n, batch=CHUNK,
):
    """CERTIFY for many images (index, x) at once: their copies share full batches.

    Yields (index, seconds, top, counts, n, bounds) of each image when its procedure returns.
    """
    images = iter(images)
    room = max(1, batch // CHUNK) * (1 if procedure is fixed_n else 4)       # some stop early
    pool = []                                                  # of (trial, its request, seconds)
    while True:
        for index, x in itertools.islice(images, room - len(pool)):
            trial = procedure(index, x, sigma, n0, n, alpha, seed, radii, bound)
            pool.append((trial, next(trial), 0.0))
        if not pool:
            return
        start = time.time()
        requests = [request for _, request, _ in pool]
        counts = count_under_noise(classifier, requests, sigma, batch)
        pace = (time.time() - start) / sum(copies for *_, copies in requests)
        going = []
        for (trial, request, seconds), row in zip(pool, counts, strict=True):
            index, *_, copies = request
            seconds += pace * copies
            try:
                going.append((trial, trial.send(row), seconds))
            except StopIteration as end:
                yield index, seconds, *end.value
        pool = going


# --------------------------------------------------------------------------------------------------
# Reports
# --------------------------------------------------------------------------------------------------

COLUMNS = [
    "idx", "label", "predict", "radius", "correct", "time",    # Cohen's
    "count", "n", "sigma", "alpha",                            # of the selected class; draws
    "top", "runner_up", "classes",                             # that class; largest other count
    "one_sided", "two_sided",                                  # radii by the bounds, -1: abstains
]


def read_log(path):
    """The rows of a TSV, ours or in Cohen's format, as a numpy record array with those columns.

    An incomplete last row is left out; what else is wrong is named.
    """
    if "_shard_" in Path(path).name:
        refuse(f"{path} is a part of a run: concatenate the parts into one file")
    lines = Path(path).read_text("utf-8-sig", "replace").splitlines(keepends=True)
    header = lines[0].rstrip().split("\t") if lines else []
    if header[:5] != COLUMNS[:5]:
        refuse(f"{path} is no certification log: it must begin with {' '.join(COLUMNS[:5])}")
    rows = []
    for number, line in enumerate(lines, 1):
        cells = line.rstrip("\r\n").split("\t")
        if not line.strip() or cells == header:
            continue
        if len(cells) == len(header):
            rows.append(line)
        elif number < len(lines) or line.endswith("\n"):
            refuse(f"{path}, line {number}: {len(cells)} columns, not {len(header)}")
    if not rows:
        refuse(f"{path} has no rows")
    kinds = [(name, "U32" if name == "time" else float) for name in header]
    table = np.genfromtxt(rows, kinds, None, "\t", ndmin=1, encoding="utf-8")

    for name in {*header} & {*COLUMNS[:4], "sigma", "top", "one_sided", "two_sided"}:
        broken = ~np.isfinite(table[name])
        if broken.any():
            refuse(f"{path}: {name} is no number in row {rows[broken.argmax()].strip()!r}")
    if len(np.unique(table["idx"])) < len(np.unique(table[["idx", "label", "predict", "radius"]])):
        refuse(f"{path} has an image twice, with other values")
    return table[np.unique(table["idx"], return_index=True)[1]]


def read_curve(path, bound="one-sided", name=""):
    """The curve_of() a log of one sigma, which is in its rows or in its path."""
    rows = read_log(path)
    if "sigma" in rows.dtype.names:
        sigmas = {*rows["sigma"].tolist()}
    else:
        named = re.findall(r"(?:sigma|noise)_(\d+(?:\.\d+)?)(?!\.?\d|_)", str(path))
        sigmas = {float(sigma) for sigma in named[-1:]}
    if len(sigmas) != 1 or not min(sigmas) > 0:
        refuse(f"{path} must have one sigma, in its rows or its path (sigma_0.25); it has "
               f"{len(sigmas)}")
    if bound != "one-sided" and "two_sided" not in rows.dtype.names:
        refuse(f"{path} has no counts of other classes: its radii are one-sided")
    return curve_of(rows, sigmas.pop(), bound, name)


def curve_of(rows, sigma, bound="one-sided", name=""):
    """Rows of read_log() as a report takes them: right is who predicts the label.

    (`correct` is not read: some published scripts write a running count there.)
    (notebook 05, (5.2))
    """
    predict, radius = rows["predict"], rows["radius"]
    column = bound.replace("-", "_")
    if column in rows.dtype.names:
        predict = np.where(rows[column] >= 0, rows["top"], ABSTAIN)
        radius = np.maximum(rows[column], 0)
    right = (predict == rows["label"]) & (predict != ABSTAIN)
    return SimpleNamespace(
        name=name,
        bound=bound,
        sigma=sigma,
        images=len(rows),
        radius=np.where(right, radius, 0),                     # in the order of the rows
        radii=np.sort(radius[right]),                          # of the images that are right
        acr=radius[right].sum() / len(rows),                   # average certified radius
        abstained=(predict == ABSTAIN).mean(),
    )


def certified_accuracy(curve, r):
    """The share of images that are right with radius >= r (notebook 05, (5.2))."""
    return float((curve.radii >= r).sum() / curve.images)


def read_curves(files, labels=(), bound=""):
    """A curve for each file, or two where no bound is named and the log has both."""
    folders = list(dict.fromkeys(Path(file).parent for file in files))
    if labels and len(labels) not in (len(files), len(folders)):
        refuse(f"--label needs a name for each of {len(files)} files or {len(folders)} folders")
    curves = []
    for i, file in enumerate(files):
        place = folders.index(Path(file).parent)
        name = str(folders[place]) if len(folders) > 1 else ""
        if labels:
            name = labels[i if len(labels) == len(files) else place]
        both = not bound and "two_sided" in read_log(file).dtype.names
        for one in BOUNDS if both else [bound or "one-sided"]:
            curves.append(read_curve(file, one, name))
    return sorted(curves, key=lambda curve: (curve.name, curve.sigma))


def table(curves, radii):
    """Certified accuracy in % at each radius, of each curve and the best over sigma: markdown."""
    columns = [f"r={r:g}" for r in radii]
    lines = [["run", "sigma", "bound", "images", *columns, "ACR", "abstain"]]
    groups = {}
    for one in curves:
        groups.setdefault((one.name, one.bound), []).append(one)
        accuracy = [f"{100 * certified_accuracy(one, r):.1f}" for r in radii]
        about = [f"{one.acr:.3f}", f"{one.abstained:.1%}"]
        lines.append([one.name, f"{one.sigma:g}", one.bound, str(one.images), *accuracy, *about])
    for (name, bound), group in groups.items():
        if len({one.sigma for one in group}) > 1:
            best = [max(certified_accuracy(one, r) for one in group) for r in radii]
            accuracy = [f"{100 * share:.1f}" for share in best]
            lines.append([name, "best", bound, "", *accuracy, "", ""])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [" | ".join(map(str.rjust, line, widths)) for line in lines]
    return "\n".join(f"| {line} |" for line in padded)


def report(files, radii, labels=(), bound="", picture=""):
    """Print the table of TSVs, and draw their curves."""
    curves = read_curves(files, labels, bound)
    if picture:
        plot(picture, curves)
    print(table(curves, radii), flush=True)


def plot(path, curves):
    """Certified accuracy over the radius; two-sided dashed. Returns the figure's axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4))
    axis = figure.subplots()
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
    known = list(dict.fromkeys((one.name, one.sigma) for one in curves))
    for one in curves:
        r = np.linspace(0, max(0.1, *one.radii * 1.02, 0.1), 500)
        accuracy = [100 * certified_accuracy(one, x) for x in r]
        colour = colours[known.index((one.name, one.sigma)) % len(colours)]
        style = "--" if one.bound == "two-sided" else "-"
        words = [f"$\\sigma$ = {one.sigma:g}", one.name, one.bound if style == "--" else ""]
        axis.plot(r, accuracy, style, color=colour, label=" ".join(filter(None, words)))
    axis.set(xlabel="certified $\\ell_2$ radius (pixels in [0, 1])", xlim=(0, None))
    axis.set(ylabel="certified accuracy (%)", ylim=(0, 100))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")
    return axis


# --------------------------------------------------------------------------------------------------
# The base classifier
# --------------------------------------------------------------------------------------------------


def open_procedure(name):
    """(fixed_n, ""), or what FILE.py:NAME names, and the file's sha256."""
    if name == "fixed_n":
        return fixed_n, ""
    plug, sha256 = open_plug(name, "--procedure")

    def procedure(*arguments):
        with users_file(f"--procedure {name}"):
            return (yield from plug(*arguments))

    return procedure, sha256


def open_classifier(args, checkpoint, device):
    """f as it is run, in the precision of --dtype: (B, C, H, W) in [0, 1] -> (B, classes)."""
    if args.classifier:
        network, _ = open_plug(args.classifier, "--classifier")
    else:
        network = rebuild(checkpoint, args.checkpoint)
        if args.compile == "on" or (args.compile == "auto" and device.type == "cuda"):
            network.compile()
    if isinstance(network, torch.nn.Module):
        network.to(device)
    with contextlib.suppress(Exception):                       # where there is an eval() that works
        network.eval()

    def f(z):
        where = f"{args.classifier}, given images {tuple(z.shape)} of --dataset {args.dataset}"
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16")
        with autocast, users_file(where):
            output = network(z)
        return logits_of(output, len(z))

    return f


def rebuild(checkpoint, file):
    """The classifier of a checkpoint of finetune.py."""
    from model import VisionTransformer, load_weights

    model = VisionTransformer(**checkpoint["config"])
    load_weights(model, checkpoint["model"], file)
    return model


def alike(logits, others, dtype):
    """Whether they differ by rounding at most, next to their spread."""
    logits, others = (torch.as_tensor(z).float().nan_to_num(0, 0, 0) for z in (logits, others))
    if logits.shape != others.shape:
        return False
    spread = logits.max() - logits.min()
    return bool((logits - others).abs().max() <= {"fp32": 0.002, "bf16": 0.02}[dtype] * spread)


@torch.no_grad()
def check_function(f, x, sigma, batch, generator, dtype):
    """Refuse an f whose answers depend on the rest of the batch, or on chance; returns logits of x.

    f is asked three times about one batch of noisy copies of x (C, H, W), the second half of which
    is black the second time and random the third. That tells training mode, BatchNorm on the
    batch's statistics and dropout, wherever they hide.
    """
    noise = torch.randn(batch, *x.shape, generator=generator, device=x.device)
    random = torch.rand(batch, *x.shape, generator=generator, device=x.device)
    kept = batch - batch // 2
    copies = x + sigma * noise                                               # B C H W
    logits = f(copies)                                                       # B classes
    for others, what in ((torch.zeros_like(random), "black"), (random, "random")):
        again = f(torch.cat([copies[:kept], others[kept:]]))                 # B classes
        if not alike(logits[:kept], again[:kept], dtype):
            refuse(f"the classifier is no function of one image: its answers changed when other "
                   f"images of the batch became {what}. Put its networks into eval mode, where the "
                   "file is imported; BatchNorm needs running statistics")
    return logits


# --------------------------------------------------------------------------------------------------
# Certification of a data set. Processes never talk: each appends to a part file of its own, and
# whoever finds all rows merges.
# --------------------------------------------------------------------------------------------------


def row_of(index, label, seconds, top, counts, n, bounds, args):
    """The TSV's row of an image."""
    prediction, radius = certificate(top, *bounds[args.bound], args.sigma)
    row = [index, label, prediction, f"{radius:.6f}", int(prediction == label)]
    row += [timedelta(seconds=seconds), int(counts[top]), n, args.sigma, args.alpha]
    row += [top, runner_up_of(counts, top, n), len(counts)]
    for bound in BOUNDS:
        prediction, radius = certificate(top, *bounds[bound], args.sigma)
        row.append("-1" if prediction == ABSTAIN else f"{radius:.6f}")
    return "\t".join(map(str, row)) + "\n"


def parts_of(result):
    return sorted(result.parent.glob(f"{result.name}.part*"))


def finished_rows(result):
    """{index: row} of all part files; of two rows the first counts, a torn one never."""
    rows = {}
    for part in parts_of(result):
        for line in part.read_text().splitlines(keepends=True):
            if line.endswith("\n") and line.count("\t") == len(COLUMNS) - 1:
                rows.setdefault(int(line.split("\t")[0]), line)
    return rows


def certify_part(part, trials, test, lock, args):
    """Append a row to the file `part` for each of the trials of certify_all()."""
    with lock:                                                 # others may be merging
        if part.exists():
            whole = part.read_bytes().rpartition(b"\n")
            os.truncate(part, len(whole[0] + whole[1]))        # what follows is a torn row
    with open(part, "a") as file:
        for index, *trial in trials:
            label = int(test.labels[index])                    # seen here first: all else is final
            file.write(row_of(index, label, *trial, args))
            file.flush()


def merge(result, chosen, lock, args):
    """Make the part files one file, if all rows are there, and show it."""
    with lock:
        finished = result.exists()
        if not finished:
            rows = finished_rows(result)
            if len(rows) < len(chosen):
                print(f"{len(rows)} of {len(chosen)} images are there", flush=True)
                return
            text = "\t".join(COLUMNS) + "\n" + "".join(rows[i] for i in chosen)
            write(result, lambda file: file.write(text.encode()))
            print(f"wrote {result}", flush=True)
        for part in parts_of(result):
            part.unlink()
    if not finished or RANK == 0:
        report([result], args.radii, picture=result.with_suffix(".png"))


def open_for_certification(args, checkpoint):
    """(f, test images, device); f is asked about test image 0, and args are completed."""
    device, args.dtype = pick_device(args.device, args.dtype)
    args.device = device.type
    channels = 3 if args.dataset in ("cifar10", "folder") else 1
    channels = checkpoint["data"]["channels"] if checkpoint else channels
    test = open_images(args.dataset, args.data_path, False, args.size, channels, "cpu")
    if not args.batch:
        args.batch = 4 * CHUNK if device.type == "cuda" or test.size <= 64 else CHUNK
    f = open_classifier(args, checkpoint, device)
    x = test.items[0][0].to(device) / test.white                             # C H W
    generator = generator_for(args.seed, 0, 3, device)
    logits = check_function(f, x, args.sigma, args.batch, generator, args.dtype)
    seen = torch.cat([logits[:8], logits.mean(dim=0, keepdim=True)])[:, :10]
    args.fingerprint = [[float(f"{z:.6g}") for z in row] for row in seen.tolist()]

    # Another order of classes would give wrong rows, silently: so it is printed.
    classes = test.classes
    say(f"{args.dataset}: classes {', '.join(classes[:12])}{', ...' if len(classes) > 12 else ''}")
    if logits.shape[1] != len(classes):
        refuse(f"the classifier has {logits.shape[1]} logits, --dataset {args.dataset} "
               f"{len(classes)} classes: name another, or a FILE.py:NAME that picks the columns")
    known = checkpoint["data"]["classes"] if checkpoint else classes
    if known != classes:
        odd = sorted({*known} ^ {*classes}) or ["their order"]
        refuse(f"{args.data_path} has other classes than the checkpoint: {', '.join(odd[:3])}")
    return f, test, device


def certify_dataset(args, checkpoint):
    """Certify every SKIP-th test image, or this process's share of them."""
    from tqdm import tqdm

    procedure, sha256 = open_procedure(args.procedure)
    f, test, device = open_for_certification(args, checkpoint)
    job, jobs = map(int, args.shard.split("/"))
    chosen = range(0, len(test.labels), args.skip)[:args.max or None]
    mine = chosen[job + RANK * jobs::jobs * WORLD]
    stem = f"{args.out}/certify_sigma_{args.sigma:g}"
    result = Path(f"{stem}.tsv")

    # The run's settings, and what others of its processes have left.
    settings = {name: getattr(args, name) for name in [*FLAGS, *RUN_FLAGS, "fingerprint"]}
    if procedure is fixed_n:
        del settings["radii"]                                  # the table's alone
    else:
        settings["procedure_sha256"] = sha256
    os.makedirs(args.out, exist_ok=True)
    lock_file = f"{args.out}/.{result.name}.lock"
    lock = filelock.FileLock(lock_file)
    with lock:
        if (result.exists() or parts_of(result)) and not Path(f"{stem}.json").exists():
            refuse(f"{stem}.json is missing, the settings of the rows in {result}*")
        earlier = begin(stem, settings, [*RUN_FLAGS, "fingerprint"])
        if not alike(earlier["fingerprint"], args.fingerprint, args.dtype):
            refuse(f"{stem} was begun by another classifier: its logits differ; use another --out")
        finished = finished_rows(result)

    if not result.exists():
        todo = [i for i in mine if i not in finished]
        say(f"{len(finished)} of {len(chosen)} images are there, {len(todo)} are for this process")
        images = ((i, test.items[i][0].to(device) / test.white) for i in todo)
        how = (args.sigma, args.n0, args.n, args.alpha, args.seed, args.radii, args.bound)
        trials = certify_all(f, images, *how, procedure, args.batch)
        bar = tqdm(trials, "certify", len(todo), disable=None if RANK == 0 else True)
        name = f"{job}-{jobs}-{RANK}-{WORLD}"
        with filelock.FileLock(f"{lock_file}{name}", blocking=False):
            certify_part(Path(f"{result}.part{name}"), bar, test, lock, args)
    merge(result, chosen, lock, args)


def main(argv=None):
    with one_line_errors():
        args, checkpoint = parse(argv)
        if checkpoint is None and not args.classifier:
            report(args.report, args.radii, args.label, args.bound, args.plot)
        else:
            certify_dataset(args, checkpoint)


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
