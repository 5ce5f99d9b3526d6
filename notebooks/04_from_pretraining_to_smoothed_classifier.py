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
# # From pre-training to a smoothed classifier
#
# Pre-training leaves us with an encoder that can restore clean digits from noisy ones. What we want is a *base classifier* $f$
# whose smoothed version
#
# $$ g(x) = \arg\max_c\; \mathbb{P}_{e}\big[f(x + e) = c\big], \qquad e \sim \mathcal{N}(0, \sigma^2 I), $$
#
# is right often and by a wide margin, since the margin is what becomes a certified radius. This notebook walks through
# `finetune.py`, the stage in between. It explains
#
# 1. why $f$ has to be trained on noisy images,
# 2. in what sense cross-entropy under noise bounds the error of $g$,
# 3. layer-wise learning-rate decay,
# 4. what mixup does to the noise level when the two come in the wrong order,
# 5. the consistency term and its effect,
# 6. what pre-training buys on the digits data: noise and masks (DMAE), masks alone (MAE), nothing (scratch),
# 7. and two comparisons that do not flatter the method: scratch with the same total time, and a classifier without any training.
#
# It runs in about a minute on two CPU cores, offline. The two checkpoints that it opens, `results/digits/pretrain.pt` and
# `results/digits/finetune_sigma_0.25.pt`, were made by `python pretrain.py && python finetune.py --sigma 0.25`, and the log behind
# sections 5 to 7 by the commands in `results/digits/README.md`.

# %%
import contextlib
import copy
import inspect
import io
import json
import math
import sys
import tempfile
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display

ROOT = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "finetune.py").exists())
sys.path.insert(0, str(ROOT))
import finetune
import model

DIGITS = ROOT / "results" / "digits"
SIGMA = 0.25
BLUE, ORANGE, GREEN, PINK, YELLOW = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"        # Okabe and Ito's
plt.rcParams.update({"font.size": 10, "figure.facecolor": "white", "savefig.facecolor": "white", "axes.spines.top": False,
                     "axes.spines.right": False, "figure.dpi": 100})
torch.set_num_threads(1)                                     # so small a network is no faster on two threads
torch.manual_seed(0)


def show(thing, first=None, last=None):
    """The source of a function of the scripts, or its lines from the one with `first` in it to the one with `last`."""
    lines = inspect.getsource(thing).splitlines()
    start = next(i for i, line in enumerate(lines) if first in line) if first else 0
    stop = next(i for i, line in enumerate(lines) if i >= start and last in line) if last else len(lines) - 1
    display(Markdown(f"```python\n{textwrap.dedent(chr(10).join(lines[start:stop + 1]))}\n```"))


def run_finetune(*flags):
    """finetune.main with these flags in a temporary directory, silently: (classifier, rows of its log)."""
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()), \
            contextlib.redirect_stderr(io.StringIO()):
        finetune.main([*map(str, flags), "--device", "cpu", "--out", out])
        log = next(Path(out).glob("finetune*.jsonl"))
        rows = [json.loads(row) for row in log.read_text().splitlines()]
        return load_classifier(log.with_suffix(".pt")), rows


def load_classifier(path):
    content = model.read_checkpoint(path, "finetune")
    classifier = model.VisionTransformer(**content["config"])
    classifier.load_state_dict(content["model"])
    return classifier.eval()


images = finetune.open_images("digits", None, train=True, size=8, channels=1)
test = finetune.open_images("digits", None, train=False, size=8, channels=1)
train, _ = finetune.hold_out(images, 0.1)                                                 # which images are trained on
train_x, train_y = images.pixels[train] / images.levels, images.labels[train]
x, y = test.pixels / test.levels, test.labels                                             # 360 1 8 8 in [0, 1], 360
classifier = load_classifier(DIGITS / "finetune_sigma_0.25.pt")
print(f"{len(train):,} training images, {len(x)} test images by other writers")

# %% [markdown]
# ## 1. Why train on noise
#
# The smoothed classifier never looks at $x$. It looks at $x + e$, many times, and takes a vote; all that counts is how $f$ behaves on
# noisy images. And these are *far* from clean ones. For $e \in \mathbb{R}^d$ with independent normal entries of variance $\sigma^2$,
#
# $$ \mathbb{E}\,\|e\|_2^2 = d\,\sigma^2, \qquad \operatorname{Var}\,\|e\|_2^2 = 2 d\,\sigma^4, $$
#
# because $\|e\|_2^2/\sigma^2$ is a sum of $d$ squared standard normal variables, each of mean 1 and variance 2 (a $\chi^2_d$ variable).
# Relative to its mean, its standard deviation is $\sqrt{2/d}$: in high dimension, noise lives on a thin shell of radius $\sigma\sqrt d$.
# For the digits, $d = 64$ and $\sigma = 0.25$, the shell has a radius of 2, nearly twice the distance from a test digit to its nearest training digit (the median is
# printed below). So a clean image is, for the distribution that $f$ is asked about, an outlier at the centre of an empty
# ball, and an $f$ that has only seen clean images is asked to extrapolate, every single time.
#
# The remedy is to train $f$ on what it will be asked about. This is the line that draws the noise, anew for every image in every step:

# %%
show(finetune.classification_loss, "images = repeat(images", "logits = ")

# %% [markdown]
# The first check is on the shell: squared lengths of drawn noise against the two moments of $\chi^2_d$, and the radius against the
# distances between real images.

# %%
d = x[0].numel()
noise = SIGMA * torch.randn(20_000, d)
squared = noise.square().sum(dim=1)
assert abs(squared.mean() / (d * SIGMA**2) - 1) < 0.01
assert abs(squared.var() / (2 * d * SIGMA**4) - 1) < 0.05

