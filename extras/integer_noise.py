"""A certificate that does not rest on floating point: integer noise (as Voracek & Hein 2023).

    python -m extras.integer_noise 0 3 6 --sigma 0.25          # test images 0, 3, 6

Its other flags are certify.py's.

For x on the grid 1/levels, rounding x + e is x + round(e): integers, drawn by comparing 53 random
bits with a table of the rounded Gaussian's cumulative probabilities. f after rounding is a base
classifier like any other, so the theorem holds without real-number noise; a deployment must round
after adding noise, and never clip. The table is known to a few units of its last place: a draw that
those would decide is not counted for the top class.
"""

import itertools
import math
import sys

import numpy as np
import torch
from scipy.stats import norm

from certify import (
    ABSTAIN,
    CHUNK,
    certificate,
    generator_for,
    lower_confidence_bound,
    one_line_errors,
    open_for_certification,
    parse,
    refuse,
    two_sided_bounds,
    votes_of,
)

BITS, SLACK = 53, 64                                 # norm.cdf errs by fewer than 8 units, tested


class GridNoise:
    """round(x + sigma N(0, I)) on the grid 1/levels, exactly (notebook 07, (7.7))."""

    def __init__(self, sigma, levels, device):
        self.levels = levels
        self.reach = math.ceil(9 * sigma * levels)                           # P[beyond] < 2^-53
        steps = np.arange(-self.reach, self.reach)
        cumulative = norm.cdf((steps + 0.5) / (sigma * levels))
        table = np.round(cumulative * 2**BITS).astype(np.int64)
        self.table = torch.from_numpy(table).to(device)

    def __call__(self, x, generator, copies):
        """Noisy copies (copies, C, H, W) of x (C, H, W), and which of them may count (copies,)."""
        if (torch.round(x * self.levels) - x * self.levels).abs().max() > 1e-3:
            refuse(f"integer noise needs images on the grid 1/{self.levels}")
        shape = copies, *x.shape
        bits = torch.randint(2**BITS, shape, generator=generator, device=x.device)

        # The entries around each draw: table[place - 1] <= bits < table[place].
        place = torch.searchsorted(self.table, bits, right=True)             # copies C H W
        below = self.table[(place - 1).clamp(min=0)]
        above = self.table[place.clamp(max=len(self.table) - 1)]
        sure = ((bits - below).abs() > SLACK) & ((bits - above).abs() > SLACK)

        integers = torch.round(x * self.levels) + place - self.reach
        return integers / self.levels, sure.flatten(1).all(dim=1)


@torch.no_grad()
def count(f, x, noise, generator, copies):
    """How often f answers each class on so many copies, int64 (classes,); unsure ones for none."""
    counts = 0
    for first in range(0, copies, CHUNK):
        z, sure = noise(x, generator, CHUNK)
        wanted = torch.arange(CHUNK, device=x.device) < copies - first
        votes = votes_of(f(z))
        if votes[wanted, -1].any():
            raise FloatingPointError("NaN or infinite logits: no certificate rests on them")
        counts = counts + votes[wanted & sure].sum(dim=0)
    return counts[:-1].cpu()


def certify_on_grid(f, x, noise, index, args):
    """CERTIFY with integer noise: (prediction, radius) of x (C, H, W)."""
    select, estimate = (generator_for(args.seed, index, phase, x.device) for phase in (0, 1))
    top = int(count(f, x, noise, select, args.n0).numpy().argmax())
    counts = count(f, x, noise, estimate, args.n)
    p_a = lower_confidence_bound(int(counts[top]), args.n, args.alpha)
    p_b = 1 - p_a
    if args.bound == "two-sided":
        p_a, p_b = two_sided_bounds(counts, top, args.n, args.alpha)
    return certificate(top, p_a, p_b, args.sigma)


def main(argv):
    images = [int(word) for word in itertools.takewhile(str.isdigit, argv)]
    args, checkpoint = parse(argv[len(images):])
    if args.procedure != "fixed_n":
        refuse("integer noise has a procedure of its own: no --procedure")
    args.batch = CHUNK
    f, test, device = open_for_certification(args, checkpoint)
    noise = GridNoise(args.sigma, test.white, device)
    for index in images:
        x = test.items[index][0].to(device) / test.white
        prediction, radius = certify_on_grid(f, x, noise, index, args)
        answer = "abstains" if prediction == ABSTAIN else test.classes[prediction]
        print(f"image {index}: {answer}, radius {radius:.6f}")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
