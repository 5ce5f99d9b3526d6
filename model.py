"""The networks of Denoising Masked Autoencoders (DMAE; Wu et al., ICLR 2023, arXiv 2210.06983).

Pre-training corrupts an image x in [0, 1] twice, by Gaussian noise in pixel space and by dropping
patches, and asks for the clean image back:

    x  ->  x + sigma * N(0, I)  ->  resize, normalise  ->  patches  ->  encoder on the kept ones
       ->  decoder on all  ->  mean squared error against the clean patches, kept *and* dropped.

Afterwards the decoder is thrown away, and the encoder becomes the classifier f of the smoothed
classifier g(x) = argmax_c P[f(x + N(0, sigma^2 I)) = c]. Everything about pixels (resize, mean,
std) lives inside the networks: sigma and radii are in units of the data set's own images.

    from model import build_dmae, build_vit, load_encoder
    dmae = build_dmae("vit_base_patch16")                      # 111.9M parameters
    loss, prediction, mask = dmae(images, sigma=0.25, mask_ratio=0.75)
    vit = build_vit("vit_base_patch16", num_classes=1000)      # 86.6M parameters
    load_encoder(vit, "pretrain.pt")                           # ours, the authors', MAE's, timm's

Axes:  B images   C channels   H W pixels   N patches (h x w)   K kept patches   D width
       P patch side

What is wrong with an argument or a file is a ValueError of one sentence.
Read down to "Named sizes": the rest is names, and reading and writing files.
"""

import math
import re
import types
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors.torch import load_file
from torch import nn

NORMALISATION = {                        # mean and standard deviation of training pixels in [0, 1]
    "digits": dict(mean=(0.3054,), std=(0.3755,)),
    "mnist": dict(mean=(0.1307,), std=(0.3081,)),
    "fashion-mnist": dict(mean=(0.2860,), std=(0.3530,)),
    "cifar10": dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616)),
    "imagenet": dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
}


# --------------------------------------------------------------------------------------------------
# Patches, positions, masks
# --------------------------------------------------------------------------------------------------


def patchify(images, patch_size):
    """Images (B, C, H, W) -> patches (B, N, P*P*C): row, column, channel (notebook 03, (3.3))."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches, patch_size, grid):
    """Patches (B, N, P*P*C) of an h x w `grid` -> images (B, C, H, W) (notebook 03, (3.3))."""
    sides = dict(h=grid[0], w=grid[1], p=patch_size, q=patch_size)
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", **sides)


def sincos_positions(dim, grid):
    """The fixed 2-D sin-cos table (1, 1 + N, D), its first row (the class token's) zero.

    With omega_i = 10000^(-i / (D/4)), a patch in row y and column x gets [sin(x w), cos(x w),
    sin(y w), cos(y w)], the order of the published checkpoints (He et al. 2022, arXiv 2111.06377,
    section 3; Vaswani et al. 2017, section 3.5). (notebook 03, (3.5))
    """
    if dim % 4:
        raise ValueError(f"2-D sin-cos positions need a width divisible by 4, not {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")                      # h w each
    x_angles = x.flatten()[:, None] * omega                                  # N D/4
    y_angles = y.flatten()[:, None] * omega                                  # N D/4
    table = torch.cat([x_angles.sin(), x_angles.cos(), y_angles.sin(), y_angles.cos()], dim=1)
    table = F.pad(table, (0, 0, 1, 0))                                       # 1+N D
    return table[None].to(torch.get_default_dtype())                         # 1 1+N D


def interpolate_positions(positions, grid):
    """Resample a table (1, 1 + N', D) of a square grid to another `grid`, bicubic; row 0 stays."""
    patches = positions.shape[1] - 1
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"{patches} positions do not form a square grid")
    table = rearrange(positions[:, 1:], "1 (h w) d -> 1 d h w", h=side)
    table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], rearrange(table, "1 d h w -> 1 (h w) d")], dim=1)


