"""The networks of Denoising Masked Autoencoders (DMAE; Wu et al., ICLR 2023, arXiv 2210.06983).

Pre-training corrupts an image x in [0, 1] twice, by Gaussian noise in pixel space and by dropping patches, and asks
for the clean image back:

    x  ->  x + sigma * N(0, I)  ->  resize, normalise  ->  patches  ->  encoder on the kept ones  ->  decoder on all
       ->  mean squared error against the clean patches, kept *and* dropped.

Afterwards the decoder is thrown away, and the encoder becomes the classifier f of the smoothed classifier
g(x) = argmax_c P[f(x + N(0, sigma^2 I)) = c]. Everything about pixels (resize, mean, std) lives inside the networks, so
that sigma and certified radii are in the units of the data set's own images.

    from model import build_dmae, build_vit, load_encoder
    dmae = build_dmae("vit_base_patch16")                              # 111.9M parameters
    loss, prediction, mask = dmae(images, sigma=0.25, mask_ratio=0.75)
    vit = build_vit("vit_base_patch16", num_classes=1000)              # 86.6M parameters
    load_encoder(vit, "pretrain.pt")                                   # ours, the published DMAE's, MAE's or timm's

Axes:  B images   C channels   H W pixels   N patches (h x w of them)   K kept patches   D width   P patch side
"""

import argparse
import ctypes
import difflib
import fcntl
import functools
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as T

NORMALISATION = {                                             # mean and standard deviation of training pixels in [0, 1]
    "digits": dict(mean=(0.3054,), std=(0.3755,)),
    "cifar10": dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616)),
    "imagenet": dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
}


# ---------------------------------------------------------------------------------------------------------------------
# Patches, positions, masks
# ---------------------------------------------------------------------------------------------------------------------


def patchify(images, patch_size):
    """Cut images (B, C, H, W) into patches (B, N, P*P*C); the pixels of a patch run row, column, channel."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches, patch_size, grid):
    """Put patches (B, N, P*P*C) of an h x w `grid` back together: images (B, C, H, W)."""
    h, w = grid
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=patch_size, q=patch_size)


def sincos_positions(dim, grid):
    """The fixed 2-D sin-cos table (1, 1 + N, D), its first row (the class token's) zero.

    With omega_i = 10000^(-i / (D/4)), a patch in row y and column x gets [sin(x w), cos(x w), sin(y w), cos(y w)], the
    order of the published checkpoints (He et al. 2022, arXiv 2111.06377, section 3; Vaswani et al. 2017, section 3.5).
    """
    if dim % 4:
        raise ValueError(f"2-D sin-cos positions need a width divisible by 4, not {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [coordinate.flatten()[:, None] * omega for coordinate in (x, y)]             # 2 x (N, D/4)
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return F.pad(table, (0, 0, 1, 0))[None].to(torch.get_default_dtype())                 # 1 1+N D


def interpolate_positions(positions, grid):
    """Resample a position table (1, 1 + N', D) of a square grid to another `grid` (bicubic); the class row is kept."""
    side = math.isqrt(positions.shape[1] - 1)
    if side * side != positions.shape[1] - 1:
        raise UsageError(f"{positions.shape[1] - 1} positions do not form a square grid")
    table = rearrange(positions[:, 1:], "1 (h w) d -> 1 d h w", h=side)
    table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], rearrange(table, "1 d h w -> 1 (h w) d")], dim=1)


def random_masking(mask_noise, mask_ratio):
    """Choose int(N (1 - mask_ratio)) patches per image, those with the smallest `mask_noise` (B, N).

    Returns keep (B, K), the kept patches' indices; restore (B, N), where each patch stands in "kept, then dropped";
    and mask (B, N), 1 = dropped, 0 = kept.
    """
    kept = int(mask_noise.shape[1] * (1 - mask_ratio))
    shuffle = mask_noise.argsort(dim=1)                                                   # B N, kept ones first
    restore = shuffle.argsort(dim=1)                                                      # B N, its inverse
    return shuffle[:, :kept], restore, (restore >= kept).to(mask_noise.dtype)


def standardise_patches(patches):
    """Each patch (..., P*P*C) by its own mean and unbiased variance + 1e-6: the norm-pix target (MAE, section 4.1)."""
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


# ---------------------------------------------------------------------------------------------------------------------
# Transformer
# ---------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, "b heads n d -> b n (heads d)"))


