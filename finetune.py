"""Stage 2: fine-tune the pre-trained encoder as the base classifier f of a smoothed classifier (DMAE, section 3.2).

    python finetune.py --sigma 0.25                                     # digits, two CPU cores: half a minute
    python finetune.py --sigma 0.5 --recipe cifar10                     # one GPU
    torchrun --nproc_per_node=8 finetune.py --sigma 0.25 --recipe imagenet-base --init dmae_base.pth
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 finetune.py --sigma ...
    python finetune.py --sigma 0.25 --linear-probe --init runs/digits/pretrain.pt --out runs/probe
    python finetune.py --sigma 0.25 --init scratch --out runs/scratch   # no pre-training, for comparison
    python finetune.py --sigma 0.25 --export vit.pt                     # the finished classifier, for timm

f learns to classify x + N(0, sigma^2 I). The decoder is dropped; data set, sizes, mean and std come from the pre-training
checkpoint (RUN/pretrain.pt unless --init names one). The best model on held-out training images, by majority vote over
noisy copies, becomes RUN/finetune_sigma_S.pt; the test images are looked at once, at the end. A rerun continues.
"""

import contextlib
import json
import math
import os
import re
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, repeat
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
    build_vit,
    choose,
    command,
    cost,
    decays,
    gather,
    learning_rate,
    load_encoder,
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
    write_atomically,
)

# ---------------------------------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------------------------------

PAPER = dict(                              # section 4.2 and appendix: ImageNet, ViT-B
    dataset="folder",
    data_path="data/imagenet",             # with train/ and val/ class folders
    image_size=224,                        # resolution at which the noise is added
    normalisation="imagenet",
    holdout=10_000,                        # training images kept for model selection
    augment="rand-augment",                # random resized crop 0.08-1, flip, RandAugment(2, 9)
    erasing=0.25,                          # chance of erasing a rectangle (with black)
    mixup=0.8,                             # Beta parameter; mixup or cutmix, one of them, for every batch
    cutmix=1.0,
    label_smoothing=0.1,
    consistency=2.0,                       # lambda of Jeong & Shin 2020; 0: off
    consistency_eta=None,                  # None: 0.5 for sigma < 1, 0.1 from there on
    epochs=100,
    warmup_epochs=5,
    batch=1024,                            # effective, over all processes and accumulated micro-batches
    device_batch=64,                       # at most, per process and micro-batch
    base_lr=5e-4,                          # lr = base_lr * batch / 256
    min_lr=1e-6,
    layer_decay=0.65,
    weight_decay=0.05,
    drop_path=0.1,
    vote_every=10,                         # epochs
    log_every=20,                          # steps
    save_every=500,                        # steps
)
RECIPES = {
    "digits": dict(                        # ours, chosen on held-out training images
        dataset="digits",
        data_path=None,
        model="vit_digits",
        image_size=8,
        normalisation="digits",
        holdout=0.1,
        augment="none",
        erasing=0.0,
        mixup=0.0,
        cutmix=0.0,
        label_smoothing=0.1,
        consistency=2.0,
        consistency_eta=None,
        epochs=60,
        warmup_epochs=5,
        batch=128,
        device_batch=128,
        base_lr=8e-3,
        min_lr=1e-6,
        layer_decay=0.75,
        weight_decay=0.05,
        drop_path=0.0,
        vote_every=10,
        log_every=50,
        save_every=200,
    ),
    "cifar10": dict(                       # ours: a small ViT on one GPU
        dataset="cifar10",
        data_path="data",
        model="vit_cifar",
        image_size=32,
        normalisation="cifar10",
        holdout=0.04,
        augment="shift-flip",              # by up to four pixels
        erasing=0.0,
        mixup=0.0,
        cutmix=0.0,
        label_smoothing=0.1,
        consistency=2.0,
        consistency_eta=None,
        epochs=50,
        warmup_epochs=5,
        batch=256,
        device_batch=256,
        base_lr=5e-4,
        min_lr=1e-6,
        layer_decay=0.75,
        weight_decay=0.05,
        drop_path=0.1,
        vote_every=10,
        log_every=50,
        save_every=500,
    ),
    "cifar10-transfer": dict(PAPER,        # paper, section 4.3: ViT-B from ImageNet, continued on CIFAR-10 or not
        dataset="cifar10",
        data_path="data",
        model="vit_base_patch16",
        image_size=32,
        model_size=224,                    # the model resizes
        normalisation="cifar10",
        holdout=0.04,
        augment="flip",
        erasing=0.0,
        mixup=0.0,
        cutmix=0.0,
        epochs=50,
        batch=256,
    ),
    "imagenet-base": dict(PAPER, model="vit_base_patch16"),
    "imagenet-large": dict(PAPER, model="vit_large_patch16", epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2,
                           consistency=0.0),
    "imagenet-huge": dict(PAPER, model="vit_huge_patch14", epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.3,
                          consistency=0.0),                                               # not in the paper
}
PROBE = dict(                              # the linear probe, section 4.4 and appendix: what it changes in a recipe
    augment="resized-crop",
    erasing=0.0,
    mixup=0.0,
    cutmix=0.0,
    label_smoothing=0.0,
    consistency=0.0,
    epochs=90,
    warmup_epochs=10,
    batch=16384,
    device_batch=512,                      # the BatchNorm's statistics are those of a device batch
    base_lr=0.1,
    min_lr=0.0,
    weight_decay=0.0,
    drop_path=0.0,
)
PROBES = {
    "digits": dict(PROBE, augment="none", epochs=60, warmup_epochs=5, batch=128, base_lr=20.0),
    "cifar10": dict(PROBE, augment="shift-flip", epochs=50, batch=1024),
    "cifar10-transfer": dict(PROBE, augment="flip", epochs=50, batch=1024),
}
FREE = {"data_path", "out", "init", "device", "device_batch", "workers", "compile", "resume", "overwrite", "dry_run",
        "recompute", "export"}             # may change when a run is continued


