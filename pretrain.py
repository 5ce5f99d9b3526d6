"""Stage 1: pre-train a denoising masked autoencoder (DMAE, section 3.2): x + noise -> mask -> reconstruct x.

    python pretrain.py                                                  # digits, two CPU cores: about a minute
    python pretrain.py --recipe cifar10                                 # one GPU
    torchrun --nproc_per_node=8 pretrain.py --recipe imagenet-base --data-path /data/imagenet
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 pretrain.py --recipe ...
    python pretrain.py --sigma 0 --loss-on dropped --out runs/mae       # the plain masked autoencoder, for comparison

A recipe sets data, model and every hyperparameter; any other flag overrides one. The result is RUN/pretrain.pt, with a
log (pretrain.jsonl) and two pictures beside it. Started again, the command goes on where it was stopped.
"""

import contextlib
import json
import math
import os
import time

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2
from tqdm import tqdm

from model import (
    INTERRUPT,
    NORMALISATION,
    SIZES,
    Parser,
    ResizedCrop,
    Run,
    UsageError,
    build_dmae,
    choose,
    command,
    cost,
    decays,
    gather,
    learning_rate,
    load_weights,
    number,
    open_images,
    pick_dtype,
    read_checkpoint,
    require,
    seed_of,
    sha256,
    share_batch,
    shift_and_flip,
    start_processes,
    training_flags,
    training_positions,
    unpatchify,
)

# ---------------------------------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------------------------------

PAPER = dict(                              # section 4.1 and appendix: ImageNet
    dataset="folder",
    data_path="data/imagenet",             # with train/ and val/ class folders
    image_size=224,                        # resolution at which the noise is added
    normalisation="imagenet",
    holdout=10_000,                        # training images kept for the pictures and for model selection
    augment="resized-crop",                # random resized crop 0.2-1 (bicubic) and flip
    sigma=0.25,                            # noise of the corrupted input, in units of [0, 1] pixels
    mask_ratio=0.75,
    loss_on="all",                         # all patches: DMAE; dropped: MAE
    norm_pix=True,                         # targets standardised patch by patch
    batch=4096,                            # effective, over all processes and accumulated micro-batches
    device_batch=64,                       # at most, per process and micro-batch
    base_lr=1.5e-4,                        # lr = base_lr * batch / 256
    weight_decay=0.05,
    log_every=5,                           # steps
    save_every=100,                        # steps
)
RECIPES = {
    "digits": dict(                        # ours, chosen on held-out training images
        dataset="digits",
        data_path=None,
        model="vit_digits",
        image_size=8,
        normalisation="digits",
        holdout=0.1,
        augment="none",                    # shifts by one pixel of eight made it worse
        sigma=0.25,
        mask_ratio=0.25,
        loss_on="all",
        norm_pix=False,
        batch=128,
        device_batch=128,
        epochs=150,
        warmup_epochs=10,
        base_lr=8e-3,
        weight_decay=0.05,
        log_every=50,
        save_every=500,
    ),
    "cifar10": dict(                       # ours: a small ViT from nothing on one GPU
        dataset="cifar10",
        data_path="data",
        model="vit_cifar",
        image_size=32,
        normalisation="cifar10",
        holdout=0.04,
        augment="shift-flip",              # by up to four pixels
        sigma=0.25,
        mask_ratio=0.75,
        loss_on="all",
        norm_pix=True,
        batch=512,
        device_batch=512,
        epochs=200,
        warmup_epochs=10,
        base_lr=3e-4,
        weight_decay=0.05,
        log_every=50,
        save_every=1000,
    ),
    "cifar10-transfer": dict(PAPER,        # paper, section 4.3: continued from ImageNet (--init CHECKPOINT)
        dataset="cifar10",
        data_path="data",
        model="vit_base_patch16",
        image_size=32,
        model_size=224,                    # the model resizes
        normalisation="cifar10",
        holdout=0.04,
        augment="flip",
        batch=512,
        epochs=50,
        warmup_epochs=10,
        base_lr=5e-5,
    ),
    "imagenet-base": dict(PAPER, model="vit_base_patch16", epochs=1100, warmup_epochs=40),
    "imagenet-large": dict(PAPER, model="vit_large_patch16", epochs=1600, warmup_epochs=40),
    "imagenet-huge": dict(PAPER, model="vit_huge_patch14", epochs=1600, warmup_epochs=40),   # not in the paper's tables
}
FREE = {"data_path", "out", "init", "device", "device_batch", "workers", "compile", "resume", "overwrite", "dry_run",
        "recompute"}                       # may change when a run is continued


