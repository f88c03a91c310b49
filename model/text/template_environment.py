"""Jinja's sandbox with a budget: the template is compiled with a count of everything that costs.

Jinja lets a sandbox see calls and operators. What it does not show is made visible in the template's tree before it is
compiled: turns of loops, what is written into macros and blocks, `~`, comparisons, slices.
"""

from collections.abc import Iterator
from types import BuiltinMethodType, MethodType, ModuleType
from typing import Any

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from . import template_functions as functions
from .template_budget import CALL, ITEM, budget

MAX_SOURCE = 256 << 10  # characters of a template
_NODE = 4  # work of a part of an expression
_REFUSED = (nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport, nodes.EvalContextModifier)
_OF_SCOPES = ("_loop_vars", "_block_vars")  # that Jinja gives to each call, for functions that take the context
_BODIES = ("body", "else_")


class _Generation(Extension):
    """`{% generation %}` around what an assistant says: for training, no more than its content here."""

    tags = frozenset({"generation"})  # pyright: ignore[reportAssignmentType]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    """Before a value is written. It takes the context so that nothing is written while the template is compiled."""
    text = functions.to_text(value)
    budget().make_text(len(text))
    return text


def _turn(parts: int, written: int) -> str:
    budget().step()
    budget().spend(parts, written)
    return ""


def _spend(parts: int, written: int) -> str:
    budget().spend(parts, written)
    return ""


def _asked() -> bool:
    """A turn of a loop's condition, which may leave out every item."""
    budget().spend(CALL)
    return True


def _weighed(value: Any) -> Any:
    budget().weigh(value)
    return value


def _container(value: Any) -> Any:
    """What `in` looks into."""
    if isinstance(value, dict):
        budget().spend(CALL)
    else:
        budget().spend(4 * budget().weigh(value))
    return value


def _sliced(value: Any) -> Any:
    if isinstance(value, str):
        budget().make_text(len(value))
    elif isinstance(value, list | tuple):
        budget().make_items(len(value))
    return value


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of one template; as transformers makes it, with a budget. Rendering needs `spending`."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)
    count_turn = staticmethod(_turn)
    count_part = staticmethod(_spend)
    count_asked = staticmethod(_asked)
    count_compared = staticmethod(_weighed)
    count_container = staticmethod(_container)
    count_sliced = staticmethod(_sliced)
    count_joined = staticmethod(functions.concat)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is computed while it is compiled
            finalize=_finalize,
            extensions=[_Generation, loopcontrols],
        )
        self.filters = functions.filters()
        self.tests = functions.tests()
        del self.globals["lipsum"]
        self.globals.update(functions.template_globals())
        own = (_turn, _spend, _asked, _weighed, _container, _sliced, functions.concat)
        self._own = frozenset(map(id, own))

    def load(self, source: str) -> tuple[Template, nodes.Template]:
        """A template ready to render, and its tree. TemplateError where it is not valid, or asks for files."""
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"{len(source)} characters; allowed: at most {MAX_SOURCE}")
        try:
            tree = self.parse(source)
            if refused := next(tree.find_all(_REFUSED), None):
                raise TemplateError(f"it has {type(refused).__name__.lower()}, which is not for chat templates")
            counted = _Counting().visit(self.parse(source))
            counted.set_environment(self)
            code = self.compile(counted)
        except (RecursionError, MemoryError, SyntaxError, OverflowError, ValueError) as error:
            raise TemplateError(f"it cannot be compiled: {type(error).__name__}") from None
        return self.template_class.from_code(self, code, self.make_globals(None)), tree

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Counts every call; methods of Python's own types are those of `template_functions.py`."""
        if id(obj) in self._own:
            return obj(*args)
        if isinstance(obj, BuiltinMethodType) and not isinstance(obj.__self__, ModuleType | None):
            own = {name: value for name, value in kwargs.items() if name not in _OF_SCOPES}
            return functions.call_method(obj, args, own)
        budget().spend(CALL + ITEM * (len(args) + len(kwargs)))
        if isinstance(obj, MethodType):  # of a loop, a cycler, ...: they may compare
            for value in args:
                budget().weigh(value)
        return super().call(context, obj, *args, **kwargs)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Counts the work of a key that is made of others: tuples are hashed anew each time."""
        if isinstance(argument, tuple):
            budget().weigh(argument)
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Counts an operator."""
        return functions.binary(operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        """Counts `format` of a text, wherever it is called from; `format_map` is no method for templates."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            functions.check_format(value.__self__, args, kwargs)
            return wrapped(*args, **kwargs)

        return bounded


class _Counting(NodeTransformer):
    """Puts the counts into a template's tree."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        own = [(name, body) for name in _BODIES if isinstance(body := getattr(node, name, None), list)]
        turns = isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block)
        counts = {name: _count_of(body, turns and name == "body", node.lineno) for name, body in own}
        node = super().visit(node, *args, **kwargs)
        for name, count in counts.items():
            if name == "body" or getattr(node, name):
                getattr(node, name).insert(0, count)
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        if node.test is not None:
            node.test = nodes.And(_call("count_asked"), node.test)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("count_joined", *node.nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _call("count_sliced", node.node)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _compared(node.key, "count_compared")
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        sides = [node.expr, *(part.expr for part in node.ops)]
        signs = {part.op for part in node.ops}
        if signs <= {"eq", "ne"} and any(isinstance(side, nodes.Const) for side in sides):
            return node  # a constant is equal to nothing that is large, or unequal at once
        node.expr = _compared(node.expr, "count_compared")
        for part in node.ops:
            part.expr = _compared(part.expr, "count_container" if part.op in ("in", "notin") else "count_compared")
        return node


def _compared(side: nodes.Expr, name: str) -> nodes.Expr:
    return side if isinstance(side, nodes.Const) else _call(name, side)


def _call(name: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)


def _count_of(body: list[nodes.Node], turns: bool, line: int) -> nodes.Node:
    """Counts what runs in a list of statements, those in the bodies inside it left out."""
    parts = _NODE * sum(1 for node in body for _ in _own_parts(node))
    written = sum(len(part.data) for node in body for part in _own_parts(node) if isinstance(part, nodes.TemplateData))
    call = _call("count_turn" if turns else "count_part", nodes.Const(parts), nodes.Const(written))
    return nodes.ExprStmt(call, lineno=line)


def _own_parts(node: nodes.Node) -> Iterator[nodes.Node]:
    pending = [node]
    while pending:
        part = pending.pop()
        yield part
        pending += part.iter_child_nodes(exclude=_BODIES)
