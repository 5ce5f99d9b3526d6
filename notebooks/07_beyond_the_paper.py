# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# previous: [06, the rivals](06_the_rivals.ipynb) | [contents](README.md)
#
# # 7. Beyond the paper: bounds for any time, noise without floats
#
# *Not on the short path.*
#
# The certificates of notebook 02 rest on two conditions that are easily forgotten. The number of draws is fixed before
# the first one. And the noise is real numbers, while a computer has floats. This notebook lifts both. It shows the
# functions of `extras/sequential.py` and `extras/integer_noise.py`. Nothing of it is in the DMAE paper, and none of it
# is ours: the sources stand where they are used.
#
# **Afterwards you can**
# * say what a look at the count costs, exactly;
# * stop drawing as soon as enough is known, with a bound that allows it, one-sided and two-sided;
# * build a certificate that is false because of floats, and one that does not rest on them.
#
# **It needs** sections 1.8, 2.1 to 2.4, and 2.9 for section 7.4, conditional expectations, and the packages of
# `requirements.txt`; no GPU, no download. **It runs** in a quarter of a minute on two CPU cores.
#
# | symbol | meaning |
# |---|---|
# | $p$ | the unknown share of class $A$ among the noisy copies |
# | $n$, $k$, $\hat p$ | draws so far, of at most $n_{\max}$; how many of them were $A$; $k/n$ |
# | $\underline p_a(k, n)$ | Clopper and Pearson's lower bound at level $a$, (2.3); without $a$: at $\alpha$ |
# | $p_0$, $\theta$ | a claim "$p \le p_0$"; a point of an integral over shares |
# | $E_n$ | the evidence against the claim after $n$ draws |
# | $\underline q_a(k, n)$ | the lower bound at level $a$ that holds at any time, from $E_n$ |
# | $R$, $r$ | certified radius; a radius of the table |
# | $G$, $j$ | steps of the pixels' grid in $[0, 1]$; an integer |
#
# (Those of all notebooks stand in the [contents](README.md#symbols), and so do the [references](README.md#references).)

# %%
# %matplotlib inline
import math
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

ROOT = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "certify.py").is_file())
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]        # works from notebooks/ and from the repository's root

import numpy as np
import pictures
import torch
from pictures import show
from scipy import stats
from scipy.integrate import quad
from scipy.special import betaincc, betaln, xlogy

import certify
from certify import lower_confidence_bound
from extras import integer_noise, sequential

alpha = 0.001

# %% [markdown]
# ## 7.1 Peeking
#
# Drawing is expensive, so one looks at the count from time to time and stops once the bound is good enough. Each look
# is a test at level $\alpha$, and the error is that *any* of them errs:
#
# $$ \Pr\bigl[\exists\, i \le t : \underline p(k_{n_i}, n_i) > p\bigr] \;\le\; t\,\alpha,
#    \quad\text{and in general far above } \alpha, \qquad n_1 < n_2 < \dots < n_t \text{ the looks.} \tag{7.1} $$
#
# How bad is it? The bound is crude, as looks at similar $n$ are correlated. But the error is not bounded by anything
# below 1. By the law of the iterated logarithm, $k_n - np$ exceeds any fixed fraction of
# $\sqrt{2 p (1-p) n \ln\ln n}$ infinitely often, while the margin of a fixed-$n$ bound is only a constant times $\sqrt
# n$. Anyone who keeps drawing long enough is certain to see a bound that exceeds the truth.
#
# **Check**, exactly. The count is a random walk. We carry its distribution from look to look, and remove at each look
# what has erred.

# %%
def least_false_count(bound, n, p, alpha):
    """The least count whose bound exceeds p."""
    low, high = math.ceil(n * p), n + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if bound(middle, n, alpha) > p else (middle + 1, high)
    return low


def peeking_error(bound, looks, p, alpha):
    """P[the bound has exceeded p at one of the looks so far], at every look: exact."""
    alive, lost, errors, before = np.ones(1), 0.0, [], 0
    for look in looks:
        step = stats.binom.pmf(np.arange(look - before + 1), look - before, p)
        alive, before = np.convolve(alive, step), look
        first = least_false_count(bound, look, p, alpha)
        lost += alive[first:].sum()
        alive[first:] = 0
        errors.append(lost)
    return np.array(errors)


looks, p = np.arange(100, 5001, 100), 0.75
peeked = {a: peeking_error(lower_confidence_bound, looks, p, a) for a in (0.05, 0.001)}
once = peeking_error(lower_confidence_bound, [5000], p, 0.05)[0]
random = np.random.default_rng(1)
walks = random.binomial(100, p, (20_000, len(looks))).cumsum(axis=1)
limits = [least_false_count(lower_confidence_bound, int(look), p, 0.05) for look in looks]
simulated = (walks >= limits).any(axis=1).mean()
assert once <= 0.05 and abs(simulated - peeked[0.05][-1]) < 0.015           # the walk against simulation
for a, errors in peeked.items():
    print(f"alpha = {a}: error after 1 look {errors[0]:.4f}, 10 looks {errors[9]:.4f}, 50 looks {errors[-1]:.4f}")
    assert errors[-1] > 3 * a

