"""Explains pictures and judges the explanations: from pixels to records."""

import base64
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from captum_fusion._methods import RememberedScoreCam
from captum_fusion._names import reason
from captum_fusion._settings import Settings
from captum_fusion.attr.fusion_cam import LayerFusionCam
from captum_fusion.benchmark._plan import STAGES, Piece, Plan, Seen, Variant, made_with, variants_of
from captum_fusion.benchmark._records import Key, Record
from captum_fusion.metrics import (
    confidence_drop,
    confidence_increase,
    deletion,
    energy_pointing_game,
    insertion,
    pointing_game,
    saliency_map,
)

T = TypeVar("T")

# Large enough to tell maps apart in the report, small enough for a million records.
_THUMBNAIL = (28, 28)


@dataclass(frozen=True)
class Batch:
    """Pictures of one model as it sees them, each with the class that is explained."""

    plan: Plan
    pieces: list[Piece]
    seen: list[Seen]
    inputs: Tensor
    targets: list[int]
    score_cam: RememberedScoreCam

    def of(self, indices: list[int]) -> "Batch":
        """Some of the pictures."""
        if indices == list(range(len(self.pieces))):
            return self
        return Batch(
            self.plan,
            [self.pieces[index] for index in indices],
            [self.seen[index] for index in indices],
            self.inputs[indices],
            [self.targets[index] for index in indices],
            self.score_cam,
        )


class Failure(NamedTuple):
    """A picture that could not be explained, and why."""

    piece: Piece
    error: str


