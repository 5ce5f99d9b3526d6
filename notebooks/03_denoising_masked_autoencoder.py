# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: -all
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. The denoising masked autoencoder
#
# [previous: From counts to certificates](02_from_counts_to_certificates.ipynb) |
# [next: From pre-training to a smoothed classifier](04_from_pretraining_to_smoothed_classifier.ipynb) |
# [contents](README.md)
#
# A classifier that will be certified by randomized smoothing has to work on very noisy images. Labelled data teach it
# that slowly. The denoising masked autoencoder (DMAE, [arXiv 2210.06983](https://arxiv.org/abs/2210.06983)) teaches it
# without labels. It spoils an image twice, by Gaussian noise in every pixel and by throwing most of its patches away,
# and asks for the clean image back.
#
# **Afterwards you can**
#
# * write a vision transformer from its equations, in about fifty lines, and say what each line is for;
# * write the pre-training loss, and say how DMAE and MAE differ;
# * count what masking saves;
# * set up AdamW and its schedule, and train on several processes so that the gradient stays what it was;
# * prove Tweedie's formula, and say what it does and does not promise about denoising.
#
# Every stop on the way has an equation, the reason for it, and a few lines of code that are the equation. Then a cell
# compares them with the scripts' own function, or with something computed in another way.
#
# **What it needs.** Linear algebra, a little probability, PyTorch. No GPU and no network connection. It runs for
# about a minute on two CPU cores. The network is the small one that this repository trains on scikit-learn's
# handwritten digits (8 × 8 pixels). Its weights, `results/digits/pretrain.pt`, were made in about a minute by
#
# ```sh
# python pretrain.py
# ```
#
# **Symbols** are those of the table in the [contents](README.md). Bold $\mathbf Q, \mathbf K, \mathbf V$ are queries,
# keys and values, as everywhere in the literature. Written in this notebook only: $\tilde x$ the noisy image, $\hat x$
# the predicted one, $x_i$ the $i$-th patch, $S$ a number of tokens, $G$ a number of processes.

# %%
import inspect
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from matplotlib.patches import Rectangle
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

ROOT = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "model.py").exists())
sys.path.insert(0, str(ROOT))
import certify
import model
import pretrain

# %matplotlib inline
plt.rcParams.update({
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "figure.dpi": 90,
    "font.size": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 9,
    "axes.grid": False,
    "figure.constrained_layout.use": True,
})
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "0.5"


def show(*things):
    """The source of functions and classes, as it stands in the scripts."""
    for thing in things:
        display(Markdown(f"```python\n{inspect.getsource(thing)}```"))


