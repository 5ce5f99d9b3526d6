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
# [contents](README.md) | next: [01, smoothing](01_smoothing.ipynb)
#
# # 0. The whole method on one page
#
# A small vision transformer learns to restore noisy digits of which a part is missing. It is then
# trained to classify noisy digits. In the end a test image gets an answer and a radius. No change
# of its pixels that is shorter than the radius can change the answer. That is proven, but for a
# chance of one in a thousand.
#
# **Afterwards you can**
#
# * read every line between an image and its certificate;
# * say what of it is proven, and what is only trained;
# * change a line, and see what it does to the table at the end.
#
# **It takes** ten minutes to read, and about a minute and a half to run on one core, without GPU or
# download. **Next** comes the path of one hour, in the [contents](README.md): why the radius holds.
#
# This page imports nothing of ours: all of the method stands on it. Below each step are two kinds
# of links. *Why* leads to the equation and its reasons, *in full* to the function of this
# repository that does the same for other data and sizes, on one CPU or many GPUs.
#
# ## 0.1 Data
#
# scikit-learn has 1797 handwritten digits of 8 × 8 pixels. The last 360 are the test images. Pixels
# are divided by 16, so that they lie in $[0, 1]$: $\sigma$ and all radii are in this unit.
#
# *Why:* [01, (1.12)](01_smoothing.ipynb). *In full:* [`pretrain.py:open_images`](../pretrain.py).

# %%
import math

import matplotlib.pyplot as plt
import torch
from scipy.stats import beta, binom, norm
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, fold, unfold

torch.manual_seed(0)
torch.set_num_threads(1)            # sums in one order: the same bits every time

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16      # 1797 1 8 8
labels = torch.tensor(digits.target)                                         # 1797

train_images, test_images = images[:-360], images[-360:]
train_labels, test_labels = labels[:-360], labels[-360:]

# %% [markdown]
# ## 0.2 Spoil an image twice
#
# The first way is Gaussian noise in every pixel, $\tilde x = x + e$ with $e \sim \mathcal N(0,
# \sigma^2 I)$. It is not clipped. The second way is a mask: the image is cut into 16 patches, and a
# quarter of them is thrown away. To choose the patches that are kept, every patch gets a random
# number, and the smallest numbers win.
#
# *Why:* [03, (3.2)](03_denoising_masked_autoencoder.ipynb) noise,
# [(3.3)](03_denoising_masked_autoencoder.ipynb) patches,
# [(3.7)](03_denoising_masked_autoencoder.ipynb) masks. *In full:*
# [`model.py:patchify`](../model.py), [`model.py:random_masking`](../model.py).

# %%
sigma = 0.25                        # standard deviation of the noise, pixels in [0, 1]
mask_ratio = 0.25                   # share of the patches that are dropped
P = 2                               # side of a patch, in pixels
N = (8 // P) ** 2                   # patches of an image
K = int(N * (1 - mask_ratio))       # patches that are kept


def add_noise(images):
    return images + sigma * torch.randn_like(images)


def patches_of(images):
    return unfold(images, P, stride=P).transpose(1, 2)                       # B 1 8 8 -> B N P*P


def images_of(patches):
    return fold(patches.transpose(1, 2), (8, 8), P, stride=P)                # B N P*P -> B 1 8 8


def choose_kept(B):
    order = torch.rand(B, N).argsort(dim=1)                                  # B N
    return order[:, :K]                                                      # B K, of 0 .. N-1


# %% [markdown]
# ## 0.3 The encoder
#
# A patch becomes a vector of width $D$, a *token*, by one linear map. A learned position is added,
# since a set of tokens has no order. (The repository takes fixed positions.) Then three blocks of a
# transformer let the tokens exchange information.
#
# Dropped patches are taken out *before* the blocks. So the encoder computes on the $K$ kept ones
# only.
#
# *Why:* [03, (3.4)](03_denoising_masked_autoencoder.ipynb) the linear map,
# [(3.5)](03_denoising_masked_autoencoder.ipynb) positions,
# [(3.10)](03_denoising_masked_autoencoder.ipynb) attention,
# [(3.12)](03_denoising_masked_autoencoder.ipynb) a block,
# [(3.14)](03_denoising_masked_autoencoder.ipynb) what is saved. *In full:*
# [`model.py:Block`](../model.py), [`model.py:Encoder`](../model.py),
# [`model.py:DenoisingMaskedAutoencoder.encode`](../model.py).

# %%
D = 64                              # width of a token


def block(width):
    return nn.TransformerEncoderLayer(
        width, nhead=2, dim_feedforward=2 * width, dropout=0.0, activation="gelu",
        norm_first=True, batch_first=True,
    )


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(P * P, D)
        self.positions = nn.Parameter(0.02 * torch.randn(N, D))
        self.blocks = nn.Sequential(block(D), block(D), block(D))

    def forward(self, images, kept=None):
        tokens = self.embed(patches_of(images)) + self.positions             # B N D
        if kept is not None:
            tokens = tokens.gather(1, kept[:, :, None].expand(-1, -1, D))    # B K D
        return self.blocks(tokens)                                           # B K D, or B N D


# %% [markdown]
# ## 0.4 The decoder
#
# The decoder is small and will be thrown away. It puts one learned vector, the *mask token*,
# wherever a patch is missing, and predicts the pixels of all patches.
#
# *Why:* [03, (3.15)](03_denoising_masked_autoencoder.ipynb). *In full:*
# [`model.py:DenoisingMaskedAutoencoder.decode`](../model.py).

# %%
D2 = 32                             # the decoder's width


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D2))
        self.mask_token = nn.Parameter(0.02 * torch.randn(D2))
        self.positions = nn.Parameter(0.02 * torch.randn(N, D2))
        self.block = block(D2)
        self.predict = nn.Sequential(nn.LayerNorm(D2), nn.Linear(D2, P * P))

    def forward(self, latent, kept):
        places = kept[:, :, None].expand(-1, -1, D2)                         # B K D2
        tokens = self.mask_token.expand(len(latent), N, -1)                  # B N D2
        tokens = tokens.scatter(1, places, self.embed(latent))               # B N D2
        return self.predict(self.block(tokens + self.positions))             # B N P*P


