"""Deep feature factorization."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from captum.attr import LayerAttribution
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import relu

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.captum import ForwardFunc, logged
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.forward_pass import forward_pass
from captum_fusion.functional import as_float, non_negative_factors


class Concepts(NamedTuple):
    r"""The K concepts of a layer, the largest first: the one with the largest part of the activations."""

    maps: Tensor
    r"""The map of each concept, shape (N, K, \*s), not negative; the highest value of a concept in the batch is 1."""
    vectors: Tensor
    """The activations of each concept where its map is 1, shape (K, C)."""
    scores: Tensor | None
    """The scores of each concept by ``head``, shape (K, classes), or None without a head."""


@fill_docstring
class LayerFeatureFactorization(LayerAttribution):
    r"""Computes deep feature factorization for the chosen layer: concepts that its activations are made of.

    The activations of all pixels of the batch are factorized into K maps and as many vectors of channels, none of them
    negative. In symbols, for the activations A of a pixel p, maps H and vectors W:

    .. math::

        \mathrm{ReLU}(A_{pc}) \approx \sum_k H_{pk} W_{kc}

    Pixels of one concept look alike to the layer, whatever their class, also across the images of a batch. Pass one
    image alone to find its own concepts. The head of the model shows which class a concept supports.

    More details can be found in the paper: https://arxiv.org/abs/1806.10206

    Args:
        {layer_constructor}
        head (Callable, optional): The part of the model after the mean over pixels, a function from vectors (K, C) to
            scores (K, classes), such as ``model.fc``. Default: None

    Examples::

        >>> import torch
        >>> from torchvision.models import resnet18
        >>> model = resnet18(weights=None).eval()
        >>> factorization = LayerFeatureFactorization(model, model.layer4, head=model.fc)
        >>> concepts = factorization.attribute(torch.rand(1, 3, 64, 64), concepts=3)
        >>> concepts.maps.shape, concepts.vectors.shape
        (torch.Size([1, 3, 2, 2]), torch.Size([3, 512]))

        The class that each concept supports:

        >>> concepts.scores.argmax(dim=1).shape
        torch.Size([3])
    """

    def __init__(
        self,
        forward_func: ForwardFunc,
        layer: Module,
        device_ids: list[int] | None = None,
        *,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(forward_func, layer, device_ids)
        self.head = head

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        additional_forward_args: object = None,
        attribute_to_layer_input: bool = False,
        *,
        concepts: int = 4,
        iterations: int = 200,
        seed: int = 0,
    ) -> Concepts:
        r"""Computes the concepts of the layer; no target is explained, and ``forward_func`` may return anything.

        Args:
            {inputs}
            {additional_forward_args}
            {attribute_to_layer_input}
            concepts (int, optional): K, the number of concepts, at least 1. Default: 4
            iterations (int, optional): The number of steps of the factorization, at least 1. Default: 200
            seed (int, optional): The seed of the random start; torch's global random state is neither used nor changed.
                Default: 0

        Returns:
            **Concepts**, a named tuple:

            - **maps** (*Tensor*): The map of each concept, (N, K, \*s), not negative, and 1 at its highest value in the
              batch. Use ``LayerAttribution.interpolate`` to enlarge them to the input's size.
            - **vectors** (*Tensor*): The activations of each concept where its map is 1, (K, C).
            - **scores** (*Tensor* or None): The head's scores of these vectors, (K, classes).

        Raises:
            ValueError: If the layer is not part of the model or has no map, if concepts or iterations are below 1, or
                if no activation is positive.
        """
        for name, value in (("concepts", concepts), ("iterations", iterations)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        call = ModelCall.of_layer(self, inputs, None, additional_forward_args, attribute_to_layer_input)
        with forward_pass(call, scored=False) as unmasked, torch.no_grad():
            activations = relu(unmasked.layer_value)
            if not activations.any():
                raise ValueError("No activation of the layer is positive; expected a layer with positive values")
            maps, vectors = non_negative_factors(activations.movedim(1, -1).flatten(0, -2), concepts, iterations, seed)
            highest = maps.amax(dim=0)
            maps, vectors = maps / torch.where(highest > 0, highest, 1), vectors * highest.unsqueeze(1)
            order = (maps.norm(dim=0) * vectors.norm(dim=1)).argsort(descending=True, stable=True)
            maps, vectors = maps[:, order].reshape(len(activations), -1, concepts).mT, vectors[order]
            scores = None if self.head is None else as_float(self.head(vectors.to(call.tensors[0].dtype)))
        return Concepts(maps.reshape(len(activations), concepts, *activations.shape[2:]), vectors, scores)
