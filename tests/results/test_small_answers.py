"""What is shown of many results at once, and what is shown of one without its latents, reads little from an object store."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from s3 import S3, forget_connections
from synthetic_bags import synthetic_result

from backend.results import hdf5
from backend.results.bag import digest
from backend.results.store import ResultStore


@contextmanager
def counting(target: str) -> Iterator[tuple[str, list[int]]]:
    """A proxy in front of ``host:port``, and the sizes of what it has passed back."""
    host, _, port = target.partition(":")
    passed: list[int] = []

    def pump(source: socket.socket, sink: socket.socket, count: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if count:
                    passed.append(len(data))
                sink.sendall(data)
        except OSError:
            return
        finally:
            for each in (source, sink):
                each.close()

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection((host, int(port)))
            threading.Thread(target=pump, args=(client, server, False), daemon=True).start()
            threading.Thread(target=pump, args=(server, client, True), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", passed
        listener.shutdown(socket.SHUT_RDWR)


def test_small_answers_of_a_stored_result_fetch_no_latents_from_an_object_store(
    s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:

    result = synthetic_result((30_000, 30_000), 0.5, planted=(1, 1, 2, 2))
    key, place = digest({"slide": "large"}), f"{s3.bucket()}/results"
    ResultStore(place).put(key, result)
    latents = result.latents.nbytes
    assert latents > 5_000_000
    forget_connections()
    with counting(os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")) as (address, passed):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        store = ResultStore(place)
        summary = store.summary(key)
        assert summary is not None and summary.tiles == len(result.bag)
        assert sum(passed) < 100_000, "for the map"
        passed.clear()
        light = store.need(key, latents=False)
        assert sum(passed) < latents / 5, "for regions, panel and overlay"
        np.testing.assert_array_equal(light.attention_logits, result.attention_logits)
        np.testing.assert_array_equal(light.bag.coords, result.bag.coords)
        assert dict(light.provenance) == dict(result.provenance)
        passed.clear()
        whole = store.need(key)
        np.testing.assert_array_equal(whole.latents, result.latents)
        assert sum(passed) > latents
        forget_connections()


def test_an_earlier_result_without_a_summary_is_read_all_the_same(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:

    result = synthetic_result((4_000, 3_000), 0.5, planted=(1, 1, 2, 2))
    store, key = ResultStore(f"{s3.bucket()}/results"), digest({"slide": "earlier"})
    seal = hdf5.make_seal
    with monkeypatch.context() as patch:
        patch.setattr(hdf5, "make_seal", lambda file, embedding, but, _summary: seal(file, embedding, but))
        store.put(key, result)
    summary = store.summary(key)
    assert summary is not None and (summary.tiles, dict(summary.provenance)) == (
        len(result.bag),
        dict(result.provenance),
    )
