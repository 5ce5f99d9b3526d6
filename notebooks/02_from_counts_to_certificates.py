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
# Notebook 01 turned a share into a radius: if class $A$ wins the share $p_A > 1/2$ of the noisy copies of $x$, then
# $g$ does not change its mind within $\sigma\,\Phi^{-1}(p_A)$. But nobody knows $p_A$. It is an integral over as many
# dimensions as there are pixels, of a function that only answers questions one at a time. We can draw noisy copies
# and count. This notebook is about the step from the count to a sentence that is *true with probability at least $1 -
# \alpha$*. It is also about the many ways to spoil that sentence without noticing, and about what it says of a whole
# test set.
#
# **Afterwards you can**
# * derive the bound of Clopper and Pearson, write CERTIFY and PREDICT from it, and say what each of them promises;
# * recognise a false certificate in the making: an estimate in place of a bound, reused draws, the best of several
#   runs, a look at the count;
# * stop drawing as soon as enough is known, with a bound that allows it;
# * use the counts of all classes, read a table of certified accuracy with its error, and keep floats from lying.
#
# **It needs** notebook 01, binomials, Beta distributions and conditional expectations, and the packages of
# `requirements.txt`; no GPU, no download. **It runs** in about a minute on two CPU cores.
#
# | symbol | meaning |
# |---|---|
# | $p$ | the unknown share $p_A = \Pr[f(x + e) = A]$, $\;e \sim \mathcal N(0, \sigma^2 I)$ |
# | $n$, $k$ | number of noisy copies; how many of them $f$ called $A$, so $k \sim \operatorname{Binomial}(n, p)$ |
# | $\hat p = k/n$ | the observed share |
# | $\underline p(k)$, $\overline p(k)$ | bounds that err with probability $\le \alpha$ ($\underline p_a$: $\le a$) |
# | $\underline{p_A}$, $\overline{p_B}$ | such bounds of the shares of the top class and of its likeliest rival |
# | $\alpha$ | the chance that the statement about one image is wrong; $0.001$ everywhere in the literature |
# | $M$ | number of test images |
# | $\Phi$, $\varphi$ | distribution function and density of $\mathcal N(0, 1)$ |
#
# (Those of all notebooks stand in the [contents](README.md#symbols).)

# %%
import inspect
import math
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

ROOT = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "certify.py").is_file())
sys.path.insert(0, str(ROOT))                              # works from notebooks/ and from the repository's root

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown, display
from scipy import stats
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import betaincc, betaln, expit, gammaln, xlogy

import certify
import model
from certify import certified_radius, lower_confidence_bound  # the two that occur everywhere
from extras import integer_noise, sequential

# %matplotlib inline
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "0.5"      # Okabe and Ito's colours
plt.rcParams.update({
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "font.size": 10,
    "axes.titlesize": 10, "legend.fontsize": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True,
    "figure.dpi": 85, "figure.constrained_layout.use": True,
})


def show(*things):
    """The source of functions and classes, as it stands in the scripts."""
    for thing in things:
        display(Markdown(f"```python\n{inspect.getsource(thing)}```"))


# %% [markdown]
# ## 2.1 Monte Carlo, and why an estimate is not enough
#
# Draw $n$ independent noisy copies and count. The count and its relative error are
#
# $$ k \sim \operatorname{Binomial}(n, p), \qquad \Pr[k = j] = \binom nj p^j (1 - p)^{n - j},
#    \qquad \operatorname{sd}(\hat p) = \sqrt{p(1 - p)/n}, \tag{2.1} $$
#
# whatever the dimension of the image: the copies are independent, and each is either called $A$ or not. Notebook 01,
# section 1.2, builds the count from (1.1); in the scripts it is `count_under_noise`, for many images at once. Here are
# the counts for one test digit and the committed transformer, made by `python pretrain.py && python finetune.py
# --sigma 0.25`.

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

figure, axes = plt.subplots(1, 3, figsize=(8.6, 2.8), width_ratios=(1, 1, 2))
for axis, picture, title in ((axes[0], x, "a {}"), (axes[1], noisy, r"a {}, a copy at $\sigma$ = 0.25")):
    axis.imshow(picture[0], cmap="gray", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[], title=title.format(images.labels[index]))
axes[2].bar(range(10), counts, color=[ORANGE if c == counts.argmax() else BLUE for c in range(10)])
axes[2].set(xlabel="answer of f", ylabel="noisy copies, of 4000", xticks=range(10))
axes[2].grid(axis="x", visible=False)
plt.show()

# %% [markdown]
# It is tempting to put $\hat p$ into the formula of the radius. Two things go wrong. The estimate is
# too large about half of the time, and then so is the radius: the "certificate" is false with probability near $1/2$.
# Worse, $k = n$ is the likely outcome if $f$ errs on a copy in a million. Then $\sigma\,\Phi^{-1}(1) = \infty$ is the
# claim, and no finite experiment supports it.
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
# We need $\underline p$ with $\Pr_p[\underline p(k) > p] \le \alpha$ for *every* $p$. Clopper and Pearson (1934) turn
# a family of tests around. Having seen $k$, a value $p$ is *refuted* if under it so large a count would have been
# rare, $\Pr_p[X \ge k] \le \alpha$. The bound is the edge of what is refuted:
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
# It shows the monotonicity (a distribution function increases), and gives the bound as a quantile. At $k = n$ the sum
# in (2.2) has the single term $p^n$.
#
# In code, (2.2) is a sum and a bisection. The scripts' `lower_confidence_bound` takes the quantile of (2.3). Both
# must agree.

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
    if k:
        assert lower_confidence_bound(k, n, a) == stats.beta.ppf(a, k, n - k + 1)
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
# For a given $p$ the probability that a bound errs is a finite sum: add up the probabilities of all counts with
# $\underline p(k) > p$. No simulation is needed. We compare three bounds, with $z = \Phi^{-1}(1 - \alpha)$:
#
# $$ \underline p_{\text{Hoeffding}} = \hat p - \sqrt{\frac{\ln(1/\alpha)}{2n}}, \qquad
#    \underline p_{\text{Wilson}} = \frac{\hat p + \frac{z^2}{2n} - z\sqrt{\frac{\hat p(1 - \hat p)}{n} +
#    \frac{z^2}{4n^2}}}{1 + \frac{z^2}{n}}. \tag{2.4} $$
#
# Hoeffding's is valid: $\Pr[\hat p - p \ge t] \le e^{-2nt^2}$ for independent variables with values in $[0, 1]$, and
# $t$ is chosen to make the right-hand side $\alpha$. It treats every variable as if its variance were $1/4$, the
# largest possible. So it is loose where the variance $p(1 - p)$ is small: near $p = 1$, where large radii live.
#
# Wilson's solves $(\hat p - p)/\sqrt{p(1-p)/n} = z$ for $p$: the count is treated as normal, with the right variance.
# It is an excellent *approximate* interval (Brown, Cai and DasGupta 2001). But a binomial is skewed and lives on
# integers, and the approximation errs where it likes.

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
looks = (wilson, ORANGE, 0.8, "Wilson"), (exact, BLUE, 0.8, "Clopper-Pearson"), (hoeffding, GREEN, 1.2, "Hoeffding")
figure, axes = plt.subplots(1, 3, figsize=(9.4, 3.6), sharey=True)
worst = {}
for axis, n in zip(axes, (10, 100, 1000), strict=True):
    for bound, colour, width, name in looks:
        error = error_probability(bound, n, p, alpha)
        worst[name, n] = error.max(), error[p > 0.5].max()
        axis.semilogy(p, np.maximum(error, 1e-9) / alpha, color=colour, linewidth=width, label=name)
    axis.axhline(1, color="black", linewidth=1)
    axis.set(xlabel="true share $p$", title=f"n = {n}", ylim=(1e-3, 300), xscale="logit", xlim=(1e-5, 0.9999))
    axis.set(xticks=(1e-4, 1e-2, 0.5, 0.99), xticklabels=("0.0001", "0.01", "0.5", "0.99"))
    axis.minorticks_off()
axes[0].set_ylabel(r"chance of error / $\alpha$ (allowed: 1)")
handles = axes[0].get_legend_handles_labels()
figure.legend(*handles, loc="outside upper center", ncols=3)
plt.show()
for (name, n), (error, above) in worst.items():
    print(f"{name:16} n = {n:4}: largest error {error / alpha:6.2f} alpha; for p > 1/2 {above / alpha:5.2f} alpha")
    assert (error <= alpha * (1 + 1e-6)) == (name != "Wilson")

# %% [markdown]
# (Where a curve ends on the right, $p$ exceeds the largest value of the bound, which then cannot err.)
# The saw teeth of Clopper and Pearson touch the line from below and never cross it. Its coverage is at times better
# than promised, because counts are integers; that is the price of a promise for every $p$.
#
# Wilson crosses the line at every $n$. For small $p$ its error is about 80 times what is allowed (take $p$ just below
# $\underline p(1)$: one success is enough to err). Above one half, the range that certificates are about, the excess
# is modest: tens of percent at $n = 100$, fading with $n$. It sits right beside $p = 1/2$, where abstention is
# decided. Near $p = 1$ the bound is even more cautious than necessary.
#
# So why is it *not allowed*? Because "with probability at least $1 - \alpha$, for every $f$ and $x$" is the whole
# product. A bound whose error is usually close to $\alpha$ gives a different, weaker sentence. That one has to be
# argued anew for each $p$, and nobody knows $p$. The exact bound costs nothing more.
#
# And Hoeffding? Valid, and expensive. Below is the radius that each *valid* bound proves when the count is what it
# should be, $k = np$:

