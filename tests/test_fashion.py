"""MNIST and Fashion-MNIST: where the files are looked for; all stages on a few hundred images."""

import gzip
import json
import os
import struct
import subprocess
import threading
import time
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
DEBIAN = Path("/usr/share/datasets/fashion-mnist")             # the package dataset-fashion-mnist
STAGES = [pretrain, finetune, certify]
NAMES = {"mnist": MNIST, "fashion-mnist": FashionMNIST}
COUNTS = {"train": 300, "t10k": 40}


def idx(values):
    """An array in MNIST's format: a word with type and number of axes, their lengths, content."""
    header = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return header + values.tobytes()


def write_files(folder):
    """Four files of random images, each brighter where its label says.

    Returns {part: (pixels, labels)}.
    """
    folder.mkdir(parents=True)
    random, made = np.random.default_rng(0), {}
    for part, count in COUNTS.items():
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = random.integers(0, 100, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            image[2 * label:2 * label + 6] += 150
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(pixels))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
        made[part] = pixels, labels
    return made


def open_part(dataset, data_path, train):
    """What all three stages do, letter for letter (test_plumbing.py)."""
    return certify.open_images(dataset, str(data_path), train, 28, 1, torch.device("cpu"))


def assert_same_images(dataset, data_path, made):
    for train, part in ((True, "train"), (False, "t10k")):
        images, (pixels, labels) = open_part(dataset, data_path, train), made[part]
        opened, answers = images.items.tensors
        assert (images.size, images.white, images.classes) == (28, 255, NAMES[dataset].classes)
        assert opened.dtype == torch.uint8 and opened.shape == (COUNTS[part], 1, 28, 28)
        assert images.labels.dtype == torch.int64 and torch.equal(answers, images.labels)
        assert np.array_equal(opened[:, 0], pixels) and np.array_equal(images.labels, labels)


@pytest.fixture
def offline(monkeypatch):
    for source in NAMES.values():
        monkeypatch.setattr(source, "mirrors", [])


@pytest.fixture(params=NAMES)
def dataset(request):
    return request.param


@pytest.fixture
def raw_folder(dataset, tmp_path):
    """Where torchvision has the four files of the data set, if it has them."""
    return tmp_path / "data" / NAMES[dataset].__name__ / "raw"


def test_torchvisions_files_are_opened(offline, tmp_path, raw_folder, dataset):
    made = write_files(raw_folder)
    assert_same_images(dataset, tmp_path / "data", made)


def test_what_is_missing_is_downloaded_by_one_process_at_a_time(
    monkeypatch, tmp_path, raw_folder, dataset,
):
    made, at_once, most = {}, [], []

    def download(self):
        at_once.append(self)
        most.append(len(at_once))
        time.sleep(0.05)
        if not self._check_exists():
            made.update(write_files(Path(self.raw_folder)))
        at_once.pop()

    monkeypatch.setattr(NAMES[dataset], "download", download)
    asking = [
        threading.Thread(target=open_part, args=(dataset, tmp_path / "data", True))
        for _ in range(3)
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert most == [1, 1, 1] and raw_folder.exists()
    assert_same_images(dataset, tmp_path / "data", made)


@pytest.mark.parametrize("stage", STAGES)
def test_a_missing_data_set_is_one_line_with_the_way_out(
    offline, tmp_path, capsys, stage, dataset,
):
    (tmp_path / "mine.py").write_text("def f(z):\n    return z.flatten(1)[:, :10]\n")
    more = {
        pretrain: [],
        finetune: ["--sigma", "0.25", "--init", "scratch"],
        certify: ["--sigma", "0.25", "--classifier", f"{tmp_path}/mine.py:f"],
    }
    line = ["--recipe", dataset.removesuffix("-mnist"), "--data-path", str(tmp_path / "data")]
    line += ["--out", str(tmp_path / "run"), "--device", "cpu", *more[stage]]
    with pytest.raises(SystemExit) as stop:
        stage.main(line)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1, error
    assert f"lacks {dataset}" in error and str(tmp_path / "data") in error
    assert "(delete that); download it elsewhere" in error
    assert not (tmp_path / "run").exists()


def test_what_the_download_says_is_said(monkeypatch, tmp_path):
    def fail(self):
        raise RuntimeError("no such host")

    monkeypatch.setattr(CIFAR10, "download", fail)
    with pytest.raises(ValueError, match="lacks cifar10.*no such host"):
        certify.open_images("cifar10", str(tmp_path), True, 32, 3, torch.device("cpu"))


def test_a_cut_file_is_not_a_data_set(offline, tmp_path, raw_folder, dataset):
    write_files(raw_folder)
    cut = raw_folder / "train-images-idx3-ubyte"
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"lacks {dataset}"):
        open_part(dataset, tmp_path / "data", True)


