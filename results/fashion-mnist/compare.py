"""Two certification logs, image by image: is the one's mean radius the larger, and by how much?

    python results/fashion-mnist/compare.py A.tsv B.tsv
    python results/fashion-mnist/compare.py A.tsv B.tsv --bound two-sided

An image that is classified wrongly or not at all has the radius 0, so that the mean radius is the
ACR. Both networks have the same images: the standard error is that of the mean of the differences.
It covers the choice of the test images, not that of the training seed.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import certify

RADII = [i / 4 for i in range(17)]


def common_rows(rows_a, rows_b):
    """The rows of two logs on the images that both have, in the images' order."""
    _, a, b = np.intersect1d(rows_a["idx"], rows_b["idx"], return_indices=True)
    if len(a) < 2:
        raise ValueError("the logs have fewer than two images in common")
    if (rows_a["label"][a] != rows_b["label"][b]).any():
        raise ValueError("the logs are of different data sets")
    return rows_a[a], rows_b[b]


def standard_error(differences):
    """Of their mean, over the images."""
    return differences.std(ddof=1) / len(differences) ** 0.5


def paired(rows_a, rows_b, bound="one-sided"):
    """(radii of A - radii of B, curve of A, curve of B) on the images that both have."""
    a, b = common_rows(rows_a, rows_b)
    if bound != "one-sided" and "two_sided" not in {*a.dtype.names} & {*b.dtype.names}:
        raise ValueError("a log without counts of other classes has the one-sided radius only")
    curves = []
    for rows, name in ((a, "A"), (b, "B")):
        sigma = rows["sigma"][0] if "sigma" in rows.dtype.names else np.nan
        curves.append(certify.curve_of(rows, sigma, bound, name))
    return curves[0].radius - curves[1].radius, *curves


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("a", metavar="A.tsv")
    parser.add_argument("b", metavar="B.tsv")
    parser.add_argument("--bound", choices=certify.BOUNDS, default="one-sided")
    args = parser.parse_args(argv)
    with certify.one_line_errors():
        rows_a, rows_b = certify.read_log(args.a), certify.read_log(args.b)
        difference, a, b = paired(rows_a, rows_b, args.bound)
        print(f"A: {args.a}\nB: {args.b}\nbound: {args.bound}")
        print(f"radius of A - radius of B: mean {difference.mean():+.4f}, "
              f"standard error {standard_error(difference):.4f}, {len(difference)} images")
        left_out = len(rows_a) + len(rows_b) - 2 * len(difference)
        if left_out:
            print(f"{left_out} rows are left out: their images are in one of the logs only")
        largest = max(0, *a.radii, *b.radii)
        print(certify.table([a, b], [r for r in RADII if r <= largest]))


if __name__ == "__main__":
    main()
