"""Refusals say what was given, what was expected and what to do."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients, LayerGradCam
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.checkpoint import checkpoint

from captum_fusion import (
    LayerFusionCam,
    LayerGradCamPlusPlus,
    LayerScoreCam,
    Rise,
    last_feature_map,
)
from captum_fusion.metrics import (
    weight_randomization,
)
from tests.assumptions.networks import cnn


def test_a_model_without_values() -> None:
    net = cnn().to("meta")
    with pytest.raises(ValueError, match="on the meta device, which holds no values"):
        LayerScoreCam(net, net[1]).attribute(torch.rand(1, 3, 8, 8, device="meta"), target=1)


@pytest.mark.filterwarnings("ignore:The layer ran 2 times")
def test_a_convergence_delta_is_no_attribution() -> None:
    net = cnn()
    fusion = LayerFusionCam(
        lambda a, b: net(a) + net(b), net[1], gradient_method=IntegratedGradients(lambda a, b: net(a) + net(b))
    )
    inputs = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match="Remove arguments such as return_convergence_delta"):
        fusion.attribute(inputs, target=1, gradient_kwargs={"return_convergence_delta": True, "n_steps": 2})


def test_a_sparse_argument() -> None:
    net = cnn()
    with pytest.raises(ValueError, match=r"additional_forward_args\[0\] is a tensor of layout torch.sparse_coo"):
        LayerScoreCam(lambda x, _: net(x), net[1]).attribute(
            torch.rand(2, 3, 8, 8), target=1, additional_forward_args=torch.eye(2).to_sparse()
        )


@pytest.mark.parametrize("inputs", ["sparse", "nested", "meta"])
def test_inputs_without_rows_or_values(inputs: str) -> None:
    net, x = cnn(), torch.rand(2, 3, 8, 8)
    given = {"sparse": x.to_sparse(), "nested": torch.nested.as_nested_tensor([*x]), "meta": x.to("meta")}[inputs]
    for method in (LayerScoreCam(net, net[1]), Rise(net, samples=2)):
        with pytest.raises(ValueError, match=r"inputs\[0\] is a tensor"):
            method.attribute(given, target=1)


@pytest.mark.parametrize("shape", [(), (1, 3, 16, 16)])
def test_a_baseline_without_values(shape: tuple[int, ...]) -> None:
    net, baseline = cnn(), torch.ones(shape, device="meta")
    with pytest.raises(ValueError, match="The baseline of input 0 is a tensor on the meta device"):
        LayerScoreCam(net, net[1]).attribute(torch.rand(2, 3, 16, 16), target=1, baselines=baseline)


def test_a_component_without_a_graph() -> None:
    net = cnn()

    def forward(x: Tensor) -> Tensor:
        return net[2:](checkpoint(net[:2], x, use_reentrant=True))

    with pytest.raises(RuntimeError, match="needs use_reentrant=False"):
        LayerFusionCam(forward, net[1]).attribute(torch.rand(1, 3, 8, 8), target=1)


def test_scores_without_a_graph() -> None:
    net = cnn()
    with pytest.raises(RuntimeError, match="The scores have no gradients at the layer"):
        LayerGradCamPlusPlus(lambda x: net(x).detach(), net[1]).attribute(torch.rand(1, 3, 8, 8), target=1)


@pytest.mark.parametrize("kind", [dict, list, np.array, tuple])
def test_rows_in_a_container(kind: Any) -> None:
    """They are not repeated, so that one example would be masked with the other one's."""
    net, factors = cnn(), torch.tensor([1.0, 3.0])
    further = {dict: {"factor": factors}, list: [factors], tuple: ("1", "3")}.get(kind, factors.numpy())

    def forward(x: Tensor, further: Any) -> Tensor:
        rows = further["factor"] if kind is dict else further[0] if kind is list else further
        return net(x * torch.tensor([float(value) for value in rows]).reshape(-1, 1, 1, 1))

    method = LayerScoreCam(forward, net[1])
    with pytest.raises(ValueError, match="expected each tensor as an argument of its own"):
        method.attribute(torch.rand(2, 3, 16, 16), 1, additional_forward_args=(further,), perturbations_per_eval=1)


def test_a_tuple_of_numbers_is_shared_by_as_many_examples() -> None:
    net = cnn()
    LayerScoreCam(lambda x, size: net(interpolate(x, size)), net[1]).attribute(
        torch.rand(2, 3, 8, 8), 1, additional_forward_args=((8, 8),)
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_scores_that_are_no_real_numbers(dtype: torch.dtype) -> None:
    net = cnn()
    with pytest.raises(TypeError, match="expected scores, which are real numbers"):
        Rise(lambda x: net(x)[:, 0].to(dtype), samples=4, activation=None).attribute(torch.rand(2, 3, 16, 16))


def test_scores_in_a_dataclass() -> None:
    @dataclass
    class Output:
        loss: None
        scores: Tensor

    net = cnn()
    with pytest.raises(TypeError, match=r"lambda x: model\(x\)\.scores"):
        LayerScoreCam(lambda x: Output(None, net(x)), net[1]).attribute(torch.rand(2, 3, 16, 16), target=1)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_scripted_model() -> None:
    scripted = torch.jit.script(cnn())
    with pytest.raises(TypeError, match=r"is a module of torch\.jit\.script"):
        LayerScoreCam(scripted, getattr(scripted, "1")).attribute(torch.rand(2, 3, 16, 16), target=1)
    with pytest.raises(TypeError, match=r"is a module of torch\.jit\.script"):
        last_feature_map(scripted, torch.rand(2, 3, 16, 16))


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="compiled models need torch 2.6")
def test_a_compiled_model() -> None:
    net, images = cnn(), torch.rand(2, 3, 16, 16)
    compiled = torch.compile(net, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert last_feature_map(compiled, images).name == last_feature_map(net, images).name
    found = weight_randomization(LayerGradCam(compiled, net[1]), images, target=1)
    right = weight_randomization(LayerGradCam(net, net[1]), images, target=1)
    for one, other in zip(found.values(), right.values(), strict=True):
        torch.testing.assert_close(one, other)