nearest = torch.cdist(x.flatten(1), train_x.flatten(1)).min(dim=1).values
print(f"length of the noise: {squared.sqrt().mean():.2f} +- {squared.sqrt().std():.2f}   (sigma sqrt(d) = {SIGMA * math.sqrt(d):.2f})")
print(f"from a test digit to the nearest training digit: median {nearest.median():.2f}")

# %% [markdown]
# The second check is the claim itself. Two classifiers start from the same random weights (pre-training has seen noise already, so it is left out here) and
# see the same images in the same order for 150 steps of the plainest training loop, one of them with $\sigma = 0$, the other with $\sigma = 0.25$; nothing else differs.
# We then turn up the noise on test images.

# %%
def train_from_scratch(sigma, steps=150, peak=3e-3):
    torch.manual_seed(0)
    f = model.build_vit("vit_digits", num_classes=10)
    optimizer = torch.optim.AdamW(f.parameters(), lr=peak)
    positions = finetune.training_positions(train, 128, 128, 0, steps, seed=0, rank=0, world=1)
    for step, (pixels, labels) in enumerate(finetune.load_batches(images, positions, torch.device("cpu"))):
        optimizer.param_groups[0]["lr"] = model.learning_rate(step, steps, 20, peak)
        clean = pixels / images.levels
        loss = F.cross_entropy(f(clean + sigma * torch.randn_like(clean)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return f.eval()


on_clean, on_noisy = train_from_scratch(0.0), train_from_scratch(SIGMA)


@torch.inference_mode()
def accuracy(f, sigma, draws=5, seed=0):
    """Share of (test image, noise draw) pairs that f gets right."""
    torch.manual_seed(seed)
    return np.mean([(f(x + sigma * torch.randn_like(x)).argmax(dim=1) == y).float().mean().item() for _ in range(draws)])


levels = np.linspace(0, 0.6, 13)
curves = {"trained on clean images": [accuracy(on_clean, s) for s in levels],
          "trained at σ = 0.25": [accuracy(on_noisy, s) for s in levels]}
for name, values in curves.items():
    print(f"{name:24} accuracy on clean images {values[0]:.1%}, under noise of 0.25 {values[5]:.1%}")
assert math.isclose(levels[5], SIGMA) and curves["trained at σ = 0.25"][5] > curves["trained on clean images"][5] + 0.05

figure = plt.figure(figsize=(9.5, 3.4))
grid = figure.add_gridspec(2, 7, width_ratios=[1, 1, 1, 1, 0.9, 3, 3], wspace=0.08, hspace=0.3)
torch.manual_seed(1)
for row, i in enumerate((0, 5)):
    e = torch.randn(8, 8)
    for column, s in enumerate((0, 0.125, 0.25, 0.5)):
        axis = figure.add_subplot(grid[row, column])
        axis.imshow((x[i, 0] + s * e).clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"σ = {s:g}", fontsize=9)
axis = figure.add_subplot(grid[:, 5:])
for (name, values), colour, marker in zip(curves.items(), (ORANGE, BLUE), "so", strict=True):
    axis.plot(levels, 100 * np.array(values), marker + "-", color=colour, label=name, markersize=4)
axis.axvline(SIGMA, color="0.6", linewidth=1, linestyle=":")
axis.set(xlabel="standard deviation of the noise (pixels in [0, 1])", ylabel="accuracy of f under noise (%)", ylim=(0, 102))
axis.legend(frameon=False, loc="lower left")
plt.show()

# %% [markdown]
# ## 2. Cross-entropy under noise bounds the error of the smoothed classifier
#
# Training minimises a cross-entropy, a smooth quantity that has a gradient. The error of $g$ is an indicator of an argmax of a probability,
# and has none. What does one have to do with the other? Write $p_c(z)$ for the softmax outputs of $f$ at an input $z$, and
# $\ell(z, y) = -\log p_y(z)$ for the cross-entropy with the true class $y$. Then, for every image and every distribution of noise,
#
# $$ \mathbf{1}[g(x) \neq y] \;\le\; 2\,\mathbb{P}_e[f(x+e) \neq y] \;\le\; \frac{2}{\ln 2}\,\mathbb{E}_e\,\ell(x + e, y). $$
#
# *The first step: from votes to draws.* If $g(x) = c \neq y$, then $c$ wins at least as many votes as $y$ does, and the two together win at most
# all of them:
#
# $$ \mathbb{P}[f(x+e) = y] \le \mathbb{P}[f(x+e) = c], \quad \mathbb{P}[f(x+e) = y] + \mathbb{P}[f(x+e) = c] \le 1
#    \;\Longrightarrow\; \mathbb{P}[f(x+e) \ne y] \ge \tfrac12. $$
#
# So twice the probability that $f$ errs is at least 1 where $g$ errs; where $g$ is right, it is at least 0, and the left side is 0.
#
# *The second step: from draws to the loss.* The same argument, one level down. If $f$ errs at $z$, then another class has a softmax output at least
# as large as $p_y(z)$, the outputs sum to one, hence $p_y(z) \le \tfrac12$ and $\ell(z, y) \ge \ln 2$. So $\mathbf{1}[f(z) \neq y] \le \ell(z, y) / \ln 2$
# everywhere (the right side is never negative); take the expectation over $z = x + e$.
#
# Averaged over images, the error of $g$ is at most $2/\ln 2 \approx 2.89$ times the expected cross-entropy under noise. This is what licenses fine-tuning with noise
# and cross-entropy alone. It is the loss of these lines, whose `logits` are those of noisy images:

# %%
show(finetune.classification_loss, "every, target = ", "loss = F.cross_entropy")

# %% [markdown]
# (Label smoothing $\varepsilon$ replaces $\ell$ by $(1 - \varepsilon)\,\ell + \varepsilon\,\overline{\ell}$ with $\overline{\ell} \ge 0$ the mean of
# $-\log p_c$ over all classes. Hence $\ell \le \text{loss}/(1 - \varepsilon)$, and the bound holds for the smoothed loss with one more factor $1/(1 - \varepsilon)$.)
#
# Neither step used that the noise is Gaussian. So both hold *exactly*, not just in the limit, if the distribution of $e$ is the
# uniform distribution over 50 drawn vectors, with all three quantities computed from the same draws. That makes the check sharp: one violation in 360 images would refute it. We try it with the committed classifier,
# with the one that was trained without noise (which errs a lot more, so that the bound has something to bound), and with outputs that
# have nothing to do with images. The last lines build the case in which both steps are equalities: half of the draws are right beyond doubt,
# the other half put $p_y$ just below a half, and the tie of the votes goes against $y$.

# %%
@torch.inference_mode()
def under_noise(f, draws=50):
    """Per test image: whether g errs, how often f errs, and the mean cross-entropy, all on the same draws."""
    torch.manual_seed(2)
    logits = torch.stack([f(x + SIGMA * torch.randn_like(x)) for _ in range(draws)])      # draws 360 10
    return bound_terms(logits, y)


def bound_terms(logits, labels):
    logits = logits.double()
    predicted = logits.argmax(dim=2)                                                      # draws B
    votes = F.one_hot(predicted, logits.shape[2]).sum(dim=0)                              # B classes
    f_errs = (predicted != labels).double().mean(dim=0)                                   # B
    loss = -logits.log_softmax(dim=2).gather(2, labels.expand(len(logits), -1)[..., None])[..., 0].mean(dim=0)
    return votes.argmax(dim=1) != labels, f_errs, loss


terms = {"trained at σ = 0.25, 60 epochs": under_noise(classifier), "trained on clean images": under_noise(on_clean),
         "random outputs": bound_terms(3 * torch.randn(200, 360, 10) + torch.randn(360, 10), y)}
for name, (g_errs, f_errs, loss) in terms.items():
    assert (g_errs.double() <= 2 * f_errs).all() and (f_errs <= loss / math.log(2) + 1e-12).all()
    print(f"{name:30}  error of g {g_errs.double().mean():6.1%}  <=  2 x error of f {2 * f_errs.mean():6.1%}"
          f"  <=  2/ln 2 x cross-entropy {2 / math.log(2) * loss.mean():6.1%}")

torn = torch.tensor([[0.0, 60.0]] * 100 + [[1e-9, 0.0]] * 100)[:, None]                    # the right class is 1
g_errs, f_errs, loss = bound_terms(torn, torch.tensor([1]))
assert g_errs.item() and f_errs.item() == 0.5 and abs(2 / math.log(2) * loss.item() - 1) < 1e-6
print(f"the equality case: f errs in {f_errs.item():.0%} of the draws, 2/ln 2 x cross-entropy = {2 / math.log(2) * loss.item():.6f}")

figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), sharey=True)
for axis, name in zip(axes, list(terms)[:2], strict=True):
    g_errs, f_errs, loss = terms[name]
    edge = np.linspace(0, 1, 100)
    axis.fill_between(100 * edge, 1e-3, np.maximum(edge * math.log(2), 1e-3), color="0.9", linewidth=0)
    axis.plot(100 * edge[1:], edge[1:] * math.log(2), color="0.4", label="E[CE] = ln 2 · P[f errs]")
    for errs, colour, marker, label in ((False, BLUE, "o", "g right"), (True, ORANGE, "s", "g wrong")):
        axis.scatter(100 * f_errs[g_errs == errs].numpy(), loss[g_errs == errs].numpy(), s=14, color=colour, marker=marker, alpha=0.6, label=label)
    axis.axvline(50, color="0.4", linestyle=":", linewidth=1)
    axis.set(yscale="log", ylim=(2e-3, 20), xlim=(-2, 102), xlabel="draws in which f errs (%)")
    axis.set_title(name, fontsize=10)
