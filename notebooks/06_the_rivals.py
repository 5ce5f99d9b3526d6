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
# previous: [05, certifying, and trying to break it](05_certify_and_attack.ipynb) | [contents](README.md)
#
# # 6. The rivals, one function each
#
# The paper's tables compare DMAE with seven other methods, each from a repository of its own, with its own network,
# certifier and year. Here each is one function, on one backbone and under one certifier.
#
# **Afterwards you can**
#
# * say for each method which problem of a smoothed classifier it solves, and write its few lines from the equation;
# * check an attack, a radius and a denoiser where the truth is known in closed form;
# * say what each method costs, in passes through the network, and where a consensus saves passes;
# * translate a noise level into the step of a diffusion, and avoid the usual factor of two;
# * read a comparison of training objectives: at equal epochs, at equal time, paired by image.
#
# **It needs** notebooks 01 to 04, and the packages of `requirements.txt`; no GPU, no download. **It runs** in about a
# minute on two CPU cores. **Which weights.** The attacks run on `results/digits/finetune_sigma_0.25.pt` (consistency,
# $\lambda=2$), the denoiser is `results/digits/pretrain.pt`; `python pretrain.py && python finetune.py --sigma 0.25`
# made both. The ensemble of section 6.6 and the clean classifier of section 6.7 are small perceptrons, trained in the
# page. The last section trains nothing: it reads `results/digits/objectives.jsonl`, written by `python
# results/digits/objectives.py`.
#
# The symbols are those of the table in the [contents](README.md).

# %%
import inspect
import json
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from scipy import stats
from torch import nn

ROOT = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "finetune.py").exists())
sys.path.insert(0, str(ROOT))
import finetune
import model
import pretrain
from extras import denoise, diffusion, ensemble, macer, smoothadv, smoothmix

