"""What the site does to the pages, so that it needs nothing but its own files.

README.md is the first page, and CONTRIBUTING.md and its like are pages too. A source file that a
page links to becomes a page as well. A flowchart becomes a table, and the help of the command line
a page.
"""

from __future__ import annotations

import posixpath
import re
from itertools import pairwise
from pathlib import Path

from click.testing import CliRunner
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from onnx_fold.cli import cli

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages of the site that lie at the top of the repository."""

LINK = re.compile(r"(?<=\]\()(?![a-z]+:|[#/])([^)#\s]+)")
COMMANDS = "<!-- commands -->"
MERMAID = re.compile(r"```mermaid\n(.*?)```", re.DOTALL)
FENCE = re.compile(r"(^ *```.*?^ *```)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from the top, and a page for each source file that a page links to."""
    for path, name in PAGES.items():
        text = (ROOT / path).read_text()
        files.append(File.generated(config, name, content=text))
    for file in list(files.documentation_pages()):
        for path in sorted(_linked(file)):
            name = _page_of(path)
            if (ROOT / path).is_file() and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, content=_source(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to pages of the site."""
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown
    folder = posixpath.dirname(here) or "."

    def link(match: re.Match[str]) -> str:
        path = _resolved(here, match[1])
        known = path in PAGES or path.startswith("docs/") or (ROOT / path).is_file()
        return posixpath.relpath(_page_of(path), folder) if known else match[1]

    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, _commands())
    pieces = FENCE.split(MERMAID.sub(lambda drawing: _table(drawing[1]), markdown))
    pieces[::2] = [LINK.sub(link, text) for text in pieces[::2]]
    return "".join(pieces)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Docstrings are written for Sphinx: ``:func:`fold``` is the name alone here."""
    return re.sub(r":(?:func|class|data|mod|attr|meth):(?=<code)", "", html)


def _table(flowchart: str) -> str:
    """A Mermaid flowchart as a table: to draw it takes a library from the network."""
    nodes = re.findall(r'^ *(\w+)\["(.*?)(?:<br/>(.*?))?"\]', flowchart, re.MULTILINE)
    titles = {name: title for name, title, _ in nodes}
    below: dict[str, list[str]] = {name: [] for name in titles}
    for line in re.findall(r"^ *(\w+(?: --> \w+)+)$", flowchart, re.MULTILINE):
        for upper, lower in pairwise(line.split(" --> ")):
            below[upper] += [titles[lower]] if titles[lower] not in below[upper] else []
    rows = [f"| **{title}** | {what} | {', '.join(below[name])} |" for name, title, what in nodes]
    return "\n".join(["| storey | what it holds | rests on |", "|---|---|---|", *rows])


def _commands() -> str:
    """The help of each command."""

    def text(*arguments: str) -> str:
        result = CliRunner().invoke(
            cli, [*arguments, "--help"], prog_name="onnx-fold", terminal_width=80
        )
        title = " ".join(("onnx-fold", *arguments))
        return f"## {title}\n\n```text\n{result.output}```\n"

    return "\n".join([text(), *map(text, cli.commands)])


def _linked(file: File) -> set[str]:
    """Paths in the repository that a page links to."""
    text = FENCE.sub("", file.content_string)
    return {_resolved(file.src_uri, link) for link in LINK.findall(text)}


def _resolved(page: str, link: str) -> str:
    """Path in the repository of a link on a page of the site."""
    at_top = {name: path for path, name in PAGES.items()}
    folder = posixpath.dirname(at_top.get(page, f"docs/{page}"))
    return posixpath.normpath(posixpath.join(folder, link))


def _page_of(path: str) -> str:
    """Where the site has a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PAGES.get(path, f"source/{path}.md")


def _source(path: str) -> str:
    """A source file as a page."""
    language = Path(path).suffix.removeprefix(".")
    return f"# {path}\n\n````{language}\n{(ROOT / path).read_text()}\n````\n"
