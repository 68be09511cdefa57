"""From the command line to a config and to processes."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import default_argument_parser
from tiny_runs import final_checkpoint, pretrain_cfg
from tiny_slotcon import REPO_ROOT

from d2_objssl import add_objssl_config
from d2_objssl.engine import default_setup, launch, setup_cfg

QUICK = str(REPO_ROOT / "configs" / "quick" / "slotcon_R_18_scenes.yaml")


def test_defaults_config_file_and_overrides_are_merged_in_this_order():
    cfg = setup_cfg(QUICK, ["SOLVER.MAX_ITER", "7", "INPUT.SSL.CROP_SIZE", "80"])
    assert cfg.SOLVER.MAX_ITER == 7 and cfg.INPUT.SSL.CROP_SIZE == 80
    assert cfg.SOLVER.OPTIMIZER == "ADAMW"  # of the file
    assert cfg.MODEL.SSL.SLOTCON.SLOT_TEMP == 0.2  # of the defaults
    assert cfg.is_frozen()


def test_without_a_config_file_the_defaults_are_detectron2s():
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    assert setup_cfg("", ["MODEL.DEVICE", "cpu"]) == cfg
    assert cfg.INPUT.SSL.NUM_VIEWS == 0 and cfg.SOLVER.OPTIMIZER == "SGD" and cfg.SOLVER.REFERENCE_BATCH == 0


def test_a_missing_config_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"--config-file no/such\.yaml does not exist"):
        setup_cfg("no/such.yaml", [])


def test_unknown_keys_and_wrong_types_are_listed_together(tmp_path):
    file = tmp_path / "typos.yaml"
    file.write_text("VERSION: 2\nSOLVER:\n  MAX_ITERS: 7\n  BASE_LR: fast\nMODEL:\n  WEIGHT: {NAME: x}\nSEED: 5\n")
    with pytest.raises(ValueError, match="5 mistakes in the config") as error:
        setup_cfg(str(file), ["MODEL.SSL.METHODE", "SlotCon", "SEED", "many"])
    lines = str(error.value).splitlines()[1:]
    assert lines[0].startswith(f" 1. SOLVER.MAX_ITERS ({file}): there is no such key; did you mean SOLVER.MAX_ITER")
    assert "SOLVER.BASE_LR" in lines[1] and "fast" in lines[1]
    assert "MODEL.WEIGHT.NAME" in lines[2]
    assert "MODEL.SSL.METHODE (command line)" in lines[3] and "did you mean MODEL.SSL.METHOD" in lines[3]
    assert "SEED" in lines[4] and "many" in lines[4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must have keys of the config and their values as YAML"),
        (b"just text", "must have keys"),
        (b"- SEED", "must have keys"),
        (b"\xff\xfe\x00", "must have keys"),
        (b"MODEL: {WEIGHTS: [1,", r"must have keys(?s:.*)while parsing"),
        (b"_BASE_: nope.yaml", r"must have keys.*nope\.yaml"),
        (
            b"MODEL: 3",
            r"1 mistake in the config:\n 1\. MODEL \(\S+\): it is 3; it must have keys below it, such as MODEL\.\S+$",
        ),
        (b"SOLVER: [a]", r"1 mistake in the config:\n 1\. SOLVER \(\S+\): it is \['a'\]; it must have keys below"),
        (b"SEED: {A: 1}", r"1 mistake in the config:\n 1\. SEED\.A \(\S+\): there is no such key"),
    ],
)
def test_a_config_file_that_is_none_is_named(tmp_path, content, message):
    file = tmp_path / "odd.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        setup_cfg(str(file), [])
    assert str(file) in str(error.value)


def test_tuples_of_old_config_files_are_read(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text("VERSION: 2\nINPUT: {SSL: {CROP_SCALE: !!python/tuple [0.2, 1.0]}}\n")
    assert setup_cfg(str(file), []).INPUT.SSL.CROP_SCALE == (0.2, 1.0)


def test_the_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    opts = ["MODEL.WEIGHTS", "~/w.pth", "OUTPUT_DIR", "~/run", "INPUT.REGIONS.ROOT", "~/maps"]
    cfg = setup_cfg(QUICK, opts)
    found = [cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, cfg.INPUT.REGIONS.ROOT]
    assert found == [f"{tmp_path}/{name}" for name in ("w.pth", "run", "maps")]
    assert setup_cfg(QUICK, ["MODEL.WEIGHTS", "detectron2://a~b"]).MODEL.WEIGHTS == "detectron2://a~b"


def test_a_key_without_value_is_named():
    with pytest.raises(ValueError, match=r"KEY VALUE pairs.*'OUTPUT_DIR'\] are 3 words"):
        setup_cfg(QUICK, ["SEED", "7", "OUTPUT_DIR"])


@pytest.mark.parametrize(("word", "value"), [("1", 1.0), ("-2", -2.0), ("0.5", 0.5), ("1e-3", 0.001)])
def test_whole_numbers_serve_keys_of_fractions(word, value):
    cfg = setup_cfg(QUICK, ["SOLVER.MAX_EPOCHS", word, "SOLVER.MAX_ITER", "3"])
    assert cfg.SOLVER.MAX_EPOCHS == value and isinstance(cfg.SOLVER.MAX_EPOCHS, float)
    assert cfg.SOLVER.MAX_ITER == 3 and isinstance(cfg.SOLVER.MAX_ITER, int)


def test_a_value_of_another_type_is_named():
    with pytest.raises(ValueError, match=r"SOLVER\.MAX_ITER"):
        setup_cfg(QUICK, ["SOLVER.MAX_ITER", "many"])


@pytest.mark.parametrize("available", [False, True])
def test_without_a_gpu_cuda_becomes_cpu(monkeypatch, caplog, available):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    caplog.set_level(logging.WARNING, "d2_objssl")
    cfg = setup_cfg("", ["MODEL.DEVICE", "cuda:1"])
    assert cfg.MODEL.DEVICE == ("cuda:1" if available else "cpu")
    assert ("No GPU is available" in caplog.text) == (not available)


def test_folders_of_images_are_registered(tmp_path, catalog):
    train, test = f"images:{tmp_path}/a b", f"images:{tmp_path}/test,1"
    setup_cfg(QUICK, ["DATASETS.TRAIN", f"('{train}', 'scenes_train')", "DATASETS.TEST", f"('{test}',)"])
    assert train in DatasetCatalog and test in DatasetCatalog


def test_default_setup_writes_config_and_logs(tmp_path):
    cfg = setup_cfg(QUICK, ["OUTPUT_DIR", str(tmp_path), "SEED", "5"])
    loggers = [logging.getLogger(name) for name in ("d2_objssl", "detectron2", "fvcore")]
    state = [(x, list(x.handlers), x.level, x.propagate) for x in loggers]
    generator = torch.get_rng_state()
    try:
        default_setup(cfg, default_argument_parser().parse_args([]))
        logging.getLogger("d2_objssl.data").info("a line of this package")
        assert torch.initial_seed() == 5
    finally:
        torch.set_rng_state(generator)
        for x, handlers, level, propagate in state:
            for handler in set(x.handlers) - set(handlers):
                handler.flush()
            x.handlers, x.level, x.propagate = handlers, level, propagate
    again = setup_cfg(str(tmp_path / "config.yaml"), [])
    again.MODEL.pop("ROI_BOX_CASCADE_HEAD")  # its nested tuples come back as lists
    expected = cfg.clone()
    expected.MODEL.pop("ROI_BOX_CASCADE_HEAD")
    assert again == expected
    assert "a line of this package" in (tmp_path / "log.txt").read_text()


def test_one_process_runs_here(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    args = default_argument_parser().parse_args(["--num-gpus", "1", "OUTPUT_DIR", "x"])
    calls = []
    launch(lambda a: calls.append((os.getpid(), a.opts)), args)
    assert calls == [(os.getpid(), ["OUTPUT_DIR", "x"])]


# ---------------------------------------------------------------------------------------------- several processes

# At the end of main one of the group's threads is busy, and a model in a reference cycle holds the group.
_SCRIPT = """
import sys, time, torch
import torch.distributed as dist
from pathlib import Path
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel
from d2_objssl.distributed import all_reduce_mean
from d2_objssl.engine import launch
from d2_objssl.engine.preemption import Preempted