axes[0].set_ylabel("mean cross-entropy under noise (nats)")
axes[1].legend(frameon=False, loc="lower right", fontsize=9)
plt.tight_layout()
plt.show()

# %% [markdown]
# Every point is a test image. None lies in the grey region (the second step), and none that $g$ gets wrong lies left of the dotted line (the
# first). The bound is loose on average (each step by a factor of four or five on the trained classifiers), and it says nothing about *radii*: it drops the margin of the vote. That is the gap
# that the consistency term of section 5 aims at.
#
# ## 3. Layer-wise learning-rate decay
#
# Fine-tuning starts from weights that are worth something, and from a head that is worth nothing. A learning rate that trains the head would
# overwrite what the lowest layers know; one that keeps them would never train the head. The compromise is a rate for every layer,
#
# $$ \eta_\ell = \eta \cdot \lambda^{\,L + 1 - \ell}, \qquad \ell = 0, \dots, L + 1, $$
#
# where $\eta$ is the rate of the current step, $\lambda \le 1$ the decay, $L$ the number of blocks; layer 0 is the patch embedding with class token
# and positions, layer $n + 1$ is block $n$, and layer $L + 1$ is the last norm and the head, which get the whole rate. For ViT-B with $\lambda = 0.65$, the patch
# embedding moves at $0.65^{13} \approx 0.4\%$ of the head's rate. The geometric form says that each layer is trusted a fixed factor more than the one
# above it: low layers compute general features (here: how to see through noise), high ones what is special to the task that
# pre-training had.

# %%
show(finetune.layer_of)
show(finetune.parameter_groups)

# %% [markdown]
# Two checks. The groups must hold every trained parameter exactly once. And the rates must arrive in the weights: the *first* step of Adam
# moves a weight with gradient $h$ by $\eta_\ell\, h / (|h| + 10^{-8})$, which is $\pm\eta_\ell$ whatever the gradient is (first and second
# moment are both that of a single sample). So the largest change of a layer in one step *is* its learning rate, and we can read the decay
# off the weights without looking at the optimizer's books.

