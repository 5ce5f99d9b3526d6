"""The benchmark runs, counts what the formulas say, and puts its table where it belongs."""

import functools
import json
import os
import platform
import re
import subprocess
import sys

import bench
import pytest
import torch

from model import SIZES, build_dmae, build_vit
from pretrain import draw_corruption


def test_the_benchmark_writes_rows_and_its_machines_table(tmp_path, capsys, monkeypatch):
    table, rows = tmp_path / "speed.md", tmp_path / "rows.json"
    table.write_text("before\n<!-- begin cpu -->\nold\n<!-- end cpu -->\nbetween\n"
                     "<!-- begin cuda -->\nkept\n<!-- end cuda -->\n")
    monkeypatch.setattr(bench, "large_matmul", functools.partial(bench.large_matmul, side=256))
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")                # without effect now; it must say so
    bench.main(["--device", "cpu", "--batch", "20", "--draws", "100", "--repeats", "2",
                "--compare", "--table", str(table), "--json", str(rows)])
    found = json.loads(rows.read_text())["rows"]
    assert [row["stage"] for row in found] == ["certify", "pretrain", "finetune"]
    for row in found:
        assert row["dtype"] == "fp32" and row["per_second"] > 0 and row["tflops"] > 0
        assert 0 < row["ratio_low"] <= row["ratio_to_bare"] <= row["ratio_high"]
        assert row["memory_gib"] > 0.05
        assert {"attention written out", "all of these"} < row["naive"].keys()
    text = table.read_text()
    assert text.startswith("before") and "old" not in text and "kept" in text
    assert text.count("| vit_digits | ") == 3 and text.index("vit_digits") < text.index("between")
    assert "`MALLOC_MMAP_MAX_=0 python tests/bench.py --device" in text


def test_naive_ways_do_the_same(tiny_vit):
    model, x = tiny_vit(num_classes=bench.CLASSES), torch.rand(1, 8, 8)
    assert bench.count_with_unique(model, x, 100, 20).sum() == 100
    images = torch.rand(3, 1, 8, 8)
    fused = model(images)
    with bench.attention_written_out():
        torch.testing.assert_close(model(images), fused)


def test_flops_are_those_of_the_formula_attention_included():
    d, n, patches, hidden, classes, depth, batch = 16, 17, 16, 32, 5, 2, 3
    vit = build_vit("vit_digits", classes, dim=d, depth=depth, heads=2)
    linear = batch * (depth * n * (2 * 4 * d * d + 2 * 2 * d * hidden) + 2 * d * classes)
    embed, attention = batch * 2 * patches * 4 * d, batch * depth * 4 * n * n * d
    logits, forward = bench.count_flops(lambda: vit(torch.rand(batch, 1, 8, 8)))
    assert forward == embed + linear + attention
    # Two products back for each one there; no gradient of pixels; attention's scores once more.
    backward = bench.count_flops(logits.sum().backward)[1]
    assert backward == embed + 2 * linear + 2.5 * attention


LARGE = ("cifar10", "imagenet-base", "imagenet-large", "imagenet-huge")


@pytest.mark.parametrize("recipe", [
    "digits", *(pytest.param(recipe, marks=pytest.mark.slow) for recipe in LARGE)])
