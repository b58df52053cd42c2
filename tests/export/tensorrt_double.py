"""A double of TensorRT's bindings, made of what the bindings themselves say.

`Double(trt)` is used in place of the module. Enums, numbers, Dims, Weights and loggers are the real
ones; of everything that only TensorRT can make (a builder, a network, a layer, an engine ...) there
is a recorder. It has the names of the real class and no others, binds arguments by the signatures
in pybind11's docstrings, checks their types, and remembers. What a method returns follows from its
signature where that is another such object, None or a bool; numbers, names and shapes a test gives:

    double = Double(trt, {"ICudaEngine.num_io_tensors": 2, "ICudaEngine.get_tensor_name": name})
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

NAMESPACE = re.compile(r"\btensorrt_bindings\.tensorrt\.")
"""In front of every type name in pybind11's signatures."""
OVERLOAD = re.compile(r"^\d+\. ", re.MULTILINE)
SEQUENCE = re.compile(r"(?:[\w.]+\.)?(?:list|List|Sequence)\[(.*)\]")
BUFFERS = (bytes, bytearray, memoryview)


def signatures(function: Any) -> list[str]:
    """Return the signature lines that pybind11 puts into a docstring, one for each overload."""
    doc = NAMESPACE.sub("", function.__doc__ or "")
    if "Overloaded function." not in doc:
        return doc.splitlines()[:1]
    return [part.splitlines()[0] for part in OVERLOAD.split(doc)[1:]]


@dataclass(frozen=True)
class Signature:
    """One overload: its parameters in order (name, type, may be left out), and what it returns."""

    text: str
    parameters: tuple[tuple[str, str, bool], ...]
    result: str

    @classmethod
    def parse(cls, text: str) -> "Signature":
        """Read `name(self: A, b: C, d: E = None) -> F`, as pybind11 writes it."""
        inside, result = text[text.index("(") + 1 :].rsplit(") -> ", 1)
        parts = re.split(r", (?=\w+: )", inside)
        pairs = [part.split(": ", 1) for part in parts[1:]]  # without self
        found = [(name, kind.split(" = ")[0], " = " in kind) for name, kind in pairs]
        return cls(text, tuple(found), result)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by name, or raise TypeError."""
        names = [name for name, _, _ in self.parameters]
        bound = dict(zip(names, args, strict=False))
        missing = [n for n, _, free in self.parameters if not free and n not in bound | kwargs]
        unknown = [n for n in kwargs if n not in names or n in bound]
        if len(args) > len(names) or missing or unknown:
            raise TypeError(f"{len(args)} positional; missing {missing}, unknown {unknown}")
        return bound | kwargs


@dataclass(frozen=True)
class Call:
    """What was called, on what, with what, and what it gave. Setting a property is a call too."""

    target: "Recorder | None"
    name: str
    arguments: dict[str, Any]
    result: Any


class Double:
    """The module's double; `calls` has every call in order."""

    def __init__(self, bindings: ModuleType, answers: Mapping[str, Any] | None = None) -> None:
        self.bindings = bindings
        self.answers = dict(answers or {})  # "Class.member": a value, or a function of arguments
        self.calls: list[Call] = []

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.bindings, name)
        if not isinstance(value, type) or not self.needs_tensorrt(value):
            return value
        return partial(self.call, None, value, "__init__")

    def named(self, name: str) -> list[Call]:
        """Return the calls of one method."""
        return [call for call in self.calls if call.name == name]

    def needs_tensorrt(self, cls: type) -> bool:
        """Tell whether TensorRT makes such objects: no constructor, or one that takes a logger."""
        init = "".join(signatures(cls.__init__))  # type: ignore[misc]
        return not hasattr(cls, "__members__") and (
            init.startswith("Initialize self")
            or re.search(r"(?<!self): ILogger\b(?!\.)", init) is not None
        )

    def find(self, kind: str) -> type | None:
        """Return the class that a docstring means, in Python's spelling or in C++'s."""
        name = kind.rsplit("::", 1)[-1]
        found = getattr(self.bindings, name, getattr(self.bindings, name.removeprefix("I"), None))
        return found if isinstance(found, type) else None

    def accepts(self, kind: str, value: Any, optional: bool = False) -> bool:
        """Tell whether a value may be passed where a docstring says `kind`."""
        if value is None:
            return optional
        if sequence := SEQUENCE.fullmatch(kind):
            return isinstance(value, list | tuple) and all(
                self.accepts(sequence[1], item) for item in value
            )
        if kind in ("int", "typing.SupportsInt"):
            return hasattr(value, "__index__")
        if kind in ("float", "typing.SupportsFloat"):
            return isinstance(value, int | float)
        if kind in ("bool", "str"):
            return type(value).__name__ == kind
        if kind in ("buffer", "typing_extensions.Buffer"):
            return isinstance(value, (*BUFFERS, self.bindings.IHostMemory))
        cls = self.find(kind)
        if cls is None or isinstance(value, cls):  # nothing is known of `object` and `function`
            return True
        if hasattr(cls, "__members__") or self.needs_tensorrt(cls) or hasattr(value, "__members__"):
            return False
        try:  # Dims of a tuple, Weights of an array: the real ones decide
            cls(value)
        except (TypeError, ValueError):
            return False
        return True

    def call(
        self, target: "Recorder | None", cls: type, name: str, *args: Any, **kwargs: Any
    ) -> Any:
        """Bind, check and record one call."""
        overloads = [Signature.parse(text) for text in signatures(getattr(cls, name))]
        reasons = []
        for signature in overloads:
            try:
                bound = signature.bind(args, kwargs)
            except TypeError as error:
                reasons.append(f"{signature.text}: {error}")
                continue
            parameters = [entry for entry in signature.parameters if entry[0] in bound]
            wrong = [n for n, kind, free in parameters if not self.accepts(kind, bound[n], free)]
            if not wrong:
                break
            reasons.append(f"{signature.text}: not the type of {wrong}")
        else:
            raise TypeError("; ".join(reasons))
        if name == "__init__":
            result: Any = Recorder(self, cls)
        else:
            result = self.answer(cls, name, signature.result, bound)
        self.calls.append(Call(target, cls.__name__ if target is None else name, bound, result))
        return result

    def answer(
        self, cls: type, name: str, kind: str, arguments: dict[str, Any] | None = None
    ) -> Any:
        """Return what a test said, or what follows from the declared type."""
        for base in cls.__mro__:
            if (key := f"{base.__name__}.{name}") in self.answers:
                found = self.answers[key]
                return found(**arguments or {}) if callable(found) else found
        if kind in ("None", "bool"):
            return {"None": None, "bool": True}[kind]
        found = self.find(kind)
        if found is None or not self.needs_tensorrt(found):
            raise LookupError(f"answers['{cls.__name__}.{name}'] must say what this {kind} is")
        return Recorder(self, found)