# %% [markdown]
# ## 0.5 Pre-training: restore the clean image
#
# $$ \mathcal L = \frac1N \sum_{i=1}^N \frac1{P^2} \bigl\lVert \hat x_i - x_i \bigr\rVert^2 $$
#
# Here $x_i$ is a patch of the *clean* image, $\hat x_i$ the prediction, and the mean goes over
# *all* patches. The kept ones have to be denoised, the dropped ones guessed from their
# surroundings. No label is used. That loss is what distinguishes the denoising masked autoencoder
# (DMAE, Wu et al. 2023) from the masked autoencoder (He et al. 2022), which sees no noise and is
# asked for dropped patches only.
#
# *Why:* [03, (3.16)](03_denoising_masked_autoencoder.ipynb) the loss,
# [(3.24)](03_denoising_masked_autoencoder.ipynb) what denoising teaches. *In full:*
# [`model.py:DenoisingMaskedAutoencoder.forward`](../model.py),
# [`model.py:DenoisingMaskedAutoencoder.loss`](../model.py).

# %%
encoder, decoder = Encoder(), Decoder()


def restore(noisy, kept):
    return decoder(encoder(noisy, kept), kept)                               # B N P*P


def restoration_loss(batch):
    clean = train_images[batch]                                              # B 1 8 8
    kept = choose_kept(len(clean))                                           # B K
    error = restore(add_noise(clean), kept) - patches_of(clean)              # B N P*P
    return error.square().mean()


# %% [markdown]
# Both stages are trained by the same loop: AdamW on batches of 128 images. The learning rate rises
# for a tenth of the steps, and then falls along half a cosine. Most other settings are those that
# the repository takes for digits.
#
# *Why:* [03, (3.19)](03_denoising_masked_autoencoder.ipynb) AdamW,
# [(3.20)](03_denoising_masked_autoencoder.ipynb) the schedule. *In full:*
# [`pretrain.py:train_step`](../pretrain.py), [`pretrain.py:pretrain`](../pretrain.py),
# [`model.py:learning_rate`](../model.py).

# %%
def train(parts, loss_of, epochs, peak):
    parameters = nn.ModuleList(parts).parameters()
    steps = epochs * math.ceil(len(train_images) / 128)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=peak, total_steps=steps, pct_start=0.1, cycle_momentum=False,
    )
    for epoch in range(1, epochs + 1):
        losses = []
        for batch in torch.randperm(len(train_images)).split(128):           # B
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        if epoch % 20 == 0:
            print(f"epoch {epoch:>3}: mean loss {sum(losses) / len(losses):.4f}")


train([encoder, decoder], restoration_loss, epochs=100, peak=8e-3)

# %% [markdown]
# Ten test images: clean; noisy; with the dropped patches in grey, which is what the encoder sees;
# and restored.