# %% [markdown]
# ## 7.2 A bound that may be looked at any time
#
# The cure is to measure evidence by something that cannot be inflated by waiting. Suppose someone claims that
# $p \le p_0$, and we bet against it. Having seen $k$ successes in $n$ draws, our capital, from a start of 1, is
#
# $$ E_n = \int_{p_0}^{1} \Bigl(\frac{\theta}{p_0}\Bigr)^{k} \Bigl(\frac{1 - \theta}{1 - p_0}\Bigr)^{n - k} w(\theta)\,
#    d\theta, \tag{7.2} $$
#
# where $w \ge 0$ is a density on $(p_0, 1]$: how we spread the first unit over alternatives $\theta$. Here $w$ is the
# $\operatorname{Beta}(\tfrac12, \tfrac12)$ density, restricted to $(p_0, 1]$ and scaled to integrate to one. Mixtures
# of likelihood ratios, as tests that may be looked at any time, are Robbins's (1970); Howard et al. (2021) give the
# modern theory.
#
# **$E_n$ is a supermartingale when the claim is true.** Let the true share be $p \le p_0$, and take one $\theta >
# p_0$. At the next draw the integrand is multiplied by $\theta/p_0$ with probability $p$, by $(1-\theta)/(1-p_0)$
# otherwise; on average by
#
# $$ p\,\frac{\theta}{p_0} + (1 - p)\,\frac{1 - \theta}{1 - p_0}
#    \;\le\; p_0\,\frac{\theta}{p_0} + (1 - p_0)\,\frac{1 - \theta}{1 - p_0} = 1, \tag{7.3} $$
#
# as the left side increases with $p$ (because $\theta/p_0 > 1 > (1-\theta)/(1-p_0)$). An average over $\theta$ of
# such processes is one again: $\mathbb E[E_{n+1} \mid \text{past}] \le E_n$. Betting against a true claim does not
# pay, whenever one stops.
#
# **Ville's inequality** (1939). Let $E_0 = 1, E_1, E_2, \dots \ge 0$ be a supermartingale. Then
#
# $$ \Pr\bigl[\exists\, n : E_n \ge 1/\alpha\bigr] \le \alpha. \tag{7.4} $$
#
# *Proof.* Let $\tau$ be the first $n$ with $E_n \ge 1/\alpha$ ($\infty$ if there is none). The capital stopped at
# $\tau$ is a supermartingale too: before $\tau$ it moves like $E$, afterwards not at all. So for each fixed $n$,
# $\mathbb E[E_{\min(\tau, n)}] \le E_0 = 1$. On the event $\tau \le n$ that variable is at least $1/\alpha$, and it
# is never negative. Hence $1 \ge \mathbb E[E_{\min(\tau, n)}] \ge \Pr[\tau \le n] / \alpha$, that is $\Pr[\tau \le n]
# \le \alpha$. The events $\{\tau \le n\}$ grow to $\{\tau < \infty\}$ as $n \to \infty$, and probability is
# continuous from below. $\square$
#
# It is Markov's inequality, valid for the whole path at the price of one point. The *anytime lower bound* $\underline
# q_\alpha(k, n)$ collects the refuted claims: it is the largest $p_0$ with $E_n(p_0) \ge 1/\alpha$. Suppose that it
# exceeds $p$ at any $n$. Then $E_n(p) \ge 1/\alpha$, too, since the refuted claims form an interval $(0, \underline
# q_\alpha]$ (proved in the appendix, section 7.8). So the true claim "the share is at most $p$" has been refuted. That
# happens with probability at most $\alpha$, for all $n$ together.
#
# The integral has a closed form. $\theta^{k}(1-\theta)^{n-k}$ times the Beta density is another Beta density, so
# numerator and normalisation are upper tails of Beta distributions. With the Beta function
# $\operatorname{beta}(a, b) = \int_0^1 \theta^{a-1} (1 - \theta)^{b-1}\, d\theta$,
#
# $$ E_n = \frac{\operatorname{beta}(k + \frac12,\, n - k + \frac12)\;
#    \Pr[\operatorname{Beta}(k + \frac12,\, n - k + \frac12) > p_0]}
#    {\operatorname{beta}(\frac12, \frac12)\; \Pr[\operatorname{Beta}(\frac12, \frac12) > p_0]}\;
#    p_0^{-k} (1 - p_0)^{-(n-k)}. $$
#
# In code: its logarithm, and a bisection. `log_e_value` and `anytime_lower_bound` of `extras/sequential.py` must agree.

# %%
def log_evidence(k, n, p0):
    """log E_n, in closed form; betaincc is the upper tail of a Beta distribution."""
    after = betaln(k + 0.5, n - k + 0.5) + math.log(betaincc(k + 0.5, n - k + 0.5, p0))
    before = betaln(0.5, 0.5) + math.log(betaincc(0.5, 0.5, p0))
    return after - before - k * math.log(p0) - (n - k) * math.log1p(-p0)


def anytime_by_hand(k, n, alpha):
    """The largest p0 with E_n(p0) >= 1 / alpha: there is none from k / n on."""
    low, high = 0.0, k / n
    for _ in range(60):
        middle = (low + high) / 2
        refuted = log_evidence(k, n, middle) >= math.log(1 / alpha)
        low, high = (middle, high) if refuted else (low, middle)
    return low


