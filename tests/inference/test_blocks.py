"""NativeBlocks: the model card's snippet runs, every layout loads, a hostile or broken file is refused by name."""

from __future__ import annotations

import collections
import io
import os
import pickle
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from backend.errors import BlockBroken, CheckpointRefused, CheckpointUnreadable, DeviceUnavailable, LicenceNotAccepted
from backend.inference.blocks import NativeBlocks
from backend.inference.checkpoint import file_sha256
from backend.inference.unpickling import load_block

LAYOUTS = ("1.0", "1.6")


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest, test_data: Path) -> tuple[str, NativeBlocks, dict[str, np.ndarray]]:
    stem = test_data / "checkpoints" / f"wsc-layout-{request.param}"
    with np.load(f"{stem}.reference.npz") as reference:
        arrays = {name: reference[name] for name in reference.files}
    return request.param, NativeBlocks(f"{stem}.pt.zip", device_identifier="cpu"), arrays


def replace_block(source: Path, target: Path, block: str, data: bytes | None) -> Path:
    """A copy of a checkpoint with one block's bytes replaced, or left out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            if name != f"{block}.pt":
                new.writestr(name, old.read(name))
        if data is not None:
            new.writestr(f"{block}.pt", data)
    return target


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_the_model_cards_snippet_runs_and_row_i_is_tile_i(layout) -> None:
    _, model, _ = layout
    tiles = torch.rand((10, 3, 224, 224), generator=torch.Generator().manual_seed(0))
    assert set(model.keys()) == {"encoder", "squeezer", "grouper"}
    with torch.inference_mode():
        pyramid = model["encoder"](tiles.to(model.device))
        _, latent = model["squeezer"](pyramid)
        latent = torch.nn.Flatten(start_dim=1)(latent)
        wsi_vector, attention = model["grouper"](latent, torch.ones((10,), dtype=torch.long, device=model.device))
        assert wsi_vector.shape == (1, 768)
        assert attention.shape == (10, 8)
        # Reordering the tiles reorders the rows in the same way, and leaves the slide vector alone.
        order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
        vector_2, attention_2 = model["grouper"](latent[order], torch.ones((10,), dtype=torch.long))
    torch.testing.assert_close(attention_2, attention[order], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(vector_2, wsi_vector, atol=1e-5, rtol=1e-5)


def test_latents_agree_with_the_release_that_made_the_checkpoint(layout) -> None:
    name, model, reference = layout
    torch.manual_seed(1)
    with torch.inference_mode():
        latents = model.latents(torch.rand(12, 3, 224, 224)).numpy()
    if name == "1.6":
        np.testing.assert_allclose(latents, reference["latent"], atol=1e-4)
    else:  # the squeezer's order is the installed release's, not 1.0's
        expected = reference["latent"]
        cosine = (latents * expected).sum(1) / np.linalg.norm(latents, axis=1) / np.linalg.norm(expected, axis=1)
        assert cosine.min() > 0.999


def test_a_zip_ending_is_accepted_too(test_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "WSC-MTL-tiny.zip"
    path.symlink_to(test_data / "checkpoints" / "wsc-layout-1.6.pt.zip")
    assert len(NativeBlocks(path, "cpu")) == 3


def test_layout_1_1_with_a_nested_config_class_loads(test_data: Path) -> None:
    """1.1 pickles name ``AttentionPoolingReducer.Config``: protocol 2 does so by ``getattr`` on the class."""
    from mmm.mtl_modules.shared_blocks.Grouper import AttentionPoolingReducer

    with zipfile.ZipFile(test_data / "checkpoints" / "wsc-layout-1.0.pt.zip") as archive:
        grouper = load_block(archive.read("grouper.pt"), "grouper")
    grouper.reducer.cfg = AttentionPoolingReducer.Config(num_heads=8)  # the 1.0 weights, the 1.1 attribute
    again = load_block(saved(grouper), "grouper")
    assert again.reducer.cfg.num_heads == 8
    assert again.reducer.attention.out_features == 8


def test_the_hostile_checkpoint_is_refused_by_name_and_nothing_runs(
    test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointRefused, match=r"'grouper'.*(posix|nt|os)\.system"):
        NativeBlocks(test_data / "checkpoints" / "hostile.pt.zip", "cpu")
    assert list(tmp_path.iterdir()) == []


class _Calls:
    """Pickles to a call of ``function(*args)``."""

    def __init__(self, function: object, *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.function, self.args


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: _Calls(os.mkdir, "pwned"), "mkdir"),
        (lambda: _Calls(eval, "__import__('os').mkdir('pwned')"), "eval"),
        (lambda: _Calls(getattr, torch.nn.Linear, "__init__"), "getattr"),
        (lambda: _Calls(getattr, os, "mkdir"), "os"),
        (lambda: _Calls(torch.load, "pwned"), r"torch\.serialization"),
        (lambda: _Calls(torch.hub.download_url_to_file, "http://127.0.0.1:9/x", "pwned"), r"torch\.hub"),
        (lambda: _Calls(shutil.copy, __file__, "pwned"), "shutil"),
        (lambda: _Calls(torch.nn.Linear, 2, 2), "a call of torch.nn.modules.linear.Linear"),
        (lambda: _Calls(__import__("functools").partial, os.mkdir, "pwned"), "functools"),
    ],
)
def test_a_pickle_that_runs_code_is_refused_before_it_runs(
    make, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        data = saved(make())
    except (TypeError, AttributeError, pickle.PicklingError):
        # A module object cannot be pickled by Python itself; a hostile file names it all the same.
        data = _raw_pickle(b"cos\n__name__\n.")
        named = "os"
    with pytest.raises(CheckpointRefused, match=named):
        load_block(data, "encoder")
    assert list(tmp_path.iterdir()) == []


def _raw_pickle(opcodes: bytes) -> bytes:
    """A file of ``torch.save`` whose pickle is replaced by ``opcodes``."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(collections.OrderedDict()))) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, opcodes if name.endswith("data.pkl") else old.read(name))
    return buffer.getvalue()


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _module(name: str = "linear\nIdentity") -> bytes:
    """Opcodes for a new module, as genuine files make it."""
    return b"ctorch.nn.modules." + name.encode() + b"\n)\x81"


