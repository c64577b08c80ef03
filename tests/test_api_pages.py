"""tools/api_pages.py: what a page says of a module, and where the links of the library's pages lead."""

import re
import sys
from textwrap import dedent

import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tools"))
import api_pages

SMALL = {
    "__init__.py": """
        '''A library.'''

        from small.rooms.hall import Hall, enter

        __all__ = ["Hall", "enter"]
    """,
    "rooms/hall.py": """
        '''The hall.'''

        SIZE: int = 3
        '''Steps from end to end.'''


        def enter(door: "Door", *doors: int, slowly=False, **rest) -> "Hall":
            '''Come in.

            Args:
                door: The first door, which
                    creaks.

            Returns:
                The hall.
            '''


        class Hall:
            '''A room.

            Attributes:
                size: Steps.
            '''

            size: int = SIZE

            @classmethod
            def of(cls, size: int, /) -> None:
                '''Build one.'''

            def _hidden(self): ...
    """,
    "rooms/_cellar.py": """
        '''Private.'''

        def dig(): ...
    """,
}


@pytest.fixture
def pages(tmp_path) -> dict[str, str]:
    """Pages of a small package."""
    for name, source in SMALL.items():
        path = tmp_path / "small" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(source).strip() + "\n")
    return api_pages.pages(api_pages.modules(tmp_path / "small"))


def test_public_modules_have_a_page_and_a_line_in_the_index(pages):
    assert sorted(pages) == ["index.md", "small.md", "small.rooms.hall.md"]
    assert pages["index.md"].splitlines()[2:] == [
        "- [`small`](small.md): A library.",
        "- [`small.rooms.hall`](small.rooms.hall.md): The hall.",
    ]


def test_a_package_links_to_the_names_that_it_offers(pages):
    assert "- [`enter`](small.rooms.hall.md#enter)" in pages["small.md"]
    assert "- [`Hall`](small.rooms.hall.md#hall)" in pages["small.md"]


@pytest.mark.parametrize(
    "part",
    [
        "## `SIZE`\n\n```python\nSIZE: int = 3\n```\n\nSteps from end to end.",
        "def enter(door: Door, *doors: int, slowly=False, **rest) -> Hall\n",
        "**Args**\n\n- `door`: The first door, which creaks.",
        "**Returns:** The hall.",
        "class Hall(size: int = SIZE)\n",
        "**Attributes**\n\n- `size`: Steps.",
        "### `Hall.of`\n\n```python\n@classmethod\ndef of(size: int, /) -> None\n```\n\nBuild one.",
    ],
)
def test_a_page_shows(pages, part):
    assert part in pages["small.rooms.hall.md"]


def test_what_is_private_is_not_shown(pages):
    assert "_hidden" not in pages["small.rooms.hall.md"]


def test_a_long_signature_has_a_line_per_parameter():
    parameters = [f"parameter_{k}: int" for k in range(9)]
    source = f"def long({', '.join(parameters)}) -> None:\n    '''Long.'''\n"
    signature = api_pages._signature(api_pages.ast.parse(source).body[0])
    assert signature.splitlines() == ["def long(", *(f"    {p}," for p in parameters), ") -> None"]


def test_every_link_between_pages_of_the_library_leads_to_a_heading(tmp_path):
    (tmp_path / "hdmil_lib.gone.md").write_text("a page of a module that has gone")
    api_pages.main(tmp_path)
    pages: dict[str, str] = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.md")}
    headings = {name: re.findall(r"^#+ `(\w+)`", text, re.MULTILINE) for name, text in pages.items()}
    links = re.findall(r"\]\((hdmil_lib[\w.]*\.md)(?:#(\w+))?\)", "".join(pages.values()))
    assert len(links) > 100
    assert "hdmil_lib.gone.md" not in pages
    broken = [
        (page, anchor)
        for page, anchor in links
        if page not in pages or (anchor and anchor not in map(str.lower, headings[page]))
    ]
    assert broken == []
