"""Proposals in MCG's .mat files and in COCO's results format become bit sets of the best ones."""

import json
import logging
import pickle

import numpy as np
import pytest
from detectron2.data import Metadata
from pycocotools import mask as coco_mask
from scipy.io import savemat

from d2_objssl.data.proposal_import import CocoRleProposals, McgProposals

IMAGE = np.zeros((4, 6, 3), dtype=np.uint8)
PHOTO = {"file_name": "photos/000000000009.jpg", "image_id": 0}
WITH_IDS, WITHOUT_IDS = Metadata(json_file="instances.json"), Metadata(image_root="photos")


def bits_of(masks):
    """Bit r of a pixel: whether mask r covers it; by loops."""
    bits = np.zeros(masks[0].shape, dtype=np.int32)
    for r, mask in enumerate(masks):
        for y, x in zip(*np.nonzero(mask), strict=True):
            bits[y, x] += 2**r
    return bits


# ----------------------------------------------------------------------------------------------------------- MCG


SUPERPIXELS = np.array([[1, 1, 2, 2, 3, 3]] * 2 + [[4, 4, 4, 5, 5, 5]] * 2, dtype=np.uint16)
PROPOSALS = [[1], [2, 3], [1, 2, 4], [5]]
SCORES = np.array([[0.5], [0.75], [-0.25], [0.625]])


def save_mcg(file, **changes):
    """A .mat file as MCG writes it: labels are a column of cells, each a row of numbers from 1 on."""
    cells = np.empty((len(PROPOSALS), 1), dtype=object)
    for i, proposal in enumerate(PROPOSALS):
        cells[i, 0] = np.array([proposal], dtype=np.float64)
    boxes = np.ones((len(PROPOSALS), 4))
    content = {"superpixels": SUPERPIXELS, "labels": cells, "scores": SCORES, "bboxes": boxes} | changes
    savemat(file, {k: v for k, v in content.items() if v is not None})


def test_mcg_keeps_the_best_proposals_by_score(tmp_path):
    save_mcg(tmp_path / "000000000009.mat")
    masks = [np.isin(SUPERPIXELS, proposal) for proposal in PROPOSALS]
    source = McgProposals(tmp_path)
    source.check([PHOTO])
    bits = source(IMAGE, PHOTO)
    assert source.overlapping and bits.dtype == np.int32
    np.testing.assert_array_equal(bits, bits_of([masks[i] for i in (1, 3, 0, 2)]))
    np.testing.assert_array_equal(McgProposals(tmp_path, 2)(IMAGE, PHOTO), bits_of([masks[1], masks[3]]))


def test_mcg_finds_the_names_of_coco_2014(tmp_path):
    save_mcg(tmp_path / "COCO_val2014_000000000009.mat")
    source = McgProposals(tmp_path)
    source.check([PHOTO])
    assert source(IMAGE, PHOTO).any()


def test_mcg_names_the_images_without_a_file(tmp_path):
    save_mcg(tmp_path / "000000000009.mat")
    others = [{"file_name": f"photos/{i}.jpg"} for i in range(7)]
    with pytest.raises(ValueError, match=r"no \.mat file for 7 image.*photos/4\.jpg, \.\.\.$"):
        McgProposals(tmp_path).check([PHOTO, *others])


def test_an_image_without_proposals_has_no_region(tmp_path):
    save_mcg(tmp_path / "000000000009.mat", labels=np.empty((0, 1), dtype=object), scores=np.empty((0, 1)))
    assert not McgProposals(tmp_path)(IMAGE, PHOTO).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"superpixels": None, "labels": None}, "lacks superpixels and labels"),
        ({"superpixels": SUPERPIXELS.T}, r"6 x 4 .* 4 x 6"),
        ({"scores": SCORES[:3]}, "each of the 3 scores"),
        ({"labels": np.ones((4, 1))}, "cell array"),
        ({"scores": np.array([[0.5], [np.nan], [1], [np.inf]])}, "2 of the 4 scores are NaN"),
    ],
)
def test_mcg_files_that_do_not_fit_are_refused_by_name(tmp_path, changes, message):
    save_mcg(tmp_path / "000000000009.mat", **changes)
    with pytest.raises(ValueError, match=rf"000000000009\.mat.*{message}"):
        McgProposals(tmp_path)(IMAGE, PHOTO)


