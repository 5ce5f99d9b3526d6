"""How fast the hot paths are on this machine, next to what it can do.

    python tests/bench.py                                      # the digits model, all stages
    python tests/bench.py --model vit_base_patch16 --batch 32  # one process, all its threads
    python tests/bench.py --compare                            # next to naive ways of the same
    python tests/bench.py --stage data --data-path DIR         # picture files -> batches
    python tests/bench.py --cost imagenet-large --stage pretrain        # FLOPs and GiB of a step
    python tests/bench.py --table results/speed.md             # this kind of machine's table there

(DIR has train/CLASS/*.jpg; a recipe's cost is counted, in seconds, not measured.) For each path:
images (certification: draws) a second; TFLOP/s; the share of the peak, which is what a large matrix
product reaches in the same dtype and turn; the ratio to the bare loop (certification: the network's
forward pass over ready-made batches; training: forward, backward and optimizer alone, noise and
masks made beforehand); peak memory. What is compared runs in turns; medians of the ratios and their
quartiles are printed, since timings on shared machines are noisy. The floor of each path, in
seconds, is its FLOPs over the peak.

On a CPU with glibc, MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 THP_MEM_ALLOC_ENABLE=1
before the command let the process keep the memory that it frees, in huge pages, instead of asking
the system for it again in every layer.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1]))
import finetune
import pretrain
from certify import CHUNK, count_under_noise, generator_for
from model import SIZES, build_dmae, build_vit
from pretrain import (
    Images,
    draw_corruption,
    load_batches,
    micro_batches,
    open_picture,
    pick_device,
    shift_and_flip,
)

SIGMA, CLASSES = 0.25, 1000
MEMORY = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "THP_MEM_ALLOC_ENABLE")  # of CPUs: speed


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


def seconds(work, device):
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(variants, device, repeats):
    """{name: [seconds of each turn]} of {name: function}, run in turns after a warm-up."""
    times = {name: [] for name in variants}
    for turn, (name, work) in itertools.product(range(repeats + 1), variants.items()):
        taken = seconds(work, device)
        if turn:
            times[name].append(taken)
    return times


def spread(values):
    """(median, lower and upper quartile)."""
    if len(values) == 1:
        return tuple(3 * values)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def large_matmul(device, dtype, side=None):
    """(function, FLOPs) of five large square matrix products: what the device can do."""
    side = side or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return lambda: [a @ b for _ in range(5)], 5 * 2 * side**3


def copy_bandwidth(device, repeats):
    """GB/s, read and written, of copying a large tensor."""
    a = torch.zeros(2**26, device=device)
    b = torch.empty_like(a)
    times = in_turns({"copy": lambda: b.copy_(a)}, device, repeats)["copy"]
    return 2 * a.nbytes / statistics.median(times) / 1e9


def peak_memory(work, device):
    """GiB: allocated, on a GPU; on a CPU, what the whole process holds (on Linux; else NaN)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return math.nan
    work()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**20


# --------------------------------------------------------------------------------------------------
# Counting
# --------------------------------------------------------------------------------------------------


def count_flops(work):
    """(work(), its FLOPs), a multiplication and an addition being two.

    torch itself would leave out attention on CPUs.
    """
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backwards = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    left_out = {
        attention: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        backwards: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
    }
    with FlopCounterMode(display=False, custom_mapping=left_out) as counter:
        result = work()
    return result, counter.get_total_flops()


