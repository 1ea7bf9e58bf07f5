"""Shapes of a sweep: they fill tiles, lie apart, and a config takes them as they are."""

import itertools
import math
from pathlib import Path

import pytest

from lmjax.config import load
from lmjax.models.parameters import parameters
from lmjax.models.shapes import ASPECTS, HEAD_DIM, LANE, Shape, nearest_shape, shapes

QUICKSTART = str(Path(__file__).resolve().parents[2] / "configs" / "quickstart.py")


def test_shapes_fill_tpu_tiles_and_have_usual_proportions() -> None:
    found = shapes(1e7, 1e11)
    assert len(found) > 50
    for shape in found:
        assert shape.embed % LANE == 0 and shape.layers >= 2
        assert min(ASPECTS) * 0.75 <= shape.embed / max(shape.layers, 3) <= max(ASPECTS) * 1.25


def test_shapes_rise_and_lie_apart() -> None:
    sizes = [shape.params for shape in shapes(1e7, 1e11)]
    assert all(later > 1.049 * earlier for earlier, later in itertools.pairwise(sizes))
    assert all(1e7 <= size <= 1e11 for size in sizes)
    assert shapes(2.0, 1.0) == []


@pytest.mark.parametrize("params", [3e6, 1e8, 1.7e9, 4e10])
def test_the_nearest_shape_is_nearest_in_ratio(params: float) -> None:
    nearest = nearest_shape(params)
    for shape in shapes(1.0, math.inf):
        assert abs(math.log(nearest.params / params)) <= abs(math.log(shape.params / params))
    assert nearest_shape(nearest.params) == nearest


def test_beyond_all_shapes_the_nearest_is_the_last() -> None:
    assert nearest_shape(1e30) == shapes(1.0, math.inf)[-1]
    assert nearest_shape(1.0) == Shape(2, LANE)


@pytest.mark.parametrize("shape", [Shape(2, 128), Shape(12, 768), Shape(40, 5120)])
def test_a_config_of_a_shape_has_its_parameters(shape: Shape) -> None:
    settings = shape.settings(512)
    cfg = load(QUICKSTART, [f"{key}={value}" for key, value in settings.items()])
    assert parameters(cfg.model)["layers"] == shape.params == 12 * shape.layers * shape.embed**2
    assert cfg.model.dims["head_dim"] == HEAD_DIM
    assert cfg.model.context == cfg.data.seq_len == 512