# %%
true = np.linspace(0.5, 0.9995, 300)
figure, axis = plt.subplots(figsize=(5.6, 3.8))
axis.plot(stats.norm.ppf(true), stats.norm.ppf(true), color="black", linewidth=1, label="exact $p$")
for n, style in ((1000, ":"), (100_000, "-")):
    k = np.floor(n * true)
    for bound, colour, name in ((lower_confidence_bound, BLUE, "Clopper-Pearson"), (hoeffding, GREEN, "Hoeffding")):
        proven = [certified_radius(float(bound(j, n, alpha)), 1.0) for j in k]
        axis.plot(stats.norm.ppf(true), proven, style, color=colour, label=f"{name}, n = " + f"{n:,}".replace(",", " "))
axis.set(xlabel=r"true radius $\Phi^{-1}(p)$ ($\sigma$)", ylabel=r"proven radius ($\sigma$)")
axis.legend()
plt.show()
for n in (100, 10_000):
    assert all(lower_confidence_bound(k, n, alpha) > hoeffding(k, n, alpha) for k in range(n // 2, n + 1, n // 50))

# %% [markdown]
# ## 2.4 CERTIFY, and when to abstain
#
# Formula (1.7) gives no positive radius if $\underline p(k) \le 1/2$. It is then not even certain that $g$ answers $A$
# at $x$ itself, and nothing is said:
#
# $$ \text{CERTIFY: } \quad \begin{cases} (A,\ \sigma\,\Phi^{-1}(\underline p(k))) & \underline p(k) > \tfrac12 \\
#    \text{abstain} & \underline p(k) \le \tfrac12 \end{cases}
#    \qquad\Rightarrow\qquad \Pr[\text{certificate false}] \le \Pr[\underline p(k) > p] \le \alpha. \tag{2.5} $$
#
# The implication needs a line of thought. If $\underline p(k) \le p$, then $p > 1/2$ whenever a certificate is
# issued, $A$ is the answer of $g$, and the radius from $\underline p(k)$ is at most the true one. So a false
# certificate requires $\underline p(k) > p$. Abstentions are never false; they count as wrong in certified accuracy,
# so they are not free either.
#
# The class $A$ is chosen with $n_0$ copies of its own, for a reason that section 2.7 gives. The whole procedure is
# then ten lines: select, estimate, bound, abstain or answer.

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
# The scripts' `certify` gives the same. It has a second way, `bound="two-sided"`, which takes
# $\overline{p_B}$ from the counts of the other classes (section 2.11); with $\overline{p_B} = 1 - \underline{p_A}$,
# to abstain at $\underline{p_A} \le \overline{p_B}$ is to abstain at $\underline{p_A} \le \frac12$.
#
# The scripts have the steps in a generator, `fixed_n`, which asks for counts and makes bounds of them; `certificate`
# abstains or answers. `certify_all` keeps a pool of such generators busy, one for each image, so that the copies of many images
# fill batches together; `certify` has a pool of one. The counts are the same.

# %%
show(certify.fixed_n, certify.certificate, certify.certify_all)

# %%
some = [(i, digit(i)) for i in range(0, 40, 5)]
pool = certify.certify_all(vit, some, sigma, 100, 500, alpha, batch=500)
pooled = {i: certify.certificate(top, *bounds["one-sided"], sigma) for i, _, top, _, _, bounds in pool}
assert pooled == {i: certify_by_hand(vit, x, sigma, 100, 500, alpha, i) for i, x in some}
print("certify and certify_all agree:", pooled)


# %% [markdown]
# **Check.** The chance to abstain is exactly $\Pr_p[k < k^*]$, where $k^*$ is the least count with
# $\underline p(k^*) > 1/2$. That is in turn the least count whose tail under a fair coin is below $\alpha$. We
# compare the latter sum, in whole numbers, with the bound. And we count false certificates on the boundary of a
# linear classifier, where $p = 1/2$ and every certificate is false.

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

p = np.linspace(0.5, 0.7, 400)
figure, axis = plt.subplots(figsize=(5.6, 3.6))
for n, colour, style in ((100, BLUE, "-"), (1000, ORANGE, "--"), (10_000, GREEN, "-."), (100_000, PURPLE, ":")):
    k = np.searchsorted(stats.binom.sf(np.arange(n + 1) - 1, n, 0.5) < alpha, True)    # k*, by the tail of a fair coin
    axis.plot(p, 100 * stats.binom.cdf(k - 1, n, p), style, color=colour, label=f"n = {n:,}".replace(",", " "))
axis.set(xlabel="true share $p$", ylabel="chance to abstain (%)", xlim=(0.5, 0.7), ylim=(0, 101))
axis.legend()
plt.show()

# %% [markdown]
# ## 2.5 PREDICT: an answer without a radius
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
# In the page it is five lines; in the scripts `predict` counts and `clear_winner` tests.

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
# ## 2.6 The largest radius that $n$ draws can prove
#
# The best outcome is $k = n$. By (2.3) it proves the share $\alpha^{1/n}$ and no more, so
#
# $$ R_{\max}(n) = \sigma\,\Phi^{-1}\bigl(\alpha^{1/n}\bigr)
#    \;\approx\; \sigma\sqrt{2 \ln \frac{n}{2\ln(1/\alpha)}}. \tag{2.7} $$
#
# For $1 - \alpha^{1/n} \approx \ln(1/\alpha)/n$ when $n$ is large, and the Gaussian tail $1 - \Phi(t)$ is at most
# $\frac12 e^{-t^2/2}$. It is smaller than that by a factor of order $1/t$. The factor changes the logarithm little,
# and the approximation (the grey line) is a few tenths of $\sigma$ too high. The cap grows like $\sqrt{\ln n}$:
# doubling a radius takes roughly the *fourth power* of $n / (2 \ln(1/\alpha))$. This is why certified-accuracy curves
# end in a cliff, and why radii beyond $4\sigma$ are never reported. In the code it is nothing but
# `certified_radius(lower_confidence_bound(n, n, alpha), sigma)`.
#
# **Check** against the root of $p^n = \alpha$, and against the committed run: no radius beyond the cap, and each
# recomputed from its count.

# %%
for n in (10, 1000, 100_000):
    share = brentq(lambda p, n=n: n * math.log(p) - math.log(alpha), 1e-9, 1 - 1e-15, xtol=1e-15)
    largest = certified_radius(lower_confidence_bound(n, n, alpha), 1.0)
    approximation = math.sqrt(2 * math.log(max(1, n / (2 * math.log(1 / alpha)))))
    assert abs(largest - stats.norm.ppf(share)) < 1e-6
    assert n < 1000 or 0 < approximation - largest < 0.5
rows = certify.read_log(ROOT / "results/digits/certify_sigma_0.25.tsv")
cap = certified_radius(lower_confidence_bound(10_000, 10_000, alpha), 0.25)
for row in rows:
    p_a = lower_confidence_bound(row["count"], row["n"], alpha)
    if row["predict"] != certify.ABSTAIN:
        assert row["radius"] == certify.round_down(certified_radius(p_a, 0.25)) <= cap
largest = max(row["radius"] for row in rows)
print(f"committed run, n = 10 000, sigma = 0.25: largest radius {largest:.4f}, cap {cap:.4f}")

n = np.unique(np.geomspace(10, 1e7, 200).astype(int))
figure, axis = plt.subplots(figsize=(5.8, 3.8))
for sigma, colour, style in ((0.25, BLUE, "-"), (0.5, ORANGE, "--"), (1.0, GREEN, "-.")):
    caps = [certified_radius(alpha ** (1 / draws), sigma) for draws in n]
    axis.semilogx(n, caps, style, color=colour, label=rf"$\sigma$ = {sigma}")
approximation = np.sqrt(2 * np.log(np.maximum(n / (2 * math.log(1 / alpha)), 1)))
axis.semilogx(n, approximation, color=GREY, linewidth=1, label=r"approximation, $\sigma$ = 1")
for draws in (10_000, 100_000):
    axis.axvline(draws, color=GREY, linestyle=":", linewidth=1)
axis.text(10_000, 0.05, "ImageNet\nin the paper", ha="right", fontsize=9)
axis.text(100_000, 0.05, " usual", fontsize=9)
axis.set(xlabel="draws n", ylabel=r"largest provable $\ell_2$ radius (pixels in [0, 1])", ylim=(0, 5.5))
axis.legend(loc="upper left")
plt.show()

# %% [markdown]
# ## 2.7 Selection and estimation: why the draws must be fresh
#
# The count in (2.2) belongs to a class that was fixed *before* the draws were made. CERTIFY therefore takes $n_0$
# copies to choose $A$, and $n$ fresh ones to count. The count would be the *largest* of several, which is not binomial,
# if one set served both purposes. The error is then bounded only by a sum over what could have been chosen:
#
# $$ \Pr\bigl[\underline p(k_{\hat c}) > p_{\hat c}\bigr] \;=\; \sum_{c} \Pr\bigl[\underline p(k_c) > p_c,\ \hat c =
#    c\bigr] \;\le\; \sum_{c} \Pr\bigl[\underline p(k_c) > p_c\bigr] \;\le\; K \alpha, \qquad \hat c = \arg\max_c k_c.
#    \tag{2.8} $$
#
# With fresh draws, conditionally on $\hat c$ each count is binomial, and the bound holds given any choice. How much
# does reuse cost? For two classes of probability $1/2$ each, a certificate for either is false, and either may win.
# The error is exactly $2\alpha'$, where $\alpha' \le \alpha$ is the exact error of the bound there. For certificates,
# which need $\underline p > 1/2$, it hardly gets worse, as two classes at most can be near one half.
#
# But the same mistake at a larger scale is unbounded. Suppose somebody certifies with $t$ random seeds, or $t$
# fine-tuned models, and reports for each image the largest radius. That is a choice among $t$ bounds, each wrong with
# probability up to $\alpha$. For independent ones the error is at most
#
# $$ 1 - (1 - \alpha)^t. \tag{2.9} $$
#
# (The envelope over several $\sigma$ in the literature's tables chooses among whole curves, each of them a valid
# statement; the choice is made on the test set. Notebook 05 says what that means.)
#
# The two random streams of an image, a third for `predict`, and a fourth that tells a classifier from another one when
# a run goes on, are kept apart by `generator_for`. A stream belongs to a seed, an image and a phase, and the same
# three give the same draws. For one seed no two images or phases share a key, since every line of the mixing is a
# bijection of 32-bit numbers:

# %%
show(certify.generator_for)

# %% [markdown]
# **Check** of the streams: the same three again; a change of one of the three; and the keys of many images. Reuse and
# fresh draws, exactly, by enumeration of all counts; and (2.9) by simulation. The right panel shows the other side: how
# few draws selection needs. A wrong choice is harmless, it only wastes an image: the true share is then below one half,
# and the bound abstains.

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
bounds = exact(k, n, a)
share = np.linspace(0.5, 0.7, 201)                                          # of class 0; class 1 has the rest
false_0 = np.array([stats.binom.pmf(k[(bounds > p) & (bounds > 0.5)], n, p).sum() for p in share])
false_1 = np.array([stats.binom.pmf(k[(bounds > 1 - p) & (bounds > 0.5)], n, 1 - p).sum() for p in share])
choose_0 = stats.binom.sf(49, 100, share)                                   # n0 = 100; ties choose class 0
fresh, reused = choose_0 * false_0 + (1 - choose_0) * false_1, false_0 + false_1
assert fresh.max() <= a and reused.max() > 1.7 * fresh[0]

random = np.random.default_rng(0)
tries = np.array([1, 2, 5, 10, 20, 50])
p = 0.8
at_p = error_probability(exact, n, np.array([p]), a)[0]
best = [np.mean(bounds[random.binomial(n, p, (20_000, t))].max(axis=1) > p) for t in tries]
assert np.allclose(best, 1 - (1 - at_p) ** tries, atol=0.015)

figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.5))
axes[0].plot(share, 100 * reused, "--", color=ORANGE, label="draws reused")
axes[0].plot(share, 100 * fresh, color=BLUE, label="fresh draws")
axes[0].axhline(100 * a, color="black", linewidth=1)
axes[0].set(xlabel="true share of class 0", ylabel="false certificates (%)", ylim=(0, 11), xlim=(0.5, 0.7),
            title="selection, n = 100, α = 5 %")
