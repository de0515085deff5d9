"""The API with one guard taken out of one statement of its store: what RELIGHT_MUTANT says, as JSON."""

import importlib
import json
import os
import sys

from ops_backend.__main__ import main
from ops_backend.store.sql import statement


def remove_guard(module_name: str, name: str, guard: str, instead: str) -> None:
    module = importlib.import_module(module_name)
    sql = getattr(module, name).text
    assert guard in sql, f"the guard moved: {guard}"
    setattr(module, name, statement(sql.replace(guard, instead)))


if __name__ == "__main__":
    remove_guard(*json.loads(os.environ["RELIGHT_MUTANT"]))
    sys.exit(main())
