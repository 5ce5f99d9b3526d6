"""Diffusion denoised smoothing (Carlini et al. 2023, arXiv 2206.10550): one step of a diffusion.

    x_t = sqrt(abar_t) (2z - 1)
    x_0 = clip((x_t - sqrt(1 - abar_t) model(x_t, t)) / sqrt(abar_t)),       then (x_0 + 1) / 2

The noise in z, 2 sigma in those units, is a little below that of step t. None is added to make up
for it: the model sees slightly less noise than it is told. So f is a deterministic function of z,
and the certificate at sigma holds, as it does for any f. The weights are yours: a file for
python certify.py --sigma 0.5 --classifier mine.py:f --dataset cifar10

    from extras.diffusion import denoise_by_diffusion
    unet, vit, abar = ...                                      # yours
    def f(z):
        return vit(denoise_by_diffusion(unet, z, 0.5, abar))

A model that predicts a variance, too, is cut: lambda x_t, t: unet(x_t, t)[:, :3].
"""

import math

import torch


def diffusion_step(sigma, abar):
    """(t, sqrt(abar_t)): the step whose noise is that of z = x + sigma N(0, I), x in [0, 1].

    A diffusion takes images 2x - 1 in [-1, 1] to x_t = sqrt(abar_t) (2x - 1) + sqrt(1 - abar_t)
    N(0, I). In those units z has noise 2 sigma, so t is the smallest with

        sqrt((1 - abar_t) / abar_t) >= 2 sigma

    abar (T,): the schedule's cumulative products of 1 - beta, falling; t counts from 0.
    (notebook 06, (6.12))
    """
    abar = torch.as_tensor(abar, dtype=torch.float64)
    noise = ((1 - abar) / abar).sqrt()                                       # T
    enough = noise >= 2 * sigma
    if not enough.any():
        largest = float(noise.max()) / 2
        raise ValueError(f"sigma {sigma:g} is above the schedule's largest, {largest:g}")
    t = int(enough.nonzero()[0])
    return t, float(abar[t].sqrt())


def denoise_by_diffusion(model, z, sigma, abar):
    """Noisy images z (B, C, H, W) = x + sigma N(0, I) to clean ones in [0, 1].

    model: any callable (x_t, t (B,)) -> the predicted noise. (notebook 06, (6.13))
    """
    t, scale = diffusion_step(sigma, abar)
    x_t = scale * (2 * z - 1)
    noise = model(x_t, torch.full((len(z),), t, device=z.device))
    x_0 = (x_t - math.sqrt(1 - scale**2) * noise) / scale
    return (x_0.clamp(-1, 1) + 1) / 2
