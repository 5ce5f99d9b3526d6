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
# # 1. Smoothing: from a brittle classifier to one with a guarantee
#
# A trained network is right on most test images, and wrong on images that nobody could tell from them. This notebook
# replaces such a classifier $f$ by its *smoothed* version $g$ and proves how far an image has to be moved before $g$ may
# change its mind. All of it rests on one classical argument, the lemma of Neyman and Pearson, which we go through in full: why
# the worst case is a half-space, what radius follows, why no larger radius could follow, and what $\sigma$ has to do with it.
#
# Formulas appear in symbols, in words, as the function of the scripts that implements them, where there is one (printed from their
# source), and in a cell that checks it against something computed in another way. Symbols used throughout:
#
# | symbol | meaning |
# |---|---|
# | $x \in \mathbb R^d$ | an image, its $d$ pixels in $[0, 1]$; it may leave that box once noise is added |
# | $f : \mathbb R^d \to \{1, \dots, K\}$ | the base classifier: any measurable function, here a network |
# | $e \sim \mathcal N(0, \sigma^2 I)$ | Gaussian noise, independent in every pixel, of standard deviation $\sigma$ |
# | $p_c(x) = \Pr[f(x + e) = c]$ | how often $f$ answers $c$ on noisy copies of $x$ |
# | $\delta \in \mathbb R^d$ | a perturbation, chosen by an adversary, of Euclidean length $\lVert\delta\rVert$ |
# | $\Phi$, $\varphi$ | distribution function and density of the standard normal distribution on $\mathbb R$ |

# %%
import inspect
import sys
from pathlib import Path

root = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "certify.py").is_file())
sys.path.insert(0, str(root))                                         # works from notebooks/ and from the repository's root

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from scipy.optimize import brentq, linprog
from scipy.stats import chi2, multivariate_normal, ncx2, norm
from torch import nn

import certify as stage3
from certify import (
    FixedN,
    GaussianNoise,
    certified_radius,
    certify,
    certify_all,
    count_classes,
    count_under_noise,
    generator_for,
)
from model import Encoder, build_vit, read_checkpoint

# %matplotlib inline
BLUE, RED, GREEN, PINK, AMBER = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"      # Okabe and Ito's colours
plt.rcParams.update({"figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "font.size": 10,
                     "axes.titlesize": 10, "legend.fontsize": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True,
                     "figure.dpi": 100, "figure.constrained_layout.use": True})


def show(*things):
    """Print the source of functions and classes, as the scripts have it."""
    print("\n".join(inspect.getsource(thing) for thing in things))


# %% [markdown]
# ## A brittle classifier
#
# The data are scikit-learn's handwritten digits, $8 \times 8$ pixels, part of the package. We train a small network on the
# clean images, and look at every third test image. Then we attack it: *projected gradient ascent* moves an image along the
# gradient of the loss and pulls it back, after each step, into the ball of a given radius $\varepsilon$ around the original,
#
# $$ x_{t+1} = \Pi_{\{z : \lVert z - x\rVert \le \varepsilon\}} \Bigl( x_t + \eta\, \tfrac{\nabla \ell(x_t)}{\lVert
#    \nabla \ell(x_t) \rVert} \Bigr), $$
#
# with $\ell$ the cross-entropy of the true class, $\eta$ the step and $\Pi$ the projection. An attack that succeeds is a proof
# of weakness; an attack that fails proves nothing.

# %%
def pixels_and_labels(train):
    images = stage3.open_images("digits", None, train, size=8, channels=1)
    return images.pixels.float() / images.levels, images.labels


