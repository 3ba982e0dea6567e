"""Every setting of the service: nearfar.toml, over it the environment (`NEARFAR_*`), over both the command line."""

from __future__ import annotations

import difflib
import os
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ByteSize, Field, StringConstraints, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from comparisons.egress import is_loopback_host
from models.errors import InvalidValue
from models.execution import ExecutionProvider
from models.openvino_vision import VisionBackend
from models.reduction import Reduction
from models.request import Policy
from serving.energy import Electricity, Hardware
from serving.keys import ApiKey, digest, secret
from serving.routes.declared import RouteRow

Source = PydanticBaseSettingsSource
FILE = Path("nearfar.toml")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
PlainKey = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Usd = Annotated[float, Field(ge=0, allow_inf_nan=False)]
SECRETS = ("api_keys", "database")  # these may also lie in a file that NEARFAR_<NAME>_FILE names
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_PASSWORD = re.compile(r"//[^/\s]*@")


class Shown(NamedTuple):
    """A setting and where it comes from."""

    value: Any
    origin: Literal["environment", "file", "default"]


def user_data_dir() -> Path:
    """Where a program keeps its user's data: the XDG base directory, on macOS Application Support."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "nearfar"
    named = os.environ.get("XDG_DATA_HOME", "")
    # A relative path there is invalid and to be ignored, says the specification.
    return (Path(named) if Path(named).is_absolute() else Path.home() / ".local" / "share") / "nearfar"


def settings_file(named: Path | str | None = None) -> Path | None:
    """The file that is read: the one named, in NEARFAR_CONFIG else, or nearfar.toml where one is at hand."""
    named = named or os.environ.get("NEARFAR_CONFIG")
    if named:
        return Path(named)
    return FILE if FILE.is_file() else None


def _read(file: Path) -> dict[str, Any]:
    """Raises InvalidValue in one line, without what stands in the file."""
    try:
        values = tomllib.loads(file.read_text())
    except OSError as error:
        raise InvalidValue(f"{file}: {error.strerror}") from error
    except ValueError as error:  # TOML's and UTF-8's errors
        raise InvalidValue(f"{file} is not TOML: {str(error).splitlines()[0]}") from error
    check_names(values, str(file))
    return values


def check_names(values: Iterable[str], place: str) -> None:
    """Raises InvalidValue for a name that is no setting, of a file or what stands for one."""
    known = set(Settings.model_fields) - {"config"}
    unknown = sorted(set(values) - known)
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InvalidValue(f"{place}: there is no setting {unknown[0]!r}{hint}")


class Settings(BaseSettings):
    """What `create_app` builds from. Lists are comma-separated in the environment."""

    model_config = SettingsConfigDict(env_prefix="NEARFAR_", extra="ignore", frozen=True)

    config: Path | None = Field(None, description="settings file  [default: nearfar.toml, if there is one]")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535)
    policy: Policy = Field("local-only", description="the widest policy any request may have")
    reduce: Reduction | None = Field(
        None, description="of pictures before they leave: crop, max_side_px, grey; a request or a key may have its own"
    )
    ledger_size: ByteSize = Field(
        ByteSize(64 * 2**20), ge=2**16, description="of the egress ledger; beyond it the oldest entries are dropped"
    )
    models: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="model names or bundle folders; the first is the default"
    )
    data_dir: Path = Field(
        default_factory=user_data_dir, description="models live in its models/, comparisons in records.sqlite3"
    )
    records: bool = Field(True, description="keep every comparison")
    database: str | None = Field(
        None,
        repr=False,
        description="of the records: sqlite:///FILE or postgresql://USER@HOST/NAME  [default: SQLite in data_dir]",
    )
    keep_inputs: bool = Field(
        False, description="with a comparison its question and files, not only hash and thumbnail"
    )
    records_days: float | None = Field(None, gt=0, description="comparisons that are older go  [default: none]")
    records_bytes: ByteSize = Field(
        ByteSize(2 * 10**9), description="of comparisons that are more together, the oldest go; 0: no bound"
    )
    offline: bool = Field(False, description="fetch no model, only use what is on this machine")
    smolvlm_3b: Path | None = Field(None, description="bundle folder that the name smolvlm-3b stands for")
    endpoints: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="endpoints, each NAME=URL,MODEL (messages+URL: in Anthropic's way); semicolons in the environment",
    )
    aliases: dict[str, str] = Field(
        {"claude-4-sonnet": "anthropic/claude-sonnet-5-5"},
        description="names of your own for targets; in the environment, a JSON object",
    )
    routes: dict[str, RouteRow] = Field(
        {}, description="chains of targets by name, each tried until one answers; in the environment, a JSON object"
    )
    api_keys: Annotated[tuple[PlainKey, ...], NoDecode] = Field(
        (), repr=False, description="keys in plain; better: keys"
    )
    daily_usd: Usd | None = Field(
        5.0, description="what hosted models may cost a day (UTC) in all, 0: nothing, none: no limit"
    )
    budgets: dict[str, Usd] = Field(
        {}, description="the same of single targets, providers or routes, by name; in the environment, a JSON object"
    )
    unpriced_usd: Usd = Field(
        0.1, description="what a request to another machine counts as in budgets where its price is not known"
    )
    electricity: Electricity | None = Field(
        None, description="usd_per_kwh and watts of local answers; watts only where energy is not measured"
    )
    hardware: Hardware | None = Field(None, description="usd that this machine cost, and years to pay for itself")
    keys: tuple[ApiKey, ...] = Field((), description="by their hashes, with limits: nearfar key NAME makes one")
    allow_anonymous: bool = Field(False, description="serve other machines without keys")
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field((), description="Host header values beyond loopback's")
    threads: int = Field(0, ge=0, description="threads per model, 0: one a core, or a fast core where they differ")
    execution_provider: ExecutionProvider = Field(
        "auto",
        description="auto (CUDA where it is there), cpu, or, untested, cuda, coreml, directml, openvino, qnn",
    )
    vision_backend: VisionBackend = Field(
        "auto", description="onnxruntime, openvino, or auto: OpenVINO where it is installed and was measured faster"
    )
    memory_budget: ByteSize | None = Field(
        None, description="for all models and what runs on them, 4GB or such  [default: nine tenths of what is free]"
    )
    model_ttl_s: float = Field(
        1800.0, ge=0, description="a model that nobody asks for so long leaves memory until it is asked again; 0: never"
    )
    max_waiting: int = Field(64, ge=1, description="requests in hand before new ones get 429")
    max_running: int = Field(4, ge=1, description="requests that decode in turn, where memory allows")
    max_body_bytes: int = Field(64 * 2**20, ge=1024)
    body_timeout_s: float = Field(30.0, gt=0)
    keep_alive_s: float = Field(5.0, gt=0, description="silence on a stream before it gets a comment")
    stalled_reader_s: float = Field(30.0, gt=0, description="a client that takes nothing for so long is cut")
    log_format: Literal["text", "json"] = Field("text", description="of the log's lines")
    drain_s: int = Field(10, ge=0, description="seconds that running answers get after SIGTERM")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: Source,
        env_settings: Source,
        dotenv_settings: Source,
        file_secret_settings: Source,
    ) -> tuple[Source, ...]:
        """What is passed, then the environment and files that it names, then the settings file.

        Raises InvalidValue for a file that is wrong.
        """
        file = settings_file(init_settings().get("config"))
        found = {name: secret(f"NEARFAR_{name}".upper(), os.environ) for name in SECRETS}
        secrets = InitSettingsSource(settings_cls, {name: value for name, value in found.items() if value})
        in_file = InitSettingsSource(settings_cls, _read(file) if file else {})
        return init_settings, secrets, env_settings, in_file  # what a secret's variable holds is in `secrets` too

    @field_validator("models", "api_keys", "allowed_hosts", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return tuple(item.strip() for line in value.splitlines() for item in line.split(",") if item.strip())

    @field_validator("endpoints", mode="before")
    @classmethod
    def _split_semicolons(cls, value: object) -> object:
        return tuple(item.strip() for item in value.split(";") if item.strip()) if isinstance(value, str) else value

    @field_validator("daily_usd", mode="before")
    @classmethod
    def _none_in_words(cls, value: object) -> object:
        return None if isinstance(value, str) and value.strip().lower() == "none" else value  # TOML has no null

    @field_validator("aliases")
    @classmethod
    def _aliases_are_names(cls, value: dict[str, str]) -> dict[str, str]:
        for alias, target in value.items():
            if not _ALIAS.fullmatch(alias) or not all(target.partition("/")):
                raise ValueError(f"an alias is a name without a slash for PROVIDER/MODEL, got {alias[:64]!r}")
        return value

    @model_validator(mode="after")
    def _routes_lead_to_targets(self) -> Settings:
        for name, route in self.routes.items():
            if not _ALIAS.fullmatch(name) or name in self.aliases:
                raise ValueError(f"a route has a name without a slash that is no alias, got {name[:64]!r}")
            for hop in route.hops:
                if hop.target in self.routes:
                    what = "itself" if hop.target == name else f"the route {hop.target}"
                    raise ValueError(f"route {name} names {what}: a route is made of targets")
        return self

    @model_validator(mode="after")
    def _names_are_unique(self) -> Settings:
        names = [key.name for key in self.all_keys()]
        if len(set(names)) < len(names):
            raise ValueError("two keys bear the same name")
        return self

    def all_keys(self) -> list[ApiKey]:
        """Every key by its hash; those given in plain are named by their place."""
        plain = [ApiKey(name=f"key{place}", sha256=digest(key)) for place, key in enumerate(self.api_keys, 1)]
        return [*self.keys, *plain]

    def effective(self) -> dict[str, Shown]:
        """Every setting, fit to be shown: of keys the names alone, no password in an address."""
        file = settings_file(self.config)
        in_file = _read(file) if file else {}
        environment = {name.upper() for name in os.environ}
        found = {}
        for name, value in self.model_dump(mode="json").items():
            if name in ("api_keys", "keys"):
                value = [key.name for key in self.all_keys() if (key in self.keys) == (name == "keys")]
            elif name == "database" and value:
                value = _PASSWORD.sub("//[...]@", value)
            elif name == "endpoints":
                value = [_PASSWORD.sub("//[...]@", endpoint) for endpoint in value]
            variable = f"NEARFAR_{name}".upper()
            given = variable in environment or (name in SECRETS and f"{variable}_FILE" in environment)
            found[name] = Shown(value, "environment" if given else "file" if name in in_file else "default")
        return found

    @property
    def is_loopback(self) -> bool:
        return is_loopback_host(self.host)

    def refusal_to_bind(self) -> str | None:
        """Why this address may not be served as configured; None where it may."""
        if self.is_loopback or self.all_keys():
            return None
        if not self.allow_anonymous:
            return f"{self.host} can be reached from elsewhere: make a key with nearfar key, or pass --allow-anonymous"
        if self.policy != "local-only":
            return (
                f"{self.host} without keys cannot be served under policy {self.policy}: strangers would spend your keys"
            )
        return None

    @property
    def host_names(self) -> frozenset[str]:
        """Host header values that are answered, without port."""
        own = () if self.host in ("0.0.0.0", "::") else (f"[{self.host}]" if ":" in self.host else self.host,)
        return frozenset(name.lower() for name in (*LOOPBACK_NAMES, *own, *self.allowed_hosts))
