"""The literature's network beside the Fashion-MNIST results, and the comparison of two logs."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_fashion import write_files
from torchvision.datasets import FashionMNIST

import certify

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "results" / "fashion-mnist"


def open_script(name):
    """A script of results/fashion-mnist as a module."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def lenet(monkeypatch):
    monkeypatch.delenv("LENET", raising=False)
    monkeypatch.chdir(ROOT)
    return open_script("lenet")


@pytest.fixture
def compare():
    return open_script("compare")


@pytest.fixture
def data_path(monkeypatch, tmp_path):
    """Torchvision's four files with a few hundred random images, each brighter where it says."""
    monkeypatch.setattr(FashionMNIST, "mirrors", [])
    write_files(tmp_path / "data" / "FashionMNIST" / "raw")
    return str(tmp_path / "data")


def flags(data_path, out, objective="gaussian", epochs=1):
    line = ["--sigma", "0.25", "--objective", objective, "--data-path", data_path]
    line += ["--out", str(out), "--device", "cpu", "--batch", "20", "--augment", "none"]
    return [*line, "--epochs", str(epochs), "--base-lr", "0.5"]


def test_the_network_is_the_literatures(lenet):
    network = lenet.LeNet()
    counts = [p.numel() for p in network.parameters()]
    assert counts == [20 * 25, 20, 50 * 20 * 25, 50, 500 * 50 * 16, 500, 10 * 500, 10]
    assert network[3].weight.is_contiguous(memory_format=torch.channels_last)

    def pool(x):
        return x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))

    x = torch.rand(3, 1, 28, 28)
    first = pool(F.conv2d(x, network[0].weight, network[0].bias).relu())
    second = pool(F.conv2d(first, network[3].weight, network[3].bias).relu()).reshape(3, 800)
    hidden = (second @ network[7].weight.T + network[7].bias).relu()
    assert torch.allclose(network(x), hidden @ network[9].weight.T + network[9].bias, atol=1e-5)


def test_the_rate_falls_at_thirds(lenet):
    rates = [lenet.rate_at(step, 90, 0.01) for step in range(90)]
    assert rates == pytest.approx([0.01] * 30 + [0.001] * 30 + [0.0001] * 30)


