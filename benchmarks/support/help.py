"""A benchmark's docstring as the beginning of its --help, for a terminal of any width."""

import argparse
import textwrap


class Paragraphs(argparse.HelpFormatter):
    """Wraps paragraphs; lines that are indented, which are commands, stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled, paragraph = list[str](), list[str]()
        for line in [*text.strip().splitlines(), ""]:
            if line and not line.startswith(" "):
                paragraph.append(line)
                continue
            filled += textwrap.wrap(" ".join(paragraph), width, break_on_hyphens=False)
            filled.append(line)
            paragraph = []
        return "\n".join(indent + line for line in filled)
