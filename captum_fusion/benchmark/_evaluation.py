"""Explains pictures and judges the explanations: from pixels to records."""

import base64
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import torch
from captum.attr import Attribution
from torch import Tensor
from torch.nn import Module

from captum_fusion._app.methods import RememberedScoreCam
from captum_fusion._app.names import reason
from captum_fusion._app.options import LOCALIZATION
from captum_fusion._app.settings import Settings
from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.forward_pass import forward_pass
from captum_fusion.attr import LayerFusionCam, LayerScoreCam
from captum_fusion.benchmark._dataset import regions_seen
from captum_fusion.benchmark._plan import STAGES, Plan, PreprocessedImage, Variant, WorkItem, provenance, variants_of
from captum_fusion.benchmark._records import Key, Record
from captum_fusion.functional import adcc
from captum_fusion.metrics import (
    coherency,
    complexity,
    deletion,
    energy_pointing_game,
    insertion,
    instances_reached,
    pointing_game,
    road,
    saliency_map,
)
from captum_fusion.metrics.confidence import drop, increase, probabilities

T = TypeVar("T")
Values = dict[str, list[Any]]

# Large enough to tell maps apart in the report, small enough for a million records.
_THUMBNAIL = (28, 28)
# Integrated Gradients would take the gradients of all its steps at once.
_GRADIENT_ROWS = 16
# What ADCC is made of, and is told with it.
_ADCC = ("confidence_drop", "coherency", "complexity")


@dataclass(frozen=True)
class Batch:
    """Pictures of one model as it sees them, each with the class that is explained."""

    plan: Plan
    items: list[WorkItem]
    seen: list[PreprocessedImage]
    inputs: Tensor
    targets: list[int]
    probabilities: list[float]
    score_cam: RememberedScoreCam
    known: "dict[tuple[Any, ...], Values]"
    """What metrics gave to a map, since methods share stages."""

    def of(self, indices: list[int]) -> "Batch":
        """Some of the pictures."""
        if indices == list(range(len(self.items))):
            return self
        return Batch(
            self.plan,
            [self.items[index] for index in indices],
            [self.seen[index] for index in indices],
            self.inputs[indices],
            [self.targets[index] for index in indices],
            [self.probabilities[index] for index in indices],
            self.score_cam,
            self.known,
        )


class Failure(NamedTuple):
    """A picture that could not be explained, and why."""

    item: WorkItem
    error: str