@pytest.mark.parametrize(("objective", "dtype"), [
    ("gaussian", "fp32"),
    ("extras/smoothmix.py:smoothmix", "fp32"),
    ("gaussian", "bf16"),
])
def test_trained_and_certified(lenet, data_path, monkeypatch, tmp_path, capsys, objective, dtype):
    out = tmp_path / "run"
    trained = [*flags(data_path, out, objective), "--dtype", dtype]
    lenet.main(trained)
    printed = capsys.readouterr().out
    assert printed.count("epoch ") == 1 and "noisy" in printed
    saved = torch.load(out / "lenet.pt", weights_only=True)
    (row,) = map(json.loads, (out / "lenet.jsonl").read_text().splitlines())
    settings = json.loads((out / "lenet.json").read_text())
    assert saved["settings"] == settings and "layer_decay" not in settings
    assert (settings["objective"], settings["dtype"]) == (objective, dtype)
    assert saved["log"] == [row] and row["seconds"] > 0 and not (out / "lenet.last.pt").exists()
    torch.manual_seed(0)
    start = lenet.LeNet().state_dict()
    assert not any(torch.equal(start[name], value) for name, value in saved["model"].items())

    lenet.main(trained)
    assert "is done" in capsys.readouterr().out

    line = ["--sigma", "0.25", "--recipe", "fashion", "--data-path", data_path, "--device", "cpu"]
    line += ["--classifier", f"{FOLDER}/lenet.py:classifier", "--n", "100", "--n0", "20"]
    with pytest.raises(SystemExit) as stop:
        certify.main([*line, "--out", str(tmp_path / "none")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "LENET names no lenet.pt" in error
    monkeypatch.setenv("LENET", str(out / "lenet.pt"))
    certify.main([*line, "--out", str(out), "--skip", "4"])
    rows = certify.read_log(out / "certify_sigma_0.25.tsv")
    test = certify.open_images("fashion-mnist", data_path, False, 28, 1, torch.device("cpu"))
    network = lenet.read(out / "lenet.pt")
    for row in rows[:3]:
        index = int(row["idx"])
        x = test.items[index][0] / 255
        expected = certify.certify(network, x, 0.25, n0=20, n=100, index=index)
        assert (row["predict"], row["radius"]) == pytest.approx(expected, abs=1e-6)
    assert len(rows) == 10


def test_an_objective_sees_the_networks_logits_of_noisy_copies(lenet, data_path, tmp_path):
    """An objective of a user, with a hyperparameter, in LeNet's training."""
    (tmp_path / "mine.py").write_text("""
import torch
seen = []
def mine(f, x, targets, sigma, epoch, epochs, copies=2, weight=1.0):
    noise = sigma * torch.randn(copies, *x.shape)
    logits = f(x, noise)
    seen.append((epoch, epochs, sigma, weight, x.shape, targets.sum(1), logits, f.frozen(x, noise)))
    return weight * logits.square().mean()
""")
    line = flags(data_path, tmp_path / "run", f"{tmp_path}/mine.py:mine", epochs=2)
    lenet.main([*line, "--objective-args", "weight=0.5"])
    seen = sys.modules["mine"].seen
    assert [one[0] for one in seen] == pytest.approx([i / 14 for i in range(28)])
    for _, epochs, sigma, weight, shape, total, logits, frozen in seen:
        assert (epochs, sigma, weight, shape) == (2, 0.25, 0.5, (20, 1, 28, 28))
        assert logits.shape == (2, 20, 10) and torch.allclose(logits, frozen, atol=1e-5)
        assert (total == 1).all()
    assert seen[-1][6].square().mean() < seen[0][6].square().mean()


def test_killed_after_an_epoch_it_ends_with_the_same_bits(lenet, data_path, monkeypatch, tmp_path):
    lenet.main(flags(data_path, tmp_path / "whole", epochs=3))
    accuracy, calls = lenet.finetune.accuracy, []

    def dying(*args):
        calls.append(args)
        if len(calls) == 4:                                    # two an epoch
            raise KeyboardInterrupt
        return accuracy(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lenet.finetune, "accuracy", dying)
        lenet.main(flags(data_path, tmp_path / "cut", epochs=3))
    assert (tmp_path / "cut" / "lenet.last.pt").exists()
    assert not (tmp_path / "cut" / "lenet.pt").exists()
    lenet.main(flags(data_path, tmp_path / "cut", epochs=3))
    whole, cut = (
        torch.load(tmp_path / name / "lenet.pt", weights_only=True) for name in ("whole", "cut")
    )
    assert all(torch.equal(value, cut["model"][name]) for name, value in whole["model"].items())
    for a, b in zip(whole["log"], cut["log"], strict=True):
        assert a | dict(seconds=0) == b | dict(seconds=0)
    assert whole["log"][-1]["noisy"] > 0.5
    assert len((tmp_path / "cut" / "lenet.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("more", [
    ["--model", "vit_fashion"],
    ["--layer-decay=0.5"],
    ["--min-lr", "0"],
    ["--linear-probe"],
])
def test_flags_of_another_network_are_refused(lenet, tmp_path, capsys, more):
    with pytest.raises(SystemExit) as stop:
        lenet.main(["--sigma", "0.25", "--out", str(tmp_path / "run"), *more])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and more[0].split("=")[0] in error
    assert not (tmp_path / "run").exists()


def write_log(path, rows):
    """A TSV of (idx, label, top, one-sided, two-sided) rows of certify.py; radius -1 abstains."""
    lines = ["\t".join(certify.COLUMNS)]
    rest = dict(time="0:00:01.0", count=900, n=1000, sigma=0.5, alpha=0.001)
    rest |= dict(runner_up=50, classes=10)
    for idx, label, top, one, two in rows:
        predict = top if one >= 0 else -1
        cells = dict(idx=idx, label=label, predict=predict, radius=max(one, 0))
        cells |= dict(correct=int(predict == label), top=top, one_sided=one, two_sided=two)
        lines.append("\t".join(str((cells | rest)[name]) for name in certify.COLUMNS))
    path.write_text("\n".join(lines) + "\n")


def test_the_paired_comparison_is_numpys(compare, tmp_path, capsys):
    # Right; wrong in one; abstained in one (not by the two-sided bound); wrong in both. 5 and 6
    # are in one log only.
    write_log(tmp_path / "a.tsv", [
        (0, 3, 3, 0.8, 0.9), (1, 4, 4, 0.5, 0.6), (2, 5, 5, -1, 0.1), (3, 6, 1, 0.7, 0.7),
        (5, 1, 1, 9, 9),
    ])
    write_log(tmp_path / "b.tsv", [
        (3, 6, 2, 0.4, 0.4), (2, 5, 5, 0.3, 0.35), (1, 4, 0, 0.9, 0.9), (0, 3, 3, 0.6, 0.65),
        (6, 1, 1, 9, 9),
    ])
    a, b = (certify.read_log(tmp_path / name) for name in ("a.tsv", "b.tsv"))
    radii = {
        "one-sided": ([0.8, 0.5, 0, 0], [0.6, 0, 0.3, 0]),
        "two-sided": ([0.9, 0.6, 0.1, 0], [0.65, 0, 0.35, 0]),
    }
    for bound, (of_a, of_b) in radii.items():
        of_a, of_b = np.array(of_a), np.array(of_b)
        difference, first, second = compare.paired(a, b, bound)
        assert difference == pytest.approx(of_a - of_b)
        assert len(difference) == first.images == second.images == 4
        error = np.std(of_a - of_b, ddof=1) / 2
        assert compare.standard_error(difference) == pytest.approx(error)
        assert (first.acr, second.acr) == pytest.approx((of_a.mean(), of_b.mean()))

        compare.main([str(tmp_path / "a.tsv"), str(tmp_path / "b.tsv"), "--bound", bound])
        printed = capsys.readouterr().out
        mean = np.mean(of_a - of_b)
        assert f"mean {mean:+.4f}, standard error {error:.4f}, 4 images" in printed
        assert "2 rows are left out" in printed
        assert f"{of_a.mean():.3f}" in printed and f"{of_b.mean():.3f}" in printed


@pytest.mark.parametrize(("label", "bound", "column", "said"), [
    (7, "one-sided", "", "different data sets"),
    (4, "two-sided", "two_sided", "one-sided radius only"),
])
def test_logs_that_do_not_compare_are_refused(
    compare, tmp_path, capsys, label, bound, column, said,
):
    write_log(tmp_path / "a.tsv", [(0, 3, 3, 0.8, 0.9), (1, 4, 4, 0.5, 0.6)])
    write_log(tmp_path / "b.tsv", [(0, 3, 3, 0.8, 0.9), (1, label, 4, 0.5, 0.6)])
    if column:
        text = (tmp_path / "b.tsv").read_text()
        (tmp_path / "b.tsv").write_text(text.replace(column, "another"))
    with pytest.raises(SystemExit) as stop:
        compare.main([str(tmp_path / "a.tsv"), str(tmp_path / "b.tsv"), "--bound", bound])
    assert stop.value.code == 2 and said in capsys.readouterr().err