axes[0].legend()
axes[1].semilogx(tries, 100 * np.array(best), "o", color=ORANGE, label="simulated")
axes[1].semilogx(tries, 100 * (1 - (1 - at_p) ** tries), color=ORANGE, label="(2.9)")
axes[1].axhline(100 * a, color="black", linewidth=1)
axes[1].set(xlabel="tries, of which the best is kept", ylabel="false bounds (%)", ylim=(0, 100),
            title="best of t, n = 100, α = 5 %", xticks=tries, xticklabels=tries)
axes[1].minorticks_off()
axes[1].legend()
for n0, colour, style in ((10, GREEN, ":"), (100, BLUE, "-"), (1000, PURPLE, "--")):
    wrong = np.maximum(stats.binom.cdf(n0 // 2 - 1, n0, share), 1e-12)
    axes[2].semilogy(share, wrong, style, color=colour, label=f"$n_0$ = {n0}")
axes[2].set(xlabel="true share of class 0", ylabel="chance of a wrong choice", ylim=(1e-6, 1), xlim=(0.5, 0.7),
            title="selection rarely errs")
axes[2].legend()
plt.show()


# %% [markdown]
# ## 2.8 Peeking
#
# Drawing is expensive, so one looks at the count from time to time and stops once the bound is good enough. Each look
# is a test at level $\alpha$, and the error is that *any* of them errs:
#
# $$ \Pr\bigl[\exists\, i \le t : \underline p(k_{n_i}, n_i) > p\bigr] \;\le\; t\,\alpha,
#    \quad\text{and in general far above } \alpha, \qquad n_1 < n_2 < \dots < n_t \text{ the looks.} \tag{2.10} $$
#
# How bad is it? Looks at similar $n$ are correlated, so it is less than $t\alpha$. But it is not bounded by anything
# below 1. By the law of the iterated logarithm, $k_n - np$ exceeds any fixed fraction of
# $\sqrt{2 p (1-p) n \ln\ln n}$ infinitely often, while the margin of a fixed-$n$ bound is only a constant times $\sqrt
# n$. Anyone who keeps drawing long enough is certain to see a bound that exceeds the truth. (This also holds for the
# informal version: draw 10 000, and if the image "nearly" made it, another 10 000.)
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
# ## 2.9 A bound that may be looked at any time
#
# The cure is to measure evidence by something that cannot be inflated by waiting. Suppose someone claims that
# $p \le p_0$, and we bet against it. Having seen $k$ successes in $n$ draws, our capital, from a start of 1, is
#
# $$ E_n = \int_{p_0}^{1} \Bigl(\frac{\theta}{p_0}\Bigr)^{k} \Bigl(\frac{1 - \theta}{1 - p_0}\Bigr)^{n - k} w(\theta)\,
#    d\theta, \tag{2.11} $$
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
#    \;\le\; p_0\,\frac{\theta}{p_0} + (1 - p_0)\,\frac{1 - \theta}{1 - p_0} = 1, \tag{2.12} $$
#
# as the left side increases with $p$ (because $\theta/p_0 > 1 > (1-\theta)/(1-p_0)$). An average over $\theta$ of
# such processes is one again: $\mathbb E[E_{n+1} \mid \text{past}] \le E_n$. Betting against a true claim does not
# pay, whenever one stops.
#
# **Ville's inequality** (1939). Let $E_0 = 1, E_1, E_2, \dots \ge 0$ be a supermartingale. Then
#
# $$ \Pr\bigl[\exists\, n : E_n \ge 1/\alpha\bigr] \le \alpha. \tag{2.13} $$
#
# *Proof.* Let $\tau$ be the first $n$ with $E_n \ge 1/\alpha$ ($\infty$ if there is none). The capital stopped at
# $\tau$ is a supermartingale too: before $\tau$ it moves like $E$, afterwards not at all. So for each fixed $n$,
# $\mathbb E[E_{\min(\tau, n)}] \le E_0 = 1$. On the event $\tau \le n$ that variable is at least $1/\alpha$, and it
# is never negative. Hence $1 \ge \mathbb E[E_{\min(\tau, n)}] \ge \Pr[\tau \le n] / \alpha$, that is $\Pr[\tau \le n]
# \le \alpha$. The events $\{\tau \le n\}$ grow to $\{\tau < \infty\}$ as $n \to \infty$, and probability is
# continuous from below. $\square$
#
# It is Markov's inequality, valid for the whole path at the price of one point. The *anytime lower bound*
# $\underline p_n$ collects the refuted claims: it is the largest $p_0$ with $E_n(p_0) \ge 1/\alpha$. Suppose
# $\underline p_n > p$ at any $n$. Then $E_n(p) \ge 1/\alpha$, too, since the refuted claims form an interval
# $(0, \underline p_n]$ (proved in the appendix, section 2.16). So the true claim "the share is at most $p$" has been
# refuted. That happens with probability at most $\alpha$, for all $n$ together.
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
# **Check.** The closed form against numerical integration of (2.11); the mean of $E_n$ by exact summation over all
# counts, which is 1 at $p = p_0$ and less below; and the error of the anytime bound by the same exact random walk as
# before.

# %%
def integrand(t, k, n, p0):
    """Of (2.11), after theta = 1 - (1 - p0) t^2, which takes the pole of w at theta = 1 away."""
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

figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.7))
for a, style in ((0.05, "-"), (0.001, "--")):
    axes[0].semilogy(looks, peeked[a] / a, style, color=ORANGE, label=f"Clopper-Pearson, α = {a}")
    axes[0].semilogy(looks, anytime[a] / a, style, color=BLUE, label=f"anytime bound, α = {a}")
