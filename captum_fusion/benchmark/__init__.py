"""Evaluates methods by metrics over many images, in one process or under torchrun."""

from captum_fusion._app.settings import Settings
from captum_fusion.benchmark._report import report
from captum_fusion.benchmark._run import NothingExplainedError, run

__all__ = ["NothingExplainedError", "Settings", "report", "run"]
