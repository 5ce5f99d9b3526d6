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
# # 5. Certifying, and trying to break it
#
# A certificate is a promise about an infinite set: *no* perturbation shorter than $R$ changes the answer. This notebook
# makes such promises for handwritten digits, step by step; adds them up to the curve that papers report; and then
# attacks them. Inside the radius the attack must fail. Just as instructive is what happens outside.
#
# The classifiers were fine-tuned from the denoising masked autoencoder on scikit-learn's digits (8 × 8 pixels in
# $[0,1]$), and the logs in `results/digits/` written, by
#
# ```sh
# python pretrain.py
# for s in 0.125 0.25 0.5 1; do python finetune.py --sigma $s && python certify.py --sigma $s; done
# ```
#
# on two CPU cores. Of the classifiers only that for $\sigma = 0.25$ is committed (`finetune_sigma_0.25.pt`); of the
# others, the logs.

# %%
import inspect
import math
import sys
import tempfile
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Image, Markdown, display
from scipy import integrate, optimize, stats

root = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "model.py").exists())
sys.path.insert(0, str(root))
import certify as certification
from certify import (
    ABSTAIN,
    GaussianNoise,
    certified_radius,
    certify,
    count_classes,
    count_under_noise,
    excess,
    generator_for,
    lower_confidence_bound,
    predict,
)
from model import VisionTransformer, load_weights, read_checkpoint

# %matplotlib inline
plt.rcParams.update({"figure.facecolor": "white", "savefig.facecolor": "white", "figure.dpi": 100, "font.size": 10,
                     "axes.titlesize": 10, "legend.fontsize": 9, "figure.constrained_layout.use": True})
BLUE, ORANGE, GREEN, PINK, YELLOW = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"


def show_source(*functions):
    """The source of functions of this repository, as it stands in its files."""
    for function in functions:
        display(Markdown(f"```python\n{textwrap.dedent(inspect.getsource(function))}```"))


