"""Chat templates, run within bounds: code that came with a model and that nobody has read.

transformers runs a template in jinja2's sandbox, which keeps it from Python and lets it run for
ever and fill the memory. Here it is given a budget: work (passes through loops, calls), the size of
a single value and of all values together, and time. What a conversation holds adds to it, so long
data has more. Every rendering in this process goes through it, those of transformers' own
`apply_chat_template` included. See docs/adr/0017-nothing-a-user-downloads-runs.md.
"""

from __future__ import annotations

import functools
import operator
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import BuiltinMethodType, MethodType
from typing import TYPE_CHECKING, Any

from jinja2 import Template, TemplateSyntaxError, nodes, pass_context
from jinja2.runtime import LoopContext, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "TemplateLimitError",
    "bound_templates",
    "probe",
    "render",
    "template_errors",
]

# Each bound is far above what a template of a released model needs for an empty conversation, and
# grows with the conversation by the factor beside it. The unit of work is a node of the template's
# syntax tree that is passed.
WORK, WORK_A_CHARACTER = 20_000_000, 1_000
LARGEST, LARGEST_A_CHARACTER = 1 << 19, 16
TOTAL, TOTAL_A_CHARACTER = 1 << 26, 256
SECONDS, SECONDS_A_CHARACTER = 2.0, 1e-6
PASS_WORK = 40
"""What a pass through a loop or a call costs besides what stands in it."""
SOURCE_CHARACTERS = 1 << 17
SOURCE_NODES = 20_000
WORK_BETWEEN_LOOKS = 2_000
"""How often the clock is read."""
WIDEST = 9_999
"""Widest column that a format may ask for."""

_CONTAINERS = (list, tuple, dict, set, frozenset)
_OTHER_TEMPLATE = 'pass chat_template="chatml" or the path of a .jinja template'


class TemplateLimitError(DataError):
    """A chat template takes more work, memory or time than any template needs."""


def bound_templates() -> None:
    """Let every chat template that transformers renders in this process run within bounds."""
    from transformers.utils import chat_template_utils

    if chat_template_utils._compile_jinja_template is not _compiled:
        chat_template_utils._compile_jinja_template = _compiled


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    answer: bool = False,
) -> str:
    """Return what a tokenizer's chat template writes, with the header of an answer if `answer`.

    Errors: `DataError` for what the template raises, `TemplateLimitError` for one out of bounds.
    """
    bound_templates()
    with template_errors():
        text: str = tokenizer.apply_chat_template(
            list(messages),
            tools=[dict(tool) for tool in tools] or None,
            add_generation_prompt=answer,
            tokenize=False,
        )
    return text


def probe(tokenizer: PreTrainedTokenizerBase) -> None:
    """Render one short conversation, to find what is wrong with a template whatever the data.

    Errors: `DataError` if it is not valid Jinja, `TemplateLimitError` if it is out of bounds.
    """
    template = tokenizer.chat_template
    named = template.values() if isinstance(template, Mapping) else (template,)
    for source in named:
        if not isinstance(source, str):
            raise DataError(
                f"the tokenizer's chat template is a {type(source).__name__}; expected Jinja "
                "source as text; " + _OTHER_TEMPLATE
            )
    try:
        render(tokenizer, [{"role": "user", "content": "a"}])
    except TemplateLimitError:
        raise
    except DataError as error:
        if isinstance(error.__cause__, (SyntaxError, TemplateSyntaxError)):
            raise
        # valid Jinja that refuses this conversation may well take the data


@contextmanager
def template_errors() -> Iterator[None]:
    """Raise what a template raises as a `DataError`; Jinja code can raise almost anything."""
    try:
        yield
    except DataError:
        raise
    except TemplateSyntaxError as error:
        raise DataError(
            f"chat_template, line {error.lineno}: not valid Jinja: {error.message}; mend it, or "
            + _OTHER_TEMPLATE
        ) from error
    except RecursionError as error:
        raise TemplateLimitError(
            "the chat template is nested, or calls itself, without end; " + _OTHER_TEMPLATE
        ) from error
    except Exception as error:
        raise DataError(
            f"the chat template refuses this conversation: {error or type(error).__name__}; change "
            "the roles or fields of these rows to what the template takes, or pass another "
            "chat_template"
        ) from error