class Block(nn.Module):
    """Pre-norm transformer block; in training each residual branch is dropped per image with chance `drop_path`."""

    def __init__(self, dim, heads, mlp_ratio=4.0, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, dim)))
        self.drop_path = drop_path

    def stochastic_depth(self, branch):
        if not self.training or self.drop_path == 0:
            return branch
        survive = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * survive / (1 - self.drop_path)

    def forward(self, x):
        x = x + self.stochastic_depth(self.attn(self.norm1(x)))
        return x + self.stochastic_depth(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    """What autoencoder and classifier share: from pixels in [0, 1] to tokens with positions, and the blocks.

    Images of another size than `image_size` are resized (bicubic) before normalisation: with CIFAR-10 at 224 the noise,
    and so sigma and the radius, belong to the 32 x 32 image (paper, section 4.3).
    """

    def __init__(self, image_size, patch_size, channels, dim, depth, heads, mean, std, mlp_ratio=4.0, drop_path=0.0):
        super().__init__()
        self.image_size, self.patch_size = image_size, patch_size
        self.grid = (image_size // patch_size,) * 2
        self.register_buffer("mean", torch.tensor(mean).view(channels, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(channels, 1, 1), persistent=False)
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(channels, dim, patch_size, patch_size)))  # a linear map
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_positions(dim, self.grid), requires_grad=False)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]                 # deeper blocks drop more
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, rate) for rate in rates)
        self.recompute_activations = False                                                # trades time for memory

    def initialise(self):
        """Xavier for every linear map (the patch embedding is one), zero biases, N(0, 0.02^2) for learned tokens."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("token"):
                nn.init.normal_(parameter, std=0.02)

    def prepare(self, images):
        """Resize (if need be) and normalise: (B, C, any, any) in [0, 1] -> (B, C, H, W)."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = F.interpolate(images, size=self.image_size, mode="bicubic", align_corners=False)
        return (images - self.mean) / self.std

    def embed(self, images):
        """Images -> patch tokens with positions (B, N, D)."""
        return rearrange(self.patch_embed(self.prepare(images)), "b d h w -> b (h w) d") + self.pos_embed[:, 1:]

    def with_cls(self, tokens):
        """Prepend the class token: (B, n, D) -> (B, 1 + n, D)."""
        cls = repeat(self.cls_token + self.pos_embed[:, :1], "1 1 d -> b 1 d", b=len(tokens))
        return torch.cat([cls, tokens], dim=1)

    def run(self, blocks, x):
        for block in blocks:
            x = recompute(block, x, use_reentrant=False) if self.recompute_activations and self.training else block(x)
        return x


class VisionTransformer(Encoder):
    """The base classifier f: images (B, C, H, W) in [0, 1] -> logits (B, num_classes), from all tokens.

    pool = "mean": mean of the patch tokens -> `fc_norm` -> head. pool = "cls": all tokens -> `norm` -> class token ->
    head. probe = True puts a BatchNorm without parameters before the linear head (the linear probe of paper section 4.4).
    """

    def __init__(self, *, dim, num_classes, pool="mean", probe=False, **encoder):
        super().__init__(dim=dim, **encoder)
        self.pool = pool
        self.pos_embed.requires_grad = True                                               # trained in fine-tuning
        setattr(self, "fc_norm" if pool == "mean" else "norm", nn.LayerNorm(dim, eps=1e-6))
        linear = nn.Linear(dim, num_classes)
        self.head = nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), linear) if probe else linear
        self.initialise()
        nn.init.trunc_normal_(linear.weight, std=0.01 if probe else 2e-5)

    def features(self, images):
        """What the head sees: (B, C, H, W) -> (B, D)."""
        x = self.with_cls(self.embed(images))                                             # B 1+N D
        x = self.run(self.blocks, x)                                                      # B 1+N D
        if self.pool == "mean":
            return self.fc_norm(x[:, 1:].mean(dim=1))                                     # B D
        return self.norm(x[:, 0])                                                         # B D

    def forward(self, images):
        return self.head(self.features(images))


