"""Every config file: it merges, keeps the backbone contract, and has the numbers of its protocol."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from d2_objssl.config import add_objssl_config
from d2_objssl.data import register_image_folders
from d2_objssl.engine import resolve_norms, resolve_schedule
from d2_objssl.engine.config_checks import find_mistakes

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*.yaml"))
RUNNABLE = [c for c in CONFIGS if not Path(c).name.startswith("Base-")]
METHODS = ("slotcon", "detcon_s", "detcon_b", "cyborgs", "semcl")  # names of configs begin with them
PRETRAIN = [c for c in RUNNABLE if Path(c).name.startswith(METHODS)]
PUBLISHED = [c for c in PRETRAIN if c.startswith("configs/pretrain/")]
SLOTCON = [c for c in PUBLISHED if "slotcon" in Path(c).name]
DETCON = [c for c in PUBLISHED if "detcon" in Path(c).name]
ABLATIONS = [c for c in SLOTCON if "/ablations/" in c]
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
    assert SLOTCON and DETCON and ABLATIONS and FINETUNE and len(PRETRAIN) > len(PUBLISHED)


@pytest.mark.parametrize("config", CONFIGS)
def test_backbone_contract(config):
    """Detectron2's own defaults for these keys cripple pretrained backbones without an error."""
    cfg = load(config)
    assert cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53]
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False
    assert cfg.MODEL.BACKBONE.FREEZE_AT == (5 if "_frozen_" in config or "/linear_" in config else 0)
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
    assert cfg.INPUT.SSL.NUM_VIEWS == {"SemCL": 6}.get(cfg.MODEL.SSL.METHOD, 1 if "one_view" in config else 2)
    assert cfg.MODEL.BACKBONE.NAME in ("build_resnet_backbone", "build_objssl_resnet_backbone", "build_swin_backbone")
    if "_swin_" in config:  # unused outputs have parameters, for which data-parallel training would wait
        assert set(cfg.MODEL.SSL.IN_FEATURES) == set(cfg.MODEL.SWIN.OUT_FEATURES)
    else:
        assert set(cfg.MODEL.SSL.IN_FEATURES) <= set(cfg.MODEL.RESNETS.OUT_FEATURES)
    # What the paper's numbers are of.
    assert cfg.MODEL.SSL.EXPORT_BRANCH == ("teacher" if cfg.MODEL.SSL.METHOD == "SlotCon" else "student")
    assert cfg.DATASETS.TEST == ()
    assert cfg.MODEL.WEIGHTS == ""  # from scratch, or given with the command


def test_pretraining_runs_do_not_share_a_folder():
    """With --resume, one run would go on from another one's checkpoint."""
    folders = [load(c).OUTPUT_DIR for c in PRETRAIN]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("config", RUNNABLE)
