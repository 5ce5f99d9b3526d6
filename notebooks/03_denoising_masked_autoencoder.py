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
# A classifier that will be certified by randomized smoothing has to work on very noisy images. Labelled data teach it
# that slowly. The denoising masked autoencoder (DMAE, [arXiv 2210.06983](https://arxiv.org/abs/2210.06983)) teaches it
# without labels: spoil an image twice, by Gaussian noise in every pixel and by throwing most of its patches away, and
# ask for the clean image back.
#
# $$
# x \;\longrightarrow\; y = x + \sigma\varepsilon \;\longrightarrow\; \text{patches} \;\longrightarrow\;
# \text{encoder on the kept ones} \;\longrightarrow\; \text{decoder on all} \;\longrightarrow\; \hat x \approx x .
# $$
#
# This notebook walks along that line. At every stop there is an equation, the reason for it, the code that runs it
# (printed from `model.py`, not retyped), and a cell that checks it against something computed in another way.
#
# The network is the small one that this repository trains on scikit-learn's handwritten digits (8 × 8 pixels). Its
# weights, `results/digits/pretrain.pt`, were made by
#
# ```sh
# python pretrain.py
# ```
#
# in about a minute on two CPU cores. Everything below runs without a GPU or a network connection.

# %%
import inspect
import math
import sys
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

root = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "model.py").exists())
sys.path.insert(0, str(root))
import model as networks
import pretrain
from model import DenoisingMaskedAutoencoder, build_dmae, load_weights, read_checkpoint

# %matplotlib inline
plt.rcParams.update({"figure.facecolor": "white", "savefig.facecolor": "white", "figure.dpi": 100, "font.size": 10,
                     "axes.titlesize": 10, "legend.fontsize": 9, "axes.grid": False, "figure.constrained_layout.use": True})
BLUE, ORANGE, GREEN, PINK, YELLOW = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"


def show_source(*functions):
    """The source of functions of this repository, as it stands in its files."""
    for function in functions:
        display(Markdown(f"```python\n{textwrap.dedent(inspect.getsource(function))}```"))


