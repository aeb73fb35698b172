import ipaddress

import pytest

from qzoom.errors import FetchRefusedError
from qzoom.images.fetch import Target, is_allowed, is_public, numeric_addresses, parse_host, parse_url


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("https://Images.Example.com", Target("https", "images.example.com", 443, "/")),
        ("HTTP://a.example:8080/x/../y?q=1&r=%20#part", Target("http", "a.example", 8080, "/x/../y?q=1&r=%20")),
        ("https://a.example?q", Target("https", "a.example", 443, "/?q")),
        ("https://192.0.2.7:443/p", Target("https", "192.0.2.7", 443, "/p")),
    ],
)
def test_parts(url, target):
    assert parse_url(url) == target


def test_url_and_host_header_are_made_of_the_parsed_parts():
    assert parse_url("https://A.example:443/p?q#f").url == "https://a.example/p?q"
    assert parse_url("https://a.example:8443/p").netloc == "a.example:8443"


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://a.example/x", "gopher://a.example/1", "javascript:alert(1)", "//a.example/x",
        "https:a.example/x", "https:///x", "https://", "https://user@a.example/", "https://user:secret@a.example/",
        "https://a.example@b.example/", "https://a.example\\@b.example/", "https://a.example\\.b.example/",
        "https:\\\\a.example/", "https://a.example%00.b.example/", "https://a.example%2f@b.example/",
        "https://a.example\t/", "https://a.exa\nmple/", "https://a.example/ x", "https://a.example/\r\nHost: b",
        "https://ä.example/", "https://a.example/ä", "https://a.example。com/", "https://[::1]/",
        "https://[::ffff:127.0.0.1]/", "https://[a.example]/", "https://[::1", "https://a.example:/",
        "https://a.example:0/", "https://a.example:65536/", "https://a.example:8x/", "https://a.example:-1/",
        "https://a..example/", "https://.example/", "https://a.example./", "https://-a.example/",
        "https://" + "a" * 64 + ".example/", "https://" + ".".join(["a" * 60] * 5) + "/",
        "https://a.example/" + "x" * 2048, "",
    ],
)  # fmt: skip
def test_what_is_not_a_plain_web_address_is_refused(url):
    with pytest.raises(FetchRefusedError) as caught:
        parse_url(url)
    text = str(caught.value)
    assert text.startswith("Cannot read the picture's web address: ")
    assert "secret" not in text
    assert "example" not in text


def test_hosts_and_ports_are_listed_literally():
    listed = ("a.example", "B.example:8443")

    def allowed(url):
        return is_allowed(parse_url(url), listed)

    assert allowed("https://a.example/")
    assert allowed("https://A.EXAMPLE:443/")
    assert allowed("http://a.example/")
    assert allowed("https://b.example:8443/")
    for url in (
        "https://a.example:8443/",
        "https://a.example:80/",
        "https://b.example/",
        "https://x.a.example/",
        "https://xa.example/",
        "https://a.example.x/",
        "https://example/",
    ):
        assert not allowed(url), url
    assert not is_allowed(parse_url("https://a.example/"), ())
    assert parse_host("Images.example.com") == ("images.example.com", None)
    assert parse_host("images.example.com:8443") == ("images.example.com", 8443)
    for text in (
        "",
        "*",
        "*.example.com",
        "https://a.example",
        "a.example/x",
        "a.example:",
        "a.example:99999",
        "[::1]",
    ):
        assert parse_host(text) is None, text


@pytest.mark.parametrize("text", ["8.8.8.8", "1.1.1.1", "192.31.196.1", "2606:4700:4700::1111", "2a00:1450:4001::1"])
def test_public_addresses(text):
    assert is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize(
    "text",
    [
        "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254",
        "168.63.129.16", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.0.192", "192.0.2.1",
        "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1",
        "239.255.255.255", "240.0.0.1", "255.255.255.255", "::", "::1", "::8.8.8.8", "::ffff:8.8.8.8",
        "::ffff:127.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b::8.8.8.8", "64:ff9b::7f00:1", "64:ff9b:1::1", "100::1",
        "2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:10::1", "2001:20::1", "2001:db8::1", "2002:7f00:1::1",
        "2002:808:808::1", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1",
        "ff02::1",
    ],
)  # fmt: skip
def test_all_other_addresses(text):
    assert not is_public(ipaddress.ip_address(text))


def test_the_system_reads_odd_spellings_of_an_address_as_what_they_are():
    for host in ("127.0.0.1", "127.1", "2130706433", "0x7f.1", "017700000001"):
        assert numeric_addresses(host, 80) == ["127.0.0.1"], host