def parse(argv):
    """(arguments, pre-training checkpoint or None). A flag overrides the checkpoint's data, which overrides the recipe."""
    first = Parser(add_help=False)
    for name in ("--recipe", "--init", "--out"):
        first.add_argument(name)
    first.add_argument("--linear-probe", action="store_true")
    early = first.parse_known_args(argv)[0]
    choose("recipe", early.recipe or "digits", RECIPES)
    init = early.init or f"{early.out or 'runs/' + (early.recipe or 'digits')}/pretrain.pt"
    checkpoint, made_with = None, {}
    if init != "scratch" and not {"-h", "--help"} & {*argv}:
        require(early.init or Path(init).exists(), f"there is no {init}: run pretrain.py first, or give --init FILE or scratch")
        checkpoint = read_checkpoint(init)
        made_with = checkpoint.get("settings", {}) if checkpoint.get("kind") == "pretrain" else {}
    recipe = early.recipe or made_with.get("recipe", "digits")
    defaults = choose("recipe", recipe, RECIPES) | (PROBES.get(recipe, PROBE) if early.linear_probe else {})
    inherited = {key: made_with[key] for key in ("dataset", "data_path", "image_size", "normalisation", "holdout", "model",
                                                 "model_size") if recipe == made_with.get("recipe")}      # else: a transfer

    parser = Parser(__doc__, defaults | inherited | dict(recipe=recipe, init=init, out=early.out or f"runs/{recipe}"))
    positive, not_negative = number(int, least=1), number(float, least=0)
    parser.add_argument("--sigma", type=not_negative, required=True, help="standard deviation of the noise, pixels in [0, 1]")
    parser.flag("--init", str, "pre-training checkpoint (ours, the published DMAE's, MAE's, timm's), or scratch")
    parser.flag("--holdout", number(float, above=0), "training images held out for model selection: share or number")
    parser.flag("--labels-per-class", positive, "train on this many images of each class, chosen by the seed")
    parser.flag("--augment", str, "augmentation",
                choices=("none", "shift", "flip", "shift-flip", "resized-crop", "rand-augment"))
    parser.flag("--erasing", number(float, least=0, below=1), "chance of erasing a rectangle of a picture")
    parser.flag("--mixup", not_negative, "mixup's Beta parameter; 0: off")
    parser.flag("--cutmix", not_negative, "cutmix's Beta parameter; 0: off")
    parser.flag("--linear-probe", bool, "train a linear classifier on the frozen encoder's class token", default=False)
    parser.flag("--label-smoothing", number(float, least=0, below=1), "label smoothing")
    parser.flag("--consistency", not_negative, "weight lambda of the consistency term; 0: off")
    parser.flag("--consistency-eta", not_negative, "weight of the entropy (None: 0.5 for sigma < 1, else 0.1)")
    parser.flag("--drop-path", number(float, least=0, below=1), "stochastic depth of the last block")
    parser.flag("--min-lr", not_negative, "learning rate at the end")
    parser.flag("--layer-decay", number(float, above=0), "learning-rate factor from each layer to the one below")
    parser.flag("--vote-every", positive, "epochs between majority votes over 100 noisy copies, which select the model")
    parser.flag("--export", str, "write the finished classifier to this file, as timm's VisionTransformer wants it, and exit")
    training_flags(parser, RECIPES)
    args = parser.parse_args(argv)
    choose("model", args.model, SIZES)
    choose("normalisation", args.normalisation, NORMALISATION)
    for key in inherited.keys() - {"data_path", "holdout"}:
        require(getattr(args, key) == inherited[key], f"--{key.replace('_', '-')} {getattr(args, key)} contradicts {init}, "
                f"which was made with {inherited[key]} (to transfer it to other data, name another --recipe)")
    if args.consistency_eta is None:
        args.consistency_eta = 0.5 if args.sigma < 1 else 0.1
    return args, checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def make_augment(kind, size, erasing, from_files):
    """The augmentation called `kind`: of batches in memory, or (the last two) of single pictures from files."""
    if kind == "none":
        return None
    require((kind in ("resized-crop", "rand-augment")) == from_files,
            f"--augment {kind} is for pictures of {'at most' if from_files else 'more than'} 64 pixels")
    if not from_files:
        return shift_and_flip(size // 8 if "shift" in kind else 0, "flip" in kind)
    if kind == "resized-crop":
        return v2.Compose([ResizedCrop(size), v2.RandomHorizontalFlip(), v2.RandomErasing(erasing)])
    return v2.Compose([v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC), v2.RandomHorizontalFlip(),
                       v2.RandAugment(num_ops=2, magnitude=9), v2.PILToTensor(), v2.RandomErasing(erasing)])


