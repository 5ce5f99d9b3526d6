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
# previous: [00, the method on one page](00_the_method_on_one_page.ipynb) | [contents](README.md) | next:
# [02, from counts to certificates](02_from_counts_to_certificates.ipynb)
#
# # 1. Smoothing: from a brittle classifier to one with a guarantee
#
# A trained network is right on most test images, and wrong on images that nobody could tell from them (Szegedy et al.
# 2014). This notebook replaces such a classifier $f$ by its *smoothed* version $g$, and proves how far an image has to
# be moved before $g$ may change its mind. The proof is the lemma of Neyman and Pearson.
#
# **Afterwards you can**
# * prove the radius $R = \sigma\,\Phi^{-1}(p_A)$ in two ways, and say why no larger one follows from the same
#   numbers;
# * say what the radius means for other norms, pixel units and resolutions;
# * explain why a larger $\sigma$ proves larger radii for fewer images.
#
# **It needs** the packages of `requirements.txt`, calculus and elementary probability; no GPU, no download. **It runs**
# in under a minute on two CPU cores. The *short path* of the [contents](README.md) reads sections 1.2, 1.4, 1.5, 1.6
# and 1.8.
#
# **History.** Lecuyer et al. (2019) certified a network by adding noise, Li et al. (2019) improved the radius, and
# Cohen, Rosenfeld and Kolter (2019) found the tight one. [References](README.md#references) and the [symbols of all
# notebooks](README.md#symbols) stand in the contents. Here:
#
# | symbol | meaning |
# |---|---|
# | $x \in \mathbb R^d$ | an image, its $d$ pixels in $[0, 1]$ |
# | $f : \mathbb R^d \to \{1, \dots, K\}$ | the base classifier: any measurable function |
# | $e \sim \mathcal N(0, \sigma^2 I)$ | Gaussian noise, independent in every pixel |
# | $p_c(x) = \Pr[f(x + e) = c]$ | how often $f$ answers $c$ on noisy copies of $x$ |
# | $\delta \in \mathbb R^d$ | a perturbation, of Euclidean length $\lVert\delta\rVert$ |
# | $\Phi$, $\varphi$ | distribution function and density of $\mathcal N(0, 1)$ |
# | $\Delta$ | a distance: of two images, or of an image from where the answer changes |

# %%
# %matplotlib inline
import sys
from pathlib import Path

ROOT = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "certify.py").is_file())
sys.path[:0] = map(str, (ROOT, ROOT / "notebooks", ROOT / "results/fashion-mnist"))      # works from any of them

import garment
import matplotlib.pyplot as plt
import numpy as np
import pictures
import torch
from pictures import show
from scipy import stats
from scipy.ndimage import gaussian_filter
from scipy.optimize import brentq, linprog
from scipy.special import gammaln, ndtri_exp
from torch import nn

import certify
import model

# %% [markdown]
# ## 1.1 A brittle classifier
#
# *Not on the short path.*
#
# *Projected gradient ascent* (Madry et al. 2018) moves an image along the gradient of the loss, and after each step
# pulls it back into a ball of radius $\varepsilon$ around the original. The $j$-th adversarial image, from $x'_0 = x$,
# is followed by
#
# $$ x'_{j+1} = \Pi_{\{z : \lVert z - x\rVert \le \varepsilon\}} \Bigl( x'_j + a\,
#    \tfrac{\nabla \mathcal L(x'_j)}{\lVert \nabla \mathcal L(x'_j) \rVert} \Bigr), $$
#
# with $\mathcal L$ the cross-entropy of the true class, $a$ the length of a step and $\Pi$ the projection. An attack
# that succeeds is a proof of weakness. An attack that fails proves nothing.
#
# Here the first test image of Fashion-MNIST (Xiao et al. 2017) is attacked with growing $\varepsilon$, until the answer
# of a small convolutional network changes (`results/fashion-mnist/garment.py`). The result stays an image: it is kept
# in $[0, 1]$ after each step. (On the digits below the attack may leave $[0, 1]$, as the theorem's ball does.)

# %%
def lengths(delta):
    """The length of each image's perturbation: (B, 1, 1, 1)."""
    return delta.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)


def attack(classifier, x, y, size, steps=30, low=-torch.inf, high=torch.inf):
    """Projected gradient ascent on the cross-entropy, within an l2 ball and [low, high]."""
    moved = x.clone()
    for _ in range(steps):
        moved.requires_grad_(True)
        loss = nn.functional.cross_entropy(classifier(moved), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, moved)
        delta = moved.detach() + size / 5 * gradient / lengths(gradient) - x
        moved = (x + delta * (size / lengths(delta)).clamp(max=1)).clamp(low, high)
    return moved


clothes = garment.load()
boot = torch.from_numpy(np.load(ROOT / "results/fashion-mnist/garment.npy")).view(1, 1, 28, 28) / 255
label, names = torch.tensor([9]), {7: "sneaker", 9: "ankle boot"}
assert clothes(boot).argmax() == label
for size in np.arange(0.02, 1, 0.02):
    moved = attack(clothes, boot, label, float(size), low=0, high=1)
    answer = clothes(moved).argmax().item()
    if answer != label:
        break
delta = moved - boot
assert answer != label and delta.norm() < size + 1e-6 and moved.min() >= 0 and moved.max() <= 1
grey = 255 * delta.abs()
print(f"size {size:.2f}: no pixel changes by more than {grey.max():.0f} of 255 grey levels, on average by "
      f"{grey.mean():.1f}; f says {names.get(answer, answer)}")
pictures.picture_of_garment(
    (boot[0, 0], 0.5 + 5 * delta[0, 0], moved[0, 0]),
    (f"x: f says {names[9]}", rf"$\delta$, enlarged five times, $\|\delta\|$ = {delta.norm():.2f}",
     rf"$x + \delta$: f says {names.get(answer, answer)}"),
)

# %% [markdown]
# From here on the images are scikit-learn's handwritten digits, $8 \times 8$ pixels; of the test images we take every
# third.

# %%
def pixels_and_labels(train):
    images = certify.open_images("digits", None, train, size=8, channels=1, device="cpu")
    pixels, labels = images.items.tensors
    return pixels / images.white, labels