def test_datasets_are_in_the_catalog(config):
    cfg = load(config)
    assert cfg.DATASETS.TRAIN
    register_image_folders([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        assert name in DatasetCatalog, name


@pytest.mark.parametrize("config", RUNNABLE)
def test_config_checks_find_no_mistake(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load(config)
    if cfg.INPUT.REGIONS.ROOT:
        Path(cfg.INPUT.REGIONS.ROOT).mkdir(parents=True)
    # The data sets themselves are not here.
    monkeypatch.setattr("d2_objssl.engine.config_paths.check_datasets", lambda names, key: None)
    assert not find_mistakes(cfg)


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
        ("800ep_coco_27_prototypes", ("coco_2017_train_images",), 800, 27),
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


# ---------------------------------------------------------------------------------------------- DetCon's values


@pytest.mark.parametrize("config", DETCON)
def test_detcon_hyper_parameters_are_the_papers(config):
    cfg = load(config)
    ssl, solver = cfg.MODEL.SSL, cfg.SOLVER
    is_b = ssl.METHOD == "DetConB"
    assert is_b == ("detcon_b" in config) and ssl.METHOD in ("DetConS", "DetConB")
    assert ssl.TEACHER.ENABLED == is_b
    for head in (ssl.PROJECTOR, ssl.PREDICTOR) if is_b else (ssl.PROJECTOR,):
        assert (head.NUM_FC, head.FC_DIM, head.OUT_DIM) == ((2, 4096, 256) if is_b else (2, 2048, 128))
        assert (head.ACTIVATION, head.LAST_BIAS, head.LAST_NORM) == ("relu", False, False)
    assert (ssl.DETCON.TEMP, ssl.DETCON.LOCAL_NEGATIVES) == (0.1, True)
    assert (solver.OPTIMIZER, solver.MOMENTUM, solver.IMS_PER_BATCH, solver.REFERENCE_BATCH) == ("LARS", 0.9, 4096, 256)
    is_long = is_b and solver.MAX_EPOCHS == 1000
    assert (solver.BASE_LR, solver.WEIGHT_DECAY) == ((0.2, 1.5e-6) if is_long else (0.3, 1e-6))
    if is_b:
        assert (ssl.TEACHER.MOMENTUM, ssl.TEACHER.MOMENTUM_SCHEDULE) == (0.996 if is_long else 0.99, "cosine")
    assert (solver.WARMUP_EPOCHS, solver.WARMUP_FACTOR) == (10.0, 0.0)
    if "coco" in config:
        assert (solver.LR_SCHEDULER_NAME, solver.GAMMA) == ("WarmupMultiStepLR", 0.1)
        assert solver.STEPS_EPOCHS == pytest.approx((0.96 * solver.MAX_EPOCHS, 0.98 * solver.MAX_EPOCHS))
    else:
        assert (solver.LR_SCHEDULER_NAME, solver.BASE_LR_END, solver.RESCALE_INTERVAL) == ("WarmupCosineLR", 0.0, True)


@pytest.mark.parametrize("config", DETCON)
def test_detcon_views_are_simclrs_and_byols(config):
    ssl = load(config).INPUT.SSL
    jitter = (ssl.COLOR_JITTER_PROB, ssl.BRIGHTNESS, ssl.CONTRAST, ssl.SATURATION, ssl.HUE)
    if "detcon_b" in config:
        assert jitter == (0.8, 0.4, 0.4, 0.2, 0.1)
        assert (list(ssl.BLUR_PROB), list(ssl.SOLARIZE_PROB)) == ([1.0, 0.1], [0.0, 0.2])
    else:
        assert jitter == (0.8, 0.8, 0.8, 0.8, 0.2)
        assert (list(ssl.BLUR_PROB), list(ssl.SOLARIZE_PROB)) == ([1.0, 0.0], [0.0, 0.0])
    assert (tuple(ssl.CROP_SCALE), ssl.FLIP_PROB, ssl.GRAYSCALE_PROB) == ((0.08, 1.0), 0.5, 0.2)
    assert ssl.CROP_SIZE == {"384": 384, "512": 512}.get(Path(config).stem.rsplit("_", 1)[-1], 224)


@pytest.mark.parametrize("config", DETCON)
def test_detcon_regions_are_made_by_the_command_in_the_header(config):
    cfg, text = load(config), header(config)
    regions = cfg.INPUT.REGIONS
    assert cfg.MODEL.SSL.DETCON.NUM_VIEWS == cfg.INPUT.SSL.NUM_VIEWS
    if regions.SOURCE == "instances":
        assert cfg.DATASETS.TRAIN == ("coco_2017_train",)  # with its labels
    if regions.SOURCE == "file":
        assert f"--output {regions.ROOT} " in text and f"--dataset {cfg.DATASETS.TRAIN[0]} " in text
    else:
        assert "generate_masks" not in text


# ----------------------------------------------------------------------------------------------- SemCL's values


@pytest.mark.parametrize("config", [c for c in PUBLISHED if "semcl" in Path(c).name])
def test_semcl_hyper_parameters_are_the_papers(config):
    cfg = load(config)
    ssl, solver, pairs = cfg.MODEL.SSL, cfg.SOLVER, cfg.INPUT.PAIRS
    assert (ssl.METHOD, ssl.SEMCL.TEMP, ssl.SEMCL.LOSS) == ("SemCL", 0.2, "paired")
    assert (ssl.TEACHER.ENABLED, ssl.TEACHER.MOMENTUM, ssl.TEACHER.MOMENTUM_SCHEDULE) == (True, 0.99, "cosine")
    for head in (ssl.PROJECTOR, ssl.PREDICTOR):
        assert (head.FC_DIM, head.OUT_DIM, head.ACTIVATION, head.LAST_BIAS) == (4096, 256, "relu", False)
    if "_R_" in config:  # MoCo-v3's heads for a ResNet
        assert (ssl.PROJECTOR.NUM_FC, ssl.PROJECTOR.LAST_NORM) == (2, True)
        assert (ssl.PREDICTOR.NUM_FC, ssl.PREDICTOR.LAST_NORM) == (2, False)
    else:  # and for a transformer
        assert (ssl.PROJECTOR.NUM_FC, ssl.PROJECTOR.LAST_NORM) == (3, True)
        assert (ssl.PREDICTOR.NUM_FC, ssl.PREDICTOR.LAST_NORM) == (2, True)
    assert (pairs.SOURCE, pairs.MIN_AREA) == ("sem_seg", 0.01)
    assert (solver.OPTIMIZER, solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM) == ("ADAMW", 0.1, 0.1)
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.REFERENCE_BATCH) == (64, 1.5e-4, 256)
    assert (solver.LR_SCHEDULER_NAME, solver.MAX_ITER, solver.WARMUP_ITERS) == ("OneCycleLR", 30_000, 3_750)
    assert solver.WARMUP_FACTOR == 1 / 25
    assert "LABELS" in header(config) and "MODEL.WEIGHTS" in header(config)


@pytest.mark.parametrize(
    ("config", "embed_dim", "depths", "num_heads", "drop_path_rate"),
    [
        ("T_30k_coco", 96, (2, 2, 6, 2), (3, 6, 12, 24), 0.1),
        ("S_30k_coco", 96, (2, 2, 18, 2), (3, 6, 12, 24), 0.2),
        ("B_30k_coco", 128, (2, 2, 18, 2), (4, 8, 16, 32), 0.2),
        ("L_30k_cityscapes", 192, (2, 2, 18, 2), (6, 12, 24, 48), 0.2),
    ],
)
def test_swin_transformers_of_semcl(config, embed_dim, depths, num_heads, drop_path_rate):
    cfg = load(f"configs/pretrain/semcl_swin_{config}.yaml")
    swin = cfg.MODEL.SWIN
    assert (swin.EMBED_DIM, swin.DEPTHS, swin.NUM_HEADS, swin.WINDOW_SIZE) == (embed_dim, depths, num_heads, 7)
    assert swin.DROP_PATH_RATE == drop_path_rate
    assert cfg.SOLVER.ACCUMULATION_STEPS == (2 if config.startswith("L") else 1)


# -------------------------------------------------------------------------------------------- fine-tuning's values


@pytest.mark.parametrize("config", [c for c in FINETUNE if "/COCO/" in c and "_detcon_" not in c])
def test_coco_protocol(config):
    cfg = load(config)
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("coco_2017_train",), ("coco_2017_val",))
    optimizer = ("ADAMW", 16, 1e-4) if "_swin_" in config else ("SGD", 16, 0.02)
    assert (cfg.SOLVER.OPTIMIZER, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == optimizer
    assert (cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.WARMUP_ITERS) == (
        "WarmupMultiStepLR",
        100 if "_C4_" in config else 1000,
    )
    expected = {"1x": ((60_000, 80_000), 90_000), "2x": ((120_000, 160_000), 180_000)}[Path(config).stem[-2:]]
    assert (cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER) == expected
    assert cfg.SOLVER.MAX_EPOCHS == cfg.SOLVER.REFERENCE_BATCH == 0
    assert cfg.INPUT.MIN_SIZE_TRAIN == (640, 672, 704, 736, 768, 800)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TEST) == (800, 1333, 1333)
    assert cfg.TEST.PRECISE_BN.ENABLED
    assert cfg.MODEL.MASK_ON
    assert cfg.MODEL.FPN.NORM == ("" if "_C4_" in config else "SyncBN")
    assert cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS  # Detectron2's, and everybody's, for detection


@pytest.mark.parametrize("schedule", ["1x", "2x"])
def test_the_two_heads_are_different_protocols(schedule):
    conv = load(f"configs/finetune/COCO/mask_rcnn_R_50_FPN_4conv1fc_{schedule}.yaml").MODEL
    fc = load(f"configs/finetune/COCO/mask_rcnn_R_50_FPN_2fc_{schedule}.yaml").MODEL
    assert (conv.ROI_BOX_HEAD.NUM_CONV, conv.ROI_BOX_HEAD.NUM_FC) == (4, 1)
    assert (fc.ROI_BOX_HEAD.NUM_CONV, fc.ROI_BOX_HEAD.NUM_FC) == (0, 2)
    assert conv.ROI_BOX_HEAD.NORM == conv.ROI_MASK_HEAD.NORM == "SyncBN"
    assert fc.ROI_BOX_HEAD.NORM == fc.ROI_MASK_HEAD.NORM == ""


def test_camvid_protocol():
    cfg, voc = (load(f"configs/finetune/SemSeg/fcn_R_50_{name}.yaml") for name in ("camvid", "voc2012aug_30k"))
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("camvid_train_sem_seg",), ("camvid_val_sem_seg",))
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        metadata = MetadataCatalog.get(name)
        head = cfg.MODEL.SEM_SEG_HEAD
        assert (head.NUM_CLASSES, head.IGNORE_VALUE) == (len(metadata.stuff_classes), metadata.ignore_label)
    same = set(voc.MODEL.SEM_SEG_HEAD) - {"NUM_CLASSES", "IGNORE_VALUE"}
    assert all(cfg.MODEL.SEM_SEG_HEAD[key] == voc.MODEL.SEM_SEG_HEAD[key] for key in same)
    assert (head.CONVS_DIM, head.DILATION, cfg.MODEL.RESNETS.RES5_DILATION) == (256, 6, 2)
    assert (cfg.INPUT.SEM_SEG.CROP_SIZE, cfg.INPUT.SEM_SEG.SCALE_RANGE) == (321, (0.5, 2.0))
    assert cfg.TEST.SEM_SEG.WINDOW == 0, "whole images"


@pytest.mark.parametrize("config", [c for c in FINETUNE if "_swin_T_" in c])
def test_swin_detector_differs_from_the_resnets_in_backbone_and_optimizer_alone(config):
    resnet, swin = flatten(load(config.replace("swin_T", "R_50"))), flatten(load(config))
    changed = {k: v for k, v in swin.items() if resnet[k] != v}
    ratio = resnet["SOLVER.BASE_LR"] / 0.02
    assert changed == {
        "MODEL.BACKBONE.NAME": "build_swin_fpn_backbone",
        "MODEL.SWIN.DROP_PATH_RATE": 0.2,
        "SOLVER.OPTIMIZER": "ADAMW",
        "SOLVER.BASE_LR": pytest.approx(1e-4 * ratio),
        "SOLVER.WEIGHT_DECAY": 0.05,
        "SOLVER.WEIGHT_DECAY_BIAS": 0.0,
    }
    assert swin["SOLVER.WEIGHT_DECAY_NORM"] == 0.0


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