def parse(argv):
    first = Parser(add_help=False)
    first.add_argument("--recipe", default="digits")
    recipe = first.parse_known_args(argv)[0].recipe
    parser = Parser(__doc__, choose("recipe", recipe, RECIPES) | dict(recipe=recipe, out=f"runs/{recipe}"))
    not_negative = number(float, least=0)
    parser.flag("--holdout", not_negative, "training images held out for pictures and model selection: share or number")
    parser.flag("--augment", str, "augmentation", choices=("none", "shift", "flip", "shift-flip", "resized-crop"))
    parser.flag("--sigma", not_negative, "standard deviation of the noise, for pixels in [0, 1]")
    parser.flag("--mask-ratio", number(float, least=0, below=1), "share of the patches that are dropped")
    parser.flag("--loss-on", str, "all patches (DMAE) or the dropped ones (MAE)", choices=("all", "dropped"))
    parser.flag("--norm-pix", bool, "standardise each target patch")
    parser.flag("--init", str, "pre-training checkpoint to start from (optimizer and schedule start anew)")
    training_flags(parser, RECIPES)
    args = parser.parse_args(argv)
    choose("model", args.model, SIZES)
    choose("normalisation", args.normalisation, NORMALISATION)
    require(args.mask_ratio > 0 or args.loss_on == "all", "--loss-on dropped needs a --mask-ratio above 0")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def make_augment(kind, size, from_files):
    """The augmentation called `kind`: of batches in memory, or ("resized-crop") of single pictures from files."""
    if kind == "none":
        return None
    require((kind == "resized-crop") == from_files,
            f"--augment {kind} is for pictures of {'at most' if from_files else 'more than'} 64 pixels")
    if kind == "resized-crop":
        return v2.Compose([ResizedCrop(size, scale=(0.2, 1)), v2.RandomHorizontalFlip()])
    return shift_and_flip(size // 8 if "shift" in kind else 0, "flip" in kind)


def draw_corruption(images, patches, *position):
    """Noise (B, C, H, W) and mask_noise (B, N) of a position (seed, step, micro-batch, rank)."""
    torch.manual_seed(seed_of(*position))
    return torch.randn_like(images), torch.rand(len(images), patches, device=images.device)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def reconstruct(model, clean, prediction):
    """Predicted patches (B, N, P*P*C) as images (B, C, H, W) in [0, 1]; norm-pix is undone with the clean patches."""
    if model.norm_pix:
        model.norm_pix = False
        target = model.target(clean)
        model.norm_pix = True
        prediction = prediction * (target.var(-1, keepdim=True) + 1e-6).sqrt() + target.mean(-1, keepdim=True)
    return (unpatchify(prediction, model.patch_size, model.grid) * model.std + model.mean).clamp(0, 1)


@torch.no_grad()
def draw_reconstructions(path, model, clean, sigma, mask_ratio, seed):
    """A grid with a column per image: clean, noisy, noisy and masked (dropped patches grey), reconstruction."""
    noise, mask_noise = draw_corruption(clean, math.prod(model.grid), seed)
    _, prediction, mask = model.eval()(clean, sigma, mask_ratio, noise, mask_noise)
    model.train()
    pixels = repeat(mask, "b n -> b n d", d=model.patch_size**2 * clean.shape[1])
    mask = F.interpolate(unpatchify(pixels, model.patch_size, model.grid), clean.shape[-2:])
    noisy = clean + sigma * noise
    output = F.interpolate(reconstruct(model, clean, prediction), clean.shape[-2:])
    rows = {"clean": clean, f"noise\n$\\sigma$ = {sigma:g}": noisy,
            f"and {mask_ratio:.0%}\ndropped:\nthe input": noisy * (1 - mask) + 0.5 * mask, "recon-\nstruction": output}
    figure = Figure(figsize=(len(clean), len(rows)))
    axes = figure.subplots(len(rows), len(clean), squeeze=False, gridspec_kw=dict(wspace=0.06, hspace=0.06))
    for line, (title, images) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=10)
        for axis, image in zip(line, rearrange(images.float().cpu().clamp(0, 1), "b c h w -> b h w c").numpy(), strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")


def draw_loss(path, rows):
    figure = Figure(figsize=(6, 3.6))
    axis = figure.subplots()
    axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], color="#0072b2")
    axis.set(xlabel="optimizer step", ylabel="reconstruction loss\n(mean square, normalised pixels)")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


