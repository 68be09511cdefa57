"""Visual concepts: segments, their features and neighbours against plain loops, the use of prototypes, evaluate.py concepts."""

import json

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from color_model import COLORS, ColorModel, write_color_images, write_slotcon

from d2_objssl.concept_drawing import mark_red
from d2_objssl.data.center_crops import CenterCrops
from d2_objssl.evaluation.commands.concepts import check_prototypes
from d2_objssl.evaluation.concepts import ConceptSearch, TopSegments, assign_images, find_concepts, segment_features
from d2_objssl.structures import RegionEmbeddings


def random_embeddings(num_images: int, num_prototypes: int, seed: int = 0, cells: tuple[int, int] = (3, 4)):
    """Projections around prototypes of which the last one is far from all of them: (embeddings, prototypes)."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(num_prototypes, 5, generator=generator).abs()
    prototypes[-1] *= -1
    features = torch.randn(num_images, 5, *cells, generator=generator) + 1.5
    scores = torch.einsum("nchw,kc->nkhw", F.normalize(features, dim=1), F.normalize(prototypes, dim=1))
    active = F.one_hot(scores.argmax(dim=1), num_prototypes).amax(dim=(1, 2)).bool()
    z = torch.zeros(num_images, num_prototypes, 5)
    return RegionEmbeddings(z, active.long(), active, scores=scores, features=features), prototypes


def naive_segments(embeddings, prototypes, size):
    """For each prototype, (cosine, image) of its segments: features resized to pixels, then a loop over masks."""
    found = [[] for _ in prototypes]
    for n in range(len(embeddings.features)):
        pixels, scores = (
            F.interpolate(x[n][None], size=size, mode="bilinear", align_corners=False)[0]
            for x in (embeddings.features, embeddings.scores)
        )
        winners = scores.argmax(dim=0)
        for k in range(len(prototypes)):
            if (winners == k).any():
                mean = pixels[:, winners == k].mean(dim=1)
                found[k].append((float(F.cosine_similarity(mean, prototypes[k], dim=0)), n))
    return found


def test_segment_features_average_the_resized_features():
    features = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0))
    assignment = torch.randint(0, 3, (20, 31), generator=torch.Generator().manual_seed(1)) * 2
    pixels = F.interpolate(features[None], size=(20, 31), mode="bilinear", align_corners=False)[0]
    expected = torch.stack([pixels[:, assignment == k].mean(dim=1) for k in (0, 2, 4)])
    assert torch.allclose(segment_features(features, assignment, torch.tensor([0, 2, 4])), expected, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_top_segments_equal_a_plain_loop(batch_size):
    """In batches of any size; the last prototype wins nothing, and has no segment."""
    embeddings, prototypes = random_embeddings(7, 6)
    search = ConceptSearch(prototypes, k=3, size=(12, 16))
    for rows in torch.arange(7).split(batch_size):
        part = RegionEmbeddings(
            *(x[rows] for x in (embeddings.z, embeddings.ids, embeddings.valid, embeddings.scores, embeddings.features))
        )
        search.update(part, rows)
    naive = naive_segments(embeddings, prototypes, (12, 16))
    assert search.num_segments.tolist() == [len(x) for x in naive]
    assert max(len(x) for x in naive) > 3 and min(len(x) for x in naive) == 0
    for k, segments in enumerate(naive):
        best = sorted(segments, key=lambda x: -x[0])[:3]
        assert search.top.images[k].tolist() == [n for _, n in best] + [-1] * (3 - len(best))
        assert search.top.cosines[k, : len(best)].tolist() == pytest.approx([c for c, _ in best], abs=1e-5)


def test_of_equal_segments_the_earlier_image_wins():
    top = TopSegments(1, 2)
    for image, cosine in enumerate((0.5, 0.9, 0.5, 0.9, 0.9)):
        top.update(torch.tensor([[cosine]]), torch.tensor([image]))
    assert top.images.tolist() == [[1, 3]]


def test_statistics_by_hand():
    """Prototype 2 is dead. Images have 1, 2 and 2 active prototypes."""
    scores = torch.full((3, 4, 1, 2), -1.0)
    for image, cells in enumerate([(0, 0), (0, 1), (3, 0)]):
        for cell, k in enumerate(cells):
            scores[image, k, 0, cell] = 1
    active = scores.amax(dim=(2, 3)) > 0
    embeddings = RegionEmbeddings(torch.zeros(3, 4, 2), active.long(), active, scores, torch.ones(3, 2, 1, 2))
    search = ConceptSearch(torch.ones(4, 2), k=1, size=(4, 8))
    search.update(embeddings, torch.arange(3))
    assert search.active_histogram.tolist() == [0, 1, 2, 0, 0] and search.num_active.tolist() == [3, 1, 0, 1]
    assert search.statistics() == {
        "active_slots": pytest.approx(5 / 3),
        "dead_prototypes": 1,
        "images_per_prototype/min": 1,
        "images_per_prototype/median": 1,
        "images_per_prototype/max": 3,
    }


def test_object_centric_images_are_one_segment():
    embeddings, prototypes = random_embeddings(9, 4)
    search = ConceptSearch(prototypes, k=9, size=(12, 16), object_centric=True)
    search.update(embeddings, torch.arange(9))
    means = F.normalize(embeddings.features.mean(dim=(2, 3)), dim=1)
    cosines = means @ F.normalize(prototypes, dim=1).T
    for k in range(4):
        mine = (cosines.argmax(dim=1) == k).nonzero()[:, 0]
        ranked = mine[cosines[mine, k].argsort(descending=True)]
        assert search.top.images[k].tolist() == ranked.tolist() + [-1] * (9 - len(ranked))
    assert search.num_segments.sum() == 9


def test_colors_are_the_concepts(tmp_path):
    """Every retrieved segment has the prototype's colour, and its mask is the ground truth."""
    dataset = CenterCrops(
        write_color_images(tmp_path), short_side=48, crop_size=48, class_of_label={i: i for i in range(4)}
    )
    model = ColorModel(COLORS)
    search = find_concepts(model, dataset, k=5, batch_size=2)
    segmented = assign_images(model, dataset, list(range(5)), batch_size=2)
    for n, (image, assignment) in segmented.items():
        assert np.array_equal(assignment, dataset[n]["classes"].numpy())
        assert np.array_equal(mark_red(image, assignment >= 0)[24, 24], np.rint(image[24, 24] * 0.55 + [114.75, 0, 0]))
    for k in range(3):
        images = [n for n in search.top.images[k].tolist() if n >= 0]
        assert sorted(images) == [n for n, (_, assignment) in segmented.items() if (assignment == k).any()]
    assert search.num_segments[3] == 0