@pytest.mark.parametrize(
    ("opcodes", "named"),
    [
        # A first state puts __setstate__ on the object, a second one would call it.
        (_module() + b"}" + _text("__setstate__") + _module() + b"sb}" + _text("a") + b"K\x01sb.", "__setstate__"),
        (_module() + b"}" + _text("forward") + _module() + b"sb.", "forward hidden"),
        (_module() + b"}" + _text("_modules") + b"}" + _text("forward") + _module() + b"ssb.", "forward hidden"),
        (_module() + b"}" + _text("_modules") + b"}" + _text('x"); import os') + _module() + b"ssb.", "_modules with"),
        (_module() + b"}" + _text("_forward_hooks") + b"}K\x01" + _module() + b"ssb.", "hooks"),
        (_module() + b"}" + _text("_modules") + b"K\x01sb.", "no dict"),
        # Adding items to something else than a list or dict would call its methods.
        (_module("container\nModuleList") + _module() + b"a.", "items for"),
        (_module("container\nModuleDict") + _text("k") + _module() + b"s.", "items for"),
        # A class is no value, and a tensor is made of a storage only.
        (b"ctorch._utils\n_rebuild_parameter\n(" + _module() + b"\x89}tR.", "something else than a tensor"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(" + _module() + b"K\x00))\x89}tR.", "something else than a storage"),
        (b"(K\x01itorch.nn.modules.linear\nLinear\n.", "an opcode"),
        (b"ctimm.models._features_fx\nFeatureGraphNet\n)\x81.", "FeatureGraphNet"),
        (b"ctorch.fx\nGraphModule\n)\x81.", "GraphModule"),
    ],
)
def test_what_could_become_a_call_is_refused(opcodes: bytes, named: str) -> None:
    with pytest.raises(CheckpointRefused, match=named):
        load_block(_raw_pickle(b"\x80\x02" + opcodes), "encoder")


