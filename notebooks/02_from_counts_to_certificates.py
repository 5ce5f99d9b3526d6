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
# previous: [01, smoothing](01_smoothing.ipynb) | [contents](README.md) | next:
# [03, the denoising masked autoencoder](03_denoising_masked_autoencoder.ipynb)
#
# # 2. From counts to certificates
#
# Notebook 01 turned a share into a radius: if class $A$ wins the share $p_A > 1/2$ of the noisy copies of $x$, then $g$
# does not change its mind within $\sigma\,\Phi^{-1}(p_A)$. But nobody knows $p_A$. We can only draw and count. This
# notebook is about the step from the count to a sentence that is *true with probability at least $1 - \alpha$*, and
# about the ways to spoil it without noticing.
#
# **Afterwards you can**
# * derive the bound of Clopper and Pearson, write CERTIFY and PREDICT from it, and say what each of them promises;
# * recognise a false certificate in the making: an estimate in place of a bound, reused draws, the best of several
#   runs, a look at the count;
# * read a table of certified accuracy with its error, and use the counts of all classes.
#
# **It needs** sections 1.2 and 1.8 of notebook 01, binomial and Beta distributions, and the packages of
# `requirements.txt`; no GPU, no download. **It runs** in about a minute on two CPU cores. The *short path* of the
# [contents](README.md) reads sections 2.1, 2.2, 2.4 and 2.7. Bounds that may be looked at
# any time, and noise without floats, are the subject of [notebook 07](07_beyond_the_paper.ipynb).
#
# | symbol | meaning |
# |---|---|
# | $p$ | the unknown share $p_A = \Pr[f(x + e) = A]$, $\;e \sim \mathcal N(0, \sigma^2 I)$ |
# | $n$, $k$ | number of noisy copies; how many of them $f$ called $A$ |
# | $\hat p = k/n$ | the observed share |
# | $\underline p(k)$, $\overline p(k)$ | bounds that err with probability $\le \alpha$ ($\underline p_a$: $\le a$) |
# | $\underline{p_A}$, $\overline{p_B}$ | such bounds of the shares of the top class and of its likeliest rival |
# | $\alpha$ | the chance that the statement about one image is wrong; $0.001$ in the literature |
# | $M$ | number of test images |
# | $\Phi$, $\varphi$ | distribution function and density of $\mathcal N(0, 1)$ |
#
# (Those of all notebooks stand in the [contents](README.md#symbols), and so do the [references](README.md#references).)

# %%
# %matplotlib inline
import math
import sys
from fractions import Fraction
from pathlib import Path

ROOT = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "certify.py").is_file())
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]        # works from notebooks/ and from the repository's root

import numpy as np
import pictures
import torch
from pictures import show
from scipy import stats
from scipy.optimize import brentq
from scipy.special import expit, gammaln, xlogy

import certify
import model
from certify import certified_radius, lower_confidence_bound  # the two that occur everywhere
from results import two_sided

# %% [markdown]
# ## 2.1 Monte Carlo, and why an estimate is not enough
#
# Draw $n$ independent noisy copies and count. The count, and the standard deviation of the observed share, are
#
# $$ k \sim \operatorname{Binomial}(n, p), \qquad \Pr[k = j] = \binom nj p^j (1 - p)^{n - j},
#    \qquad \operatorname{sd}(\hat p) = \sqrt{p(1 - p)/n}, \tag{2.1} $$
#
# whatever the dimension of the image: the copies are independent, and each is either called $A$ or not. Here are
# the counts for one test digit and the committed transformer.

# %%
checkpoint = model.read_checkpoint(ROOT / "results/digits/finetune_sigma_0.25.pt", "finetune")
vit = certify.rebuild(checkpoint, "the checkpoint").eval()
images = certify.open_images("digits", None, train=False, size=8, channels=1, device="cpu")


def digit(i):
    """Test image i in [0, 1]: (1, 8, 8)."""
    return images.items[i][0] / images.white


def counts_of(f, x, sigma, n, index, phase, batch=100):
    """The scripts' counts (K,) on n noisy copies of image `index`; the phases 0, 1 and 2 select, estimate, predict."""
    request = index, x, certify.generator_for(0, index, phase, "cpu"), n
    return certify.count_under_noise(f, [request], sigma, batch)[0]


index, sigma, alpha = 3, 0.25, 0.001
x = digit(index)
counts = counts_of(vit, x, sigma, 4000, index, 1, batch=500)
noisy = x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

pictures.picture_of_counts(
    (x[0], noisy[0]), (f"a {images.labels[index]}", rf"a copy at $\sigma$ = {sigma}"), counts.tolist(), counts.argmax(),
)

# %% [markdown]
# Put $\hat p$ into the formula of the radius, and two things go wrong. The estimate is too large about half of the
# time, and then so is the radius: the "certificate" is false. Worse, $k = n$ is the likely outcome if $f$ errs on a
# copy in a million. Then the claim is $\sigma\,\Phi^{-1}(1) = \infty$, which no finite experiment supports.
#
# **Check**, exactly: $\Pr[\hat p > p]$ is a binomial tail.

# %%
n = 1000
for p in (0.55, 0.8, 0.95, 0.9999):
    too_large = stats.binom.sf(math.floor(n * p), n, p)                     # P[k > n p]
    infinite = p**n
    print(f"p = {p}: the radius from k/n is too large with probability {too_large:.2f}, infinite with {infinite:.3f}")
    assert too_large > 0.4
assert certified_radius(1.0, 0.25) == math.inf

# %% [markdown]
# ## 2.2 The bound of Clopper and Pearson
#
# We need $\underline p$ with $\Pr_p[\underline p(k) > p] \le \alpha$ for *every* $p$. Clopper and Pearson (1934) turn a
# family of tests around. Having seen $k$, a value $p$ is *refuted* if under it so large a count would have been rare,
# $\Pr_p[X \ge k] \le \alpha$ with $X \sim \operatorname{Binomial}(n, p)$. The bound is the edge of what is refuted:
#
# $$ \underline p(k) = \sup\{\, p : \Pr_p[X \ge k] \le \alpha \,\}, \quad\text{the solution of}\quad
#    \sum_{j = k}^{n} \binom nj p^j (1 - p)^{n - j} = \alpha \quad (k \ge 1), \qquad \underline p(0) = 0. \tag{2.2} $$
#
# *Why it is valid.* The tail $\Pr_p[X \ge k]$ increases with $p$ (next equation), so $\underline p(k) > p$ means that
# $\Pr_p[X \ge k] < \alpha$. The tail decreases with $k$. Let $k^*$ be the smallest count with $\underline p(k^*) > p$.
# Then $\Pr_p[\underline p(X) > p] = \Pr_p[X \ge k^*] < \alpha$, as $\underline p$ increases with $k$. The probability
# is 0 if there is no such count. $\square$ No approximation has been made, and no assumption about $p$ or $n$.
#
# **The Beta form.** Let $U_1, \dots, U_n$ be independent and uniform on $[0, 1]$. The number of them below $p$ is
# $\operatorname{Binomial}(n, p)$, and it is at least $k$ exactly if the $k$-th smallest, $U_{(k)}$, is below $p$. The
# $k$-th of $n$ uniform order statistics has the density $n\binom{n-1}{k-1}u^{k-1}(1-u)^{n-k}$ (one of them at $u$,
# $k-1$ below, $n - k$ above). That is the density of $\operatorname{Beta}(k, n - k + 1)$. Hence
#
# $$ \Pr_p[X \ge k] = \Pr[U_{(k)} \le p] = \Pr\bigl[\operatorname{Beta}(k, n - k + 1) \le p\bigr], \qquad
#    \underline p(k) = \text{its } \alpha \text{ quantile}, \qquad \underline p(n) = \alpha^{1/n}. \tag{2.3} $$
#
# It shows the monotonicity, and gives the bound as a quantile. At $k = n$ the sum in (2.2) has the single term $p^n$.
#
# In code, (2.2) is a sum and a bisection. The scripts' `lower_confidence_bound` takes the quantile of (2.3).

