"""Restricted unpickling of the model's blocks: a pickle may rebuild what a model is made of, and do nothing else.

A block is a pickled ``nn.Module``. Unpickling runs whatever the file names, so here

- a name is looked up only in a short list of modules, *before* anything is imported, and only if it is a class *defined* there
  that is an ``nn.Module`` (no traced or scripted one), a pydantic model or an enum;
- what a name stands for is never handed to the file: it gets an inert token, good for making an object and for nothing else;
- objects are made without their constructors, as genuine files do. The only calls are: rebuilding tensors and parameters from checked
  arguments, ``OrderedDict``, ``set``, ``torch.Size``, ``torch.device``, enum members, and a class nested in an allowed class;
- state is set only by the *class's* own ``__setstate__``, and only if it hides no method or property, registers no hook and
  names its submodules plainly; items are added to lists, dicts and sets only.

It is the pure-Python unpickler of the standard library, whose opcodes can be overridden. The pickle holds the structure
only (weights lie beside it), so its speed does not matter.
"""

from __future__ import annotations

import enum
import importlib
import io
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from pydantic import BaseModel
from torch import nn

from backend.errors import BlockBroken, CheckpointRefused

# Where a class of a block may be defined; a final dot stands for everything below. Importing anything else never happens. Of `mmm` and
# torchvision only what WSC's blocks and their configs are made of: other modules trace code, start applications or touch files.
_ALLOWED_MODULES = (
    "torch.nn.modules.",
    "torchvision.models.swin_transformer",
    "torchvision.ops.misc",
    "torchvision.ops.stochastic_depth",
    "mmm.BaseModel",
    "mmm.mmm_types.",
    "mmm.mtl_modules.MTLModule",
    "mmm.mtl_modules.shared_blocks.Grouper",
    "mmm.mtl_modules.shared_blocks.PyramidEncoder",
    "mmm.mtl_modules.shared_blocks.SharedBlock",
    "mmm.mtl_modules.shared_blocks.Squeezer",
    "mmm.mtl_modules.shared_blocks.TaskSpecificLayer",
    "mmm.neural.TorchModule",
    "mmm.neural.activations",
    "mmm.neural.modules.simple_cnn",
    "mmm.neural.modules.swinformer",
    "mmm.neural.pooling",
)
_PLAIN_NAME = re.compile(r"\w+")
_PYDANTIC_STATE = {"__dict__", "__pydantic_extra__", "__pydantic_fields_set__", "__pydantic_private__"}


class _ForbiddenName(Exception):
    """Raised inside the unpickler with what was refused."""


def _refuse(what: str) -> NoReturn:
    raise _ForbiddenName(what)


@dataclass(frozen=True)
class _ModelClass:
    """A class of the model, as the file holds it: it can be asked for a new object or an enum member, and is nothing else."""

    cls: type


@dataclass(frozen=True)
class _Function:
    """One of the few functions that a genuine file calls, with its arguments checked."""

    name: str
    call: Callable[..., Any]


# --- what may be called --------------------------------------------------------------------------------------------


def _rebuild_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> torch.Tensor:
    whole = (offset, *size, *stride) if isinstance(size, tuple) and isinstance(stride, tuple) else (None,)
    if not isinstance(storage, torch.storage.TypedStorage) or not all(type(n) is int and n >= 0 for n in whole):
        _refuse("a tensor made of something else than a storage and whole numbers")
    if hooks or metadata:
        _refuse("a tensor with hooks or metadata")
    rebuilt: torch.Tensor = torch._utils._rebuild_tensor_v2(  # type: ignore[no-untyped-call]
        storage, offset, size, stride, bool(requires_grad), OrderedDict()
    )
    return rebuilt


def _rebuild_parameter(data: Any, requires_grad: Any, hooks: Any) -> nn.Parameter:
    if not isinstance(data, torch.Tensor) or hooks:
        _refuse("a parameter made of something else than a tensor")
    return nn.Parameter(data, requires_grad=bool(requires_grad))


def _ordered_dict(*items: Any) -> OrderedDict[Any, Any]:
    if len(items) > 1 or not all(isinstance(item, list) for item in items):
        _refuse("an OrderedDict made of something else than a list")
    return OrderedDict(*items)


def _set(*items: Any) -> set[Any]:
    if len(items) > 1 or not all(isinstance(item, (list, tuple)) for item in items):
        _refuse("a set made of something else than a list")
    return set(*items)


def _size(numbers: Any = ()) -> torch.Size:
    if not isinstance(numbers, (list, tuple)) or not all(type(n) is int for n in numbers):
        _refuse("a torch.Size made of something else than whole numbers")
    return torch.Size(numbers)


