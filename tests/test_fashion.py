"""MNIST and Fashion-MNIST: where the files are looked for, and all stages on a few hundred random images in their format."""

import gzip
import json
import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, MNIST, FashionMNIST

import certify
import finetune
import model
import pretrain

ROOT = Path(__file__).parents[1]
STAGES = [pretrain, finetune, certify]
NAMES = {"mnist": MNIST, "fashion-mnist": FashionMNIST}
COUNTS = {"train": 300, "t10k": 40}


def idx(values):
    """The bytes of an array in MNIST's format: a word with its type and number of axes, their lengths, the content."""
    return struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_files(folder, compress=False):
    """Four files of random images, each brighter where its label says; returns {part: (pixels, labels)}."""
    folder.mkdir(parents=True)
    random, made = np.random.default_rng(0), {}
    for part, count in COUNTS.items():
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = random.integers(0, 100, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            image[2 * label:2 * label + 6] += 150
        for name, values in ((f"{part}-images-idx3-ubyte", pixels), (f"{part}-labels-idx1-ubyte", labels)):
            content = idx(values)
            file = folder / (f"{name}.gz" if compress else name)
            file.write_bytes(gzip.compress(content) if compress else content)
        made[part] = pixels, labels
    return made


def same_images(stage, dataset, data_path, made):
    """Whether the stage opens just what was made."""
    for train, part in ((True, "train"), (False, "t10k")):
        images, (pixels, labels) = stage.open_images(dataset, data_path, train, 28, 1), made[part]
        assert (images.size, images.channels, images.levels, images.files) == (28, 1, 255, None)
        assert images.classes == NAMES[dataset].classes and len(images) == COUNTS[part]
        assert images.pixels.dtype == torch.uint8 and images.labels.dtype == torch.int64
        if images.pixels.shape != (COUNTS[part], 1, 28, 28) or images.read(3).shape != (1, 28, 28):
            return False
        if not (np.array_equal(images.pixels[:, 0], pixels) and np.array_equal(images.labels, labels)):
            return False
    return True


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and no files of Debian's: returns the folder where they would be."""
    for source in NAMES.values():
        monkeypatch.setattr(source, "mirrors", [])
    for stage in STAGES:
        monkeypatch.setattr(stage, "DEBIAN_FASHION", str(tmp_path / "debian"))
    return tmp_path / "debian"


@pytest.mark.parametrize("dataset", NAMES)
@pytest.mark.parametrize("stage", STAGES)
def test_torchvisions_files_are_opened_and_come_before_debians(offline, tmp_path, capsys, stage, dataset):
    made = write_files(tmp_path / "data" / NAMES[dataset].__name__ / "raw")
    write_files(offline, compress=True)
    for file in offline.iterdir():
        file.write_bytes(b"never looked at")
    assert same_images(stage, dataset, tmp_path / "data", made)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("dataset", NAMES)
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_missing_is_downloaded_once(offline, monkeypatch, tmp_path, stage, dataset):
    source, made, calls = NAMES[dataset], {}, []

    def download(self):
        calls.append(self.raw_folder)
        if not self._check_exists():
            made.update(write_files(Path(self.raw_folder)))

    monkeypatch.setattr(source, "download", download)
    stage.open_images(dataset, tmp_path / "data", True, 28, 1)
    assert same_images(stage, dataset, tmp_path / "data", made)
    assert {*calls} == {str(tmp_path / "data" / source.__name__ / "raw")}


@pytest.mark.parametrize("stage", STAGES)
def test_debians_files_are_read_where_torchvision_has_none_and_it_is_said(offline, tmp_path, capsys, stage):
    (tmp_path / "data" / "FashionMNIST" / "raw").mkdir(parents=True)                      # what a failed download leaves
    made = write_files(offline, compress=True)
    assert same_images(stage, "fashion-mnist", tmp_path / "data", made)
    first, second = capsys.readouterr().out.splitlines()
    assert "300 images" in first and "40 images" in second and str(offline) in first
    with pytest.raises(ValueError, match="MNIST/raw lacks mnist"):                        # they are not digits
        stage.open_images("mnist", tmp_path / "data", True, 28, 1)


@pytest.mark.parametrize("dataset", NAMES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_missing_data_set_is_one_line_with_the_ways_to_get_it(offline, tmp_path, capsys, stage, dataset):
    source = "def f(x):\n    return x.flatten(1)[:, :2]\n"
    (tmp_path / "mine.py").write_text(source)
    recipe = dataset.removesuffix("-mnist")
    more = {pretrain: [], finetune: ["--sigma", "0.25", "--init", "scratch"],
            certify: ["--sigma", "0.25", "--classifier", f"{tmp_path}/mine.py:f"]}[stage]
    with pytest.raises(SystemExit) as stop:
        stage.main(["--recipe", recipe, "--data-path", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--device",
                    "cpu", *more])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1, error
    assert f"lacks {dataset}" in error and str(tmp_path / "data") in error and "network" in error
    assert ("apt-get install dataset-fashion-mnist" in error) == (dataset == "fashion-mnist")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_cifar10_that_cannot_be_downloaded_is_the_same_line(monkeypatch, tmp_path, stage):
    def fail(self):
        raise RuntimeError("no such host")

    monkeypatch.setattr(CIFAR10, "download", fail)
    with pytest.raises(ValueError, match=r"lacks cifar10, and the download failed \(no such host\): run this once where"):
        stage.open_images("cifar10", str(tmp_path), True, 32, 3)


@pytest.mark.parametrize("stage", STAGES)
def test_a_cut_file_is_not_a_data_set_and_no_data_path_is_said(offline, tmp_path, stage):
    write_files(tmp_path / "data" / "FashionMNIST" / "raw")
    cut = tmp_path / "data" / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(ValueError, match="lacks fashion-mnist"):
        stage.open_images("fashion-mnist", tmp_path / "data", True, 28, 1)
    with pytest.raises(ValueError, match="needs a --data-path"):
        stage.open_images("mnist", None, True, 28, 1)


@pytest.mark.slow
def test_every_process_says_in_one_line_what_is_missing(torchrun, tmp_path):
    nowhere = dict(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9", OMP_NUM_THREADS="1")
    job = torchrun(2, ROOT / "pretrain.py", "--recipe", "mnist", "--data-path", tmp_path, "--device", "cpu",
                   env=os.environ | nowhere, stderr=subprocess.PIPE)
    said = [line for line in job.communicate(timeout=120)[1].splitlines() if line.startswith("pretrain.py: ")]
    assert job.returncode != 0 and 1 <= len(said) <= 2 and all("lacks mnist" in line for line in said)


# ---------------------------------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path(certify.DEBIAN_FASHION).is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_the_normalisation_is_that_of_the_training_images(tmp_path):
    images = certify.open_images("fashion-mnist", tmp_path, True, 28, 1)
    pixels = images.pixels.double() / 255
    assert images.pixels.shape == (60_000, 1, 28, 28) and images.labels.bincount().tolist() == [6000] * 10
    found = model.NORMALISATION["fashion-mnist"]
    assert (round(pixels.mean().item(), 4), round(pixels.std().item(), 4)) == (*found["mean"], *found["std"])


@pytest.mark.parametrize("stage", STAGES)
def test_digits_are_trained_as_clothes_are_but_never_flipped(stage):
    fashion, digits = (stage.RECIPES[name] for name in ("fashion", "mnist"))
    assert {key for key in fashion if fashion[key] != digits[key]} <= {"dataset", "normalisation", "augment"}
    assert digits["dataset"] == "mnist" and fashion["dataset"] == "fashion-mnist"
    recipes = [digits] if stage is not finetune else [digits, finetune.PROBES["mnist"]]
    assert not any("flip" in recipe.get("augment", "") for recipe in recipes)


@pytest.mark.parametrize("dataset", NAMES)
def test_all_stages_run_on_a_few_hundred_images(offline, monkeypatch, tmp_path, capsys, dataset):
    monkeypatch.setitem(model.SIZES, "vit_fashion", model.SIZES["vit_fashion"] | dict(dim=32, depth=2, decoder_dim=16))
    write_files(tmp_path / "data" / NAMES[dataset].__name__ / "raw")
    common = ["--out", str(tmp_path / "run"), "--device", "cpu"]
    train = [*common, "--batch", "50", "--warmup-epochs", "0", "--base-lr", "0.01", "--log-every", "3"]
    pretrain.main([*train, "--recipe", dataset.removesuffix("-mnist"), "--data-path", str(tmp_path / "data"), "--epochs", "2"])
    finetune.main([*train, "--sigma", "0.25", "--epochs", "6", "--augment", "none", "--consistency", "0"])
    certify.main([*common, "--sigma", "0.25", "--n", "100", "--n0", "20", "--skip", "4"])
    assert "10 images" in capsys.readouterr().out
    tuned = model.read_checkpoint(tmp_path / "run" / "finetune_sigma_0.25.pt", "finetune")
    expected = model.NORMALISATION[dataset]
    assert tuned["data"]["dataset"] == dataset and tuned["data"]["classes"] == NAMES[dataset].classes
    assert (tuned["config"]["mean"], tuned["config"]["std"]) == (expected["mean"], expected["std"])
    for log in ("pretrain.jsonl", "finetune_sigma_0.25.jsonl"):
        logged = [json.loads(line) for line in (tmp_path / "run" / log).read_text().splitlines()]
        losses = [row["loss"] for row in logged if "loss" in row]
        assert len(losses) > 1 and losses[-1] < losses[0]
    assert logged[-1]["split"] == "test" and 0 <= logged[-1]["vote"] <= 1
    rows = (tmp_path / "run" / "certify_sigma_0.25.tsv").read_text().splitlines()[1:]
    assert [int(row.split("\t")[0]) for row in rows] == [*range(0, 40, 4)]
    assert [int(row.split("\t")[1]) for row in rows] == [i % 10 for i in range(0, 40, 4)]
