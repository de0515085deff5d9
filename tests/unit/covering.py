"""Covering arrays: few configurations in which every two values of two dimensions meet."""

import random
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

Pair = frozenset[tuple[str, Any]]
CANDIDATES = 10


def pairs_of(configuration: Mapping[str, Any]) -> set[Pair]:
    return {frozenset(pair) for pair in combinations(configuration.items(), 2)}


def all_pairs(dimensions: Mapping[str, Sequence[Any]]) -> set[Pair]:
    return {
        frozenset([(a, x), (b, y)])
        for a, b in combinations(dimensions, 2)
        for x, y in product(dimensions[a], dimensions[b])
    }


def covering_array(dimensions: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Greedy (AETG, Cohen et al. 1997), the same at every call: each is the best of some candidates, so that the first
    ones cover most."""
    chance, left, chosen = random.Random(0), all_pairs(dimensions), list[dict[str, Any]]()
    while left:
        candidates = [_candidate(dimensions, left, chance) for _ in range(CANDIDATES)]
        chosen.append(max(candidates, key=lambda candidate: len(pairs_of(candidate) & left)))
        left -= pairs_of(chosen[-1])
    return chosen


def _candidate(dimensions: Mapping[str, Sequence[Any]], left: set[Pair], chance: random.Random) -> dict[str, Any]:
    """One that is still missing, and around it, dimension by dimension, the value that meets most of the missing."""
    candidate = dict(chance.choice(sorted(left, key=lambda pair: sorted(map(repr, pair)))))
    for name in chance.sample(list(dimensions), len(dimensions)):
        if name not in candidate:
            values = chance.sample(list(dimensions[name]), len(dimensions[name]))
            candidate[name] = max(
                values, key=lambda v: sum(frozenset([(name, v), other]) in left for other in candidate.items())
            )
    return {name: candidate[name] for name in dimensions}
