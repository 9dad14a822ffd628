"""What the objects of a model may look like: the rules for the state that a pickle sets, and for the finished block.

The rules hold twice. At the moment when a state is set, since setting it runs methods of the class; the containers in it are copied then, so
that what the file still does to them through the pickle's memo reaches nothing. And once more over the whole finished block, as
a tree: whatever became of it on the way, it consists of modules, configs, enum members, tensors and plain values, and nothing shadows
a method, registers a hook or is too deep or too large for those who walk it.
"""

from __future__ import annotations

import enum
import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from pydantic import BaseModel
from torch import nn

from backend.inference.bounded_zip import MAX_BLOCK_BYTES

# WSC's encoder is 18 levels deep and has 5 000 values. Torch walks modules by recursion and visits a shared one once for each way to it.
MAX_DEPTH = 100
MAX_VALUES = 200_000

_PYDANTIC_STATE = {"__dict__", "__pydantic_extra__", "__pydantic_fields_set__", "__pydantic_private__"}
_MEMBERS: tuple[tuple[str, type], ...] = (
    ("_modules", nn.Module),
    ("_parameters", torch.Tensor),
    ("_buffers", torch.Tensor),
)
# Exact types: a class of these kinds that someone derived may have methods of its own.
_KEYS = (str, int, float, bool, type(None))
_LEAVES = (*_KEYS, complex, bytes, torch.Size, torch.device, torch.dtype)
_DICTS = (dict, OrderedDict)
_CONTAINERS = (*_DICTS, list, set)
_PLAIN_NAME = re.compile(r"\w+")  # Sequential names its members 0, 1, 2, ...


class ForbiddenError(Exception):
    """Raised inside the unpickler with what was refused."""


def refuse(what: str) -> NoReturn:
    raise ForbiddenError(what)


@dataclass(frozen=True)
class ModelClass:
    """A class of the model, as the file holds it: it can be asked for a new object or an enum member, and is nothing else."""

    cls: type


def name_of(value: object) -> str:
    """What to call a value of the file in an error. Never its ``repr``: of nested tuples that share parts it could fill the memory."""
    if type(value) is str:
        return f"{value[:60]!r}"
    if isinstance(value, ModelClass):
        return f"{value.cls.__module__}.{value.cls.__qualname__}"
    return f"a {type(value).__module__}.{type(value).__qualname__}"


def check_key(key: object) -> None:
    """Refuse what is no plain key of a dict or set: to look for a key runs its class's methods, and a tuple can take for ever."""
    if type(key) not in _KEYS and not isinstance(key, enum.Enum):
        refuse(f"{name_of(key)} as a key")


def set_state(target: nn.Module | BaseModel, state: Any) -> None:
    """Check a state and give it to a new module or config, its containers copied.

    Raises
    ------
    ForbiddenError
        The state breaks a rule; the target is left as it was.
    """
    cls = type(target)
    if not isinstance(target, (nn.Module, BaseModel)) or type(state) is not dict:
        refuse(f"setting attributes of {name_of(target)}")
    if vars(target):
        refuse(f"a second state for {name_of(target)}")
    state = {key: _copy(value) for key, value in state.items()}
    if isinstance(target, nn.Module):
        _check_module(cls, state)
        type(target).__setstate__(target, state)  # type: ignore[no-untyped-call]
        return
    if cls.__setstate__ is not BaseModel.__setstate__ or not set(state) <= _PYDANTIC_STATE:
        refuse(f"a state that {_full_name(cls)} does not have")
    _check_config(cls, state)
    BaseModel.__setstate__(target, state)


def check_finished(block: object) -> None:
    """Check a whole block after it was loaded, as the tree that others will see.

    Parameters
    ----------
    block
        What the pickle made, a module as a rule.

    Raises
    ------
    ForbiddenError
        Something in it breaks a rule, or it has more than :data:`MAX_DEPTH` levels or :data:`MAX_VALUES` values, each counted as
        often as there are ways to it (a loop, therefore, is refused), or more tensors than fit a block.
    """
    values, tensor_bytes = 1, 0
    pending = [(block, 0)]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, torch.Tensor) and type(value) in (torch.Tensor, nn.Parameter):
            # Half precision is computed in single precision.
            tensor_bytes += value.numel() * max(value.element_size(), 4)
            if tensor_bytes > MAX_BLOCK_BYTES or value._backward_hooks:
                refuse(f"tensors of more than {MAX_BLOCK_BYTES} bytes, or with hooks")
            continue
        parts = _parts(value)
        values += len(parts)
        if values > MAX_VALUES or (parts and depth >= MAX_DEPTH):
            refuse(f"values nested over {MAX_DEPTH} levels deep, or more than {MAX_VALUES} of them")
        pending += ((part, depth + 1) for part in parts)


