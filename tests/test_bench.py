"""The benchmark runs, and puts its table where it belongs."""

import json

import bench


def test_the_benchmark_writes_rows_and_its_machines_table(tmp_path, capsys, make_folder):
    table, rows = tmp_path / "speed.md", tmp_path / "rows.json"
    table.write_text("before\n<!-- begin cpu -->\nold\n<!-- end cpu -->\nbetween\n"
                     "<!-- begin cuda -->\nkept\n<!-- end cuda -->\n")
    bench.main(["--device", "cpu", "--batch", "20", "--draws", "100", "--repeats", "2", "--compare", "--table", str(table),
                "--json", str(rows)])
    found = json.loads(rows.read_text())["rows"]
    assert [row["stage"] for row in found] == ["certify", "pretrain", "finetune"]
    for row in found:
        assert row["per_second"] > 0 and row["tflops"] > 0 and 0 < row["ratio_low"] <= row["ratio_to_bare"] <= row["ratio_high"]
        assert row["memory_gib"] > 0.05 and "attention written out" in row["naive"] and "all of these" in row["naive"]
    text = table.read_text()
    assert "old" not in text and "kept" in text and text.startswith("before") and text.count("| vit_digits | ") == 3
    assert text.index("vit_digits") < text.index("between")


def test_naive_ways_do_the_same(tiny_vit):
    model, x = tiny_vit(num_classes=bench.CLASSES), bench.torch.rand(1, 8, 8)
    assert bench.count_with_unique(model, x, 100, 20).sum() == 100
    images = bench.torch.rand(3, 1, 8, 8)
    fused = model(images)
    with bench.attention_written_out():
        bench.torch.testing.assert_close(model(images), fused)


def test_memory_is_counted_in_proportion_to_the_batch():
    (weights, few), (same, many) = (bench.memory("vit_digits", batch) for batch in (10, 1000))
    parameters = sum(parameter.numel() for parameter in bench.build_dmae("vit_digits").parameters())
    assert weights == same == 16 * parameters / 2**30 and 50 < many / few < 101


def test_the_loader_is_measured_against_the_device(make_folder, capsys):
    bench.main(["--device", "cpu", "--stage", "data", "--data-path", str(make_folder(80)), "--repeats", "1", "--batch", "20"])
    out = capsys.readouterr().out
    assert "ours: uint8 tensor" in out and "PSNR" in out and "vit_digits: the device pre-trains" in out and "bottleneck" in out
