"""Every setting of the backend, once, read from the environment.

Units are in the names (``_S`` seconds, ``_PX`` pixels, ``_MPP`` micrometres per pixel, ``_BYTES``). The settings table
in the README is generated from this file by :func:`settings_table`, so a description here is what a user reads.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from backend.errors import SettingsError

LICENCE_VARIABLE = "MMM_LICENSE_ACCEPTED"
LICENCE_ANSWER = "i accept"
# fsspec takes every variable that begins with its name for one of its own, and complains of it.
_RENAMED = {"FSSPEC_PROTOCOLS": "REMOTE_STORES"}
HOW_TO_ENCODE = (
    "a user name or password in it must be percent-encoded: / is %2F, @ is %40, # is %23, ? is %3F, : is %3A, % is %25"
)
_REDIS_SCHEMES = ("redis", "rediss", "unix")


def default_data_dir() -> Path:
    """``$XDG_DATA_HOME/wsc-backend``, or ``~/.local/share/wsc-backend``."""
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "wsc-backend"


class Settings(BaseSettings):
    """All settings. ``Settings()`` reads the environment; keyword arguments (lower case) override it."""

    model_config = SettingsConfigDict(
        env_prefix="", case_sensitive=False, extra="ignore", frozen=True, hide_input_in_errors=True
    )

    # --- model ---
    model: str = Field(
        "",
        description="Checkpoint: a path or URL of a `.zip`/`.pt.zip` with encoder, squeezer, grouper. Empty: the stand-in model.",
    )
    model_sha256: str = Field("", description="If set, the checkpoint must have this SHA-256, else it is refused.")
    devices: str = Field(
        "auto", description="`auto` (every CUDA device, else the CPU), `cpu`, or a list such as `cuda:0,cuda:1`."
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="Arithmetic of encoder and squeezer: `float32`, `bfloat16` or `float16`. Pooling is always float32.",
    )
    batch_tiles: int = Field(
        32,
        ge=1,
        le=4096,
        description="Tiles that go through the encoder at once (unset, 256 on CUDA); halved when memory runs out.",
    )
    compile_encoder: bool = Field(
        False,
        description="On CUDA: compile the encoder with `torch.compile` in the background, and use that once it agrees.",
    )

    # --- tiles and tissue ---
    tile_px: int = Field(224, ge=32, le=2048, description="Edge of a tile as the encoder sees it, in pixels.")
    tile_mpp: float = Field(0.5, gt=0, le=20, description="Scale at which tiles are read, in µm per pixel.")
    default_mpp: float | None = Field(
        None,
        description="Scale to assume where neither the slide nor the task states one, in µm per pixel. Unset: such a slide is an error.",
    )
    tissue_mpp: float = Field(8.0, gt=0, le=64, description="Scale at which tissue is looked for, in µm per pixel.")
    tissue_min_fraction: float = Field(
        0.25, ge=0, le=1, description="A tile is analysed if at least this part of it is tissue."
    )
    tissue_pen_rules: bool = Field(
        True, description="Leave out pen marks: what is blue, green, red or black, and as even as ink is."
    )
    image_max_pixels: int = Field(
        400_000_000,
        ge=1,
        description="Largest plain image (JPEG, PNG, TIFF) that is decoded whole, in pixels; larger ones are refused.",
    )
    read_threads: int = Field(
        2, ge=1, le=64, description="Threads that read tiles ahead of the device, for each worker."
    )

    # --- where slides may come from ---
    slide_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (),
        description="Folders from which slides may be opened, separated by commas. Nothing outside them is ever read.",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Hosts (`name` or `name:port`) from which http(s) slides may be fetched, separated by commas."
    )
    remote_stores: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Remote stores that slides may be read from, separated by commas: `s3`, `gs`, `az` (as `azure-blob`), or another name of fsspec's.",
    )
    download_max_bytes: int = Field(20_000_000_000, ge=1, description="Largest file that is downloaded, in bytes.")
    download_timeout_s: float = Field(
        60.0,
        gt=0,
        description="Seconds without a byte, or with less than 50 kB a second, after which a download counts as failed.",
    )
    download_cache_max_bytes: int = Field(
        50_000_000_000, ge=0, description="Size to which the cache of downloaded slides is trimmed, in bytes."
    )

    # --- state ---
    model_dir: Path = Field(
        default_factory=default_data_dir,
        description="Folder for everything that is kept: results, embedded Redis, caches, stand-in model.",
    )
    results_url: str = Field(
        "", description="Where results are stored, as an fsspec URL. Empty: `results/` in `MODEL_DIR`."
    )
    redis_url: SecretStr = Field(
        SecretStr(""),
        description="A Redis to use, such as `redis://host:6379/0`. Empty: an embedded one on a private unix socket.",
    )

    # --- jobs ---
    predict_wait_s: float = Field(
        3.0, ge=0, le=60, description="How long opening one task waits for an unfinished slide, in seconds."
    )
    predict_batch_budget_s: float = Field(
        20.0, ge=0.1, le=90, description="Longest answer to a request with several tasks, in seconds."
    )
    job_timeout_s: int = Field(3600, ge=10, description="Longest time that one slide may take, in seconds.")
    job_retries: int = Field(
        2, ge=0, le=20, description="How often a slide is tried again after a worker died or a fault that may pass."
    )
    heartbeat_ttl_s: int = Field(
        45, ge=5, le=600, description="A worker that is silent for so long counts as dead, in seconds."
    )
    result_ttl_s: int = Field(
        3600, ge=60, description="How long a finished job stays listed, in seconds (results themselves are kept)."
    )
    failure_ttl_s: int = Field(
        86_400, ge=60, description="How long a failed job is listed and not tried again by itself, in seconds."
    )
    publish_retries: int = Field(
        300,
        ge=0,
        le=10_000,
        description="How often a push to an unreachable Label Studio is repeated, with back-off up to 5 min (300: about a day).",
    )

    # --- learning ---
    train_min_labels: int = Field(
        4, ge=4, le=100_000, description="Labelled slides that a control needs before a head is trained for it."
    )
    tile_label_min_overlap: float = Field(
        0.5, gt=0, le=1, description="A drawn region labels the tiles of which it covers at least this part."
    )
    patient_field: str = Field(
        "patient",
        description="Field of a task that names the patient, whose slides are never in both parts of a validation.",
    )
    patient_from: Annotated[tuple[Literal["dicom", "tcga"], ...], NoDecode] = Field(
        (),
        description="Else from a slide's file: `dicom` (its Patient ID), `tcga` (a barcode in its name), separated by commas.",
    )
    train_debounce_n: int = Field(
        5, ge=1, le=10_000, description="Training starts after so many new or changed annotations."
    )
    train_debounce_s: float = Field(
        30.0, ge=0, le=86_400, description="Training starts so long after the last new annotation, in seconds."
    )

    rank_tasks: bool = Field(
        True,
        description="Write `priority`, `novelty` and `confidence` into the tasks' data, for sorting in the Data Manager.",
    )
    keep_old_predictions: bool = Field(
        False, description="Keep this backend's predictions of earlier model versions in Label Studio."
    )

    # --- Label Studio ---
    label_studio_url: str = Field(
        "", description="Address of Label Studio for this backend, such as `http://localhost:8080`."
    )
    label_studio_public_url: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Address under which browsers reach Label Studio, if not `LABEL_STUDIO_URL`; several separated by commas, the first is linked to. Only pages from there may frame the panel.",
    )
    label_studio_api_key: SecretStr = Field(
        SecretStr(""), description="Token of a Label Studio user: a legacy token or a personal access token."
    )
    top_k: int = Field(
        10, ge=0, le=400, description="Tiles with the highest attention that are outlined as rectangles."
    )

    # --- web ---
    host: str = Field(
        "127.0.0.1", description="Address that the backend listens on. `0.0.0.0` for all; then set a password."
    )
    port: int = Field(9090, ge=0, le=65535, description="Port that the backend listens on.")
    public_url: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Address under which browsers reach the backend, with its path if it has one; several separated by commas, the first is written into tasks. Empty: `http://localhost:PORT`.",
    )
    basic_auth_user: str = Field(
        "",
        description="User name that Label Studio must send (basic authentication). With `BASIC_AUTH_PASS`, or neither: no check.",
    )
    basic_auth_pass: SecretStr = Field(
        SecretStr(""), description="Password that Label Studio must send. With `BASIC_AUTH_USER`."
    )
    webhook_secret: SecretStr = Field(
        SecretStr(""),
        description="What webhooks must carry in the header `X-WSC-Webhook-Secret`. Empty: a secret made once and kept in `MODEL_DIR`; `import` registers it.",
    )
    max_body_bytes: int = Field(64_000_000, ge=1000, description="Largest request body that is accepted, in bytes.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="`DEBUG`, `INFO`, `WARNING` or `ERROR`."
    )

    log_format: Literal["text", "json"] = Field(
        "text", description="`text`, or `json`: one object a line, with the bag or project that is worked on."
    )

    @field_validator(
        "slide_roots",
        "allowed_hosts",
        "remote_stores",
        "label_studio_public_url",
        "public_url",
        "patient_from",
        mode="before",
    )
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("slide_roots", mode="after")
    @classmethod
    def _resolve_roots(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        return tuple(_real(root) for root in value)

    @field_validator("default_mpp", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: Any) -> Any:
        return None if value == "" else value

    @field_validator("default_mpp", mode="after")
    @classmethod
    def _plausible_mpp(cls, value: float | None) -> float | None:
        if value is not None and not 0.05 <= value <= 5.0:
            raise ValueError("must lie between 0.05 and 5 µm per pixel")
        return value

    @field_validator("model_sha256", mode="after")
    @classmethod
    def _hex_digest(cls, value: str) -> str:
        value = value.strip().lower()
        if value and not re.fullmatch(r"[0-9a-f]{64}", value):
            raise ValueError("must be 64 hexadecimal digits")
        return value

    @field_validator("devices", mode="after")
    @classmethod
    def _known_devices(cls, value: str) -> str:
        value = value.strip()
        names = [name.strip() for name in value.split(",")]
        if value not in ("auto", "cpu") and not all(re.fullmatch(r"cuda:\d+|cpu", name) for name in names):
            raise ValueError("must be auto, cpu, or a list such as cuda:0,cuda:1")
        return value

    @field_validator("label_studio_url", mode="after")
    @classmethod
    def _bare_url(cls, value: str) -> str:
        value = value.strip()
        if value and not re.match(r"https?://[^/\s]+", value):
            raise ValueError("must start with http:// or https://")
        _check_address(value)
        return value.rstrip("/")

    @field_validator("label_studio_public_url", "public_url", mode="after")
    @classmethod
    def _bare_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(cls._bare_url(url) for url in value)

    @field_validator("model", "results_url", mode="after")
    @classmethod
    def _readable_url(cls, value: str) -> str:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
            _check_address(value)
        return value

    @field_validator("redis_url", mode="after")
    @classmethod
    def _redis_address(cls, value: SecretStr) -> SecretStr:
        address = value.get_secret_value().strip()
        if address:
            _check_address(address)
            parts = urlsplit(address)
            if parts.scheme not in _REDIS_SCHEMES:
                raise ValueError("must be redis://host:6379/0, rediss://… or unix:///path/to/redis.sock")
            if parts.scheme != "unix" and (parts.fragment or "@" in parts.path + parts.query):
                raise ValueError(f"cannot be read as an address: {HOW_TO_ENCODE}")
        return SecretStr(address)

    @field_validator("label_studio_api_key", "webhook_secret", mode="after")
    @classmethod
    def _fit_for_a_header(cls, value: SecretStr, info: ValidationInfo) -> SecretStr:
        """Both are sent in the header of a request: a token in ASCII, any other value in Latin-1 (RFC 9110, 5.5)."""
        secret, token = value.get_secret_value().strip(), info.field_name == "label_studio_api_key"
        for place, character in enumerate(secret, start=1):
            # Which character it is would be part of the secret.
            if not character.isprintable() or (token and character == " "):
                kind = "white space or a control character"
            elif ord(character) > (127 if token else 255):
                kind = "no letter that a header can hold, such as a typographic quote"
            else:
                continue
            raise ValueError(f"character {place} of {len(secret)} is {kind}: copy it again")
        return SecretStr(secret)

    @field_validator("basic_auth_pass", mode="after")
    @classmethod
    def _without_line_end(cls, value: SecretStr) -> SecretStr:
        return SecretStr(value.get_secret_value().rstrip("\r\n"))  # of the file that it was read from

    @model_validator(mode="after")
    def _both_or_neither(self) -> Settings:
        user, password = self.basic_auth_user, self.basic_auth_pass.get_secret_value()
        if bool(user) != bool(password):
            given, missing = ("BASIC_AUTH_USER", "BASIC_AUTH_PASS")[:: 1 if user else -1]
            raise ValueError(f"{given} is set and {missing} is not: set both, or neither for no check")
        return self

    @field_validator("model_dir", mode="after")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return _real(value)

    @property
    def results_location(self) -> str:
        """The fsspec URL of the result store."""
        return self.results_url or str(self.model_dir / "results")

    @property
    def label_studio_browser_url(self) -> str:
        """The address under which browsers reach Label Studio, without user and final slash; empty if none is known."""
        return _without_user((*self.label_studio_public_url, self.label_studio_url)[0])

    @property
    def label_studio_urls(self) -> tuple[str, ...]:
        """All addresses of Label Studio: the one that this backend asks, then those of browsers; without a final slash."""
        return tuple(url for url in (self.label_studio_url, *self.label_studio_public_url) if url)

    @property
    def browser_url(self) -> str:
        """The address under which browsers reach the backend, without user and final slash."""
        return self.own_urls[0]

    @property
    def own_urls(self) -> tuple[str, ...]:
        """All addresses of the backend for browsers, without user and final slash; the first is the one that is given out."""
        return tuple(map(_without_user, self.public_url)) or (f"http://localhost:{self.port}",)

    @property
    def open_to_the_network(self) -> bool:
        """Whether everybody who reaches this machine may ask, as no password is set."""
        return not self.basic_auth_user and self.host not in ("127.0.0.1", "localhost", "::1")


def _check_address(value: str) -> None:
    """Refuse what is no address, without repeating any of it: with a password that is not encoded, any part may hold it."""
    try:
        parts = urlsplit(value)
        _ = parts.port
    except ValueError:
        raise ValueError(f"cannot be read as an address; {HOW_TO_ENCODE}") from None
    if any(character.isspace() or ord(character) < 32 for character in value):
        raise ValueError("has white space or control characters in it")
    if parts.scheme in ("http", "https") and not parts.hostname:
        raise ValueError("names no host")


def _without_user(address: str) -> str:
    return re.sub(r"(?<=://)[^/]*@", "", address)


def _real(path: Path) -> Path:
    try:
        return Path(os.path.realpath(path.expanduser()))
    except (RuntimeError, OSError) as error:  # no such user's home, a loop of links
        raise ValueError(f"is no folder that can be found: {error}") from None


def load_settings(**overrides: Any) -> Settings:
    """Read the settings, turning what pydantic says into one :class:`~backend.errors.SettingsError` naming each variable."""
    for old, new in _RENAMED.items():
        if os.environ.get(old):
            raise SettingsError(f"{old} is not read any more.", hint=f"Set {new}={os.environ[old]} in its place.")
    try:
        return Settings(**overrides)
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False)
        # One about several settings names them itself.
        lines = [": ".join(filter(None, (".".join(map(str, e["loc"])).upper(), _said(e["msg"])))) for e in found]
        raise SettingsError("; ".join(lines), hint="`wsc-backend settings` lists every setting.") from None


def _said(message: str) -> str:
    return message.removeprefix("Value error, ")


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The process's settings, read once."""
    return load_settings()


def licence_accepted() -> bool:
    """Whether the user has accepted the licence of ``mmm`` by its variable. We read it, and never set it."""
    return os.environ.get(LICENCE_VARIABLE, "").lower() == LICENCE_ANSWER


def settings_table() -> str:
    """The Markdown table of all settings: variable, default, meaning."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=False)
        if name == "model_dir":
            shown = "`~/.local/share/wsc-backend`"
        elif isinstance(default, SecretStr) or default in ("", (), None):
            shown = "–"
        else:
            shown = f"`{str(default).lower() if isinstance(default, bool) else default}`"
        rows.append(f"| `{name.upper()}` | {shown} | {field.description} |")
    rows.append(
        f'| `{LICENCE_VARIABLE}` | – | `"{LICENCE_ANSWER}"` once you have read and accepted the licence of `medicalmultitaskmodeling`. |'
    )
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(settings_table(), end="")
