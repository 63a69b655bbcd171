"""What a page must have for a screen reader, checked without a browser; tests/browser.py asks axe, which sees more."""

import itertools
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


@dataclass
class Element:
    """One element; text is everything inside it."""

    name: str
    attributes: dict[str, str]
    text: str = ""
    inside: list["Element"] = field(default_factory=list)

    def find(self, name: str) -> list["Element"]:
        """Return the elements of that name inside it, in order."""
        found = []
        for each in self.inside:
            found += [each] if each.name == name else []
            found += each.find(name)
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].inside.append(element)
        if tag not in _VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].inside.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].name == tag, f"</{tag}> ends <{self.open[-1].name}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data


def read_page(page: str) -> Element:
    """Return a page's elements; every start tag has its end tag."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert len(reader.open) == 1, f"<{reader.open[-1].name}> has no end tag"
    return reader.open[0]


def assert_accessible(page: str) -> Element:
    """Assert that every part has its name, and that nothing is fetched from elsewhere; return the elements."""
    root = read_page(page)
    everything = _everything(root)
    assert root.find("html")[0].attributes["lang"] == "en"
    assert root.find("title")[0].text.strip()
    assert "width=device-width" in next(m.attributes["content"] for m in root.find("meta") if "content" in m.attributes)
    for landmark in ("header", "main", "footer"):
        assert len(root.find(landmark)) == 1, landmark
    levels = [int(each.name[1]) for each in everything if re.fullmatch("h[1-6]", each.name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), levels
    ids = [each.attributes["id"] for each in everything if "id" in each.attributes]
    assert len(ids) == len(set(ids))
    inner_svgs = {id(inner) for outer in root.find("svg") for inner in outer.find("svg")}
    for each in everything:
        for name in ("aria-labelledby", "for"):
            assert set(each.attributes.get(name, "").split()) <= set(ids), each.attributes
        if each.name == "table":
            assert each.find("caption")[0].text.strip()
            assert all(cell.attributes.get("scope") in ("col", "row") for cell in each.find("th"))
        elif each.name == "img":
            assert "alt" in each.attributes
        elif each.name == "svg":
            is_named = each.attributes.get("role") == "img" and {"aria-label", "aria-labelledby"} & set(each.attributes)
            assert is_named or id(each) in inner_svgs or each.attributes.get("aria-hidden") == "true", each.attributes
        elif each.name in ("button", "summary"):
            assert each.text.strip()
        elif each.name == "input":
            assert each.attributes["id"] in [label.attributes["for"] for label in root.find("label")]
        for name in ("src", "href"):
            assert not re.match(r"\w+:(?<!data:)|//", each.attributes.get(name, "")), each.attributes[name]
    return root


def _everything(element: Element) -> list[Element]:
    return [each for inner in element.inside for each in (inner, *_everything(inner))]