def random_masking(mask_noise, mask_ratio):
    """Keep int(N (1 - mask_ratio)) patches an image, those with the smallest `mask_noise` (B, N).

    Returns keep (B, K), the kept patches' indices; restore (B, N), where each patch stands in
    "kept, then dropped"; and mask (B, N), 1 = dropped, 0 = kept. (notebook 03, (3.7))
    """
    kept = int(mask_noise.shape[1] * (1 - mask_ratio))
    shuffle = mask_noise.argsort(dim=1)                                      # B N, kept ones first
    restore = shuffle.argsort(dim=1)                                         # B N, its inverse
    mask = (restore >= kept).to(mask_noise.dtype)                            # B N, 1 = dropped
    return shuffle[:, :kept], restore, mask


def standardise_patches(patches):
    """norm-pix (MAE, 4.1): each patch by its mean and variance (notebook 03, (3.18))."""
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True)                             # unbiased
    return (patches - mean) / (variance + 1e-6).sqrt()


# --------------------------------------------------------------------------------------------------
# Transformer
# --------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v in each head; (B, N, D) (notebook 03, (3.9), (3.10))."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x)                                                    # B N 3D
        apart = "b n (three heads d) -> three b heads n d"
        q, k, v = rearrange(qkv, apart, three=3, heads=self.heads)           # B heads N d
        x = F.scaled_dot_product_attention(q, k, v)                          # B heads N d
        return self.proj(rearrange(x, "b heads n d -> b n (heads d)"))       # B N D


