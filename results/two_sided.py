"""Compute the two-sided column of fixed-n logs again, from the counts that stand beside it.

    python results/two_sided.py results/*/certify_sigma_*.tsv

Logs made before alpha was split 0.9 to 0.1 had halves. A row keeps the counts of the selected class
and of its largest rival, which is all that the pair depends on. So the column is what a new run
would write. In a run with --bound two-sided predict, radius and correct follow; nothing else
changes. Logs of a --procedure stopped by their bounds: they are left alone, and so are logs without
the column.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from certify import ABSTAIN, certificate, two_sided_bounds


def counts_of(top, count, runner_up, classes, n):
    """Counts of which runner_up_of() sees these; what is left over goes to the other classes."""
    counts, left = [0] * classes, n - count
    for c in range(classes):
        if c != top:
            counts[c] = min(left, runner_up)
            left -= counts[c]
    counts[top] = count
    return counts


def recomputed(cells, bound, share):
    """A row {column: text} with the two-sided radius of that share of alpha for the top class."""
    top, count, n = int(cells["top"]), int(cells["count"]), int(cells["n"])
    counts = counts_of(top, count, int(cells["runner_up"]), int(cells["classes"]), n)
    pair = two_sided_bounds(counts, top, n, float(cells["alpha"]), share)
    prediction, radius = certificate(top, *pair, float(cells["sigma"]))
    new = {"two_sided": "-1" if prediction == ABSTAIN else f"{radius:.6f}"}
    if bound == "two-sided":
        new["predict"] = str(prediction)
        new["radius"] = f"{radius:.6f}"
        new["correct"] = str(int(str(prediction) == cells["label"]))
    return cells | new


def recompute(path, share=0.9):
    """The text of a log with its two-sided column made anew, or None if it is left alone."""
    settings = json.loads(path.with_suffix(".json").read_text())
    header, *rows = path.read_text().splitlines()
    names = header.split("\t")
    sequential = settings.get("sequential") or settings.get("procedure", "fixed_n") != "fixed_n"
    if sequential or "two_sided" not in names:
        return None
    lines = [header]
    for row in rows:
        cells = dict(zip(names, row.split("\t"), strict=True))
        lines.append("\t".join(recomputed(cells, settings["bound"], share).values()))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        text = recompute(path)
        print(f"{path}: {'left alone' if text is None else 'written'}")
        if text:
            path.write_text(text)