def draw(axis, image, title=""):
    """One grey image (H, W) in [0, 1], without ticks."""
    axis.imshow(image.clamp(0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)


digits = root / "results/digits"
checkpoint = read_checkpoint(digits / "finetune_sigma_0.25.pt", "finetune")
f = VisionTransformer(**checkpoint["config"]).eval().requires_grad_(False)
load_weights(f, checkpoint["model"], "results/digits/finetune_sigma_0.25.pt")
SIGMA = checkpoint["sigma"]
test = certification.open_images("digits", None, train=False, size=8, channels=1)
images, labels = test.pixels / test.levels, test.labels
print(f"base classifier fine-tuned for sigma = {SIGMA}; {len(images)} test digits")

# %% [markdown]
# ## 5.1 CERTIFY, step by step, on one digit
#
# $$ g(x) = \operatorname*{arg\,max}_{c}\; \mathbb P\bigl[f(x+e) = c\bigr], \qquad e\sim\mathcal N(0,\sigma^2 I) . $$
#
# $f$ is the base classifier (any function from images to classes), $x$ an image, $\sigma$ the noise level, $g$ the
# smoothed classifier: the answer that $f$ gives most often around $x$. We cannot compute these probabilities, since $f$
# is a network; we can count. Everything follows from drawing noise and counting answers.
#
# **Step 1, select.** Draw $n_0 = 100$ noisy copies; the most frequent answer is the candidate $c_A$. This is a guess
# and needs no guarantee: a bad guess will cost an abstention, not a wrong promise. Noise is drawn and answers are counted
# by `count_under_noise`, from a random stream that belongs to the image and the step:

# %%
show_source(count_under_noise, generator_for)

# %%
index, n0, n, alpha = 3, 100, 10_000, 0.001
x, noise = images[index], GaussianNoise(SIGMA)
selection = count_under_noise(f, x, SIGMA, n0, generator_for(0, index, 0, "cpu"))
top = int(selection.argmax())
print(f"answers on {n0} copies: {selection.tolist()}  ->  c_A = {top}")

again = generator_for(0, index, 0, "cpu")                        # the same stream, drawn again: the same hundred copies
copies = x + SIGMA * torch.randn(100, *x.shape, generator=again)
answers = f(copies).argmax(1)
assert torch.equal(torch.bincount(answers, minlength=10), selection)
figure, axes = plt.subplots(2, 9, figsize=(9.5, 2.7))
draw(axes[0, 0], x[0], "clean")
axes[1, 0].axis("off")
wrong = (answers != top).nonzero().flatten()[:6].tolist()
shown = [*(answers == top).nonzero().flatten()[:16 - len(wrong)].tolist(), *wrong]
for axis, copy in zip(axes[:, 1:].flat, shown[:16], strict=True):
    draw(axis, copies[copy, 0], f"f: {int(answers[copy])}")
    axis.title.set_color("black" if answers[copy] == top else ORANGE)
plt.show()

# %% [markdown]
# (Noisy copies have pixels outside $[0,1]$; the picture clips them, the classifier does not. Wrong answers were picked
# for display and are set in orange.)
#
# **Step 2, estimate.** Draw $n$ *fresh* copies and count how often $f$ says $c_A$:
#
# $$ k \sim \mathrm{Binomial}(n, p_A), \qquad p_A = \mathbb P\bigl[f(x+e)=c_A\bigr] . $$
#
# Fresh, because the first hundred chose the winner: on them, $c_A$ has been lucky by construction. Given $c_A$, the new
# draws are independent of the choice and the binomial law holds exactly.
#
# **Step 3, bound.** The share $k/n$ may lie above $p_A$. What is wanted is a number $\underline{p_A}$ that exceeds
# $p_A$ with probability at most $\alpha$: the $p$ at which a count of $k$ or more would just be an $\alpha$-surprise
# (Clopper and Pearson),
#
# $$ \mathbb P\bigl[\mathrm{Binomial}(n, \underline{p_A}) \ge k\bigr] = \alpha \qquad\Longleftrightarrow\qquad
#    \underline{p_A} = \alpha\text{-quantile of } \mathrm{Beta}(k,\; n-k+1) . $$
#
# The second form is the first one, with the binomial tail written as an integral over $p$; notebook 02 derives it.

# %%
show_source(lower_confidence_bound)

# %%
counts = count_under_noise(f, x, SIGMA, n, generator_for(0, index, 1, "cpu"))
k = int(counts[top])
p_lower = lower_confidence_bound(k, n, alpha)
by_tail = optimize.brentq(lambda p: stats.binom.sf(k - 1, n, p) - alpha, 1e-6, k / n, xtol=1e-14)     # the tail, solved for p
assert math.isclose(p_lower, by_tail, rel_tol=1e-9)
print(f"k = {k} of n = {n}: share {k / n:.4f}, lower bound {p_lower:.4f}")

figure, axes = plt.subplots(1, 2, figsize=(9.5, 2.9))
axes[0].bar(range(10), counts / n, color=[ORANGE if c == top else BLUE for c in range(10)])
axes[0].set(xlabel="answer of f", ylabel=f"share of {n:,} copies", xticks=range(10), ylim=(0, 1))
p = np.linspace(p_lower - 0.006, k / n + 0.014, 400)
density = stats.beta(k, n - k + 1).pdf(p)
axes[1].plot(p, density, color=BLUE)
axes[1].fill_between(p, density, where=p <= p_lower, color=ORANGE, linewidth=0)
axes[1].axvline(p_lower, color=ORANGE, label=r"lower bound: $\alpha$ = 0.001 of the mass is left of it")
axes[1].axvline(k / n, color="0.3", linestyle="--", label="share $k/n$")
axes[1].set(xlabel="$p_A$", ylabel="density of Beta($k$, $n-k+1$)", ylim=(0, density.max() * 1.55))
axes[1].legend(loc="upper right")
plt.show()

# %% [markdown]
# **Step 4, the radius.**
#
# $$ R = \frac\sigma2\bigl(\Phi^{-1}(\underline{p_A}) - \Phi^{-1}(\overline{p_B})\bigr)
#      \;=\; \sigma\,\Phi^{-1}(\underline{p_A}) \quad\text{with } \overline{p_B} = 1-\underline{p_A}, $$
#
# where $\Phi$ is the standard normal distribution function and $\overline{p_B}$ bounds the probability of every other
# class. The reason, proved in notebook 01: among all sets of mass $p_A$ under the noise around $x$, a half-space loses
# the most mass when the noise moves by $\delta$ straight away from it, and keeps $\Phi\bigl(\Phi^{-1}(p_A) -
# \|\delta\|/\sigma\bigr)$. With the lower bound for $p_A$ that is one half exactly at $\|\delta\| = R$.
#
# **Step 5, abstain** if $\underline{p_A}\le\frac12$: then $c_A$ may not even be the majority at $x$ itself.
#
# All five steps in one function are `certify`:

# %%
show_source(certified_radius, certification.round_down, certify)

# %%
radius = certified_radius(p_lower, SIGMA)
kept = lambda shift: stats.norm.cdf(stats.norm.ppf(p_lower) - shift / SIGMA)
half = optimize.brentq(lambda shift: kept(shift) - 0.5, 0, 5)    # where the worst case ties
drawn = np.random.default_rng(0).normal(size=2_000_000) * SIGMA  # and by drawing, for the half-space of all z below R
print(f"radius {radius:.6f}: the half-space has {np.mean(drawn < radius):.4f} of the noise, "
      f"and {np.mean(drawn + radius < radius):.4f} after a shift by the radius")
assert math.isclose(radius, half, rel_tol=1e-9) and abs(np.mean(drawn < radius) - p_lower) < 0.002

whole = certify(f, x, SIGMA, n0, n, alpha, index=index)          # all steps in one call
logged = next(row for row in certification.read_rows(digits / "certify_sigma_0.25.tsv") if row["idx"] == index)
print(f"certify(): {whole}; the committed log: class {logged['predict']}, radius {logged['radius']}, k = {logged['count']}")
assert whole == (top, certification.round_down(radius))
(trial,) = certification.certify_all(f, [(index, x)], noise, n0, certification.FixedN(n, alpha))      # the script's way
assert trial.certificate(SIGMA) == whole and trial.k == k
assert whole[0] == logged["predict"] and abs(k - logged["count"]) <= 20                   # bit for bit on one type of CPU

# %% [markdown]
# The last line compares with what the script wrote for the same image long ago: a row depends on seed, image index and
# settings alone. (On another type of CPU a few of the 10 000 answers may differ, hence the tolerance.) The script takes
# the same steps for many images at once, whose copies share batches: `certify_all`, which counts by `count_classes` and
# ends in `Trial.certificate`. Its counts are those of `certify`, as the cell asserts.
#
# The promise in words: *with probability at least* $1-\alpha = 99.9\,\%$ *over the noise drawn in this cell, $g$
# answers the same for every image within $\ell_2$ distance $R$ of this one.* The label has played no part. Whether the
# answer is right is another question, asked next.

# %% [markdown]
# ## 5.2 The certified-accuracy curve
#
# $$ \mathrm{CA}(r) = \frac1m \sum_{i=1}^m \mathbf 1\bigl[\hat c_i = y_i \text{ and } R_i \ge r\bigr], \qquad
#    \mathrm{ACR} = \frac1m\sum_{i=1}^m R_i\,\mathbf 1\bigl[\hat c_i = y_i\bigr] = \int_0^\infty \mathrm{CA}(r)\,dr . $$
#
# $\hat c_i$ and $R_i$ are prediction and radius of test image $i$, $y_i$ its label, $m$ the number of images.
# $\mathrm{CA}(r)$ is a lower bound of the accuracy under *every* attack of length below $r$, but for
# certificates that are false (the *proven* rows allow for those); wrong answers and abstentions never count. ACR, the average certified radius, is the area under the curve: integrate $\mathbf 1[R_i\ge
# r]$ over $r$ and get $R_i$.

# %%
show_source(certification.Summary, certification.summarise)

# %%
files = sorted(digits.glob("certify_sigma_*.tsv"))
summaries = certification.summarise(files)
for file, one in zip(files, summaries, strict=True):      # a second way: NumPy on the text file, and the integral
    _, label, guess, r = np.loadtxt(file, skiprows=1, usecols=(0, 1, 2, 3)).T
    assert all(math.isclose(one.accuracy(at), np.mean((guess == label) & (r >= at))) for at in (0, 0.1, 0.25, 0.5, 1))
    grid = np.linspace(0, 4, 40_001)
    assert abs(integrate.trapezoid([one.accuracy(at) for at in grid], grid) - one.acr) < 1e-4
print(certification.table(summaries, (0.0, 0.25, 0.5, 0.75, 1.0)))

# %% [markdown]
# The lines that begin with *proven* subtract what the certificates' own errors may have added. Each of the $m$
# certificates is wrong with probability at most $\alpha$, independently, so the number of wrong ones is at most a
# Binomial$(m,\alpha)$ variable, and
#
# $$
# \mathbb P\bigl[\#\text{wrong} > q\bigr] \le \rho, \qquad
# q = \text{the } (1-\rho)\text{-quantile of Binomial}(m,\alpha) .
# $$

# %%
show_source(excess)

# %%
m, rho = summaries[0].m, 0.001
q = excess(m, alpha, rho)
tail = lambda q: 1 - math.fsum(math.comb(m, j) * alpha**j * (1 - alpha)**(m - j) for j in range(q + 1))      # exact sum
assert tail(q) <= rho < tail(q - 1)
print(f"of {m} certificates at most {q} are wrong, but for a chance of {tail(q):.5f}")

# %% [markdown]
# Now the picture. Every $\sigma$ has its own classifier, its own curve, and its own end: no image can get a larger
# radius than $\sigma\,\Phi^{-1}(\alpha^{1/n})$, what $k = n$ would give. Little noise leaves the images legible but
# promises little; more noise can promise more, about fewer images. Where the trade stops paying depends on the data:
# $\sigma = 0.5$ reaches a few images that $\sigma = 0.25$ cannot, and $\sigma = 1$ leaves of an 8 × 8 digit too little
# to recognise.
#
# The **envelope**, the best $\sigma$ at each $r$, is what papers tabulate. It is not the curve of one classifier:
# whoever deploys one has to choose.

# %%
figure, axis = plt.subplots(figsize=(7, 3.8))
r = np.linspace(0, 1.1, 1101)
envelope = np.max([[100 * one.accuracy(at) for at in r] for one in summaries], axis=0)
axis.fill_between(r, envelope, color="0.92", linewidth=0, label="envelope: the best $\\sigma$ at each $r$")
for one, colour in zip(summaries, (GREEN, BLUE, ORANGE, PINK), strict=True):
    axis.plot(r, [100 * one.accuracy(at) for at in r], color=colour, label=rf"$\sigma$ = {one.sigma:g}")
    limit = certified_radius(lower_confidence_bound(n, n, alpha), one.sigma)
    assert one.radii.max() <= limit
    if limit < r[-1]:
        axis.plot(limit, 0, "|", color=colour, markersize=16, markeredgewidth=2, clip_on=False)
axis.set(xlabel="radius $r$ ($\\ell_2$, pixels in [0, 1]); ticks: largest provable (0.5 and 1: outside)",
         ylabel="certified accuracy (%)", xlim=(0, 1.1), ylim=(0, 100))
axis.grid(alpha=0.3)
axis.legend()
plt.show()

# %% [markdown]
# ### One classifier under other noise
#
# Could one classifier serve all $\sigma$? The theorem does not ask what $f$ was trained for. We certify the committed
# $\sigma=0.25$ classifier at other noise levels, on every twelfth test digit with $n = 200$ only, so that the largest
# provable radius is small and the numbers are not those of the table above; they compare with each other alone.

# %%
some = range(0, len(images), 12)
print("sigma at certification   right at r = 0   r = 0.1   r = 0.25   abstained")
shares = {}
for sigma in (0.125, 0.25, 0.5, 1.0):
    out = [certify(f, images[i], sigma, n0=100, n=200, index=i) for i in some]
    right = np.array([r if guess == labels[i] else -1 for i, (guess, r) in zip(some, out, strict=True)])
    shares[sigma] = np.mean(right >= 0)
    print(f"{sigma:22g}   {np.mean(right >= 0):14.1%}   {np.mean(right >= 0.1):7.1%}   {np.mean(right >= 0.25):8.1%}"
          f"   {np.mean([guess == ABSTAIN for guess, _ in out]):9.1%}")
assert shares[1.0] < shares[0.25]

# %% [markdown]
# With less noise than it was trained for, the classifier stays right, but a small $\sigma$ cannot prove much. With
# more, it soon gets worse, and at four times its own level it abstains on everything. This
# is why `certify.py` refuses another $\sigma$ than the checkpoint's unless told `--any-sigma`, and why the paper
# fine-tunes one classifier for each.

# %% [markdown]
# ## 5.3 Reading other people's logs
#
# The logs of Cohen, Rosenfeld and Kolter, and of most work after them, are tab-separated with six columns: `idx label
# predict radius correct time`. Ours begin with the same six. So their scripts read our files, and ours theirs. To show
# it, we strip our log to the foreign format, cut it into two overlapping shards, tear the last line of one as a killed
# job would, and read both.

# %%
show_source(certification.read_rows, certification.curves_of)

# %%
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
lines = [line.split("\t")[:6] for line in (digits / "certify_sigma_0.25.tsv").read_text().splitlines()]
foreign = ["\t".join(line) for line in lines]
(folder / "noise_0.25_first").write_text("\n".join(foreign[:80]) + "\n" + foreign[80][:9])      # a torn row at the end
(folder / "noise_0.25_second").write_text("\n".join([foreign[0], *foreign[60:]]) + "\n")      # rows 60 to 79 stand in both
print("\n".join(foreign[:4]), "\n")

(theirs,) = certification.summarise([folder / "noise_0.25_first", folder / "noise_0.25_second"])
(ours,) = certification.summarise([digits / "certify_sigma_0.25.tsv"])
assert theirs.m == ours.m and theirs.acr == ours.acr and np.array_equal(theirs.radii, ours.radii)
display(Markdown(certification.table([theirs], (0.0, 0.25, 0.5, 0.75), "markdown")))

forged = foreign[80].split("\t")                                 # a file that contradicts the other one ...
forged[3] = "9.000000"
(folder / "noise_0.25_forged").write_text(foreign[0] + "\n" + "\t".join(forged) + "\n")
both = [folder / "noise_0.25_second", folder / "noise_0.25_forged"]
apart = certification.summarise(both, labels=["second", "forged"])
print("not merged:", [f"{one.name}: {one.m} images, largest radius {one.radii.max():g}" for one in apart])
assert [one.m for one in apart] == [len(foreign) - 60, 1]
for file in both:                                                # ... though both were made with the same settings
    file.with_name(f"{file.name}.json").write_text("{}")
try:
    certification.summarise(both)
    raise AssertionError("the contradiction went unnoticed")
except ValueError as error:
    print("refused:", str(error).replace(str(folder), "..."))

# %% [markdown]
# Files that contradict each other are not merged: they are of different classifiers, and each becomes a curve of its own.
# Only where the settings beside them say that both are of one run is the contradiction an error.
#
# Cohen's format does not store $\sigma$ and $\alpha$. The reader takes $\sigma$ from the path (`sigma_0.25` or
# `noise_0.25`, as those logs are named), or refuses; and it takes $\alpha$ to be the customary 0.001. On the command
# line this is `python certify.py --report FILES --radii 0.25 0.5`.

# %% [markdown]
# ## 5.4 A real attack
#
# To attack $g$ we look for a short $\delta$ that turns the vote. Votes have no gradient; their soft version has:
#
# $$ J(\delta) = -\log \mathbb E_e\bigl[\operatorname{softmax} f(x+\delta+e)\bigr]_{y}
#     \;\approx\; -\log \frac1M\sum_{i=1}^{M}\operatorname{softmax} f(x+\delta+e_i)_y , $$
#
# $y$ being the class that $g$ predicts. Projected gradient ascent walks uphill in steps of a fixed length $\eta$ and
# never leaves the ball of radius $\varepsilon$:
#
# $$ \delta \leftarrow \Pi_\varepsilon\Bigl(\delta + \eta\,\frac{\nabla J}{\|\nabla J\|}\Bigr), \qquad
#    \Pi_\varepsilon(\delta) = \delta\cdot\min\Bigl(1, \frac{\varepsilon}{\|\delta\|}\Bigr) . $$
#
# Two details make it strong. The average stands *inside* the logarithm (Salman et al. 2019, [arXiv
# 1906.04584](https://arxiv.org/abs/1906.04584)): what is attacked is the smoothed classifier, not the average image's loss.
# And, this notebook's choice, each step draws its $M$ noises anew, so that $\delta$ cannot adapt to a particular sample.
#
# The attack is this notebook's own, since the scripts have no use for it. It may leave the range $[0,1]$: the
# certificate covers that too, and it makes the attacker stronger.

# %%
def attack(classifier, x, y, epsilon, sigma, draws, steps, generator):
    """Perturbations of x (B, C, H, W), of l2 norms at most epsilon (B,), that lower the smoothed soft vote of y (B,)."""
    def clip(delta):
        return delta * (epsilon / delta.flatten(1).norm(dim=1).clamp(min=1e-12)).clamp(max=1)[:, None, None, None]

    delta = clip(0.01 * epsilon[:, None, None, None] * torch.randn(x.shape, generator=generator))
    for step in range(steps):
        delta.requires_grad_()
        noise = sigma * torch.randn(draws, *x.shape, generator=generator)
        logits = classifier((x + delta + noise).flatten(0, 1)).unflatten(0, (draws, len(x)))
        soft = logits.softmax(-1).mean(0)                                                 # the vote, smoothed: B classes
        loss = -soft.gather(1, y[:, None]).clamp(min=1e-12).log().sum()
        (gradient,) = torch.autograd.grad(loss, delta)
        direction = gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-20)[:, None, None, None]
        eta = epsilon * (2.5 / steps if step < steps - 4 else 0.5 / steps)                # small steps at the end
        delta = clip(delta.detach() + eta[:, None, None, None] * direction)
    return delta


