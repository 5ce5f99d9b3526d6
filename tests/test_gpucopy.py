"""Every path that only a GPU takes, on one NVIDIA GPU: `pytest -m gpu tests/test_gpu.py`.

Without one, all of it is skipped. Autocast to bf16, torch.compile, NCCL, pinned memory, a kill -9
and what it leaves, the certifier's counts against the CPU's, and a training step's memory against
what bench.py --cost counts.
"""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from test_training import TINY_RGB, rows, same_weights
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import certify
import finetune
import model
import pretrain
from extras import integer_noise

DEVICE = "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(False, reason="there is no CUDA device"),
]

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SHORT = ["--batch", "128", "--warmup-epochs", "1", "--device", DEVICE]       # 10 steps an epoch
SCRATCH = ["--sigma", "0.25", "--init", "scratch"]
PRETRAIN = [*SHORT, "--epochs", "4"]
FINETUNE = [*SHORT, *SCRATCH, "--epochs", "4"]
CERTIFY = ["--sigma", "0.25", "--n", "2000", "--skip", "30", "--device", DEVICE]


@pytest.fixture(autouse=True)
def compiled_anew():
    """Else, after eight variants of a network, torch would run the next ones uncompiled."""
    torch.compiler.reset()


def losses(log):
    """{step: loss} of a training log."""
    return {row["step"]: row["loss"] for row in rows(log) if "loss" in row}


def counts(tsv):
    """[(image, class, how often it was answered)] of a certification."""
    lines = [line.split("\t") for line in tsv.read_text().splitlines()]
    image, top, k = (lines[0].index(name) for name in ("idx", "top", "count"))
    return [(int(line[image]), int(line[top]), int(line[k])) for line in lines[1:]]


# --------------------------------------------------------------------------------------------------
# The defaults of a GPU, and several processes. This file is also the script that torchrun starts
# --------------------------------------------------------------------------------------------------


class OneOfMany(int):
    """A number of processes that is 1 and calls itself more: a stage does all that many do."""

    def __gt__(self, other):
        return True


def three_stages(out, checkpoint):
    """All stages, into folders of `out`; the last one certifies another checkpoint, the same."""
    pretrain.main([*PRETRAIN, "--out", f"{out}/pretrain"])
    finetune.main([*FINETUNE, "--out", f"{out}/finetune"])
    certify.main([*CERTIFY, "--checkpoint", str(checkpoint), "--out", f"{out}/certify"])


@pytest.fixture(scope="module")
def defaults(tmp_path_factory, tiny_run):
    """What the three stages do with a GPU's defaults, and the same under torchrun.

    (folder of both; status and output of one process under torchrun; the modules that the stages
    compiled)
    """
    out, checkpoint = tmp_path_factory.mktemp("defaults"), tiny_run / "finetune_sigma_0.25.pt"
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    line += [__file__, str(out / "torchrun"), str(checkpoint)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           env=environment)
    watched = mock.patch.object(nn.Module, "compile", autospec=True, side_effect=nn.Module.compile)
    try:
        with watched as compiled:
            three_stages(out / "alone", checkpoint)
        output = job.communicate(timeout=300)[0]
    finally:
        job.kill()
    modules = [type(call.args[0]).__name__ for call in compiled.call_args_list]
    return out, job.returncode, output, modules


def test_by_default_all_stages_are_compiled_and_run_in_bf16(defaults):
    out, _, _, compiled = defaults
    device, dtype = pretrain.pick_device("auto", "auto")
    assert (device.type, dtype) == (DEVICE, "bf16")
    stems = ("pretrain/pretrain", "finetune/finetune_sigma_0.25", "certify/certify_sigma_0.25")
    for stem in stems:
        assert json.loads((out / "alone" / f"{stem}.json").read_text())["dtype"] == "bf16"
    assert compiled == ["DenoisingMaskedAutoencoder", "VisionTransformer", "VisionTransformer"]