# %%
clean = test_images[:10]                                                     # 10 1 8 8
noisy = add_noise(clean)
kept = choose_kept(10)                                                       # 10 K
with torch.no_grad():
    restored = images_of(restore(noisy, kept))                               # 10 1 8 8

is_kept = torch.zeros(10, N).scatter(1, kept, 1.0)                           # 10 N
is_kept = images_of(is_kept[:, :, None].expand(-1, -1, P * P))               # 10 1 8 8
seen = torch.where(is_kept == 1, noisy, 0.5)

figure, axes = plt.subplots(4, 10, figsize=(9, 3.7), layout="constrained")
for row, pictures in enumerate([clean, noisy, seen, restored]):
    axes[row, 0].set_ylabel(["clean", "noisy", "seen", "restored"][row])
    for axis, picture in zip(axes[row], pictures, strict=True):
        axis.imshow(picture[0], cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## 0.6 Fine-tuning: classify under the same noise
#
# The decoder is gone. The classifier $f$ is the encoder on all patches, the mean of its tokens, and
# a linear layer. Each image comes with $m = 2$ noisy copies. Let $F_i$ be the scores (softmax) of
# copy $i$, and $F$ their mean. Then
#
# $$
# \mathcal L = \text{CE} \;+\; \lambda\, \frac1m \sum_{i=1}^m \text{KL}(F \,\Vert\, F_i)
# \;+\; \eta\, H(F).
# $$
#
# The first term asks for right answers under noise. The other two (Jeong & Shin 2020) ask for the
# *same* and a *sure* answer on all copies, since the radius will depend on how often the answer is
# the same.
#
# *Why:* [03, (3.13)](03_denoising_masked_autoencoder.ipynb) the mean of the tokens, [04,
# (4.3)](04_from_pretraining_to_smoothed_classifier.ipynb) the first term,
# [(4.9)](04_from_pretraining_to_smoothed_classifier.ipynb) the other two. *In full:*
# [`finetune.py:consistency_loss`](../finetune.py), [`finetune.py:consistency`](../finetune.py).

# %%
head = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 10))
copies, lam, eta = 2, 2.0, 0.5


def f(images):
    tokens = encoder(images)                                                 # B N D
    return head(tokens.mean(dim=1))                                          # B 10


def classification_loss(batch):
    x = train_images[batch].repeat(copies, 1, 1, 1)                          # mB 1 8 8
    y = train_labels[batch].repeat(copies)                                   # mB
    logits = f(add_noise(x))                                                 # mB 10

    log_each = logits.log_softmax(dim=1).view(copies, -1, 10)                # m B 10, log F_i
    log_mean = log_each.logsumexp(dim=0) - math.log(copies)                  # B 10, log F
    mean = log_mean.exp()                                                    # B 10, F
    divergence = (mean * (log_mean - log_each)).sum(dim=2).mean()
    entropy = -(mean * log_mean).sum(dim=1).mean()
    return cross_entropy(logits, y) + lam * divergence + eta * entropy


train([encoder, head], classification_loss, epochs=40, peak=4e-3)

# %% [markdown]
# ## 0.7 Certify
#
# The *smoothed* classifier $g$ answers what $f$ answers most often under noise,
#
# $$ g(x) = \arg\max_c \Pr[f(x + e) = c]. $$
#
# If $f$ answers $A$ with a probability of at least $\underline{p_A} > \frac12$, then $g$ answers
# $A$ everywhere closer to $x$ than
#
# $$ R = \sigma\, \Phi^{-1}(\underline{p_A}) . $$
#
# That is a theorem (Cohen, Rosenfeld & Kolter 2019), and it asks nothing of $f$. The probability is
# not known, but it can be bounded by counting. First $n_0$ noisy copies choose the class $A$. Then
# $n$ *fresh* ones count how often it wins. The bound of Clopper and Pearson turns the count $k$
# into $\underline{p_A}$, which is above the true probability with a chance of at most $\alpha$.
# Where $\underline{p_A} \le \frac12$ there is no certificate: `certify` abstains.
#
# *Why:* [01, (1.1)](01_smoothing.ipynb) $g$, [(1.7)](01_smoothing.ipynb) the radius, [02,
# (2.3)](02_from_counts_to_certificates.ipynb) the bound,
# [(2.5)](02_from_counts_to_certificates.ipynb) CERTIFY,
# [(2.8)](02_from_counts_to_certificates.ipynb) why fresh. *In full:*
# [`certify.py:count_under_noise`](../certify.py),
# [`certify.py:lower_confidence_bound`](../certify.py),
# [`certify.py:certified_radius`](../certify.py), [`certify.py:fixed_n`](../certify.py).
# *To play with:* [`playground.html`](playground.html), for the browser: a point in the plane, its
# noisy copies, bound and circle, and three ways to spoil them.