# %% [markdown]
# **Is the attack any good?** An attack that finds nothing proves nothing, so we first test it where the truth is known.
# For a linear classifier $f(x) = \mathbf 1[w^\top x + b > 0]$ smoothing changes nothing, and the true robust radius is
# the distance to the plane, $|w^\top x+b|/\|w\|$. A good attack succeeds just above this distance, and no attack can
# below.

# %%
torch.manual_seed(1)
w, b = torch.randn(64), 0.3
linear = lambda x: torch.stack([torch.zeros(len(x)), x.flatten(1) @ w + b], dim=1)
points = torch.rand(40, 1, 8, 8)
side = linear(points).argmax(1)
true_radius = (points.flatten(1) @ w + b).abs() / w.norm()
for factor, all_flipped in ((0.97, False), (1.03, True)):
    delta = attack(linear, points, side, factor * true_radius, SIGMA, 16, 20, torch.Generator().manual_seed(0))
    assert (delta.flatten(1).norm(dim=1) <= factor * true_radius * (1 + 1e-5)).all()
    flipped = (linear(points + delta).argmax(1) != side).float().mean()
    print(f"perturbations of {factor} x the distance to the plane: {flipped:.0%} succeed")
    assert flipped == float(all_flipped)

# %% [markdown]
# ### Attack on the certified digits
#
# We take correctly certified test images from the committed log, attack each at several multiples of its own certified
# radius $R$, and let the certifier's own `predict` judge the result: `predict` draws fresh noise and answers only if a
# two-sided binomial test separates the top two classes,
#
# $$
# \text{answer } c_{(1)} \quad\text{if}\quad
# \mathbb P\bigl[\,|\mathrm{Binomial}(n_1+n_2,\tfrac12) - \tfrac{n_1+n_2}2| \ge \tfrac{n_1-n_2}2\,\bigr] \le \alpha,
# \quad\text{else abstain,}
# $$
#
# with $n_1\ge n_2$ the counts of the two most frequent classes. If the two were equally likely, a lead this large would
# be a rarity; a wrong winner is named with probability at most $\alpha$ (notebook 02 says why).
#
# An attack **succeeds** if `predict` names a *different class*. Abstentions are shown separately.

