"""Shapley-CAM."""

from typing import Literal

from torch import Tensor
from torch.nn import Module

from captum_fusion._engine.captum import ForwardFunc, TargetType, select_targets
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion.attr.gradient_cam import GradientCam
from captum_fusion.functional import grad_cam_weights, rest_scores, shapley_gradients


@fill_docstring
class LayerShapleyCam(GradientCam):
    r"""Computes Shapley-CAM for the chosen layer: Grad-CAM with the second derivatives of the target's utility.

    Its weights approximate the Shapley values of the pixels of each channel, as players whose value is the utility u of
    the target. In symbols, for channels A_k, and the gradient g and the Hessian H of the utility:

    .. math::

        u &= y_c + \log \mathrm{softmax}(y)_c \\
        w_k &= \mathrm{mean}\left(g_k - \frac{1}{2} (H A)_k\right) \\
        L &= \sum_k w_k A_k

    The paper's utility of a class is its logit plus its log-probability. With the score alone as utility,
    the map is Grad-CAM's wherever the score is a linear function of the layer, as after the last convolution of most
    networks. The Hessian is not built: its product takes one more backward pass.

    More details can be found in the paper: https://arxiv.org/abs/2501.06261

    Args:
        {layer_constructor}
        utility (str, optional): The utility of the target: "rest" as above, for logits with the classes in dimension 1,
            or "score" for the target's score as it is. Default: "rest"

    Raises:
        ValueError: If the utility is unknown.

    {layer_example}
    """

    uses_hessian = True

    def __init__(
        self,
        forward_func: ForwardFunc,
        layer: Module,
        device_ids: list[int] | None = None,
        *,
        utility: Literal["rest", "score"] = "rest",
    ) -> None:
        super().__init__(forward_func, layer, device_ids)
        if utility not in ("rest", "score"):
            raise ValueError(f"utility is {utility!r}; expected 'rest' or 'score'")
        self.utility = utility

    def explained_scores(self, output: Tensor, target: TargetType) -> Tensor:
        """The utility of the target; see ``captum_fusion.functional.rest_scores``."""
        if self.utility == "score":
            return select_targets(output, target)
        if output.dim() < 2:
            raise ValueError(
                f"forward_func returned an output of shape {tuple(output.shape)}; expected logits with the classes in "
                "dimension 1. For one score per example, pass utility='score'."
            )
        return select_targets(rest_scores(output), target)

    def second_order_gradients(self, gradients: Tensor, hessian_products: Tensor) -> Tensor:
        """See ``captum_fusion.functional.shapley_gradients``."""
        return shapley_gradients(gradients, hessian_products)

    def channel_weights(self, gradients: Tensor, _: Tensor) -> Tensor:
        """See ``captum_fusion.functional.grad_cam_weights``."""
        return grad_cam_weights(gradients)
