"""Restricted unpickling of the model's blocks: a pickle may rebuild what a model is made of, and do nothing else.

A block is a pickled ``nn.Module``. Unpickling runs whatever the file names, so here

- a name is looked up only in a short list of modules, *before* anything is imported, and only if it is a class *defined* there
  that is an ``nn.Module`` (no traced or scripted one), a pydantic model or an enum;
- what a name stands for is never handed to the file: it gets an inert token, good for making an object and for nothing else;
- objects are made without their constructors, as genuine files do. The only calls are: rebuilding tensors and parameters from checked
  arguments, ``OrderedDict``, ``set``, ``torch.Size``, ``torch.device``, enum members, and a class nested in an allowed class;
- state is set once, by the *class's* own ``__setstate__``, and only if it follows the rules of
  :mod:`~backend.inference.block_rules`, which the finished block must follow too; items are added to lists, dicts and sets only.

It is the pure-Python unpickler of the standard library, whose opcodes can be overridden. The pickle holds the structure
only (weights lie beside it), so its speed does not matter. The weights are not read by torch either: they are where the zip's
directory says, stored plainly, and a tensor may not reach beyond its own.
"""

from __future__ import annotations

import enum
import importlib
import io
import mmap
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import nn

from backend.errors import BlockBroken, CheckpointRefused
from backend.inference.block_records import STORAGE_TYPES, Records, Storage, StorageType
from backend.inference.block_rules import (
    ForbiddenError,
    ModelClass,
    check_finished,
    check_key,
    name_of,
    refuse,
    set_state,
)
from backend.inference.bounded_zip import checked_zip

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
    if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in whole):
        refuse("a tensor made of something else than a storage and whole numbers")
    if hooks or metadata:
        refuse("a tensor with hooks or metadata")
    if len(size) != len(stride):
        refuse("a tensor with other strides than sizes")
    count, last = 1, offset
    for n, step in zip(size, stride, strict=True):
        count, last = count * n, last + (n - 1) * step
    # A stride of 0 would let one number pass for any amount of them, until something copies the tensor.
    if count > storage.numbers.numel() or (count and last >= storage.numbers.numel()):
        refuse("a tensor that is larger than its storage")
    rebuilt = storage.numbers.as_strided(size, stride, offset) if count else storage.numbers.new_empty(size)
    return rebuilt.detach().requires_grad_(bool(requires_grad))


def _rebuild_parameter(data: Any, requires_grad: Any, hooks: Any) -> nn.Parameter:
    if not isinstance(data, torch.Tensor) or hooks:
        refuse("a parameter made of something else than a tensor")
    return nn.Parameter(data, requires_grad=bool(requires_grad))


def _ordered_dict(*items: Any) -> OrderedDict[Any, Any]:
    if len(items) > 1 or not all(type(item) is list for item in items):
        refuse("an OrderedDict made of something else than a list")
    for pair in items[0] if items else ():
        if type(pair) not in (list, tuple) or len(pair) != 2:
            refuse("an OrderedDict made of something else than pairs")
        check_key(pair[0])
    return OrderedDict(*items)


def _set(*items: Any) -> set[Any]:
    if len(items) > 1 or not all(isinstance(item, (list, tuple)) for item in items):
        refuse("a set made of something else than a list")
    for item in items[0] if items else ():
        check_key(item)
    return set(*items)


def _size(numbers: Any = ()) -> torch.Size:
    if not isinstance(numbers, (list, tuple)) or not all(type(n) is int for n in numbers):
        refuse("a torch.Size made of something else than whole numbers")
    return torch.Size(numbers)


def _device(*parts: Any) -> torch.device:
    if not all(type(part) in (str, int) for part in parts):
        refuse("a torch.device made of something else than its name")
    return torch.device(*parts)


def _nested_class(owner: Any, name: Any) -> Any:
    """``getattr(owner, name)``, where that is a class (or enum member) defined inside an allowed class; else refused."""
    if not isinstance(owner, ModelClass) or not isinstance(name, str) or name.startswith("_"):
        refuse(f"getattr of {_name_of(owner)}")
    value = vars(owner.cls).get(name)
    if isinstance(value, enum.Enum):
        return value
    if not isinstance(value, type) or not _is_model_class(value) or not _may_define(value.__module__):
        refuse(f"{owner.cls.__module__}.{owner.cls.__qualname__}.{name}")
    return ModelClass(value)


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


# --- the unpickler -------------------------------------------------------------------------------------------------

_PythonUnpickler: Any = pickle._Unpickler


