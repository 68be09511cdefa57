"""fast_felzenszwalb.py: the regions of scikit-image, on generated pictures and on photographs."""

import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
from skimage.segmentation import felzenszwalb as reference

from d2_objssl.data.image_reading import read_rgb_image

fast = pytest.importorskip("d2_objssl.fast_felzenszwalb", reason="needs numba")


def textured_image(height: int, width: int, seed: int) -> np.ndarray:
    """Blobs of all sizes and noise, (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3))
    for size in (3, 8, 20):
        coarse = rng.normal(0, 40, (size, size, 3))
        image += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return (image + rng.normal(128, 4, image.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", [(90, 120), (61, 40), (1, 30), (30, 1), (1, 1), (2, 2)])
@pytest.mark.parametrize(("scale", "min_size"), [(100, 20), (1000, 200), (3, 0)])
def test_regions_are_those_of_scikit_image(shape, scale, min_size):
    image = textured_image(*shape, seed=sum(shape))
    ours = fast.felzenszwalb(image, scale=scale, sigma=0.8, min_size=min_size)
    expected = reference(image, scale=scale, sigma=0.8, min_size=min_size)
    assert ours.dtype == np.int32
    np.testing.assert_array_equal(ours, expected)


def test_equal_weights_do_not_depend_on_sorting():
    """Flat areas with sharp borders: most weights are 0, a few values repeat."""
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 30:] = 200
    image[10:20, 10:20] = 90
    ours = fast.felzenszwalb(image, scale=50, sigma=0.8, min_size=10)
    np.testing.assert_array_equal(ours, reference(image, scale=50, sigma=0.8, min_size=10))


def test_weights_are_sorted_stably():
    keys = np.random.default_rng(0).integers(0, 50, 2000, dtype=np.uint32) * np.uint32(0x04030201)
    ours = fast._sort(keys.copy(), np.arange(len(keys), dtype=np.int32))
    order = np.argsort(keys, kind="stable")
    np.testing.assert_array_equal(ours[0], keys[order])
    np.testing.assert_array_equal(ours[1], order)


def test_photographs(test_data):
    """A different order of equal weights may change single images; of these four it changes none."""
    for path in sorted((test_data / "coco128" / "train2017").glob("*.jpg"))[:4]:
        image = read_rgb_image(str(path))
        ours = fast.felzenszwalb(image, scale=1000, sigma=0.8, min_size=1000)
        np.testing.assert_array_equal(ours, reference(image, scale=1000, sigma=0.8, min_size=1000))


def test_compiles_where_nothing_can_be_cached():
    """As in a container whose packages and home are read-only: of numba's places for a cache only an unset one is left."""
    places = "numba.core.caching.UserProvidedCacheLocator"
    environment = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": places, "NUMBA_CACHE_DIR": ""}
    command = "import numpy, d2_objssl.fast_felzenszwalb as f;"
    command += "print(f.felzenszwalb(numpy.zeros((3, 4, 3), 'uint8'), 1, 0.8, 0).max())"
    done = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=240, cwd=os.getcwd()
    )
    assert done.returncode == 0 and done.stdout == "0\n", done.stderr
