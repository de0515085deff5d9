"""A workload class by its import path, and what can be said of it before anything is built. No torch of its own."""

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, TypeGuard

from pydantic import BaseModel, ValidationError

from ops_contract.problems import Problem, problems_of
from relight.training.faults import TrainingFault
from relight.workload import AnyWorkload, LoopWorkload, Workload

_MAX_SAID_CHARS = 1_000


def import_workload(path: str) -> AnyWorkload:
    """`module:Class`, nested attributes too. Raises a permanent TrainingFault `import_failed` that says what to do."""
    module, found = _found(path, _offered)
    if not _is_workload(found):
        raise _failed(f"{path} is not a subclass of relight.Workload or relight.LoopWorkload; {_offered(module)}")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise _failed(f"{path} does not define {', '.join(missing)}()")
    config = getattr(found, "Config", None)
    if not (inspect.isclass(config) and issubclass(config, BaseModel)):
        raise _failed(f"{path} needs a class attribute Config, a pydantic BaseModel with its settings")
    return found


def imported(path: str) -> Any:
    """What a `module:attr` names. Raises as `import_workload` does."""
    if ":" not in path:
        raise _failed(f"{path}: write module:attr, the name of a module and of what it has")
    return _found(path, lambda module: "is it spelled so?")[1]


def config_problems(workload_type: AnyWorkload, config: dict[str, Any]) -> list[Problem]:
    """What its Config refuses, cross-field rules included."""
    try:
        workload_type.Config.model_validate(config)
    except ValidationError as error:
        found = problems_of(error, workload_type.Config, "config.")
        return [Problem(field=field, problem=problem) for field, problem in found]
    return []


def with_defaults(workload_type: AnyWorkload, config: dict[str, Any]) -> dict[str, Any]:
    """A config that it accepts, as it was given, and the defaults of what was not."""
    whole = workload_type.Config.model_validate(config).model_dump(mode="json", by_alias=True)
    return {**whole, **config}


def checks_by_code(config_type: type[BaseModel]) -> bool:
    """Whether it has validators of its own, or types with some, that its JSON Schema cannot say."""
    return _has_function(config_type.__pydantic_core_schema__)


def _found(path: str, offered: Callable[[ModuleType], str]) -> tuple[ModuleType, Any]:
    name, _, attributes = path.partition(":")
    module = _module(name, path)
    found: Any = module
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise _failed(f"{path}: {_place(module)} has no {attribute!r}; {offered(module)}")
        found = getattr(found, attribute)
    return module, found


def _module(name: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except BaseException as error:  # a module may call sys.exit
        if isinstance(error, KeyboardInterrupt):
            raise
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise _failed(
                f"{path}: there is no module {error.name!r} in {Path.cwd()} (where the job's code runs), nor installed "
                f"for {sys.executable}; submit it with its code, or install it there"
            ) from error
        said = f"{type(error).__name__}: {error}"[:_MAX_SAID_CHARS]
        trace = _users(error.__traceback__)
        text = "".join(traceback.format_exception(type(error), error, trace))
        raise _failed(f"{path} does not import: {said}{_where(error, trace)}", text) from error


def _users(trace: TracebackType | None) -> TracebackType | None:
    """Without the frames of importing, ours and Python's, that lead to the user's file."""
    while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, importlib.__file__, *_FROZEN):
        trace = trace.tb_next
    return trace


_FROZEN = ("<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>")


def _where(error: BaseException, trace: TracebackType | None) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    places = [frame for frame in traceback.extract_tb(trace) if frame.filename not in _FROZEN]
    return f" ({places[0].filename}:{places[0].lineno})" if places else ""


def _place(module: ModuleType) -> str:
    """The module and its file; a file of the user that an installed module hides is said."""
    loaded = getattr(module, "__file__", None)
    place = f"module {module.__name__} ({loaded or 'built in'})"
    own = Path.cwd() / f"{module.__name__.replace('.', '/')}.py"
    if own.is_file() and (loaded is None or not own.samefile(loaded)):
        return f"{place}, which hides {own.name} of the working directory (rename that),"
    return place


def _offered(module: ModuleType) -> str:
    given = (Workload, LoopWorkload)
    names = [name for name, value in vars(module).items() if _is_workload(value) and value not in given]
    return f"its workloads are: {', '.join(sorted(names))}" if names else "it has no workload"


def _is_workload(value: object) -> TypeGuard[AnyWorkload]:
    return inspect.isclass(value) and issubclass(value, (Workload, LoopWorkload))


def _has_function(schema: object) -> bool:
    if isinstance(schema, dict):
        own = str(schema.get("type", "")).startswith("function-") or schema.get("post_init")
        return bool(own) or any(_has_function(value) for key, value in schema.items() if key != "serialization")
    return isinstance(schema, list | tuple) and any(map(_has_function, schema))


def _failed(message: str, trace: str = "") -> TrainingFault:
    return TrainingFault("import_failed", message, permanent=True, traceback=trace)
