"""Options that several commands take, written once as a dataclass, and what completes them.

Typer reads a command's options from its signature. :func:`takes` puts the fields of a dataclass
there, and hands the command one object of it.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

from convmixer_fast.choices import words

__all__ = ["completed", "takes"]


def completed(choice: Any) -> Callable[[str], list[str]]:
    """Return what completes the last of a choice's words, separated by commas, in a shell."""

    def complete(incomplete: str) -> list[str]:
        before, comma, begun = incomplete.rpartition(",")
        return [before + comma + word for word in words(choice) if word.startswith(begun)]

    return complete


def takes(group: type, **defaults: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a command take the fields of ``group`` as options of its own.

    Args:
        group: a dataclass; its fields are annotated as Typer wants them. Where a parameter of the
            command is annotated with it, the options stand, and the command gets an object of it.
        defaults: of its fields, for this command.
    """
    hints = get_type_hints(group, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(group)}
    assert set(defaults) <= set(fields), defaults

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command)
        (holder,) = (p.name for p in signature.parameters.values() if p.annotation is group)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            if parameter.name != holder:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            for name, field in fields.items():
                default = defaults.get(name, field.default)
                missing = default is dataclasses.MISSING
                parameters.append(
                    inspect.Parameter(
                        name,
                        inspect.Parameter.KEYWORD_ONLY,
                        default=inspect.Parameter.empty if missing else default,
                        annotation=hints[name],
                    )
                )

        @functools.wraps(command)
        def run(**values: Any) -> Any:
            options = group(**{name: values.pop(name) for name in fields})
            return command(**{holder: options}, **values)

        vars(run)["__signature__"] = signature.replace(parameters=parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        del run.__wrapped__
        return run

    return decorate
