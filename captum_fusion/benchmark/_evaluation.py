"""Explains images and evaluates the explanations: from pixels to records."""

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from torchvision.transforms.v2.functional import gaussian_blur

from captum_fusion import LayerFusionCam
from captum_fusion._app.messages import reason
from captum_fusion._app.methods import Method, parse_method
from captum_fusion._app.models.loading import autocast
from captum_fusion._app.settings import LOCALIZATION, Settings
from captum_fusion.benchmark._plan import STAGES, Plan, PreprocessedImage, Variant, WorkItem, provenance, variants_of
from captum_fusion.benchmark._records import CURVES, Key, Record
from captum_fusion.functional import adcc
from captum_fusion.metrics import (
    coherency,
    complexity,
    energy_pointing_game,
    evaluate,
    instances_reached,
    pointing_game,
    saliency_map,
)
from captum_fusion.metrics.evaluate import MASKING_METRICS

T = TypeVar("T")
Values = dict[str, list[Any]]

# Large enough to distinguish maps in the report, small enough for a million records.
_THUMBNAIL = (28, 28)
# Integrated Gradients would take the gradients of all its steps at once.
_GRADIENT_ROWS = 16
# The metrics that ADCC combines; they are recorded with it.
_ADCC = ("confidence_drop", "coherency", "complexity")
# The metrics without a forward pass; arguments: the map, the regions that LOCALIZATION names, the size of the input.
_OF_MAPS: dict[str, Callable[..., Tensor]] = {
    "complexity": complexity,
    "pointing_game": pointing_game,
    "energy_pointing_game": energy_pointing_game,
    "mask_pointing_game": pointing_game,
    "mask_energy_pointing_game": energy_pointing_game,
    "instances_reached": instances_reached,
}
# Xplain-CAM's blur, kernel and sigma, and what it adds to the denominator of the drop.
_PROTOCOL_BLUR, _PROTOCOL_EPSILON = ([51, 51], [50.0, 50.0]), 1e-8
# Recomputed values may differ by this much, on another machine for example.
_TOLERANCE = 1e-2


class Row(NamedTuple):
    """An image and its explained class, which ``_predict`` sets."""

    item: WorkItem
    image: PreprocessedImage
    target: int = -1
    probability: float = torch.nan


@dataclass(frozen=True)
class Batch:
    """Images of one model with the classes that are explained."""

    plan: Plan
    layer: Module
    rows: Sequence[Row]
    inputs: Tensor
    attributions: dict[tuple[str, float | None], tuple[list[Tensor], float]] = field(default_factory=dict)
    """The maps of each method and percentile, which fusions take as well, and the seconds."""
    values: dict[Any, Values] = field(default_factory=dict)
    """The metrics of maps that methods share."""

    @property
    def targets(self) -> list[int]:
        """The classes that are explained."""
        return [row.target for row in self.rows]

    def subset(self, indices: list[int]) -> "Batch":
        """Some of the images, in their order."""
        if len(indices) == len(self.rows):
            return self
        return Batch(self.plan, self.layer, [self.rows[index] for index in indices], self.inputs[indices])


Failure = tuple[WorkItem, str]
"""An image that could not be explained, and the reason."""


