"""SmoothAdv (Salman et al. 2019, arXiv 1906.04584): train on images adversarial to the smoothed f.

    x^ = argmax_{|x' - x| <= eps} J(x'),    J(x') = -log mean_i softmax(f(x' + e_i))_y
    loss = mean_i CE(f(x^ + e_i), y)                    with the same draws e_i in attack and loss

    python finetune.py --sigma 0.5 --objective extras/smoothadv.py:smoothadv --out runs/smoothadv \\
        --init runs/digits/pretrain.pt --objective-args copies=2 eps=0.5 steps=4

The defaults are the paper's on CIFAR-10, triples for sigma 0.25, 0.5, 1. On other data sets:

    digits (ours)      copies=2 steps=4     eps=0.25, 0.5, 1.0 at the three sigmas
    MNIST, Fashion     copies=4 steps=10    eps=0.996
    ImageNet           copies=1 steps=1     eps=1.0, 0.996, 2.0

Paper recipes mix images; this wants one class an image: --mixup 0 --cutmix 0.
"""

import math

import torch

from finetune import cross_entropy, log_smoothed, refuse


def norms(images):
    """The L2 norm of each image, (B, 1, 1, 1)."""
    return images.flatten(1).norm(dim=1)[:, None, None, None]


def directions(images, otherwise):
    """Each image (B, C, H, W) over its L2 norm, however small; where it is zero, `otherwise`'s."""
    largest = images.flatten(1).abs().amax(dim=1)[:, None, None, None]
    images = torch.where(largest > 0, images / largest, otherwise)           # no underflow
    return images / norms(images).clamp(min=torch.finfo(images.dtype).tiny)


def ascend(f, x, targets, noise, step, steps, eps=math.inf):
    """Adversarial images (B, C, H, W): `steps` steps of L2 length `step` up J.

    J is the logarithm of a mean, not the mean of logarithms. After each step the pixels are clipped
    to [0, 1], then the way from x is shortened to eps. Where the gradient is zero, the direction is
    that of the first noise. (notebook 06, (6.4))
    """
    adversarial = x
    for _ in range(steps):
        adversarial = adversarial.detach().requires_grad_()
        with torch.enable_grad():
            loss = -(targets * log_smoothed(f.frozen(adversarial, noise))).sum()
        (gradient,) = torch.autograd.grad(loss, adversarial)                 # B C H W
        way = (adversarial.detach() + step * directions(gradient, noise[0])).clamp(0, 1) - x
        length = norms(way)
        adversarial = x + way * torch.where(length > eps, eps / length, 1.0)
    return adversarial.detach()


def check_one_hot(targets):
    if not ((targets == 0) | (targets == 1)).all():
        refuse("this objective needs images of one class: --mixup 0 --cutmix 0")


def warmed_up(epoch, epochs, warmup):
    """The share of eps or eta in this epoch: it rises over `warmup` epochs, a fifth at most."""
    warmup = min(warmup, epochs / 5)
    return min(1.0, (math.floor(epoch) + 1) / warmup) if warmup else 1.0


def smoothadv(
    f, x, targets, sigma, epoch, epochs,
    copies=(4, 8, 2), eps=(255 / 256, 1.0, 2.0), steps=10, warmup=10, label_smoothing=0.1,
):
    """Steps of 2 eps / steps. (The paper has no label smoothing.) (notebook 06, (6.4))."""
    noise = sigma * torch.randn(copies, *x.shape, device=x.device)           # m B C H W
    check_one_hot(targets)
    eps = eps * warmed_up(epoch, epochs, warmup)
    adversarial = ascend(f, x, targets, noise, 2 * eps / steps, steps, eps)
    return cross_entropy(f(adversarial, noise), targets, label_smoothing)
