"""Arms that take each step together, in one call of one network.

Every arm makes its effective weights as it does alone. These, its other parameters and its buffers
are stacked with those of the other arms, and a plain network, in which nothing is masked, is mapped
over the stacks with one batch (`torch.func.vmap`): k convolutions become one of k groups. The
backward pass goes through the stacks into what each arm trains.

So k arms cost the calls of one network, on devices that one network does not fill. Sums are rounded
otherwise than in an arm alone; dropout draws the same, since alone, too, an arm's step is seeded by
its position.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from pemn_surgery.recipe import pruning
from pemn_surgery.recipe.arms import Arm

Tensors = dict[str, Tensor]


class Together:
    """Maps one batch to the outputs of several arms of one case."""

    def __init__(self, network: nn.Module, *, compiled: bool) -> None:
        """Take the case's network, whose own numbers are never read; ``compiled``: once for all."""
        self.network = network.train()
        self._mapped = torch.compile(self._map, dynamic=False) if compiled else self._map

    def __call__(self, arms: Sequence[Arm], inputs: Tensor) -> Tensor:
        """Return the outputs ``[k, b, ...]`` of k arms in training; statistics move in each.

        Args:
            arms: Whose networks have the names and shapes of this one.
            inputs: What a network takes, ``[b, ...]``, on the arms' device.
        """
        trained, moved = (
            {name: [_read(arm.network, name) for arm in arms] for name, _ in named}
            for named in (self.network.named_parameters(), self.network.named_buffers())
        )
        stacks = _stacked(moved)
        outputs = self._mapped(_stacked(trained), stacks, inputs)
        with torch.no_grad():
            for name, stack in stacks.items():
                for buffer, value in zip(moved[name], stack, strict=True):
                    buffer.copy_(value)
        return outputs

    def _map(self, trained: Tensors, moved: Tensors, inputs: Tensor) -> Tensor:
        def outputs(weights: Tensors, buffers: Tensors) -> Tensor:
            return functional_call(self.network, (weights, buffers), (inputs,))

        return vmap(outputs, randomness="same")(trained, moved)


def _read(network: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer as the network's next forward would read it."""
    path, _, attribute = name.rpartition(".")
    return pruning.read(network.get_submodule(path), attribute)


def _stacked(tensors: dict[str, list[Tensor]]) -> Tensors:
    return {name: torch.stack(of_arms) for name, of_arms in tensors.items()}