def train_mlp(sigma, epochs=40, seed=0):
    """A two-layer network, trained on x + sigma N(0, I)."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(train_x)).split(128):
            x = train_x[batch] + sigma * torch.randn_like(train_x[batch])
            loss = nn.functional.cross_entropy(network(x), train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def accuracy_under_attack(target, answer, sizes):
    """Share of the test images that the attacks on `target` leave right: beaten early, beaten later."""
    right = []
    for size in sizes:
        moved = attack(target, test_x, test_y, float(size))
        with torch.no_grad():
            right.append((answer(moved).argmax(dim=1) == test_y).numpy())
    return np.minimum.accumulate(right, axis=0).mean(axis=1)


train_x, train_y = pixels_and_labels(train=True)
test_x, test_y = (part[::3] for part in pixels_and_labels(train=False))     # what `certify.py --sigma 0.25` certifies
brittle = train_mlp(sigma=0.0)
sizes = np.linspace(0, 1.2, 13)
survives = accuracy_under_attack(brittle, brittle, sizes)
print(f"clean accuracy {survives[0]:.1%}; under attacks of size {sizes[3]:.1f}: {survives[3]:.1%}, "
      f"of size {sizes[6]:.1f}: {survives[6]:.1%}")
assert survives[0] > 0.9 and survives[-1] < 0.1

# %% [markdown]
# ## 1.2 The smoothed classifier
#
# The base classifier is asked about noisy copies of $x$ in place of $x$ itself, and the majority decides:
#
# $$ g(x) = \arg\max_{c}\; p_c(x), \qquad p_c(x) = \Pr_{e \sim \mathcal N(0, \sigma^2 I)}[f(x + e) = c]. \tag{1.1} $$
#
# Here $p_c(x)$ is the share of class $c$ among the noisy copies. It is an average of the indicator of $\{f = c\}$ over
# a neighbourhood, $p_c(x) = \int \mathbb 1[f(z) = c]\, \varphi_\sigma(z - x)\, dz$ with $\varphi_\sigma$ the density of
# the noise. The image enters only through the smooth weight $\varphi_\sigma(z - x)$. So $p_c$ cannot jump, however
# wildly $f$ does.
#
# In code, (1.1) is three lines: draw, ask, count. (A hundred copies at a time, as in the scripts, so that the same
# generator gives the same copies. `brittle` is a small network, trained in 1.1 on digits of $8 \times 8$ pixels.)

# %%
def count(f, x, sigma, n, generator):
    """How often f answers each class on n noisy copies of x: the counts behind (1.1)."""
    e = sigma * torch.cat([torch.randn(100, *x.shape, generator=generator) for _ in range(n // 100)])      # n C H W
    answers = f(x + e).argmax(dim=1)
    return answers.bincount(minlength=f(x[None]).shape[1])


x = torch.rand(1, 8, 8)
counts = count(brittle, x, 0.5, 2000, torch.Generator().manual_seed(1))
request = 0, x, torch.Generator().manual_seed(1), 2000                      # image 0
assert torch.equal(counts, certify.count_under_noise(brittle, [request], 0.5)[0])
print("of 2000 noisy copies of a random image:", counts.tolist())

# %% [markdown]
# The scripts' `count_under_noise` counts for many images at once, in shared batches, each with its own random numbers.

# %%
show(certify.count_under_noise)

# %% [markdown]
# **Check.** In one dimension, let $f$ answer class 1 on the interval $[-1, 2]$ and class 0 elsewhere.
# Then $p_1(x) = \Phi((2 - x)/\sigma) - \Phi((-1 - x)/\sigma)$.

# %%
def interval(z):
    z = z.flatten(1)
    return torch.cat([torch.zeros_like(z), 1.5 - (z - 0.5).abs()], dim=1)          # positive on [-1, 2]


sigma, n = 0.8, 20_000
for position in (-1.5, -0.5, 0.0, 1.9):
    x = torch.full((1, 1, 1), position)
    counts = count(interval, x, sigma, n, certify.generator_for(0, 0, 1, "cpu"))
    exact = stats.norm.cdf((2 - position) / sigma) - stats.norm.cdf((-1 - position) / sigma)
    print(f"x = {position:4.1f}: counted {counts[1] / n:.4f}, exact {exact:.4f}")
    assert abs(counts[1] / n - exact) < 4 * np.sqrt(exact * (1 - exact) / n)

# %% [markdown]
# ## 1.3 The picture in two dimensions
#
# *Not on the short path.*
#
# Images of two pixels can be drawn. On the left a base classifier $f$ with ragged boundaries and little islands of
# wrong answers, on the right $g$. The boundary has become smooth and the islands have drowned: each is too small to win
# a majority anywhere. The circles have the radius that the theorem below proves.
#
# **Check.** On a grid, $p_c$ is the indicator of $\{f = c\}$ convolved with a Gaussian. The counts must agree with it,
# and inside each circle $g$ must be constant.

# %%
def ripples(z):
    """Distances of points of the plane (B, 1, 1, 2) to three anchors, after a ripple: (B, 3)."""
    z = z.flatten(1).double()
    u = z + 0.13 * torch.sin(9 * z.flip(1)) + 0.07 * torch.cos(23 * z)
    anchors = torch.tensor([[-1.0, -0.6], [1.0, -0.6], [0.0, 1.1]], dtype=torch.float64)
    return torch.cdist(u, anchors)


def ragged(z):
    """Three classes in the plane -> logits: the nearest anchor, with islands."""
    first, second = z.flatten(1).double().T
    islands = (torch.sin(7 * first + 1) * torch.sin(7 * second) > 0.9).long()
    return nn.functional.one_hot((ripples(z).argmin(dim=1) + islands) % 3, 3).float()


sigma, step = 0.35, 0.01
line = np.arange(-4, 4 + step / 2, step)
plane = torch.from_numpy(np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 1, 1, 2))
base = ragged(plane).numpy().reshape(len(line), len(line), 3)               # rows are the second coordinate
p = np.stack([gaussian_filter(base[..., c], sigma / step, truncate=6) for c in range(3)], axis=-1)
f_map, g_map = base.argmax(-1), p.argmax(-1)


def at(point):
    """The grid's p_c at a point of it."""
    row, column = (int(round((value + 4) / step)) for value in point[::-1])
    return p[row, column]


points = [(-1.0, -0.8), (1.1, -0.3), (0.1, 0.9), (-0.5, -0.2), (0.9, 0.6), (-1.4, 0.5)]
discs = []
for index, point in enumerate(points):
    share = at(point)
    top = share.argmax()
    x = torch.tensor(point, dtype=torch.float32).view(1, 1, 2)
    n = 10_000
    counts = count(ragged, x, sigma, n, certify.generator_for(0, index, 1, "cpu")).numpy()
    assert np.all(np.abs(counts / n - share) < 4 * np.sqrt(share * (1 - share) / n) + 0.002)       # two ways to p_c
    radius = certify.certified_radius(share[top], sigma, np.sort(share)[-2])
    inside = np.hypot(line[None] - point[0], line[:, None] - point[1]) < radius
    assert np.all(g_map[inside] == top)                                     # what the theorem promises
    discs.append((point, top, radius))
    print(f"x = {point}: p = {np.round(share, 3)}, g says {top} within {radius:.3f}")

window = slice(int((4 - 2) / step), int((4 + 2) / step) + 1)
cloud = np.array(points[3]) + sigma * np.random.default_rng(0).normal(size=(300, 2))
pictures.picture_of_plane(
    (f_map[window, window], g_map[window, window]), (points[3], cloud),
    [(point, radius) for point, _, radius in discs], sigma,
)

# %% [markdown]
# ## 1.4 The likelihood ratio
#
# Let the adversary move $x$ to $x + \delta$. The noisy copies then come from $P_1 = \mathcal N(x + \delta, \sigma^2
# I)$ instead of $P_0 = \mathcal N(x, \sigma^2 I)$. How much more likely a point $z$ has become is the *likelihood
# ratio*
#
# $$ \Lambda(z) = \frac{dP_1}{dP_0}(z) = \exp\Bigl( \frac{\langle \delta, z - x\rangle}{\sigma^2} -
#    \frac{\lVert\delta\rVert^2}{2\sigma^2} \Bigr), \tag{1.2} $$
#
# where $\langle\cdot,\cdot\rangle$ is the inner product of $\mathbb R^d$.
#
# *Proof.* Both densities have the same constant, so the logarithm of the ratio is $\bigl(\lVert z - x\rVert^2 -
# \lVert z - x - \delta\rVert^2\bigr) / 2\sigma^2$, and $\lVert z - x - \delta\rVert^2 = \lVert z - x\rVert^2 -
# 2\langle\delta, z - x\rangle + \lVert\delta\rVert^2$. $\square$
#
# So of all dimensions only *one* matters: $\Lambda$ is an increasing function of the projection $\langle\delta, z -
# x\rangle$. The sets $\{\Lambda \le k_0\}$ are half-spaces. This is special to Gaussian noise, and the reason why the
# theorem speaks of Euclidean length.
#
# **Check:** against two densities, and by the change of measure $P_1(S) = \mathbb E_{P_0}[\Lambda\, \mathbb 1_S]$, for
# an odd-shaped set $S$.

# %%
random = np.random.default_rng(1)
d, sigma = 6, 0.7
x, delta = random.normal(size=d), 0.4 * random.normal(size=d)


def log_ratio(z):
    return (z - x) @ delta / sigma**2 - delta @ delta / (2 * sigma**2)


def odd(z):
    return (np.sin(3 * z).sum(axis=1) > 0.3) & (z[:, 0] * z[:, 1] < 0.5)


z0 = x + sigma * random.normal(size=(200_000, d))                           # from P0
z1 = x + delta + sigma * random.normal(size=(200_000, d))                   # from P1
densities = [stats.multivariate_normal(mean, sigma**2 * np.eye(d)) for mean in (x, x + delta)]
assert np.allclose(log_ratio(z0), densities[1].logpdf(z0) - densities[0].logpdf(z0))
weighted, direct = np.exp(log_ratio(z0)) * odd(z0), odd(z1)
print(f"P1(S) by weighting draws of P0: {weighted.mean():.4f}, by drawing from P1: {direct.mean():.4f}")
assert abs(weighted.mean() - direct.mean()) < 4 * np.hypot(weighted.std(), direct.std()) / np.sqrt(len(z0))