class DenoisingMaskedAutoencoder(Encoder):
    """DMAE (paper, section 3.2): reconstruct the clean image from a noisy one of which most patches are dropped.

    loss_on = "all" is the paper's loss; "dropped", with sigma = 0, is the plain masked autoencoder (MAE).
    """

    def __init__(self, *, dim, decoder_dim, decoder_depth, decoder_heads, channels, patch_size, mlp_ratio=4.0,
                 norm_pix=True, loss_on="all", **encoder):
        super().__init__(dim=dim, channels=channels, patch_size=patch_size, mlp_ratio=mlp_ratio, **encoder)
        self.norm_pix, self.loss_on = norm_pix, loss_on
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(decoder_dim, self.grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, decoder_heads, mlp_ratio) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, patch_size**2 * channels)
        self.initialise()

    def encode(self, noisy, mask_ratio, mask_noise):
        """Noisy images -> latent (B, 1 + K, D) of the kept patches, restore (B, N), mask (B, N) with 1 = dropped."""
        x = self.embed(noisy)                                                             # B N D
        keep, restore, mask = random_masking(mask_noise, mask_ratio)
        x = x.gather(1, repeat(keep, "b k -> b k d", d=x.shape[-1]))                      # B K D
        x = self.run(self.blocks, self.with_cls(x))                                       # B 1+K D
        return self.norm(x), restore, mask

    def decode(self, latent, restore):
        """Latent (B, 1 + K, D) -> predicted patches (B, N, P*P*C), all of them."""
        x = self.decoder_embed(latent)                                                    # B 1+K D'
        dropped = restore.shape[1] + 1 - x.shape[1]
        tokens = torch.cat([x[:, 1:], self.mask_token.to(x.dtype).expand(len(x), dropped, -1)], dim=1)
        tokens = tokens.gather(1, repeat(restore, "b n -> b n d", d=x.shape[-1]))         # B N D', in image order
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed                 # B 1+N D'
        x = self.decoder_norm(self.run(self.decoder_blocks, x))
        return self.decoder_pred(x)[:, 1:]                                                # B N P*P*C

    def target(self, images):
        """The patches to predict (B, N, P*P*C), from *clean* images."""
        patches = patchify(self.prepare(images), self.patch_size)
        return standardise_patches(patches) if self.norm_pix else patches

    def loss(self, target, prediction, mask):
        """Mean squared error over the pixels of each patch, then over all patches (DMAE) or the dropped ones (MAE)."""
        error = (prediction - target).square().mean(dim=-1)                               # B N
        return error.mean() if self.loss_on == "all" else (error * mask).sum() / mask.sum()

    def forward(self, images, sigma, mask_ratio, noise=None, mask_noise=None):
        """Clean images (B, C, H, W) in [0, 1] -> loss, prediction (B, N, P*P*C), mask (B, N) with 1 = dropped.

        noise (B, C, H, W) ~ N(0, 1) and mask_noise (B, N) ~ U(0, 1) are drawn here, in this order, unless given.
        """
        noise = torch.randn_like(images) if noise is None else noise
        if mask_noise is None:
            mask_noise = torch.rand(len(images), math.prod(self.grid), device=images.device)
        noisy = images + sigma * noise
        latent, restore, mask = self.encode(noisy, mask_ratio, mask_noise)
        prediction = self.decode(latent, restore)
        return self.loss(self.target(images), prediction, mask), prediction, mask


# ---------------------------------------------------------------------------------------------------------------------
# Named sizes, and what they cost
# ---------------------------------------------------------------------------------------------------------------------

DECODER = dict(decoder_dim=512, decoder_depth=8, decoder_heads=16)
SIZES = {
    "vit_digits": dict(image_size=8, patch_size=2, channels=1, dim=64, depth=3, heads=2, mlp_ratio=2.0,
                       decoder_dim=32, decoder_depth=1, decoder_heads=2),
    "vit_cifar_tiny": dict(image_size=32, patch_size=4, channels=3, dim=128, depth=4, heads=4,
                           decoder_dim=96, decoder_depth=1, decoder_heads=3),
    "vit_cifar": dict(image_size=32, patch_size=4, channels=3, dim=384, depth=12, heads=6,
                      decoder_dim=192, decoder_depth=2, decoder_heads=3),
    "vit_base_patch16": dict(image_size=224, patch_size=16, channels=3, dim=768, depth=12, heads=12, **DECODER),
    "vit_large_patch16": dict(image_size=224, patch_size=16, channels=3, dim=1024, depth=24, heads=16, **DECODER),
    "vit_huge_patch14": dict(image_size=224, patch_size=14, channels=3, dim=1280, depth=32, heads=16, **DECODER),
}


def build_dmae(name, **overrides):
    """A DenoisingMaskedAutoencoder of a named size; `overrides` replace any constructor argument. .config rebuilds it."""
    return _build(DenoisingMaskedAutoencoder, choose("model", name, SIZES) | overrides)


def build_vit(name, num_classes, **overrides):
    """A VisionTransformer of a named size; `overrides` replace any constructor argument. .config rebuilds it."""
    size = {key: value for key, value in choose("model", name, SIZES).items() if not key.startswith("decoder_")}
    return _build(VisionTransformer, size | {"num_classes": num_classes} | overrides)


def _build(network, config):
    config = NORMALISATION["imagenet" if config["channels"] == 3 else "digits"] | config
    if config["image_size"] < 1 or config["patch_size"] < 1 or config["image_size"] % config["patch_size"]:
        raise UsageError(f"image size {config['image_size']} is not a multiple of the patch size {config['patch_size']}")
    model = network(**config)
    model.config = config
    return model


def decays(name, parameter):
    """Weight decay acts on matrices, not on biases and norms (1-D), learned tokens and positions."""
    return parameter.ndim > 1 and not name.endswith(("token", "pos_embed"))


def activations_of(loss_of_batch, model):
    """(loss_of_batch(), GiB that it keeps for the backward pass, weights aside); fake tensors can be counted, too."""
    kept, own = {}, {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of_batch()                                        # its graph holds the storages: no two have one place
    return loss, sum(size for storage, size in kept.items() if storage not in own) / 2**30


def count_flops(work):
    """(work(), its FLOPs), a multiplication and an addition being two; torch itself would leave out attention on CPUs."""
    aten = torch.ops.aten
    left_out = {aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
                aten._scaled_dot_product_flash_attention_for_cpu_backward:
                lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])}
    with FlopCounterMode(display=False, custom_mapping=left_out) as counter:
        result = work()
    return result, counter.get_total_flops()