axes[0].axhline(1, color="black", linewidth=1)
axes[0].set(xlabel="draws, with a look after every 100", ylabel="chance of an error so far / α", ylim=(0.001, 40),
            xlim=(0, 5000), title="exact, p = 0.75")
axes[0].legend(ncols=1, loc="lower right", fontsize=9)
random = np.random.default_rng(5)
steps = np.arange(10, 1501, 10)
for true, colour, name in ((0.5, BLUE, "true: p = 0.5"), (0.58, ORANGE, "false: p = 0.58")):
    for run in range(12):
        path = random.binomial(10, true, len(steps)).cumsum()
        axes[1].plot(steps, sequential.log_e_value(path, steps, 0.5) / math.log(10), color=colour, linewidth=0.8,
                     alpha=0.8, label=name if run == 0 else None)
axes[1].axhline(3, color="black", linewidth=1)
axes[1].text(1480, 2.2, "1/α = 1000", ha="right", bbox=dict(facecolor="white", edgecolor="none", pad=1))
axes[1].set(xlabel="draws", ylabel=r"$\log_{10}$ of the evidence $E_n$", ylim=(-3, 8), xlim=(0, 1500),
            title="betting against the claim $p \\leq 0.5$")
axes[1].legend(loc="upper left")
plt.show()

# %% [markdown]
# ## 2.10 The sequential test: same guarantee, fewer draws
#
# The anytime bound is smaller than Clopper and Pearson's at the same $n$: validity at all times has a price. It buys
# the right to stop. A table of certified accuracy asks only whether the radius reaches 0.25, 0.5 and so on. So an
# image may stop
# * as soon as the largest radius of the table is proven;
# * when the next one, $r$, is *out of reach*, as not even successes in all draws to come would prove it;
# * or when $r$ is *futile*: the evidence against $p_A \ge \Phi(r/\sigma)$ reaches 100. That evidence is (2.11) with
#   successes and failures exchanged.
#
# The last two compare $r$ with a radius each: the most that can still be proven, and the largest that is not refuted.
# After $k$ successes in $n$ of at most $n_{\max}$ draws, with $\underline p_n$ the best bound of all looks so far, they
# say
#
# $$ \sigma\,\Phi^{-1}\bigl(\max\{\underline p_n,\ \underline p_{\alpha/2}(k + n_{\max} - n)\}\bigr) < r
#    \qquad\text{or}\qquad \sigma\,\Phi^{-1}\bigl(1 - \underline p_{n,\,1/100}(n - k)\bigr) \le r. \tag{2.14} $$
#
# On the left stands `largest_radius`, with the bound (2.2) after all $n_{\max}$ draws at the error $\alpha/2$. On the
# right stands `possible_radius`, with the anytime bound for $n - k$ failures in $n$ draws at the error $1/100$.
# Futility needs no share of $\alpha$. The anytime bounds hold at all looks at once, hence at the one where one stops,
# for whatever reason. A wrong stop can make a radius smaller, never false.
#
# An image whose radius lies next to one of the table's gets all $n_{\max}$ draws, and there the anytime bound would be
# a worse judge than Clopper and Pearson's. So $\alpha$ is split: the anytime bounds are computed at $\alpha/2$, and one
# Clopper-Pearson bound at $\alpha/2$ after the last draw. Its chance of error is at most $\alpha/2$ whether or not
# one gets so far (imagine the draws that were not made). By the union bound all these bounds hold together with
# probability $1 - \alpha$. The price is small, since bounds depend on $\ln(1/\alpha)$.
#
# Drawing as much as an image needs has been done before: Horváth et al. (2022) do it in stages that share $\alpha$,
# Chen et al. (2022) choose the number of draws for each image, and Voracek (2024) uses bounds that hold at all times.
#
# In the page, the rule is (2.14) and a dozen lines around it. In `extras/sequential.py` it is `sequential`, a generator
# as `fixed_n` is, for `certify.py --procedure`. Both must agree at every look, on the bound, on the two radii of (2.14)
# and on whether to stop.

# %%
def anytime_or_none(k, n, alpha):
    return anytime_by_hand(k, n, alpha) if k else 0.0                       # no success, no evidence


def most_by_hand(k, n, n_max, best, sigma):
    return sigma * stats.norm.ppf(max(best, lower_confidence_bound(k + n_max - n, n_max, alpha / 2)))


def possible_by_hand(k, n, sigma):
    return sigma * stats.norm.ppf(1 - anytime_or_none(n - k, n, 1 / 100))


def look_by_hand(k, n, n_max, best, sigma, radii):
    """(the best bound so far, why to stop or None), after k successes in n draws."""
    best = max(best, anytime_or_none(k, n, alpha / 2))
    if n == n_max:
        return max(best, lower_confidence_bound(k, n, alpha / 2)), "all draws made"
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
# **Check.** Feed the rule with binomial draws of a known share and compare with the fixed $n =
# 100\,000$. How many draws does it take until it stops, and is its bound ever above the truth? Close to the boundary
# (grey line) it needs tens of thousands of draws; away from it, about a thousand. ($R \ge r$ is undecidable at the
# boundary itself.) And after a futile stop the evidence (2.11) against the next radius must be at least 100.

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
        assert lower <= p                                                   # fails with probability 0.001 a run
        settled = sigma * stats.norm.ppf(lower) >= r
        reachable = lower_confidence_bound(k + 100_000 - n, 100_000, alpha / 2) > stats.norm.cdf(r / sigma)
        if n < 100_000 and not settled and reachable and lower > 1 / 2:
            futile += 1
            assert log_evidence(n - k, n, 1 - stats.norm.cdf(r / sigma)) >= math.log(100)
        draws[row, column] = n
print(f"{futile} of {draws.size} runs stopped as futile; median number of draws {np.median(draws):.0f}")
assert futile > 5 and draws.min() < 3000 and np.median(draws) < 50_000

figure, axis = plt.subplots(figsize=(5.6, 3.6))
axis.axvline(r, color="0.6", linewidth=1)
axis.axhline(100_000, color=ORANGE, linestyle="--", label="fixed n")
axis.semilogy(sigma * stats.norm.ppf(true_shares), draws, "o", color=BLUE, markersize=5, alpha=0.6)
axis.semilogy(sigma * stats.norm.ppf(true_shares), draws.mean(axis=1), color=BLUE, label="sequential: runs, mean")
axis.set(xlabel=r"true radius, with $r = 0.5$ asked (pixels in [0, 1])", ylabel="draws", ylim=(700, 250_000))
axis.legend(loc="center right")
plt.show()

# %% [markdown]
# ## 2.11 Two sides: what the other counts are worth
#
# Theorem 1 of Cohen, Rosenfeld and Kolter takes *two* numbers: a lower bound $\underline{p_A}$ of the top class's
# share, and an upper bound $\overline{p_B}$ of the share of each other class, of its *rivals*. CERTIFY knows
# $\underline{p_A}$ alone and sets $\overline{p_B} = 1 - \underline{p_A}$. With both,
#
# $$ R = \frac\sigma2 \bigl(\Phi^{-1}(\underline{p_A}) - \Phi^{-1}(\overline{p_B})\bigr), \qquad
#    R - \sigma\,\Phi^{-1}(\underline{p_A}) = \frac\sigma2 \bigl(\Phi^{-1}(1 - \overline{p_B}) -
#    \Phi^{-1}(\underline{p_A})\bigr) \ge 0, \tag{2.15} $$
#
# since $1 - \overline{p_B} \ge \underline{p_A}$. The two radii are equal where $\overline{p_B} = 1 -
# \underline{p_A}$: where two classes hold everything. Everywhere else CERTIFY pretends that all copies that $A$ lost
# went to one single rival, and that is wasteful. Let $A$ have the share 0.4, and six rivals 0.1 each. Then $g$
# answers $A$, with a wide margin. But $p_A < \frac12$, so CERTIFY abstains, whatever $n$. Yet $f$ has answered, and
# the rivals' counts are there. From now on a radius is *one-sided* if $\overline{p_B} = 1 - \underline{p_A}$, and
# *two-sided* if $\overline{p_B}$ comes from the counts.
#
# **Check** (2.15) on the classifier of notebook 01, section 1.9, here with one pixel: $A$ below $a$, $B$ above $b$, and
# between the two, many classes with a little each. There the shares of $A$ and $B$ meet exactly at the two-sided
# radius. The one-sided one is smaller.

# %%
def radius_of(pair, sigma):
    """(2.15), from a pair (p_A, p_B)."""
    p_a, p_b = pair
    return certified_radius(p_a, sigma, p_b)


for a, b, s in ((-0.1, 0.3, 0.5), (0.05, 0.2, 0.25), (0.1, 0.1, 1.0)):
    p_a, p_b = stats.norm.cdf(a / s), stats.norm.cdf(-b / s)
    one, two = certified_radius(p_a, s), radius_of((p_a, p_b), s)
    meet = brentq(lambda t, a=a, b=b, s=s: stats.norm.cdf((a - t) / s) - stats.norm.cdf((t - b) / s), -5, 5)
    print(f"p_A = {p_a:.3f}, p_B = {p_b:.3f}: one-sided {one:.3f}, two-sided {two:.3f}; A and B meet at {meet:.3f}")
    gain = s / 2 * (stats.norm.ppf(1 - p_b) - stats.norm.ppf(p_a))
    assert abs(two - meet) < 1e-9 and abs(two - s * stats.norm.ppf(p_a) - gain) < 1e-9 and gain > -1e-9
    assert one == max(0, s * stats.norm.ppf(p_a)) and (two > one or abs(p_a + p_b - 1) < 1e-9)