# --- what a rendering may use ---------------------------------------------------------------------


class _Meter:
    """What is left to one rendering.

    The size of a value is that of its text: characters for a string, and all that a list holds,
    counted as often as it stands there, since that is how often it is written or compared.
    """

    __slots__ = (
        "_cpu",
        "_data",
        "_extended",
        "_measured",
        "_seconds",
        "_until_look",
        "_wall",
        "largest",
        "total",
        "work",
    )

    def __init__(self, data: Any = ()) -> None:
        self._data = data
        self._extended = False
        self.work = WORK
        self.total = TOTAL
        self.largest = LARGEST
        self._seconds = SECONDS
        self._until_look = WORK_BETWEEN_LOOKS
        self._wall = time.perf_counter()
        self._cpu = time.thread_time()
        # by id: (the value, which keeps the id its own; size; items; depth)
        self._measured: dict[int, tuple[Any, int, int, int]] = {}

    def step(self, work: int) -> None:
        """Take note of a pass through `work` nodes of the template."""
        self._until_look -= work
        if self._until_look < 0:
            self._look()

    def keep(self, size: int) -> None:
        """Take note of a value of this size that the template has made, or is about to."""
        self.total -= size
        if size > self.largest or self.total < 0:
            self._extend()
            if size > self.largest:
                raise TemplateLimitError(
                    f"the chat template makes a value of {size:,} characters, and {self.largest:,} "
                    "are more than any needs for these messages; " + _OTHER_TEMPLATE
                )
            if self.total < 0:
                raise TemplateLimitError(
                    "the chat template takes more memory than any needs for these messages; "
                    + _OTHER_TEMPLATE
                )

    def fits(self, size: int) -> None:
        """Refuse a value of this size, made or not; nothing is noted."""
        if size > self.largest:
            self.keep(size)

    def measure(self, value: Any) -> tuple[int, int, int]:
        """Return a value's size, its items and how deep it is nested."""
        if isinstance(value, (str, bytes)):
            return len(value), 1, 0
        if isinstance(value, range):
            return 8 * len(value), len(value), 1
        if not isinstance(value, _CONTAINERS):
            return 8, 1, 0
        known = self._measured.get(id(value))
        if known is not None:
            return known[1:]
        size, items, depth = 2, 1, 0
        parts = value if not isinstance(value, dict) else (*value.keys(), *value.values())
        for part in parts:
            if type(part) is str:
                size += len(part) + 2
                items += 1
                continue
            part_size, part_items, part_depth = self.measure(part)
            size += part_size + 2
            items += part_items
            if part_depth > depth:
                depth = part_depth
        self._measured[id(value)] = (value, size, items, depth + 1)
        return size, items, depth + 1

    def check(self, value: Any) -> None:
        """Refuse a container that would be too large if it were written."""
        if isinstance(value, _CONTAINERS):
            self.fits(self.measure(value)[0])

    def _look(self) -> None:
        self.work -= WORK_BETWEEN_LOOKS - self._until_look
        self._until_look = WORK_BETWEEN_LOOKS
        if self.work < 0:
            self._extend()
        if self.work < 0:
            raise TemplateLimitError(
                "the chat template loops more often than any needs to for these messages; "
                + _OTHER_TEMPLATE
            )
        if time.perf_counter() - self._wall > self._seconds:
            self._extend()
            # a process that was stopped, or a busy machine, is not the template's fault
            if time.thread_time() - self._cpu > self._seconds / 2:
                raise TemplateLimitError(
                    f"the chat template has run for {self._seconds:.0f} seconds on one "
                    "conversation; " + _OTHER_TEMPLATE
                )

    def _extend(self) -> None:
        """Add what the data allows; it is counted only for a rendering that asks for it."""
        if self._extended:
            return
        self._extended = True
        size = self.measure(self._data)[0] if self._data else 0
        self.work += size * WORK_A_CHARACTER
        self.total += size * TOTAL_A_CHARACTER
        self.largest += size * LARGEST_A_CHARACTER
        self._seconds += size * SECONDS_A_CHARACTER


