import io
import socket
import ssl
import threading

import pytest
import trustme
from PIL import Image

from qzoom.errors import FetchFailedError, FetchRefusedError, FetchTimeoutError, ImageError
from qzoom.images.fetch import FetchPolicy, fetch_image
from qzoom.images.load import load_image
from tests.images.asset_server import assets, reply

HOST = "images.example"


def png():
    out = io.BytesIO()
    Image.new("RGB", (30, 20), (200, 10, 10)).save(out, "PNG")
    return out.getvalue()


def policy_for(server, **changes):
    options = {
        "allowed_hosts": (f"{HOST}:{server.port}",),
        "allow_http": True,
        "allow_private": True,
        "timeout_s": 60.0,
        "read_timeout_s": 60.0,
        "max_bytes": 100_000,
    }
    return FetchPolicy(**{**options, **changes})


def to_loopback(host, port):
    return ["127.0.0.1"]


def get(server, path="/p", resolve=to_loopback, tls=None, scheme="http", **changes):
    return fetch_image(
        f"{scheme}://{HOST}:{server.port}{path}", policy_for(server, **changes), resolve=resolve, tls=tls
    )


def refusal(kind, call, *args, **options):
    with pytest.raises(kind) as caught:
        call(*args, **options)
    assert type(caught.value) is kind
    text = str(caught.value)
    assert text.startswith("Cannot read the picture's web address: ")
    assert "127.0.0" not in text
    assert "example" not in text
    return text


def test_picture_comes_from_the_checked_address_under_its_own_name():
    with assets({"/a/p.png?size=2": reply("200 OK", png(), Content_Type="text/html")}) as server:
        data = get(server, "/a/p.png?size=2#part")
    assert load_image(data).image.getpixel((0, 0)) == (200, 10, 10)
    ((path, headers),) = server.asked
    assert path == "/a/p.png?size=2"
    assert headers["Host"] == f"{HOST}:{server.port}"
    assert headers["Accept-Encoding"] == "identity"
    assert not {"Cookie", "Authorization"} & set(headers)


def test_off_by_default():
    def unexpected(host, port):
        raise AssertionError("looked up")

    text = refusal(FetchRefusedError, fetch_image, f"https://{HOST}/x", FetchPolicy(), resolve=unexpected)
    assert "fetches no pictures" in text
    assert "data URL" in text


def test_nothing_is_looked_up_for_what_is_not_allowed():
    def unexpected(host, port):
        raise AssertionError("looked up")

    policy = FetchPolicy(allowed_hosts=(HOST, "other.example:8443"))
    for url, words in [
        (f"http://{HOST}/", "not https"),
        ("https://elsewhere.example/", "not on this server's list"),
        (f"https://{HOST}:8443/", "not on this server's list"),
        ("https://other.example/", "not on this server's list"),
        (f"https://{HOST}\\@elsewhere.example/", "characters that addresses do not have"),
        (f"https://{HOST}@elsewhere.example/", "user name or password"),
        ("file:///etc/passwd", "neither https nor http"),
        ("ftp://images.example/p", "neither https nor http"),
    ]:
        assert words in refusal(FetchRefusedError, fetch_image, url, policy, resolve=unexpected), url


@pytest.mark.parametrize(
    "answers",
    [
        ["127.0.0.1"], ["10.0.0.1"], ["169.254.169.254"], ["::1"], ["::ffff:127.0.0.1"], ["64:ff9b::7f00:1"],
        ["2002:7f00:1::"], ["fe80::1%lo"], ["8.8.8.8", "127.0.0.1"], ["127.0.0.1", "8.8.8.8"],
    ],
)  # fmt: skip
def test_hosts_with_any_address_that_is_not_public_are_refused_and_not_dialled(answers):
    with assets({"/p": reply("200 OK", png())}) as server:
        resolve = lambda host, port: answers  # noqa: E731
        text = refusal(FetchRefusedError, get, server, resolve=resolve, allow_private=False)
        assert "not public" in text
        assert not any(address in text for address in answers)
    assert server.asked == []


def test_listed_odd_spellings_of_the_loopback_are_refused():
    for host in ("127.0.0.1", "2130706433", "0x7f.1", "localhost"):
        policy = FetchPolicy(allowed_hosts=(host,))
        assert "not public" in refusal(FetchRefusedError, fetch_image, f"https://{host}/", policy)


def test_a_name_server_that_changes_its_answer_is_asked_once_per_hop():
    asked = []

    def rebinding(host, port):
        asked.append((host, port))
        return ["127.0.0.1"] if len(asked) == 1 else ["192.0.2.1"]

    with assets({"/p": reply("200 OK", png())}) as server:
        assert get(server, resolve=rebinding) == png()
        assert asked == [(HOST, server.port)]
    assert len(server.asked) == 1


