"""Which server a client talks to: arguments, environment, config file, or the last `ops up`."""

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from relight.private import make_private


@dataclass(frozen=True)
class Server:
    """`origin` says where the address came from, for messages."""

    url: str
    token: str | None
    origin: str


@dataclass(frozen=True)
class UpState:
    """What the last `ops up` left for clients of the same user."""

    url: str
    token: str
    data_dir: str
    pid: int


class SettingsError(ValueError):
    """A setting cannot be used; the message says which and how to write it."""


def find_server(
    url: str | None = None, token: str | None = None, environ: Mapping[str, str] = os.environ
) -> Server | None:
    """The first of: the arguments and OPS_API_URL, the config file, the last `ops up`. None: no server is known.

    Raises SettingsError for an address that is no http(s) URL and for an unreadable config file.
    """
    url = url or environ.get("OPS_API_URL")
    token = token or environ.get("OPS_API_TOKEN")
    known = [server for server in (_configured(environ), _last_up(environ)) if server is not None]
    if url is None:
        return Server(known[0].url, token or known[0].token, known[0].origin) if known else None
    url = checked_url(url)
    # A stored token goes only to the server that it was stored for.
    stored = next((server.token for server in known if server.url == url), None)
    return Server(url, token or stored, "given by --url or OPS_API_URL")


def checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingsError(f"{url!r} is not a server address; write it like http://127.0.0.1:8470")
    return url.rstrip("/")


def config_path(environ: Mapping[str, str] = os.environ) -> Path:
    return _base(environ, "XDG_CONFIG_HOME", ".config") / "config.toml"


def data_home(environ: Mapping[str, str] = os.environ) -> Path:
    """Where `ops up` keeps its data unless told otherwise."""
    return _base(environ, "XDG_DATA_HOME", ".local/share")


def up_state_path(environ: Mapping[str, str] = os.environ) -> Path:
    return _base(environ, "XDG_STATE_HOME", ".local/state") / "up.json"


def read_up_state(environ: Mapping[str, str] = os.environ) -> UpState | None:
    try:
        return UpState(**json.loads(up_state_path(environ).read_text()))
    except (OSError, ValueError, TypeError):
        return None  # none yet, or another version's: as if there were none


def write_up_state(state: UpState, environ: Mapping[str, str] = os.environ) -> None:
    """Readable by its owner only: it holds the token."""
    path = up_state_path(environ)
    make_private(path.parent)
    new = path.with_name(f".{path.name}.{state.pid}")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(asdict(state), file)
    new.replace(path)


def forget_up_state(pid: int, environ: Mapping[str, str] = os.environ) -> None:
    """Remove the state unless a later `ops up` has written its own."""
    state = read_up_state(environ)
    if state is not None and state.pid == pid:
        up_state_path(environ).unlink(missing_ok=True)


def _configured(environ: Mapping[str, str]) -> Server | None:
    path = config_path(environ)
    try:
        table = tomllib.loads(path.read_text()).get("server", {})
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read: {error}; correct or remove it") from error
    if not isinstance(table, dict) or "url" not in table:
        return None
    return Server(checked_url(str(table["url"])), table.get("token"), f"from {path}")


def _last_up(environ: Mapping[str, str]) -> Server | None:
    state = read_up_state(environ)
    if state is None:
        return None
    return Server(state.url, state.token, f"the last `ops up`, data in {state.data_dir}")


def _base(environ: Mapping[str, str], variable: str, default: str) -> Path:
    base = environ.get(variable) or str(Path(environ.get("HOME") or Path.home()) / default)
    return Path(base) / "relight"
