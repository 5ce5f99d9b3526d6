"""SmoothMix (Jeong et al. 2021, arXiv 2111.09277): half-way to an adversarial image, be unsure.

    mean_i CE(f(x + e_i), y) + eta mean_i KL(y_mix || softmax f(x_mix + e_i)) [F is right]
    x_mix = (1 - mu) x + mu x~,    y_mix = (1 - mu) F(x) + mu / classes,    mu uniform in [0, 1/2]

with x~ of ascend() without an eps, and the same draws e_i everywhere.

    python finetune.py --sigma 0.5 --objective extras/smoothmix.py:smoothmix --out runs/smoothmix \\
        --init runs/digits/pretrain.pt --objective-args step=0.5

The defaults are the paper's on CIFAR-10, triples for sigma 0.25, 0.5, 1. On other data sets:

    digits (ours)      step=0.25, 0.5, 1.0 at the three sigmas
    MNIST, Fashion     copies=4 step=1.0 eta=1.0    steps=3, 4, 8 at the three sigmas

Paper recipes mix images; this wants one class an image: --mixup 0 --cutmix 0.
"""

import torch

from extras.smoothadv import ascend, check_one_hot, warmed_up
from finetune import cross_entropy, log_smoothed


def smoothmix_loss(logits, logits_mixed, targets, mu, eta):
    """The second term above; logits and logits_mixed (m, B, classes) under the same noise, mu (B,).

    Gradients reach F(x), too. The mean is over all B images. (notebook 06, (6.7), (6.8))
    """
    log_mean = log_smoothed(logits)                                          # B classes
    right = log_mean.argmax(dim=-1) == targets.argmax(dim=-1)                # B
    mu = mu[:, None]
    mixed = (1 - mu) * log_mean.exp() + mu / logits.shape[-1]                # B classes
    log_mixed = mixed.clamp(min=torch.finfo(mixed.dtype).tiny).log()
    divergence = (mixed * (log_mixed - logits_mixed.log_softmax(dim=-1))).sum(dim=-1)      # m B
    return eta * (divergence.mean(dim=0) * right).mean()


def smoothmix(
    f, x, targets, sigma, epoch, epochs,
    copies=2, step=(0.5, 1.0, 2.0), steps=4, eta=5.0, warmup=10, label_smoothing=0.1,
):
    """The objective; eta rises over `warmup` epochs. (The paper has no label smoothing.)"""
    noise = sigma * torch.randn(copies, *x.shape, device=x.device)           # m B C H W
    check_one_hot(targets)
    adversarial = ascend(f, x, targets, noise, step, steps)
    mu = torch.rand(len(x), device=x.device) / 2                             # B
    mixed = torch.lerp(x, adversarial, mu[:, None, None, None])
    both = f(torch.cat([x, mixed]), torch.cat([noise, noise], dim=1))        # m 2B classes
    logits, logits_mixed = both.chunk(2, dim=1)
    loss = cross_entropy(logits, targets, label_smoothing)
    eta = eta * warmed_up(epoch, epochs, warmup)
    return loss + smoothmix_loss(logits, logits_mixed, targets, mu, eta)