def make_mix(mixup, cutmix, classes):
    """(images, labels) -> (images, targets (B, classes)): mixup or cutmix at random, where their parameter is not 0."""
    mixes = ([v2.MixUp(alpha=mixup, num_classes=classes)] if mixup else []) \
        + ([v2.CutMix(alpha=cutmix, num_classes=classes)] if cutmix else [])
    return v2.RandomChoice(mixes) if mixes else lambda images, labels: (images, F.one_hot(labels, classes).to(images))


def few_labels(images, count, seed):
    """`count` images of each class, chosen by the seed, again and again: an epoch stays as long as it was."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed_of(seed)))
    chosen = torch.cat([order[images.labels[order] == label][:count] for label in range(len(images.classes))])
    return images.subset(chosen.repeat(-(-len(images) // len(chosen)))[:len(images)])


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------


def consistency_loss(logits, lam, eta):
    """Jeong & Shin 2020 (arXiv 2006.04062): lam * mean_i KL(F || F_i) + eta * H(F), averaged over images.

    logits (m, B, classes) of m noisy copies of each image; F_i are their softmax outputs and F is the mean of the F_i.
    """
    log_each = logits.log_softmax(dim=-1)                                                 # m B classes
    log_mean = log_each.logsumexp(dim=0) - math.log(len(logits))                          # B classes
    mean = log_mean.exp()
    divergence = (mean * (log_mean - log_each)).sum(dim=-1).mean()
    entropy = -(mean * log_mean).sum(dim=-1).mean()
    return lam * divergence + eta * entropy


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer
# ---------------------------------------------------------------------------------------------------------------------


def layer_of(name, depth):
    """0: class token, positions, patch embedding; N + 1: blocks.N; depth + 1: final norm and head."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed")):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1