# %matplotlib inline
DIGITS = ROOT / "results" / "digits"
SIGMA = 0.25
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "0.5"
plt.rcParams.update({"font.size": 10, "axes.titlesize": 10, "legend.fontsize": 9, "figure.dpi": 90,
                     "figure.facecolor": "white", "savefig.facecolor": "white",
                     "axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True})
torch.set_num_threads(1)                                     # so small a network is no faster on two threads
torch.manual_seed(0)


def show(*things):
    """The source of functions and classes, as it stands in the scripts."""
    for thing in things:
        display(Markdown(f"```python\n{inspect.getsource(thing)}```"))


def draw(axis, image, title="", colour="black"):
    """A digit (8, 8) with pixels in [0, 1], strokes bright on black, and its label."""
    axis.imshow(image.clamp(0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9, color=colour)


checkpoint = model.read_checkpoint(DIGITS / "finetune_sigma_0.25.pt", "finetune")
f = model.VisionTransformer(**checkpoint["config"]).eval().requires_grad_(False)
model.load_weights(f, checkpoint["model"], "results/digits/finetune_sigma_0.25.pt")
train_images = finetune.open_images("digits", None, train=True, size=8, channels=1, device="cpu")
test_images = finetune.open_images("digits", None, train=False, size=8, channels=1, device="cpu")
train_x, train_y = train_images.items.tensors[0] / train_images.white, train_images.labels
x, y = test_images.items.tensors[0][::3] / test_images.white, test_images.labels[::3]  # 120 1 8 8 in [0, 1], 120
targets = F.one_hot(y, 10).float()                                                     # 120 10
parameters = sum(weight.numel() for weight in f.parameters())
print(f"{len(train_x):,} training images, {len(x)} test images; the classifier has {parameters:,} parameters")

# %% [markdown]
# ## 6.1 What they have in common: Gaussian training, and the smoothed scores
#
# **The problem.** $g(x)$ is a vote of $f$ on $x + e_1, \dots, x + e_m$, $e_i\sim\mathcal N(0,\sigma^2 I)$. An $f$ that
# has only seen clean images answers at random there (notebook 04, section 4.1).
#
# Every method below changes one link of this chain:
#
# | method | what it changes | what for |
# |---|---|---|
# | Gaussian training | $f$ sees noise | to be right on $x+e$ |
# | consistency | the loss | copies of one image are to agree |
# | SmoothAdv | the image | $x$ is replaced by its worst neighbour |
# | MACER | the loss | the radius itself is maximised |
# | SmoothMix | both | unsure half-way to an adversarial image |
# | ensembles | $f$, after training | less variance of the scores |
# | denoise, then classify | $f$, before a classifier that is there already | no training on noise |
# | one step of a diffusion | the same, with another denoiser | strong denoisers are there already, too |
# | DMAE | where the training starts | an encoder that has learnt to see through noise |
#
# The certificate stays the same for all: it holds for *any* deterministic $f$ (notebook 01).
#
# With the softmax scores $F_i = \mathrm{softmax} f(x+e_i)$ of $m$ copies, training with noise (Cohen et al. 2019) and
# the **smoothed scores** are
#
# $$ \mathcal L_{\text{Gaussian}} = -\frac1m\sum_{i=1}^m \log F_{i,y}, \tag{6.1} $$
#
# $$ F = \frac1m\sum_{i=1}^m F_i, \qquad J(x) = -\log F_y(x). \tag{6.2} $$
#
# $J$ is the logarithm of a mean; (6.1) is the mean of logarithms, and never smaller (Jensen). $J$ asks whether the
# *vote* is right; (6.1) asks of each copy to be right. It is (4.3) with $s = 0$, built in notebook 04, section 4.2.
#
# All objectives here are pure functions of logits of shape $(m, B, K)$. The noise is an argument, since an attack and
# the loss that follows it have to see the same draws.


# %%
def my_log_smoothed(logits):
    return logits.softmax(dim=-1).mean(dim=0).log()                                    # B K


logits = 3 * torch.randn(4, 6, 10, dtype=torch.float64)
torch.testing.assert_close(my_log_smoothed(logits), finetune.log_smoothed(logits))
show(finetune.log_smoothed)

# %% [markdown]
# The script takes `logsumexp` of logarithms, so that a score which float32 rounds to zero does no harm. Now the two
# losses on the test digits: each point is an image, with 200 noisy copies.

# %%
logits_of = finetune.noisy_logits(f, "fp32")
with torch.inference_mode():
    logits = logits_of(x, SIGMA * torch.randn(200, *x.shape))                          # 200 120 10
each = -logits.log_softmax(dim=-1)[:, range(len(y)), y].mean(dim=0)                    # 120
J = -finetune.log_smoothed(logits)[range(len(y)), y]                                   # 120
votes = (logits.argmax(dim=-1) == y).float().mean(dim=0)                               # 120, the share of right copies
assert (each >= J).all()                                                               # Jensen
torch.testing.assert_close(each.mean(), finetune.cross_entropy(logits, targets))       # (6.1), the mean over the images

figure, axis = plt.subplots(figsize=(5.6, 3.6))
points = axis.scatter(J, each, c=votes, cmap="viridis", s=18, vmin=0, vmax=1)
axis.axline((0.3, 0.3), slope=1, color=GREY, linewidth=1)
axis.set(xscale="log", yscale="log", xlabel="$J$: minus the log of the mean score",
         ylabel="(6.1): mean of minus the logs")
axis.text(0.6, 0.45, "equal", color=GREY)
figure.colorbar(points, ax=axis, label="share of copies that $f$ gets right")
plt.show()

# %% [markdown]
# ## 6.2 Consistency
#
# **The problem.** (6.1) rests content with a mean. Its copies may disagree about an image, and the radius grows with
# their agreement: it is a function of $p_A$ alone.
#
# **The idea** (Jeong & Shin 2020): each copy's scores are pulled towards their mean, and the mean towards certainty.
#
# $$ \mathcal L = \mathcal L_{\text{Gaussian}} + \lambda\,\frac1m\sum_{i=1}^m \mathrm{KL}(F\,\|\,F_i) + \eta\,H(F).
#    \tag{6.3} $$
#
# It is the one rival that the DMAE paper itself uses, with a weaker weight. (6.3) is (4.9): notebook 04, section 4.5,
# says what each term pulls on, and builds `consistency_loss`. Here we look at the divergence on two digits.

# %%
divergence = torch.stack([finetune.consistency_loss(logits[:, [i]], 1.0, 0.0) for i in range(len(x))])
order = divergence.argsort()
figure, axes = plt.subplots(2, 3, figsize=(9.4, 3.6), width_ratios=(1, 3, 3))
for row, i in enumerate((int(order[len(order) // 4]), int(order[-5]))):
    scores = logits[:20, i].softmax(dim=-1)                                            # 20 10
    draw(axes[row, 0], x[i, 0], f"y = {y[i]}")
    shown = axes[row, 1].imshow(scores, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes[row, 1].set(xticks=range(10), yticks=[], ylabel="20 copies", title="$F_i$, a row a copy")
    axes[row, 2].bar(range(10), logits[:, i].softmax(dim=-1).mean(dim=0), color=BLUE)
    axes[row, 2].set(xticks=range(10), ylim=(0, 1), title=f"$F$; mean KL($F$ || $F_i$) = {divergence[i]:.3f}")
for axis in axes[1, 1:]:
    axis.set_xlabel("class")
figure.colorbar(shown, ax=axes, label="score, left")
plt.show()

# %% [markdown]
# Above, the copies agree and the term is small. Below they do not: the mean is a compromise, and each copy is told to
# move towards it. **Cost**: $m$ forward and backward passes an image, two with the usual $m=2$.
#
# ## 6.3 SmoothAdv
#
# **The problem.** A radius is a statement about the neighbours of $x$, and (6.1) never looks at them.
#
# **The idea** (Salman et al. 2019): train on the neighbour where the *smoothed* classifier is worst, found by an attack
# on $J$ inside a ball.
#
# $$ x'_0 = x, \quad x'_{t+1} =
#    \Pi_\varepsilon\Bigl(x'_t + \frac{2\varepsilon}T\,\frac{\nabla J(x'_t)}{\lVert\nabla J(x'_t)\rVert}\Bigr),
#    \qquad \mathcal L = -\frac1m\sum_{i=1}^m\log \mathrm{softmax} f(x'_T + e_i)_y. \tag{6.4} $$
#
# $\Pi_\varepsilon$ clips the pixels to $[0, 1]$ and then shortens the way from $x$ to $\varepsilon$, by (5.4). The loss
# at the end is (6.1), not $J$. The noise $e_i$ is the same in all steps of the attack and in the loss.


# %%
def my_ascend(logits_of, x, y, noise, step, steps, eps=math.inf):
    now = x
    for _ in range(steps):
        now = now.detach().requires_grad_()
        J = -my_log_smoothed(logits_of(now, noise))[range(len(y)), y]                  # B
        (gradient,) = torch.autograd.grad(J.sum(), now)                                # B C H W
        length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        way = (now.detach() + step * gradient / length).clamp(0, 1) - x
        size = way.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        now = x + way * (eps / size).clamp(max=1)
    return now.detach()


def as_attacked(logits_of):
    """logits_of with what the scripts' attack asks: frozen(x, noise), here nothing else."""
    logits_of.frozen = logits_of
    return logits_of


def random_network(classes):
    """logits_of a random network with a hidden layer, in float64."""
    first, last = torch.randn(64, 16, dtype=torch.float64) / 4, torch.randn(16, classes, dtype=torch.float64)
    return as_attacked(lambda x, noise: ((x + noise).flatten(2) @ first).tanh() @ last)      # m B K


some, label = x[:6].double(), y[:6]
one_hot = F.one_hot(label, 10).double()
noise = SIGMA * torch.randn(4, *some.shape, dtype=torch.float64)
network = random_network(10)
for eps in (0.3, math.inf):
    mine = my_ascend(network, some, label, noise, 0.15, 4, eps)
    torch.testing.assert_close(mine, smoothadv.ascend(network, some, one_hot, noise, 0.15, 4, eps))
assert (mine - some).flatten(1).norm(dim=1).max() < 4 * 0.15 + 1e-9

with torch.random.fork_rng():                                                          # (6.4) as a whole
    torch.manual_seed(1)
    theirs = smoothadv.smoothadv(logits_of, x[:8], targets[:8], SIGMA, 50, 50, copies=4, eps=0.5, steps=4,
                                 label_smoothing=0.0)
    torch.manual_seed(1)
    draws = SIGMA * torch.randn(4, *x[:8].shape)
worst = my_ascend(logits_of, x[:8], y[:8], draws, 2 * 0.5 / 4, 4, 0.5)
torch.testing.assert_close(-logits_of(worst, draws).log_softmax(dim=-1)[:, range(8), y[:8]].mean(), theirs)
show(smoothadv.ascend, smoothadv.smoothadv)

# %% [markdown]
# **A closed form.** For a linear $f$ with two classes the plane between them is the same under any noise, and the
# gradient of $J$ points straight at it. So the attack walks along the plane's normal, for any noise and in every step.

# %%
weight = torch.randn(2, 64, dtype=torch.float64)
linear = as_attacked(lambda x, noise: (x + noise).flatten(2) @ weight.T)               # m B 2
middle = 0.4 + 0.2 * torch.rand(6, 1, 8, 8, dtype=torch.float64)                       # so that nothing is clipped
label = torch.tensor([0, 1, 0, 1, 0, 1])
normal = (weight[1 - label] - weight[label]).view(6, 1, 8, 8)
normal = normal / normal.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
found = smoothadv.ascend(linear, middle, F.one_hot(label, 2).double(), noise, 2 * 0.1 / 4, 4, eps=0.1)
torch.testing.assert_close(found, middle + 0.1 * normal)

# %% [markdown]
# Now a digit, and the committed classifier. We follow the smoothed score $F_y$ along the path: on the four copies that
# the attack sees, and on 2000 fresh ones.

# %%
hesitant = ((votes > 0.85) & (votes < 0.97)).nonzero().flatten()
i = int(hesitant[0])
EPS, STEPS, COPIES = 0.5, 4, 4
digit, wanted = x[[i]], targets[[i]]
noise = SIGMA * torch.randn(COPIES, *digit.shape)
fresh = SIGMA * torch.randn(2000, *digit.shape)
path = [smoothadv.ascend(logits_of, digit, wanted, noise, 2 * EPS / STEPS, steps, EPS) for steps in range(STEPS + 1)]


@torch.inference_mode()
def score_of(image, noise):
    """The smoothed score of the digit's label, on these draws of noise."""
    return finetune.log_smoothed(logits_of(image, noise)).exp()[0, y[i]].item()


seen, score = ([score_of(image, draws) for image in path] for draws in (noise, fresh))
lengths = [(image - digit).norm().item() for image in path]
assert max(lengths) < EPS + 1e-5 and seen[-1] < seen[0] and score[-1] < score[0]

falls = []                                                                             # the same with other draws
for _ in range(30):
    draws = SIGMA * torch.randn(COPIES, *digit.shape)
    end = smoothadv.ascend(logits_of, digit, wanted, draws, 2 * EPS / STEPS, STEPS, EPS)
    falls.append([score_of(digit, which) - score_of(end, which) for which in (draws, fresh[:500])])
falls = np.array(falls)                                                                # 30 2
tailored = falls[:, 0] - falls[:, 1]
print("thirty attacks: the score falls by {:.2f} on the copies they see, by {:.2f} on fresh ones".format(*falls.mean(axis=0)))
assert tailored.mean() > 2 * tailored.std(ddof=1) / math.sqrt(len(tailored))

figure = plt.figure(figsize=(10, 3.0))
left, right = figure.subfigures(1, 2, width_ratios=(1.3, 1))
axes = left.subplots(2, STEPS + 1)
for steps, image in enumerate(path):
    draw(axes[0, steps], image[0, 0], f"y = {y[i]}, step {steps}")
    way = (image - digit)[0, 0]
    shown = axes[1, steps].imshow(way, cmap="RdBu_r", vmin=-0.2, vmax=0.2, interpolation="nearest")
    axes[1, steps].set(xticks=[], yticks=[])
    axes[1, steps].set_title(f"length {lengths[steps]:.2f}", fontsize=9)
left.colorbar(shown, ax=axes[1, :], label="change")
axis = right.subplots()
axis.plot(seen, "o--", color=ORANGE)
axis.plot(score, "o-", color=BLUE)
axis.text(4.15, seen[-1], "the 4 copies\nof the attack", color=ORANGE, va="top")
axis.text(4.15, score[-1], "2000\nfresh copies", color=BLUE, va="bottom")
axis.set(xlabel="step", ylabel=f"smoothed score of y = {y[i]}", ylim=(-0.05, 1.05), xlim=(-0.2, 5.9), xticks=range(5))
plt.show()

# %% [markdown]
# Two steps reach the rim of the ball, the others look for a worse place on it. One attack may be luck, so the cell
# makes thirty. On average the copies that an attack sees fall further than fresh ones: part of it is tailored
# to four draws of noise. More copies tell less of chance and more of $g$, and cost as much more.
#
# **Cost**: $T$ passes for the attack and one for the loss, each forward and backward and for $m$ copies, so $m(T+1)$ an
# image. **Details that count**: the attack sees the network in eval mode and with its weights frozen (`f.frozen`). In
# the first epochs $\varepsilon$ rises in equal steps, one an epoch, but in a fifth of all epochs at most. SmoothMix's
# $\eta_S$ does the same. In `extras/` that is `warmed_up`:

# %%
def my_warm_up(epoch, epochs, warmup):
    """The share of eps or eta_S that is used in an epoch (a number that may lie within one)."""
    return min(1.0, (int(epoch) + 1) / min(warmup, epochs / 5))


for epochs in (5, 20, 50):
    for warmup in (1, 3, 10):
        for epoch in np.arange(0, 12, 0.25):
            assert smoothadv.warmed_up(epoch, epochs, warmup) == my_warm_up(epoch, epochs, warmup)
assert [smoothadv.warmed_up(epoch, 50, 10) for epoch in (0, 4, 9, 50)] == [0.1, 0.5, 1.0, 1.0]

# %% [markdown]
# ## 6.4 MACER
#
# **The problem.** Every loss so far is a stand-in for the radius. An attack, moreover, multiplies the cost.
#
# **The idea** (Zhai et al. 2020): write down the radius as a differentiable function of the scores, and maximise it
# where $g$ is right.
#
# $$ \hat F = \frac1m\sum_{i=1}^m \mathrm{softmax}\bigl(\beta_M f(x+e_i)\bigr), \qquad
#    \xi_M = \Phi^{-1}(\hat F_y) - \Phi^{-1}\bigl(\max_{c\ne y} \hat F_c\bigr), \tag{6.5} $$
#
# $$ \mathcal L = J + \lambda_M\,\frac\sigma2\,\max(\gamma_M - \xi_M,\, 0)\;\mathbb 1[\arg\max\nolimits_c \hat F_c = y].
#    \tag{6.6} $$
#
# $\sigma\xi_M/2$ is the two-sided radius with scores in place of votes. A large $\beta_M$ makes scores nearly votes.
# The first term is $J$, with $\beta_M = 1$, and no (6.1). The hinge stops paying at $\xi_M = \gamma_M$.


# %%
def my_macer(logits, y, sigma, lam, beta, gamma):
    rows = range(len(y))
    sharp = (beta * logits).softmax(dim=-1).mean(dim=0)                                # B K: F with a hat
    rival = sharp.clone()
    rival[rows, y] = 0
    xi = torch.special.ndtri(sharp[rows, y]) - torch.special.ndtri(rival.amax(dim=-1)) # B
    hinge = sigma / 2 * (gamma - xi).clamp(min=0)
    right = sharp.argmax(dim=-1) == y
    return (-my_log_smoothed(logits)[rows, y] + lam * torch.where(right, hinge, 0)).mean()


small, label = torch.randn(8, 40, 4, dtype=torch.float64), torch.randint(4, (40,))
one_hot = F.one_hot(label, 4).double()
for setting in ((0.5, 4.0, 1.0, 8.0), (0.25, 12.0, 4.0, 8.0), (1.0, 4.0, 4.0, 0.5)):
    theirs = macer.macer_loss(small, one_hot, *setting)
    torch.testing.assert_close(my_macer(small, label, *setting), theirs, rtol=1e-5, atol=0)
torch.testing.assert_close(macer.macer_loss(small, one_hot, 0.5, 0.0, 16.0, 8.0),
                           -finetune.log_smoothed(small)[range(40), label].mean())     # without lambda: J

with torch.random.fork_rng():                                                          # in training, of 30 epochs
    for epoch, lam in ((0, 0.0), (9.75, 0.0), (10, 4.0), (29, 4.0)):
        torch.manual_seed(1)
        theirs = macer.macer(logits_of, x[:8], targets[:8], SIGMA, epoch, 30, copies=4, lam=4.0, beta=1.0)
        torch.manual_seed(1)
        copies = logits_of(x[:8], SIGMA * torch.randn(4, *x[:8].shape))
        torch.testing.assert_close(my_macer(copies, y[:8], SIGMA, lam, 1.0, 8.0), theirs)
show(macer.macer_loss, macer.macer)

# %% [markdown]
# The page's version has the right values, and no gradients where $\hat F_y$ is rounded to 1: there $\Phi^{-1}$ is
# infinite, and its derivative times zero is nan. The script keeps $\hat F$ away from 0 and 1, before $\Phi^{-1}$.
#
# **A closed form.** For a linear $f$ with two classes, the soft radius with a large $\beta_M$ is the distance to the
# plane, since that is what the certificate gives (notebook 01, section 1.10). We recover it from the hinge.

# %%
pixels = torch.full((1, 1, 8, 8), 0.5, dtype=torch.float64)
difference = (weight[0] - weight[1]) / (weight[0] - weight[1]).norm()
for distance in (0.1, 0.3, 0.6):
    offset = distance - float(pixels.flatten() @ difference)                           # the plane lies this far away
    plane = lambda x, noise, offset=offset: torch.stack([(x + noise).flatten(2) @ difference + offset,
                                                         torch.zeros(len(noise), len(x), dtype=x.dtype)], dim=-1)
    copies = plane(pixels, 0.5 * torch.randn(100_000, 1, 1, 8, 8, dtype=torch.float64))
    first = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    with_hinge, without = (macer.macer_loss(copies, first, 0.5, lam, 1e4, 8.0).item() for lam in (1.0, 0.0))
    radius = 0.5 / 2 * 8.0 - (with_hinge - without)                                    # sigma xi / 2
    print(f"distance {distance}: soft radius {radius:.4f}")
    assert abs(radius - distance) < 0.01

# %%
share = torch.linspace(0.5, 1, 2001, dtype=torch.float64)[1:-1]
two = torch.stack([share.log(), (1 - share).log()], dim=-1)[None]                      # 1 1999 2: one copy
first = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
hinge, cross = [], []
for k in range(len(share)):
    J_alone, J_hinge = (macer.macer_loss(two[:, [k]], first, SIGMA, lam, 1.0, 8.0).item() for lam in (0.0, 1.0))
    hinge.append(J_hinge - J_alone)
    cross.append(J_alone)
np.testing.assert_allclose(cross, -share.log(), atol=1e-12)
np.testing.assert_allclose(hinge, SIGMA / 2 * (8 - 2 * stats.norm.ppf(share)).clip(min=0), atol=1e-5)

figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
axes[0].plot(share, hinge, color=GREEN)
axes[0].plot(share, cross, color=BLUE)
axes[0].text(0.62, 0.94, r"hinge, $\sigma/2\ (\gamma_M - \xi_M)$", color=GREEN)
axes[0].text(0.6, 0.56, r"$J = -\log F_y$", color=BLUE)
axes[0].set(xlabel="score of $y$ (two classes)", ylabel=r"loss ($\lambda_M = 1$, $\sigma$ = 0.25)",
            xlim=(0.5, 1), ylim=(0, 1.05))


def two_sided_radius(shares):
    """sigma/2 (Phi^-1 of the largest share - Phi^-1 of the second), shares (B, K) in 0.5 % to 99.5 %."""
    first, second = shares.topk(2, dim=-1).values.clamp(0.005, 0.995).unbind(dim=-1)
    return SIGMA / 2 * (torch.special.ndtri(first) - torch.special.ndtri(second))


hard = two_sided_radius(F.one_hot(logits.argmax(dim=-1), 10).double().mean(dim=0))     # 120, by votes
distances = {}
for beta, colour in ((1, GREY), (4, ORANGE), (16, PURPLE)):
    soft = two_sided_radius(finetune.log_smoothed(beta * logits.double()).exp())       # 120, by scores
    distances[beta] = (soft - hard).abs().mean().item()
    axes[1].scatter(hard, soft, s=10, color=colour, label=rf"$\beta_M$ = {beta}")
    print(f"beta {beta:2}: mean distance of soft and voted radius {distances[beta]:.3f}")
assert distances[16] < distances[4] < distances[1]
axes[1].axline((0, 0), slope=1, color=GREY, linewidth=1)
axes[1].set(xlabel="radius by votes (200 copies, no bound)", ylabel=r"soft radius $\sigma\xi_M/2$")
axes[1].legend(frameon=False)
plt.show()

# %% [markdown]
# Left: beyond a score of 0.9 cross-entropy has a tenth left to gain, and its slope falls. The hinge's slope *grows*
# towards 1, since there a vote is worth most radius. That is its strength and its danger: images that are easy already
# pull hardest. So $\lambda_M$ is zero for the first part of the training: in `macer`, the objective, for a third of it.
#
# Right: with $\beta_M = 1$ the soft radius is below the voted one. With $\beta_M = 16$ it follows it. (Scores and
# shares of votes beyond 0.995 are drawn as 0.995, since 200 votes can tell no more. No radius here is a certificate.)
#
# **Cost**: $m$ passes an image, usually 16: no attack, but many copies.
#
# ## 6.5 SmoothMix
#
# **The problem.** Between an image and an adversarial one a smoothed classifier may stay sure of itself for too long.
# And SmoothAdv needs to know how far to go: $\varepsilon$.
#
# **The idea** (Jeong et al. 2021): ascend $J$ without a ball, and ask half-way for scores half-way to uniform.
#
# $$ x'_{t+1} = \mathrm{clip}\Bigl(x'_t + a\,\frac{\nabla J}{\lVert\nabla J\rVert}\Bigr), \qquad
#    x_\mu = (1-\mu)\,x + \mu\,x'_T, \qquad y_{\mu,c} = (1-\mu)\,F_c(x) + \frac\mu K, \tag{6.7} $$
#
# $$ \mathcal L = \mathcal L_{\text{Gaussian}} + \eta_S\;\mathbb 1[F \text{ is right}]\;\frac1m\sum_{i=1}^m
#    \mathrm{KL}\bigl(y_\mu\,\|\,\mathrm{softmax} f(x_\mu + e_i)\bigr), \tag{6.8} $$
#
# with $\mu$ uniform between 0 and $\tfrac12$, and $a$ the length of a step. The attack is `ascend` with $\varepsilon =
# \infty$. Gradients reach $F(x)$, too.


# %%
def my_smoothmix(logits, logits_mixed, y, mu, eta):
    clean = logits.softmax(dim=-1).mean(dim=0)                                         # B K
    mu = mu[:, None]
    wanted = (1 - mu) * clean + mu / clean.shape[-1]                                   # B K
    divergence = (wanted * (wanted.log() - logits_mixed.log_softmax(dim=-1))).sum(dim=-1)
    right = clean.argmax(dim=-1) == y
    return eta * (divergence.mean(dim=0) * right).mean()


clean, mixed = (torch.randn(4, 6, 10, dtype=torch.float64) for _ in range(2))
label = finetune.log_smoothed(clean).argmax(dim=-1)
label[:2] = (label[:2] + 1) % 10                                                       # two images that F gets wrong
mu = torch.rand(6, dtype=torch.float64) / 2
torch.testing.assert_close(my_smoothmix(clean, mixed, label, mu, 5.0),
                           smoothmix.smoothmix_loss(clean, mixed, F.one_hot(label, 10).double(), mu, 5.0))
found = smoothadv.ascend(linear, middle, F.one_hot(torch.tensor([0, 1, 0, 1, 0, 1]), 2).double(), noise[:, :6], 0.05, 4)
torch.testing.assert_close(found, middle + 4 * 0.05 * normal)                          # linear f: straight on
show(smoothmix.smoothmix_loss)

# %%
noise = SIGMA * torch.randn(COPIES, *digit.shape)
walk = [smoothadv.ascend(logits_of, digit, wanted, noise, 0.25, steps) for steps in range(5)]
shares = torch.linspace(0, 1, 21)
between = torch.cat([torch.lerp(digit, walk[-1], float(mu)) for mu in shares])         # 21 1 8 8
with torch.inference_mode():
    scores = finetune.log_smoothed(logits_of(between, fresh[:1000].expand(-1, 21, -1, -1, -1))).exp()[:, y[i]]
target = (1 - shares) * scores[0] + shares / 10
assert (walk[-1] - digit).norm() > EPS                                                 # no ball holds it

figure = plt.figure(figsize=(10, 3.0))
left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
axes = left.subplots(2, 5)
for steps in range(5):
    draw(axes[0, steps], walk[steps][0, 0], f"y = {y[i]}, step {steps}\nlength {(walk[steps] - digit).norm():.2f}")
    draw(axes[1, steps], between[round(steps * 2.5)][0], rf"$\mu$ = {float(shares[round(steps * 2.5)]):.2f}")
axes[0, 0].set_ylabel("$x'_t$", fontsize=9)
axes[1, 0].set_ylabel(r"$x_\mu$", fontsize=9)
axis = right.subplots()
axis.axvspan(0, 0.5, color="0.93")
axis.plot(shares, scores, color=BLUE)
axis.plot(shares[shares <= 0.5], target[shares <= 0.5], color=PURPLE)
axis.text(0.52, float(target[10]), r"wanted, $y_\mu$", color=PURPLE, va="center")
axis.text(0.28, float(scores[5]) + 0.06, "committed classifier", color=BLUE)
axis.text(0.03, 0.02, r"range of $\mu$")
axis.set(xlabel=r"share $\mu$ of the adversarial image", ylabel=f"smoothed score of y = {y[i]}",
         ylim=(0, 1.05), xlim=(0, 1))
plt.show()

# %% [markdown]
# The upper row is the ascent, which no ball holds back; the lower row is what enters the loss. The curve is the
# smoothed score along the way, and the purple line what SmoothMix asks for. Wherever the curve is above the line, the
# classifier is surer than it may be; where it is below, less sure. This classifier never heard of SmoothMix.
#
# **Cost**: $T$ passes for the attack and two for the loss, for $m$ copies each: $m(T+2)$ an image.
#
# ## 6.6 Ensembles, and a consensus that saves passes
#
# **The problem.** The scores of one network at $x+e$ vary: with the noise, and with the seed of its training. The vote
# pays for both.
#
# **The idea** (Horváth et al. 2022): nothing is trained differently, but $f$ is the mean of the logits $f_1,\dots,f_Z$
# of $Z$ networks with different seeds. Take any margin, the difference of two logits. Its variance over the noise is
#
# $$ \mathrm{Var}\Bigl[\frac1Z\sum_{l=1}^Z f_l\Bigr] = \frac1Z\;\overline{\mathrm{Var}}
#    + \Bigl(1 - \frac1Z\Bigr)\,\overline{\mathrm{Cov}}, \tag{6.9} $$
#
# with the mean variance of one network, and the mean covariance of two. (A variance of a sum is the sum of all
# covariances: $Z$ of a network with itself, $Z(Z-1)$ of two.) The first term falls with $Z$; what the networks have in
# common stays.
#
# The price is $Z$ passes a copy, in certification. **Consensus**: ask the first $u$ networks. The answer is theirs if
# they agree, and that of all $Z$ otherwise.
#
# $$ f(\tilde x) = \begin{cases} c & \text{if } \arg\max f_1(\tilde x) = \dots = \arg\max f_u(\tilde x) = c,\\
#    \arg\max \sum_{l=1}^Z f_l(\tilde x) & \text{otherwise.}\end{cases} \tag{6.10} $$
#
# (Horváth et al. call the two numbers $k$ and $K$, letters that are taken here.) It is a deterministic function of the
# noisy image $\tilde x = x+e$, so the certificate holds. But it is *another* function than the mean of all: two that
# agree can be outvoted.

# %%
RIVALS, ASKED = 5, 2


def train_perceptron(seed, sigma, epochs=25):
    """A network with one hidden layer, trained with noise by (6.1)."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(train_x)).split(128):
            noise = sigma * torch.randn(1, len(batch), 1, 8, 8)
            logits = finetune.noisy_logits(network, "fp32")(train_x[batch], noise)
            loss = finetune.cross_entropy(logits, F.one_hot(train_y[batch], 10).float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval().requires_grad_(False)


networks = [train_perceptron(seed, SIGMA) for seed in range(RIVALS)]
noisy = (x + SIGMA * torch.randn(100, *x.shape)).flatten(0, 1)                         # 12 000 1 8 8
outputs = torch.stack([network(noisy) for network in networks]).double()               # Z 12000 10
answers = outputs.argmax(dim=-1)                                                       # Z 12000
label = y.repeat(100)

# (6.9), for one image: the margin of its label to the likeliest rival, over the noise
here = outputs.view(RIVALS, 100, len(x), 10)[:, :, i]                                  # Z 100 10
rival = here.mean(dim=(0, 1)).topk(2).indices
rival = rival[rival != y[i]][0]
margin = here[:, :, y[i]] - here[:, :, rival]                                          # Z 100
covariance = torch.cov(margin)                                                         # Z Z
own = covariance.diagonal().mean()
shared = (covariance.sum() - covariance.trace()) / (RIVALS * (RIVALS - 1))
assert math.isclose(margin.mean(dim=0).var(), own / RIVALS + (1 - 1 / RIVALS) * shared, rel_tol=1e-9)
print(f"margin at one image: variance {own:.2f} of one network, covariance {shared:.2f} of two, "
      f"variance {margin.mean(dim=0).var():.2f} of the mean of {RIVALS}")
print(f"one network is right on {(answers == label).double().mean():.1%} of the noisy copies, "
      f"the mean of {RIVALS} on {(outputs.mean(dim=0).argmax(dim=-1) == label).double().mean():.1%}")


# %%
def my_consensus(outputs, asked):
    """The answers (n,) of (6.10) from the logits (Z, n, K) of all networks, and how many copies are in dispute."""
    votes = outputs[:asked].argmax(dim=-1)                                             # u n
    agree = (votes == votes[0]).all(dim=0)                                             # n
    return torch.where(agree, votes[0], outputs.sum(dim=0).argmax(dim=-1)), int((~agree).sum())


done = []                                                                              # the copies of every pass


def counted(network):
    def counting(z):
        done.append(len(z))
        return network(z)
    return counting


mine, disputed = my_consensus(outputs, ASKED)
consensus = ensemble.Consensus([counted(network) for network in networks], ASKED)
theirs = torch.cat([consensus(batch).argmax(dim=-1) for batch in noisy.split(400)])
assert torch.equal(mine, theirs)
assert sum(done) >= ASKED * len(noisy) + (RIVALS - ASKED) * disputed                   # batches are padded: a few more
full = outputs.sum(dim=0).argmax(dim=-1)
print(f"{ASKED} of {RIVALS} agree on {1 - disputed / len(noisy):.1%} of the copies; "
      f"{1 - sum(done) / (RIVALS * len(noisy)):.1%} of the passes saved; "
      f"the answer differs from the mean's on {(mine != full).double().mean():.2%}")
show(ensemble.Consensus)

# %%
noise_levels = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1)
rates, passes = [], []
unit = torch.randn(20, *x.shape)
for sigma in noise_levels:
    copies = (x + sigma * unit).flatten(0, 1)
    _, apart = my_consensus(torch.stack([network(copies) for network in networks]), ASKED)
    rates.append(1 - apart / len(copies))
    passes.append(ASKED + (RIVALS - ASKED) * apart / len(copies))
agreement = (answers[0] == answers[1]).double().view(100, -1).mean(dim=0)              # 120
right_share = (full == label).double().view(100, -1).mean(dim=0)                       # 120

figure, axes = plt.subplots(1, 2, figsize=(10, 3.3))
axes[0].plot(noise_levels, passes, "o-", color=BLUE)
axes[0].axhline(RIVALS, color=GREY, linewidth=1)
axes[0].axhline(ASKED, color=GREY, linewidth=1)
axes[0].text(1.0, RIVALS - 0.08, "all networks, always", color=GREY, va="top", ha="right")
axes[0].text(1.0, ASKED - 0.08, "the least", color=GREY, va="top", ha="right")
axes[0].axvline(SIGMA, color=GREY, linestyle=":")
axes[0].text(SIGMA + 0.01, 4.1, "trained for", color=GREY)
axes[0].set(xlabel=r"noise $\sigma$", ylabel="passes a noisy copy", ylim=(1.7, 5.2))
axes[1].scatter(right_share, agreement, s=16, color=BLUE)
axes[1].set(xlabel="copies that the ensemble gets right (a point an image)", ylabel="copies on which two agree")
plt.show()

# %% [markdown]
# Left: with more noise the first two agree less often, and the saving shrinks. Right: it shrinks on hard images. On
# easy ones, whose certificates are large, the rest of the ensemble is hardly ever asked. Most of the networks' variance
# is the noise's, which they share: the larger the covariance, the less there is to gain from more of them.
#
# ## 6.7 Denoise, then classify
#
# **The problem.** There is a good classifier of *clean* images already, too large to be trained again, or behind
# somebody else's interface.
#
# **The idea** (Salman et al. 2020): put a denoiser in front of it.
#
# $$ f(\tilde x) = \arg\max_c F_c\bigl(\mathcal D(\tilde x)\bigr), \qquad
#    \mathcal D \text{ trained by } \mathbb E\,\lVert\mathcal D(x + e) - x\rVert^2. \tag{6.11} $$
#
# $f$ is a function of the noisy image, and so the certificate speaks of the pixels of $x$. Their $\mathcal D$ is a
# convolutional network. Here it is what pre-training leaves behind: DMAE's encoder and decoder with no patch dropped.

# %%
dmae = denoise.open_denoiser(DIGITS / "pretrain.pt").requires_grad_(False)


def my_denoise(dmae, noisy):
    patches = (noisy.shape[-1] // dmae.patch_size) ** 2
    nothing_dropped = dict(mask_ratio=0.0, mask_noise=torch.rand(len(noisy), patches))
    latent, restore, _ = dmae.encode(noisy, **nothing_dropped)
    prediction = dmae.decode(latent, restore)                                          # B N P*P*C, normalised
    pixels = model.unpatchify(prediction, dmae.patch_size, dmae.grid)
    return (pixels * dmae.std + dmae.mean).clamp(0, 1)


noisy = x + SIGMA * torch.randn_like(x)
restored = denoise.denoise(dmae, noisy)
torch.testing.assert_close(my_denoise(dmae, noisy), restored, rtol=0, atol=1e-4)       # in any order of tokens
_, prediction, mask = dmae(noisy, 0.0, 0.0)                                            # no noise added, nothing masked
assert mask.sum() == 0
torch.testing.assert_close(pretrain.reconstruct(dmae, noisy, prediction), restored, rtol=0, atol=1e-4)
show(denoise.denoise)

# %% [markdown]
# The classifier behind it is a perceptron trained with $\sigma = 0$, in the page. It has never seen noise.

# %%
clean_classifier = train_perceptron(0, sigma=0.0)
LEVELS = (0.25, 0.5, 1.0)


def right(images):
    """The share of images (a multiple of 120) that the clean classifier gets right."""
    return (clean_classifier(images).argmax(dim=-1) == y.repeat(len(images) // len(y))).double().mean().item()


print(f"clean images: {right(x):.1%} right")
for sigma in LEVELS:
    noisy = (x + sigma * torch.randn(20, *x.shape)).flatten(0, 1)                      # 20 copies of each image
    restored = denoise.denoise(dmae, noisy)
    before, after = ((images - x.repeat(20, 1, 1, 1)).square().mean().item() for images in (noisy, restored))
    print(f"sigma {sigma:4}: {right(noisy):.1%} right on noisy, {right(restored):.1%} on denoised copies; "
          f"mean squared error {before:.3f} -> {after:.3f}")
    assert after < before

figure, axes = plt.subplots(4, 9, figsize=(9.6, 4.6))
for column in range(9):
    sigma, image = LEVELS[column // 3], x[[10 * column]]
    noisy = image + sigma * torch.randn_like(image)
    restored = denoise.denoise(dmae, noisy)
    draw(axes[0, column], image[0, 0], f"y = {y[10 * column]}")
    draw(axes[1, column], noisy[0, 0], rf"$\sigma$ = {sigma}")
    draw(axes[2, column], restored[0, 0], "")
    scores = clean_classifier(torch.cat([noisy, restored])).softmax(dim=-1)
    for shade, colour, width in ((scores[0], GREY, 0.8), (scores[1], BLUE, 0.4)):
        axes[3, column].bar(range(10), shade, color=colour, width=width)
    axes[3, column].set(xticks=(0, 5, 9), yticks=[], ylim=(0, 1))
for axis, name in zip(axes[:, 0], ("clean", "noisy", "denoised", "scores: noisy grey,\ndenoised blue"), strict=True):
    axis.set_ylabel(name, rotation=0, ha="right", va="center")
plt.show()

# %% [markdown]
# The error falls to a quarter and less. The classifier gains less than one may expect: a plain perceptron is not so
# brittle on these digits, and at $\sigma = 1$ little is left to restore. (In front of a transformer: section 6.9.)
#
# The denoiser was trained at $\sigma = 0.25$ with a quarter of the patches dropped; at 0.5 and 1 it works outside of
# what it has learnt. What it returns is near the mean of all clean digits that the noisy one may have been (Tweedie's
# formula, notebook 03, section 3.15). So it is blurred where it is unsure, and may show a digit that was not there.
#
# **Cost**: one pass of $\mathcal D$ and one of $F$ a copy, and no training but the denoiser's.
#
# ## 6.8 One step of a diffusion
#
# **The problem.** A denoiser trained for one $\sigma$ serves one $\sigma$, and large ones are expensive to train.
#
# **The idea** (Carlini et al. 2023): a diffusion model *is* a denoiser for all noise levels, and very large ones can be
# downloaded. One step suffices. A diffusion works on $2x-1 \in [-1, 1]$ and makes
#
# $$ x_t = \sqrt{\bar a_t}\,(2x-1) + \sqrt{1-\bar a_t}\;\mathcal N(0, I), \qquad \bar a_t \text{ falling}. $$
#
# $\tilde x = x+e$ is such an $x_t$, up to a factor, at the step where the noise is as large. In units of $2x-1$ the
# noise is $2\sigma$:
#
# $$ t(\sigma) = \min\Bigl\{t : \sqrt{\tfrac{1-\bar a_t}{\bar a_t}} \ge 2\sigma\Bigr\}, \qquad
#    x_t = \sqrt{\bar a_t}\,(2\tilde x - 1). \tag{6.12} $$
#
# With the model's prediction $\hat e(x_t, t)$ of the noise, one step back is
#
# $$ \mathcal D(\tilde x) = \tfrac12 + \tfrac12\,
#    \mathrm{clip}\Bigl(\frac{x_t - \sqrt{1-\bar a_t}\;\hat e(x_t, t)}{\sqrt{\bar a_t}}\Bigr). \tag{6.13} $$
#
# This repository trains no diffusion. `denoise_by_diffusion` takes any callable $\hat e(x_t, t)$, for those who have
# one.


# %%
def my_step(sigma, abar):
    for t, a in enumerate(abar.tolist()):
        if math.sqrt((1 - a) / a) >= 2 * sigma:
            return t, math.sqrt(a)


def my_diffusion_denoiser(e_hat, noisy, t, abar):
    a = abar[t].item()
    x_t = math.sqrt(a) * (2 * noisy - 1)
    estimate = (x_t - math.sqrt(1 - a) * e_hat(x_t, torch.full((len(noisy),), t))) / math.sqrt(a)
    return (1 + estimate.clamp(-1, 1)) / 2


time = torch.linspace(0, 1, 1001, dtype=torch.float64)
cosine = ((time + 0.008) / 1.008 * math.pi / 2).cos() ** 2
SCHEDULES = {"linear": (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(dim=0),
             "cosine": cosine[1:-1] / cosine[0]}
for name, abar in SCHEDULES.items():
    for sigma in LEVELS:
        t, scale = diffusion.diffusion_step(sigma, abar)
        assert (t, scale) == my_step(sigma, abar)
        noise_there = math.sqrt(1 - scale**2) / scale / 2
        print(f"{name} schedule of 1000 steps, sigma {sigma:4}: step {t}, whose noise is {noise_there:.4f}")
show(diffusion.diffusion_step, diffusion.denoise_by_diffusion)

# %% [markdown]
# **A closed form.** For Gaussian data, $x\sim\mathcal N(\bar x, \Sigma)$, the best denoiser is known, and linear:
#
# $$ \mathbb E[x\mid \tilde x] = \bar x + \Sigma\,(\Sigma + \sigma^2 I)^{-1}(\tilde x - \bar x), \tag{6.14} $$
#
# Wiener's filter. A diffusion that has learnt such data perfectly predicts the noise
# $\hat e(x_t,t) = \bigl(x_t - \sqrt{\bar a_t}\;\mathbb E[2x-1\mid x_t]\bigr)/\sqrt{1-\bar a_t}$. We give it mean and
# covariance of the training digits, and one step of (6.13) must return (6.14).

# %%
abar = SCHEDULES["cosine"]
flat = (2 * train_x.double() - 1).flatten(1)
centre, Sigma = flat.mean(dim=0), torch.cov(flat.T)                                    # in units of 2x - 1


def e_hat(x_t, t):
    """The noise that a perfect diffusion of Gaussian data would predict."""
    a = abar[t[0]].item()
    gain = math.sqrt(a) * Sigma @ torch.linalg.inv(a * Sigma + (1 - a) * torch.eye(64, dtype=torch.float64))
    mean = centre + (x_t.flatten(1).double() - math.sqrt(a) * centre) @ gain.T         # E[2x - 1 given x_t]
    return ((x_t.flatten(1) - math.sqrt(a) * mean) / math.sqrt(1 - a)).view_as(x_t)


def wiener(noisy, sigma):
    """(6.14) for the Gaussian with the training digits' mean and covariance."""
    gain = Sigma / 4 @ torch.linalg.inv(Sigma / 4 + sigma**2 * torch.eye(64, dtype=torch.float64))
    middle = (1 + centre) / 2
    return (middle + (noisy.flatten(1) - middle) @ gain.T).view_as(noisy).clamp(0, 1)


for sigma in LEVELS:
    noisy = x.double() + sigma * torch.randn(x.shape, dtype=torch.float64)
    t, scale = diffusion.diffusion_step(sigma, abar)
    at_step = math.sqrt(1 - scale**2) / scale / 2                                      # a little above sigma
    found = diffusion.denoise_by_diffusion(e_hat, noisy, sigma, abar)
    torch.testing.assert_close(found, my_diffusion_denoiser(e_hat, noisy, t, abar))
    torch.testing.assert_close(found, wiener(noisy, at_step))
    theirs, ours = ((images - x).square().mean().item() for images in (found, denoise.denoise(dmae, noisy.float())))
    print(f"sigma {sigma:4}: mean squared error {theirs:.4f} of the Gaussian diffusion, {ours:.4f} of DMAE")

# %% [markdown]
# The factor of two is easily lost: some texts state $\sigma$ for images in $[-1, 1]$. What does it cost? We tell the
# model each step $t$ in turn. For Gaussian data the error is known. Let $\sigma_j^2$ be the eigenvalues of $\Sigma$,
# and
# $\sigma'$ the noise that the model assumes. The filter multiplies by $w_j = \sigma_j^2/(\sigma_j^2+\sigma'^2)$, and
#
# $$ \frac1d\,\mathbb E\,\lVert\mathcal D(\tilde x) - x\rVert^2 = \frac1d\sum_{j=1}^d
#    \bigl[(1-w_j)^2 \sigma_j^2 + w_j^2\sigma^2\bigr], \quad\text{least at } \sigma'=\sigma. \tag{6.15} $$

# %%
steps = torch.arange(20, 700)
assumed = ((1 - abar[steps]) / abar[steps]).sqrt() / 2                                 # the noise of each step
own = torch.linalg.eigvalsh(Sigma / 4).clamp(min=0)                                    # 64: sigma_j^2
w = own / (own + assumed[:, None] ** 2)                                                # steps 64
error = ((1 - w) ** 2 * own + w**2 * SIGMA**2).mean(dim=1)                               # (6.15)
right_step, forgotten = (diffusion.diffusion_step(sigma, abar)[0] for sigma in (SIGMA, SIGMA / 2))
assert abs(int(steps[error.argmin()]) - right_step) <= 1

noisy = x.double() + SIGMA * torch.randn(x.shape, dtype=torch.float64)
coarse = range(20, 700, 20)
on_digits = [(my_diffusion_denoiser(e_hat, noisy, t, abar) - x).square().mean().item() for t in coarse]

figure = plt.figure(figsize=(10, 3.2))
left, right_side = figure.subfigures(1, 2, width_ratios=(1, 1.1))
axis = left.subplots()
axis.plot(steps, error, color=BLUE)
axis.plot(coarse, on_digits, ".", color=GREY)
axis.plot((right_step, forgotten), error[[right_step - 20, forgotten - 20]], "o", color=ORANGE)
axis.text(right_step, error[right_step - 20] - 0.002, "step of $2\\sigma$", color=ORANGE, ha="center", va="top")
axis.text(forgotten + 12, error[forgotten - 20] + 0.002, "step of $\\sigma$: factor lost", color=ORANGE)
axis.text(560, 0.038, "Gaussian data,\n(6.15)", color=BLUE, ha="right")
axis.text(690, 0.017, "test digits,\nclipped", color=GREY, ha="right")
axis.set(xlabel="step $t$ that the model is told", ylabel="mean squared error, σ = 0.25", ylim=(0, None))
axes = right_side.subplots(3, 6)
for column in range(6):
    image = noisy[[15 * column]]
    draw(axes[0, column], image[0, 0], f"y = {y[15 * column]}")
    draw(axes[1, column], diffusion.denoise_by_diffusion(e_hat, image, SIGMA, abar)[0, 0])
    draw(axes[2, column], denoise.denoise(dmae, image.float())[0, 0])
for axis, name in zip(axes[:, 0], ("noisy", "Gaussian\ndiffusion", "DMAE"), strict=True):
    axis.set_ylabel(name, rotation=0, ha="right", va="center")
plt.show()

# %% [markdown]
# (6.15) is least at the step of (6.12), and the lost factor leaves noise behind. On the test digits, which are not
# Gaussian, and with the clip to $[0, 1]$, the best step is another, a little below.
#
# A Gaussian knows how the pixels vary together, and no more. A diffusion model in earnest knows far more of images than
# mean and covariance; this one is here since its truth is known.
#
# ## 6.9 All of them on one backbone
#
# `results/digits/objectives.py` fine-tunes one pre-trained encoder by each objective, for $\sigma = 0.25$, 0.5 and 1,
# with three seeds of fine-tuning. Each run is certified like any other, on the 120 images of above.
#
# **What this can and cannot show.** These are digits of 8 × 8 pixels, a network of 100 000 parameters, a few epochs,
# and 120 test images. Nothing here is evidence about ImageNet. The hyperparameters were chosen on held-out *training*
# images, at $\sigma = 0.5$ and one seed; lengths are scaled with $\sigma$. Each was tried with one seed, so that
# small differences within a method mean little. `tuning.jsonl` keeps what was tried:

# %%
sys.path.insert(0, str(DIGITS))
import objectives

print(f"{objectives.EPOCHS} epochs; n = {objectives.N:,}, alpha = {objectives.ALPHA}")
rows = [json.loads(line) for line in (DIGITS / "objectives.jsonl").read_text().splitlines()]
tried = [json.loads(line) for line in (DIGITS / "tuning.jsonl").read_text().splitlines()]
METHODS = {"gaussian": ("Gaussian", GREY), "consistency, lambda 2": ("consistency, λ = 2", "#56b4e9"),
           "consistency": ("consistency, tuned", BLUE), "macer": ("MACER", GREEN), "smoothadv": ("SmoothAdv", ORANGE),
           "smoothmix": ("SmoothMix", PURPLE)}
BOUNDS = ("one-sided", "two-sided")
RADII = [float(r) for r in rows[0]["two-sided"]["certified"]]


def select(**wanted):
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def spread(values):
    """Mean and standard deviation over seeds, as text."""
    if len(values) < 2:
        return f"{values[0]:.3f}        " if values else "-            "
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def percentages(runs):
    """Certified accuracy (%) at RADII, two-sided, the mean over the runs, as text."""
    return "".join(f"{100 * np.mean([run['two-sided']['certified'][f'{r:g}'] for run in runs]):6.1f}" for r in RADII)


best = {}
for row in tried:
    if row["held_out_acr"] > best.get(row["objective"], {"held_out_acr": 0})["held_out_acr"]:
        best[row["objective"]] = row
for row in tried:
    chosen = "  <- chosen" if row is best[row["objective"]] else ""
    print(f"{row['objective']:12} {row['flags']:60} held-out ACR {row['held_out_acr']:.3f}{chosen}")

if best["consistency"]["flags"] == "--consistency 2":                                  # then two rows are one run
    for run in select(part="equal epochs", objective="consistency, lambda 2"):
        place = dict(init="dmae", sigma=run["sigma"], seed=run["seed"])
        for other in select(part="equal epochs", objective="consistency", **place):
            assert all(run[bound] == other[bound] for bound in BOUNDS)
    print("\nThe chosen weight of consistency is the paper's, so that the two are one row below.")
    del METHODS["consistency, lambda 2"]
    METHODS["consistency"] = ("consistency, λ = 2", BLUE)

# %% [markdown]
# The objective is judged by what it is for: radius. ACR and certified accuracy, first at equal epochs: the mean over
# the seeds, and the standard deviation over the seeds. "One-sided" radii use $\overline{p_B} = 1 - \underline{p_A}$,
# "two-sided" ones all counts (notebook 02, section 2.11), of the same draws.

# %%
def table(part, methods, **more):
    """ACR by both bounds, and certified accuracy by the two-sided radii, at each sigma."""
    for sigma in (0.25, 0.5, 1.0):
        print(f"sigma {sigma:4}" + " " * 17 + "ACR one-sided   two-sided       certified (%) at r = "
              + "".join(f"{r:6g}" for r in RADII) + "   seconds  epochs")
        for method in methods:
            runs = select(part=part, objective=method, sigma=sigma, **more)
            name = METHODS[method][0]
            if not runs:
                print(f"   {name:22} not run")
                continue
            acr = "   ".join(spread([run[bound]["acr"] for run in runs]) for bound in BOUNDS)
            shares = percentages(runs)
            seconds, epochs = (np.mean([run[key] for run in runs]) for key in ("seconds", "epochs"))
            print(f"   {name:22} {acr}" + " " * 22 + f"{shares}   {seconds:7.0f}  {epochs:6.0f}")


table("equal epochs", METHODS, init="dmae")
for row in rows:
    shares = [row["two-sided"]["certified"][f"{r:g}"] for r in RADII]
    if shares[0] == shares[-1] > 0:                                                    # whatever is right is right by far
        print(f"collapsed to one class: {row['objective']}, {row['init']}, sigma {row['sigma']}, seed {row.get('seed')}, "
              f"{row['part']}")
for row in rows:                                                                       # the file agrees with itself
    for bound in BOUNDS:
        radii = np.array(row[bound]["radii"])
        assert math.isclose(radii.mean(), row[bound]["acr"], abs_tol=1e-4) and len(radii) == len(x)
        for r in RADII[1:]:
            assert math.isclose((radii >= r).mean(), row[bound]["certified"][f"{r:g}"], abs_tol=1e-4)

# %% [markdown]
# A run called collapsed gives every image the same answer. It is right on that class's share of the images, with the
# largest radius that the draws can prove. So its ACR may even be above that of a network that has learnt something:
# another reason never to print ACR alone.
#
# Seeds differ, and so do images. A comparison is sharper when it is paired by image (notebook 04): the difference of
# two methods' radii on the same image, each the mean over the seeds, has a standard error of its own over the $M = 120$
# images. The word at the end is "level" where the difference is below two standard errors.

# %%
def by_image(runs, bound="two-sided"):
    """The radius of each image (M,), a mean over the runs; wrong or abstained: 0."""
    return np.mean([run[bound]["radii"] for run in runs], axis=0)


def compare(first, second, bound="two-sided"):
    """Mean paired difference of two sets of runs, and its standard error over images."""
    seeds = {run.get("seed") for run in first} & {run.get("seed") for run in second}
    one, other = (by_image([run for run in runs if run.get("seed") in seeds], bound) for runs in (first, second))
    difference = one - other
    return difference.mean(), difference.std(ddof=1) / math.sqrt(len(difference))


def judge(difference, error):
    if abs(difference) < 2 * error or error == 0:
        return "level"
    return "ahead" if difference > 0 else "behind"


def compare_all(against, part="equal epochs"):
    """A line for each method and sigma: its paired difference to `against` (at equal epochs)."""
    for sigma in (0.25, 0.5, 1.0):
        base = select(part="equal epochs", objective=against, init="dmae", sigma=sigma)
        for method, (name, _) in METHODS.items():
            runs = select(part=part, objective=method, init="dmae", sigma=sigma)
            if method == against or not runs or not {run["seed"] for run in runs} & {run["seed"] for run in base}:
                continue
            difference, error = compare(runs, base)
            print(f"sigma {sigma:4}: {name:20} less {METHODS[against][0]:20} {difference:+.3f} ± {error:.3f}   "
                  f"{judge(difference, error)}")


compare_all("gaussian")
print()
compare_all("consistency")
at_one = {method: select(part="equal epochs", objective=method, init="dmae", sigma=1.0) for method in METHODS}
one_sided, two_sided = ({method: np.mean([run[bound]["acr"] for run in runs]) for method, runs in at_one.items()}
                        for bound in BOUNDS)
assert all(0.20 < acr < 0.25 for acr in two_sided.values())                            # what the text says of sigma = 1
assert max(one_sided, key=one_sided.get) == "smoothadv"

# %% [markdown]
# At equal epochs SmoothAdv and SmoothMix have the largest radii at σ = 0.25 and 0.5, then comes consistency, then
# Gaussian training. That is the order of the literature. MACER stays behind consistency; its λ is the smallest of those
# that were tried, so a smaller one may be better. At σ = 1 ten epochs are not enough for anybody: the two-sided ACR
# lies between 0.20 and 0.25. SmoothAdv answers one class for every image there, in all three seeds: its one-sided ACR
# is the largest at that σ, and worthless.
#
# Now the same at **equal time**. An epoch of MACER or of an attack takes many passes. Here each method has as many
# epochs as take the processor time of consistency above; so Gaussian training has more, the others fewer.

# %%
TIMED = [method for method in METHODS if method not in ("consistency", "consistency, lambda 2")]
table("equal time", TIMED, init="dmae")
print("\nagainst consistency, which has the same time:")
compare_all("consistency", part="equal time")
for sigma, word in ((0.25, "level"), (0.5, "level"), (1.0, "ahead")):                    # Gaussian training
    difference, error = compare(select(part="equal time", objective="gaussian", init="dmae", sigma=sigma),
                                select(part="equal epochs", objective="consistency", init="dmae", sigma=sigma))
    assert judge(difference, error) == word
assert (round(difference, 3), round(error, 3)) == (0.021, 0.007)

# %%
figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.9))
for axis, sigma in zip(axes, (0.25, 0.5, 1.0), strict=True):
    for method, (name, colour) in METHODS.items():
        for part, fill in (("equal epochs", colour), ("equal time", "white")):
            runs = select(part=part, objective=method, init="dmae", sigma=sigma)
            if not runs:
                continue
            seconds, acr = np.mean([run["seconds"] for run in runs]), [run["two-sided"]["acr"] for run in runs]
            deviation = np.std(acr, ddof=1) if len(acr) > 1 else 0
            axis.errorbar(seconds, np.mean(acr), yerr=deviation, color=colour, linewidth=1)
            axis.plot(seconds, np.mean(acr), "o", color=colour, markerfacecolor=fill, markersize=7,
                      label=name if part == "equal epochs" else None)
    axis.set(xscale="log", xlabel="processor seconds of fine-tuning", title=rf"$\sigma$ = {sigma:g}")
    axis.set_xticks((3, 5, 10, 20, 50, 100, 200), (3, 5, 10, 20, 50, 100, 200), minor=False)
    axis.set_xticks((), minor=True)
    axis.set_xlim(0.8 * min(row["seconds"] for row in rows if "seconds" in row),
                  1.25 * max(row["seconds"] for row in rows if "seconds" in row))
axes[0].set_ylabel("ACR, two-sided")
handles, names = axes[0].get_legend_handles_labels()
figure.legend(handles, names, loc="outside lower center", ncols=6, frameon=False)
figure.suptitle("filled: equal epochs; open: equal time; bars: standard deviation over seeds", fontsize=10)
plt.show()

# %% [markdown]
# Nothing is left of the attacks' lead at equal time. In the time of ten epochs of consistency they have three or four,
# and at σ = 0.25 and 0.5 they are behind it. Gaussian training has fifteen or sixteen. It is level with consistency at
# σ = 0.25 and 0.5, and ahead by 0.021 ± 0.007 at σ = 1. A costlier objective pays where time is not what is lacking.
#
# ACR is dominated by easy images (notebook 05, section 5.2), so here are the whole curves: certified accuracy at each
# radius, from the two-sided radii, the mean over the seeds.

# %%
def draw_curve(axis, runs, colour, **more):
    """Certified accuracy (%) over the two-sided radius, the mean over the runs."""
    radii = np.sort(np.concatenate([run["two-sided"]["radii"] for run in runs]))
    share = 100 * (1 - np.arange(len(radii)) / len(radii))                             # of runs x images with so much
    axis.step(np.concatenate([[0], radii[radii > 0]]), np.concatenate([[share[radii > 0][0]], share[radii > 0]]),
              where="pre", color=colour, linewidth=1.4, **more)


figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.7), sharey=True)
for axis, sigma in zip(axes, (0.25, 0.5, 1.0), strict=True):
    for method, (name, colour) in METHODS.items():
        runs = select(part="equal epochs", objective=method, init="dmae", sigma=sigma)
        if runs:
            draw_curve(axis, runs, colour, label=name)
    axis.set(xlabel=r"radius $r$ ($\ell_2$, pixels in [0, 1])", title=rf"$\sigma$ = {sigma:g}",
             xlim=(0, None), ylim=(0, 102))
axes[0].set_ylabel("certified accuracy (%)")
handles, names = axes[0].get_legend_handles_labels()
figure.legend(handles, names, loc="outside lower center", ncols=6, frameon=False)
plt.show()

for r, low, high in (("0", 84.7, 85.3), ("0.5", 40.3, 46.4)):                          # what the text says of sigma = 0.5
    shares = [100 * np.mean([run["two-sided"]["certified"][r] for run in
                             select(part="equal epochs", objective=method, init="dmae", sigma=0.5)])
              for method in METHODS if method != "macer"]
    print(f"sigma 0.5, all but MACER, certified at r = {r}: {min(shares):.1f} to {max(shares):.1f} %")
    assert (round(min(shares), 1), round(max(shares), 1)) == (low, high)

# %% [markdown]
# The gain lies at the larger radii. At σ = 0.5 all methods but MACER have 84.7 to 85.3 % at $r = 0$, by the two-sided
# radii. At $r = 0.5$ they have 40.3 to 46.4 %.
#
# **Where the training starts.** The same at σ = 0.5, with the encoder of a DMAE, of an MAE with the same number of
# epochs, and from random weights: the question of the paper, judged by radius. Three objectives were run from all
# three, with three seeds of fine-tuning; there is one pre-training of each kind.

# %%
INITS = {"dmae": ("DMAE", BLUE), "mae": ("MAE", PURPLE), "scratch": ("scratch", ORANGE)}
compared = [method for method in METHODS if select(part="equal epochs", objective=method, init="scratch")]
started = {(method, init): select(part="equal epochs", objective=method, init=init, sigma=0.5)
           for method in compared for init in INITS}
acr = {which: np.mean([run["two-sided"]["acr"] for run in runs]) for which, runs in started.items()}
for method in compared:
    for init, (name, _) in INITS.items():
        runs = started[method, init]
        line = f"sigma 0.5, {METHODS[method][0]:18} {name:8} ACR {spread([run['two-sided']['acr'] for run in runs])}   "
        line += f"certified (%) {percentages(runs)}"
        if init != "dmae":
            difference, error = compare(started[method, "dmae"], runs)
            line += f"   DMAE less it {difference:+.3f} ± {error:.3f}: {judge(difference, error)}"
            assert judge(difference, error) == "ahead"
        print(line)
    assert acr[method, "mae"] > acr[method, "scratch"] and acr[method, "scratch"] < acr[method, "dmae"] / 4

figure, axes = plt.subplots(1, 1 + len(compared), figsize=(11.8, 3.2), width_ratios=(1.15, *[1] * len(compared)))
for place, method in enumerate(compared):
    for shift, (init, (_, colour)) in zip((0.2, 0, -0.2), INITS.items(), strict=True):
        dots = [run["two-sided"]["acr"] for run in started[method, init]]
        axes[0].plot(dots, [shift - place] * len(dots), "o", color=colour, markersize=4)
        draw_curve(axes[1 + place], started[method, init], colour)
    for (name, colour), corner in zip(INITS.values(), ((0.4, 64), (0.1, 45), (0.3, 15)), strict=True):
        axes[1 + place].text(*corner, name, color=colour)
    axes[1 + place].set(title=METHODS[method][0], xlabel="radius $r$", xlim=(0, 1), ylim=(0, 102))
axes[0].set_yticks([-place for place in range(len(compared))], [METHODS[method][0] for method in compared])
axes[0].set(xlabel="ACR, two-sided (a dot a seed)", title=r"$\sigma$ = 0.5")
axes[1].set_ylabel("certified accuracy (%)")
plt.show()

# %% [markdown]
# At σ = 0.5 DMAE's encoder gives the largest radius under each of the three objectives, MAE's the second. With random
# weights the ACR is less than a quarter of DMAE's. Ten epochs are few for a network that starts from nothing: given
# more time it catches up on this data (notebook 04, section 4.7).
#
# (The encoder's own training is not in the seconds of above. Notebook 04, section 4.7, counts it.)
#
# **Without training on noise, and with three networks.** A clean classifier behind DMAE's denoiser; the mean of the
# three seeds' networks; and their consensus of two.

# %%
for sigma in (0.25, 0.5, 1.0):
    for row in [*select(part="denoised", sigma=sigma), *select(part="ensemble", sigma=sigma)]:
        name = row["objective"]
        if row["part"] == "ensemble":
            name = f"three of {METHODS[name][0]}, {'consensus of 2' if 'consensus' in row['command'] else 'mean'}"
        line = f"sigma {sigma:4}: {name:44} ACR {row['two-sided']['acr']:.3f}   certified (%) {percentages([row])}"
        base = "gaussian" if row["part"] == "denoised" else row["objective"]
        single = select(part="equal epochs", objective=base, init="dmae", sigma=sigma)
        if single:
            difference = np.array(row["two-sided"]["radii"]) - by_image(single)
            error = difference.std(ddof=1) / math.sqrt(len(difference))
            line += f"   less one {METHODS[base][0]}: {difference.mean():+.3f} ± {error:.3f}: "
            line += judge(difference.mean(), error)
        print(line)

for r, ahead in (("0", True), ("0.25", True), ("0.5", False)):                         # what the text says of sigma = 0.5
    (denoised,) = select(part="denoised", sigma=0.5)
    trained = select(part="equal epochs", objective="gaussian", init="dmae", sigma=0.5)
    shares = denoised["two-sided"]["certified"][r], np.mean([run["two-sided"]["certified"][r] for run in trained])
    assert (shares[0] > shares[1]) == ahead

# %% [markdown]
# The denoiser, trained at σ = 0.25, serves a clean classifier well at that noise: in ACR it is ahead of Gaussian
# training. At σ = 0.5 it is ahead at small radii, with 89.2 and 71.7 % at $r = 0$ and 0.25 against 85.3 and 68.6 %. At
# $r = 0.5$ it is behind, with 29.2 against 40.3 %, and so it is in ACR. At σ = 1 it is behind in ACR, too. Three
# networks gain little over one, and the consensus of two loses next to nothing of it.
#
# Reservations, whatever the numbers say. A standard error over 120 images is not one over data sets. The tuning tried
# three or four settings a method, and a larger search might reorder neighbours. The encoder is one draw: a single
# pre-training is shared by all seeds. And the epochs are few, for methods whose papers train for 90 and more.
#
# ## 6.10 What to take along
#
# * Each rival changes one link of the chain: the loss, the image, the network, what stands before it, or where its
#   training starts. The certificate is the same for all.
# * $J$, (6.2), takes the logarithm after the mean, and so is at most (6.1), which takes it before. The attacks climb
#   $J$.
# * A pass is the unit of cost. An attack costs $m(T+1)$ or $m(T+2)$ of them an image, MACER $m$, an ensemble $Z$ a copy
#   in certification, where a consensus saves some.
# * A denoiser in front leaves a function of the noisy image, so that the radius belongs to $x$. For a diffusion the
#   step is that of $2\sigma$, (6.12).
# * At equal epochs the attacks have the largest radii at σ = 0.25 and 0.5. At equal time nothing is left of that lead.
# * At σ = 0.5 DMAE's encoder gives larger radii than MAE's, under each of three objectives. One pre-training of each
#   kind is behind that, and 120 images of 8 × 8 pixels.
#
# ## 6.11 Exercises
#
# 1. **The order of log and mean.** Replace $J$ in the attack by (6.1). For a linear $f$ with two classes, does the path
#    change? And for a network? *Hint:* the direction of both gradients, for a linear $f$.
# 2. **How far to go.** SmoothAdv with $\varepsilon$ = 0.25 at $\sigma$ = 0.25 trains on neighbours at that distance.
#    What share of votes does $g$ lose at most on the way there, for an image with $p_A = 0.99$? *Hint:* (5.5).
# 3. **MACER's slope.** Differentiate the hinge with two classes by $\hat F_y$, at $\hat F_y = 0.9$ and $0.99$, and
#    compare with the slope of $J$. At which $\lambda_M$ is the hinge the steeper one at 0.9, for $\sigma = 0.25$?
#    *Hint:* $(\Phi^{-1})' = 1/\varphi(\Phi^{-1})$.
# 4. **What is left to save.** An ensemble of $Z$ with a consensus of $u$, whose first $u$ agree on a share $\hat p$ of
#    the copies, needs how many passes a copy? What is the most that can be saved with $Z = 3$, $u = 2$? *Hint:* the
#    passes that the picture in 6.6 counts.
# 5. **A diffusion of other images.** Somebody's model has images in $[0, 255]$, scaled to variance one by dividing by
#    64 after subtracting the mean. Which noise level has $\sigma = 0.25$ there? *Hint:* it is only a matter of units.
#
# <details>
# <summary>Answers</summary>
#
# 1. No: with a linear $f$ every copy's gradient is a multiple of the plane's normal, and so is any mean with positive
#    weights. For a network it does: $J$ weights each copy's gradient by its score $F_{i,y}$, so that copies that are
#    lost already count little, while (6.1) gives all the same weight.
# 2. $p_A$ falls to $\Phi(\Phi^{-1}(0.99) - 1) = \Phi(1.326) = 0.908$ at worst: eight votes in a hundred more are lost.
# 3. $\xi_M = 2\,\Phi^{-1}(\hat F_y)$, so the slope is $-\lambda_M\sigma/\varphi(\Phi^{-1}(\hat F_y))$: at 0.9 it is
#    $-5.70\,\lambda_M\sigma$, at 0.99 $-37.5\,\lambda_M\sigma$. With $\beta_M = 1$, $J$ has $-1/\hat F_y$: $-1.11$ and
#    $-1.01$. Equal at 0.9 for $\lambda_M = 1.11/(5.70 \cdot 0.25) = 0.78$.
# 4. $u + (Z-u)(1-\hat p)$. At most $1 - u/Z$, a third.
# 5. One unit of $[0, 1]$ is 255 grey levels, or $255/64$ of the model's units: $0.25 \cdot 255/64 = 0.996$.
#
# </details>
#
# ## References
#
# * J. Cohen, E. Rosenfeld, Z. Kolter, *Certified adversarial robustness via randomized smoothing*, ICML 2019,
#   [arXiv 1902.02918](https://arxiv.org/abs/1902.02918): Gaussian training.
# * J. Jeong, J. Shin, *Consistency regularization for certified robustness of smoothed classifiers*, NeurIPS 2020,
#   [arXiv 2006.04062](https://arxiv.org/abs/2006.04062).
# * H. Salman et al., *Provably robust deep learning via adversarially trained smoothed classifiers*, NeurIPS 2019,
#   [arXiv 1906.04584](https://arxiv.org/abs/1906.04584): SmoothAdv.
# * R. Zhai et al., *MACER: attack-free and scalable robust training via maximizing certified radius*, ICLR 2020,
#   [arXiv 2001.02378](https://arxiv.org/abs/2001.02378).
# * J. Jeong et al., *SmoothMix: training confidence-calibrated smoothed classifiers for certified robustness*, NeurIPS
#   2021, [arXiv 2111.09277](https://arxiv.org/abs/2111.09277).
# * M. Horváth et al., *Boosting randomized smoothing with variance reduced classifiers*, ICLR 2022,
#   [arXiv 2106.06946](https://arxiv.org/abs/2106.06946): ensembles and the consensus.
# * H. Salman et al., *Denoised smoothing: a provable defense for pretrained classifiers*, NeurIPS 2020,
#   [arXiv 2003.01908](https://arxiv.org/abs/2003.01908).
# * N. Carlini et al., *(Certified!!) adversarial robustness for free!*, ICLR 2023,
#   [arXiv 2206.10550](https://arxiv.org/abs/2206.10550): one step of a diffusion.
# * Q. Wu et al., *Denoising masked autoencoders help robust classification*, ICLR 2023,
#   [arXiv 2210.06983](https://arxiv.org/abs/2210.06983).
# * J. Ho, A. Jain, P. Abbeel, *Denoising diffusion probabilistic models*, NeurIPS 2020,
#   [arXiv 2006.11239](https://arxiv.org/abs/2006.11239): the linear schedule.
# * A. Nichol, P. Dhariwal, *Improved denoising diffusion probabilistic models*, ICML 2021,
#   [arXiv 2102.09672](https://arxiv.org/abs/2102.09672): the cosine schedule.
#
# previous: [05, certifying, and trying to break it](05_certify_and_attack.ipynb) | [contents](README.md)
