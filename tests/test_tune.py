"""results/fashion-mnist/tune.py: its trials are accepted by the stages; a small one, end to end."""

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
    by_hand = dict(pretraining=None, held_out=dict(noisy=0.5))             # the first trials'
    module.RESULT.write_text(json.dumps(by_hand) + "\n")
    monkeypatch.chdir(ROOT)
    return module


def settings_of(one):
    """Those of a trial's command, from scratch, which needs no file."""
    flags = shlex.split(one.commands("")[0])[2:]
    flags[flags.index("--init") + 1] = "scratch"
    return vars(finetune.parse(flags))


def test_every_trial_is_accepted_and_differs_from_the_recipe_as_it_says(tune):
    trials = tune.trials()
    assert len({what for what, _ in trials}) == len(trials) == len({one.name for _, one in trials})
    flags = "--recipe fashion --sigma 0.5 --init scratch"
    gaussian, recipe = (
        vars(finetune.parse([*flags.split(), *more])) for more in (["--objective", "gaussian"], [])
    )
    named = {"layer decay": "layer_decay", "learning rate": "base_lr"}
    for what, one in trials:
        args = settings_of(one)
        words, _, value = what.rpartition(" ")
        changed = {key for key in recipe if args[key] != gaussian[key]}
        if words in named:
            assert args[named[words]] == float(value)
            assert changed == {named[words], "epochs", "out"}
        if words == "consistency":
            assert args["objective_args"] == recipe["objective_args"] | dict(lam=float(value))
            assert changed == {"objective", "objective_args", "epochs", "out"}
        if what.startswith("smoothadv, one copy"):
            assert args["objective"] == "extras/smoothadv.py:smoothadv"
            found = [args["objective_args"][key] for key in ("eps", "copies", "steps")]
            assert found == [255 / 256, 1, int(what.split()[-2])]
        if what.startswith("probe"):
            found = args["linear_probe"], args["base_lr"], args["epochs"]
            assert found == (True, float(value), 2)
        elif not what.endswith("epochs"):
            assert args["epochs"] == 3


def test_a_network_of_another_shape_is_trained_by_the_command_that_is_logged(tune, monkeypatch):
    made = []
    monkeypatch.setattr(tune.run, "execute", lambda commands, *rest: made.extend(commands))
    (one,) = [one for _, one in tune.trials() if one.init == "patch-4"]
    assert tune.train(one, "--device cpu") == made and len(made) == 2
    for command, stage in zip(made, ("pretrain", "finetune"), strict=True):
        python, c, code = shlex.split(command)
        assert (python, c) == ("python", "-c") and f"; {stage}.main([" in code
        assert 'model.SIZES["vit_fashion"].update({"patch_size": 4})' in code
    assert f'"--init", "{tune.run.RUNS}/patch-4/pretrain.pt"' in made[1]
    assert "layer-decay" not in made[1]


def test_the_table_is_that_of_the_readme(tune, monkeypatch, capsys):
    folder = Path(tune.__file__).parent
    monkeypatch.setattr(tune, "RESULT", folder / "tuning.jsonl")
    tune.main(["--table"])
    printed, table = capsys.readouterr().out.splitlines(), (folder / "README.md").read_text()
    assert len(printed) > 20 and all(line in table for line in printed)


@pytest.mark.slow
def test_small_trials_are_trained_judged_on_held_out_images_and_not_run_again(
    tune, monkeypatch, tmp_path, capfd,
):
    write_files(tmp_path / "data" / "FashionMNIST" / "raw")
    data = f"--data-path {tmp_path / 'data'}"
    small = f"{data} --epochs 6 --warmup-epochs 0 --batch 50"
    monkeypatch.setattr(tune, "FIVE", small)
    monkeypatch.setattr(tune, "EVERY", 2)
    monkeypatch.setattr(tune, "SHAPES", {"patch-14": dict(patch_size=14, dim=32, depth=1)})
    flags = f"--objective gaussian --base-lr 0.01 {small}"
    one = tune.run.Run("a shape", "patch-14", flags=flags)
    monkeypatch.setattr(tune, "trials", lambda: [("larger patches", one)])
    tune.main([])
    first, row = map(json.loads, tune.RESULT.read_text().splitlines())
    assert first["pretraining"] is None
    assert (row["what"], len(row["commands"])) == ("larger patches", 2)
    held_out = row["held_out"]
    assert 0 < held_out["acr"] <= 0.5 * 2.4634 and 0 <= held_out["noisy"] <= 1
    config = torch.load(one.out / "finetune_sigma_0.5.pt", weights_only=True)["config"]
    assert config["patch_size"] == 14 != model.SIZES["vit_fashion"]["patch_size"]
    assert f"| larger patches | {100 * held_out['noisy']:.1f} | " in capfd.readouterr().out

    written = tune.RESULT.read_text()
    monkeypatch.setattr(tune, "train", None)
    tune.main([])
    assert tune.RESULT.read_text() == written