def cost(loss_of_batch, model, images):
    """One line on what a training step costs: runs loss_of_batch() forwards and backwards, and counts."""
    (loss, activations), forward = count_flops(lambda: activations_of(loss_of_batch, model))
    _, backward = count_flops(loss.backward)
    weights = sum(parameter.numel() * (16 if parameter.requires_grad else 4) for parameter in model.parameters()) / 2**30
    there, back = forward / images / 1e9, backward / images / 1e9
    return (f"{there:.3g} GFLOP an image forwards, {back:.3g} backwards; memory of a process about {weights + activations:.3g} "
            f"GiB: {weights:.3g} for weights, gradients and optimizer, {activations:.3g} for {images} images' activations")


def pick_dtype(dtype, model, device, world):
    """The dtype that "auto" stands for: bf16 where rank 0 finds it faster, else fp32. One answer for all ranks."""
    return dtype if dtype != "auto" else "bf16" if gather([faster_in_bf16(model, device)], world)[0, 0] else "fp32"


def faster_in_bf16(model, device):
    """Whether bf16 autocast pays: on GPUs that have it; on a CPU, if a trial of a block says so: 1.3 times as fast, so that
    noise does not decide, and only for wide models, since narrow ones have too little arithmetic to gain from it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    width = model.pos_embed.shape[-1] if isinstance(model, Encoder) else 0                # of others nothing is known
    if device.type != "cpu" or width < 256:
        return False
    for tokens in (8, 400):                     # where processors have no instructions for it, it is so slow that few tell
        best = {False: math.inf, True: math.inf}
        for enabled in 4 * [False, True]:
            start = time.perf_counter()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                model.blocks[0](torch.ones(1, tokens, width))
            best[enabled] = min(best[enabled], time.perf_counter() - start)
        if best[True] > 2 * best[False]:
            return False
    return best[False] > 1.3 * best[True]


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


def read_checkpoint(path, kind=None):
    """The dict {"model": state dict, ...} of a file, on the CPU: tensors and plain values, never code that would run."""
    require(Path(path).is_file(), f"there is no checkpoint {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):                      # the published files hold one
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                                # a damaged file can raise anything at all
        raise UsageError(f"{path} is not a readable checkpoint ({type(error).__name__})") from None
    content = content if isinstance(content, dict) and "model" in content else {"model": content}    # timm's are bare
    state = content["model"]
    require(isinstance(state, dict) and state and all(isinstance(value, torch.Tensor) for value in state.values()),
            f"{path} holds no model")
    require(kind is None or content.get("kind") == kind and {"config", "data", "settings"} <= content.keys(),
            f"{path} is not a checkpoint of {kind}.py")
    return content


def load_weights(model, state, origin, may_miss=(), may_leave=()):
    """Copy `state` into `model`; keys missing or left over must start with one of the given prefixes. Returns both lists."""
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    left = [key for key in state if key not in own]
    wrong = ([f"{key} is missing" for key in missing if not key.startswith(tuple(may_miss))]
             + [f"{key} is unexpected" for key in left if not key.startswith(tuple(may_leave))]
             + [f"{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
                for key in own if key in state and state[key].shape != own[key].shape]
             + [f"{key} is {state[key].dtype}, not {own[key].dtype}" for key in own
                if key in state and state[key].is_floating_point() != own[key].is_floating_point()]
             + [f"{key} is not finite" for key in own if key in state and not state[key].isfinite().all()])
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UsageError(f"{origin} does not fit the model: {wrong[0]}{more}")
    model.load_state_dict({key: state[key] for key in own if key in state}, strict=False)
    return missing, left


def load_encoder(vit, path):
    """Start a classifier from pre-trained weights: ours, the published DMAE's, MAE's, or a timm ViT's state dict.

    Positions are interpolated when the grid differs. A decoder, a head for other classes and a final norm of the other
    pooling are left over; the new head (and `fc_norm` after pre-training) start fresh. Returns (missing, left over), the
    two lists of keys; anything else that does not fit raises UsageError.
    """
    state = dict(read_checkpoint(path)["model"])
    own = vit.state_dict()
    if "pos_embed" in state and state["pos_embed"].ndim == 3 and state["pos_embed"].shape[1] != own["pos_embed"].shape[1]:
        state["pos_embed"] = interpolate_positions(state["pos_embed"].float(), vit.grid)
    replaceable = ("head.", "norm.", "fc_norm.")
    for key in [key for key in state if key.startswith("head.") and key in own and state[key].shape != own[key].shape]:
        state[f"{key}.other"] = state.pop(key)                                            # a head for other classes
    return load_weights(vit, state, path, replaceable, (*replaceable, "decoder_", "mask_token"))


# ---------------------------------------------------------------------------------------------------------------------
# Schedule and data: pure functions of the position, so that a checkpoint stores no more than the step
# ---------------------------------------------------------------------------------------------------------------------


def seed_of(*position):
    """A 32-bit seed for a position such as (seed, step, micro-batch, rank)."""
    return int(np.random.SeedSequence([len(position), *position]).generate_state(1)[0])


def learning_rate(step, steps, warmup, peak, minimum=0.0):
    """Linear warm-up from 0 to `peak` over `warmup` steps, then half a cosine down to `minimum` at `steps`."""
    if step < warmup:
        return peak * step / warmup
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def share_batch(batch, world, largest):
    """(device batch, micro-batches) such that batch = world * device batch * micro-batches, device batch <= largest."""
    require(batch % world == 0, f"a batch of {batch} cannot be divided by {world} processes")
    share = batch // world
    device_batch = max(size for size in range(1, min(share, largest) + 1) if share % size == 0)
    return device_batch, share // device_batch


@functools.lru_cache(maxsize=2)
def epoch_draws(size, seed, epoch):
    """An epoch's order of `size` images, and four uniform numbers (size, 4) to augment each of them with."""
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    return torch.randperm(size, generator=generator), torch.rand(size, 4, generator=generator)


