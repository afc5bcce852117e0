"""Control maps, which know nothing of the model: the baseline of every metric."""

import hashlib
from typing import Any

import torch
from captum.attr import Attribution, LayerActivation, LayerAttribution
from torch import Tensor

# The standard deviation, as a share of each side: about the size of an object in the middle.
_WIDTH = 0.25


class LayerRandomMap(LayerAttribution):
    """Independent uniform values in the layer's size, seeded by the input, so that each picture has its own map."""

    def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:  # noqa: ARG002
        """Computes the maps, whatever the target."""
        shape = LayerActivation(self.forward_func, self.layer).attribute(inputs).shape[2:]
        maps = []
        for row in inputs.detach():
            digest = hashlib.sha256(row.cpu().contiguous().numpy().tobytes()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
            maps.append(torch.rand(1, *shape, generator=generator))
        return torch.stack(maps).to(inputs.device)


class CentredGaussian(Attribution):
    """A Gaussian in the middle of the input, a quarter of each side wide: most photographs show their object there."""

    def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:  # noqa: ARG002
        """Computes the maps, whatever the target."""
        exponent = torch.zeros((), device=inputs.device)
        for side in inputs.shape[2:]:
            offset = (torch.arange(side, device=inputs.device) + 0.5) / side - 0.5
            exponent = exponent.unsqueeze(-1) - (offset / _WIDTH) ** 2 / 2
        return exponent.exp().expand(len(inputs), 1, *exponent.shape)