def test_the_cost_of_a_recipes_step_is_the_formulas(recipe):
    """75 % of the patches are dropped (25 % of the digits').

    Fine-tuning sees two copies, for their consistency, or one.
    """
    counted = bench.cost(recipe, "pretrain", "fp32", batch=4)
    size = SIZES[counted["model"]]
    width, narrow, ratio = size["dim"], size["decoder_dim"], size.get("mlp_ratio", 4)
    patches, pixels = (size["image_size"] // size["patch_size"]) ** 2, size["patch_size"] ** 2
    kept = patches * (3 if recipe == "digits" else 1) // 4

    def block(tokens, width):
        linear = tokens * (2 * 4 * width**2 + 2 * 2 * width * ratio * width)
        return linear + 4 * tokens**2 * width

    embed = patches * 2 * pixels * size["channels"] * width
    decoder = (1 + kept) * 2 * width * narrow + size["decoder_depth"] * block(1 + patches, narrow)
    decoder += (1 + patches) * 2 * narrow * pixels * size["channels"]
    forward = embed + size["depth"] * block(1 + kept, width) + decoder
    assert counted["forward"] * 1e9 == pytest.approx(forward, rel=1e-9)
    assert 2 < counted["backward"] / counted["forward"] < 2.1
    bytes_of_weights = parameters(build_on_meta(build_dmae, counted["model"]))
    assert counted["weights"] * 2**30 == pytest.approx(bytes_of_weights)

    counted = bench.cost(recipe, "finetune", "fp32", batch=4)
    copies = 1 if recipe in ("imagenet-large", "imagenet-huge") else 2
    classes = 1000 if recipe.startswith("imagenet") else 10
    forward = copies * (embed + size["depth"] * block(1 + patches, width) + 2 * width * classes)
    assert counted["forward"] * 1e9 == pytest.approx(forward, rel=1e-9)
    bytes_of_weights = parameters(build_on_meta(build_vit, counted["model"], classes))
    assert counted["weights"] * 2**30 == pytest.approx(bytes_of_weights)


def build_on_meta(build, *arguments):
    with torch.device("meta"):
        return build(*arguments)


def parameters(model):
    """Bytes of fp32: a weight, and where it is trained its gradient and two moments."""
    return sum(p.numel() * (16 if p.requires_grad else 4) for p in model.parameters())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_counted_activations_are_those_of_real_tensors(dtype):
    model, images = build_dmae("vit_digits"), torch.rand(20, 1, 8, 8)

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            return model(images, 0.25, 0.25, *draw_corruption(images, model.grid, 0))[0]

    _, real = bench.activations_of(loss, model)
    counted = bench.cost("digits", "pretrain", dtype, batch=20)["activations"]
    assert counted == pytest.approx(real, rel=0.01)


def test_activations_grow_in_proportion_to_the_batch_and_shrink_in_bf16():
    cases = (("fp32", 10), ("fp32", 1000), ("bf16", 1000))
    few, many, half = (bench.cost("digits", "pretrain", *case) for case in cases)
    assert few["weights"] == many["weights"] == half["weights"]
    assert few["forward"] == pytest.approx(half["forward"])
    assert many["activations"] / few["activations"] == pytest.approx(100, rel=0.02)
    assert 0.4 < half["activations"] / many["activations"] < 0.8


def test_the_cost_is_one_line_for_each_stage_and_recipe(capsys):
    bench.main(["--cost", "digits", "digits"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    for line, stage in zip(lines, 2 * ["pretrain", "finetune"], strict=True):
        assert line.startswith(f"digits, {stage}, vit_digits in bf16")
        numbers = re.findall(r"([\d.]+) (?:GFLOP|backwards|GiB|for)", line)
        there, back, whole, weights, activations = map(float, numbers)
        assert 0 < there < back and whole == pytest.approx(weights + activations, rel=0.01)
        assert line.endswith("for 128 images' activations")


@pytest.mark.slow
def test_the_loader_is_measured_against_the_device(make_folder, capsys):
    bench.main(["--device", "cpu", "--stage", "data", "--data-path", str(make_folder(80)),
                "--repeats", "1", "--batch", "20"])
    out = capsys.readouterr().out
    assert "ours: uint8 tensor" in out and "vit_digits: the device pre-trains" in out
    alike = re.findall(r"at least (\d+)", out)                # three ways, one picture
    assert len(alike) == 2 and min(map(float, alike)) > 30


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of another allocator")
def test_the_environment_variables_that_keep_freed_memory_do_so():
    """Without them, a tensor that is freed and made again asks the system for all of its pages."""
    code = """
import resource, torch
faults = []
for _ in range(12):                                            # the first few find their place
    torch.ones(2**24)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-2])
"""
    pages = 2**24 * 4 / os.sysconf("SC_PAGE_SIZE")
    keep = dict(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(2**31 - 1))
    plain = {name: value for name, value in os.environ.items() if name not in bench.MEMORY}
    plain["THP_MEM_ALLOC_ENABLE"] = "0"

    def faults(environment):
        job = [sys.executable, "-c", code]
        return int(subprocess.run(job, capture_output=True, check=True, env=environment).stdout)

    assert faults(plain) > 0.9 * pages and faults(plain | keep) < 0.1 * pages
    for name, value in keep.items():
        assert name in bench.MEMORY and f"{name}={value}" in bench.__doc__
