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
# [contents](README.md) | next: [02, from counts to certificates](02_from_counts_to_certificates.ipynb)
#
# # 1. Smoothing: from a brittle classifier to one with a guarantee
#
# A trained network is right on most test images, and wrong on images that nobody could tell from them (Szegedy et al.
# 2014). This notebook replaces such a classifier $f$ by its *smoothed* version $g$. Then it proves how far an image
# has to be moved before $g$ may change its mind. All of it rests on one classical argument, the lemma of Neyman and
# Pearson.
#
# **Afterwards you can**
# * prove the radius $R = \sigma\,\Phi^{-1}(p_A)$ in two ways, and say why no larger one follows from the same
#   numbers;
# * say what the radius means for other norms, pixel units and resolutions, and find false claims about it;
# * explain why a larger $\sigma$ proves larger radii for fewer images.
#
# **It needs** the packages of `requirements.txt`, calculus and elementary probability; no GPU, no download. The
# trained transformer of the last pictures lies in `results/digits/`. **It runs** in under a minute on two CPU cores.
#
# **History.** Lecuyer et al. (2019) certified a network by adding noise, through differential privacy. Li et al.
# (2019) improved the radius. Cohen, Rosenfeld and Kolter (2019) found the tight one, which is the subject here.
# Salman et al. (2019) and Levine et al. (2019) proved it again, as a Lipschitz property. All references are at the
# end.
#
# Each formula appears in symbols, in words, and as a few lines of code. The code is then held against something that
# is computed in another way, and against the function of the scripts that does the same, where there is one. Symbols
# used throughout (those of all notebooks stand in the [contents](README.md#symbols)):
#
# | symbol | meaning |
# |---|---|
# | $x \in \mathbb R^d$ | an image, its $d$ pixels in $[0, 1]$; it may leave that box once noise is added |
# | $f : \mathbb R^d \to \{1, \dots, K\}$ | the base classifier: any measurable function, here a network |
# | $e \sim \mathcal N(0, \sigma^2 I)$ | Gaussian noise, independent in every pixel, of standard deviation $\sigma$ |
# | $p_c(x) = \Pr[f(x + e) = c]$ | how often $f$ answers $c$ on noisy copies of $x$ |
# | $\delta \in \mathbb R^d$ | a perturbation, chosen by an adversary, of Euclidean length $\lVert\delta\rVert$ |
# | $\Phi$, $\varphi$ | distribution function and density of the standard normal distribution on $\mathbb R$ |
# | $\Delta$ | a distance: of two images, or of an image from where the answer changes |

# %%
import inspect
import sys
from pathlib import Path

ROOT = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "certify.py").is_file())
sys.path.insert(0, str(ROOT))                              # works from notebooks/ and from the repository's root

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown, display
from scipy import stats
from scipy.ndimage import gaussian_filter
from scipy.optimize import brentq, linprog
from scipy.special import gammaln, ndtri_exp
from torch import nn

import certify
import model

# %matplotlib inline
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "0.5"      # Okabe and Ito's colours
plt.rcParams.update({
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "font.size": 10,
    "axes.titlesize": 10, "legend.fontsize": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True,
    "figure.dpi": 100, "figure.constrained_layout.use": True,
})


def show(*things):
    """The source of functions and classes, as it stands in the scripts."""
    for thing in things:
        display(Markdown(f"```python\n{inspect.getsource(thing)}```"))


# %% [markdown]
# ## 1.1 A brittle classifier
#
# The data are scikit-learn's handwritten digits, $8 \times 8$ pixels, part of the package. We train a small network
# on the clean images, and look at every third test image. Then we attack it. *Projected gradient ascent* (Madry et
# al. 2018) moves an image along the gradient of the loss. After each step it pulls the image back into the ball of a
# given radius $\varepsilon$ around the original. So the $j$-th adversarial image, $x'_0 = x$, is followed by
#
# $$ x'_{j+1} = \Pi_{\{z : \lVert z - x\rVert \le \varepsilon\}} \Bigl( x'_j + a\,
#    \tfrac{\nabla \mathcal L(x'_j)}{\lVert \nabla \mathcal L(x'_j) \rVert} \Bigr), $$
#
# with $\mathcal L$ the cross-entropy of the true class, $a$ the length of a step and $\Pi$ the projection. An attack
# that succeeds is a proof of weakness. An attack that fails proves nothing.

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


def lengths(delta):
    """The length of each image's perturbation: (B, 1, 1, 1)."""
    return delta.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)


def attack(classifier, x, y, size, steps=30):
    """Projected gradient ascent on the cross-entropy, within an l2 ball."""
    moved = x.clone()
    for _ in range(steps):
        moved.requires_grad_(True)
        loss = nn.functional.cross_entropy(classifier(moved), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, moved)
        delta = moved.detach() + size / 5 * gradient / lengths(gradient) - x
        moved = x + delta * (size / lengths(delta)).clamp(max=1)
    return moved


def accuracy_under_attack(classifier, sizes):
    """Share of the test images that the attacks leave right: beaten within a small ball, beaten within a larger one."""
    right = []
    for size in sizes:
        moved = attack(classifier, test_x, test_y, float(size))
        assert (moved - test_x).flatten(1).norm(dim=1).max() < size + 1e-5
        right.append((classifier(moved).argmax(dim=1) == test_y).numpy())
    return np.minimum.accumulate(right, axis=0).mean(axis=1)


train_x, train_y = pixels_and_labels(train=True)
test_x, test_y = (part[::3] for part in pixels_and_labels(train=False))     # what `certify.py --sigma 0.25` certifies
brittle = train_mlp(sigma=0.0)
sizes = np.linspace(0, 1.5, 16)
survives = accuracy_under_attack(brittle, sizes)
print(f"clean accuracy {survives[0]:.1%}; under attacks of size {sizes[5]:.1f}: {survives[5]:.1%}, "
      f"of size {sizes[10]:.1f}: {survives[10]:.1%}")
assert survives[0] > 0.9 and survives[-1] < 0.1

# %%
size = 0.6
moved = attack(brittle, test_x, test_y, size)
fooled = ((brittle(moved).argmax(1) != test_y) & (brittle(test_x).argmax(1) == test_y)).nonzero()[:5, 0]
figure, axes = plt.subplots(2, 5, figsize=(7.5, 3.7))
for column, i in enumerate(fooled):
    for row, x in enumerate((test_x, moved)):
        axis = axes[row, column]
        axis.imshow(x[i, 0].detach(), cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[], title=f"a {test_y[i]}; f says {brittle(x[i:i + 1]).argmax().item()}")
