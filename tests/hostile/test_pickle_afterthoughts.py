"""A pickle can go on working on what it has already made; none of that gets around the rules for a block."""

from __future__ import annotations

import struct
import time
from typing import Any

import pytest
import torch
from hostile.pickle_bombs import (
    IDENTITY,
    SEQUENTIAL,
    build,
    call,
    g,
    get,
    module,
    new,
    ordered,
    put,
    tensor,
    torch_file,
    v,
)
from torch import nn

from backend.errors import BlockBroken, CheckpointRefused
from backend.inference.block_rules import MAX_DEPTH
from backend.inference.unpickling import load_block

CONFIG = g("mmm.neural.activations", "ActivationFunctionConfig")
MEMBER = call(g("mmm.neural.pooling", "GlobalPooling"), "average")  # an enum member that is a str as well
POP = b"0"


def config(fields: Any = None, **state: Any) -> bytes:
    whole = {"__dict__": {} if fields is None else fields, "__pydantic_extra__": None, "__pydantic_private__": None}
    return build(new(CONFIG), {**whole, "__pydantic_fields_set__": b"\x8f", **state})


def loaded(opcodes: bytes, *storages: bytes) -> nn.Module:
    return load_block(torch_file(b"\x80\x04" + opcodes + b".", storages), "encoder")


