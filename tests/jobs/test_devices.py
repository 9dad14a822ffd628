"""Which devices are found without torch, and what a process tied to one of them sees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from backend.errors import DeviceUnavailable, SettingsError
from backend.jobs.devices import available_cores, devices_from, find_devices, pin_device

TWO_GPUS = """#!/bin/sh
echo "GPU 0: NVIDIA H200 (UUID: GPU-1b8b2a1c-0000-0000-0000-000000000000)"
echo "GPU 1: NVIDIA H200 (UUID: GPU-2b8b2a1c-0000-0000-0000-000000000000)"
echo "  MIG 1g.10gb     Device  0: (UUID: MIG-3b8b2a1c-0000-0000-0000-000000000000)"
"""
BROKEN = "#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2\nexit 9\n"


def install_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str | None) -> None:
    """Make ``script`` the only nvidia-smi, or have none."""
    monkeypatch.setattr("backend.jobs.devices._DRIVER_GPUS", folder / "gpus")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if script is not None:
        (folder / "nvidia-smi").write_text(script)
        (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    else:
        monkeypatch.setenv("PATH", str(folder))


def test_auto_is_every_cuda_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, TWO_GPUS)
    devices, found = find_devices("auto")
    assert devices == devices_from("auto") == ["cuda:0", "cuda:1"]
    assert "NVIDIA H200, NVIDIA H200" in found


def test_auto_without_cuda_is_the_cpu_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, None)
    devices, found = find_devices("auto")
    assert devices == ["cpu"]
    assert "no nvidia-smi here" in found and "so the CPU is used" in found


def test_where_nvidia_smi_fails_the_driver_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, BROKEN)
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    assert find_devices("auto")[0] == ["cuda:0"]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("2,5", ["cuda:0", "cuda:1"]), ("GPU-1b8b", ["cuda:0"]), ("0,-1,1", ["cuda:0"]), ("", ["cpu"]), ("-1", ["cpu"])],
)
def test_auto_respects_what_is_visible(monkeypatch: pytest.MonkeyPatch, visible: str, expected: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_devices("auto")[0] == expected


@pytest.mark.parametrize("setting", ["gpu", "cuda", "cuda:0,cuda:0", "", "cpu,"])
def test_other_lists_are_refused(setting: str) -> None:
    with pytest.raises(SettingsError, match=r"cuda:0,cuda:1"):
        find_devices(setting)


def test_a_process_sees_its_own_device_only_as_the_first() -> None:
    environ: dict[str, str] = {}
    assert pin_device("cuda:3", environ) == "cuda:0"
    assert environ["CUDA_VISIBLE_DEVICES"] == "3"
    assert environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_a_device_is_counted_among_those_that_are_visible_already() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "2,GPU-5b8b", "OMP_NUM_THREADS": "3"}
    assert pin_device("cuda:1", environ) == "cuda:0"
    assert environ["CUDA_VISIBLE_DEVICES"] == "GPU-5b8b"
    assert environ["OMP_NUM_THREADS"] == "3"
    with pytest.raises(DeviceUnavailable, match=r"cuda:2 .* shows 1 devices"):
        pin_device("cuda:2", environ | {"CUDA_VISIBLE_DEVICES": "0"})


def test_a_cpu_process_sees_no_cuda_device() -> None:
    environ: dict[str, str] = {}
    assert pin_device("cpu", environ) == "cpu"
    assert environ == {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(available_cores())}


def test_a_worker_for_a_device_that_is_not_there_says_so_and_ends(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "backend.jobs.worker", "--device", "cuda:4"],
        env={"CUDA_VISIBLE_DEVICES": "0", "MODEL_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 3
    assert "cuda:4 was asked for" in ended.stderr and "Set DEVICES" in ended.stderr
