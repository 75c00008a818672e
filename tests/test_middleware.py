import pytest

from nanochat.serve.middleware import is_loopback, page_policy


def test_policy_allows_each_inline_block_by_its_hash_and_nothing_else():
    page = "<style>p {}</style><script>1 < 2 && 'é'</script><script type=module>\n2\n</script><p>text</p>"
    directives = dict(directive.split(" ", 1) for directive in page_policy(page).split("; "))
    # each by: printf %s TEXT | openssl dgst -sha256 -binary | base64
    assert directives["style-src"] == "'sha256-SNJDlN1Iy2mnt7DOjQIyDb2LQE6O5PQiSZomcdzawQ4='"
    assert directives["script-src"].split() == [
        "'sha256-x+ObvOvVFdr4KP7H2Ft8ZqsPyUpy3URRGmWwrak1JM8='",
        "'sha256-rAHRYt9DfYpZQ6hDngDBW3KU8orAXgZCHuC82Hj2EHk='",
    ]
    assert (directives["default-src"], directives["connect-src"]) == ("'none'", "'self'")
    assert "script-src 'none'; style-src 'none'" in page_policy("<p>text</p>")


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("node7", False), ("", False)],
)  # fmt: skip
def test_loopback_is_told_from_other_addresses(host, expected):
    assert is_loopback(host) is expected
