"""Two certification logs on the same images, image by image: is the one's mean radius the larger, and by how much?

    python results/fashion-mnist/compare.py A.tsv B.tsv
    python results/fashion-mnist/compare.py A.tsv B.tsv --bound two-sided

An image that is classified wrongly or not at all has the radius 0, so that the mean radius is the ACR. Both networks
have the same images: the standard error is that of the mean of the differences. It covers the choice of the test
images, not that of the training seed.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import certify

RADII = [i / 4 for i in range(17)]


def by_image(rows_a, rows_b, bound="one-sided"):
    """(rows of A, rows of B, radii of A - radii of B) on the images that both have, in their order.

    rows_a and rows_b are as certify.read_rows() returns them.
    """
    for rows in (rows_a, rows_b):
        there = bound == "one-sided" or all("two_sided" in row for row in rows)
        certify.require(there, "a log without counts of other classes has the one-sided radius only")
    a = {row["idx"]: certify.by_bound(row, bound) for row in rows_a}
    b = {row["idx"]: certify.by_bound(row, bound) for row in rows_b}
    common = sorted(a.keys() & b.keys())
    certify.require(len(common) > 1, "the logs have fewer than two images in common")
    certify.require(all(a[i]["label"] == b[i]["label"] for i in common), "the logs are of different data sets")
    a, b = ([rows[i] for i in common] for rows in (a, b))
    radii_a, radii_b = (np.array([row["radius"] * row["correct"] for row in rows]) for rows in (a, b))
    return a, b, radii_a - radii_b


def standard_error(differences):
    """Of their mean, over the images."""
    return differences.std(ddof=1) / len(differences) ** 0.5


def paired(rows_a, rows_b, bound="one-sided"):
    """(mean of the differences of radii A - B, its standard error, images, Summary of A, Summary of B)."""
    a, b, difference = by_image(rows_a, rows_b, bound)
    summaries = [certify.Summary(rows, bound, name) for name, rows in (("A", a), ("B", b))]
    return difference.mean(), standard_error(difference), len(difference), *summaries


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="A.tsv")
    parser.add_argument("b", metavar="B.tsv")
    parser.add_argument("--bound", choices=certify.BOUNDS, default="one-sided")
    args = parser.parse_args(argv)
    with certify.one_line_errors():
        rows_a, rows_b = certify.read_rows(args.a), certify.read_rows(args.b)
        mean, error, images, a, b = paired(rows_a, rows_b, args.bound)
        print(f"A: {args.a}\nB: {args.b}\nbound: {args.bound}")
        print(f"radius of A - radius of B: mean {mean:+.4f}, standard error {error:.4f}, {images} images")
        left_out = len(rows_a) + len(rows_b) - 2 * images
        if left_out:
            print(f"{left_out} rows are left out: their images are in one of the logs only")
        radii = [r for r in RADII if r == 0 or a.right(r) or b.right(r)]
        print(certify.table([a, b], radii))


if __name__ == "__main__":
    main()
