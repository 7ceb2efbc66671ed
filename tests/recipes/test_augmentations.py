"""Augmentations of whole batches, against torchvision's of one image at a time."""

import math

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from pemn_surgery.recipe import augmentations

IMAGES = torch.randint(
    0, 256, (24, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
MEAN = (0.5, 0.25, 1.0)


def one_by_one(function):
    return torch.stack([function(image) for image in IMAGES])


@pytest.mark.parametrize("level", [0, 12, 14, 30])
def test_operations_are_those_of_torchvisions_randaugment(level):
    oracle = v2.RandAugment(2, level)
    ours = augmentations.operations_at(level, 32, 32)
    assert list(ours) == list(oracle._AUGMENTATION_SPACE)
    for name, (levels, is_signed) in oracle._AUGMENTATION_SPACE.items():
        operation, magnitude, signed = ours[name]
        assert signed == is_signed
        found = levels(31, 32, 32)
        given = 0.0 if found is None else float(found[level])
        for sign in (1, -1) if is_signed else (1,):
            said = (name, sign * given, oracle.interpolation, oracle._fill)
            want = one_by_one(lambda image, said=said: apply(oracle, image, *said))
            assert torch.equal(operation(IMAGES, sign * magnitude), want), name


def apply(oracle, image, name, magnitude, interpolation, fill):
    return oracle._apply_image_or_video_transform(image, name, magnitude, interpolation, fill)


def test_every_image_draws_its_own_operations():
    torch.manual_seed(0)
    same = IMAGES[:1].expand(400, -1, -1, -1)
    changed = augmentations.rand_augment(same, operations=1, level=12)
    kinds = {picture.numpy().tobytes() for picture in changed}
    table = augmentations.operations_at(12, 32, 32).values()
    made = {
        operation(same[:1], sign * magnitude).numpy().tobytes()
        for operation, magnitude, is_signed in table
        for sign in ((1, -1) if is_signed else (1,))
    }
    assert len(made) > 20
    assert kinds == made  # 400 draws of 24 kinds leave none out, and make no other


def test_jitter_is_torchvisions_of_the_same_draws():
    torch.manual_seed(1)
    order = torch.rand(len(IMAGES), 3).argsort(1)
    factors = 0.6 + 0.8 * torch.rand(len(IMAGES), 3)
    found = augmentations.jittered(IMAGES, order, factors)
    functions = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    for image, numbers, amounts, got in zip(IMAGES, order, factors, found, strict=True):
        want = image
        for number in numbers.tolist():
            want = functions[number](want, float(amounts[number]))
        difference = (want.int() - got.int()).abs()
        assert difference.max() <= 1  # torch sums a product in one rounding or in two
        assert (difference > 0).float().mean() < 0.01
    assert len({tuple(row) for row in order.tolist()}) == 6


def test_erased_rectangles_are_those_that_torchvision_draws():
    torch.manual_seed(2)
    inside = augmentations.rectangles(4000, 32, 40)
    rows, columns = inside.any(2), inside.any(1)
    assert torch.equal(inside, rows[:, :, None] & columns[:, None, :])
    for edge in (rows, columns):  # one run of pixels each
        starts = edge[:, 1:] & ~edge[:, :-1]
        assert (starts.sum(1) + edge[:, 0] <= 1).all()
    shares = inside.float().mean((1, 2))
    assert shares[shares > 0].min() > 0.015
    assert shares.max() < 0.35
    oracle = v2.RandomErasing(1.0)
    drawn = [oracle.make_params([IMAGES.new_zeros(3, 32, 40)]) for _ in range(4000)]
    areas = [one["h"] * one["w"] / (32 * 40) for one in drawn if one["v"] is not None]
    assert shares.mean().item() == pytest.approx(sum(areas) / 4000, rel=0.05)
    heights, wide = rows.sum(1).float(), [one["h"] for one in drawn]
    assert heights.mean().item() == pytest.approx(sum(wide) / 4000, rel=0.05)


def test_erasing_writes_the_colour_into_a_share_of_the_images():
    torch.manual_seed(3)
    plain = torch.zeros(4000, 3, 8, 8, dtype=torch.uint8)
    found = augmentations.erase(plain, 0.25, [7, 8, 9])
    touched = found.flatten(1).any(1)
    assert touched.float().mean().item() == pytest.approx(0.25, abs=0.03)
    colours = found.permute(0, 2, 3, 1).reshape(-1, 3).unique(dim=0)
    assert colours.tolist() == [[0, 0, 0], [7, 8, 9]]


def test_flip_mirrors_half_of_the_images():
    torch.manual_seed(4)
    many = IMAGES.repeat(40, 1, 1, 1)
    found = augmentations.flip(many)
    mirrored = (found == many.flip(-1)).flatten(1).all(1)
    assert torch.equal(found[~mirrored], many[~mirrored])
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.06)


def test_a_large_image_is_cropped_by_an_eighth():
    torch.manual_seed(5)
    large = torch.randint(1, 256, (50, 3, 64, 64), dtype=torch.uint8)
    found = augmentations.resnet(large, MEAN)
    black = (found == 0).all(1)
    assert found.shape == large.shape
    assert max(int(black.all(2).sum(1).max()), int(black.all(1).sum(1).max())) in range(5, 9)


@pytest.mark.parametrize("name", sorted(augmentations.AUGMENTATIONS))
def test_no_images_are_no_images(name):
    empty = IMAGES[:0]
    assert augmentations.AUGMENTATIONS[name](empty, MEAN).shape == empty.shape


def test_convmixer_erases_with_the_mean_colour(monkeypatch):
    seen = []
    kept = augmentations.erase
    monkeypatch.setattr(augmentations, "erase", lambda *given: seen.append(given) or kept(*given))
    augmentations.convmixer(IMAGES, MEAN)
    ((_, share, colour),) = seen
    assert (share, colour) == (0.2, [128, 64, 255])
    assert all(math.isclose(c / 255, m, abs_tol=0.01) for c, m in zip(colour, MEAN, strict=True))