random = np.random.default_rng(2)
for _ in range(200):
    n = int(random.integers(1, 3000))
    k, p0 = int(random.integers(0, n + 1)), random.uniform(0.01, 0.99)
    if betaincc(k + 0.5, n - k + 0.5, p0) > 0:
        assert np.isclose(log_evidence(k, n, p0), sequential.log_e_value(k, n, p0), rtol=1e-9, atol=1e-9)
    if k > 0.6 * n:
        assert np.isclose(anytime_by_hand(k, n, 0.001), sequential.anytime_lower_bound(k, n, 0.001), rtol=1e-9, atol=0)
for k, n in ((60, 100), (600, 1000), (6000, 10_000)):
    print(f"k = {k:4} of {n:5}: any time {anytime_by_hand(k, n, alpha):.4f}, "
          f"one look {lower_confidence_bound(k, n, alpha):.4f}")

# %% [markdown]
# **Check.** The closed form against numerical integration of (7.2); the mean of $E_n$ by exact summation over all
# counts, which is 1 at $p = p_0$ and less below; and the error of the anytime bound by the same exact random walk as
# before.

# %%
def integrand(t, k, n, p0):
    """Of (7.2), after theta = 1 - (1 - p0) t^2, which takes the pole of w at theta = 1 away."""
    theta = 1 - (1 - p0) * t**2
    weight = stats.beta.pdf(theta, 0.5, 0.5) / stats.beta.sf(p0, 0.5, 0.5)
    ratio = (theta / p0) ** k * ((1 - theta) / (1 - p0)) ** (n - k)
    return ratio * weight * 2 * (1 - p0) * t


for k, n, p0 in ((3, 10, 0.5), (70, 100, 0.5), (95, 100, 0.8), (0, 5, 0.3)):
    integral = quad(integrand, 1e-12, 1, args=(k, n, p0), points=[0.3, 0.7])[0]
    assert abs(math.exp(log_evidence(k, n, p0)) / integral - 1) < 1e-6

k, n, p0 = np.arange(201), 200, 0.7
evidence = np.exp(sequential.log_e_value(k, n, p0))
mean = {p: float(stats.binom.pmf(k, n, p) @ evidence) for p in (0.7, 0.69, 0.6)}
print("mean of E after 200 draws against p <= 0.7:", {p: round(value, 4) for p, value in mean.items()})
assert abs(mean[0.7] - 1) < 1e-8 and mean[0.69] < 1 and mean[0.6] < mean[0.69]

anytime = {a: peeking_error(sequential.anytime_lower_bound, looks, 0.75, a) for a in (0.05, 0.001)}
for a, errors in anytime.items():
    print(f"alpha = {a}: error of the anytime bound after 50 looks {errors[-1]:.5f}")
    assert 0 < errors[-1] <= a

random, steps, paths = np.random.default_rng(5), np.arange(10, 1501, 10), {}
for true, name in ((0.5, "true: p = 0.5"), (0.58, "false: p = 0.58")):
    walks = random.binomial(10, true, (12, len(steps))).cumsum(axis=1)
    paths[name] = sequential.log_e_value(walks, steps, 0.5) / math.log(10)
relative = [{a: errors / a for a, errors in found.items()} for found in (peeked, anytime)]
pictures.picture_of_peeking(looks, *relative, steps, paths, alpha)

# %% [markdown]
# ## 7.3 The sequential test: same guarantee, fewer draws
#
# The anytime bound is smaller than Clopper and Pearson's at the same $n$: validity at all times has a price. It buys
# the right to stop. A table of certified accuracy asks only whether the radius reaches 0.25, 0.5 and so on. So an
# image may stop
# * as soon as the largest radius of the table is proven;
# * when the next one, $r$, is *out of reach*, as not even successes in all draws to come would prove it;
# * or when $r$ is *futile*: the evidence against $p_A \ge \Phi(r/\sigma)$ reaches 100. That evidence is (7.2) with
#   successes and failures exchanged.
#
# (The radii begin with 0: is there an answer at all? The first look is after 1000 draws, each next one a tenth later.)
#
# An image whose radius lies next to one of the table's most likely needs all $n_{\max}$ draws, and there the anytime
# bound would be a worse judge than Clopper and Pearson's. So $\alpha$ is split: a fifth for the anytime bounds at all
# looks, and four fifths for one Clopper-Pearson bound after the last draw. Its chance of error is at most
# $\frac45\alpha$ whether or not one gets so far (imagine the draws that were not made). By the union bound all these
# bounds hold together with probability $1 - \alpha$. A larger part for the looks saves draws, and leaves less for the
# images next to a radius.
#
# Let $\underline p^*$ be the best bound of all looks so far, after $k$ successes in $n$ draws, and $k' = k + n_{\max} -
# n$ the successes if no draw to come fails. The last two rules compare $r$ with a radius each: the most that can still
# be proven, and the largest that is not refuted:
#
# $$ \sigma\,\Phi^{-1}\bigl(\max\{\underline p^*,\ \underline q_{\alpha/5}(k', n_{\max}),\
#    \underline p_{4\alpha/5}(k', n_{\max})\}\bigr) < r
#    \qquad\text{or}\qquad \sigma\,\Phi^{-1}\bigl(1 - \underline q_{1/100}(n - k, n)\bigr) \le r. \tag{7.5} $$
#
# On the left stands `largest_radius`, which asks `bounds_after` for the bounds after all $n_{\max}$ draws. On the right
# stands `possible_radius`. Futility needs no share of $\alpha$. The anytime bounds hold at all looks at once, hence at
# the one where one stops, for whatever reason. A wrong stop can make a radius smaller, never false.
#
# Drawing as much as an image needs has been done before: Horváth et al. (2022) do it in stages that share $\alpha$,
# Chen et al. (2022) choose the number of draws for each image, and Voracek (2024) uses bounds that hold at all times.
#
# In the page, the rule is (7.5) and a dozen lines around it. In `extras/sequential.py` it is `sequential`, a generator
# as `fixed_n` is, for `certify.py --procedure`. Both must agree at every look, on the bound, on the two radii of (7.5)
# and on whether to stop.

