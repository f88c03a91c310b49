"""What pages, docstrings and comments name is there: files, names in the code, commands, links."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from prose import (
    CODE_FOLDERS,
    PAGES,
    ROOT,
    code_blocks,
    code_words,
    headings,
    members,
    modules,
    protos,
    remarks,
    sources,
    spans,
    without_code_blocks,
)

from isthmus.cluster.cli.main import app

WIDTH = 120
MAX_TERMS = 40
FILES = r"\.(py|proto|md|svg|json|jsonl|yaml|toml|safetensors)$"
# Named, and not ours: of transformers, of OpenAI, of a data set.
OTHERS = {"modeling_rope_utils.py", "response_format", "AzureLLMInferenceTrace_conv", "conversation_trace"}
NOWHERE = {"__init__.py"}  # docs say that there is none
TOP = (*CODE_FOLDERS, "docs", ".ci")
NAMED_IN = [*PAGES, *sources(), *protos()]

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def text_of(path: Path) -> str:
    """What of a file is for people: a page without its examples, docstrings and comments of code."""
    return without_code_blocks(path.read_text()) if path.suffix == ".md" else remarks(path)


@pages
def test_lines_are_short(page: Path) -> None:
    lines = enumerate(page.read_text().splitlines(), 1)
    assert [number for number, line in lines if len(line) > WIDTH and not line.startswith("|")] == []


@pages
def test_links_lead_somewhere(page: Path) -> None:
    text = without_code_blocks(page.read_text())
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    wrong = []
    for target in targets:
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in headings(file.read_text())):
            wrong.append(target)
    assert wrong == []


def exists(name: str, named_in: Path) -> bool:
    """Whether a path is there, seen from the folder of the file that names it or one above; a mere name: anywhere."""
    file, _, test = name.partition("::")
    if "/" not in file and file in {path.name for path in NAMED_IN}:
        return True
    for folder in (named_in.parent, *named_in.parent.parents):
        if folder.is_relative_to(ROOT):
            found = list(folder.glob(file.rstrip("/"))) if file else []
            if found and (not test or test.partition("[")[0] in found[0].read_text()):
                return True
    return False


def is_path(word: str) -> bool:
    if not re.fullmatch(r"[\w.\-*/]+(::.*)?", word):
        return False
    return bool(re.search(r"\w\.(py|proto|md|svg)(::|$)", word)) or ("/" in word and word.split("/")[0] in TOP)


@pytest.mark.parametrize("folder", ["pages", *CODE_FOLDERS])
def test_files_that_are_named_exist(folder: str) -> None:
    wrong = set()
    for path in NAMED_IN:
        if folder != ("pages" if path in PAGES else path.relative_to(ROOT).parts[0]):
            continue
        text = text_of(path)
        words = {span.split()[0] for span in spans(text)} | set(re.findall(r"[\w./-]*\w\.(?:py|proto)\b", text))
        if path in PAGES:
            words |= {word for line in code_blocks(path.read_text()) for word in line.split()}
        wrong |= {
            f"{path.relative_to(ROOT)}: {word}"
            for word in words
            if is_path(word) and word not in OTHERS | NOWHERE and not exists(word, path)
        }
    assert wrong == set()


def known(name: str) -> bool:
    """Whether a name in backticks, dotted or not, is one of the code; True for names that may be anybody's."""
    owner, _, rest = name.partition(".")
    if not rest:
        ours = re.search(r"[a-z0-9]{2}_[a-z]|[a-z][A-Z]", name) and not re.search(r"[a-z]_[A-Z]+_", name)  # a pattern
        return not ours or name in code_words() | OTHERS
    if owner == "isthmus" or (owner in CODE_FOLDERS and (ROOT / owner).is_dir() and rest.count(".")):
        return _known_module(rest if owner == "isthmus" else name)
    first = rest.split(".")[0]
    if owner in members():
        return first in members()[owner]
    if owner in modules() and (owner not in code_words() or "_" in owner or first[0].isupper()):
        return first in modules()[owner]
    return True


def _known_module(name: str) -> bool:
    """Of a name below `isthmus`: folders, a module, what is in it; or a service or message of the wire."""
    folder, parts = ROOT, name.split(".")
    if parts[0] == "v1":
        return len(parts) == 1 or parts[1] in members()
    for number, part in enumerate(parts):
        if (folder / part).is_dir():
            folder = folder / part
        elif (folder / f"{part}.py").exists():
            return all(inner in modules()[part] for inner in parts[number + 1 :])
        else:
            return False
    return True


@pytest.mark.parametrize("folder", ["pages", *CODE_FOLDERS])
def test_names_in_backticks_are_those_of_the_code(folder: str) -> None:
    wrong = set()
    for path in NAMED_IN:
        if folder == ("pages" if path in PAGES else path.relative_to(ROOT).parts[0]):
            names = {re.sub(r"\(.*\)$", "", span) for span in spans(text_of(path))}
            names = {name for name in names if re.fullmatch(r"[A-Za-z_][\w.]*\w", name) and not re.search(FILES, name)}
            wrong |= {f"{path.relative_to(ROOT)}: {name}" for name in names if not known(name)}
    assert wrong == set()


def commands_in(text: str) -> list[list[str]]:
    """Command lines that begin with `isthmus`, in words, without comments."""
    found = re.findall(r"^(?:\.venv/bin/)?isthmus ([^#|&\n]*)", text, re.MULTILINE)
    return [command.split() for command in found]


def problem_of(words: list[str]) -> str | None:
    """What is wrong with a command line of ours as a page shows it: an unknown command or option."""
    command: Any = typer.main.get_command(app)
    for word in words:
        inner = getattr(command, "commands", None)  # of a group
        parameters = command.get_params(command.context_class(command))  # also those that are made when asked for
        options = {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}
        if inner and re.fullmatch(r"[a-z]+(\|[a-z]+)*", word):
            if missing := set(word.split("|")) - set(inner):
                return f"no command {sorted(missing)}"
            command = inner[word.split("|")[0]]
        elif re.match(r"--?[a-z]", word) and word.partition("=")[0] not in {*options, "--help"}:
            return f"no option {word!r}"
    return None


@pages
def test_commands_are_those_of_the_command_line(page: Path) -> None:
    text = page.read_text()
    examples = "\n".join([*code_blocks(text), *spans(without_code_blocks(text))])
    wrong = {" ".join(words): problem for words in commands_in(examples) if (problem := problem_of(words))}
    assert wrong == {}


@pages
def test_targets_are_those_of_the_makefile(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    examples = "\n".join([*code_blocks(text), *spans(without_code_blocks(text))])
    named = set(re.findall(r"^make ([a-z-]+)", examples, re.MULTILINE))
    assert named - targets == set()


def plain(text: str) -> str:
    return re.sub(r"[\s_-]+", " ", text.lower())


def test_the_glossary_is_short_and_its_terms_are_in_use() -> None:
    glossary = ROOT / "docs" / "glossary.md"
    terms = re.findall(r"^- \*\*(.+?)\*\*", glossary.read_text(), re.MULTILINE)
    assert 0 < len(terms) <= MAX_TERMS
    assert len({plain(term) for term in terms}) == len(terms)
    elsewhere = plain("\n".join(path.read_text() for path in NAMED_IN if path != glossary))
    assert [term for term in terms if plain(term) not in elsewhere] == []
