"""Methods judged by metrics over many pictures, in one process or under torchrun."""

from captum_fusion.benchmark._report import report
from captum_fusion.benchmark._run import run

__all__ = ["report", "run"]