# %%
def anytime_or_none(k, n, alpha):
    return anytime_by_hand(k, n, alpha) if k else 0.0                       # no success, no evidence


def at_the_end(k, n_max, best):
    """The best bound once all draws are made: the looks had a fifth of alpha, this one has the rest."""
    return max(best, anytime_or_none(k, n_max, alpha / 5), lower_confidence_bound(k, n_max, 4 / 5 * alpha))


def most_by_hand(k, n, n_max, best, sigma):
    return sigma * stats.norm.ppf(at_the_end(k + n_max - n, n_max, best))


def possible_by_hand(k, n, sigma):
    return sigma * stats.norm.ppf(1 - anytime_or_none(n - k, n, 1 / 100))


def look_by_hand(k, n, n_max, best, sigma, radii):
    """(the best bound so far, why to stop or None), after k successes in n draws."""
    best = max(best, anytime_or_none(k, n, alpha / 5))
    if n == n_max:
        return at_the_end(k, n, best), "all draws made"
    unproven = [r for r in (0, *radii) if r > sigma * stats.norm.ppf(best)]
    if not unproven:
        return best, "all radii proven"
    if most_by_hand(k, n, n_max, best, sigma) < unproven[0]:
        return best, "out of reach"
    if possible_by_hand(k, n, sigma) <= unproven[0]:
        return best, "futile"
    return best, None


def looks_of(rule, toss):
    """Send counts toss(copies) to the scripts' generator, class 0 selected; yield (counts, n, its result or None)."""
    next(rule)
    copies = rule.send(torch.tensor([1, 0]))[3]
    counts, n, result = 0, 0, None
    while result is None:
        fresh = torch.tensor(toss(copies))
        counts, n = counts + fresh, n + copies
        try:
            copies = rule.send(fresh)[3]
        except StopIteration as end:
            result = end.value
        yield counts, n, result


zero = torch.zeros(1, 2, 2)                                                # an image; its counts are made up
NOTHING = {"one-sided": (0.0, 1.0), "two-sided": (0.0, 1.0)}                # the bounds before the first look
random, n_max, radii, s = np.random.default_rng(16), 5000, (0.25, 0.5, 1.0), 0.5
reasons = dict.fromkeys(("all draws made", "all radii proven", "out of reach", "futile"), 0)
for p in stats.norm.cdf(random.uniform(-0.2, 3, 60)):
    def toss(copies, p=p):
        k = int(random.binomial(copies, p))
        return [k, copies - k]

    best, bounds = 0.0, NOTHING
    rule = sequential.sequential(0, zero, s, 1, n_max, alpha, 0, radii, "one-sided")
    for counts_so_far, n, result in looks_of(rule, toss):
        k = int(counts_so_far[0])
        best, reason = look_by_hand(k, n, n_max, best, s, radii)
        bounds = sequential.bounds_after(counts_so_far, 0, n, n_max, alpha, bounds)
        assert np.isclose(bounds["one-sided"][0], best, rtol=1e-9, atol=0) and (result is None) == (reason is None)
        most = sequential.largest_radius(counts_so_far, 0, n, n_max, alpha, s, "one-sided", bounds)
        assert np.isclose(most, most_by_hand(k, n, n_max, best, s))
        possible = sequential.possible_radius(counts_so_far, 0, n, s, "one-sided")
        assert np.isclose(possible, possible_by_hand(k, n, s))
    assert result[2:] == (n, bounds)
    reasons[reason] += 1
print("why 60 images stopped:", reasons)
assert min(reasons.values()) > 0

# %% [markdown]
# The scripts' rule, whole:

# %%
show(sequential.sequential, sequential.bounds_after, sequential.largest_radius, sequential.possible_radius)

# %% [markdown]
# **Check.** Feed the rule with binomial draws of a known share and compare with the fixed $n = 100\,000$. How many
# draws does it take until it stops, and is its bound ever above the truth? Close to the boundary (grey line) it needs
# tens of thousands of draws; away from it, little more than the first look's 1000. ($R \ge r$ is undecidable at the
# boundary itself.) And after a futile stop the evidence (7.2) against the next radius must be at least 100.

