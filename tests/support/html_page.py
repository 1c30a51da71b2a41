"""What a reader with a screen reader, a phone or no network needs of a page: found with html.parser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise

VOID = {"meta", "img", "br", "wbr", "link", "path", "use", "input", "hr"}


class Page(HTMLParser):
    """Elements in order as (tag, attributes), with the text below each.

    Attributes:
        elements: of every start tag its name, its attributes and those of the elements around it.
        problems: tags that are not closed where they should be.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], tuple[str, ...]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.problems: list[str] = []
        self.feed(html)
        self.close()
        self.problems += [f"<{tag}> is not closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, tuple(self.open)))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open:
            self.texts.append((self.open[-1], data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]


def faults(html: str) -> list[str]:
    """Everything that is wrong with a page, in words; empty for a good one."""
    page = Page(html)
    wrong = list(page.problems)
    if page.all("html")[0].get("lang") != "en":
        wrong.append("html: no language")
    wrong += [f"img without alt: {str(a)[:80]}" for a in page.all("img") if len(a.get("alt", "")) < 12]
    images = [a for _, a, _ in page.elements if a.get("role") == "img"]
    wrong += [f"drawing without a text: {a}" for a in images if len(a.get("aria-label", "")) < 20]
    for tag, attributes, around in page.elements:
        if tag == "svg" and "aria-hidden" not in attributes and "figure" not in around:
            wrong.append("an svg outside of a figure")
        for name in ("src", "href", "xlink:href", "srcset", "data", "poster"):
            value = attributes.get(name, "")
            if value and not value.startswith(("data:", "#")):
                wrong.append(f"{tag}: {name} needs a network: {value[:60]}")
        if tag in ("script", "link", "iframe", "object", "embed", "base", "form"):
            wrong.append(f"<{tag}>")
        if re.search(r"\b(width|left)\s*:\s*[\d.]+(px|pt|rem|em|cm)", attributes.get("style", "")):
            wrong.append(f"{tag}: a fixed width: {attributes['style']}")
        if any(name.startswith("on") for name in attributes):
            wrong.append(f"{tag}: a script in an attribute")
        if tag in ("td", "th") and "width" in attributes:
            wrong.append(f"{tag}: a fixed width")
    wrong += [f"th without scope: {a}" for a in page.all("th") if a.get("scope") not in ("col", "row")]
    if len(page.all("table")) != len(page.all("caption")):
        wrong.append("a table without a caption")
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    if levels.count(1) != 1 or levels[0] != 1:
        wrong.append(f"headings: expected one h1, first: {levels}")
    wrong += [f"heading h{b} after h{a}" for a, b in pairwise(levels) if b > a + 1]
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    wrong += [f"id {name!r} twice" for name in {name for name in ids if ids.count(name) > 1}]
    referred = {
        name for _, a, _ in page.elements for value in a.values() for name in re.findall(r"#([\w-]{8,})", value)
    }
    wrong += [f"#{name} is nowhere" for name in referred - set(ids) if not re.fullmatch(r"[0-9a-f]{6,8}", name)]
    style = html[html.index("<style>") : html.index("</style>")]
    if "prefers-color-scheme: dark" not in style:
        wrong.append("no dark colours")
    wrong += [f"style: needs a network: {m}" for m in re.findall(r"@import|url\(", style)]
    sizes = [
        (float(n) * (16 if unit == "rem" else 1), n)
        for n, unit in re.findall(r"font(?:-size)?: ([\d.]+)(rem|px)", style)
    ]
    # A drawing is shown at 4/3 of a pixel a point, or smaller where the window is narrower than a phone's.
    sizes += [
        (float(n) * 4 / 3, n)
        for n in re.findall(r"font(?:-size)?: (?:bold )?([\d.]+)px", html[html.index("</style>") :])
    ]
    wrong += [f"text of {n} is smaller than 12 px" for size, n in sizes if size < 12]
    return wrong


def contrast(first: str, second: str) -> float:
    """The ratio of WCAG between two colours written as #rrggbb."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