_IDLE = _Meter()


class _Current(threading.local):
    meter = _IDLE
    """That of the rendering that goes on in this thread."""


_current = _Current()


# --- the environment ------------------------------------------------------------------------------


@functools.lru_cache
def _compiled(source: str) -> Template:
    """Return a compiled template that counts what it uses: takes the place of transformers' own."""
    if not isinstance(source, str):
        raise DataError(
            f"the chat template is a {type(source).__name__}; expected Jinja source as text"
        )
    if len(source) > SOURCE_CHARACTERS:
        raise TemplateLimitError(
            f"the chat template is {len(source):,} characters long; at most "
            f"{SOURCE_CHARACTERS:,} are taken; " + _OTHER_TEMPLATE
        )
    _current.meter = _Meter()
    return _environment().from_string(source)


@functools.cache
def _environment() -> BoundedEnvironment:
    """Return the environment that transformers renders in, with its bounds."""
    from transformers.utils.chat_template_utils import _cached_compile_jinja_template

    theirs = _cached_compile_jinja_template("").environment
    ours = BoundedEnvironment(
        trim_blocks=theirs.trim_blocks,
        lstrip_blocks=theirs.lstrip_blocks,
        extensions=[type(extension) for extension in theirs.extensions.values()],
    )
    ours.filters.update(
        (name, _metered(name, function))
        for name, function in theirs.filters.items()
        if name not in _LEFT_OUT
    )
    for name in _LEFT_OUT:
        ours.filters.pop(name, None)
    ours.filters.update(_OWN_FILTERS)
    ours.globals.update(theirs.globals)
    ours.globals.pop("lipsum", None)
    ours.globals["namespace"] = type(
        "Namespace", (theirs.globals["namespace"],), {"__repr__": lambda _: "<namespace>"}
    )
    return ours


