"""Every configuration key that d2_objssl adds to Detectron2's."""

from detectron2.config import CfgNode as CN


def add_objssl_config(cfg: CN) -> None:
    """Add d2_objssl's keys, with defaults that leave Detectron2's own behaviour unchanged, to `cfg` (in place)."""
    _add_model_config(cfg)
    _add_input_config(cfg)
    _add_solver_config(cfg)
    _add_sem_seg_config(cfg)
    _add_detection_config(cfg)
    _add_label_config(cfg)
    _add_classification_config(cfg)
    _add_depth_config(cfg)
    _add_collapse_config(cfg)


def _add_model_config(cfg: CN) -> None:
    # These two are used by MODEL.BACKBONE.NAME "build_objssl_resnet_backbone" and "build_objssl_resnet_fpn_backbone".
    cfg.MODEL.RESNETS.WIDTH_MULTIPLIER = 1  # of all channels, the stem's included; 2: "ResNet-50 (2x)"
    # How strided convolutions and the stem's pooling pad: "symmetric" (PyTorch) | "same" (TensorFlow, haiku).
    cfg.MODEL.RESNETS.PADDING = "symmetric"

    # Used by MODEL.BACKBONE.NAME "build_swin_backbone" and "build_swin_fpn_backbone". The defaults are Swin-T.
    swin = cfg.MODEL.SWIN = CN()
    swin.EMBED_DIM = 96  # channels of res2
    swin.DEPTHS = (2, 2, 6, 2)  # blocks in res2 to res5
    swin.NUM_HEADS = (3, 6, 12, 24)
    swin.WINDOW_SIZE = 7  # cells
    swin.DROP_PATH_RATE = 0.0  # stochastic depth: how often the last block is left out; earlier ones less often
    swin.OUT_FEATURES = ("res2", "res3", "res4", "res5")

    ssl = cfg.MODEL.SSL = CN()
    # The pretraining method: a name of SSL_METHOD_REGISTRY. Used by MODEL.META_ARCHITECTURE "ObjectSSL" alone.
    ssl.METHOD = "SlotCon"
    # Backbone features that enter the projector; several are brought to one grid and concatenated.
    ssl.IN_FEATURES = ["res5"]
    # The feature whose grid the others are brought to; "" = the last of IN_FEATURES.
    ssl.GRID_FEATURE = ""
    # Which network the converter exports: "student" or "teacher".
    ssl.EXPORT_BRANCH = "teacher"
    # Memory layout of images and convolutions. True is faster wherever it was measured.
    ssl.CHANNELS_LAST = True
    # Compute the activations of the student's residual blocks anew in the backward pass: less memory, more time.
    ssl.CHECKPOINT_ACTIVATIONS = False

    ssl.TEACHER = CN()
    ssl.TEACHER.ENABLED = True
    # m of the exponential moving average  teacher <- m teacher + (1 - m) student,  at the first step.
    ssl.TEACHER.MOMENTUM = 0.99
    # "cosine": from MOMENTUM to 1 over the run. "constant".
    ssl.TEACHER.MOMENTUM_SCHEDULE = "cosine"

    # The projector maps every cell (or region) to the embedding space; the predictor only exists in the student.
    for name in ("PROJECTOR", "PREDICTOR"):
        head = ssl[name] = CN()
        head.NUM_FC = 3
        head.FC_DIM = 4096
        head.OUT_DIM = 256
        head.NORM = "SyncBN"
        head.ACTIVATION = "gelu"
        head.LAST_BIAS = True  # whether the last layer has a bias
        head.LAST_NORM = False  # whether it ends in a normalisation without scale and shift

    slotcon = ssl.SLOTCON = CN()
    slotcon.NUM_PROTOTYPES = 256  # K
    slotcon.STUDENT_TEMP = 0.1  # tau_s, divides the student's scores in the grouping loss
    slotcon.TEACHER_TEMP = 0.07  # tau_t, divides the teacher's scores there, and all scores in the assignment
    slotcon.SLOT_TEMP = 0.2  # tau_c of the slot-level contrastive loss
    slotcon.CENTER_MOMENTUM = 0.9  # of the centre c
    slotcon.GROUP_LOSS_WEIGHT = 0.5  # lambda_g; the slot loss gets 1 - lambda_g
    slotcon.ALIGN = "assignment"  # where views are aligned: "assignment" | "projection" (supplement, Table 3c)
    slotcon.SLOT_LOSS = "contrastive"  # "contrastive" | "regression" (supplement, Table 3b)
    slotcon.IMAGE_LOSS_WEIGHT = 0.0  # of the MoCo-v3 image-level loss (supplement, Table 3d)

    _add_region_method_config(ssl)

    semcl = ssl.SEMCL = CN()
    semcl.TEMP = 0.2  # tau
    # "paired": the negatives of an object are its own surroundings (Eq. 3) | "unpaired": other images, as in MoCo-v3.
    semcl.LOSS = "paired"