axes[0, 0].set_ylabel("image x")
axes[1, 0].set_ylabel(rf"$x + \delta$, $\|\delta\| \leq {size}$")
plt.show()

# %% [markdown]
# ## 1.2 The smoothed classifier
#
# The base classifier is asked about a cloud of noisy copies of $x$ in place of $x$ itself, and the majority decides:
#
# $$ g(x) = \arg\max_{c}\; p_c(x), \qquad p_c(x) = \Pr_{e \sim \mathcal N(0, \sigma^2 I)}[f(x + e) = c]. \tag{1.1} $$
#
# Here $g(x)$ is the answer, $p_c(x)$ the share of class $c$ among the noisy copies, and $\sigma$ the only parameter.
# Why should this help? Because $p_c$ is an average of the indicator of $\{f = c\}$ over a whole neighbourhood,
# $p_c(x) = \int \mathbb 1[f(z) = c]\, \varphi_\sigma(z - x)\, dz$ with $\varphi_\sigma$ the density of the noise. The
# image enters only through the smooth weight $\varphi_\sigma(z - x)$. So $p_c$ cannot jump, however wildly $f$ does.
# It is the solution of the heat equation at time $\sigma^2 / 2$, with the decision region as initial temperature.
#
# In code, (1.1) is three lines: draw, ask, count. The noise is drawn a hundred copies at a time, since the
# scripts do so; then the same generator gives the same copies.

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
# The cell has held it against the scripts' `count_under_noise`, which counts for many images at once: their copies
# share batches, each image's from its own random numbers.

# %%
show(certify.count_under_noise)


# %% [markdown]
# **Check.** In one dimension, let $f$ answer class 1 on the interval $[-1, 2]$ and class 0 elsewhere.
# Then $p_1(x) = \Phi((2 - x)/\sigma) - \Phi((-1 - x)/\sigma)$. The counts have to agree with it, up to the standard
# deviation of a binomial count.

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
# Images of two pixels can be drawn. The base classifier below has three classes with ragged boundaries, and little
# islands of wrong answers, such as attacks on real networks find. The left panel shows $f$ with the noisy copies of
# one point, the right panel $g$. The ragged boundary has become smooth and the islands have drowned: each is too
# small to win a majority anywhere. The circles have the radius that the theorem below proves.
#
# On a grid, $p_c$ is the indicator of $\{f = c\}$ convolved with a Gaussian. So `scipy` computes it without drawing a
# single random number. That is the independent check of the Monte Carlo counts, and of the circles: inside each, $g$
# has to be constant.

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

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 4.1), sharey=True)
tints = plt.matplotlib.colors.ListedColormap(["#a6cfe6", "#f3c5a3", "#a3dccb"])
window = slice(int((4 - 2) / step), int((4 + 2) / step) + 1)
titles = "base classifier f", f"smoothed classifier g, $\\sigma$ = {sigma}"
for axis, regions, title in zip(axes, (f_map, g_map), titles, strict=True):
    axis.imshow(regions[window, window], origin="lower", extent=(-2, 2, -2, 2), cmap=tints, vmin=0, vmax=2,
                aspect="equal", interpolation="nearest")
    axis.set(xlabel="first pixel", title=title, xlim=(-2, 2), ylim=(-2, 2), xticks=range(-2, 3), yticks=range(-2, 3))
    axis.grid(False)
    for c, place in enumerate(((-1.9, -1.85), (1.15, -1.85), (-1.9, 1.75))):
        axis.text(*place, f"class {c}", fontsize=9)
axes[0].set_ylabel("second pixel")
cloud = np.array(points[3]) + sigma * np.random.default_rng(0).normal(size=(300, 2))
axes[0].plot(*cloud.T, ".", color="0.15", markersize=3, label="x + e, 300 draws")
axes[0].plot(*points[3], "o", color="white", markeredgecolor="black", markersize=7, label="x")
axes[0].legend(loc="upper right", framealpha=1)
for point, _, radius in discs:
    axes[1].add_patch(plt.Circle(point, radius, fill=False, color="black", linewidth=1.5))
    axes[1].plot(*point, "o", color="white", markeredgecolor="black", markersize=5)
plt.show()

# %% [markdown]
# ## 1.4 How different can two noisy images look? The likelihood ratio
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
# So in a space of a hundred thousand dimensions only *one* matters. $\Lambda$ is an increasing function of the
# projection $\langle\delta, z - x\rangle$, and constant on the hyperplanes orthogonal to $\delta$. The sets
# $\{\Lambda \le k_0\}$ are half-spaces. This is special to Gaussian noise, and the reason why the theorem speaks
# of Euclidean length.
#
# This formula is a tool of the proof; no script evaluates it. **Check:** against the two densities of `scipy`, and by
# the change of measure that defines a ratio, $P_1(S) = \mathbb E_{P_0}[\Lambda\, \mathbb 1_S]$, for an odd-shaped set
# $S$.

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
# classifiers with this property, which one loses class $A$ fastest when $x$ moves to $x + \delta$? It is the same
# question as: which test of "$P_0$ against $P_1$" is the most powerful at a given level? Neyman and Pearson answered
# it in 1933.
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
# In words: to give away as little as possible of $P_1$ while holding a fixed share of $P_0$, take the points where
# $P_1$ is cheapest in terms of $P_0$. With $\psi' = 1 - \psi$ and $H' = \{\Lambda > k_0\}$ the lemma turns around:
# if $\int \psi'\,dP_0 \le P_0(H')$, then $\int \psi'\,dP_1 \le P_1(H')$.
#
# **Check.** Forget the proof, and ask a solver. On a grid of cells $i$ in the plane, with masses $P_0(i)$ and
# $P_1(i)$, minimise $\sum_i \psi_i P_1(i)$ over $0 \le \psi_i \le 1$ with $\sum_i \psi_i P_0(i) \ge p_A$. That is a
# linear programme with 3600 unknowns. Its solution is found by a method that knows nothing of likelihood ratios. It
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

figure, axis = plt.subplots(figsize=(4.9, 4.3))
tints = plt.matplotlib.colors.LinearSegmentedColormap.from_list("", ["white", "#7fb8da"])
picture = axis.imshow(psi, origin="lower", extent=(-4, 4, -4, 4), cmap=tints, vmin=0, vmax=1)
along = np.linspace(-4, 4, 2)
axis.plot(along, (stats.norm.ppf(p_a) * np.linalg.norm(shift) - shift[0] * along) / shift[1], color=ORANGE,
          label=r"$\langle\delta, z-x\rangle = \|\delta\|\,\Phi^{-1}(p_A)$")
