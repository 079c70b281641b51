"""Policies by name: as files hold them, and as they write themselves."""

import ast
import json
from dataclasses import asdict, is_dataclass

from .checks import LessError
from .policies import Policy


def policy_of(name: str, fields: dict) -> Policy | None:
    """The policy of a class name and fields, as they were written to a file; None if no such class is imported."""
    kind = _class_called(name)
    return kind and kind(**{field: tuple(x) if isinstance(x, list) else x for field, x in fields.items()})


def policy_said(text: str) -> Policy | None:
    """The policy that wrote itself as "H2O(heavy=26, recent=25)"; None if it is none, or its class is not imported."""
    try:
        call = ast.parse(text, mode="eval").body
        fields = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}  # type: ignore[attr-defined]
        return policy_of(call.func.id, fields)  # type: ignore[attr-defined]
    except (SyntaxError, ValueError, AttributeError, TypeError):
        return None


def written(policy: Policy) -> tuple[str, dict]:
    """A policy as files hold it, class name and fields, from which `policy_of` makes it again. LessError if it could not."""
    name = type(policy).__name__
    if not is_dataclass(policy):
        raise LessError(f"{policy!r} cannot be written to a file: make its class a dataclass, @dataclass(frozen=True)")
    if _class_called(name) is not type(policy):
        raise LessError(
            f"{policy} cannot be written to a file, where {name} would mean another class: give yours another name or, if it was "
            f"defined anew, make what uses it anew"
        )
    fields = asdict(policy)
    try:
        again = policy_of(*json.loads(json.dumps([name, fields])))
    except TypeError:
        again = None
    if again != policy:
        raise LessError(
            f"{policy} cannot be written to a file: not all of its fields are numbers, strings or tuples, and these alone can be"
        )
    return name, fields


def _class_called(name):
    """The policy class of that name: the one of this package or, of several others, the one defined last; None if none is."""
    classes = [*Policy.__subclasses__()]
    for kind in classes:  # it grows on the way
        classes += kind.__subclasses__()
    here = __name__.rpartition(".")[0]
    return {kind.__name__: kind for kind in sorted(classes, key=lambda kind: kind.__module__.startswith(here))}.get(name)
