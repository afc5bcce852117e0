"""What a report tells of the metrics."""

from typing import NamedTuple


class Measure(NamedTuple):
    """A measure: its entry in the records, the factor that papers report it with, whether more is better."""

    column: str
    scale: float
    higher: bool
    short: str
    """Its name where there is no room for the whole one."""


MEASURES = {
    "average_drop": Measure("confidence_drop", 100, False, "AD"),
    "average_increase": Measure("confidence_increase", 100, True, "AI"),
    "insertion": Measure("insertion", 1, True, "Ins"),
    "deletion": Measure("deletion", 1, False, "Del"),
    "overall": Measure("overall", 1, True, "All"),
    "pointing_game": Measure("pointing_game", 100, True, "PG"),
    "energy_pointing_game": Measure("energy_pointing_game", 100, True, "EPG"),
}