def train_mlp(sigma, epochs=40, seed=0):
    """A two-layer network, trained on x + sigma N(0, I)."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(train_x)).split(128):
            x = train_x[batch] + sigma * torch.randn_like(train_x[batch])
            loss = F.cross_entropy(network(x), train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def attack(classifier, x, y, size, steps=30):
    """Projected gradient ascent on the cross-entropy, within an l2 ball."""
    moved = x.clone()
    for _ in range(steps):
        moved.requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(classifier(moved), y, reduction="sum"), moved)
        length = gradient.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
        delta = moved.detach() + size / 5 * gradient / length - x
        delta = delta * (size / delta.flatten(1).norm(dim=1).clamp(min=1e-12)).clamp(max=1).view(-1, 1, 1, 1)
        moved = x + delta
    return moved


train_x, train_y = pixels_and_labels(train=True)
test_x, test_y = (part[::3] for part in pixels_and_labels(train=False))    # those that `certify.py --sigma 0.25` certifies
brittle = train_mlp(sigma=0.0)
sizes = np.linspace(0, 1.5, 16)
attacked = [attack(brittle, test_x, test_y, float(size)) for size in sizes]
survives = np.array([(brittle(x).argmax(1) == test_y).numpy() for x in attacked])
survives = np.minimum.accumulate(survives, axis=0).mean(axis=1)       # beaten within a small ball: beaten within a larger one
print(f"clean accuracy {survives[0]:.1%}; under attacks of size {sizes[5]:.1f}: {survives[5]:.1%}, of size {sizes[10]:.1f}: "
      f"{survives[10]:.1%}")
longest = max((x - test_x).flatten(1).norm(dim=1).max().item() - size for x, size in zip(attacked, sizes, strict=True))
assert longest < 1e-5 and survives[0] > 0.9 and survives[-1] < 0.1

# %%
size = 0.6
moved = attack(brittle, test_x, test_y, size)
fooled = ((brittle(moved).argmax(1) != test_y) & (brittle(test_x).argmax(1) == test_y)).nonzero()[:5, 0]
figure, axes = plt.subplots(2, 5, figsize=(7.5, 3.5))
for column, i in enumerate(fooled):
    for row, x in enumerate((test_x, moved)):
        axis = axes[row, column]
        axis.imshow(x[i, 0].detach(), cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[], title=f"f says {brittle(x[i:i + 1]).argmax().item()}")
axes[0, 0].set_ylabel("image x")
axes[1, 0].set_ylabel(rf"$x + \delta$, $\|\delta\| \leq {size}$")
plt.show()

# %% [markdown]
# ## The smoothed classifier
#
# The base classifier is consulted not about $x$ but about a cloud of noisy copies of it, and the majority decides:
#
# $$ g(x) = \arg\max_{c}\; p_c(x), \qquad p_c(x) = \Pr_{e \sim \mathcal N(0, \sigma^2 I)}[f(x + e) = c]. \tag{1} $$
#
# Here $g(x)$ is the answer, $p_c(x)$ the share of class $c$ among the noisy copies, $\sigma$ the only parameter. Why should
# this help? Because $p_c$ is an average of the indicator of $\{f = c\}$ over a whole neighbourhood,
# $p_c(x) = \int \mathbb 1[f(z) = c]\, \phi_\sigma(z - x)\, dz$ with $\phi_\sigma$ the density of the noise. The image enters
# only through the smooth weight $\phi_\sigma(z - x)$: however wildly $f$ jumps, $p_c$ cannot. It is the solution of the heat
# equation at time $\sigma^2 / 2$ with the decision region as initial temperature.
#
# In the scripts, the counts over noisy copies, whose largest is the answer, come from `count_under_noise`. Where many
# images are certified, `count_classes` counts for all of them at once: their copies share batches, and the noise is
# `GaussianNoise`, from the same random numbers.

# %%
show(count_under_noise, GaussianNoise, count_classes)


# %% [markdown]
# **Check.** In one dimension, let $f$ answer class 1 on the interval $[-1, 2]$ and class 0 elsewhere. Then
# $p_1(x) = \Phi((2 - x)/\sigma) - \Phi((-1 - x)/\sigma)$, and the counts have to agree with it, up to the standard deviation
# of a binomial count; and both ways to count have to agree to the last copy.

# %%
def interval(z):
    z = z.flatten(1)
    return torch.cat([torch.zeros_like(z), 0.5 - (z - 0.5).abs() + 1], dim=1)             # positive on [-1, 2]


sigma, n = 0.8, 20_000
for position in (-1.5, -0.5, 0.0, 1.9):
    x = torch.full((1, 1, 1), position)
    counts = count_under_noise(interval, x, sigma, n, generator_for(0, 0, 1, "cpu"), batch=1000)
    requests = [(x, generator_for(0, 0, 1, "cpu"), n)]
    assert torch.equal(counts, count_classes(interval, requests, GaussianNoise(sigma), batch=1000)[0])
    exact = norm.cdf((2 - position) / sigma) - norm.cdf((-1 - position) / sigma)
    print(f"x = {position:4.1f}: counted {counts[1] / n:.4f}, exact {exact:.4f}")
    assert abs(counts[1] / n - exact) < 4 * np.sqrt(exact * (1 - exact) / n)


# %% [markdown]
# ## The picture in two dimensions
#
# Images of two pixels can be drawn. The base classifier below has three classes with ragged boundaries and little islands of
# wrong answers, such as attacks on real networks find. Its left panel shows $f$ with the noisy copies of one point; the right
# panel shows $g$. The ragged boundary has become smooth and the islands have drowned: each is too small to win a majority
# anywhere. The circles have the radius that the theorem below proves.
#
# On a grid, $p_c$ is the indicator of $\{f = c\}$ convolved with a Gaussian, so `scipy` computes it without drawing a single
# random number. That is the independent check of the Monte Carlo counts, and of the circles: inside each, $g$ has to be
# constant.

# %%
def ragged(z):
    """Three classes in the plane (B, 1, 1, 2) -> logits: the nearest of three anchors, after a ripple, with islands."""
    z = z.flatten(1).double()
    u = z + 0.13 * torch.sin(9 * z.flip(1)) + 0.07 * torch.cos(23 * z)
    anchors = torch.tensor([[-1.0, -0.6], [1.0, -0.6], [0.0, 1.1]], dtype=torch.float64)
    islands = (torch.sin(7 * z[:, 0] + 1) * torch.sin(7 * z[:, 1]) > 0.9).long()
    return F.one_hot((torch.cdist(u, anchors).argmin(1) + islands) % 3, 3).float()


sigma, step = 0.35, 0.01
line = np.arange(-4, 4 + step / 2, step)
plane = torch.from_numpy(np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 1, 1, 2))
base = ragged(plane).numpy().reshape(len(line), len(line), 3)         # rows are the second coordinate
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
    counts = count_under_noise(ragged, x, sigma, n, generator_for(0, index, 1, "cpu"), batch=1000).numpy()
    assert np.all(np.abs(counts / n - share) < 4 * np.sqrt(share * (1 - share) / n) + 0.002)        # two ways to compute p_c
    radius = certified_radius(share[top], sigma, np.sort(share)[-2])
    inside = np.hypot(line[None] - point[0], line[:, None] - point[1]) < radius
    assert np.all(g_map[inside] == top)                                                   # what the theorem promises
    discs.append((point, top, radius))
    print(f"x = {point}: p = {np.round(share, 3)}, g says {top} within {radius:.3f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 4.1), sharey=True)
tints = plt.matplotlib.colors.ListedColormap(["#a6cfe6", "#f3c5a3", "#a3dccb"])
window = slice(int((4 - 2) / step), int((4 + 2) / step) + 1)
titles = "base classifier f", f"smoothed classifier g, $\\sigma$ = {sigma}"
for axis, regions, title in zip(axes, (f_map, g_map), titles, strict=True):
    axis.imshow(regions[window, window], origin="lower", extent=(-2, 2, -2, 2), cmap=tints, vmin=0, vmax=2, aspect="equal",
                interpolation="nearest")
    axis.set(xlabel="first pixel", title=title, xlim=(-2, 2), ylim=(-2, 2), xticks=range(-2, 3), yticks=range(-2, 3))
    axis.grid(False)
axes[0].set_ylabel("second pixel")
cloud = np.array(points[3]) + sigma * np.random.default_rng(0).normal(size=(300, 2))
axes[0].plot(*cloud.T, ".", color="0.15", markersize=3, label="x + e, 300 draws")
axes[0].plot(*points[3], "o", color="white", markeredgecolor="black", markersize=7, label="x")
axes[0].legend(loc="lower right", framealpha=1)
for point, _, radius in discs:
    axes[1].add_patch(plt.Circle(point, radius, fill=False, color="black", linewidth=1.5))
    axes[1].plot(*point, "o", color="white", markeredgecolor="black", markersize=5)
plt.show()

# %% [markdown]
# ## How different can two noisy images look? The likelihood ratio
#
# Let the adversary move $x$ to $x + \delta$. The noisy copies then come from $P_1 = \mathcal N(x + \delta, \sigma^2 I)$
# instead of $P_0 = \mathcal N(x, \sigma^2 I)$. How much more likely a point $z$ has become is the *likelihood ratio*
#
# $$ \Lambda(z) = \frac{dP_1}{dP_0}(z) = \exp\Bigl( \frac{\langle \delta, z - x\rangle}{\sigma^2} -
#    \frac{\lVert\delta\rVert^2}{2\sigma^2} \Bigr), \tag{2} $$
#
# where $\langle\cdot,\cdot\rangle$ is the inner product of $\mathbb R^d$.
#
# *Proof.* Both densities have the same constant, so the logarithm of the ratio is
# $\bigl(\lVert z - x\rVert^2 - \lVert z - x - \delta\rVert^2\bigr) / 2\sigma^2$, and
# $\lVert z - x - \delta\rVert^2 = \lVert z - x\rVert^2 - 2\langle\delta, z - x\rangle + \lVert\delta\rVert^2$. $\square$
#
# So in a space of a hundred thousand dimensions only *one* matters: $\Lambda$ is an increasing function of the projection
# $\langle\delta, z - x\rangle$, constant on the hyperplanes orthogonal to $\delta$. The sets $\{\Lambda \le t\}$ are
# half-spaces. This is special to Gaussian noise, and the reason why the theorem speaks of Euclidean length.
#
# This formula is a tool of the proof; no script evaluates it. **Check:** against the two densities of `scipy`, and by the
# change of measure that defines a ratio, $P_1(A) = \mathbb E_{P_0}[\Lambda\, \mathbb 1_A]$, for an odd-shaped set $A$.

# %%
random = np.random.default_rng(1)
d, sigma = 6, 0.7
x, delta = random.normal(size=d), 0.4 * random.normal(size=d)


def log_ratio(z):
    return (z - x) @ delta / sigma**2 - delta @ delta / (2 * sigma**2)


z0 = x + sigma * random.normal(size=(200_000, d))                      # from P0
z1 = x + delta + sigma * random.normal(size=(200_000, d))              # from P1
densities = [multivariate_normal(mean, sigma**2 * np.eye(d)) for mean in (x, x + delta)]
assert np.allclose(log_ratio(z0), densities[1].logpdf(z0) - densities[0].logpdf(z0))
odd = lambda z: (np.sin(3 * z).sum(axis=1) > 0.3) & (z[:, 0] * z[:, 1] < 0.5)
weighted, direct = np.exp(log_ratio(z0)) * odd(z0), odd(z1)
print(f"P1(A) by weighting draws of P0: {weighted.mean():.4f}, by drawing from P1: {direct.mean():.4f}")
assert abs(weighted.mean() - direct.mean()) < 4 * np.hypot(weighted.std(), direct.std()) / np.sqrt(len(z0))

# %% [markdown]
# ## The worst case is a half-space: the lemma of Neyman and Pearson
#
# All we know about $f$ is a number: class $A$ gets at least the share $p_A$ of the noisy copies of $x$. Among *all*
# classifiers with this property, which one loses class $A$ fastest when $x$ moves to $x + \delta$? It is the same question as:
# which test of "$P_0$ against $P_1$" is the most powerful at a given level? Neyman and Pearson answered it in 1933.
#
# **Lemma.** Let $h : \mathbb R^d \to [0, 1]$ be measurable, and let $H = \{ z : \Lambda(z) \le t \}$ for some $t > 0$.
#
# $$ \text{If } \int h \, dP_0 \ge P_0(H), \text{ then } \int h \, dP_1 \ge P_1(H). \tag{3} $$
#
# *Proof.* Since $dP_1 = \Lambda\, dP_0$,
#
# $$ \int h\, dP_1 - P_1(H) = \int (h - \mathbb 1_H)\, \Lambda \, dP_0
#    = \int (h - \mathbb 1_H)(\Lambda - t)\, dP_0 \;+\; t \Bigl( \int h \, dP_0 - P_0(H) \Bigr). $$
#
# The second term is non-negative by assumption. So is the first, because its integrand is, everywhere: on $H$ both factors are
# $\le 0$ (there $h \le 1$ and $\Lambda \le t$), and off $H$ both are $\ge 0$ (there $h \ge 0$ and $\Lambda > t$). $\square$
#
# In words: to give away as little as possible of $P_1$ while holding a fixed share of $P_0$, take the points where $P_1$ is
# cheapest in terms of $P_0$. With $h' = 1 - h$ and $H' = \{\Lambda > t\}$ the lemma turns around: if
# $\int h'\,dP_0 \le P_0(H')$, then $\int h'\,dP_1 \le P_1(H')$.
#
# **Check.** Forget the proof, and ask a solver. On a grid of cells in the plane, with masses $P_0$ and $P_1$, minimise
# $\sum_i h_i P_1(i)$ over $0 \le h_i \le 1$ with $\sum_i h_i P_0(i) \ge p_A$. That is a linear programme with 3600 unknowns;
# its solution, found by a method that knows nothing of likelihood ratios, must be a half-space, and its value that of $H$.

# %%
cells, p_a, shift = np.linspace(-4, 4, 61), 0.8, np.array([0.8, 0.5])                     # sigma = 1, x = 0
middle = (cells[1:] + cells[:-1]) / 2
mass = lambda centre: np.outer(*(np.diff(norm.cdf(cells - c)) for c in centre[::-1]))     # rows: second coordinate
P0, P1 = mass((0, 0)), mass(shift)
P0, P1 = P0 / P0.sum(), P1 / P1.sum()
solution = linprog(P1.ravel(), A_ub=-P0.ravel()[None], b_ub=[-p_a], bounds=(0, 1))
h = solution.x.reshape(P0.shape)

order = np.argsort((P1 / P0).ravel())                                  # Neyman and Pearson: cheapest cells first
share = np.clip((p_a - np.concatenate([[0], P0.ravel()[order].cumsum()[:-1]])) / P0.ravel()[order], 0, 1)
greedy = share @ P1.ravel()[order]
continuous = norm.cdf(norm.ppf(p_a) - np.linalg.norm(shift))
print(f"least P1 share: linear programme {solution.fun:.5f}, half-space of cells {greedy:.5f}, of the plane {continuous:.5f}")
assert abs(solution.fun - greedy) < 1e-7 and abs(solution.fun - continuous) < 1e-3

figure, axis = plt.subplots(figsize=(4.6, 4.3))
picture = axis.imshow(h, origin="lower", extent=(-4, 4, -4, 4), cmap=plt.matplotlib.colors.LinearSegmentedColormap.from_list(
    "", ["white", "#7fb8da"]), vmin=0, vmax=1)
along = np.linspace(-4, 4, 2)
axis.plot(along, (norm.ppf(p_a) * np.linalg.norm(shift) - shift[0] * along) / shift[1], color=RED,
          label=r"$\langle\delta, z-x\rangle = \|\delta\|\,\Phi^{-1}(p_A)$")
for centre, colour, name, side in (((0, 0), "black", "$x$", "right"), (shift, RED, r"$x+\delta$", "left")):
    axis.plot(*centre, "o", color=colour)
    axis.text(centre[0] + (0.2 if side == "left" else -0.2), centre[1] + 0.1, name, ha=side)
    axis.add_patch(plt.Circle(centre, 1, fill=False, color=colour, linestyle=":"))
axis.set(xlim=(-3.3, 3.3), ylim=(-3.3, 3.3), xlabel="first pixel ($\\sigma$)", ylabel="second pixel ($\\sigma$)",
         title="worst region A, by linear programming")
axis.grid(False)
axis.legend(loc="lower left", framealpha=1)
plt.colorbar(picture, label="h: share of the cell in A", shrink=0.85)
plt.show()

# %% [markdown]
# ## Both bounds
#
# It remains to measure half-spaces. Under $P_0$ the projection $\langle \delta, z - x\rangle$ is distributed as
# $\sigma \lVert\delta\rVert\, \mathcal N(0, 1)$; under $P_1$ its mean is $\lVert\delta\rVert^2$ instead. Choose
# $H_A = \{\langle\delta, z - x\rangle \le \sigma \lVert\delta\rVert\, \Phi^{-1}(p_A)\}$, so that $P_0(H_A) = p_A$. Then
#
# $$ P_1(H_A) = \Pr\bigl[\lVert\delta\rVert^2 + \sigma \lVert\delta\rVert\, \xi \le
#    \sigma\lVert\delta\rVert\,\Phi^{-1}(p_A)\bigr] = \Phi\bigl(\Phi^{-1}(p_A) - \lVert\delta\rVert/\sigma\bigr),
#    \qquad \xi \sim \mathcal N(0, 1). $$
#
# The lemma with $h = \mathbb 1[f = A]$, and its reverse with $h' = \mathbb 1[f = c]$ and the opposite half-space
# $H_B = \{\langle\delta, z - x\rangle \ge \sigma\lVert\delta\rVert\,\Phi^{-1}(1 - p_B)\}$, where $P_0(H_B) = p_B$, give both
# bounds:
#
# $$ p_A(x) \ge p_A \;\Rightarrow\; p_A(x + \delta) \ge \Phi\bigl(\Phi^{-1}(p_A) - \lVert\delta\rVert/\sigma\bigr), \qquad
#    p_c(x) \le p_B \;\Rightarrow\; p_c(x + \delta) \le \Phi\bigl(\Phi^{-1}(p_B) + \lVert\delta\rVert/\sigma\bigr). \tag{4} $$
#
# On the scale of $\Phi^{-1}$ the statement is simple: *a step of length $\lVert\delta\rVert$ changes $\Phi^{-1}(p_c)$ by at
# most $\lVert\delta\rVert / \sigma$*. The function $\sigma\,\Phi^{-1}(p_c(x))$ is 1-Lipschitz, whatever $f$ is.
#
# **Check.** Regions whose shares are known in closed form: balls (a non-central $\chi^2$ distribution), slabs, complements of
# balls, and half-spaces. For each, $p_A(x)$ and $p_A(x + \delta)$ are computed exactly; every point must lie between the two
# curves, and half-spaces orthogonal to $\delta$ on them.

# %%
d, step = 10, 1.0                                                     # sigma = 1, |delta| = 1, along the first axis
p0 = np.linspace(0.001, 0.999, 400)
lower, upper = norm.cdf(norm.ppf(p0) - step), norm.cdf(norm.ppf(p0) + step)

regions = {"balls": [], "complements of balls": [], "slabs": []}
for centre in (-4.0, -1.0, 0.0, 2.0, 5.0):                             # of the region, along delta, from x
    for size in np.linspace(0.5, 8, 16):
        ball = [ncx2.cdf(size**2, d, (centre - a)**2) if centre != a else chi2.cdf(size**2, d) for a in (0, step)]
        regions["balls"].append(ball)
        regions["complements of balls"].append([1 - share for share in ball])
        regions["slabs"].append([norm.cdf(centre + size / 2 - a) - norm.cdf(centre - size / 2 - a) for a in (0, step)])

figure, axis = plt.subplots(figsize=(7.2, 4.2))
axis.fill_between(p0, lower, upper, color="0.9", label="what (4) allows")
for (name, values), colour, mark in zip(regions.items(), (BLUE, GREEN, PINK), "osv", strict=True):
    before, after = np.array(values).T
    inside = (before > 1e-6) & (before < 1 - 1e-6)
    gap = norm.ppf(after[inside]) - norm.ppf(before[inside])
    assert np.all(np.abs(gap) <= step + 1e-6)
    axis.plot(before, after, mark, color=colour, markersize=4, label=name)
for name, curve, style in (("half-space, moving out of it", lower, "-"), ("half-space, moving into it", upper, "--")):
    axis.plot(p0, curve, style, color=RED, label=name)
axis.set(xlabel="share of the region at $x$", ylabel=r"share of the region at $x + \delta$, $\|\delta\| = \sigma$",
         xlim=(0, 1), ylim=(0, 1))
axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
plt.show()

# %% [markdown]
# ## The radius
#
# Let $A$ be the top class, $p_A \le p_A(x)$ a lower bound of its share, and $p_B \ge p_c(x)$ an upper bound of every other
# class's. Then $g(x + \delta) = A$ as soon as the lower bound in (4) exceeds the upper one, that is
# $\Phi^{-1}(p_A) - \lVert\delta\rVert/\sigma > \Phi^{-1}(p_B) + \lVert\delta\rVert/\sigma$, since $\Phi$ is strictly
# increasing. Solved for the length:
#
# $$ g(x + \delta) = A \quad\text{for every}\quad \lVert\delta\rVert < R = \frac{\sigma}{2}\bigl(\Phi^{-1}(p_A) -
#    \Phi^{-1}(p_B)\bigr). \tag{5} $$
#
# All other classes *together* have at most the share $1 - p_A$, so $p_B = 1 - p_A$ is always a valid choice, and as
# $\Phi^{-1}(1 - p) = -\Phi^{-1}(p)$, it leaves
#
# $$ R = \sigma\, \Phi^{-1}(p_A), \qquad\text{positive when } p_A > \tfrac12. \tag{6} $$
#
# This is what is used in practice: one share has to be bounded, not $K$. For many classes it gives something away: where the
# rest is spread thinly, the true $p_B$ is far below $1 - p_A$. In practice, the rest sits mostly in one class when it matters.

# %%
show(certified_radius)


# %% [markdown]
# **Check.** Solve the defining equation numerically: the length at which the two bounds of (4) meet.

# %%
def margin(length, p_a, p_b, sigma):
    return norm.cdf(norm.ppf(p_a) - length / sigma) - norm.cdf(norm.ppf(p_b) + length / sigma)


for p_a, p_b, sigma in ((0.9, 0.1, 0.25), (0.6, 0.3, 0.5), (0.45, 0.2, 1.0), (0.999, 0.0005, 0.12)):
    meet = brentq(margin, 0, 10 * sigma, args=(p_a, p_b, sigma), xtol=1e-12)
    assert abs(meet - certified_radius(p_a, sigma, p_b)) < 1e-9
    assert certified_radius(p_a, sigma) <= certified_radius(p_a, sigma, p_b) + 1e-12      # p_b = 1 - p_a claims no more
    print(f"p_A = {p_a}, p_B = {p_b}, sigma = {sigma}: R = {meet:.4f}; with p_B = 1 - p_A: {certified_radius(p_a, sigma):.4f}")

figure, axis = plt.subplots(figsize=(5.4, 3.6))
p = np.linspace(0.1, 0.9999, 500)
for share, colour, style in ((1, BLUE, "-"), (2, RED, "--"), (9, GREEN, ":")):
    name = "$p_B = 1 - p_A$" if share == 1 else f"$p_B = (1 - p_A) / {share}$"
    axis.plot(p, [certified_radius(a, 1.0, (1 - a) / share) for a in p], style, color=colour, label=name)
axis.set(xlabel="share $p_A$ of the top class", ylabel=r"radius $R$ ($\sigma$)", ylim=(0, 4), xlim=(0.1, 1))
axis.legend()
plt.show()


# %% [markdown]
# ## Tightness: nobody can prove more
#
# Could a cleverer argument give a larger $R$ from the same two numbers? No: for every $p_A \ge p_B > 0$ with $p_A + p_B \le 1$
# there is a classifier that fits them and changes its answer immediately beyond $R$, if it may answer enough classes: two
# where $p_B = 1 - p_A$, else $2 + \lceil (1 - p_A - p_B) / p_B \rceil$.
#
# *Proof.* Take a unit vector $u$ and let $f$ answer $A$ where $\langle u, z - x\rangle \le \sigma\Phi^{-1}(p_A)$ and $B$ where
# $\langle u, z - x \rangle \ge \sigma\Phi^{-1}(1 - p_B)$. The half-spaces are disjoint since $p_A \le 1 - p_B$; the strip
# between them is cut into slices, one class each, of share at most $p_B$ at $x$. At $x + r u$ both inequalities of (4) are
# equalities, for $A$ and for $B$ at once: $p_A(x + ru) = \Phi(\Phi^{-1}(p_A) - r/\sigma)$ and
# $p_B(x + ru) = \Phi(\Phi^{-1}(p_B) + r/\sigma)$. For $r > R$ the second is the larger one, so $g(x + ru) \ne A$. $\square$
#
# Whoever wants larger radii has to know more about $f$ than its shares at $x$ (its gradient, or what it does under other
# noise), or has to train an $f$ with a larger $p_A$. The latter is the business of notebooks 3 and 4.
#
# **Check.** Build that classifier, compute the shares of all its classes exactly along $u$, and find where the winner changes.

# %%
def shares_along(p_a, p_b, r, sigma):
    """Shares of A, the slices, B, for the classifier of the proof, at x + r u."""
    slices = max(1, int(np.ceil((1 - p_a - p_b) / p_b - 1e-9)))
    edges = np.concatenate([[-np.inf], sigma * norm.ppf(np.linspace(p_a, 1 - p_b, slices + 1)), [np.inf]])
    return np.diff(norm.cdf((edges[:, None] - r) / sigma), axis=0)


p_a, p_b, sigma = 0.55, 0.2, 0.5
r = np.linspace(0, 0.8, 8001)
shares = shares_along(p_a, p_b, r, sigma)
R = certified_radius(p_a, sigma, p_b)
assert np.allclose(shares.sum(axis=0), 1) and np.isclose(shares[0, 0], p_a) and np.all(shares[1:, 0] <= p_b + 1e-9)
changes = r[(shares.argmax(axis=0) != 0).argmax()]
print(f"R = {R:.4f}; the answer changes at {changes:.4f}")
assert R <= changes < R + 2e-4

figure, axis = plt.subplots(figsize=(5.4, 3.6))
axis.plot(r, shares[0], color=BLUE, label="A")
axis.plot(r, shares[-1], color=RED, linestyle="--", label="B")
for number, row in enumerate(shares[1:-1]):
    axis.plot(r, row, color="0.55", linestyle=":", label="the strip's classes" if number == 0 else None)
axis.axvline(R, color="black", linewidth=1)
axis.text(R + 0.01, 0.02, "R of (5)")
axis.set(xlabel="way $r$ along $u$ (pixels in [0, 1])", ylabel="share of the noisy copies", ylim=(0, 0.7), xlim=(0, 0.8))
axis.legend()
plt.show()

# %% [markdown]
# ## The linear classifier: the exact case
#
# With two classes and a linear $f$, $f(z) = A$ where $\langle w, z\rangle + b > 0$, the half-space is not the worst case but
# the fact. The distance of $x$ from the plane is $D = (\langle w, x\rangle + b) / \lVert w\rVert$, and
#
# $$ p_A(x) = \Pr\bigl[\langle w, x\rangle + b + \sigma\lVert w\rVert\,\xi > 0\bigr] = \Phi(D / \sigma)
#    \quad\Rightarrow\quad R = \sigma\,\Phi^{-1}(p_A(x)) = D. \tag{7} $$
#
# The radius is the distance, for *every* $\sigma$: nothing is lost, and nothing depends on the dimension. It makes the linear
# classifier the best test of a certification procedure: the truth is known, to the last digit. The whole procedure, sampling
# and confidence bound included (notebook 2), is `certify`, which counts by `count_under_noise`:

# %%
show(certify)

# %% [markdown]
# **Check.** A random plane in $3 \times 8 \times 8$ dimensions; what `certify` claims must stay below the distance, and come
# close to it. That it remains a little below is the price of a finite number of draws, and grows with $\sigma$ as long as
# $p_A$ is away from 1.

# %%
torch.manual_seed(0)
w = torch.randn(3 * 8 * 8)
x = torch.rand(3, 8, 8)
distance = 0.4
b = distance * w.norm() - w @ x.flatten()


def linear(z):
    return torch.stack([torch.zeros(len(z)), z.flatten(1) @ w + b], dim=1)


for sigma in (0.15, 0.25, 0.5, 1.0):
    p_exact = norm.cdf(distance / sigma)
    prediction, radius = certify(linear, x, sigma, n0=100, n=20_000, alpha=0.001, batch=1000)
    print(f"sigma = {sigma:4}: exact radius {certified_radius(p_exact, sigma):.4f}, certified from 20 000 draws {radius:.4f}")
    assert abs(certified_radius(p_exact, sigma) - distance) < 1e-6
    assert prediction == 1 and 0.85 * distance < radius < distance

# %% [markdown]
# ## Why $\sigma$ trades accuracy for radius
#
# Formula (6) has $\sigma$ as a factor, so why not choose $\sigma = 100$? And if linear classifiers get their distance at any
# $\sigma$, why not $\sigma = 0.001$? Three answers, each an inequality.
#
# **(a) Large $\sigma$: classes drown.** Let $x$ and $x'$ have different true classes $a \ne b$ and distance
# $D = \lVert x - x'\rVert$. By (4), $p_b(x') \le 1 - p_a(x') \le 1 - \Phi(\Phi^{-1}(p_a(x)) - D/\sigma)$, which says
#
# $$ \sigma\,\Phi^{-1}(p_a(x)) + \sigma\,\Phi^{-1}(p_b(x')) \le D, \qquad\qquad
#    \tfrac12\bigl(p_a(x) + p_b(x')\bigr) \le \Phi\Bigl(\frac{D}{2\sigma}\Bigr). \tag{8} $$
#
# The second inequality holds as $p_a(x) + p_b(x') \le 1 + \sup_S |P_0(S) - P_1(S)|$, and by the lemma the supremum is attained
# by a half-space midway, where it is $2\Phi(D/2\sigma) - 1$. The first one says that the two radii share the distance between
# the images, at any $\sigma$: enlarging $\sigma$ cannot push them beyond $D$. The second one says what it does instead: no
# network, however large, tells the two noisy images apart more often than $\Phi(D/2\sigma)$. As $\sigma$ grows, this falls to
# one half, for the closest pairs first.
#
# **Check** on the digits: the linear classifier midway between two images attains both. We take each test image and its
# nearest training image of another class.

# %%
distances = torch.cdist(test_x.flatten(1), train_x.flatten(1))
distances[test_y[:, None] == train_y[None]] = torch.inf
nearest = distances.min(dim=1).values.double().numpy()
sigmas = np.geomspace(0.05, 4, 60)
bound = norm.cdf(nearest[:, None] / (2 * sigmas))                     # (8), one row per image

i = int(nearest.argmin())
x, other = test_x[i].flatten().double(), train_x[distances[i].argmin()].flatten().double()
u = (other - x) / (other - x).norm()
for sigma in (0.25, 1.0):
    noise = sigma * torch.randn(100_000, 64, dtype=torch.float64)
    right = [((z + noise - (x + other) / 2) @ u * sign > 0).double().mean().item() for z, sign in ((x, -1), (other, 1))]
    limit = norm.cdf(nearest[i] / (2 * sigma))
    assert abs(np.mean(right) - limit) < 0.006
    assert abs(sigma * norm.ppf(right).sum() - nearest[i]) < 0.03
    print(f"closest pair, D = {nearest[i]:.2f}, sigma = {sigma}: midway plane right on {np.mean(right):.4f}, limit {limit:.4f}")

figure, axis = plt.subplots(figsize=(5.4, 3.6))
for quantile, colour, style, name in ((0, RED, "--", "closest"), (0.5, BLUE, "-", "median"), (1, GREEN, ":", "farthest")):
    axis.semilogx(sigmas, 100 * np.quantile(bound, quantile, axis=0), style, color=colour, label=f"{name} pair")
axis.set(xlabel=r"noise $\sigma$ (pixels in [0, 1])", ylabel="best possible accuracy under noise (%)", ylim=(50, 101),
         xticks=[0.05, 0.1, 0.25, 0.5, 1, 2, 4], xticklabels=["0.05", "0.1", "0.25", "0.5", "1", "2", "4"])
axis.minorticks_off()
axis.legend()
plt.show()

# %% [markdown]
# **(b) Large $\sigma$ in high dimension: regions are left.** A noisy copy is not near $x$: its distance concentrates around
# $\sigma\sqrt d$. If the region of class $A$ is a ball of radius $\rho$ around $x$, then
#
# $$ p_A(x) = \Pr[\lVert e\rVert \le \rho] = F_{\chi^2_d}(\rho^2/\sigma^2),
#    \qquad R(\sigma) = \sigma\,\Phi^{-1}\bigl(F_{\chi^2_d}(\rho^2/\sigma^2)\bigr), \tag{9} $$
#
# with $F_{\chi^2_d}$ the distribution function of $\chi^2$ with $d$ degrees of freedom. The ball is lost once
# $\sigma > \rho/\sqrt d$, roughly: half of the copies are then outside. Before, $R$ is nearly as large as $\rho$ only for
# $\sigma \ll \rho / \sqrt d$.
#
# **(c) Small $\sigma$: the cap of finitely many draws.** From $n$ draws at error $\alpha$ no share above $\alpha^{1/n}$ can be
# proven (notebook 2), so that $R \le \sigma\,\Phi^{-1}(\alpha^{1/n})$: about $3.8\,\sigma$ for $n = 100\,000$,
# $\alpha = 0.001$. A small $\sigma$ proves small radii only. Also, a small $\sigma$ does not smooth away the small-scale
# brittleness that was our problem.
#
# (b) and (c) together leave a best $\sigma$ in between, drawn below for balls in several dimensions. (On the left, curves
# begin where floats can tell $p_A$ from 1.)
#
# **Check** of (9) by drawing the noise.

# %%
cap = norm.ppf(0.001 ** (1 / 100_000))
random = np.random.default_rng(2)
for d, scaled in ((64, 0.8), (64, 1.0), (3072, 0.98)):
    sigma = scaled / np.sqrt(d)                                       # rho = 1
    drawn = np.mean((sigma * random.standard_normal((4000, d)) ** 2 * sigma).sum(axis=1) <= 1)
    exact = chi2.cdf(1 / sigma**2, d)
    assert abs(drawn - exact) < 4 * np.sqrt(exact * (1 - exact) / 4000) + 1e-3
figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.6))
scaled = np.linspace(0.02, 1.3, 400)                                  # sigma sqrt(d) / rho
for d, colour, style in ((2, BLUE, "-"), (64, RED, "--"), (3072, GREEN, ":")):
    sigma = scaled / np.sqrt(d)
    exact = np.clip(-sigma * norm.ppf(chi2.sf(1 / sigma**2, d)), 0, None)
    finite = np.minimum(exact, sigma * cap)
    assert 0 < finite.argmax() < len(scaled) - 1                      # the best sigma lies in between
    axes[0].plot(scaled, np.where(np.isfinite(exact), exact, np.nan), style, color=colour, label=f"d = {d}")
    axes[1].plot(scaled, finite, style, color=colour, label=f"d = {d}")
for axis, title in zip(axes, ("exact shares", "provable with 100 000 draws"), strict=True):
    axis.set(xlabel=r"$\sigma \sqrt{d}\, /\, \rho$", ylabel=r"radius $R / \rho$", ylim=(0, 1.02), title=title)
axes[0].legend()
plt.show()


# %% [markdown]
# **On the digits.** The same small network, trained on four noise levels and certified at each. Every curve is the share of
# test images that are answered rightly *and* certified beyond the radius. From $\sigma = 0.12$ to $0.5$ each curve starts
# lower and reaches farther than the one before: the trade. At $\sigma = 1$ the trade is over. The classes drown, shares
# stay near one half, and the radii shrink as well: (8) and (9) at work. (The draws are few here, 2000 per image, so that
# the cell takes seconds; `certify_all` does what `certify` does, for many images at once.)

# %%
def certified_curve(network, sigma, radii, n=2000):
    trials = certify_all(network, list(enumerate(test_x)), GaussianNoise(sigma), 100, FixedN(n, 0.001), batch=2000)
    results = {trial.index: trial.certificate(sigma) for trial in trials}
    found = np.array([results[i][1] if results[i][0] == test_y[i] else -1 for i in range(len(test_x))])
    return np.array([(found >= r).mean() for r in radii]), found.max()


radii, curves, reach = np.linspace(0, 1.2, 121), {}, []
for sigma in (0.12, 0.25, 0.5, 1.0):
    curves[sigma], largest = certified_curve(train_mlp(sigma), sigma, radii)
    reach.append(largest)
    assert largest <= sigma * norm.ppf(0.001 ** (1 / 2000))           # (c)
    print(f"sigma = {sigma:4}: {curves[sigma][0]:.1%} at radius 0, largest radius {largest:.2f}")
assert reach[0] < reach[1] < reach[2] > reach[3] and curves[0.12][0] > curves[0.5][0] > curves[1.0][0]
figure, axis = plt.subplots(figsize=(5.8, 3.8))
for (sigma, curve), colour, style in zip(curves.items(), (BLUE, RED, GREEN, PINK), ("-", "--", "-.", ":"), strict=True):
    axis.plot(radii, 100 * curve, style, color=colour, label=rf"$\sigma$ = {sigma}")
axis.set(xlabel=r"certified $\ell_2$ radius (pixels in [0, 1])", ylabel="certified accuracy (%)", ylim=(0, 101), xlim=(0, 1.1))
axis.legend()
plt.show()

# %% [markdown]
# ## Back to the attack
#
# The repository's own classifier is a small vision transformer, pre-trained to denoise. Its checkpoint and its certificates
# were made by
#
# ```sh
# python pretrain.py && python finetune.py --sigma 0.25 && python certify.py --sigma 0.25
# ```
#
# and lie in `results/digits/`. The two curves below say opposite things about two classifiers. For the brittle network the
# curve is an *upper* bound of its robustness, since a stronger attack may exist. For the smoothed transformer it is a *lower*
# bound: no attack, known or unknown, gets below it (up to the errors of sampling, which notebook 2 quantifies). The cell also
# certifies one image anew, with fewer draws, and must come to a radius close to the recorded one.

# %%
rows = stage3.read_rows(root / "results/digits/certify_sigma_0.25.tsv")
vit = stage3.rebuild(read_checkpoint(root / "results/digits/finetune_sigma_0.25.pt", "finetune"), "the checkpoint").eval()
row = max(rows, key=lambda row: row["radius"] if row["radius"] < 0.6 else 0)
assert row["label"] == test_y[row["idx"] // 3]
prediction, radius = certify(vit, test_x[row["idx"] // 3], 0.25, n=3000, index=row["idx"], batch=500)
print(f"test image {row['idx']}: recorded {row['predict']} within {row['radius']:.3f} ({row['n']} draws), "
      f"now {prediction} within {radius:.3f} (3000 draws)")
assert prediction == row["predict"] and abs(radius - row["radius"]) < 0.06
certified = [100 * np.mean([row["correct"] and row["radius"] >= size for row in rows]) for size in radii]
figure, axis = plt.subplots(figsize=(5.8, 3.8))
axis.plot(radii, certified, color=BLUE, label=r"g, transformer, $\sigma$ = 0.25: proven")
axis.plot(sizes, 100 * survives, "--", color=RED, label="brittle f: what one attack leaves")
axis.set(xlabel=r"size of the perturbation $\|\delta\|$ (pixels in [0, 1])", ylabel="accuracy (%)",
         ylim=(0, 101), xlim=(0, 1.5))
axis.legend()
plt.show()

# %% [markdown]
# ## Pixel scalings: what is $\sigma$ in other units?
#
# Papers and libraries disagree about what a pixel is: $[0, 1]$, $\{0, \dots, 255\}$, or standardised by a mean $m$ and a
# deviation $s$ per channel. Let $u = (x - m) / s$ with one $s$ for all pixels. Then $u + e_u$ with
# $e_u \sim \mathcal N(0, \sigma_u^2 I)$ is the image of $x + s\, e_u$, so
#
# $$ \sigma_x = s\, \sigma_u, \qquad R_x = s\, R_u, \qquad p_c \text{ unchanged}. \tag{10} $$
#
# Both lengths scale alike and their ratio stays. In units of $[0, 255]$ put $s = 1/255$: $\sigma = 0.25$ is $63.75$ grey
# levels. A radius without its unit means nothing.
#
# With *different* $s_j$ per channel, isotropic noise on $u$ is anisotropic on $x$, and what is certified there is an
# ellipsoid, $\sum_j \delta_j^2 / s_j^2 < R_u^2$; the largest ball in it has radius $R_u \min_j s_j$. To avoid all this, the
# networks here take images in $[0, 1]$ and normalise inside, in `Encoder.prepare`, *after* the noise was added: normalisation
# is part of $f$, and the theorem does not care what $f$ does.

# %%
show(Encoder.prepare)

# %% [markdown]
# **Check.** The same linear classifier, told once in $[0, 1]$ and once in $[0, 255]$ (which `certify` takes for a mistake
# unless told `any_range`), with the same random stream: the same counts, the radius multiplied by 255. Then three
# channels with different $s_j$: the point of the ellipsoid's surface that is nearest to its centre, over many directions,
# lies at $R_u \min_j s_j$.

# %%
x = torch.rand(3, 8, 8)
b = 0.3 * w.norm() - w @ x.flatten()
_, small = certify(linear, x, 0.25, n=5000, batch=1000)
_, large = certify(lambda z: linear(z / 255), 255 * x, 255 * 0.25, n=5000, batch=1000, any_range=True)
print(f"radius {small:.6f} in [0, 1], {large:.4f} in [0, 255], ratio {large / small:.3f}")
assert abs(large / small - 255) < 0.01

scale = np.array([0.2470, 0.2435, 0.2616])                             # CIFAR-10's channels
radius_u = 0.5
directions = np.random.default_rng(3).normal(size=(20_000, 3))
directions /= np.linalg.norm(directions, axis=1, keepdims=True)
edge = radius_u / np.linalg.norm(directions / scale, axis=1)           # how far until |delta / s| = R_u
print(f"distance to the ellipsoid's surface: {edge.min():.5f} to {edge.max():.5f}; R_u min s = {radius_u * scale.min():.5f}")
assert edge.min() >= radius_u * scale.min() and edge.min() < 1.001 * radius_u * scale.min()

# %% [markdown]
# ## Resizes: 32 → 224
#
# The paper's CIFAR-10 classifier enlarges the image from $32 \times 32$ to $224 \times 224$ before the transformer sees it.
# Where does the noise belong? Let $T$ be the enlargement, a linear map (bicubic interpolation). There are two smoothed
# classifiers:
#
# * *noise, then resize*: $\;\arg\max_c \Pr[f(T(x + e)) = c]$ with $e$ on the 32-pixel grid. Here $f \circ T$ is the base
#   classifier, and $R$ is a radius among $32 \times 32$ images. This is what is published, and what the code does: `prepare`
#   stands inside the network.
# * *resize, then noise*: $\;\arg\max_c \Pr[f(Tx + e') = c]$ with independent $e'$ on the 224-pixel grid. Its radius is about
#   $224 \times 224$ images. For the small ones it says
#
# $$ \lVert T\delta\rVert \le \lVert T\rVert\,\lVert\delta\rVert
#    \quad\Rightarrow\quad R_{32} \ge R_{224} / \lVert T\rVert, \tag{11} $$
#
# where $\lVert T\rVert$ is the largest singular value of $T$. Enlarging $k$ times copies, roughly, each pixel $k^2$ times, and
# so multiplies lengths of smooth perturbations by $k$: $\lVert T\rVert \approx 7$. Who adds noise after resizing and quotes
# $R_{224}$ as if it were a radius for CIFAR-10 overstates it sevenfold.
#
# **Check 1.** $T$ is separable, $T = M \otimes M$ with a $224 \times 32$ matrix $M$ that we read off `prepare` by enlarging
# striped images; $\lVert T\rVert = \lVert M\rVert^2$. Perturbations try the inequality.

# %%
prepare = build_vit("vit_digits", 2, image_size=224, patch_size=16, mean=(0.0,), std=(1.0,)).prepare
stripes = torch.eye(32, dtype=torch.float64)[:, None, :, None].expand(32, 1, 32, 32)      # the i-th row white
matrix = prepare(stripes.float())[:, 0, :, 0].double().T                                  # 224 x 32
singular = torch.linalg.svdvals(matrix)
image = torch.rand(1, 1, 32, 32)
assert torch.allclose(prepare(image)[0, 0].double(), matrix @ image[0, 0].double() @ matrix.T, atol=1e-4)     # separable
norm_t = (singular.max() ** 2).item()
smooth = gaussian_filter(np.random.default_rng(4).normal(size=(32, 32)), 3)
rough = np.indices((32, 32)).sum(axis=0) % 2 - 0.5
for name, delta in (("smooth", smooth), ("white", np.random.default_rng(5).normal(size=(32, 32))), ("checkerboard", rough)):
    delta = torch.from_numpy(delta).float()[None, None]
    ratio = (prepare(delta).norm() / delta.norm()).item()
    print(f"{name:12} perturbation grows {ratio:.2f} times; at most {norm_t:.2f}")
    assert ratio <= norm_t + 1e-3


# %% [markdown]
# **Check 2.** A base classifier whose true distances are known: is the mean of the enlarged image above one half? It is
# linear, so (7) applies in either space. We certify the same small image both ways, and then walk nine tenths of the second
# radius, on the small grid, towards the plane.

# %%
def brighter(z):
    return torch.stack([torch.zeros(len(z)), prepare(z).mean(dim=(1, 2, 3)) - 0.5], dim=1)


small = torch.full((1, 32, 32), 0.51)
weights = torch.zeros(1, 1, 32, 32, requires_grad=True)
brighter(weights)[0, 1].backward()
normal = weights.grad[0] / weights.grad.norm()
distance = 0.01 / weights.grad.norm().item()
with torch.no_grad():
    _, before = certify(brighter, small, 0.25, n=1500)
    _, after = certify(brighter, prepare(small[None])[0], 0.25, n=1500)
    walked = brighter((small - 0.9 * after * normal)[None]).argmax().item()
    restored = brighter((small - 0.999 * after / norm_t * normal)[None]).argmax().item()
assert before < distance and after > 2 * distance and walked == 0     # the claim about 224 is false of the 32 x 32 image
assert after / norm_t < distance and restored == 1                    # divided by |T|, it is true

figure, axis = plt.subplots(figsize=(6.6, 2.4))
names = ["noise on 32 × 32", "noise on 224 × 224,\nquoted as it is", "the same,\ndivided by ‖T‖"]
axis.barh(names[::-1], [after / norm_t, after, before], color=[GREEN, RED, BLUE], height=0.55)
axis.axvline(distance, color="black")
axis.text(distance + 0.01, -0.35, "true distance", va="bottom")
axis.set(xlabel=r"certified $\ell_2$ radius of the 32 × 32 image (pixels in [0, 1])")
axis.grid(axis="y", visible=False)
plt.show()

# %% [markdown]
# **What does the same $\sigma$ mean at another resolution?** Take a scene at 32 and at $224 = 7 \cdot 32$ pixels a side.
# Averaging blocks of $7 \times 7$ pixels brings the large one back to the small one, and independent noise of deviation
# $\sigma$ on the large one to
#
# $$ \sigma_{\text{block}} = \sigma / k, \qquad \lVert x_{224} - x'_{224}\rVert \approx k\,
#    \lVert x_{32} - x'_{32}\rVert, \qquad k = 7. \tag{12} $$
#
# The average of $k^2$ independent variables has variance $\sigma^2/k^2$, and the sum of squares over $k^2$ times as many
# pixels of similar difference is $k^2$ times as large. So $\sigma = 0.25$ and $r = 0.5$ on a $224$-pixel image correspond to
# about $0.036$ and $0.071$ at $32$ pixels: the same numbers are a much milder demand on ImageNet than on CIFAR-10, and rows of
# the two tables are not to be compared. In $[0, 1]$ pixels, $\sigma$ needs its resolution as much as its unit.

# %%
k, sigma = 7, 0.25
torch.manual_seed(0)
blocks = F.avg_pool2d(sigma * torch.randn(20, 1, 224, 224), k)
print(f"noise after averaging {k} x {k} blocks: {blocks.std():.4f}; sigma / k = {sigma / k:.4f}")
assert abs(blocks.std().item() / (sigma / k) - 1) < 0.03


def scene(shift, size):
    place = torch.arange(size) / size
    return torch.sin(9 * place[:, None] + shift) * torch.cos(7 * place)


ratio = ((scene(0.3, 224) - scene(0, 224)).norm() / (scene(0.3, 32) - scene(0, 32)).norm()).item()
print(f"distance of two smooth scenes at 224 over that at 32 pixels a side: {ratio:.3f}")
assert abs(ratio / k - 1) < 0.03

figure, axes = plt.subplots(1, 3, figsize=(8, 2.9))
digit = test_x[1][None]
for axis, size in zip(axes, (8, 32, 128), strict=True):
    big = F.interpolate(digit, size=size, mode="bicubic").clamp(0, 1)
    axis.imshow((big + sigma * torch.randn_like(big))[0, 0], cmap="gray_r", vmin=-0.5, vmax=1.5, interpolation="nearest")
    axis.set(title=rf"{size} × {size}, $\sigma$ = {sigma}", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# The same digit, the same $\sigma$, three resolutions: the eye averages, as (12) says, and the noise seems to fade.
#
# ## What to take along
#
# * Smoothing turns *any* $f$ into a $g$ for which $\sigma\,\Phi^{-1}(p_c)$ is 1-Lipschitz: (4). The proof is one inequality,
#   (3), and the fact that the likelihood ratio of two shifted Gaussians depends on one direction only, (2).
# * The radius is $R = \sigma\,\Phi^{-1}(p_A)$, tight given $p_A$ alone, and exact for linear classifiers.
# * $\sigma$ sets the scale of what can be proven and of what can be told apart.
# * A radius belongs to a unit and a resolution: those at which the noise was added.
#
# Everything here used exact shares $p_c(x)$. In reality they are integrals over hundreds of thousands of dimensions that can
# only be sampled. How a count becomes a proof is the subject of notebook 2.
