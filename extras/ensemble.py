"""Boosting (Horvath et al. 2022, arXiv 2106.06946): several classifiers as one f.

    mean:       f(z) = argmax (F_1(z) + ... + F_k(z))            F_l are network l's logits
    consensus:  f(z) = c where the first two networks agree on c, else as mean

    CHECKPOINTS=a.pt:b.pt:c.pt python certify.py --sigma 0.5 --classifier extras/ensemble.py:mean \\
        --out runs/three

(add --dataset, --data-path, --recipe as for any classifier). The theorem holds for either as for
any function f; but they are two functions.
"""

import functools
import os

import torch
import torch.nn.functional as F

from certify import CHUNK, rebuild, refuse
from model import read_checkpoint


class Consensus:
    """K-consensus: where the first K networks agree, the others are not asked.

        f = Consensus([net1, net2, net3], 2)
        logits = f(z)                                          # (B, C, H, W) -> (B, classes)

    Where they agree the logits are network 1's, exactly. The copies in dispute go through the
    others `pack` at a time, the last batch padded: each network sees batches of one shape alone, so
    what a copy gets does not depend on which others are in dispute. (notebook 06, (6.10))
    """

    def __init__(self, networks, first, pack=CHUNK // 4):
        self.first = networks[:first]
        self.others = networks[first:]
        self.pack = pack

    def __call__(self, z):
        logits = torch.stack([network(z) for network in self.first])         # K B classes
        largest, answers = logits.max(dim=2)                                 # K B, K B
        agree = (answers == answers[0]) & largest.isfinite()                 # K B
        disputed = (~agree.all(dim=0)).nonzero().flatten()                   # D
        result = logits[0].clone()                                           # B classes
        pack = min(self.pack, len(z))
        for first in range(0, len(disputed), pack):
            copies = disputed[first:first + pack]
            padded = F.pad(copies, (0, pack - len(copies)))                  # copy 0 fills it up
            votes = [*logits[:, padded], *(network(z[padded]) for network in self.others)]
            result[copies] = sum(votes)[:len(copies)]
        return result


@functools.cache
def open_networks():
    """The networks of CHECKPOINTS, files of finetune.py, in eval mode; all for the same classes."""
    files = os.environ.get("CHECKPOINTS", "").split(":")
    if len(files) < 2:
        refuse("extras/ensemble.py needs CHECKPOINTS=a.pt:b.pt")
    try:
        checkpoints = [read_checkpoint(file, "finetune") for file in files]
    except ValueError as error:
        refuse(error)
    wanted = ("dataset", "image_size", "channels", "classes")
    if any(c["data"][key] != checkpoints[0]["data"][key] for c in checkpoints for key in wanted):
        refuse(f"{', '.join(files)} are for different data")
    return [rebuild(*pair).eval() for pair in zip(checkpoints, files, strict=True)]


def mean(z):
    return sum(network.to(z.device)(z) for network in open_networks())


def consensus(z):
    return Consensus([network.to(z.device) for network in open_networks()], 2)(z)