# %%
LAM, RATE = finetune.RECIPES["digits"]["layer_decay"], 1e-3
tuned = load_classifier(DIGITS / "finetune_sigma_0.25.pt").train()
groups = finetune.parameter_groups(tuned, weight_decay=0.0, layer_decay=LAM)
counted = [id(p) for group in groups for p in group["params"]]
assert sorted(counted) == sorted(id(p) for p in tuned.parameters() if p.requires_grad)

before = {name: p.detach().clone() for name, p in tuned.named_parameters()}
optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999))
for group in optimizer.param_groups:                                                      # as in finetune.finetune's loop
    group["lr"] = RATE * group["lr_scale"]
torch.manual_seed(3)
F.cross_entropy(tuned(x + 2 * SIGMA * torch.randn_like(x)), y).backward()
optimizer.step()

moved = {}
for name, p in tuned.named_parameters():                                                  # layers by hand, not by layer_of
    place = "patches, positions" if name.split(".")[0] in ("cls_token", "pos_embed", "patch_embed") else \
        f"block {name.split('.')[1]}" if name.startswith("blocks.") else "norm, head"
    moved[place] = max(moved.get(place, 0), (p.detach() - before[name]).abs().max().item() / RATE)
wanted = {"patches, positions": LAM**4, "block 0": LAM**3, "block 1": LAM**2, "block 2": LAM, "norm, head": 1.0}
for place, scale in wanted.items():
    assert math.isclose(moved[place], scale, rel_tol=1e-3), (place, moved[place], scale)

figure, axes = plt.subplots(1, 2, figsize=(9.5, 3), gridspec_kw=dict(width_ratios=[1, 1.6]))
axes[0].barh(list(wanted), [moved[place] for place in wanted], color=BLUE, height=0.6)
axes[0].plot(list(wanted.values()), list(wanted), "o", color=ORANGE, label=r"$\lambda^{L+1-\ell}$")
axes[0].set(xlabel="largest change of a weight in one step (units of η)")
axes[0].set_title("digits: 3 blocks, λ = 0.75 (bars: measured)", fontsize=10)
axes[0].legend(frameon=False, loc="lower right")
for lam, depth, colour, marker, label in ((0.65, 12, BLUE, "o", "ViT-B, 12 blocks, λ = 0.65"), (0.75, 24, GREEN, "s", "ViT-L, 24 blocks, λ = 0.75"),
                                          (0.75, 3, ORANGE, "^", "digits, 3 blocks, λ = 0.75")):
    axes[1].semilogy(range(depth + 2), lam ** (depth + 1 - np.arange(depth + 2)), marker + "-", color=colour, label=label, markersize=4)
axes[1].set(xlabel="layer ℓ (0: patch embedding)", ylabel="share of the learning rate")
axes[1].legend(frameon=False, fontsize=9, loc="lower right")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## 4. Mixup and the noise level
#
# Mixup trains on blends of two images, $l\,x_a + (1 - l)\,x_b$ with $l \sim \mathrm{Beta}(\alpha, \alpha)$, and blends the labels likewise. If each image already
# carries its own noise, the noise is blended too:
#
# $$ l\,(x_a + e_a) + (1 - l)\,(x_b + e_b) = \big[l\,x_a + (1 - l)\,x_b\big] + \tilde e, \qquad
#    \tilde e \sim \mathcal{N}\!\big(0,\; \sigma^2\,(l^2 + (1 - l)^2)\, I\big). $$
#
# Variances of independent terms add, and scale with the square of the factor. As $l^2 + (1 - l)^2 = 1 - 2\,l\,(1 - l) \le 1$, with $\tfrac12$ at $l = \tfrac12$, averaging *denoises*: the
# classifier is trained for less noise than it will meet, by up to a factor $\sqrt{1/2}$. With $\mathbb{E}[l(1-l)] = \alpha / (2(2\alpha + 1))$ the mean variance is
#
# $$ \mathbb{E}\big[l^2 + (1 - l)^2\big] = 1 - \frac{\alpha}{2\alpha + 1}, $$
#
# which for the paper's $\alpha = 0.8$ is 0.69: noise of $0.83\,\sigma$ in the root mean square. CutMix copies a rectangle instead of blending; each pixel keeps the
# noise of one image, so its level stays. In `finetune.py`, noise therefore comes after the mix: `train_step` mixes clean
# images, and only `classification_loss` adds the noise.

# %%
show(finetune.train_step, "torch.manual_seed", "loss = classification_loss")
show(finetune.classification_loss, "def ", "noisy = ")

# %% [markdown]
# The check runs the mix of the scripts on images of pure noise. Labels that are all different let us read $l$ off the blended targets, so that nothing
# about the mix has to be believed.

# %%
def noise_after(mix, rounds=300):
    """(l, standard deviation of the noise in units of sigma) for each round of mixing 10 images of pure noise."""
    measured = []
    for _ in range(rounds):
        mixed, targets = mix(SIGMA * torch.randn(10, 1, 32, 32), torch.arange(10))
        measured.append((targets[0].max().item(), mixed.std().item() / SIGMA))
    return np.array(measured).T


torch.manual_seed(4)
ALPHA = finetune.PAPER["mixup"]
l_mixup, std_mixup = noise_after(finetune.make_mix(ALPHA, 0.0, 10))
l_cutmix, std_cutmix = noise_after(finetune.make_mix(0.0, finetune.PAPER["cutmix"], 10))
assert np.abs(std_mixup - np.sqrt(l_mixup**2 + (1 - l_mixup) ** 2)).max() < 0.05           # 10 x 1024 pixels: 0.7 % each
assert np.abs(std_cutmix - 1).max() < 0.05
beta = np.random.default_rng(0).beta(ALPHA, ALPHA, 200_000)
assert abs(np.mean(beta**2 + (1 - beta) ** 2) - (1 - ALPHA / (2 * ALPHA + 1))) < 2e-3
print(f"root mean square of the noise: mixup {np.sqrt(np.mean(std_mixup**2)):.3f} sigma "
      f"(formula {math.sqrt(1 - ALPHA / (2 * ALPHA + 1)):.3f}), cutmix {np.sqrt(np.mean(std_cutmix**2)):.3f} sigma")

