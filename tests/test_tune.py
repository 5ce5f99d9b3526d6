"""results/fashion-mnist/tune.py: its trials are ones that the stages accept, and small ones run from end to end."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from test_fashion import write_files
from test_lenet import open_script

import finetune
import model

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tune(monkeypatch, tmp_path):
    """The module, its runs and its result in a temporary folder."""
    module = open_script("tune")
    monkeypatch.setattr(module.run, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(module, "RESULT", tmp_path / "tuning.jsonl")
    module.RESULT.write_text('{"pretraining": null, "held_out": {"noisy": 0.5}}\n')               # as the first trials'
    monkeypatch.chdir(ROOT)
    return module


def test_every_trial_is_accepted_and_differs_from_the_recipe_as_it_says(tune):
    trials = tune.trials()
    assert len({what for what, _ in trials}) == len(trials) == len({one.name for _, one in trials})
    recipe = vars(finetune.parse(["--recipe", "fashion", "--sigma", "0.5", "--init", "scratch"]))
    named = {"layer decay": "layer_decay", "learning rate": "base_lr", "consistency": "consistency"}
    for what, one in trials:
        flags = shlex.split(one.commands("")[0])[2:]
        flags[flags.index("--init") + 1] = "scratch"                                             # which needs no file
        args = vars(finetune.parse(flags))
        words, _, value = what.rpartition(" ")
        if words in named:
            changed = {key for key in recipe if args[key] != recipe[key]} - {"copies"}             # consistency's two
            assert args[named[words]] == float(value)
            assert changed == {named[words], "consistency", "epochs", "out"} and args["consistency"] in (0.0, float(value))
        if what.startswith("probe"):
            assert (args["linear_probe"], args["base_lr"], args["epochs"]) == (True, float(what.split()[-1]), 2)
        elif not what.endswith("epochs"):
            assert args["epochs"] == 3


def test_a_network_of_another_shape_is_trained_by_the_command_that_is_logged(tune, monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(tune.run, "execute", lambda commands, *rest: made.extend(commands))
    (one,) = [one for _, one in tune.trials() if one.init == "patch-4"]
    assert tune.train(one, "--device cpu") == made and len(made) == 2
    for command, stage in zip(made, ("pretrain", "finetune"), strict=True):
        python, c, code = shlex.split(command)
        assert (python, c) == ("python", "-c") and f"; {stage}.main([" in code
        assert 'model.SIZES["vit_fashion"].update({"patch_size": 4})' in code
    assert f'"--init", "{tune.run.RUNS}/patch-4/pretrain.pt"' in made[1] and "layer-decay" not in made[1]


@pytest.mark.slow
def test_small_trials_are_trained_judged_on_held_out_images_and_not_run_again(tune, monkeypatch, tmp_path, capfd):
    write_files(tmp_path / "data" / "FashionMNIST" / "raw")
    small = f"--data-path {tmp_path / 'data'} --epochs 6 --warmup-epochs 0 --batch 50"
    monkeypatch.setattr(tune, "FIVE", small)
    monkeypatch.setattr(tune, "EVERY", 2)
    monkeypatch.setattr(tune, "SHAPES", {"patch-14": dict(patch_size=14, dim=32, depth=1)})
    one = tune.run.Run("a shape", "patch-14", flags=f"--consistency 0 --base-lr 0.01 {small}")
    monkeypatch.setattr(tune, "trials", lambda: [("larger patches", one)])
    tune.main([])
    first, row = map(json.loads, tune.RESULT.read_text().splitlines())
    assert first["pretraining"] is None and (row["what"], len(row["commands"])) == ("larger patches", 2)
    assert 0 < row["held_out"]["acr"] <= 0.5 * 2.4634 and 0 <= row["held_out"]["noisy"] <= 1
    config = torch.load(one.out / "finetune_sigma_0.5.pt", weights_only=True)["config"]
    assert config["patch_size"] == 14 != model.SIZES["vit_fashion"]["patch_size"]
    assert f"| larger patches | {100 * row['held_out']['noisy']:.1f} | " in capfd.readouterr().out
    written = tune.RESULT.read_text()
    monkeypatch.setattr(tune, "train", None)
    tune.main([])
    assert tune.RESULT.read_text() == written