def main(args):
    mean = all_reduce_mean(torch.tensor([comm.get_rank() + 1.0])).item()
    values = [comm.get_rank(), comm.get_world_size(), comm.get_local_rank(), comm.get_local_size(), mean]
    file = Path(args.opts[0], str(comm.get_rank()))
    model = DistributedDataParallel(torch.nn.Linear(1, 1))
    model.itself = [model]
    work = dist.all_reduce(torch.ones(1), async_op=True)
    work.get_future().then(lambda _: time.sleep(0.5) or file.write_text(repr(values)))
    if "stop" in args.opts:
        raise Preempted(143)

if __name__ == "__main__":
    launch(main, default_argument_parser().parse_args())
"""


def run(*command: str, exit_code: int = 0) -> None:
    """Run Python with arguments, on one thread a process."""
    process = subprocess.run(
        [sys.executable, *command],
        cwd=REPO_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert process.returncode == exit_code, process.stdout[-5000:]


def torchrun() -> list[str]:
    """`--standalone` picks a free port."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launched(folder: Path) -> list[str]:
    """A file as the meeting point needs no port."""
    return [str(folder / "script.py"), "--num-gpus", "2", "--dist-url", f"file://{folder}/store"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torchrun", "detectron2"])
def test_two_processes_form_one_group(tmp_path, how):
    """And leave it only when its threads are done."""
    (tmp_path / "script.py").write_text(_SCRIPT)
    if how == "torchrun":
        run(*torchrun(), str(tmp_path / "script.py"), str(tmp_path))
    else:
        run(*launched(tmp_path), str(tmp_path))
    for rank in range(2):
        assert (tmp_path / str(rank)).read_text() == repr([rank, 2, rank, 2, 1.5])


@pytest.mark.slow
def test_processes_that_are_preempted_leave_the_group_as_well(tmp_path):
    (tmp_path / "script.py").write_text(_SCRIPT)
    run(*launched(tmp_path), str(tmp_path), "stop", exit_code=143)


@pytest.mark.slow
def test_pretraining_under_torchrun(photos, folder):
    """The tool itself, on two CPU processes."""
    cfg = pretrain_cfg(photos, folder / "run", "SOLVER.MAX_ITER", 4)
    (folder / "cfg.yaml").write_text(cfg.dump())
    run(*torchrun(), "tools/train_net.py", "--config-file", str(folder / "cfg.yaml"))
    final = final_checkpoint(folder / "run")
    assert final["trainer"]["iteration"] == 3
    assert len(final["trainer"]["hooks"]["RandomState"]["ranks"]) == 2
    assert all(v.isfinite().all() for v in final["model"].values())
    log = (folder / "run" / "log.txt").read_text()
    assert "SyncBN is replaced by naiveSyncBN" in log


# ------------------------------------------------------------------------------------------------ Slurm

# Slurm's commands, and a Python that notes its arguments and waits for SIGTERM in jobs of that name.
_FAKES = {
    "scontrol": """[ "$1" = show ] && printf 'node-a\\nnode-b\\n' || echo "$@" > requeued""",
    "scancel": """[ "$1" = --signal=TERM ] && [ "$2" = 40007 ] && kill -TERM "$(cat pid)" """,
    "srun": """while [ "$1" != bash ]; do shift; done; SLURM_NODEID=1 exec "$@" """,
    "bin/python": """printf '%s\\n' "$@" > arguments; echo $$ > pid.new; mv pid.new pid
        [ "$SLURM_JOB_NAME" = short ] && exit 0
        trap 'exit 143' TERM; while true; do sleep 0.01; done""",
}


def start_slurm_job(folder: Path, name: str) -> "subprocess.Popen[str]":
    """tools/slurm.sh as a batch script on two machines of 4 GPUs, with commands of Slurm that `_FAKES` stand for."""
    for file, text in _FAKES.items():
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    slurm = {"JOB_ID": "40007", "JOB_NAME": name, "JOB_NODELIST": "node-[a-b]", "JOB_NUM_NODES": "2"}
    slurm |= {"GPUS_ON_NODE": "4", "SUBMIT_DIR": str(folder)}
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "VENV": str(folder)}
    env |= {f"SLURM_{key}": value for key, value in slurm.items()}
    command = [str(REPO_ROOT / "tools" / "slurm.sh"), "--config-file", "a b.yaml", "OUTPUT_DIR", "out"]
    return subprocess.Popen(["bash", *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_slurm_job_starts_the_tool_on_each_machine(tmp_path, load_tool):
    job = start_slurm_job(tmp_path, "short")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    tool, *arguments = (tmp_path / "arguments").read_text().splitlines()
    assert tool == "tools/train_net.py" and not (tmp_path / "requeued").exists()
    args = load_tool("train_net")._parser().parse_args(arguments)
    assert (args.num_gpus, args.num_machines, args.machine_rank) == (4, 2, 1)
    assert args.dist_url == "tcp://node-a:20007" and args.resume
    assert args.config_file == "a b.yaml" and args.opts == ["OUTPUT_DIR", "out"]


def test_slurm_job_is_queued_again_after_sigterm(tmp_path):
    job = start_slurm_job(tmp_path, "long")
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists():
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    job.terminate()
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 143, output
    assert (tmp_path / "requeued").read_text() == "requeue 40007\n"


# ------------------------------------------------------------------------------------------------------- the tool


def test_help_of_the_tool_has_examples(load_tool):
    text = load_tool("train_net")._parser().format_help()
    assert "images:" in text and "--resume" in text and "configs/pretrain/slotcon_R_50_800ep_coco.yaml" in text


def test_evaluation_of_nothing_is_refused(load_tool, tmp_path):
    quick = str(REPO_ROOT / "configs" / "quick" / "mask_rcnn_R_18_FPN_scenes.yaml")
    train_net = load_tool("train_net")
    args = default_argument_parser().parse_args(["--config-file", quick, "--eval-only", "OUTPUT_DIR", str(tmp_path)])
    train_net.default_setup = lambda cfg, args: None  # it would redirect the log of the tests
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS is empty"):
        train_net.main(args)


def test_the_tool_says_whether_it_resumes(load_tool, tmp_path, monkeypatch):
    """Weights with a mistyped name are found before anything is built, old checkpoints or not."""
    train_net = load_tool("train_net")
    monkeypatch.setattr(train_net, "default_setup", lambda cfg, args: pytest.fail("too late"))
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    arguments = ["--config-file", QUICK, "OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", "gone.pth"]
    with pytest.raises(ValueError, match=r'MODEL\.WEIGHTS is "gone\.pth"; there is no such file'):
        train_net.main(default_argument_parser().parse_args(arguments))


def test_whole_number_is_accepted_for_a_float() -> None:
    cfg = setup_cfg("", ["SOLVER.BASE_LR", "1", "SOLVER.MAX_EPOCHS", "12", "SOLVER.MAX_ITER", "7"])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_EPOCHS, cfg.SOLVER.MAX_ITER) == (1.0, 12.0, 7)