for centre, colour, name, side in (((0, 0), "black", "$x$", "right"), (shift, ORANGE, r"$x+\delta$", "left")):
    axis.plot(*centre, "o", color=colour)
    axis.text(centre[0] + (0.2 if side == "left" else -0.2), centre[1] + 0.1, name, ha=side)
    axis.add_patch(plt.Circle(centre, 1, fill=False, color=colour, linestyle=":"))
axis.set(xlim=(-3.3, 3.3), ylim=(-3.3, 3.3), xlabel="first pixel ($\\sigma$)", ylabel="second pixel ($\\sigma$)",
         title="worst region A, by linear programming")
axis.grid(False)
axis.legend(loc="lower left", framealpha=1)
plt.colorbar(picture, label=r"$\psi$: share of the cell in A", shrink=0.85)
plt.show()

# %% [markdown]
# ## 1.6 Both bounds
#
# It remains to measure half-spaces. Under $P_0$ the projection $\langle \delta, z - x\rangle$ is distributed as
# $\sigma \lVert\delta\rVert\, \mathcal N(0, 1)$; under $P_1$ its mean is $\lVert\delta\rVert^2$ instead. Write $p_A$
# and $p_B$ for $p_A(x)$ and $p_B(x)$. Choose $H_A = \{\langle\delta, z - x\rangle \le \sigma \lVert\delta\rVert\,
# \Phi^{-1}(p_A)\}$, so that $P_0(H_A) = p_A$. Then
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
# The right-hand sides increase with the shares. So (1.4) holds as well with a lower bound $\underline{p_A}$ in place
# of $p_A$, and an upper bound $\overline{p_B}$ in place of $p_B$.
#
# On the scale of $\Phi^{-1}$ the statement is simple: *a step of length $\lVert\delta\rVert$ changes $\Phi^{-1}(p_c)$
# by at most $\lVert\delta\rVert / \sigma$*. The function $\sigma\,\Phi^{-1}(p_c(x))$ is 1-Lipschitz, whatever $f$ is
# (Salman et al. 2019, Levine et al. 2019).
#
# **Check.** Regions whose shares are known in closed form: balls (a non-central $\chi^2$ distribution), slabs,
# complements of balls, and half-spaces. For each, the shares at $x$ and at $x + \delta$ are computed exactly. Every
# point must lie between the two curves, and half-spaces orthogonal to $\delta$ on them.

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

figure, axis = plt.subplots(figsize=(7.2, 4.2))
axis.fill_between(p0, lower, upper, color="0.9", label="what (1.4) allows")
for (name, values), colour, mark in zip(regions.items(), (BLUE, GREEN, PURPLE), "osv", strict=True):
    before, after = np.array(values).T
    inside = (before > 1e-6) & (before < 1 - 1e-6)
    gap = stats.norm.ppf(after[inside]) - stats.norm.ppf(before[inside])
    assert np.all(np.abs(gap) <= step + 1e-6)
    axis.plot(before, after, mark, color=colour, markersize=4, label=name)
for name, curve, style in (("half-space, moving out of it", lower, "-"), ("half-space, moving into it", upper, "--")):
    axis.plot(p0, curve, style, color=ORANGE, label=name)
axis.set(xlabel="share of the region at $x$", ylabel=r"share of the region at $x + \delta$, $\|\delta\| = \sigma$",
         xlim=(0, 1), ylim=(0, 1))
axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
plt.show()

# %% [markdown]
# ## 1.7 The second proof: a gradient of length at most $1/\sigma$
#
# Salman et al. (2019) reach the same statement by calculus. It is worth knowing both: this one takes three lines, and
# it covers more. Let $F : \mathbb R^d \to [0, 1]$ be *any* measurable score, the indicator of $\{f = c\}$ or a
# softmax output, and let $p(x) = \mathbb E\,F(x + e)$ lie strictly between 0 and 1. Then
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
# $\lVert\delta\rVert/\sigma$, and that is (1.4). The half-space is the worst case again, now for an infinitesimal
# step.
#
# **The soft classifier comes for free.** Nothing in the proof asks for votes. With $F_c$ the softmax score of class
# $c$, $\arg\max_c \mathbb E\,F_c(x + e)$ has the same Lipschitz property and the same radius. (It needs another
# confidence bound: scores are not counts, and notebook 02 counts. MACER and SmoothAdv train on the soft version,
# since it has gradients.)
#
# **Check.** On the plane of section 1.3, for the hard classifier and for a soft one: the gradient by convolving with
# $e$, as in step 1; the same by differences of the grid's $p$; and its length, after $\Phi^{-1}$.

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
    profiles[name] = scores[333, :, 0], smooth[333]                         # a line that meets islands

figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.5))
for (name, (scores, smooth)), colour, style in zip(profiles.items(), (BLUE, ORANGE), ("-", "--"), strict=True):
    axes[0].plot(line, scores, color=colour, linewidth=1)
    axes[0].plot(line, smooth, style, color=colour, linewidth=2, label=f"{name}, smoothed")
    lipschitz = sigma * stats.norm.ppf(smooth)
    axes[1].plot(line, lipschitz, style, color=colour, linewidth=2, label=name)
    drop = np.abs(np.diff(lipschitz[200:601]))
    assert drop.max() <= 1.001 * step
axes[1].plot(line, -line, color=GREY, linewidth=1, label="slope $-1$")
axes[0].set(xlabel="first pixel (second: $-0.67$)", ylabel="class 0: base (thin) and $p_0$ (thick)", xlim=(-2, 2))
axes[1].set(xlabel="first pixel (second: $-0.67$)", ylabel=r"$\sigma\,\Phi^{-1}(p_0)$", xlim=(-2, 2), ylim=(-1.2, 1.2))
for axis in axes:
    axis.legend()