def draw(axis, image, title=""):
    """One grey image (H, W) in [0, 1], without ticks."""
    axis.imshow(image.clamp(0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xticks=[], yticks=[], title=title)


checkpoint = model.read_checkpoint(ROOT / "results/digits/pretrain.pt", "pretrain")
dmae = model.DenoisingMaskedAutoencoder(**checkpoint["config"]).eval().requires_grad_(False)
model.load_weights(dmae, checkpoint["model"], "results/digits/pretrain.pt")

digits = {split: pretrain.open_images("digits", None, train=split == "train", size=8, channels=1, device="cpu")
          for split in ("train", "test")}
train, test = (images.items.tensors[0] / images.white for images in digits.values())
labels = digits["test"].labels
P, N = dmae.patch_size, math.prod(dmae.grid)
SIGMA, GAMMA = checkpoint["settings"]["sigma"], checkpoint["settings"]["mask_ratio"]
print(f"{len(train)} training digits and {len(test)} test digits of {test.shape[-1]} x {test.shape[-1]} pixels in "
      f"[0, 1]; {N} patches of {P} x {P}; trained with sigma = {SIGMA} and mask ratio {GAMMA}")

# %% [markdown]
# ## 3.1 The whole of it in one picture
#
# $$
# x \;\longrightarrow\; \tilde x = x + e \;\longrightarrow\; \text{patches} \;\longrightarrow\;
# \text{encoder on the kept ones} \;\longrightarrow\; \text{decoder on all} \;\longrightarrow\; \hat x \approx x .
# \tag{3.1}
# $$
#
# Below is one real run of the trained network on a test digit. Its shapes were caught by hooks on the way, for one
# image ($B = 1$).

# %%
torch.manual_seed(5)
clean, noise, mask_noise = test[21:22], torch.randn(1, 1, 8, 8), torch.rand(1, N)
name = f"digit {labels[21]}"
shapes = {}
stops = {"kept": dmae.blocks[0], "latent": dmae.decoder_embed, "all": dmae.decoder_blocks[0], "read": dmae.decoder_pred}
hooks = [module.register_forward_pre_hook(lambda module, inputs, stop=stop: shapes.update({stop: inputs[0].shape[1:]}))
         for stop, module in stops.items()]
loss, prediction, mask = dmae(clean, SIGMA, GAMMA, noise, mask_noise)
for hook in hooks:
    hook.remove()
kept = N - int(mask.sum())
depth, decoder_depth = len(dmae.blocks), len(dmae.decoder_blocks)
assert (shapes["kept"], shapes["latent"]) == ((1 + kept, 64), (1 + kept, 64))             # the class token and kept ones
assert (shapes["all"], shapes["read"]) == ((1 + N, 32), (1 + N, 32))                      # all of them
assert prediction.shape == (1, N, P * P)


def grey_out(images, mask):
    """Dropped patches of images (B, 1, H, W) painted grey."""
    pixels = model.unpatchify(mask[:, :, None].expand(-1, -1, P * P), P, dmae.grid)
    return images * (1 - pixels) + 0.5 * pixels


def size(shape):
    return " × ".join(map(str, shape))


noisy = clean + SIGMA * noise
restored = pretrain.reconstruct(dmae, clean, prediction)
dropped = mask[0].bool().tolist()
figure, axis = plt.subplots(figsize=(10.5, 4.1))
axis.set(xlim=(-0.2, 22.2), ylim=(-1.9, 6.9), aspect="equal")
axis.axis("off")
SIDE, MIDDLE = 2.4, 2.5


def picture(left, image, title, middle=MIDDLE, low=0.0, high=1.0):
    bottom = middle - SIDE / 2
    axis.imshow(image[0, 0], cmap="gray", vmin=low, vmax=high, interpolation="nearest", aspect="equal",
                extent=(left, left + SIDE, bottom, bottom + SIDE))
    axis.text(left + SIDE / 2, bottom - 0.15, title, ha="center", va="top", fontsize=8.5)


def column(left, colours, title):
    """A sequence of tokens, the class token on top."""
    height = 0.26
    top = MIDDLE + height * len(colours) / 2
    for place, colour in enumerate(colours):
        axis.add_patch(Rectangle((left, top - height * (place + 1)), 0.5, height, facecolor=colour, edgecolor="white"))
    axis.text(left + 0.25, top - height * len(colours) - 0.12, title, ha="center", va="top", fontsize=8.5)


def box(left, width, text):
    axis.add_patch(Rectangle((left, MIDDLE - 1.5), width, 3, facecolor="0.93", edgecolor="0.3"))
    axis.text(left + width / 2, MIDDLE, text, ha="center", va="center", fontsize=9)


def arrow(start, end):
    axis.annotate("", xytext=start, xy=end, arrowprops=dict(arrowstyle="->", color="0.2", shrinkA=0, shrinkB=0))


picture(0, clean, f"clean $x$ ({name})\n{size(clean.shape[1:])}", middle=4.1)
picture(0, noise, f"noise $e / \\sigma$\n{size(noise.shape[1:])}", middle=0.3, low=-3, high=3)
arrow((SIDE + 0.1, 3.6), (3.4, 2.8))
arrow((SIDE + 0.1, 0.9), (3.4, 2.1))
picture(3.5, noisy, f"noisy $\\tilde{{x}} = x + e$\n$\\sigma$ = {SIGMA}")
arrow((6.0, MIDDLE), (6.7, MIDDLE))
picture(6.8, grey_out(noisy, mask), f"{kept} of {N} patches kept\n{N} × {P * P} → {kept} × {P * P}")
for line in np.arange(1, dmae.grid[0]) * SIDE / dmae.grid[0]:
    axis.plot((6.8 + line, 6.8 + line), (MIDDLE - SIDE / 2, MIDDLE + SIDE / 2), color=ORANGE, linewidth=1)
    axis.plot((6.8, 6.8 + SIDE), (MIDDLE - SIDE / 2 + line, MIDDLE - SIDE / 2 + line), color=ORANGE, linewidth=1)
arrow((9.3, MIDDLE), (9.9, MIDDLE))
column(10.0, [PURPLE] + [BLUE] * kept, f"tokens\n{size(shapes['kept'])}")
arrow((10.6, MIDDLE), (11.1, MIDDLE))
box(11.2, 1.9, f"encoder\n{depth} blocks")
arrow((13.2, MIDDLE), (13.7, MIDDLE))
column(13.9, [PURPLE] + [BLUE] * kept, f"latent\n{size(shapes['latent'])}")
arrow((14.5, MIDDLE), (15.7, MIDDLE))
column(15.8, [PURPLE] + [GREY if gone else BLUE for gone in dropped], f"in image order\n{size(shapes['all'])}")
arrow((16.4, MIDDLE), (16.9, MIDDLE))
box(17.0, 1.9, f"decoder\n{decoder_depth} block")
arrow((19.0, MIDDLE), (19.5, MIDDLE))
picture(19.6, restored, f"prediction $\\hat{{x}}$\n{size(prediction.shape[1:])}")
arrow((SIDE + 0.1, 6.2), (18.9, 6.2))
axis.plot((SIDE / 2, SIDE / 2, SIDE + 0.2), (5.4, 6.2, 6.2), color="0.2", linewidth=1)
arrow((20.8, MIDDLE + SIDE / 2 + 0.1), (20.8, 5.5))
axis.text(20.8, 6.2, f"loss\nall {N} patches:\n{loss:.3f}", ha="center", va="center", fontsize=9)
axis.text(10.3, 6.35, "the clean image is the target", ha="center", va="bottom", fontsize=9)
for left, colour, text in ((11.0, PURPLE, "class token"), (13.4, BLUE, "kept patch"), (15.7, GREY, "mask token")):
    axis.add_patch(Rectangle((left, -1.75), 0.3, 0.3, facecolor=colour))
    axis.text(left + 0.4, -1.6, text, va="center", fontsize=8.5)
plt.show()

# %% [markdown]
# Everything left of the decoder is kept for the classifier; the decoder is thrown away. `forward` reads like the
# picture, line by line:

# %%
show(model.DenoisingMaskedAutoencoder.forward)

# %% [markdown]
# ## 3.2 Noise
#
# $$ \tilde x = x + e, \qquad e \sim \mathcal N(0, \sigma^2 I_d), \qquad x \in [0,1]^d . \tag{3.2} $$
#
# $x$ is the clean image with $d$ pixel values, $e$ independent Gaussian noise in each of them, $\sigma$ its standard
# deviation in units of the pixel range, and $\tilde x$ the noisy image.
#
# The noise is the one that smoothing will use later, so nothing about it is negotiable. It is added to pixels in
# $[0,1]$, before any resizing or normalisation. The result is *not* clipped back to $[0,1]$, because the theorem about
# radii is a theorem about unclipped Gaussians.
#
# How big is that noise? $\lVert e\rVert^2/\sigma^2$ is a $\chi^2_d$ variable, so that $\lVert e\rVert$ is close to
# $\sigma\sqrt d$ (notebook 01, section 1.11 (b)). Here we ask whether the *network* receives such noise. A hook catches
# the input of its first layer; we undo the normalisation, subtract the clean image and compare with the $\chi^2_{64}$
# distribution from SciPy.

# %%
caught = {}
hook = dmae.patch_embed.register_forward_pre_hook(lambda module, inputs: caught.update(x=inputs[0]))
torch.manual_seed(0)
dmae(test, SIGMA, GAMMA)
hook.remove()
added = caught["x"] * dmae.std + dmae.mean - test
squared = (added / SIGMA).flatten(1).square().sum(1)
p_value = stats.kstest(squared.numpy(), stats.chi2(64).cdf).pvalue
print(f"mean of |e|^2 / sigma^2: {squared.mean():.2f} (theory: 64); Kolmogorov-Smirnov p-value {p_value:.2f}")
assert p_value > 0.001 and abs(squared.mean() - 64) < 4 * math.sqrt(2 * 64 / len(test))
assert caught["x"].amin() < ((0 - dmae.mean) / dmae.std).amin()                           # nothing was clipped

# %% [markdown]
# The picture sets this against the digits themselves: how far is a test digit from the nearest *training digit of
# another class*? At $\sigma = 0.25$ the noise is already about as long as the way to a different digit. The task is
# possible at all because the noise points in a random direction: along the one direction that leads to the other
# digit, its size is only $\sigma$.

# %%
distance = torch.cdist(test.flatten(1), train.flatten(1))
distance[labels[:, None] == digits["train"].labels] = math.inf
figure, axis = plt.subplots(figsize=(7, 3))
bins = np.linspace(0, 10, 121)
axis.hist(distance.amin(1), bins, density=True, color="0.7")
axis.annotate("way to the nearest digit\nof another class", (2.1, 1.0), (2.9, 2.2),
              arrowprops=dict(arrowstyle="-", color=GREY))
for sigma, colour in zip((0.125, 0.25, 0.5, 1.0), (BLUE, ORANGE, GREEN, PURPLE), strict=True):
    length = np.linspace(0.01, 10, 1000)
    density = stats.chi(64, scale=sigma).pdf(length)
    axis.plot(length, density, color=colour)
    axis.text(length[density.argmax()], density.max() + 0.1, rf"noise, $\sigma$ = {sigma:g}", color=colour, ha="center")
axis.set(xlabel=r"$\ell_2$ length (pixels in [0, 1])", ylabel="probability density", xlim=(0, 10), ylim=(0, 5.2))
plt.show()

# %% [markdown]
# ## 3.3 Patches
#
# A transformer works on a set of vectors. Cut the image into $N = HW/P^2$ squares of side $P$ and flatten each:
#
# $$
# x_{(a,b)}\bigl[(u P + v)\,C + \text{ch}\bigr] = x\,[\,\text{ch},\; aP+u,\; bP+v\,], \qquad 0 \le u,v < P , \tag{3.3}
# $$
#
# with $(a,b)$ the patch's row and column on the grid, $(u,v)$ the pixel inside the patch, ch one of $C$ channels. Each
# patch then becomes a token by one linear map,
#
# $$ \mathbf t_i = W x_i + w_0 \in \mathbb R^D . \tag{3.4} $$
#
# Why patches rather than pixels: attention compares every token with every other, so its cost grows with $N^2$, and a
# single pixel says little. The order of pixels inside a patch (row, column, channel) is a convention, but one that the
# published weights share. The scripts write the linear map as a convolution whose stride equals its kernel, which is
# the same thing.
#
# In code, (3.3) splits two axes and puts them into another order:

# %%
def cut(images, P):
    """Images (B, C, H, W) -> patches (B, N, P P C): equation (3.3)."""
    B, C, H, W = images.shape
    pieces = images.reshape(B, C, H // P, P, W // P, P)                                   # B C a u b v
    return pieces.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, P * P * C)                     # B (a b) (u v C)


def glue(patches, P, grid):
    """The way back: patches (B, N, P P C) -> images (B, C, H, W)."""
    B, C = len(patches), patches.shape[-1] // P**2
    pieces = patches.reshape(B, *grid, P, P, C)                                           # B a b u v C
    return pieces.permute(0, 5, 1, 3, 2, 4).reshape(B, C, grid[0] * P, grid[1] * P)


# %% [markdown]
# The test image has three channels and is not square, so that every axis has its own length. Three ways have to agree:
# the lines above, the scripts' `patchify` and `unpatchify`, and the indices of (3.3) written out as loops.

# %%
torch.manual_seed(0)
colour = torch.rand(2, 3, 12, 8)
patches = model.patchify(colour, 4)
by_index = [colour[1, ch, 4 * a + u, 4 * b + v].item()
            for a in range(3) for b in range(2) for u in range(4) for v in range(4) for ch in range(3)]
assert torch.equal(patches[1].flatten(), torch.tensor(by_index))                          # the equation, as loops
assert torch.equal(cut(colour, 4), patches)
assert torch.equal(glue(patches, 4, (3, 2)), colour)
assert torch.equal(model.unpatchify(patches, 4, (3, 2)), colour)

W, w_0 = dmae.patch_embed.proj.weight, dmae.patch_embed.proj.bias                         # the convolution is W x + w_0
tokens = cut(dmae.prepare(test), P) @ W.movedim(1, 3).flatten(1).T + w_0
torch.testing.assert_close(tokens + dmae.pos_embed[:, 1:], dmae.embed(test), rtol=1e-4, atol=1e-4)
print("patchify is the equation, unpatchify its inverse, the convolution a linear map of patches")

# %% [markdown]
# ## 3.4 Positions
#
# Attention sees a *set*: shuffle the tokens and its answers are shuffled in the same way (section 3.6 checks it). So a
# token has to say where its patch stood. DMAE adds a fixed vector
#
# $$
# \operatorname{pos}(a,b) = \bigl[\sin(b\omega),\ \cos(b\omega),\ \sin(a\omega),\ \cos(a\omega)\bigr] \in \mathbb R^D,
# \qquad \omega_j = 10000^{-j/(D/4)}, \quad j = 0,\dots,\tfrac D4-1 , \tag{3.5}
# $$
#
# where $a$ and $b$ are the patch's row and column. $\omega$ is a list of $D/4$ frequencies from one radian per patch
# down to nearly none, and sine and cosine act on each frequency. The class token's position is zero.
#
# Think of clock hands that turn at different speeds as one walks over the image: fast hands tell neighbours apart, slow
# ones tell left from right. The inner product of two positions depends only on the *displacement* between them, since
# $\cos(b\omega)\cos(b'\omega) + \sin(b\omega)\sin(b'\omega) = \cos(\omega(b-b'))$:
#
# $$
# \langle \operatorname{pos}(a,b),\, \operatorname{pos}(a',b')\rangle
# = \sum_j \cos\bigl(\omega_j (b-b')\bigr) + \cos\bigl(\omega_j (a-a')\bigr) . \tag{3.6}
# $$
#
# An attention head can thus look "two patches to the left" with the same weights everywhere.

# %%
def position(a, b, D):
    """The position (D,) of the patch in row a and column b: equation (3.5)."""
    omega = 10000.0 ** (-np.arange(D // 4) / (D // 4))
    return np.concatenate([np.sin(b * omega), np.cos(b * omega), np.sin(a * omega), np.cos(a * omega)])


D, side = 768, 14                                                                         # ViT-B/16 at 224 x 224
table = np.stack([np.zeros(D)] + [position(a, b, D) for a in range(side) for b in range(side)])
np.testing.assert_allclose(model.sincos_positions(D, (side, side))[0], table, atol=1e-6)  # the scripts' table

a, b = np.divmod(np.arange(side**2), side)                                                # equation (3.6)
omega = 10000.0 ** (-np.arange(D // 4) / (D // 4))
predicted = (np.cos((b[:, None] - b)[..., None] * omega) + np.cos((a[:, None] - a)[..., None] * omega)).sum(-1)
np.testing.assert_allclose(table[1:] @ table[1:].T, predicted, rtol=1e-9)
assert math.isclose(table[1 + 3 * side + 5, 0], math.sin(5))                              # row 3, column 5

figure, axes = plt.subplots(1, 4, figsize=(9.5, 2.9), width_ratios=(1.9, 1, 1, 1))
shown = axes[0].imshow(table[1:], cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
axes[0].set(xlabel="channel", ylabel="patch (row by row)", title="the table pos$(a, b)$", xticks=(0, 192, 384, 576))
figure.colorbar(shown, ax=axes[0], label="value")
for axis, (row, column) in zip(axes[1:], ((7, 7), (1, 3), (12, 10)), strict=True):
    similarity = (table[1 + row * side + column] @ table[1:].T / (D / 2)).reshape(side, side)
    shown = axis.imshow(similarity, cmap="viridis", vmin=0.6, vmax=1, interpolation="nearest")
    axis.plot(column, row, "o", color=ORANGE, markersize=5)
    axis.set(title=f"similarity with\n({row}, {column})", xlabel="column", xticks=(0, 5, 10), yticks=(0, 5, 10))
axes[1].set_ylabel("row")
figure.colorbar(shown, ax=axes[3], label="cosine similarity", shrink=0.7)
plt.show()

# %% [markdown]
# Left, the whole table: the left half of the channels follows the column (it repeats with every row of patches), the
# right half the row. Right, the inner product of one patch's position with all others: the same bump, moved along.

# %% [markdown]
# ## 3.5 Masks
#
# For every image, independently, keep a uniformly random set of
#
# $$ N_{\text{kept}} = \lfloor N(1-\gamma) \rfloor \tag{3.7} $$
#
# patches, $\gamma$ being the mask ratio. Draw one uniform number $\xi_i$ per patch and keep the patches with the
# smallest ones. All $N!$ orders of $N$ independent, identically distributed continuous numbers are equally likely, so
# every set of $N_{\text{kept}}$ patches is equally likely too. Unlike a coin per patch, this keeps *exactly*
# $N_{\text{kept}}$ in every image, which makes a batch a rectangular tensor.
#
# The scripts' function returns three things: the kept indices; `restore`, the inverse permutation that the decoder
# needs to put tokens back; and `mask`, in which **1 means dropped**. For one image:

# %%
def choose(numbers, gamma):
    """Kept patches, the place of each patch in "kept first, then dropped", and which are dropped; numbers is (N,)."""
    order = sorted(range(len(numbers)), key=lambda i: numbers[i])
    count = int(len(numbers) * (1 - gamma))
    place = [order.index(i) for i in range(len(numbers))]
    dropped = [i not in order[:count] for i in range(len(numbers))]
    return order[:count], place, dropped


torch.manual_seed(0)
numbers = torch.rand(50, 16)
for gamma in (0.25, 0.5, 0.75, 0.9):
    for image, answers in enumerate(zip(*model.random_masking(numbers, gamma), strict=True)):
        for ours, theirs in zip(choose(numbers[image].tolist(), gamma), answers, strict=True):
            assert ours == theirs.tolist()

keep, restore, many_masks = model.random_masking(torch.rand(20_000, 6), 0.5)
sets = (1 - many_masks) @ 2.0 ** torch.arange(6)                                          # each kept set as a number
observed = torch.bincount(sets.long(), minlength=64)
observed = observed[observed > 0]
p_value = stats.chisquare(observed.numpy()).pvalue
print(f"{len(observed)} of {math.comb(6, 3)} possible sets occurred; chi-square test of uniformity: p = {p_value:.2f}")
assert len(observed) == math.comb(6, 3) and p_value > 0.001
assert (many_masks.sum(1) == 3).all() and not many_masks.gather(1, keep).any()            # 3 dropped; the kept are not
assert torch.equal(keep, restore.argsort(1)[:, :3])
assert (int(196 * (1 - 0.75)), int(N * (1 - GAMMA))) == (49, 12)                          # ViT-B/16 at 0.75; the digits

# %% [markdown]
# One digit on its way into the encoder. Grey patches are not blanked: they are *absent*.

# %%
figure, axes = plt.subplots(1, 4, figsize=(8.5, 2.4))
titles = (f"clean $x$ ({name})", f"noisy $\\tilde{{x}}$, $\\sigma$ = {SIGMA}", f"cut into {N} patches",
          f"{N - kept} of {N} dropped")
for axis, image, title in zip(axes, (clean, noisy, noisy, grey_out(noisy, mask)), titles, strict=True):
    draw(axis, image[0, 0], title)
for axis in axes[2:]:
    for line in np.arange(P, 8, P) - 0.5:
        axis.axhline(line, color=ORANGE, linewidth=1)
        axis.axvline(line, color=ORANGE, linewidth=1)
plt.show()

# %% [markdown]
# ## 3.6 The transformer
#
# Encoder and decoder are made of the same block. It turns $S$ tokens of width $D$, a matrix
# $\mathbf X \in \mathbb R^{S \times D}$, into $S$ tokens of width $D$. It has four parts; each is a few lines. To
# compare them with `model.py` we take a network whose parameters are *all* random. (A fresh one has gains 1 and biases
# 0, so that a forgotten gain would not show.) Double precision leaves no room for excuses.

# %%
def randomised(network):
    """All parameters drawn anew, those of norms and biases, too; in double precision."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.double().eval().requires_grad_(False)


torch.manual_seed(0)
vit = randomised(model.build_vit("vit_digits", num_classes=10))
block = vit.blocks[0]
B, S, D = 5, 1 + N, 64
h = block.attn.heads
X = torch.randn(B, S, D, dtype=torch.float64)
print(f"{B} images, S = {S} tokens, width D = {D}, h = {h} heads of width D / h = {D // h}")

# %% [markdown]
# **LayerNorm.** Every token is standardised over its own $D$ channels, then scaled and shifted by learned vectors:
#
# $$
# \operatorname{LN}(\mathbf t) = \text{gain} \odot
# \frac{\mathbf t - \operatorname{mean}(\mathbf t)}{\sqrt{\operatorname{var}(\mathbf t) + 10^{-6}}}
# {} + \text{bias} , \tag{3.8}
# $$
#
# with mean and variance over channels, the variance divided by $D$. It keeps the size of what enters a layer fixed,
# whatever the layers before did. Its statistics are of the token alone, neither of other tokens nor of other images.
# So the answer for an image does not depend on its batch, a property that certification relies on, and that section
# 3.13 needs once more.

# %%
def layer_norm(t, norm):
    centred = t - t.mean(-1, keepdim=True)                                                # B S D
    variance = centred.square().mean(-1, keepdim=True)                                    # B S 1
    return norm.weight * centred / (variance + 1e-6).sqrt() + norm.bias


torch.testing.assert_close(layer_norm(X, block.norm1), block.norm1(X))

# %% [markdown]
# **Attention.** Every token asks a question, a *query*; every token offers a *key*, to be compared with queries, and a
# *value*, to be handed out. All three are linear in the token. A token's answer is a weighted mean of all values, and
# the weights come from comparing its query with all keys:
#
# $$
# \operatorname{Att}(\mathbf Q, \mathbf K, \mathbf V)
# = \operatorname{softmax}\!\Bigl(\frac{\mathbf Q \mathbf K^\top}{\sqrt{D/h}}\Bigr)\,\mathbf V ,
# \qquad \mathbf Q = \mathbf X W_Q^\top + w_Q, \quad \mathbf K = \mathbf X W_K^\top + w_K, \quad
# \mathbf V = \mathbf X W_V^\top + w_V , \tag{3.9}
# $$
#
# where softmax acts on rows, $\operatorname{softmax}(z)_j = e^{z_j} / \sum_l e^{z_l}$, so that each row of weights is
# positive and sums to 1. Why the root: the inner product of two independent vectors with $D/h$ standardised entries has
# variance $D/h$ (exercise 1). Without the division the weights of a wide head would be all but 0 and 1, where softmax
# has no gradient.
#
# **Heads.** One weighted mean per token can look at one thing. So the channels of $\mathbf Q, \mathbf K, \mathbf V$ are
# split into $h$ groups of $D/h$, attention runs in each group by itself, and a linear map mixes the results:
#
# $$
# \operatorname{MHA}(\mathbf X) = \bigl[\operatorname{Att}(\mathbf Q_1, \mathbf K_1, \mathbf V_1), \dots,
# \operatorname{Att}(\mathbf Q_h, \mathbf K_h, \mathbf V_h)\bigr]\,W_O^\top + w_O . \tag{3.10}
# $$
#
# The number of operations does not depend on $h$. `model.Attention` holds $W_Q, W_K, W_V$ on top of each other in one
# matrix `qkv`.

# %%
def weights_of(Q, K):
    """Softmax of scaled products: (B, S, D/h) twice -> (B, S, S), rows sum to 1."""
    scores = Q @ K.mT / math.sqrt(Q.shape[-1])
    return scores.exp() / scores.exp().sum(-1, keepdim=True)


def attention(X, layer):
    """Equations (3.9) and (3.10): (B, S, D) -> (B, S, D)."""
    D = X.shape[-1]
    queries, keys, values = (X @ layer.qkv.weight.T + layer.qkv.bias).split(D, dim=-1)    # B S D each
    answers = []
    for channels in torch.arange(D).chunk(layer.heads):                                   # D/h channels of a head
        Q, K, V = queries[..., channels], keys[..., channels], values[..., channels]      # B S D/h
        answers.append(weights_of(Q, K) @ V)                                              # B S D/h
    return torch.cat(answers, dim=-1) @ layer.proj.weight.T + layer.proj.bias


small = X / 10                                                                            # exp() must not overflow
torch.testing.assert_close(attention(small, block.attn), block.attn(small))
shuffled = torch.randperm(S)
torch.testing.assert_close(attention(small[:, shuffled], block.attn), attention(small, block.attn)[:, shuffled])
print("attention is model.Attention; shuffled tokens get the same answers, shuffled")

# %% [markdown]
# **GELU and the MLP.** Attention moves information between tokens. The other half of a block works on every token by
# itself: a linear map to a larger width, a nonlinear function, and a linear map back,
#
# $$ \operatorname{MLP}(\mathbf t) = W_2 \operatorname{GELU}(W_1 \mathbf t + w_1) + w_2, \qquad
# \operatorname{GELU}(z) = z\,\Phi(z) , \tag{3.11} $$
#
# $\Phi$ being the distribution function of the standard normal. GELU is a smooth ReLU. Gate $z$ by a coin that falls on
# 1 with probability $\Phi(z)$: the mean is $z\,\Phi(z)$. The scripts use this exact form, as the published weights do;
# a common shortcut replaces $\Phi$ by a hyperbolic tangent.

# %%
def gelu(z):
    return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))                                    # z Phi(z)


def mlp(t, layer):
    return gelu(t @ layer.fc1.weight.T + layer.fc1.bias) @ layer.fc2.weight.T + layer.fc2.bias


torch.testing.assert_close(mlp(X, block.mlp), block.mlp(X))
z = torch.linspace(-6, 6, 1201, dtype=torch.float64)
shortcut = (F.gelu(z, approximate="tanh") - gelu(z)).abs().max()
print(f"the shortcut differs from z Phi(z) by at most {shortcut:.1e}")
assert 1e-4 < shortcut < 1e-3

# %% [markdown]
# **The pre-norm residual block.** Both halves are *added* to what is there, and each sees it through a LayerNorm:
#
# $$
# \mathbf X' = \mathbf X + \operatorname{MHA}\bigl(\operatorname{LN}_1(\mathbf X)\bigr), \qquad
# \operatorname{block}(\mathbf X) = \mathbf X' + \operatorname{MLP}\bigl(\operatorname{LN}_2(\mathbf X')\bigr) .
# \tag{3.12}
# $$
#
# Unroll $L$ blocks: the output is the input plus the sum of all $2L$ branches. Its derivative by the input is the
# identity plus other terms, so gradients reach the first block however deep the network is. The first transformers
# normalised *after* the addition, $\operatorname{LN}(\mathbf X + \dots)$. Then every block rescales the direct path,
# too, and deep ones needed a careful warm-up ([Xiong et al. 2020](https://arxiv.org/abs/2002.04745)).

# %%
def run_block(X, block):
    X = X + attention(layer_norm(X, block.norm1), block.attn)
    return X + mlp(layer_norm(X, block.norm2), block.mlp)


torch.testing.assert_close(run_block(small, block), block(small))

stream, branches = small, []
for layer in vit.blocks:                                                                  # the sum of all branches
    branches.append(layer.attn(layer.norm1(stream)))
    branches.append(layer.mlp(layer.norm2(stream + branches[-1])))
    stream = layer(stream)
torch.testing.assert_close(stream, small + sum(branches))
print(f"one block is model.Block; {len(vit.blocks)} blocks add {len(branches)} branches to their input")

# %% [markdown]
# **Class token, or mean pooling.** A classifier needs one vector per image; the blocks end with $1 + N$. There are two
# customs. A learned vector $\mathbf t_{\text{cls}}$, the *class token*, is put before the patch tokens. It stands for
# no place, attends to all of them, and its output may serve; or the mean of the patch tokens' outputs $\mathbf t'_i$
# does:
#
# $$
# \text{features} = \operatorname{LN}\bigl(\mathbf t'_{\text{cls}}\bigr) \qquad\text{or}\qquad
# \text{features} = \operatorname{LN}\Bigl(\frac1N \sum_{i=1}^N \mathbf t'_i\Bigr) . \tag{3.13}
# $$
#
# DMAE fine-tunes with the mean, and probes linearly with the class token. For the mean speaks the pre-training loss
# (section 3.9), which reads what the decoder says about patches and never its class token. The patch tokens have
# learned to describe their places; the class token learns only what other tokens fetch from it. Even with mean pooling
# the class token is there, and takes part in attention.

# %%
def features(network, images):
    """Images (B, 1, 8, 8) -> (B, D), from the page's own functions alone."""
    patches = cut((images - network.mean) / network.std, P)                               # B N PPC
    projection = network.patch_embed.proj
    tokens = patches @ projection.weight.movedim(1, 3).flatten(1).T + projection.bias     # B N D
    cls = network.cls_token.expand(len(images), 1, -1)
    X = torch.cat([cls, tokens], dim=1) + network.pos_embed                               # B 1+N D
    for block in network.blocks:
        X = run_block(X, block)
    if network.pool == "mean":
        return layer_norm(X[:, 1:].mean(1), network.fc_norm)
    return layer_norm(X[:, 0], network.norm)


for pool in ("mean", "cls"):
    vit = randomised(model.build_vit("vit_digits", num_classes=10, pool=pool))
    images = torch.rand(7, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(features(vit, images), vit.features(images))
    torch.testing.assert_close(features(vit, images) @ vit.head.weight.T + vit.head.bias, vit(images))
print("the page's vision transformer is model.VisionTransformer, with either way to pool")

# %% [markdown]
# What do heads look at? In the trained encoder we take the attention weights of one patch (orange dot) and average them
# over all clean test digits, without a mask.

# %%
X = dmae.with_cls(dmae.embed(test))
patch = 5                                                                                 # row 1, column 1
maps = {}
for layer, block in enumerate(dmae.blocks):
    queries, keys, _ = block.attn.qkv(block.norm1(X)).split(X.shape[-1], dim=-1)
    for head, channels in enumerate(torch.arange(X.shape[-1]).chunk(block.attn.heads)):
        weights = weights_of(queries[..., channels], keys[..., channels])                 # B 1+N 1+N
        torch.testing.assert_close(weights.sum(-1), torch.ones(len(test), 1 + N))
        maps[head, layer] = weights[:, 1 + patch, 1:].mean(0).view(dmae.grid)
    X = block(X)
strongest = {place: divmod(int(weights.argmax()), 4) for place, weights in maps.items()}
assert strongest[1, 1] == (1, 2) and strongest[0, 1] == (0, 1) and strongest[0, 2] == (2, 1)
assert maps[1, 0].max() < 0.1

figure, axes = plt.subplots(2, depth, figsize=(6, 4.3))
for place, weights in maps.items():
    shown = axes[place].imshow(weights, cmap="viridis", vmin=0, vmax=max(map(torch.max, maps.values())))
    axes[place].plot(patch % 4, patch // 4, "o", color=ORANGE, markersize=6)
    axes[place].set(xticks=range(4), yticks=range(4), title=f"block {place[1] + 1}, head {place[0] + 1}")
axes[0, 0].set_ylabel("row")
axes[1, 0].set_ylabel("row")
for axis in axes[1]:
    axis.set_xlabel("column")
figure.colorbar(shown, ax=axes, label="mean attention weight", shrink=0.7)
plt.show()

# %% [markdown]
# Heads have found neighbours: in block 2 head 1 looks up and head 2 to the right, in block 3 head 1 looks down. Head 2
# of block 1 looks nearly everywhere alike. Nobody told them; positions and the loss did.

# %% [markdown]
# ## 3.7 The encoder sees kept patches only, and what that saves
#
# Dropped patches are removed from the sequence before the first block. A transformer of width $D$ with $S$ tokens, a
# class token among them, spends in every block
#
# $$
# \text{FLOPs}(S) = \underbrace{8SD^2}_{\text{q, k, v, projection}} + \underbrace{4S^2D}_{\text{attention}}
# {} + \underbrace{16SD^2}_{\text{MLP, ratio 4}} , \tag{3.14}
# $$
#
# counting a multiplication and an addition as two operations. Why: a linear map from $D$ to $D'$ costs $2DD'$ per
# token; attention has four of them with $D' = D$, the MLP two with $D'=4D$. The products of queries with keys, and of
# weights with values, cost $2S^2D$ each. So the cost falls a little faster than the number of tokens. The activations
# kept for the backward pass shrink in the same way, which allows larger batches.

# %%
show(model.DenoisingMaskedAutoencoder.encode)

# %% [markdown]
# First, that it is what we say: the kept tokens, picked by a plain list of indices, through the blocks of section 3.6.
# And that the encoder truly does not see the others: spoil the dropped patches as badly as you like, and the prediction
# must not change by a single bit.

# %%
numbers = torch.rand(6, N)
latent, _, _ = dmae.encode(test[:6], GAMMA, numbers)
for image in range(6):
    chosen, _, _ = choose(numbers[image].tolist(), GAMMA)
    X = torch.cat([dmae.cls_token[0], dmae.embed(test[image:image + 1])[0, chosen]])[None]     # 1 1+N_kept D
    for block in dmae.blocks:
        X = run_block(X, block)
    torch.testing.assert_close(layer_norm(X, dmae.norm)[0], latent[image], rtol=1e-4, atol=1e-4)

pixels = glue(mask[:, :, None].expand(-1, -1, P * P), P, dmae.grid)
_, before, _ = dmae(clean, SIGMA, GAMMA, noise, mask_noise)
_, after, _ = dmae(clean + 1000 * pixels, SIGMA, GAMMA, noise, mask_noise)
assert torch.equal(before, after)
print("the prediction is bit for bit the same")

# %% [markdown]
# Then the bill. PyTorch's counter looks at the operations that really run; on the `meta` device they run without data.
# We count ViT-B/16 at 224 × 224 and compare with the formula. The patch embedding adds $2N\cdot P^2C\cdot D$. (It is
# applied to all $N$ patches; selecting before it would save two more percent.)

# %%
vit_b = model.build_dmae("vit_base_patch16").to("meta")
image = torch.zeros(1, 3, 224, 224, device="meta")


def count(gamma):
    """FLOPs of encoder and decoder for one image."""
    with torch.no_grad(), FlopCounterMode(display=False) as encoder:
        latent, restore, _ = vit_b.encode(image, gamma, torch.rand(1, 196, device="meta"))
    with torch.no_grad(), FlopCounterMode(display=False) as decoder:
        vit_b.decode(latent, restore)
    return encoder.get_total_flops(), decoder.get_total_flops()


def formula(gamma, width=768, depth=12):
    S = 1 + int(196 * (1 - gamma))
    return depth * (24 * S * width**2 + 4 * S**2 * width) + 2 * 196 * 16**2 * 3 * width


gammas = np.array([0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875])
flops = np.array([count(gamma) for gamma in gammas]) / 1e9
np.testing.assert_array_equal(flops[:, 0] * 1e9, [formula(gamma) for gamma in gammas])
full, quarter = flops[0], flops[list(gammas).index(0.75)]
print(f"ViT-B/16 encoder: {full[0]:.2f} GFLOP per image on all patches, {quarter[0]:.2f} with 3 of 4 dropped: "
      f"{full[0] / quarter[0]:.2f} times less")
print(f"with the decoder (8 blocks, width 512, always on all {196} patches): {full.sum():.2f} against "
      f"{quarter.sum():.2f}: {full.sum() / quarter.sum():.2f} times less")
assert full[0] / quarter[0] > 3.9

figure, axis = plt.subplots(figsize=(6.2, 3))
axis.fill_between(gammas, 0, flops[:, 0], color=BLUE, linewidth=0)
axis.fill_between(gammas, flops[:, 0], flops.sum(1), color=ORANGE, linewidth=0)
axis.text(0.12, 14, "encoder, on kept patches", color="white")
axis.text(0.12, 34.5, "decoder, on all patches", color="white", rotation=-16, rotation_mode="anchor")
axis.plot((0.75, 0.75), (0, 30), "--", color="0.2")
axis.text(0.75, 31, "the paper's ratio", ha="center", va="bottom")
axis.set(xlabel=r"mask ratio $\gamma$", ylabel="forward pass, one image\n(GFLOP)", xlim=(0, 0.875), ylim=(0, 48))
plt.show()

# %% [markdown]
# The encoder becomes four times cheaper at $\gamma = 0.75$; the decoder, which must look at every place, then
# dominates. This is why the decoder is narrow. It is thrown away after pre-training, so its size costs nothing later.

# %% [markdown]
# ## 3.8 The decoder
#
# Let $\mathbf t'_i$ be the encoder's output for a kept patch $i$, and $W_d$, $w_d$ a linear map to the decoder's width.
# The decoder's input is
#
# $$
# \mathbf s_i = \begin{cases} W_d \mathbf t'_i + w_d + \operatorname{pos}'_i & \text{if patch } i \text{ was kept},\\
# \mathbf t_{\text{mask}} + \operatorname{pos}'_i & \text{if it was dropped,}\end{cases} \tag{3.15}
# $$
#
# with one learned mask token $\mathbf t_{\text{mask}}$ for all dropped places and the decoder's own positions
# $\operatorname{pos}'$. Blocks of attention follow, then a linear map to $P^2C$ pixel values.
#
# All dropped places start from the same vector, so that position is all that tells them apart; what belongs there has
# to come by attention from the kept ones. One `gather` puts everything back into image order, since `restore` sends
# patch $i$ to its place in "kept first, then dropped".

# %%
show(model.DenoisingMaskedAutoencoder.decode)

# %% [markdown]
# The page's version follows the two cases of (3.15), with boolean indexing in place of the inverse permutation:

# %%
def decoder_input(network, latent, order, dropped):
    """Latent (1 + N_kept, D) of one image, kept patches `order`, dropped (N,) -> tokens (1 + N, D')."""
    tokens = network.decoder_embed(latent)
    places = torch.full((len(dropped), tokens.shape[-1]), math.nan)
    places[dropped] = network.mask_token[0, 0]
    places[order] = tokens[1:]
    return torch.cat([tokens[:1], places]) + network.decoder_pos_embed[0]


hook = dmae.decoder_blocks[0].register_forward_pre_hook(lambda module, inputs: caught.update(s=inputs[0]))
many, many_noise, many_numbers = test[:32], torch.randn(32, 1, 8, 8), torch.rand(32, N)
_, many_predictions, many_masks = dmae(many, SIGMA, 0.75, many_noise, many_numbers)
hook.remove()
latent, _, _ = dmae.encode(many + SIGMA * many_noise, 0.75, many_numbers)
for image in range(32):
    order, _, dropped = choose(many_numbers[image].tolist(), 0.75)
    X = decoder_input(dmae, latent[image], torch.tensor(order), torch.tensor(dropped))[None]
    torch.testing.assert_close(caught["s"][image], X[0], rtol=1e-4, atol=1e-5)
    for block in dmae.decoder_blocks:
        X = run_block(X, block)
    predicted = dmae.decoder_pred(layer_norm(X, dmae.decoder_norm))[0, 1:]
    torch.testing.assert_close(many_predictions[image], predicted, rtol=1e-3, atol=1e-4)
print("every place holds its own token or the mask token, and the prediction follows")

# %% [markdown]
# ## 3.9 The loss: all patches, or the dropped ones
#
# $$
# \mathcal L_{\text{all}} = \frac1N \sum_{i=1}^{N} \mathcal L_i, \qquad
# \mathcal L_{\text{dropped}} = \frac{1}{N-N_{\text{kept}}}\sum_{i\,\text{dropped}} \mathcal L_i, \qquad
# \mathcal L_i = \frac{1}{P^2C}\bigl\lVert\hat x_i - x_i\bigr\rVert^2 , \tag{3.16}
# $$
#
# where $x_i$ is the *clean* (normalised) patch and $\hat x_i$ the prediction. MAE uses $\mathcal L_{\text{dropped}}$:
# without noise, a kept patch could simply be copied, and there is nothing to learn from it. With noise the kept patches
# become a task of their own, to denoise, and DMAE asks for it. Splitting the sum shows the two tasks and their weights:
#
# $$
# \mathcal L_{\text{all}} = \tfrac{N_{\text{kept}}}{N}\,\mathcal L_{\text{kept}}
# {} + \tfrac{N-N_{\text{kept}}}{N}\,\mathcal L_{\text{dropped}} . \tag{3.17}
# $$

# %%
def loss_over(patches, prediction, chosen):
    """Mean of L_i over the patches that `chosen` (B, N) marks with True: equation (3.16)."""
    per_patch = ((prediction - patches)**2).mean(-1)                                      # B N
    return per_patch[chosen].mean()


mae = model.DenoisingMaskedAutoencoder(**checkpoint["config"] | {"loss_on": "dropped"}).eval().requires_grad_(False)
model.load_weights(mae, checkpoint["model"], "results/digits/pretrain.pt")                # the same network, other loss

torch.manual_seed(0)
noise, mask_noise = torch.randn_like(test), torch.rand(len(test), N)
l_all, prediction, mask = dmae(test, SIGMA, GAMMA, noise, mask_noise)
target = cut((test - dmae.mean) / dmae.std, P)
dropped = mask.bool()
torch.testing.assert_close(dmae.target(test), target)
l_kept, l_dropped = loss_over(target, prediction, ~dropped), loss_over(target, prediction, dropped)
torch.testing.assert_close(loss_over(target, prediction, dropped | ~dropped), l_all)
torch.testing.assert_close(mae.loss(target, prediction, mask), l_dropped)
torch.testing.assert_close(mae.loss(target, prediction, 1 - mask), l_kept)

picture = model.unpatchify(prediction, P, dmae.grid).numpy()                              # in image space, with NumPy
error = (picture - ((test - dmae.mean) / dmae.std).numpy())**2
inside = np.kron(mask.numpy().reshape(-1, 1, *dmae.grid), np.ones((P, P))).astype(bool)
by_pixels = [error.mean(), error[inside].mean(), error[~inside].mean()]
np.testing.assert_allclose([l_all, l_dropped, l_kept], by_pixels, rtol=1e-5)
np.testing.assert_allclose(l_all, kept / N * l_kept + (N - kept) / N * l_dropped, rtol=1e-5)
print(f"kept {l_kept:.3f}, dropped {l_dropped:.3f}, all {l_all:.3f}")

# %% [markdown]
# How hard is each half of the task? Against noise we plot both losses of the trained network, beside two answers that
# need no network. Returning the noisy pixels as they are costs $\sigma^2$ over the pixels' variance, in normalised
# pixels. The other is the mean training image.

# %%
sigmas = np.linspace(0, 0.6, 13)
predictions = [dmae(test, float(sigma), GAMMA, noise, mask_noise)[1] for sigma in sigmas]
kept_curve, dropped_curve = np.array([[loss_over(target, prediction, part).item() for prediction in predictions]
                                      for part in (~dropped, dropped)])
mean_image = (dmae.target(train.mean(0, keepdim=True)) - target).square().mean().item()
place = np.isclose(sigmas, 0.25)
assert kept_curve[place] < 0.5 * (0.25 / dmae.std.item())**2                              # far better than copying
assert dropped_curve[place] < mean_image                                                  # and better than the mean
figure, axis = plt.subplots(figsize=(6.8, 3.3))
axis.plot(sigmas, dropped_curve, "s-", color=ORANGE, markersize=4)
axis.plot(sigmas, kept_curve, "o-", color=BLUE, markersize=4)
axis.plot(sigmas, (sigmas / dmae.std.item())**2, ":", color="0.2")
axis.axhline(mean_image, color=GREY, linestyle="--")
axis.axvline(SIGMA, color="0.8", zorder=0)
axis.text(0.01, 0.16, "dropped patches\n(predict)", color=ORANGE)
axis.text(0.4, 0.12, "kept patches (denoise)", color=BLUE)
axis.text(0.375, 0.86, "copy the noisy pixels", color="0.2")
axis.text(0.01, mean_image + 0.02, "answer with the mean image", color=GREY)
axis.set(xlabel=r"noise level $\sigma$ (pixels in [0, 1]); trained at the grey line",
         ylabel="mean squared error\n(normalised pixels)", xlim=(0, 0.6), ylim=(0, 0.95))
plt.show()

# %% [markdown]
# ## 3.10 Norm-pix
#
# Optionally, the target is not the patch but the patch seen through its own statistics:
#
# $$
# x_i^{\text{norm}} = \frac{x_i - \operatorname{mean}(x_i)}{\sqrt{\operatorname{var}(x_i) + 10^{-6}}}, \qquad
# \operatorname{var}(x_i) = \frac{1}{P^2C-1}\bigl\lVert x_i-\operatorname{mean}(x_i)\bigr\rVert^2 . \tag{3.18}
# $$
#
# Mean squared error is dominated by brightness and contrast; both are removed, so that a faint texture counts as much
# as a bold edge. For any positive factor and any shift, the changed patch has (up to the $10^{-6}$) the same target.
# Also $\lVert x_i^{\text{norm}}\rVert^2 = P^2C-1$, so that answering 0 everywhere costs $(P^2C-1)/(P^2C)$: a yardstick
# for the loss curve. The variance is the unbiased one because the published code has it so; for $P^2C = 768$ nobody
# could tell.

# %%
def norm_pix(patches):
    centred = patches - patches.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (patches.shape[-1] - 1)
    return centred / (variance + 1e-6).sqrt()


torch.manual_seed(0)
patch = torch.rand(50, 16, dtype=torch.float64)
torch.testing.assert_close(model.standardise_patches(patch), norm_pix(patch))
by_numpy = (patch.numpy() - patch.numpy().mean(1, keepdims=True)) / np.sqrt(patch.numpy().var(1, ddof=1, keepdims=True) + 1e-6)
np.testing.assert_allclose(model.standardise_patches(patch), by_numpy, rtol=1e-9)
np.testing.assert_allclose(model.standardise_patches(3 * patch - 1), by_numpy, rtol=1e-4)
np.testing.assert_allclose((by_numpy**2).mean(), 15 / 16, rtol=1e-4)
flat = cut(test, P).var(-1) == 0
print(f"{flat.float().mean():.0%} of the digits' 2 x 2 patches have no contrast at all")

# %% [markdown]
# The last number is why the digits recipe leaves norm-pix off. With patches of four pixels on a black background, the
# standardised target is often identically zero, and otherwise mostly the rounding of 17 grey levels, blown up. With 16
# × 16 patches of photographs (all of the paper's recipes) the case is rare.

# %% [markdown]
# ## 3.11 With $\sigma = 0$ and the loss on dropped patches, it is MAE
#
# Set $\sigma = 0$ in (3.2), take $\mathcal L_{\text{dropped}}$, and what remains is the masked autoencoder of He et al.
# ([arXiv 2111.06377](https://arxiv.org/abs/2111.06377)). The scripts do the same by flags: `python pretrain.py --sigma
# 0 --loss-on dropped --out runs/mae`.
#
# To check it we write MAE down once more, for one image, in the plainest way: no shuffling, no gather, no inverse
# permutation; the kept tokens stay in image order, and boolean indexing puts them back. The encoder has no notion of
# order, so the loss must be the same. With the functions of this page it is a dozen lines, and none of them is
# `model.py`'s.

# %%
def plain_mae_loss(network, image, dropped):
    """MAE's loss for one clean image (1, C, H, W), dropped (N,) boolean."""
    patches = cut((image - network.mean) / network.std, P)[0]                             # N PPC
    projection = network.patch_embed.proj
    tokens = patches @ projection.weight.movedim(1, 3).flatten(1).T + projection.bias + network.pos_embed[0, 1:]
    X = torch.cat([network.cls_token[0] + network.pos_embed[0, :1], tokens[~dropped]])[None]
    for block in network.blocks:
        X = run_block(X, block)
    X = decoder_input(network, layer_norm(X, network.norm)[0], ~dropped, dropped)[None]
    for block in network.decoder_blocks:
        X = run_block(X, block)
    prediction = network.decoder_pred(layer_norm(X, network.decoder_norm))[0, 1:]
    return F.mse_loss(prediction[dropped], patches[dropped])


torch.manual_seed(3)
for image in test[:8]:
    numbers = torch.rand(1, N)
    scripts, _, mask = mae(image[None], 0.0, 0.75, mask_noise=numbers)
    torch.testing.assert_close(scripts, plain_mae_loss(dmae, image[None], mask[0].bool()), rtol=1e-4, atol=1e-6)
print("eight images, two ways, one loss")

# %% [markdown]
# ## 3.12 The optimiser
#
# **AdamW** keeps, for every weight $w$, a running mean of its gradient $\nabla_t$ and one of the gradient's square, and
# steps by their quotient:
#
# $$
# \begin{aligned}
# \overline{\nabla}_t &= \beta_1 \overline{\nabla}_{t-1} + (1-\beta_1)\,\nabla_t, \qquad
# \overline{\nabla^2}_t = \beta_2 \overline{\nabla^2}_{t-1} + (1-\beta_2)\,\nabla_t^2, \\
# w_t &= (1 - \text{lr}\cdot\text{wd})\,w_{t-1}
# {} - \text{lr}\,\frac{\overline{\nabla}_t / (1-\beta_1^t)}{\sqrt{\overline{\nabla^2}_t / (1-\beta_2^t)} + 10^{-8}} ,
# \end{aligned} \tag{3.19}
# $$
#
# where both means start at 0. The divisions by $1-\beta^t$ undo that: $\overline{\nabla}_t$ is a weighted sum of $t$
# gradients whose weights add up to $1-\beta_1^t$. Pre-training has $\beta_1 = 0.9$ and $\beta_2 = 0.95$. The usual
# $0.999$ remembers a thousand steps; 0.95 remembers twenty, and forgets a sudden large gradient as soon.
#
# The quotient has no unit. A weight moves by lr per step at most, roughly, whether its gradients are large or small.

# %%
def adamw_step(weight, gradient, mean, square, t, lr, decay, beta_1=0.9, beta_2=0.95):
    """Equation (3.19): the new weight and the new running means."""
    mean = beta_1 * mean + (1 - beta_1) * gradient
    square = beta_2 * square + (1 - beta_2) * gradient**2
    step = (mean / (1 - beta_1**t)) / ((square / (1 - beta_2**t)).sqrt() + 1e-8)
    return (1 - lr * decay) * weight - lr * step, mean, square


args = pretrain.parse([])                                                                 # the recipe "digits"
torch.manual_seed(0)
student = randomised(model.build_dmae("vit_digits"))
for name, parameter in student.named_parameters():
    parameter.requires_grad_("pos_embed" not in name)
optimizer = pretrain.build_optimizer(student, args)
trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
state = {name: (parameter.detach().clone(), 0.0, 0.0) for name, parameter in trained.items()}
for t in range(1, 6):
    for name, parameter in trained.items():
        parameter.grad = torch.randn_like(parameter)
        decay = args.weight_decay if model.decays(name, parameter) else 0.0
        state[name] = adamw_step(state[name][0], parameter.grad, *state[name][1:], t, optimizer.defaults["lr"], decay)
    optimizer.step()
for name, parameter in trained.items():
    torch.testing.assert_close(parameter.detach(), state[name][0])
print(f"five steps of all {len(trained)} tensors agree with pretrain.build_optimizer's AdamW")

# %% [markdown]
# **Decoupled decay.** The factor $1 - \text{lr}\cdot\text{wd}$ pulls every weight to zero at the same rate. The older
# way adds the gradient of $\frac{\text{wd}}2 w^2$ to $\nabla_t$, before the division. Then the pull is divided, too:
# weights with large gradients hardly decay, weights with small ones decay fast, and wd means something else for each
# weight ([Loshchilov & Hutter](https://arxiv.org/abs/1711.05101)). Two weights that start at 1 show it. Their gradients
# are pure noise, that of one a hundred times as large as that of the other.

# %%
def trace(coupled, scale, steps=2000, lr=4e-3, decay=0.05):
    """A weight that starts at 1 under noisy gradients of size `scale`: the mean of 200 runs, at every step."""
    generator = torch.Generator().manual_seed(0)
    weight, mean, square = torch.ones(200, dtype=torch.float64), 0.0, 0.0
    means = []
    for t in range(1, steps + 1):
        gradient = scale * torch.randn(200, generator=generator, dtype=torch.float64)
        if coupled:
            weight, mean, square = adamw_step(weight, gradient + decay * weight, mean, square, t, lr, 0.0)
        else:
            weight, mean, square = adamw_step(weight, gradient, mean, square, t, lr, decay)
        means.append(weight.mean().item())
    return np.array(means)


steps = np.arange(1, 2001)
traces = {(coupled, scale): trace(coupled, scale) for coupled in (False, True) for scale in (0.1, 10)}
np.testing.assert_allclose(traces[False, 0.1], traces[False, 10], atol=1e-3)              # decoupled: the same for both
np.testing.assert_allclose(traces[False, 10], (1 - 4e-3 * 0.05)**steps, atol=0.05)
assert traces[True, 0.1][-1] < 0.2 and traces[True, 10][-1] > 0.9                         # coupled: not at all
figure, axes = plt.subplots(1, 2, figsize=(8.5, 2.8), sharey=True)
for axis, coupled, title in zip(axes, (False, True), ("decoupled (AdamW)", "inside the gradient (Adam with L2)"), strict=True):
    axis.plot(steps, traces[coupled, 10], color=BLUE)
    axis.plot(steps, traces[coupled, 0.1], "--", color=ORANGE)
    axis.set(title=title, xlabel="step", xlim=(0, 2000), ylim=(0, 1.1))
axes[0].set_ylabel("weight, mean of 200 runs")
axes[0].text(150, 0.55, "both weights, one on the other", color="0.2")
axes[1].text(900, 1.01, "large gradients", color=BLUE)
axes[1].text(900, 0.2, "small gradients", color=ORANGE)
plt.show()

# %% [markdown]
# **What decays.** Matrices. Not biases, nor the gains and biases of LayerNorm (vectors), nor the class and mask tokens,
# nor positions (which pre-training does not train at all). Decay keeps linear maps from growing. A bias has nothing to
# do with that, and pulling a gain to zero would switch its layer off. `model.decays` decides by name and shape; here we
# ask the layers what they are.

# %%
linear = torch.nn.Linear | torch.nn.Conv2d
matrices = {f"{name}.weight" for name, module in student.named_modules() if isinstance(module, linear)}
groups = {True: [], False: []}
for name, parameter in trained.items():
    assert model.decays(name, parameter) == (name in matrices)
    groups[name in matrices].append(name)
sizes = {kind: sum(trained[name].numel() for name in names) for kind, names in groups.items()}
assert all(name.endswith(("bias", "token")) or "norm" in name for name in groups[False])
assert [len(group["params"]) for group in optimizer.param_groups] == [len(groups[True]), len(groups[False])]
assert sum(sizes.values()) == sum(parameter.numel() for parameter in dmae.parameters()) - dmae.pos_embed.numel() \
    - dmae.decoder_pos_embed.numel()
print(f"{len(groups[True])} matrices with {sizes[True]:,} weights decay; {len(groups[False])} vectors and tokens with "
      f"{sizes[False]:,} do not, such as {groups[False][0]} and {groups[False][-1]}")

# %% [markdown]
# **The learning rate over time.** A straight line up to the peak at step $t_{\text{warm}}$, then half a cosine down to
# 0 at $t_{\text{end}}$:
#
# $$
# \text{lr}(t) = \text{peak} \cdot \begin{cases} t / t_{\text{warm}} & t < t_{\text{warm}}, \\
# \tfrac12\Bigl(1 + \cos\pi\,\dfrac{t - t_{\text{warm}}}{t_{\text{end}} - t_{\text{warm}}}\Bigr)
# & t \ge t_{\text{warm}} . \end{cases} \tag{3.20}
# $$
#
# Warm-up, because the running means of squares in the first steps are guesses from a few gradients, and dividing by a
# bad guess makes bad steps. The long way down, because a fixed step size leaves the weights jittering around a minimum,
# at a distance that shrinks with the step.
#
# **And over batches.** The peak of a recipe is given per 256 images,
#
# $$ \text{peak} = \text{base lr} \cdot \frac{B}{256} . \tag{3.21} $$
#
# The reason is a statement about plain gradient descent. Take $j$ steps of size lr, on batches of $B$, while the
# weights hardly change: they add up to lr times the sum of $j$ mean gradients. One step on the union of those batches,
# of $jB$ images, has one mean gradient; it moves as far with the step size $j \cdot \text{lr}$ ([Goyal et
# al.](https://arxiv.org/abs/1706.02677)). For AdamW, whose step does not grow with the gradient, that proof fails, and
# (3.21) is a custom which the paper's recipes follow.

# %%
def lr_at(t, steps, warmup, peak):
    if t < warmup:
        return peak * t / warmup
    return peak * (1 + math.cos(math.pi * (t - warmup) / (steps - warmup))) / 2


settings = checkpoint["settings"]
peak = settings["base_lr"] * settings["batch"] / 256
train_index, held_out = pretrain.hold_out(len(train), settings["holdout"])
_, _, per_epoch = pretrain.plan(args.batch, args.device_batch, len(train_index))
steps, warmup = args.epochs * per_epoch, int(args.warmup_epochs * per_epoch)
assert optimizer.defaults["lr"] == peak == 0.004
paper = pretrain.RECIPES["imagenet-base"]
assert math.isclose(paper["base_lr"] * paper["batch"] / 256, 2.4e-3)                      # 16 times the base
for t in range(steps):
    assert math.isclose(lr_at(t, steps, warmup, peak), model.learning_rate(t, steps, warmup, peak), abs_tol=1e-12)

rows = [json.loads(line) for line in (ROOT / "results/digits/pretrain.jsonl").read_text().splitlines()]
for row in rows:                                                                          # a row stands after its step
    assert math.isclose(row["lr"], lr_at(row["step"] - 1, steps, warmup, peak), rel_tol=1e-9)

weights = torch.randn(8, dtype=torch.float64)                                             # (3.21) for plain descent
points, answers = torch.randn(4 * 32, 8, dtype=torch.float64), torch.randn(4 * 32, dtype=torch.float64)


def mean_gradient(part):
    """Of least squares on a part of the points."""
    return 2 * points[part].T @ (points[part] @ weights - answers[part]) / len(points[part])


small_steps = sum(0.1 * mean_gradient(part) for part in torch.arange(128).chunk(4))       # 4 batches of 32 at lr 0.1
torch.testing.assert_close(small_steps, 0.4 * mean_gradient(torch.arange(128)))           # 1 batch of 128 at lr 0.4

figure, axes = plt.subplots(1, 2, figsize=(8.5, 2.8))
axes[0].plot([lr_at(t, steps, warmup, peak) for t in range(steps)], color=BLUE)
axes[0].plot([row["step"] - 1 for row in rows], [row["lr"] for row in rows], "o", color=ORANGE, markersize=4)
axes[0].text(420, 0.0041, "(3.20), and the run's log", color="0.2")
axes[0].set(xlabel="optimizer step", ylabel="learning rate", xlim=(-20, steps + 20), ylim=(0, 0.0045))
axes[1].plot([row["step"] for row in rows], [row["loss"] for row in rows], "o-", color=BLUE, markersize=3)
axes[1].axhline(mean_image, color=GREY, linestyle="--")
axes[1].text(400, mean_image - 0.02, "answer with the mean image", color=GREY, va="top")
axes[1].set(xlabel="optimizer step", ylabel="loss (normalised pixels)\nmean of 50 steps", xlim=(-20, steps + 20), ylim=(0, 0.9))
plt.show()

# %% [markdown]
# Right, the loss of the committed run. (The first point is the mean of 50 steps of warm-up.) Layer-wise rates,
# stochastic depth and label smoothing belong to fine-tuning: notebook 04.

# %% [markdown]
# ## 3.13 Several processes
#
# Large models train on many GPUs, one process for each. Every process holds all weights and computes the gradient on
# its share of the batch; then the processes exchange gradients, and all take the same step. PyTorch's
# `DistributedDataParallel` (DDP) *averages* the gradients. When is that average the gradient of the whole batch?
#
# Let $B$ images be dealt to $G$ processes, $B_j$ to the $j$-th, in disjoint shares $\mathcal B_j$. Each takes the mean
# of its images' losses $\mathcal L_i$.
#
# $$
# \frac1G \sum_{j=1}^G \nabla \Bigl[\frac{1}{B_j} \sum_{i \in \mathcal B_j} \mathcal L_i\Bigr]
# = \nabla \Bigl[\frac1B \sum_{i=1}^{B} \mathcal L_i \Bigr]
# \quad\text{for all losses, if and only if}\quad B_1 = \dots = B_G = \frac BG . \tag{3.22}
# $$
#
# *Proof.* The gradient is linear, so the left side gives image $i \in \mathcal B_j$ the weight $1/(G B_j)$; the right
# side gives it $1/B$. If $B_j = B/G$ for all $j$, the weights are the same, and so are the sums. If they are the same
# sums for all losses, let all losses but one in $\mathcal B_j$ be constant: then $1/(GB_j) = 1/B$, and this for every
# $j$. $\square$
#
# So the scripts refuse a batch that the number of processes does not divide (`pretrain.plan`). Two conditions hide in
# the notation:
#
# * **$\mathcal L_i$ belongs to image $i$ alone.** LayerNorm respects that; BatchNorm does not, see below. So does
#   $\mathcal L_{\text{dropped}}$, since every image drops the same number of patches. With a coin per patch, the mean
#   over dropped patches would weigh images unequally, and differently in each share.
# * **All processes have the same weights.** They begin with rank 0's and take the same steps.
#
# **Micro-batches.** A share that does not fit into memory is cut into $\nu$ equal micro-batches. Their gradients add
# up in `.grad`, so each loss is divided by $\nu$ before `backward()`: (3.22) once more, in time in place of space. DDP
# exchanges gradients during every `backward()`; only the last exchange is needed. DDP's `no_sync` leaves the others
# out. All that it does is to set `require_backward_grad_sync`, and so does `train_step`, which is all of it:

# %%
show(pretrain.train_step, pretrain.micro_batches)

# %% [markdown]
# **Which images.** Step $t$ takes the next $B$ images in the epoch's order, whatever the number of processes.
# `micro_batches` deals them out, and the shares are disjoint. (A process is number `RANK` of `WORLD`, as `torchrun`
# says; here we say it.)

# %%
def dealt_to(rank, processes, device_batch):
    """The images of each micro-batch of the first epoch, of that process among so many."""
    with mock.patch.multiple(pretrain, RANK=rank, WORLD=processes):
        return pretrain.micro_batches(train_index, 128, device_batch, epoch=0, seed=0)


everything = torch.cat(dealt_to(0, 1, 128)[:3])                                           # of three steps
order = torch.randperm(len(train_index), generator=pretrain.generator(pretrain.seed_of(0, 0)))
assert torch.equal(everything, train_index[order[:3 * 128]])
for processes in (2, 4):
    with mock.patch.multiple(pretrain, WORLD=processes):
        device_batch, micro_batches, _ = pretrain.plan(128, 16, len(train_index))
    dealt = torch.cat([part for rank in range(processes)
                       for part in dealt_to(rank, processes, device_batch)[:3 * micro_batches]])
    assert device_batch * micro_batches * processes == 128
    assert torch.equal(dealt.sort().values, everything.sort().values) and len(dealt.unique()) == len(dealt)
print("2 or 4 processes see the images that one process sees, each of them once")
try:
    with mock.patch.multiple(pretrain, WORLD=3):
        pretrain.plan(128, 128, len(train_index))
except ValueError as refusal:
    print(f"3 processes: {refusal}")
else:
    raise AssertionError("unequal shares must be refused")

# %% [markdown]
# **Now with two real processes.** The script below is started by `torchrun` on this machine's CPU (with `gloo` for the
# exchange). It uses the scripts' `start_processes`, `parallelise`, `plan` and `micro_batches`. Every image gets noise
# and mask numbers that we fix beforehand, so that only the dealing changes. It writes down what each rank's gradient
# is after
#
# * the first batch of 128 images, as 2 processes × 2 micro-batches × 32 images, with `no_sync`;
# * the same without `no_sync`;
# * the same batch in *unequal* shares of 120 and 8 images;
#
# and then the losses of three true steps of `train_step`. A hook counts the exchanges.

# %%
SCRIPT = '''
import sys

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import pretrain

folder = sys.argv[1]
device = torch.device("cpu")
pretrain.start_processes(device)
args = pretrain.parse([])
images = pretrain.open_images("digits", None, True, 8, 1, device)
train, _ = pretrain.hold_out(len(images.labels), args.holdout)
device_batch, micro_batches, _ = pretrain.plan(args.batch, 32, len(train))
noise, uniforms, whole = torch.load(f"{folder}/fixed.pt")          # of every training image; the first batch
network = pretrain.build_model(args, device)
parallel = pretrain.parallelise(network, args, device)
exchanges = []


def counted(state, bucket):
    exchanges.append(bucket.buffer().numel())
    return allreduce_hook(state, bucket)


def gradient(parts, no_sync):
    """(gradient, number of exchanges) after one backward pass for each part, a list of images."""
    exchanges.clear()
    for number, part in enumerate(parts):
        x = images.items.tensors[0][part] / images.white
        parallel.require_backward_grad_sync = not no_sync or number == len(parts) - 1
        loss, _, _ = parallel(x, args.sigma, args.mask_ratio, noise[part], uniforms[part])
        (loss / len(parts)).backward()
    flat = torch.cat([p.grad.flatten() for p in network.parameters() if p.requires_grad])
    parallel.zero_grad()
    return flat, len(exchanges)


parallel.register_comm_hook(None, counted)
epoch = pretrain.micro_batches(train, args.batch, device_batch, 0, args.seed)
shares = [part.tolist() for part in epoch[:micro_batches]]
found = {
    "shares": shares,
    "with no_sync": gradient(shares, no_sync=True),
    "without": gradient(shares, no_sync=False),
    "unequal": gradient([whole[:120] if pretrain.RANK == 0 else whole[120:]], no_sync=True),
}

optimizer = pretrain.build_optimizer(network, args)
batches = pretrain.load_batches(images, epoch, device)
found["losses"] = [
    pretrain.train_step(parallel, optimizer, batches, micro_batches, args, step).item()
    for step in range(3)
]
torch.save(found, f"{folder}/rank{pretrain.RANK}.pt")
'''

torch.manual_seed(1)
fixed_noise, fixed_numbers = torch.randn_like(train), torch.rand(len(train), N)
whole = train_index[order[:args.batch]].tolist()
with tempfile.TemporaryDirectory() as folder:
    torch.save((fixed_noise, fixed_numbers, whole), f"{folder}/fixed.pt")
    Path(folder, "shares.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, f"{folder}/shares.py", folder], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(f"{folder}/rank{rank}.pt") for rank in range(2)]

# %% [markdown]
# In this process, without any of that machinery, the gradient is one mean over one batch:

# %%
def gradient(images):
    """The gradient of the mean loss of these training images, each with its fixed noise and mask numbers."""
    network = pretrain.build_model(args, torch.device("cpu"))                             # before its first step
    loss, _, _ = network(train[images], args.sigma, args.mask_ratio, fixed_noise[images], fixed_numbers[images])
    loss.backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.requires_grad])


def difference(one, other):
    """Relative to the gradient's length."""
    return ((one - other).norm() / other.norm()).item()


assert sorted(sum(ranks[0]["shares"] + ranks[1]["shares"], [])) == sorted(whole)          # the same 128 images
for key in ("with no_sync", "without", "unequal"):
    assert torch.equal(ranks[0][key][0], ranks[1][key][0])                                # both ranks: the same bits

together = gradient(whole)
equal, calls = ranks[0]["with no_sync"]
chatty, more_calls = ranks[0]["without"]
unequal, _ = ranks[0]["unequal"]
assert difference(equal, together) < 1e-5 and difference(chatty, together) < 1e-5         # (3.22), "if"
assert more_calls == 2 * calls                                                            # what no_sync saves
assert difference(unequal, together) > 0.02                                               # (3.22), "only if"
assert difference(unequal, (gradient(whole[:120]) + gradient(whole[120:])) / 2) < 1e-5      # its weights are 1/(G B_j)
print(f"equal shares: differs from one process by {difference(equal, together):.0e} of the gradient's length, "
      f"{calls} exchange with no_sync, {more_calls} without")
print(f"shares of 120 and 8: differs by {difference(unequal, together):.0%}")

# %% [markdown]
# Not the same *bits*: floating-point sums depend on their order.
#
# **A seed per rank.** In a true run noise and masks are drawn on the spot, after seeding from (seed, step, micro-batch,
# rank). Without the rank in it, two processes would draw the same noise for different images. The gradient's mean would
# stay right. Its variance would grow, since an average over equal noise does not average the noise away. So with
# another number of processes the images, the batch and the schedule are the same, and the draws are not. One process
# that imitates two, rank by rank with the ranks' own seeds, must reproduce the losses of the two.

# %%
first = pretrain.draw_corruption(train[:32], dmae.grid, args.seed, 0, 0, 0)
again = pretrain.draw_corruption(train[:32], dmae.grid, args.seed, 0, 0, 0)
other_rank = pretrain.draw_corruption(train[:32], dmae.grid, args.seed, 0, 0, 1)
assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
assert abs(torch.corrcoef(torch.stack([first[0].flatten(), other_rank[0].flatten()]))[0, 1]) < 0.1


def three_losses(processes, device_batch):
    """Three steps on one process, with the noise that so many processes would draw."""
    network = pretrain.build_model(args, torch.device("cpu"))
    optimizer = pretrain.build_optimizer(network, args)
    losses, micro_batches = [], 128 // processes // device_batch
    for step in range(3):
        total = 0.0
        for rank in range(processes):
            batches = dealt_to(rank, processes, device_batch)[step * micro_batches:(step + 1) * micro_batches]
            for micro, batch in enumerate(batches):
                corruption = pretrain.draw_corruption(train[batch], dmae.grid, args.seed, step, micro, rank)
                loss, _, _ = network(train[batch], args.sigma, args.mask_ratio, *corruption)
                (loss * len(batch) / 128).backward()
                total += loss.item() * len(batch) / 128
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


two_processes = np.mean([rank["losses"] for rank in ranks], axis=0)
imitated, alone = three_losses(2, 32), three_losses(1, 128)
print("two processes:   ", np.round(two_processes, 4))
print("one imitates two:", np.round(imitated, 4))
print("one, as itself:  ", np.round(alone, 4))
np.testing.assert_allclose(imitated, two_processes, rtol=1e-3)
assert abs(alone[0] / two_processes[0] - 1) > 1e-4                                        # other noise, other loss
np.testing.assert_allclose(alone, two_processes, rtol=0.2)                                # of the same size

# %% [markdown]
# **BatchNorm's local statistics.** The linear probe of notebook 04 has a BatchNorm, which standardises a feature by its
# mean and variance *over the images at hand*. Under DDP these are the images of one micro-batch. Then $\mathcal L_i$
# depends on the other images of its share, and (3.22) says nothing. The same two halves, once through the plain
# classifier and once through the probe:

# %%
def gradient_of(network, images, classes):
    network.zero_grad()
    F.cross_entropy(network(images), classes).backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()])


torch.manual_seed(0)
for probe in (False, True):
    vit = randomised(model.build_vit("vit_digits", num_classes=10, pool="cls", probe=probe)).train().requires_grad_(True)
    images, classes = test[:64].double(), labels[:64]
    halves = (gradient_of(vit, images[:32], classes[:32]) + gradient_of(vit, images[32:], classes[32:])) / 2
    away = difference(halves, gradient_of(vit, images, classes))
    print(f"{'with BatchNorm' if probe else 'with LayerNorm alone'}: two equal halves differ from the whole by {away:.1e}")
    assert away > 0.01 if probe else away < 1e-10

# %% [markdown]
# So a probe's result depends on the device batch and on the number of processes, beyond rounding. DDP also copies
# rank 0's running statistics to all ranks before each forward pass. What the classifier remembers from training is then
# one share's statistics, not the batch's.
#
# **Certification** needs no gradient, and its processes never talk to each other. Images are dealt by stride,
# `[rank::world]`. Each process appends the rows of its images to a file of its own, and whoever finds all rows there
# at its end merges the files, sorted by image (`certify.merge`). An image's noise is drawn from (seed, image, phase).
# So the row depends neither on how many processes there were nor on which of them did it. Here with a linear
# classifier, the nearest class mean:

# %%
means = torch.stack([train[digits["train"].labels == c].mean(0).flatten() for c in range(10)])


def nearest_mean(images):
    return -torch.cdist(images.flatten(1), means)


def certificates(index):
    """{image: (prediction, radius)} for some of the test images."""
    trials = certify.certify_all(nearest_mean, [(i, test[i]) for i in index], SIGMA, n0=100, n=1000, alpha=0.001)
    return {i: certify.certificate(top, *bounds["one-sided"], SIGMA) for i, _, top, _, _, bounds in trials}


chosen = list(range(0, 360, 36))
alone = certificates(chosen)
parts = [certificates(chosen[rank::3]) for rank in range(3)]
assert parts[0] | parts[1] | parts[2] == alone
assert sum(map(len, parts)) == len(alone) and len(set(alone.values())) > 3
print(f"{len(alone)} images, certified by one process or dealt to three: the same predictions and radii")

# %% [markdown]
# ## 3.14 Reconstructions over noise and mask ratio
#
# The trained network on a **test** digit, for five noise levels and four mask ratios. It was trained at one setting
# only (framed); everything else asks it to extrapolate. `pretrain.reconstruct` turns predicted patches into pixels.

# %%
show(pretrain.reconstruct)

# %%
grid_sigmas, grid_gammas = (0, 0.125, 0.25, 0.5, 1.0), (0, 0.25, 0.5, 0.75)
torch.manual_seed(8)
example = test[13:14]
noise, mask_noise = torch.randn_like(example), torch.rand(1, N)
_, prediction, _ = dmae(example, SIGMA, GAMMA, noise, mask_noise)
by_hand = glue(prediction, P, dmae.grid) * dmae.std + dmae.mean
torch.testing.assert_close(pretrain.reconstruct(dmae, example, prediction), by_hand.clamp(0, 1))

figure = plt.figure(figsize=(9.5, 5.6))
halves = figure.subfigures(1, 2, wspace=0.03)
panels = [half.subplots(len(grid_sigmas), len(grid_gammas)) for half in halves]
for row, sigma in enumerate(grid_sigmas):
    for column, gamma in enumerate(grid_gammas):
        _, prediction, mask = dmae(example, sigma, gamma, noise, mask_noise)
        draw(panels[0][row, column], grey_out(example + sigma * noise, mask)[0, 0])
        draw(panels[1][row, column], pretrain.reconstruct(dmae, example, prediction)[0, 0])
        for panel in panels:
            if row == 0:
                panel[row, column].set_title(f"{gamma:.0%} dropped", fontsize=9)
            if column == 0:
                panel[row, column].set_ylabel(f"$\\sigma$ = {sigma:g}")
            if (sigma, gamma) == (SIGMA, GAMMA):
                for spine in panel[row, column].spines.values():
                    spine.set(color=ORANGE, linewidth=3)
for half, title in zip(halves, ("what the encoder gets", "what the decoder answers"), strict=True):
    half.suptitle(f"digit {labels[13]}: {title}", fontsize=11)
plt.show()

# %% [markdown]
# One example flatters or insults. Over all 360 test digits, the mean squared error in pixel units, with five draws of
# noise and mask for each cell:

# %%
torch.manual_seed(0)
error = np.array([[np.mean([(dmae(test, sigma, gamma)[0] * dmae.std.square()).item() for _ in range(5)])
                   for gamma in grid_gammas] for sigma in grid_sigmas])
assert (np.diff(error, axis=0) >= -2e-4).all()                                            # more noise is harder everywhere
assert (np.diff(error[:3], axis=1) > 0).all()                      # up to the trained sigma, so are fewer patches
figure, axis = plt.subplots(figsize=(5.6, 3.6))
shown = axis.imshow(error, cmap="viridis", norm="log")
for (row, column), value in np.ndenumerate(error):
    axis.text(column, row, f"{value:.4f}", ha="center", va="center", color="white" if value < 0.06 else "black")
axis.set(xticks=range(4), xticklabels=[f"{gamma:.0%}" for gamma in grid_gammas], yticks=range(5), yticklabels=grid_sigmas,
         xlabel="patches dropped", ylabel=r"noise level $\sigma$")
figure.colorbar(shown, ax=axis, label="mean squared error (pixels in [0, 1])")
plt.show()

# %% [markdown]
# Copying the noisy pixels would cost $\sigma^2$: 0.0156, 0.0625, 0.25 and 1 in the four lower rows. In the lowest one,
# dropping half the patches *helps*: the network was never shown $\sigma = 1$, believes what it sees, and is better off
# seeing less of it.

# %% [markdown]
# ## 3.15 Why denoising teaches what images look like: Tweedie's formula
#
# Take mask ratio 0. Which function $\hat x(\tilde x)$ minimises the expected squared error $\mathbb E\lVert\hat
# x(\tilde x) - x\rVert^2$? The posterior mean $\mathbb E[x \mid \tilde x]$, as always with squares. For Gaussian noise
# it has a remarkable form:
#
# $$
# \boxed{\;\mathbb E[x\mid \tilde x] = \tilde x + \sigma^2\,\nabla \log p(\tilde x)\;}, \qquad
# p(\tilde x) = \int \varphi_\sigma(\tilde x-x)\,\pi(dx) . \tag{3.23}
# $$
#
# Here $\pi$ is the distribution of clean images and $\varphi_\sigma$ the density of $\mathcal N(0,\sigma^2 I)$. The
# gradient is by $\tilde x$. $p$ is the density of the **noisy** images $\tilde x = x + e$, not of the clean ones (which
# may have no density at all, if images live on a surface).
#
# *Derivation.* The Gaussian satisfies $\nabla\varphi_\sigma(\tilde x-x) = \frac{x-\tilde x}{\sigma^2}\,
# \varphi_\sigma(\tilde x-x)$. Differentiate under the integral and divide by $p(\tilde x)$:
#
# $$
# \nabla\log p(\tilde x)
# = \frac{1}{p(\tilde x)}\int \frac{x-\tilde x}{\sigma^2}\,\varphi_\sigma(\tilde x-x)\,\pi(dx)
# = \frac{1}{\sigma^2}\int (x-\tilde x)\,\pi(dx\mid \tilde x) = \frac{\mathbb E[x\mid \tilde x]-\tilde x}{\sigma^2},
# \tag{3.24}
# $$
#
# since $\varphi_\sigma(\tilde x-x)\,\pi(dx)/p(\tilde x)$ is $\pi(dx\mid \tilde x)$ by Bayes' rule. Solve for the mean.
# $\square$
#
# In words: the best denoiser takes a step uphill on the log-density of noisy images, of a size that the noise dictates.
# Anyone who denoises well at every $\tilde x$ knows the slope of the log-density at every $\tilde x$. No label was
# needed for that, and this is the sense in which the loss over kept patches is density estimation. The line of the
# scripts that makes it so is the loss of section 3.9: the square of prediction minus *clean* target.
#
# **Check on a Gaussian mixture.** Let $\pi = \sum_j \pi_j\,\mathcal N(\bar x_j, \Sigma_j)$ in the plane, with weights
# $\pi_j$ that add up to 1. Then $p = \sum_j \pi_j\,\mathcal N(\bar x_j, \Sigma_j+\sigma^2I)$. One side of the formula
# is computed by automatic differentiation of $\log p$. The other is computed by brute force, without any formula for
# the posterior: draw millions of pairs $(x, \tilde x)$ and average the $x$ of those whose $\tilde x$ fell into a small
# cell. And once more by integrating Bayes' rule on a grid.

# %%
weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
centres = torch.tensor([[-1.5, 0.0], [1.2, 1.0], [0.8, -1.4]], dtype=torch.float64)
covariances = torch.tensor([[[0.30, 0.15], [0.15, 0.20]], [[0.10, -0.05], [-0.05, 0.25]], [[0.05, 0.0], [0.0, 0.05]]],
                           dtype=torch.float64)
sigma = 0.7


def log_density(points, variance):
    """log of the mixture's density after adding N(0, variance I)."""
    spread = covariances + variance * torch.eye(2, dtype=torch.float64)
    parts = torch.distributions.MultivariateNormal(centres, spread)
    return torch.logsumexp(weights.log() + parts.log_prob(points[:, None]), dim=1)


def tweedie(points, variance_of_density):
    points = points.clone().requires_grad_()
    (score,) = torch.autograd.grad(log_density(points, variance_of_density).sum(), points)
    return points.detach() + sigma**2 * score


line = torch.linspace(-6, 6, 241, dtype=torch.float64)                                    # Bayes' rule on a grid of x
x_grid = torch.cartesian_prod(line, line)
prior = log_density(x_grid, 0.0)
seen = torch.tensor([[-1.5, 0.5], [0.0, 0.0], [1.0, -0.2], [2.5, 2.0], [-0.3, -1.5]], dtype=torch.float64)
posterior = torch.softmax(prior - torch.cdist(seen, x_grid).square() / (2 * sigma**2), dim=1) @ x_grid
torch.testing.assert_close(tweedie(seen, sigma**2), posterior, rtol=1e-6, atol=1e-6)
wrong = (tweedie(seen, 0.0) - posterior).norm(dim=1)
print(f"with the density of noisy images: largest error {(tweedie(seen, sigma**2) - posterior).norm(dim=1).max():.1e}")
print(f"with the density of clean images instead: errors from {wrong.min():.2f} to {wrong.max():.2f}")
assert wrong.min() > 0.05

rng = np.random.default_rng(0)                                                            # pairs, counted in cells
which = rng.choice(3, 2_000_000, p=weights.numpy())
factors = np.linalg.cholesky(covariances.numpy())
x_drawn = centres.numpy()[which] + np.einsum("nij,nj->ni", factors[which], rng.normal(size=(len(which), 2)))
noisy_drawn = x_drawn + sigma * rng.normal(size=x_drawn.shape)
for point, expected in zip(seen.numpy(), tweedie(seen, sigma**2).numpy(), strict=True):
    near = np.abs(noisy_drawn - point).max(axis=1) < 0.08
    error = x_drawn[near].std(axis=0) / math.sqrt(near.sum())
    assert (np.abs(x_drawn[near].mean(axis=0) - expected) < 5 * error + 0.01).all()
print("the average x of the pairs whose noisy image fell near a point agrees at all five points")

# %%
axis_line = torch.linspace(-3.3, 3.3, 12, dtype=torch.float64)
arrows = torch.cartesian_prod(axis_line, axis_line)
fine = torch.linspace(-3.6, 3.6, 91, dtype=torch.float64)
background = torch.cartesian_prod(fine, fine)
figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), sharex=True, sharey=True)
titles = "clean $x \\sim \\pi$", f"noisy $\\tilde{{x}} \\sim p$, $\\sigma$ = {sigma}"
for axis, variance, title in zip(axes, (0.0, sigma**2), titles, strict=True):
    density = log_density(background, variance).exp().view(91, 91).T
    shown = axis.contourf(fine, fine, density, 8, cmap="Blues")
    axis.set_aspect("equal")
    axis.set(title=title, xlabel="first coordinate")
    figure.colorbar(shown, ax=axis, label="density", shrink=0.85)
step = (tweedie(arrows, sigma**2) - arrows).numpy()
axes[1].quiver(*arrows.numpy().T, *step.T, angles="xy", scale_units="xy", scale=1, color=ORANGE, width=0.004)
axes[0].scatter(*tweedie(arrows, sigma**2).numpy().T, s=10, color=ORANGE)
axes[0].text(-3.4, 3.2, r"dots: $E[x \mid \tilde{x}]$, the arrows' heads", color=ORANGE, va="center")
axes[0].set(ylabel="second coordinate", xlim=(-3.6, 3.6), ylim=(-3.6, 3.6))
plt.show()

# %% [markdown]
# Right: the arrows run from $\tilde x$ to $\mathbb E[x\mid \tilde x]$, uphill on the noisy density. Left: where they
# end. They do not reach the nearest mode; a point between two clusters is sent between them, for the mean does not
# decide.

# %% [markdown]
# ### The trained autoencoder, beside an exact posterior mean
#
# For real digits $\pi$ is unknown. One exactly solvable stand-in is the *empirical* distribution, which puts equal mass
# on each image of the training set $\mathcal T$. Its posterior is a softmax of squared distances, and its mean
#
# $$
# \mathbb E_{\mathcal T}[x\mid \tilde x] = \sum_{z \in \mathcal T} \Pr(z \mid \tilde x)\,z, \qquad
# \Pr(z \mid \tilde x) \propto \exp\Bigl(-\frac{\lVert\tilde x-z\rVert^2}{2\sigma^2}\Bigr) . \tag{3.25}
# $$
#
# This is Tweedie's formula for a mixture of equal Gaussians. (Notebook 04 uses the same posterior as a classifier.) No
# denoiser has a smaller expected error on *training* digits with fresh noise. On test digits the theorem says nothing:
# this denoiser can only answer with averages of images it has stored. The autoencoder, at mask ratio 0, is our other
# candidate. It was trained with a quarter of the patches missing, and at $\sigma = 0.25$ alone.

# %%
def empirical_mean(noisy, sigma):
    """E[x | noisy] if x is one of the training images, each with the same probability."""
    weights = torch.softmax(-torch.cdist(noisy.flatten(1), train.flatten(1)).square() / (2 * sigma**2), dim=1)
    return (weights @ train.flatten(1)).view_as(noisy)


def autoencoder(x, sigma, noise):
    _, prediction, _ = dmae(x, sigma, 0.0, noise)
    return glue(prediction, P, dmae.grid) * dmae.std + dmae.mean


few = train[:4].double().flatten(1)                              # the weighted mean is Tweedie's step: check on 4 images
seen = (test[:6].double().flatten(1)).requires_grad_()
log_p = torch.logsumexp(-torch.cdist(seen, few).square() / (2 * 0.5**2), dim=1)
by_score = seen + 0.5**2 * torch.autograd.grad(log_p.sum(), seen)[0]
by_weights = torch.softmax(-torch.cdist(seen, few).square() / (2 * 0.5**2), dim=1) @ few
torch.testing.assert_close(by_score, by_weights)

levels = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
torch.manual_seed(0)
errors = {}
for split, images in (("training", train[::4]), ("test", test)):
    for sigma in levels:
        noise = torch.randn_like(images)
        outputs = {"autoencoder": autoencoder(images, sigma, noise), "empirical": empirical_mean(images + sigma * noise, sigma)}
        for name, output in outputs.items():
            errors.setdefault((split, name), []).append((output - images).square().mean().item())
place = levels.index(SIGMA)
stored, learnt = np.array(errors["training", "empirical"]), np.array(errors["training", "autoencoder"])
assert (stored < learnt).all()                                                            # optimal there, by Tweedie
assert errors["test", "autoencoder"][place] < errors["test", "empirical"][place]          # but not on new digits

figure, axes = plt.subplots(1, 2, figsize=(9, 3.3), sharey=True)
for axis, split in zip(axes, ("training", "test"), strict=True):
    axis.plot(levels, errors[split, "autoencoder"], "o-", color=BLUE)
    axis.plot(levels, errors[split, "empirical"], "s-", color=ORANGE)
    axis.plot(levels, np.square(levels), ":", color="0.2")
    axis.axvline(SIGMA, color="0.8", zorder=0)
    axis.set(xlabel=r"noise level $\sigma$ (pixels in [0, 1])", title=f"{split} digits, fresh noise",
             xlim=(0.08, 0.54), ylim=(0, 0.1))
axes[0].set_ylabel("mean squared error\n(pixels in [0, 1])")
axes[0].text(0.31, 0.05, "autoencoder,\nmask ratio 0", color=BLUE, ha="left")
axes[1].text(0.35, 0.008, "posterior mean\nover training digits", color=ORANGE)
axes[0].text(0.33, 0.085, "copy the noisy\n" r"pixels, $\sigma^2$", color="0.2")
plt.show()

# %% [markdown]
# The two panels tell memorising from learning. The empirical posterior wins everywhere on the images it stores, where
# it is provably optimal. On new digits and near the noise level of its training (grey line) the autoencoder wins, since
# it recombines strokes instead of recalling whole images. At small noise the empirical answer is stuck at the distance
# of the nearest neighbour; at large noise the autoencoder, never trained there, falls behind.

# %%
torch.manual_seed(4)
places = [30, 52, 75, 101, 137, 180, 222, 300]
chosen = test[places]
noise = torch.randn_like(chosen)
noisy = chosen + SIGMA * noise
rows = {"clean $x$": chosen, f"noisy $\\tilde{{x}}$\n$\\sigma$ = {SIGMA}": noisy,
        "autoencoder": autoencoder(chosen, SIGMA, noise), "empirical\nposterior mean": empirical_mean(noisy, SIGMA)}
figure, axes = plt.subplots(4, len(chosen), figsize=(8.5, 4.5))
for line, (title, images) in zip(axes, rows.items(), strict=True):
    line[0].set_ylabel(title, rotation=0, ha="right", va="center")
    for axis, image in zip(line, images, strict=True):
        draw(axis, image[0])
for axis, label in zip(axes[0], labels[places], strict=True):
    axis.set_title(f"digit {label}", fontsize=9)
for line in axes:
    line[0].yaxis.set_label_coords(-0.1, 0.5)
plt.show()

# %% [markdown]
# Three reservations, to know what Tweedie's formula does and does not say about DMAE:
#
# * **With a mask**, the kept part of the answer is $\mathbb E[x_i\mid \tilde x_{\text{kept}}] = \tilde x_i +
#   \sigma^2\nabla_i \log p(\tilde x_{\text{kept}})$, by the same derivation for the density of what is left. The
#   dropped part is a regression on the noisy surroundings, not a score.
# * **With norm-pix** the target is a nonlinear function of $x$. The best answer is then
#   $\mathbb E[x_i^{\text{norm}}\mid \tilde x]$, and dividing its difference from $\tilde x$ by $\sigma^2$ gives no
#   score.
# * **The encoder is what we keep.** Nothing proves that good denoising makes good features. That it does so here is an
#   experiment, and notebook 04 makes it, with its unflattering comparisons.

# %% [markdown]
# ## 3.16 What to take along
#
# * DMAE spoils an image by noise, (3.2), and by a mask, (3.7), and asks for the clean image on *all* patches, (3.16).
#   With $\sigma = 0$ and the loss on the dropped patches it is MAE.
# * A transformer adds up branches, (3.12). Tokens exchange information in attention alone, (3.9).
# * The encoder sees the kept patches only. That takes about a quarter of the operations at $\gamma = 0.75$, (3.14).
# * AdamW's step has no unit, and its decay is decoupled from the gradient, (3.19).
# * The average of the processes' gradients is the gradient of the batch's mean if and only if the shares are equal,
#   (3.22). It takes losses that belong to one image each.
# * The best denoiser steps uphill on the log-density of *noisy* images, (3.23). That it makes good features is not a
#   theorem.
#
# Notebook 04 makes a classifier of the encoder.
#
# ## 3.17 Exercises
#
# 1. **The root in (3.9).** Let the entries of a query and a key of length $D/h$ be independent, with mean 0 and
#    variance 1. Show that their inner product has variance $D/h$. *Hint:* the terms of the sum are uncorrelated.
# 2. **Another patch side.** The digits are cut with $P = 2$. What is the encoder's cost with $P = 4$, relative to $P =
#    2$, without a mask? And why is it not done? *Hint:* (3.14) with MLP ratio 2, $D = 64$; how many squares of side 4
#    does a digit have?
# 3. **A loss that can be cheated.** A network is trained with $\sigma = 0$ and $\mathcal L_{\text{all}}$. Which map
#    brings $\mathcal L_{\text{kept}}$ to zero, and is attention needed for it? What has it learned? *Hint:* (3.17).
# 4. **Unequal shares, mended.** Three processes have 50, 50 and 28 images. By which number must each multiply its mean
#    loss, so that DDP's average is the gradient of the batch's mean? *Hint:* the weights in the proof of (3.22).
# 5. **The second derivative.** Show that the Jacobian of the best denoiser is
#    $\operatorname{Cov}[x \mid \tilde x]/\sigma^2$. So its divergence tells how uncertain the image is. *Hint:*
#    differentiate $\mathbb E[x \mid \tilde x] = \int x\,\pi(dx \mid \tilde x)$, with (3.24) for the derivative of
#    $\log p$.
#
# <details><summary><b>Answers</b></summary>
#
# 1. Each term $Q_l K_l$ has mean $0$ and variance $\mathbb E[Q_l^2]\,\mathbb E[K_l^2] = 1$. Different terms are
#    independent, so that the variances add up, to $D/h$.
# 2. There are four patches in place of sixteen, so $S = 5$ in place of 17. With MLP ratio 2 a block costs $16SD^2 +
#    4S^2D$: 334 080 operations in place of 1 188 096, or 0.28 times as much. It is not done because a quarter of a
#    digit is too much to lose: one dropped patch would be a quadrant.
# 3. The identity on each patch. It needs no attention: every token can keep its own pixels. It learns nothing about
#    images from the kept patches; only $\mathcal L_{\text{dropped}}$, with the weight $\gamma$, teaches.
# 4. By $G B_j / B$: $150/128$, $150/128$ and $84/128$. Image $i \in \mathcal B_j$ then has the weight
#    $\frac{1}{G B_j} \cdot \frac{G B_j}{B} = \frac1B$.
# 5. $\pi(dx\mid\tilde x) \propto \varphi_\sigma(\tilde x - x)\,\pi(dx)$, so its logarithmic derivative by $\tilde x$ is
#    $\frac{x - \tilde x}{\sigma^2} - \nabla\log p(\tilde x) = \frac{x - \mathbb E[x\mid\tilde x]}{\sigma^2}$. Hence the
#    Jacobian is $\int x\,(x - \mathbb E[x\mid\tilde x])^\top \pi(dx\mid\tilde x)/\sigma^2$, the covariance over
#    $\sigma^2$.
#
# </details>
#
# The answers that have numbers, checked:

# %%
torch.manual_seed(0)
products = (torch.randn(100_000, 32) * torch.randn(100_000, 32)).sum(1)                   # answer 1
assert abs(products.var().item() / 32 - 1) < 0.05

costs = {S: 16 * S * 64**2 + 4 * S**2 * 64 for S in (5, 17)}                              # answer 2
assert costs == {5: 334_080, 17: 1_188_096} and round(costs[5] / costs[17], 2) == 0.28

shares = [whole[:50], whole[50:100], whole[100:]]                                         # answer 4
averaged = sum(3 * len(share) / 128 * gradient(share) for share in shares) / 3
assert difference(averaged, gradient(whole)) < 1e-5

sigma = 0.7                                                                               # answer 5, on the mixture
point = torch.tensor([[0.3, -0.4]], dtype=torch.float64)
by_hand = torch.softmax(prior - torch.cdist(point, x_grid).square() / (2 * sigma**2), dim=1)[0]
centred = x_grid - by_hand @ x_grid
covariance = (by_hand[:, None] * centred).T @ centred
shift = 1e-4 * torch.eye(2, dtype=torch.float64)
jacobian = (tweedie(point + shift, sigma**2) - tweedie(point - shift, sigma**2)) / 2e-4
torch.testing.assert_close(jacobian, covariance / sigma**2, rtol=1e-5, atol=1e-5)
print("answers 1, 2, 4 and 5 hold")

# %% [markdown]
# ## References
#
# * Q. Wu, H. Ye, Y. Gu, H. Zhang, L. Wang, D. He, *Denoising Masked Autoencoders Help Robust Classification*, ICLR
#   2023, [arXiv 2210.06983](https://arxiv.org/abs/2210.06983): the method.
# * K. He, X. Chen, S. Xie, Y. Li, P. Dollár, R. Girshick, *Masked Autoencoders Are Scalable Vision Learners*, CVPR
#   2022, [arXiv 2111.06377](https://arxiv.org/abs/2111.06377): masks, encoder, decoder, norm-pix.
# * A. Vaswani et al., *Attention Is All You Need*, NeurIPS 2017, [arXiv 1706.03762](https://arxiv.org/abs/1706.03762).
# * A. Dosovitskiy et al., *An Image is Worth 16x16 Words*, ICLR 2021,
#   [arXiv 2010.11929](https://arxiv.org/abs/2010.11929): the vision transformer.
# * J. L. Ba, J. R. Kiros, G. E. Hinton, *Layer Normalization*, 2016,
#   [arXiv 1607.06450](https://arxiv.org/abs/1607.06450).
# * R. Xiong et al., *On Layer Normalization in the Transformer Architecture*, ICML 2020,
#   [arXiv 2002.04745](https://arxiv.org/abs/2002.04745): before or after the addition.
# * D. Hendrycks, K. Gimpel, *Gaussian Error Linear Units (GELUs)*, 2016,
#   [arXiv 1606.08415](https://arxiv.org/abs/1606.08415).
# * I. Loshchilov, F. Hutter, *Decoupled Weight Decay Regularization*, ICLR 2019,
#   [arXiv 1711.05101](https://arxiv.org/abs/1711.05101): AdamW; and *SGDR*, ICLR 2017,
#   [arXiv 1608.03983](https://arxiv.org/abs/1608.03983): the cosine.
# * P. Goyal et al., *Accurate, Large Minibatch SGD*, 2017, [arXiv 1706.02677](https://arxiv.org/abs/1706.02677): the
#   learning rate and the batch, warm-up.
# * S. Li et al., *PyTorch Distributed: Experiences on Accelerating Data Parallel Training*, VLDB 2020,
#   [arXiv 2006.15704](https://arxiv.org/abs/2006.15704): DDP.
# * B. Efron, *Tweedie's Formula and Selection Bias*, JASA 2011,
#   [doi 10.1198/jasa.2011.tm11181](https://doi.org/10.1198/jasa.2011.tm11181).
# * P. Vincent, *A Connection Between Score Matching and Denoising Autoencoders*, Neural Computation 2011,
#   [doi 10.1162/NECO_a_00142](https://doi.org/10.1162/NECO_a_00142).
#
# [previous: From counts to certificates](02_from_counts_to_certificates.ipynb) |
# [next: From pre-training to a smoothed classifier](04_from_pretraining_to_smoothed_classifier.ipynb) |
# [contents](README.md)
