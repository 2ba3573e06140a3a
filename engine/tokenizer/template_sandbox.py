"""A Jinja sandbox whose programs end: bounded operations, time and size of every value.

Jinja's own sandbox keeps a template from Python's internals, but not from looping for hours or from building a string
of terabytes. Here:

- every turn of a loop, macro, call, operator and filter spends from a budget and looks at the deadline;
- what can make a value larger than its operands (operators, literals, joins, captured blocks, filters, string methods)
  is checked before it runs. So no value holds more than MAX_VALUE_SIZE characters and entries, shared parts counted
  as often as they occur, and what Jinja does with a value (print, compare, sort) is bounded too.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.parser
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_VALUE_SIZE = 8 << 20
"""Largest value that a template may make, by size_of; also the largest output."""
MAX_OPERATIONS = 2_000_000
MAX_SECONDS = 3.0
MAX_INTEGER_BITS = 256
MAX_INDENT = 16
ENTRY_SIZE = 8
"""What an entry of a list or dict, or a number, counts beside its characters; as the pointer to it takes."""


class TemplateLimitError(Exception):
    """A template used more time, operations or memory than it may."""


class TemplateRefusal(Exception):
    """The template called raise_exception."""


class Budget:
    """What one rendering has left."""

    def __init__(self) -> None:
        self.operations = MAX_OPERATIONS
        self.deadline = time.monotonic() + MAX_SECONDS

    def spend(self, count: int = 1) -> None:
        """Raises TemplateLimitError if there is not so much left, or if the time is over."""
        self.operations -= count
        if self.operations < 0:
            raise TemplateLimitError(f"more than {MAX_OPERATIONS} operations")
        if time.monotonic() > self.deadline:
            raise TemplateLimitError(f"more than {MAX_SECONDS:g} seconds")


def check_size(size: int) -> None:
    """Raises TemplateLimitError above MAX_VALUE_SIZE."""
    if size > MAX_VALUE_SIZE:
        raise TemplateLimitError(f"a value of {size} characters or entries; accepted: at most {MAX_VALUE_SIZE}")


def size_of(value: object) -> int:
    """Characters of a value and ENTRY_SIZE per entry, shared parts as often as they occur; stops above the limit."""
    total = 0
    pending: list[object] = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, list | tuple | set | frozenset):
            pending.extend(item)
        elif isinstance(item, dict):
            pending.extend(item.keys())
            pending.extend(item.values())
        if item is not value:
            total += ENTRY_SIZE
        if total + ENTRY_SIZE * len(pending) > MAX_VALUE_SIZE:
            return total + ENTRY_SIZE * len(pending)
    return total


class Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training masks; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateNamespace(Namespace):
    """Refuses names that begin with an underscore, which reach Python's internals; prints none of its contents."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace may not hold {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with a budget; one rendering at a time, each with a new ``budget``."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self) -> None:
        self.budget = Budget()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # or constants would be computed at compile time, outside the budget
            cache_size=0,
            extensions=[Generation, "jinja2.ext.loopcontrols"],
        )
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        # Filters that lay text out for people: each one more way to ask for a large value.
        for name in ("center", "pprint", "urlize", "wordwrap", "xmlattr", "batch", "slice", "random"):
            del self.filters[name]
        self.filters["tojson"] = _to_json
        for name, function in list(self.filters.items()):
            self.filters[name] = self._bounded_filter(name, function)
        self.globals.update(
            namespace=TemplateNamespace,
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            _spend=self._spend,
            _checked=_checked,
            _join=lambda *parts: self.concat(map(str, parts)),
        )

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        instrument(source)
        return super()._generate(source, name, filename, defer_init)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.budget.spend()
        if __obj is _checked:
            return _checked(*args)
        _check_method(__obj, args)
        result = super().call(__context, __obj, *args, **kwargs)
        check_size(size_of(result))
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.budget.spend()
        if operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else (right,))
        elif isinstance(left, int | float) and isinstance(right, int | float):
            _check_integers(operator, left, right)
        elif operator == "*":
            sized, count = (left, right) if isinstance(right, int) else (right, left)
            if isinstance(count, int):
                check_size(size_of(sized) * count)
        elif operator == "+":
            check_size(size_of(left) + size_of(right))
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Also refuses the string methods that pad to a width."""
        if isinstance(obj, str) and attr in _WIDENING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """str.format, with widths of at most three digits."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text: str = value.__self__

        def run(*args: Any, **kwargs: Any) -> str:
            _check_format(text, [*args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return run

    def _spend(self) -> str:
        self.budget.spend()
        return ""

    def concat(self, parts: Iterable[str]) -> str:
        """What Jinja joins captured output with."""
        texts = list(parts)
        check_size(sum(map(len, texts)))
        return "".join(texts)

    def _bounded_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        # Jinja passes the environment or context first to functions marked for it.
        marker = getattr(function, "jinja_pass_arg", None)

        def run(*args: Any, **kwargs: Any) -> Any:
            given = args if marker is None else args[1:]
            self.budget.spend()
            _check_filter(name, given, kwargs)
            result = function(*args, **kwargs)
            check_size(size_of(result))
            return result

        if marker is not None:
            run.jinja_pass_arg = marker  # type: ignore[attr-defined]
        return run


_WIDENING_METHODS = frozenset(("center", "ljust", "rjust", "zfill", "expandtabs", "translate", "encode"))


def instrument(template: nodes.Template) -> None:
    """Makes every loop, macro and call block spend at each turn, and checks the size of literals and of ``~``."""
    for kind in (nodes.For, nodes.Macro, nodes.CallBlock):
        for block in template.find_all(kind):
            body: list[nodes.Node] = block.body  # type: ignore[attr-defined]
            body.insert(0, nodes.ExprStmt(_call("_spend", [])).set_lineno(block.lineno))
    _wrap_children(template)


def _wrap_children(node: nodes.Node) -> None:
    for field, value in node.iter_fields():
        if isinstance(value, list):
            value[:] = [_wrap(item) for item in value]
        elif isinstance(value, nodes.Node):
            setattr(node, field, _wrap(value))


def _wrap(node: Any) -> Any:
    if not isinstance(node, nodes.Node):
        return node
    _wrap_children(node)
    if isinstance(node, nodes.Concat):
        return _call("_join", node.nodes).set_lineno(node.lineno)
    is_literal = isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load")
    return _call("_checked", [node]).set_lineno(node.lineno) if is_literal else node


def _call(name: str, args: list[Any]) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load"), args, [], None, None)


def _checked(value: Any) -> Any:
    check_size(size_of(value))
    return value


def _check_integers(operator: str, left: float, right: float) -> None:
    if not isinstance(left, int) or not isinstance(right, int):
        return
    bits = 0
    if operator == "*":
        bits = left.bit_length() + right.bit_length()
    elif operator == "**":
        bits = left.bit_length() * abs(right)
    if bits > MAX_INTEGER_BITS:
        raise TemplateLimitError(f"an integer of {bits} bits; accepted: at most {MAX_INTEGER_BITS}")


def _check_format(text: str, values: Sequence[Any]) -> None:
    """A width in a format makes a value of any size out of nothing; so does an argument that is used often."""
    if re.search(r"\d{4}|%[^%a-zA-Z]*\*|:[^{}]*\{", text):
        raise TemplateLimitError("a format with a computed width, or one of more than three digits")
    fields = text.count("{") + text.count("%")
    check_size(len(text) + fields * (1000 + sum(size_of(value) for value in values)) if fields else 0)


def _check_method(function: object, args: Sequence[Any]) -> None:
    text, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if isinstance(text, str):
        if name == "join" and args:
            _check_join(text, args[0])
        elif name == "replace" and len(args) >= 2:
            _check_replace(text, args[0], args[1])


def _check_join(separator: str, items: object) -> None:
    if isinstance(items, list | tuple | set | dict | str):
        check_size(len(separator) * len(items) + size_of(items))


def _check_replace(text: str, old: object, new: object) -> None:
    times = text.count(old) if isinstance(old, str) else 0
    check_size(len(text) + times * size_of(new))


def _check_filter(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    values = [*args, *kwargs.values()]
    others = values[1:]
    if name == "join":
        _check_join(next((v for v in others if isinstance(v, str)), ""), values[0])
    elif name == "replace" and len(others) >= 2:
        _check_replace(str(values[0]), others[0], others[1])
    elif name == "format":
        _check_format(str(values[0]), others)
    elif name == "indent":
        for value in others:
            if isinstance(value, str):
                check_size(len(value) * (str(values[0]).count("\n") + 1))
            elif not isinstance(value, bool):
                _check_indent(value)
    elif name == "sum":
        check_size(sum(size_of(value) for value in values))


def _check_indent(indent: object) -> None:
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= MAX_INDENT):
        raise TemplateLimitError(f"an indent of {indent!r}; accepted: 0 to {MAX_INDENT}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML; models were trained on plain JSON."""
    _check_indent(indent)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object = "") -> None:
    raise TemplateRefusal(str(message))


def _strftime_now(form: object) -> str:
    if not isinstance(form, str) or len(form) > 64 or re.search(r"%[^%a-zA-Z]*\d", form):
        raise TemplateLimitError("a date format with widths, or of more than 64 characters")
    return datetime.now().strftime(form)
