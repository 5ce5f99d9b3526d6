"""Stage 3: certify the smoothed classifier g(x) = argmax_c P[f(x + N(0, sigma^2 I)) = c] (Cohen, Rosenfeld, Kolter 2019).

    python certify.py --sigma 0.25                                      # digits, two CPU cores: about a minute
    python certify.py --sigma 0.25 --images mine.png                    # your own pictures
    torchrun --nproc_per_node=8 -- certify.py --sigma 0.5 --recipe imagenet-base --n 10000      # --: else torchrun eats --n
    python certify.py --sigma 0.5 --recipe cifar10 --shard 0/16         # one job of an array of 16
    python certify.py --sigma 0.5 --recipe cifar10 --sequential         # same guarantee, a fraction of the draws
    python certify.py --sigma 0.5 --classifier mine.py:f --dataset cifar10 --data-path data     # any network
    python certify.py --report runs/*/certify_sigma_*.tsv --plot curves.png --published cifar10

    from certify import certify
    prediction, radius = certify(classifier, x, sigma=0.25, n0=100, n=100_000, alpha=0.001)     # x: (C, H, W)

What a row of the result says: with probability at least 1 - alpha over the noise drawn for that image, either g abstained
or g answers `predict` on every x + d with |d|_2 < radius. To have all m rows true at once with 1 - alpha, run with
--alpha alpha/m. The theorem is about f exactly as it is run here: same dtype, same device, eval mode; deploy that.
The noise is pseudo-random, and in the default mode it is floating-point noise standing for real numbers, as in all
published work; --sound removes the second assumption. The label is never looked at until prediction and radius are final.

Same settings, same rows: the result for an image depends on (seed, image index, settings) alone, not on the number of
processes, their order, or interruptions. Bit for bit that holds on one type of CPU; on GPUs the kernel that is chosen may
depend on the batch and the device, so that a logit's last bits, and so a few counts in 100 000, may differ.
"""

import importlib.util
import itertools
import math
import re
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.special import betaincc, betaln
from scipy.stats import beta, binom, binomtest, norm
from tqdm import tqdm

from model import (
    INTERRUPT,
    Parser,
    Run,
    UsageError,
    VisionTransformer,
    choose,
    command,
    fit,
    gather,
    load_weights,
    number,
    open_images,
    open_picture,
    pick_dtype,
    read_checkpoint,
    require,
    run_flags,
    sha256,
    start_processes,
    write_atomically,
)

ABSTAIN = -1

# ---------------------------------------------------------------------------------------------------------------------
# From counts to a certificate
# ---------------------------------------------------------------------------------------------------------------------


def lower_confidence_bound(k, n, alpha):
    """Clopper-Pearson: p with P[p <= P(success)] >= 1 - alpha, after k successes in n independent trials.

    The alpha quantile of Beta(k, n - k + 1); 0 when k = 0, alpha^(1/n) when k = n. (Clopper & Pearson 1934; Cohen 2019,
    section 3.2.2, LowerConfBound.)
    """
    return 0.0 if k == 0 else float(beta.ppf(alpha, k, n - k + 1))


def certified_radius(p_a, sigma, p_b=None):
    """sigma/2 (Phi^-1(p_a) - Phi^-1(p_b)), or sigma Phi^-1(p_a) with p_b = 1 - p_a; 0 where p_a <= p_b (Cohen, theorem 1).

    p_a: lower bound of the top class's probability; p_b: upper bound of any other's. The radius is in units of pixels.
    """
    p_b = 1 - p_a if p_b is None else p_b
    return max(0.0, float(sigma / 2 * (norm.ppf(p_a) - norm.ppf(p_b))))


def round_down(radius):
    """To 6 decimals, and below the true value even if `radius` carries an error of 1e-9."""
    return max(0.0, math.floor((radius - 1e-9) * 1e6) / 1e6)


def log_e_value(k, n, p):
    """Log of the evidence against P[success] <= p after k successes in n trials: a test that may be looked at any time.

    E = integral over q in (p, 1] of (q/p)^k ((1-q)/(1-p))^(n-k) w(q) dq, w the Beta(1/2, 1/2) density restricted to (p, 1].
    For each q > p the likelihood ratio is multiplied, at the next trial, by q/p or (1-q)/(1-p); if P[success] = s <= p its
    mean is s q/p + (1-s)(1-q)/(1-p) <= 1, with equality at s = p. So the ratio, and its average E, is a non-negative
    supermartingale that starts at 1, and by Ville's inequality P[E ever reaches 1/alpha] <= alpha.
    """
    a, b = 0.5 + k, 0.5 + n - k
    with np.errstate(divide="ignore"):
        return (betaln(a, b) - betaln(0.5, 0.5) - k * np.log(p) - (n - k) * np.log1p(-p)
                + np.log(betaincc(a, b, p)) - np.log(betaincc(0.5, 0.5, p)))


