"""Class activation maps from masked inputs: the base of the methods that compare probabilities."""

from captum.attr import LayerAttribution
from torch.nn import Module

from captum_fusion._engine.captum import ForwardFunc
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion.arguments import Activation, check_activation


@fill_docstring
class MaskedCam(LayerAttribution):
    """Base class of class activation maps of the input's shape that compare the probabilities of masked inputs.

    Args:
        {layer_constructor}
        {activation}

    Raises:
        ValueError: If the activation is unknown.
    """

    def __init__(
        self,
        forward_func: ForwardFunc,
        layer: Module,
        device_ids: list[int] | None = None,
        *,
        activation: Activation | None = "softmax",
    ) -> None:
        super().__init__(forward_func, layer, device_ids)
        check_activation(activation)
        self.activation = activation
