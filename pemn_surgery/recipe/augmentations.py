"""The papers' augmentations of whole batches at once, on the device where the images are.

Images are uint8 ``[n, 3, h, w]`` here, before and after; ``mean`` is that of each channel, in 0..1.
Every image has draws of its own. They come from torch's global generator on the CPU, so that one
seed gives the same images on every device. Images that drew the same operation go through
torchvision's function for it together, so that an epoch takes some hundred calls, not some hundred
thousand.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

Operation = Callable[[Tensor, float], Tensor]

_BINS = 31  # levels of magnitude that RandAugment knows
_ERASED = (0.02, 0.33)  # share of the image
_ASPECTS = (0.3, 3.3)
_TRIES = 10  # rectangles drawn until one fits


def convmixer(images: Tensor, mean: Sequence[float]) -> Tensor:
    """Flip, RandAugment(2, 12), ColorJitter(.2, .2, .2), RandomErasing(.2): PEMN's for ConvMixer.

    The paper's RandomResizedCrop(32, scale=(1, 1)) is the identity on 32 x 32 images and left out.
    Erasing writes the mean colour, which is the zero of the normalised image.
    """
    images = rand_augment(flip(images), operations=2, level=12)
    return erase(jitter(images, 0.2), 0.2, [round(255 * one) for one in mean])


def resnet(images: Tensor, mean: Sequence[float]) -> Tensor:
    """Crop out of the image padded by an eighth of its side, and flip: He et al., 2016."""
    return crop_and_flip(images, images.shape[-1] // 8)


def vit(images: Tensor, mean: Sequence[float]) -> Tensor:
    """RandAugment(2, 14), then `resnet`'s crop and flip."""
    return crop_and_flip(rand_augment(images, operations=2, level=14), images.shape[-1] // 8)


def none(images: Tensor, mean: Sequence[float]) -> Tensor:
    """Return the images as they are."""
    return images


def flip(images: Tensor) -> Tensor:
    """Mirror half of the images, left to right."""
    return _where(torch.rand(len(images)) < 0.5, images.flip(-1), images)


def crop_and_flip(images: Tensor, pad: int = 4) -> Tensor:
    """Crop at random out of the image with ``pad`` black pixels on each side, flip half of them."""
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (pad,) * 4)
    top, left = torch.randint(2 * pad + 1, (2, n, 1))
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    columns = torch.where(torch.rand(n, 1) < 0.5, columns.flip(1), columns)
    place = torch.arange(n).view(n, 1, 1), rows[:, :, None], columns[:, None, :]
    picked = padded.permute(0, 2, 3, 1)[tuple(one.to(images.device) for one in place)]
    return picked.permute(0, 3, 1, 2).contiguous()


def rand_augment(images: Tensor, operations: int, level: int) -> Tensor:
    """Apply so many operations of a level (0 to 30), drawn for each image (Cubuk et al., 2020)."""
    table = operations_at(level, *images.shape[-2:]).values()
    signed = torch.tensor([is_signed for _, _, is_signed in table])
    for _ in range(operations):
        which = torch.randint(len(table), (len(images),))
        negative = (torch.rand(len(images)) <= 0.5) & signed[which]
        changed = images.clone()
        for number, (operation, magnitude, _) in enumerate(table):
            for sign in (1, -1):
                drawn = (which == number) & (negative == (sign < 0))
                rows = drawn.nonzero()[:, 0].to(images.device)
                if len(rows):
                    changed[rows] = operation(images[rows], sign * magnitude)
        images = changed
    return images


def operations_at(level: int, height: int, width: int) -> dict[str, tuple[Operation, float, bool]]:
    """Return RandAugment's operations: function, magnitude, whether its sign is drawn."""

    def at(largest: float, least: float = 0.0) -> float:
        return torch.linspace(least, largest, _BINS)[level].item()

    bits = round(8 - level / ((_BINS - 1) / 4))
    return {
        "Identity": (lambda x, _: x, 0.0, False),
        "ShearX": (lambda x, m: _sheared(x, [math.degrees(math.atan(m)), 0.0]), at(0.3), True),
        "ShearY": (lambda x, m: _sheared(x, [0.0, math.degrees(math.atan(m))]), at(0.3), True),
        "TranslateX": (lambda x, m: _moved(x, [int(m), 0]), at(150 / 331 * width), True),
        "TranslateY": (lambda x, m: _moved(x, [0, int(m)]), at(150 / 331 * height), True),
        "Rotate": (F.rotate, at(30.0), True),
        "Brightness": (lambda x, m: F.adjust_brightness(x, 1.0 + m), at(0.9), True),
        "Color": (lambda x, m: F.adjust_saturation(x, 1.0 + m), at(0.9), True),
        "Contrast": (lambda x, m: F.adjust_contrast(x, 1.0 + m), at(0.9), True),
        "Sharpness": (lambda x, m: F.adjust_sharpness(x, 1.0 + m), at(0.9), True),
        "Posterize": (lambda x, m: F.posterize(x, int(m)), bits, False),
        "Solarize": (lambda x, m: F.solarize(x, 255 * m), at(0.0, 1.0), False),
        "AutoContrast": (lambda x, _: F.autocontrast(x), 0.0, False),
        "Equalize": (lambda x, _: F.equalize(x), 0.0, False),
    }