# %% [markdown]
# ## 1.5 The worst case is a half-space: the lemma of Neyman and Pearson
#
# All we know about $f$ is a number: class $A$ gets the share $p_A$ of the noisy copies of $x$. Among *all*
# classifiers with this property, which one loses class $A$ fastest when $x$ moves to $x + \delta$? That is the question
# for the most powerful test of $P_0$ against $P_1$ (Neyman and Pearson 1933).
#
# **Lemma.** Let $\psi : \mathbb R^d \to [0, 1]$ be measurable, and let $H = \{ z : \Lambda(z) \le k_0 \}$ for some
# $k_0 > 0$.
#
# $$ \text{If } \int \psi \, dP_0 \ge P_0(H), \text{ then } \int \psi \, dP_1 \ge P_1(H). \tag{1.3} $$
#
# *Proof.* Since $dP_1 = \Lambda\, dP_0$,
#
# $$ \int \psi\, dP_1 - P_1(H) = \int (\psi - \mathbb 1_H)\, \Lambda \, dP_0
#    = \int (\psi - \mathbb 1_H)(\Lambda - k_0)\, dP_0 \;+\; k_0 \Bigl( \int \psi \, dP_0 - P_0(H) \Bigr). $$
#
# The second term is non-negative by assumption. So is the first, because its integrand is, everywhere. On $H$ both
# factors are $\le 0$ (there $\psi \le 1$ and $\Lambda \le k_0$). Off $H$ both are $\ge 0$ (there $\psi \ge 0$ and
# $\Lambda > k_0$). $\square$
#
# In words: to hold a fixed share of $P_0$ with as little as possible of $P_1$, take the points where $P_1$ is cheapest.
# With $\psi' = 1 - \psi$ and $H' = \{\Lambda > k_0\}$ the lemma turns around:
# if $\int \psi'\,dP_0 \le P_0(H')$, then $\int \psi'\,dP_1 \le P_1(H')$.
#
# **Check**, by a solver. On a grid of cells $i$ in the plane, with masses $P_0(i)$ and $P_1(i)$, minimise $\sum_i
# \psi_i P_1(i)$ over $0 \le \psi_i \le 1$ with $\sum_i \psi_i P_0(i) \ge p_A$. The solution of this linear programme
# must be a half-space, and its value that of $H$.

# %%
def masses(centre):
    """What each cell has of the Gaussian around `centre`; rows are the second coordinate."""
    first, second = (np.diff(stats.norm.cdf(cells - place)) for place in centre)
    cell_masses = np.outer(second, first)
    return cell_masses / cell_masses.sum()


cells, p_a, shift = np.linspace(-4, 4, 61), 0.8, np.array([0.8, 0.5])       # sigma = 1, x = 0
P0, P1 = masses((0, 0)), masses(shift)
solution = linprog(P1.ravel(), A_ub=-P0.ravel()[None], b_ub=[-p_a], bounds=(0, 1))
psi = solution.x.reshape(P0.shape)

order = np.argsort((P1 / P0).ravel())                                       # Neyman and Pearson: cheapest cells first
taken_before = np.concatenate([[0], P0.ravel()[order].cumsum()[:-1]])
share = np.clip((p_a - taken_before) / P0.ravel()[order], 0, 1)
greedy = share @ P1.ravel()[order]
continuous = stats.norm.cdf(stats.norm.ppf(p_a) - np.linalg.norm(shift))
print(f"least P1 share: linear programme {solution.fun:.5f}, half-space of cells {greedy:.5f}, "
      f"of the plane {continuous:.5f}")
assert abs(solution.fun - greedy) < 1e-7 and abs(solution.fun - continuous) < 1e-3

along = np.linspace(-4, 4, 2)
edge = along, (stats.norm.ppf(p_a) * np.linalg.norm(shift) - shift[0] * along) / shift[1]
pictures.picture_of_worst_region(psi, edge, ((0, 0), shift))

# %% [markdown]
# ## 1.6 Both bounds
#
# It remains to measure half-spaces. Under $P_0$ the projection $\langle \delta, z - x\rangle$ is distributed as $\sigma
# \lVert\delta\rVert\, \mathcal N(0, 1)$; under $P_1$ its mean is $\lVert\delta\rVert^2$ instead. Let $B$ be any other
# class, and write $p_A$ and $p_B$ for $p_A(x)$ and $p_B(x)$. Choose $H_A = \{\langle\delta, z - x\rangle \le \sigma
# \lVert\delta\rVert\, \Phi^{-1}(p_A)\}$, so that $P_0(H_A) = p_A$. Then
#
# $$ P_1(H_A) = \Pr\bigl[\lVert\delta\rVert^2 + \sigma \lVert\delta\rVert\, \xi \le
#    \sigma\lVert\delta\rVert\,\Phi^{-1}(p_A)\bigr] = \Phi\bigl(\Phi^{-1}(p_A) - \lVert\delta\rVert/\sigma\bigr),
#    \qquad \xi \sim \mathcal N(0, 1). $$
#
# The lemma with $\psi = \mathbb 1[f = A]$ gives the first of the two bounds below. Its reverse gives the second, with
# $\psi' = \mathbb 1[f = B]$ and the opposite half-space
# $H_B = \{\langle\delta, z - x\rangle \ge \sigma\lVert\delta\rVert\,\Phi^{-1}(1 - p_B)\}$, where $P_0(H_B) = p_B$:
#
# $$ p_A(x + \delta) \ge \Phi\bigl(\Phi^{-1}(p_A) - \lVert\delta\rVert/\sigma\bigr), \qquad
#    p_B(x + \delta) \le \Phi\bigl(\Phi^{-1}(p_B) + \lVert\delta\rVert/\sigma\bigr). \tag{1.4} $$
#
# The right-hand sides increase with the shares. So (1.4) holds as well with a lower bound $\underline{p_A}$ in place of
# $p_A$, and an upper bound $\overline{p_B}$ in place of $p_B$. In other words, *a step of length $\lVert\delta\rVert$
# changes $\Phi^{-1}(p_c)$ by at most $\lVert\delta\rVert / \sigma$*: the function $\sigma\,\Phi^{-1}(p_c(x))$ is
# 1-Lipschitz, whatever $f$ is (Salman et al. 2019, Levine et al. 2019).
#
# **Check.** Balls (a non-central $\chi^2$ distribution), their complements, and slabs have shares in closed form. Every
# point must lie between the two curves.

# %%
def ball_share(radius, offset, d):
    """Share of the noisy copies, sigma = 1, in a ball whose centre is `offset` away."""
    return stats.ncx2.cdf(radius**2, d, offset**2) if offset else stats.chi2.cdf(radius**2, d)


d, step = 10, 1.0                                                           # sigma = 1, |delta| = 1
p0 = np.linspace(0.001, 0.999, 400)
lower, upper = stats.norm.cdf(stats.norm.ppf(p0) - step), stats.norm.cdf(stats.norm.ppf(p0) + step)

regions = {"balls": [], "complements of balls": [], "slabs": []}
for centre in (-4.0, -1.0, 0.0, 2.0, 5.0):                                  # of the region, along delta, from x
    for size in np.linspace(0.5, 8, 16):
        ball = [ball_share(size, centre - place, d) for place in (0, step)]
        regions["balls"].append(ball)
        regions["complements of balls"].append([1 - share for share in ball])
        regions["slabs"].append([stats.norm.cdf(centre + size / 2 - place) - stats.norm.cdf(centre - size / 2 - place)
                                 for place in (0, step)])

points = {}
for name, values in regions.items():
    before, after = np.array(values).T
    inside = (before > 1e-6) & (before < 1 - 1e-6)
    gap = stats.norm.ppf(after[inside]) - stats.norm.ppf(before[inside])
    assert np.all(np.abs(gap) <= step + 1e-6)
    points[name] = before, after