def anytime_lower_bound(k, n, alpha):
    """The p where log_e_value(k, n, p) crosses log(1/alpha): P[p <= P(success), at every look] >= 1 - alpha."""
    low, high = 0.0, k / n                                            # k = 0: no evidence, 0
    for _ in range(60 if k else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if log_e_value(k, n, middle) >= -math.log(alpha) else (low, middle)
    return low


class FixedN:
    """Cohen's procedure: one look, after n draws."""

    def __init__(self, n, alpha):
        self.n, self.alpha = n, alpha

    def next_look(self, drawn):
        return self.n

    def decide(self, k, n, bound):
        """(lower bound of P[f = c_A], whether to stop) after k in n draws; `bound` is that of the look before."""
        return lower_confidence_bound(k, n, self.alpha), True


class Sequential:
    """Looks again and again, at most until n draws, and stops when the radii that a table asks for are settled.

    An image stops when the largest of `radii` is certified; when the next one up is futile, that is, the evidence against
    P[f = c_A] >= Phi(r / sigma) reaches 100 (this costs no alpha: the bounds hold wherever one stops); or when its radius
    is known to lie within `tolerance` of that r. Half of alpha is spent on the anytime bounds, which hold at all looks at
    once, so that their running maximum does; the other half on a Clopper-Pearson bound at n, for the images that get there.
    So all bounds hold with probability 1 - alpha, and images next to a radius of the table are not judged by the looser one.
    """

    def __init__(self, n, alpha, sigma, radii, tolerance=0.0, first=1000, growth=1.1, futility=100.0):
        self.n, self.alpha, self.sigma, self.tolerance = n, alpha, sigma, tolerance
        self.radii, self.first, self.growth, self.futility = sorted({0.0, *radii}), first, growth, futility

    def next_look(self, drawn):
        look = max(self.first, math.ceil(drawn * self.growth))
        return min(self.n, math.ceil(look / CHUNK) * CHUNK)

    def decide(self, k, n, bound):
        bound = max(bound, anytime_lower_bound(k, n, self.alpha / 2))
        if n >= self.n:
            bound = max(bound, lower_confidence_bound(k, n, self.alpha / 2))
        radius = self.sigma * norm.ppf(bound)                                             # negative while bound < 1/2
        above = [r for r in self.radii if r > radius]
        if not above or n >= self.n:
            return bound, True
        futile = log_e_value(n - k, n, norm.sf(above[0] / self.sigma)) >= math.log(self.futility)
        if futile or not self.tolerance or above[0] - radius > self.tolerance:
            return bound, futile
        most = self.sigma * norm.isf(anytime_lower_bound(n - k, n, 1 / self.futility))
        return bound, most - above[0] <= self.tolerance


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------

CHUNK = 100                         # noise is always drawn for this many copies at once: other splits give other numbers


def generator_for(seed, index, phase, device):
    """The random stream of one (image, phase): 0 selects, 1 estimates, 2 predicts. Injective into 32 bits for one seed,
    since the CPU generator looks at no more: two images never share their noise."""
    key = 4 * index + phase
    require(0 <= key < 2**32, f"image index {index} is too large")
    for word in (seed, 0x9E3779B9):                                   # each line is a bijection of 32-bit numbers
        key = (key + word * 0x85EBCA6B) % 2**32
        key = (key ^ (key >> 16)) * 0x7FEB352D % 2**32
        key = (key ^ (key >> 15)) * 0x846CA68B % 2**32
        key ^= key >> 16
    return torch.Generator(device).manual_seed(key)


class GaussianNoise:
    """x + sigma N(0, I) in floating point."""

    def __init__(self, sigma):
        self.sigma = sigma

    def admit(self, x):
        return x

    def __call__(self, x, generator, out):
        """Fill `out` (CHUNK, C, H, W) with noisy copies of x (C, H, W); returns which copies may count."""
        torch.randn(out.shape, generator=generator, out=out, device=out.device)
        out.mul_(self.sigma).add_(x)
        return True


class GridNoise:
    """round(x + sigma N(0, I)) on the grid 1/levels, exactly: the noise of --sound.

    For x on the grid, rounding x + e is x + round(e): integers, drawn by comparing 53 random bits with a table of the rounded
    Gaussian's cumulative probabilities. f after rounding is a base classifier like any other, so the theorem holds without
    real-number noise; a deployment must round after adding noise, and never clip. The table is known to a few units of its
    last place: a draw that those would decide is not counted for c_A.
    """

    BITS, SLACK = 53, 64                                              # 64 units: norm.cdf errs by fewer than 8, tested

    def __init__(self, sigma, levels, device):
        self.levels = levels
        reach = math.ceil(9 * sigma * levels)                                             # P[beyond] < 2^-53
        steps = np.arange(-reach, reach)
        table = np.round(norm.cdf((steps + 0.5) / (sigma * levels)) * 2**self.BITS).astype(np.int64)
        self.table, self.reach = torch.from_numpy(table).to(device), reach

    def admit(self, x):
        """x, if it is on the grid."""
        require((torch.round(x * self.levels) - x * self.levels).abs().max() < 1e-3,
                f"--sound needs images on the grid 1/{self.levels}")
        return x

    def __call__(self, x, generator, out):
        bits = torch.randint(2**self.BITS, out.shape, generator=generator, device=out.device)
        place = torch.searchsorted(self.table, bits, right=True)                          # table[place - 1] <= bits
        sure = ((bits - self.table[(place - 1).clamp(min=0)]).abs() > self.SLACK) \
            & ((bits - self.table[place.clamp(max=len(self.table) - 1)]).abs() > self.SLACK)
        out.copy_((torch.round(x * self.levels) + (place - self.reach)) / self.levels)
        return sure.flatten(1).all(dim=1)


@torch.inference_mode()
def count_classes(classifier, requests, noise, batch=CHUNK):
    """How often f answers each class on noisy copies: int64 (len(requests), classes) on the CPU.

    requests: [(x (C, H, W), generator, copies), ...]. All images' copies share batches, in chunks; every batch has the same
    shape, the last one padded. Counts stay on the device: this function's end is its only synchronisation.
    """
    if batch % CHUNK and CHUNK % batch:
        raise ValueError(f"the batch must be a multiple or a divisor of {CHUNK}, not {batch}")
    x = requests[0][0]
    chunks = [(row, request, min(CHUNK, request[2] - drawn))
              for row, request in enumerate(requests) for drawn in range(0, request[2], CHUNK)]
    slots = max(1, batch // CHUNK)
    copies = torch.zeros(slots * CHUNK, *x.shape, device=x.device, dtype=x.dtype)
    place, unused = torch.arange(CHUNK, device=x.device), len(requests)
    owner = torch.empty(slots * CHUNK, dtype=torch.int64, device=x.device)
    counts = None
    for first in range(0, len(chunks), slots):
        owner.fill_(unused)                                           # the row of copies that do not count
        for slot, (row, (image, generator, _), valid) in enumerate(chunks[first:first + slots]):
            part = slice(slot * CHUNK, (slot + 1) * CHUNK)
            sure = noise(image, generator, copies[part])
            owner[part] = torch.where((place < valid) & sure, row, unused)
        logits = torch.cat([classifier(piece) for piece in copies.split(batch)])          # slots*CHUNK classes
        if counts is None:
            counts = torch.zeros((unused + 1) * logits.shape[1], dtype=torch.int64, device=x.device)
        counts.scatter_add_(0, owner * logits.shape[1] + logits.argmax(dim=1), torch.ones_like(owner))
    return counts.view(unused + 1, -1)[:-1].cpu()


class Trial:
    """One image on its way to a certificate."""

    def __init__(self, index, x, seed):
        self.index, self.x, self.seconds = index, x, 0.0
        self.streams = [generator_for(seed, index, phase, x.device) for phase in (0, 1)]
        self.top, self.k, self.n, self.bound, self.done = None, 0, 0, 0.0, False

    def request(self, n0, rule):
        if self.top is None:
            return self.x, self.streams[0], n0
        return self.x, self.streams[1], rule.next_look(self.n) - self.n

    def absorb(self, counts, rule):
        if self.top is None:
            self.top = int(counts.numpy().argmax())                   # the first of the most frequent
            return
        self.k, self.n = self.k + int(counts[self.top]), rule.next_look(self.n)
        self.bound, self.done = rule.decide(self.k, self.n, self.bound)

    def certificate(self, sigma):
        """(prediction, radius): abstains unless P[f = c_A] > 1/2 is certain."""
        radius = round_down(certified_radius(self.bound, sigma)) if self.bound > 0.5 else 0.0
        return (self.top, radius) if self.bound > 0.5 else (ABSTAIN, 0.0)


def certify_all(classifier, images, noise, n0, rule, seed=0, batch=CHUNK):
    """CERTIFY (Cohen 2019, section 3.2.2) for many images (index, x) at once; yields each Trial when it is done.

    n0 copies choose a class c_A; fresh ones count how often it wins; `rule` says how many, and bounds its probability.
    """
    images, pool = iter(images), []
    room = max(1, 4 * batch // CHUNK) if isinstance(rule, Sequential) else max(1, batch // CHUNK)
    while True:
        pool += [Trial(index, noise.admit(x), seed) for index, x in itertools.islice(images, room - len(pool))]
        if not pool:
            return
        start, requests = time.time(), [trial.request(n0, rule) for trial in pool]
        counts = count_classes(classifier, requests, noise, batch)
        for trial, (_, _, copies), row in zip(pool, requests, counts, strict=True):
            trial.seconds += (time.time() - start) * copies / sum(request[2] for request in requests)
            trial.absorb(row, rule)
        yield from (trial for trial in pool if trial.done)
        pool = [trial for trial in pool if not trial.done]


def certify(classifier, x, sigma, n0=100, n=100_000, alpha=0.001, seed=0, index=0, batch=CHUNK):
    """(prediction, radius) for one image x (C, H, W) in [0, 1], on x's device; (-1, 0.0) is an abstention.

    classifier: any callable from (B, C, H, W) to logits (B, classes). With probability at least 1 - alpha over the noise
    (its stream is that of seed and index), g answers `prediction` wherever |d|_2 < radius. Put it into eval mode before.
    Give every image an `index` of its own: images that share one share their noise.
    """
    (trial,) = certify_all(classifier, [(index, x)], GaussianNoise(sigma), n0, FixedN(n, alpha), seed, batch)
    return trial.certificate(sigma)


def predict(classifier, x, sigma, n=100_000, alpha=0.001, seed=0, index=0, batch=CHUNK, noise=None):
    """PREDICT (Cohen 2019, section 3.2.1): g(x), or -1 unless a two-sided binomial test tells the top two counts apart."""
    request = x, generator_for(seed, index, 2, x.device), n
    counts = count_classes(classifier, [request], noise or GaussianNoise(sigma), batch)[0]
    order = counts.numpy().argsort(kind="stable")[::-1]
    first, second = (int(counts[c]) for c in order[:2])
    return int(order[0]) if binomtest(first, first + second, 0.5).pvalue <= alpha else ABSTAIN


# ---------------------------------------------------------------------------------------------------------------------
# Reports
# ---------------------------------------------------------------------------------------------------------------------

PUBLISHED = {                       # certified accuracy in %, best over sigma, at each radius: the paper's tables 1 and 3
    "imagenet": ((0.5, 1.0, 1.5, 2.0, 3.0), {
        "RS (Cohen 2019)": (49.0, 37.0, 29.0, 19.0, 12.0),
        "SmoothAdv (Salman 2019)": (54.0, 43.0, 37.0, 27.0, 20.0),
        "Consistency (Jeong & Shin 2020)": (50.0, 44.0, 34.0, 24.0, 17.0),
        "MACER (Zhai 2021)": (57.0, 43.0, 31.0, 25.0, 14.0),
        "Boosting (Horvath 2022)": (57.0, 44.6, 38.4, 28.6, 20.2),
        "SmoothMix (Jeong 2021)": (50.0, 43.0, 38.0, 26.0, 17.0),
        "Diffusion + BEiT (Carlini 2022)": (71.1, 54.3, 38.1, 29.5, 13.1),
        "DMAE ViT-B": (69.6, 57.9, 47.8, 35.4, 22.5),
        "DMAE ViT-L": (73.6, 64.6, 53.7, 41.5, 27.5)}),
    "cifar10": ((0.25, 0.5, 0.75, 1.0), {
        "RS (Cohen 2019)": (61.0, 43.0, 32.0, 23.0),
        "SmoothAdv (Salman 2019)": (74.8, 60.8, 47.0, 37.8),
        "Consistency (Jeong & Shin 2020)": (68.8, 58.1, 48.5, 37.8),
        "MACER (Zhai 2021)": (71.0, 59.0, 46.0, 38.0),
        "Boosting (Horvath 2022)": (70.6, 60.4, 52.4, 38.8),
        "SmoothMix (Jeong 2021)": (67.9, 57.9, 47.7, 37.2),
        "Diffusion (Carlini 2022)": (79.3, 65.5, 48.7, 35.5),
        "DMAE ViT-B": (79.2, 64.6, 47.3, 36.1),
        "DMAE ViT-B, continued": (80.8, 67.1, 49.7, 37.7)}),
}
COLUMNS = ["idx", "label", "predict", "radius", "correct", "time", "count", "n", "sigma", "alpha"]     # the first six: Cohen's


def read_rows(path):
    """The complete rows of a TSV, ours or in Cohen's format, as dicts."""
    try:
        lines = Path(path).read_text().split("\n")[:-1]               # what follows the last newline is a torn row
        header = lines[0].split("\t")
        require(header[:5] == COLUMNS[:5], f"{path} is not a certification log")
        kinds = dict(idx=int, label=int, predict=int, correct=int, count=int, n=int, time=str)
        rows = [{key: kinds.get(key, float)(value) for key, value in zip(header, line.split("\t"), strict=True)}
                for line in lines[1:]]
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, IndexError) as error:
        raise UsageError(f"{path} is not a certification log: {error}") from None
    named = re.findall(r"(?:sigma|noise)_?(\d+(?:\.\d+)?)", str(path))
    require("sigma" in header or named, f"{path} does not say its sigma: put it into its path, as in sigma_0.25")
    return [{"sigma": float(named[-1]) if named else None, "alpha": 0.001} | row for row in rows]


def excess(m, alpha, rho=0.001):
    """q: with probability 1 - rho at most q of m certificates are wrong, each with chance <= alpha: a binomial quantile.

    (Cohen 2019, appendix, bounds the same by Bernstein's inequality.)
    """
    return int(binom.ppf(1 - rho, m, alpha))


class Summary:
    """The table's numbers for certificates that share a sigma."""

    def __init__(self, rows):
        self.m, self.alpha, self.sigma = len(rows), max(row["alpha"] for row in rows), rows[0]["sigma"]
        self.radii = np.sort([row["radius"] for row in rows if row["correct"]])
        self.acr = self.radii.sum() / self.m                          # average certified radius; wrong ones count 0
        self.abstained = sum(row["predict"] == ABSTAIN for row in rows) / self.m
        times = [[float(part) for part in re.findall(r"[\d.]+", row["time"])] for row in rows]       # d, h:mm:ss or seconds
        self.seconds = float(np.mean([np.dot(time, [86400, 3600, 60, 1][-len(time):]) for time in times]))
        self.draws = sum(row.get("n", 0) for row in rows)

    def right(self, r):
        """How many are right with radius >= r."""
        return len(self.radii) - int(np.searchsorted(self.radii, r))

    def accuracy(self, r):
        return self.right(r) / self.m

    def guaranteed(self, r):
        """Lower bound, at 99.9 %, of the share of these images on which g is right within r."""
        return max(0, self.right(r) - excess(self.m, self.alpha)) / self.m


def summarise(files):
    """One Summary for each sigma of the files; rows of one image that stand twice (shards that overlap) count once."""
    rows = {}
    for path in files:
        for row in read_rows(path):
            key = row["sigma"], row["idx"]
            same = rows.setdefault(key, row)
            require(all(same[column] == row[column] for column in COLUMNS[:5]),
                    f"{path} contradicts another file on image {row['idx']} at sigma {row['sigma']:g}")
    groups = [list(group) for _, group in itertools.groupby(sorted(rows.values(), key=lambda row: row["sigma"]),
                                                           key=lambda row: row["sigma"])]
    require(groups, "there are no rows to report")
    return [Summary(group) for group in groups]


def table(summaries, radii, kind="text"):
    """Certified accuracy in % at each radius, for each sigma and the best over them."""
    lines = [["sigma", "images", *(f"r={r:g}" for r in radii), "ACR", "abstain", "s/image"]]
    for one in summaries:
        lines.append([f"{one.sigma:g}", f"{one.m}", *(f"{100 * one.accuracy(r):.1f}" for r in radii), f"{one.acr:.3f}",
                      f"{100 * one.abstained:.1f}%", f"{one.seconds:.2f}"])
    if len(summaries) > 1:
        lines.append(["best", "", *(f"{100 * max(one.accuracy(r) for one in summaries):.1f}" for r in radii), "", "", ""])
    for one in summaries:
        lines.append([f"{one.sigma:g}", "proven*", *(f"{100 * one.guaranteed(r):.1f}" for r in radii), "", "", ""])
    if kind == "csv":
        return "\n".join(",".join(line) for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    edge, bar = ("| ", " | ") if kind == "markdown" else ("", "  ")
    lines = [edge + bar.join(map(str.rjust, line, widths)) + edge[::-1] for line in lines]
    if kind == "markdown":
        lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines) + ("\n\n" if kind == "markdown" else "\n") + \
        "* certified accuracy in % less what the certificates' own errors may add, at 99.9 % confidence"


def plot(path, summaries, published=None):
    """Certified accuracy over the radius, with its lower bound; with the paper's baselines as marks."""
    figure = Figure(figsize=(6.4, 4))
    axis = figure.subplots()
    kinds = figure.canvas.get_supported_filetypes()
    require(Path(path).suffix[1:] in kinds, f"cannot draw {path}: its name must end in one of {', '.join(kinds)}")
    for one, colour in zip(summaries, itertools.cycle(("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"))):
        r = np.linspace(0, max(0.1, *one.radii * 1.02) if len(one.radii) else 0.1, 500)
        axis.plot(r, [100 * one.accuracy(x) for x in r], color=colour, label=f"$\\sigma$ = {one.sigma:g}")
        axis.fill_between(r, [100 * one.guaranteed(x) for x in r], [100 * one.accuracy(x) for x in r], color=colour, alpha=0.2,
                          linewidth=0)
    if published:
        radii, methods = PUBLISHED[published]
        for (name, values), mark in zip(methods.items(), "os^vDX*Ph", strict=True):
            axis.plot(radii, values, mark, color="0.35", markersize=5, fillstyle="none", label=name)
    axis.set(xlabel="certified $\\ell_2$ radius (pixels in [0, 1])", ylabel="certified accuracy (%)", ylim=(0, 100))
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    if published:
        axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))                # a long list: beside the curves
    else:
        axis.legend(fontsize=9)
    figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------