def _device(*parts: Any) -> torch.device:
    if not all(type(part) in (str, int) for part in parts):
        _refuse("a torch.device made of something else than its name")
    return torch.device(*parts)


def _nested_class(owner: Any, name: Any) -> Any:
    """``getattr(owner, name)``, where that is a class (or enum member) defined inside an allowed class; else refused."""
    if not isinstance(owner, _ModelClass) or not isinstance(name, str) or name.startswith("_"):
        _refuse(f"getattr of {getattr(owner, 'name', type(owner).__name__)!r}")
    value = vars(owner.cls).get(name)
    if isinstance(value, enum.Enum):
        return value
    if not isinstance(value, type) or not _is_model_class(value):
        _refuse(f"{owner.cls.__module__}.{owner.cls.__qualname__}.{name}")
    return _ModelClass(value)


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    **{(module, "set"): _set for module in ("builtins", "__builtin__")},
    **{(module, "getattr"): _nested_class for module in ("builtins", "__builtin__")},
}


def _is_model_class(value: object) -> bool:
    if not isinstance(value, type) or not issubclass(value, (nn.Module, BaseModel, enum.Enum)):
        return False
    # A traced or scripted module carries code of its own.
    return not issubclass(value, (torch.fx.GraphModule, torch.jit.ScriptModule))


def _may_define(module: str) -> bool:
    return any(module.startswith(name) if name.endswith(".") else module == name for name in _ALLOWED_MODULES)


# --- what may be set -----------------------------------------------------------------------------------------------


def _set_module_state(module: nn.Module, state: Any) -> None:
    cls = type(module)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        _refuse(f"a state of {cls.__name__} that is no dict of names")
    for key, value in state.items():
        hidden = getattr(cls, key, None)
        if key.startswith("__") or callable(hidden) or hasattr(type(hidden), "__get__"):
            _refuse(f"{cls.__module__}.{cls.__qualname__}.{key} hidden by a value of the file")
        if "hook" in key and value not in (None, False, True) and len(value):
            _refuse(f"hooks in {cls.__module__}.{cls.__qualname__}.{key}")
    for group, kinds in (("_modules", nn.Module), ("_parameters", torch.Tensor), ("_buffers", torch.Tensor)):
        members = state.get(group, {})
        if not isinstance(members, dict):
            _refuse(f"{cls.__qualname__}.{group} that is no dict")
        for name, member in members.items():
            if (
                not isinstance(name, str)
                or not _PLAIN_NAME.fullmatch(name)
                or not isinstance(member, (kinds, type(None)))
            ):
                _refuse(f"{cls.__qualname__}.{group} with {name!r:.60}")
            if callable(getattr(cls, name, None)):
                _refuse(f"{cls.__module__}.{cls.__qualname__}.{name} hidden by a member of the file")
    cls.__setstate__(module, state)  # type: ignore[no-untyped-call]


def _set_config_state(config: BaseModel, state: Any) -> None:
    cls = type(config)
    if (
        cls.__setstate__ is not BaseModel.__setstate__
        or not isinstance(state, dict)
        or not set(state) <= _PYDANTIC_STATE
    ):
        _refuse(f"a state that {cls.__module__}.{cls.__qualname__} does not have")
    fields = state.get("__dict__")
    if not isinstance(fields, Mapping) or not all(
        isinstance(key, str) and not key.startswith("_") and not callable(getattr(cls, key, None)) for key in fields
    ):
        _refuse(f"fields that {cls.__module__}.{cls.__qualname__} does not have")
    BaseModel.__setstate__(config, state)


# --- the unpickler -------------------------------------------------------------------------------------------------

_PythonUnpickler: Any = pickle._Unpickler


