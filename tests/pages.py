"""Reads a page of HTML, and complains where it is unsound or does not stand alone."""

import html.parser
import itertools
import re

VOID = {"meta", "img", "br", "link", "hr", "input", "wbr"}


class Checker(html.parser.HTMLParser):
    """Collects tags and complains of those that are not closed."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(page):
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def assert_stands_alone(page):
    """One file without scripts and without anything from elsewhere; its tags, text and ids fit."""
    checker = parse(page)
    tags = [tag for tag, _ in checker.tags]
    assert page.startswith("<!DOCTYPE html>")
    assert ("html", {"lang": "en"}) in checker.tags
    assert "width=device-width" in page
    for tag in ("header", "main", "footer", "title"):
        assert tag in tags, tag
    assert tags.count("h1") == 1
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(tags)
    without_data = re.sub(r'src="data:[^"]*"', "", page)
    assert not re.search(r"(?:https?:)?//\w|url\(|@import", without_data)
    for tag, attributes in checker.tags:
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert attributes["src"].startswith("data:image/")
            assert attributes["alt"]
        if "href" in attributes:
            assert attributes["href"].startswith("#")
    ids = [attributes["id"] for _, attributes in checker.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    return checker
