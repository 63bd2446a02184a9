"""The pages of the documentation: links lead somewhere, commands exist, and every page is reached."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import notebook
import page_outputs
import pytest
import reference
import yaml

from moesim.cli import build, parse
from moesim.errors import InfeasibleError, UserError
from moesim.scenario import load_scenario
from moesim.shipped import resolve

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
MADE = reference.pages() | notebook.pages()
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SEPARATORS = ("&&", "|", ";", "||")
VERBS = build()[1]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """All pages by path inside docs/, those that are made included."""
    return {page.name: page.read_text(encoding="utf-8") for page in PAGES} | MADE


def anchors(text: str) -> set[str]:
    """The anchors of headings, as the site makes them: what is stated, or words joined by hyphens."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", _FENCED.sub("", text), re.MULTILINE):
        stated = re.search(r"\{ #([\w-]+) \}", heading)
        words = re.sub(r"[^\w\s-]", "", heading.lower()).strip()
        found.add(stated[1] if stated else re.sub(r"[-\s]+", "-", words))
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path, texts: dict[str, str]) -> None:
    text = _FENCED.sub("", document.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        at = (document.parent / path).resolve() if path else document
        inside = str(at.relative_to(ROOT / "docs")) if at.is_relative_to(ROOT / "docs") else ""
        assert at.exists() or inside in texts, f"{name_of(document)}: {target} does not exist"
        if anchor and inside in texts:
            assert anchor in anchors(texts[inside]), f"{name_of(document)}: {target}: no heading of that name"


def commands(text: str) -> Iterator[list[str]]:
    """The words of every call of moesim in blocks of code; what follows a prompt is a command, and so are other lines
    that begin with moesim or pip."""
    for language, block in _FENCED.findall(text):
        if language == "console":
            lines = [shown.command for shown in page_outputs.shown_in(block)]
        else:
            lines = [line for line in block.splitlines() if re.match(r"(moesim|pip) ", line)]
        for line in lines:
            words: list[str] = []
            for word in [*shlex.split(line.replace("\\\n", " "), comments=True), "&&"]:
                if word not in _SEPARATORS:
                    words.append(word)
                    continue
                if words[:1] == ["moesim"]:
                    yield words[1:]
                words = []


def all_commands() -> list[tuple[str, list[str]]]:
    found = [(name_of(page), words) for page in DOCUMENTS for words in commands(page.read_text(encoding="utf-8"))]
    assert len(found) > 30
    return found


@pytest.mark.parametrize(("page", "words"), all_commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_commands_parse(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Verbs, flags and keys exist, but for mistakes that a page shows with their message.

    A word in capitals stands for a scenario of the reader's; files of the reader need not exist here.
    """
    monkeypatch.chdir(ROOT)
    args = parse(words)
    overrides = getattr(args, "overrides", None)
    if args is None or args.verb != "run" or not overrides or args.from_megatron is not None:
        return  # a launch script is the page's own; its command runs where outputs are held
    text = (ROOT / page).read_text(encoding="utf-8")
    try:
        readers_own = str(args.scenario).isupper()
        name = "quickstart" if readers_own else args.scenario
        load_scenario(resolve(name, "scenario"), overrides)
    except InfeasibleError:
        pass
    except UserError as error:
        missing = "does not exist" in str(error) or (readers_own and "unknown" not in str(error))
        assert str(error) in text or missing, f"{page}: {shlex.join(words)}: {error}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_calls_inside_sentences_name_verbs_and_flags(document: Path) -> None:
    text = _FENCED.sub("", document.read_text(encoding="utf-8"))
    for call in re.findall(r"`moesim ([^`]+)`", text):
        words = call.split()
        if not words[0].islower() or words[0] in ("help", "version"):
            continue
        verb = " ".join(words[:2]) if " ".join(words[:2]) in VERBS else words[0]
        assert verb in VERBS, f"{name_of(document)}: `moesim {call}`"
        known = {flag for action in VERBS[verb]._actions for flag in action.option_strings}
        flags = {word.split("=")[0] for word in words if word.startswith("--")}
        assert flags <= known, f"{name_of(document)}: `moesim {call}`"


def test_pages_show_what_their_commands_print() -> None:
    """Every command with a prompt has output below it; that it is the true one, tools/page_outputs.py --check holds."""
    pages = page_outputs.pages_with_commands()
    assert {page.name for page in pages} >= {"first-ten-minutes.md", "imbalance.md", "memory.md", "gpu.md"}
    for page in pages:
        for _, block in _FENCED.findall(page.read_text(encoding="utf-8")):
            for shown in page_outputs.shown_in(block):
                assert any(line.strip() for line in shown.lines), f"{page.name}: {shown.command}"


def test_the_navigation_names_pages_that_exist(texts: dict[str, str]) -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").replace("!!python/name:", "")
    config = yaml.safe_load(text)

    def named(node: object) -> list[str]:
        if isinstance(node, str):
            return [node]
        return [name for child in (node.values() if isinstance(node, dict) else node) for name in named(child)]  # type: ignore[attr-defined]

    found = named(config["nav"])
    assert len(found) == len(set(found)) and set(found) <= set(texts)
    assert set(MADE) <= set(found)
    assert [name for name in config["extra_css"] + config["extra"]["polyfills"] if "//" in name] == []
    assert config["theme"]["font"] is False


def test_a_check_finds_what_a_page_shows_wrongly() -> None:
    printed = ("name  8 GPUs", "  step time   1.2256 s", "  memory      60.39 GB", "", "  done")
    shown = ("...", "  step time   1.2257 s", "...", "  done")
    assert page_outputs.abridged(shown, printed) == ("...", printed[1], "...", printed[4])
    assert page_outputs.differs(shown, page_outputs.abridged(shown, printed)) == ""
    assert page_outputs.abridged((), printed) == printed
    for wrong in (("...", "  step time   1.4 s", "...", "  done"), ("...", "  step time   1.2256 ms", "...", "  done")):
        assert "step time" in page_outputs.differs(wrong, page_outputs.abridged(wrong, printed))
    assert "lines" in page_outputs.differs(printed[:3], printed)
    with pytest.raises(page_outputs.PageError, match="step times"):
        page_outputs.abridged(("...", "  step times  1.2256 s"), printed)


def test_commands_run_in_order_and_may_fail_with_a_message_alone(tmp_path: Path) -> None:
    block = "$ echo one > f\n$ cat f\nold\n...\n$ printf 'a\n> b'\n"
    shown = list(page_outputs.shown_in(block))
    assert [(each.command, each.lines) for each in shown] == [
        ("echo one > f", ()),
        ("cat f", ("old", "...")),
        ("printf 'a\nb'", ()),
    ]
    assert [page_outputs.printed_by(each.command, tmp_path) for each in shown] == [(), ("one",), ("a", "b")]
    assert page_outputs.printed_by("echo 'moesim: no'; exit 1", tmp_path) == ("moesim: no",)
    with pytest.raises(page_outputs.PageError, match="ends with 1"):
        page_outputs.printed_by("exit 1", tmp_path)


def test_files_of_a_page_lie_where_its_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_outputs, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("```python\n# one.py\nprint(1)\n```\n\n```console\n$ cat one.py\n```\n")
    text, _ = page_outputs.renewed(page, check=False)
    assert text.endswith("```console\n$ cat one.py\n# one.py\nprint(1)\n```\n")