# %% [markdown]
# **Bounds that hold together.** Failures are counts, too: a share is at most $u$ if the share of the rest is at least
# $1 - u$. So the upper bound of Clopper and Pearson at level $a$ is
#
# $$ \overline p_a(k) = 1 - \underline p_a(n - k), \qquad \Pr_p[\overline p_a(k) < p] \le a, \tag{2.16} $$
#
# the $1 - a$ quantile of $\operatorname{Beta}(k + 1, n - k)$. For classes with counts $k_c$, half of $\alpha$ goes to
# the top class, and the other half to the largest count among its rivals:
#
# $$ \underline{p_A} = \underline p_{\alpha/2}(k_A), \qquad
#    \overline{p_B} = \min\Bigl\{ \overline p_{\alpha/2}\bigl(\max_{c \ne A} k_c\bigr),\ 1 - \underline{p_A} \Bigr\}.
#    \tag{2.17} $$
#
# *Proof* that both hold with probability at least $1 - \alpha$.
# 1. $A$ was chosen with other draws. So each $k_c$ is binomial, with the share of $c$. (They depend on each other.)
# 2. Let $c^*$ be the rival with the largest *share*: one class, whatever is drawn. Its bound $\overline
#    p_{\alpha/2}(k_{c^*})$ errs with probability at most $\alpha/2$, and so does $\underline p_{\alpha/2}(k_A)$. So
#    one of the two errs with probability at most $\alpha$.
# 3. If none errs: $\max_c k_c \ge k_{c^*}$ and $\overline p$ increases with $k$. So $\overline p_{\alpha/2}(\max_c
#    k_c)$ is at least the bound of $c^*$, which is above the share of $c^*$, which is above every other rival's. And
#    no rival has more than $1 - \underline{p_A}$, as $A$ has at least $\underline{p_A}$: that minimum costs nothing.
#    $\square$
#
# A bound for *each* rival would need the union bound over them, $\alpha/(2(K-1))$ each for $K$ classes. The radius
# asks for no such thing.
#
# $g$ is certified where $\underline{p_A} > \overline{p_B}$; $\underline{p_A} > \frac12$ is not needed. And the
# argument of (2.5) remains: a false certificate requires that one of the bounds errs.
#
# In the page: the upper bound by solving $\Pr_p[X \le k] = a$ on the sum, and (2.17) word for word. In the scripts:
# `upper_confidence_bound`, `rivals_of` (which finds the largest count) and `two_sided_bounds`.

# %%
def upper_by_hand(k, n, a):
    """(2.16): where P_p[X <= k], which is the upper tail of the failures, is a."""
    return 1 - clopper_pearson(n - k, n, a)


def pair_by_hand(tally, top, alpha):
    """(2.17), word for word."""
    n, rivals = sum(tally), [int(k) for c, k in enumerate(tally) if c != top]
    p_a = clopper_pearson(int(tally[top]), n, alpha / 2)
    return p_a, min(upper_by_hand(max(rivals), n, alpha / 2), 1 - p_a)


random = np.random.default_rng(11)
for k, n, a in ((0, 10, 0.05), (3, 10, 0.001), (60, 100, 0.001), (100, 100, 0.05)):
    tail = 1 - upper_tail(k + 1, n, upper_by_hand(k, n, a))                 # P[X <= k] at the bound
    assert k == n or abs(tail - a) < 1e-9
    assert abs(certify.upper_confidence_bound(k, n, a) - upper_by_hand(k, n, a)) < 1e-9
for classes in (2, 3, 10):
    for _ in range(10):
        tally = random.multinomial(random.integers(1, 80), random.dirichlet(np.ones(classes)))
        top, n = int(random.integers(classes)), int(tally.sum())            # any class: not only the most frequent
        assert certify.rivals_of(tally, top, n) == (max(np.delete(tally, top)), classes - 1)
        pair = certify.two_sided_bounds(torch.tensor(tally), top, n, alpha)
        assert np.allclose(pair, pair_by_hand(tally, top, alpha), rtol=0, atol=1e-9)
print("of 40 copies 20, 12 and 8:", ", ".join(f"{bound:.4f}" for bound in pair_by_hand([20, 12, 8], 0, alpha)))

# %% [markdown]
# **Check.** The error of (2.17), exactly: there are 861 outcomes for three classes and $n = 40$. We add
# up the multinomial probabilities of those where $\underline{p_A}$ or $\overline{p_B}$ is on the wrong side of the
# truth, for shares all over the simplex.

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


halves = [certify.two_sided_bounds(torch.tensor(tally), 0, n, a) for tally in outcomes]
assert np.array_equal(halves, pairs_at(a / 2, a / 2))
error = {"α for every bound": worst_error(pairs_at(a, a)),
         "α/2 for A, α/2 for the largest rival: (2.17)": worst_error(halves),
         "α/2 for A, α/4 for each rival": worst_error(pairs_at(a / 2, a / 4))}
figure, axis = plt.subplots(figsize=(5.6, 3.2))
for (name, errors), colour, style in zip(error.items(), (ORANGE, GREEN, BLUE), ("-", "-.", "-"), strict=True):
    print(f"{name}: at most {errors.max() / a:.2f} alpha")
    axis.plot(share, errors / a, style, color=colour, linewidth=1, label=name)
    assert (errors.max() <= a) == (name != "α for every bound")
axis.axhline(1, color="black", linewidth=1)
axis.set(xlabel="true share of A, three classes, n = 40", ylabel="chance of error / α", ylim=(0, 2.5), xlim=(0, 1))
axis.legend(loc="upper left")
plt.show()

# %% [markdown]
# The line is crossed unless $\alpha$ is shared: two bounds err more often than one. And the blue line shows what a
# bound for each rival would give away.
#
# **The plane of $\underline{p_A}$ and $\overline{p_B}$.** With $\Phi^{-1}$ as scale on both axes the level lines of
# both radii are straight: vertical for the one-sided radius, at 45 degrees for the two-sided one. On the edge
# $\overline{p_B} = 1 - \underline{p_A}$ they meet. Every dot is a test digit at its bounds (2.17). There are thirty,
# with $n = 2000$ copies each, counted here. The classifier is the committed one. It was fine-tuned at $\sigma =
# 0.25$, and is asked at 0.5 and at 1, where its answers are spread. (The average certified radius, ACR, is due to
# Zhai et al. 2020; an image that is answered wrongly counts 0.)

# %%
digits = [(i, digit(i)) for i in range(0, 360, 12)]
states = (("both certify", BLUE, "o"), ("only two-sided certifies", GREEN, "D"), ("both abstain", ORANGE, "X"))
figure, axes = plt.subplots(1, 2, figsize=(9.4, 4.3), sharey=True)
ticks = np.array([0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99])
for axis, s in zip(axes, (0.5, 1.0), strict=True):
    for level in (0.0, 0.25, 0.5, 1.0):
        corner = level / s                                                  # where the radii agree: p_B = 1 - p_A
        axis.plot([corner - 5, corner], [-corner - 5, -corner], color="black", linewidth=1)
        axis.plot([corner, corner], [-5, -corner], "--", color=GREY, linewidth=1)
        assert np.isclose(certified_radius(stats.norm.cdf(corner), s), level)
        assert np.isclose(certified_radius(stats.norm.cdf(corner - 0.7), s, stats.norm.cdf(-corner - 0.7)), level)
        axis.annotate(f"R = {level:g}", (corner, -corner), xytext=(4, 2), textcoords="offset points", fontsize=9)
    axis.fill_between([-3, 3], [3, -3], 3, color="0.9")
    axis.text(0.9, 0.35, "$p_B > 1 - p_A$:\nimpossible", fontsize=9)

    found = list(certify.certify_all(vit, digits, s, 100, 2000, alpha, batch=500))
    tally = dict.fromkeys(states, 0)
    for _, _, top, _, _, bounds in found:
        answers = [certify.certificate(top, *bounds[one], s)[0] for one in ("one-sided", "two-sided")]
        certifies = [answer != certify.ABSTAIN for answer in answers]
        state = states[2 - sum(certifies)]
        assert certifies[1] or not certifies[0]                # no theorem: it could fail by a hair at p_A = 1/2
        tally[state] += 1
        name, colour, marker = state
        p_a, p_b = bounds["two-sided"]
        label = name if tally[state] == 1 else None
        axis.plot(stats.norm.ppf(p_a), stats.norm.ppf(p_b), marker, color=colour, markersize=5, zorder=3, label=label)
    axis.set(xlim=(-2.1, 2.6), ylim=(-2.6, 1.0), xlabel="$p_A$, at least", title=rf"$\sigma$ = {s:g}",
             xticks=stats.norm.ppf(ticks[1:]), xticklabels=ticks[1:],
             yticks=stats.norm.ppf(ticks[:5]), yticklabels=ticks[:5])

    print(f"sigma = {s:g}, of {len(found)} digits: "
          + ", ".join(f"{count} {name}" for (name, *_), count in tally.items()))
    right = [(top, bounds) for i, _, top, _, _, bounds in found if top == images.labels[i]]
    mean = {bound: sum(certify.certificate(top, *bounds[bound], s)[1] for top, bounds in right) / len(found)
            for bound in ("one-sided", "two-sided")}
    print("  average certified radius: " + ", ".join(f"{bound} {value:.3f}" for bound, value in mean.items()))
    assert mean["two-sided"] > 1.2 * mean["one-sided"] and tally[states[1]] > 0
