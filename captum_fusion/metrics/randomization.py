"""Randomization of a model's weights, a test of whether attributions depend on what the model has learned."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any, Literal, cast, get_args

import torch
from captum.attr import Attribution
from torch import Tensor
from torch.jit import ScriptModule
from torch.nn import Module, ModuleDict
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils.parametrize import is_parametrized

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.captum import TargetType, eager
from captum_fusion._engine.component import check_component
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.saliency import explained_pixels, saliency_maps
from captum_fusion._engine.state import preserved, warn
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
    *,
    channel_dim: int = 1,
) -> dict[str, Tensor]:
    r"""Computes the similarity of attributions before and after the model's weights are randomized.

    An attribution that shows what the model has learned must change; one that does not change may only show the edges
    in the image. The weights are randomized module by module, in the reverse order of registration, from the output to
    the input: each module together with the modules before it ("cascading") or alone ("independent"). The value is
    Spearman's rank correlation over the pixels of the saliency maps before and after. It is near 0 if the attribution
    depends on the weights.

    A module is randomized by its own ``reset_parameters``, or, if it has none that takes no arguments, by a normal
    distribution with the mean and the standard deviation of each parameter. The same distribution replaces parameters
    from which hooks or parametrizations compute a module's weights (``weight_norm``, ``spectral_norm``, pruning). A
    warning names the modules whose weights did not change, such as scales that still have their initial value of 1. The
    model's parameters and buffers and the random state are restored, also after an error.

    More details can be found in the paper: https://arxiv.org/abs/1810.03292

    Args:
        attribution_method (Attribution): Any attribution of Captum or of this package.
        {inputs}
        {additional_forward_args}
        {target}
        model (torch.nn.Module, optional): The model whose weights are randomized. Default: None, which means the
            method's ``forward_func``
        randomization (str, optional): "cascading" or "independent". Default: "cascading"
        seed (int, optional): The seed of the random weights. Default: 0
        {sign}
        attribution_kwargs (dict, optional): Further arguments of the method's ``attribute``. Default: None
        {channel_dim}

    Returns:
        *dict* from the name of each module with its own parameters, from the output to the input, to a *Tensor* of
        shape (N,) with values in [-1, 1]; 0 if one map is constant, 1 if both maps are constant.

    Raises:
        TypeError: If the method is not an attribution, or if there is no model.
        ValueError: If the randomization or the sign is unknown, if no module of the model has parameters, or if a
            ``model`` does not run and its weights change nothing.

    Examples::

        >>> from captum.attr import LayerGradCam
        >>> from torchvision.models import squeezenet1_1
        >>> model = squeezenet1_1(weights=None).eval()
        >>> method = LayerGradCam(model, model.features)
        >>> correlations = weight_randomization(method, torch.rand(2, 3, 64, 64), target=281)
        >>> next(iter(correlations)), correlations["classifier.1"].shape
        ('classifier.1', torch.Size([2]))
    """
    check_component("attribution_method", attribution_method, None)
    if randomization not in RANDOMIZATIONS:
        raise ValueError(f"randomization is {randomization!r}; expected one of {RANDOMIZATIONS}")
    explained = attribution_method.forward_func if model is None else model
    if not isinstance(explained, Module):
        raise TypeError(f"model is {explained!r}; expected the torch.nn.Module to randomize")
    modules = {
        name: part
        for name, part in explained.named_modules()
        if ".parametrizations." not in f".{name}." and _own_parameters(part)
    }
    if not modules:
        raise ValueError(f"model is a {type(explained).__name__} without parameters; expected a model with parameters")
    call = ModelCall(explained, inputs, channel_dim=channel_dim)
    further = {} if additional_forward_args is None else {"additional_forward_args": additional_forward_args}

    def saliency() -> dict[int, Tensor]:
        copies = call.in_form(tuple(tensor.detach().clone() for tensor in call.tensors))
        attributions = attribution_method.attribute(copies, target=target, **further, **(attribution_kwargs or {}))
        if isinstance(attributions, tuple) and len(attributions) == 1:
            attributions = attributions[0]
        return saliency_maps(call, attributions, sign)

    def correlate(first: dict[int, Tensor], second: dict[int, Tensor]) -> Tensor:
        """The correlation over the pixels of the inputs that either explains; the other has zeros there."""
        pairs: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
        for position in {*first, *second}:
            none = torch.full_like(first[position] if position in first else second[position], torch.nan)
            values = [part.get(position, none) for part in (first, second)]
            nowhere = values[0].isnan() & values[1].isnan()
            for part, value in zip(pairs, values, strict=True):
                part[position] = value.nan_to_num(0).masked_fill(nowhere, torch.nan)
        rows = range(call.examples)
        return torch.cat([rank_correlation(*(explained_pixels(part, row) for part in pairs)) for row in rows])

    correlations, unchanged = {}, []
    parts, ran = set(explained.modules()), list[bool]()
    with preserved(call.tensors) as state, eager(), state.tracking(explained):
        with register_module_forward_pre_hook(lambda module, _: ran.append(module in parts)):
            original = saliency()
        with _restored(explained) as restore:
            for position, (name, part) in enumerate(reversed(modules.items())):
                if randomization == "independent":
                    restore()
                before = _weights(part)
                _randomize(part, seed + position)
                # The forward pass runs the hooks that make weights.
                correlations[name] = correlate(original, saliency())
                if all(torch.equal(value, before[weight]) for weight, value in _weights(part).items()):
                    unchanged.append(name)
    # Other modules may use its weights, and a method that runs no model has a correlation of 1 in fact.
    if model is not None and ran and not any(ran) and torch.stack([*correlations.values()]).gt(0.9999).all():
        raise ValueError(
            f"No module of model, a {type(explained).__name__}, ran, and no attribution changed with its weights; "
            "expected the model that the method's forward_func runs"
        )
    if unchanged:
        warn(
            f"Randomization did not change the weights of {', '.join(map(repr, unchanged))}: their values test nothing"
        )
    return correlations


def _own_parameters(module: Module) -> list[Tensor]:
    """The parameters that a module has itself, those behind its parametrized weights included."""
    behind = cast(Module, module.parametrizations).parameters() if is_parametrized(module) else ()
    return [*module.parameters(recurse=False), *behind]


def _computed_weights(module: Module) -> list[str]:
    """The names of the weights that hooks or parametrizations make from other parameters."""
    hooked = [
        name
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
        and (name in ("weight", "bias") or any(own.startswith(f"{name}_") for own in module._parameters))
    ]
    return [*hooked, *(cast(ModuleDict, module.parametrizations) if is_parametrized(module) else ())]


def _weights(module: Module) -> dict[str, Tensor]:
    """Copies of the values that a module computes with: a parametrized or hooked weight, not what it is made of."""
    values = {name: getattr(module, name) for name in _computed_weights(module)} or {
        **module._parameters,
        **module._buffers,
    }
    return {name: value.detach().clone() for name, value in values.items() if value is not None}


@contextmanager
def _restored(model: Module) -> Iterator[Callable[[], None]]:
    """Restores parameters, buffers and the weights that hooks make on leaving, and whenever asked to."""
    # A module's reset may set new ones in their place, but not in that of a scripted module.
    plain = (module for module in model.modules() if not isinstance(module, ScriptModule))
    own = [(module, module._parameters.copy(), module._buffers.copy()) for module in plain]
    saved = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    computed = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    ]

    @torch.no_grad()
    def restore() -> None:
        for module, parameters, buffers in own:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for tensor, value in saved:
            tensor.copy_(value)
        for module, name, value in computed:
            setattr(module, name, value)

    try:
        yield restore
    finally:
        restore()


@torch.no_grad()
def _randomize(module: Module, seed: int) -> None:
    own, computed = _own_parameters(module), _computed_weights(module)
    before = [parameter.clone() for parameter in own]
    with torch.random.fork_rng({parameter.device for parameter in own if parameter.is_cuda}):
        torch.manual_seed(seed)
        if not computed and _resets(module):
            cast(Any, module).reset_parameters()
        for parameter, value in zip(_own_parameters(module), before, strict=True):
            if torch.equal(parameter, value):
                spread = float(parameter.std(correction=0))
                parameter.copy_(parameter.mean() + spread * torch.randn_like(parameter))
    if computed:
        _converge(module)


def _resets(module: Module) -> bool:
    """Tells whether a module has a ``reset_parameters`` that needs no arguments."""
    try:
        signature(cast(Any, module).reset_parameters).bind()
    except (AttributeError, TypeError, ValueError):
        return False
    return True


def _converge(module: Module) -> None:
    """Makes hooked weights from the new parameters; the power iteration of a spectral norm needs several passes."""
    modes = [(part, part.training) for part in module.modules()]
    hooks = [hook for hook in module._forward_pre_hooks.values() if type(hook).__module__.startswith("torch.nn.utils")]
    module.train()
    for _ in range(20):
        for hook in hooks:
            hook(module, ())
        for name in _computed_weights(module):
            getattr(module, name)
    for part, mode in modes:
        part.training = mode
