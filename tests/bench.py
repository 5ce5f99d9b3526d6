"""How fast the three hot paths are on this machine, next to what it can do.

    python tests/bench.py                                               # the digits model
    python tests/bench.py --model vit_base_patch16 --batch 20 --dtype fp32
    python tests/bench.py --json bench.json

For each path: draws or images a second, TFLOP/s, the share of the peak that a large matrix product reaches in the same run
and dtype, and the ratio to the bare loop: for certification, the network's forward pass over ready-made batches; for training,
forward, backward and optimizer alone, with noise and masks made beforehand. What is compared runs in turns, and medians are
taken, since timings on shared machines are noisy. The floor of each path is its FLOPs over the peak.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from certify import CHUNK, GaussianNoise, count_classes, generator_for
from model import SIZES, build_dmae, build_vit, start_processes
from pretrain import draw_corruption


def seconds(work, device):
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(candidates, device, repeats):
    """{name: median seconds} of {name: function}, run in turns after a warm-up."""
    times = {name: [] for name in candidates}
    for turn, (name, work) in itertools.product(range(repeats + 1), candidates.items()):
        taken = seconds(work, device)
        if turn:
            times[name].append(taken)
    return {name: statistics.median(taken) for name, taken in times.items()}


def matmul_peak(device, dtype, repeats):
    """TFLOP/s of a large square matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / in_turns({"matmul": lambda: a @ b}, device, repeats)["matmul"] / 1e12


def flops(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def synthetic(name, batch, device):
    size = SIZES[name]
    return torch.rand(batch, size["channels"], size["image_size"], size["image_size"], device=device)


def certification(name, batch, autocast, device, draws, repeats):
    """(ratio to the bare forward, draws per second, FLOPs per draw)."""
    model = build_vit(name, 1000).to(device).eval()
    (x,) = synthetic(name, 1, device)
    ready = x + 0.25 * torch.randn(batch, *x.shape, device=device)
    draws = -(-draws // CHUNK) * CHUNK

    def ours():
        with autocast():
            count_classes(model, [(x, generator_for(0, 0, 1, device), draws)], GaussianNoise(0.25), batch)

    @torch.inference_mode()
    def bare():
        with autocast():
            for _ in range(draws // batch):
                model(ready)

    with torch.inference_mode():
        each = flops(lambda: model(ready[:1]))
    times = in_turns({"ours": ours, "bare": bare}, device, repeats)
    return times["bare"] / times["ours"], draws / times["ours"], each


def training(network, inputs, make_inputs, parameters, autocast, device, repeats):
    """(ratio to the bare loop, steps per second, FLOPs per step) of `network(*inputs) -> loss`."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step(inputs):
        with autocast():
            loss = network(*inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    each = flops(lambda: network(*inputs).backward())
    times = in_turns({"ours": lambda: step(make_inputs()), "bare": lambda: step(inputs)}, device, repeats)
    return times["bare"] / times["ours"], 1 / times["ours"], each


def pretraining(name, batch, autocast, device, draws, repeats):
    model, images = build_dmae(name).to(device), synthetic(name, batch, device)
    patches = model.pos_embed.shape[1] - 1
    return training(lambda *drawn: model(images, 0.25, 0.75, *drawn)[0], draw_corruption(images, patches, 0),
                    lambda: draw_corruption(images, patches, 0), model.parameters(), autocast, device, repeats)


def finetuning(name, batch, autocast, device, draws, repeats):
    model, images = build_vit(name, 1000).to(device), synthetic(name, batch, device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    return training(lambda noisy: cross_entropy(model(noisy), labels), (images,),
                    lambda: (images + 0.25 * torch.randn_like(images),), model.parameters(), autocast, device, repeats)


STAGES = {"certify": certification, "pretrain": pretraining, "finetune": finetuning}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["vit_digits"], choices=list(SIZES))
    parser.add_argument("--stage", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--batch", type=int, default=CHUNK, help="images in a forward pass")
    parser.add_argument("--draws", type=int, default=2000, help="noisy copies in each certification run")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", help="write the rows to this file, too")
    args = parser.parse_args(argv)
    device = start_processes(args.device)[2]
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16")

    peak = matmul_peak(device, dtype, args.repeats)
    machine = dict(device=str(device), threads=torch.get_num_threads(), torch=torch.__version__, peak=peak)
    print(f"{device}, {machine['threads']} threads, torch {torch.__version__}, peak {peak:.3g} TFLOP/s in {args.dtype}")
    rows = []
    for name, stage in itertools.product(args.model, args.stage):
        ratio, rate, each = STAGES[stage](name, args.batch, autocast, device, args.draws, args.repeats)
        per_second, tera = rate * (1 if stage == "certify" else args.batch), rate * each / 1e12
        rows.append(dict(model=name, stage=stage, dtype=args.dtype, batch=args.batch, per_second=per_second, tflops=tera,
                         share_of_peak=tera / peak, ratio_to_bare=ratio))
        print(f"{name:18} {stage:9} {args.dtype}  batch {args.batch:4}  {per_second:10,.1f}/s  {tera:8.4f} TFLOP/s  "
              f"{tera / peak:6.1%} of peak  {ratio:6.1%} of the bare loop", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(machine | dict(rows=rows), indent=1))


if __name__ == "__main__":
    main()
