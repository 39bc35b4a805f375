"""The Markdown pages refer to things that exist: files, headings, options, imports, error messages."""

import ast
import functools
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cli
import sws_export

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "docs", "examples", "graph_passes", "integrations", "plugins", "sws_export", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
VERBS = (
    *("export", "inspect", "validate", "sample", "evaluate", "report", "triton"),
    *("cache", "cache list", "cache clear", "plugins", "plugins build", "plugins info"),
)
OTHER_OPTIONS = {
    *("--staticPlugins", "--dynamicPlugins", "--setPluginsToSerialize", "--loadEngine"),  # trtexec
    *("--backend-config", "--plugins"),  # tritonserver, polygraphy
    *("--only", "--seconds", "--side", "--small", "--optimum-python", "--resume", "--rounds"),  # benchmarks
    *("--prompts",),  # examples/shapes
}

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_OPTION = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")
_QUOTED = re.compile(r"^\*\*`(.+)`\*\*$", re.MULTILINE)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text("utf-8"))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [text for tag, text in _FENCE.findall(page.read_text("utf-8")) if tag == language]


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each command in the shell blocks, without comments."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub generates them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    texts = (re.sub(r"[^\w\- ]", "", heading.strip().lower()) for heading in headings)
    return {text.replace(" ", "-") for text in texts}


@functools.cache
def options_of(verb: str) -> frozenset[str]:
    """Options of a verb, from its help text."""
    written: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout.write", written.append)
        with pytest.raises(SystemExit):
            cli.main([*([] if verb == "export" else verb.split()), "--help"])
    return frozenset(_OPTION.findall("".join(written)))


def test_there_are_pages() -> None:
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert {"README.md", "CONTRIBUTING.md", "docs/method.md", "benchmarks/README.md"} <= names


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_images_are_small() -> None:
    images = list((ROOT / "docs" / "images").iterdir())
    assert images
    assert all(image.stat().st_size < 300_000 for image in images)


@each_page
def test_links_resolve(page: Path) -> None:
    broken = []
    for target in _LINK.findall(prose(page)):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if target.startswith(("http://", "https://")):
            continue
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@each_page
def test_paths_exist(page: Path) -> None:
    words = " ".join(_CODE.findall(prose(page))).split()
    named = [word for word in words if re.fullmatch(r"[\w./*-]+", word)]
    paths = [text for text in named if "/" in text and text.split("/")[0] in FOLDERS]
    assert [path for path in paths if not list(ROOT.glob(path.rstrip("/")))] == []


@each_page
def test_options_exist(page: Path) -> None:
    known = OTHER_OPTIONS.union(*map(options_of, VERBS))
    mentioned = {option for text in _CODE.findall(prose(page)) for option in _OPTION.findall(text)}
    assert mentioned - known == set()


@each_page
def test_commands_have_their_options(page: Path) -> None:
    for words in commands(page):
        if words[0] == "sws-export":
            verbs = [verb for verb in VERBS if words[1 : 1 + len(verb.split())] == verb.split()]
            used = {word for word in words if _OPTION.fullmatch(word)}
            assert used - options_of(max(verbs, key=len, default="export")) == set(), words


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_documented(verb: str) -> None:
    page = (ROOT / "docs" / "cli.md").read_text("utf-8")
    assert options_of(verb) - {"--help"} <= set(_OPTION.findall(page))


@each_page
def test_imports_resolve(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_options_of_the_python_page_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    exported: list[tuple[Any, ...]] = []
    monkeypatch.setattr(sws_export, "export", lambda *arguments: exported.append(arguments), raising=False)
    exec(block_of("python-api.md", "ExportOptions("), {})
    *_, options = exported[-1]
    assert isinstance(options, sws_export.ExportOptions)
    assert len(exported) == 2


def test_the_passes_of_the_python_page_run(
    traced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain.onnx").symlink_to(traced)
    monkeypatch.chdir(tmp_path)
    exec(block_of("python-api.md", "sws_passes("), {})
    assert (tmp_path / "sws.onnx").stat().st_size > 0


def block_of(page: str, text: str) -> str:
    """The Python block of a page that contains a text."""
    (block,) = [block for block in blocks(ROOT / "docs" / page, "python") if text in block]
    return block


def messages() -> Iterator[str]:
    """Every string of the sources; `…` stands for a value that is formatted into it."""
    for folder in ("sws_export", "graph_passes"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
                elif isinstance(node, ast.JoinedStr):
                    yield "".join(
                        part.value if isinstance(part, ast.Constant) else "…" for part in node.values
                    )


def test_quoted_messages_are_those_of_the_code() -> None:
    known = "\n".join(messages())
    quoted = _QUOTED.findall((ROOT / "docs" / "troubleshooting.md").read_text("utf-8"))
    assert len(quoted) > 20
    assert [
        text for text in quoted if not re.search("[^\n]*".join(map(re.escape, text.split("…"))), known)
    ] == []


def test_pages_named_in_the_sources_exist() -> None:
    suffixes = {".py", ".h", ".cu", ".cpp", ".cmake", ".html", ".toml"}
    missing = set()
    for file in (
        file for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.suffix in suffixes
    ):
        for name in re.findall(r"\b(?:docs|benchmarks|plugins)/[\w/-]*\w\.md\b", file.read_text("utf-8")):
            if not (ROOT / name).exists():
                missing.add(f"{file.relative_to(ROOT)}: {name}")
    assert missing == set()
