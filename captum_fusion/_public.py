"""The public names of the package."""

from captum_fusion import attr
from captum_fusion._engine.feature_map import FeatureMap, feature_maps, last_feature_map
from captum_fusion._engine.progress import Progress, Stopped, progress_to, tell
from captum_fusion._engine.spatial_view import layer_run, spatial_view
from captum_fusion.attr import *  # noqa: F403

__all__ = [
    "FeatureMap",
    "Progress",
    "Stopped",
    "feature_maps",
    "last_feature_map",
    "layer_run",
    "progress_to",
    "spatial_view",
    "tell",
]
__all__ += attr.__all__