plt.show()

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
# spread thinly over many classes, as the true $p_B$ is then far below $1 - p_A$. Notebook 02, section 2.11, takes
# that back.
#
# *Ties.* The ball is open, since at $\lVert\delta\rVert = R$ the two shares may be equal and the first class of
# equals wins; the scripts print a number strictly below $R$, so that the closed ball of the printed radius is
# certified.
#
# **Other norms.** The theorem speaks of Euclidean length. Of the largest change in a pixel,
# $\lVert\delta\rVert_\infty = \max_j \lvert\delta_j\rvert$, it says
#
# $$ \lVert\delta\rVert_2 \le \sqrt d\, \lVert\delta\rVert_\infty \quad\Rightarrow\quad
#    g(x + \delta) = A \;\text{ for every }\; \lVert\delta\rVert_\infty < R / \sqrt d. \tag{1.8} $$
#
# The corners of the cube are the directions where this is sharp. It is little: $R = 0.5$ on $224 \times 224$ images
# in colour is a third of one grey level of 255, as the cell prints. Kumar et al. (2020) show that a large class of
# other noises, independent in every pixel, does not fare better as $d$ grows. (Yang et al. 2020 treat many noises and
# norms; exercise 3 is one of them.)

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
# The scripts' `certified_radius` gives the same. **Check** (1.6): solve the defining equation numerically, for the
# length at which the two bounds of (1.4) meet. And (1.8): for a plane whose normal is a corner of the cube, both
# distances are known.

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
for rivals, colour, style in ((1, BLUE, "-"), (2, ORANGE, "--"), (9, GREEN, ":")):
    name = "$p_B = 1 - p_A$" if rivals == 1 else f"$p_B = (1 - p_A) / {rivals}$"
    axis.plot(p_a, [radius(a, (1 - a) / rivals, 1.0) for a in p_a], style, color=colour, label=name)
axis.set(xlabel="share $p_A$ of the top class", ylabel=r"radius $R$ ($\sigma$)", ylim=(0, 4), xlim=(0.1, 1))
axis.legend()
plt.show()


# %% [markdown]
# ## 1.9 Tightness: nobody can prove more
#
# Could a cleverer argument give a larger $R$ from the same two numbers? No. For every $p_A \ge p_B > 0$ with $p_A +
# p_B \le 1$ there is a classifier that fits them and changes its answer immediately beyond $R$. (Cohen, Rosenfeld and
# Kolter prove it as their theorem 2.) It only must have enough classes: two where $p_B = 1 - p_A$, else $2 + \lceil
# (1 - p_A - p_B) / p_B \rceil$.
#
# *Proof.* Take a unit vector $v$. Let $f$ answer $A$ where $\langle v, z - x\rangle \le \sigma\Phi^{-1}(p_A)$ and $B$
# where $\langle v, z - x \rangle \ge \sigma\Phi^{-1}(1 - p_B)$. The half-spaces are disjoint since $p_A \le 1 - p_B$.
# The strip between them is cut into slices, one class each, of share at most $p_B$ at $x$. At $x + t v$ both
# inequalities of (1.4) are equalities, for $A$ and for $B$ at once: $p_A(x + tv) = \Phi(\Phi^{-1}(p_A) - t/\sigma)$
# and $p_B(x + tv) = \Phi(\Phi^{-1}(p_B) + t/\sigma)$. For $t > R$ the second is the larger one, so $g(x + tv) \ne A$.
# $\square$
#
# There are two ways to larger radii. One is to know more about $f$ than its shares at $x$: its gradient (Mohapatra et
# al. 2020), or what it does under other noise. The other is to train an $f$ with a larger $p_A$, which is the
# business of notebooks 03 and 04.
#
# **Check.** Build that classifier, compute the shares of all its classes exactly along $v$, and find where the winner
# changes.

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

figure, axis = plt.subplots(figsize=(5.4, 3.6))
axis.plot(t, shares[0], color=BLUE)
axis.plot(t, shares[-1], color=ORANGE, linestyle="--")
axis.plot(t, shares[1:-1].T, color=GREY, linestyle=":")
axis.text(0.03, 0.56, "A", color=BLUE)
axis.text(0.1, 0.31, "B", color=ORANGE)
axis.text(0.05, 0.08, "two classes of the strip", color=GREY)
axis.axvline(R, color="black", linewidth=1)
axis.text(R + 0.01, 0.62, "R of (1.6)")
axis.set(xlabel="way $t$ along $v$ (pixels in [0, 1])", ylabel="share of the noisy copies", ylim=(0, 0.7),
         xlim=(0, 0.8))
plt.show()

# %% [markdown]
# ## 1.10 The linear classifier: the exact case
#
# With two classes and a linear $f$, $f(z) = A$ where $\langle w, z\rangle + b > 0$, the half-space is not the worst
# case but the fact. The distance of $x$ from the plane is $\Delta = (\langle w, x\rangle + b) / \lVert w\rVert$, and
#
# $$ p_A(x) = \Pr\bigl[\langle w, x\rangle + b + \sigma\lVert w\rVert\,\xi > 0\bigr] = \Phi(\Delta / \sigma)
#    \quad\Rightarrow\quad R = \sigma\,\Phi^{-1}(p_A(x)) = \Delta. \tag{1.9} $$
#
# The radius is the distance, for *every* $\sigma$ (Cohen et al. 2019, appendix B, proposition 4). Nothing is lost, and
# nothing depends on the dimension. It makes the linear classifier the best test of a certification procedure: the
# truth is known, to the last digit. The whole procedure, sampling and confidence bound included, is `certify.certify`;
# notebook 02, section 2.4, builds it. Here we only use it.
#
# **Check.** A random plane in $3 \times 8 \times 8$ dimensions. What `certify` claims must stay below the distance,
# and come close to it. It remains a little below: that is the price of a finite number of draws. The price grows with
# $\sigma$ as long as $p_A$ is away from 1.

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
# Formula (1.7) has $\sigma$ as a factor, so why not choose $\sigma = 100$? And if linear classifiers get their
# distance at any $\sigma$, why not $\sigma = 0.001$? Three answers, each an inequality.
#
# **(a) Large $\sigma$: classes drown.** Let $x_1$ and $x_2$ have different true classes $c_1 \ne c_2$ and the
# distance $\Delta = \lVert x_1 - x_2\rVert$. By (1.4), $p_{c_2}(x_2) \le 1 - p_{c_1}(x_2) \le 1 -
# \Phi(\Phi^{-1}(p_{c_1}(x_1)) - \Delta/\sigma)$, which says
#
# $$ \sigma\,\Phi^{-1}(p_{c_1}(x_1)) + \sigma\,\Phi^{-1}(p_{c_2}(x_2)) \le \Delta, \qquad\qquad
#    \tfrac12\bigl(p_{c_1}(x_1) + p_{c_2}(x_2)\bigr) \le \Phi\Bigl(\frac{\Delta}{2\sigma}\Bigr). \tag{1.10} $$
#
# The second inequality holds as $p_{c_1}(x_1) + p_{c_2}(x_2) \le 1 + \sup_S |P_0(S) - P_1(S)|$. By the lemma the
# supremum is attained by a half-space midway, where it is $2\Phi(\Delta/2\sigma) - 1$. The first inequality says that
# the two radii share the distance between the images, at any $\sigma$: enlarging $\sigma$ cannot push them beyond
# $\Delta$. The second one says what it does instead. No network, however large, tells the two noisy images apart more
# often than $\Phi(\Delta/2\sigma)$. This falls to one half as $\sigma$ grows, for the closest pairs first.
#
# **Check** on the digits: the linear classifier midway between two images attains both. We take each test image and
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

