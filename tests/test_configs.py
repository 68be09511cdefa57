"""Every config file: it merges, keeps the backbone contract, and has the numbers of its protocol."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from d2_objssl.config import add_objssl_config
from d2_objssl.engine import resolve_norms, resolve_schedule

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*.yaml"))
RUNNABLE = [c for c in CONFIGS if not Path(c).name.startswith("Base-")]
PRETRAIN = [c for c in RUNNABLE if "slotcon" in Path(c).name]
SLOTCON = [c for c in PRETRAIN if c.startswith("configs/pretrain/")]
ABLATIONS = [c for c in PRETRAIN if "/ablations/" in c]
FINETUNE = [c for c in RUNNABLE if c not in PRETRAIN]


def load(config: str) -> CfgNode:
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.merge_from_file(str(ROOT / config))
    return cfg


def header(config: str) -> str:
    """The comment at the top, as one line."""
    lines = []
    for line in (ROOT / config).read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines)


def flatten(cfg: CfgNode, prefix: str = "") -> dict[str, object]:
    items: dict[str, object] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            items |= flatten(value, f"{prefix}{key}.")
        else:
            items[prefix + key] = value
    return items


def test_there_are_configs_of_each_kind():
    assert SLOTCON and ABLATIONS and FINETUNE and len(PRETRAIN) > len(SLOTCON)


@pytest.mark.parametrize("config", CONFIGS)
def test_backbone_contract(config):
    """Detectron2's own defaults for these keys cripple pretrained backbones without an error."""
    cfg = load(config)
    assert cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53]
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 0
    norms = {k: v for k, v in flatten(cfg).items() if k.endswith(".NORM")}
    assert norms["MODEL.RESNETS.NORM"] == "SyncBN"
    assert "FrozenBN" not in norms.values()
    if cfg.MODEL.META_ARCHITECTURE == "ObjectSSL":
        assert cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS is False
    else:
        assert cfg.INPUT.SSL.NUM_VIEWS == 0


@pytest.mark.parametrize("config", PRETRAIN)
def test_pretraining_uses_the_ssl_pipeline(config):
    cfg = load(config)
    assert cfg.MODEL.META_ARCHITECTURE == "ObjectSSL"
    assert cfg.INPUT.SSL.NUM_VIEWS == 2
    assert cfg.MODEL.BACKBONE.NAME == "build_resnet_backbone"
    assert set(cfg.MODEL.SSL.IN_FEATURES) <= set(cfg.MODEL.RESNETS.OUT_FEATURES)
    assert cfg.MODEL.SSL.EXPORT_BRANCH == "teacher"  # what the paper's numbers are of
    assert cfg.DATASETS.TEST == ()
    assert cfg.MODEL.WEIGHTS == ""  # from scratch


def test_pretraining_runs_do_not_share_a_folder():
    """With --resume, one run would go on from another one's checkpoint."""
    folders = [load(c).OUTPUT_DIR for c in PRETRAIN]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("config", RUNNABLE)
def test_datasets_are_in_the_catalog(config):
    cfg = load(config)
    assert cfg.DATASETS.TRAIN
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        assert name in DatasetCatalog, name


@pytest.mark.parametrize("config", RUNNABLE)
def test_header_has_command_cost_and_result(config):
    text = header(config)
    commands = re.findall(r"--config-file (\S+)", text)
    assert commands == [config], "the header's command must run this very file"
    assert re.search(r"\b\d+ (GPUs|CPU cores)\b", text), "on what it runs"
    if config.startswith("configs/quick/"):
        assert re.search(r"\b\d+ (minutes|seconds)\b", text), "how long it takes"
    else:
        assert re.search(r"\b\d+ hours\b|\b\d+k iterations\b", text), "how long it takes"
        assert "paper" in text or re.search(r"\bAP\b.*\d+\.\d", text), "the expected number, and whose it is"
    for other in re.findall(r"\S+\.yaml", text):  # other configs that it mentions exist, too
        assert any(c.endswith(other) for c in CONFIGS), other


# --------------------------------------------------------------------------------------------- SlotCon's values