# %%
show_source(predict, certification.clear_winner)

# %%
rows = [row for row in certification.read_rows(digits / "certify_sigma_0.25.tsv") if row["correct"] and row["radius"] > 0.05]
rows = rows[::len(rows) // 20][:20]
x, y, R = (torch.stack([images[row["idx"]] for row in rows]), torch.tensor([row["predict"] for row in rows]),
           torch.tensor([row["radius"] for row in rows]))
print(f"{len(rows)} correctly certified digits, radii from {R.min():.3f} to {R.max():.3f}")

votes = count_classes(f, [(image, generator_for(7, i, 2, "cpu"), 200) for i, image in enumerate(x)], noise)
first, second = votes.sort(dim=1, descending=True).values[:, :2].T.tolist()
named = [predict(f, image, SIGMA, n=200, seed=7, index=i) for i, image in enumerate(x)]
for a, b, answer, row in zip(first, second, named, votes, strict=True):     # the test as the equation has it: an exact sum, doubled
    p_value = min(1.0, 2 * sum(math.comb(a + b, j) for j in range(a, a + b + 1)) / 2**(a + b))
    assert answer == (int(row.argmax()) if p_value <= 0.001 else ABSTAIN)
print("predict agrees with exact binomial sums")

# %%
FACTORS, DRAWS, STEPS, JUDGES = (0.5, 0.99, 1.25, 1.5, 2.0, 3.0), 16, 16, 400


def judge(attacked, draws, seed):
    """Counts of f's answers (B, classes) on fresh noisy copies of each image."""
    return count_classes(f, [(image, generator_for(seed, i, 2, "cpu"), draws) for i, image in enumerate(attacked)], noise)


found, judged, random = {}, {}, {}
generator = torch.Generator().manual_seed(0)
for factor in FACTORS:
    delta = attack(f, x, y, factor * R, SIGMA, DRAWS, STEPS, generator)
    found[factor] = delta
    judged[factor] = judge(x + delta, JUDGES, seed=1)
    away = torch.randn(delta.shape, generator=generator)         # the same length, in a random direction
    away *= (delta.flatten(1).norm(dim=1) / away.flatten(1).norm(dim=1))[:, None, None, None]
    random[factor] = judge(x + away, 100, seed=2)


def verdict(counts, y):
    """Shares of images on which the judge names another class, and on which it abstains."""
    lead = counts.sort(dim=1, descending=True).values[:, :2].tolist()
    sure = torch.tensor([stats.binomtest(a, a + b, 0.5).pvalue <= 0.001 for a, b in lead])
    return (sure & (counts.argmax(1) != y)).float().mean().item(), (~sure).float().mean().item()


inside = x + found[0.99]                                         # inside: the verdict by predict itself
answers = torch.tensor([predict(f, image, SIGMA, n=500, seed=3, index=i) for i, image in enumerate(inside)])
assert (found[0.99].flatten(1).norm(dim=1) < R).all()
assert ((answers == y) | (answers == ABSTAIN)).all(), "a certificate would be broken"
print(f"inside, at 0.99 R: {int((answers == y).sum())} keep their class, {int((answers == ABSTAIN).sum())} abstentions, "
      f"{int(((answers != y) & (answers != ABSTAIN)).sum())} attacks succeed")
print("size/R   attack succeeds   judge abstains   random direction succeeds")
for factor in FACTORS:
    success, unsure = verdict(judged[factor], y)
    print(f"{factor:6g}   {success:15.0%}   {unsure:14.0%}   {verdict(random[factor], y)[0]:25.0%}")
    assert factor >= 1 or success == 0
assert verdict(judged[3.0], y)[0] > 0.5

# %%
figure, axis = plt.subplots(figsize=(6.6, 3.4))
success, unsure = np.array([verdict(judged[factor], y) for factor in FACTORS]).T
axis.axvspan(0, 1, color="0.93", label="certified: no success possible")
axis.fill_between(FACTORS, 100 * success, 100 * (success + unsure), color=ORANGE, alpha=0.25, linewidth=0,
                  label="judge abstains")
axis.plot(FACTORS, 100 * success, "o-", color=ORANGE, label="projected gradient")
axis.plot(FACTORS, [100 * verdict(random[factor], y)[0] for factor in FACTORS], "s--", color=BLUE, label="random direction")
axis.set(xlabel="size of the perturbation / certified radius of the image", ylabel="attacks that succeed (%)",
         xlim=(0, 3.05), ylim=(-3, 103))
axis.grid(alpha=0.3)
axis.legend(loc="upper left")
plt.show()

# %% [markdown]
# Inside the radius: nothing, as promised. Outside, success rises over a range of sizes rather than at once at $R$, for
# three reasons. $R$ comes from a *lower bound* of $p_A$; the bound allows for the worst of all functions $f$, a
# half-space, and the true decision region is kinder; and the attack only gives an upper bound of the true robust
# radius. The gap between the curves shows that noise and attack are not the same thing: a random vector of three times
# the radius hardly ever changes anything.
#
# What do successful attacks look like?

# %%
factor = 2.0
changed = (judged[factor].argmax(1) != y).nonzero().flatten()[:7]
assert len(changed) > 0
figure, axes = plt.subplots(3, len(changed), figsize=(1.3 * len(changed) + 1.2, 4.6), squeeze=False)
for column, i in enumerate(changed.tolist()):
    draw(axes[0, column], x[i, 0], f"g: {int(y[i])}\nR = {R[i]:.2f}")
    shown = axes[1, column].imshow(found[factor][i, 0], cmap="RdBu_r", vmin=-0.4, vmax=0.4, interpolation="nearest")
    axes[1, column].set(xticks=[], yticks=[])
    axes[1, column].set_title(f"length {found[factor][i].norm():.2f}", fontsize=9)
    draw(axes[2, column], (x + found[factor])[i, 0], f"g: {int(judged[factor][i].argmax())}")
for axis, name in zip(axes[:, 0], ("clean", r"$\delta$ at 2 $R$", "attacked"), strict=True):
    axis.set_ylabel(name, rotation=0, ha="right", va="center")
figure.colorbar(shown, ax=axes[1, :], label="pixel change")
plt.show()

# %% [markdown]
# ### How much of the vote an attack can take
#
# The theorem says more than "the majority survives". It bounds the vote itself:
#
# $$ \mathbb P\bigl[f(x+\delta+e) = c_A\bigr] \;\ge\; \Phi\!\left(\Phi^{-1}(p_A) - \frac{\|\delta\|}{\sigma}\right)
#    \qquad\text{for every }\delta, $$
#
# the half-space's loss of section 5.1 at any length. With the lower bound for $p_A$, the right side is one half at
# $\|\delta\|=R$, which is how the radius was defined. Inside and outside, no attack may push the vote below the curve. Every attacked image is a point
# of the next picture: $\|\delta\|/R$ across, the measured share of $c_A$ upwards; in the second panel, against the
# bound of that very image.

# %%
p_lower = np.array([lower_confidence_bound(row["count"], row["n"], alpha) for row in rows])
bounds, shares, sizes = [], [], []
for factor in FACTORS:
    length = found[factor].flatten(1).norm(dim=1).numpy()
    bound = stats.norm.cdf(stats.norm.ppf(p_lower) - length / SIGMA)
    kept = judged[factor].gather(1, y[:, None])[:, 0].numpy()
    upper = stats.beta.ppf(1 - 1e-5, kept + 1, np.maximum(JUDGES - kept, 1e-9))      # above the true share, but for 1e-5
    assert (upper >= bound).all(), "below the Neyman-Pearson bound"
    bounds, shares, sizes = [*bounds, *bound], [*shares, *(kept / JUDGES)], [*sizes, *(length / R.numpy())]
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), sharey=True)
axes[0].axvspan(0, 1, color="0.93")
axes[0].axhline(0.5, color="0.6", linewidth=1)
axes[0].scatter(sizes, shares, s=14, color=BLUE)
axes[0].set(xlabel=r"size of the attack, $\|\delta\|$ / $R$", ylabel="share of noisy copies with class $c_A$",
            xlim=(0, 3.1), ylim=(-0.02, 1.02))
