from dataclasses import dataclass


@dataclass
class Plan:
    tile: tuple
    carries: str
def choose(graph, budget, tile, training, carries):
    return Plan(tile or (512,512), "device" if carries=="auto" else carries)
