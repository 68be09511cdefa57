"""The colours of depth maps."""

import numpy as np

from d2_objssl.depth_drawing import draw_depth


def test_near_is_red_far_is_blue_and_what_was_not_measured_black():
    near, far, beyond, missing = draw_depth(np.array([[0.1, 10.0, 99.0, 0.0]]), 10.0)[0].astype(int)
    assert near[0] > 2 * near[2] and far[2] > 1.5 * far[0]
    assert far.tolist() == beyond.tolist() and missing.tolist() == [0, 0, 0]
