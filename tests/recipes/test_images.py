"""Images as tensors and the networks for them, against slow oracles."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe import images as pictures
from pemn_surgery.recipe import load, networks, sources
from pemn_surgery.recipe.augmentations import crop_and_flip
from pemn_surgery.recipe.options import ImageOptions

RECIPE = load(Path(__file__).resolve().parents[2] / "recipes" / "pemn")
DATA = RECIPE.images("resnet32")
TRAIN, TEST = 40, 12


@pytest.mark.parametrize(
    ("case", "masked", "norms"),
    [
        # stem 3*256*4, six of 256*25 + 256*256, head 2560; 13 norms of 2*256
        ("convmixer_d6_h256", 3072 + 6 * (6400 + 65536) + 2560, 13 * 512),
        # stem 432, 10 of 16*16*9, 16*32*9 + 9 of 32*32*9, 32*64*9 + 9 of 64*64*9, head 640
        ("resnet32", 432 + 23040 + 4608 + 82944 + 18432 + 331776 + 640, 2 * (11 * 16 + 960)),
    ],
)
def test_parameter_counts(case, masked, norms):
    model = RECIPE.network(case)
    sizes = {True: 0, False: 0}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            sizes[isinstance(module, nn.BatchNorm2d)] += p.numel()
            assert isinstance(module, nn.BatchNorm2d) or name == "weight"
    assert sizes == {False: masked, True: norms}
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_option_a_shortcut_subsamples_and_pads_with_zeros():
    block = networks.BasicBlock(16, 32).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 16, 8, 8)
    y = block(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


@pytest.mark.parametrize("depth", [2, 31, 33])
def test_resnet_refuses_other_depths(depth):
    with pytest.raises(ValueError, match=rf"depth={depth} is not 6n \+ 2"):
        networks.resnet(depth)


def test_papers_resized_crop_is_the_identity_on_32x32():
    x = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    crop = v2.RandomResizedCrop(32, scale=(1, 1), ratio=(1, 1))
    assert all(torch.equal(crop(x), x) for _ in range(20))


def test_crop_and_flip_gives_crops_and_flips():
    torch.manual_seed(0)
    x = torch.randint(0, 256, (30, 3, 6, 5), dtype=torch.uint8)
    y = crop_and_flip(x, pad=2)
    padded = nn.functional.pad(x, (2, 2, 2, 2))
    places, flips = set(), 0
    for i in range(30):
        crops = {(r, c): padded[i, :, r : r + 6, c : c + 5] for r in range(5) for c in range(5)}
        plain = [at for at, crop in crops.items() if torch.equal(crop, y[i])]
        flipped = [at for at, crop in crops.items() if torch.equal(crop.flip(2), y[i])]
        assert len(plain) + len(flipped) == 1
        places |= {*plain, *flipped}
        flips += len(flipped)
    assert 5 < flips < 25
    assert {r for r, _ in places} == {c for _, c in places} == set(range(5))


def test_augmentations_keep_shape_type_and_follow_the_seed():
    x = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    drawn = []
    for name in ("convmixer", "resnet", "vit"):
        for _ in range(2):
            torch.manual_seed(5)
            drawn.append(torch.cat(list(DATA.augment(name, x))))
    assert all(y.shape == x.shape and y.dtype == torch.uint8 for y in drawn)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[2], drawn[3])
    assert torch.equal(drawn[4], drawn[5])
    assert not torch.equal(drawn[0], x)
    assert torch.equal(next(DATA.augment("none", x)), x)
    with pytest.raises(RecipeError, match="'other' is unknown"):
        next(DATA.augment("other", x))


def test_decoding_keeps_pixels_labels_and_order(images, tmp_path):
    decoded = DATA.load(ImageOptions(case="", work=tmp_path, data=str(images)))
    for split, n in (("train", TRAIN), ("test", TEST)):
        found, labels = decoded[split]
        pixels = np.random.default_rng(n).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        assert torch.equal(found, torch.from_numpy(pixels).permute(0, 3, 1, 2))
        assert labels.tolist() == [i % 10 for i in range(n)]
        cut = getattr(DATA.task(decoded).cut(7), split)
        assert torch.equal(cut[0], found[:7])
        assert torch.equal(cut[1], labels[:7])


def test_decoding_names_missing_columns(images, tmp_path):
    with pytest.raises(RecipeError, match=r"lacks the columns \['image'\]; it has"):
        pictures.decode(dataclasses.replace(DATA, image="image"), str(images), tmp_path)


def test_normalise_is_torchvisions():
    x = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    oracle = v2.functional.normalize(x / 255, list(DATA.mean), list(DATA.std))
    torch.testing.assert_close(DATA.normalise(x), oracle)


def test_parquet_is_read_alike_without_datasets(images, tmp_path, monkeypatch):
    whole = pictures.decode(DATA, str(images), tmp_path)
    spec = sources.importlib.util.find_spec
    monkeypatch.setattr(
        sources.importlib.util,
        "find_spec",
        lambda name: None if name == "datasets" else spec(name),
    )
    alone = pictures.decode(DATA, str(images), tmp_path)
    for split in ("train", "test"):
        for one, other in zip(whole[split], alone[split], strict=True):
            assert torch.equal(one, other)
    with pytest.raises(RecipeError, match=r"has no valid-\*\.parquet"):
        pictures.decode(dataclasses.replace(DATA, test="valid"), str(images), tmp_path)
    with pytest.raises(RecipeError, match=r"lacks the columns \['other'\]"):
        pictures.decode(dataclasses.replace(DATA, label="other"), str(images), tmp_path)


def test_pictures_of_other_sizes_are_cut_to_a_square(images, tmp_path):
    small = pictures.decode(dataclasses.replace(DATA, side=16), str(images), tmp_path)
    large = pictures.decode(DATA, str(images), tmp_path)
    assert small["train"][0].shape == (TRAIN, 3, 16, 16)
    means = [split["train"][0].float().mean() for split in (small, large)]
    assert abs(means[0] - means[1]) < 1
    assert torch.equal(small["test"][1], large["test"][1])


def test_missing_splits_are_named(images, tmp_path):
    with pytest.raises(RecipeError, match=r"has the splits \['test', 'train'\]; \['valid'\]"):
        pictures.decode(dataclasses.replace(DATA, test="valid"), str(images), tmp_path)


def test_a_trials_images_are_random_and_the_same_again(tmp_path):
    given = ImageOptions(case="", work=tmp_path, smoke=True)
    first, again = DATA.load(given), DATA.load(given)
    assert [len(split[1]) for split in first.values()] == [96, 64]
    assert torch.equal(first["train"][0], again["train"][0])
    assert first["train"][1].bincount().tolist() == [48, 48]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("width", "depth"), [(256, 6), (512, 8)])
def test_the_vision_transformer_is_the_one_that_is_described(width, depth):
    model = networks.vit(width, depth, classes=10)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    block = width * 3 * width + width * width + 2 * width * 512
    masked = 3 * 16 * width + depth * block + 10 * width
    matrices = [p for p in model.parameters() if p.dim() == 2]
    stem = model.patch_embed.proj.weight.numel()
    assert sum(p.numel() for p in matrices) + stem == masked
    assert len(model.blocks) == depth


def test_data_without_a_source_asks_for_one(tmp_path):
    with pytest.raises(RecipeError, match="200' has no source of its own; give --data"):
        RECIPE.images("resnet50_imagenet200").load(
            ImageOptions(case="resnet50_imagenet200", work=tmp_path)
        )