axes[0].text(0.5, 0.05, "certified", ha="center")
points = axes[1].scatter(bounds, shares, s=14, c=sizes, cmap="viridis")
axes[1].plot((0, 1), (0, 1), color=ORANGE, label="the theorem's floor")
axes[1].set(xlabel=r"lower bound $\Phi(\Phi^{-1}(p_A) - \|\delta\|/\sigma)$", xlim=(-0.02, 1.02))
axes[1].legend(loc="lower right")
figure.colorbar(points, ax=axes[1], label=r"$\|\delta\|$ / $R$")
plt.show()
margin = np.array(shares) - np.array(bounds)
print(f"{len(shares)} attacks, none below the floor by more than sampling allows; "
      f"share minus floor: median {np.median(margin):.3f}, least {margin.min():.4f}")

# %% [markdown]
# No point lies below the line by more than the sampling error, as it must be, and the distance is what the decision
# region of a real network has to spare over a half-space. (The measured share is an estimate, the floor's $p_A$ a
# lower bound; the assertion allows for both.)
#
# A reservation. The certificate is about $g$ with ideal Gaussian noise. Whoever deploys $g$ evaluates it by sampling,
# and so may abstain or, with probability $\alpha$, err, at the attacked image as at any other.

# %% [markdown]
# ## 5.5 Where the paper's numbers stand
#
# The paper (Wu et al., [arXiv 2210.06983](https://arxiv.org/abs/2210.06983)) reports certified accuracy at a few radii,
# the best over $\sigma$: points on an envelope. `certify.py` holds them in `PUBLISHED`, with those it compares with,
# and `certify.plot` marks them beside measured curves (`--published cifar10`). The digits are another data set, and
# their curves have no business in that picture; here the marks stand alone.