def test_redirects_are_looked_up_and_checked_again():
    seen = []

    def rebinding(host, port):
        seen.append(host)
        return ["127.0.0.1"] if len(seen) == 1 else ["fe80::1", "127.0.0.1", "not an address"]

    with assets({"/p": reply("302 Found", Location="/q"), "/q": reply("200 OK", png())}) as server:
        policy = policy_for(server)
        assert "cannot be found" in refusal(
            FetchFailedError, fetch_image, f"http://{HOST}:{server.port}/p", policy, resolve=rebinding
        )
    assert [path for path, _ in server.asked] == ["/p"]
    assert seen == [HOST, HOST]


def test_three_redirects_are_followed_and_no_more():
    chain = {f"/{i}": reply("302 Found", Location=f"/{i + 1}") for i in range(4)}
    with assets({**chain, "/4": reply("200 OK", png())}) as server:
        assert get(server, "/1") == png()
        assert "redirects too often" in refusal(FetchRefusedError, get, server, "/0")
        assert "redirects too often" in refusal(FetchRefusedError, get, server, "/3", max_redirects=0)
    assert [path for path, _ in server.asked] == ["/1", "/2", "/3", "/4", "/0", "/1", "/2", "/3", "/3"]


@pytest.mark.parametrize("status", ["301 x", "302 x", "303 x", "307 x", "308 x"])
def test_relative_redirects(status):
    with assets({"/a/p": reply(status, Location="../b?c"), "/b?c": reply("200 OK", png())}) as server:
        assert get(server, "/a/p") == png()


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("http://elsewhere.example/", "not on this server's list"),
        ("http://127.0.0.1/", "not on this server's list"),
        ("http://images.example/", "not on this server's list"),
        ("//elsewhere.example/x", "not on this server's list"),
        ("file:///etc/passwd", "neither https nor http"),
        ("ftp://images.example/x", "neither https nor http"),
        ("gopher://images.example/x", "neither https nor http"),
        ("http://user:pw@images.example/", "user name or password"),
        ("http://images.example\\@elsewhere.example/", "malformed address"),
        ("/x y", "malformed address"),
        ("/\xe4", "malformed address"),
        ("http://[::1/", "malformed address"),
        ("http://[::1]/", "not a plain name"),
        ("", "redirects to nowhere"),
    ],
)
def test_redirects_that_are_refused(location, words):
    with assets({"/p": reply("302 Found", Location=location)}) as server:
        assert words in refusal(FetchRefusedError, get, server)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("404 Not Found", FetchRefusedError), ("403 Forbidden", FetchRefusedError), ("410 Gone", FetchRefusedError),
        ("204 No Content", FetchRefusedError), ("206 Partial Content", FetchRefusedError),
        ("300 Multiple Choices", FetchRefusedError), ("304 Not Modified", FetchRefusedError),
        ("501 Not Implemented", FetchRefusedError), ("429 Too Many Requests", FetchFailedError),
        ("500 Internal Server Error", FetchFailedError), ("503 Service Unavailable", FetchFailedError),
    ],
)  # fmt: skip
def test_permanent_and_transient_statuses(status, kind):
    with assets({"/p": reply(status, b"")}) as server:
        refusal(kind, get, server)


def test_too_large_by_content_length_is_refused_before_the_body_comes():
    with assets({"/p": reply("200 OK", Content_Length="100001")}) as server:
        assert "larger than the limit" in refusal(FetchRefusedError, get, server)


def endless(head, chunk):
    def answer(connection):
        connection.sendall(head)
        while True:
            connection.sendall(chunk)

    return answer


@pytest.mark.parametrize(
    ("head", "chunk", "kind"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 5000, FetchRefusedError),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"400\r\n" + b"x" * 1024 + b"\r\n",
            FetchRefusedError,
        ),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", b"x" * 5000, FetchFailedError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"trailer: x\r\n", FetchFailedError),
        (b"HTTP/1.1 200 OK\r\n", b"x: y\r\n", FetchFailedError),
        (b"HTTP/1.1 200 OK\r\nx: ", b"y" * 5000, FetchFailedError),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", FetchFailedError),
        (b"", b"x", FetchFailedError),
    ],
)
def test_endless_answers_end_at_the_byte_limit(head, chunk, kind):
    with assets({"/p": endless(head, chunk)}) as server:
        refusal(kind, get, server)