pictures.picture_of_shares(p0, lower, upper, points)

# %% [markdown]
# ## 1.7 The second proof: a gradient of length at most $1/\sigma$
#
# *Not on the short path.*
#
# Salman et al. (2019) reach the same statement by calculus. Let $F : \mathbb R^d \to [0, 1]$ be *any* measurable score,
# the indicator of $\{f = c\}$ or a softmax output, and let $p(x) = \mathbb E\,F(x + e)$ lie strictly between 0 and 1.
# Then
#
# $$ \bigl\lVert \nabla\, \Phi^{-1}(p(x)) \bigr\rVert \le \frac1\sigma. \tag{1.5} $$
#
# *Proof.*
# 1. The derivative falls on the density of the noise, $\nabla_x\, \varphi_\sigma(z - x) = \varphi_\sigma(z - x)\, (z -
#    x)/\sigma^2$. So $\nabla p(x) = \mathbb E[e\,F(x + e)] / \sigma^2$. For a unit vector $v$ this says $\langle v,
#    \nabla p\rangle = \mathbb E[\xi F] / \sigma$, with $\xi = \langle v, e\rangle / \sigma \sim \mathcal N(0, 1)$.
# 2. Among all $F$ with values in $[0, 1]$ and the mean $p$, the largest $\mathbb E[\xi F]$ belongs to the half-space
#    $S = \{\xi \ge k_0\}$, $k_0 = -\Phi^{-1}(p)$. For $(F - \mathbb 1_S)(\xi - k_0) \le 0$ everywhere, as in
#    (1.3), and the means are equal. Its value is $\int_{k_0}^\infty t\,\varphi(t)\,dt = \varphi(k_0) =
#    \varphi(\Phi^{-1}(p))$.
# 3. The derivative of $\Phi^{-1}$ at $p$ is $1 / \varphi(\Phi^{-1}(p))$. The chain rule multiplies, and $\varphi$
#    cancels. $\square$
#
# Along the segment from $x$ to $x + \delta$ the function $\Phi^{-1}(p)$ thus changes by at most
# $\lVert\delta\rVert/\sigma$, and that is (1.4). The half-space is the worst case again.
#
# **The soft classifier comes for free.** With $F_c$ the softmax score of class $c$, $\arg\max_c \mathbb E\,F_c(x + e)$
# has the same Lipschitz property and the same radius. (It needs another confidence bound: scores are not counts.)
#
# **Check.** On the plane of section 1.3, for votes and for scores: the gradient by convolving with $e$, as in step 1;
# the same by differences of the grid's $p$; and its length, after $\Phi^{-1}$.

# %%
sigma, step = 0.35, 0.01
soft = torch.softmax(-8 * ripples(plane), dim=1).numpy().reshape(base.shape)
profiles = {}
for name, scores in (("votes", base), ("scores", soft)):
    smooth = gaussian_filter(scores[..., 0], sigma / step, truncate=6)
    gradient = [gaussian_filter(scores[..., 0], sigma / step, order=order, truncate=6) / step
                for order in ((1, 0), (0, 1))]
    middle = slice(200, 601)                                                # away from the grid's border
    for mine, difference in zip(gradient, np.gradient(smooth, step), strict=True):
        assert np.allclose(mine[middle, middle], difference[middle, middle], atol=2e-3)
    known = (smooth > 1e-4) & (smooth < 1 - 1e-4)
    known[:200] = known[601:] = known[:, :200] = known[:, 601:] = False
    steepness = np.hypot(*gradient)[known] / stats.norm.pdf(stats.norm.ppf(smooth[known]))
    print(f"{name}: gradient of Phi^-1(p) at most {steepness.max():.3f}; 1 / sigma = {1 / sigma:.3f}")
    assert steepness.max() <= 1.001 / sigma
    lipschitz = sigma * stats.norm.ppf(smooth[333])                         # a line that meets islands
    assert np.abs(np.diff(lipschitz[200:601])).max() <= 1.001 * step
    profiles[name] = scores[333, :, 0], smooth[333], lipschitz

pictures.picture_of_profiles(line, profiles, sigma)

# %% [markdown]
# ## 1.8 The radius
#
# Let $A$ be the top class, $\underline{p_A} \le p_A$ a lower bound of its share, and $\overline{p_B}$ an upper bound
# of every other class's. Then $g(x + \delta) = A$ as soon as the lower bound in (1.4) exceeds the upper one.
# That is $\Phi^{-1}(\underline{p_A}) - \lVert\delta\rVert/\sigma > \Phi^{-1}(\overline{p_B}) +
# \lVert\delta\rVert/\sigma$, as $\Phi$ is strictly increasing. Solved for the length:
#
# $$ g(x + \delta) = A \quad\text{for every}\quad \lVert\delta\rVert < R =
#    \frac{\sigma}{2}\bigl(\Phi^{-1}(\underline{p_A}) - \Phi^{-1}(\overline{p_B})\bigr). \tag{1.6} $$
#
# All other classes *together* have at most the share $1 - \underline{p_A}$, so $\overline{p_B} = 1 - \underline{p_A}$
# is always a valid choice. It leaves, by $\Phi^{-1}(1 - p) = -\Phi^{-1}(p)$,
#
# $$ R = \sigma\, \Phi^{-1}(\underline{p_A}), \qquad\text{positive when } \underline{p_A} > \tfrac12. \tag{1.7} $$
#
# This is what is used in practice: one share has to be bounded, not $K$. It gives something away where the rest is
# spread over many classes, which notebook 02, section 2.9, takes back. (The ball is open, since at $\lVert\delta\rVert
# = R$ the shares may be equal. The scripts print a number strictly below $R$.)
#
# **Other norms.** The theorem speaks of Euclidean length. Of the largest change in a pixel,
# $\lVert\delta\rVert_\infty = \max_j \lvert\delta_j\rvert$, it says
#
# $$ \lVert\delta\rVert_2 \le \sqrt d\, \lVert\delta\rVert_\infty \quad\Rightarrow\quad
#    g(x + \delta) = A \;\text{ for every }\; \lVert\delta\rVert_\infty < R / \sqrt d. \tag{1.8} $$
#
# It is little: $R = 0.5$ on $224 \times 224$ images in colour is a third of one grey level of 255. A large class of
# other noises, independent in every pixel, does not fare better as $d$ grows (Kumar et al. 2020; for other noises and
# norms Yang et al. 2020).

# %%
def radius(p_a, p_b, sigma):
    """(1.6), where it is positive."""
    return max(0.0, sigma / 2 * (stats.norm.ppf(p_a) - stats.norm.ppf(p_b)))


random = np.random.default_rng(0)
for _ in range(1000):
    p_a, p_b, _ = random.dirichlet(np.ones(3))
    sigma = random.uniform(0.1, 2)
    assert np.isclose(certify.certified_radius(p_a, sigma, p_b), radius(p_a, p_b, sigma))
    assert np.isclose(certify.certified_radius(p_a, sigma), radius(p_a, 1 - p_a, sigma))
print(f"R = 0.5 in the maximum norm: digits {0.5 / 8:.4f}, ImageNet {0.5 / np.sqrt(3 * 224**2):.5f}, "
      f"that is {255 * 0.5 / np.sqrt(3 * 224**2):.2f} grey levels")

# %% [markdown]
# **Check** (1.6): solve for the length at which the two bounds of (1.4) meet. And (1.8): for a plane whose normal is a
# corner of the cube, both distances are known.

# %%
def margin(length, p_a, p_b, sigma):
    return stats.norm.cdf(stats.norm.ppf(p_a) - length / sigma) - stats.norm.cdf(stats.norm.ppf(p_b) + length / sigma)


for p_a, p_b, sigma in ((0.9, 0.1, 0.25), (0.6, 0.3, 0.5), (0.45, 0.2, 1.0), (0.999, 0.0005, 0.12)):
    meet = brentq(margin, 0, 10 * sigma, args=(p_a, p_b, sigma), xtol=1e-12)
    assert abs(meet - radius(p_a, p_b, sigma)) < 1e-9
    one_sided = radius(p_a, 1 - p_a, sigma)
    assert one_sided <= meet + 1e-12                                        # p_B = 1 - p_A claims no more
    print(f"p_A = {p_a}, p_B = {p_b}, sigma = {sigma}: R = {meet:.4f}; with p_B = 1 - p_A: {one_sided:.4f}")