class BlockUnpickler(_PythonUnpickler):  # type: ignore[misc]  # typeshed does not describe its opcodes
    """The unpickler described in this module's docstring. Used through :func:`load_block`."""

    dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)

    def __init__(self, file: Any, storages: Callable[[str, torch.dtype, int], Storage]) -> None:
        super().__init__(file)
        self._storages = storages

    def persistent_load(self, pid: Any) -> Storage:
        """A storage that lies beside the pickle; the device that it was on does not matter."""
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[1], StorageType):
            refuse("a reference to something else than a storage")
        _, kind, key, _, numbers = pid
        if type(key) is not str or type(numbers) is not int:
            refuse("a storage without a name and a size")
        return self._storages(key, kind.dtype, numbers)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _FUNCTIONS:
            return _Function(f"{module}.{name}", _FUNCTIONS[module, name])
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module == "torch" and name in STORAGE_TYPES:
            return StorageType(STORAGE_TYPES[name])
        if not _may_define(module):
            refuse(f"{module}.{name}")
        outer, *inner = name.split(".")
        # Only what is defined there: a module also holds what it imported (os, functions, other packages' classes).
        found = vars(sys.modules.get(module) or importlib.import_module(module)).get(outer)
        if not _is_model_class(found) or not _may_define(str(getattr(found, "__module__", ""))):
            refuse(f"{module}.{name}")
        assert isinstance(found, type)
        token: Any = ModelClass(found)
        for part in inner:
            token = _nested_class(token, part)
        return token

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(arguments, tuple):
            refuse("a call without a list of arguments")
        if isinstance(function, ModelClass) and issubclass(function.cls, enum.Enum) and len(arguments) == 1:
            check_key(arguments[0])
            self.stack[-1] = function.cls(arguments[0])
        elif isinstance(function, _Function):
            self.stack[-1] = function.call(*arguments)
        else:
            refuse(f"a call of {_name_of(function)}")

    def _new_object(self) -> None:
        arguments = self.stack.pop()
        token = self.stack[-1]
        if not isinstance(token, ModelClass) or issubclass(token.cls, enum.Enum) or arguments != ():
            refuse(f"a new {_name_of(token)}")
        self.stack[-1] = token.cls.__new__(token.cls)

    def _build(self) -> None:
        state = self.stack.pop()
        set_state(self.stack[-1], state)

    def _refused_opcode(self) -> None:
        refuse("an opcode that no genuine file uses")

    @staticmethod
    def _only_into(
        kinds: tuple[type, ...], marked: bool, step: int, load: Callable[[Any], None]
    ) -> Callable[[Any], None]:
        """``load``, if what it adds to is one of ``kinds``, and if every ``step``-th of what is added is fit to be a key (0: none need be)."""

        def checked(self: Any) -> None:
            items = self.stack if marked else self.stack[-max(step, 1) :]
            target = self.metastack[-1][-1] if marked else self.stack[-1 - max(step, 1)]
            if type(target) not in kinds:
                refuse(f"items for {_name_of(target)}")
            for key in items[::step] if step else ():
                check_key(key)
            load(self)

        return checked

    dispatch[pickle.REDUCE[0]] = _reduce
    dispatch[pickle.NEWOBJ[0]] = _new_object
    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.APPEND[0]] = _only_into((list,), False, 0, _PythonUnpickler.load_append)
    dispatch[pickle.APPENDS[0]] = _only_into((list,), True, 0, _PythonUnpickler.load_appends)
    dispatch[pickle.SETITEM[0]] = _only_into((dict, OrderedDict), False, 2, _PythonUnpickler.load_setitem)
    dispatch[pickle.SETITEMS[0]] = _only_into((dict, OrderedDict), True, 2, _PythonUnpickler.load_setitems)
    dispatch[pickle.ADDITEMS[0]] = _only_into((set,), True, 1, _PythonUnpickler.load_additems)
    # Calls by other ways; dicts and sets whose keys nobody checked; a buffer whose few bytes ask for any amount of memory.
    for _opcode in (
        *(pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4),
        *(pickle.DICT, pickle.FROZENSET, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    ):
        dispatch[_opcode[0]] = _refused_opcode


def _name_of(value: object) -> str:
    return value.name if isinstance(value, _Function) else name_of(value)


def load_block(data: bytes | mmap.mmap, block: str) -> nn.Module:
    """Unpickle one block on the CPU.

    Parameters
    ----------
    data
        The bytes that ``torch.save(module, file)`` wrote. Memory of :func:`~backend.inference.bounded_zip.unpack` becomes the module's
        own: its weights stay there.
    block
        Its name, for the errors.

    Raises
    ------
    CheckpointRefused
        The pickle names or does something that a model does not need. Nothing of it was executed.
    BlockBroken
        The bytes are not a pickled ``nn.Module`` that the installed releases of torch and mmm can rebuild.
    """
    if not isinstance(data, mmap.mmap):
        memory = mmap.mmap(-1, max(len(data), 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory[: len(data)] = data
        data = memory
    try:
        with checked_zip(data, f"Block {block!r}") as archive:
            records = Records(archive, data, block)
            module = BlockUnpickler(io.BytesIO(records.read("data.pkl")), records.storage).load()
        check_finished(module)
    except (BlockBroken, CheckpointRefused):
        raise
    except zipfile.BadZipFile as error:
        raise BlockBroken(
            f"Block {block!r} is not a file of torch.save: {error}.", hint="Download it again."
        ) from error
    except ForbiddenError as refused:
        raise CheckpointRefused(
            f"Block {block!r} of the checkpoint holds {refused}, which a model does not need; nothing was executed.",
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