class _BoundedTemplate(Template):
    def render(self, *args: Any, **kwargs: Any) -> str:
        _current.meter = _Meter(kwargs or args)
        try:
            return super().render(*args, **kwargs)
        finally:
            _current.meter = _IDLE

    def generate(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        meter = _current.meter = _Meter(kwargs or args)
        written = 0
        try:
            for piece in super().generate(*args, **kwargs):
                written += len(piece)
                meter.fits(written)
                yield piece
        finally:
            _current.meter = _IDLE


_BOUND = frozenset((BuiltinMethodType, MethodType))


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with what a template does counted by a `_Meter`."""

    template_class = _BoundedTemplate
    intercepted_binops = frozenset(("*", "**", "%"))

    def concat(self, pieces: Any) -> str:  # jinja2's is "".join
        """Return pieces of output as one text."""
        every = list(pieces)
        _current.meter.keep(sum(map(len, every)))
        return "".join(every)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        count = sum(1 for _ in source.find_all(nodes.Node))
        if count > SOURCE_NODES:
            raise TemplateLimitError(
                f"the chat template has {count:,} parts; at most {SOURCE_NODES:,} are taken; "
                + _OTHER_TEMPLATE
            )
        counted = _Count().visit(source)
        counted.set_environment(self)
        return super()._generate(counted, *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Allow what the sandbox does, and of the built-in types only what does a little work."""
        allowed = _METHODS.get(type(obj))
        if allowed is not None:
            return attr in allowed
        for kind, allowed in _METHODS.items():
            if isinstance(obj, kind):
                return attr in allowed
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Return left operator right, for the operators that can make much of little."""
        _current.meter.step(1)
        if operator == "%" and isinstance(left, str):
            _check_format(left, "%", right if isinstance(right, tuple) else (right,))
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(other, int) and isinstance(one, (str, bytes, list, tuple)):
                    _current.meter.keep(_current.meter.measure(one)[0] * max(0, other))
            if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() + right.bit_length())
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * max(0, right))
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str):
            _current.meter.keep(len(result))
        return result

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call an object from a template."""
        _current.meter.step(PASS_WORK)
        method = called if type(called) in _BOUND else getattr(called, "__wrapped__", called)
        if type(method) in _BOUND:  # the sandbox wraps str.format
            check = _METHOD_CHECKS.get(method.__name__)
            if check is not None and isinstance(method.__self__, str):
                check(method.__self__, *args, **kwargs)
        elif isinstance(called, LoopContext) and args:  # a loop marked as recursive
            args = (_Counted(args[0], PASS_WORK * 10), *args[1:])
        return _kept(super().call(context, called, *args, **kwargs))


class _Count(NodeTransformer):
    """Rewrites a template's syntax tree so that what it does is counted.

    Only what a filter does can be put in anywhere, so operators become filters whose names cannot
    be written in a template.
    """

    def get_visitor(self, node: nodes.Node) -> Any:
        return getattr(self, f"count_{type(node).__name__.lower()}", None)

    def count_for(self, node: nodes.For) -> nodes.Node:
        work = _weight(node)
        self.generic_visit(node)
        node.iter = _filter(node.iter, "for", nodes.Const(work))
        return node

    def count_macro(self, node: Any) -> nodes.Node:
        work = _weight(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(work), "enter"), lineno=node.lineno))
        return node  # type: ignore[no-any-return]

    count_callblock = count_macro
    count_block = count_macro

    def count_output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        # what a filter or a call gives is measured by them
        node.nodes = [
            child
            if isinstance(child, (nodes.TemplateData, nodes.Const, nodes.Call))
            or (isinstance(child, nodes.Filter) and child.name != "slice:")
            else _filter(child, "write")
            for child in node.nodes
        ]
        return node

    def count_add(self, node: nodes.Add) -> nodes.Node:
        terms: list[nodes.Expr] = []
        left: nodes.Expr = node
        while isinstance(left, nodes.Add):
            terms.append(self.visit(left.right))
            left = left.left
        return _filter(self.visit(left), "+", *reversed(terms))

    def count_concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node.nodes[0], "~", *node.nodes[1:])

    def count_getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, "slice") if isinstance(node.arg, nodes.Slice) else node

    def count_compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        for operand in node.ops:
            if operand.op in ("in", "notin"):
                operand.expr = _filter(operand.expr, "in")
        return node

    def count_list(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        if all(isinstance(item, nodes.Const) for item in node.items):
            return node  # type: ignore[no-any-return]
        return _filter(node, "make")

    count_dict = count_list

    def count_tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self.count_list(node) if node.ctx == "load" else node


def _weight(node: nodes.Node) -> int:
    return PASS_WORK + sum(1 for _ in node.find_all(nodes.Node))


def _filter(node: Any, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, f"{name}:", list(args), [], None, None, lineno=node.lineno)


class _Counted:
    """An iterable, each of whose items is a pass through a loop."""

    __slots__ = ("_items", "_work")

    def __init__(self, items: Any, work: int) -> None:
        self._items = items
        self._work = max(PASS_WORK, work)

    def __iter__(self) -> Iterator[Any]:
        step, work = _current.meter.step, self._work
        for item in self._items:
            step(work)
            yield item

    def __len__(self) -> int:
        return len(self._items)


# --- filters --------------------------------------------------------------------------------------


@pass_context  # so that it is not worked out once, at compiling
def _for(_: Any, items: Any, work: int) -> _Counted:
    return _Counted(items, work)


@pass_context
def _enter(_: Any, work: int) -> None:
    _current.meter.step(max(0, work))


def _write(value: Any) -> Any:
    if type(value) is not str:
        _current.meter.check(value)
    return value


_TEXT = frozenset((str,))


def _add(*terms: Any) -> Any:
    """Return the sum of terms, from left to right."""
    if _TEXT.issuperset(map(type, terms)):
        text = "".join(terms)
        _current.meter.keep(len(text))
        return text
    result = terms[0]
    for term in terms[1:]:
        if isinstance(result, (*_CONTAINERS, str)):
            size = _current.meter.measure(result)[0] + _current.meter.measure(term)[0]
            _current.meter.fits(size)
            result = operator.add(result, term)
            _current.meter.keep(len(result))
        else:
            result = operator.add(result, term)
    return result


def _concatenate(*parts: Any) -> str:
    for part in parts:
        _current.meter.check(part)
    text = str_join(parts)
    _current.meter.keep(len(text))
    return text


def _slice(value: Any) -> Any:
    if isinstance(value, (str, list, tuple, bytes)):
        _current.meter.keep(len(value))
    return value


def _in(value: Any) -> Any:
    _current.meter.step(1 + _current.meter.measure(value)[0] // 64)
    return value


def _make(value: Any) -> Any:
    _current.meter.check(value)
    _current.meter.keep(len(value))
    return value


_OWN_FILTERS: Mapping[str, Callable[..., Any]] = {
    "for:": _for,
    "enter:": _enter,
    "write:": _write,
    "+:": _add,
    "~:": _concatenate,
    "slice:": _slice,
    "in:": _in,
    "make:": _make,
}

# no chat template needs them, and what they cost cannot be told from their arguments
_LEFT_OUT = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")


# they hand on what they are given, or its parts, once
_SHALLOW = frozenset(("count", "d", "default", "first", "items", "last", "length"))


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that counts; it says what it is given by as jinja2's own does."""
    check = _FILTER_CHECKS.get(name)
    passed = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0
    shallow = name in _SHALLOW
    eager = name in ("batch", "slice")

    @functools.wraps(function)
    def metered(*args: Any, **kwargs: Any) -> Any:
        meter = _current.meter
        meter.step(PASS_WORK)
        if shallow:
            return function(*args, **kwargs)
        for value in args[passed:]:
            if type(value) is not str:
                meter.check(value)
        for value in kwargs.values():
            meter.check(value)
        if name == "join" and len(args) > passed and not isinstance(args[passed], _SIZED):
            args = (*args[:passed], list(args[passed]), *args[passed + 1 :])
        if check is not None:
            check(*args[passed:], **kwargs)
        result = function(*args, **kwargs)
        if eager:
            result = list(result)
            _current.meter.check(result)
        return _kept(result)

    return metered


_SIZED = (*_CONTAINERS, str, range)


def _kept(result: Any) -> Any:
    if type(result) is str:
        _current.meter.keep(len(result))
    elif isinstance(result, (str, *_CONTAINERS)):
        _current.meter.check(result)
        _current.meter.keep(len(result))
    return result


def _check_bits(bits: int) -> None:
    if bits > 4096:
        raise TemplateLimitError(
            f"the chat template computes a number of {bits:,} bits; " + _OTHER_TEMPLATE
        )


def _check_number(value: Any, most: int = WIDEST) -> int:
    """Return a width, or the length of what is given in its place; refuse one that is too large."""
    number = len(value) if isinstance(value, str) else value
    if not isinstance(number, (int, float)) or abs(number) > most:
        raise TemplateLimitError(
            f"the chat template asks for a width or count of {str(value)[:20]!r}; at most {most:,} "
            "is taken; " + _OTHER_TEMPLATE
        )
    return int(abs(number))


_LONG_NUMBER = re.compile(r"\d{5}")
_NESTED_FIELD = re.compile(r"\{[^{}]*\{")


def _check_format(text: str, mark: str, values: Sequence[Any]) -> None:
    """Refuse a format that would write far more than it is given."""
    if _LONG_NUMBER.search(text) or (mark == "%" and "*" in text):
        raise TemplateLimitError(
            f"the chat template formats with {text[:40]!r}, whose widths are too large or given "
            "elsewhere; " + _OTHER_TEMPLATE
        )
    if mark == "{" and _NESTED_FIELD.search(text.replace("{{", "")):
        raise TemplateLimitError(
            f"the chat template formats with {text[:40]!r}, a field within a field; "
            + _OTHER_TEMPLATE
        )
    each = max((_current.meter.measure(value)[0] for value in values), default=0)
    widest = max((int(number) for number in re.findall(r"\d+", text)), default=0)
    _current.meter.fits(len(text) + text.count(mark) * max(each, widest))


def _percent(text: Any, *args: Any, **kwargs: Any) -> None:
    values = [*args, *kwargs.values()]
    # a mapping is given as one value
    _check_format(str(text), "%", [*values, *(v for a in values if isinstance(a, dict) for v in a)])


def _braces(text: str, *args: Any, **kwargs: Any) -> None:
    _check_format(text, "{", [*args, *kwargs.values()])


def _replace(text: Any, old: Any = "", new: Any = "", count: Any = None) -> None:
    text, old, new = str(text), str(old), str(new)
    _current.meter.fits(len(text) + text.count(old) * len(new))


def _join(items: Any, between: Any = "", attribute: Any = None) -> None:
    if isinstance(items, _SIZED):
        _current.meter.fits(_current.meter.measure(items)[0] + len(items) * len(str(between)))


def _join_method(between: str, items: Any) -> None:
    # a generator's items are strings that exist, each of them counted when it was made
    _join(items, between)
    if not isinstance(items, _SIZED) and len(between) > 64:
        raise TemplateLimitError(
            "the chat template joins what has no length by a long text; " + _OTHER_TEMPLATE
        )


def _indent(text: Any, width: Any = 4, first: Any = False, blank: Any = False) -> None:
    _current.meter.fits(len(str(text)) + (str(text).count("\n") + 2) * _check_number(width))


def _tojson(value: Any, *args: Any, **kwargs: Any) -> None:
    widths = 4
    for given in (*args, *kwargs.values()):
        for part in given if isinstance(given, (list, tuple)) else (given,):
            if part is not None and not isinstance(part, bool):
                widths += _check_number(part, 16)
    size, items, depth = _current.meter.measure(value)
    _current.meter.fits(6 * size + (items * (depth + 2) * widths if widths > 4 else 0))


def _pad(_: Any, width: Any = 80, *args: Any, **kwargs: Any) -> None:
    _check_number(width)


def _numbers(_: Any, *args: Any, **kwargs: Any) -> None:
    for given in (*args, *kwargs.values()):
        if isinstance(given, (int, float)):
            _check_number(given)


_FILTER_CHECKS: Mapping[str, Callable[..., None]] = {
    "batch": _numbers,
    "center": _pad,
    "format": _percent,
    "indent": _indent,
    "join": _join,
    "replace": _replace,
    "round": _numbers,
    "slice": _numbers,
    "tojson": _tojson,
}

_METHOD_CHECKS: Mapping[str, Callable[..., None]] = {
    "center": _pad,
    "ljust": _pad,
    "rjust": _pad,
    "zfill": _pad,
    "format": _braces,
    "join": _join_method,
    "replace": _replace,
}

_METHODS: Mapping[type, frozenset[str]] = {
    kind: frozenset(names.split())
    for kind, names in (
        (
            str,
            "capitalize casefold center count endswith find format index isalnum isalpha isascii "
            "isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper "
            "join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex "
            "rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title "
            "upper zfill",
        ),
        (dict, "copy get items keys values"),
        (list, "copy count index"),
        (tuple, "count index"),
        (bytes, ""),
        (int, "bit_length"),
        (float, "is_integer"),
    )
}