def shift_and_flip(shift, flip):
    """An augmentation of batches: by up to `shift` pixels each way (borders repeat) and, if `flip`, left to right.

    augment(pixels (B, C, S, S), uniforms (B, 4)) -> pixels (B, C, S, S).
    """
    def augment(pixels, uniforms):
        side = torch.arange(pixels.shape[-1], device=pixels.device)
        y, x = (side + (u * (2 * shift + 1)).long()[:, None] - shift for u in uniforms[:, :2].T)          # B S, B S
        x = torch.where(flip & (uniforms[:, 2:3] < 0.5), x.flip(1), x)
        y, x = (source.clamp(0, len(side) - 1) for source in (y, x))
        image = torch.arange(len(pixels), device=pixels.device)[:, None, None]
        return pixels.movedim(1, 3)[image, y[:, :, None], x[:, None, :]].movedim(3, 1)
    return augment


def open_picture(file, channels):
    """A picture file as a PIL image, RGB or grey."""
    try:
        with Image.open(file) as picture:
            require(picture.mode[0] not in "IF", f"cannot read the image {file}: more than 8 bits per channel")
            ImageOps.exif_transpose(picture, in_place=True)
            mode = "RGB" if channels == 3 else "L"
            picture.load()
            return picture if picture.mode == mode else picture.convert(mode)                 # convert() always copies
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"cannot read the image {file}: {error}", status=1) from None


def fit(picture, size):
    """The middle of a picture as uint8 (C, S, S): shorter side to S 256/224 (bicubic), centre crop; S x S stays as is."""
    if picture.size != (size, size):
        picture = T.center_crop(T.resize(picture, round(size * 256 / 224), T.InterpolationMode.BICUBIC), [size, size])
    return T.pil_to_tensor(picture)


class ResizedCrop(v2.RandomResizedCrop):
    """torchvision's random resized crop, bicubic, of a PIL image -> uint8 (C, S, S), but faster (tests/bench.py --stage data).

    It leaves the resizing to torch, which has antialiased bicubic on bytes; results agree with PIL's to 40 dB PSNR or better.
    """
    def transform(self, picture, params):
        top, left, height, width = (params[key] for key in ("top", "left", "height", "width"))
        part = T.pil_to_tensor(picture.crop((left, top, left + width, top + height)))
        return F.interpolate(part[None], self.size, mode="bicubic", antialias=True)[0]


