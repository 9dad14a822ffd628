"""docker-compose.yml and the Dockerfile say what the backend understands, and accept nobody's licence for them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from backend.demo.label_studio_venv import LABEL_STUDIO_VERSION
from backend.settings import LICENCE_VARIABLE, Settings, load_settings

REPOSITORY = Path(__file__).resolve().parents[1]
COMPOSE = REPOSITORY / "docker-compose.yml"
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
OURS = ("ml-backend", "worker", "worker-cpu")
INTERPOLATION = re.compile(r"\$\{(\w+)(?::?([-?])([^}]*))?\}")


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """The services, with YAML's own merges done and variables as written."""
    return dict(yaml.safe_load(COMPOSE.read_text())["services"])


def as_compose_fills_it(value: str, given: dict[str, str]) -> str:
    """``value`` with ``${NAME:-default}`` and ``${NAME:?message}`` replaced, as Compose does it."""
    return INTERPOLATION.sub(lambda m: given.get(m[1]) or ((m[3] or "") if m[2] == "-" else ""), value)


def test_the_file_is_valid_by_the_compose_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", OURS)
def test_every_variable_of_our_services_is_a_setting(services: dict[str, Any], name: str) -> None:
    known = {field.upper() for field in Settings.model_fields} | {LICENCE_VARIABLE}
    assert set(services[name]["environment"]) - known == set()


@pytest.mark.parametrize("name", OURS)
def test_our_services_start_with_the_defaults_that_the_file_gives(services: dict[str, Any], name: str) -> None:
    given = {LICENCE_VARIABLE: "i accept", "LABEL_STUDIO_API_KEY": "f" * 40}
    filled = {k: as_compose_fills_it(str(v), given) for k, v in services[name]["environment"].items()}
    settings = load_settings(**{k.lower(): v for k, v in filled.items() if k != LICENCE_VARIABLE})
    assert settings.redis_url.get_secret_value() == "redis://redis:6379/0"
    assert settings.label_studio_api_key.get_secret_value() == "f" * 40
    mounted = [volume.rpartition("/")[2] for volume in services[name]["volumes"]]
    assert [str(root).lstrip("/") for root in settings.slide_roots] == ["slides"] and "slides:ro" in mounted


def test_only_workers_get_the_licence_variable_and_only_from_the_user(services: dict[str, Any]) -> None:
    holders = {name for name, service in services.items() if LICENCE_VARIABLE in service.get("environment", {})}
    assert holders == {"worker", "worker-cpu"}
    for name in holders:
        match = INTERPOLATION.fullmatch(services[name]["environment"][LICENCE_VARIABLE])
        assert match is not None, "it is passed through, never a literal"
        assert match[1] == LICENCE_VARIABLE and match[2] == "?", "no default: unset is an error with a message"
        assert "read the licence" in match[3]


def test_the_image_sets_no_licence_and_only_settings() -> None:
    instructions = [line for line in DOCKERFILE.splitlines() if not line.startswith("#")]
    assert LICENCE_VARIABLE not in "\n".join(instructions)
    (block,) = re.findall(r"^ENV ((?:.*\\\n)*.*)$", DOCKERFILE, flags=re.MULTILINE)
    names = set(re.findall(r"(\w+)=", block))
    assert names - {"PYTHONUNBUFFERED", "PIP_NO_CACHE_DIR"} <= {field.upper() for field in Settings.model_fields}
    assert re.search(r"^USER (?!root|0)", DOCKERFILE, flags=re.MULTILINE), "it does not run as root"


def test_no_weights_and_no_slides_can_get_into_the_image() -> None:
    copied = re.findall(
        r"^(?:COPY|ADD) (?!--from=panel /panel/node_modules/openseadragon/)(.*)$", DOCKERFILE, flags=re.MULTILINE
    )
    sources = {Path(source).parts[0] for line in copied for source in line.split()[:-1]}
    ignore = (REPOSITORY / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in ignore if line.startswith("!")}
    assert next(line for line in ignore if not line.startswith("#")) == "*", "everything is left out but what follows"
    assert sources == let_in == {"pyproject.toml", "README.md", "LICENSE", "backend"}
    # All that is let in is text or code.
    heavy = {".pt", ".pth", ".zip", ".safetensors", ".svs", ".tif", ".tiff", ".h5", ".dcm"}
    assert [path for path in (REPOSITORY / "backend").rglob("*") if path.suffix in heavy] == []


def test_label_studio_may_speak_to_us_and_reaches_us_by_a_dotted_name(services: dict[str, Any]) -> None:
    environment = services["label-studio"]["environment"]
    assert environment["ML_BLOCK_LOCAL_IP"] == environment["SSRF_PROTECTION_ENABLED"] == "false"
    assert environment["LABEL_STUDIO_USER_TOKEN"] == services["ml-backend"]["environment"]["LABEL_STUDIO_API_KEY"]
    assert services["label-studio"]["image"] == f"heartexlabs/label-studio:{LABEL_STUDIO_VERSION}"
    (network,) = services["ml-backend"]["networks"].items()
    assert any("." in alias for alias in network[1]["aliases"])
    assert network[0] in services["label-studio"]["networks"]


def test_redis_keeps_jobs_over_a_restart_and_workers_wait_for_it(services: dict[str, Any]) -> None:
    command = services["redis"]["command"]
    assert command[command.index("--appendonly") + 1] == "yes"
    assert any(volume.endswith(":/data") for volume in services["redis"]["volumes"])
    for name in OURS:
        assert services[name]["depends_on"]["redis"]["condition"] == "service_healthy"


def test_one_worker_reserves_a_gpu_and_the_other_needs_none(services: dict[str, Any]) -> None:
    (device,) = services["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
    assert services["worker-cpu"]["profiles"] == ["cpu"] and "deploy" not in services["worker-cpu"]
    assert services["worker-cpu"]["environment"]["DEVICES"] == "cpu"


@pytest.mark.parametrize("name", OURS)
def test_server_and_workers_share_state_and_run_commands_that_exist(services: dict[str, Any], name: str) -> None:
    assert "data:/data" in services[name]["volumes"], "the server reads the results that workers write"
    command = [sys.executable, "-m", "backend", *services[name]["command"], "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


def test_nothing_is_published_beyond_this_machine_unless_asked(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("${PUBLISH_ON:-127.0.0.1}:") for port in ports)