d, distance = 64, 0.4
normal = random.choice([-1.0, 1.0], size=d)                # f = A where <normal, z - x> > -distance sqrt(d)
euclidean = distance * np.sqrt(d) / np.linalg.norm(normal)
largest_entry = distance * np.sqrt(d) / np.abs(normal).sum()                # every pixel moves by as much
share = stats.norm.cdf(euclidean / 0.25)
assert np.isclose(radius(share, 1 - share, 0.25), euclidean) and np.isclose(largest_entry, euclidean / np.sqrt(d))

figure, axis = plt.subplots(figsize=(5.4, 3.6))
p_a = np.linspace(0.1, 0.9999, 500)
pictures.draw_lines(axis, p_a, {
    name: [radius(a, (1 - a) / rivals, 1.0) for a in p_a]
    for name, rivals in (("$p_B = 1 - p_A$", 1), ("$p_B = (1 - p_A) / 2$", 2), ("$p_B = (1 - p_A) / 9$", 9))
})
axis.set(xlabel="share $p_A$ of the top class", ylabel=r"radius $R$ ($\sigma$)", ylim=(0, 4), xlim=(0.1, 1))
plt.show()

# %% [markdown]
# ## 1.9 Tightness: nobody can prove more
#
# *Not on the short path.*
#
# For every $p_A \ge p_B > 0$ with $p_A + p_B \le 1$ there is a classifier that fits these shares and changes its answer
# immediately beyond $R$ (Cohen et al. 2019, theorem 2). It only must have enough classes: two where $p_B = 1 - p_A$,
# else $2 + \lceil (1 - p_A - p_B) / p_B \rceil$.
#
# *Proof.* Take a unit vector $v$. Let $f$ answer $A$ where $\langle v, z - x\rangle \le \sigma\Phi^{-1}(p_A)$ and $B$
# where $\langle v, z - x \rangle \ge \sigma\Phi^{-1}(1 - p_B)$. The half-spaces are disjoint since $p_A \le 1 - p_B$.
# The strip between them is cut into slices, one class each, of share at most $p_B$ at $x$. At $x + t v$ both
# inequalities of (1.4) are equalities, for $A$ and for $B$ at once: $p_A(x + tv) = \Phi(\Phi^{-1}(p_A) - t/\sigma)$
# and $p_B(x + tv) = \Phi(\Phi^{-1}(p_B) + t/\sigma)$. For $t > R$ the second is the larger one, so $g(x + tv) \ne A$.
# $\square$
#
# Larger radii need more knowledge of $f$ than its shares at $x$, as its gradient (Mohapatra et al. 2020), or an $f$
# with a larger $p_A$: notebooks 03 and 04.
#
# **Check.** The shares of all classes of that classifier along $v$, exactly, and where the winner changes.

# %%
def shares_along(p_a, p_b, t, sigma):
    """Shares of A, the slices, B, for the classifier of the proof, at x + t v."""
    slices = max(1, int(np.ceil((1 - p_a - p_b) / p_b - 1e-9)))
    edges = np.concatenate([[-np.inf], sigma * stats.norm.ppf(np.linspace(p_a, 1 - p_b, slices + 1)), [np.inf]])
    return np.diff(stats.norm.cdf((edges[:, None] - t) / sigma), axis=0)


p_a, p_b, sigma = 0.55, 0.2, 0.5
t = np.linspace(0, 0.8, 8001)
shares = shares_along(p_a, p_b, t, sigma)
R = radius(p_a, p_b, sigma)
assert np.allclose(shares.sum(axis=0), 1) and np.isclose(shares[0, 0], p_a) and np.all(shares[1:, 0] <= p_b + 1e-9)
changes = t[(shares.argmax(axis=0) != 0).argmax()]
print(f"R = {R:.4f}; the answer changes at {changes:.4f}")
assert R <= changes < R + 2e-4

pictures.picture_of_tightness(t, shares, R)

# %% [markdown]
# ## 1.10 The linear classifier: the exact case
#
# *Not on the short path.*
#
# Let there be two classes, and $f(z) = A$ where $\langle w, z\rangle + b > 0$. Let $x$ lie there: its distance from the
# plane is $\Delta = (\langle w, x\rangle + b) / \lVert w\rVert$, and
#
# $$ p_A(x) = \Pr\bigl[\langle w, x\rangle + b + \sigma\lVert w\rVert\,\xi > 0\bigr] = \Phi(\Delta / \sigma)
#    \quad\Rightarrow\quad R = \sigma\,\Phi^{-1}(p_A(x)) = \Delta. \tag{1.9} $$
#
# The radius is the distance, for *every* $\sigma$ and in every dimension (Cohen et al. 2019, appendix B). So a linear
# classifier is the best test of a certification procedure: the truth is known. The procedure, sampling and confidence
# bound included, is `certify.certify`; notebook 02, section 2.4, builds it.
#
# **Check.** A random plane in $3 \times 8 \times 8$ dimensions. What `certify` claims must stay below the distance, and
# come close to it.

# %%
torch.manual_seed(0)
w = torch.randn(3 * 8 * 8)
x = torch.rand(3, 8, 8)
distance = 0.4
b = distance * w.norm() - w @ x.flatten()


def linear(z):
    return torch.stack([torch.zeros(len(z)), z.flatten(1) @ w + b], dim=1)


for sigma in (0.15, 0.25, 0.5, 1.0):
    p_a = stats.norm.cdf(distance / sigma)
    prediction, certified = certify.certify(linear, x, sigma, n0=100, n=20_000, alpha=0.001, batch=1000)
    print(f"sigma = {sigma:4}: exact radius {radius(p_a, 1 - p_a, sigma):.4f}, "
          f"certified from 20 000 draws {certified:.4f}")
    assert abs(radius(p_a, 1 - p_a, sigma) - distance) < 1e-6
    assert prediction == 1 and 0.85 * distance < certified < distance

# %% [markdown]
# ## 1.11 Why $\sigma$ trades accuracy for radius
#
# *Not on the short path.*
#
# **(a) Large $\sigma$: classes drown.** Let $x_1$ and $x_2$ have different true classes $c_1 \ne c_2$ and the
# distance $\Delta = \lVert x_1 - x_2\rVert$. By (1.4), $p_{c_2}(x_2) \le 1 - p_{c_1}(x_2) \le 1 -
# \Phi(\Phi^{-1}(p_{c_1}(x_1)) - \Delta/\sigma)$, which says
#
# $$ \sigma\,\Phi^{-1}(p_{c_1}(x_1)) + \sigma\,\Phi^{-1}(p_{c_2}(x_2)) \le \Delta, \qquad\qquad
#    \tfrac12\bigl(p_{c_1}(x_1) + p_{c_2}(x_2)\bigr) \le \Phi\Bigl(\frac{\Delta}{2\sigma}\Bigr). \tag{1.10} $$
#
# The second inequality holds as $p_{c_1}(x_1) + p_{c_2}(x_2) \le 1 + \sup_S |P_0(S) - P_1(S)|$, with $P_0$ and $P_1$
# now the noisy copies of $x_1$ and of $x_2$. By the lemma the supremum is attained by a half-space midway, where it is
# $2\Phi(\Delta/2\sigma) - 1$. So the two radii, (1.7), together are at most the distance between the images, at any
# $\sigma$. And no network is right more often, on average over the two, than $\Phi(\Delta/2\sigma)$, which falls to one
# half as $\sigma$ grows.
#
# **Check** on the digits: the linear classifier midway between two images attains both. Each test image is paired with
# its nearest training image of another class.

# %%
distances = torch.cdist(test_x.flatten(1), train_x.flatten(1))
distances[test_y[:, None] == train_y[None]] = torch.inf
nearest = distances.min(dim=1).values.double().numpy()
sigmas = np.geomspace(0.05, 4, 60)
limits = stats.norm.cdf(nearest[:, None] / (2 * sigmas))                    # (1.10), one row per image