class Images(torch.utils.data.Dataset):
    """One split of a data set: image i is read(i), uint8 (C, S, S) with `levels` for white, of class labels[i].

    Small images are held in memory, as `pixels` (M, C, S, S), the others read from `files`. A batch is augmented by
    augment(pixels, uniforms (b, 4)) in memory, by augment(PIL image) from files; both draw from (seed, epoch, i) alone.
    """

    def __init__(self, labels, classes, size, channels, pixels=None, files=None, levels=255):
        self.labels, self.classes, self.size, self.channels, self.levels = labels, classes, size, channels, levels
        self.pixels, self.files, self.augment, self.seed = pixels, files, None, 0

    def __len__(self):
        return len(self.labels)

    def subset(self, index):
        pixels = None if self.pixels is None else self.pixels[index.to(self.pixels.device)]
        files = None if self.files is None else [self.files[i] for i in index.tolist()]
        return Images(self.labels[index], self.classes, self.size, self.channels, pixels, files, self.levels)

    def read(self, i):
        return fit(open_picture(self.files[i], self.channels), self.size) if self.files else self.pixels[i]

    def __getitems__(self, positions):
        epoch, index = positions[0][0], torch.tensor([i for _, i in positions])
        if self.files is None:
            pixels = self.pixels[index.to(self.pixels.device)]
            if self.augment:
                pixels = self.augment(pixels, epoch_draws(len(self), self.seed, epoch)[1][index].to(pixels.device))
            return pixels, self.labels[index]
        pixels = []
        for i in index.tolist():
            torch.manual_seed(seed_of(self.seed, epoch, i))
            pixels.append(self.augment(open_picture(self.files[i], self.channels)) if self.augment else self.read(i))
        return torch.stack(pixels), self.labels[index]

    def load(self, positions, device, workers=0):
        """Batches (pixels (b, C, S, S) uint8, labels (b,)) on `device`, one for each list of (epoch, i)."""
        workers = workers if self.files else 0
        for pixels, labels in torch.utils.data.DataLoader(
                self, batch_sampler=positions, collate_fn=tuple, num_workers=workers,
                pin_memory=device.type == "cuda" and workers > 0, prefetch_factor=4 if workers else None):
            yield pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def training_positions(size, batch, device_batch, start, steps, seed, rank, world):
    """Yield [(epoch, image), ...] for every micro-batch of this rank in steps start..steps - 1.

    Step s takes the next `batch` images of its epoch's order, whatever the number of processes, and deals them to the
    ranks in device batches, one micro-batch after the other. What does not fill a batch at an epoch's end is left out.
    """
    for step in range(start, steps):
        epoch, place = divmod(step, size // batch)
        share = epoch_draws(size, seed, epoch)[0][place * batch:(place + 1) * batch].tolist()
        for first in range(rank * device_batch, batch, world * device_batch):
            yield [(epoch, image) for image in share[first:first + device_batch]]


def run_flags(parser):
    """Declare the flags that all stages share: where and how to run."""
    parser.flag("--out", str, "run directory")
    parser.flag("--resume", str, "auto: continue an unfinished run; never: refuse", choices=("auto", "never"), default="auto")
    parser.flag("--overwrite", bool, "delete this stage's earlier files in the run directory", default=False)
    parser.flag("--device", str, "where to run", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.flag("--dtype", str, "auto: bf16 autocast where that is faster", choices=("auto", "fp32", "bf16"), default="auto")
    parser.flag("--compile", bool, "torch.compile (None: on GPUs)")


def training_flags(parser, recipes):
    """Declare the flags that pre-training and fine-tuning share."""
    positive, not_negative = number(int, least=1), number(float, least=0)
    parser.flag("--recipe", str, ", ".join(recipes))
    parser.flag("--dataset", str, "digits, cifar10, or folder: class folders in DATA_PATH/train and DATA_PATH/{val,test}")
    parser.flag("--data-path", str, "where the data set lies")
    parser.flag("--image-size", positive, "resolution at which noise is added, in pixels")
    parser.flag("--normalisation", str, f"mean and standard deviation of {', '.join(NORMALISATION)}")
    parser.flag("--model", str, ", ".join(SIZES))
    parser.flag("--model-size", positive, "resolution to which the model resizes, in pixels (None: not at all)")
    parser.flag("--batch", positive, "effective batch, images")
    parser.flag("--device-batch", positive, "largest batch of one process at a time, images")
    parser.flag("--epochs", number(float, above=0), "epochs")
    parser.flag("--warmup-epochs", not_negative, "epochs of linear warm-up")
    parser.flag("--base-lr", number(float, above=0), "learning rate per 256 images of the effective batch")
    parser.flag("--weight-decay", not_negative, "AdamW's")
    parser.flag("--seed", number(int, least=0), "of initialisation, data order, augmentation, noise and masks", default=0)
    parser.flag("--log-every", positive, "steps between log rows")
    parser.flag("--save-every", positive, "steps between checkpoints (written together with a log row)")
    run_flags(parser)
    parser.flag("--deterministic", bool, "deterministic kernels only: on a GPU, too, the same command gives the same bits",
                default=False)
    parser.flag("--recompute", bool, "recompute activations in the backward pass, to save memory", default=False)
    parser.flag("--workers", number(int, least=0), "processes that read picture files, per process", default=8)
    parser.flag("--dry-run", bool, "print settings, sizes and costs, run one step, and exit", default=False)


# ---------------------------------------------------------------------------------------------------------------------
# Shared by the three stages: usage errors, processes, files, data sets. No equation below: a reader of the paper is done.
# ---------------------------------------------------------------------------------------------------------------------

class UsageError(Exception):
    """One line for the user. `status` is the exit status: 2 where nothing was done, 1 where a run broke."""
    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status
def require(condition, message):
    if not condition:
        raise UsageError(message)
def choose(kind, name, table):
    close = difflib.get_close_matches(str(name), table, n=1)
    require(name in table, f"unknown {kind} {name!r}: {f'did you mean {close[0]!r}?' if close else list(table)}")
    return table[name]

class Parser(argparse.ArgumentParser):
    """argparse with a recipe's values as defaults, every default in --help, and errors of one line."""
    def __init__(self, doc=None, recipe=(), **more):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **more)
        self.set_defaults(**dict(recipe))

    def flag(self, name, kind, text, **more):
        kind = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        self.add_argument(name, help=f"{text} (default: %(default)s)", **kind, **more)

    def error(self, message):
        raise UsageError(message)

def number(kind, above=-math.inf, least=-math.inf, below=math.inf):
    """An argparse type: an int or a float with above < x < below and least <= x."""
    def number(text):                                                 # argparse says "invalid number value"
        if above < kind(text) < below and least <= kind(text):
            return kind(text)
        limits = [f"{word} {x:g}" for word, x in (("above", above), ("at least", least), ("below", below)) if abs(x) < math.inf]
        raise argparse.ArgumentTypeError(f"must be {' and '.join(limits) or 'finite'}, not {text}")
    return number

def keep_memory():
    """Let this process keep what it frees, in huge pages, where malloc is glibc's. Otherwise it returns large tensors' pages
    to the system and faults them in again in every layer, which can take longer than the arithmetic (results/speed.md)."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")                # torch looks at its first tensor
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for option, value in ((-4, 0), (-1, 2**31 - 1)) if mallopt else ():                   # M_MMAP_MAX, M_TRIM_THRESHOLD
        mallopt(option, value)

INTERRUPT = []                                   # the number of a SIGTERM or SIGINT; loops look here when they can stop
def command(main):
    """Decorates a stage's main(argv=None): errors become one line; in a Run, a signal waits until a loop sees it."""
    def note(number, frame):
        if not Run.begun:                        # there is nothing to lose yet
            raise SystemExit(128 + number)
        if INTERRUPT:                            # a terminal sends one to all, and torchrun passes on its own: one stop
            signal.signal(number, signal.SIG_DFL)                                         # a third one ends at once
        INTERRUPT.append(number)

    @functools.wraps(main)
    def run(argv=None):
        keep_memory()
        INTERRUPT.clear()
        Run.begun = False
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return main(sys.argv[1:] if argv is None else argv)
        except (UsageError, OSError) as error:                  # a data worker's error comes wrapped in its traceback
            line = str(error).strip().splitlines()[-1].removeprefix("model.UsageError: ")
            print(f"{Path(main.__code__.co_filename).name}: error: {line}", file=sys.stderr, flush=True)
            raise SystemExit(getattr(error, "status", 2 if isinstance(error, FileNotFoundError) else 1)) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return run

def start_processes(device="auto", timeout=None):
    """(rank, world, device); joins torchrun's process group: gloo for tensors on CPUs, NCCL for those on GPUs."""
    rank, local, world = (int(os.environ.get(*of)) for of in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    there = {"cuda": torch.cuda.device_count() > local, "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name in there if there[name]) if device == "auto" else device
    require(there[device], f"there is no {device} device for local process {local}")
    torch.cuda.set_device(local if device == "cuda" else -1)                              # -1 does nothing
    if world > 1 and not dist.is_initialized():
        count = os.environ.get("TORCHELASTIC_RESTART_COUNT" if os.environ.get("LOCAL_WORLD_SIZE") == str(world) else "", "0")
        store = dist.PrefixStore(count, next(dist.rendezvous("env://"))[0])       # or a restart would find the dead's addresses
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", None, timeout, world, rank, store)
    return rank, world, torch.device(device, local if device == "cuda" else None)

def gather(values, world):
    """A few numbers of every rank, (number of values, world), on the CPU; also the place where ranks wait for each other."""
    parts = [torch.tensor(values, dtype=torch.float64) for _ in range(world)]
    if world > 1:
        dist.all_gather(parts, parts[0].clone())
    return torch.stack(parts, dim=1)

def write_atomically(path, write):
    """write(temporary path), then rename: whoever looks, after a crash too, finds the old file or the new, never half."""
    temporary = Path(f"{path}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                                              # torch.save raises either
        temporary.unlink(missing_ok=True)
        raise UsageError(f"cannot write {path}: {str(error).splitlines()[0]}", status=1) from None
def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

class Run:
    """A stage's files in a run directory, in rank 0's hands: NAME.json (settings), NAME.jsonl (log), NAME.last.pt (to
    resume from), and the result, NAME.pt or NAME.tsv, which says by being there that the stage is done."""
    def __init__(self, out, name, settings, free, rank, world, suffix=".pt", resume="auto", overwrite=False):
        self.stem, self.rank, self.rows, self.start, problem = f"{out}/{name}", rank, 0, time.time(), [None]
        self.settings, self.log_file, self.last, self.result = map(self.file, (".json", ".jsonl", ".last.pt", suffix))
        if rank == 0:
            try:
                self._open(json.loads(json.dumps(settings)), free, resume, overwrite)
            except (UsageError, OSError) as error:
                problem = [UsageError(str(error))]
        if world > 1:
            dist.broadcast_object_list(problem, device=torch.device("cpu"))
        if problem[0]:
            raise problem[0]
        self.done, Run.begun = self.result.exists(), True

    def file(self, end):
        return Path(self.stem + end)

    def _open(self, settings, free, resume, overwrite):
        self.result.parent.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.result.parent / f".{Path(self.stem).name}.lock", "a+")      # noqa: SIM115 held to the end
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.seek(0)
            raise UsageError(f"{self.stem} is in use by {self.lock.read().strip() or 'another process'}") from None
        self.lock.truncate(0)
        print(f"process {os.getpid()} on {os.uname().nodename}", file=self.lock, flush=True)
        own = self.settings, self.log_file, self.last, self.result, *self.result.parent.glob(f"{self.result.name}.part*")
        for file in own if overwrite else ():
            file.unlink(missing_ok=True)
        if self.settings.exists():
            before = json.loads(self.settings.read_text())
            other = [f"{key} {before.get(key)} -> {settings.get(key)}" for key in sorted({*before, *settings})
                     if key not in free and before.get(key) != settings.get(key)]
            require(not other, f"{self.stem} has other settings ({', '.join(other)}): use another --out, or --overwrite")
            require(resume == "auto" or self.result.exists(), f"{self.stem} is unfinished: --resume auto or --overwrite")
        if not self.result.exists():
            write_atomically(self.settings, lambda path: path.write_text(json.dumps(settings, indent=1) + "\n"))

    def load(self):
        """What save() kept last, or None. The log is cut back to the rows of that moment."""
        state = read_checkpoint(self.last) if self.last.exists() else None
        if self.rank == 0:
            rows = self.log_file.read_text().splitlines(True)[:state["rows"]] if state else []
            self.rows, self.start = len(rows), time.time() - (json.loads(rows[-1])["time"] if rows else 0)
            write_atomically(self.log_file, lambda path: path.write_text("".join(rows)))
        return state

    def log(self, **row):
        """Append a row to the log, with the seconds since the start (less the pauses), and return it."""
        row["time"], self.rows = round(time.time() - self.start, 3), self.rows + 1
        if self.rank == 0:
            with open(self.log_file, "a") as file:
                file.write(json.dumps(row) + "\n")
        return row

    def save(self, path, model, **rest):
        """Write a checkpoint, unless something in the model is not finite."""
        if self.rank == 0:
            for key in (key for key, value in model.items() if not value.isfinite().all()):
                raise UsageError(f"{key} is not finite: nothing saved, what {self.last} holds stays", status=1)
            write_atomically(path, lambda temporary: torch.save({"model": model, "rows": self.rows, **rest}, temporary))

def open_images(dataset, data_path, split, image_size, channels, holdout=0.0, device="cpu"):
    """The split "train", "holdout" (a fixed random share of the training images, missing from "train") or "test" of digits
    (scikit-learn's, 8 x 8, 0..16; the last 360, by other writers, are the test set), cifar10 (torchvision's) or folder: class
    folders in data_path/train and data_path/{val,test}; pictures of at most 64 pixels are kept in memory."""
    choose("data set", dataset, dict.fromkeys(("digits", "cifar10", "folder")))
    if dataset == "digits":
        digits, part = load_digits(), slice(-360, None) if split == "test" else slice(-360)
        images = Images(torch.as_tensor(digits.target[part]).long(), [str(name) for name in digits.target_names], 8, 1,
                        torch.as_tensor(digits.images[part], dtype=torch.uint8)[:, None], levels=16)
    elif dataset == "cifar10":
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            CIFAR10(data_path, download=True)
        gather([0], int(os.environ.get("WORLD_SIZE", 1)))
        part = CIFAR10(data_path, train=split != "test")
        images = Images(torch.tensor(part.targets), part.classes, 32, 3, torch.from_numpy(part.data).movedim(3, 1).clone())
    else:
        roots = {name: Path(data_path or "--data-path", name) for name in ("train", "val", "test")}
        found = [name for name, root in roots.items() if root.is_dir()]
        require("train" in found, f"there is no folder {roots['train']}")
        require(len(found) > 1, f"there is no folder {roots['val']} or {roots['test']}")
        part = ImageFolder(roots["train" if split != "test" else found[1]])
        folders = {os.path.dirname(file) for file, _ in part.samples}
        require(len({*map(os.path.realpath, folders)}) == len(folders), f"{data_path} reaches a folder twice (a link's loop?)")
        images = Images(torch.tensor(part.targets), part.classes, image_size, channels, files=[f for f, _ in part.samples])
        if image_size <= 64:
            images.pixels, images.files = torch.stack([images.read(i) for i in range(len(images))]), None
    require((images.size, images.channels) == (image_size, channels), f"{dataset} has images of {images.channels} x "
            f"{images.size} x {images.size}, the model takes {channels} x {image_size} x {image_size}")
    if split != "test" and holdout:
        held = round(holdout * len(images)) if holdout < 1 else int(holdout)
        require(0 < held < len(images), f"cannot hold out {held} of {len(images)} training images")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        images = images.subset((order[:held] if split == "holdout" else order[held:]).sort().values)
    images.pixels = None if images.pixels is None else images.pixels.to(device)
    return images