figure, axes = plt.subplots(1, 3, figsize=(8.6, 3.5), width_ratios=(1, 1, 3.4))
for axis, picture, label in ((axes[0], x, test_y[i]), (axes[1], other, train_y[j])):
    axis.imshow(picture.view(8, 8), cmap="gray", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[], title=f"a {label}")
axes[0].set_xlabel("the closest pair:")
axes[1].set_xlabel(f"{nearest[i]:.2f} apart")
for quantile, colour, style, name in (
        (0, ORANGE, "--", "closest"), (0.5, BLUE, "-", "median"), (1, GREEN, ":", "farthest")):
    axes[2].semilogx(sigmas, 100 * np.quantile(limits, quantile, axis=0), style, color=colour, label=f"{name} pair")
axes[2].set(xlabel=r"noise $\sigma$ (pixels in [0, 1])", ylabel="accuracy on the two noisy images (%)", ylim=(50, 101),
            title="(1.10): an upper bound for one pair of images", xticks=[0.05, 0.1, 0.25, 0.5, 1, 2, 4],
            xticklabels=["0.05", "0.1", "0.25", "0.5", "1", "2", "4"])
axes[2].minorticks_off()
axes[2].legend()
plt.show()

# %% [markdown]
# **(b) Large $\sigma$ in high dimension: regions are left.** A noisy copy is not near $x$. Its squared distance is
# $\lVert e\rVert^2 = \sigma^2 (\xi_1^2 + \dots + \xi_d^2)$ with independent $\xi_j \sim \mathcal N(0, 1)$, that is
# $\sigma^2$ times a $\chi^2_d$ variable. Each term has the mean $\mathbb E\,\xi^2 = 1$ and the variance
# $\mathbb E\,\xi^4 - 1 = 3 - 1 = 2$, and both add up. So the squared distance has the mean $\sigma^2 d$ and the
# standard deviation $\sigma^2\sqrt{2d}$: the copies lie in a thin shell of radius about $\sigma\sqrt d$. Let the
# region of class $A$ be a ball of radius $\Delta$ around $x$. Then
#
# $$ p_A(x) = \Pr[\lVert e\rVert \le \Delta] = \Pr[\chi^2_d \le \Delta^2/\sigma^2],
#    \qquad R(\sigma) = \sigma\,\Phi^{-1}\bigl(\Pr[\chi^2_d \le \Delta^2/\sigma^2]\bigr). \tag{1.11} $$
#
# The ball is lost once $\sigma > \Delta/\sqrt d$, roughly: half of the copies are then outside. Before, $R$ is nearly
# as large as $\Delta$ only for $\sigma \ll \Delta / \sqrt d$.
#
# **(c) Small $\sigma$: the cap of finitely many draws.** No share above $\alpha^{1/n}$ can be proven from $n$ draws,
# at the error $\alpha$ (notebook 02, section 2.6). So $R \le \sigma\,\Phi^{-1}(\alpha^{1/n})$, which is about
# $3.8\,\sigma$ for $n = 100\,000$ and $\alpha = 0.001$. A small $\sigma$ proves small radii only. Nor does it smooth
# away the small-scale brittleness that was our problem.
#
# (b) and (c) together leave a best $\sigma$ in between, drawn below for balls in several dimensions. From $d = 64$ on
# the exact curves nearly coincide in these units; what 100 000 draws can prove falls like $1/\sqrt d$. For small
# $\sigma$ the share $p_A$ is so near to 1 that floats cannot hold $1 - p_A$. For $d = 3072$ it is less than
# $e^{-1000}$ where $\sigma\sqrt d < 0.6\,\Delta$. So we compute its logarithm, by Legendre's continued fraction for
# the upper incomplete gamma function, and invert $\ln\Phi$.
#
# **Check** of the shell and of (1.11) by drawing the noise, and of the logarithm against `scipy`, where that has
# digits.

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

figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.7))
scaled = np.linspace(0.02, 1.3, 400)                                        # sigma sqrt(d) / Delta
for d, colour, style in ((2, BLUE, "-"), (64, ORANGE, "--"), (3072, GREEN, ":")):
    sigma = scaled / np.sqrt(d)
    exact = ball_radius(sigma, d)
    finite = np.minimum(exact, sigma * cap)
    assert np.isfinite(exact).all() and exact.max() < 1                     # never beyond the ball
    assert 0 < finite.argmax() < len(scaled) - 1                            # the best sigma lies in between
    axes[0].plot(scaled, exact, style, color=colour, label=f"d = {d}", linewidth=2)
    axes[1].semilogy(scaled, np.maximum(finite, 1e-6), style, color=colour, label=f"d = {d}", linewidth=2)
for axis, title in zip(axes, ("exact shares", "provable with 100 000 draws"), strict=True):
    axis.set(xlabel=r"$\sigma \sqrt{d}\, /\, \Delta$", ylabel=r"radius $R / \Delta$", title=title)
axes[0].set(ylim=(0, 1.02))
axes[1].set(ylim=(0.001, 1.2))
axes[0].legend()
plt.show()


# %% [markdown]
# **On the digits.** The same small network, trained on four noise levels and certified at each. Every
# curve is the share of test images that are answered rightly *and* certified beyond the radius. From $\sigma = 0.12$
# to $0.5$ each curve starts lower and reaches farther than the one before: the trade. At $\sigma = 1$ the trade is
# over. The classes drown, shares stay near one half, and the radii shrink as well: (1.10) and (1.11) at work. (The
# draws are few here, 2000 per image, so that the cell takes seconds. `certify_all` does what `certify` does, for many
# images at once.)

# %%
def certified_curve(network, sigma, radii, n=2000):
    found = np.empty(len(test_x))
    trials = certify.certify_all(network, enumerate(test_x), sigma, 100, n, 0.001, batch=2000)
    for index, _, top, _, _, bounds in trials:
        prediction, certified = certify.certificate(top, *bounds["one-sided"], sigma)
        found[index] = certified if prediction == test_y[index] else -1
    return np.array([(found >= r).mean() for r in radii]), found.max()


radii, curves, reach = np.linspace(0, 1.2, 121), {}, []
for sigma in (0.12, 0.25, 0.5, 1.0):
    curves[sigma], largest = certified_curve(train_mlp(sigma), sigma, radii)
    reach.append(largest)
    assert largest <= sigma * stats.norm.ppf(0.001 ** (1 / 2000))           # (c)
    print(f"sigma = {sigma:4}: {curves[sigma][0]:.1%} at radius 0, largest radius {largest:.2f}")
