"""The literature's network beside the Fashion-MNIST results, and the paired comparison of two certification logs."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_fashion import write_files
from torchvision.datasets import FashionMNIST

import certify

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "results" / "fashion-mnist"


def open_script(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def lenet(monkeypatch):
    monkeypatch.delenv("LENET", raising=False)
    return open_script("lenet")


@pytest.fixture
def data_path(monkeypatch, tmp_path):
    """Torchvision's four files with a few hundred random images, each brighter where its label says."""
    monkeypatch.setattr(FashionMNIST, "mirrors", [])
    write_files(tmp_path / "data" / "FashionMNIST" / "raw")
    return str(tmp_path / "data")


def flags(data_path, out, objective, epochs=1):
    return ["--sigma", "0.25", "--objective", objective, "--data-path", data_path, "--out", str(out), "--device", "cpu",
            "--batch", "20", "--augment", "none", "--epochs", str(epochs), "--base-lr", "0.5"]


def test_the_network_is_the_literatures(lenet):
    network = lenet.LeNet()
    counts = [p.numel() for p in network.parameters()]
    assert counts == [20 * 25, 20, 50 * 20 * 25, 50, 500 * 50 * 16, 500, 10 * 500, 10]
    assert network[3].weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.rand(3, 1, 28, 28)
    first = torch.nn.functional.conv2d(x, network[0].weight, network[0].bias).relu()
    first = first.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
    second = torch.nn.functional.conv2d(first, network[3].weight, network[3].bias).relu()
    second = second.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2)).reshape(3, 800)
    hidden = (second @ network[7].weight.T + network[7].bias).relu()
    assert torch.allclose(network(x), hidden @ network[9].weight.T + network[9].bias, atol=1e-5)


def test_the_rate_falls_at_thirds(lenet):
    rates = [lenet.rate_at(step, 90, 0.01) for step in range(90)]
    assert rates == pytest.approx([0.01] * 30 + [0.001] * 30 + [0.0001] * 30)


@pytest.mark.parametrize(("objective", "dtype"), [("gaussian", "fp32"), ("smoothmix", "fp32"), ("gaussian", "bf16")])
def test_trained_and_certified(lenet, data_path, monkeypatch, tmp_path, capsys, objective, dtype):
    out = tmp_path / "run"
    lenet.main([*flags(data_path, out, objective), "--dtype", dtype])
    printed = capsys.readouterr().out
    assert printed.count("epoch ") == 1 and "noisy" in printed
    saved = torch.load(out / "lenet.pt", weights_only=True)
    (row,) = map(json.loads, (out / "lenet.jsonl").read_text().splitlines())
    assert saved["settings"]["objective"] == objective and saved["seconds"] > 0
    assert saved["settings"]["dtype"] == dtype
    assert saved["held_out"] == row["noisy"] and not (out / "lenet.last.pt").exists()
    torch.manual_seed(0)
    start = lenet.LeNet().state_dict()
    assert all(not torch.equal(start[name], value) for name, value in saved["model"].items())

    lenet.main([*flags(data_path, out, objective), "--dtype", dtype])
    assert "is done" in capsys.readouterr().out

    line = ["--sigma", "0.25", "--recipe", "fashion", "--data-path", data_path, "--out", str(out), "--device", "cpu",
            "--classifier", f"{FOLDER}/lenet.py:classifier", "--n", "100", "--n0", "20", "--skip", "4"]
    with pytest.raises(SystemExit):
        certify.main([*line, "--out", str(tmp_path / "none")])
    assert "LENET names no lenet.pt" in capsys.readouterr().err
    monkeypatch.setenv("LENET", str(out / "lenet.pt"))
    certify.main(line)
    rows = certify.read_rows(out / "certify_sigma_0.25.tsv")
    test = certify.open_images("fashion-mnist", data_path, False, 28, 1)
    network = lenet.read(out / "lenet.pt")
    for row in rows[:3]:
        x = test.read(row["idx"]) / 255
        expected = certify.certify(network, x, 0.25, n0=20, n=100, index=row["idx"])
        assert (row["predict"], row["radius"]) == (expected[0], pytest.approx(expected[1], abs=1e-6))
    assert len(rows) == 10


