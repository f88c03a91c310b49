"""What people read in this repository, and the names in it: pages of Markdown, docstrings and comments."""

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
CODE_FOLDERS = (
    *("benchmarks", "cluster", "decode", "kernels", "kvtransfer", "model", "prefill", "proto", "tests", "worker"),
)
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))

_WITH_DOCSTRING = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@cache
def sources() -> list[Path]:
    """All Python files but the generated ones."""
    files = (path for folder in CODE_FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
    return [path for path in files if "_pb2" not in path.name]


@cache
def protos() -> list[Path]:
    return sorted((ROOT / "proto").glob("*.proto"))


@cache
def nodes(path: Path) -> list[ast.AST]:
    """Everything in a file's syntax tree, the module first."""
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def words(path: Path) -> tuple[set[str], list[str]]:
    """The identifiers of a file, and its comments."""
    names, comments = set(), []
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.NAME:
            names.add(token.string)
        elif token.type == tokenize.COMMENT:
            comments.append(token.string)
    return names, comments


def without_code_blocks(page: str) -> str:
    """A page of Markdown less its fenced and indented blocks."""
    page = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<=\n)\n(?:    .*\n)+", "\n", page)


def code_blocks(page: str) -> list[str]:
    """Lines of the fenced and indented blocks of a page."""
    fenced = re.findall(r"^```.*?\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"(?<=\n\n)((?:    .*\n)+)", page)
    return [line.strip() for block in (*fenced, *indented) for line in block.splitlines()]


def spans(text: str) -> list[str]:
    """What stands in backticks, on one line each."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def headings(page: str) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.*)$", re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.replace("`", "").strip().lower()).replace(" ", "-") for title in titles}


@cache
def remarks(path: Path) -> str:
    """Docstrings and comments of a Python file, comments of a .proto file."""
    text = path.read_text()
    if path.suffix == ".proto":
        return "\n".join(re.findall(r"//.*", text))
    docstrings = [ast.get_docstring(node) or "" for node in nodes(path) if isinstance(node, _WITH_DOCSTRING)]
    return "\n".join([*docstrings, *words(path)[1]])


@cache
def code_words() -> set[str]:
    """Every identifier and every word of a string in the code, and every key of the chart's values; of docstrings and
    comments none."""
    found: set[str] = set()
    for path in sources():
        documented = [node for node in nodes(path) if isinstance(node, _WITH_DOCSTRING) and node.body]
        docstrings = {id(node.body[0].value) for node in documented if isinstance(node.body[0], ast.Expr)}
        for node in nodes(path):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found.update(re.findall(r"\w+", node.value))
        found |= words(path)[0]
    for path in protos():
        found.update(re.findall(r"\w+", re.sub(r"//.*", "", path.read_text())))
    found.update(re.findall(r"^ *(\w+):", (ROOT / "helm" / "values.yaml").read_text(), re.MULTILINE))
    return found


@cache
def members() -> dict[str, set[str]]:
    """Attributes and methods of each class, fields of each message, methods of each service, by its name."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sources():
        for node in nodes(path):
            if isinstance(node, ast.ClassDef):
                found[node.name].update(_members(node))
    for path in protos():
        for name, body in re.findall(r"(?ms)^(?:message|service) (\w+) \{(.*?)^\}", path.read_text()):
            found[name].update(re.findall(r"\w+", re.sub(r"//.*", "", body)))
    return found


def _members(node: ast.ClassDef) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield inner.name
        elif isinstance(inner, ast.AnnAssign | ast.Assign):
            for target in inner.targets if isinstance(inner, ast.Assign) else [inner.target]:
                yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))
                yield from (part.attr for part in ast.walk(target) if isinstance(part, ast.Attribute))
    for base in node.bases:
        name = ast.unparse(base).rpartition(".")[2]
        yield from (member for base in _classes().get(name, []) if base is not node for member in _members(base))


@cache
def _classes() -> dict[str, list[ast.ClassDef]]:
    """The classes of ours; what bases of others bring is not known."""
    found: dict[str, list[ast.ClassDef]] = defaultdict(list)
    for path in sources():
        for node in nodes(path):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(node)
    return found


@cache
def modules() -> dict[str, set[str]]:
    """What each module defines, by the name of its file: top-level names and those of its classes."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sources():
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found[path.stem].add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found[path.stem].add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found[path.stem].add(node.attr)
    return found