# %%
def run_sequential(p, r, sigma, random):
    """(bound, successes, draws) when the rule stops, on two classes of the shares p and 1 - p."""
    def toss(copies):
        k = random.binomial(copies, p)
        return [k, copies - k]

    rule = sequential.sequential(0, zero, sigma, 1, 100_000, alpha, 0, [r], "one-sided")
    *_, (counts, n, (_, _, _, bounds)) = looks_of(rule, toss)
    lower, _ = bounds["one-sided"]
    return lower, int(counts[0]), n


random, r, sigma = np.random.default_rng(6), 0.5, 0.5
true_shares = stats.norm.cdf(np.array([0.2, 0.6, 0.8, 0.9, 0.96, 1.04, 1.1, 1.2, 1.5, 2.0]))   # radii 0.2 sigma, ...
draws = np.empty((len(true_shares), 4))
futile = 0
for row, p in enumerate(true_shares):
    for column in range(4):
        lower, k, n = run_sequential(p, r, sigma, random)
        assert lower <= p, "a false bound: may happen with probability alpha a run"
        settled = sigma * stats.norm.ppf(lower) >= r
        reachable = at_the_end(k + 100_000 - n, 100_000, lower) > stats.norm.cdf(r / sigma)
        if n < 100_000 and not settled and reachable and lower > 1 / 2:
            futile += 1
            assert log_evidence(n - k, n, 1 - stats.norm.cdf(r / sigma)) >= math.log(100)
        draws[row, column] = n
print(f"{futile} of {draws.size} runs stopped as futile; median number of draws {np.median(draws):.0f}")
assert futile > 5 and draws.min() < 3000 and np.median(draws) < 50_000

pictures.picture_of_draws(sigma * stats.norm.ppf(true_shares), draws, r, 100_000)

# %% [markdown]
# ## 7.4 The sequential test, two-sided
#
# `sequential` keeps both pairs of bounds, one-sided and two-sided, at every look. Its two-sided pair is (2.13) with the
# anytime bound in place of Clopper and Pearson's: a tenth of $\alpha$ for $A$, a tenth for the rivals. The upper bound
# of a rival is one minus the lower bound of its failures. After the last draw comes (2.13) itself, with four fifths of
# $\alpha$ as its $\alpha$. The two radii of (7.5) are two-sided, too. The most that can be proven is what all these say
# if all draws to come are $A$'s. The largest that is not refuted has $p_A$ at its upper bound and the largest rival at
# its lower bound, each an anytime bound at the error $1/100$. `bound` says which of the radii the rule for stopping
# means.
#
# In the page, and against `bounds_after`, `largest_radius` and `possible_radius`, with a few draws:

# %%
def anytime_pair(tally, top, a):
    """(2.13), with the anytime bound in place of Clopper and Pearson's, and halves."""
    n, strongest = sum(tally), max(np.delete(tally, top))
    p_a = anytime_or_none(tally[top], n, a / 2)
    return p_a, min(1 - anytime_or_none(n - strongest, n, a / 2), 1 - p_a)


def better(one, other):
    """The best of two pairs that hold together."""
    p_a = max(one[0], other[0])
    return p_a, min(one[1], other[1], 1 - p_a)


def last_pair(tally, top, best):
    """The best pair after the last draw."""
    best = better(best, anytime_pair(tally, top, alpha / 5))
    return better(best, certify.two_sided_bounds(tally, top, int(sum(tally)), 4 / 5 * alpha))


def signed_radius(pair, sigma):
    """(2.11), negative where p_A < p_B."""
    return sigma / 2 * (stats.norm.ppf(pair[0]) - stats.norm.ppf(pair[1]))


random, n_max = np.random.default_rng(17), 300
for _ in range(5):
    tally, best, bounds, shares = np.zeros(4, dtype=int), (0.0, 1.0), NOTHING, random.dirichlet(np.ones(4))
    for n in range(100, n_max + 1, 100):
        tally = tally + random.multinomial(100, shares)
        best = better(best, anytime_pair(tally, 0, alpha / 5))
        if n == n_max:
            best = last_pair(tally, 0, best)
        bounds = sequential.bounds_after(tally, 0, n, n_max, alpha, bounds)
        assert np.allclose(bounds["two-sided"], best, rtol=1e-9, atol=1e-9)
        all_for_a = tally + np.array([n_max - n, 0, 0, 0])
        most = signed_radius(last_pair(all_for_a, 0, best), 0.5)
        assert np.isclose(sequential.largest_radius(tally, 0, n, n_max, alpha, 0.5, "two-sided", bounds), most)
        at_best = (1 - anytime_or_none(n - tally[0], n, 1 / 100), anytime_or_none(max(tally[1:]), n, 1 / 100))
        assert np.isclose(sequential.possible_radius(tally, 0, n, 0.5, "two-sided"), signed_radius(at_best, 0.5))
print("the two-sided pair, and both radii of (7.5), are those of sequential")

# %% [markdown]
# **Check** with multinomial draws, where $A$ has the share 0.4, one rival 0.25 and five others 0.07 each: does the pair
# hold at the end, and how many draws does it take to certify the radius 0.08? The one-sided rule never can, and stops
# when that is clear.

