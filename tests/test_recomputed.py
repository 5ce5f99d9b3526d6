"""results/two_sided.py: the two-sided column made anew from the counts beside it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scipy.stats import binomtest, norm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "results"))
from two_sided import counts_of, recompute  # noqa: E402

from certify import runner_up_of, two_sided_bounds  # noqa: E402

BEFORE = "0146837"                                             # a commit with halves of alpha
LOGS = [
    file for file in sorted((ROOT / "results").rglob("*.tsv"))
    if "cifar10-cpu" not in file.parts and "sequential" not in str(file)
]


def names(file):
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("counts", [
    [900, 57, 43], [10, 0, 990], [4, 4, 4, 4], [0, 16], [16, 0], [7], [600, 100, 100, 100, 100],
    [34, 33, 33], [50, 0, 25, 25]])
def test_rebuilt_counts_give_the_same_pair(counts):
    n = sum(counts)
    for top in range(len(counts)):
        runner_up = runner_up_of(counts, top, n)
        rebuilt = counts_of(top, counts[top], runner_up, len(counts), n)
        assert sum(rebuilt) == n and rebuilt[top] == counts[top]
        for share in (0.5, 0.9):
            pair = two_sided_bounds(counts, top, n, 0.01, share)
            assert two_sided_bounds(rebuilt, top, n, 0.01, share) == pair


@pytest.mark.parametrize("file", LOGS, ids=names)
def test_committed_logs_are_what_the_script_writes(file):
    assert recompute(file) == file.read_text()


@pytest.mark.parametrize("file", LOGS, ids=names)
def test_only_the_column_changed_and_halves_give_the_old_bytes_back(file):
    """Against the log as its run wrote it, in this repository's history."""
    git = ["git", "-C", str(ROOT), "show", f"{BEFORE}:{names(file)}"]
    shown = subprocess.run(git, capture_output=True, text=True)
    if shown.returncode:
        pytest.skip(f"this clone's history lacks {BEFORE}")
    assert recompute(file, share=0.5) == shown.stdout

    old, new = ([row.split("\t") for row in text.splitlines()]
                for text in (shown.stdout, file.read_text()))
    column = old[0].index("two_sided")
    for before, after in zip(old, new, strict=True):
        assert before[:column] + before[column + 1:] == after[:column] + after[column + 1:]
    assert old != new


def test_predictions_of_a_two_sided_run_follow_and_procedures_are_left_alone(tmp_path):
    """5,160 of 10,000 are certain to be a majority at 0.9 alpha, and are not at half of it."""
    file = tmp_path / "certify_sigma_0.5.tsv"
    row = dict(idx=3, label=2, predict=-1, radius="0.000000", correct=0, time="0:00:01.000000")
    row |= dict(count=5160, n=10_000, sigma=0.5, alpha=0.001, top=2, runner_up=4840, classes=10)
    row |= dict(one_sided=0.000716, two_sided=-1)
    text = "".join("\t".join(map(str, cells)) + "\n" for cells in (row, row.values()))
    file.write_text(text)

    def recomputed_by(share, **settings):
        file.with_suffix(".json").write_text(json.dumps(settings))
        return recompute(file, share)

    two_sided = dict(bound="two-sided", procedure="fixed_n")
    assert recomputed_by(0.5, **two_sided) == text
    p_a = binomtest(5160, 10_000).proportion_ci(1 - 0.0018, "exact").low
    radius = f"{0.5 * norm.ppf(p_a) - 5e-7:.6f}"
    new = row | dict(predict=2, radius=radius, correct=1, two_sided=radius)
    assert recomputed_by(0.9, **two_sided).splitlines()[1] == "\t".join(map(str, new.values()))
    new |= dict(predict=-1, radius="0.000000", correct=0)
    one_sided = recomputed_by(0.9, bound="one-sided", procedure="fixed_n")
    assert one_sided.splitlines()[1] == "\t".join(map(str, new.values()))
    for other in (dict(procedure="extras/sequential.py:sequential"), dict(sequential=True)):
        assert recomputed_by(0.9, **two_sided | other) is None
