"""Whether attributions depend on what the model has learned: randomization of its weights."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from captum.attr import Attribution
from torch import Tensor
from torch.nn import Module

from captum_fusion._engine.captum import TargetType
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.saliency import saliency_maps
from captum_fusion._engine.state import preserved
from captum_fusion.arguments import Sign
from captum_fusion.functional import rank_correlation

Randomization = Literal["cascading", "independent"]
RANDOMIZATIONS: tuple[Randomization, ...] = get_args(Randomization)


@fill_docstring
def weight_randomization(
    attribution_method: Attribution,
    inputs: Tensor | tuple[Tensor, ...],
    additional_forward_args: object = None,
    target: TargetType = None,
    model: Module | None = None,
    randomization: Randomization = "cascading",
    seed: int = 0,
    sign: Sign = "positive",
    attribution_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    r"""Computes how far attributions stay the same when the model's weights are replaced with random ones.

    An attribution that shows what the model has learned has to change; one that stays shows the edges of the picture.
    The weights are randomized module by module from the output to the input, as the modules are registered, each with
    those before it ("cascading") or alone ("independent"). The value is Spearman's rank correlation over the pixels of
    the saliency maps before and after, near 0 where the attribution depends on the weights.

    A module is randomized by its own ``reset_parameters``, or, where it has none, by a normal distribution with the
    mean and the standard deviation of each parameter. The model's parameters, buffers and the random state are as they
    were afterwards, also after an error.

    More details can be found in the paper: https://arxiv.org/abs/1810.03292

    Args:
        attribution_method (Attribution): Any attribution of Captum or of this package.
        {inputs}
        {additional_forward_args}
        {target}
        model (torch.nn.Module, optional): The model whose weights are randomized. Default: None, which means the
            method's ``forward_func``
        randomization (str, optional): "cascading" or "independent". Default: "cascading"
        seed (int, optional): What the random weights follow from. Default: 0
        {sign}
        attribution_kwargs (dict, optional): Further arguments of the method's ``attribute``. Default: None

    Returns:
        *dict* of the name of each module with parameters of its own, from the output to the input, to a *Tensor* of
        shape (N,) with values in [-1, 1]; 0 where one map is constant, 1 where both are the same constant.

    Raises:
        TypeError: If the method is not an attribution, or if there is no model.
        ValueError: If the randomization or the sign is unknown, or if no module of the model has parameters.

    Examples::

        >>> from captum.attr import LayerGradCam
        >>> from torchvision.models import resnet18
        >>> model = resnet18(weights=None).eval()
        >>> correlations = weight_randomization(LayerGradCam(model, model.layer4), torch.rand(2, 3, 64, 64), target=281)
        >>> next(iter(correlations)), correlations["fc"].shape
        ('fc', torch.Size([2]))
    """
    if not isinstance(attribution_method, Attribution):
        raise TypeError(
            f"attribution_method is {attribution_method!r}; expected an instance of captum.attr.Attribution"
        )
    if randomization not in RANDOMIZATIONS:
        raise ValueError(f"randomization is {randomization!r}; expected one of {RANDOMIZATIONS}")
    explained = attribution_method.forward_func if model is None else model
    if not isinstance(explained, Module):
        raise TypeError(f"model is {explained!r}; expected the torch.nn.Module whose weights are to be randomized")
    modules = {name: part for name, part in explained.named_modules() if any(True for _ in part.parameters(False))}
    if not modules:
        raise ValueError(f"model is a {type(explained).__name__} without parameters; expected one with parameters")
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    further = {} if additional_forward_args is None else {"additional_forward_args": additional_forward_args}

    def flat_maps() -> Tensor:
        given = tuple(tensor.detach().clone() for tensor in tensors)
        attributions = attribution_method.attribute(
            given if isinstance(inputs, tuple) else given[0], target=target, **further, **(attribution_kwargs or {})
        )
        if isinstance(attributions, tuple) and len(attributions) == 1:
            attributions = attributions[0]
        maps = saliency_maps(inputs, attributions, sign)
        return torch.cat([maps[position].flatten(1) for position in sorted(maps)], dim=1)

    correlations = {}
    with preserved(tensors) as state, state.tracking():
        original = flat_maps()
        with _restored(explained) as restore:
            for position, (name, part) in enumerate(reversed(modules.items())):
                if randomization == "independent":
                    restore()
                _randomize(part, seed + position)
                correlations[name] = rank_correlation(original, flat_maps())
    return correlations


@contextmanager
def _restored(model: Module) -> Iterator[Callable[[], None]]:
    """Restores parameters and buffers on leaving, and whenever asked to."""
    kept = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]

    @torch.no_grad()
    def restore() -> None:
        for tensor, value in kept:
            tensor.copy_(value)

    try:
        yield restore
    finally:
        restore()


@torch.no_grad()
def _randomize(module: Module, seed: int) -> None:
    own = list(module.parameters(recurse=False))
    reset: Any = getattr(module, "reset_parameters", None)
    with torch.random.fork_rng({parameter.device for parameter in own if parameter.is_cuda}):
        torch.manual_seed(seed)
        if reset is not None:
            reset()
            return
        for parameter in own:
            spread = float(parameter.std(correction=0))
            parameter.copy_(parameter.mean() + spread * torch.randn_like(parameter))