def test_killed_after_an_epoch_it_ends_with_the_same_bits(lenet, data_path, monkeypatch, tmp_path):
    lenet.main(flags(data_path, tmp_path / "whole", "gaussian", epochs=3))
    measure, calls = lenet.finetune.measure, []

    def dying(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(lenet.finetune, "measure", dying)
        lenet.main(flags(data_path, tmp_path / "cut", "gaussian", epochs=3))
    assert (tmp_path / "cut" / "lenet.last.pt").exists() and not (tmp_path / "cut" / "lenet.pt").exists()
    lenet.main(flags(data_path, tmp_path / "cut", "gaussian", epochs=3))
    whole, cut = (torch.load(tmp_path / name / "lenet.pt", weights_only=True) for name in ("whole", "cut"))
    assert whole["held_out"] == cut["held_out"] > 0.5
    assert all(torch.equal(value, cut["model"][name]) for name, value in whole["model"].items())
    assert len((tmp_path / "cut" / "lenet.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("more", [["--model", "vit_fashion"], ["--layer-decay=0.5"], ["--min-lr", "0"]])
def test_flags_of_another_network_are_refused(lenet, tmp_path, capsys, more):
    with pytest.raises(SystemExit) as stop:
        lenet.main(["--sigma", "0.25", "--out", str(tmp_path / "run"), *more])
    assert stop.value.code == 2 and "LeNet does not take" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def write_log(path, rows):
    """A TSV of (idx, label, top, one-sided, two-sided) rows in certify.py's columns; radius -1 abstains."""
    lines = ["\t".join(certify.COLUMNS)]
    for idx, label, top, one, two in rows:
        predict = top if one >= 0 else -1
        cells = dict(idx=idx, label=label, predict=predict, radius=max(one, 0), correct=int(predict == label),
                     time="0:00:01.0", count=900, n=1000, sigma=0.5, alpha=0.001, top=top, runner_up=50, classes=10,
                     one_sided=one, two_sided=two)
        lines.append("\t".join(str(cells[name]) for name in certify.COLUMNS))
    path.write_text("\n".join(lines) + "\n")


def test_the_paired_comparison_is_numpys(tmp_path, capsys):
    compare = open_script("compare")
    # Right, wrong in one, abstained in one (not by the two-sided bound), wrong in both; 5 and 6 are in one log only.
    write_log(tmp_path / "a.tsv", [(0, 3, 3, 0.8, 0.9), (1, 4, 4, 0.5, 0.6), (2, 5, 5, -1, 0.1), (3, 6, 1, 0.7, 0.7), (5, 1, 1, 9, 9)])
    write_log(tmp_path / "b.tsv", [(3, 6, 2, 0.4, 0.4), (2, 5, 5, 0.3, 0.35), (1, 4, 0, 0.9, 0.9), (0, 3, 3, 0.6, 0.65), (6, 1, 1, 9, 9)])
    a, b = (certify.read_rows(tmp_path / name) for name in ("a.tsv", "b.tsv"))
    radii = {"one-sided": ([0.8, 0.5, 0, 0], [0.6, 0, 0.3, 0]), "two-sided": ([0.9, 0.6, 0.1, 0], [0.65, 0, 0.35, 0])}
    for bound, (of_a, of_b) in radii.items():
        of_a, of_b = np.array(of_a), np.array(of_b)
        mean, error, images, first, second = compare.paired(a, b, bound)
        assert images == first.m == second.m == 4
        assert mean == pytest.approx(np.mean(of_a - of_b)) and error == pytest.approx(np.std(of_a - of_b, ddof=1) / 2)
        assert (first.acr, second.acr) == pytest.approx((of_a.mean(), of_b.mean()))
        compare.main([str(tmp_path / "a.tsv"), str(tmp_path / "b.tsv"), "--bound", bound])
        printed = capsys.readouterr().out
        assert f"mean {mean:+.4f}, standard error {error:.4f}, 4 images" in printed and "2 rows are left out" in printed
        assert f"{of_a.mean():.3f}" in printed and f"{of_b.mean():.3f}" in printed


def test_logs_of_other_data_are_not_compared(tmp_path, capsys):
    compare = open_script("compare")
    write_log(tmp_path / "a.tsv", [(0, 3, 3, 0.8, 0.9), (1, 4, 4, 0.5, 0.6)])
    write_log(tmp_path / "b.tsv", [(0, 3, 3, 0.8, 0.9), (1, 7, 4, 0.5, 0.6)])
    with pytest.raises(SystemExit) as stop:
        compare.main([str(tmp_path / "a.tsv"), str(tmp_path / "b.tsv")])
    assert stop.value.code == 2 and "different data sets" in capsys.readouterr().err
