import asyncio

import pytest
from starlette.responses import PlainTextResponse

from nanochat.serve.middleware import Gate, Settings, is_loopback, page_policy


def test_policy_allows_each_inline_block_by_its_hash_and_nothing_else():
    page = "<style>p {}</style><script>1 < 2 && 'é'</script><script type=module>\n2\n</script><p>text</p>"
    directives = dict(directive.split(" ", 1) for directive in page_policy(page).split("; "))
    # each by: printf %s TEXT | openssl dgst -sha256 -binary | base64
    assert directives["style-src"] == "'sha256-SNJDlN1Iy2mnt7DOjQIyDb2LQE6O5PQiSZomcdzawQ4='"
    assert directives["script-src"].split() == [
        "'sha256-x+ObvOvVFdr4KP7H2Ft8ZqsPyUpy3URRGmWwrak1JM8='",
        "'sha256-rAHRYt9DfYpZQ6hDngDBW3KU8orAXgZCHuC82Hj2EHk='",
    ]
    assert directives["default-src"] == "'none'"
    assert directives["connect-src"] == "'self'"


def test_a_page_without_scripts_may_run_none():
    assert "script-src 'none'; style-src 'none'" in page_policy("<p>text</p>")


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("node7", False), ("", False)],
)  # fmt: skip
def test_loopback_is_told_from_other_addresses(host, expected):
    assert is_loopback(host) is expected


def run_gate(messages, *, max_bytes=10, max_seconds=1.0):
    """What an application behind the gate received, and what was sent."""
    received, sent, pending = [], [], list(messages)

    async def app(scope, receive, send):
        received.append(await receive())
        await PlainTextResponse("ok")(scope, receive, send)

    async def receive():
        if not pending:
            await asyncio.sleep(60)
        return pending.pop(0)

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    settings = Settings("m", 64, max_body_bytes=max_bytes, body_seconds=max_seconds)
    asyncio.run(Gate(app, settings)(scope, receive, send))
    return received, sent


def chunk(body, more=False):
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_in_pieces_is_handed_on_as_one():
    received, sent = run_gate([chunk(b"12345", True), chunk(b"", True), chunk(b"67890")])
    assert received == [{"type": "http.request", "body": b"1234567890"}]
    assert sent[0]["status"] == 200


def test_a_body_without_a_length_is_counted_as_it_comes():
    received, sent = run_gate([chunk(b"12345", True), chunk(b"123456", True), chunk(b"more")])
    assert not received
    assert sent[0]["status"] == 413


def test_a_body_that_does_not_end_is_given_up():
    received, sent = run_gate([chunk(b"1", True)], max_seconds=0.05)
    assert not received
    assert sent[0]["status"] == 408


def test_who_leaves_within_the_body_is_not_served_and_counts_as_gone():
    received, sent = run_gate([chunk(b"1", True), {"type": "http.disconnect"}])
    assert not received
    assert sent[0]["status"] == 499
