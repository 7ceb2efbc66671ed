"""The outputs of a layer in its weight, and a scale for each of them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Where the outputs of a layer lie in its weight.

    A weight, row by row, is ``outer`` x ``summed`` x ``outputs`` x ``inner`` numbers: output
    ``(g, r)`` of ``outer`` x ``outputs`` sums over all ``[g, :, r, :]``. A Linear (out, in) is
    1 x 1 x out x in, transformers' ``Conv1D`` (in, out) is 1 x in x out x 1.

    Attributes:
        outer: Groups, or experts whose inputs come before their outputs.
        summed: Inputs that come before the outputs.
        outputs: Outputs of one group.
        inner: Inputs (and positions in a kernel) that come after the outputs.
    """

    outer: int
    summed: int
    outputs: int
    inner: int

    @property
    def count(self) -> int:
        """Number of outputs, that is of scales."""
        return self.outer * self.outputs

    @property
    def view(self) -> tuple[int, int, int, int]:
        """The weight's shape with one dimension for each attribute."""
        return (self.outer, self.summed, self.outputs, self.inner)

    def spread(self, scale: Tensor) -> Tensor:
        """Return one scale an output, shape (count,), in a shape that broadcasts to ``view``."""
        return scale.view(self.outer, 1, self.outputs, 1)

    def outputs_at(self, places: Tensor) -> Tensor:
        """Return which output each of some places in the flattened weight belongs to.

        Args:
            places: Integer tensor of any shape.
        """
        group = places // (self.summed * self.outputs * self.inner)
        return group * self.outputs + places // self.inner % self.outputs

    def mean(self, weight: Tensor) -> Tensor:
        """Return the mean over each output's weights, shape (count,)."""
        return weight.reshape(self.view).mean(dim=(1, 3)).view(-1)


def scaled_rows(weight: Tensor, scale: Tensor, rows: Rows) -> Tensor:
    """Return a weight with every output's numbers multiplied by its scale.

    The product is made in the wider type of both and rounded once, to the weight's. Gradients reach
    both.

    Args:
        weight: Float tensor of the weight's shape.
        scale: Float tensor of shape (rows.count,).
        rows: Where each output's weights lie.
    """
    product = weight.reshape(rows.view) * rows.spread(scale)
    return product.to(weight.dtype).view(weight.shape)