assert reach[0] < reach[1] < reach[2] > reach[3] and curves[0.12][0] > curves[0.5][0] > curves[1.0][0]

figure, axis = plt.subplots(figsize=(5.8, 3.8))
looks = zip((BLUE, ORANGE, GREEN, PURPLE), ("-", "--", "-.", ":"), strict=True)
for (sigma, curve), (colour, style) in zip(curves.items(), looks, strict=True):
    axis.plot(radii, 100 * curve, style, color=colour, label=rf"$\sigma$ = {sigma}")
axis.set(xlabel=r"certified $\ell_2$ radius (pixels in [0, 1])", ylabel="certified accuracy (%)", ylim=(0, 101),
         xlim=(0, 1.1))
axis.legend()
plt.show()

# %% [markdown]
# ## 1.12 Back to the attack
#
# Now the same network twice, smoothed and not. The curve of an attack on $f$ is an *upper* bound of its robustness,
# since a stronger attack may exist. The curve of certificates of $g$ is a *lower* bound: no attack, known or unknown,
# gets below it, up to the errors of sampling (notebook 02). So the curve of $f$ can only come down, with better
# attacks, and the curve of $g$ can only go up, with more draws. That the second lies below the first does not say
# that $g$ is the weaker of the two. It says how much is still unknown.
#
# * On the left the brittle network of section 1.1, which saw no noise in training. Smoothing needs no training, and
#   proves something at once.
# * On the right the repository's own classifier, a small vision transformer, pre-trained to denoise and fine-tuned
#   under noise. Both curves are higher, and nearer to each other: noise in training helps $f$ as well, though no
#   theorem says so. (From 0.8 on nothing can be proven with 10 000 draws at this $\sigma$: that is (c) above.)
#
# The transformer's checkpoint and certificates lie in `results/digits/`. They were made by
#
# ```sh
# python pretrain.py && python finetune.py --sigma 0.25 && python certify.py --sigma 0.25
# ```
#
# The cell also certifies one image of the transformer anew, with fewer draws. It must come to a radius close to the
# recorded one.