def parameter_groups(model, weight_decay, layer_decay):
    """One group for every layer with and without weight decay; its lr_scale is layer_decay^(depth + 1 - layer)."""
    groups, depth = {}, len(model.blocks)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer, decay = layer_of(name, depth), weight_decay * decays(name, parameter)
            group = groups.setdefault((layer, decay > 0), dict(params=[], weight_decay=decay,
                                                               lr_scale=layer_decay ** (depth + 1 - layer)))
            group["params"].append(parameter)
    return list(groups.values())


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv 1708.03888) of SGD with momentum, for the linear probe.

    The gradient of a matrix w is scaled by trust * |w| / |gradient + weight_decay * w|; that of a 1-D parameter is not.
    """

    def __init__(self, groups, lr, momentum=0.9, trust=0.001):
        super().__init__(groups, dict(lr=lr, momentum=momentum, trust=trust, weight_decay=0.0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                update = w.grad + group["weight_decay"] * w
                if w.ndim > 1:
                    size, change = w.norm(), update.norm()
                    update = update * torch.where((size > 0) & (change > 0), group["trust"] * size / change, 1.0)
                velocity = self.state[w].setdefault("velocity", torch.zeros_like(w))
                velocity.mul_(group["momentum"]).add_(update)
                w.sub_(group["lr"] * velocity)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(model, images, sigma, draws, batch, seed, rank, world, device, workers=0):
    """(accuracy on clean images, under one noise draw, of the majority of `draws` noisy copies), each image counted once.

    The last is the certified accuracy at r = 0 but for the confidence; None if draws = 0. Blocks of images are dealt to
    the ranks by stride, and their noise depends on (seed, block) alone.
    """
    model.eval()
    starts = range(rank * batch, len(images), world * batch)
    blocks = [[(0, i) for i in range(start, min(start + batch, len(images)))] for start in starts]
    clean = noisy = voted = 0
    for start, (pixels, labels) in zip(starts, images.load(blocks, device, workers), strict=True):
        x = pixels / images.levels                                                        # B C H W in [0, 1]
        torch.manual_seed(seed_of(seed, start, 0))
        clean += (model(x).argmax(dim=1) == labels).sum()
        noisy += (model(x + sigma * torch.randn_like(x)).argmax(dim=1) == labels).sum()
        if draws:
            votes = sum(F.one_hot(model(x + sigma * torch.randn_like(x)).argmax(dim=1), len(images.classes))
                        for _ in range(draws))                                            # B classes
            voted += (votes.argmax(dim=1) == labels).sum()
    model.train()
    totals = gather([float(clean), float(noisy), float(voted)], world).sum(dim=1) / len(images)
    return [round(share, 6) for share in totals.tolist()[:3 if draws else 2]] + [None] * (not draws)


def export(source, path):
    """Write a fine-tuned classifier for timm: VisionTransformer(**file["model_args"]).load_state_dict(file["state_dict"]).

    The names are timm's already; a linear probe's BatchNorm is folded into its linear layer. timm's models take images that
    are resized and normalised beforehand: "mean", "std" and "img_size" say how.
    """
    checkpoint = read_checkpoint(source, "finetune")
    config, state = checkpoint["config"], dict(checkpoint["model"])
    if config.get("probe"):
        mean, variance = state.pop("head.0.running_mean"), state.pop("head.0.running_var")
        del state["head.0.num_batches_tracked"]
        weight, bias = state.pop("head.1.weight"), state.pop("head.1.bias")
        state["head.weight"] = weight / (variance + 1e-6).sqrt()
        state["head.bias"] = bias - state["head.weight"] @ mean
    arguments = dict(img_size=config["image_size"], patch_size=config["patch_size"], in_chans=config["channels"],
                     num_classes=config["num_classes"], embed_dim=config["dim"], depth=config["depth"],
                     num_heads=config["heads"], mlp_ratio=config.get("mlp_ratio", 4.0),
                     global_pool="avg" if config.get("pool", "mean") == "mean" else "token")
    content = dict(state_dict=state, model_args=arguments, mean=config["mean"], std=config["std"],
                   classes=checkpoint["data"]["classes"], sigma=checkpoint["sigma"])
    write_atomically(path, lambda temporary: torch.save(content, temporary))


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


@command
def main(argv):
    args, checkpoint = parse(argv)
    name = f"finetune_sigma_{args.sigma:g}"
    if args.export:
        export(f"{args.out}/{name}.pt", args.export)
        return print(f"wrote {args.export}")
    rank, world, device = start_processes(args.device)
    torch.use_deterministic_algorithms(args.deterministic)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")                       # what cuBLAS asks for
    say = print if rank == 0 else lambda *_: None

    # data
    channels = SIZES[args.model]["channels"]
    data = dict(dataset=args.dataset, data_path=args.data_path, image_size=args.image_size, channels=channels,
                holdout=args.holdout)
    train, held, test = (open_images(split=split, device=device, **data) for split in ("train", "holdout", "test"))
    require(train.classes == test.classes, f"the classes of training and test images differ in {args.data_path}")
    labelled = min(len(train), (args.labels_per_class or len(train)) * len(train.classes))
    if args.labels_per_class:
        train = few_labels(train, args.labels_per_class, args.seed)
    train.augment = make_augment(args.augment, args.image_size, args.erasing, bool(train.files))
    train.seed = args.seed
    mix = make_mix(args.mixup, args.cutmix, len(train.classes))
    device_batch, accumulate = share_batch(args.batch, world, args.device_batch)
    require(len(train) >= args.batch, f"{len(train)} training images are fewer than one batch of {args.batch}")
    per_epoch = len(train) // args.batch
    steps, warmup = int(args.epochs * per_epoch), int(args.warmup_epochs * per_epoch)
    require(steps > 0, f"--epochs {args.epochs:g} makes no step of {args.batch} images")
    peak = args.base_lr * args.batch / 256

    # model
    torch.manual_seed(args.seed)
    normalisation = choose("normalisation", args.normalisation, NORMALISATION)
    require(len(normalisation["mean"]) == channels, f"--normalisation {args.normalisation} is not for {channels} channels")
    model = build_vit(args.model, len(train.classes), image_size=args.model_size or args.image_size, probe=args.linear_probe,
                      pool="cls" if args.linear_probe else "mean", drop_path=args.drop_path, **normalisation)
    if checkpoint:
        missing, left = load_encoder(model, args.init)
        say(f"{args.init} ({args.dataset}, {args.model}): starting anew {', '.join(missing) or 'nothing'}; "
            f"leaving out {', '.join(sorted({key.split('.')[0] for key in left})) or 'nothing'}")
    if args.linear_probe:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    model.recompute_activations = args.recompute
    model.to(device)

    # optimizer
    groups = parameter_groups(model, args.weight_decay, args.layer_decay)
    optimizer = LARS(groups, peak) if args.linear_probe else \
        torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.999), fused=True)

    args.dtype = pick_dtype(args.dtype, model, device, world)
    settings = vars(args) | {"init_sha256": checkpoint and sha256(args.init)}

    # one micro-batch
    if args.compile if args.compile is not None else device.type == "cuda":
        model.compile()
    network = DistributedDataParallel(model) if world > 1 else model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16")
    copies = 2 if args.consistency else 1

    def load_batches(start):
        positions = training_positions(len(train), args.batch, device_batch, start, steps, args.seed, rank, world)
        return train.load(positions, device, args.workers)

    def micro_loss(pixels, labels, *position):
        torch.manual_seed(seed_of(args.seed, *position, rank))
        # Noise comes after everything else: mixup of noisy images would scale it by sqrt(l^2 + (1 - l)^2).
        images, targets = mix(pixels / train.levels, labels)                              # B C H W in [0, 1], B classes
        images = repeat(images, "b c h w -> (m b) c h w", m=copies)
        noisy = images + args.sigma * torch.randn_like(images)
        with autocast:
            logits = rearrange(network(noisy), "(m b) k -> m b k", m=copies)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.repeat(copies, 1), label_smoothing=args.label_smoothing)
        if args.consistency:
            loss = loss + consistency_loss(logits.float(), args.consistency, args.consistency_eta)
        return loss

    say(f"{args.model}: {sum(p.numel() for group in groups for p in group['params']):,} trained parameters on {world} x "
        f"{device.type} in {args.dtype}; {labelled:,} images; {steps:,} steps of {world} x {accumulate} x "
        f"{device_batch} = {args.batch} images; lr {peak:.3g}; sigma {args.sigma:g}")
    if args.dry_run:
        batch = next(load_batches(0))
        say(json.dumps(settings, indent=1), cost(lambda: micro_loss(*batch, 0, 0), model, device_batch), sep="\n")
        return optimizer.step()

    # run directory
    run = Run(args.out, name, settings, FREE, rank, world, resume=args.resume, overwrite=args.overwrite)
    if run.done:
        return say(f"{run.result} is done; --out elsewhere, or --overwrite to do it again")
    state, start, best = run.load(), 0, None
    if state:
        load_weights(model, state["model"], run.last)
        optimizer.load_state_dict(state["optimizer"])
        start, best = state["step"], state["best"]
        say(f"continuing {run.last} after step {start}")

    def weights():
        return {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}

    def accuracy(images, draws):
        for buffer in model.buffers() if world > 1 else ():           # the probe's statistics: rank 0's, as in its checkpoint
            dist.broadcast(buffer, 0)
        with autocast:
            return evaluate(model, images, args.sigma, draws, 250, args.seed, rank, world, device, args.workers)

    def thousand(images):
        """At most 1000 of them, evenly spaced: class folders are sorted by class."""
        return images.subset(torch.linspace(0, len(images) - 1, min(1000, len(images)), dtype=torch.float64).long())

    batches = load_batches(start)
    total, counted = torch.zeros((), device=device), 0
    bar = tqdm(total=steps, initial=start, desc="finetune", disable=None if rank == 0 else True)
    for step in range(start, steps):
        lr = learning_rate(step, steps, warmup, peak, args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        for micro in range(accumulate):
            last = micro == accumulate - 1
            with contextlib.nullcontext() if last or world == 1 else network.no_sync():
                loss = micro_loss(*next(batches), step, micro)
                (loss / accumulate).backward()
            total += loss.detach() / accumulate
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        done, counted = step + 1, counted + 1
        if done % args.log_every and done % per_epoch and done < steps:
            continue
        # now and then the ranks meet: to average the loss, to notice a signal, to write a checkpoint
        loss, interrupted = gather([total.item() / counted, max(INTERRUPT, default=0)], world)
        loss, saved = loss.mean().item(), (done - counted) // args.save_every
        if not math.isfinite(loss):
            raise UsageError(f"loss {loss} at step {done} (lr {lr:.3g}): stopped; the checkpoint before it stays", status=1)
        total.zero_()
        counted = 0
        row = run.log(step=done, epoch=round(done / per_epoch, 4), lr=lr, loss=loss)
        bar.set_postfix(loss=f"{loss:.4f}")
        if bar.disable and (done % args.log_every == 0 or done == steps):
            say(f"step {done}/{steps}  loss {loss:.4f}  lr {lr:.2e}  {row['time']:.0f} s")
        if done % per_epoch == 0 or done == steps:
            voting = done % (args.vote_every * per_epoch) == 0 or done == steps
            clean, noisy, _ = accuracy(held, 0)
            vote = accuracy(thousand(held), 100)[2] if voting else None
            run.log(step=done, epoch=round(done / per_epoch, 4), split="holdout", clean=clean, noisy=noisy, vote=vote)
            if voting:
                say(f"held out, epoch {done / per_epoch:g}: clean {clean:.1%}  noisy {noisy:.1%}  vote {vote:.1%}")
                if best is None or vote >= best["vote"]:
                    best = dict(vote=vote, epoch=done / per_epoch, model=weights())
        if done // args.save_every > saved or interrupted.any() or done == steps:
            run.save(run.last, weights(), step=done, best=best, optimizer=optimizer.state_dict())
        if interrupted.any():
            say(f"stopped by signal {int(interrupted.max())} after step {done}; the same command continues")
            raise SystemExit(128 + int(interrupted.max()))
    bar.close()

    # the kept model, on the test images, once
    model.load_state_dict(best["model"])
    clean, noisy, _ = accuracy(test, 0)
    vote = accuracy(thousand(test), 100)[2]
    run.log(step=steps, epoch=best["epoch"], split="test", clean=clean, noisy=noisy, vote=vote)
    say(f"test images, model of epoch {best['epoch']:g}: clean {clean:.1%}  noisy {noisy:.1%}  vote {vote:.1%}")
    run.save(run.result, best["model"], kind="finetune", config=model.config, data=data | {"classes": train.classes},
             settings=settings, sigma=args.sigma, step=steps)
    if rank == 0:
        run.last.unlink(missing_ok=True)
    say(f"wrote {run.result} in {time.time() - run.start:.0f} s")


if __name__ == "__main__":
    main()