# %%
show_source(certification.plot)

# %%
for data in ("cifar10", "imagenet"):
    certification.plot(folder / f"{data}.png", [], published=data)
    display(Markdown(f"**{data}**, published certified accuracy:"), Image(folder / f"{data}.png", width=720))

# %% [markdown]
# How much is a difference of one point worth? A certified accuracy is a share of $m$ test images, so its standard error
# is
#
# $$ \mathrm{se} = \sqrt{\frac{\mathrm{CA}\,(1-\mathrm{CA})}{m}} , $$
#
# the standard deviation of a mean of $m$ zeros and ones. The paper certifies $m = 10\,000$ test images of CIFAR-10 and
# $m = 1000$ of ImageNet; older rows often rest on 500 (every 100th, or every 20th, image).

# %%
radii, methods = certification.PUBLISHED["imagenet"]
others = np.array([values for name, values in methods.items() if "DMAE" not in name])
ours, m = np.array(methods["DMAE ViT-B"]), 1000
error = 100 * np.sqrt(ours / 100 * (1 - ours / 100) / m)
simulated = 100 * np.random.default_rng(0).binomial(m, ours / 100, size=(20_000, len(ours))).std(axis=0) / m
np.testing.assert_allclose(error, simulated, rtol=0.03)
figure, axis = plt.subplots(figsize=(6.4, 3.4))
for name, colour, marker in (("DMAE ViT-L", BLUE, "s"), ("DMAE ViT-B", ORANGE, "o")):
    values = np.array(methods[name])
    axis.errorbar(radii, values, 200 * np.sqrt(values / 100 * (1 - values / 100) / m), color=colour, marker=marker, capsize=3,
                  label=f"{name}, ± 2 standard errors")
