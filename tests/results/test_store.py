"""The result store: what goes in comes out, a damaged file is set aside, no key becomes a path."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from s3 import S3, forget_connections

from backend.errors import ResultDamaged, ResultDamagedAgain, ResultNotFound, SettingsError, StoreUnavailable
from backend.results.bag import Bag, BagResult, digest
from backend.results.hdf5 import read_hdf5
from backend.results.store import DAMAGED_MAX, ResultStore


def make_result(n: int = 50, seed: int = 0) -> BagResult:
    rng = np.random.default_rng(seed)
    grid = np.stack(np.unravel_index(np.arange(n), (10, -(-n // 10))), axis=1).astype(np.int64)
    bag = Bag(
        "slide",
        np.rint(grid * 224.45).astype(np.int64),
        grid,
        (10, -(-n // 10)),
        224.45,
        (2244, 2245),
        224,
        0.5,
        0.499,
        "slide",
    )
    return BagResult(
        bag,
        rng.normal(size=(n, 768)).astype(np.float16),
        rng.normal(size=(n, 8)).astype(np.float32),
        rng.normal(size=768).astype(np.float32),
        {"model_version": "wsc-abc123", "stand_in": False, "mpp": 0.499},
    )


KEY = digest({"slide": "a"})


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty store."""
    match request.param:
        case "local":
            return str(tmp_path / "results")
        case "memory":
            return f"memory://{tmp_path.name}"
    return f"{request.getfixturevalue('s3').bucket()}/some/folder"


@pytest.fixture
def store(place: str) -> ResultStore:
    return ResultStore(place)


def test_a_result_comes_back_exactly(store: ResultStore) -> None:
    result = make_result()
    assert not store.has(KEY)
    assert store.get(KEY) is None
    store.put(KEY, result)
    again = store.get(KEY)
    assert store.has(KEY)
    assert again is not None
    for name in ("latents", "attention_logits", "slide_embedding"):
        np.testing.assert_array_equal(getattr(again, name), getattr(result, name))
        assert getattr(again, name).dtype == getattr(result, name).dtype
    np.testing.assert_array_equal(again.bag.coords, result.bag.coords)
    assert (again.bag.mpp, again.bag.mpp_source, again.bag.tile_size_level0) == (0.499, "slide", 224.45)
    assert again.bag.slide_size == (2244, 2245)
    assert dict(again.provenance) == dict(result.provenance)
    assert list(store.keys()) == [KEY]


def test_latents_can_be_left_out(store: ResultStore) -> None:
    store.put(KEY, make_result())
    light = store.need(KEY, latents=False)
    assert light.latents.shape == (50, 0)
    assert light.attention.shape == (50, 8)


