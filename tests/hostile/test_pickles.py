"""A checkpoint is a program in the hands of whoever made it: of many that run code, none gets to run any."""

from __future__ import annotations

import copyreg
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile import pickle_bombs
from hostile.pickle_bombs import EXTENSION_CODE, Bomb, bombs, call, g, harmed, prepare, torch_file, v
from reliability_report import record

from backend.errors import CheckpointRefused, ModelError
from backend.inference.blocks import NativeBlocks
from backend.inference.unpickling import load_block

ALL = bombs()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, where a canary would appear; Python would also import modules from it."""
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def extension() -> Iterator[None]:
    """``posix.system`` under a number, as some package might register a function of its own."""
    copyreg.add_extension("posix", "system", EXTENSION_CODE)
    yield
    copyreg.remove_extension("posix", "system", EXTENSION_CODE)


def test_a_program_that_trusts_them_is_harmed(tmp_path: Path) -> None:
    """Else the refusals below would prove nothing."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", pickle_bombs.__file__, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert set(json.loads(done.stdout.splitlines()[-1])) == {bomb.name for bomb in ALL if bomb.harms}


@pytest.mark.parametrize("bomb", ALL, ids=lambda bomb: bomb.name)
def test_it_is_refused_by_name_and_nothing_runs(bomb: Bomb, folder: Path, extension: None) -> None:
    before, modules = sorted(folder.rglob("*")), set(sys.modules)
    with pytest.raises(CheckpointRefused) as refused:
        load_block(torch_file(bomb.opcodes), "encoder")
    assert "'encoder'" in refused.value.message
    assert any(name in refused.value.message for name in bomb.refused.split("|")), refused.value.message
    assert not harmed(folder)
    assert sorted(folder.rglob("*")) == before
    # What is refused is not even imported: importing a module runs it.
    assert {name for name in set(sys.modules) - modules if not name.startswith(("torch", "mmm", "encodings."))} == set()


def test_a_whole_checkpoint_with_any_of_them_is_refused(folder: Path, test_data: Path) -> None:
    """Through the door that a worker uses, in each of the three blocks."""
    refused = 0
    with zipfile.ZipFile(test_data / "checkpoints" / "wsc-layout-1.6.pt.zip") as genuine:
        blocks = {name: genuine.read(name) for name in genuine.namelist()}
    for number, bomb in enumerate(ALL):
        block = ("encoder", "squeezer", "grouper")[number % 3]
        path = folder / "model.pt.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{block}.pt", torch_file(bomb.opcodes))
            if number < 3:  # the others complete, once for each block: which one is read first must not matter
                for name, data in blocks.items():
                    if name != f"{block}.pt":
                        archive.writestr(name, data)
        with pytest.raises(ModelError):
            NativeBlocks(path, "cpu")
        assert not harmed(folder), bomb.name
        refused += 1
    record("pickles", "pickles that run code", tried=len(ALL), refused=refused)


@pytest.mark.parametrize(
    "opcodes",
    [
        v(("storage", "text", "0", "cpu", 1)) + b"Q",
        v(("storage", g("torch.nn.modules.linear", "Identity"), "0", "cpu", 1)) + b"Q",
        v(("storage", None, "../../../victim", "cpu", 1)) + b"Q",
        v(("module", "Identity", "harm.py", "import harm")) + b"Q",
        b"Pharm\n",
        v(7) + b"Q",
        v("a text") + b"\x93",
        b"\x94h\x63",
        b"(((((",
        call(g("torch", "Size"), [2**31 - 1] * 3),
        call(g("torch", "device"), "cuda:99999"),
        b"\x8e" + b"\xff" * 7 + b"\x7f",
        b"]" * 50_000,
    ],
    ids=lambda opcodes: opcodes[:40].hex(),
)
def test_nonsense_is_a_model_error_too(opcodes: bytes, folder: Path) -> None:
    """Persistent ids that are no storage, stacks that run empty, lengths of an exabyte, lists fifty thousand deep."""
    with pytest.raises(ModelError, match="encoder"):
        load_block(torch_file(b"\x80\x04" + opcodes + b"."), "encoder")
    assert not harmed(folder)