@pytest.mark.parametrize("config", SLOTCON)
def test_slotcon_hyper_parameters_are_the_papers(config):
    cfg = load(config)
    slotcon, solver, ssl = cfg.MODEL.SSL.SLOTCON, cfg.SOLVER, cfg.MODEL.SSL
    assert cfg.MODEL.RESNETS.DEPTH == 50
    assert (slotcon.STUDENT_TEMP, slotcon.TEACHER_TEMP, slotcon.SLOT_TEMP) == (0.1, 0.07, 0.2)
    assert slotcon.CENTER_MOMENTUM == 0.9
    assert slotcon.GROUP_LOSS_WEIGHT == 0.5
    assert (ssl.TEACHER.ENABLED, ssl.TEACHER.MOMENTUM, ssl.TEACHER.MOMENTUM_SCHEDULE) == (True, 0.99, "cosine")
    for head in (ssl.PROJECTOR, ssl.PREDICTOR):
        assert (head.NUM_FC, head.FC_DIM, head.OUT_DIM, head.ACTIVATION) == (3, 4096, 256, "gelu")
    assert (solver.OPTIMIZER, solver.MOMENTUM, solver.WEIGHT_DECAY) == ("LARS", 0.9, 1e-5)
    assert solver.LARS_TRUST_COEFFICIENT == 0.001
    assert (solver.BASE_LR, solver.REFERENCE_BATCH, solver.BASE_LR_END) == (1.0, 256, 1e-6)
    assert (solver.LR_SCHEDULER_NAME, solver.WARMUP_EPOCHS, solver.WARMUP_FACTOR) == ("WarmupCosineLR", 5.0, 0.01)
    assert solver.AMP.ENABLED
    expected_batch = {"batch256": 256, "batch1024": 1024}.get(Path(config).stem.rsplit("_", 1)[-1], 512)
    assert solver.IMS_PER_BATCH == expected_batch


@pytest.mark.parametrize("config", SLOTCON)
def test_slotcon_views_are_byols(config):
    ssl = load(config).INPUT.SSL
    assert (ssl.CROP_SIZE, tuple(ssl.CROP_SCALE), ssl.MIN_OVERLAP, ssl.FLIP_PROB) == (224, (0.08, 1.0), 0.01, 0.5)
    assert tuple(ssl.CROP_RATIO) == pytest.approx((3 / 4, 4 / 3))
    assert (ssl.COLOR_JITTER_PROB, ssl.BRIGHTNESS, ssl.CONTRAST, ssl.SATURATION, ssl.HUE) == (0.8, 0.4, 0.4, 0.2, 0.1)
    assert (ssl.GRAYSCALE_PROB, tuple(ssl.BLUR_SIGMA)) == (0.2, (0.1, 2.0))
    assert (list(ssl.BLUR_PROB), list(ssl.SOLARIZE_PROB)) == ([1.0, 0.1], [0.0, 0.2])


@pytest.mark.parametrize(
    ("name", "datasets", "epochs", "prototypes"),
    [
        ("800ep_coco", ("coco_2017_train_images",), 800, 256),
        ("800ep_coco_plus", ("coco_2017_train_images", "coco_2017_unlabeled_images"), 800, 256),
        ("100ep", ("imagenet_1k_train_images",), 100, 2048),
        ("200ep", ("imagenet_1k_train_images",), 200, 2048),
        ("800ep_bdd100k", ("bdd100k_train_images",), 800, 64),
    ],
)
def test_slotcon_runs_of_the_paper(name, datasets, epochs, prototypes):
    cfg = load(f"configs/pretrain/slotcon_R_50_{name}.yaml")
    assert cfg.DATASETS.TRAIN == datasets
    assert cfg.SOLVER.MAX_EPOCHS == epochs
    assert cfg.SOLVER.CHECKPOINT_EPOCHS > 0
    assert cfg.MODEL.SSL.SLOTCON.NUM_PROTOTYPES == prototypes