def test_a_class_in_a_value_stays_inert() -> None:
    """A class that the file puts into an attribute is a token there, which nothing can call."""
    members = b"".join(_text(group) + b"}s" for group in ("_modules", "_parameters", "_buffers"))
    factory = _text("factory") + b"ctorch.nn.modules.linear\nLinear\ns"
    block = load_block(_raw_pickle(b"\x80\x02" + _module() + b"}" + members + factory + b"b."), "x")
    assert not callable(block.factory)


def test_a_refused_name_is_not_even_imported() -> None:
    sys.modules.pop("this", None)
    with pytest.raises(CheckpointRefused, match=r"this\.s"):
        load_block(_raw_pickle(b"cthis\ns\n."), "encoder")
    assert "this" not in sys.modules


@pytest.mark.parametrize("block", ["encoder", "squeezer", "grouper"])
def test_a_missing_block_is_named(test_data: Path, tmp_path: Path, block: str) -> None:
    path = replace_block(test_data / "checkpoints" / "wsc-layout-1.6.pt.zip", tmp_path / "m.pt.zip", block, None)
    with pytest.raises(BlockBroken, match=f"'{block}' is missing"):
        NativeBlocks(path, "cpu")


def test_a_broken_block_is_named(test_data: Path, tmp_path: Path) -> None:
    source = test_data / "checkpoints" / "wsc-layout-1.6.pt.zip"
    with pytest.raises(BlockBroken, match=r"'squeezer' is not a file of torch\.save"):
        NativeBlocks(replace_block(source, tmp_path / "a.pt.zip", "squeezer", b"garbage"), "cpu")
    with pytest.raises(BlockBroken, match=r"'squeezer' is a dict, not a torch\.nn\.Module"):
        NativeBlocks(replace_block(source, tmp_path / "b.pt.zip", "squeezer", saved({"a": 1})), "cpu")


def test_a_block_that_does_not_fit_the_others_is_named(test_data: Path, tmp_path: Path) -> None:
    source = test_data / "checkpoints" / "wsc-layout-1.6.pt.zip"
    wrong_encoder = replace_block(source, tmp_path / "a.pt.zip", "encoder", saved(torch.nn.Linear(3, 3)))
    with pytest.raises(BlockBroken, match="'encoder' fails on a blank tile"):
        NativeBlocks(wrong_encoder, "cpu")
    no_reducer = replace_block(source, tmp_path / "b.pt.zip", "grouper", saved(torch.nn.Linear(3, 3)))
    with pytest.raises(BlockBroken, match="'grouper' is a Linear without a reducer"):
        NativeBlocks(no_reducer, "cpu")


def test_a_checkpoint_of_the_wrong_kind_says_what_it_is_not(tmp_path: Path) -> None:
    text = tmp_path / "weights.pt.zip"
    text.write_text("not a zip")
    with pytest.raises(CheckpointUnreadable, match="not a zip file of blocks"):
        NativeBlocks(text, "cpu")
    with pytest.raises(CheckpointUnreadable, match=r"no \.zip or \.pt\.zip"):
        other = tmp_path / "weights.safetensors"
        other.write_bytes(b"")
        NativeBlocks(other, "cpu")
    with pytest.raises(CheckpointUnreadable, match="There is no checkpoint"):
        NativeBlocks(tmp_path / "absent.pt.zip", "cpu")


def test_the_pinned_sha256_is_enforced(test_data: Path) -> None:
    path = test_data / "checkpoints" / "wsc-layout-1.6.pt.zip"
    assert NativeBlocks(path, "cpu", sha256=file_sha256(path)).sha256 == file_sha256(path)
    with pytest.raises(CheckpointUnreadable, match="MODEL_SHA256"):
        NativeBlocks(path, "cpu", sha256="0" * 64)


def test_without_the_licence_variable_nothing_is_loaded(test_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MMM_LICENSE_ACCEPTED", raising=False)
    with pytest.raises(LicenceNotAccepted, match="MMM_LICENSE_ACCEPTED"):
        NativeBlocks(test_data / "checkpoints" / "wsc-layout-1.6.pt.zip", "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device, so asking for one is no error")
def test_an_absent_device_is_a_clear_error(test_data: Path) -> None:
    with pytest.raises(DeviceUnavailable, match="'cuda:0' cannot be used"):
        NativeBlocks(test_data / "checkpoints" / "wsc-layout-1.6.pt.zip", device_identifier="cuda:0")