def test_concepts_of_a_checkpoint(load_tool, tmp_path, capsys):
    """A folder of images without labels: record, pages of concepts, the picture of the statistics."""
    tool = load_tool("evaluate")
    photos = tmp_path / "photos"
    photos.mkdir()
    for d in write_color_images(photos, num_images=6):
        (photos / d["sem_seg_file_name"]).unlink()
    weights = write_slotcon(tmp_path / "model.pth", num_prototypes=8)
    files = [
        f"--{x}={tmp_path / y}"
        for x, y in (("output", "r.json"), ("picture", "c.png"), ("statistics-picture", "s.png"))
    ]
    options = ["--short-side", "64", "--crop-size", "64", "--top", "3", "--rows", "4", "--picture-side", "64", *files]
    tool.main(["concepts", "--dataset", f"images:{photos}", "--weights", weights, *options])
    record = json.loads((tmp_path / "r.json").read_text())
    assert sum(record["active_slots_histogram"]) == record["num_images"] == 6
    assert len(record["images_per_prototype"]) == 8
    assert record["metrics"]["dead_prototypes"] == record["images_per_prototype"].count(0)
    assert record["concepts"][0]["top"][0]["image"].startswith("photos/")
    pages = sorted(p.name for p in tmp_path.glob("c*.png"))
    assert pages == ["c.png", *(f"c_{i}.png" for i in range(2, (len(record["concepts"]) + 3) // 4 + 1))]
    width = cv2.imread(str(tmp_path / "c.png")).shape[1]
    assert width == 14 + 3 * 64 + 2 * 10 + 14 and cv2.imread(str(tmp_path / "s.png")) is not None
    assert "8 prototypes, 6 images" in capsys.readouterr().out


def test_a_prototype_that_is_not_there_is_refused():
    assert check_prototypes([7, 0], 8) == [7, 0] and check_prototypes(None, 8) is None
    with pytest.raises(ValueError, match="--prototypes names 8, but the model has the prototypes 0 to 7"):
        check_prototypes([3, 8], 8)
