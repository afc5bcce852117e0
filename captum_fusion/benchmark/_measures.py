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
    "road_most": Measure("road_most", 1, False, "RM"),
    "road_least": Measure("road_least", 1, True, "RL"),
    "road": Measure("road", 1, True, "ROAD"),
    "coherency": Measure("coherency", 100, True, "Coh"),
    "complexity": Measure("complexity", 100, False, "Com"),
    "adcc": Measure("adcc", 100, True, "ADCC"),
    "pointing_game": Measure("pointing_game", 100, True, "PG"),
    "energy_pointing_game": Measure("energy_pointing_game", 100, True, "EPG"),
    "mask_pointing_game": Measure("mask_pointing_game", 100, True, "MPG"),
    "mask_energy_pointing_game": Measure("mask_energy_pointing_game", 100, True, "MEPG"),
    "instances_reached": Measure("instances_reached", 100, True, "IR"),
}