i = int(nearest.argmin())
j = int(distances[i].argmin())
x, other = test_x[i].flatten().double(), train_x[j].flatten().double()
v = (other - x) / (other - x).norm()
for sigma in (0.25, 1.0):
    noise = sigma * torch.randn(100_000, 64, dtype=torch.float64)
    right = [((z + noise - (x + other) / 2) @ v * sign > 0).double().mean().item() for z, sign in ((x, -1), (other, 1))]
    limit = stats.norm.cdf(nearest[i] / (2 * sigma))
    assert abs(np.mean(right) - limit) < 0.006
    assert abs(sigma * stats.norm.ppf(right).sum() - nearest[i]) < 0.03
    print(f"closest pair, distance {nearest[i]:.2f}, sigma = {sigma}: midway plane right on {np.mean(right):.4f}, "
          f"limit {limit:.4f}")

pictures.picture_of_closest_pair(
    (x.view(8, 8), other.view(8, 8)), (test_y[i].item(), train_y[j].item()), nearest[i], sigmas,
    {f"{name} pair": np.quantile(limits, quantile, axis=0)
     for name, quantile in (("median", 0.5), ("closest", 0), ("farthest", 1))},
)

# %% [markdown]
# **(b) Large $\sigma$ in high dimension: regions are left.** The squared distance of a noisy copy from $x$ is
# $\lVert e\rVert^2 = \sigma^2 (\xi_1^2 + \dots + \xi_d^2)$ with independent $\xi_j \sim \mathcal N(0, 1)$, that is
# $\sigma^2$ times a $\chi^2_d$ variable. Each term has the mean $\mathbb E\,\xi^2 = 1$ and the variance
# $\mathbb E\,\xi^4 - 1 = 3 - 1 = 2$, and both add up. So the squared distance has the mean $\sigma^2 d$ and the
# standard deviation $\sigma^2\sqrt{2d}$: the copies lie in a thin shell of radius about $\sigma\sqrt d$. Let the
# region of class $A$ be a ball of radius $\Delta$ around $x$. Then
#
# $$ p_A(x) = \Pr[\lVert e\rVert \le \Delta] = \Pr[\chi^2_d \le \Delta^2/\sigma^2],
#    \qquad R(\sigma) = \sigma\,\Phi^{-1}\bigl(\Pr[\chi^2_d \le \Delta^2/\sigma^2]\bigr). \tag{1.11} $$
#
# The ball is lost once $\sigma > \Delta/\sqrt d$, roughly: half of the copies are then outside.
#
# **(c) Small $\sigma$: the cap of finitely many draws.** No share above $\alpha^{1/n}$ can be proven from $n$ draws,
# at the error $\alpha$ (notebook 02, section 2.6). So $R \le \sigma\,\Phi^{-1}(\alpha^{1/n})$: a small $\sigma$ proves
# small radii only.
#
# (b) and (c) together leave a best $\sigma$ in between, drawn below for balls in several dimensions. (Floats cannot
# hold $1 - p_A$ where $\sigma$ is small. So we compute its logarithm, by Legendre's continued fraction for the upper
# incomplete gamma function, and invert $\ln\Phi$.)
#
# **Check** of the shell and of (1.11) by drawing the noise, and of the logarithm against `scipy`.

# %%
def log_outside(square, d, terms=4000):
    """log P[chi^2_d > square], also where floats hold no such number; for square > d."""
    a, z = d / 2, square / 2
    fraction = z + 2 * terms + 1 - a
    for j in range(terms, 0, -1):
        fraction = z + 2 * j - 1 - a + j * (a - j) / fraction
    return a * np.log(z) - z - gammaln(a) - np.log(fraction)


def ball_radius(sigma, d):
    """(1.11) for a ball of radius 1, as -sigma Phi^-1 of the share outside."""
    square = 1 / sigma**2
    outside = np.where(square > 1.1 * d, log_outside(np.maximum(square, 1.1 * d), d), stats.chi2.logsf(square, d))
    return np.maximum(0, -sigma * ndtri_exp(outside))


cap = stats.norm.ppf(0.001 ** (1 / 100_000))
print(f"(c): n = 100 000 draws at alpha = 0.001 prove at most {cap:.2f} sigma")
random = np.random.default_rng(2)
for d, scaled in ((64, 0.8), (64, 1.0), (3072, 0.98)):
    sigma = scaled / np.sqrt(d)                                             # the ball has radius 1
    square = (sigma**2 * random.standard_normal((4000, d)) ** 2).sum(axis=1)
    assert abs(square.mean() / (sigma**2 * d) - 1) < 4 * np.sqrt(2 / d / 4000)
    assert abs(square.std() / (sigma**2 * np.sqrt(2 * d)) - 1) < 0.06
    drawn = np.mean(square <= 1)
    exact = stats.chi2.cdf(1 / sigma**2, d)
    assert abs(drawn - exact) < 4 * np.sqrt(exact * (1 - exact) / 4000) + 1e-3
for d in (2, 64, 3072):
    square = d * np.linspace(1.1, 1.3, 20)
    assert np.allclose(log_outside(square, d), stats.chi2.logsf(square, d), rtol=1e-6)
assert log_outside(3072 / 0.6**2, 3072) < -1000

scaled, exact, provable = np.linspace(0.02, 1.3, 400), {}, {}               # sigma sqrt(d) / Delta
for d in (2, 64, 3072):
    sigma = scaled / np.sqrt(d)
    exact[d] = ball_radius(sigma, d)
    provable[d] = np.minimum(exact[d], sigma * cap)
    assert np.isfinite(exact[d]).all() and exact[d].max() < 1               # never beyond the ball
    assert 0 < provable[d].argmax() < len(scaled) - 1                       # the best sigma lies in between
pictures.picture_of_balls(scaled, exact, provable)

# %% [markdown]
# **On the digits.** The same small network, trained on four noise levels and certified at each, with 2000 draws. Every
# curve is the share of test images that are answered rightly *and* certified beyond the radius. From $\sigma = 0.12$
# to $0.5$ each reaches farther than the one before, and at $0.5$ fewer images are certified at all: the trade. At
# $\sigma = 1$ the curve falls and shortens. That is less the classes than the bound: the most frequent answer is still
# right on most images, but answers are spread, and (1.7) asks for more than half of the copies (notebook 02, section
# 2.9). (`certify_all` is `certify` for many images.)

# %%
DRAWS = 2000


def certified_curve(network, sigma, radii, n=DRAWS):
    found, most_votes = np.empty(len(test_x)), np.empty(len(test_x))
    trials = certify.certify_all(network, enumerate(test_x), sigma, 100, n, 0.001, batch=2000)
    for index, _, top, counts, _, bounds in trials:
        most_votes[index] = counts.argmax() == test_y[index]
        prediction, certified = certify.certificate(top, *bounds["one-sided"], sigma)
        found[index] = certified if prediction == test_y[index] else -1
    return np.array([(found >= r).mean() for r in radii]), found.max(), most_votes.mean()


radii, networks, curves, reach, right = np.linspace(0, 1.1, 111), {}, {}, [], {}
for sigma in (0.12, 0.25, 0.5, 1.0):
    networks[sigma] = train_mlp(sigma)
    curves[sigma], largest, right[sigma] = certified_curve(networks[sigma], sigma, radii)
    reach.append(largest)
    assert largest <= sigma * stats.norm.ppf(0.001 ** (1 / DRAWS))          # (c)
    print(f"sigma = {sigma:4}: most votes right on {right[sigma]:.1%}, certified at radius 0 {curves[sigma][0]:.1%}, "
          f"largest radius {largest:.2f}")
assert reach[0] < reach[1] < reach[2] > reach[3] and curves[0.12][0] > curves[0.5][0] > curves[1.0][0], "no trade"
assert right[1.0] - curves[1.0][0] > 1 - right[1.0], "the classes, not the bound"

pictures.picture_of_trade(radii, {rf"$\sigma$ = {sigma}": curve for sigma, curve in curves.items()})

