"""Records of runs: what they hold, and that they tell how weights came about."""

import argparse
import hashlib
import json
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from tiny_runs import finetune_cfg, train

from d2_objssl.checkpoint import to_detectron2, write_checkpoint
from d2_objssl.engine import Trainer, setup_cfg
from d2_objssl.evaluation.evaluation_records import write_evaluation_records
from d2_objssl.evaluation.results import config_identity, environment, weights_identity, write_record

PRETRAINING = {
    "method": "SlotCon",
    "config": {"file": "pretrain.yaml", "sha256": "0" * 64},
    "num_images": 20,
    "max_iter": 7,
    "weights": None,
}


def test_record_holds_what_made_it(tmp_path):
    path = tmp_path / "new" / "record.json"
    write_record(path, {"task": "t", "seeds": [0]})
    record = json.loads(path.read_text())
    assert record["task"] == "t" and record["seeds"] == [0]
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert {"python", "detectron2", "d2_objssl", "opencv"} <= record["versions"].keys()
    assert record["command"] and record["hardware"]["num_cpus"] >= 1
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


def test_environment_is_plain():
    assert json.loads(json.dumps(environment())) == environment()


def _hash(*opts: str) -> str:
    return config_identity(setup_cfg("", list(opts)))["sha256"]


def test_config_hash_follows_what_decides_about_numbers():
    same = ["OUTPUT_DIR", "x", "MODEL.WEIGHTS", "y", "SEED", "3", "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "7"]
    same += ["SOLVER.CHECKPOINT_PERIOD", "9", "TEST.EVAL_PERIOD", "5", "SOLVER.BASE_LR", "0.001"]  # the default
    assert _hash(*same) == _hash()
    changes = [("SOLVER.BASE_LR", "0.5"), ("SOLVER.MAX_ITER", "9"), ("INPUT.FORMAT", "RGB"), ("SOLVER.STEPS", "(1, 2)")]
    assert len({_hash(), *(_hash(*change) for change in changes)}) == 1 + len(changes)


def test_a_new_key_that_is_off_changes_no_hash(monkeypatch):
    """Records of earlier versions go on filling the tables."""
    before = _hash("SOLVER.BASE_LR", "0.5")

    def with_new_key(cfg: CfgNode) -> None:
        add(cfg)
        cfg.SOLVER.NEW_KEY = False

    from d2_objssl.evaluation import results

    add = results.add_objssl_config
    monkeypatch.setattr(results, "add_objssl_config", with_new_key)
    cfg = setup_cfg("", ["SOLVER.BASE_LR", "0.5"])
    cfg.defrost()
    cfg.SOLVER.NEW_KEY = False
    assert config_identity(cfg)["sha256"] == before


def test_weights_of_elsewhere_and_none(tmp_path):
    path = tmp_path / "other.bin"
    path.write_bytes(b"abc")
    assert weights_identity(str(path)) == {"file": "other.bin", "sha256": hashlib.sha256(b"abc").hexdigest()}
    assert weights_identity("") is None
    with pytest.raises(FileNotFoundError):
        weights_identity(str(tmp_path / "absent.pth"))


def test_converted_weights_tell_how_they_were_pretrained(tmp_path, load_tool):
    resnet = torchvision.models.resnet18().state_dict()
    backbone = to_detectron2(
        {name: value for name, value in resnet.items() if not name.startswith("fc.")}, "torchvision"
    )
    state = {f"student.backbone.{name}": value for name, value in backbone.items()}
    metadata = {"method": "SlotCon", "export_branch": "student", "training": PRETRAINING}
    write_checkpoint({"model": state, "d2_objssl": metadata, "iteration": 4}, tmp_path / "model_0000004.pth")
    expected = PRETRAINING | {"branch": "student", "iterations": 5}
    assert weights_identity(str(tmp_path / "model_0000004.pth"))["training"] == expected
    converted = str(tmp_path / "backbone.pkl")
    assert load_tool("convert_checkpoint").main([str(tmp_path / "model_0000004.pth"), converted]) == 0
    identity = weights_identity(converted)
    assert identity["training"] == expected and identity["source"] == "model_0000004.pth"


def test_record_of_a_fine_tuning_that_was_killed(tmp_path, catalog, load_tool):
    """The final test is recorded once, with what the run started from, though that file has gone, and its whole time."""
    start = tmp_path / "start.pth"
    short = ["SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.IMS_PER_BATCH", 2]
    short += ["SOLVER.AMP.ENABLED", True, "TEST.PRECISE_BN.ENABLED", False]
    short += ["DATASETS.TEST", ("tiny_wide",), "MODEL.WEIGHTS", str(start)]
    cfg = finetune_cfg(tmp_path / "run", *short)
    state = Trainer.build_model(cfg).state_dict()
    write_checkpoint({"model": state, "d2_objssl": {"training": PRETRAINING}, "iteration": 6}, start)
    sha256 = weights_identity(str(start))["sha256"]
    train(cfg, kill_before=2)
    assert not (tmp_path / "run" / "records").exists()
    first_part = torch.load(tmp_path / "run" / "model_0000001.pth")["trainer"]["hooks"]["RunRecord"]["wall_time_s"]
    start.unlink()
    train(cfg, resume=True)
    record = json.loads((tmp_path / "run" / "records" / "tiny_wide.json").read_text())
    assert (record["task"], record["dataset"], record["num_images"]) == ("instance segmentation", "tiny_wide", 8)
    assert {"bbox/AP", "segm/AP"} <= record["metrics"].keys()
    assert (record["seed"], record["precision"], record["num_processes"]) == (0, "bfloat16", 1)
    assert record["weights"]["sha256"] == sha256
    assert record["weights"]["training"] == PRETRAINING | {"branch": None, "iterations": 7}
    assert record["config"] == config_identity(cfg) == record["checkpoint"]["training"]["config"]
    trained = record["checkpoint"]["training"]
    assert trained["iterations"] == trained["max_iter"] == 3
    assert (trained["seed"], trained["precision"]) == (0, "bfloat16")
    assert record["wall_time_s"] > first_part > 0

    # A later --eval-only with another setting and seed says so, and knows the rest from the checkpoint.
    other = cfg.clone()
    other.defrost()
    other.TEST.DETECTIONS_PER_IMAGE, other.SEED = 1, 5
    options = {"config_file": "f.yaml", "precision": "float32", "wall_time_s": 1.0, "of_training": False}
    final = str(tmp_path / "run" / "model_final.pth")
    (path,) = write_evaluation_records(other, {"bbox": {"AP": float("nan")}}, checkpoint=final, **options)
    again = json.loads(Path(path).read_text())
    assert again["weights"] == record["weights"] and again["checkpoint"] == record["checkpoint"]
    assert again["config"] != record["config"] and again["metrics"] == {"bbox/AP": None}
    assert (again["seed"], again["precision"]) == (5, "float32")

    # Records stand beside each other: of the training, of this setting, of that as it was, of another checkpoint.
    first = str(tmp_path / "run" / "model_0000001.pth")
    write_evaluation_records(cfg, {"bbox": {"AP": 1.0}}, checkpoint=first, **options)
    same = cfg.clone()
    same.defrost()
    same.MODEL.WEIGHTS = final
    load_tool("train_net").evaluate(same, argparse.Namespace(config_file="", resume=False))
    records = tmp_path / "run" / "records"
    assert json.loads((records / "tiny_wide.json").read_text()) == record
    config, weights = again["config"]["sha256"][:8], record["checkpoint"]["sha256"][:8]
    assert Path(path).name == f"tiny_wide-{weights}-{config}.json"
    assert len(list(records.iterdir())) == 4

    # A name that is a path stays one file.
    MetadataCatalog.get("voc:/a/folder:test").set(evaluator_type="pascal_voc")
    DatasetCatalog.register("voc:/a/folder:test", lambda: [])
    same.DATASETS.TEST = ("voc:/a/folder:test",)
    (path,) = write_evaluation_records(same, {"bbox": {"AP": 1.0}}, checkpoint=final, **options | {"of_training": True})
    assert Path(path) == records / "voc:_a_folder:test.json" and Path(path).exists()
