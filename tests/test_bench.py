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

import finetune
from model import SIZES, build_dmae, build_vit
from pretrain import draw_corruption


def test_the_benchmark_writes_rows_and_its_machines_table(tmp_path, capsys, monkeypatch):
    table, rows = tmp_path / "speed.md", tmp_path / "rows.json"
    table.write_text("before\n<!-- begin cpu -->\nold\n<!-- end cpu -->\nbetween\n"
                     "<!-- begin cuda -->\nkept\n<!-- end cuda -->\n")
    monkeypatch.setattr(bench, "large_matmul", functools.partial(bench.large_matmul, side=256))
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")                       # without effect now, but the table must say it
    bench.main(["--device", "cpu", "--batch", "20", "--draws", "100", "--repeats", "2", "--compare", "--table", str(table),
                "--json", str(rows)])
    found = json.loads(rows.read_text())["rows"]
    assert [row["stage"] for row in found] == ["certify", "pretrain", "finetune"]
    for row in found:
        assert row["dtype"] == "fp32"
        assert row["per_second"] > 0 and row["tflops"] > 0 and 0 < row["ratio_low"] <= row["ratio_to_bare"] <= row["ratio_high"]
        assert row["memory_gib"] > 0.05 and "attention written out" in row["naive"] and "all of these" in row["naive"]
    text = table.read_text()
    assert "old" not in text and "kept" in text and text.startswith("before") and text.count("| vit_digits | ") == 3
    assert text.index("vit_digits") < text.index("between") and "`MALLOC_MMAP_MAX_=0 python tests/bench.py --device" in text


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
    # two products back for each one there; pixels get no gradient; fused attention computes its scores once more
    assert bench.count_flops(logits.sum().backward)[1] == embed + 2 * linear + 2.5 * attention


@pytest.mark.parametrize("recipe", ["digits", *(pytest.param(recipe, marks=pytest.mark.slow) for recipe in (
    "cifar10", "imagenet-base", "imagenet-large", "imagenet-huge"))])
def test_the_cost_of_a_recipes_step_is_the_formulas(recipe):
    """75 % of the patches are dropped (25 % of the digits'); fine-tuning sees two copies, for their consistency, or one."""
    counted = bench.cost(recipe, "pretrain", "fp32", batch=4)
    size = SIZES[counted["model"]]
    patches, width, narrow = (size["image_size"] // size["patch_size"]) ** 2, size["dim"], size["decoder_dim"]
    kept, ratio = patches * (3 if recipe == "digits" else 1) // 4, size.get("mlp_ratio", 4)
    block = lambda tokens, width: tokens * (2 * 4 * width**2 + 2 * 2 * width * ratio * width) + 4 * tokens**2 * width
    embed = patches * 2 * size["patch_size"] ** 2 * size["channels"] * width
    to_pixels = (1 + patches) * 2 * narrow * size["patch_size"] ** 2 * size["channels"]
    decoder = (1 + kept) * 2 * width * narrow + size["decoder_depth"] * block(1 + patches, narrow) + to_pixels
    assert counted["forward"] * 1e9 == pytest.approx(embed + size["depth"] * block(1 + kept, width) + decoder, rel=1e-9)
    assert 2 < counted["backward"] / counted["forward"] < 2.1
    assert counted["weights"] * 2**30 == pytest.approx(parameters(build_on_meta(build_dmae, counted["model"])))

    counted = bench.cost(recipe, "finetune", "fp32", batch=4)
    copies = 1 if recipe in ("imagenet-large", "imagenet-huge") else 2
    classes = 1000 if recipe.startswith("imagenet") else 10
    forward = copies * (embed + size["depth"] * block(1 + patches, width) + 2 * width * classes)
    assert counted["forward"] * 1e9 == pytest.approx(forward, rel=1e-9)
    assert counted["weights"] * 2**30 == pytest.approx(parameters(build_on_meta(build_vit, counted["model"], classes)))


def build_on_meta(build, *arguments):
    with torch.device("meta"):
        return build(*arguments)


def parameters(model):
    """Bytes: a weight, its gradient and two moments in fp32 where it is trained; else the weight."""
    return sum(p.numel() * (16 if p.requires_grad else 4) for p in model.parameters())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_counted_activations_are_those_of_real_tensors(dtype):
    model, images = build_dmae("vit_digits"), torch.rand(20, 1, 8, 8)

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            return model(images, 0.25, 0.25, *draw_corruption(images, 16, 0))[0]

    _, real = bench.activations_of(loss, model)
    assert bench.cost("digits", "pretrain", dtype, batch=20)["activations"] == pytest.approx(real, rel=0.01)


def test_activations_grow_in_proportion_to_the_batch_and_shrink_in_bf16():
    few, many, half = (bench.cost("digits", "pretrain", dtype, batch) for dtype, batch in
                       (("fp32", 10), ("fp32", 1000), ("bf16", 1000)))
    assert few["weights"] == many["weights"] == half["weights"] and few["forward"] == pytest.approx(half["forward"])
    assert many["activations"] / few["activations"] == pytest.approx(100, rel=0.02)
    assert 0.4 < half["activations"] / many["activations"] < 0.8


def test_the_cost_is_one_line_for_each_stage_and_recipe(capsys):
    bench.main(["--cost", "digits", "digits"])
    lines = capsys.readouterr().out.splitlines()
    starts = 2 * ["digits, pretrain, vit_digits in bf16", "digits, finetune, vit_digits in bf16"]
    assert len(lines) == 4 and all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    for line in lines:
        there, back, whole, weights, activations = (float(x) for x in re.findall(r"([\d.]+) (?:GFLOP|backwards|GiB|for)", line))
        assert 0 < there < back and whole == pytest.approx(weights + activations, rel=0.01)
        assert line.endswith(f"for {finetune.RECIPES['digits']['batch']} images' activations")


@pytest.mark.slow
def test_the_loader_is_measured_against_the_device(make_folder, capsys):
    bench.main(["--device", "cpu", "--stage", "data", "--data-path", str(make_folder(80)), "--repeats", "1", "--batch", "20"])
    out = capsys.readouterr().out
    assert "ours: uint8 tensor" in out and "PSNR" in out and "vit_digits: the device pre-trains" in out and "bottleneck" in out
    assert [float(db) > 30 for db in re.findall(r"at least (\d+)", out)] == [True, True]  # three ways, one picture


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other variables")
def test_the_environment_variables_that_keep_freed_memory_do_so():
    """Without them, a tensor that is freed and made again asks the system for all of its pages again."""
    code = ("import resource, torch\n"
            "faults = [(torch.ones(2**24), resource.getrusage(resource.RUSAGE_SELF).ru_minflt)[1] for _ in range(12)]\n"
            "print(faults[-1] - faults[-2])")                         # the first few find their place
    pages = 2**24 * 4 / os.sysconf("SC_PAGE_SIZE")
    keep = dict(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(2**31 - 1))
    plain = {name: value for name, value in os.environ.items() if name not in bench.MEMORY} | {"THP_MEM_ALLOC_ENABLE": "0"}
    again, kept = (int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True,
                                      env=plain | more).stdout) for more in ({}, keep))
    assert again > 0.9 * pages and kept < 0.1 * pages
    assert {*keep} < {*bench.MEMORY} and all(f"{name}={value}" in bench.__doc__ for name, value in keep.items())