class Judge:
    """Makes the records of pictures.

    Args:
        settings (Settings): What is asked.
        done (Mapping): The records that are there already.
    """

    def __init__(self, settings: Settings, done: Mapping[Key, Record]) -> None:
        self.settings = settings
        self.variants = variants_of(settings)
        self.done = done

    def missing(self, plan: Plan, piece: Piece, variant: Variant) -> set[str]:
        """The metrics that a picture's records lack."""
        lacking: set[str] = set()
        for part in variant.parts:
            record = self.done.get(plan.key(piece, variant, part))
            if record is None or "error" in record:
                return set(self.settings.metrics)
            lacking |= set(self.settings.metrics) - record.keys()
        return lacking

    def pending(self, plan: Plan, piece: Piece) -> list[Variant]:
        """What is still to be done for a picture."""
        return [variant for variant in self.variants if self.missing(plan, piece, variant)]

    def records(self, plan: Plan, pieces: list[Piece], loaded: list[Seen | str]) -> Iterator[list[Record]]:
        """The records that pictures lack, method by method, as soon as they are known."""
        whole: list[tuple[Piece, Seen]] = []
        for piece, seen in zip(pieces, loaded, strict=True):
            if isinstance(seen, str):
                yield self._failed(plan, Failure(piece, seen))
            else:
                whole.append((piece, seen))
        if not whole:
            return
        with plan.layer.view() as layer:
            yield from self._made(plan, layer, whole)

    def _made(self, plan: Plan, layer: Module, whole: list[tuple[Piece, Seen]]) -> Iterator[list[Record]]:
        score_cam = RememberedScoreCam(plan.classifier.model, layer, self.settings.tolerance)
        pixels = torch.cat([seen.pixels for _, seen in whole]).to(plan.place, non_blocking=True)
        batch = Batch(
            plan,
            [piece for piece, _ in whole],
            [seen for _, seen in whole],
            plan.classifier.preprocessing.normalize(pixels),
            [-1] * len(whole),
            score_cam,
        )
        for part in self._each(batch, self._predict):
            if isinstance(part, Failure):
                yield self._failed(plan, part)
                continue
            for variant in self.variants:
                lacking = [self.missing(plan, piece, variant) for piece in part.pieces]
                metrics = {name for names in lacking for name in names}
                if not metrics:
                    continue
                wanted = part.of([index for index, names in enumerate(lacking) if names])
                for result in self._each(wanted, partial(self._explain, variant=variant, metrics=metrics)):
                    yield self._failed(plan, result, variant) if isinstance(result, Failure) else result

    def _each(self, batch: Batch, action: Callable[[Batch], T]) -> "list[T | Failure]":
        """What an action makes of a batch, or where it fails, of each picture alone."""
        try:
            return [action(batch)]
        except Exception as error:
            if self.settings.strict:
                names = ", ".join(piece.picture.name for piece in batch.pieces)
                raise RuntimeError(f"{names}: {reason(error)}") from error
            if len(batch.pieces) == 1:
                return [Failure(batch.pieces[0], reason(error))]
        return [result for index in range(len(batch.pieces)) for result in self._each(batch.of([index]), action)]

    def _failed(self, plan: Plan, failure: Failure, variant: Variant | None = None) -> list[Record]:
        """Records of what could not be explained, but for those that say the same already."""
        piece, error = failure
        if self.settings.strict:
            raise ValueError(f"{piece.picture.name}: {error}")
        records = []
        for pending in self.pending(plan, piece) if variant is None else [variant]:
            for part in pending.parts:
                key = plan.key(piece, pending, part)
                if self.done.get(key, {}).get("error") != error:
                    records.append(self._base(plan, piece, key) | {"error": error})
        return records

    def _predict(self, batch: Batch) -> Batch:
        with self._autocast(batch.plan.place):
            predicted = batch.plan.classifier.scores(batch.inputs).argmax(dim=1).tolist()
        targets = [
            index if piece.requested is None else piece.requested
            for piece, index in zip(batch.pieces, predicted, strict=True)
        ]
        return Batch(batch.plan, batch.pieces, batch.seen, batch.inputs, targets, batch.score_cam)

    def _explain(self, batch: Batch, variant: Variant, metrics: set[str]) -> list[Record]:
        plan, method = batch.plan, variant.method
        attribution = method.build(
            plan.classifier.model, batch.score_cam.layer, {"score-cam": batch.score_cam}, self.settings.activation
        )
        options: dict[str, Any] = {} if variant.percentile is None else {"percentile": variant.percentile}
        if isinstance(attribution, LayerFusionCam):
            options |= {"weighting": method.weighting, "return_stages": True}
        saved = batch.score_cam.saved
        _synchronize(plan.place)
        start = perf_counter()
        with self._autocast(plan.place):
            result: Any = attribution.attribute(batch.inputs, target=batch.targets, **options)
        _synchronize(plan.place)
        seconds = (perf_counter() - start + batch.score_cam.saved - saved) / len(batch.pieces)
        maps: list[Tensor] = [result]
        if isinstance(attribution, LayerFusionCam):
            attributions, stages = result
            maps = [attributions, *(getattr(stages, stage) for stage in STAGES)][: len(variant.parts)]
        records: list[Record] = []
        for part, values in zip(variant.parts, maps, strict=True):
            judged = self._judge(batch, values, metrics)
            thumbnails = (saliency_map(values, _THUMBNAIL) * 255).round().byte().cpu()
            for index, piece in enumerate(batch.pieces):
                seen, target = batch.seen[index], batch.targets[index]
                records.append(
                    self._base(plan, piece, plan.key(piece, variant, part))
                    | {"target": target, "category": plan.classifier.category(target)}
                    | {"frame": [round(side, 3) for side in seen.frame]}
                    | ({"note": seen.note} if seen.note else {})
                    | {name: numbers[index] for name, numbers in judged.items()}
                    | {"map": base64.b64encode(thumbnails[index].numpy().tobytes()).decode(), "seconds": seconds}
                )
        return records

    def _judge(self, batch: Batch, attributions: Tensor, metrics: set[str]) -> dict[str, list[Any]]:
        network, inputs, targets = batch.plan.classifier.model, batch.inputs, batch.targets
        size = tuple(inputs.shape[2:])
        maps = saliency_map(attributions, size).flatten(1)
        values: dict[str, list[Any]] = {"empty": [not row.any().item() for row in maps]}
        with self._autocast(batch.plan.place):
            for name, metric in (("confidence_drop", confidence_drop), ("confidence_increase", confidence_increase)):
                if name in metrics:
                    numbers = metric(
                        network, inputs, attributions, target=targets, activation=self.settings.activation
                    ).tolist()
                    # A map that keeps everything changes nothing, whatever rounding makes of another batch.
                    values[name] = [
                        0.0 if (row == 1).all() else number for row, number in zip(maps, numbers, strict=True)
                    ]
            for name, curve in (("insertion", insertion), ("deletion", deletion)):
                if name in metrics:
                    area, _, probabilities = curve(
                        network,
                        inputs,
                        attributions,
                        target=targets,
                        steps=self.settings.steps,
                        activation=self.settings.activation,
                        return_curve=True,
                    )
                    values[name] = area.tolist()
                    values[f"{name}_curve"] = [[round(p, 5) for p in row] for row in probabilities.tolist()]
        games = (("pointing_game", pointing_game), ("energy_pointing_game", energy_pointing_game))
        for name, game in games:
            if name in metrics:
                regions = [
                    torch.tensor(batch.plan.boxes[piece.picture.name].get(target, [])).reshape(-1, 4)
                    for piece, target in zip(batch.pieces, targets, strict=True)
                ]
                shares = game(attributions, regions, size).tolist()
                values[name] = [None if share != share else share for share in shares]
        return values

    def _base(self, plan: Plan, piece: Piece, key: Key) -> Record:
        return (
            key._asdict()
            | {"file": str(piece.picture.file.absolute()), "target": piece.requested}
            | made_with(self.settings, plan, piece)
        )

    def _autocast(self, place: torch.device) -> AbstractContextManager[Any]:
        if self.settings.precision == "float32":
            return nullcontext()
        return torch.autocast(place.type, torch.bfloat16 if self.settings.precision == "bfloat16" else torch.float16)


def _synchronize(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)