def draw(axis, image, title=""):
    """One grey image (H, W) in [0, 1], without ticks."""
    axis.imshow(image.clamp(0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xticks=[], yticks=[], title=title)


checkpoint = read_checkpoint(root / "results/digits/pretrain.pt", "pretrain")
dmae = DenoisingMaskedAutoencoder(**checkpoint["config"]).eval().requires_grad_(False)
load_weights(dmae, checkpoint["model"], "results/digits/pretrain.pt")

digits = {split: pretrain.open_images("digits", None, train=split == "train", size=8, channels=1)
          for split in ("train", "test")}
train, test = (images.pixels / images.levels for images in digits.values())
P, N = dmae.patch_size, math.prod(dmae.grid)
SIGMA, RATIO = checkpoint["settings"]["sigma"], checkpoint["settings"]["mask_ratio"]
print(f"{len(train)} training digits and {len(test)} test digits of {test.shape[-1]} x {test.shape[-1]} pixels in [0, 1]; "
      f"{N} patches of {P} x {P}; trained with sigma = {SIGMA} and mask ratio {RATIO}")

# %% [markdown]
# ## 3.1 Noise
#
# $$ y = x + \sigma\,\varepsilon, \qquad \varepsilon \sim \mathcal N(0, I_d), \qquad x \in [0,1]^d . $$
#
# $x$ is the clean image with $d$ pixel values, $\varepsilon$ a vector of independent standard normal numbers, $\sigma$
# the noise level in units of the pixel range, and $y$ the noisy image.
#
# The noise is the one that smoothing will use later, so nothing about it is negotiable: it is added to pixels in
# $[0,1]$, before any resizing or normalisation, and the result is *not* clipped back to $[0,1]$, because the theorem
# about radii is a theorem about unclipped Gaussians. The forward pass is the paper's recipe, line by line; its third
# statement is the equation.

# %%
show_source(DenoisingMaskedAutoencoder.forward)

# %% [markdown]
# How big is that noise? $\|\sigma\varepsilon\|^2/\sigma^2$ is a sum of $d$ squared standard normals, that is, a
# $\chi^2_d$ variable: its length is close to $\sigma\sqrt d$. We catch what the network really receives with a hook on
# its first layer, undo the normalisation, subtract the clean image and compare with the $\chi^2_{64}$ distribution from
# SciPy.

# %%
caught = {}
hook = dmae.patch_embed.register_forward_pre_hook(lambda module, inputs: caught.update(x=inputs[0]))
torch.manual_seed(0)
dmae(test, SIGMA, RATIO)
hook.remove()
added = caught["x"] * dmae.std + dmae.mean - test
squared = (added / SIGMA).flatten(1).square().sum(1)
p_value = stats.kstest(squared.numpy(), stats.chi2(64).cdf).pvalue
print(f"mean of |y - x|^2 / sigma^2: {squared.mean():.2f} (theory: 64); Kolmogorov-Smirnov p-value {p_value:.2f}")
assert p_value > 0.001 and abs(squared.mean() - 64) < 4 * math.sqrt(2 * 64 / len(test))
assert caught["x"].amin() < ((0 - dmae.mean) / dmae.std).amin()                           # nothing was clipped

# %% [markdown]
# The picture sets this against the digits themselves: how far is a test digit from the nearest *training digit of
# another class*? At $\sigma = 0.25$ the noise is already about as long as the way to a different digit. The task is
# possible at all because the noise points in a random direction: along the one direction that leads to the other digit,
# its size is only $\sigma$.

# %%
distance = torch.cdist(test.flatten(1), train.flatten(1))
distance[digits["test"].labels[:, None] == digits["train"].labels] = math.inf
figure, axis = plt.subplots(figsize=(7, 3))
bins = np.linspace(0, 10, 121)
axis.hist(distance.amin(1), bins, density=True, color="0.6", label="nearest digit of another class")
for sigma, colour in zip((0.125, 0.25, 0.5, 1.0), (BLUE, ORANGE, GREEN, PINK), strict=True):
    length = np.linspace(0.01, 10, 1000)
    axis.plot(length, stats.chi(64, scale=sigma).pdf(length), color=colour, label=rf"noise, $\sigma$ = {sigma:g}")
axis.set(xlabel=r"$\ell_2$ length (pixels in [0, 1])", ylabel="probability density", xlim=(0, 10), ylim=(0, 4.8))
axis.legend()
plt.show()

# %% [markdown]
# ## 3.2 Patches
#
# A transformer works on a set of vectors. Cut the image into $N = HW/P^2$ squares of side $P$ and flatten each:
#
# $$ p_{(i,j)}\bigl[(u P + v)\,C + c\bigr] = x_c\,[\,iP+u,\; jP+v\,], \qquad 0 \le u,v < P , $$
#
# with $(i,j)$ the patch's row and column on the grid, $u,v$ the pixel inside the patch, $c$ one of $C$ channels. Each
# patch then becomes a token by one linear map, $t_n = W p_n + b \in \mathbb R^D$.
#
# Why patches rather than pixels: attention compares every token with every other, so its cost grows with $N^2$, and a
# single pixel says little. The order of pixels inside a patch (row, column, channel) is a convention, but one that the
# published weights share. The linear map is written as a convolution whose stride equals its kernel, which is the same
# thing.

# %%
show_source(networks.patchify, networks.unpatchify)

# %%
color = torch.rand(2, 3, 12, 8)                                  # three channels, not square: every axis has its own length
patches = networks.patchify(color, 4)
by_index = [color[1, c, 4 * i + u, 4 * j + v].item() for i in range(3) for j in range(2)
            for u in range(4) for v in range(4) for c in range(3)]                        # the equation, as loops
assert torch.equal(patches[1].flatten(), torch.tensor(by_index))
assert torch.equal(networks.unpatchify(patches, 4, (3, 2)), color)

W, b = dmae.patch_embed.proj.weight, dmae.patch_embed.proj.bias                           # the convolution as W p + b
tokens = networks.patchify(dmae.prepare(test), P) @ W.movedim(1, 3).flatten(1).T + b
torch.testing.assert_close(tokens + dmae.pos_embed[:, 1:], dmae.embed(test), rtol=1e-4, atol=1e-4)
print("patchify is the equation, unpatchify its inverse, the convolution a linear map of patches")

# %% [markdown]
# ## 3.3 Positions
#
# Attention sees a *set*: shuffle the tokens and its answers are shuffled in the same way. Where a patch stood must
# therefore be written into its token. DMAE adds a fixed vector
#
# $$
# e(i,j) = \bigl[\sin(j\omega),\ \cos(j\omega),\ \sin(i\omega),\ \cos(i\omega)\bigr] \in \mathbb R^D, \qquad
# \omega_k = 10000^{-k/(D/4)}, \quad k = 0,\dots,\tfrac D4-1 ,
# $$
#
# where $i$ and $j$ are the patch's row and column, $\omega$ is a list of $D/4$ frequencies from one radian per patch
# down to nearly none, and sine and cosine act on each frequency. The class token's position is zero.
#
# Think of clock hands that turn at different speeds as one walks over the image: fast hands tell neighbours apart, slow
# ones tell left from right. Since $\cos a\cos b + \sin a\sin b = \cos(a-b)$, the inner product of two positions depends
# only on the *displacement* between them:
#
# $$ \langle e(i,j),\, e(i',j')\rangle = \sum_k \cos\bigl(\omega_k (j-j')\bigr) + \cos\bigl(\omega_k (i-i')\bigr) . $$
#
# An attention head can thus look "two patches to the left" with the same weights everywhere.

# %%
show_source(networks.sincos_positions)

# %%
D, side = 768, 14                                                                         # ViT-B/16 at 224 x 224
table = networks.sincos_positions(D, (side, side))[0]
i, j = np.divmod(np.arange(side**2), side)
omega = 10000.0 ** (-np.arange(D // 4) / (D // 4))
predicted = (np.cos((j[:, None] - j)[..., None] * omega) + np.cos((i[:, None] - i)[..., None] * omega)).sum(-1)
np.testing.assert_allclose(table[1:].double() @ table[1:].double().T, predicted, rtol=1e-5)
assert not table[0].any() and math.isclose(table[1 + 3 * side + 5, 0].item(), math.sin(5), rel_tol=1e-6)     # row 3, column 5

figure, axes = plt.subplots(1, 4, figsize=(9.5, 2.9), width_ratios=(1.9, 1, 1, 1))
shown = axes[0].imshow(table[1:], cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
axes[0].set(xlabel="channel", ylabel="patch (row by row)", title="the table $e(i, j)$", xticks=(0, 192, 384, 576))
figure.colorbar(shown, ax=axes[0], label="value")
for axis, (row, column) in zip(axes[1:], ((7, 7), (1, 3), (12, 10)), strict=True):
    similarity = (table[1 + row * side + column] @ table[1:].T / (D / 2)).view(side, side)
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
# ## 3.4 Masks
#
# For every image, independently, keep a uniformly random set of
#
# $$ K = \lfloor N(1-\rho) \rfloor $$
#
# patches, $\rho$ being the mask ratio. The code draws one uniform number $u_n$ per patch and keeps the $K$ patches with
# the smallest. All $N!$ orders of $N$ independent, identically distributed continuous numbers are equally likely, so
# every set of $K$ patches is equally likely too; and unlike a coin per patch, every image keeps *exactly* $K$, which
# makes a batch a rectangular tensor.
#
# Besides the kept indices, the function returns `restore`, the inverse permutation that the decoder needs to put tokens
# back, and `mask`, in which **1 means dropped**.

# %%
show_source(networks.random_masking)

# %%
torch.manual_seed(0)
keep, restore, mask = networks.random_masking(torch.rand(20_000, 6), 0.5)
sets = (1 - mask) @ 2.0 ** torch.arange(6)                                                # each kept set as a number
observed = torch.bincount(sets.long(), minlength=64)
observed = observed[observed > 0]
p_value = stats.chisquare(observed.numpy()).pvalue
print(f"{len(observed)} of {math.comb(6, 3)} possible sets occurred; chi-square test of uniformity: p = {p_value:.2f}")
assert len(observed) == math.comb(6, 3) and p_value > 0.001
assert (mask.sum(1) == 3).all() and not mask.gather(1, keep).any()                        # 3 dropped; the kept ones are not
assert torch.equal(keep, restore.argsort(1)[:, :3])
assert (int(196 * (1 - 0.75)), int(N * (1 - RATIO))) == (49, 12)                          # ViT-B/16 at 0.75; the digits

# %% [markdown]
# One digit on its way into the encoder. Grey patches are not blanked: they are *absent*.

# %%
torch.manual_seed(5)
clean, noise, mask_noise = test[21:22], torch.randn(1, 1, 8, 8), torch.rand(1, N)
_, _, mask = dmae(clean, SIGMA, RATIO, noise, mask_noise)


def grey_out(images, mask):
    """Dropped patches of images (B, 1, H, W) painted grey."""
    pixels = networks.unpatchify(mask[:, :, None].expand(-1, -1, P * P), P, dmae.grid)
    return images * (1 - pixels) + 0.5 * pixels


noisy = clean + SIGMA * noise
figure, axes = plt.subplots(1, 4, figsize=(8.5, 2.4))
titles = "clean $x$", f"noisy $y$, $\\sigma$ = {SIGMA}", f"cut into {N} patches", f"{int(mask.sum())} of {N} dropped"
for axis, image, title in zip(axes, (clean, noisy, noisy, grey_out(noisy, mask)), titles, strict=True):
    draw(axis, image[0, 0], title)
for axis in axes[2:]:
    for line in np.arange(P, 8, P) - 0.5:
        axis.axhline(line, color=YELLOW, linewidth=1)
        axis.axvline(line, color=YELLOW, linewidth=1)
plt.show()

# %% [markdown]
# ## 3.5 The encoder sees kept patches only, and what that saves
#
# Dropped patches are removed from the sequence before the first block. A transformer of width $D$ with $n$ tokens, a
# class token among them, spends in every block
#
# $$
# \text{FLOPs}(n) = \underbrace{8nD^2}_{\text{q, k, v, projection}} + \underbrace{4n^2D}_{\text{attention}}
# + \underbrace{16nD^2}_{\text{MLP, ratio 4}} ,
# $$
#
# counting a multiplication and an addition as two operations. Why: a linear map from $D$ to $D'$ costs $2DD'$ per
# token; attention has four of them with $D' = D$, the MLP two with $D'=4D$. The products of queries with keys, and of
# weights with values, cost $2n^2D$ each. So the cost falls a little faster than the number of tokens, and the
# activations kept for the backward pass shrink in the same way, which allows larger batches.

# %%
show_source(DenoisingMaskedAutoencoder.encode)

# %% [markdown]
# First, that the encoder truly does not see them: spoil the dropped patches as badly as you like, and the prediction
# must not change by a single bit.

# %%
pixels = networks.unpatchify(mask[:, :, None].expand(-1, -1, P * P), P, dmae.grid)
_, before, _ = dmae(clean, SIGMA, RATIO, noise, mask_noise)
_, after, _ = dmae(clean + 1000 * pixels, SIGMA, RATIO, noise, mask_noise)
assert torch.equal(before, after)
print("the prediction is bit for bit the same")

# %% [markdown]
# Then the bill. PyTorch's counter looks at the operations that really run; on the `meta` device they run without data.
# We count ViT-B/16 at 224 × 224 and compare with the formula, to which the patch embedding adds $2N\cdot P^2C\cdot D$
# (it is applied to all $N$ patches; selecting before it would save two more percent).

# %%
vit_b = build_dmae("vit_base_patch16").to("meta")
image = torch.zeros(1, 3, 224, 224, device="meta")


def count(ratio):
    """FLOPs of encoder and decoder for one image."""
    with torch.no_grad(), FlopCounterMode(display=False) as encoder:
        latent, restore, _ = vit_b.encode(image, ratio, torch.rand(1, 196, device="meta"))
    with torch.no_grad(), FlopCounterMode(display=False) as decoder:
        vit_b.decode(latent, restore)
    return encoder.get_total_flops(), decoder.get_total_flops()


def formula(ratio, width=768, depth=12):
    n = 1 + int(196 * (1 - ratio))
    return depth * (24 * n * width**2 + 4 * n**2 * width) + 2 * 196 * 16**2 * 3 * width


ratios = np.array([0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875])
flops = np.array([count(ratio) for ratio in ratios]) / 1e9
np.testing.assert_array_equal(flops[:, 0] * 1e9, [formula(ratio) for ratio in ratios])
full, kept = flops[0], flops[list(ratios).index(0.75)]
print(f"ViT-B/16 encoder: {full[0]:.2f} GFLOP per image on all patches, {kept[0]:.2f} with 3 of 4 dropped: "
      f"{full[0] / kept[0]:.2f} times less")
print(f"with the decoder (8 blocks, width 512, always on all {196} patches): {full.sum():.2f} against {kept.sum():.2f}: "
      f"{full.sum() / kept.sum():.2f} times less")
assert full[0] / kept[0] > 3.9

figure, axis = plt.subplots(figsize=(6.2, 3))
axis.fill_between(ratios, 0, flops[:, 0], color=BLUE, label="encoder, on kept patches", linewidth=0)
axis.fill_between(ratios, flops[:, 0], flops.sum(1), color=YELLOW, label="decoder, on all patches", linewidth=0)
axis.plot((0.75, 0.75), (0, 40), "--", color="0.2")
axis.text(0.74, 37, "the paper's ratio", ha="right", va="center")
axis.set(xlabel="mask ratio", ylabel="forward pass, one image\n(GFLOP)", xlim=(0, 0.875), ylim=(0, 54))
axis.legend(loc="upper right", ncols=2, frameon=False)
plt.show()

# %% [markdown]
# The encoder becomes four times cheaper at $\rho = 0.75$; the decoder, which must look at every place, then dominates.
# This is why the decoder is narrow. It is thrown away after pre-training, so its size costs nothing later.

# %% [markdown]
# ## 3.6 The decoder
#
# Let $z_n$ be the encoder's output for a kept patch $n$, and $A$, $a$ a linear map to the decoder's width. The
# decoder's input is
#
# $$
# s_n = \begin{cases} A z_n + a + e'_n & \text{if patch } n \text{ was kept},\\
# m + e'_n & \text{if it was dropped,}\end{cases}
# $$
#
# with one learned mask token $m$ for all dropped places and the decoder's own positions $e'$. Blocks of attention
# follow, then a linear map to $P^2C$ pixel values.
#
# All dropped places start from the same vector, so that position is all that tells them apart; what belongs there has
# to come by attention from the kept ones. Since `restore` sends patch $n$ to its place in "kept first, then dropped",
# one `gather` puts everything back into image order.

# %%
show_source(DenoisingMaskedAutoencoder.decode)

# %%
hook = dmae.decoder_blocks[0].register_forward_pre_hook(lambda module, inputs: caught.update(s=inputs[0]))
many, many_noise, many_masks = test[:32], torch.randn(32, 1, 8, 8), torch.rand(32, N)
_, _, mask = dmae(many, SIGMA, 0.75, many_noise, many_masks)
hook.remove()
latent, _, _ = dmae.encode(many + SIGMA * many_noise, 0.75, many_masks)
s = caught["s"][:, 1:] - dmae.decoder_pos_embed[:, 1:]
for image in range(32):                                          # the cases of the equation, with boolean indexing
    dropped = mask[image].bool()
    order = many_masks[image].argsort()[:len(latent[image]) - 1]
    expected = torch.full_like(s[image], math.nan)
    expected[dropped] = dmae.mask_token[0, 0]
    expected[order] = dmae.decoder_embed(latent[image, 1:])
    torch.testing.assert_close(s[image], expected, rtol=1e-4, atol=1e-5)
print("every place holds its own token or the mask token")

# %% [markdown]
# ## 3.7 The loss: all patches, or the dropped ones
#
# $$
# L_{\text{all}} = \frac1N \sum_{n=1}^{N} \ell_n, \qquad
# L_{\text{dropped}} = \frac{1}{N-K}\sum_{n\,\text{dropped}} \ell_n, \qquad
# \ell_n = \frac{1}{P^2C}\bigl\|\hat x_n - x_n\bigr\|^2 ,
# $$
#
# where $x_n$ is the *clean* (normalised) patch and $\hat x_n$ the prediction. MAE uses $L_{\text{dropped}}$: without
# noise, a kept patch could simply be copied, and there is nothing to learn from it. With noise the kept patches become
# a task of their own, to denoise, and DMAE asks for it. Splitting the sum shows the two tasks and their weights:
#
# $$ L_{\text{all}} = \tfrac{K}{N}\,L_{\text{kept}} + \tfrac{N-K}{N}\,L_{\text{dropped}} . $$

# %%
show_source(DenoisingMaskedAutoencoder.loss, DenoisingMaskedAutoencoder.target)


# %%
mae = DenoisingMaskedAutoencoder(**checkpoint["config"] | {"loss_on": "dropped"}).eval().requires_grad_(False)
load_weights(mae, checkpoint["model"], "results/digits/pretrain.pt")                      # the same network, the other loss

torch.manual_seed(0)
noise, mask_noise = torch.randn_like(test), torch.rand(len(test), N)
l_all, prediction, mask = dmae(test, SIGMA, RATIO, noise, mask_noise)
target = dmae.target(test)
l_dropped, l_kept = mae.loss(target, prediction, mask), mae.loss(target, prediction, 1 - mask)

picture = networks.unpatchify(prediction, P, dmae.grid).numpy()                           # in image space, with NumPy
error = (picture - ((test - dmae.mean) / dmae.std).numpy())**2
inside = np.kron(mask.numpy().reshape(-1, 1, *dmae.grid), np.ones((P, P))).astype(bool)
np.testing.assert_allclose([l_all, l_dropped, l_kept], [error.mean(), error[inside].mean(), error[~inside].mean()], rtol=1e-5)
K = int(N * (1 - RATIO))
np.testing.assert_allclose(l_all, K / N * l_kept + (N - K) / N * l_dropped, rtol=1e-5)
print(f"kept {l_kept:.3f}, dropped {l_dropped:.3f}, all {l_all:.3f}")

# %% [markdown]
# How hard is each half of the task? Against noise we plot both losses of the trained network, beside two answers that
# need no network: returning the noisy pixels as they are, which costs $\sigma^2/s^2$ in normalised pixels ($s$ is the
# pixels' standard deviation), and answering with the mean training image.

# %%
sigmas = np.linspace(0, 0.6, 13)
predictions = [dmae(test, float(sigma), RATIO, noise, mask_noise)[1] for sigma in sigmas]
kept, dropped = np.array([[mae.loss(target, prediction, part).item() for prediction in predictions]
                          for part in (1 - mask, mask)])
mean_image = (dmae.target(train.mean(0, keepdim=True)) - target).square().mean().item()
assert kept[np.isclose(sigmas, 0.25)] < 0.5 * (0.25 / dmae.std.item())**2                 # it denoises, far better than copying
assert dropped[np.isclose(sigmas, 0.25)] < mean_image                                     # and predicts better than the mean
figure, axis = plt.subplots(figsize=(6.2, 3.2))
axis.plot(sigmas, dropped, "s-", color=ORANGE, label="dropped patches (predict)", markersize=4)
axis.plot(sigmas, kept, "o-", color=BLUE, label="kept patches (denoise)", markersize=4)
axis.plot(sigmas, (sigmas / dmae.std.item())**2, ":", color="0.2", label="copy the noisy pixels")
axis.axhline(mean_image, color="0.5", linestyle="--", label="answer with the mean image")
axis.axvline(SIGMA, color="0.8", zorder=0)
axis.set(xlabel=r"noise level $\sigma$ (pixels in [0, 1]); trained at the grey line",
         ylabel="mean squared error\n(normalised pixels)", xlim=(0, 0.6), ylim=(0, 0.95))
axis.legend(loc="upper left")
plt.show()

# %% [markdown]
# ## 3.8 Norm-pix
#
# Optionally, the target is not the patch but the patch seen through its own statistics:
#
# $$
# \tilde x_n = \frac{x_n - \mu_n}{\sqrt{v_n + 10^{-6}}}, \qquad
# \mu_n = \frac1q\sum_{k} x_{nk}, \qquad v_n = \frac{1}{q-1}\sum_k (x_{nk}-\mu_n)^2, \qquad q = P^2C .
# $$
#
# Mean squared error is dominated by brightness and contrast; both are removed, so that a faint texture counts as much
# as a bold edge. For any $a>0$ and $b$, the patch $a x_n + b$ has (up to the $10^{-6}$) the same target. And as $\sum_k
# \tilde x_{nk}^2 = q-1$, answering 0 everywhere costs $(q-1)/q$: a yardstick for the loss curve. The variance is the
# unbiased one because the published code has it so; for $q = 768$ nobody could tell.

# %%
show_source(networks.standardise_patches)

# %%
torch.manual_seed(0)
patch = torch.rand(50, 16, dtype=torch.float64)
numpy = (patch.numpy() - patch.numpy().mean(1, keepdims=True)) / np.sqrt(patch.numpy().var(1, ddof=1, keepdims=True) + 1e-6)
np.testing.assert_allclose(networks.standardise_patches(patch), numpy, rtol=1e-9)
np.testing.assert_allclose(networks.standardise_patches(3 * patch - 1), numpy, rtol=1e-4)
np.testing.assert_allclose((numpy**2).mean(), 15 / 16, rtol=1e-4)
flat = networks.patchify(test, P).var(-1) == 0
print(f"{flat.float().mean():.0%} of the digits' 2 x 2 patches have no contrast at all")

# %% [markdown]
# The last number is why the digits recipe leaves norm-pix off: with patches of four pixels on a black background, the
# standardised target is often identically zero, and otherwise mostly the rounding of 17 grey levels, blown up. With 16
# × 16 patches of photographs (all of the paper's recipes) the case is rare.

# %% [markdown]
# ## 3.9 With $\sigma = 0$ and the loss on dropped patches, it is MAE
#
# Set $\sigma = 0$ in $y = x + \sigma\varepsilon$, take $L_{\text{dropped}}$, and what remains is the masked autoencoder
# of He et al. ([arXiv 2111.06377](https://arxiv.org/abs/2111.06377)). The scripts do the same by flags: `python
# pretrain.py --sigma 0 --loss-on dropped --out runs/mae`.
#
# To check it we write MAE down once more, for one image, in the plainest way: no shuffling, no gather, no inverse
# permutation; the kept tokens stay in image order, and boolean indexing puts them back. The encoder has no notion of
# order, so the loss must be the same.

# %%
def plain_mae_loss(network, image, dropped):
    """MAE's loss for one clean image (1, C, H, W), dropped (N,) boolean."""
    tokens = network.embed(image)[0][~dropped]
    x = torch.cat([network.cls_token[0] + network.pos_embed[0, :1], tokens])[None]
    for block in network.blocks:
        x = block(x)
    z = network.decoder_embed(network.norm(x))[0]
    places = network.mask_token[0].repeat(len(dropped), 1)
    places[~dropped] = z[1:]
    x = (torch.cat([z[:1], places]) + network.decoder_pos_embed[0])[None]
    for block in network.decoder_blocks:
        x = block(x)
    prediction = network.decoder_pred(network.decoder_norm(x))[0, 1:]
    normal = (image[0] - network.mean) / network.std
    corners = [(i, j) for i in range(0, 8, P) for j in range(0, 8, P)]
    target = torch.stack([normal[:, i:i + P, j:j + P].movedim(0, 2).flatten() for i, j in corners])
    return F.mse_loss(prediction[dropped], target[dropped])


torch.manual_seed(3)
for image in test[:8]:
    numbers = torch.rand(1, N)
    ours, _, mask = mae(image[None], 0.0, 0.75, mask_noise=numbers)
    torch.testing.assert_close(ours, plain_mae_loss(dmae, image[None], mask[0].bool()), rtol=1e-4, atol=1e-6)
print("eight images, two ways, one loss")

# %% [markdown]
# ## 3.10 Reconstructions over noise and mask ratio
#
# The trained network on a **test** digit, for five noise levels and four mask ratios. It was trained at one setting
# only (framed); everything else asks it to extrapolate. `pretrain.reconstruct` turns predicted patches into pixels.

# %%
show_source(pretrain.reconstruct)

# %%
grid_sigmas, grid_ratios = (0, 0.125, 0.25, 0.5, 1.0), (0, 0.25, 0.5, 0.75)
torch.manual_seed(8)
example = test[13:14]
noise, mask_noise = torch.randn_like(example), torch.rand(1, N)
figure = plt.figure(figsize=(9.5, 5.6))
halves = figure.subfigures(1, 2, wspace=0.03)
panels = [half.subplots(len(grid_sigmas), len(grid_ratios)) for half in halves]
for row, sigma in enumerate(grid_sigmas):
    for column, ratio in enumerate(grid_ratios):
        _, prediction, mask = dmae(example, sigma, ratio, noise, mask_noise)
        draw(panels[0][row, column], grey_out(example + sigma * noise, mask)[0, 0])
        draw(panels[1][row, column], pretrain.reconstruct(dmae, example, prediction)[0, 0])
        for panel in panels:
            if row == 0:
                panel[row, column].set_title(f"{ratio:.0%} dropped", fontsize=9)
            if column == 0:
                panel[row, column].set_ylabel(f"$\\sigma$ = {sigma:g}")
            if (sigma, ratio) == (SIGMA, RATIO):
                for spine in panel[row, column].spines.values():
                    spine.set(color=ORANGE, linewidth=3)
for half, title in zip(halves, ("what the encoder gets", "what the decoder answers"), strict=True):
    half.suptitle(title, fontsize=11)
plt.show()

# %% [markdown]
# One example flatters or insults. Over all 360 test digits, the mean squared error in pixel units, with five draws of
# noise and mask for each cell:

# %%
torch.manual_seed(0)
error = np.array([[np.mean([(dmae(test, sigma, ratio)[0] * dmae.std.square()).item() for _ in range(5)])
                   for ratio in grid_ratios] for sigma in grid_sigmas])
assert (np.diff(error, axis=0) >= -2e-4).all()                                            # more noise is harder everywhere
assert (np.diff(error[:3], axis=1) > 0).all()                      # up to the trained sigma, so are fewer patches
figure, axis = plt.subplots(figsize=(5.6, 3.6))
shown = axis.imshow(error, cmap="viridis", norm="log")
for (row, column), value in np.ndenumerate(error):
    axis.text(column, row, f"{value:.4f}", ha="center", va="center", color="white" if value < 0.06 else "black")
axis.set(xticks=range(4), xticklabels=[f"{ratio:.0%}" for ratio in grid_ratios], yticks=range(5), yticklabels=grid_sigmas,
         xlabel="patches dropped", ylabel=r"noise level $\sigma$")
figure.colorbar(shown, ax=axis, label="mean squared error (pixels in [0, 1])")
plt.show()

# %% [markdown]
# Copying the noisy pixels would cost $\sigma^2$: 0.0156, 0.0625, 0.25 and 1 in the four lower rows. In the lowest one,
# dropping half the patches *helps*: the network was never shown $\sigma = 1$, believes what it sees, and is better off
# seeing less of it.

# %% [markdown]
# ## 3.11 Why denoising teaches what images look like: Tweedie's formula
#
# Take mask ratio 0. Which function of $y$ minimises the expected squared error $\mathbb E\|D(y) - x\|^2$? The posterior
# mean $D^\star(y) = \mathbb E[x \mid y]$, as always with squares. For Gaussian noise it has a remarkable form:
#
# $$ \boxed{\;\mathbb E[x\mid y] = y + \sigma^2\,\nabla_y \log p(y)\;}, \qquad p(y) = \int \varphi_\sigma(y-x)\,q(dx) . $$
#
# Here $q$ is the distribution of clean images, $\varphi_\sigma$ the density of $\mathcal N(0,\sigma^2 I)$, and $p$ the
# density of the **noisy** images $y = x + \sigma\varepsilon$, not of the clean ones (which may have no density at all,
# if images live on a surface).
#
# *Derivation.* The Gaussian satisfies $\nabla_y\varphi_\sigma(y-x) = \frac{x-y}{\sigma^2}\,\varphi_\sigma(y-x)$.
# Differentiate under the integral and divide by $p(y)$:
#
# $$
# \nabla_y\log p(y) = \frac{1}{p(y)}\int q(x)\,\frac{x-y}{\sigma^2}\,\varphi_\sigma(y-x)\,dx
# = \frac{1}{\sigma^2}\int (x-y)\,p(x\mid y)\,dx = \frac{\mathbb E[x\mid y]-y}{\sigma^2},
# $$
#
# since $q(x)\varphi_\sigma(y-x)/p(y)$ is $p(x\mid y)$ by Bayes' rule. Solve for the mean. $\square$
#
# In words: the best denoiser takes a step uphill on the log-density of noisy images, of a size that the noise dictates.
# Whoever denoises well at every $y$ knows the slope of the density at every $y$. No label was needed for that, and this
# is the sense in which the loss over kept patches is density estimation. The line of the scripts that makes it so is
# the loss of section 3.7: the square of prediction minus *clean* target.
#
# **Check on a Gaussian mixture.** Let $q = \sum_k w_k\,\mathcal N(\mu_k, S_k)$ in the plane. Then $p = \sum_k
# w_k\,\mathcal N(\mu_k, S_k+\sigma^2I)$. One side of the formula is computed by automatic differentiation of $\log p$;
# the other by brute force, without any formula for the posterior: draw millions of pairs $(x, y)$ and average the $x$
# of those whose $y$ fell into a small cell; and again by integrating Bayes' rule on a grid.

# %%
weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
centres = torch.tensor([[-1.5, 0.0], [1.2, 1.0], [0.8, -1.4]], dtype=torch.float64)
shapes = torch.tensor([[[0.30, 0.15], [0.15, 0.20]], [[0.10, -0.05], [-0.05, 0.25]], [[0.05, 0.0], [0.0, 0.05]]],
                      dtype=torch.float64)
sigma = 0.7


def log_density(points, variance):
    """log of the mixture's density after adding N(0, variance I)."""
    parts = torch.distributions.MultivariateNormal(centres, shapes + variance * torch.eye(2, dtype=torch.float64))
    return torch.logsumexp(weights.log() + parts.log_prob(points[:, None]), dim=1)


def tweedie(points, variance_of_density):
    points = points.clone().requires_grad_()
    (score,) = torch.autograd.grad(log_density(points, variance_of_density).sum(), points)
    return points.detach() + sigma**2 * score


line = torch.linspace(-6, 6, 241, dtype=torch.float64)                                    # Bayes' rule on a grid of clean x
x_grid = torch.cartesian_prod(line, line)
prior = log_density(x_grid, 0.0)
y = torch.tensor([[-1.5, 0.5], [0.0, 0.0], [1.0, -0.2], [2.5, 2.0], [-0.3, -1.5]], dtype=torch.float64)
posterior = torch.softmax(prior - torch.cdist(y, x_grid).square() / (2 * sigma**2), dim=1) @ x_grid
torch.testing.assert_close(tweedie(y, sigma**2), posterior, rtol=1e-6, atol=1e-6)
wrong = (tweedie(y, 0.0) - posterior).norm(dim=1)
print(f"with the density of noisy y: largest error {(tweedie(y, sigma**2) - posterior).norm(dim=1).max():.1e}")
print(f"with the density of clean x instead: errors from {wrong.min():.2f} to {wrong.max():.2f}")
assert wrong.min() > 0.05

rng = np.random.default_rng(0)                                                            # pairs, counted in cells
which = rng.choice(3, 2_000_000, p=weights.numpy())
factors = np.linalg.cholesky(shapes.numpy())
x_drawn = centres.numpy()[which] + np.einsum("nij,nj->ni", factors[which], rng.normal(size=(len(which), 2)))
y_drawn = x_drawn + sigma * rng.normal(size=x_drawn.shape)
for point, expected in zip(y.numpy(), tweedie(y, sigma**2).numpy(), strict=True):
    near = np.abs(y_drawn - point).max(axis=1) < 0.08
    error = x_drawn[near].std(axis=0) / math.sqrt(near.sum())
    assert (np.abs(x_drawn[near].mean(axis=0) - expected) < 5 * error + 0.01).all()
print("the average x of the pairs whose y fell near a point agrees at all five points")

# %%
axis_line = torch.linspace(-3.3, 3.3, 12, dtype=torch.float64)
arrows = torch.cartesian_prod(axis_line, axis_line)
fine = torch.linspace(-3.6, 3.6, 91, dtype=torch.float64)
background = torch.cartesian_prod(fine, fine)
figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), sharex=True, sharey=True)
for axis, variance, title in zip(axes, (0.0, sigma**2), ("clean $x \\sim q$", f"noisy $y \\sim p$, $\\sigma$ = {sigma}"), strict=True):
    density = log_density(background, variance).exp().view(91, 91).T
    shown = axis.contourf(fine, fine, density, 8, cmap="Blues")
    axis.set_aspect("equal")
    axis.set(title=title, xlabel="first coordinate")
    figure.colorbar(shown, ax=axis, label="density", shrink=0.85)
step = (tweedie(arrows, sigma**2) - arrows).numpy()
axes[1].quiver(*arrows.numpy().T, *step.T, angles="xy", scale_units="xy", scale=1, color=ORANGE, width=0.004)
axes[0].scatter(*tweedie(arrows, sigma**2).numpy().T, s=10, color=ORANGE, label=r"$E[x \mid y]$, the arrows' heads")
axes[0].legend(loc="upper left")
axes[0].set(ylabel="second coordinate", xlim=(-3.6, 3.6), ylim=(-3.6, 3.6))
plt.show()

# %% [markdown]
# Right: the arrows run from $y$ to $\mathbb E[x\mid y]$, uphill on the noisy density. Left: where they end. They do not
# reach the nearest mode; a point between two clusters is sent between them, for the mean does not decide.

# %% [markdown]
# ### The trained autoencoder, beside an exact posterior mean
#
# For real digits $q$ is unknown. One exactly solvable stand-in is the *empirical* distribution, all mass on the $M$
# training images. Then
#
# $$ \mathbb E_{\text{emp}}[x\mid y] = \sum_{i=1}^M w_i(y)\,x_i, \qquad
# w_i(y) = \frac{\exp\bigl(-\|y-x_i\|^2/2\sigma^2\bigr)}{\sum_k \exp\bigl(-\|y-x_k\|^2/2\sigma^2\bigr)} , $$
#
# Tweedie's formula for a mixture of $M$ equal Gaussians. No denoiser has a smaller error on *training* digits with
# fresh noise. On test digits the theorem says nothing: this denoiser can only answer with averages of images it has
# stored. The autoencoder, at mask ratio 0, is our other candidate (it was trained with a quarter of the patches
# missing, and at $\sigma = 0.25$ alone).

# %%
def empirical_mean(y, sigma):
    """E[x | y] if x is one of the training images, each with the same probability."""
    weights = torch.softmax(-torch.cdist(y.flatten(1), train.flatten(1)).square() / (2 * sigma**2), dim=1)
    return (weights @ train.flatten(1)).view_as(y)


def autoencoder(x, sigma, noise):
    _, prediction, _ = dmae(x, sigma, 0.0, noise)
    return networks.unpatchify(prediction, P, dmae.grid) * dmae.std + dmae.mean


few = train[:4].double().flatten(1)                              # the weighted mean is Tweedie's step: check on 4 images
y = (test[:6].double().flatten(1)).requires_grad_()
log_p = torch.logsumexp(-torch.cdist(y, few).square() / (2 * 0.5**2), dim=1)
by_score = y + 0.5**2 * torch.autograd.grad(log_p.sum(), y)[0]
by_weights = torch.softmax(-torch.cdist(y, few).square() / (2 * 0.5**2), dim=1) @ few
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
    axis.plot(levels, errors[split, "autoencoder"], "o-", color=BLUE, label="autoencoder, mask ratio 0")
    axis.plot(levels, errors[split, "empirical"], "s-", color=ORANGE, label="posterior mean over\ntraining digits")
    axis.plot(levels, np.square(levels), ":", color="0.2", label=r"copy the noisy pixels, $\sigma^2$")
    axis.axvline(SIGMA, color="0.8", zorder=0)
    axis.set(xlabel=r"noise level $\sigma$ (pixels in [0, 1])", title=f"{split} digits, fresh noise", ylim=(0, 0.1))
axes[0].set_ylabel("mean squared error\n(pixels in [0, 1])")
axes[0].legend(loc="upper right")
plt.show()

# %% [markdown]
# The two panels tell memorising from learning. Where the empirical posterior is provably optimal, on the images it
# stores, it wins everywhere. On new digits and near the noise level of its training (grey line) the autoencoder wins,
# since it recombines strokes instead of recalling whole images. At small noise the empirical answer is stuck at the
# distance of the nearest neighbour; at large noise the autoencoder, never trained there, falls behind.

# %%
torch.manual_seed(4)
chosen = test[[30, 52, 75, 101, 137, 180, 222, 300]]
noise = torch.randn_like(chosen)
noisy = chosen + SIGMA * noise
rows = {"clean $x$": chosen, f"noisy $y$\n$\\sigma$ = {SIGMA}": noisy, "autoencoder\n$D(y)$": autoencoder(chosen, SIGMA, noise),
        "empirical\n$E[x \\mid y]$": empirical_mean(noisy, SIGMA)}
figure, axes = plt.subplots(4, len(chosen), figsize=(8.5, 4.3))
for line, (title, images) in zip(axes, rows.items(), strict=True):
    line[0].set_ylabel(title, rotation=0, ha="right", va="center")
    for axis, image in zip(line, images, strict=True):
        draw(axis, image[0])
plt.show()

# %% [markdown]
# Three reservations, to know what Tweedie's formula does and does not say about DMAE:
#
# * **With a mask**, the kept part of the answer is $\mathbb E[x_n\mid y_{\text{kept}}] = y_n + \sigma^2\nabla_{y_n}\log
#   p(y_{\text{kept}})$, by the same derivation for the density of what is left. The dropped part is a regression on the
#   noisy surroundings, not a score.
# * **With norm-pix** the target is a nonlinear function of $x$, so that the best answer is $\mathbb E[\tilde x_n\mid
#   y]$, and dividing $D(y)-y$ by $\sigma^2$ gives no score.
# * **The encoder is what we keep.** Nothing proves that good denoising makes good features; that it does so here is an
#   experiment, and notebook 04 makes it, with its unflattering comparisons.