# %% [markdown]
# ## 1.12 Back to the attack
#
# *Not on the short path.*
#
# The curve of an attack is an *upper* bound of robustness, since a stronger attack may exist. The curve of certificates
# of $g$ is a *lower* bound: no attack, known or unknown, gets below it, up to the errors of sampling (notebook 02).
#
# To compare like with like, take the same perceptron twice, trained on clean images and on noisy ones
# ($\sigma = 0.25$), and attack both $f$ and $g$, each with its own gradient. That of $g$ is of the mean scores over 16
# noisy copies (Salman et al. 2019), drawn anew at every step; 1,000 others vote on the image that it finds.

# %%
def mean_scores(f, sigma, copies, generator):
    """log of f's mean softmax over noisy copies: what an attack on g can differentiate."""
    def classifier(z):
        e = sigma * torch.randn(copies, *z.shape, generator=generator)
        logits = f((z + e).flatten(0, 1)).unflatten(0, (copies, len(z)))                    # copies B K
        return logits.log_softmax(dim=2).logsumexp(dim=0) - np.log(copies)
    return classifier


def votes(f, sigma, copies, generator):
    """g, as the counts (B, K) of its votes."""
    def classifier(z):
        requests = [(i, image, generator, copies) for i, image in enumerate(z)]
        return certify.count_under_noise(f, requests, sigma, batch=2000)
    return classifier


trained = {}
for name, f in (("trained on clean images", brittle), ("trained on noisy images", networks[0.25])):
    random = torch.Generator().manual_seed(0)
    f_attacked = accuracy_under_attack(f, f, sizes)
    g_attacked = accuracy_under_attack(mean_scores(f, 0.25, 16, random), votes(f, 0.25, 1000, random), sizes)
    proven, _, _ = certified_curve(f, 0.25, sizes)
    trained[name] = f_attacked, g_attacked, proven
    at = np.abs(sizes - 0.5).argmin()
    print(f"{name}, at size {sizes[at]:.1f}: f under attack {f_attacked[at]:.1%}, g under attack "
          f"{g_attacked[at]:.1%}, g proven {proven[at]:.1%}")
    assert np.all(g_attacked >= proven), "an attack got below the proof"
pictures.picture_of_robustness(sizes, trained)
for clean, noisy in zip(*trained.values(), strict=True):
    assert np.all(noisy >= clean) and noisy.mean() > clean.mean()

# %% [markdown]
# *In this pair noise in training made both more robust*: from left to right all three curves rise, that of $f$ as well,
# though no theorem says so. *Smoothing gives the proof*: by this attack $g$ is hardly harder to fool than $f$, but it
# comes with a lower bound. (It ends where 2000 draws prove no more.)

# %% [markdown]
# ## 1.13 Pixel scalings: what is $\sigma$ in other units?
#
# *Not on the short path.*
#
# Let $x_\star = (x - \text{mean}) / \text{std}$ with one $\text{std}$ for all pixels.
# Then $x_\star + e_\star$ with $e_\star \sim \mathcal N(0, \sigma_\star^2 I)$ is what $x + \text{std}\, e_\star$
# becomes, so
#
# $$ \sigma = \text{std}\; \sigma_\star, \qquad R = \text{std}\; R_\star, \qquad p_c \text{ unchanged}. \tag{1.12} $$
#
# Both lengths scale alike and their ratio stays. In units of $[0, 255]$ put $\text{std} = 1/255$: $\sigma = 0.25$ is
# $63.75$ grey levels.
#
# With *different* $\text{std}_j$ per channel, isotropic noise on $x_\star$ is anisotropic on $x$. What is certified
# there is an ellipsoid, $\sum_j \delta_j^2 / \text{std}_j^2 < R_\star^2$. The largest ball in it has the radius
# $R_\star \min_j \text{std}_j$. To avoid all this, the networks here take images in $[0, 1]$ and normalise inside,
# *after* the noise was added (`Encoder.prepare`, which also enlarges):

# %%
def prepare_by_hand(images, size, mean, std):
    """Enlarge, then normalise: the first layer of every network here."""
    enlarged = nn.functional.interpolate(images, size=size, mode="bicubic", align_corners=False)
    return (enlarged - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])       # CIFAR-10's channels
network = model.build_vit("vit_digits", 2, image_size=224, patch_size=16, channels=3, mean=tuple(mean.tolist()),
                          std=tuple(std.tolist()))
images = torch.rand(2, 3, 32, 32)
assert isinstance(network, model.Encoder)
assert torch.allclose(model.Encoder.prepare(network, images), prepare_by_hand(images, 224, mean, std), atol=1e-6)
print(f"{tuple(images.shape)} -> {tuple(network.prepare(images).shape)}")

# %% [markdown]
# **Check.** The same linear classifier in $[0, 1]$ and in $[0, 255]$ (which `certify` takes for a mistake unless told
# `any_range`). Then three channels with different $\text{std}_j$: over many directions, the nearest point of the
# ellipsoid's surface lies at $R_\star \min_j \text{std}_j$.

# %%
x = torch.rand(3, 8, 8)
b = 0.3 * w.norm() - w @ x.flatten()
_, small = certify.certify(linear, x, 0.25, n=5000, batch=1000)
_, large = certify.certify(lambda z: linear(z / 255), 255 * x, 255 * 0.25, n=5000, batch=1000, any_range=True)
print(f"radius {small:.6f} in [0, 1], {large:.4f} in [0, 255], ratio {large / small:.3f}")
assert abs(large / small - 255) < 0.01

scale, radius_star = std.double().numpy(), 0.5
directions = np.random.default_rng(3).normal(size=(20_000, 3))
directions /= np.linalg.norm(directions, axis=1, keepdims=True)
edge = radius_star / np.linalg.norm(directions / scale, axis=1)             # how far until |delta / std| = R_*
print(f"distance to the ellipsoid's surface: {edge.min():.5f} to {edge.max():.5f}; "
      f"R_* min std = {radius_star * scale.min():.5f}")
assert edge.min() >= radius_star * scale.min() and edge.min() < 1.001 * radius_star * scale.min()

# %% [markdown]
# ## 1.14 Resizes: 32 → 224
#
# *Not on the short path.*
#
# The paper's CIFAR-10 classifier enlarges the image from $32 \times 32$ to $224 \times 224$, by a linear map $U$
# (bicubic interpolation). There are two smoothed classifiers:
#
# * *noise, then resize*: $\;\arg\max_c \Pr[f(U(x + e)) = c]$ with $e$ on the 32-pixel grid. Here $f \circ U$ is the
#   base classifier, and $R$ is a radius among $32 \times 32$ images. This is what is published, and what the code does.
# * *resize, then noise*: $\;\arg\max_c \Pr[f(Ux + e_{224}) = c]$ with independent $e_{224}$ on the 224-pixel grid. Its
#   radius is about $224 \times 224$ images. For the small ones it says
#
# $$ \lVert U\delta\rVert \le \lVert U\rVert\,\lVert\delta\rVert
#    \quad\Rightarrow\quad R_{32} \ge R_{224} / \lVert U\rVert, \tag{1.13} $$
#
# where $\lVert U\rVert$ is the largest singular value of $U$. Enlarging $\zeta = 7$ times copies, roughly, each pixel
# $\zeta^2$ times, and so multiplies lengths of smooth perturbations by $\zeta$. Who quotes $R_{224}$ as a radius for
# CIFAR-10 overstates it up to $\lVert U\rVert \approx 7$ times.
#
# **Check 1.** $U$ is separable, $U = \mathcal M \otimes \mathcal M$ with a $224 \times 32$ matrix $\mathcal M$, read
# off `prepare` by enlarging striped images; $\lVert U\rVert = \lVert \mathcal M\rVert^2$. Perturbations try the
# inequality.