class Evaluator:
    """Makes the records of pictures.

    Args:
        settings (Settings): What is asked.
        done (Mapping): The records that are there already.
    """

    def __init__(self, settings: Settings, done: Mapping[Key, Record]) -> None:
        self.settings = settings
        self.variants = variants_of(settings)
        self.done = done

    def missing(self, plan: Plan, item: WorkItem, variant: Variant) -> set[str]:
        """The metrics that a picture's records lack."""
        lacking: set[str] = set()
        for part in variant.parts:
            record = self.done.get(plan.key(item, variant, part))
            if record is None or "error" in record:
                return set(self.settings.metrics)
            lacking |= set(self.settings.metrics) - record.keys()
        return lacking

    def pending(self, plan: Plan, item: WorkItem) -> list[Variant]:
        """What is still to be done for a picture."""
        return [variant for variant in self.variants if self.missing(plan, item, variant)]

    def records(
        self, plan: Plan, items: list[WorkItem], loaded: list[PreprocessedImage | str]
    ) -> Iterator[list[Record]]:
        """The records that pictures lack, method by method, as soon as they are known."""
        whole: list[tuple[WorkItem, PreprocessedImage]] = []
        for item, seen in zip(items, loaded, strict=True):
            if isinstance(seen, str):
                yield self._failed(plan, Failure(item, seen))
            else:
                whole.append((item, seen))
        if not whole:
            return
        with plan.layer.view() as layer:
            yield from self._made(plan, layer, whole)

    def _made(
        self, plan: Plan, layer: Module, whole: list[tuple[WorkItem, PreprocessedImage]]
    ) -> Iterator[list[Record]]:
        score_cam = RememberedScoreCam(plan.masked_model, layer, self.settings.tolerance)
        pixels = torch.cat([seen.pixels for _, seen in whole]).to(plan.device, non_blocking=True)
        batch = Batch(
            plan,
            [item for item, _ in whole],
            [seen for _, seen in whole],
            plan.classifier.preprocessing.normalize(pixels),
            [-1] * len(whole),
            [torch.nan] * len(whole),
            score_cam,
            {},
        )
        for part in self._each(batch, self._predict):
            if isinstance(part, Failure):
                yield self._failed(plan, part)
                continue
            for variant in self.variants:
                lacking = [self.missing(plan, item, variant) for item in part.items]
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
                names = ", ".join(item.picture.name for item in batch.items)
                raise RuntimeError(f"{names}: {reason(error)}") from error
            if len(batch.items) == 1:
                return [Failure(batch.items[0], reason(error))]
        return [result for index in range(len(batch.items)) for result in self._each(batch.of([index]), action)]

    def _failed(self, plan: Plan, failure: Failure, variant: Variant | None = None) -> list[Record]:
        """Records of what could not be explained, but for those that say the same already."""
        item, error = failure
        if self.settings.strict:
            raise ValueError(f"{item.picture.name}: {error}")
        records = []
        for pending in self.pending(plan, item) if variant is None else [variant]:
            for part in pending.parts:
                key = plan.key(item, pending, part)
                if self.done.get(key, {}).get("error") != error:
                    records.append(self._base(plan, item, key) | {"error": error})
        return records

    def _predict(self, batch: Batch) -> Batch:
        with self._autocast(batch.plan.device):
            scores = batch.plan.classifier.scores(batch.inputs)
        targets = [
            int(row.argmax()) if not item.classes else max(item.classes, key=row.tolist().__getitem__)
            for item, row in zip(batch.items, scores, strict=True)
        ]
        probabilities = batch.plan.classifier.probabilities(scores)[range(len(targets)), targets].tolist()
        return replace(batch, targets=targets, probabilities=probabilities)

    def _explain(self, batch: Batch, variant: Variant, metrics: set[str]) -> list[Record]:
        plan = batch.plan
        saved = batch.score_cam.saved
        _synchronize(plan.device)
        start = perf_counter()
        maps = self._maps(batch, variant, batch.score_cam, batch.inputs)
        _synchronize(plan.device)
        seconds = (perf_counter() - start + batch.score_cam.saved - saved) / len(batch.items)
        if "adcc" in metrics:
            metrics = metrics | set(_ADCC)
        records: list[Record] = []
        for part, (stage, values) in enumerate(zip(variant.parts, maps, strict=True)):

            def again(inputs: Tensor, target: list[int], part: int = part) -> Tensor:  # noqa: ARG001
                """The same method anew, whose Score-CAM is of other inputs than the one that is remembered."""
                score_cam = LayerScoreCam(plan.masked_model, batch.score_cam.layer, tolerance=self.settings.tolerance)
                return self._maps(batch, variant, score_cam, inputs)[part]

            judged = dict(self._judge(batch, values, metrics))
            if "coherency" in metrics:
                judged["coherency"] = coherency(again, batch.inputs, values, target=batch.targets).tolist()
            if "adcc" in metrics:
                judged["adcc"] = adcc(*(torch.tensor(judged[name]) for name in _ADCC)).tolist()
            thumbnails = (saliency_map(values, _THUMBNAIL) * 255).round().byte().cpu()
            for index, item in enumerate(batch.items):
                seen, target = batch.seen[index], batch.targets[index]
                records.append(
                    self._base(plan, item, plan.key(item, variant, stage))
                    | {"target": target, "category": plan.classifier.category(target)}
                    | {"probability": round(batch.probabilities[index], 5)}
                    | {"frame": [round(side, 3) for side in seen.frame]}
                    | ({"note": seen.note} if seen.note else {})
                    | {name: numbers[index] for name, numbers in judged.items()}
                    | {"map": base64.b64encode(thumbnails[index].numpy().tobytes()).decode(), "seconds": seconds}
                )
        return records

    def _maps(self, batch: Batch, variant: Variant, score_cam: Attribution, inputs: Tensor) -> list[Tensor]:
        """The attributions of a method, and those of its stages."""
        plan = batch.plan
        how = (self.settings.activation, plan.compiled, self.settings.tolerance)
        attribution = variant.method.build(plan.classifier.model, batch.score_cam.layer, {"score-cam": score_cam}, *how)
        options: dict[str, Any] = {} if variant.percentile is None else {"percentile": variant.percentile}
        if isinstance(attribution, LayerFusionCam):
            options |= {"weighting": variant.method.weighting, "return_stages": True}
        if "internal_batch_size" in signature(attribution.attribute).parameters:
            options["internal_batch_size"] = max(_GRADIENT_ROWS, len(inputs))
        with self._autocast(plan.device):
            result: Any = attribution.attribute(inputs, target=batch.targets, **options)
        if not isinstance(attribution, LayerFusionCam):
            return [result]
        attributions, stages = result
        return [attributions, *(getattr(stages, stage) for stage in STAGES)][: len(variant.parts)]

    def _judge(self, batch: Batch, attributions: Tensor, metrics: set[str]) -> Values:
        """What the metrics that need a map alone give to it; a map that is known is not judged again."""
        size = tuple(batch.inputs.shape[2:])
        maps = saliency_map(attributions, size).cpu()
        names = tuple(item.picture.name for item in batch.items)
        key = (names, tuple(batch.targets), tuple(sorted(metrics)), maps.numpy().tobytes())
        if key not in batch.known:
            call = ModelCall(batch.plan.masked_model, batch.inputs, batch.targets, None, self.settings.activation)
            # All metrics share the unmasked pass.
            with self._autocast(batch.plan.device), forward_pass(call):
                masked = self._judge_by_masks(batch, attributions, metrics)
            empty = {"empty": [not row.any().item() for row in maps]}
            batch.known[key] = empty | masked | self._judge_by_place(batch, attributions, metrics)
        return batch.known[key]

    def _judge_by_masks(self, batch: Batch, attributions: Tensor, metrics: set[str]) -> Values:
        what = (batch.plan.masked_model, batch.inputs, attributions)
        how: dict[str, Any] = {"target": batch.targets, "activation": self.settings.activation}
        values: Values = {}
        confidence = {"confidence_drop": drop, "confidence_increase": increase}
        if metrics & confidence.keys():
            both = probabilities(*what, **how)
            values |= {name: metric(*both).tolist() for name, metric in confidence.items() if name in metrics}
        for name, curve in (("insertion", insertion), ("deletion", deletion)):
            if name in metrics:
                area, _, curves = curve(*what, **how, steps=self.settings.steps, return_curve=True)
                values[name] = area.tolist()
                values[f"{name}_curve"] = [[round(p, 5) for p in row] for row in curves.tolist()]
        if "road" in metrics:
            most, least = (road(*what, **how, order=order) for order in ("most", "least"))
            values |= {"road_most": most.tolist(), "road_least": least.tolist(), "road": ((least - most) / 2).tolist()}
        return values

    def _judge_by_place(self, batch: Batch, attributions: Tensor, metrics: set[str]) -> Values:
        size = tuple(batch.inputs.shape[2:])
        values: Values = {}
        if "complexity" in metrics:
            values["complexity"] = complexity(attributions, size).tolist()
        if not metrics & set(LOCALIZATION):
            return values
        regions = [
            regions_seen(batch.plan.instances(item, target), seen.frame, size[0])
            for item, seen, target in zip(batch.items, batch.seen, batch.targets, strict=True)
        ]
        found = {
            "pointing_game": pointing_game(attributions, [region.boxes for region in regions], size),
            "energy_pointing_game": energy_pointing_game(attributions, [region.boxes for region in regions], size),
            "mask_pointing_game": pointing_game(attributions, [region.mask for region in regions], size),
            "mask_energy_pointing_game": energy_pointing_game(attributions, [region.mask for region in regions], size),
            "instances_reached": instances_reached(attributions, [region.singles for region in regions], size),
        }
        values["instances"] = [len(region.singles) for region in regions]
        for name in metrics & found.keys():
            values[name] = [None if share != share else share for share in found[name].tolist()]
        return values

    def _base(self, plan: Plan, item: WorkItem, key: Key) -> Record:
        return key._asdict() | {"file": str(item.picture.file.absolute())} | provenance(self.settings, plan, item)

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.settings.precision == "float32":
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16 if self.settings.precision == "bfloat16" else torch.float16)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
