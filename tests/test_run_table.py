"""Running a table: the order of its steps, what is missing, and going on after a crash."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import run_table
import runs
from tiny_slotcon import REPO_ROOT

ROWS = ["--table", "scenes", "--rows", "random", "slotcon"]
# Writes down that it was called; the first pretraining dies as if killed, with a checkpoint; what was done is not repeated.
TRAIN = """
import json, os, signal, sys
from pathlib import Path
output = Path(sys.argv[sys.argv.index("OUTPUT_DIR") + 1])
with open(os.environ["CALLS"], "a") as f:
    f.write(output.name.split("_")[0] + " " + sys.argv[sys.argv.index("MODEL.WEIGHTS") + 1] + "\\n")
begun = output / "model_0000001.pth"
if output.name.startswith("pretrain") and not begun.exists():
    begun.touch()
    os.kill(os.getpid(), signal.SIGKILL)
(output / "model_final.pth").touch()
"""
CONVERT = """
import os, sys
from pathlib import Path
Path(sys.argv[2]).touch()
with open(os.environ["CALLS"], "a") as f:
    f.write("convert\\n")
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Puts stubs in the place of the tools; the file that their calls are written to."""
    for name, text in (("TRAIN_NET", TRAIN), ("CONVERT", CONVERT)):
        script = tmp_path / f"{name}.py"
        script.write_text(text)
        monkeypatch.setattr(runs, name, script)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


def _plan(*options: str) -> run_table.Plan:
    args = run_table._parse([*options, "--output", "out"])
    table = run_table.load_table(args.table)
    return run_table.make_plan(table, args.rows or table.rows, args)


def test_steps_are_in_order_and_shared_ones_planned_once():
    names = [step.name.split(", seed")[0] for step in _plan(*ROWS, "slotcon", "--seeds", "3").steps.values()]
    assert names == [
        "finetune mask_rcnn_R_18_FPN_scenes_from_random",
        "pretrain slotcon_R_18_scenes",
        "convert pretrain slotcon_R_18_scenes",
        "finetune mask_rcnn_R_18_FPN_scenes_from_slotcon_R_18_scenes",
    ]
    # Four protocols from one pretraining.
    steps = _plan("--table", "slotcon_table2", "--rows", "slotcon", "--seeds", "0", "1").steps.values()
    phases = [step.name.split()[0] for step in steps]
    assert phases == 2 * ["pretrain", "convert", "finetune", "finetune", "finetune", "finetune"]
    assert len({step.output for step in steps}) == 12


def test_pretraining_starts_from_the_weights_of_the_table():
    plan = _plan("--table", "semcl_table4a", "--rows", "semcl", "imagenet", "--weights-dir", "w", "--num-gpus", "4")
    starts = [
        s.arguments[s.arguments.index("MODEL.WEIGHTS") + 1] for s in plan.steps.values() if "OUTPUT_DIR" in s.arguments
    ]
    assert starts.count("w/r-50-1000ep.pth.tar") == 3 + 3  # three pretrainings, three fine-tunings without one
    assert sum(start.endswith("backbone.pkl") for start in starts) == 3
    assert any("there is no file w/r-50-1000ep.pth.tar of weights" in problem for problem in plan.missing())


def test_a_column_of_an_evaluation_command(tmp_path):
    plan = _plan("--table", "cyborgs_table1", "--rows", "cyborgs")
    (step,) = [s for s in plan.steps.values() if s.name.startswith("svm")]
    assert step.arguments[1] == "svm" and step.arguments[-3].endswith("backbone.pkl")
    assert step.arguments[-1].endswith("records/voc_2007_test.json")
    assert "voc_2007_trainval" in " ".join(plan.missing())


def test_an_evaluation_of_prototypes_reads_the_checkpoint_of_pretraining():
    plan = _plan("--table", "slotcon_table5")
    pretrain, step = plan.steps.values()  # without a conversion
    options = dict(zip(step.arguments[2::2], step.arguments[3::2], strict=True))
    assert step.arguments[1] == "segmentation" and options["--weights"] == str(pretrain.output / "model_final.pth")
    image_list = Path(os.environ["DETECTRON2_DATASETS"], "coco/curated/val2017/Coco164kFull_Stuff_Coarse_7.txt")
    assert options["--image-list"] == str(image_list) and f"there is no list {image_list} of images" in plan.missing()
    assert any("stuffthingmaps" in problem for problem in plan.missing())


def test_a_killed_chain_goes_on_without_repeating(tmp_path, calls, capsys):
    command = [*ROWS, "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="status -9"):
        run_table.main(command)
    weights = tmp_path / "out" / "pretrain_slotcon_R_18_scenes_seed0" / "backbone.pkl"
    assert calls.read_text().splitlines() == ["finetune ", "pretrain "]
    assert run_table.main(command) == 0
    done = ["finetune ", "pretrain ", "pretrain ", "convert", f"finetune {weights}"]
    assert calls.read_text().splitlines() == done
    assert run_table.main(command) == 0
    assert calls.read_text().splitlines() == done
    assert capsys.readouterr().out.count("goes on: ") == 1


def test_another_command_in_the_same_folder_is_refused(tmp_path, calls):
    command = ["--table", "scenes", "--rows", "random", "--output", str(tmp_path / "out")]
    assert run_table.main(command) == 0
    with pytest.raises(SystemExit, match="belongs to another command"):
        run_table.main([*command, "--num-gpus", "2"])


def test_missing_data_stops_it_before_the_first_step(tmp_path, calls, capsys):
    command = ["--table", "slotcon_table2", "--rows", "random", "--output", str(tmp_path / "out")]
    assert run_table.main(command) == 2
    folder = os.environ["DETECTRON2_DATASETS"]
    assert (
        f'"coco_2017_train", but there is no {folder}/coco/annotations/instances_train2017.json'
        in capsys.readouterr().err
    )
    assert not calls.exists() and not (tmp_path / "out").exists()
    assert run_table.main([*command, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "1. [to do] finetune mask_rcnn_R_50_FPN_4conv1fc_1x_from_random" in out and "Missing:" in out
    assert not calls.exists()


@pytest.mark.parametrize("is_there", [False, True])
def test_packages_of_evaluations_are_missing_before_the_first_step(monkeypatch, is_there):
    find_spec, packages = importlib.util.find_spec, ("sklearn", "cityscapesscripts")

    def find(name, *args):
        return (object() if is_there else None) if name in packages else find_spec(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    for table, row, package in (
        ("cyborgs_table1", "cyborgs", "scikit-learn"),
        ("slotcon_table2", "random", "cityscapesscripts"),
    ):
        missing = " ".join(_plan("--table", table, "--rows", row).missing())
        assert (f"needs {package}: pip install" in missing) != is_there


def test_unknown_row():
    with pytest.raises(SystemExit, match="--rows nobody: slotcon_table2 has random, moco_v2"):
        run_table.main(["--table", "slotcon_table2", "--rows", "nobody"])


@pytest.mark.slow
def test_a_real_run_killed_and_resumed(tmp_path):
    """SIGKILL to the command and the training under it; the second call resumes, records, and the trial fills nothing."""
    narrow = (
        "MODEL.FPN.OUT_CHANNELS 16 MODEL.RPN.CONV_DIMS [16] MODEL.ROI_BOX_HEAD.FC_DIM 32 INPUT.MIN_SIZE_TRAIN (64,)"
    )
    narrow += " DATASETS.TRAIN ('scenes_tiny_train',) DATASETS.TEST ('scenes_tiny_val',) SOLVER.IMS_PER_BATCH 2"
    narrow += " SOLVER.MAX_ITER 10 SOLVER.STEPS () SOLVER.WARMUP_ITERS 2 SOLVER.CHECKPOINT_PERIOD 2 TEST.PRECISE_BN.ENABLED False"
    script = str(REPO_ROOT / "benchmarks" / "run_table.py")
    command = [sys.executable, script, "--table", "scenes", "--rows", "random", "--output", str(tmp_path)]
    command += ["--finetune-opts", *narrow.split()]
    first = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/model_*.pth")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "goes on: " in second.stdout and "do not fill the columns" in second.stdout
    (log,) = tmp_path.glob("*/log.txt")
    assert "Resuming at iteration " in log.read_text()
    (path,) = tmp_path.glob("*/records/*.json")
    record = json.loads(Path(path).read_text())
    assert record["weights"] is None and record["checkpoint"]["training"]["iterations"] == 10
    assert record["num_images"] == 8 and "bbox/AP" in record["metrics"]