# %%
def upper_tail(k, n, p):
    """P_p[X >= k], term by term."""
    return math.fsum(math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(k, n + 1))


def clopper_pearson(k, n, alpha):
    """(2.2): the p at which so large a count becomes as likely as alpha."""
    if k == 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        refuted = upper_tail(k, n, middle) <= alpha
        low, high = (middle, high) if refuted else (low, middle)
    return low


random = np.random.default_rng(0)
for _ in range(100):
    n = int(random.integers(1, 120))
    k, a = int(random.integers(0, n + 1)), random.uniform(0.0001, 0.2)
    assert abs(clopper_pearson(k, n, a) - lower_confidence_bound(k, n, a)) < 1e-9
for k, n, a in ((1, 10, 0.05), (7, 10, 0.001), (60, 100, 0.001), (99, 100, 0.05), (100, 100, 0.001)):
    print(f"k = {k:3} of {n:3}, alpha = {a}: bound {clopper_pearson(k, n, a):.6f}, k/n = {k / n:.2f}")

# %% [markdown]
# **Check** the density of the order statistic, by the derivative of the sum.

# %%
for k, n, a in ((1, 10, 0.05), (7, 10, 0.001), (60, 100, 0.001), (99, 100, 0.05), (100, 100, 0.001)):
    u = clopper_pearson(k, n, a)
    slope = (upper_tail(k, n, u + 1e-6) - upper_tail(k, n, u - 1e-6)) / 2e-6
    density = n * math.comb(n - 1, k - 1) * u ** (k - 1) * (1 - u) ** (n - k)
    assert abs(slope / density - 1) < 1e-4
assert clopper_pearson(0, 10, 0.05) == lower_confidence_bound(0, 10, 0.05) == 0

# %% [markdown]
# ## 2.3 How often does a bound err? Exactly
#
# *Not on the short path.*
#
# The probability that a bound errs at $p$ is a finite sum, over all counts with $\underline p(k) > p$. We compare three
# bounds, with $z = \Phi^{-1}(1 - \alpha)$:
#
# $$ \underline p_{\text{Hoeffding}} = \hat p - \sqrt{\frac{\ln(1/\alpha)}{2n}}, \qquad
#    \underline p_{\text{Wilson}} = \frac{\hat p + \frac{z^2}{2n} - z\sqrt{\frac{\hat p(1 - \hat p)}{n} +
#    \frac{z^2}{4n^2}}}{1 + \frac{z^2}{n}}. \tag{2.4} $$
#
# Hoeffding's is valid: $\Pr[\hat p - p \ge t] \le e^{-2nt^2}$ for independent variables with values in $[0, 1]$, and
# $t$ is chosen to make the right-hand side $\alpha$. It treats every variable as if its variance were $1/4$, the
# largest possible, and is loose near $p = 1$, where large radii live.
#
# Wilson's solves $(\hat p - p)/\sqrt{p(1-p)/n} = z$ for $p$: the count is treated as normal, with the right variance.
# It is an excellent *approximate* interval (Brown, Cai and DasGupta 2001).

# %%
def hoeffding(k, n, alpha):
    return np.maximum(0, k / n - np.sqrt(np.log(1 / alpha) / (2 * n)))


def wilson(k, n, alpha):
    share, z = k / n, stats.norm.isf(alpha)
    root_of_variance = np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return (share + z**2 / (2 * n) - z * root_of_variance) / (1 + z**2 / n)


def exact(k, n, alpha):
    return np.array([lower_confidence_bound(int(j), n, alpha) for j in k])


def error_probability(bound, n, p, alpha):
    """P[bound(k) > p] for each p: the bounds grow with k, so it is a binomial tail."""
    bounds = np.maximum.accumulate(bound(np.arange(n + 1), n, alpha))
    return stats.binom.sf(np.searchsorted(bounds, p, side="right") - 1, n, p)


p = expit(np.linspace(-11.5, 9.2, 12_000))                          # evenly on the logit scale: both ends are seen
bounds = {"Wilson": wilson, "Clopper-Pearson": exact, "Hoeffding": hoeffding}
errors = {n: {name: error_probability(bound, n, p, alpha) / alpha for name, bound in bounds.items()}
          for n in (10, 100, 1000)}
pictures.picture_of_errors(p, errors)
for n, of_bounds in errors.items():
    for name, error in of_bounds.items():
        print(f"{name:16} n = {n:4}: largest error {error.max():6.2f} alpha; for p > 1/2 {error[p > 0.5].max():5.2f} alpha")
        assert (error.max() <= 1 + 1e-6) == (name != "Wilson")
    assert of_bounds["Wilson"][p > 0.5].max() > 1

# %% [markdown]
# The saw teeth of Clopper and Pearson touch the line from below and never cross it. Wilson crosses it at each of the
# three $n$: far for small $p$, where one success is enough to err, and by 10 to 26 percent beside $p = 1/2$, where
# abstention is decided. It is *not allowed*, because "with probability at least $1 - \alpha$, for every $f$ and $x$" is
# the whole product. The exact bound costs nothing more.
#
# Hoeffding's is valid, and expensive. Below is the radius that each *valid* bound proves when the count is $k = np$:

# %%
true, proven = np.linspace(0.5, 0.9995, 300), {}
for n in (1000, 100_000):
    for name, bound in (("Clopper-Pearson", lower_confidence_bound), ("Hoeffding", hoeffding)):
        proven[name, n] = [certified_radius(float(bound(j, n, alpha)), 1.0) for j in np.floor(n * true)]