# %%
random, true = np.random.default_rng(13), np.array([0.4, 0.25] + 5 * [0.07])
for bound in certify.BOUNDS:
    spent = []
    for _ in range(5):
        rule = sequential.sequential(0, zero, 0.5, 1, 100_000, alpha, 0, [0.08], bound)
        *_, (_, n, (_, _, _, pairs)) = looks_of(rule, lambda copies: random.multinomial(copies, true))
        p_a, p_b = pairs["two-sided"]
        assert p_a <= true[0] and p_b >= true[1:].max(), "a false bound: may happen with probability alpha a run"
        assert (signed_radius(pairs[bound], 0.5) >= 0.08) == (bound == "two-sided")
        spent.append(n)
    print(f"{bound}: stopped after {spent} draws")
    assert max(spent) < 50_000

# %% [markdown]
# ## 7.5 Floating point
#
# The theorem speaks of real numbers, a computer adds floats. Is it a quibble? A float of 32 bits near 1 has a spacing
# of $2^{-24}$ just below and $2^{-23}$ above; near 0 the spacing is finer by many orders of magnitude. So the *last
# digits* of $x + e$ carry information about $x$, which no real noise would leave, and a classifier may read it (Jin et
# al. 2022, Voracek and Hein 2023). Consider
#
# $$ f(z) = \mathbb 1\bigl[\, 2^{24} z \text{ is an integer} \,\bigr]. \tag{7.6} $$
#
# For real noise, $\Pr[f(x + e) = 1] = 0$ at every $x$: a countable set. With floats, at $x = 1$ every copy is such a
# multiple, and at $x = 0$ only a third of them are. So CERTIFY at $x = 1$ sees 100 %. With enough draws it claims a
# radius beyond the distance to $x = 0$, where $g$ answers otherwise. The certificate is false, with certainty, at
# whatever confidence level.

# %%
def coarse(z):
    """Class 1 where z is a multiple of 2^-24."""
    yes = (z.double() * 2**24).frac() == 0
    return torch.stack([~yes.flatten(), yes.flatten()], dim=1).float()


sigma, one, zero = 0.3, torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
prediction, radius = certify.certify(coarse, one, sigma, n=20_000, alpha=alpha)
at_zero = certify.predict(coarse, zero, sigma, n=20_000, alpha=alpha)
print(f"at x = 1: class {prediction}, certified within {radius:.3f} > 1; at x = 0, within that radius: class {at_zero}")
assert prediction == 1 and radius > 1 and at_zero == 0, "not false: alpha is so small that n = 20 000 is too few"

places = np.linspace(0, 1, 101)
share = []
for i, place in enumerate(places):
    request = i, torch.full((1, 1, 1), float(place)), certify.generator_for(0, i, 1, "cpu"), 2000
    counts = certify.count_under_noise(coarse, [request], sigma, batch=1000)[0]
    share.append(counts[1].item() / 2000)
print(f"share of class 1 at x = 0: {share[0]:.1%}, at x = 1: {share[-1]:.0%}")
assert 0.3 < share[0] < 0.37 and share[-1] == 1
pictures.picture_of_floats(places, np.array(share))

# %% [markdown]
# Networks do not read last digits on purpose, and published results rest on the belief that they do not do so by
# accident. It can be made a theorem. Images are on a grid to begin with, $x \in \{0, 1/G, \dots, 1\}^d$. Let the base
# classifier *round* its input to that grid (without clipping): $\tilde f(z) = f(\operatorname{round}(z))$. This is a
# classifier like any other, so (1.6) and (1.7) hold for it with *real* noise. And since $x$ is on the grid,
#
# $$ \operatorname{round}(x + e) = x + \operatorname{round}(e), \qquad
#    \Pr\bigl[\operatorname{round}(e) = j/G\bigr] = \Phi\Bigl(\frac{j + \frac12}{\sigma G}\Bigr) -
#    \Phi\Bigl(\frac{j - \frac12}{\sigma G}\Bigr), \tag{7.7} $$
#
# with $\operatorname{round}$ to the nearest multiple of $1/G$. So all that is ever needed is an integer $j$ with
# these probabilities, for each pixel. It is drawn from 53 random bits and a table of the cumulative probabilities.
# Draws that the last bits of the table would decide are not counted for $A$. This is in substance the method of
# Voracek and Hein (ICLR 2023); in the scripts it is `GridNoise` of `extras/integer_noise.py`.
#
# In the page, without the care for the last bits, it is four lines:

# %%
def rounded_noise(sigma, G, shape, generator):
    """Integers j with the probabilities (7.7): as many table entries as lie below 53 random bits."""
    edges = np.arange(-math.ceil(9 * sigma * G), math.ceil(9 * sigma * G)) + 0.5
    table = np.round(stats.norm.cdf(edges / (sigma * G)) * 2**53)
    bits = torch.randint(2**53, shape, generator=generator).numpy()
    return np.searchsorted(table, bits, side="right") - math.ceil(9 * sigma * G)


random = np.random.default_rng(8)
for _ in range(20):
    s, G = random.uniform(0.1, 1), int(random.integers(2, 256))
    x = torch.randint(G + 1, (1, 6, 6)) / G
    out, _ = integer_noise.GridNoise(s, G, torch.device("cpu"))(x, torch.Generator().manual_seed(3), copies=100)
    j = rounded_noise(s, G, out.shape, torch.Generator().manual_seed(3))
    assert np.array_equal(np.round((out * G).double().numpy()), np.round((x * G).double().numpy()) + j)
show(integer_noise.GridNoise)

