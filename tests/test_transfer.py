"""benchmarks/transfer.py: what is run for a comparison."""

import json
from pathlib import Path
from types import ModuleType

import pytest

REPO_ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def transfer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPO_ROOT / "benchmarks"))
    import transfer

    return transfer


def test_configs_of_all_tasks_exist(transfer):
    for task in transfer.TASKS.values():
        settings = [task.pretraining(method) for method in transfer.METHODS]
        assert settings[0] is None  # random
        for config in [task.finetune_config, *(setting[0] for setting in settings[1:])]:
            assert (REPO_ROOT / config).is_file(), config
    assert transfer.TASKS["bccd"].pretraining("slotcon")[0] == "configs/quick/slotcon_R_18_bccd.yaml"
    assert transfer.TASKS["scenes"].pretraining("slotcon")[0] == "configs/quick/slotcon_R_18_scenes.yaml"


def test_initialisations_are_fine_tuned_alike_on_every_part_of_the_labels(transfer, monkeypatch, tmp_path):
    executed = []

    def execute(run, threads):
        executed.append(run)
        run.output.mkdir(parents=True)
        ap = 30.0 if "detcon_grid" in run.name else 20.0
        (run.output / "metrics.json").write_text(
            f'{{"iteration": 200, "bbox/AP": {ap}, "bbox/AP50": 1, "bbox/AP75": 2}}\n'
        )

    monkeypatch.setattr(transfer, "execute", execute)
    monkeypatch.setattr(transfer.DatasetCatalog, "get", lambda name: [])
    record = tmp_path / "record.json"
    arguments = ["--task", "bccd", "--methods", "random", "detcon_grid", "--seeds", "0", "1", "--fractions", "0.1", "1"]
    assert transfer.main([*arguments, "--output", str(tmp_path / "out"), "--record", str(record)]) == 0
    finetunings = {run.output.name: run.arguments for run in executed if run.output.name.startswith("finetune")}
    assert len(finetunings) == 8

    def fraction_and_weights(folder: str) -> tuple[str, str]:
        arguments = finetunings[folder]
        fraction = "DATASETS.TRAIN_FRACTION"
        value = arguments[arguments.index(fraction) + 1] if fraction in arguments else "all"
        return value, arguments[arguments.index("MODEL.WEIGHTS") + 1]

    assert fraction_and_weights("finetune_random_seed1_0.1") == ("0.1", "")
    assert fraction_and_weights("finetune_random_seed1") == ("all", "")
    weights = str(tmp_path / "out/pretrain_detcon_grid_seed0/backbone.pkl")
    assert fraction_and_weights("finetune_detcon_grid_seed0_0.1") == ("0.1", weights)
    results = json.loads(record.read_text())["results"]
    assert results["detcon_grid, 10% of the labels"]["bbox/AP"] == {"200": [30.0, 30.0]}
    assert results["random"]["bbox/AP"] == {"200": [20.0, 20.0]}