def test_the_stages_run_in_a_process_group_of_nccl_and_do_the_same(defaults):
    out, status, output, _ = defaults
    assert status == 0, output
    assert "backends: cpu:gloo,cuda:nccl" in output, output
    assert "gradients averaged: 2 networks" in output, output
    for log in ("pretrain/pretrain.jsonl", "finetune/finetune_sigma_0.25.jsonl"):
        alone, grouped = (losses(out / which / log) for which in ("alone", "torchrun"))
        assert len(alone) >= 4 and grouped == pytest.approx(alone, rel=0.02)
    tsv = "certify/certify_sigma_0.25.tsv"
    alone, grouped = (counts(out / which / tsv) for which in ("alone", "torchrun"))
    assert len(alone) == 12
    for (image, top, k), (same_image, same_top, same_k) in zip(alone, grouped, strict=True):
        assert (image, top) == (same_image, same_top)
        assert abs(k - same_k) <= 10                           # of 2000, with the same noise


def test_compiled_or_not_a_run_has_the_same_losses(defaults, tmp_path):
    out, _, _, _ = defaults
    pretrain.main([*PRETRAIN, "--compile", "off", "--out", str(tmp_path)])
    finetune.main([*FINETUNE, "--compile", "off", "--out", str(tmp_path)])
    for log in ("pretrain/pretrain.jsonl", "finetune/finetune_sigma_0.25.jsonl"):
        compiled, eager = losses(out / "alone" / log), losses(tmp_path / Path(log).name)
        assert eager == pytest.approx(compiled, rel=0.02)


def test_compiled_or_not_a_step_has_the_same_loss_and_gradients_in_fp32():
    device = torch.device(DEVICE)
    args = pretrain.parse(["--dtype", "fp32", "--device", DEVICE])
    images = torch.rand(128, 1, 8, 8, device=device)
    found = []
    for compiled in (False, True):
        network = pretrain.build_model(args, device)
        drawn = pretrain.draw_corruption(images, network.grid, 0)
        if compiled:
            network.compile()
        loss, _, _ = network(images, args.sigma, args.mask_ratio, *drawn)
        loss.backward()
        gradients = (p.grad for p in network.parameters() if p.grad is not None)
        found.append([loss.detach(), *gradients])
    assert len(found[0]) > 20
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype, inside", [
    ("auto", torch.bfloat16), ("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_networks_products_are_of_the_dtype_and_its_weights_of_fp32(tmp_path, dtype, inside):
    seen, build = set(), pretrain.build_dmae

    def watched(*args, **kwargs):
        network = build(*args, **kwargs)
        network.blocks[0].mlp.fc1.register_forward_hook(
            lambda module, inputs, output: seen.add((module.training, output.dtype)))
        return network

    with mock.patch.object(pretrain, "build_dmae", watched):
        pretrain.main([*SHORT, "--epochs", "1", "--dtype", dtype, "--compile", "off",
                       "--out", str(tmp_path)])
    assert {kind for training, kind in seen if training} == {inside}
    weights = model.read_checkpoint(tmp_path / "pretrain.pt")["model"]
    assert {value.dtype for value in weights.values()} == {torch.float32}


# --------------------------------------------------------------------------------------------------
# Pictures from files
# --------------------------------------------------------------------------------------------------


def test_pictures_come_through_pinned_memory_as_they_are_on_a_cpu(make_folder):
    images = pretrain.open_images("folder", make_folder(80), True, 80, 3, torch.device(DEVICE))
    augment = finetune.make_augment("rand-augment", images, 0.25)
    order = list(torch.arange(18).reshape(6, 3).T)             # three batches of six
    pinned, loader = [], torch.utils.data.DataLoader

    class Watched(loader):
        def __iter__(self):
            for batch in super().__iter__():
                pinned.extend(part.is_pinned() for part in batch)
                yield batch

    def batches(device, workers):
        for epoch in range(2):
            yield from pretrain.load_batches(images, order, device, augment, 3, epoch, workers)

    with mock.patch.object(pretrain, "DataLoader", Watched):
        there = list(batches(torch.device(DEVICE), 2))
    here = list(batches(CPU, 1))
    assert pinned == [False] * 12
    for (x, labels), (same_x, same_labels) in zip(there, here, strict=True):
        assert x.device.type == labels.device.type == DEVICE
        assert torch.equal(labels.cpu(), same_labels)
        # x is k / 255 for a byte k, and division there may err in its last bit.
        torch.testing.assert_close(x.cpu(), same_x, rtol=2e-7, atol=0)


def test_class_folders_go_through_both_stages_with_data_workers(
        monkeypatch, make_folder, tmp_path):
    monkeypatch.setitem(model.SIZES, "vit_cifar_tiny", TINY_RGB)             # it resizes to 16
    common = ["--recipe", "cifar10", "--batch", "6", "--epochs", "2", "--warmup-epochs", "1"]
    common += ["--workers", "2", "--compile", "off", "--device", DEVICE, "--out", str(tmp_path)]
    pretrain.main([*common, "--dataset", "folder", "--data-path", str(make_folder(80)), "--size",
                   "80", "--model", "vit_cifar_tiny", "--holdout", "3", "--augment",
                   "resized-crop"])
    finetune.main([*common, "--sigma", "0.5", "--augment", "rand-augment", "--mixup", "0.8",
                   "--cutmix", "1", "--erasing", "0.25"])
    tested = rows(tmp_path / "finetune_sigma_0.5.jsonl")[-1]
    assert tested["split"] == "test" and 0 <= tested["vote"] <= 1


# --------------------------------------------------------------------------------------------------
# Same command, same bits
# --------------------------------------------------------------------------------------------------

DETERMINISTIC = """
import sys
import torch
import {stage}
torch.use_deterministic_algorithms(True)
{stage}.main(sys.argv[1:])
"""


def start_stage(stage, out, log):
    """A stage with torch's deterministic kernels, 20 epochs and a checkpoint every 5."""
    line = [sys.executable, "-c", DETERMINISTIC.format(stage=stage), *SHORT, "--epochs", "20"]
    line += ["--save-every", "5", "--out", str(out)]
    if stage == "finetune":
        line += SCRATCH
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    with open(log, "w") as file:
        return subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, env=environment)