RECIPES = {                         # by the recipe that the checkpoint was made with; any classifier: "other"
    "digits": dict(n=10_000, skip=3, radii=(0.0, 0.25, 0.5, 0.75)),
    "cifar10": dict(n=100_000, skip=20, radii=(0.0, 0.25, 0.5, 0.75, 1.0)),               # Cohen: every 20th image
    "cifar10-transfer": dict(n=100_000, skip=1, radii=(0.0, 0.25, 0.5, 0.75, 1.0)),       # the paper: all of them
    **dict.fromkeys(("imagenet-base", "imagenet-large", "imagenet-huge"),
                    dict(n=10_000, skip=50, radii=(0.0, 0.5, 1.0, 1.5, 2.0, 3.0))),       # the paper: every 50th
    "other": dict(n=100_000, skip=1, radii=(0.0, 0.25, 0.5, 0.75, 1.0)),
}
SHAPES = {"digits": (8, 1), "cifar10": (32, 3), "folder": (224, 3)}                       # for --classifier
FREE = {"data_path", "out", "checkpoint", "classifier", "resume", "overwrite", "plot", "published", "format"}


def parse(argv):
    """(arguments, checkpoints). Data set and recipe come from the checkpoint."""
    first = Parser(add_help=False)
    first.add_argument("--sigma", type=number(float, above=0))
    for name in ("--recipe", "--out", "--classifier"):
        first.add_argument(name)
    first.add_argument("--checkpoint", nargs="+")
    early = first.parse_known_args(argv)[0]
    choose("recipe", early.recipe or "digits", RECIPES)
    other = {"-h", "--help", "--report"} & {*argv} or early.classifier or early.sigma is None
    out = early.out or f"runs/{early.recipe or 'digits'}"
    files = [] if other else early.checkpoint or [f"{out}/finetune_sigma_{early.sigma:g}.pt"]
    checkpoints = [read_checkpoint(file, "finetune") for file in files]
    made_with = checkpoints[0]["settings"] if checkpoints else {}
    recipe = early.recipe or made_with.get("recipe", "other" if early.classifier else "digits")
    inherited = checkpoints[0]["data"] if checkpoints else {}
    defaults = {key: inherited[key] for key in ("dataset", "data_path", "image_size") if key in inherited}

    parser = Parser(__doc__, dict(dataset="digits") | RECIPES.get(recipe, RECIPES["other"]) | defaults | dict(
        recipe=recipe, checkpoint=files, out=early.out or f"runs/{Path(early.classifier.split(':')[0]).stem}"
        if early.classifier and not early.out and not early.recipe else out))
    positive, chance = number(int, least=1), number(float, above=0, below=1)
    parser.flag("--sigma", number(float, above=0), "standard deviation of the noise, pixels in [0, 1]")
    parser.flag("--checkpoint", str, "fine-tuned classifier; the logits of several are averaged", nargs="+")
    parser.flag("--classifier", str, "FILE.py:NAME, a callable from (B, C, H, W) in [0, 1] to logits, instead of a checkpoint")
    parser.flag("--recipe", str, ", ".join(RECIPES))
    parser.flag("--dataset", str, "digits, cifar10 or folder")
    parser.flag("--data-path", str, "where the data set lies")
    parser.flag("--image-size", positive, "side of the images, pixels")
    parser.flag("--n0", positive, "noisy copies that select the class", default=100)
    parser.flag("--n", positive, "noisy copies that estimate its probability; at most, if --sequential")
    parser.flag("--alpha", chance, "chance that an image's certificate is wrong", default=0.001)
    parser.flag("--seed", number(int, least=0), "of the noise", default=0)
    parser.flag("--skip", positive, "certify every SKIP-th test image")
    parser.flag("--max", positive, "certify at most so many")
    parser.flag("--shard", str, "I/K: certify the I-th of K parts (from 0), for job arrays; --report merges them")
    parser.flag("--radii", number(float, least=0), "radii of the table, and that --sequential settles", nargs="+")
    parser.flag("--sequential", bool, "stop drawing once the radii of the table are settled", default=False)
    parser.flag("--boundary-tolerance", number(float, least=0), "let --sequential stop this near a radius", default=0.0)
    parser.flag("--sound", bool, "integer noise: sound in floating point; needs images on their grid", default=False)
    parser.flag("--any-sigma", bool, "allow another sigma than the classifier was fine-tuned with", default=False)
    parser.flag("--images", str, "certify these pictures and print the outcome", nargs="+")
    parser.flag("--report", str, "print the table of these TSVs, ours or others'", nargs="+")
    parser.flag("--format", str, "of the report", choices=("text", "markdown", "csv"), default="text")
    parser.flag("--plot", str, "draw the report's curves into this file")
    parser.flag("--published", str, "mark published results in the plot", choices=tuple(PUBLISHED))
    parser.flag("--batch", positive, "copies in a pass, a multiple or a divisor of 100 (None: 400; large images, CPU: 100)")
    run_flags(parser)
    args = parser.parse_args(argv)
    if args.report:
        return args, []
    require(args.sigma, "--sigma is needed")
    require(not args.plot, "--plot needs --report")
    require(not (args.classifier and early.checkpoint), "either --checkpoint or --classifier")
    for key, value in defaults.items():
        require(key == "data_path" or getattr(args, key) == value, f"--{key.replace('_', '-')} {getattr(args, key)} "
                f"contradicts {files[0]}, which was made with {value}")
    for file, checkpoint in zip(files, checkpoints, strict=True):
        require({"dataset", "image_size", "channels", "classes"} <= checkpoint["data"].keys(), f"{file} names no data set")
        tuned = checkpoint.get("sigma")
        require(args.any_sigma or tuned == args.sigma, f"{file} was fine-tuned for sigma {tuned}, not {args.sigma:g}: "
                "certify at that, or say --any-sigma")
        other = [key for key in ("dataset", "image_size", "channels", "classes")
                 if checkpoint["data"].get(key) != inherited.get(key)]
        require(not other, f"{file} and {files[0]} differ in {', '.join(other)}")
    last_alpha = args.alpha / 2 if args.sequential else args.alpha
    most = certified_radius(lower_confidence_bound(args.n, args.n, last_alpha), args.sigma)
    require(most > 0, f"n = {args.n} copies can only abstain at alpha = {args.alpha:g}: "
            f"--n {math.floor(-math.log2(last_alpha)) + 1} or more")                          # alpha^(1/n) > 1/2
    reachable = [r for r in args.radii if r < most]
    if args.sequential and len(reachable) < len(args.radii):
        print(f"radii above {most:.3f} cannot be reached with n = {args.n}: left out", file=sys.stderr)
        args.radii = reachable
    args.shard = args.shard or "0/1"
    shard = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    require(shard and int(shard[1]) < int(shard[2]), f"--shard must be I/K with I from 0 to K - 1, not {args.shard}")
    require(not args.batch or args.batch % CHUNK == 0 or CHUNK % args.batch == 0,
            f"--batch must be a multiple or a divisor of {CHUNK}, not {args.batch}")
    return args, checkpoints


