"""Denoised smoothing (Salman et al. 2020, arXiv 2003.01908), with the autoencoder as denoiser.

    f(z) = argmax_c F(D(z))_c,    D(z) = clip(mean + std * decode(encode(z))), no patch dropped

So a classifier F of clean images becomes a base classifier f for noisy ones; the certificate is
about the pixels of z. (With a diffusion model: Carlini et al. 2023, extras/diffusion.py. The
denoiser here is the autoencoder of Wu et al. 2023, arXiv 2210.06983.)

    python pretrain.py --no-norm-pix --out runs/denoiser
    python finetune.py --sigma 0 --init runs/denoiser/pretrain.pt --out runs/clean
    CHECKPOINTS=runs/denoiser/pretrain.pt:runs/clean/finetune_sigma_0.pt python certify.py \\
        --sigma 0.25 --classifier extras/denoise.py:denoised --out runs/denoised
"""

import functools
import math
import os

import torch
import torch.nn.functional as F

from certify import rebuild, refuse
from model import DenoisingMaskedAutoencoder, load_weights, read_checkpoint, unpatchify


def denoise(dmae, z):
    """D(z): noisy images (B, C, S, S) to clean ones in [0, 1].

    dmae: model.DenoisingMaskedAutoencoder, trained without norm-pix: with it, the prediction lacks
    each patch's mean and variance. It may work at another size than S; the result has size S.
    (notebook 06, (6.11))
    """
    patches = math.prod(dmae.grid)
    in_order = torch.arange(patches, device=z.device).expand(len(z), -1)     # B N
    latent, restore, _ = dmae.encode(z, mask_ratio=0.0, mask_noise=in_order)
    prediction = dmae.decode(latent, restore)                                # B N P*P*C
    images = unpatchify(prediction, dmae.patch_size, dmae.grid) * dmae.std + dmae.mean
    if images.shape != z.shape:
        images = F.interpolate(images, z.shape[-2:], mode="bicubic", antialias=True)
    return images.clamp(0, 1)                                                # B C S S


def open_denoiser(file):
    """The autoencoder of a checkpoint of pretrain.py, in eval mode."""
    checkpoint = read_checkpoint(file, "pretrain")
    dmae = DenoisingMaskedAutoencoder(**checkpoint["config"])
    load_weights(dmae, checkpoint["model"], file)
    if dmae.norm_pix or dmae.loss_on != "all":
        refuse(f"{file} gives no pixels back: pretrain.py --no-norm-pix --loss-on all does")
    return dmae.eval()


@functools.cache
def open_networks():
    """(denoiser, classifier) of CHECKPOINTS."""
    files = os.environ.get("CHECKPOINTS", "").split(":")
    if len(files) != 2:
        refuse("extras/denoise.py needs CHECKPOINTS=DENOISER.pt:CLASSIFIER.pt")
    try:
        denoiser, checkpoint = open_denoiser(files[0]), read_checkpoint(files[1], "finetune")
        return denoiser, rebuild(checkpoint, files[1]).eval()
    except ValueError as error:
        refuse(error)


def denoised(z):
    denoiser, classifier = (network.to(z.device) for network in open_networks())
    return classifier(denoise(denoiser, z))