def test_the_file_has_the_names_that_other_tools_read(tmp_path: Path) -> None:
    import h5py

    store = ResultStore(str(tmp_path))
    store.put(KEY, make_result())
    with h5py.File(next(tmp_path.glob("*/*.h5"))) as h5:
        assert h5["features"].dtype == np.float16
        assert h5["coords"].dtype == np.int64
        assert h5["attention_logits"].dtype == np.float32
        assert h5["coords"].attrs["patch_size_level0"] == 224.45


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text"])
def test_a_damaged_file_is_set_aside_and_counts_as_absent(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = ResultStore(str(tmp_path))
    store.put(KEY, make_result())
    path = next(tmp_path.glob("*/*.h5"))
    data = bytearray(path.read_bytes())
    where = data.find(make_result().latents.tobytes()[:64])
    assert where > 0
    if damage == "truncate":
        data = data[: len(data) // 2]
    elif damage == "flip":
        data[where + 10] ^= 1
    else:
        data = bytearray(b"" if damage == "empty" else b"this is no HDF5 file")
    path.write_bytes(data)
    with pytest.raises(ResultDamaged):
        read_hdf5(path)
    assert store.get(KEY) is None
    assert "damaged" in caplog.text
    assert not store.has(KEY)
    assert len(list(tmp_path.glob("*/*.damaged-*"))) == 1  # kept, for whoever wants to know why
    store.put(KEY, make_result())
    assert store.get(KEY) is not None


def test_what_another_process_has_stored_or_removed_is_seen(place: str) -> None:
    ours, theirs = ResultStore(place), ResultStore(place)
    keys = [KEY, KEY[:-1] + "0", "ff" + KEY[2:]]
    assert not any(ours.has(key) for key in keys)
    for stored, key in enumerate(keys, start=1):
        theirs.put(key, make_result())
        assert ours.has(key)
        assert len(list(ours.keys())) == stored, "no listing is remembered"


def test_a_folder_that_cannot_be_looked_at_is_not_an_absent_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ResultStore(str(tmp_path))
    store.put(KEY, make_result())

    def fails(_path: Path, **_: object) -> os.stat_result:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", fails)
        with pytest.raises(StoreUnavailable, match="Input/output error"):
            store.has(KEY)
    assert store.has(KEY)


def test_a_whole_result_that_takes_a_damaged_ones_place_is_not_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ResultStore(str(tmp_path))
    store.put(KEY, make_result())
    path = next(tmp_path.glob("*/*.h5"))
    path.write_bytes(b"damaged")
    read = store._read

    def read_and_replace(where: str, latents: bool) -> BagResult:
        try:
            return read(where, latents)
        except ResultDamaged:
            store.put(KEY, make_result())  # as a worker on another machine does
            raise

    monkeypatch.setattr(store, "_read", read_and_replace)
    assert store.get(KEY) is not None
    assert not list(tmp_path.glob("*/*.damaged-*"))


def test_what_killed_writers_left_is_deleted_after_a_day(tmp_path: Path) -> None:
    store = ResultStore(str(tmp_path))
    store.put(KEY, make_result())
    folder = tmp_path / KEY[:2]
    old, new = folder / f".{KEY}.h5.one.tmp", folder / f".{KEY}.h5.two.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert store.tidy() == 1
    assert sorted(path.name for path in folder.iterdir()) == sorted([new.name, f"{KEY}.h5"])


@pytest.mark.parametrize("place", ["local", "s3"], indirect=True)
def test_a_result_that_is_damaged_again_and_again_is_not_computed_for_ever(place: str) -> None:
    store = ResultStore(place)
    path = f"{store._root}/{KEY[:2]}/{KEY}.h5"
    for _ in range(DAMAGED_MAX - 1):
        store.put(KEY, make_result())
        store._fs.pipe_file(path, b"this is no HDF5 file")
        assert store.get(KEY) is None, "to be computed again"
    for _ in range(2):
        store.put(KEY, make_result())
        store._fs.pipe_file(path, b"this is no HDF5 file")
        with pytest.raises(ResultDamagedAgain, match="Check the disk") as caught:
            store.get(KEY)
        assert not caught.value.retryable
    asides = store._fs.glob(f"{path}.damaged-*")
    assert len(asides) == DAMAGED_MAX, "some are kept to look at, and not ever more"
    for aside in asides:  # what the message says
        store._fs.rm_file(aside)
    store.put(KEY, make_result())
    assert store.get(KEY) is not None


@pytest.mark.parametrize(
    ("url", "says"), [("gs://bucket/x", "gcsfs.*the extra `gcs`"), ("foo://x", "not known.*Stores are s3, gs, az")]
)
def test_a_store_of_a_kind_that_is_not_installed_says_what_to_do(url: str, says: str) -> None:
    with pytest.raises(SettingsError, match=rf"RESULTS_URL.*{says}"):
        ResultStore(url)


@pytest.fixture
def s3_that_is_away(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody is there
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    forget_connections()  # and the addresses that they know
    yield "s3://bucket-of-nobody/results"
    forget_connections()


def test_a_store_that_does_not_answer_says_so(s3_that_is_away: str) -> None:
    store = ResultStore(s3_that_is_away)
    for use in (
        lambda: store.has(KEY),
        lambda: store.get(KEY),
        lambda: store.slide_embedding(KEY),
        lambda: store.put(KEY, make_result()),
        lambda: list(store.keys()),
    ):
        with pytest.raises(StoreUnavailable, match="s3://bucket-of-nobody") as caught:
            use()
        assert caught.value.retryable


def test_two_writers_of_one_key_leave_one_whole_file(tmp_path: Path) -> None:
    store = ResultStore(str(tmp_path))
    results = [make_result(seed=seed) for seed in range(4)]
    threads = [threading.Thread(target=store.put, args=(KEY, result)) for result in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stored = store.need(KEY)
    assert any(np.array_equal(stored.latents, result.latents) for result in results)
    assert [path.name for path in tmp_path.glob("*/*") if not path.name.startswith(".")] == [f"{KEY}.h5"]
    assert not list(tmp_path.glob("*/.*"))


@pytest.mark.parametrize("key", ["", "../../etc/passwd", "A" * 40, KEY + "/..", KEY[:-1]])
def test_what_is_no_key_is_never_a_path(key: str, tmp_path: Path) -> None:
    with pytest.raises(ResultNotFound):
        ResultStore(str(tmp_path)).get(key)


def test_a_bag_of_patches_keeps_its_page_sizes(store: ResultStore) -> None:
    sizes = np.array([[300, 200], [50, 60]], np.int64)
    zero = np.zeros((2, 2), np.int64)
    bag = Bag("patches", zero, np.array([[0, 0], [1, 0]]), (2, 1), 224.0, (0, 0), 224, 0.0, 0.0, "none", sizes)
    store.put(KEY, BagResult(bag, np.zeros((2, 4), np.float16), np.zeros((2, 8), np.float32), np.zeros(4, np.float32)))
    again = store.need(KEY)
    assert again.bag.kind == "patches"
    np.testing.assert_array_equal(again.bag.patch_sizes, sizes)


def test_a_result_that_cannot_be_opened_now_is_not_set_aside_as_damaged(tmp_path: Path) -> None:
    store = ResultStore(str(tmp_path))
    store.put(KEY, make_result())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(StoreUnavailable, match="Too many open files"):
            store.get(KEY)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for handle in taken:
            os.close(handle)
    assert store.get(KEY) is not None, "it is still there, and good"