figure, axis = plt.subplots(figsize=(6, 3.4))
share = np.linspace(0.5, 1, 100)
axis.plot(share, np.sqrt(share**2 + (1 - share) ** 2), color="0.4", label=r"$\sqrt{l^2 + (1-l)^2}$")
axis.scatter(l_mixup, std_mixup, s=12, color=BLUE, label="mixup, measured")
axis.scatter(l_cutmix, std_cutmix, s=12, color=ORANGE, marker="s", label="cutmix, measured")
axis.set(xlabel="share l of the image that has the larger share", ylabel="noise level after mixing (σ)", ylim=(0.6, 1.1))
axis.legend(frameon=False, loc="lower right")
plt.show()

# %% [markdown]
# ## 5. Consistency
#
# A certified radius is $\sigma\,\Phi^{-1}$ of the share of noisy copies that vote for the winner. To be right is not enough: the copies must *agree*. Jeong and Shin (2020)
# ask for that directly. Draw $m$ noisy copies of an image (here $m = 2$), let $F_i$ be the softmax output on copy $i$, and $F = \frac1m \sum_i F_i$ their mean. The
# loss is
#
# $$ \frac1m\sum_{i} \mathrm{CE}_i \;+\; \lambda \cdot \frac1m \sum_{i=1}^m \mathrm{KL}(F \,\|\, F_i) \;+\; \eta \cdot H(F), \qquad
#    \mathrm{KL}(F \| F_i) = \sum_c F_c \log\frac{F_c}{F_{i,c}}, \quad H(F) = -\sum_c F_c \log F_c, $$
#
# where $\lambda$ and $\eta$ weigh agreement and confidence. The divergence is zero if and only if all copies give the same distribution. That alone could be had cheaply, by answering
# $(\frac1K, \dots, \frac1K)$ to everything; the entropy closes this way out, since it is largest there, and rewards a mean that is sure of *something*. Which class it is sure of is left to the cross-entropy. Both
# terms together read
#
# $$ \lambda\,\tfrac1m \textstyle\sum_i \mathrm{KL}(F\|F_i) + \eta\,H(F)
#    = \lambda\,\tfrac1m \sum_i \mathrm{CE}(F, F_i) + (\eta - \lambda)\,H(F), $$
#
# with $\mathrm{CE}(F, F_i) = -\sum_c F_c \log F_{i,c}$: every copy is taught by the committee's mean, as a soft label. (Expand the logarithm of the quotient: the first half is $-H(F)$.)

# %%
show(finetune.consistency_loss)
show(finetune.classification_loss, "if args.consistency:", "loss = loss + consistency_loss")

# %% [markdown]
# The check computes it a second time with `torch.distributions`, in double precision, and a third time by the identity above; it also tries the two extremes, equal copies and a uniform answer.

# %%
from torch.distributions import Categorical, kl_divergence

torch.manual_seed(5)
logits = 3 * torch.randn(2, 50, 10, dtype=torch.float64)
LAMBDA, ETA = finetune.RECIPES["digits"]["consistency"], 0.5
ours = finetune.consistency_loss(logits, LAMBDA, ETA)

copies = [Categorical(logits=one) for one in logits]
mean = Categorical(probs=sum(one.probs for one in copies) / 2)
by_definition = LAMBDA * sum(kl_divergence(mean, one) for one in copies) / 2 + ETA * mean.entropy()
by_identity = LAMBDA * sum(-(mean.probs * one.logits).sum(1) for one in copies) / 2 + (ETA - LAMBDA) * mean.entropy()
assert torch.allclose(ours, by_definition.mean(), atol=1e-9) and torch.allclose(ours, by_identity.mean(), atol=1e-9)
same = logits[:1].repeat(2, 1, 1)
assert finetune.consistency_loss(same, 1.0, 0.0).abs() < 1e-12                              # copies agree: no divergence
assert math.isclose(finetune.consistency_loss(0 * logits, 1.0, 1.0).item(), math.log(10))   # uniform: the entropy is all

odds = torch.linspace(0.005, 0.995, 51, dtype=torch.float64)
p1, p2 = torch.meshgrid(odds, odds, indexing="ij")
pairs = torch.stack([torch.stack([p, 1 - p], dim=-1).log() for p in (p1, p2)])             # 2 51 51 2
figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.2), sharey=True, layout="constrained")
for axis, (lam, eta, title) in zip(axes, ((1, 0, "mean KL(F ‖ Fᵢ)"), (0, 1, "H(F)"), (LAMBDA, ETA, "2 · KL + 0.5 · H")), strict=True):
    value = torch.stack([finetune.consistency_loss(pair[:, None], lam, eta) for pair in pairs.flatten(1, 2).unbind(1)])
    picture = axis.contourf(odds.numpy(), odds.numpy(), value.reshape(51, 51).T.numpy(), levels=np.linspace(0, value.max().item(), 13), cmap="cividis")
    axis.set(title=title, xlabel="P[class 1], copy 1", aspect="equal")
    figure.colorbar(picture, ax=axis, label="nats", shrink=0.8, format="%.2f")
axes[0].set_ylabel("P[class 1], copy 2")
plt.show()

# %% [markdown]
# For two classes one can see it all: the divergence (left) vanishes on the diagonal and is steep off it, the entropy (middle) pushes along the diagonal to one of
# the ends, and their sum (right) has its two minima in the corners where both copies are sure of the same class.
#
# What does it do to the vote? We let the classifier of section 1 that was trained at $\sigma = 0.25$ continue for 40 steps in three ways: with cross-entropy alone, with the divergence ($\eta = 0$), and with the recipe's two terms. We
# look at the share of 50 noisy copies that vote for the right class, which is what a radius is made of, and at what the divergence was meant to lower.