axis.plot(radii, others.max(axis=0), "^--", color="0.35", label="best of the other methods listed")
axis.set(xlabel=r"radius $r$ ($\ell_2$, pixels in [0, 1])", ylabel="certified accuracy (%)", xlim=(0.4, 3.1), ylim=(0, 80),
         title="ImageNet, published")
axis.grid(alpha=0.3)
axis.legend()
plt.show()
for at, value, best, se in zip(radii, ours, others.max(axis=0), error, strict=True):
    print(f"r = {at}: DMAE ViT-B {value:.1f}, best other {best:.1f}: {value - best:+.1f} points, "
          f"{(value - best) / se:+.1f} standard errors")

# %% [markdown]
# At $r = 0.5$ ViT-B is behind the 857-million-parameter diffusion pipeline by about one standard error of its own; from
# $r = 1$ on it is ahead of all others by one and a half to six of these (that of a difference is larger: by $\sqrt 2$ if both
# rest on as many images, more where the other rests on fewer). On CIFAR-10 no method leads everywhere: the continued model up to
# $r = 0.5$, Boosting (an ensemble, 17M parameters) beyond.
#
# What this repository has measured is in `results/`; a cell that is empty in the README's table of the paper's settings
# has not been measured. The digits results above are not evidence for ImageNet: they show that every part does what it
# says, on a problem small enough to check.

# %%
temporary.cleanup()
