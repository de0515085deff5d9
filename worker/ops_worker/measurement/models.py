"""A measurement's model: found, read and built by transformers, and nothing of it executed that is not transformers'.

transformers is imported in here when it is wanted: it takes seconds, and is not part of every installation.
"""

import difflib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ops_contract.measurements import RandomModel

# Of these transformers takes the first that there is. Pickled weights could run code, and are not read.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Of a config what says something else than the architecture: `precision` is the dtype.
NOT_CONFIGURED = {"model_type", "transformers_version", "_name_or_path", "dtype", "architectures"}
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id")


class Unusable(Exception):
    """What keeps the model from being measured, and what to do about it."""


def quiet() -> None:
    """Into a trainer's output go its own lines, no bars that redraw themselves; and nothing out of what is here."""
    import transformers
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    constants.HF_HUB_DISABLE_TELEMETRY = True  # else it asks the hub for a list of agents, whatever is in the cache
    disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def read_config(model: str | RandomModel) -> Any:
    """The config as transformers has it; raises Unusable."""
    config = _random_config(model) if isinstance(model, RandomModel) else _stored_config(model)
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Unusable(f"{config.model_type} is no model of transformers that continues text: choose another")
    if getattr(config, "quantization_config", None):
        raise Unusable("its weights are quantised, which `precision` does not describe: give one with plain weights")
    return config


def _random_config(model: RandomModel) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    if model.model_type not in CONFIG_MAPPING:
        raise Unusable(
            f"transformers knows no model_type {model.model_type}{_nearest(model.model_type, CONFIG_MAPPING)}"
        )
    kind = CONFIG_MAPPING[model.model_type]
    known = {*kind().to_dict(), *kind.attribute_map} - NOT_CONFIGURED
    if unknown := sorted(set(model.config) - known):
        names = ", ".join(f"{name}{_nearest(name, known)}" for name in unknown)
        raise Unusable(f"the config of a {model.model_type} has no {names}")
    try:
        return AutoConfig.for_model(model.model_type, **model.config)
    except Exception as error:  # what a config refuses, it refuses in every way there is
        raise Unusable(f"the config of a {model.model_type} is refused: {_one_line(error)}") from error


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (there is {close[0]})" if close else ""


def _stored_config(model: str) -> Any:
    if not _directory(model) and not HUB_NAME.fullmatch(model):
        raise Unusable(f"{model} is no directory on this worker, and no name on Hugging Face either")
    if (directory := _directory(model)) and not (directory / "config.json").is_file():
        raise Unusable(f"{directory} has no config.json: save the model there with save_pretrained")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(_place(model), **_trusting_nothing(model, "config.json"))
    except OSError as error:
        raise Unusable(_unreachable(model)) from error
    except Exception as error:
        raise Unusable(f"the config of {model} is refused: {_one_line(error)}") from error


def _directory(model: str) -> Path | None:
    path = Path(model).expanduser()
    return path if path.is_dir() else None


def _place(model: str) -> str:
    return str(_directory(model) or model)


def _trusting_nothing(model: str, *files: str) -> dict[str, Any]:
    """No code of the model's, and of files that are here no question whether the hub has newer ones."""
    return {"trust_remote_code": False, "local_files_only": all(_here(model, name) for name in files)}


def _unreachable(model: str) -> str:
    if _offline():
        return f"{model} is not whole in the local cache, and HF_HUB_OFFLINE is set: unset it, or `hf download {model}`"
    return (
        f"{model} is not in the local cache, and Hugging Face does not give it: see that the name is right, that this "
        f"worker has a network, and HF_TOKEN where it is gated; or `hf download {model}`"
    )


def find_weights(model: str) -> None:
    """Raises Unusable unless there are safetensors, all of them."""
    if not any(_reachable(model, name) for name in WEIGHTS):
        if not _directory(model) and _offline():
            raise Unusable(_unreachable(model))
        raise Unusable(f"{model} has no safetensors, and pickled weights are not read: save it with save_pretrained")
    if missing := [name for name in _weight_files(model) if not _reachable(model, name)]:
        raise Unusable(f"{model} lacks {', '.join(missing)} of its weights: fetch it again")


def _weight_files(model: str) -> list[str]:
    """All that is to be loaded, as far as it is known here."""
    whole, index = WEIGHTS
    listed = None if _here(model, whole) else _here(model, index)
    return [index, *sorted(set(json.loads(listed.read_text())["weight_map"].values()))] if listed else [whole]


def _reachable(model: str, name: str) -> bool:
    if _here(model, name) or _directory(model):
        return _here(model, name) is not None
    if _offline():
        return False
    from huggingface_hub import file_exists

    try:
        return bool(file_exists(model, name))
    except Exception as error:  # the hub's own, and those of the connection
        raise Unusable(_unreachable(model)) from error


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _here(model: str, name: str) -> Path | None:
    if directory := _directory(model):
        return directory / name if (directory / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, name)
    return Path(cached) if isinstance(cached, str) else None


def revision(model: str | RandomModel) -> str | None:
    """The commit of what a hub's name stood for here; null: it is no such name, or not fetched yet."""
    if isinstance(model, RandomModel) or _directory(model):
        return None
    cached = _here(model, "config.json")
    return cached.parent.name if cached else None


def read_tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(_place(model), **_trusting_nothing(model, "tokenizer_config.json"))
    except Exception as error:
        raise Unusable(f"{model} has no tokenizer that can be read: {_one_line(error)}") from error


def sketch(config: Any, attention: str) -> Any:
    """The model without weights, which says whether it can be built, and how large it is; raises Unusable."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, attn_implementation=attention, trust_remote_code=False)
    except Exception as error:
        raise Unusable(f"the model cannot be built with {attention} attention: {_one_line(error)}") from error


def build(model: str | RandomModel, config: Any, precision: str, attention: str) -> Any:
    """With its weights, in the memory of the host."""
    from transformers import AutoModelForCausalLM

    given = {"dtype": getattr(torch, precision), "attn_implementation": attention}
    if isinstance(model, RandomModel):
        with _seeded(model.seed):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **given).eval()
    given |= _trusting_nothing(model, *_weight_files(model))
    built, found = AutoModelForCausalLM.from_pretrained(
        _place(model), config=config, use_safetensors=True, output_loading_info=True, **given
    )
    if found["missing_keys"]:
        raise Unusable(f"{model} has no weights for {', '.join(sorted(found['missing_keys']))}")
    return built.eval()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """For what draws on the CPU, and without a trace in the generators of the process."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def special_tokens(config: Any, tokenizer: Any | None) -> set[int]:
    """Those that no text becomes, as far as anyone says which they are."""
    named = [getattr(config.get_text_config(), name, None) for name in SPECIAL]
    found = {token for name in named for token in (name if isinstance(name, list) else [name]) if token is not None}
    return found | set(tokenizer.all_special_ids if tokenizer else ())


def positions(config: Any) -> int | None:
    """The most tokens of a sequence; null: the model has no such limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _one_line(error: Exception) -> str:
    """transformers lists all that it knows, over pages."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + " …"
