"""What `mkdocs build` adds to these pages: README, the executed tutorial, the help of each command."""

import html
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import griffe
import nbformat
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

from lit_gptdata.configs import all_options

ROOT = Path(__file__).parents[1]
PAGES = {"index.md": "README.md", "benchmarks.md": "benchmarks/README.md"}
LINKS = [  # a link that works in the repository → the same on the site
    (r"(?<=\]\()(\.\./)?docs/", ""),
    (r"(?<=\]\()(\.\./)?benchmarks/README\.md", "benchmarks.md"),
    (r"(?<=\]\()(\.\./)?README\.md", "index.md"),
    (r"(?<=\]\()tutorial\.ipynb", "tutorial.md"),
    (r"\[([^\]]+)\]\(CONTRIBUTING\.md\)", r"\1"),
]
QUIET = ["--log-level=ERROR"]  # the kernel warns that it talks over the loopback device
DOWNLOAD = '\n<a href="tutorial.ipynb" download>Download this page as a notebook.</a>\n'


def on_files(files: Files, config: Any) -> Files:
    """Add the pages whose text is not in docs/."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    for name, content in execute(ROOT / "docs" / "tutorial.ipynb").items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead to pages; fill in `[options of data]` and the output of `$ lit-gptdata …`."""
    for pattern, page_link in LINKS:
        markdown = re.sub(pattern, page_link, markdown)
    markdown = re.sub(r"^\[options of (.*)\]$", lambda m: table_of(m[1]), markdown, flags=re.M)
    return re.sub(r"^\$ lit-gptdata (.*)$", lambda m: f"{m[0]}\n{help_of(m[1])}", markdown, flags=re.M)


def table_of(group: str) -> str:
    """The options of a group of configs, with the comments in conf/."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for key, (value, comment) in all_options()[group].items():
        if comment:
            name = re.sub(r"([._])", r"\1<wbr>", key)
            default, meaning = (html.escape(text).replace("|", "&#124;") for text in (value, comment))
            rows.append(f"| <code>{name}</code> | <code>{default}</code> | {meaning} |")
    return "\n".join(rows)


def execute(notebook: Path) -> dict[str, str | bytes]:
    """Run a notebook in an empty folder: its page, and the pictures that the page shows, by name."""
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # transformers without ipywidgets
    cells = nbformat.read(notebook, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        options = {"extra_arguments": QUIET, "coalesce_streams": True, "timeout": 600}
        NotebookClient(cells, resources={"metadata": {"path": folder}}, **options).execute()
    text, resources = MarkdownExporter().from_notebook_node(cells)
    return {f"{notebook.stem}.md": text + DOWNLOAD, **resources["outputs"]}


def help_of(command: str) -> str:
    environment = os.environ | {"COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "lit_gptdata", *shlex.split(command)]
    return subprocess.run(
        words, env=environment, check=True, capture_output=True, text=True
    ).stdout.rstrip()


class GroupedArguments(griffe.Extension):
    """Groups of arguments become sections; griffe would take their titles for arguments."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        if cls.docstring:
            title = r"(?:\nArgs:)?\n    ([A-Z][a-z ]+):(?=\n)"
            cls.docstring.value = re.sub(title, r"\n\nArgs: \1", cls.docstring.value)