def activations_of(loss_of_batch, model):
    """(loss_of_batch(), GiB that it keeps for the backward pass: no weights but copies in bf16)."""
    kept, own = {}, {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of_batch()                   # its graph holds them: no two have one place
    return loss, sum(size for storage, size in kept.items() if storage not in own) / 2**30


def cost(recipe, stage, dtype="bf16", batch=None):
    """What a training step of a recipe costs, uncomputed: its loss, on tensors without content.

    Returns dict(model, batch: images of a device batch; forward, backward: GFLOP an image; weights:
    GiB of weights, gradients and AdamW's moments; activations: GiB). A second's work for digits,
    ten for ViT-H; no memory to speak of.
    """
    argv = ["--recipe", recipe, "--dtype", dtype]
    if stage == "pretrain":
        args = pretrain.parse(argv)
    else:
        args = finetune.parse([*argv, "--sigma", "0.25", "--init", "scratch"])
    batch = batch or pretrain.plan(args.batch, args.device_batch, args.batch)[0]
    classes = CLASSES if args.dataset == "folder" else 10
    size, channels = (SIZES[args.model][key] for key in ("image_size", "channels"))
    with FakeTensorMode(), mock.patch("torch.nn.init.trunc_normal_"):   # it looks at what it draws
        images = torch.rand(batch, channels, size, size)
        if stage == "pretrain":
            model = build_dmae(args.model, norm_pix=args.norm_pix, loss_on=args.loss_on)

            def loss_of_batch():
                drawn = draw_corruption(images, model.grid, 0)
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                    return model(images, args.sigma, args.mask_ratio, *drawn)[0]
        else:
            model = build_vit(args.model, classes, drop_path=args.drop_path)
            objective, _ = finetune.open_objective(args.objective)
            f = finetune.noisy_logits(model, dtype)
            given = (torch.rand(batch, classes), args.sigma, 0.0, args.epochs)

            def loss_of_batch():
                return objective(f, images, *given, **args.objective_args)

        kept = lambda: activations_of(loss_of_batch, model)
        (loss, activations), forward = count_flops(kept)
        _, backward = count_flops(loss.backward)
        weights = sum(p.numel() * (16 if p.requires_grad else 4) for p in model.parameters())
    return dict(
        model=args.model,
        batch=batch,
        forward=forward / batch / 1e9,
        backward=backward / batch / 1e9,
        weights=weights / 2**30,
        activations=activations,
    )


# --------------------------------------------------------------------------------------------------
# Naive ways, for --compare
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def attention_written_out():
    def plain(q, k, v):
        return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v

    fused, F.scaled_dot_product_attention = F.scaled_dot_product_attention, plain
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


def inside(context, work):
    def both():
        with context():
            work()

    return both


@torch.inference_mode()
def count_with_unique(model, x, draws, batch):
    """Brings every batch's answers to the CPU, and sorts them there."""
    counts = torch.zeros(CLASSES, dtype=torch.int64)
    for _ in range(draws // batch):
        logits = model(x + SIGMA * torch.randn(batch, *x.shape, device=x.device))
        answers, times = logits.argmax(dim=1).cpu().unique(return_counts=True)
        counts[answers] += times
    return counts


# --------------------------------------------------------------------------------------------------
# The stages: each returns ({variant: function}, FLOPs, images) of one call
# --------------------------------------------------------------------------------------------------


class Setting:
    """What the stages are measured with."""

    def __init__(self, args, device, name, stage, dtype):
        self.device, self.bf16, self.compare = device, dtype == "bf16", args.compare
        self.compile = device.type == "cuda"
        slow = device.type == "cpu" and SIZES[name]["image_size"] > 64
        if stage == "certify":
            usual = 20 if slow else 4 * CHUNK                  # fewer than certify.py's: they last
        elif device.type == "cpu":
            usual = 32 if slow else CHUNK
        else:
            usual = 2 * CHUNK if SIZES[name]["image_size"] > 64 else 10 * CHUNK
        self.batch = args.batch or usual
        self.draws = args.draws or (100 if slow else 2000)

    def autocast(self, on=True):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16 and on)

    def images(self, name, batch):
        side, channels = (SIZES[name][key] for key in ("image_size", "channels"))
        return torch.rand(batch, channels, side, side, device=self.device)

    def pair(self, build):
        """(network as the scripts run it, the same one eager)."""
        model, eager = build().to(self.device), build().to(self.device)
        eager.load_state_dict(model.state_dict())
        if self.compile:
            model.compile()
        return model, eager


def certification(name, s):
    model, eager = s.pair(lambda: build_vit(name, CLASSES).eval())
    (x,) = s.images(name, 1)
    whole, ready = math.lcm(CHUNK, s.batch), s.images(name, s.batch)
    draws = math.ceil(s.draws / whole) * whole

    def ours(model=model, on=True):
        request = 0, x, generator_for(0, 0, 1, s.device), draws
        with s.autocast(on):
            count_under_noise(model, [request], SIGMA, s.batch)

    @torch.inference_mode()
    def bare():
        with s.autocast():
            for _ in range(draws // s.batch):
                model(ready)

    def unique(on=True):
        with s.autocast(on):
            count_with_unique(eager, x, draws, s.batch)

    variants = {"ours": ours, "bare": bare}
    if s.compare:
        variants["unique on the CPU for each batch"] = unique
        variants["attention written out"] = inside(attention_written_out, lambda: ours(eager))
        if s.compile:
            variants["eager"] = lambda: ours(eager)
        if s.bf16:
            variants["fp32"] = lambda: ours(on=False)
        variants["all of these"] = inside(attention_written_out, lambda: unique(on=False))
    with torch.inference_mode():
        return variants, draws * count_flops(lambda: eager(ready[:1]))[1], draws


def training(s, build, loss_of, draw):
    """loss_of(model, *inputs) on the inputs that draw() makes."""
    model, eager = s.pair(build)
    adam = lambda network, **how: torch.optim.AdamW(network.parameters(), lr=1e-5, **how)
    fused, eager_fused = adam(model, fused=True), adam(eager, fused=True)
    loop = adam(eager, foreach=False)

    def step(inputs, model=model, optimizer=fused, on=True):
        with s.autocast(on):
            loss = loss_of(model, *inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    ready = draw()
    plain = lambda: step(draw(), eager, eager_fused)
    variants = {"ours": lambda: step(draw()), "bare": lambda: step(ready)}
    if s.compare:
        variants["for-loop optimizer"] = lambda: step(draw(), eager, loop)
        variants["attention written out"] = inside(attention_written_out, plain)
        if s.compile:
            variants["eager"] = plain
        if s.bf16:
            variants["fp32"] = lambda: step(draw(), on=False)
        naive = lambda: step(draw(), eager, loop, False)
        variants["all of these"] = inside(attention_written_out, naive)
    return variants, count_flops(lambda: loss_of(eager, *ready).backward())[1], s.batch


def pretraining(name, s):
    images, grid = s.images(name, s.batch), build_dmae(name).grid
    loss_of = lambda model, *drawn: model(images, SIGMA, 0.75, *drawn)[0]
    return training(s, lambda: build_dmae(name), loss_of, lambda: draw_corruption(images, grid, 0))


def finetuning(name, s):
    images = s.images(name, s.batch)
    labels = torch.zeros(s.batch, dtype=torch.int64, device=s.device)
    loss_of = lambda model, noisy: F.cross_entropy(model(noisy), labels)
    draw = lambda: (images + SIGMA * torch.randn_like(images),)
    return training(s, lambda: build_vit(name, CLASSES), loss_of, draw)


STAGES = {"certify": certification, "pretrain": pretraining, "finetune": finetuning}


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------

PLAIN, TENSORS = "plain: PIL crop, flip, float tensor", "tensors: uint8, torchvision's crop"
OURS = "ours: uint8 tensor"


def psnr(a, b):
    return 10 * math.log10(255**2 / max((a.float() - b.float()).square().mean().item(), 1e-9))


def picture_files(path, repeats):
    """Images a second of one worker, from picture files, as the scripts do it and otherwise.

    Returns the scripts' rate.
    """
    endings = (".jpg", ".jpeg", ".png")
    files = sorted(file for file in Path(path, "train").rglob("*")
                   if file.suffix.lower() in endings)[:100]
    if not files:
        raise SystemExit(f"there are no pictures in {path}/train")
    crop = v2.RandomResizedCrop(224, (0.2, 1), interpolation=v2.InterpolationMode.BICUBIC)
    to_floats = v2.ToDtype(torch.float32, scale=True)
    plain = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.ToImage(), to_floats])
    on_tensors = v2.Compose([v2.PILToTensor(), crop, v2.RandomHorizontalFlip()])
    ours = pretrain.make_augment("resized-crop", SimpleNamespace(size=224))
    tuning = finetune.make_augment("rand-augment", SimpleNamespace(size=224), 0.25)
    decode = lambda file: Image.open(file).convert("RGB")
    ways = {
        "decoding alone": decode,
        PLAIN: lambda file: plain(decode(file)),
        TENSORS: lambda file: on_tensors(decode(file)),
        OURS: lambda file: ours(open_picture(file, 3)),
        "ours, for fine-tuning: RandAugment": lambda file: tuning(open_picture(file, 3)),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                   # as in a worker
    all_files = {name: lambda way=way: [way(file) for file in files] for name, way in ways.items()}
    times = in_turns(all_files, torch.device("cpu"), repeats)
    alike = {PLAIN: [], TENSORS: []}
    for i, file in enumerate(files):
        drawn = {}
        for name in (PLAIN, TENSORS, OURS):
            torch.manual_seed(i)
            drawn[name] = ways[name](file)
        alike[PLAIN].append(psnr(255 * drawn[PLAIN], drawn[OURS]))
        alike[TENSORS].append(psnr(drawn[TENSORS], drawn[OURS]))
    torch.set_num_threads(threads)
    rates = {name: len(files) / statistics.median(taken) for name, taken in times.items()}
    for name, rate in rates.items():
        print(f"{name:36} {rate:8,.0f} images/s of one worker")
    for name, values in alike.items():
        ratios = [a / b for a, b in zip(times[name], times[OURS], strict=True)]
        ratio, low, high = spread(ratios)
        print(f"ours is {ratio:.2f} ({low:.2f}-{high:.2f}) times as fast as {name}; PSNR between "
              f"them {statistics.median(values):.0f} dB, at least {min(values):.0f}")
    return rates[OURS]


def memory_images(device, batch=500):
    """Images a second of a 32 x 32 data set held in memory, shifted and flipped on the device."""
    labels = torch.zeros(50_000, dtype=torch.int64, device=device)
    pixels = torch.zeros(50_000, 3, 32, 32, dtype=torch.uint8, device=device)
    train = Images(TensorDataset(pixels, labels), labels, ["0"], 32, 255)
    order = micro_batches(torch.arange(50_000), batch, batch, 0, 0)[:40]
    augment = functools.partial(shift_and_flip, shift=4, flip=True)
    start = time.perf_counter()
    for _ in load_batches(train, order, device, augment):
        pass
    if device.type == "cuda":
        torch.cuda.synchronize()
    return len(order) * batch / (time.perf_counter() - start)


def data(args, device):
    """Whether the loader or the device is the slower one, for the models named."""
    files, cores = None, os.cpu_count()
    if args.data_path:
        files = picture_files(args.data_path, args.repeats)
    held = memory_images(device)
    print(f"held in memory (32 x 32): {held:,.0f} images/s")
    for name in args.model:
        setting = Setting(args, device, name, "pretrain", args.dtype[0])
        variants, _, images = pretraining(name, setting)
        times = in_turns({"ours": variants["ours"]}, device, 3)["ours"]
        rate = images / statistics.median(times)
        if SIZES[name]["image_size"] <= 64:
            slower = "device" if held > rate else "loader"
            print(f"{name}: the device pre-trains {rate:,.0f} images/s; the {slower} is the "
                  "bottleneck")
        elif files:
            slower = "device" if cores * files > rate else "loader"
            print(f"{name}: the device pre-trains {rate:,.1f} images/s, as many as "
                  f"{rate / files:.2g} workers load; with {cores} cores the {slower} is the "
                  "bottleneck")


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def write_table(path, kind, head, rows):
    """Replace the table between this kind of machine's marks in a Markdown file."""
    lines = ["| model | stage | dtype | batch | images or draws/s | TFLOP/s | of peak "
             "| of the bare loop | GiB |", "|---" * 9 + "|"]
    naive = []
    for r in rows:
        lines.append(
            f"| {r['model']} | {r['stage']} | {r['dtype']} | {r['batch']} "
            f"| {r['per_second']:,.1f} | {r['tflops']:.3g} | {r['share_of_peak']:.0%} "
            f"| {r['ratio_to_bare']:.1%} ({r['ratio_low']:.1%}-{r['ratio_high']:.1%}) "
            f"| {r['memory_gib']:.2f} |")
        if r["naive"]:
            ways = [f"{name} {ratio:.2f} ({low:.2f}-{high:.2f})"
                    for name, (ratio, low, high) in r["naive"].items()]
            naive.append(f"* {r['model']}, {r['stage']}, {r['dtype']}: {', '.join(ways)}")
    if naive:
        lines += ["", "Times as fast as the naive way (median of turns):", "", *naive]
    text, marks = Path(path).read_text(), [f"<!-- {word} {kind} -->" for word in ("begin", "end")]
    before, rest = text.split(marks[0])
    table = "\n".join([before + marks[0], head, "", *lines, marks[1]])
    Path(path).write_text(table + rest.split(marks[1])[1])


def print_costs(args):
    for recipe, stage, dtype in itertools.product(args.cost, args.stage, args.dtype or ["bf16"]):
        if stage in ("pretrain", "finetune"):
            of = cost(recipe, stage, dtype, args.batch)
            gib = of["weights"] + of["activations"]
            print(f"{recipe}, {stage}, {of['model']} in {dtype}: {of['forward']:.3g} GFLOP an "
                  f"image forwards, {of['backward']:.3g} backwards; {gib:.3g} GiB: "
                  f"{of['weights']:.3g} for weights, gradients and optimizer, "
                  f"{of['activations']:.3g} for {of['batch']} images' activations", flush=True)


def describe(device, args, flags, matmuls):
    """The line over a table: machine, peaks, command."""
    peaks = []
    for dtype, (matmul, work) in matmuls.items():
        taken = statistics.median(in_turns({dtype: matmul}, device, args.repeats)[dtype])
        peaks.append(f"{work / taken / 1e12:.3g} TFLOP/s in {dtype}")
    machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name()
    memory = "".join(f"{name}={os.environ[name]} " for name in MEMORY if name in os.environ)
    return (f"{machine}, torch {torch.__version__}; peak {', '.join(peaks)}, "
            f"{copy_bandwidth(device, args.repeats):.3g} GB/s copying; "
            f"`{memory}python tests/bench.py {' '.join(flags)}`")


def measure(name, stage, dtype, args, device, matmul, matmul_work):
    """A row of the table, which is printed."""
    setting = Setting(args, device, name, stage, dtype)
    variants, work, images = STAGES[stage](name, setting)
    times = in_turns(variants | {"matmul": matmul}, device, args.repeats)
    products = times.pop("matmul")
    share = statistics.median(work / ours * product / matmul_work
                              for ours, product in zip(times["ours"], products, strict=True))
    against = {}
    for other in times.keys() - {"ours"}:
        ratios = [b / a for a, b in zip(times["ours"], times[other], strict=True)]
        against[other] = spread(ratios)
    taken, (ratio, low, high) = statistics.median(times["ours"]), against.pop("bare")
    naive = {other: against[other] for other in times if other in against}
    row = dict(
        model=name,
        stage=stage,
        dtype=dtype,
        batch=setting.batch,
        per_second=images / taken,
        tflops=work / taken / 1e12,
        share_of_peak=share,
        ratio_to_bare=ratio,
        ratio_low=low,
        ratio_high=high,
        memory_gib=peak_memory(variants["ours"], device),
        naive=naive,
    )
    print(f"{name:18} {stage:9} {dtype}  batch {setting.batch:4}  {row['per_second']:10,.1f}/s  "
          f"{row['tflops']:8.4f} TFLOP/s  {share:6.1%} of peak  {ratio:6.1%} "
          f"({low:.1%}-{high:.1%}) of the bare loop  {row['memory_gib']:.2f} GiB", flush=True)
    for other, (ratio, low, high) in naive.items():
        print(f"{'':18} {ratio:5.2f} ({low:.2f}-{high:.2f}) times as fast as: {other}", flush=True)
    return row


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", nargs="+", default=["vit_digits"], choices=list(SIZES))
    add("--stage", nargs="+", default=list(STAGES), choices=[*STAGES, "data"])
    add("--batch", type=int, help="images in a forward pass (by the model, if not given)")
    add("--draws", type=int, help="noisy copies in each certification run")
    add("--dtype", nargs="+", choices=("fp32", "bf16"), help="fp32; with --cost bf16")
    add("--compare", action="store_true", help="time naive variants, too")
    add("--cost", nargs="+", choices=pretrain.RECIPES, help="count what a step costs, and end")
    add("--data-path", help="class folders for --stage data")
    add("--repeats", type=int, default=7)
    add("--device", default="auto")
    add("--json", help="write the rows to this file, too")
    add("--table", help="a Markdown file with <!-- begin cpu --> (or cuda) and end")
    args = parser.parse_args(argv)
    if args.cost:
        print_costs(args)
        return
    args.dtype = args.dtype or ["fp32"]
    device, _ = pick_device(args.device, "fp32")
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    matmuls = {dtype: large_matmul(device, types[dtype]) for dtype in args.dtype}
    head = describe(device, args, sys.argv[1:] if argv is None else argv, matmuls)
    print(head, flush=True)
    rows = []
    stages = [stage for stage in args.stage if stage in STAGES]
    for name, stage, dtype in itertools.product(args.model, stages, args.dtype):
        rows.append(measure(name, stage, dtype, args, device, *matmuls[dtype]))
    if "data" in args.stage:
        data(args, device)
    if args.json:
        Path(args.json).write_text(json.dumps(dict(machine=head, rows=rows), indent=1))
    if args.table:
        write_table(args.table, device.type, head, rows)


if __name__ == "__main__":
    main()