def _add_region_method_config(ssl: CN) -> None:
    """DetCon and CYBORGS, which contrast the regions of INPUT.REGIONS."""
    detcon = ssl.DETCON = CN()
    detcon.NUM_REGIONS = 16  # M, regions drawn from each view
    detcon.MAX_REGION_IDS = 256  # region ids are below this; more regions in an image than this are an error or are cut
    detcon.TEMP = 0.1  # tau
    detcon.LOCAL_NEGATIVES = True  # other regions of the same image are negatives
    detcon.GLOBAL_NEGATIVES = True  # images of other processes are negatives, too (Table 5a)
    detcon.NUM_VIEWS = 2  # 1: predict regions within one view (Table 5b)
    detcon.POOLING = "mean"  # "mean" over a region | "sample": the feature of one random cell of it (section 4.4)

    cyborgs = ssl.CYBORGS = CN()
    cyborgs.CONSISTENCY = "vmf"  # cluster consistency loss: "vmf" | "euclidean" (Table 2f)
    cyborgs.VMF_KAPPA = 10.0  # kappa, concentration
    cyborgs.VMF_WEIGHT = 0.1  # lambda, after the warm-up; in it the weight is 1
    # M, epochs: the consistency loss is on in every M-th epoch. 0: only in the warm-up (Table 2g).
    cyborgs.VMF_PERIOD = 5
    cyborgs.WARMUP_EPOCHS = 5.0  # W, the consistency loss alone; masks are bootstrapped when they are over
    cyborgs.WARMUP_CLUSTERS = 8  # K of the consistency loss during the warm-up, and of whole images in inference
    cyborgs.MIN_CLUSTERS = 2  # K ~ U[MIN_CLUSTERS, MAX_CLUSTERS], both included
    cyborgs.MAX_CLUSTERS = 256
    cyborgs.KMEANS_ITERS = 20
    cyborgs.BOOTSTRAP_PERIOD = 100.0  # N: masks are made anew at its multiples, epochs from the start; 0: never again
    cyborgs.BOOTSTRAP_FEATURE = "res3.2"  # stage and block (from 0) of the backbone whose output is clustered
    cyborgs.IMAGES_PER_CLUSTERING = 16


def _add_input_config(cfg: CN) -> None:
    # Of fine-tuning and its tests: "detectron2" (built from Detectron2's own keys) or a name of AUGMENTATION_REGISTRY.
    cfg.INPUT.AUGMENTATION = "detectron2"
    ssl = cfg.INPUT.SSL = CN()
    # Number of augmented views of an image, or of a pair (INPUT.PAIRS): then half of them show the object, half its
    # surroundings. 0: the mapper is Detectron2's DatasetMapper, for fine-tuning.
    ssl.NUM_VIEWS = 0
    ssl.CROP_SIZE = 224  # side of a view, pixels
    ssl.CROP_SCALE = (0.08, 1.0)  # area of a crop, as a share of the image's
    ssl.CROP_RATIO = (3.0 / 4.0, 4.0 / 3.0)  # width / height of a crop
    # Later crops are redrawn (at most 10 times) until they share this part of their own area with the first crop.
    ssl.MIN_OVERLAP = 0.01
    # False: all views show the same crop, unflipped; only the photometric part differs (supplement, Table 3e).
    ssl.GEOMETRIC = True
    ssl.FLIP_PROB = 0.5
    # Where the colours of the views are changed: "worker" (of the loader) | "model": on the model's device, for GPUs that
    # outrun the processor's cores.
    ssl.AUGMENT_DEVICE = "worker"
    # Colour jitter: probability, then the strengths as in torchvision's ColorJitter.
    ssl.COLOR_JITTER_PROB = 0.8
    ssl.BRIGHTNESS = 0.4
    ssl.CONTRAST = 0.4
    ssl.SATURATION = 0.2
    ssl.HUE = 0.1
    ssl.GRAYSCALE_PROB = 0.2
    # One probability a view; the last one serves the views beyond the list.
    ssl.BLUR_PROB = [1.0, 0.1]
    ssl.BLUR_SIGMA = (0.1, 2.0)  # standard deviation of the blur, pixels of the view
    ssl.SOLARIZE_PROB = [0.0, 0.2]

    regions = cfg.INPUT.REGIONS = CN()
    # Where the regions of the views come from: "none" | "grid" | "global" (the whole image) | "felzenszwalb" |
    # "selective_search" | "instances" or "sem_seg" (ground truth of the data set) | "file" (tools/generate_masks.py) |
    # "bootstrap" (CYBORGS makes them during the run).
    regions.SOURCE = "none"
    regions.ROOT = ""  # "file": the folder that tools/generate_masks.py filled (format: data/region_files.py)
    regions.GRID_SIZE = 5  # n of the n x n grid
    # (scale, min_size) of Felzenszwalb and Huttenlocher; of several, one is drawn for each image.
    regions.FELZENSZWALB = [[1000.0, 1000]]
    regions.NUM_PROPOSALS = 16  # how many overlapping proposals an image keeps, the best by score; at most 16

    pairs = cfg.INPUT.PAIRS = CN()
    # Labels that make the pairs (object, surroundings) of SemCL: "none" | "sem_seg" (label maps) | "instances" (the union
    # of a category's masks) | "both" (the classes of either).
    pairs.SOURCE = "none"
    pairs.MIN_AREA = 0.01  # t: a class that covers a smaller share of the image makes no pair
    # Names of semantic classes that are no objects; "things" stands for all objects in COCO's panoptic stuff maps.
    pairs.SKIP_CLASSES = ("background", "things")
    pairs.CACHE_DIR = ""  # where the index of all pairs is kept; "": the folder pair_index in OUTPUT_DIR