# %% [markdown]
# **Check.** The frequencies of the integers against (7.7); the identity on the left by exact rational
# arithmetic; and the trap. With grid noise, what is claimed at $x = 1$ is also true at $x = 0$, as both are multiples
# of $1/16$ and stay such.

# %%
grid = integer_noise.GridNoise(sigma, 16, torch.device("cpu"))
out, counted = grid(torch.zeros(1, 30, 30), torch.Generator().manual_seed(0), copies=100)
j = (out * 16).round().long().flatten().numpy()
values = np.arange(-12, 13)
probability = stats.norm.cdf((values + 0.5) / (16 * sigma)) - stats.norm.cdf((values - 0.5) / (16 * sigma))
observed = np.array([(j == value).mean() for value in values])
assert counted.all() and np.all(np.abs(observed - probability) < 5 * np.sqrt(probability / len(j)))


def nearest(z):
    """round, to the grid 1/16, in fractions."""
    return Fraction(math.floor(z * 16 + Fraction(1, 2)), 16)


for numerator in range(17):
    for e in np.random.default_rng(numerator).normal(size=50):
        x, e = Fraction(numerator, 16), Fraction(float(e))
        assert nearest(x + e) == x + nearest(e)
settings = SimpleNamespace(sigma=sigma, n0=100, n=20_000, alpha=alpha, seed=0, bound="one-sided")
for place in (one, zero):
    answer = integer_noise.certify_on_grid(coarse, place, grid, 0, settings)
    print(f"grid noise, x = {place.item():.0f}: {answer}")
    assert answer[0] == 1

pictures.picture_of_grid_noise(values, observed, probability, len(j))

# %% [markdown]
# One more place where digits matter: the radius that is printed. The quantiles are themselves computed
# in floats, and a table entry must not exceed the truth. So radii are rounded *down*, with a margin of $10^{-9}$ for
# errors of the special functions (`round_down`). And in one sense floats are no approximation at all: the theorem is
# about $f$ *as it is computed*. A network run in another precision, or with another kernel, is another $f$, with its
# own certificates. Deploy the one that you certified.

# %%
for radius in (0.1234567891, 0.25, 1.0000004, 1e-10):
    lowered = certify.round_down(radius)
    written = Fraction(f"{lowered:.6f}")
    assert written < Fraction(radius) and Fraction(radius) - written < Fraction(2, 10**6)
    print(f"{radius:.10f} -> {lowered:.6f}")

# %% [markdown]
# ## 7.6 What to take along
#
# * A fixed-$n$ bound that is looked at again and again errs, in the end, with certainty: section 7.1.
# * Evidence is a bet against the claim. If the claim is true, no rule for stopping wins: (7.3), (7.4). So a bound from
#   it holds at all looks together.
# * A table's radii are settled with far fewer draws than a fixed $n$, but for images next to one of them.
# * Who wants the theorem without a footnote draws the noise on the grid: (7.7).
# * What is certified is $f$ as it is computed, in its precision, on its device.
#
# ## 7.7 Exercises
#
# 1. **A single bet.** Replace $w$ by a point mass at one $\theta$. How fast does $\ln E_n$ grow when the true share is
#    $\theta$? How many draws does it take on average to reach $1/\alpha = 1000$, for $p_0 = 0.5$ and $\theta = 0.6$?
#    Why spread the bet at all? *Hint:* the law of large numbers for the logarithm of one factor.
# 2. **Fifty looks by Bonferroni.** Somebody looks after every 100 draws up to 5000, with Clopper-Pearson bounds at
#    $\alpha/50$. Is that valid? Compare the bound with the anytime bound for $\hat p = 0.75$, at the first and at the
#    last look. *Hint:* `lower_confidence_bound` and `anytime_lower_bound`.
# 3. **Clip, then count.** A deployment rounds noisy copies to the grid and clips them to $[0, 1]$, since its network
#    asks for that. Which classifier is certified if the counts were made with the clipping inside $f$, and which claim
#    is lost if only the deployment clips? *Hint:* (7.7), with a function in between.
#
# <details><summary>Answers</summary>
#
# 1. By $\mathbb E \ln(\text{factor}) = \theta \ln\frac{\theta}{p_0} + (1-\theta)\ln\frac{1-\theta}{1-p_0}$ a draw, the
#    Kullback-Leibler divergence: here 0.0201. It takes about $\ln 1000 / 0.0201 = 343$ draws. But the bet on $\theta =
#    0.6$ loses for ever if the true share is 0.54, although that is above $p_0$. The mixture needs no guess, and pays
#    for it with a logarithm of $n$.
# 2. It is valid, by the union bound. Its bound is a little lower than the anytime bound at the first look, and a little
#    higher at the last. But after the fiftieth look it has nothing left to spend, and the looks must be fixed before.
# 3. With the clipping inside, the base classifier is $z \mapsto f(\operatorname{clip}(\operatorname{round}(z)))$, a
#    function of $x + e$ like any other: it is certified, and it must be deployed as it is. If only the deployment
#    clips, its answers are those of another base classifier, with other shares: nothing is certified. The cell shows
#    two shares for one $f$, at a black pixel.
#
# </details>

