"""MACER (Zhai et al. 2020, arXiv 2001.02378): cross-entropy of smoothed scores, and the radius.

    -log F_y + lam sigma/2 max(gamma - xi, 0) [z is right]
    xi = Phi^-1(z_y) - Phi^-1(max_{c != y} z_c)

    python finetune.py --sigma 0.5 --objective extras/macer.py:macer --out runs/macer \\
        --init runs/digits/pretrain.pt --objective-args copies=8 lam=1.0

The defaults are the paper's on CIFAR-10, triples for sigma 0.25, 0.5, 1; ours is the wait of a
third of the epochs at every sigma. On other data sets:

    digits (ours)      copies=8 lam=1.0
    MNIST, Fashion     lam=16.0, 16.0, 6.0 at the three sigmas

Paper recipes mix images; this wants one class an image: --mixup 0 --cutmix 0.
"""

import torch

from extras.smoothadv import check_one_hot
from finetune import log_smoothed


def macer_loss(logits, targets, sigma, lam, beta, gamma):
    """The loss above; logits (m, B, classes), targets (B, classes) one-hot, the mean over B images.

    z = mean_i softmax(beta f(x + e_i)) are scores at a lower temperature, so that sigma xi / 2 is
    nearly the certified radius. z is kept 2^-24 away from 0 and 1, where Phi^-1 is infinite: xi is
    above any gamma of use there. (notebook 06, (6.5), (6.6))
    """
    cross = -(targets * log_smoothed(logits)).sum(dim=-1)                    # B
    z = log_smoothed(beta * logits).exp()                                    # B classes
    label = targets.argmax(dim=-1, keepdim=True)                             # B 1
    right = z.argmax(dim=-1, keepdim=True) == label                          # B 1
    rival = z.scatter(-1, label, 0.0).amax(dim=-1, keepdim=True)             # B 1
    both = torch.cat([z.gather(-1, label), rival], dim=-1).clamp(2**-24, 1 - 2**-24)
    quantiles = torch.special.ndtri(both)                                    # B 2
    xi = quantiles[:, 0] - quantiles[:, 1]                                   # B
    hinge = sigma / 2 * (gamma - xi).clamp(min=0) * right[:, 0]
    return (cross + lam * hinge).mean()


def macer(
    f, x, targets, sigma, epoch, epochs,
    copies=16, lam=(12.0, 4.0, 12.0), beta=16.0, gamma=8.0, wait=1 / 3,
):
    """The objective; lam is 0 in the first `wait` of the epochs. It has no label smoothing."""
    noise = sigma * torch.randn(copies, *x.shape, device=x.device)           # m B C H W
    check_one_hot(targets)
    lam = lam * float(epoch >= wait * epochs)
    return macer_loss(f(x, noise), targets, sigma, lam, beta, gamma)
