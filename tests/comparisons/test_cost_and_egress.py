from __future__ import annotations

import sys

import pytest

from comparisons.cost import LOCAL_COST, price
from comparisons.egress import is_loopback_address, is_loopback_host, leaves_device
from models.events import Usage

USAGE = Usage(prompt_tokens=1000, completion_tokens=100)


def test_a_known_model_is_priced_and_the_basis_names_the_price_list():
    cost = price("openai", "gpt-4.1-mini", USAGE)
    assert cost.usd is not None
    assert cost.usd > 0
    assert "genai-prices 0." in cost.basis
    assert "openai gpt-4.1-mini" in cost.basis


def test_cached_tokens_are_part_of_the_prompt_and_cheaper():
    cached = price("openai", "gpt-4.1-mini", Usage(prompt_tokens=1000, completion_tokens=100, cached_tokens=900))
    assert 0 < cached.usd < price("openai", "gpt-4.1-mini", USAGE).usd


@pytest.mark.parametrize(
    ("provider", "model", "usage", "why"),
    [
        ("openai", "no-such-model", USAGE, "has no price for"),
        ("nobody", "gpt-4.1-mini", USAGE, "has no price for"),
        ("openai", "gpt-4.1-mini", Usage(), "no token counts"),
        ("openai", "gpt-4.1-mini", Usage(prompt_tokens=1, completion_tokens=1, cached_tokens=5), "has no price for"),
    ],
)
def test_what_cannot_be_priced_is_null_with_a_reason(provider, model, usage, why):
    cost = price(provider, model, usage)
    assert cost.usd is None
    assert why in cost.basis


def test_without_the_package_the_price_is_null_and_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    cost = price("openai", "gpt-4.1-mini", USAGE)
    assert cost.usd is None
    assert 'pip install "nearfar[hosted]"' in cost.basis


def test_a_local_answer_costs_nothing_and_says_what_was_not_counted():
    assert LOCAL_COST.usd == 0.0
    assert "not counted" in LOCAL_COST.basis


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "localhost.", "LOCALHOST.", "127.0.0.1", "127.9.9.9", "127.255.255.254"),
        *("::1", "[::1]", "0:0:0:0:0:0:0:1", "::ffff:127.0.0.1", "[::ffff:127.0.0.1]", "::ffff:7f00:1"),
    ],
)
def test_loopback_stays_on_the_device(host):
    assert is_loopback_host(host)


@pytest.mark.parametrize(
    "host",
    [
        "0.0.0.0",
        "::",
        "[::]",
        "::ffff:0.0.0.0",
        "::ffff:10.0.0.1",
        "::127.0.0.1",
        "128.0.0.1",
        "10.0.0.1",
        "192.168.1.2",
        "example.com",
        "localhost.example.com",
        "127.0.0.1.nip.io",
        "127.1",
        "",
    ],
)
def test_everything_else_leaves_the_device(host):
    assert not is_loopback_host(host)


@pytest.mark.parametrize(
    ("url", "leaves"),
    [
        ("http://127.0.0.1:9001/v1", False),
        ("http://[::1]:9001/v1", False),
        ("http://localhost/v1", False),
        ("https://api.openai.com/v1", True),
        ("http://127.0.0.1@example.com/v1", True),
        ("http://0.0.0.0:80/", True),
        ("nonsense", True),
        ("http://[half", True),
    ],
)
def test_a_url_leaves_the_device_by_its_host(url, leaves):
    assert leaves_device(url) is leaves


def test_a_connected_peer_is_judged_by_its_address():
    assert is_loopback_address(("127.0.0.1", 80))
    assert is_loopback_address(("::1", 80, 0, 0))
    assert not is_loopback_address(("203.0.113.5", 443))
    assert not is_loopback_address("localhost")
    assert not is_loopback_address(None)
    assert not is_loopback_address(())