# %%
def continue_with(lam, eta, steps=40):
    torch.manual_seed(8)
    f = copy.deepcopy(on_noisy).train()
    optimizer = torch.optim.AdamW(f.parameters(), lr=1e-3)
    positions = finetune.training_positions(train, 128, 128, 0, steps, seed=1, rank=0, world=1)
    for pixels, labels in finetune.load_batches(images, positions, torch.device("cpu")):
        clean = (pixels / images.levels).repeat(2, 1, 1, 1)                               # two noisy copies of each
        logits = f(clean + SIGMA * torch.randn_like(clean))
        loss = F.cross_entropy(logits, labels.repeat(2)) + finetune.consistency_loss(logits.reshape(2, -1, 10), lam, eta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return f.eval()


twins = {"cross-entropy alone": continue_with(0.0, 0.0), "with the divergence": continue_with(LAMBDA, 0.0),
         "with both terms": continue_with(LAMBDA, ETA)}


@torch.inference_mode()
def disagreement(f):
    """Mean KL(F || F_i) of two noisy copies of the test images."""
    torch.manual_seed(6)
    two = torch.stack([f(x + SIGMA * torch.randn_like(x)) for _ in range(2)])
    return finetune.consistency_loss(two, 1.0, 0.0).item()


shares = {name: 1 - under_noise(f)[1].numpy() for name, f in twins.items()}
for name, f in twins.items():
    print(f"{name:20} disagreement {disagreement(f):.4f} nats   right votes: mean {shares[name].mean():.1%}, "
          f"images with at least 99 % of them {np.mean(shares[name] >= 0.99):.1%}, with more than half {np.mean(shares[name] > 0.5):.1%}")
assert disagreement(twins["with the divergence"]) < disagreement(twins["cross-entropy alone"])

figure, axis = plt.subplots(figsize=(6, 3.4))
radius = np.linspace(0, 0.58, 200)
for (name, share), colour, line in zip(shares.items(), (ORANGE, GREEN, BLUE), ("--", ":", "-"), strict=True):
    reach = SIGMA * torch.special.ndtri(torch.from_numpy(np.clip(share, 0, 1 - 1 / 100))).numpy()
    axis.plot(radius, [100 * np.mean((share > 0.5) & (reach >= r)) for r in radius], line, color=colour, label=name)
axis.set(xlabel="σ Φ⁻¹(share of right votes) at least (L2, pixels in [0, 1])", ylabel="test images (%)", ylim=(0, 102))
axis.legend(frameon=False, loc="lower left")
plt.show()

# %% [markdown]
# The divergence does what it says; the entropy sharpens every answer, and a divergence in nats grows with the sharpness of what it compares, so that the two pull at it from both sides. The log of full fine-tuning runs (ten epochs, from the DMAE encoder) tells what is left of it in accuracy:

# %%
runs = [json.loads(row) for row in (DIGITS / "comparison.jsonl").read_text().splitlines()]
paired = {run["seed"] for run in runs if run["part"] == "consistency"}
for weight in (0.0, LAMBDA):
    chosen = [run for run in runs if run["init"] == "dmae" and run["labels"] == "all" and run["head"] == "fine-tuned" and run["consistency"] == weight
              and run["seed"] in paired]
    print(f"lambda = {weight:g}: " + "   ".join(f"{key} {100 * np.mean([run[key] for run in chosen]):.1f} %" for key in ("clean", "noisy", "vote"))
          + f"   (seeds {[run['seed'] for run in chosen]})")

# %% [markdown]
# The curves of the picture are *estimates*, with the observed share in place of a lower confidence bound: good enough to compare two classifiers, not a certificate. Notebook 02 explains the difference. And 360 images are few: a difference of a point or two in a row of the table is within chance.
#
# ## 6. What pre-training buys: DMAE, MAE, and nothing
#
# The log `results/digits/comparison.jsonl` holds the runs, made by `results/digits/compare.py`. For each of three seeds, one encoder was pre-trained as a DMAE (noise of 0.25, a quarter of the patches dropped, loss on all
# of them), another as an MAE (no noise, half of the patches dropped, loss on those), and each, like a freshly initialised one, then met three tasks, all at $\sigma = 0.25$:
#
# * *linear probe*: the encoder is frozen, and a linear layer on its class token learns all labels. It measures what the features hold already.
# * *ten labels per class*: everything is fine-tuned, on 100 labelled images.
# * *all labels*: everything is fine-tuned, on 1293.
#
# All numbers are of the 360 test images, by other writers. The model was selected on 144 held-out training images with labels, also in the ten-label runs, which therefore know a little more than their name says.

# %%
ENCODERS = {"dmae": ("DMAE", BLUE, "o"), "mae": ("MAE", PINK, "^"), "scratch": ("scratch", ORANGE, "s")}
TASKS = {"linear probe": ("linear probe", "all"), "ten labels per class": ("fine-tuned", 10), "all labels": ("fine-tuned", "all")}
MEASURES = {"noisy": "one noise draw", "vote": "majority of 100 draws"}


def select(**wanted):
    return [run for run in runs if all(run[key] == value for key, value in wanted.items())]


def of_task(init, task):
    head, labels = TASKS[task]
    return select(init=init, head=head, labels=labels, part="comparison")


def summary(chosen, key):
    values = np.array([100 * run[key] for run in chosen])
    return values, values.mean(), values.std(ddof=1) if len(values) > 1 else math.nan


print("test accuracy under one noise draw / by majority of 100 draws (%), mean +- standard deviation over the seeds")
for task in TASKS:
    for init, (name, *_) in ENCODERS.items():
        chosen = of_task(init, task)
        cells = [f"{mean:5.1f} +- {spread:3.1f}" for _, mean, spread in (summary(chosen, key) for key in MEASURES)]
        print(f"{task:22} {name:8} {' / '.join(cells)}   seeds {[run['seed'] for run in chosen]}, {chosen[0]['epochs']:g} epochs")
        assert [run["seed"] for run in chosen] == [run["seed"] for run in of_task("dmae", task)]     # seed by seed

figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), sharey=True, layout="constrained")
for axis, (key, title) in zip(axes, MEASURES.items(), strict=True):
    for offset, (init, (name, colour, marker)) in zip((-0.25, 0, 0.25), ENCODERS.items(), strict=True):
        for place, task in enumerate(TASKS):
            values, mean, spread = summary(of_task(init, task), key)
            axis.bar(place + offset, mean, 0.23, color=colour, alpha=0.55, label=name if place == 0 else None)
            axis.errorbar(place + offset, mean, spread, color="black", capsize=4, linewidth=1.2)
            axis.scatter(place + offset + np.linspace(-0.05, 0.05, len(values)), values, s=14, color=colour, edgecolor="black",
                         linewidth=0.5, marker=marker, zorder=3)
    axis.set_xticks(range(len(TASKS)), [task.replace(" per", "\nper") for task in TASKS])
    axis.set(title=f"accuracy at σ = 0.25: {title}", ylim=(0, 105))
