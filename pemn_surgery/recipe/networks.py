"""Networks for images of 32 x 32, as the PEMN paper masks them: no bias outside norms.

Shapes: images ``[n, 3, 32, 32]`` -> logits ``[n, classes]``.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from pemn_surgery.recipe.depthwise import DepthwiseConv2d


class Residual(nn.Module):
    """``inner(x) + x``."""

    def __init__(self, inner: nn.Module) -> None:
        """Wrap ``inner``, which must keep the shape of its input."""
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """``[n, c, h, w] -> [n, c, h, w]``."""
        return self.inner(x) + x


def _activated(conv: nn.Conv2d) -> list[nn.Module]:
    """Conv, GELU, BatchNorm: ConvMixer's order (the norm comes after the activation)."""
    return [conv, nn.GELU(), nn.BatchNorm2d(conv.out_channels)]


def convmixer(
    width: int, depth: int, kernel: int = 5, patch: int = 2, classes: int = 10
) -> nn.Sequential:
    """ConvMixer (Trockman and Kolter, "Patches Are All You Need?", 2022), without biases.

    Its initialisation is torch's default, as in the authors' code.

    Args:
        width: Channels ``h`` of every block.
        depth: Number of blocks: a residual depthwise convolution, then a pointwise one.
        kernel: Side of the depthwise kernel, odd.
        patch: Side and stride of the stem, so that blocks see ``[n, h, 32/patch, 32/patch]``.
        classes: Number of logits.
    """
    layers = _activated(nn.Conv2d(3, width, patch, stride=patch, bias=False))
    for _ in range(depth):
        layers += [Residual(nn.Sequential(*_activated(DepthwiseConv2d(width, kernel))))]
        layers += _activated(nn.Conv2d(width, width, 1, bias=False))
    head = nn.Linear(width, classes, bias=False)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around an option-A shortcut (He et al., 2016, section 4.2).

    Where the width grows, the shortcut takes every second pixel and pads the new channels
    with zeros, half in front and half behind; it has no weights.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        """Build for ``[n, inputs, h, w]``; the side is halved where the width grows."""
        super().__init__()
        self.stride = 1 if inputs == outputs else 2
        self.extra = (outputs - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, inputs, h, w] -> [n, outputs, h/stride, w/stride]``."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.extra:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(y + x)


def resnet(depth: int = 32, classes: int = 10, width: int = 16) -> nn.Sequential:
    """CIFAR ResNet of ``6n + 2`` layers (He et al., 2016), classifier without bias.

    Convolutions and classifier start kaiming-normal (fan-in, ReLU).

    Args:
        depth: Number of layers.
        classes: Number of logits.
        width: Channels of the first stage, 16 in the paper; the next have two and four times them.

    Raises:
        ValueError: If ``depth`` is not ``6n + 2``.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        message = f"depth={depth} is not 6n + 2; give 8, 14, 20, 32, 44, 56 or 110"
        raise ValueError(message)
    stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(width), nn.ReLU()]
    for before, wide in ((width, width), (width, 2 * width), (2 * width, 4 * width)):
        layers.append(BasicBlock(before, wide))
        layers += [BasicBlock(wide, wide) for _ in range(blocks - 1)]
    head = nn.Linear(4 * width, classes, bias=False)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).apply(_initialise)


def vit(width: int, depth: int, classes: int = 10, patch: int = 4, heads: int = 8) -> nn.Module:
    """Vision transformer for images of 32 x 32 (Dosovitskiy et al., 2021), linear maps unbiased.

    PEMN's configuration was never released. Its optimizer, rate, schedule and 200 epochs are the
    defaults of the widely used ``vision-transformers-cifar10``, whose network this therefore is:
    patches of 4 x 4, 8 heads, 512 hidden units in every block, dropout .1. Queries, keys, values
    and projections have no bias, MLPs have timm's.
    """
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=32, patch_size=patch, num_classes=classes, embed_dim=width, depth=depth,
        num_heads=heads, mlp_ratio=512 / width, qkv_bias=False, proj_bias=False, drop_rate=0.1,
        pos_drop_rate=0.1, proj_drop_rate=0.1,
    )  # fmt: skip


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)