# The text and the version by which a MATLAB 7.3 file, which is HDF5, is known.
HDF5 = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(400)


@pytest.mark.parametrize(("content", "message"), [(HDF5, r"7\.3.*-v7"), (b"x" * 300, "cannot read"), (b"", "cannot")])
def test_mat_files_of_other_kinds_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "000000000009.mat").write_bytes(content)
    with pytest.raises(ValueError, match=rf"000000000009\.mat.*{message}"):
        McgProposals(tmp_path)(IMAGE, PHOTO)


@pytest.mark.parametrize("num_proposals", [0, 17])
def test_the_number_of_proposals_must_fit_into_a_bit_set(tmp_path, num_proposals):
    with pytest.raises(ValueError, match=f"{num_proposals}.*from 1 to 16"):
        McgProposals(tmp_path, num_proposals)
    with pytest.raises(ValueError, match=f"{num_proposals}.*from 1 to 16"):
        CocoRleProposals([], num_proposals)


# ------------------------------------------------------------------------------------------------------ COCO RLE


def encode(mask, *, as_list=False):
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    counts = rle["counts"].decode()
    if as_list:
        flat = np.concatenate([[False], mask.T.ravel(), [not mask[-1, -1]]])
        counts = np.diff(np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1])])).tolist()
    return {"size": list(mask.shape), "counts": counts}


def random_masks(num, seed=0, shape=(4, 6)):
    rng = np.random.default_rng(seed)
    return [rng.random(shape) < 0.4 for _ in range(num)]


def make_results(masks, scores, image_id=9, **kwargs):
    return [
        {"image_id": image_id, "category_id": 1, "segmentation": encode(m, **kwargs), "score": s}
        for m, s in zip(masks, scores, strict=True)
    ]


def write_json(file, content):
    file.write_text(json.dumps(content))
    return file


def prepare(source, dicts=(PHOTO,), metadata=WITHOUT_IDS):
    prepared = source.prepare(dicts, metadata)
    source.check(prepared)
    return prepared


def test_coco_results_keep_the_best_by_score_from_several_files(tmp_path):
    masks, scores = random_masks(20), np.random.default_rng(1).permutation(20).tolist()
    scores[3] = scores[7] = 50.0  # equal: the first one first
    files = [
        write_json(tmp_path / "a.json", make_results(masks[:12], scores[:12])),
        write_json(tmp_path / "b.json", make_results(masks[12:], scores[12:], as_list=True)),
    ]
    order = sorted(range(20), key=lambda i: (-scores[i], i))
    for num in (16, 5):
        source = CocoRleProposals(files, num)
        bits = source(IMAGE, prepare(source)[0])
        np.testing.assert_array_equal(bits, bits_of([masks[i] for i in order[:num]]))


def test_large_segments_are_decoded_as_pycocotools_does(tmp_path):
    masks = [np.kron(m, np.ones((31, 17), dtype=bool)) for m in random_masks(5, shape=(7, 9))]
    masks += [*random_masks(2, shape=(217, 153)), np.zeros((217, 153), bool), np.ones((217, 153), bool)]
    results = make_results(masks, range(9, 0, -1))
    source = CocoRleProposals([write_json(tmp_path / "a.json", results)])
    bits = source(np.zeros((217, 153, 3), dtype=np.uint8), prepare(source)[0])
    for r, result in enumerate(results):
        np.testing.assert_array_equal(bits >> r & 1, coco_mask.decode(result["segmentation"]))