axes[0].set_ylabel("test images (%)")
axes[0].legend(frameon=False, loc="upper left", ncols=3)
plt.show()

# %% [markdown]
# By linear probe, what the DMAE's features hold under noise is far ahead of the MAE's, although the MAE's are not bad on *clean* images: it is the noise in pre-training that matters. After ten epochs of fine-tuning, the MAE has caught up to within two or three points: under noise no seed has it
# ahead, but that is not much more than the spread over the seeds. A network from scratch is still far behind, with few labels and with all.
#
# How much to trust this? The error bars are the standard deviation over three seeds, and a seed draws everything: the initialisation, the pre-training's noise and masks, the new head, the order of the images, the noise, and in the second task the labelled images.
# Not in the bars is the luck of the test set, which is the same for all: with 360 images, a share of 90 % has a binomial standard error of 1.6 points of its own. The recipe's hyperparameters were chosen for DMAE on held-out
# images, not for the other two; an initialisation from scratch might like another schedule, and no layer decay.
#
# The probe's optimizer is a matter of its own. LARS (You et al. 2017; here in the variant of MAE's probes) sets the length of a step by the weights instead of by the gradient: a matrix $w$ with gradient $h$ (and weight decay $\beta$) gets
#
# $$ v \leftarrow \mu\,v + \tau\,\frac{\|w\|}{\|h + \beta w\|}\,(h + \beta w), \qquad w \leftarrow w - \eta\,v, $$
#
# with momentum $\mu = 0.9$ and trust coefficient $\tau = 0.001$. The first step then has length $\eta\,\tau\,\|w\|$, a thousandth of the weights' own per unit of rate, however large the batch or the loss: which is why its rates look so large (10 here), and why the gradient's scale drops out.

# %%
show(finetune.LARS.step)

w = torch.nn.Parameter(torch.randn(10, 64, dtype=torch.float64))
start, lars = w.detach().clone(), finetune.LARS([dict(params=[w])], lr=10.0)
w.grad = 1e3 * torch.randn(10, 64, dtype=torch.float64)                                   # any scale will do
lars.step()
first = w.detach() - start
assert math.isclose(first.norm().item(), 10.0 * 0.001 * start.norm().item(), rel_tol=1e-9)
direction = -w.grad / w.grad.norm()
middle, w.grad = w.detach().clone(), torch.zeros_like(w)                                  # no gradient: momentum alone
lars.step()
assert torch.allclose(first / first.norm(), direction) and torch.allclose(w.detach() - middle, 0.9 * first)

# %% [markdown]
# One of these runs again, shortened: a linear probe of five epochs (instead of 60) on the committed encoder, and on none.

# %%
PROBE = ("--sigma", SIGMA, "--linear-probe", "--epochs", 5, "--warmup-epochs", 1)
rerun = {name: run_finetune(*PROBE, "--init", init)[1] for name, init in (("DMAE", DIGITS / "pretrain.pt"), ("scratch", "scratch"))}
for name, rows in rerun.items():
    assert rows[-1]["split"] == "test"
    print(f"{name:8} clean {rows[-1]['clean']:.1%}   one noise draw {rows[-1]['noisy']:.1%}   majority {rows[-1]['vote']:.1%}")
assert rerun["DMAE"][-1]["noisy"] > rerun["scratch"][-1]["noisy"] + 0.1

figure, axis = plt.subplots(figsize=(6, 3.2))
for (name, rows), colour, marker in zip(rerun.items(), (BLUE, ORANGE), "os", strict=True):
    held = [row for row in rows if row.get("split") == "holdout"]
    axis.plot([row["epoch"] for row in held], [100 * row["noisy"] for row in held], marker + "-", color=colour, label=name, markersize=4)
