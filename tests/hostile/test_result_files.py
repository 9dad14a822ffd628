"""Files that somebody else has put into the store of results: none reads another file, fills the memory or ends the process."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from reliability_report import record
from synthetic_bags import synthetic_result

from backend.errors import ResultDamaged
from backend.results.hdf5 import read_end, read_hdf5, write_hdf5
from backend.results.seal import make_seal

MUTANTS = 400
SEED = 20_261
SECRET = b"-the-signing-key-of-this-backend"


@pytest.fixture
def result_file(tmp_path: Path) -> Path:
    path = tmp_path / "result.h5"
    write_hdf5(synthetic_result((3_000, 2_000), 0.5, planted=(1, 1, 2, 2)), path)
    return path


def replaced(path: Path, make: Callable[[h5py.File], object]) -> None:
    """Put another ``slide_embedding`` into a result, and seal it: whoever writes results can do that."""
    with h5py.File(path, "r+") as h5:
        del h5["slide_embedding"]
        make(h5)
    with path.open("r+b") as file:
        seal = make_seal(file, np.zeros(8, np.float32), [])
        file.seek(0, 2)
        file.write(seal)


def external_storage(path: Path, secret: Path) -> None:
    replaced(
        path,
        lambda h5: h5.create_dataset("slide_embedding", (8,), np.float32, external=[(str(secret), 0, len(SECRET))]),
    )


def external_link(path: Path, secret: Path) -> None:
    with h5py.File(secret.with_suffix(".h5"), "w") as other:
        other["x"] = np.frombuffer(SECRET, np.float32)
    replaced(path, lambda h5: h5.__setitem__("slide_embedding", h5py.ExternalLink(str(secret.with_suffix(".h5")), "x")))


def virtual(path: Path, secret: Path) -> None:
    external_link(path, secret)
    layout = h5py.VirtualLayout((8,), np.float32)
    layout[:] = h5py.VirtualSource(str(secret.with_suffix(".h5")), "x", shape=(8,))
    replaced(path, lambda h5: h5.create_virtual_dataset("slide_embedding", layout))


def soft_link(path: Path, _secret: Path) -> None:
    replaced(path, lambda h5: h5.__setitem__("slide_embedding", h5py.SoftLink("/features")))


def unpacks_to_gigabytes(path: Path, _secret: Path) -> None:
    def bomb(h5: h5py.File) -> None:
        made = h5.create_dataset(
            "slide_embedding", (500_000_000,), np.float32, chunks=(1_000_000,), compression="gzip", fletcher32=True
        )
        made[:1_000_000] = 0

    replaced(path, bomb)


def made_up_of_fill_values(path: Path, _secret: Path) -> None:
    replaced(path, lambda h5: h5.create_dataset("slide_embedding", (10**13,), np.float32, chunks=(1_000_000,)))


def a_group(path: Path, _secret: Path) -> None:
    replaced(path, lambda h5: h5.create_group("slide_embedding"))


def texts(path: Path, _secret: Path) -> None:
    replaced(path, lambda h5: h5.create_dataset("slide_embedding", data=["a"] * 8))


HOSTILE = [external_storage, external_link, virtual, soft_link, unpacks_to_gigabytes, made_up_of_fill_values, a_group, texts]  # fmt: skip


@pytest.mark.parametrize("make", HOSTILE)
@pytest.mark.parametrize("kept", ["in a folder", "in an object store"])
def test_a_result_that_leads_elsewhere_is_damaged(
    result_file: Path, tmp_path: Path, make: Callable[[Path, Path], None], kept: str
) -> None:
    secret = tmp_path / "signing.key"
    secret.write_bytes(SECRET)
    make(result_file, secret)
    file = result_file if kept == "in a folder" else io.BytesIO(result_file.read_bytes())
    with pytest.raises(ResultDamaged) as caught:
        read_hdf5(file)
    assert "signing" not in str(caught.value)
    assert not read_end(file).embedding.any(), "it is read out of the seal"
    record("results", "result files that lead elsewhere or unpack to gigabytes", tried=len(HOSTILE), typed_errors=len(HOSTILE), crashes=0)  # fmt: skip


def mutants(original: bytes) -> list[bytes]:
    """Bytes set, runs overwritten, pieces moved: anywhere, and more often in the first 4 kB, where the file's structure begins."""
    dice = random.Random(SEED)
    made = []
    for number in range(MUTANTS):
        data = bytearray(original)
        for _ in range(dice.randint(1, 12)):
            at = dice.randrange(4096 if number % 2 else len(data))
            match dice.randrange(3):
                case 0:
                    data[at] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
                case 1:
                    data[at : at + 8] = dice.choice((b"\xff" * 8, b"\0" * 8, dice.randbytes(8)))
                case _:
                    source = dice.randrange(len(data))
                    data[at : at + 16] = data[source : source + 16]
        made.append(bytes(data[: len(original)] if number % 10 else data[: dice.randrange(len(data))]))
    return made


READER = """
import json, resource, sys, time
from pathlib import Path
from backend.errors import BackendError
from backend.results.hdf5 import read_end, read_hdf5
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
for path in sorted(Path(sys.argv[1]).iterdir()):
    said, began = [], time.monotonic()
    for read in (read_hdf5, read_end):
        try:
            read(path)
            said.append("good")
        except BackendError as error:
            said.append(error.code)
        except BaseException as error:
            said.append("other: " + repr(error)[:200])
    print(json.dumps([path.name, said, time.monotonic() - began]), flush=True)
"""


def test_mutants_of_a_result_end_as_typed_errors_or_good_reads(result_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mutants"
    folder.mkdir()
    for number, data in enumerate(mutants(result_file.read_bytes())):
        (folder / f"{number:04}.h5").write_bytes(data)
    done = subprocess.run([sys.executable, "-c", READER, str(folder)], capture_output=True, text=True, timeout=300)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(rows) == MUTANTS, f"ended by mutant {len(rows)}: {done.stderr[-2000:]}"
    said = [word for _, words, _ in rows for word in words]
    assert not [word for word in said if word.startswith("other")]
    slow = [name for name, _, seconds in rows if seconds > 10]
    damaged = sum("result_damaged" in words for _, words, _ in rows)
    assert damaged > MUTANTS / 10 and said.count("good") > 10, "the mutator does some harm, and not only harm"
    assert not slow
    record("results", "mutants of a result file", tried=MUTANTS, typed_errors=damaged, crashes=0, hangs=len(slow))