# %%
# The numbers of the answers.
def growth(p, theta, p0):
    """Mean of the logarithm of one factor of (7.2), for a bet on theta alone."""
    return p * math.log(theta / p0) + (1 - p) * math.log((1 - theta) / (1 - p0))


random = np.random.default_rng(14)
won = np.log(np.where(random.random((2000, 3000)) < 0.6, 0.6 / 0.5, 0.4 / 0.5)).cumsum(axis=1)
waited = (won >= math.log(1000)).argmax(axis=1) + 1
assert growth(0.54, 0.6, 0.5) < 0 and 1 <= waited.mean() / (math.log(1000) / growth(0.6, 0.6, 0.5)) < 1.05
print(f"exercise 1: {growth(0.6, 0.6, 0.5):.4f} a draw, {waited.mean():.0f} draws on average")
for n, better in ((100, "any time"), (5000, "Bonferroni")):
    bonferroni = lower_confidence_bound(n * 3 // 4, n, 0.001 / 50)
    any_time = sequential.anytime_lower_bound(n * 3 // 4, n, 0.001)
    print(f"exercise 2, n = {n:4}: Bonferroni {bonferroni:.4f}, any time {any_time:.4f}")
    assert (bonferroni > any_time) == (better == "Bonferroni")

j = rounded_noise(sigma, 16, (100_000,), torch.Generator().manual_seed(4))
answers = {"as it is": (j >= 0).mean(), "clipped": (np.clip(j, 0, 16) >= 0).mean()}       # f: is the pixel at least 0?
print("exercise 3, share of 'at least 0' at x = 0:", {name: round(float(value), 3) for name, value in answers.items()})
assert answers["as it is"] < 0.6 and answers["clipped"] == 1

# %% [markdown]
# ## 7.8 Appendix: the refuted claims form an interval
#
# Section 7.2 needs this: *wherever $E_n \ge 1/\alpha$, it falls as $p_0$ rises.* So the refuted claims form an
# interval $(0, \underline q_\alpha]$. Write $q_0 = 1 - p_0$, $b$ for the Beta density at $p_0$, and $W$ for its mass on
# $(p_0, 1]$. Differentiating (7.2),
#
# $$ \frac{d \ln E_n}{d p_0} = \frac bW \Bigl(1 - \frac 1{E_n}\Bigr) - \frac{n (\hat p - p_0)}{p_0 q_0}. $$
#
# *Proof* that this is negative where $E_n \ge 1/\alpha$, for $\alpha < 0.49$.
# 1. Where $p_0 \ge \hat p$ all likelihood ratios are below 1, and so is $E_n$. So let $p_0 < \hat p$.
# 2. There $E_n$ is at most the largest ratio, $e^{n \mathrm{KL}(\hat p \| p_0)}$, and $\mathrm{KL}(\hat p \| p_0) \le
#    (\hat p - p_0)^2 / (p_0 q_0)$. Hence $E_n \ge 1/\alpha$ makes the last term at least
#    $\sqrt{n \ln(1/\alpha) / (p_0 q_0)}$.
# 3. The first term is at most $b / W \le 1 / (2 q_0 \sqrt{p_0})$, since $b = 1 / (\pi \sqrt{p_0 q_0})$ and $W = \frac
#    2\pi \arcsin \sqrt{q_0} \ge \frac 2\pi \sqrt{q_0}$.
# 4. So the derivative is negative if $4 n q_0 \ln(1/\alpha) > 1$. If $p_0 < \frac12$, then $n q_0 \ge \frac12$.
#    Otherwise $E_n \le p_0^{-n}$ gives $\ln(1/\alpha) \le n \ln(1/p_0) \le n q_0 / p_0$, so that $n q_0 \ge
#    \ln(1/\alpha) / 2$. Both suffice for $\alpha < 0.49$. $\square$
#
# **Check** the derivative by differences, the inequalities of steps 2 and 3, and the sign.

# %%
random, refuted = np.random.default_rng(15), 0
for _ in range(3000):
    n = int(random.integers(1, 500))
    k, p0 = int(random.integers(0, n + 1)), random.uniform(0.02, 0.98)
    q0, share, step = 1 - p0, k / n, 1e-6
    log_e = sequential.log_e_value(k, n, p0)
    density_over_mass = stats.beta.pdf(p0, 0.5, 0.5) / stats.beta.sf(p0, 0.5, 0.5)
    assert density_over_mass <= 1 / (2 * q0 * math.sqrt(p0)) + 1e-9
    divergence = xlogy(share, share / p0) + xlogy(1 - share, (1 - share) / q0)
    assert divergence <= (share - p0) ** 2 / (p0 * q0) + 1e-12
    if log_e < math.log(1 / 0.49):
        continue
    refuted += 1
    slope = density_over_mass * (1 - math.exp(-log_e)) - n * (share - p0) / (p0 * q0)
    difference = sequential.log_e_value(k, n, p0 + step) - sequential.log_e_value(k, n, p0 - step)
    assert log_e <= n * divergence + 1e-9 and slope < 0 and np.isclose(difference / (2 * step), slope, rtol=1e-3)
print(f"{refuted} of 3000 random claims were refuted; E falls at each of them")
assert refuted > 500

# %% [markdown]
# previous: [06, the rivals](06_the_rivals.ipynb) | [contents](README.md)
