from html.parser import HTMLParser

import pytest
from rich.console import Console

from eetrain.viewing import Generation, Token, depth_colour, depth_shares, html_page, legend, mean_depth, render_tokens
from eetrain.viewing.palette import contrast

TOKENS = (Token("<b>", 7, 1), Token("", 8, 4), Token(" & \x1b[31m", 9, 4), Token("é", 10, 2))


@pytest.mark.parametrize("num_blocks", range(1, 97))
def test_text_is_readable_on_every_depth(num_blocks: int) -> None:
    for depth in range(1, num_blocks + 1):
        colour = depth_colour(depth, num_blocks)
        assert contrast(colour.text, colour.background) >= 4.5, (depth, colour)


def test_deeper_is_darker_from_end_to_end_of_the_ramp() -> None:
    ramp = [contrast(depth_colour(depth, 12).background, "#000000") for depth in range(1, 13)]
    assert ramp == sorted(ramp, reverse=True)
    assert len(set(ramp)) == 12
    assert depth_colour(1, 12).background == "#fee838"
    assert depth_colour(12, 12).background == "#00224e"


def test_contrast_of_known_pairs() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


def test_shares_and_mean() -> None:
    assert [(share.depth, share.tokens, share.share) for share in depth_shares(TOKENS)] == [
        (1, 1, 0.25),
        (2, 1, 0.25),
        (4, 2, 0.5),
    ]
    assert mean_depth(TOKENS) == 11 / 4
    assert mean_depth([]) is None


def test_terminal_text_has_no_control_characters_and_one_style_a_token() -> None:
    rendered = render_tokens(TOKENS, 4)
    assert rendered.plain == "<b> & ␛[31mé"
    shallow = depth_colour(1, 4)
    assert rendered.spans[0].style == f"{shallow.text} on {shallow.background}"
    assert [rendered.plain[span.start : span.end] for span in rendered.spans] == ["<b>", " & ␛[31m", "é"]


def test_legend_says_shares_mean_and_speed() -> None:
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(legend(TOKENS, 4, seconds=2.0))
    line = " ".join(capture.get().split())
    assert line == "depth 1 25% 2 25% 4 50% mean 2.75 of 4 4 tokens, 2.0 tokens/s"


class Page(HTMLParser):
    """Collects what the page shows and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.titles: list[str] = []
        self.texts: dict[str, str] = {"prompt": "", "text": ""}
        self.fetched: list[str] = []
        self._within = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "div":
            self._within = given["class"] or ""
        if tag == "span":
            self.titles.append(given["title"] or "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "div":
            self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within:
            self.texts[self._within] += data


def test_page_is_self_contained_and_escaped() -> None:
    text = html_page([Generation("1 < 2\n<i>", TOKENS)], 4, title="<x>", policy="threshold:0.9", seconds=2.0)
    page = Page(text)
    assert page.texts == {"prompt": "1 < 2\n<i>", "text": "<b> & \x1b[31mé"}
    assert page.titles[0] == "depth 1 of 4, token 7"
    assert len(page.titles) == 4
    assert not {"b", "i", "x", "script", "link", "img"} & set(page.tags)
    assert page.fetched == []
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert "mean depth 2.75 of 4 blocks, 2.0 tokens/s" in text
    assert '<td style="background:#fee838;color:#000000">1</td><td>1</td><td>25.0%</td>' in text


SPECULATED = (Token("a", 7, 4), Token("b", 8, 4, drafted_by=1), Token("c", 9, 4, drafted_by=1))


def test_drafted_tokens_have_the_colour_of_the_exit_that_drafted_them() -> None:
    shallow, deep = depth_colour(1, 4), depth_colour(4, 4)
    styles = [span.style for span in render_tokens(SPECULATED, 4).spans]
    assert styles == [f"{colour.text} on {colour.background}" for colour in (deep, shallow, shallow)]
    assert mean_depth(SPECULATED) == 4, "every token has run all blocks"
    assert str(legend(SPECULATED, 4, 1.0)) == "chosen after block  1  67%   4  33%  3 tokens, 3.0 tokens/s"
    text = html_page([Generation("p", SPECULATED)], 4, title="x", policy="speculative:exit=1")
    assert Page(text).titles == [
        "depth 4 of 4, token 7",
        "depth 4 of 4, drafted after block 1, token 8",
        "depth 4 of 4, drafted after block 1, token 9",
    ]
    assert "all of 4 blocks deep, coloured by the block that chose them first" in text
    assert "<th>chosen after block</th>" in text