def _sheared(images: Tensor, shear: list[float]) -> Tensor:
    return F.affine(images, angle=0.0, translate=[0, 0], scale=1.0, shear=shear, center=[0, 0])


def _moved(images: Tensor, by: list[float]) -> Tensor:
    return F.affine(images, angle=0.0, translate=by, scale=1.0, shear=[0.0, 0.0])


def jitter(images: Tensor, strength: float) -> Tensor:
    """Change brightness, contrast and saturation in any order, by 1 - strength to 1 + strength."""
    order = torch.rand(len(images), 3).argsort(1)
    factors = 1 + strength * (2 * torch.rand(len(images), 3) - 1)
    return jittered(images, order, factors)


def jittered(images: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Return torchvision's ColorJitter of these draws.

    ``order`` has 0 (brightness), 1 (contrast), 2 (saturation) for each image in their order,
    ``factors``, float32 ``[n, 3]``, theirs by these numbers.
    """
    for position in order.unbind(1):
        changed = images.clone()
        for number, beside in enumerate((_black, _mean_grey, _grey)):
            rows = (position == number).nonzero()[:, 0]
            if len(rows):
                factor = factors[rows, number].view(-1, 1, 1, 1).to(images.device)
                there = rows.to(images.device)
                changed[there] = _blended(images[there], beside(images[there]), factor)
        images = changed
    return images


def _blended(images: Tensor, others: Tensor, factor: Tensor) -> Tensor:
    return (images * factor + others * (1 - factor)).clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.float().split(1, dim=1)
    return (red * 0.2989 + green * 0.587 + blue * 0.114).floor_()


def _mean_grey(images: Tensor) -> Tensor:
    return _grey(images).mean((1, 2, 3), keepdim=True)


def _black(images: Tensor) -> Tensor:
    return images.new_zeros((), dtype=torch.float32)


def erase(images: Tensor, share: float, colour: Sequence[int]) -> Tensor:
    """Fill a rectangle of a share of the images with the channels' ``colour``: RandomErasing.

    As torchvision's (Zhong et al., 2020).
    """
    n, _, height, width = images.shape
    inside = rectangles(n, height, width) & (torch.rand(n) < share)[:, None, None]
    filled = torch.tensor(colour, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
    return torch.where(inside[:, None].to(images.device), filled, images)


def rectangles(n: int, height: int, width: int) -> Tensor:
    """Return where a rectangle of each image lies, bool ``[n, height, width]``.

    Area and logarithm of the aspect are uniform; of some draws the first that fits counts, none if
    none does.
    """
    area = height * width * torch.empty(n, _TRIES).uniform_(*_ERASED)
    aspect = torch.empty(n, _TRIES).uniform_(*map(math.log, _ASPECTS)).exp()
    high, wide = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (high < height) & (wide < width)
    first = fits.int().argmax(1, keepdim=True)
    sides = [torch.where(fits.any(1), side.gather(1, first)[:, 0], 0) for side in (high, wide)]
    rows, columns = (_interval(s, n) for s, n in zip(sides, (height, width), strict=True))
    return rows[:, :, None] & columns[:, None, :]


def _interval(sides: Tensor, length: int) -> Tensor:
    """Where an interval of each of these sides lies in a length, bool ``[n, length]``."""
    start = (torch.rand(len(sides)) * (length - sides + 1)).floor()[:, None]
    places = torch.arange(length)
    return (places >= start) & (places < start + sides[:, None])


def _where(chosen: Tensor, images: Tensor, others: Tensor) -> Tensor:
    return torch.where(chosen.view(-1, 1, 1, 1).to(images.device), images, others)


AUGMENTATIONS: dict[str, Callable[[Tensor, Sequence[float]], Tensor]] = {
    function.__name__: function for function in (convmixer, resnet, vit, none)
}