class Evaluator:
    """Makes the missing records of images; ``done`` are those of earlier runs."""

    def __init__(self, settings: Settings, done: Mapping[Key, Record]) -> None:
        self.settings = settings
        self.variants = variants_of(settings)
        self.done = done

    def missing(self, plan: Plan, item: WorkItem, variant: Variant) -> set[str]:
        """The metrics that an image's records lack."""
        metrics: set[str] = set()
        for part in variant.parts:
            record = self.done.get(plan.key(item, variant, part))
            if record is None or "error" in record:
                return set(self.settings.metrics)
            metrics |= set(self.settings.metrics) - record.keys()
        return metrics

    def pending(self, plan: Plan, item: WorkItem) -> list[Variant]:
        """The variants whose records an image lacks."""
        return [variant for variant in self.variants if self.missing(plan, item, variant)]

    def records(
        self, plan: Plan, items: Sequence[WorkItem], loaded: Sequence[PreprocessedImage | str]
    ) -> Iterator[list[Record]]:
        """The missing records of images, method by method, as soon as they are computed."""
        readable = []
        for item, image in zip(items, loaded, strict=True):
            if isinstance(image, str):
                yield self._errors(plan, (item, image))
            else:
                readable.append(Row(item, image))
        if not readable:
            return
        with plan.layer.view() as layer:
            for part in self._each(_batch(plan, layer, readable), self._predict):
                if isinstance(part, tuple):
                    yield self._errors(plan, part)
                    continue
                for variant in self.variants:
                    missing = [self.missing(plan, row.item, variant) for row in part.rows]
                    metrics = set().union(*missing)
                    if metrics:
                        lacking = part.subset([index for index, names in enumerate(missing) if names])
                        for result in self._each(lacking, partial(self._explain, variant=variant, metrics=metrics)):
                            failed = isinstance(result, tuple)
                            yield self._errors(plan, result, variant) if failed else result  # type: ignore[misc,arg-type]

    def check_unchanged(self, plan: Plan) -> None:
        """Recomputes one record of a model that the user's code builds, which may have changed.

        Raises:
            ValueError: If the values differ.
        """
        if ":" not in plan.classifier.name or plan.classifier.name.startswith(("timm:", "hf:")):
            return
        items = {plan.key(item, self.variants[0], None).item: item for item in plan.items}
        for key, done in self.done.items():
            if key.item not in items or key.stage or "error" in done:
                continue
            (image,) = next(plan.load([[items[key.item]]]))
            if isinstance(image, str):
                continue
            metrics = set(self.settings.metrics) & done.keys()
            with plan.layer.view() as layer:
                batch = self._predict(_batch(plan, layer, [Row(items[key.item], image)]))
                (again,) = self._explain(batch, Variant(parse_method(key.method), key.percentile, ()), metrics)
            for name in ("target", "probability", *metrics):
                old, new = (dict(record)[name] for record in (done, again))
                if abs((old or 0) - (new or 0)) > _TOLERANCE:  # type: ignore[operator]
                    raise ValueError(
                        f"The code of {plan.classifier.name} has changed: {name} of {key.image} by {key.method} was "
                        f"{old} and is {new} now; expected the same value, or another output folder"
                    )
            return

    def _each(self, batch: Batch, action: Callable[[Batch], T]) -> "list[T | Failure]":
        """The result of an action for a batch; where it fails, those for each image alone."""
        try:
            return [action(batch)]
        except Exception as error:
            if self.settings.strict:
                names = ", ".join(row.item.image.name for row in batch.rows)
                raise RuntimeError(f"{names}: {reason(error)}") from error
            if len(batch.rows) == 1:
                return [(batch.rows[0].item, reason(error))]
        return [result for index in range(len(batch.rows)) for result in self._each(batch.subset([index]), action)]

    def _errors(self, plan: Plan, failure: Failure, variant: Variant | None = None) -> list[Record]:
        """The records of a failure, but for those that are there already."""
        item, error = failure
        if self.settings.strict:
            raise ValueError(f"{item.image.name}: {error}")
        return [
            {**self._base(plan, item, pending, part), "error": error}
            for pending in (self.pending(plan, item) if variant is None else [variant])
            for part in pending.parts
            if self.done.get(plan.key(item, pending, part), {}).get("error") != error
        ]

    def _predict(self, batch: Batch) -> Batch:
        """The batch with its targets and their probabilities."""
        classifier = batch.plan.classifier
        with autocast(batch.plan.device, self.settings.precision):
            scores = classifier.scores(batch.inputs)
        targets = [
            max(row.item.classes, key=values.tolist().__getitem__) if row.item.classes else int(values.argmax())
            for row, values in zip(batch.rows, scores, strict=True)
        ]
        probabilities = classifier.probabilities(scores)[range(len(targets)), targets].tolist()
        predicted = zip(batch.rows, targets, probabilities, strict=True)
        return replace(batch, rows=[row._replace(target=t, probability=p) for row, t, p in predicted])

    def _explain(self, batch: Batch, variant: Variant, metrics: set[str]) -> list[Record]:
        maps, seconds = self._timed(batch, variant.method, variant.percentile)
        records: list[Record] = []
        for index, (stage, attributions) in enumerate(zip(variant.parts, maps, strict=False)):
            key = (*variant.map_id(stage), frozenset(metrics))
            if key not in batch.values:
                batch.values[key] = self._evaluate(batch, variant, attributions, index, metrics)
            thumbnails = (saliency_map(attributions, _THUMBNAIL) * 255).round().byte().cpu()
            for position, row in enumerate(batch.rows):
                record: Any = {
                    **self._base(batch.plan, row.item, variant, stage),
                    "target": row.target,
                    "category": batch.plan.classifier.category(row.target),
                    "probability": round(row.probability, 5),
                    "frame": [round(side, 3) for side in row.image.frame],
                    **({"note": row.image.note} if row.image.note else {}),
                    **{name: values[position] for name, values in batch.values[key].items()},
                    "map": base64.b64encode(thumbnails[position].numpy().tobytes()).decode(),
                    "seconds": seconds / len(batch.rows),
                }
                records.append(record)
        return records

    def _timed(self, batch: Batch, method: Method, percentile: float | None = None) -> tuple[list[Tensor], float]:
        """The maps of a method, and the seconds that it took with all components, computed once for the batch."""
        key = method.name, percentile
        if key not in batch.attributions:
            components = [self._timed(batch, parse_method(name)) for name in method.parts]
            _synchronize(batch.plan.device)
            start = perf_counter()
            maps = self._attribute(batch, method, percentile, batch.inputs, [maps[0] for maps, _ in components])
            _synchronize(batch.plan.device)
            seconds = perf_counter() - start + sum(seconds for _, seconds in components)
            batch.attributions[key] = maps, seconds
        return batch.attributions[key]

    def _attribute(
        self,
        batch: Batch,
        method: Method,
        percentile: float | None,
        inputs: Tensor,
        components: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """The map of a method and its stages; components that are not given are computed."""
        plan = batch.plan
        compiled = None if plan.masked_model is plan.classifier.model else plan.masked_model
        how = (plan.classifier.activation, compiled, self.settings.tolerance)
        attribution = method.build(plan.classifier.model, batch.layer, *how)
        options: dict[str, Any] = dict(zip(method.part_arguments, components, strict=False))
        if percentile is not None:
            options["percentile"] = percentile
        if isinstance(attribution, LayerFusionCam):
            options |= {"weighting": method.weighting, "return_stages": True}
        if "internal_batch_size" in signature(attribution.attribute).parameters:
            options["internal_batch_size"] = max(_GRADIENT_ROWS, len(inputs))
        with autocast(plan.device, self.settings.precision):
            result: Any = attribution.attribute(inputs, target=batch.targets, **options)
        if not isinstance(attribution, LayerFusionCam):
            return [result]
        return [result[0], *(getattr(result[1], stage) for stage in STAGES)]

    def _evaluate(self, batch: Batch, variant: Variant, attributions: Tensor, index: int, metrics: set[str]) -> Values:
        """The metrics of one map of each image; ``index`` is its position among the method's maps."""
        if "adcc" in metrics:
            metrics = metrics | set(_ADCC)
        plan, size = batch.plan, tuple(batch.inputs.shape[2:])
        values: Values = {"empty": (~saliency_map(attributions, size).flatten(1).any(dim=1)).tolist()}
        masking: Any = [name for name in MASKING_METRICS if name in metrics]
        if masking:
            how: dict[str, Any] = {"activation": plan.classifier.activation, "steps": self.settings.steps}
            how["target"] = batch.targets
            shared = [name for name in masking if name != "insertion"] if self.settings.protocol else masking
            masked, results = (plan.masked_model, batch.inputs, attributions), {}
            with autocast(plan.device, self.settings.precision):
                if shared:
                    results = evaluate(*masked, shared, **how)
                if shared != masking:
                    blurred = gaussian_blur(batch.inputs, *_PROTOCOL_BLUR)
                    results |= evaluate(*masked, ["insertion"], baselines=blurred, **how)
            if self.settings.protocol and "confidence_drop" in results:
                whole = torch.tensor([row.probability for row in batch.rows])
                results["confidence_drop"] = results["confidence_drop"].cpu() * whole / (whole + _PROTOCOL_EPSILON)
            values |= {name: result.tolist() for name, result in results.items() if name not in CURVES}
            values |= {
                name: [[round(p, 5) for p in row] for row in results[name].tolist()]
                for name in CURVES
                if name in results
            }
        regions = []
        if metrics & LOCALIZATION.keys():
            for row in batch.rows:
                assert row.image.placement is not None
                regions.append(row.image.placement.regions(plan.instances(row.item, row.target)))
            values["instances"] = [len(region.instances) for region in regions]
        for name in metrics & _OF_MAPS.keys():
            needs = [[getattr(region, LOCALIZATION[name]) for region in regions]] if name in LOCALIZATION else []
            # No region, no value.
            values[name] = [v if v == v else None for v in _OF_MAPS[name](attributions, *needs, size).tolist()]
        if "coherency" in metrics:

            def again(inputs: Tensor, target: list[int]) -> Tensor:  # noqa: ARG001
                return self._attribute(batch, variant.method, variant.percentile, inputs)[index]

            values["coherency"] = coherency(again, batch.inputs, attributions, target=batch.targets).tolist()
        if "adcc" in metrics:
            values["adcc"] = adcc(*(torch.tensor(values[name]) for name in _ADCC)).tolist()
        return values

    def _base(self, plan: Plan, item: WorkItem, variant: Variant, part: str | None) -> Record:
        """The key and the provenance of a record."""
        key: Any = plan.key(item, variant, part)._asdict() | {"file": str(item.image.file.absolute())}
        record: Record = key | provenance(self.settings, plan, item, variant.method)
        return record


def _batch(plan: Plan, layer: Module, rows: Sequence[Row]) -> Batch:
    """The batch of some images, whose targets are still to be predicted."""
    pixels = torch.cat([row.image.pixels for row in rows]).to(plan.device, non_blocking=True)
    return Batch(plan, layer, rows, plan.classifier.preprocessing.normalize(pixels))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