def kill_after_a_checkpoint(job, out, stem):
    """kill -9 as soon as there is something to go on from."""
    end = time.time() + 240
    while not (out / f"{stem}.last.pt").exists():
        assert job.poll() is None and time.time() < end, "ended before its first checkpoint"
        time.sleep(0.01)
    job.kill()
    job.wait()
    assert not (out / f"{stem}.pt").exists()


def test_a_run_that_was_killed_and_continued_has_the_bits_of_one_that_was_not(tmp_path):
    """Which says, too, that a command has the same bits twice.

    Both stages at once, since starting takes the time.
    """
    stems = {"pretrain": "pretrain", "finetune": "finetune_sigma_0.25"}
    whole, killed = ({stage: tmp_path / which / stage for stage in stems}
                     for which in ("whole", "killed"))
    jobs = []

    def start(stage, out, kind):
        jobs.append(start_stage(stage, out[stage], tmp_path / f"{stage}.{kind}.log"))
        return jobs[-1]

    try:
        undisturbed = [start(stage, whole, "whole") for stage in stems]
        doomed = {stage: start(stage, killed, "killed") for stage in stems}
        for stage in ("finetune", "pretrain"):
            kill_after_a_checkpoint(doomed[stage], killed[stage], stems[stage])
        again = [start(stage, killed, "again") for stage in stems]
        statuses = [job.wait(timeout=240) for job in undisturbed + again]
    finally:
        for job in jobs:
            job.kill()
    said = "\n".join(log.read_text()[-3000:] for log in sorted(tmp_path.glob("*.log")))
    assert statuses == [0, 0, 0, 0], said
    for stage, stem in stems.items():
        assert "continuing" in (tmp_path / f"{stage}.again.log").read_text()
        one, other = (rows(out[stage] / f"{stem}.jsonl") for out in (whole, killed))
        before = [[row for row in log if row["step"] <= 50] for log in (one, other)]
        assert before[0] == before[1], "not the same twice"
        assert one == other, "not the same after the kill"
        assert same_weights(whole[stage] / f"{stem}.pt", killed[stage] / f"{stem}.pt")


# --------------------------------------------------------------------------------------------------
# Certification: the device's counts and the CPU's
# --------------------------------------------------------------------------------------------------

DRAWS = 5000


def answers(checkpoint, device, dtype, compiled, sound=False):
    """How often each class is answered under noise: (16 images, classes)."""
    args, content = certify.parse(["--sigma", "0.25", "--checkpoint", str(checkpoint), "--dtype",
                                   dtype, "--compile", "on" if compiled else "off"])
    test = certify.open_images("digits", "", False, 8, 1, "cpu")
    requests = []
    for i in range(0, 352, 22):
        x = test.items[i][0].to(device) / test.white
        requests.append((i, x, certify.generator_for(0, i, 1, device), DRAWS))
    f = certify.open_classifier(args, content, device)
    if not sound:
        return certify.count_under_noise(f, requests, 0.25, 400)
    noise = integer_noise.GridNoise(0.25, test.white, device)
    return torch.stack([integer_noise.count(f, x, noise, generator, copies)
                        for _, x, generator, copies in requests])