EMPTY = {"a dict": b"}", "an OrderedDict": ordered()}
WRITES = {
    "SETITEM": lambda key, value: v(key) + v(value) + b"s",
    "SETITEMS": lambda key, value: b"(" + v(key) + v(value) + b"u",
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize(
    ("group", "key", "value"),
    [
        ("_forward_hooks", 7, module(SEQUENTIAL)),
        ("_forward_pre_hooks", 7, module(SEQUENTIAL)),
        ("_modules", "forward.weird name", module()),
        ("_modules", "forward", module()),
        ("_parameters", "forward", module()),
        ("_buffers", MEMBER, 1),
    ],
)
def test_a_dict_that_a_module_was_made_of_is_not_the_modules_afterwards(
    group: str, key: Any, value: Any, empty: bytes, write: Any
) -> None:
    block = loaded(module(**{group: empty + put(1)}) + get(1) + write(key, value) + POP)
    assert dict(getattr(block, group)) == {}
    assert block(1) == 1


def test_a_list_that_a_dict_was_made_of_is_not_the_dicts_afterwards() -> None:
    pairs = v([]) + put(1)
    block = loaded(module(_modules=ordered(pairs)) + get(1) + v(["forward", module()]) + b"a" + POP)
    assert dict(block._modules) == {}


def test_the_names_of_passing_buffers_are_not_the_modules_afterwards() -> None:
    names = b"\x8f" + put(1)
    block = loaded(module(_non_persistent_buffers_set=names) + get(1) + b"(" + v("forward") + b"\x90" + POP)
    assert block._non_persistent_buffers_set == set()


def test_the_fields_of_a_config_are_not_the_configs_afterwards() -> None:
    late = config(b"}" + put(1)) + get(1) + v("model_dump") + v(1) + b"s" + get(1) + v("_x") + v(1) + b"s" + POP + POP
    block = loaded(module(cfg=late))
    assert vars(block.cfg) == {}
    assert callable(block.cfg.model_dump)


def afterwards(container: Any, opcodes: bytes) -> bytes:
    """A module with a list of a container in it (so deep nobody copies), to which ``opcodes`` add something when the module is there."""
    return module(kept=[v(container) + put(1)]) + get(1) + opcodes + POP


DEEP = v([])
for _ in range(2 * MAX_DEPTH):
    DEEP = DEEP + b"\x85"
DOUBLED = v(()) + b"".join(put(1) + get(1) + b"\x86" for _ in range(60))
FAMILY = module() + b"".join(
    put(1)
    + POP
    + b"".join(module(SEQUENTIAL, _modules={"0": get(1)}) + put(2 + child) + POP for child in range(2))
    + module(SEQUENTIAL, _modules={"0": get(2), "1": get(3)})
    for _ in range(25)
)
CHAIN = module() + b"".join(put(1) + POP + module(SEQUENTIAL, _modules={"0": get(1)}) for _ in range(2000))

REFUSED: dict[str, tuple[bytes, str]] = {
    "a function appended to a list": (afterwards([], g("builtins", "getattr") + b"a"), "_Function as a value"),
    "functions appended to a list": (afterwards([], b"(" + g("builtins", "getattr") + b"e"), "_Function as a value"),
    "a function put into a dict": (afterwards({}, v("x") + g("builtins", "getattr") + b"s"), "_Function as a value"),
    "a function in an OrderedDict": (
        afterwards(ordered(), v("x") + g("builtins", "getattr") + b"s"),
        "_Function as a value",
    ),
    "a storage put into a list": (
        afterwards([], v(("storage", g("torch", "FloatStorage"), "0", "cpu", 1)) + b"Qa"),
        "Storage as a value",
    ),
    "a list that holds itself": (afterwards([], get(1) + b"a"), "levels deep"),
    "a module that holds itself": (
        build(new(IDENTITY) + put(1), {"_parameters": {}, "_buffers": {}, "_modules": {"a": get(1)}}),
        "levels deep",
    ),
    "modules as deep as no model": (CHAIN, "levels deep"),
    "modules that share their parts, 2**25 ways": (FAMILY, "levels deep, or more than"),
    "values as deep as no model": (module(kept=DEEP), "levels deep"),
    "a second state": (build(module(), {"training": False}), "a second state"),
    "no state": (new(IDENTITY), "without a state"),
    "half a state": (build(new(IDENTITY), {"_modules": {}}), "without a state"),
    "a config without a state": (module(cfg=new(CONFIG)), "without a state"),
    "a state that is no dict of its own": (build(new(IDENTITY), ordered()), "setting attributes"),
    "a switch of torch": (module(_compiled_call_impl=module()), "_compiled_call_impl hidden"),
    "a module that is a plain attribute": (module(activation=module()), "plain attribute"),
    "a member that is an attribute too": (module(a=1, _modules={"a": module()}), "in two places"),
    "a module that is a parameter too": (
        module(_modules={"a": module()}, _parameters={"a": tensor(1, (1,), (1,))}),
        "in two places",
    ),
    "an enum member as a name": (module(_modules={MEMBER: module()}), "_modules with"),
    "an enum member as an attribute": (build(new(IDENTITY), {MEMBER: 1}), "named a mmm"),
    "a number as an attribute": (build(new(IDENTITY), {7: 1}), "named a builtins.int"),
    "an attribute with a blank": (build(new(IDENTITY), {"a b": 1}), "named 'a b'"),
    "a field that hides a method": (module(cfg=config({"model_dump": 1})), "model_dump hidden"),
    "a private attribute that is none": (module(cfg=config(__pydantic_private__={"_x": 1})), "private attribute"),
    "an extra attribute that hides a method": (module(cfg=config(__pydantic_extra__={"model_dump": 1})), "hidden"),
    "a module as a key": (module(kept={module(): 1}), "Identity as a key"),
    "a tuple as a key": (module(kept=b"}" + v((1,)) + v(1) + b"s"), "tuple as a key"),
    "2**60 tuples as a key": (b"}" + DOUBLED + v(1) + b"s", "tuple as a key"),
    "2**60 tuples in a set": (b"\x8f(" + DOUBLED + b"\x90", "tuple as a key"),
    "2**60 tuples in a set by call": (call(g("builtins", "set"), [DOUBLED]), "tuple as a key"),
    "2**60 tuples as a key of an OrderedDict": (ordered([(DOUBLED, 1)]), "tuple as a key"),
    "2**60 tuples as an enum member": (call(g("mmm.neural.pooling", "GlobalPooling"), DOUBLED), "tuple as a key"),
    "2**60 tuples as the name of a class": (call(g("builtins", "getattr"), IDENTITY, DOUBLED), "getattr of"),
    "a dict by DICT": (b"(" + DOUBLED + v(1) + b"d", "an opcode"),
    "a set by FROZENSET": (b"(" + DOUBLED + b"\x91", "an opcode"),
    "a terabyte of zeros": (b"\x96" + struct.pack("<Q", 2**40), "an opcode"),
    "a state for a tensor": (build(tensor(1, (1,), (1,)), {"data": 1}), "setting attributes of a torch.Tensor"),
    "one number as 10**12": (module(_buffers={"a": tensor(1, (10**6, 10**6), (0, 0))}), "larger than its storage"),
    "a tensor past its storage": (module(_buffers={"a": tensor(1, (1,), (1,), offset=1)}), "larger than its storage"),
    "a storage past its entry": (module(_buffers={"a": tensor(4096, (4096,), (1,))}), "another size"),
    "a storage short of its entry": (module(_buffers={"a": tensor(1, (1,), (1,), "Half")}), "another size"),
    "a storage of two kinds": (
        module(_buffers={"a": tensor(1, (1,), (1,)), "b": tensor(1, (1,), (1,), "Int")}),
        "another size",
    ),
}


@pytest.mark.parametrize(("opcodes", "named"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused_by_name_and_soon(opcodes: bytes, named: str) -> None:
    started = time.monotonic()
    with pytest.raises(CheckpointRefused) as refused:
        loaded(opcodes, bytes(4))
    assert named in refused.value.message
    assert time.monotonic() - started < 20


def test_one_storage_in_many_parameters_counts_as_often_as_it_would_be_copied() -> None:
    """2 MiB of half precision in 600 parameters: 2.3 GiB, once they are computed in single precision."""
    count = 2**20
    parts = {f"p{number}": tensor(count, (count,), (1,), "Half") for number in range(600)}
    with pytest.raises(CheckpointRefused, match="tensors of more than"):
        loaded(module(_buffers=parts), bytes(2 * count))
    few = dict(list(parts.items())[:2])
    assert loaded(module(_buffers=few), bytes(2 * count)).p1.shape == (count,)


def test_weights_that_are_missing_or_of_another_machine_are_a_broken_block() -> None:
    with pytest.raises(BlockBroken, match="data/0"):
        loaded(module(_buffers={"a": tensor(1, (1,), (1,))}))
    data = torch_file(b"\x80\x04" + module() + b".").replace(b"little", b"bigbig")
    with pytest.raises(BlockBroken, match="byte order"):
        load_block(data, "encoder")


def test_a_module_by_hand_loads_and_runs() -> None:
    """Else the refusals above would prove nothing."""
    weights = torch.arange(6, dtype=torch.float32)
    linear = module(
        g("torch.nn.modules.linear", "Linear"),
        _parameters={
            "weight": call(g("torch._utils", "_rebuild_parameter"), tensor(6, (2, 3), (3, 1)), True, ordered()),
            "bias": None,
        },
    )
    block = loaded(
        module(SEQUENTIAL, _modules=ordered([("0", linear)]), cfg=config({"act": MEMBER})), weights.numpy().tobytes()
    )
    assert block(torch.ones(1, 3)).tolist() == [[3.0, 12.0]]
    assert block.cfg.act == "average"
