"""For which requests a browser's cookie counts."""

import pytest
from starlette.requests import Request

from ops_backend.browsers import from_our_page


@pytest.mark.parametrize(
    ("method", "headers", "counts"),
    [
        ("GET", {"Sec-Fetch-Site": "same-origin"}, True),
        ("GET", {"Sec-Fetch-Site": "none"}, True),  # typed, or a bookmark
        ("GET", {"Sec-Fetch-Site": "same-site"}, False),  # another port of this host
        ("GET", {"Sec-Fetch-Site": "cross-site"}, False),
        ("GET", {}, True),  # plain http in a network: browsers say nothing of plain reads
        ("POST", {"Sec-Fetch-Site": "same-origin"}, True),
        ("POST", {"Sec-Fetch-Site": "none"}, False),
        ("POST", {"Sec-Fetch-Site": "same-site", "Origin": "http://test:81"}, False),
        ("POST", {"Origin": "http://test"}, True),
        ("POST", {"Origin": "http://test:81"}, False),
        ("POST", {"Origin": "https://evil.example"}, False),
        ("POST", {"Origin": "null"}, False),
        ("POST", {}, False),
    ],
)
def test_a_cookie_counts_for_requests_of_our_own_pages_only(method: str, headers: dict[str, str], counts: bool) -> None:
    given = [(name.lower().encode(), value.encode()) for name, value in ({"Host": "test"} | headers).items()]
    request = Request({"type": "http", "method": method, "headers": given})

    assert from_our_page(request) is counts
