import pytest

from qzoom.errors import ConfigError
from qzoom.images.fetch import FetchPolicy


@pytest.mark.parametrize(
    "options",
    [
        {"allowed_hosts": ["a.example"]}, {"allowed_hosts": ("https://a.example",)}, {"allowed_hosts": ("*",)},
        {"allowed_hosts": (5,)}, {"max_redirects": -1}, {"max_redirects": True}, {"timeout_s": 0},
        {"timeout_s": float("nan")}, {"read_timeout_s": "5"}, {"max_bytes": 0}, {"max_bytes": 1.5},
    ],
)  # fmt: skip
def test_policies_are_validated(options):
    with pytest.raises(ConfigError):
        FetchPolicy(**options)