class Recorder:
    """Stands for an object of a class of the bindings; `isinstance` says so too."""

    def __init__(self, double: Double, cls: type) -> None:
        vars(self).update(_double=double, _cls=cls, _values={})

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        cls: type = self._cls
        return cls

    def __repr__(self) -> str:
        return f"<{self._cls.__name__} {self._values.get('name', hex(id(self)))}>"

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._cls, name)  # AttributeError for what the class lacks
        if callable(member):
            if not name.startswith("get_"):
                return partial(self._double.call, self, self._cls, name)
            return lambda *args, **kwargs: self._once(
                (name, args, *kwargs.items()),
                partial(self._double.call, self, self._cls, name, *args, **kwargs),
            )
        kind = signatures(member.fget)[-1].rsplit(" -> ", 1)[-1]
        return self._once(name, partial(self._double.answer, self._cls, name, kind))

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Give what was set before, and the same object where one is asked for again."""
        if key in self._values:
            return self._values[key]
        found = make()
        if type(found) is Recorder:
            self._values[key] = found
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        setter = getattr(getattr(self._cls, name), "fset", None)
        if setter is None:
            raise AttributeError(f"{self._cls.__name__}.{name} cannot be set")
        ((_, kind, _),) = Signature.parse(signatures(setter)[-1]).parameters
        if not self._double.accepts(kind, value):
            raise TypeError(f"{self._cls.__name__}.{name} is a {kind}, not {value!r}")
        self._values[name] = value
        self._double.calls.append(Call(self, f"{name} =", {"value": value}, None))
