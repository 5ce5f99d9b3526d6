"""Sequential certification: look again and again, stop when the table's radii are settled.

    python certify.py --sigma 0.25 --procedure extras/sequential.py:sequential \\
        --checkpoint runs/digits/finetune_sigma_0.25.pt --out runs/sequential

An image stops when the largest of --radii is certified, or when the next one up is futile (an
evidence of 100 against it; this costs no alpha, for the bounds hold wherever one stops) or out of
reach (even if all draws to come were successes). --bound says whose radius is meant; both are kept.

A fifth of alpha is spent on anytime bounds, which hold at all looks at once, so that the best of
them does; the rest on Clopper-Pearson bounds at n, for the images that get there. A larger part for
the looks saves draws, and leaves less for images next to a radius. (Sequential certification:
Horvath et al. 2022, Chen et al. 2022, Voracek 2024; mixture martingales: Robbins 1970, Howard et
al. 2021.)
"""

import math

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import betaincc, betaln
from scipy.stats import norm

from certify import CHUNK, generator_for, lower_confidence_bound, runner_up_of, two_sided_bounds

FIRST, GROWTH = 1000, 1.1               # the looks: each a tenth later
EARLY = 0.2                             # share of alpha for the anytime bounds
FUTILITY = 100.0


def log_e_value(k, n, p):
    """Log of the evidence against P[success] <= p after k successes in n trials, at any time.

    E = integral over q in (p, 1] of (q/p)^k ((1-q)/(1-p))^(n-k) w(q) dq, w the Beta(1/2, 1/2)
    density restricted to (p, 1]. If P[success] <= p, each ratio has at each trial a mean of at most
    1: E is a non-negative supermartingale from 1, and P[E ever reaches 1/alpha] <= alpha (Ville).
    (notebook 07, (7.2), (7.3))
    """
    a, b = 0.5 + k, 0.5 + n - k
    with np.errstate(divide="ignore"):
        posterior = betaln(a, b) + np.log(betaincc(a, b, p))
        prior = betaln(0.5, 0.5) + np.log(betaincc(0.5, 0.5, p))
        return posterior - prior - k * np.log(p) - (n - k) * np.log1p(-p)


def anytime_lower_bound(k, n, alpha):
    """Where log_e_value crosses log(1/alpha): holds at all looks at once (notebook 07, (7.4))."""
    if k == 0:
        return 0.0                                                           # no evidence

    def excess_of(p):                                                        # falls below k / n
        return log_e_value(k, n, p) + math.log(alpha)

    high = min(k / n, math.nextafter(1, 0))
    low = high / 2
    while excess_of(low) < 0:
        low, high = low / 2, low
    root = brentq(excess_of, low, high, xtol=1e-300, rtol=1e-13)
    return float(root * (1 - 1e-12))                                         # on the safe side


def radius_of(p_a, p_b, sigma):
    """As certified_radius, but negative where p_a < p_b."""
    return sigma / 2 * (norm.ppf(p_a) - norm.ppf(p_b))


def bounds_after(counts, top, n, most, alpha, before):
    """Both pairs (p_a, p_b) after n of `most` draws, not worse than `before`."""
    k, early = int(counts[top]), EARLY * alpha
    others = n - runner_up_of(counts, top, n)                                # not the runner-up
    one = max(before["one-sided"][0], anytime_lower_bound(k, n, early))
    two = max(before["two-sided"][0], anytime_lower_bound(k, n, early / 2))
    rival = min(before["two-sided"][1], 1 - anytime_lower_bound(others, n, early / 2))
    if n >= most:
        one = max(one, lower_confidence_bound(k, n, alpha - early))
        p_a, p_b = two_sided_bounds(counts, top, n, alpha - early)
        two, rival = max(two, p_a), min(rival, p_b)
    return {"one-sided": (one, 1 - one), "two-sided": (two, min(rival, 1 - two))}


def largest_radius(counts, top, n, most, alpha, sigma, bound, before):
    """The radius if every draw from here to `most` were a success (notebook 07, (7.5))."""
    best = torch.as_tensor(counts).clone()
    best[top] += most - n
    return radius_of(*bounds_after(best, top, most, most, alpha, before)[bound], sigma)


def possible_radius(counts, top, n, sigma, bound):
    """The largest radius there may be, at an evidence of FUTILITY (notebook 07, (7.5))."""
    p_a = 1 - anytime_lower_bound(n - int(counts[top]), n, 1 / FUTILITY)
    if bound == "one-sided":
        return radius_of(p_a, 1 - p_a, sigma)
    p_b = anytime_lower_bound(runner_up_of(counts, top, n), n, 1 / FUTILITY)
    return radius_of(p_a, p_b, sigma)


def sequential(index, x, sigma, n0, n, alpha, seed, radii, bound):
    """CERTIFY with at most n draws; as certify.fixed_n() (notebook 07, (7.5))."""
    selection = yield index, x, generator_for(seed, index, 0, x.device), n0
    top = int(selection.numpy().argmax())

    generator = generator_for(seed, index, 1, x.device)
    counts, drawn = 0, 0
    bounds = {"one-sided": (0.0, 1.0), "two-sided": (0.0, 1.0)}
    while True:
        look = max(FIRST, math.ceil(drawn * GROWTH))
        look = min(n, math.ceil(look / CHUNK) * CHUNK)
        counts = counts + (yield index, x, generator, look - drawn)
        drawn = look
        bounds = bounds_after(counts, top, drawn, n, alpha, bounds)

        certified = radius_of(*bounds[bound], sigma)
        above = [r for r in sorted({0.0, *radii}) if r > certified]
        if drawn >= n or not above:
            break
        if largest_radius(counts, top, drawn, n, alpha, sigma, bound, bounds) < above[0]:
            break                                                            # out of reach
        if possible_radius(counts, top, drawn, sigma, bound) <= above[0]:
            break                                                            # futile
    return top, counts, drawn, bounds