class Block(nn.Module):
    """Pre-norm; in training branches drop with chance drop_path (notebook 03, (3.12))."""

    def __init__(self, dim, heads, mlp_ratio=4.0, drop_path=0.0):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, hidden),
            act=nn.GELU(),
            fc2=nn.Linear(hidden, dim),
        ))
        self.drop_path = drop_path

    def stochastic_depth(self, branch):
        """Drop it for some images, scale up the others (Huang et al. 2016) (notebook 04, (4.5))."""
        if not self.training or self.drop_path == 0:
            return branch
        survive = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * survive / (1 - self.drop_path)

    def forward(self, x):
        x = x + self.stochastic_depth(self.attn(self.norm1(x)))
        return x + self.stochastic_depth(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    """What autoencoder and classifier share: pixels in [0, 1] to tokens with positions; the blocks.

    Images of another size than `image_size` are resized (bicubic) before normalisation: with
    CIFAR-10 at 224 the noise, and so sigma and the radius, belong to the 32 x 32 image (paper,
    section 4.3).
    """

    def __init__(
        self, image_size, patch_size, channels, dim, depth, heads, mean, std,
        mlp_ratio=4.0, drop_path=0.0,
    ):
        super().__init__()
        self.image_size = image_size
        self.patch_size = patch_size
        self.grid = (image_size // patch_size, image_size // patch_size)

        # Constants, not weights: state dicts keep the published names.
        self.register_buffer("mean", torch.tensor(mean).view(channels, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(channels, 1, 1), persistent=False)

        # A linear map of each patch: a convolution for the published name and shape of its weight.
        projection = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=projection))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_positions(dim, self.grid), requires_grad=False)

        # Deeper blocks drop more.
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, rate) for rate in rates)

    def initialise(self):
        """Xavier for linear maps (the patch embedding, too), zero biases, N(0, 0.02^2) tokens."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("token"):
                nn.init.normal_(parameter, std=0.02)

    def prepare(self, images):
        """Resize, normalise: (B, C, any, any) -> (B, C, H, W) (notebook 01, (1.12), (1.13))."""
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
        return (images - self.mean) / self.std

    def embed(self, images):
        """Images -> patch tokens with positions (B, N, D) (notebook 03, (3.4))."""
        tokens = self.patch_embed(self.prepare(images))                      # B D h w
        return rearrange(tokens, "b d h w -> b (h w) d") + self.pos_embed[:, 1:]

    def with_cls(self, tokens):
        """Prepend the class token: (B, n, D) -> (B, 1 + n, D)."""
        cls = repeat(self.cls_token + self.pos_embed[:, :1], "1 1 d -> b 1 d", b=len(tokens))
        return torch.cat([cls, tokens], dim=1)


class VisionTransformer(Encoder):
    """The base classifier f: images (B, C, H, W) in [0, 1] -> logits (B, num_classes).

    pool = "mean": mean of the patch tokens -> `fc_norm` -> head. pool = "cls": all tokens -> `norm`
    -> class token -> head. probe = True puts a BatchNorm without parameters before the linear head
    (the linear probe of paper section 4.4).
    """

    def __init__(self, *, dim, num_classes, pool="mean", probe=False, **encoder):
        super().__init__(dim=dim, **encoder)
        self.pool = pool
        self.pos_embed.requires_grad = True                                  # trained, too
        if pool == "mean":
            self.fc_norm = nn.LayerNorm(dim, eps=1e-6)
        else:
            self.norm = nn.LayerNorm(dim, eps=1e-6)
        linear = nn.Linear(dim, num_classes)
        if probe:
            self.head = nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), linear)
        else:
            self.head = linear
        self.initialise()
        nn.init.trunc_normal_(linear.weight, std=0.01 if probe else 2e-5)

    def features(self, images):
        """What the head sees: (B, C, H, W) -> (B, D) (notebook 03, (3.13))."""
        x = self.with_cls(self.embed(images))                                # B 1+N D
        for block in self.blocks:
            x = block(x)                                                     # B 1+N D
        if self.pool == "mean":
            return self.fc_norm(x[:, 1:].mean(dim=1))                        # B D
        return self.norm(x[:, 0])                                            # B D

    def forward(self, images):
        return self.head(self.features(images))                              # B classes


class DenoisingMaskedAutoencoder(Encoder):
    """DMAE (paper, section 3.2): the clean image from a noisy one, most patches dropped.

    loss_on = "all" is the paper's loss; "dropped", with sigma = 0, is the plain masked autoencoder
    (MAE).
    """

    def __init__(
        self, *, dim, channels, patch_size, decoder_dim, decoder_depth, decoder_heads,
        mlp_ratio=4.0, norm_pix=True, loss_on="all", **encoder,
    ):
        shared = dict(channels=channels, patch_size=patch_size, mlp_ratio=mlp_ratio)
        super().__init__(dim=dim, **shared, **encoder)
        self.norm_pix = norm_pix
        self.loss_on = loss_on
        self.norm = nn.LayerNorm(dim, eps=1e-6)

        positions = sincos_positions(decoder_dim, self.grid)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, decoder_heads, mlp_ratio) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, patch_size**2 * channels)
        self.initialise()

    def encode(self, noisy, mask_ratio, mask_noise):
        """Noisy images -> latent (B, 1+K, D), restore, mask (B, N) (notebook 03, (3.14))."""
        x = self.embed(noisy)                                                # B N D
        keep, restore, mask = random_masking(mask_noise, mask_ratio)         # B K, B N, B N
        x = x.gather(1, repeat(keep, "b k -> b k d", d=x.shape[-1]))         # B K D
        x = self.with_cls(x)                                                 # B 1+K D
        for block in self.blocks:
            x = block(x)                                                     # B 1+K D
        return self.norm(x), restore, mask

    def decode(self, latent, restore):
        """Latent (B, 1 + K, D) -> all patches, predicted (B, N, P*P*C) (notebook 03, (3.15))."""
        x = self.decoder_embed(latent)                                       # B 1+K D'
        cls, kept = x[:, :1], x[:, 1:]
        dropped = restore.shape[1] - kept.shape[1]
        mask_tokens = self.mask_token.to(x.dtype).expand(len(x), dropped, -1)         # B N-K D'
        x = torch.cat([kept, mask_tokens], dim=1)                            # B N D', kept first
        x = x.gather(1, repeat(restore, "b n -> b n d", d=x.shape[-1]))      # B N D', in order
        x = torch.cat([cls, x], dim=1) + self.decoder_pos_embed              # B 1+N D'
        for block in self.decoder_blocks:
            x = block(x)                                                     # B 1+N D'
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]                # B N P*P*C

    def target(self, images):
        """The patches to predict (B, N, P*P*C), from *clean* images."""
        patches = patchify(self.prepare(images), self.patch_size)
        return standardise_patches(patches) if self.norm_pix else patches

    def loss(self, target, prediction, mask):
        """Mean square, over all patches or dropped ones (notebook 03, (3.16), (3.17))."""
        error = (prediction - target).square().mean(dim=-1)                  # B N
        if self.loss_on == "all":
            return error.mean()
        return (error * mask).sum() / mask.sum()

    def forward(self, images, sigma, mask_ratio, noise=None, mask_noise=None):
        """Clean images (B, C, H, W) in [0, 1] -> loss, prediction (B, N, P*P*C), mask (B, N).

        noise (B, C, H, W) ~ N(0, 1) and mask_noise (B, N) ~ U(0, 1) are drawn here, in this order,
        unless given. In the mask 1 = dropped. (notebook 03, (3.1), (3.2))
        """
        if noise is None:
            noise = torch.randn_like(images)
        if mask_noise is None:
            mask_noise = torch.rand(len(images), math.prod(self.grid), device=images.device)
        noisy = images + sigma * noise
        latent, restore, mask = self.encode(noisy, mask_ratio, mask_noise)
        prediction = self.decode(latent, restore)
        return self.loss(self.target(images), prediction, mask), prediction, mask


# --------------------------------------------------------------------------------------------------
# Named sizes
# --------------------------------------------------------------------------------------------------

CIFAR = dict(image_size=32, patch_size=4, channels=3)
IMAGENET = dict(                                               # as published
    image_size=224, patch_size=16, channels=3, decoder_dim=512, decoder_depth=8, decoder_heads=16,
)
SIZES = {
    "vit_digits": dict(
        image_size=8, patch_size=2, channels=1, dim=64, depth=3, heads=2, mlp_ratio=2.0,
        decoder_dim=32, decoder_depth=1, decoder_heads=2,
    ),
    "vit_fashion": dict(
        image_size=28, patch_size=7, channels=1, dim=128, depth=4, heads=4,
        decoder_dim=64, decoder_depth=1, decoder_heads=2,
    ),
    "vit_cifar_tiny": dict(
        CIFAR, dim=128, depth=4, heads=4, decoder_dim=96, decoder_depth=1, decoder_heads=3,
    ),
    "vit_cifar_small": dict(
        CIFAR, dim=256, depth=8, heads=4, decoder_dim=128, decoder_depth=1, decoder_heads=4,
    ),
    "vit_cifar": dict(
        CIFAR, dim=384, depth=12, heads=6, decoder_dim=192, decoder_depth=2, decoder_heads=3,
    ),
    "vit_base_patch16": dict(IMAGENET, dim=768, depth=12, heads=12),
    "vit_large_patch16": dict(IMAGENET, dim=1024, depth=24, heads=16),
    "vit_huge_patch14": dict(IMAGENET, patch_size=14, dim=1280, depth=32, heads=16),
}


def build_dmae(name, **overrides):
    """A DenoisingMaskedAutoencoder of a named size, arguments replaced; .config rebuilds it."""
    return _build(DenoisingMaskedAutoencoder, name, overrides)


def build_vit(name, num_classes, **overrides):
    """A VisionTransformer of a named size, arguments replaced; .config rebuilds it."""
    return _build(VisionTransformer, name, {"num_classes": num_classes} | overrides)


def _build(network, name, overrides):
    if name not in SIZES:
        raise ValueError(f"unknown model {name!r}: there are {', '.join(SIZES)}")
    config = SIZES[name]
    if network is VisionTransformer:
        config = {key: value for key, value in config.items() if not key.startswith("decoder_")}
    config = config | overrides
    config = NORMALISATION["imagenet" if config["channels"] == 3 else "digits"] | config
    size, patch, channels = (config[key] for key in ("image_size", "patch_size", "channels"))
    if size < patch or size % patch:
        raise ValueError(f"image size {size} is not a multiple of the patch size {patch}")
    if {len(config["mean"]), len(config["std"])} != {channels}:
        raise ValueError(f"mean and std must have a value for each of {channels} channels")
    model = network(**config)
    model.config = config
    return model


# --------------------------------------------------------------------------------------------------
# How they are trained: which parameters decay, and the learning rate. Pure functions.
# --------------------------------------------------------------------------------------------------


def decays(name, parameter):
    """Weight decay is for matrices, not for biases and norms (1-D), learned tokens, positions."""
    return parameter.ndim > 1 and not name.endswith(("token", "pos_embed"))


def learning_rate(step, steps, warmup, peak, minimum=0.0):
    """Linear from 0 to `peak`, then half a cosine to `minimum` at `steps` (notebook 03, (3.20))."""
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / (steps - warmup)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


# --------------------------------------------------------------------------------------------------
# Weights in and out
# --------------------------------------------------------------------------------------------------

HUGGING_FACE = (        # ViTMAE's and ViT's names -> ours, one after the other
    (r"^vit\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"^decoder\.(decoder_layers|decoder_encoder\.layer)\.", "decoder_blocks."),
    (r"^decoder\.", ""),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.", r".attn.\2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)


def read_checkpoint(path, kind=None):
    """The dict {"model": state dict, ...} of a file, on the CPU; never code that would run.

    Weights may lie in an entry of the file or bare, in a .safetensors file, under a prefix that a
    wrapper put before all names, or under Hugging Face's names: "model" has ours. kind: "pretrain"
    or "finetune", to accept a checkpoint of that stage of ours only.
    """
    content = read_file(path)
    entries = [content.get(key) for key in ("model", "state_dict", "model_ema")]      # these first
    entries += [*content.values(), content]
    dicts = [entry for entry in entries if isinstance(entry, dict)]
    state = next((s for s in map(our_names, dicts) if "patch_embed.proj.weight" in s), None)
    if state is None:
        found = [*map(str, next(filter(None, map(our_names, dicts)), content))] or ["nothing"]
        raise ValueError(f"{path} holds no vision transformer (cls_token, patch_embed.proj.weight, "
                         f"blocks.0.norm1.weight, ...), but {', '.join(found[:4])}")
    if "dist_token" in state:
        raise ValueError(f"{path} is a distilled DeiT, which has a token and a head more: take a "
                         "plain one, or give certify.py a --classifier that builds it")
    ours = {"config", "data", "settings"} <= content.keys()
    if kind and not (ours and content.get("kind") == kind):
        raise ValueError(f"{path} is not a checkpoint of {kind}.py (others' classifiers: vit = "
                         "build_vit(...); load_encoder(vit, FILE) in a file for --classifier)")
    return content | {"model": state}


def read_file(path):
    """What torch.save or safetensors put into a file, as a dict."""
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: name the file in it")
    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint {path}")
    # The published files hold an argparse.Namespace of settings; it is read as a plain record.
    namespace = [(types.SimpleNamespace, "argparse.Namespace")]
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(namespace):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                               # a damaged file can raise anything
        raise ValueError(f"{path} is not a readable checkpoint ({type(error).__name__}); of a "
                         "model that was pickled whole, save the state dict alone") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no weights, but a {type(content).__name__}")
    return content


def our_names(state):
    """A state dict under our names: without wrappers' prefixes, Hugging Face's names translated."""
    state = {str(name): w for name, w in state.items() if isinstance(w, torch.Tensor)}
    state.pop("n_averaged", None)                              # AveragedModel's counter
    while len({name.partition(".")[0] for name in state}) == 1 and all("." in n for n in state):
        state = {name.partition(".")[2]: value for name, value in state.items()}

    if any("patch_embeddings.projection" in name for name in state):
        for theirs, ours in HUGGING_FACE:
            state = {re.sub(theirs, ours, name): value for name, value in state.items()}
        for query in [name for name in state if ".attn.q." in name]:
            parts = [state.pop(query.replace(".q.", f".{part}."), None) for part in "qkv"]
            if all(part is not None for part in parts):
                state[query.replace(".q.", ".qkv.")] = torch.cat(parts)
        state = {name: value for name, value in state.items() if not name.startswith("pooler.")}

    # A table of a square grid alone gets the class token's row, of zeros: (1, 1 + N, D).
    for name in {"pos_embed", "decoder_pos_embed"} & state.keys():
        table = state[name]
        if table.ndim == 3 and math.isqrt(table.shape[1]) ** 2 == table.shape[1]:
            state[name] = F.pad(table, (0, 0, 1, 0))
    return state


def load_weights(model, state, origin, may_miss=(), may_leave=()):
    """Copy `state` into `model`, or raise a ValueError that names what does not fit in `origin`.

    Keys may be missing from `state`, or be left over in it, if they start with one of the given
    prefixes; then positions of another grid are interpolated, too. Returns the lists of both.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    left_over = [key for key in state if key not in own]
    wrong = [f"{key} is missing" for key in missing if not key.startswith(tuple(may_miss))]
    wrong += [f"{key} is unexpected" for key in left_over if not key.startswith(tuple(may_leave))]
    common = {key: state[key] for key in own if key in state}
    for key in [key for key in common if may_leave and key.endswith("pos_embed")]:
        if common[key].ndim == 3 and common[key].shape[1] != own[key].shape[1]:
            common[key] = interpolate_positions(common[key].float(), model.grid)
    for key, value in common.items():
        if value.shape != own[key].shape:
            wrong.append(f"{key} is {tuple(value.shape)}, not {tuple(own[key].shape)}")
        elif value.is_floating_point() != own[key].is_floating_point():
            wrong.append(f"{key} is {value.dtype}, not {own[key].dtype}")
        elif not value.isfinite().all():
            wrong.append(f"{key} is not finite")
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"{origin} does not fit the model: {wrong[0]}{more}")
    model.load_state_dict(common, strict=False)
    return missing, left_over


def load_encoder(vit, path):
    """Start a classifier from pre-trained weights: ours, the published DMAE's, MAE's, or timm's.

    A decoder, a head for other classes and a final norm of the other pooling are left over; the new
    head (and `fc_norm` after pre-training) start fresh. Returns (missing, left over), the two lists
    of keys; anything else that does not fit raises ValueError.
    """
    state = read_checkpoint(path)["model"]
    own = vit.state_dict()
    for key in ("head.weight", "head.bias"):
        if key in state and key in own and state[key].shape != own[key].shape:
            state[f"{key}.of_other_classes"] = state.pop(key)
    replaceable = ("head.", "norm.", "fc_norm.")
    return load_weights(vit, state, path, replaceable, (*replaceable, "decoder_", "mask_token"))


def load_autoencoder(dmae, path):
    """Start pre-training from an autoencoder, or from an encoder, whose decoder then starts fresh.

    A head is left over. Returns and raises as load_encoder().
    """
    state = read_checkpoint(path)["model"]
    decoder = ("decoder_", "mask_token")
    whole = any(name.startswith(decoder) for name in state)
    return load_weights(dmae, state, path, () if whole else decoder, may_leave=("head.",))