def dribble(head):
    """Sends a byte now and then until the server stops: each wait is short, their sum is not."""

    def answer(connection):
        server_stops = answer.server.stopping
        connection.sendall(head)
        while not server_stops.wait(0.05):
            connection.sendall(b"x")

    return answer


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"])
def test_slow_answers_end_at_the_time_limit_of_the_whole(head):
    answer = dribble(head)
    with assets({"/p": answer}) as server:
        answer.server = server
        text = refusal(FetchTimeoutError, get, server, timeout_s=0.5)
    assert "in time" in text


def test_answers_that_never_come_end_in_time():
    def silent(connection):
        server.stopping.wait(60)

    with assets({"/p": silent}) as server:
        refusal(FetchTimeoutError, get, server, read_timeout_s=0.3)
    answered = threading.Event()

    def stuck(host, port):
        answered.wait(60)
        return ["127.0.0.1"]

    with assets({"/p": reply("200 OK", png())}) as server:
        refusal(FetchTimeoutError, get, server, resolve=stuck, timeout_s=0.3)
        answered.set()
        assert server.asked == []


def test_unknown_hosts_and_closed_ports_are_transient():
    def unknown(host, port):
        raise socket.gaierror(socket.EAI_NONAME, "internal detail 10.1.2.3")

    with assets({}) as server:
        text = refusal(FetchFailedError, get, server, resolve=unknown)
        assert "internal" not in text
        assert "cannot be found" in refusal(FetchFailedError, get, server, resolve=lambda host, port: [])
    assert "failed or was broken off" in refusal(FetchFailedError, get, server)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (reply("200 OK", b"cut", Content_Length="500"), FetchFailedError),
        (reply("200 OK", b"5\r\nab", Transfer_Encoding="chunked"), FetchFailedError),
        (reply("200 OK", b"zz\r\nab\r\n", Transfer_Encoding="chunked"), FetchFailedError),
        (lambda connection: connection.sendall(b"garbage\r\n\r\n"), FetchFailedError),
        (lambda connection: None, FetchFailedError),
        (reply("200 OK", b"\x1f\x8b", Content_Encoding="gzip"), FetchRefusedError),
    ],
)
def test_broken_answers(answer, kind):
    with assets({"/p": answer}) as server:
        refusal(kind, get, server)


def test_whole_answers_are_read_and_no_proxies_used(monkeypatch):
    body = b"3\r\nabc\r\n2;ext=1\r\nde\r\n0\r\n\r\n"
    with assets({"/p": reply("200 OK", body, Transfer_Encoding="chunked")}) as server:
        assert get(server) == b"abcde"
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:9")
    with assets({"/p": reply("200 OK", png())}) as server:
        assert get(server) == png()
    with assets({"/p": reply("200 OK", png())}) as server:
        assert get(server, resolve=lambda host, port: ["127.0.0.77", "127.0.0.1"]) == png()


def test_what_is_fetched_is_recognised_by_its_bytes():
    page = b"<!DOCTYPE html><html>secret</html>"
    with assets({"/p": reply("200 OK", page, Content_Type="image/png")}) as server:
        data = get(server)
    with pytest.raises(ImageError, match="web page") as caught:
        load_image(data)
    assert "secret" not in str(caught.value)


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


def over_tls(authority, name):
    """A wrapper of connections that remembers the names it was asked for, and a client that trusts it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    names = []
    context.sni_callback = lambda connection, asked, _: names.append(asked)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return lambda raw: context.wrap_socket(raw, server_side=True), client, names


def test_tls_names_the_host_and_redirects_do_not_leave_it(authority):
    wrap, client, names = over_tls(authority, HOST)
    with assets({"/p": reply("200 OK", png())}, wrap) as server:
        assert get(server, scheme="https", tls=client, allow_http=False) == png()
    assert names == [HOST]
    assert server.asked[0][1]["Host"] == f"{HOST}:{server.port}"
    wrap, client, _ = over_tls(authority, HOST)
    with assets({}, wrap) as server:
        server.answers["/p"] = reply("302 Found", Location=f"http://{HOST}:{server.port}/q")
        assert "not https" in refusal(FetchRefusedError, get, server, scheme="https", tls=client, allow_http=False)


def test_certificates_of_other_names_or_unknown_authorities_are_refused(authority):
    wrap, client, _ = over_tls(authority, "other.example")
    with assets({"/p": reply("200 OK", png())}, wrap) as server:
        assert "certificate" in refusal(FetchRefusedError, get, server, scheme="https", tls=client)
        assert "certificate" in refusal(FetchRefusedError, get, server, scheme="https")
    assert server.asked == []