def _parts(value: Any) -> list[Any]:
    """What a value consists of, which is to be checked in turn; the value itself is checked here."""
    if isinstance(value, nn.Module):
        if any(type(vars(value).get(group)) not in _DICTS for group, _ in _MEMBERS):
            refuse(f"{_full_name(type(value))} without a state")
        _check_module(type(value), vars(value))
        return list(vars(value).values())
    if isinstance(value, BaseModel):
        state = {name: getattr(value, name, None) for name in _PYDANTIC_STATE}
        if type(state["__pydantic_fields_set__"]) is not set:
            refuse(f"{_full_name(type(value))} without a state")
        _check_config(type(value), state)
        return list(state.values())
    if type(value) in _DICTS:
        for key in value:
            check_key(key)
        return list(value.values())
    if type(value) in (list, tuple, set, frozenset):
        return list(value)
    if type(value) not in _LEAVES and not isinstance(value, (enum.Enum, ModelClass)):
        refuse(f"{name_of(value)} as a value")
    return []


def _check_module(cls: type, attributes: dict[Any, Any]) -> None:
    for key, value in attributes.items():
        _check_name(cls, key)
        # Torch keeps submodules in `_modules`; one that is an attribute would be called wherever the code calls that attribute.
        if isinstance(value, nn.Module):
            refuse(f"a module as the plain attribute {_full_name(cls)}.{key}")
        if "hook" in key and not (value is None or type(value) is bool or (type(value) in _DICTS and not value)):
            refuse(f"hooks in {_full_name(cls)}.{key}")
    seen = set(attributes)
    for group, kind in _MEMBERS:
        members = attributes.get(group, {})
        if type(members) not in _DICTS:
            refuse(f"{cls.__qualname__}.{group} that is no dict")
        for name, member in members.items():
            if type(name) is not str or not _PLAIN_NAME.fullmatch(name) or not isinstance(member, (kind, type(None))):
                refuse(f"{cls.__qualname__}.{group} with {name_of(name)}")
            if name in seen:
                refuse(f"{cls.__qualname__}.{name} in two places")
            seen.add(name)
            if hasattr(cls, name):
                refuse(f"{_full_name(cls)}.{name} hidden by a member of the file")
    if type(attributes.get("_non_persistent_buffers_set", set())) is not set:
        refuse(f"{cls.__qualname__}._non_persistent_buffers_set that is no set")


def _check_config(cls: type, state: dict[str, Any]) -> None:
    fields = state.get("__dict__")
    extra, private = state.get("__pydantic_extra__"), state.get("__pydantic_private__")
    if type(fields) is not dict or type(state.get("__pydantic_fields_set__")) not in (set, type(None)):
        refuse(f"fields that {_full_name(cls)} does not have")
    if not all(type(names) in (dict, type(None)) for names in (extra, private)):
        refuse(f"fields that {_full_name(cls)} does not have")
    # A release may have had other fields than the installed one, so an unknown name is no offence; one with an underscore is no field.
    for name in (*fields, *(extra or ())):
        _check_name(cls, name)
        if name.startswith("_"):
            refuse(f"fields that {_full_name(cls)} does not have")
    for name in private or ():
        if type(name) is not str or name not in getattr(cls, "__private_attributes__", ()):
            refuse(f"a private attribute that {_full_name(cls)} does not have")


def _check_name(cls: type, name: Any) -> None:
    """Refuse an attribute's name that is none, or that the class has already: a method, a property, a default, a switch of torch."""
    # An enum member may be a str too, one that compares as another name than it shows.
    if type(name) is not str or not name.isidentifier() or name.startswith("__"):
        refuse(f"an attribute of {_full_name(cls)} named {name_of(name)}")
    if hasattr(cls, name):
        refuse(f"{_full_name(cls)}.{name} hidden by a value of the file")


def _copy(value: Any) -> Any:
    return type(value)(value) if type(value) in _CONTAINERS else value


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
