"""The metrics of the class activation map papers, in the form of Captum's metrics."""

from captum_fusion._engine.saliency import saliency_map
from captum_fusion.metrics.coherency import adcc, arcc, coherency, complexity
from captum_fusion.metrics.confidence import confidence_drop, confidence_increase
from captum_fusion.metrics.curves import deletion, insertion
from captum_fusion.metrics.evaluate import evaluate
from captum_fusion.metrics.localization import energy_pointing_game, instances_reached, pointing_game
from captum_fusion.metrics.means import DatasetMeans, Mean
from captum_fusion.metrics.randomization import weight_randomization
from captum_fusion.metrics.regions import instances, region_masks
from captum_fusion.metrics.road import road

__all__ = [
    "DatasetMeans",
    "Mean",
    "adcc",
    "arcc",
    "coherency",
    "complexity",
    "confidence_drop",
    "confidence_increase",
    "deletion",
    "energy_pointing_game",
    "evaluate",
    "insertion",
    "instances",
    "instances_reached",
    "pointing_game",
    "region_masks",
    "road",
    "saliency_map",
    "weight_randomization",
]
