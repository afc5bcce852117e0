"""The metrics of the class activation map papers, in the form of Captum's."""

from captum_fusion._maps import saliency_map
from captum_fusion.metrics.confidence import confidence_drop, confidence_increase
from captum_fusion.metrics.curves import deletion, insertion
from captum_fusion.metrics.localization import energy_pointing_game, pointing_game
from captum_fusion.metrics.means import DatasetMeans, Mean

__all__ = [
    "DatasetMeans",
    "Mean",
    "confidence_drop",
    "confidence_increase",
    "deletion",
    "energy_pointing_game",
    "insertion",
    "pointing_game",
    "saliency_map",
]
