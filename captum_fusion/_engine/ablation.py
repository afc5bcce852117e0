"""The scores of rows for which a channel of the layer is set to 0."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from captum_fusion._engine.captum import eager
from captum_fusion._engine.forward_pass import ForwardPass
from captum_fusion._engine.masking import MaskedScorer, Masks


class Ablator(MaskedScorer):
    """Scores the inputs as they are, with one channel of the session's layer set to 0 in each row.

    Args:
        opened (Session): The model that has run once.
        perturbations_per_eval (int or None): Rows per example in one call of ``forward_func``. Default: None, which
            takes as many rows as are fast on the device
    """

    def __init__(self, unmasked: ForwardPass, perturbations_per_eval: int | None = None) -> None:
        super().__init__(unmasked, masked=(), perturbations_per_eval=perturbations_per_eval)
        self._ablated = torch.empty(0)
        self._runs = 0

    def ablated_scores(self, examples: Tensor, channels: Tensor, description: str | None = None) -> Tensor:
        """Scores one example for each row, without one channel.

        Args:
            examples (Tensor): The example of each row, shape (rows,).
            channels (Tensor): The channel that is set to 0 in each row, shape (rows,).
            description (str or None): Shows a progress bar with this description. Default: None

        Returns:
            *Tensor* of shape (rows,), float32 or wider.
        """
        # Compiled code passes over hooks.
        with eager(), self._hooked():
            return self.scores(examples, lambda rows, _: channels[rows], description)

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        layer, thread = self.forward_pass.layer, threading.get_ident()
        assert layer is not None

        def ablate(module: Module, *values: Any) -> Any:
            # What other threads run is left alone; a layer that runs several times is explained by its last run.
            if module is not layer or threading.get_ident() != thread:
                return None
            self._runs += 1
            if self._runs != self.forward_pass.layer_runs:
                return None
            value = values[0 if self.forward_pass.attribute_to_layer_input else -1]
            return (self._without(value[0]), *value[1:]) if isinstance(value, tuple) else self._without(value)

        to_input = self.forward_pass.attribute_to_layer_input
        hook = (layer.register_forward_pre_hook if to_input else layer.register_forward_hook)(ablate)
        try:
            yield
        finally:
            hook.remove()

    def _without(self, value: Tensor) -> Tensor:
        if len(value) != len(self._ablated):
            raise ValueError(
                f"The layer gave {len(value)} rows for {len(self._ablated)} examples; expected one for each example"
            )
        return value.masked_fill(
            self._ablated.to(value.device).reshape(*self._ablated.shape, *(1,) * (value.dim() - 2)), 0
        )

    def _score_rows(
        self, examples: Tensor, rows: Tensor, masks: Masks, control: bool, buffers: dict[int, Tensor]
    ) -> Tensor:
        own = rows - int(control)
        channels = masks(own.clamp(min=0), 0)
        ablated = torch.arange(self.forward_pass.layer_value.shape[1], device=rows.device) == channels.unsqueeze(1)
        # The control row has all channels.
        self._ablated = ablated & (own >= 0).unsqueeze(1)
        return super()._score_rows(examples, rows, masks, control, buffers)

    def _pass(self, row_inputs: tuple[Tensor, ...], arguments: tuple[Any, ...]) -> Tensor:
        self._runs = 0
        output = super()._pass(row_inputs, arguments)
        if self._runs < self.forward_pass.layer_runs:
            raise ValueError(
                f"The layer ran {self._runs} times in this thread, but {self.forward_pass.layer_runs} times for the "
                "inputs as they are, so that its channels cannot be set to 0. Give the model itself rather than a "
                "DataParallel over several devices."
            )
        return output