class BlockUnpickler(_PythonUnpickler):  # type: ignore[misc]  # typeshed does not describe its opcodes
    """The unpickler described in this module's docstring. Used through :func:`load_block`."""

    dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _FUNCTIONS:
            return _Function(f"{module}.{name}", _FUNCTIONS[module, name])
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if not _may_define(module):
            _refuse(f"{module}.{name}")
        outer, *inner = name.split(".")
        # Only what is defined there: a module also holds what it imported (os, functions, other packages' classes).
        found = vars(sys.modules.get(module) or importlib.import_module(module)).get(outer)
        if not _is_model_class(found) or not _may_define(str(getattr(found, "__module__", ""))):
            _refuse(f"{module}.{name}")
        assert isinstance(found, type)
        token: Any = _ModelClass(found)
        for part in inner:
            token = _nested_class(token, part)
        return token

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(arguments, tuple):
            _refuse("a call without a list of arguments")
        if isinstance(function, _ModelClass) and issubclass(function.cls, enum.Enum) and len(arguments) == 1:
            self.stack[-1] = function.cls(arguments[0])
        elif isinstance(function, _Function):
            self.stack[-1] = function.call(*arguments)
        else:
            _refuse(f"a call of {_name_of(function)}")

    def _new_object(self) -> None:
        arguments = self.stack.pop()
        token = self.stack[-1]
        if not isinstance(token, _ModelClass) or issubclass(token.cls, enum.Enum) or arguments != ():
            _refuse(f"a new {_name_of(token)}")
        self.stack[-1] = token.cls.__new__(token.cls)

    def _build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, nn.Module):
            _set_module_state(target, state)
        elif isinstance(target, BaseModel):
            _set_config_state(target, state)
        else:
            _refuse(f"setting attributes of {_name_of(target)}")

    def _refused_opcode(self) -> None:
        _refuse("an opcode that no genuine file uses")

    @staticmethod
    def _only_into(kinds: tuple[type, ...], depth: int, load: Callable[[Any], None]) -> Callable[[Any], None]:
        """``load``, if what it adds to (``depth`` entries down the stack, or down the stack before the mark) is one of ``kinds``."""

        def checked(self: Any) -> None:
            target = (self.stack if depth else self.metastack[-1])[-1 - depth]
            if type(target) not in kinds:
                _refuse(f"items for {_name_of(target)}")
            load(self)

        return checked

    dispatch[pickle.REDUCE[0]] = _reduce
    dispatch[pickle.NEWOBJ[0]] = _new_object
    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.APPEND[0]] = _only_into((list,), 1, _PythonUnpickler.load_append)
    dispatch[pickle.APPENDS[0]] = _only_into((list,), 0, _PythonUnpickler.load_appends)
    dispatch[pickle.SETITEM[0]] = _only_into((dict, OrderedDict), 2, _PythonUnpickler.load_setitem)
    dispatch[pickle.SETITEMS[0]] = _only_into((dict, OrderedDict), 0, _PythonUnpickler.load_setitems)
    dispatch[pickle.ADDITEMS[0]] = _only_into((set,), 0, _PythonUnpickler.load_additems)
    for _opcode in (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4):
        dispatch[_opcode[0]] = _refused_opcode


def _name_of(value: object) -> str:
    if isinstance(value, _ModelClass):
        return f"{value.cls.__module__}.{value.cls.__qualname__}"
    if isinstance(value, _Function):
        return value.name
    return f"a {type(value).__module__}.{type(value).__qualname__}"


class _PickleModule:
    """What ``torch.load`` wants of a pickle module."""

    __name__ = "backend.inference.unpickling"
    Unpickler = BlockUnpickler
    UnpicklingError = pickle.UnpicklingError

    @staticmethod
    def load(*_: Any, **__: Any) -> NoReturn:
        raise pickle.UnpicklingError("only the zip format of torch.save (torch >= 1.6) is accepted")


def load_block(data: bytes, block: str) -> nn.Module:
    """Unpickle one block on the CPU.

    Parameters
    ----------
    data
        The bytes that ``torch.save(module, file)`` wrote.
    block
        Its name, for the errors.

    Raises
    ------
    CheckpointRefused
        The pickle names or does something that a model does not need. Nothing of it was executed.
    BlockBroken
        The bytes are not a pickled ``nn.Module`` that the installed releases of torch and mmm can rebuild.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise CheckpointRefused(
                    f"Block {block!r} is a TorchScript archive, which is code.",
                    hint="Use the file with pickled modules.",
                )
    except zipfile.BadZipFile as error:
        raise BlockBroken(f"Block {block!r} is not a file of torch.save: {error}.") from error
    try:
        module = torch.load(io.BytesIO(data), map_location="cpu", pickle_module=_PickleModule, weights_only=False)
    except _ForbiddenName as refused:
        raise CheckpointRefused(
            f"Block {block!r} of the checkpoint names {refused}, which a model does not need; nothing was executed.",
            hint="Do not use this file. Get the checkpoint from its publisher again.",
        ) from None
    except Exception as error:
        # A damaged file can fail anywhere inside the unpickler; all of it means the same to the user.
        raise BlockBroken(
            f"Block {block!r} cannot be rebuilt: {type(error).__name__}: {error}.",
            hint="The file is damaged, or was made by a release of mmm that the installed one does not understand.",
        ) from error
    if not isinstance(module, nn.Module):
        raise BlockBroken(f"Block {block!r} is a {type(module).__name__}, not a torch.nn.Module.")
    return module