def open_classifier(args, checkpoints, device, world):
    """The base classifier f that the arguments name: (B, C, H, W) in [0, 1] -> logits (B, classes), in eval mode."""
    if args.classifier:
        file, _, name = args.classifier.partition(":")
        require(Path(file).is_file(), f"there is no {file} (--classifier FILE.py:NAME)")
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        require(callable(getattr(module, name, None)), f"{file} has no function {name!r} (--classifier FILE.py:NAME)")
        models = [getattr(module, name)]
    else:
        models = [model.to(device).eval() for model in map(rebuild, checkpoints, args.checkpoint)]
        if args.compile:
            for model in models:
                model.compile()
    args.dtype = pick_dtype(args.dtype, models[0], device, world)

    def classifier(x):
        if INTERRUPT:
            raise SystemExit(128 + INTERRUPT[0])
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
            return sum(model(x) for model in models)

    return classifier


def rebuild(checkpoint, file):
    try:
        model = VisionTransformer(**checkpoint["config"])
    except (TypeError, ValueError, KeyError, RuntimeError, UsageError) as error:
        raise UsageError(f"{file} describes no model ({str(error).splitlines()[0]})") from None
    load_weights(model, checkpoint["model"], file)
    return model


def certify_pictures(args, classifier, classes, size, channels, rule, noise, device):
    """Certify --images one by one, and print what comes out."""
    try:
        pictures = [open_picture(file, channels) for file in args.images]
    except UsageError as error:
        raise UsageError(str(error)) from None                        # status 2: nothing was done yet
    for index, (file, picture) in enumerate(zip(args.images, pictures, strict=True)):
        if picture.size != (size, size):
            print(f"{file}: resized and cropped to {size} x {size}, the radius is in pixels of that")
        x = fit(picture, size).to(device) / 255
        (trial,) = certify_all(classifier, [(index, x)], noise, args.n0, rule, args.seed, args.batch)
        guess, radius = trial.certificate(args.sigma)
        voted = predict(classifier, x, args.sigma, args.n, args.alpha, args.seed, index, args.batch, noise)
        name, vote = ("abstains" if c == ABSTAIN else classes[c] if classes else f"class {c}" for c in (guess, voted))
        sure = "" if guess == ABSTAIN else f", certified within an l2 radius of {radius:.6f}"
        print(f"{file}: {name}{sure} (without a radius: {vote})")


