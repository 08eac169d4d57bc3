import pytest

from cluster.config import parse
from cluster.errors import RequestError
from pipeline.addresses import is_inside, is_public
from pipeline.config import BuildConfig, FetchConfig
from pipeline.handle import ca_file
from pipeline.http import Downloader
from pipeline.reasons import Reason, is_transient, sentence
from pipeline.urls import UrlError, clean_url


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses_are_allowed(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1"),
        *("169.254.169.254", "224.0.0.1", "240.0.0.1", "255.255.255.255", "198.18.0.1", "203.0.113.4"),
        *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "2002:7f00:1::", "64:ff9b::7f00:1", "not an address"),
        *(
            "::127.0.0.1",
            "::8.8.8.8",
            "2001:0:4136:e378:8000:63bf:3fff:fdd2",
            "64:ff9b:1::808:808",
            "100::1",
            "fec0::1",
        ),
        *(
            "192.88.99.1",
            "192.0.0.192",
            "168.63.129.16",
            "100.100.100.200",
            "3fff::1",
            "5f00::1",
            "0177.0.0.1",
            "127.1",
        ),
    ],
)
def test_special_addresses_are_refused(address: str) -> None:
    assert not is_public(address)


def test_addresses_are_found_in_named_networks() -> None:
    assert is_inside("10.1.2.3", ["fd00::/8", "10.1.0.0/16"])
    assert is_inside("fd00::1%eth0", ["fd00::/8", "10.1.0.0/16"])
    assert not is_inside("10.2.0.1", ["10.1.0.0/16"])
    assert not is_inside("not an address", ["0.0.0.0/0"])


def test_a_network_that_is_none_is_refused_with_the_key() -> None:
    with pytest.raises(RequestError, match=r"fetch\.allow_addresses: 10\.0\.0\.0/99: not a network"):
        parse(BuildConfig, ["input=a", "output=b", "fetch.allow_addresses=[10.0.0.0/99]"])


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("http://a.example/x y.jpg", "http://a.example/x%20y.jpg"),
        (" https://bücher.example/ü.jpg?q=ä#part ", "https://xn--bcher-kva.example/%C3%BC.jpg?q=%C3%A4"),
        ("HTTP://A.Example/%20b", "http://a.example/%20b"),
        ("http://a.example?x=1", "http://a.example/?x=1"),
        ("http://user:pass@a.example/x", "http://a.example/x"),
        ("http://a.example\\@127.0.0.1/x", "http://127.0.0.1/x"),
        ("http://2130706433/x", "http://127.0.0.1/x"),
        ("http://0x7f.0.0.0x1:80/x", "http://127.0.0.1:80/x"),
        ("http://0177.1/x", "http://127.0.0.1/x"),
        ("http://\uff11\uff12\uff17.1/x", "http://127.0.0.1/x"),
        ("http://1.2.3.4./", "http://1.2.3.4/"),
        ("http://a.example./x", "http://a.example/x"),
        ("https://bücher.example.:8443/x", "https://xn--bcher-kva.example:8443/x"),
        ("http://[2606:4700::1111]:8080/x", "http://[2606:4700::1111]:8080/x"),
        ('http://a.example/"<x>"', "http://a.example/%22%3Cx%3E%22"),
    ],
)
def test_urls_are_sent_in_a_valid_spelling(url: str, sent: str) -> None:
    assert clean_url(url) == sent


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://a.example/x", Reason.UNSUPPORTED_SCHEME),
        ("data:image/png;base64,xx", Reason.UNSUPPORTED_SCHEME),
        ("file:///etc/passwd", Reason.UNSUPPORTED_SCHEME),
        ("a.example/x.jpg", Reason.INVALID_URL),
        ("http://", Reason.INVALID_URL),
        ("http://./x", Reason.INVALID_URL),
        ("http://a b/x", Reason.INVALID_URL),
        ("http://a.example:99999/", Reason.INVALID_URL),
        ("http://a.example:0/", Reason.INVALID_URL),
        ("http://1.2.3.999/", Reason.INVALID_URL),
        ("http://%31%32%37.0.0.1/", Reason.INVALID_URL),
        ("http://a.example/\x00", Reason.INVALID_URL),
        ("http://a.example/\ud800", Reason.INVALID_URL),
        ("http://a.example/\r\nHost: b", Reason.INVALID_URL),
        ("http://[::1/x", Reason.INVALID_URL),
        ("http://" + "ü" * 300 + ".example/", Reason.INVALID_URL),
        ("http://a.example/" + "x" * 10_000, Reason.INVALID_URL),
    ],
)
def test_urls_that_cannot_be_sent_have_their_reason(url: str, reason: Reason) -> None:
    with pytest.raises(UrlError) as refused:
        clean_url(url)
    assert refused.value.reason is reason


@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://127.0.0.1:9/x",
            "http://[::1]:9/x",
            "http://localhost:9/",
            "http://169.254.169.254/latest/",
        ),
        *("http://2130706433:9/x", "http://0x7f000001:9/x", "http://0177.0.0.1:9/x", "http://127.1:9/x"),
        *("http://0.0.0.0:9/x", "http://[::ffff:127.0.0.1]:9/x", "https://127.0.0.1:9/x"),
    ],
)
def test_private_addresses_are_refused_in_every_spelling(url: str) -> None:
    with Downloader(FetchConfig(timeout_s=5, connect_timeout_s=5, retries=2)) as downloader:
        downloader.submit(0, url)
        while downloader.num_open:
            for response in downloader.poll(0.1, 2**20):
                assert (response.reason, response.attempts) == ("forbidden_address", 1)


def test_every_reason_has_its_sentence_and_says_whether_to_try_again() -> None:
    assert all(sentence(reason) for reason in Reason)
    assert is_transient("timeout")
    assert is_transient("http_503")
    assert is_transient("http_522")
    assert not is_transient("http_501")
    assert not is_transient("http_404")
    assert not is_transient("forbidden_address")
    assert sentence("http_410").endswith("410")
    with pytest.raises(ValueError, match="nonsense"):
        sentence("nonsense")


def test_certificates_are_found() -> None:
    assert ca_file() is not None