def test_ids_are_those_of_the_annotations_or_else_the_numbers_of_the_files(tmp_path):
    masks = random_masks(2)
    file = write_json(tmp_path / "a.json", make_results(masks[:1], [1], 9) + make_results(masks[1:], [1], 3))
    other = {"file_name": "photos/000000000003.jpg", "image_id": 9}
    for metadata, expected in ((WITHOUT_IDS, masks[1]), (WITH_IDS, masks[0])):
        source = CocoRleProposals([file])
        np.testing.assert_array_equal(source(IMAGE, source.prepare([other], metadata)[0]), expected)
    named = CocoRleProposals([write_json(tmp_path / "b.json", make_results(masks[:1], [1], "street"))])
    assert named.prepare([{"file_name": "photos/street.png", "image_id": 0}], WITHOUT_IDS)[0]["proposals"]


def test_ids_that_do_not_match_the_data_set_are_refused(tmp_path, caplog):
    known, unknown = make_results(random_masks(1), [1]), make_results(random_masks(1), [1], 10)
    lonely = {"file_name": "photos/8.jpg"}
    with pytest.raises(ValueError, match=r"a\.json.*1 have no image \(10\).*1 image\(s\) have no proposal.*8\.jpg"):
        prepare(CocoRleProposals([write_json(tmp_path / "a.json", known + unknown)]), [PHOTO, lonely])
    prepare(CocoRleProposals([tmp_path / "a.json"]))  # more images than the data set has
    source = CocoRleProposals([write_json(tmp_path / "b.json", known)])
    with caplog.at_level(logging.WARNING, "d2_objssl"):
        prepared = prepare(source, [PHOTO, lonely])
    assert "1 image(s) have no proposal: photos/8.jpg" in caplog.text
    assert not source(IMAGE, prepared[1]).any()


def test_a_copy_for_another_process_carries_no_proposals(tmp_path):
    source = CocoRleProposals([write_json(tmp_path / "a.json", make_results(random_masks(8), range(8)))])
    prepared = prepare(source)[0]
    copy = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 500
    np.testing.assert_array_equal(copy(IMAGE, prepared), source(IMAGE, prepared))


GOOD = make_results(random_masks(1), [0.5])[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": []}, "holds a dict"),
        ([5], "result 0 is a int"),
        ([GOOD, {"image_id": 9, "score": 1}], "result 1 lacks segmentation"),
        ([GOOD | {"image_id": None}], "image_id is None"),
        ([GOOD | {"score": float("nan")}], r"image 9.*score is nan"),
        ([GOOD | {"score": "high"}], "score is high"),
        ([GOOD | {"segmentation": [[0, 0, 2, 0, 2, 2]]}], "no run-length encoding"),
        ([GOOD | {"segmentation": {"size": 24, "counts": "1"}}], "size of the segmentation is 24"),
    ],
)
def test_results_that_are_none_are_refused_by_name(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"a\.json.*{message}"):
        CocoRleProposals([write_json(tmp_path / "a.json", content)])


def test_a_damaged_json_file_is_refused_by_name(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"image_id": 9, "sc\xff')
    with pytest.raises(ValueError, match=r"a\.json.*cannot read"):
        CocoRleProposals([tmp_path / "a.json"])


@pytest.mark.parametrize(
    ("size", "counts", "message"),
    [
        ([6, 4], "0h0", r"6 x 4 .* 4 x 6"),
        ([4, 6], [3, 2], "of 5 pixels.*4 x 6"),  # pycocotools fills the rest with whatever is in memory
        ([4, 6], [3, 210], "of 213 pixels"),
        ([4, 6], [30, -6], "are not those"),
        ([4, 6], "", "of 0 pixels"),
        ([4, 6], "zzzzzzzzzzzzzzzzzzzzzzzzz", "runs"),
        ([4, 6], "€", "cannot read its runs"),
        ([4, 6], [[1, 2], [3]], "cannot read its runs"),
        ([4, 6], None, "runs"),
    ],
)
def test_runs_that_do_not_fit_the_image_are_refused(tmp_path, size, counts, message):
    result = GOOD | {"segmentation": {"size": size, "counts": counts}}
    source = CocoRleProposals([write_json(tmp_path / "a.json", [result])])
    with pytest.raises(ValueError, match=rf"a\.json.*000000000009\.jpg.*({message})"):
        source(IMAGE, prepare(source)[0])