@pytest.mark.slow
def test_one_process_of_two_says_in_one_line_what_is_missing(torchrun, tmp_path):
    nowhere = dict(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    environment = os.environ | nowhere | dict(OMP_NUM_THREADS="1")
    line = [ROOT / "pretrain.py", "--recipe", "mnist", "--data-path", tmp_path, "--device", "cpu"]
    job = torchrun(2, *line, env=environment, stderr=subprocess.PIPE)
    lines = job.communicate(timeout=120)[1].splitlines()
    (said,) = [line for line in lines if line.startswith("pretrain.py: ")]
    assert job.returncode != 0 and "lacks mnist" in said


# --------------------------------------------------------------------------------------------------
# Recipes
# --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_the_normalisation_is_that_of_the_training_images(offline, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in DEBIAN.glob("*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    images = open_part("fashion-mnist", tmp_path, True)
    pixels = images.items.tensors[0].double() / 255
    assert pixels.shape == (60_000, 1, 28, 28)
    assert images.labels.bincount().tolist() == [6000] * 10
    found = model.NORMALISATION["fashion-mnist"]
    mean, deviation = round(pixels.mean().item(), 4), round(pixels.std().item(), 4)
    assert ((mean,), (deviation,)) == (found["mean"], found["std"])


@pytest.mark.parametrize("stage", STAGES)
def test_digits_are_trained_as_clothes_are_but_never_flipped(stage):
    fashion, digits = (stage.RECIPES[name] for name in ("fashion", "mnist"))
    differing = {key for key in fashion if fashion[key] != digits[key]}
    assert differing <= {"dataset", "augment"}
    assert (digits["dataset"], fashion["dataset"]) == ("mnist", "fashion-mnist")
    recipes = [digits] if stage is not finetune else [digits, finetune.PROBES["mnist"]]
    assert not any("flip" in recipe.get("augment", "") for recipe in recipes)


def test_all_stages_run_on_a_few_hundred_images(
    offline, monkeypatch, tmp_path, capsys, raw_folder, dataset,
):
    small = dict(dim=32, depth=2, decoder_dim=16)
    monkeypatch.setitem(model.SIZES, "vit_fashion", model.SIZES["vit_fashion"] | small)
    write_files(raw_folder)
    common = ["--out", str(tmp_path / "run"), "--device", "cpu"]
    train = [*common, "--batch", "50", "--warmup-epochs", "0", "--base-lr", "0.01"]
    data = ["--recipe", dataset.removesuffix("-mnist"), "--data-path", str(tmp_path / "data")]
    pretrain.main([*train, *data, "--epochs", "2"])
    plain = ["--augment", "none", "--objective", "gaussian"]
    finetune.main([*train, *plain, "--sigma", "0.25", "--epochs", "6"])
    certify.main([*common, "--sigma", "0.25", "--n", "100", "--n0", "20", "--skip", "4"])
    assert "0 of 10 images are there" in capsys.readouterr().out

    tuned = model.read_checkpoint(tmp_path / "run" / "finetune_sigma_0.25.pt", "finetune")
    assert tuned["data"]["dataset"] == dataset
    assert tuned["data"]["classes"] == NAMES[dataset].classes
    config, expected = tuned["config"], model.NORMALISATION[dataset]
    assert (config["mean"], config["std"]) == (expected["mean"], expected["std"])
    for log in ("pretrain.jsonl", "finetune_sigma_0.25.jsonl"):
        lines = (tmp_path / "run" / log).read_text().splitlines()
        logged = [json.loads(line) for line in lines]
        losses = [row["loss"] for row in logged if "loss" in row]
        assert len(losses) > 1 and losses[-1] < losses[0]
    assert logged[-1]["split"] == "test" and 0 <= logged[-1]["vote"] <= 1
    rows = certify.read_log(tmp_path / "run" / "certify_sigma_0.25.tsv")
    assert rows["idx"].tolist() == [*range(0, 40, 4)]
    assert rows["label"].tolist() == [i % 10 for i in range(0, 40, 4)]
