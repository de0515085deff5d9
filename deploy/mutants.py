"""Runs mutmut in the directory of a part (mutants.sh), without changes of a string's case, and of a sample at wish."""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from mutmut import __main__ as mutmut
from mutmut.mutation import mutators
from mutmut.stats import status_by_exit_code

SEED = 0
# What they make is a constant when a change takes place: guards in SQL are tests/integration/test_store_machine.py's.
AT_IMPORT = ("placement.x_runs", "placement.x_suits", "placement.x_room", "transitions.x_cancelling")
NOTICED = ("killed", "timeout", "segfault", "suspicious")

parser = argparse.ArgumentParser()
parser.add_argument("names", nargs="*")
parser.add_argument("--sample", type=int)
parser.add_argument("--jobs", type=int, default=1)
asked = parser.parse_args()
collect, strings = mutmut.collect_source_file_mutation_data, mutators.operator_string
drawn: list[Any] = []


def other_strings(node: Any) -> Iterator[Any]:
    """SQL in another case is equal in effect, and what is only a key is tried by XX…XX too."""
    return (changed for changed in strings(node) if changed.value.lower() != node.value.lower())


def sampled(*, mutant_names: Any) -> tuple[Any, Any]:
    """Each change draws its own number, so that the sample stays what it is when other functions change.

    What no test noticed before is tried again: there may be new ones.
    """
    mutmut._reset_mutant_results(lambda name, exit_code: status_by_exit_code[exit_code] not in NOTICED)
    changes, files = collect(mutant_names=mutant_names)
    changes = [change for change in changes if not change[1].split("__mutmut")[0].endswith(AT_IMPORT)]
    drawn[:] = sorted(changes, key=lambda change: random.Random(f"{SEED} {change[1]}").random())[: asked.sample]
    print(f"{len(drawn)} of {len(changes)} changes, by seed {SEED}")
    return drawn, files


sys.setrecursionlimit(3000)  # every function is called through another one
mutators.mutation_operators[:] = [
    (node, other_strings if operator is strings else operator) for node, operator in mutators.mutation_operators
]
mutmut.collect_source_file_mutation_data = sampled
mutmut._run(asked.names, asked.jobs)

tried = {name: status_by_exit_code[file.exit_code_by_key[name]] for file, name, _ in drawn}
noticed = sum(Counter(tried.values())[status] for status in NOTICED)
for name, status in tried.items():
    if status not in NOTICED:
        print(f"{name}: {status}")
print(f"tried {len(tried)}, noticed {noticed}, unnoticed {len(tried) - noticed}, score {noticed / len(tried):.0%}")