def part_files(run):
    return sorted(run.result.parent.glob(f"{run.result.name}.part*"))


def merge_parts(run):
    """{idx: row} of all part files of a run, whatever number of processes wrote them; torn last lines are left out."""
    lines = [line for part in part_files(run) for line in part.read_text().split("\n")[:-1]]
    return {int(line.split("\t")[0]): line for line in lines if line.count("\t") == len(COLUMNS) - 1}


@command
def main(argv):
    args, checkpoints = parse(argv)
    if args.report:
        summaries = summarise(args.report)
        if args.plot:
            plot(args.plot, summaries, args.published)
        return print(table(summaries, args.radii, args.format))
    rank, world, device = start_processes(args.device, timeout=timedelta(days=30))        # ranks may finish hours apart
    say = print if rank == 0 else lambda *_: None
    gpu = device.type == "cuda"
    data = checkpoints[0]["data"] if checkpoints else {}
    size, channels = choose("data set", args.dataset, SHAPES)
    size, channels = data.get("image_size", args.image_size or size), data.get("channels", channels)
    args.device, args.batch = device.type, args.batch or (4 * CHUNK if gpu or size <= 64 else CHUNK)
    args.compile = gpu if args.compile is None else args.compile
    classifier = open_classifier(args, checkpoints, device, world)
    if args.dtype == "bf16" and not gpu:
        say("f runs in bf16, which --dtype fp32 would change")
    if args.sequential:
        rule = Sequential(args.n, args.alpha, args.sigma, args.radii, args.boundary_tolerance)
    else:
        rule = FixedN(args.n, args.alpha)
    if args.images:
        noise = GridNoise(args.sigma, 255, device) if args.sound else GaussianNoise(args.sigma)
        return certify_pictures(args, classifier, data.get("classes"), size, channels, rule, noise, device)

    # data: every skip-th test image, this job's shard of them
    test = open_images(args.dataset, args.data_path, "test", size, channels)
    require(data.get("classes", test.classes) == test.classes, f"the checkpoint has other classes than {args.data_path}")
    part, parts = map(int, args.shard.split("/"))
    chosen = list(range(0, len(test), args.skip))[:args.max][part::parts]
    require(chosen, f"there is no image to certify in shard {args.shard}")
    file, _, function = (args.classifier or "").partition(":")
    settings = vars(args) | {"sha256": [sha256(path) for path in args.checkpoint or [file]], "function": function}
    name = f"certify_sigma_{args.sigma:g}" + (f"_shard_{part}_of_{parts}" if parts > 1 else "")
    run = Run(args.out, name, settings, FREE, rank, world, ".tsv", args.resume, args.overwrite)
    if run.done:
        for file in part_files(run) if rank == 0 else []:             # left by a run that was killed at its very end
            file.unlink()
        say(f"{run.result} is done; --out elsewhere, or --overwrite to do it again")
        return say(table(summarise([run.result]), args.radii))

    # what earlier processes left: rank 0 puts it into one part, all go on from there
    if rank == 0:
        rows, old = merge_parts(run), part_files(run)
        write_atomically(run.file(".tsv.part0"), lambda path: path.write_text("".join(f"{row}\n" for row in rows.values())))
        for file in old:
            if file != run.file(".tsv.part0"):
                file.unlink()
    gather([0], world)
    finished = merge_parts(run)
    todo = [i for i in chosen if i not in finished][rank::world]
    gather([0], world)
    if finished:
        say(f"continuing after {len(finished)} of {len(chosen)} images")

    noise = GridNoise(args.sigma, test.levels, device) if args.sound else GaussianNoise(args.sigma)
    images = ((i, test.read(i).to(device) / test.levels) for i in todo)
    bar = tqdm(total=len(todo), desc="certify", disable=None if rank == 0 else True)
    shown = [r for r in args.radii if r > 0][:2] or [0.0]
    right, drawn, start = [0] * len(shown), 0, time.time()
    with open(run.file(f".tsv.part{rank}"), "a") as file:
        for done, trial in enumerate(certify_all(classifier, images, noise, args.n0, rule, args.seed, args.batch), 1):
            prediction, radius = trial.certificate(args.sigma)
            label = int(test.labels[trial.index])                     # seen here first: prediction and radius are final
            correct = int(prediction == label)
            taken = str(timedelta(seconds=trial.seconds))
            row = [trial.index, label, prediction, f"{radius:.6f}", correct, taken, trial.k, trial.n, args.sigma, args.alpha]
            file.write("\t".join(map(str, row)) + "\n")
            file.flush()
            right = [count + (correct and radius >= r) for count, r in zip(right, shown, strict=True)]
            drawn += trial.n + args.n0
            bar.update()
            status = "  ".join(f"r={r:g}: {count / done:.1%}" for r, count in zip(shown, right, strict=True)) \
                + f"  {drawn / (time.time() - start):,.0f} draws/s"
            bar.set_postfix_str(status)
            if bar.disable and (done % max(1, len(todo) // 10) == 0 or done == len(todo)):
                left = (time.time() - start) / done * (len(todo) - done)
                say(f"{done}/{len(todo)} images  {status}  {left:.0f} s left")
    bar.close()

    gather([0], world)
    if rank == 0:
        rows = merge_parts(run)
        body = "\n".join(["\t".join(COLUMNS), *(rows[i] for i in sorted(rows))]) + "\n"
        write_atomically(run.result, lambda path: path.write_text(body))
        for file in part_files(run):
            file.unlink()
        summaries = summarise([run.result])
        plot(run.file(".png"), summaries)
        one = summaries[0]
        clean = binomtest(round(one.accuracy(0) * one.m), one.m).proportion_ci(method="wilson")
        say(table(summaries, args.radii))
        say(f"clean accuracy of g {one.accuracy(0):.1%} (Wilson interval, 95 %: {clean.low:.1%} to {clean.high:.1%})")
        if args.sequential:
            say(f"{one.draws:,} draws, {one.draws / (one.m * args.n):.1%} of n = {args.n:,} an image")
        say(f"wrote {run.result} and {run.file('.png').name} in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
