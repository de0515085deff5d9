"""Settings from `OPS_*` variables: `lease_s` of a model is `OPS_LEASE_S`."""

from collections.abc import Mapping

from pydantic import BaseModel, ValidationError

from ops_contract.problems import in_words


def given(settings: type[BaseModel], environ: Mapping[str, str]) -> dict[str, str]:
    """By field; a variable that is empty is not given."""
    return {name: value for name in settings.model_fields if (value := environ.get(_variable(name)))}


def problems(error: ValidationError, settings: type[BaseModel]) -> str:
    """Every variable that is missing or wrong, with what it is for."""
    found = []
    for each in error.errors(include_url=False, include_input=False, include_context=False):
        name, problem = next(map(str, each["loc"]), None), in_words(each)
        found.append(f"{_variable(name)}: {problem} ({settings.model_fields[name].description})" if name else problem)
    return "; ".join(found)


def _variable(name: str) -> str:
    return f"OPS_{name.upper()}"