def _add_solver_config(cfg: CN) -> None:
    solver = cfg.SOLVER
    solver.OPTIMIZER = "SGD"  # "SGD" | "LARS" | "ADAMW"
    solver.LARS_TRUST_COEFFICIENT = 0.001  # eta
    solver.ADAMW_BETAS = (0.9, 0.999)
    # Parts into which a batch is cut; they go through the model one after the other, for one step of the optimiser.
    solver.ACCUMULATION_STEPS = 1
    # LR_SCHEDULER_NAME is one of Detectron2's, or "OneCycleLR": see engine.schedule.build_lr_scheduler.
    # > 0: the learning rate is BASE_LR * IMS_PER_BATCH / REFERENCE_BATCH (linear scaling). 0: it is BASE_LR.
    solver.REFERENCE_BATCH = 0
    # > 0: MAX_ITER, WARMUP_ITERS, STEPS and CHECKPOINT_PERIOD are computed from these and the data set's size.
    solver.MAX_EPOCHS = 0.0
    solver.WARMUP_EPOCHS = 0.0
    solver.STEPS_EPOCHS = ()  # for LR_SCHEDULER_NAME "WarmupMultiStepLR"
    solver.CHECKPOINT_EPOCHS = 0.0  # 0: CHECKPOINT_PERIOD, in iterations, stands
    # How many periodic checkpoints stay on disk; 0 keeps all.
    solver.MAX_TO_KEEP = 0
    # Precision of autocast where SOLVER.AMP.ENABLED: "bfloat16" | "float16" (the latter with a gradient scaler).
    solver.AMP.DTYPE = "bfloat16"

    # Unreadable images are replaced by others, counted, and listed in OUTPUT_DIR/bad_images.tsv. A share of the
    # images seen that is surely larger than this, and not by chance (p < 1e-6), stops the run.
    cfg.DATALOADER.MAX_BAD_IMAGES = 0.05


def _add_detection_config(cfg: CN) -> None:
    # A data set that does not have the number of images that is known of it: True: an error. False: a warning.
    cfg.DATASETS.REQUIRE_COMPLETE = False

    # INPUT.AUGMENTATION "large_scale_jitter".
    lsj = cfg.INPUT.LSJ = CN()
    lsj.IMAGE_SIZE = 1024  # side of the training images, and longest side of the test images, pixels
    # Range of the longest side before the image is cropped or padded, as a share of IMAGE_SIZE.
    lsj.MIN_SCALE = 0.8
    lsj.MAX_SCALE = 1.25


def _add_label_config(cfg: CN) -> None:
    # Fine-tuning with few labels: the part of the images of DATASETS.TRAIN that is used, in (0, 1]. Pretraining uses all.
    cfg.DATASETS.TRAIN_FRACTION = 1.0
    cfg.DATASETS.TRAIN_FRACTION_SEED = 0  # chooses the images, whatever SEED is