pictures.picture_of_proven(stats.norm.ppf(true), proven)
for n in (100, 10_000):
    assert all(lower_confidence_bound(k, n, alpha) > hoeffding(k, n, alpha) for k in range(n // 2, n + 1, n // 50))

# %% [markdown]
# ## 2.4 CERTIFY, and when to abstain
#
# If $\underline p(k) \le 1/2$, it is not even certain that $g$ answers $A$ at $x$ itself, and nothing is said:
#
# $$ \text{CERTIFY: } \quad \begin{cases} (A,\ \sigma\,\Phi^{-1}(\underline p(k))) & \underline p(k) > \tfrac12 \\
#    \text{abstain} & \underline p(k) \le \tfrac12 \end{cases}
#    \qquad\Rightarrow\qquad \Pr[\text{certificate false}] \le \Pr[\underline p(k) > p] \le \alpha. \tag{2.5} $$
#
# The implication: if $\underline p(k) \le p$, then $p > 1/2$ whenever a certificate is
# issued, $A$ is the answer of $g$, and the radius from $\underline p(k)$ is at most the true one. So a false
# certificate requires $\underline p(k) > p$. Abstentions are never false; they count as wrong in certified accuracy.
#
# The class $A$ is chosen with $n_0$ copies of its own, for a reason that section 2.7 gives.

# %%
def certify_by_hand(f, x, sigma, n0, n, alpha, index):
    selection = counts_of(f, x, sigma, n0, index, 0)
    top = int(selection.argmax())
    estimation = counts_of(f, x, sigma, n, index, 1)
    k = int(estimation[top])
    p_a = stats.beta.ppf(alpha, k, n - k + 1) if k else 0.0
    if p_a <= 1 / 2:
        return certify.ABSTAIN, 0.0
    radius = sigma * stats.norm.ppf(p_a)
    return top, certify.round_down(radius)


for i in range(0, 360, 45):
    mine = certify_by_hand(vit, digit(i), 0.25, 100, 500, alpha, i)
    assert mine == certify.certify(vit, digit(i), 0.25, n0=100, n=500, alpha=alpha, index=i)
    print(f"test image {i}, a {images.labels[i]}: {mine}")

# %% [markdown]
# The scripts' `certify` gives the same. They have the steps in a generator, `fixed_n`, which asks for counts and makes
# bounds of them; `certificate` abstains or answers. (The two-sided bounds are the subject of section 2.9.)
# `certify_all` keeps a pool of such generators busy, one for each image, so that the copies of many images fill batches
# together; `certify` has a pool of one.

# %%
show(certify.fixed_n, certify.certificate, certify.certify_all)

# %%
some = [(i, digit(i)) for i in range(0, 40, 5)]
pool = certify.certify_all(vit, some, sigma, 100, 500, alpha, batch=500)
pooled = {i: certify.certificate(top, *bounds["one-sided"], sigma) for i, _, top, _, _, bounds in pool}
assert pooled == {i: certify_by_hand(vit, x, sigma, 100, 500, alpha, i) for i, x in some}
print("certify and certify_all agree:", pooled)

# %% [markdown]
# **Check.** The chance to abstain is exactly $\Pr_p[k < k^*]$, with the $k^*$ of 2.2 for the share $1/2$: the least
# count with $\underline p(k^*) > 1/2$. That is in turn the least count whose tail under a fair coin is below $\alpha$.
# The latter sum, in whole numbers, is held against the bound. On the boundary of a linear classifier $p = 1/2$, and
# every certificate is false: we count them.

# %%
def least_count(n, alpha):
    """By integers alone: the least k with sum_{j >= k} C(n, j) < alpha 2^n."""
    tail, k = 0, n + 1
    while (tail + math.comb(n, k - 1)) < alpha * 2**n:
        k -= 1
        tail += math.comb(n, k)
    return k


def on_the_plane(z):
    """A linear classifier whose boundary goes through x = 0."""
    return torch.stack([z.flatten(1).sum(1), -z.flatten(1).sum(1)], dim=1)


for n in (20, 100, 1000):
    k = least_count(n, alpha)
    assert lower_confidence_bound(k, n, alpha) > 0.5 >= lower_confidence_bound(k - 1, n, alpha)
    print(f"n = {n:4}: certifies from {k} of {n} on")

zero = torch.zeros(1, 2, 2)
answers = [certify.certify(on_the_plane, zero, 0.25, n0=100, n=100, alpha=0.05, index=i)[0] for i in range(1000)]
false = sum(answer != certify.ABSTAIN for answer in answers)
print(f"on the plane, 1000 runs with alpha = 0.05: {false} false certificates")
assert 0 < false <= stats.binom.ppf(1 - 1e-4, 1000, 0.05)

p, chances = np.linspace(0.5, 0.7, 400), {}
for n in (100, 1000, 10_000, 100_000):
    k = np.searchsorted(stats.binom.sf(np.arange(n + 1) - 1, n, 0.5) < alpha, True)    # k*, by the tail of a fair coin
    chances[n] = stats.binom.cdf(k - 1, n, p)
pictures.picture_of_abstentions(p, chances)

# %% [markdown]
# ## 2.5 PREDICT: an answer without a radius
#
# *Not on the short path.*
#
# Anyone who only wants $g(x)$ can do with less. PREDICT counts, and takes the two most frequent classes, with the
# counts $k_1 \ge k_2$. It abstains unless a two-sided test of $k_1$ out of $k_1 + k_2$ against a fair coin has a
# $p$-value of at most $\alpha$:
#
# $$ 2 \sum_{j = k_1}^{k_1 + k_2} \binom{k_1 + k_2}{j} 2^{-(k_1 + k_2)} \le \alpha. \tag{2.6} $$
#
# Given that a copy fell into one of two fixed classes, it is a coin toss, fair only if both are equally likely. The
# test is *two*-sided as the same draws decide which of the two classes is called the first: either could have come
# out ahead. For two classes this is the whole argument. The test remains valid when the two are the most frequent of
# $K$: that is a theorem on rank verification (Hung and Fithian 2019).
#
# In the scripts `predict` counts and `clear_winner` tests.

# %%
def winner_by_hand(counts, alpha):
    """(2.6), in whole numbers."""
    second, first = sorted(counts)[-2:]
    tail = sum(math.comb(first + second, j) for j in range(first, first + second + 1))
    if min(Fraction(1), Fraction(2 * tail, 2 ** (first + second))) > alpha:
        return certify.ABSTAIN
    return counts.index(first)


random = np.random.default_rng(1)
for _ in range(300):
    tally = random.multinomial(random.integers(1, 100), random.dirichlet(np.full(random.integers(2, 10), 0.5)))
    a = random.uniform(0.001, 0.2)
    assert certify.clear_winner(torch.tensor(tally), a) == winner_by_hand(tally.tolist(), a)

answers = [certify.predict(on_the_plane, zero, 0.25, n=100, alpha=0.05, index=i) for i in range(1000)]
tallies = [counts_of(on_the_plane, zero, 0.25, 100, i, 2) for i in range(1000)]
assert answers == [winner_by_hand(tally.tolist(), 0.05) for tally in tallies]
answered = np.mean(np.array(answers) != certify.ABSTAIN)
print(f"with equal classes, predict answers in {answered:.1%} of runs; allowed are 5 %")
assert 0 < answered <= stats.binom.ppf(1 - 1e-4, 1000, 0.05) / 1000

# %% [markdown]
# ## 2.6 The largest radius that n draws can prove
#
# *Not on the short path.*
#
# The best outcome is $k = n$. By (2.3) it proves the share $\alpha^{1/n}$ and no more, so
#
# $$ R_{\max}(n) = \sigma\,\Phi^{-1}\bigl(\alpha^{1/n}\bigr)
#    \;\approx\; \sigma\sqrt{2 \ln \frac{n}{2\ln(1/\alpha)}}. \tag{2.7} $$
#
# For $1 - \alpha^{1/n} \approx \ln(1/\alpha)/n$ when $n$ is large, and the Gaussian tail $1 - \Phi(t)$ is at most
# $\frac12 e^{-t^2/2}$. It is smaller than that by a factor of order $1/t$, so the approximation (the grey line) is a
# few tenths of $\sigma$ too high. The cap grows like $\sqrt{\ln n}$: doubling a radius takes roughly the *fourth power*
# of $n / (2 \ln(1/\alpha))$. This is why certified-accuracy curves end in a cliff. In the code it is nothing but
# `certified_radius(lower_confidence_bound(n, n, alpha), sigma)`.
#
# **Check** against the root of $p^n = \alpha$, and against the committed run: no radius beyond the cap, and each
# recomputed from its count.

# %%
for n in (10, 1000, 100_000, 1_000_000):
    share = brentq(lambda p, n=n: n * math.log(p) - math.log(alpha), 1e-9, 1 - 1e-15, xtol=1e-15)
    largest = certified_radius(lower_confidence_bound(n, n, alpha), 1.0)
    approximation = math.sqrt(2 * math.log(max(1, n / (2 * math.log(1 / alpha)))))
    assert abs(largest - max(0, stats.norm.ppf(share))) < 1e-6
    assert n < 1000 or 0 < approximation - largest < 0.5
    print(f"n = {n:7}: at most {largest:.2f} sigma")
rows = certify.read_log(ROOT / "results/digits/certify_sigma_0.25.tsv")
for row in rows:
    p_a = lower_confidence_bound(row["count"], row["n"], row["alpha"])
    cap = certified_radius(row["alpha"] ** (1 / row["n"]), 0.25)
    if row["predict"] != certify.ABSTAIN:
        assert row["radius"] == certify.round_down(certified_radius(p_a, 0.25)) <= cap
largest = max(row["radius"] for row in rows)
print(f"committed run, n = 10 000, sigma = 0.25: largest radius {largest:.4f}, cap {cap:.4f}")

n = np.unique(np.geomspace(10, 1e7, 200).astype(int))
caps = {sigma: [certified_radius(alpha ** (1 / draws), sigma) for draws in n] for sigma in (0.25, 0.5, 1.0)}
pictures.picture_of_caps(n, caps, np.sqrt(2 * np.log(np.maximum(n / (2 * math.log(1 / alpha)), 1))))

# %% [markdown]
# ## 2.7 Selection and estimation: why the draws must be fresh
#
# The count in (2.2) belongs to a class that was fixed *before* the draws were made. CERTIFY therefore takes $n_0$
# copies to choose $A$, and $n$ fresh ones to count. If one set served both purposes, the count would be the *largest*
# of several, which is not binomial. The error is then bounded only by a sum over what could have been chosen:
#
# $$ \Pr\bigl[\underline p(k_{\hat c}) > p_{\hat c}\bigr] \;=\; \sum_{c} \Pr\bigl[\underline p(k_c) > p_c,\ \hat c =
#    c\bigr] \;\le\; \sum_{c} \Pr\bigl[\underline p(k_c) > p_c\bigr] \;\le\; K \alpha, \qquad \hat c = \arg\max_c k_c.
#    \tag{2.8} $$
#
# With fresh draws, conditionally on $\hat c$ each count is binomial, and the bound holds given any choice. Reuse costs
# most for two classes of probability $1/2$ each: a certificate for either is false, and either may win. The error is
# exactly $2\alpha'$, where $\alpha' \le \alpha$ is the exact error of the bound there.
#
# The same mistake at a larger scale is unbounded. Who certifies with $t$ random seeds, or $t$ fine-tuned models, and
# reports for each image the largest radius, chooses among $t$ bounds. For independent ones the error is at most
#
# $$ 1 - (1 - \alpha)^t. \tag{2.9} $$
#
# *Peeking* is as bad: to look at the count from time to time, and to stop once the bound is good enough. Who looks
# after every 100 of 5,000 draws, at $\alpha = 5\,\%$ and a true share of $0.75$, meets a false bound in a quarter of
# the runs, as the cell below prints. [Notebook 07](07_beyond_the_paper.ipynb) has the exact number, and a bound that
# may be looked at.
#
# The random streams of an image are kept apart by `generator_for`. For one seed no two images or phases share a key,
# since every line of the mixing is a bijection of 32-bit numbers:

# %%
show(certify.generator_for)

# %% [markdown]
# **Check** of the streams: the same three again; a change of one of the three; and the keys of many images. Reuse and
# fresh draws, exactly, by enumeration of all counts; and (2.9) by simulation. On the right, the chance of a wrong
# choice, which only wastes an image: the true share is then below one half, and the bound abstains.

# %%
def stream(seed, image, phase):
    return torch.randn(1000, generator=certify.generator_for(seed, image, phase, "cpu"))


assert torch.equal(stream(0, 7, 1), stream(0, 7, 1))
others = [stream(0, 7, 0), stream(0, 7, 1), stream(0, 7, 2), stream(0, 8, 1), stream(1, 7, 1)]
assert (torch.corrcoef(torch.stack(others)) - torch.eye(5)).abs().max() < 0.15
keys = [certify.generator_for(0, image, phase, "cpu").initial_seed() for image in range(3000) for phase in (0, 1, 2)]
assert len(set(keys)) == len(keys)
print(f"{len(set(keys))} different keys of 3000 images in 3 phases")

n, a = 100, 0.05
k = np.arange(n + 1)
bounds = np.array([lower_confidence_bound(int(j), n, a) for j in k])
share = np.linspace(0.5, 0.7, 201)                                          # of class 0; class 1 has the rest
false_0 = np.array([stats.binom.pmf(k[(bounds > p) & (bounds > 0.5)], n, p).sum() for p in share])
false_1 = np.array([stats.binom.pmf(k[(bounds > 1 - p) & (bounds > 0.5)], n, 1 - p).sum() for p in share])
choose_0 = stats.binom.sf(49, 100, share)                                   # n0 = 100; ties choose class 0
fresh, reused = choose_0 * false_0 + (1 - choose_0) * false_1, false_0 + false_1
assert fresh.max() <= a and reused.max() > 1.7 * fresh[0]

random = np.random.default_rng(0)
tries = np.array([1, 2, 5, 10, 20, 50])
p = 0.8
at_p = stats.binom.pmf(k[bounds > p], n, p).sum()
best = [np.mean(bounds[random.binomial(n, p, (20_000, t))].max(axis=1) > p) for t in tries]
assert np.allclose(best, 1 - (1 - at_p) ** tries, atol=0.015)

best = np.array(best), 1 - (1 - at_p) ** tries
wrong = {n0: stats.binom.cdf(n0 // 2 - 1, n0, share) for n0 in (10, 100, 1000)}
pictures.picture_of_choices(share, {"fresh draws": fresh, "draws reused": reused}, tries, best, wrong, n, a)

looks = np.arange(100, 5001, 100)                                           # a claim is refuted by (2.2)
counts_so_far = random.binomial(100, 0.75, (20_000, len(looks))).cumsum(axis=1)
peeked = (stats.binom.sf(counts_so_far - 1, looks, 0.75) < a).any(axis=1).mean()
print(f"peeking, 50 looks: a false bound at one of them in {peeked:.1%} of 20 000 runs; allowed are {a:.1%}")
assert 0.2 < peeked < 0.3

# %% [markdown]
# ## 2.8 One image, and a whole test set
#
# *Not on the short path.*
#
# Of $M$ test images, image $i$ has the label $y_i$, the answer $\hat y_i$ and the radius $R_i$. *Certified accuracy* at
# $r$ is the share of images that are right with $R_i \ge r$. The *average certified radius* (Zhai et al. 2020) is the
# mean of the radii, where wrong answers and abstentions count 0. It is the area under the curve of the first:
#
# $$ \mathrm{CA}(r) = \frac1M \sum_{i=1}^M \mathbb 1\bigl[\hat y_i = y_i,\ R_i \ge r\bigr], \qquad
#    \mathrm{ACR} = \frac1M \sum_{i=1}^M R_i\,\mathbb 1\bigl[\hat y_i = y_i\bigr]. $$
#
# (They are equation (5.2) of notebook 05, which draws them and says what they hide.)
#
# At $\alpha = 0.001$, of 10 000 images about ten may carry a false certificate. What does that do to CA? Let $Z_i = 1$
# if the certificate of image $i$ is false. Given the images, the $Z_i$ are independent (each has its own noise) with
# $\Pr[Z_i = 1] \le \alpha$. So $\sum Z_i$ is stochastically smaller than $\operatorname{Binomial}(M, \alpha)$, and
#
# $$ \Pr\Bigl[\text{measured} - \text{true certified accuracy} > \frac qM\Bigr] \le \Pr\bigl[\operatorname{Bin}(M,
#    \alpha) > q\bigr] \le \rho, \qquad
#    q = \min\{j : \Pr[\operatorname{Bin}(M, \alpha) \le j] \ge 1 - \rho\}. \tag{2.10} $$
#
# For suppose that the measured number exceeds the true one by more than $q$. Then more than $q$ images were counted
# that are not really right within $r$, and each of those has a false certificate. (Independent indicators with
# chances $\alpha_i \le \alpha$ can be coupled: with uniform $U_i$, $\mathbb 1[U_i < \alpha_i] \le \mathbb 1[U_i <
# \alpha]$.) This holds for every $r$ at once: the false certificates are the same ones.
#
# Cohen, Rosenfeld and Kolter bound the same by Bernstein's inequality, $q/M \le \alpha + \sqrt{2\alpha(1 -
# \alpha)\ln(1/\rho)/M} + \ln(1/\rho)/(3M)$. The factor 2 under the root is missing in the published script
# (`HighProbAccuracy` in its `analyze.py`). Without it the bound can fail, as the check shows.
#
# It is a statement about *these* images, not about the population they come from. The other reading, "all $M$
# certificates hold, with probability $1 - \alpha$", needs the union bound: run each image at $\alpha / M$. By (2.7)
# that is cheap in radius.
#
# In the page, $q$ is added up in exact fractions, and taken as a quantile, too: `excess`, over $M$, is what to subtract
# from the measured accuracy that the scripts print.

# %%
def excess_by_hand(M, alpha, rho):
    """(2.10): the least j with P[Bin(M, alpha) <= j] >= 1 - rho."""
    alpha, rho = Fraction(alpha), Fraction(rho)
    j, reached = 0, (1 - alpha) ** M
    while reached < 1 - rho:
        j += 1
        reached += math.comb(M, j) * alpha**j * (1 - alpha) ** (M - j)
    return j


def excess(M, alpha, rho=0.001):
    """(2.10), as a quantile of the binomial distribution."""
    return int(stats.binom.ppf(1 - rho, M, alpha))


rho = 0.001
for M, a in ((1, 0.001), (20, 0.05), (120, 0.001), (500, 0.001), (1000, 0.002)):
    assert excess(M, a, rho) == excess_by_hand(M, a, rho)
print("images, false certificates:", {M: excess(M, alpha, rho) for M in (120, 500, 10_000)})

# %% [markdown]
# **Check.** Unequal error chances do no harm (their distribution is computed by convolution);
# Bernstein's bound with and without the factor; and the committed run's table.

# %%
chances, distribution = np.random.default_rng(7).uniform(0, 0.001, 500), np.ones(1)
for chance in chances:
    distribution = np.convolve(distribution, [1 - chance, chance])
stochastically = stats.binom.cdf(np.arange(50), 500, 0.001)
assert np.all(distribution.cumsum()[:50] >= stochastically - 1e-12)         # smaller

for factor in (1, 2):                                                       # under Bernstein's root, 10 000 images
    bernstein = 10 + math.sqrt(factor * 10 * 0.999 * math.log(1 / rho)) + math.log(1 / rho) / 3
    beyond = stats.binom.sf(math.floor(bernstein), 10_000, 0.001)
    print(f"Bernstein with factor {factor}: {bernstein:.1f} false certificates, "
          f"exceeded with probability {beyond:.5f}; quantile: {excess(10_000, 0.001, rho)}")
    assert (beyond <= rho) == (factor == 2)

q = excess_by_hand(len(rows), float(rows["alpha"][0]), rho)
print(f"committed run: M = {len(rows)} images, at most q = {q} false certificates, with 99.9 %")
curve = certify.read_curve(ROOT / "results/digits/certify_sigma_0.25.tsv")
for r in (0.0, 0.25, 0.5):
    measured = np.mean((rows["predict"] == rows["label"]) & (rows["radius"] >= r))
    print(f"  r = {r:4}: measured {100 * measured:.1f} %, true value at least {100 * (measured - q / len(rows)):.1f} %")
    assert np.isclose(certify.certified_accuracy(curve, r), measured)
each = certified_radius(lower_confidence_bound(100_000, 100_000, alpha), 1.0)
together = certified_radius(lower_confidence_bound(100_000, 100_000, alpha / 10_000), 1.0)
print(f"largest radius from 100 000 draws: {each:.3f} sigma at alpha, {together:.3f} sigma at alpha / 10 000")
assert 0.9 * each < together < each

M = np.unique(np.geomspace(20, 50_000, 300).astype(int))
points = {size: 100 * excess(size, alpha) / size for size in (500, 10_000)}
pictures.picture_of_excess(M, [100 * excess(int(j), alpha) / j for j in M], alpha, points)

# %% [markdown]
# ## 2.9 Two sides: what the other counts are worth
#
# *Not on the short path.*
#
# Theorem 1 of Cohen, Rosenfeld and Kolter takes *two* numbers: a lower bound $\underline{p_A}$ of the top class's
# share, and an upper bound $\overline{p_B}$ of the share of each other class, of its *rivals*. CERTIFY knows
# $\underline{p_A}$ alone and sets $\overline{p_B} = 1 - \underline{p_A}$. With both,
#
# $$ R = \frac\sigma2 \bigl(\Phi^{-1}(\underline{p_A}) - \Phi^{-1}(\overline{p_B})\bigr), \qquad
#    R - \sigma\,\Phi^{-1}(\underline{p_A}) = \frac\sigma2 \bigl(\Phi^{-1}(1 - \overline{p_B}) -
#    \Phi^{-1}(\underline{p_A})\bigr) \ge 0, \tag{2.11} $$
#
# since $1 - \overline{p_B} \ge \underline{p_A}$. The two radii are equal where two classes hold everything. Elsewhere
# CERTIFY pretends that all copies that $A$ lost went to one rival. If $A$ has the share 0.4, and six rivals 0.1 each,
# $g$ answers $A$ with a wide margin, but CERTIFY abstains, whatever $n$. From now on a radius is *one-sided* if
# $\overline{p_B} = 1 - \underline{p_A}$, and *two-sided* if $\overline{p_B}$ comes from the counts.
#
# **Check** (2.11) on the classifier of notebook 01, section 1.9, here with one pixel: $A$ below $z_A$, $B$ above $z_B$,
# many classes between. The shares of $A$ and $B$ meet exactly at the two-sided radius.

# %%
def radius_of(pair, sigma):
    """(2.11), from a pair (p_A, p_B)."""
    p_a, p_b = pair
    return certified_radius(p_a, sigma, p_b)


for z_a, z_b, s in ((-0.1, 0.3, 0.5), (0.05, 0.2, 0.25), (0.1, 0.1, 1.0)):
    p_a, p_b = stats.norm.cdf(z_a / s), stats.norm.cdf(-z_b / s)
    one, two = certified_radius(p_a, s), radius_of((p_a, p_b), s)
    meet = brentq(lambda t, A=z_a, B=z_b, s=s: stats.norm.cdf((A - t) / s) - stats.norm.cdf((t - B) / s), -5, 5)
    print(f"p_A = {p_a:.3f}, p_B = {p_b:.3f}: one-sided {one:.3f}, two-sided {two:.3f}; A and B meet at {meet:.3f}")
    gain = s / 2 * (stats.norm.ppf(1 - p_b) - stats.norm.ppf(p_a))
    assert abs(two - meet) < 1e-9 and abs(two - s * stats.norm.ppf(p_a) - gain) < 1e-9 and gain > -1e-9
    assert one == max(0, s * stats.norm.ppf(p_a)) and (two > one or abs(p_a + p_b - 1) < 1e-9)

# %% [markdown]
# **Bounds that hold together.** Failures are counts, too: a share is at most $u$ if the share of the rest is at least
# $1 - u$. So the upper bound of Clopper and Pearson at level $a$ is
#
# $$ \overline p_a(k) = 1 - \underline p_a(n - k), \qquad \Pr_p[\overline p_a(k) < p] \le a, \tag{2.12} $$
#
# the $1 - a$ quantile of $\operatorname{Beta}(k + 1, n - k)$. For classes with counts $k_c$, the part $\tau$ of
# $\alpha$ goes to the top class, and the rest to the largest count among its rivals:
#
# $$ \underline{p_A} = \underline p_{\tau\alpha}(k_A), \qquad
#    \overline{p_B} = \min\Bigl\{ \overline p_{(1 - \tau)\alpha}\bigl(\max_{c \ne A} k_c\bigr),\ 1 - \underline{p_A}
#    \Bigr\}, \qquad \tau = 0.9. \tag{2.13} $$
#
# *Proof* that both hold with probability at least $1 - \alpha$, for any $\tau$ that is fixed before the draws.
# 1. $A$ was chosen with other draws. So each $k_c$ is binomial, with the share of $c$. (They depend on each other.)
# 2. Let $c^*$ be the rival with the largest *share*: one class, whatever is drawn. Its bound $\overline
#    p_{(1-\tau)\alpha}(k_{c^*})$ errs with probability at most $(1 - \tau)\alpha$, and $\underline p_{\tau\alpha}(k_A)$
#    with at most $\tau\alpha$. So one of the two errs with probability at most $\alpha$.
# 3. If none errs: $\max_c k_c \ge k_{c^*}$ and $\overline p$ increases with $k$. So $\overline
#    p_{(1-\tau)\alpha}(\max_c k_c)$ is at least the bound of $c^*$, which is above the share of $c^*$, which is above
#    every other rival's. And no rival has more than $1 - \underline{p_A}$, as $A$ has at least $\underline{p_A}$: that
#    minimum costs nothing. $\square$
#
# A bound for *each* rival would need the union bound over them, $(1-\tau)\alpha/(K-1)$ each for $K$ classes. The radius
# asks for no such thing. $g$ is certified where $\underline{p_A} > \overline{p_B}$; $\underline{p_A} > \frac12$ is not
# needed. And the argument of (2.5) remains: a false certificate requires that one of the bounds errs.
#
# In the scripts these are `upper_confidence_bound`, `runner_up_of` and `two_sided_bounds`.

# %%
def upper_by_hand(k, n, a):
    """(2.12): where P_p[X <= k], which is the upper tail of the failures, is a."""
    return 1 - clopper_pearson(n - k, n, a)


def pair_by_hand(tally, top, alpha, part=0.9):
    """(2.13), word for word."""
    n, rivals = sum(tally), [int(k) for c, k in enumerate(tally) if c != top]
    p_a = clopper_pearson(int(tally[top]), n, part * alpha)
    return p_a, min(upper_by_hand(max(rivals), n, (1 - part) * alpha), 1 - p_a)


random = np.random.default_rng(11)
for k, n, a in ((0, 10, 0.05), (3, 10, 0.001), (60, 100, 0.001), (100, 100, 0.05)):
    tail = 1 - upper_tail(k + 1, n, upper_by_hand(k, n, a))                 # P[X <= k] at the bound
    assert k == n or abs(tail - a) < 1e-9
    assert abs(certify.upper_confidence_bound(k, n, a) - upper_by_hand(k, n, a)) < 1e-9
for classes in (2, 3, 10):
    for _ in range(10):
        tally = random.multinomial(random.integers(1, 80), random.dirichlet(np.ones(classes)))
        top, n = int(random.integers(classes)), int(tally.sum())            # any class: not only the most frequent
        assert certify.runner_up_of(tally, top, n) == max(np.delete(tally, top))
        part = random.uniform(0.1, 0.9)
        for mine, theirs in (((), ()), ((part,), (part,))):                 # at 0.9, and at any other part
            pair = certify.two_sided_bounds(torch.tensor(tally), top, n, alpha, *theirs)
            assert np.allclose(pair, pair_by_hand(tally, top, alpha, *mine), rtol=0, atol=1e-9)
print("of 40 copies 20, 12 and 8:", ", ".join(f"{bound:.4f}" for bound in pair_by_hand([20, 12, 8], 0, alpha)))

# %% [markdown]
# **Check.** The error of (2.13), exactly: of the 861 outcomes for three classes and $n = 40$ we add up the multinomial
# probabilities of those where $\underline{p_A}$ or $\overline{p_B}$ is on the wrong side of the truth, for shares all
# over the simplex.

# %%
n, a = 40, 0.05
outcomes = np.array([(i, j, n - i - j) for i in range(n + 1) for j in range(n + 1 - i)])       # 861 x 3 classes
log_ways = gammaln(n + 1) - gammaln(outcomes + 1).sum(axis=1)
share, split = np.linspace(0, 1, 301), np.linspace(0, 0.5, 41)              # of A; of the first rival in the rest


def worst_error(pairs):
    """P[p_A or p_B errs], at the worst split of the rest, for each share of A."""
    p_a, p_b = np.array(pairs).T
    errors = []
    for s in share:
        p = np.stack([np.full_like(split, s), (1 - s) * split, (1 - s) * (1 - split)], axis=1)     # splits x 3
        probability = np.exp(log_ways + xlogy(outcomes, p[:, None]).sum(axis=2))                   # splits x outcomes
        assert np.allclose(probability.sum(axis=1), 1)
        wrong = (p_a > p[:, :1] + 1e-12) | (p_b < p[:, 1:].max(axis=1, keepdims=True) - 1e-12)
        errors.append((probability * wrong).sum(axis=1).max())
    return np.array(errors)


def pairs_at(level_a, level_b):
    pairs = []
    for tally in outcomes:
        p_a = lower_confidence_bound(int(tally[0]), n, level_a)
        p_b = certify.upper_confidence_bound(int(tally[1:].max()), n, level_b)
        pairs.append((p_a, min(p_b, 1 - p_a)))
    return pairs


pairs = [certify.two_sided_bounds(torch.tensor(tally), 0, n, a) for tally in outcomes]
error = {"α for every bound": worst_error(pairs_at(a, a)),
         "0.9 α for A, 0.1 α for the largest rival: (2.13)": worst_error(pairs),
         "0.5 α for A, 0.5 α for the largest rival": worst_error(pairs_at(a / 2, a / 2)),
         "0.5 α for A, 0.25 α for each rival": worst_error(pairs_at(a / 2, a / 4))}
for name, errors in error.items():
    print(f"{name}: at most {errors.max() / a:.2f} alpha")
    assert (errors.max() <= a) == (name != "α for every bound")
pictures.picture_of_two_errors(share, {name: errors / a for name, errors in error.items()})

# %% [markdown]
# The line is crossed unless $\alpha$ is shared: two bounds err more often than one.
#
# **The plane of $\underline{p_A}$ and $\overline{p_B}$.** With $\Phi^{-1}$ as scale on both axes the level lines of
# both radii are straight: vertical for the one-sided radius, at 45 degrees for the two-sided one. On the edge
# $\overline{p_B} = 1 - \underline{p_A}$ they meet. Every dot is a test digit at its bounds (2.13), from $n = 2000$
# copies. The classifier was fine-tuned at $\sigma = 0.25$, and is asked at 0.5 and at 1, where its answers are spread.

# %%
digits = [(i, digit(i)) for i in range(0, 360, 12)]
levels, points, acr = (0.0, 0.25, 0.5, 1.0), {}, {}
for s in (0.5, 1.0):
    for level in levels:
        corner = level / s                                                  # where the radii agree: p_B = 1 - p_A
        assert np.isclose(certified_radius(stats.norm.cdf(corner), s), level)
        assert np.isclose(certified_radius(stats.norm.cdf(corner - 0.7), s, stats.norm.cdf(-corner - 0.7)), level)

    points[s] = {"both certify": [], "only two-sided certifies": [], "both abstain": []}
    total = dict.fromkeys(certify.BOUNDS, 0.0)
    for i, _, top, _, _, bounds in certify.certify_all(vit, digits, s, 100, 2000, alpha, batch=500):
        answers = {bound: certify.certificate(top, *bounds[bound], s) for bound in certify.BOUNDS}
        certifies = [answer != certify.ABSTAIN for answer, _ in answers.values()]
        assert certifies[1] or not certifies[0], "no theorem: it could fail by a hair at p_A = 1/2"
        [*points[s].values()][2 - sum(certifies)].append(bounds["two-sided"])
        for bound, (answer, radius) in answers.items():
            total[bound] += radius * int(answer == images.labels[i])
    acr[s] = {bound: value / len(digits) for bound, value in total.items()}
    print(f"sigma = {s:g}, of {len(digits)} digits: " + ", ".join(f"{len(pairs)} {name}" for name, pairs in points[s].items()))
    print("  ACR: " + ", ".join(f"{bound} {value:.3f}" for bound, value in acr[s].items()))
    assert acr[s]["two-sided"] > 1.2 * acr[s]["one-sided"] and points[s]["only two-sided certifies"]
pictures.picture_of_the_plane_of_bounds(points, levels)

# %% [markdown]
# The wedge between the diagonal $R = 0$ and the vertical line $p_A = \frac12$ holds the images that the one-sided bound
# gives away. Here is one, by `certify` itself:

# %%
index = 144
x = digit(index)
settings = dict(sigma=0.5, n0=100, n=4000, alpha=alpha, index=index, batch=500)
answer = {bound: certify.certify(vit, x, bound=bound, **settings) for bound in ("one-sided", "two-sided")}
counts = counts_of(vit, x, 0.5, 4000, index, 1, batch=500)
p_a, p_b = certify.two_sided_bounds(counts, 8, 4000, alpha)
print(f"image {index}, a {images.labels[index]}: one-sided {answer['one-sided']}, two-sided {answer['two-sided']}; "
      f"p_A = {p_a:.3f}, p_B = {p_b:.3f}")
assert answer["one-sided"] == (certify.ABSTAIN, 0.0) and images.labels[index] == 8
assert answer["two-sided"] == (8, certify.round_down(certified_radius(p_a, 0.5, p_b)))

# Nothing in reach may change g's answer; PREDICT says so, or abstains. Try the way to the rival's nearest digit.
rival = int(counts.argsort()[-2])
others = images.items.tensors[0][images.labels == rival] / images.white
towards = min((other - x for other in others), key=lambda way: way.norm())
pushed = x + 0.999 * answer["two-sided"][1] * towards / towards.norm()
answer_there = certify.predict(vit, pushed, 0.5, n=4000, alpha=alpha, index=index, batch=500)
assert answer_there in (8, certify.ABSTAIN)

noisy = x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
titles = "an 8", r"a copy at $\sigma$ = 0.5"
pictures.picture_of_a_pair((x[0], noisy[0]), titles, counts / 4000, 8, rival, p_a, p_b)

# %% [markdown]
# **When it does not pay.** The top class now has $\tau\alpha$:
#
# $$ R_{\text{two}}(\alpha) \;\ge\; R_{\text{one}}(\tau\alpha), \quad
#    \text{with equality if } k_A + \max_{c \ne A} k_c = n \text{ and } \tau \ge \tfrac12. \tag{2.14} $$
#
# The inequality is the minimum in (2.13). If two classes got everything, then $\overline p_{(1-\tau)\alpha}(n - k_A) =
# 1 - \underline p_{(1-\tau)\alpha}(k_A) \ge 1 - \underline p_{\tau\alpha}(k_A)$, so the minimum is $1 -
# \underline{p_A}$, for any $K$. There the published bound is the better one, by a hair. For more classes it depends on
# the image. But one has to choose *before* looking. Who takes the better of both has two chances to err, and up to $(2
# - \tau)\alpha$ (the bounds of $A$ at $\alpha$ and $\tau\alpha$ err together).

# %%
random = np.random.default_rng(12)
for _ in range(300):
    classes, size = random.integers(2, 20), random.integers(20, 5000)
    tally = torch.tensor(random.multinomial(size, random.dirichlet(np.full(classes, 0.3))))
    top, size = int(tally.argmax()), int(size)
    least = certified_radius(lower_confidence_bound(int(tally[top]), size, 0.9 * alpha), 1.0)
    assert radius_of(certify.two_sided_bounds(tally, top, size, alpha), 1.0) >= least - 1e-12
    pair = torch.tensor([int(tally[top]), size - int(tally[top])] + [0] * int(random.integers(9)))
    assert np.isclose(radius_of(certify.two_sided_bounds(pair, 0, size, alpha), 1.0), least)

print("radii in units of sigma, K = 10, A has 90 %; its rivals have the rest, in equal parts")
for n in (1000, 10_000, 100_000):
    one = certified_radius(lower_confidence_bound(n * 9 // 10, n, alpha), 1.0)
    for rivals in (1, 2, 5):
        tally = [n * 9 // 10] + [n // 10 // rivals] * rivals + [0] * (9 - rivals)
        p_a, p_b = certify.two_sided_bounds(tally, 0, n, alpha)
        two = certified_radius(p_a, 1.0, p_b)
        each = certified_radius(p_a, 1.0, min(1 - p_a, certify.upper_confidence_bound(tally[1], n, 0.1 * alpha / 9)))
        print(f"  n = {n:6}, {rivals} of the rivals: one-sided {one:.4f}, two-sided {two:.4f} ({two - one:+.4f}); "
              f"with a bound for each of the nine {each:.4f}")
        assert (two < one) == (rivals == 1) and one - two < 0.01

part, gains = np.linspace(1 / 9, 1, 100), {}                                # of the strongest rival in what A lost
for p in (0.4, 0.6, 0.9, 0.99):
    k = round(10_000 * p)
    one = certified_radius(lower_confidence_bound(k, 10_000, alpha), 1.0)
    gains[p] = []
    for s in part:
        strongest = round((10_000 - k) * s)
        rest = 10_000 - k - strongest
        tally = [k, strongest] + [rest // 8 + (c < rest % 8) for c in range(8)]
        gains[p].append(radius_of(certify.two_sided_bounds(tally, 0, 10_000, alpha), 1.0) - one)
    assert gains[p][0] > 0.1 and -0.005 < gains[p][-1] <= 0
pictures.picture_of_gain(part, gains)

# %% [markdown]
# **Why nine tenths, and why it costs so little.** The proof holds for any $\tau$ that is fixed beforehand. Three things
# make a large one cheap:
# * $\underline p_{0.9\,\alpha}$ is almost $\underline p_\alpha$: the bound depends on $\alpha$ through $\ln(1/\alpha)$,
#   to which the factor adds $\ln(1/0.9) = 0.11$, of $6.9$ at $\alpha = 0.001$;
# * the minimum in (2.13) holds the one-sided bound at the top class's part. So where two classes hold everything, only
#   the factor 0.9 is lost, and not the tenth that the rival has;
# * where answers are spread, $\overline p_{\alpha/10}$ is slightly larger than $\overline p_{\alpha/2}$, which costs a
#   little of a large gain.
#
# The curves below are the ACR over $\tau$ of committed logs, from the counts that their rows keep. Of the digits they
# are flat. Fashion-MNIST's rises: there many images have $k = n$, and only the top class's part matters. At one half it
# would lose to the one-sided bound, at 0.9 it wins. At 0.9 each is within 0.002 of its best. None is best for all:
# where answers are most spread ($\sigma = 0.5$ and $1$) it is near 0.4, at $\sigma = 0.25$ near 0.7, Fashion-MNIST's
# beyond 0.9. (The logs were drawn before 0.9 was chosen, with such curves in view. A new run has fixed it before its
# draws, as the proof asks.)

# %%
def acr_of(rows, part=None):
    """The ACR of a log's rows, one-sided, or two-sided with that part of alpha for the top class."""
    radii = []
    for row in rows:
        top, count, runner_up, classes, n = (int(row[name]) for name in ("top", "count", "runner_up", "classes", "n"))
        p_a = lower_confidence_bound(count, n, row["alpha"])
        pair = p_a, 1 - p_a
        if part is not None:
            tally = two_sided.counts_of(top, count, runner_up, classes, n)
            pair = certify.two_sided_bounds(tally, top, n, row["alpha"], part)
        answer, radius = certify.certificate(top, *pair, row["sigma"])
        radii.append(radius if answer == row["label"] else 0)
    return np.mean(radii)


logs = {f"digits, σ = {s}": f"digits/certify_sigma_{s}.tsv" for s in ("0.25", "0.5", "1")}
logs["Fashion-MNIST, σ = 0.5"] = "fashion-mnist/recipe/dmae-0.5/certify_sigma_0.5.tsv"
parts = np.array([0.02, 0.05, *np.arange(0.1, 0.95, 0.1), 0.95, 0.98])
one, two = {}, {}
for name, file in logs.items():
    log = certify.read_log(ROOT / "results" / file)
    one[name] = acr_of(log)
    two[name] = np.array([acr_of(log, part) for part in parts])
    half, nine_tenths = (two[name][np.abs(parts - part).argmin()] for part in (0.5, 0.9))
    print(f"{name}: ACR one-sided {one[name]:.4f}, two-sided {half:.4f} at 1/2, {nine_tenths:.4f} at 0.9; "
          f"k = n on {np.mean(log['count'] == log['n']):.0%}, best at {parts[two[name].argmax()]:.2f}")
    assert np.isclose(nine_tenths, np.mean(np.where(log["top"] == log["label"], np.maximum(log["two_sided"], 0), 0)))
    assert nine_tenths > max(one[name] - 0.001, two[name].max() - 0.002)
    assert not name.startswith("Fashion") or half < one[name] < nine_tenths
pictures.picture_of_split(parts, two, one)

# %% [markdown]
# *Sources.* The pair $(\underline{p_A}, \overline{p_B})$: Cohen, Rosenfeld and Kolter 2019, theorem 1.
# Simultaneous bounds for several classes: Jia et al. 2020. Classes in groups, so that fewer bounds share $\alpha$:
# Delattre et al. 2025.
#
# ## 2.10 What to take along
#
# *Not on the short path.*
#
# * A certificate is a *confidence statement*: $\underline p(k)$ exceeds the true share with probability at most
#   $\alpha$, for every share.
# * $n$ draws prove at most $\sigma\,\Phi^{-1}(\alpha^{1/n})$, (2.7).
# * The class is chosen with other draws than those that are counted, and the number of draws is fixed beforehand.
# * Per image $\alpha$; for the table, subtract $q/M$; for all certificates at once, $\alpha/M$.
# * CERTIFY does not use the counts of the other classes. Bounds on both sides, (2.13), do: much is gained where
#   answers are spread, a hair is lost where two classes hold everything.
#
# ## 2.11 Exercises
#
# *Not on the short path.*
#
# 1. **The rule of three.** All of $n$ copies were called $A$. Show that, at $\alpha = 0.05$, the share of $A$ is at
#    least $1 - 3/n$. What replaces the 3 at $\alpha = 0.001$? *Hint:* (2.3), and $e^{-u} \ge 1 - u$.
# 2. **How many draws?** How many draws does it take, at least, to certify $R = 1$ at $\sigma = 0.25$ and
#    $\alpha = 0.001$? *Hint:* solve (2.7) exactly for $n$.
# 3. **A part for the counts.** Somebody looks at an image's counts, and then takes the $\tau$ of (2.13) that gives the
#    largest radius, among 0.5 and 0.9. What is true of the certificate? *Hint:* which bounds must hold?
#
# <details><summary>Answers</summary>
#
# 1. $\underline p(n) = \alpha^{1/n} = e^{-\ln(1/\alpha)/n} \ge 1 - \ln(1/\alpha)/n$, and $\ln 20 = 2.996$. At $\alpha =
#    0.001$ it is $\ln 1000 = 6.9$.
# 2. $\alpha^{1/n} \ge \Phi(R/\sigma) = \Phi(4)$ means $n \ge \ln\alpha / \ln\Phi(4)$: more than 218 000 draws, all of
#    them successes. The usual 100 000 cannot do it.
# 3. Both pairs must hold. $A$'s bound at $0.9\,\alpha$ is the larger one, and errs whenever that at $0.5\,\alpha$ does;
#    the rival's at $0.5\,\alpha$ is the smaller one, and errs whenever that at $0.1\,\alpha$ does. So the chance of an
#    error is at most $0.9\,\alpha + 0.5\,\alpha = 1.4\,\alpha$.
#
# </details>

# %%
# The numbers of the answers.
assert all(0.05 ** (1 / n) >= 1 - 3 / n and 0.001 ** (1 / n) >= 1 - math.log(1000) / n for n in range(1, 2000))
needed = math.floor(math.log(0.001) / stats.norm.logcdf(4)) + 1
assert certified_radius(0.001 ** (1 / needed), 0.25) >= 1 > certified_radius(0.001 ** (1 / (needed - 1)), 0.25)
print(f"exercise 2: {needed} draws")
for k in range(41):
    assert lower_confidence_bound(k, 40, 0.9 * alpha) >= lower_confidence_bound(k, 40, 0.5 * alpha)      # exercise 3
    assert certify.upper_confidence_bound(k, 40, 0.5 * alpha) <= certify.upper_confidence_bound(k, 40, 0.1 * alpha)

# %% [markdown]
# previous: [01, smoothing](01_smoothing.ipynb) | [contents](README.md) | next:
# [03, the denoising masked autoencoder](03_denoising_masked_autoencoder.ipynb)