# %%
n0 = 100                            # noisy copies that choose the class
n = 2_000                           # noisy copies that estimate its probability
alpha = 0.001                       # chance that a certificate is wrong, per image
ABSTAIN = -1


@torch.no_grad()
def count(f, x, draws):
    noisy = add_noise(x.expand(draws, -1, -1, -1))                           # draws 1 8 8
    answers = f(noisy).argmax(dim=1)                                         # draws
    return answers.bincount(minlength=10)                                    # 10


def certify(f, x):
    top = int(count(f, x, n0).argmax())
    k = int(count(f, x, n)[top])
    p_a = beta.ppf(alpha, k, n - k + 1) if k > 0 else 0.0
    if p_a <= 0.5:
        return ABSTAIN, 0.0
    return top, sigma * norm.ppf(p_a)


# %% [markdown]
# Is `certify` right? There are classifiers whose true radius is known. This one says whether an
# image is bright. Its two answers meet at a plane in the space of the 64 pixels, and the true
# radius is the distance to that plane. No certificate may be larger, but for a share of at most
# $\alpha$ of them, on average. Nor should it be much smaller.
#
# *Why:* [01, (1.9)](01_smoothing.ipynb) the distance, [02,
# (2.10)](02_from_counts_to_certificates.ipynb) how many wrong ones a table may have.

# %%
def bright(images):
    excess = images.mean(dim=(1, 2, 3)) - 0.3                                # B
    return torch.stack([excess, -excess], dim=1)                             # B 2


chosen = test_images[::3]                                                    # 120 1 8 8
distance = 8 * (chosen.mean(dim=(1, 2, 3)) - 0.3).abs()                      # 120
radius = torch.tensor([certify(bright, x)[1] for x in chosen])               # 120

too_large = int((radius > distance).sum())
allowed = int(binom.ppf(0.999, len(chosen), alpha))
print(f"{too_large} of {len(chosen)} radii are larger than the distance; chance allows {allowed}")
print(f"all radii together are {radius.sum() / distance.sum():.0%} of the distances")
assert too_large <= allowed, "more wrong certificates than alpha explains"

# %% [markdown]
# Now the trained $f$, on every third test image. Their labels are used for the first time here.

# %%
encoder.eval()
head.eval()
certificates = [certify(f, x) for x in chosen]
answers = torch.tensor([answer for answer, _ in certificates])               # 120
radii = torch.tensor([radius for _, radius in certificates])                 # 120
right = answers == test_labels[::3]                                          # 120


def certified_accuracy(r):
    return (right & (radii >= r)).double().mean().item()


for r in (0.0, 0.25, 0.5):
    print(f"certified accuracy at r = {r:<4}  {certified_accuracy(r):.1%}")
acr = (radii * right).mean().item()
print(f"average certified radius      {acr:.3f}")
print(f"abstentions                   {(answers == ABSTAIN).double().mean().item():.1%}")

# %% [markdown]
# The certified accuracy at $r$ is the share of images whose answer is right *and* proven for every
# change shorter than $r$. The average certified radius (ACR) is the area under its curve; wrong
# answers and abstentions count as 0.
#
# The curve ends where $n$ draws end: even if all of them agree, no larger radius can be proven.
#
# *Why:* [05, (5.2)](05_certify_and_attack.ipynb) both, [02,
# (2.7)](02_from_counts_to_certificates.ipynb) the end. *In full:*
# [`certify.py:certified_accuracy`](../certify.py), [`certify.py:curve_of`](../certify.py).

# %%
largest = sigma * norm.ppf(alpha ** (1 / n))
grid = torch.linspace(0, 1.3 * largest, 401).tolist()
curve = [100 * certified_accuracy(r) for r in grid]

figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
axis.plot(grid, curve)
axis.fill_between(grid, curve, alpha=0.15)
axis.axvline(largest, color="0.5", linestyle=":")
axis.text(0.2 * largest, 30, f"area: ACR = {acr:.3f}")
axis.text(1.03 * largest, 60, f"n = {n}\nproves no\nmore than\n{largest:.3f}")
axis.set(xlabel="radius r (pixels in [0, 1])", ylabel="certified accuracy, %")
axis.set(xlim=(0, grid[-1]), ylim=(0, 100))
plt.show()