axes[0].set_ylabel("$p_B$, at most")
axes[0].plot([], [], color="black", linewidth=1, label="level lines, two-sided")
axes[0].plot([], [], "--", color=GREY, linewidth=1, label="level lines, one-sided")
handles = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=5, fontsize=8.5)
plt.show()

# %% [markdown]
# Below the line $R = 0$ (the diagonal $p_A = p_B$) the two-sided radius is positive; the one-sided one
# needs the vertical line $p_A = \frac12$. The wedge between them holds the images that were given away. Here is one,
# by `certify` itself:

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

figure, axes = plt.subplots(1, 3, figsize=(8.6, 2.9), width_ratios=(1, 1, 2))
noisy = x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
for axis, picture, title in ((axes[0], x, "an 8"), (axes[1], noisy, r"an 8, a copy at $\sigma$ = 0.5")):
    axis.imshow(picture[0], cmap="gray", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[], title=title)
axes[2].bar(range(10), counts / 4000, color=[GREEN if c == 8 else PURPLE if c == rival else "0.7" for c in range(10)])
axes[2].axhline(0.5, color=GREY, linestyle="--", linewidth=1)
axes[2].axhline(p_a, color=GREEN, linewidth=1)
axes[2].axhline(p_b, color=PURPLE, linewidth=1)
axes[2].text(9.5, 0.51, "asked by one-sided", ha="right", va="bottom", fontsize=8)
axes[2].text(-0.4, p_a + 0.01, f"$p_A \\geq$ {p_a:.3f}", fontsize=9)
axes[2].text(-0.4, p_b + 0.01, f"$p_B \\leq$ {p_b:.3f}", fontsize=9)
axes[2].set(xlabel="answer of f", ylabel="share of 4000 copies", xticks=range(10), ylim=(0, 0.58))
axes[2].grid(axis="x", visible=False)
plt.show()

# %% [markdown]
# **When it does not pay.** The top class now has $\alpha/2$, which costs a hair:
#
# $$ R_{\text{two}}(\alpha) \;\ge\; R_{\text{one}}(\alpha/2), \quad
#    \text{with equality if } k_A + \max_{c \ne A} k_c = n. \tag{2.18} $$
#
# The inequality is the minimum in (2.17). If two classes got everything, then $\overline p_{\alpha/2}(n - k_A) = 1 -
# \underline p_{\alpha/2}(k_A)$, so the minimum is $1 - \underline{p_A}$, for any $K$. By (2.7) halving $\alpha$ takes
# little: it acts as a logarithm under a root. So for two classes the published bound is the better one, by that hair.
# For more classes it depends on the image. But one has to choose *before* looking. Anyone who takes the better of
# both has two chances to err, and up to $\frac32\alpha$ (the bounds at $\alpha$ and $\alpha/2$ of $A$ err together).

# %%
random = np.random.default_rng(12)
for _ in range(300):
    classes, size = random.integers(2, 20), random.integers(20, 5000)
    tally = torch.tensor(random.multinomial(size, random.dirichlet(np.full(classes, 0.3))))
    top, size = int(tally.argmax()), int(size)
    halved = certified_radius(lower_confidence_bound(int(tally[top]), size, alpha / 2), 1.0)
    assert radius_of(certify.two_sided_bounds(tally, top, size, alpha), 1.0) >= halved - 1e-12
    pair = torch.tensor([int(tally[top]), size - int(tally[top])] + [0] * int(random.integers(9)))
    assert np.isclose(radius_of(certify.two_sided_bounds(pair, 0, size, alpha), 1.0), halved)