def test_slotcon_on_coco_in_iterations():
    cfg = resolve_schedule(load("configs/pretrain/slotcon_R_50_800ep_coco.yaml"), num_images=118_287)
    assert cfg.SOLVER.MAX_ITER == int(118_287 / 512 * 800) == 184_823
    assert cfg.SOLVER.WARMUP_ITERS == round(118_287 / 512 * 5) == 1155
    assert cfg.SOLVER.BASE_LR == 2.0


@pytest.mark.parametrize("config", ABLATIONS)
def test_ablation_changes_one_key(config):
    base, changed = flatten(load("configs/pretrain/slotcon_R_50_800ep_coco.yaml")), flatten(load(config))
    differences = {k for k in base if base[k] != changed[k]} - {"OUTPUT_DIR"}
    assert len(differences) == 1
    known = {
        "SOLVER.IMS_PER_BATCH",
        "INPUT.SSL.GEOMETRIC",
        *(f"MODEL.SSL.SLOTCON.{k}" for k in ("ALIGN", "SLOT_LOSS", "IMAGE_LOSS_WEIGHT")),
    }
    assert differences <= known


# -------------------------------------------------------------------------------------------- fine-tuning's values


@pytest.mark.parametrize("config", [c for c in FINETUNE if "/COCO/" in c])
def test_coco_protocol(config):
    cfg = load(config)
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("coco_2017_train",), ("coco_2017_val",))
    assert (cfg.SOLVER.OPTIMIZER, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == ("SGD", 16, 0.02)
    assert (cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.WARMUP_ITERS) == ("WarmupMultiStepLR", 1000)
    expected = {"1x": ((60_000, 80_000), 90_000), "2x": ((120_000, 160_000), 180_000)}[Path(config).stem[-2:]]
    assert (cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER) == expected
    assert cfg.SOLVER.MAX_EPOCHS == cfg.SOLVER.REFERENCE_BATCH == 0
    assert cfg.INPUT.MIN_SIZE_TRAIN == (640, 672, 704, 736, 768, 800)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TEST) == (800, 1333, 1333)
    assert cfg.TEST.PRECISE_BN.ENABLED
    assert cfg.MODEL.MASK_ON
    assert cfg.MODEL.FPN.NORM == "SyncBN"
    assert cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS  # Detectron2's, and everybody's, for detection


@pytest.mark.parametrize("schedule", ["1x", "2x"])
def test_the_two_heads_are_different_protocols(schedule):
    conv = load(f"configs/finetune/COCO/mask_rcnn_R_50_FPN_4conv1fc_{schedule}.yaml").MODEL
    fc = load(f"configs/finetune/COCO/mask_rcnn_R_50_FPN_2fc_{schedule}.yaml").MODEL
    assert (conv.ROI_BOX_HEAD.NUM_CONV, conv.ROI_BOX_HEAD.NUM_FC) == (4, 1)
    assert (fc.ROI_BOX_HEAD.NUM_CONV, fc.ROI_BOX_HEAD.NUM_FC) == (0, 2)
    assert conv.ROI_BOX_HEAD.NORM == conv.ROI_MASK_HEAD.NORM == "SyncBN"
    assert fc.ROI_BOX_HEAD.NORM == fc.ROI_MASK_HEAD.NORM == ""


# ------------------------------------------------------------------------------------------------- quick configs


def test_quick_pretraining_model_can_be_built():
    cfg = resolve_norms(load("configs/quick/slotcon_R_18_scenes.yaml"))
    torch.manual_seed(0)
    model = build_model(cfg)
    assert model.student.embedder.prototypes.shape == (32, 128)
    assert model.teacher is not None


def test_quick_fine_tuning_takes_the_backbone_of_quick_pretraining():
    pretrain = build_model(resolve_norms(load("configs/quick/slotcon_R_18_scenes.yaml")))
    finetune = build_model(resolve_norms(load("configs/quick/mask_rcnn_R_18_FPN_scenes.yaml")))
    assert finetune.roi_heads.num_classes == 6
    given = {k: v.shape for k, v in pretrain.teacher.backbone.state_dict().items()}
    taken = {k: v.shape for k, v in finetune.backbone.bottom_up.state_dict().items()}
    assert given == taken
