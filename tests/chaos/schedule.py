"""Which faults, when, on whom and for how long: a pure function of the seed."""

import random
from dataclasses import dataclass

SPACING_S = 1.1

# How often a kind is in a deck, and how long it lasts, in seconds. The lease of the machine is 4 s: half of what stops
# or is away comes back before it has run out. Every deck is dealt to its end, so each kind comes in each.
DECK: dict[str, tuple[int, tuple[float, float]]] = {
    "kill_trainer": (3, (0, 0)),
    "stop_trainer": (1, (0.5, 6)),
    "kill_agent": (1, (0, 2)),
    "stop_agent": (1, (0.3, 1.5)),
    "stop_agent_past_its_lease": (1, (6, 9)),
    "kill_api": (1, (0, 2)),
    "stop_api": (1, (0.3, 1.5)),
    "stop_api_past_the_lease": (1, (5, 8)),
    "restart_postgres": (1, (0, 2)),
    "cut_connections": (1, (0, 0)),
    "fill_disk": (1, (0.5, 3)),
    "truncate_checkpoint": (1, (0, 0)),
    "flip_a_bit": (1, (0, 0)),
    "remove_a_file": (1, (0, 0)),
    "remove_a_checkpoint": (1, (0, 0)),
    "cut_off_agent": (1, (0.5, 8)),
    "lose_answers": (2, (0.5, 1.5)),
    "lose_requests": (1, (0.5, 1.5)),
    "duplicate": (1, (1, 3)),
    "delay": (1, (1, 3)),
    "repeat_late": (1, (1, 3)),
    "step_clock_of_api": (1, (1, 5)),
    "step_clock_of_agent": (1, (1, 5)),
}


@dataclass(frozen=True)
class Fault:
    """At `at_s` after the start. `pick` in [0, 1) chooses the victim among those that there are at that moment."""

    at_s: float
    kind: str
    duration_s: float
    pick: float

    def __str__(self) -> str:
        return f"{self.at_s:7.1f} s  {self.kind} for {self.duration_s:.1f} s ({self.pick:.3f})"


def schedule(seed: int, faults: int) -> list[Fault]:
    """In order of time, `SPACING_S` apart on average."""
    chance = random.Random(seed)
    kinds = [kind for kind, (number, _) in DECK.items() for _ in range(number)]
    found: list[Fault] = []
    at_s, deck = 0.0, []
    while len(found) < faults:
        deck = deck or chance.sample(kinds, len(kinds))
        kind = deck.pop()
        at_s += chance.uniform(0.2, 2 * SPACING_S - 0.2)
        found.append(Fault(round(at_s, 2), kind, round(chance.uniform(*DECK[kind][1]), 2), chance.random()))
    return found