@command
def main(argv):
    args = parse(argv)
    rank, world, device = start_processes(args.device)
    torch.use_deterministic_algorithms(args.deterministic)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")                       # what cuBLAS asks for
    say = print if rank == 0 else lambda *_: None

    # data
    size = SIZES[args.model]
    data = dict(dataset=args.dataset, data_path=args.data_path, image_size=args.image_size, channels=size["channels"],
                holdout=args.holdout)
    train, held = (open_images(split=split, device=device, **data) for split in ("train", "holdout"))
    train.augment, train.seed = make_augment(args.augment, args.image_size, bool(train.files)), args.seed
    device_batch, accumulate = share_batch(args.batch, world, args.device_batch)
    require(len(train) >= args.batch, f"{len(train)} training images are fewer than one batch of {args.batch}")
    per_epoch = len(train) // args.batch
    steps, warmup = int(args.epochs * per_epoch), int(args.warmup_epochs * per_epoch)
    require(steps > 0, f"--epochs {args.epochs:g} makes no step of {args.batch} images")
    peak = args.base_lr * args.batch / 256

    # model
    torch.manual_seed(args.seed)
    normalisation = NORMALISATION[args.normalisation]
    require(len(normalisation["mean"]) == size["channels"],
            f"--normalisation {args.normalisation} is not for {size['channels']} channels")
    model = build_dmae(args.model, image_size=args.model_size or args.image_size, norm_pix=args.norm_pix, loss_on=args.loss_on,
                       **normalisation)
    require(int(math.prod(model.grid) * (1 - args.mask_ratio)) > 0, f"--mask-ratio {args.mask_ratio} keeps no patch at all")
    if args.init:
        load_weights(model, read_checkpoint(args.init)["model"], args.init)
    model.recompute_activations = args.recompute
    model.to(device)
    args.dtype = pick_dtype(args.dtype, model, device, world)
    settings = vars(args) | {"init_sha256": args.init and sha256(args.init)}

    # optimizer
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [dict(params=[p for name, p in named if decays(name, p)], weight_decay=args.weight_decay),
              dict(params=[p for name, p in named if not decays(name, p)], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)

    # one micro-batch
    if args.compile if args.compile is not None else device.type == "cuda":
        model.compile()
    network = DistributedDataParallel(model) if world > 1 else model

    def load_batches(start):
        positions = training_positions(len(train), args.batch, device_batch, start, steps, args.seed, rank, world)
        return train.load(positions, device, args.workers)

    def micro_loss(pixels, *position):
        images = pixels / train.levels                                                    # B C H W in [0, 1]
        noise, mask_noise = draw_corruption(images, math.prod(model.grid), args.seed, *position, rank)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
            return network(images, args.sigma, args.mask_ratio, noise, mask_noise)[0]

    say(f"{args.model}: {sum(p.numel() for _, p in named):,} trained parameters on {world} x {device.type} in "
        f"{args.dtype}; {len(train):,} images; {steps:,} steps of {world} x {accumulate} x {device_batch} = "
        f"{args.batch} images; lr {peak:.3g}")
    if args.dry_run:
        pixels, _ = next(load_batches(0))
        say(json.dumps(settings, indent=1), cost(lambda: micro_loss(pixels, 0, 0), model, device_batch), sep="\n")
        return optimizer.step()

    # run directory
    run = Run(args.out, "pretrain", settings, FREE, rank, world, resume=args.resume, overwrite=args.overwrite)
    if run.done:
        return say(f"{run.result} is done; --out elsewhere or --overwrite to do it again")
    state, start = run.load(), 0
    if state:
        load_weights(model, state["model"], run.last)
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        say(f"continuing {run.last} after step {start}")

    def checkpoint(step, path, **more):
        weights = {name: value.cpu() for name, value in model.state_dict().items()}
        run.save(path, weights, kind="pretrain", config=model.config, data=data | {"classes": train.classes},
                 settings=settings, step=step, **more)

    def pictures():
        if rank == 0:
            rows = [json.loads(row) for row in run.log_file.read_text().splitlines()]
            draw_loss(run.file(".loss.png"), rows)
            some = torch.linspace(0, len(held) - 1, min(10, len(held))).long().tolist()   # class folders are sorted by class
            clean = torch.stack([held.read(i) for i in some]).to(device) / held.levels
            draw_reconstructions(run.file(".png"), model, clean, args.sigma, args.mask_ratio, args.seed)

    batches = load_batches(start)
    total = torch.zeros((), device=device)
    bar = tqdm(total=steps, initial=start, desc="pretrain", disable=None if rank == 0 else True)
    for step in range(start, steps):
        lr = learning_rate(step, steps, warmup, peak)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for micro in range(accumulate):
            last = micro == accumulate - 1
            with contextlib.nullcontext() if last or world == 1 else network.no_sync():
                loss = micro_loss(next(batches)[0], step, micro)
                (loss / accumulate).backward()
            total += loss.detach() / accumulate
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        done = step + 1
        if done % args.log_every and done < steps:
            continue
        # every log_every steps the ranks meet: to average the loss, to notice a signal, to write a checkpoint
        since = (done - 1) % args.log_every + 1
        loss, interrupted = gather([total.item() / since, max(INTERRUPT, default=0)], world)
        loss = loss.mean().item()
        if not math.isfinite(loss):
            raise UsageError(f"loss {loss} at step {done} (lr {lr:.3g}): stopped; the checkpoint before it stays", status=1)
        total.zero_()
        row = run.log(step=done, epoch=round(done / per_epoch, 4), lr=lr, loss=loss)
        bar.set_postfix(loss=f"{loss:.4f}")
        if bar.disable:
            say(f"step {done}/{steps}  loss {loss:.4f}  lr {lr:.2e}  {row['time']:.0f} s")
        if done // args.save_every > (done - since) // args.save_every or interrupted.any() or done == steps:
            pictures()
            checkpoint(done, run.last, optimizer=optimizer.state_dict())
        if interrupted.any():
            say(f"stopped by signal {int(interrupted.max())} after step {done}; the same command continues")
            raise SystemExit(128 + int(interrupted.max()))
    bar.close()
    checkpoint(steps, run.result)
    if rank == 0:
        run.last.unlink(missing_ok=True)
    say(f"wrote {run.result} in {time.time() - run.start:.0f} s")


if __name__ == "__main__":
    main()