# %%
rows = certify.read_log(ROOT / "results/digits/certify_sigma_0.25.tsv")
checkpoint = model.read_checkpoint(ROOT / "results/digits/finetune_sigma_0.25.pt", "finetune")
vit = certify.rebuild(checkpoint, "the checkpoint").eval()
row = max(rows, key=lambda row: row["radius"] if row["radius"] < 0.6 else 0)
index = int(row["idx"])
assert row["label"] == test_y[index // 3]
prediction, certified = certify.certify(vit, test_x[index // 3], 0.25, n=3000, index=index, batch=500)
print(f"test image {index}: recorded {row['predict']:.0f} within {row['radius']:.3f} ({row['n']:.0f} draws), "
      f"now {prediction} within {certified:.3f} (3000 draws)")
assert prediction == row["predict"] and abs(certified - row["radius"]) < 0.06

proven, _ = certified_curve(brittle, 0.25, sizes)
right = rows["predict"] == rows["label"]
recorded = np.array([np.mean(right & (rows["radius"] >= size)) for size in sizes])
networks = {
    "brittle network, trained on clean images": (survives, proven),
    "transformer, fine-tuned under noise": (accuracy_under_attack(vit, sizes), recorded),
}
figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.8), sharey=True)
for axis, (name, (attacked, lower)) in zip(axes, networks.items(), strict=True):
    axis.fill_between(sizes, 100 * lower, 100 * attacked, color="0.93")
    axis.plot(sizes, 100 * attacked, "--", color=ORANGE, label="f: what one attack leaves, an upper bound")
    axis.plot(sizes, 100 * lower, color=BLUE, label=r"g, $\sigma$ = 0.25: proven, a lower bound")
    axis.set(xlabel=r"size of the perturbation $\|\delta\|$ (pixels in [0, 1])", title=name, ylim=(0, 101),
             xlim=(0, 1.5))
    middle = np.abs(sizes - 0.5).argmin()
    print(f"{name}: at 0.5 the attack leaves f {attacked[middle]:.1%}, and g is certified on {lower[middle]:.1%}")
axes[0].set_ylabel("accuracy (%)")
handles = axes[0].get_legend_handles_labels()
figure.legend(*handles, loc="outside upper center", ncols=2)
plt.show()
(f_brittle, g_brittle), (f_trained, g_trained) = networks.values()
assert g_brittle[middle] > 0 and g_trained[middle] > 2 * g_brittle[middle] and f_trained[middle] > f_brittle[middle]
assert np.abs(f_trained - g_trained)[:middle].mean() < np.abs(f_brittle - g_brittle)[:middle].mean()

# %% [markdown]
# ## 1.13 Pixel scalings: what is $\sigma$ in other units?
#
# Papers and libraries disagree about what a pixel is: $[0, 1]$, $\{0, \dots, 255\}$, or standardised by a mean and a
# standard deviation per channel. Let $x_\star = (x - \text{mean}) / \text{std}$ with one $\text{std}$ for all pixels.
# Then $x_\star + e_\star$ with $e_\star \sim \mathcal N(0, \sigma_\star^2 I)$ is what $x + \text{std}\, e_\star$
# becomes, so
#
# $$ \sigma = \text{std}\; \sigma_\star, \qquad R = \text{std}\; R_\star, \qquad p_c \text{ unchanged}. \tag{1.12} $$
#
# Both lengths scale alike and their ratio stays. In units of $[0, 255]$ put $\text{std} = 1/255$: $\sigma = 0.25$ is
# $63.75$ grey levels. A radius without its unit means nothing.
#
# With *different* $\text{std}_j$ per channel, isotropic noise on $x_\star$ is anisotropic on $x$. What is certified
# there is an ellipsoid, $\sum_j \delta_j^2 / \text{std}_j^2 < R_\star^2$. The largest ball in it has the radius
# $R_\star \min_j \text{std}_j$. To avoid all this, the networks here take images in $[0, 1]$ and normalise inside,
# *after* the noise was added. Normalisation is then part of $f$, and the theorem does not care what $f$ does. The place
# is `Encoder.prepare`, which also enlarges (next section). In the page it is two lines:

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
# **Check.** The same linear classifier, told once in $[0, 1]$ and once in $[0, 255]$ (which `certify`
# takes for a mistake unless told `any_range`). With the same random stream it gets the same counts, and the radius is
# multiplied by 255. Then three channels with different $\text{std}_j$: over many directions, the point of the
# ellipsoid's surface that is nearest to its centre lies at $R_\star \min_j \text{std}_j$.

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
# The paper's CIFAR-10 classifier enlarges the image from $32 \times 32$ to $224 \times 224$ before the transformer
# sees it. Where does the noise belong? Let $U$ be the enlargement, a linear map (bicubic interpolation). There are
# two smoothed classifiers:
#
# * *noise, then resize*: $\;\arg\max_c \Pr[f(U(x + e)) = c]$ with $e$ on the 32-pixel grid. Here $f \circ U$ is the
#   base classifier, and $R$ is a radius among $32 \times 32$ images. This is what is published, and what the code
#   does: `prepare` stands inside the network.
# * *resize, then noise*: $\;\arg\max_c \Pr[f(Ux + e_{224}) = c]$ with independent $e_{224}$ on the 224-pixel grid. Its
#   radius is about $224 \times 224$ images. For the small ones it says
#
# $$ \lVert U\delta\rVert \le \lVert U\rVert\,\lVert\delta\rVert
#    \quad\Rightarrow\quad R_{32} \ge R_{224} / \lVert U\rVert, \tag{1.13} $$
#
# where $\lVert U\rVert$ is the largest singular value of $U$. Enlarging $\zeta$ times copies, roughly, each pixel
# $\zeta^2$ times. So it multiplies lengths of smooth perturbations by $\zeta$: here $\zeta = 7$, and
# $\lVert U\rVert \approx 7$. Anyone who adds noise after resizing, and quotes $R_{224}$ as if it were a radius for
# CIFAR-10, overstates it sevenfold.
#
# **Check 1.** $U$ is separable, $U = \mathcal M \otimes \mathcal M$ with a $224 \times 32$ matrix $\mathcal M$. We
# read it off `prepare` by enlarging striped images; $\lVert U\rVert = \lVert \mathcal M\rVert^2$. Perturbations try
# the inequality.

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
# **Check 2.** A base classifier whose true distances are known: is the mean of the enlarged image above
# one half? It is linear, so (1.9) applies in either space. We certify the same small image both ways. Then we walk
# nine tenths of the second radius, on the small grid, towards the plane.

# %%
def brighter(z):
    return torch.stack([torch.zeros(len(z)), prepare(z).mean(dim=(1, 2, 3)) - 0.5], dim=1)


small = torch.full((1, 32, 32), 0.51)
weights = torch.zeros(1, 1, 32, 32, requires_grad=True)
brighter(weights)[0, 1].backward()
normal = weights.grad[0] / weights.grad.norm()
distance = 0.01 / weights.grad.norm().item()
with torch.no_grad():
    _, before = certify.certify(brighter, small, 0.25, n=1500)
    _, after = certify.certify(brighter, prepare(small[None])[0], 0.25, n=1500)
    walked = brighter((small - 0.9 * after * normal)[None]).argmax().item()
    restored = brighter((small - 0.999 * after / norm_u * normal)[None]).argmax().item()
assert before < distance and after > 2 * distance and walked == 0           # about 32 x 32 images the claim is false
assert after / norm_u < distance and restored == 1                          # divided by |U|, it is true

figure, axis = plt.subplots(figsize=(6.6, 2.4))
names = ["noise on 32 × 32", "noise on 224 × 224,\nquoted as it is", "the same,\ndivided by ‖U‖"]
axis.barh(names[::-1], [after / norm_u, after, before], color=[GREEN, ORANGE, BLUE], height=0.55)
axis.axvline(distance, color="black")
axis.text(distance + 0.01, -0.35, "true distance", va="bottom")
axis.set(xlabel=r"certified $\ell_2$ radius of the 32 × 32 image (pixels in [0, 1])")
axis.grid(axis="y", visible=False)
plt.show()

# %% [markdown]
# **What does the same $\sigma$ mean at another resolution?** Take a scene at 32 and at $224 = 7 \cdot
# 32$ pixels a side. Averaging blocks of $7 \times 7$ pixels brings the large one back to the small one. It brings
# independent noise of deviation $\sigma$ on the large one to
#
# $$ \sigma_{\text{block}} = \sigma / \zeta, \qquad \lVert \delta_{224}\rVert \approx \zeta\,
#    \lVert \delta_{32}\rVert, \qquad \zeta = 7, \tag{1.14} $$
#
# where $\delta$ is the difference of two such scenes.
# The average of $\zeta^2$ independent variables has the variance $\sigma^2/\zeta^2$. The sum of squares over
# $\zeta^2$ times as many pixels of similar difference is $\zeta^2$ times as large. So $\sigma = 0.25$ and $r = 0.5$
# on a $224$-pixel image correspond to about $0.036$ and $0.071$ at $32$ pixels. The same numbers are a much milder
# demand on ImageNet than on CIFAR-10, and rows of the two tables are not to be compared. In $[0, 1]$ pixels, $\sigma$
# needs its resolution as much as its unit.

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

figure, axes = plt.subplots(1, 3, figsize=(8, 2.9))
digit = test_x[1][None]
for axis, size in zip(axes, (8, 32, 128), strict=True):
    big = nn.functional.interpolate(digit, size=size, mode="bicubic").clamp(0, 1)
    noisy = big + sigma * torch.randn_like(big)
    axis.imshow(noisy[0, 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set(title=rf"a {test_y[1]}: {size} × {size}, $\sigma$ = {sigma}", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# The same digit, the same $\sigma$, three resolutions: the eye averages, as (1.14) says, and the noise seems to fade.
#
# ## 1.15 What to take along
#
# * Smoothing turns *any* $f$ into a $g$ for which $\sigma\,\Phi^{-1}(p_c)$ is 1-Lipschitz: (1.4). One proof is an
#   inequality, (1.3), and the fact that the likelihood ratio of two shifted Gaussians depends on one direction only,
#   (1.2). The other bounds a gradient, (1.5), and holds for scores as well as for votes.
# * The radius is $R = \sigma\,\Phi^{-1}(p_A)$, tight given $p_A$ alone, and exact for linear classifiers.
# * $\sigma$ sets the scale of what can be proven and of what can be told apart.
# * A radius belongs to a norm, a unit and a resolution: those in which the noise was added.
#
# Everything here used exact shares $p_c(x)$. In reality they are integrals over hundreds of thousands of dimensions
# that can only be sampled. How a count becomes a proof is the subject of notebook 02.
#
# ## 1.16 Exercises
#
# 1. **A shorter, weaker radius.** Show that $p_c$ itself is Lipschitz with the constant $1/(\sigma\sqrt{2\pi})$.
#    Deduce that $R' = \sigma\sqrt{2\pi}\,(p_A - \frac12)$ is a valid radius, and that it is never larger than (1.7).
#    *Hint:* stop the proof of (1.5) before the last step.
# 2. **Two radii.** Three classes have the shares $0.4$, $0.35$ and $0.25$, and $\sigma = 0.5$. Which radius gives
#    (1.6), which (1.7)? *Hint:* one of them is none.
# 3. **Another noise.** Let the noise be Laplace, with the density proportional to $e^{-\lVert z\rVert_1 / b}$. Bound
#    the likelihood ratio, and deduce a radius in the norm $\lVert\cdot\rVert_1$. *Hint:* the triangle inequality
#    replaces (1.2); no lemma is needed.
# 4. **Noise of any covariance.** Let $e \sim \mathcal N(0, \Sigma)$ with an invertible $\Sigma$. Which set of
#    perturbations is certified? *Hint:* substitute $z = \Sigma^{-1/2} x$.
# 5. **Smoothing twice.** Smooth the scores $\mathbb E F_c(x + e)$ of a soft classifier once more, with noise of
#    deviation $\sigma'$. Which classifier is it, and which radius has it? *Hint:* the heat equation.
#
# <details><summary>Answers</summary>
#
# 1. $\lVert\nabla p_c\rVert \le \varphi(\Phi^{-1}(p_c))/\sigma \le \varphi(0)/\sigma = 1/(\sigma\sqrt{2\pi})$. Along
#    a way of length $t$ the share falls by at most $t/(\sigma\sqrt{2\pi})$, and so stays above $\frac12$ for $t <
#    R'$. On $[\frac12, 1)$ the function $\Phi^{-1}$ is convex, with the value $0$ and the slope $\sqrt{2\pi}$ at
#    $\frac12$. So it lies above its tangent, which is $\sqrt{2\pi}\,(p - \frac12)$.
# 2. (1.6) gives $0.25\,(\Phi^{-1}(0.4) - \Phi^{-1}(0.35)) = 0.25\,(-0.253 + 0.385) = 0.033$. (1.7) gives none, since
#    $0.4 < \frac12$.
# 3. $\Lambda = e^{(\lVert z - x\rVert_1 - \lVert z - x - \delta\rVert_1)/b} \le e^{\lVert\delta\rVert_1/b}$. The
#    share of all other classes is at most $e^{\lVert\delta\rVert_1/b}\,(1 - p_A)$ at $x + \delta$. That is below
#    $\frac12$ for $\lVert\delta\rVert_1 < b \ln\frac{1}{2(1 - p_A)}$.
# 4. In $z$ the noise is $\mathcal N(0, I)$. So the certified set is the ellipsoid $\sqrt{\delta^\top \Sigma^{-1}
#    \delta} < \Phi^{-1}(p_A)$. With $\Sigma = \sigma^2 I$ it is (1.7); with a diagonal $\Sigma$ it is the ellipsoid
#    of section 1.13.
# 5. The sum of two independent Gaussians is Gaussian. So it is $F$ smoothed once at $\sqrt{\sigma^2 + \sigma'^2}$,
#    and its radius is (1.6) with that in place of $\sigma$ and its own shares. (With *votes* in between it is another
#    classifier: the argmax does not commute with averaging.)
#
# </details>

# %%
# The numbers of the answers.
p_a = np.linspace(0.5, 0.999, 500)
assert np.all(np.sqrt(2 * np.pi) * (p_a - 0.5) <= stats.norm.ppf(p_a) + 1e-12)             # exercise 1, sigma = 1
print(f"exercise 2: Phi^-1 of 0.4 and 0.35 is {stats.norm.ppf(0.4):.3f} and {stats.norm.ppf(0.35):.3f}; "
      f"the radii are {radius(0.4, 0.35, 0.5):.3f} and {radius(0.4, 0.6, 0.5):.3f}")

random = np.random.default_rng(6)
inside = lambda z: np.abs(z).sum(axis=1) < 4                                # exercise 3: class A, in two dimensions
noise = random.laplace(size=(100_000, 2))                                   # b = 1
share = inside(noise).mean()
reach = np.log(1 / (2 * (1 - share)))
for way in ((1, 0), (0.5, 0.5), (0.3, -0.7)):
    assert inside(noise + 0.99 * reach * np.array(way)).mean() > 0.5
print(f"exercise 3: p_A = {share:.3f}, certified in the norm of the sum up to {reach:.3f}")

scores = nn.functional.one_hot(torch.from_numpy(f_map), 3).numpy()[..., 0].astype(float)       # exercise 5
twice = gaussian_filter(gaussian_filter(scores, 30, truncate=6), 40, truncate=6)
assert np.allclose(twice[300:501, 300:501], gaussian_filter(scores, 50, truncate=6)[300:501, 300:501], atol=1e-3)

# %% [markdown]
# ## References
#
# * Neyman, Pearson 1933: [On the problem of the most efficient tests of statistical
#   hypotheses](https://doi.org/10.1098/rsta.1933.0009)
# * Szegedy et al. 2014: [Intriguing properties of neural networks](https://arxiv.org/abs/1312.6199)
# * Madry et al. 2018: [Towards deep learning models resistant to adversarial
#   attacks](https://arxiv.org/abs/1706.06083)
# * Lecuyer et al. 2019: [Certified robustness to adversarial examples with differential
#   privacy](https://arxiv.org/abs/1802.03471)
# * Li, Chen, Wang, Carin 2019: [Certified adversarial robustness with additive
#   noise](https://arxiv.org/abs/1809.03113)
# * Cohen, Rosenfeld, Kolter 2019: [Certified adversarial robustness via randomized
#   smoothing](https://arxiv.org/abs/1902.02918)
# * Levine, Singla, Feizi 2019: [Certifiably robust interpretation in deep learning](https://arxiv.org/abs/1905.12105)
# * Salman et al. 2019: [Provably robust deep learning via adversarially trained smoothed
#   classifiers](https://arxiv.org/abs/1906.04584)
# * Kumar et al. 2020: [Curse of dimensionality on randomized smoothing for certifiable
#   robustness](https://arxiv.org/abs/2002.03239)
# * Yang et al. 2020: [Randomized smoothing of all shapes and sizes](https://arxiv.org/abs/2002.08118) (other noises
#   and norms)
# * Mohapatra et al. 2020: [Higher-order certification for randomized smoothing](https://arxiv.org/abs/2010.06651)
# * Wu et al. 2023: [Denoising masked autoencoders help robust classification](https://arxiv.org/abs/2210.06983), the
#   paper of this repository
#
# [contents](README.md) | next: [02, from counts to certificates](02_from_counts_to_certificates.ipynb)