def _add_classification_config(cfg: CN) -> None:
    classifier = cfg.MODEL.CLASSIFIER = CN()  # used by MODEL.META_ARCHITECTURE "ImageClassifier" alone
    classifier.NUM_CLASSES = 0  # 0: as many as DATASETS have
    classifier.IN_FEATURE = "res5"  # the feature of the backbone that is average-pooled

    # Used by INPUT.AUGMENTATION "classification". Training: a random crop, resized to CROP_SIZE, and a flip.
    images = cfg.INPUT.CLASSIFICATION = CN()
    images.CROP_SIZE = 224  # side of what the network sees, pixels
    images.CROP_SCALE = (0.08, 1.0)  # area of a crop, as a share of the image's
    images.CROP_RATIO = (3.0 / 4.0, 4.0 / 3.0)  # width / height of a crop
    images.FLIP_PROB = 0.5
    images.TEST_SHORT_SIDE = 256  # pixels; then the central CROP_SIZE x CROP_SIZE is cut out

    # The learning rate of what is not the backbone, the head, is this times that of the backbone, BASE_LR.
    cfg.SOLVER.HEAD_LR_FACTOR = 1.0


def _add_sem_seg_config(cfg: CN) -> None:
    # With build_objssl_resnet_backbone: 2 keeps the resolution of res3 in res4; RES5_DILATION is then 4, and the stride 8.
    cfg.MODEL.RESNETS.RES4_DILATION = 1

    # Used by MODEL.SEM_SEG_HEAD.NAME "FCNHead", beside CONVS_DIM, NORM, NUM_CLASSES, IGNORE_VALUE and LOSS_WEIGHT. Its
    # IN_FEATURES is one feature, whose stride COMMON_STRIDE must be.
    cfg.MODEL.SEM_SEG_HEAD.NUM_CONVS = 2  # 3x3 convolutions before the 1x1 classifier; 0: a linear head
    cfg.MODEL.SEM_SEG_HEAD.DILATION = 1  # of these convolutions

    # Used by INPUT.AUGMENTATION "sem_seg".
    sem_seg = cfg.INPUT.SEM_SEG = CN()
    # Shorter side of an image at scale 1, pixels, in training and tests; 0: images keep their own size.
    sem_seg.BASE_SIZE = 0
    sem_seg.SCALE_RANGE = (0.5, 2.0)  # a factor of that size, drawn uniformly for each training image
    sem_seg.CROP_SIZE = 512  # side of a training crop, pixels; smaller images are padded

    # Used by MODEL.META_ARCHITECTURE "SlidingWindowSegmentor": side of the window and its step, pixels; WINDOW 0: images
    # go through the network whole.
    cfg.TEST.SEM_SEG = CN()
    cfg.TEST.SEM_SEG.WINDOW = 0
    cfg.TEST.SEM_SEG.STRIDE = 0

    # Of LR_SCHEDULER_NAME "WarmupPolyLR": BASE_LR max((1 - iteration / MAX_ITER) ** POWER, CONSTANT_ENDING).
    cfg.SOLVER.POLY_LR_POWER = 0.9
    cfg.SOLVER.POLY_LR_CONSTANT_ENDING = 0.0  # a share of BASE_LR


def _add_collapse_config(cfg: CN) -> None:
    """When a pretraining run warns that it has collapsed (engine/collapse.py); each limit is of a metric in the log."""
    collapse = cfg.MODEL.SSL.COLLAPSE = CN()
    # Iterations, behind the warm-up of the learning rate, in which a metric must be beyond its limit; 0: never warn.
    collapse.PERIOD = 100
    # Of "feature_std" and "cell_std": 1 is the even spread over the sphere; 0.03 is a mean cosine above 0.999.
    collapse.MIN_FEATURE_STD = 0.03
    collapse.MIN_ACTIVE_SLOTS = 1.5  # prototypes that win a cell of a view
    collapse.MAX_DEAD_PROTOTYPES = 0.9  # a share of all prototypes
    collapse.MIN_POSITIVE_PAIRS = 0.1  # regions or slots of an image that are in both views
    collapse.MAX_WITHOUT_REGION = 0.5  # a share of the images
    collapse.MIN_CLUSTER_ENTROPY = 0.1  # 1: clusters of equal size, 0: one cluster has all cells


def _add_depth_config(cfg: CN) -> None:
    depth = cfg.MODEL.DEPTH = CN()  # used by MODEL.META_ARCHITECTURE "DepthEstimator" alone
    depth.IN_FEATURES = ["p2", "p3", "p4", "p5"]  # features of the backbone that are summed at the finest one's stride
    depth.CONVS_DIM = 128  # channels of the head
    depth.NORM = "GN"
    # Range of depths, metres: others are neither trained on nor scored, and predictions end at MAX.
    depth.MIN = 0.001
    depth.MAX = 10.0
    depth.SILOG_LAMBDA = 0.85  # lambda of the scale-invariant loss, in [0, 1]: 0: absolute, 1: relative depth alone
    depth.LOSS_WEIGHT = 10.0