def disagreements(a, b, slack):
    """How many of the counts a and b cannot come from probabilities within `slack`.

    Their Clopper-Pearson intervals, each missed in one of 5,000 cases, do not meet.
    """
    far = 0
    for one, other in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True):
        small, large = sorted((one, other))
        highest = certify.upper_confidence_bound(small, DRAWS, 1e-4)
        far += certify.lower_confidence_bound(large, DRAWS, 1e-4) > highest + slack
    return far


@pytest.fixture(scope="module")
def answers_of_the_cpu(tiny_run):
    return answers(tiny_run / "finetune_sigma_0.25.pt", CPU, "fp32", False)


@pytest.mark.parametrize("dtype, compiled, sound, slack", [
    ("fp32", False, False, 0),
    ("fp32", True, False, 0),
    ("bf16", True, False, 0.02),
    ("fp32", False, True, 0.005),
])
def test_the_certifier_counts_on_the_device_what_it_counts_on_a_cpu(
        tiny_run, answers_of_the_cpu, dtype, compiled, sound, slack):
    """But for other noise of the same law.

    In bf16 f is another function, with nearly the same decision regions.
    """
    checkpoint = tiny_run / "finetune_sigma_0.25.pt"
    there = answers(checkpoint, torch.device(DEVICE), dtype, compiled, sound)
    assert there.shape == (16, 10)
    assert (DRAWS - there.sum(dim=1)).max() <= (5 if sound else 0)
    assert not torch.equal(there, answers_of_the_cpu)          # other noise, or it were no test
    assert disagreements(there, answers_of_the_cpu, slack) == 0
    of_others = there.roll(1, dims=0)
    assert disagreements(of_others, answers_of_the_cpu, slack) > 10


def test_the_certifier_draws_the_same_noise_again(tiny_run):
    how = (tiny_run / "finetune_sigma_0.25.pt", torch.device(DEVICE), "fp32", False)
    first, again = answers(*how), answers(*how)
    assert (first - again).abs().max() <= 2       # the documented exception: a logit's last bits


# --------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------


def counted_memory(recipe, batch):
    """GiB of a pre-training step as bench.py --cost prints it.

    In a process of its own, for its tensors have no content.
    """
    line = [sys.executable, str(ROOT / "tests/bench.py"), "--cost", recipe, "--stage", "pretrain"]
    line += ["--batch", str(batch)]
    job = subprocess.run(line, capture_output=True, text=True, check=True)
    return float(re.search(r"backwards; ([\d.]+) GiB: ", job.stdout)[1])


def test_a_step_takes_the_memory_that_is_counted():
    batch, device = 64, torch.device(DEVICE)
    counted = counted_memory("imagenet-base", batch)
    args = pretrain.parse(["--recipe", "imagenet-base", "--dtype", "bf16", "--device", DEVICE])
    before = torch.cuda.memory_allocated()
    network = pretrain.build_model(args, device)
    optimizer = pretrain.build_optimizer(network, args)
    images = torch.rand(batch, 3, 224, 224, device=device)
    torch.cuda.reset_peak_memory_stats()
    for step in range(2):                         # the second one has the optimizer's moments, too
        loss = pretrain.train_step(network, optimizer, iter([(images, None)]), 1, args, step)
    taken = (torch.cuda.max_memory_allocated() - before) / 2**30
    print(f"ViT-B, {batch} images in bf16: {taken:.2f} GiB, counted {counted:.2f}")
    assert math.isfinite(loss) and taken == pytest.approx(counted, rel=0.2)


if __name__ == "__main__":
    averaged = []
    for stage in (pretrain, finetune):
        stage.WORLD = OneOfMany(1)                # it joins a group, with the backends for many
        parallelise = stage.parallelise

        def watched(*args, parallelise=parallelise):
            network = parallelise(*args)
            averaged.append(isinstance(network, DistributedDataParallel))
            return network

        stage.parallelise = watched
    three_stages(*sys.argv[1:])
    print(f"backends: {dist.get_backend_config()}; gradients averaged: {sum(averaged)} networks")
