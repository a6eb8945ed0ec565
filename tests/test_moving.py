"""The films and mosaics that the caching, sparse-attention and patch notebooks draw."""

import torch

from workbook import moving
from workbook.models.mosaic import mosaics


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_items_move_evenly_and_turn_back_at_the_edges():
    corners = moving.paths(2000, seeded())
    room = moving.CANVAS - moving.ITEM
    assert corners.min() == 0
    assert corners.max() == room
    step = corners.diff(dim=1)
    assert step.abs().max() <= moving.FASTEST + 1  # a rounded place moves by at most one pixel more
    inside = ((corners > 3) & (corners < room - 3)).all(1)  # films that turn nowhere, an axis at a time
    bend = step.diff(dim=1).abs().amax(1)
    assert inside.any()
    assert bend[inside].max() <= 1, "a straight path bends by rounding alone"


def test_a_film_holds_its_item_in_every_frame():
    films, labels = moving.moving_fashion(20, seeded(1), split="test")
    assert films.shape == (20, 1, moving.FRAMES, moving.CANVAS, moving.CANVAS)
    ink = (films + 1).sum((-2, -1))[:, 0]
    torch.testing.assert_close(ink, ink[:, :1].expand_as(ink), rtol=1e-4, atol=1e-3)
    assert labels.shape == (20,)


def test_the_four_quarters_of_a_mosaic_are_different_items_of_its_class():
    items, labels = moving.small_items("test")
    pictures, asked = mosaics(10, seeded(2), split="test")
    quarters = pictures.unfold(2, 16, 16).unfold(3, 16, 16).reshape(10, 4, -1)
    exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}  # equal pictures are at distance 0, without rounding
    apart = torch.cdist(quarters.flatten(0, 1), items.flatten(1), **exact).min(1)
    assert apart.values.max() < 1e-3
    assert (labels[apart.indices].view(10, 4) == asked[:, None]).all()
    assert all(len(set(row.tolist())) == 4 for row in apart.indices.view(10, 4))