# %%
prepare = model.build_vit("vit_digits", 2, image_size=224, patch_size=16, mean=(0.0,), std=(1.0,)).prepare
stripes = torch.eye(32, dtype=torch.float64)[:, None, :, None].expand(32, 1, 32, 32)       # the i-th row white
matrix = prepare(stripes.float())[:, 0, :, 0].double().T                                   # 224 x 32
singular = torch.linalg.svdvals(matrix)
image = torch.rand(1, 1, 32, 32)
assert torch.allclose(prepare(image)[0, 0].double(), matrix @ image[0, 0].double() @ matrix.T, atol=1e-4)  # separable
norm_u = (singular.max() ** 2).item()
smooth = gaussian_filter(np.random.default_rng(4).normal(size=(32, 32)), 3)
rough = np.indices((32, 32)).sum(axis=0) % 2 - 0.5
white = np.random.default_rng(5).normal(size=(32, 32))
for name, delta in (("smooth", smooth), ("white", white), ("checkerboard", rough)):
    delta = torch.from_numpy(delta).float()[None, None]
    ratio = (prepare(delta).norm() / delta.norm()).item()
    print(f"{name:12} perturbation grows {ratio:.2f} times; at most {norm_u:.2f}")
    assert ratio <= norm_u + 1e-3

# %% [markdown]
# **Check 2.** Is the mean of the enlarged image above one half? That is linear, so (1.9) applies in either space. We
# certify the same small image both ways, and walk nine tenths of the second radius, on the small grid, towards the
# plane.

# %%
def brighter(z):
    return torch.stack([torch.zeros(len(z)), prepare(z).mean(dim=(1, 2, 3)) - 0.5], dim=1)


small = torch.full((1, 32, 32), 0.51)
weights = torch.zeros(1, 1, 32, 32, requires_grad=True)
brighter(weights)[0, 1].backward()
normal = weights.grad[0] / weights.grad.norm()
distance = 0.01 / weights.grad.norm().item()
with torch.no_grad():
    _, before = certify.certify(brighter, small, 1.0, n=1500)
    _, after = certify.certify(brighter, prepare(small[None])[0], 1.0, n=1500)
    walked = brighter((small - 0.9 * after * normal)[None]).argmax().item()
    restored = brighter((small - 0.999 * after / norm_u * normal)[None]).argmax().item()
print(f"noise after resizing claims {after / distance:.1f} times the true distance")
assert before < distance and after > 2 * distance and walked == 0           # about 32 x 32 images the claim is false
assert after / norm_u < distance and restored == 1                          # divided by |U|, it is true

pictures.picture_of_resizes({
    "noise on 32 × 32": before, "noise on 224 × 224,\nquoted as it is": after, "the same,\ndivided by ‖U‖": after / norm_u,
}, distance)

# %% [markdown]
# **What does the same $\sigma$ mean at another resolution?** Take a scene at 32 and at $224 = 7 \cdot
# 32$ pixels a side. Averaging blocks of $7 \times 7$ pixels brings the large one back to the small one, and
# independent noise of deviation $\sigma$ to
#
# $$ \sigma_{\text{block}} = \sigma / \zeta, \qquad \lVert \delta_{224}\rVert \approx \zeta\,
#    \lVert \delta_{32}\rVert, \qquad \zeta = 7, \tag{1.14} $$
#
# where $\delta$ is the difference of two such scenes. The average of $\zeta^2$ independent variables has the variance
# $\sigma^2/\zeta^2$. The sum of squares over $\zeta^2$ times as many pixels of similar difference is $\zeta^2$ times as
# large. So the same $\sigma$ and $r$ are a much milder demand on ImageNet than on CIFAR-10: a seventh, in this sense.
# (Below, one digit at three resolutions: the eye averages, and the noise fades.)

# %%
zoom, sigma = 7, 0.25
torch.manual_seed(0)
blocks = nn.functional.avg_pool2d(sigma * torch.randn(20, 1, 224, 224), zoom)
print(f"noise after averaging {zoom} x {zoom} blocks: {blocks.std():.4f}; sigma / zeta = {sigma / zoom:.4f}")
assert abs(blocks.std().item() / (sigma / zoom) - 1) < 0.03


def scene(shift, size):
    place = torch.arange(size) / size
    return torch.sin(9 * place[:, None] + shift) * torch.cos(7 * place)


ratio = ((scene(0.3, 224) - scene(0, 224)).norm() / (scene(0.3, 32) - scene(0, 32)).norm()).item()
print(f"distance of two smooth scenes at 224 over that at 32 pixels a side: {ratio:.3f}")
assert abs(ratio / zoom - 1) < 0.03

digit, enlarged = test_x[1][None], []
for size in (8, 32, 128):
    big = nn.functional.interpolate(digit, size=size, mode="bicubic").clamp(0, 1)
    enlarged.append((big + sigma * torch.randn_like(big))[0, 0])
_, axes = plt.subplots(1, 3, figsize=(8, 2.9))
pictures.draw_images(axes, enlarged, [rf"{len(image)} × {len(image)}, $\sigma$ = {sigma}" for image in enlarged])
plt.show()

# %% [markdown]
# ## 1.15 What to take along
#
# *Not on the short path.*
#
# * Smoothing turns *any* $f$ into a $g$ for which $\sigma\,\Phi^{-1}(p_c)$ is 1-Lipschitz: (1.4), by (1.2) and (1.3),
#   or by a gradient, (1.5).
# * The radius is $R = \sigma\,\Phi^{-1}(p_A)$, tight given $p_A$ alone, and exact for linear classifiers.
# * In our pair noise in training gave robustness; smoothing gives the proof.
# * A radius belongs to a norm, a unit and a resolution: those in which the noise was added.
#
# ## 1.16 Exercises
#
# *Not on the short path.*
#
# 1. **A shorter, weaker radius.** Show that $p_c$ itself is Lipschitz with the constant $1/(\sigma\sqrt{2\pi})$.
#    Deduce that $R' = \sigma\sqrt{2\pi}\,(p_A - \frac12)$ is a valid radius, and that it is never larger than (1.7).
#    *Hint:* stop the proof of (1.5) before the last step.
# 2. **Another noise.** Let the noise be Laplace, with the density proportional to $e^{-\lVert z\rVert_1 / b}$. Bound
#    the likelihood ratio, and deduce a radius in the norm $\lVert\cdot\rVert_1$. *Hint:* the triangle inequality
#    replaces (1.2); no lemma is needed.
#
# <details><summary>Answers</summary>
#
# 1. $\lVert\nabla p_c\rVert \le \varphi(\Phi^{-1}(p_c))/\sigma \le \varphi(0)/\sigma = 1/(\sigma\sqrt{2\pi})$. Along
#    a way of length $t$ the share falls by at most $t/(\sigma\sqrt{2\pi})$, and so stays above $\frac12$ for $t <
#    R'$. On $[\frac12, 1)$ the function $\Phi^{-1}$ is convex, with the value $0$ and the slope $\sqrt{2\pi}$ at
#    $\frac12$. So it lies above its tangent, which is $\sqrt{2\pi}\,(p - \frac12)$.
# 2. $\Lambda = e^{(\lVert z - x\rVert_1 - \lVert z - x - \delta\rVert_1)/b} \le e^{\lVert\delta\rVert_1/b}$. The
#    share of all other classes is at most $e^{\lVert\delta\rVert_1/b}\,(1 - p_A)$ at $x + \delta$. That is below
#    $\frac12$ for $\lVert\delta\rVert_1 < b \ln\frac{1}{2(1 - p_A)}$.
#
# </details>

# %%
# The numbers of the answers.
p_a = np.linspace(0.5, 0.999, 500)
assert np.all(np.sqrt(2 * np.pi) * (p_a - 0.5) <= stats.norm.ppf(p_a) + 1e-12)             # exercise 1, sigma = 1
random = np.random.default_rng(6)
inside = lambda z: np.abs(z).sum(axis=1) < 4                                # exercise 2: class A, in two dimensions
noise = random.laplace(size=(100_000, 2))                                   # b = 1
share = inside(noise).mean()
reach = np.log(1 / (2 * (1 - share)))
for way in ((1, 0), (0.5, 0.5), (0.3, -0.7)):
    assert inside(noise + 0.99 * reach * np.array(way)).mean() > 0.5
print(f"exercise 2: p_A = {share:.3f}, certified in the norm of the sum up to {reach:.3f}")

# %% [markdown]
# previous: [00, the method on one page](00_the_method_on_one_page.ipynb) | [contents](README.md) | next:
# [02, from counts to certificates](02_from_counts_to_certificates.ipynb)
