import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
import pretrain
from model import build_dmae, build_vit

ROOT = Path(__file__).parents[1]

signal.signal(signal.SIGINT, signal.default_int_handler)       # a shell's background jobs ignore it
torch.set_num_threads(1)             # threads that wait for each other are many times slower


def pytest_collection_modifyitems(items):
    """The benchmark comes last: after a backward pass of fake tensors no fork can have one."""
    items.sort(key=lambda item: item.path.name == "test_bench.py")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def plugs_are_forgotten(tmp_path_factory):
    """What a test's FILE.py:NAME imported from a temporary folder is no other test's."""
    path, folder = [*sys.path], str(tmp_path_factory.getbasetemp())
    yield
    sys.path[:] = path
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, "__file__", "")).startswith(folder):
            del sys.modules[name]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A run directory on digits, with pretrain.pt and finetune_sigma_0.25.pt of two epochs each.

    It is not to be written to.
    """
    out = tmp_path_factory.mktemp("tiny_run")
    common = ["--epochs", "2", "--warmup-epochs", "1", "--out", str(out), "--device", "cpu"]
    pretrain.main(common)
    finetune.main(["--sigma", "0.25", *common])
    return out


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory):
    """make(...) -> a new folder with train/ and val/: class folders of so many pictures each."""

    def make(side=32, classes=3, train=6, test=2, grey=False):
        root, random = tmp_path_factory.mktemp("folder"), np.random.default_rng(side)
        shape = (side, side) if grey else (side, side, 3)
        for split, count in (("train", train), ("val", test)):
            for label in range(classes):
                folder = root / split / f"class_{label}"
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = random.integers(0, 160, shape, dtype=np.uint8) + np.uint8(30 * label)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
        return root

    return make


@pytest.fixture(scope="session")
def folder8(make_folder):
    """Class folders of 3 x 40 training and 3 x 5 test pictures, 1 x 8 x 8: soon evaluated."""
    return make_folder(8, train=40, test=5, grey=True)


@pytest.fixture
def torchrun():
    """torchrun(processes, script, *arguments, flags=(), **popen) -> the Popen of a `torchrun`.

    `flags` are torchrun's own, `arguments` the script's (--N, --N0 and --limit, which torchrun does
    not take for its own). One thread a process; the script finds model.py and the stages. Its
    output is text, in pipes: both streams in job.communicate()[0], or as **popen says. A job that a
    test leaves running, because it failed, is ended.
    """
    jobs = []

    def start(processes, script, *arguments, flags=(), **popen):
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        line += [f"--nproc_per_node={processes}", *flags, script, *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        how = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        jobs.append(subprocess.Popen([str(part) for part in line], **how | popen))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.poll() is None:
            job.terminate()                                    # torchrun passes it on, and kills
            job.communicate()                                  # after 30 s


@pytest.fixture
def tiny_vit():
    """make(**overrides) -> a VisionTransformer in eval mode whose weights are random, none zero."""

    def make(**overrides):
        torch.manual_seed(1)
        size = dict(image_size=8, dim=16, depth=2, heads=2, num_classes=5)
        return randomise(build_vit("vit_digits", **size | overrides)).eval()

    return make


@pytest.fixture
def tiny_dmae():
    """make(**overrides) -> a DenoisingMaskedAutoencoder: 1 x 8 x 8, 16 patches, width 16."""

    def make(**overrides):
        torch.manual_seed(2)
        size = dict(dim=16, depth=2, heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2)
        return build_dmae("vit_digits", **size | overrides)

    return make


def randomise(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
