"""robots.txt, tdmrep.json and headers: what they forbid, and which of their lines does."""

import json
import time

import pytest

from cluster.config import parse
from cluster.errors import RequestError
from pipeline.config import BuildConfig, FetchConfig
from pipeline.directives import product_token, refused_by, user_agent
from pipeline.robots import Robots, file_url, matches, tdm_verdict

TEXT = """\
User-agent: otherbot
Disallow: /private/for/others

User-agent: *
Disallow: /everybody

User-agent: PairMill   # us
User-agent: friend
Crawl-delay: 2.5
Disallow: /private
Disallow: /private/deep/
Allow: /private/but/this
Disallow: /*.gif$
Disallow: /search?
"""
SITE = "http://site.test"


def rule(url: str, text: str = TEXT, status: int | None = 200) -> str | None:
    return Robots(status, text, "pairmill").verdict(SITE + url).rule


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("/open/cat.jpg", None),
        ("/everybody/cat.jpg", None),  # a group of our own: that of everybody is not ours
        ("/private/cat.jpg", "robots.txt: Disallow: /private"),
        ("/private/deep/cat.jpg", "robots.txt: Disallow: /private/deep/"),
        ("/private/but/this/cat.jpg", None),
        ("/private/for/others/cat.jpg", "robots.txt: Disallow: /private"),
        ("/a/b.gif", "robots.txt: Disallow: /*.gif$"),
        ("/a/b.gif?size=1", None),
        ("/search?q=cat", "robots.txt: Disallow: /search?"),
        ("/Private/cat.jpg", None),
        ("/%70rivate/cat.jpg", "robots.txt: Disallow: /private"),
        ("/robots.txt", None),
    ],
)
def test_the_longest_line_of_our_group_decides_and_is_named(url: str, expected: str | None) -> None:
    assert rule(url) == expected


def test_without_a_group_of_ours_that_of_everybody_holds() -> None:
    assert rule("/everybody/x", TEXT.replace("PairMill", "nobody")) == "robots.txt: Disallow: /everybody"


@pytest.mark.parametrize("status", [404, 403, 401, 410, 301])
def test_a_site_without_robots_txt_allows_everything(status: int) -> None:
    assert rule("/private/x", status=status) is None


@pytest.mark.parametrize("status", [500, 503, 429, None])
def test_a_site_that_cannot_say_is_left_alone_for_now(status: int | None) -> None:
    verdict = Robots(status, "", "pairmill").verdict(f"{SITE}/x")
    assert verdict.rule == "robots.txt"
    assert not verdict.is_final


@pytest.mark.parametrize("text", ["", "<html>404</html>", "\x00\x01\x02", "Disallow: /", "User-agent: *\nDisallow:"])
def test_files_that_forbid_nothing_allow_everything(text: str) -> None:
    assert rule("/x", text) is None


def test_crawl_delay_is_that_of_our_group() -> None:
    assert Robots(200, TEXT, "pairmill").crawl_delay_s == 2.5
    assert Robots(200, TEXT, "stranger").crawl_delay_s == 0.0
    assert Robots(404, TEXT, "pairmill").crawl_delay_s == 0.0


def test_a_site_is_scheme_host_and_port() -> None:
    assert file_url("https://u:p@Site.test:8443/a/b?c", "/robots.txt") == "https://Site.test:8443/robots.txt"


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [("/a", "/ab", True), ("/a/*.jpg", "/a/b/c.jpg?x", True), ("/a$", "/ab", False), ("/a\nDisallow: /", "/b", False)],
)
def test_patterns(pattern: str, path: str, expected: bool) -> None:
    assert matches(pattern, SITE + path) is expected


def test_hostile_files_cost_little_time() -> None:
    lines = [f"Disallow: /{'*' * (number % 5)}a" for number in range(40_000)]
    robots = Robots(200, "User-agent: otherbot\n" + "\n".join(lines) + "\nUser-agent: *\nDisallow: /a\n", "pairmill")
    rules = json.dumps([{"location": f"/z{number}", "tdm-reservation": 1} for number in range(40_000)])
    started = time.process_time()
    for number in range(20):
        assert robots.verdict(f"{SITE}/a/{number}").rule == "robots.txt: Disallow"
        assert tdm_verdict(200, rules, f"{SITE}/b/{number}").rule is None
    assert time.process_time() - started < 5