axis.set(xlabel="epochs of the linear probe", ylabel="held-out images,\none noise draw (%)", ylim=(0, 102))
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 7. Two comparisons that do not flatter
#
# **Equal total time.** Section 6 gave every initialisation the same *fine-tuning*. But pre-training is not free. The fair question to someone who owns the labels already is
# what training from scratch reaches in the time that both stages take together, on the same machine.
#
# **No training at all.** Suppose that a test image were one of the $M$ training images $x_1, \dots, x_M$, each equally likely, plus noise. Then Bayes' rule gives the
# probability of each class, given the noisy image $z = x_i + e$,
#
# $$ \mathbb{P}[c \mid z] = \frac{\sum_{i:\, y_i = c} \exp\!\big(-\|z - x_i\|_2^2 / 2\sigma^2\big)}{\sum_{j=1}^M \exp\!\big(-\|z - x_j\|_2^2 / 2\sigma^2\big)}, $$
#
# since the density of $z$ given $x_i$ is that of $e$ at $z - x_i$, whose normalisation $(2\pi\sigma^2)^{-d/2}$ is the same for all $i$ and cancels, as the prior $1/M$ does. Under this assumption no classifier of $z$ errs less often. The
# assumption is wrong, of course (test digits are new ones, by new writers), but with noise (of length $\sigma\sqrt d = 2$) longer than the distance between neighbouring digits (about 1.1) it is not very wrong: the sum
# becomes a kernel density estimate whose bandwidth is the noise itself. A network that is to be worth its training should do better.
#
# This baseline is in none of the stages, because it is nothing of the method's, but in `results/digits/compare.py`, which made the log; `finetune.evaluate` takes it like any other classifier, and gives it the same noise as the networks of the same seed.

# %%
sys.path.insert(0, str(DIGITS))
from compare import Posterior

show(Posterior)
show(finetune.evaluate, "model.eval()", "voted += ")
posterior = Posterior(train_x, train_y, SIGMA)

# The same by Bayes' rule, spelled out: normalised densities, prior 1/M, one noisy image at a time, double precision.
torch.manual_seed(7)
for z in (x[:20] + SIGMA * torch.randn_like(x[:20])).double():
    density = torch.distributions.Normal(train_x.double(), SIGMA).log_prob(z).sum(dim=(1, 2, 3)).exp()
    joint = torch.stack([density[train_y == c].sum() / len(train) for c in range(10)])
    assert torch.allclose(posterior(z[None].float())[0].exp().double(), joint / joint.sum(), atol=2e-3)

measured = finetune.evaluate(posterior, test, torch.arange(len(test)), SIGMA, draws=100, batch=250, seed=0, rank=0, world=1,
                             device=torch.device("cpu"))
logged = select(part="posterior", labels="all", seed=0)[0]
print("Bayes posterior without training: clean {:.1%}, one noise draw {:.1%}, majority of 100 {:.1%}".format(*measured))
assert all(abs(now - logged[key]) <= 3 / 360 for now, key in zip(measured, ("clean", "noisy", "vote"), strict=True))

# %%
EQUAL = {"DMAE, then fine-tuned": [run for run in of_task("dmae", "all labels") if select(part="equal time", seed=run["seed"])],
         "scratch, equal total time": select(part="equal time"),
         "scratch, equal fine-tuning": [run for run in of_task("scratch", "all labels") if select(part="equal time", seed=run["seed"])],
         "Bayes posterior, no training": select(part="posterior", labels="all")}
for name, chosen in EQUAL.items():
    seconds = [run["pretrain_seconds"] + run["finetune_seconds"] for run in chosen]
    values = "   ".join(f"{key} {summary(chosen, key)[1]:.1f} %" for key in ("clean", "noisy", "vote"))
    print(f"{name:29} {values}   seeds {[run['seed'] for run in chosen]}, epochs {[run['epochs'] for run in chosen]}, "
          f"seconds {[round(s) for s in seconds]}")
for ours, theirs in zip(EQUAL["DMAE, then fine-tuned"], EQUAL["scratch, equal total time"], strict=True):
    ratio = theirs["finetune_seconds"] / (ours["pretrain_seconds"] + ours["finetune_seconds"])
    assert ours["seed"] == theirs["seed"] and 0.75 < ratio < 1.33, ratio                   # the times agree, roughly

few = {"DMAE, ten labels": of_task("dmae", "ten labels per class"), "Bayes posterior, ten labels": select(part="posterior", labels=10)}
figure, axis = plt.subplots(figsize=(9.5, 3.6), layout="constrained")
colours = [BLUE, ORANGE, YELLOW, "0.5", BLUE, "0.5"]
for place, (chosen, colour) in enumerate(zip((EQUAL | few).values(), colours, strict=True)):
    for shift, key, hatch in ((-0.2, "noisy", None), (0.2, "vote", "//")):
        values, mean, spread = summary(chosen, key)
        axis.bar(place + shift, mean, 0.36, color=colour, alpha=0.55, hatch=hatch, edgecolor="white")
        axis.scatter(place + shift + np.linspace(-0.08, 0.08, len(values)), values, s=16, color=colour, edgecolor="black", linewidth=0.5, zorder=3)
        axis.text(place + shift, values.max() + 1.2, f"{mean:.1f}", ha="center", fontsize=9)
for label, hatch in (("one noise draw", None), ("majority of 100 draws", "//")):
    axis.bar(0, 0, color="0.7", hatch=hatch, edgecolor="white", label=label)
axis.set_xticks(range(len(EQUAL | few)), [name.replace(", ", ",\n").replace("equal ", "equal\n") for name in EQUAL | few])
axis.set(ylabel="test images (%)", ylim=(60, 104), xlim=(-0.6, 5.6))
axis.axvline(3.5, color="0.6", linestyle=":", linewidth=1)
axis.legend(frameon=False, loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.12), fontsize=9)
plt.show()

# %% [markdown]
# In four fifths of the total time (processor seconds on one core; the epochs from scratch were reckoned from the seconds of the ten-epoch run, and took less than planned), training from scratch has more than made up for what it lacked, with each of the three seeds: pre-training is no
# bargain on these 1300 labelled digits, if its own cost is counted. And a sum of exponentials over the training images, without any training, is better than either with all labels, and no worse than the DMAE with ten per class. What the table does
# say for pre-training is what section 6 says: *given* the encoder, a few epochs or a linear layer go far. The encoder's cost is paid once, without a label, and can be shared by many tasks, noise levels and few-label problems; the paper pays it
# on ImageNet, where neither labels nor a nearest neighbour in pixel space are of so much use. Nothing here, in either direction, measures that: 8 × 8 digits lie so close together that pixels are almost the right features already.
