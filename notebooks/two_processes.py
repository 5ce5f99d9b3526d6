"""Two processes take the steps that one process would take; notebook 03, appendix A.2, runs it.

    torchrun --standalone --nproc_per_node=2 notebooks/two_processes.py FOLDER

FOLDER/fixed.pt holds the noise and the mask numbers of every training digit, and the images of the
first batch. Each rank writes to FOLDER/rankR.pt: its shares of that batch; the gradient that it has
after equal shares, with and without no_sync, and after unequal ones, each with the number of
exchanges; and its losses in three steps of pretrain.train_step.
"""

import atexit
import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pretrain


def main(folder):
    device = torch.device("cpu")
    args = pretrain.parse([])
    images = pretrain.open_images("digits", None, True, 8, 1, device)
    train, _ = pretrain.hold_out(len(images.labels), args.holdout)
    device_batch, micro_batches, _ = pretrain.plan(args.batch, 32, len(train))
    noise, uniforms, whole = torch.load(f"{folder}/fixed.pt")
    network = pretrain.build_model(args, device)
    parallel = pretrain.parallelise(network, args, device)
    exchanges = []

    def counted(state, bucket):
        exchanges.append(bucket.buffer().numel())
        return allreduce_hook(state, bucket)

    def gradient(parts, no_sync):
        """(gradient, number of exchanges) after one backward pass for each part, some images."""
        exchanges.clear()
        for number, part in enumerate(parts):
            x = images.items.tensors[0][part] / images.white
            parallel.require_backward_grad_sync = not no_sync or number == len(parts) - 1
            loss, _, _ = parallel(x, args.sigma, args.mask_ratio, noise[part], uniforms[part])
            (loss / len(parts)).backward()
        flat = torch.cat([p.grad.flatten() for p in network.parameters() if p.requires_grad])
        parallel.zero_grad()
        return flat, len(exchanges)

    parallel.register_comm_hook(None, counted)
    epoch = pretrain.micro_batches(train, args.batch, device_batch, 0, args.seed)
    shares = [part.tolist() for part in epoch[:micro_batches]]
    found = {
        "shares": shares,
        "with no_sync": gradient(shares, no_sync=True),
        "without": gradient(shares, no_sync=False),
        "unequal": gradient([whole[:120] if pretrain.RANK == 0 else whole[120:]], no_sync=True),
    }

    optimizer = pretrain.build_optimizer(network, args)
    batches = pretrain.load_batches(images, epoch, device)
    found["losses"] = [
        pretrain.train_step(parallel, optimizer, batches, micro_batches, args, step).item()
        for step in range(3)
    ]
    torch.save(found, f"{folder}/rank{pretrain.RANK}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
    gc.collect()                # DDP's hook is Python: it must be gone before the interpreter is
    atexit.unregister(dist.destroy_process_group)
    dist.destroy_process_group()