print("radii in units of sigma, K = 10, A has 90 %; its rivals have the rest, in equal parts")
for n in (1000, 10_000, 100_000):
    one = certified_radius(lower_confidence_bound(n * 9 // 10, n, alpha), 1.0)
    for rivals in (1, 2, 5):
        tally = [n * 9 // 10] + [n // 10 // rivals] * rivals + [0] * (9 - rivals)
        p_a, p_b = certify.two_sided_bounds(tally, 0, n, alpha)
        two = certified_radius(p_a, 1.0, p_b)
        each = certified_radius(p_a, 1.0, min(1 - p_a, certify.upper_confidence_bound(tally[1], n, alpha / 18)))
        print(f"  n = {n:6}, {rivals} of the rivals: one-sided {one:.4f}, two-sided {two:.4f} ({two - one:+.4f}); "
              f"with a bound for each of the nine {each:.4f}")
        assert (two < one) == (rivals == 1) and one - two < 0.04

part = np.linspace(1 / 9, 1, 100)                                           # of the strongest rival in what A lost
figure, axis = plt.subplots(figsize=(5.8, 3.4))
for p, colour, style in ((0.4, GREEN, "-"), (0.6, BLUE, "--"), (0.9, ORANGE, "-."), (0.99, PURPLE, ":")):
    k = round(10_000 * p)
    one = certified_radius(lower_confidence_bound(k, 10_000, alpha), 1.0)
    gain = []
    for s in part:
        strongest = round((10_000 - k) * s)
        rest = 10_000 - k - strongest
        tally = [k, strongest] + [rest // 8 + (c < rest % 8) for c in range(8)]
        gain.append(radius_of(certify.two_sided_bounds(tally, 0, 10_000, alpha), 1.0) - one)
    axis.plot(part, gain, style, color=colour, label=f"$k_A/n$ = {p}")
    assert gain[0] > 0.1 and -0.02 < gain[-1] <= 0
axis.axhline(0, color="black", linewidth=1)
axis.set(xlabel="share of the strongest rival in what A lost (K = 10)", ylabel=r"radius gained ($\sigma$), n = 10 000")
axis.legend()
plt.show()

# %% [markdown]
# **Sequential, too.** `sequential` keeps both pairs at every look. Its two-sided pair is (2.17) with
# the anytime bound in place of (2.2), at $\alpha/2$ as before: half of that for $A$, half for the rivals. The upper
# bound of a rival is again one minus the lower bound of its failures. After the last draw comes (2.17) itself, at the
# other $\alpha/2$. The two radii of (2.14) are two-sided, too. The most that can be proven is what (2.17) says if all
# draws to come are $A$'s. The largest that is not refuted has $p_A$ at its upper bound and the largest rival at its
# lower bound, each an anytime bound at the error $1/100$. `bound` says which of the radii the rule for stopping means.
#
# In the page, and against `bounds_after`, `largest_radius` and `possible_radius`, with a few draws:

# %%
def anytime_pair(tally, top, a):
    """(2.17), with the anytime bound in place of (2.2)."""
    n, strongest = sum(tally), max(np.delete(tally, top))
    p_a = anytime_or_none(tally[top], n, a / 2)
    return p_a, min(1 - anytime_or_none(n - strongest, n, a / 2), 1 - p_a)


def better(one, other):
    """The best of two pairs that hold together."""
    p_a = max(one[0], other[0])
    return p_a, min(one[1], other[1], 1 - p_a)


def signed_radius(pair, sigma):
    """(2.15), negative where p_A < p_B."""
    return sigma / 2 * (stats.norm.ppf(pair[0]) - stats.norm.ppf(pair[1]))


random, n_max = np.random.default_rng(17), 300
for _ in range(5):
    tally, best, bounds, shares = np.zeros(4, dtype=int), (0.0, 1.0), NOTHING, random.dirichlet(np.ones(4))
    for n in range(100, n_max + 1, 100):
        tally = tally + random.multinomial(100, shares)
        best = better(best, anytime_pair(tally, 0, alpha / 2))
        if n == n_max:
            best = better(best, pair_by_hand(tally, 0, alpha / 2))
        bounds = sequential.bounds_after(tally, 0, n, n_max, alpha, bounds)
        assert np.allclose(bounds["two-sided"], best, rtol=1e-9, atol=1e-9)
        all_for_a = tally + np.array([n_max - n, 0, 0, 0])
        most = signed_radius(better(best, pair_by_hand(all_for_a, 0, alpha / 2)), 0.5)
        assert np.isclose(sequential.largest_radius(tally, 0, n, n_max, alpha, 0.5, "two-sided", bounds), most)
        at_best = (1 - anytime_or_none(n - tally[0], n, 1 / 100), anytime_or_none(max(tally[1:]), n, 1 / 100))
        assert np.isclose(sequential.possible_radius(tally, 0, n, 0.5, "two-sided"), signed_radius(at_best, 0.5))
print("the two-sided pair, and both radii of (2.14), are those of sequential")

# %% [markdown]
# **Check** with multinomial draws for our digit's shares: does the pair hold at the end, and how many draws does it
# take to certify the radius 0.1? The one-sided rule never can, and stops when that is clear.

# %%
random, true = np.random.default_rng(13), (counts / 4000).double().numpy()
order = [8] + [c for c in range(10) if c != 8]
for bound in ("one-sided", "two-sided"):
    spent = []
    for _ in range(5):
        rule = sequential.sequential(index, x, 0.5, 1, 100_000, alpha, 0, [0.1], bound)
        *_, (_, n, (_, _, _, pairs)) = looks_of(rule, lambda copies: random.multinomial(copies, true[order]))
        p_a, p_b = pairs["two-sided"]
        assert p_a <= true[8] and p_b >= true[order[1:]].max()              # fails with probability 0.001 a run
        assert (radius_of(pairs[bound], 0.5) >= 0.1) == (bound == "two-sided")
        spent.append(n)
    print(f"{bound}: stopped after {spent} draws")
    assert max(spent) < 50_000

# %% [markdown]
# *Sources.* The pair $(\underline{p_A}, \overline{p_B})$: Cohen, Rosenfeld and Kolter 2019, theorem 1.
# Simultaneous Clopper-Pearson bounds that share $\alpha$: Jia et al. 2020, for top-$k$ predictions, which need the
# bounds of several classes. Bounds that may be looked at any time: Voracek 2024. Classes in groups, so that fewer
# bounds share $\alpha$: Delattre et al. 2025.

# %% [markdown]
# ## 2.12 One image, and a whole test set
#
# With $\alpha = 0.001$ each of $M$ certificates is false with probability at most 0.001. Of 10 000 images, about ten
# may carry a false one. What does that do to the certified accuracy, the share of images with a right answer and $R
# \ge r$? Let $Z_i = 1$ if the certificate of image $i$ is false. Given the images, the $Z_i$ are independent (each
# has its own noise) with $\Pr[Z_i = 1] \le \alpha$. So $\sum Z_i$ is stochastically smaller than
# $\operatorname{Binomial}(M, \alpha)$, and
#
# $$ \Pr\Bigl[\text{measured} - \text{true certified accuracy} > \frac qM\Bigr] \le \Pr\bigl[\operatorname{Bin}(M,
#    \alpha) > q\bigr] \le \rho, \qquad
#    q = \min\{j : \Pr[\operatorname{Bin}(M, \alpha) \le j] \ge 1 - \rho\}. \tag{2.19} $$
#
# For suppose that the measured number exceeds the true one by more than $q$. Then more than $q$ images were counted
# that are not really right within $r$, and each of those has a false certificate. (Independent indicators with
# chances $\alpha_i \le \alpha$ can be coupled: with uniform $U_i$, $\mathbb 1[U_i < \alpha_i] \le \mathbb 1[U_i <
# \alpha]$.) This holds for every $r$ at once: the false certificates are the same ones.
#
# Cohen, Rosenfeld and Kolter bound the same by Bernstein's inequality, $q/M \le \alpha + \sqrt{2\alpha(1 -
# \alpha)\ln(1/\rho)/M} + \ln(1/\rho)/(3M)$. The factor 2 under the root is missing in the published script
# (`HighProbAccuracy` in its `analyze.py`). Without it the bound can fail, as the check shows. The exact quantile
# needs no inequality, and is smaller than the correct one.
#
# It is a statement about *these* images. How well a classifier does on the population they come from is a second
# question, with a second error, that of any test accuracy.
#
# The other reading, "all $M$ certificates hold, with probability $1 - \alpha$", needs the union bound: run each image
# at $\alpha / M$. By (2.7) that is cheap in radius, as $\ln(1/\alpha)$ grows slowly.
#
# In the page, $q$ is added up from its definition, in exact fractions, and is taken as a quantile, too. The scripts
# print the measured accuracy; `excess`, over $M$, is what to subtract from it.

# %%
def excess_by_hand(M, alpha, rho):
    """(2.19): the least j with P[Bin(M, alpha) <= j] >= 1 - rho."""
    alpha, rho = Fraction(alpha), Fraction(rho)
    j, reached = 0, (1 - alpha) ** M
    while reached < 1 - rho:
        j += 1
        reached += math.comb(M, j) * alpha**j * (1 - alpha) ** (M - j)
    return j


def excess(M, alpha, rho=0.001):
    """(2.19), as a quantile of the binomial distribution."""
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

q = excess_by_hand(len(rows), alpha, rho)
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
figure, axis = plt.subplots(figsize=(5.6, 3.6))
axis.loglog(M, [100 * excess(int(j), alpha) / j for j in M], color=BLUE, label=r"$q/M$, $\rho = 0.001$: exact")
axis.axhline(100 * alpha, color="black", linestyle=":", label=r"mean, $\alpha$")
for size, name in ((500, "500"), (10_000, "10 000")):
    lost = 100 * excess(size, alpha) / size
    axis.plot(size, lost, "o", color=ORANGE)
    axis.annotate(f"{name} images: {lost:.2f} %", (size, lost), xytext=(0, 22), textcoords="offset points",
                  arrowprops=dict(arrowstyle="-", color=GREY, linewidth=0.8, shrinkB=4))
axis.set(xlabel="images M", ylabel="accuracy to subtract (%)", ylim=(0.05, 20), xlim=(15, 600_000))
axis.legend()
plt.show()


# %% [markdown]
# ## 2.13 Floating point
#
# The theorem speaks of real numbers, a computer adds floats. Is it a quibble? A float near 1 has a spacing of
# $2^{-24}$ just below and $2^{-23}$ above; near 0 the spacing is finer by many orders of magnitude. So the *last
# digits* of $x + e$ carry information about $x$, which no real noise would leave, and a classifier may read it (Jin
# et al. 2022, Voracek and Hein 2023). Consider
#
# $$ f(z) = \mathbb 1\bigl[\, 2^{24} z \text{ is an integer} \,\bigr]. \tag{2.20} $$
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
prediction, radius = certify.certify(coarse, one, sigma, n=20_000)
at_zero = certify.predict(coarse, zero, sigma, n=20_000)
print(f"at x = 1: class {prediction}, certified within {radius:.3f} > 1; at x = 0, within that radius: class {at_zero}")
assert prediction == 1 and radius > 1 and at_zero == 0                      # a false certificate

places = np.linspace(0, 1, 101)
share = []
for i, place in enumerate(places):
    counts = counts_of(coarse, torch.full((1, 1, 1), float(place)), sigma, 2000, i, 1, batch=1000)
    share.append(counts[1].item() / 2000)
figure, axis = plt.subplots(figsize=(5.6, 3.4))
axis.plot(places, 100 * np.array(share), ".", color=ORANGE, label="floats: counted")
axis.axhline(0, color=BLUE, label="real numbers")
axis.set(xlabel="pixel x", ylabel="noisy copies in class 1 (%)", ylim=(-3, 103))
axis.legend(loc="center right")
plt.show()

# %% [markdown]
# Networks do not read last digits on purpose, and published results rest on the belief that they do not do so by
# accident. It can be made a theorem. Images are on a grid to begin with, $x \in \{0, 1/G, \dots, 1\}^d$. Let the base
# classifier *round* its input to that grid (without clipping): $\tilde f(z) = f(\operatorname{round}(z))$. This is a
# classifier like any other, so (1.6) and (1.7) hold for it with *real* noise. And since $x$ is on the grid,
#
# $$ \operatorname{round}(x + e) = x + \operatorname{round}(e), \qquad
#    \Pr\bigl[\operatorname{round}(e) = j/G\bigr] = \Phi\Bigl(\frac{j + \frac12}{\sigma G}\Bigr) -
#    \Phi\Bigl(\frac{j - \frac12}{\sigma G}\Bigr), \tag{2.21} $$
#
# with $\operatorname{round}$ to the nearest multiple of $1/G$. So all that is ever needed is an integer $j$ with
# these probabilities, for each pixel. It is drawn from 53 random bits and a table of the cumulative probabilities.
# Draws that the last bits of the table would decide are not counted for $A$. This is in substance the method of
# Voracek and Hein (ICLR 2023); in the scripts it is `GridNoise` of `extras/integer_noise.py`.
#
# In the page, without the care for the last bits, it is four lines:

# %%
def rounded_noise(sigma, G, shape, generator):
    """Integers j with the probabilities (2.21): as many table entries as lie below 53 random bits."""
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
# **Check.** The frequencies of the integers against (2.21); the identity on the left by exact rational
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

figure, axis = plt.subplots(figsize=(5.6, 3.2))
axis.bar(values, 100 * observed, color=BLUE, width=0.7, label="drawn, 90 000")
axis.plot(values, 100 * probability, "o", color=ORANGE, markersize=4, label="(2.21)")
axis.set(xlabel=r"integer $j$ (noise in units of $1/16$)", ylabel="share (%)")
axis.legend()
plt.show()

# %% [markdown]
# One more place where digits matter: the radius that is printed. The quantiles are themselves computed
# in floats, and a table entry must not exceed the truth. So radii are rounded *down*, with a margin of $10^{-9}$ for
# errors of the special functions (`round_down`). And in one sense floats are no approximation at all: the theorem is
# about $f$ *as it is computed*. A network run in another precision, or with another kernel, is another $f$, with its
# own certificates. Deploy the one that you certified.

# %%
for radius in (0.1234567891, 0.25, 1.0000004, 1e-10):
    lowered = max(0, math.floor((radius - 1e-9) * 10**6) / 10**6)
    written = Fraction(f"{certify.round_down(radius):.6f}")
    assert lowered == certify.round_down(radius)
    assert written < Fraction(radius) and Fraction(radius) - written < Fraction(2, 10**6)
    print(f"{radius:.10f} -> {lowered:.6f}")

# %% [markdown]
# ## 2.14 What to take along
#
# * A certificate is a *confidence statement*: $\underline p(k)$ exceeds the true share with probability at most
#   $\alpha$, for every share. Clopper and Pearson's bound has this property exactly, (2.2) and (2.3); Wilson's has
#   not.
# * $n$ draws prove at most $\sigma\,\Phi^{-1}(\alpha^{1/n})$, (2.7).
# * The class is chosen with other draws than those that are counted. The number of draws is fixed beforehand, or the
#   bound is one that allows looking, (2.11) to (2.13).
# * CERTIFY does not use the counts of the other classes. Bounds on both sides, (2.17), do: much is gained where
#   answers are spread, a hair is lost where two classes hold everything.
# * Per image $\alpha$; for the table, subtract $q/M$; for all certificates at once, $\alpha/M$.
# * Anyone who wants the theorem without a footnote draws the noise on the grid.
#
# Notebook 05 puts the pieces together on real images, and then tries to break the result.
#
# ## 2.15 Exercises
#
# 1. **The rule of three.** All of $n$ copies were called $A$. Show that, at $\alpha = 0.05$, the share of $A$ is at
#    least $1 - 3/n$. What replaces the 3 at $\alpha = 0.001$? *Hint:* (2.3), and $e^{-u} \ge 1 - u$.
# 2. **How many draws?** How many draws does it take, at least, to certify $R = 1$ at $\sigma = 0.25$ and
#    $\alpha = 0.001$? *Hint:* solve (2.7) exactly for $n$.
# 3. **Once more, please.** Somebody certifies each image with $\alpha = 0.001$. If the answer is an abstention, they
#    try again with fresh draws, up to three times. What is true of the certificates? How is it done properly? *Hint:*
#    (2.9).
# 4. **A single bet.** Replace $w$ by a point mass at one $\theta$. How fast does $\ln E_n$ grow when the true share
#    is $\theta$? How many draws does it take on average to reach $1/\alpha = 1000$, for $p_0 = 0.5$ and $\theta =
#    0.6$? Why spread the bet at all? *Hint:* the law of large numbers for the logarithm of one factor.
# 5. **Fifty looks by Bonferroni.** Somebody looks after every 100 draws up to 5000, with Clopper-Pearson bounds at
#    $\alpha/50$. Is that valid? Compare the bound with the anytime bound for $\hat p = 0.75$, at the first and at the
#    last look. *Hint:* `lower_confidence_bound` and `anytime_lower_bound`.
#
# <details><summary>Answers</summary>
#
# 1. $\underline p(n) = \alpha^{1/n} = e^{-\ln(1/\alpha)/n} \ge 1 - \ln(1/\alpha)/n$, and $\ln 20 = 2.996$. At
#    $\alpha = 0.001$ it is $\ln 1000 = 6.9$.
# 2. $\alpha^{1/n} > \Phi(r/\sigma)$ means $n > \ln\alpha / \ln\Phi(4)$: more than 218 000 draws, all of them
#    successes. The usual 100 000 cannot do it.
# 3. Each certificate may be the lucky one of three, so it is false with probability up to $3\alpha$ (for independent
#    ones $1 - (1-\alpha)^3$). Properly: $\alpha/3$ for each try, or one anytime bound for all draws together.
# 4. By $\mathbb E \ln(\text{factor}) = \theta \ln\frac{\theta}{p_0} + (1-\theta)\ln\frac{1-\theta}{1-p_0}$ a draw,
#    the Kullback-Leibler divergence: here 0.0201. It takes about $\ln 1000 / 0.0201 = 343$ draws. But the bet on
#    $\theta = 0.6$ loses for ever if the true share is 0.54, although that is above $p_0$. The mixture needs no
#    guess, and pays for it with a logarithm of $n$.
# 5. It is valid, by the union bound. Its bound is a little lower than the anytime bound at the first look, and a
#    little higher at the last. But after the fiftieth look it has nothing left to spend, and the looks must be fixed
#    before.
#
# </details>

# %%
# The numbers of the answers.
assert all(0.05 ** (1 / n) >= 1 - 3 / n and 0.001 ** (1 / n) >= 1 - math.log(1000) / n for n in range(1, 2000))
needed = math.floor(math.log(0.001) / stats.norm.logcdf(4)) + 1
assert certified_radius(0.001 ** (1 / needed), 0.25) >= 1 > certified_radius(0.001 ** (1 / (needed - 1)), 0.25)


def growth(p, theta, p0):
    """Mean of the logarithm of one factor of (2.11), for a bet on theta alone."""
    return p * math.log(theta / p0) + (1 - p) * math.log((1 - theta) / (1 - p0))


random = np.random.default_rng(14)
won = np.log(np.where(random.random((2000, 3000)) < 0.6, 0.6 / 0.5, 0.4 / 0.5)).cumsum(axis=1)
waited = (won >= math.log(1000)).argmax(axis=1) + 1
assert growth(0.54, 0.6, 0.5) < 0 and 1 <= waited.mean() / (math.log(1000) / growth(0.6, 0.6, 0.5)) < 1.05
print(f"exercise 2: {needed} draws")
print(f"exercise 4: {growth(0.6, 0.6, 0.5):.4f} a draw, {waited.mean():.0f} draws on average")
for n, better in ((100, "any time"), (5000, "Bonferroni")):
    bonferroni = lower_confidence_bound(n * 3 // 4, n, 0.001 / 50)
    any_time = sequential.anytime_lower_bound(n * 3 // 4, n, 0.001)
    print(f"exercise 5, n = {n:4}: Bonferroni {bonferroni:.4f}, any time {any_time:.4f}")
    assert (bonferroni > any_time) == (better == "Bonferroni")

# %% [markdown]
# ## 2.16 Appendix: the refuted claims form an interval
#
# Section 2.9 needs this: *wherever $E_n \ge 1/\alpha$, it falls as $p_0$ rises.* So the refuted claims form an
# interval $(0, \underline p_n]$. Write $q_0 = 1 - p_0$, $b$ for the Beta density at $p_0$, and $W$ for its mass on
# $(p_0, 1]$. Differentiating (2.11),
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
# ## References
#
# * Wilson 1927: [Probable inference, the law of succession, and statistical
#   inference](https://doi.org/10.1080/01621459.1927.10502953); Hoeffding 1963: [Probability inequalities for sums of
#   bounded random variables](https://doi.org/10.1080/01621459.1963.10500830)
# * Clopper, Pearson 1934: [The use of confidence or fiducial limits illustrated in the case of the
#   binomial](https://doi.org/10.1093/biomet/26.4.404); Brown, Cai, DasGupta 2001: [Interval estimation for a binomial
#   proportion](https://doi.org/10.1214/ss/1009213286)
# * Ville 1939: [Étude critique de la notion de collectif](http://www.numdam.org/item/THESE_1939__218__1_0/)
# * Robbins 1970: [Statistical methods related to the law of the iterated
#   logarithm](https://doi.org/10.1214/aoms/1177696786)
# * Howard, Ramdas, McAuliffe, Sekhon 2021: [Time-uniform, nonparametric, nonasymptotic confidence
#   sequences](https://arxiv.org/abs/1810.08240)
# * Hung, Fithian 2019: [Rank verification for exponential families](https://arxiv.org/abs/1610.03944)
# * Cohen, Rosenfeld, Kolter 2019: [Certified adversarial robustness via randomized
#   smoothing](https://arxiv.org/abs/1902.02918), and [its script](https://github.com/locuslab/smoothing)
# * Zhai et al. 2020: [MACER: attack-free and scalable robust training via maximizing certified
#   radius](https://arxiv.org/abs/2001.02378) (ACR)
# * Jia et al. 2020: [Certified robustness for top-k predictions against adversarial perturbations via randomized
#   smoothing](https://arxiv.org/abs/1912.09899); Delattre et al. 2025: [Bridging the theoretical gap in randomized
#   smoothing](https://arxiv.org/abs/2504.02412)
# * Horváth et al. 2022: [Boosting randomized smoothing with variance reduced
#   classifiers](https://arxiv.org/abs/2106.06946)
# * Chen et al. 2022: [Input-specific robustness certification for randomized
#   smoothing](https://arxiv.org/abs/2112.12084)
# * Voracek 2024: [Treatment of statistical estimation problems in randomized smoothing for adversarial
#   robustness](https://arxiv.org/abs/2406.17830) (confidence sequences)
# * Jin et al. 2022: [Getting a-round guarantees: floating-point attacks on certified
#   robustness](https://arxiv.org/abs/2205.10159); Voracek, Hein 2023: [Sound randomized smoothing in floating-point
#   arithmetics](https://arxiv.org/abs/2207.07209)
#
# previous: [01, smoothing](01_smoothing.ipynb) | [contents](README.md) | next:
# [03, the denoising masked autoencoder](03_denoising_masked_autoencoder.ipynb)