TDM = """[
 {"location": "/free/*.jpg", "tdm-reservation": 0},
 {"location": "/free/", "tdm-reservation": 1, "tdm-policy": "https://site.test/policy.json"},
 {"tdm-reservation": 1}, "noise",
 {"location": "/kept/", "tdm-reservation": "1"}
]"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/free/a.jpg", None),
        ("/free/a.png", "tdmrep.json: /free/"),
        ("/kept/a", "tdmrep.json: /kept/"),
        ("/x", None),
    ],
)
def test_the_first_location_of_tdmrep_that_matches_decides(path: str, expected: str | None) -> None:
    assert tdm_verdict(200, TDM, SITE + path).rule == expected
    assert tdm_verdict(404, TDM, SITE + path).rule is None


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", "[" * 100_000, '[{"location": 3, "tdm-reservation": 1}]'])
def test_a_broken_tdmrep_says_nothing(text: str) -> None:
    assert tdm_verdict(200, text, f"{SITE}/x").rule is None


def fetch_config(*words: str) -> FetchConfig:
    return parse(BuildConfig, ["input=a", "output=b", *words]).fetch


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["noai"], "x-robots-tag: noai"),
        (["all, NoIndex , nofollow"], "x-robots-tag: noindex"),
        (["nofollow", "noimageai"], "x-robots-tag: noimageai"),
        (["pairmill: noai"], "x-robots-tag: noai"),
        (["otherbot: noai, noindex"], None),
        (["otherbot: noai", "PAIRMILL: nofollow, noindex"], "x-robots-tag: noindex"),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST"], None),
        (["max-snippet:5, noindex"], "x-robots-tag: noindex"),
        (["noindex, max-snippet:5"], "x-robots-tag: noindex"),
        (["nothing"], None),
        ([""], None),
    ],
)
def test_x_robots_tag(values: list[str], expected: str | None) -> None:
    assert refused_by({"x-robots-tag": values}, fetch_config()) == expected


def test_which_directives_count_is_a_choice() -> None:
    headers = {"x-robots-tag": ["noai, noml"], "tdm-reservation": ["1"]}
    assert refused_by(headers, fetch_config("fetch.disallowed_header_directives=[noml]")) == "x-robots-tag: noml"
    assert refused_by(headers, fetch_config("fetch.disallowed_header_directives=[]")) == "tdm-reservation: 1"
    nothing = fetch_config("fetch.disallowed_header_directives=[]", "fetch.tdm_reservation=ignore")
    assert refused_by(headers, nothing) is None
    assert refused_by({"tdm-reservation": ["0"]}, fetch_config()) is None


@pytest.mark.parametrize(
    ("contact", "expected"),
    [
        ("https://example.org/bot", "mybot/1.0 (pictures; +https://example.org/bot)"),
        ("bot@example.org", "mybot/1.0 (pictures; bot@example.org)"),
        ("null", "mybot/1.0 (pictures)"),
    ],
)
def test_the_contact_goes_into_the_user_agent(contact: str, expected: str) -> None:
    config = fetch_config("fetch.user_agent=mybot/1.0 (pictures)", f"fetch.contact={contact}")
    assert user_agent(config) == expected
    assert product_token(config.user_agent) == "mybot"


def test_a_user_agent_without_a_comment_gets_one() -> None:
    assert user_agent(fetch_config("fetch.user_agent=mybot", "fetch.contact=a@b.org")) == "mybot (a@b.org)"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("fetch.contact=me", "neither a URL nor a mail address"),
        ("fetch.contact=https://example.org/(x)", "neither a URL nor a mail address"),
        ('fetch.contact="a@b.org\\r\\nX-Evil: 1"', "neither a URL nor a mail address"),
        ('fetch.user_agent="bot\\r\\nX-Evil: 1"', "not a User-Agent"),
        ("fetch.user_agent=b\N{LATIN SMALL LETTER O WITH DIAERESIS}t", "not a User-Agent"),
        ("fetch.user_agent=1.0", "not a User-Agent"),
        ("fetch.disallowed_header_directives=[no ai]", "not a directive"),
    ],
)
def test_malformed_identities_are_refused(word: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        fetch_config(word)