# %% [markdown]
# ## 0.8 What a certificate says, and what it does not
#
# It says: *$g$ gives this answer on every image that is closer than $R$ to this one, in the
# Euclidean norm of the pixels.* Over the noise that is drawn for the image, no false statement is
# made with a chance of at least $1 - \alpha$.
#
# * It is a statement about **one image**. That all 120 certificates hold at once is less certain,
#   unless each gets $\alpha / 120$ ([02, (2.10)](02_from_counts_to_certificates.ipynb)).
# * It is a statement about **one norm**. A rotated or a darker picture may be further away than
#   $R$, though it looks the same. For a bound on the change of every pixel there is
#   [01, (1.8)](01_smoothing.ipynb).
# * It is a statement about **$g$ and about $f$ as it is run here**: the same weights, the same
#   arithmetic, in evaluation mode. It says nothing about $f$ alone.
# * It does **not** say that the answer is right. That is what the labels of the table are for.
# * The training is not part of the proof. A badly trained $f$ gets small radii, and they hold as
#   well.
#
# ## 0.9 What this page leaves out
#
# | left out here | where it is |
# |---|---|
# | the paper's settings: layer decay, drop path, mixup, norm-pix, sizes | [03](03_denoising_masked_autoencoder.ipynb), [04](04_from_pretraining_to_smoothed_classifier.ipynb), [`pretrain.py`](../pretrain.py), [`finetune.py`](../finetune.py) |
# | the model is selected by votes on held-out training images; here the last one is taken | [`finetune.py:measure`](../finetune.py) |
# | what pre-training buys, against none and against MAE | [04](04_from_pretraining_to_smoothed_classifier.ipynb) |
# | bounds for the runner-up as well, which pay where $f$ is unsure | [02, (2.13)](02_from_counts_to_certificates.ipynb), [`certify.py:two_sided_bounds`](../certify.py) |
# | several processes and GPUs; going on after a stop | [03, (3.22)](03_denoising_masked_autoencoder.ipynb), [`pretrain.py:resume`](../pretrain.py) |
# | a stream of noise for each image, so that a row can be computed alone, and again | [`certify.py:generator_for`](../certify.py) |
# | an attack on $g$: nothing inside the radius, much outside | [05, (5.3)](05_certify_and_attack.ipynb) |
#
# ## 0.10 Exercises
#
# 1. **More draws.** What is the largest radius that $n = 2\,000$ draws can prove, and what $n =
#    100\,000$? *Hint:* put $k = n$ into `certify`; the $\alpha$ quantile of $\text{Beta}(n, 1)$ is
#    $\alpha^{1/n}$.
# 2. **Another norm.** An image is certified at $r = 0.5$. Somebody changes every pixel by at most
#    $1/20$. Is the answer safe? And by at most $1/10$? *Hint:* how long is the longest such change,
#    in the Euclidean norm?
# 3. **Clipping.** In `certify` you clip the noisy images to $[0, 1]$ before $f$ sees them. Are the
#    certificates still valid? And are they as large? *Hint:* the theorem asks nothing of $f$.
#
# <details><summary><b>Answers</b></summary>
#
# 1. $R = \sigma\,\Phi^{-1}(\alpha^{1/n})$, that is 0.675 and 0.953. Fifty times the draws buy less
#    than half as much again.
# 2. The longest change has the length $\sqrt{64}/20 = 0.4 < 0.5$: the answer is safe. By $1/10$ it
#    is $0.8$. That is not covered, and nothing is said about it.
# 3. They are valid. Clipping, then $f$, is another function $f'$ of the noisy image, and the
#    theorem holds for $f'$. But they are certificates of the smoothed $f'$. Since $f$ was trained
#    on noise that was not clipped, $f'$ may answer worse, and then radii are smaller. Who clips
#    here should clip in training, too.
#
# </details>
#
# The numbers of answers 1 and 2:

# %%
for draws in (2_000, 100_000):
    print(f"n = {draws:>7,}: {sigma * norm.ppf(alpha ** (1 / draws)):.3f}")
for change in (1 / 20, 1 / 10):
    print(f"every pixel by {change:.2f}: length {change * math.sqrt(64):.1f}")

# %% [markdown]
# The papers stand in the [references](README.md#references) of all notebooks.
#
# [contents](README.md) | next: [01, smoothing](01_smoothing.ipynb)
