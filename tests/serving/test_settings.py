"""Where settings come from, what of them is shown, and what API keys may do."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import InvalidValue
from serving.keys import ApiKey, KeyRing, RateLimited, Unauthorized, digest, new_key
from serving.settings import Settings
from serving.targets import Targets
from tests.serving.conftest import RunningService, running
from tests.serving.test_cli import nearfar
from tests.serving.test_streams import Script, serve_script, slowed

BODY = {"prompt": "x", "max_tokens": 1}


def written(folder: Path, text: str) -> Path:
    file = folder / "nearfar.toml"
    file.write_text(text)
    return file


def test_the_environment_wins_over_the_file_and_a_flag_over_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path, 'port = 1111\nmax_waiting = 11\ndrain_s = 1\nmodels = ["tiny-scenes@fp32"]')
    monkeypatch.setenv("NEARFAR_MAX_WAITING", "22")
    monkeypatch.setenv("NEARFAR_DRAIN_S", "2")
    monkeypatch.setenv("NEARFAR_CONFIG", str(file))
    settings = Settings(drain_s=3)
    assert (settings.port, settings.max_waiting, settings.drain_s) == (1111, 22, 3)
    assert settings.models == ("tiny-scenes@fp32",)


def test_nearfar_toml_is_read_where_the_service_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, "port = 1111")
    monkeypatch.chdir(tmp_path)
    assert Settings().port == 1111


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("prot = 1", "there is no setting 'prot'; did you mean port?"),
        ("port = ", "is not TOML"),
        ('config = "other.toml"', "there is no setting 'config'"),
        ('port = "many"', "port"),
        ('[[keys]]\nname = "a"\nsha256 = "secret"', "keys.0.sha256"),
        ('[[keys]]\nname = "a"\nlimit = 3', "keys.0"),
        ('api_keys = ["secret", ""]', "api_keys.1"),
        ('api_keys = [" "]', "api_keys.0"),
        (f'[[keys]]\nname = "a"\nsha256 = "{digest("")}"', "keys.0.sha256"),
    ],
)
def test_a_wrong_file_is_one_line_and_status_2(tmp_path: Path, text: str, part: str) -> None:
    run = nearfar("config", "--config", str(written(tmp_path, text)))
    assert run.returncode == 2
    assert part in run.stderr
    assert run.stderr.count("\n") == 1
    assert "secret" not in run.stderr


def test_a_named_file_that_is_not_there_is_an_error() -> None:
    with pytest.raises(InvalidValue, match="No such file"):
        Settings(config=Path("/nowhere/nearfar.toml"))


def test_the_command_shows_what_takes_effect_and_where_it_comes_from_without_secrets(tmp_path: Path) -> None:
    text = f'port = 1111\n[[keys]]\nname = "laptop"\nsha256 = "{"a" * 64}"'
    run = nearfar(
        "config", "--json", "--config", str(written(tmp_path, text)),
        NEARFAR_MAX_WAITING="7", NEARFAR_API_KEYS="hidden-key", NEARFAR_ENDPOINTS="a=http://me:hidden@box/v1,m",
    )  # fmt: skip
    shown = json.loads(run.stdout)
    assert shown["port"] == {"value": 1111, "origin": "file"}
    assert shown["max_waiting"] == {"value": 7, "origin": "environment"}
    assert shown["host"] == {"value": "127.0.0.1", "origin": "default"}
    assert (shown["keys"]["value"], shown["api_keys"]["value"]) == (["laptop"], ["key1"])
    assert "hidden" not in run.stdout
    assert "aaaa" not in run.stdout
    assert "laptop" in nearfar("config", "--config", str(tmp_path / "nearfar.toml")).stdout


def test_a_made_key_opens_the_service_that_keeps_its_hash(tmp_path: Path) -> None:
    run = nearfar("key", "laptop")
    key = run.stderr.split()[-1]
    assert key not in run.stdout
    settings = tomllib.loads(run.stdout)
    with running(keys=settings["keys"], models=("tiny-scenes@fp32",)) as service:
        client = service.ready().client
        assert client.post("/infer", json=BODY, headers={"authorization": f"Bearer {key}"}).status_code == 200
        assert client.post("/infer", json=BODY, headers={"x-api-key": key[:-1]}).status_code == 401
        assert client.post("/infer", json=BODY, headers={"x-api-key": settings["keys"][0]["sha256"]}).status_code == 401


def test_every_key_is_another() -> None:
    assert new_key("a").key != new_key("a").key


def test_two_keys_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="same name"):
        Settings(keys=(ApiKey(name="key1", sha256="a" * 64),), api_keys=("plain",))


@given(st.lists(st.floats(0, 20), max_size=60))
def test_no_minute_holds_more_requests_than_a_key_may_have(pauses: list[float]) -> None:
    now, taken, refused = 0.0, [], []
    key = ApiKey(name="a", sha256=digest("a"), requests_per_minute=3)
    ring = KeyRing([key], clock=lambda: now)
    for pause in pauses:
        now += pause
        try:
            with ring.use(key):
                taken.append(now)
        except RateLimited as error:
            refused.append(now + error.retry_after_s - (taken[-3] + 60))  # too late by, where one more is let in
    assert all(-1e-6 < late <= 1 for late in refused)
    assert all(later - earlier >= 60 for earlier, later in zip(taken, taken[3:], strict=False))


def test_a_key_is_found_among_others_and_nothing_else_is() -> None:
    ring = KeyRing([ApiKey(name=name, sha256=digest(f"key of {name}")) for name in ("a", "b")])
    assert ring.find("key of b").name == "b"
    for wrong in ("", "key of c", digest("key of a"), "ké"):
        with pytest.raises(Unauthorized):
            ring.find(wrong)


def test_of_several_offers_one_that_is_right_is_enough() -> None:
    ring = KeyRing([ApiKey(name=name, sha256=digest(f"key of {name}")) for name in ("a", "b")])
    assert ring.find("", "wrong", "key of b").name == "b"
    assert ring.find("key of b", "key of a").name == "b"
    with pytest.raises(Unauthorized):
        ring.find()


def test_an_empty_offer_opens_nothing_whatever_hashes_are_kept() -> None:
    ring = KeyRing([ApiKey.model_construct(name="a", sha256=digest(""))])
    with pytest.raises(Unauthorized):
        ring.find("")


def limited(**limits: Any) -> list[ApiKey]:
    return [ApiKey(name="narrow", sha256=digest("one"), **limits), ApiKey(name="wide", sha256=digest("two"))]


POSTS = [
    ("/infer", {"prompt": "x", "max_tokens": 1}),
    ("/compare", {"prompt": "x", "max_tokens": 1}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
    ("/v1/responses", {"input": "x", "max_output_tokens": 16}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
]


# The error's code, where the dialect has one, or its type.
LIMITED = {
    "/infer": "rate_limited",
    "/compare": "rate_limited",
    "/v1/chat/completions": "rate_limit_exceeded",
    "/v1/responses": "rate_limit_exceeded",
    "/v1/messages": "rate_limit_error",
}


@pytest.mark.parametrize(("path", "body"), POSTS, ids=[path for path, _ in POSTS])
def test_over_its_rate_a_key_gets_429_in_that_dialect_and_other_keys_go_on(path: str, body: dict[str, Any]) -> None:
    with running(keys=limited(requests_per_minute=1), models=("tiny-scenes@fp32",)) as service:
        client = service.ready().client
        assert client.post(path, json=body, headers={"x-api-key": "one"}).status_code == 200
        refused = client.post(path, json=body, headers={"x-api-key": "one"})
        assert refused.status_code == 429
        assert 55 <= int(refused.headers["retry-after"]) <= 60
        error = refused.json()["error"]
        assert "narrow" in error["message"]
        assert error.get("code", error["type"]) == LIMITED[path]
        assert client.get("/targets", headers={"x-api-key": "one"}).status_code == 200
        assert client.post(path, json=body, headers={"x-api-key": "two"}).status_code == 200


def test_a_key_has_so_many_requests_at_a_time_until_their_streams_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(keys=limited(concurrent_requests=1), models=("tiny-scenes@fp32",)) as service:
        slowed(service.ready(), monkeypatch, "decode_together", 0.01)
        ask = {"json": BODY, "headers": {"x-api-key": "one"}}
        words = {"type": "regex", "pattern": "[a-z]{200}"}  # of itself the model says two tokens
        long = {**BODY, "max_tokens": 200, "stream": True, "response_format": words}
        with service.client.stream("POST", "/infer", json=long, headers={"x-api-key": "one"}) as busy:
            assert service.client.post("/infer", **ask).status_code == 429
            list(busy.iter_bytes())
        assert service.client.post("/infer", **ask).status_code == 200


@pytest.mark.parametrize(("path", "body"), POSTS, ids=[path for path, _ in POSTS])
def test_a_request_bears_its_keys_name_on_every_route(keyed: RunningService, path: str, body: dict[str, Any]) -> None:
    script: Script = serve_script(keyed, "yes")
    name = {"targets": ["script/one"]} if path == "/compare" else {"model": "script/one"}
    assert keyed.client.post(path, json={**body, **name}, headers={"x-api-key": "two"}).status_code == 200
    assert [request.tenant for request in script.asked] == ["wide"]


def test_a_keys_policy_only_tightens_the_servers(keyed: RunningService) -> None:
    body = {**BODY, "model": "away/one"}
    serve_away(keyed)
    assert keyed.client.post("/infer", json=body, headers={"x-api-key": "two"}).status_code == 200
    assert keyed.client.post("/infer", json=body, headers={"x-api-key": "one"}).status_code == 403
    wider = {**body, "policy": "any"}
    assert keyed.client.post("/infer", json=wider, headers={"x-api-key": "one"}).status_code == 403
    shown = keyed.client.get("/targets", headers={"x-api-key": "one"}).json()["targets"]
    assert [target["allowed"] for target in shown if target["leaves_device"]] == [False]


def serve_away(service: RunningService) -> None:
    serve_script(service, "yes").name = "away/one"
    service.services._targets = Targets(
        [replace(target, leaves_device=target.kind == "hosted") for target in service.services.targets()]
    )


@pytest.fixture
def keyed() -> Any:
    with running(keys=limited(policy="local-only"), policy="any", models=("tiny-scenes@fp32",)) as service:
        yield service.ready()


def test_a_secret_may_lie_in_a_file_that_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("one,two\n")
    (tmp_path / "database").write_text("postgresql://me:hidden@box/records\n")
    monkeypatch.setenv("NEARFAR_API_KEYS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("NEARFAR_DATABASE_FILE", str(tmp_path / "database"))
    settings = Settings(config=written(tmp_path, 'database = "sqlite:///other.sqlite3"'))
    assert settings.api_keys == ("one", "two")
    assert settings.database == "postgresql://me:hidden@box/records"
    assert settings.effective()["database"] == ("postgresql://[...]@box/records", "environment")
    monkeypatch.setenv("NEARFAR_API_KEYS", "")  # an empty variable does not open what the file closes
    (tmp_path / "keys").write_text("one\ntwo\n")
    assert Settings().api_keys == ("one", "two")
    monkeypatch.setenv("NEARFAR_API_KEYS", "three")
    assert Settings().api_keys == ("three",)


def test_a_file_of_keys_that_is_empty_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("\n")
    monkeypatch.setenv("NEARFAR_API_KEYS_FILE", str(tmp_path / "keys"))
    with pytest.raises(InvalidValue, match="NEARFAR_API_KEYS_FILE names is empty"):
        Settings()


def test_a_secrets_file_that_cannot_be_read_is_one_line_and_status_2(tmp_path: Path) -> None:
    run = nearfar("config", NEARFAR_DATABASE_FILE=str(tmp_path / "nowhere"))
    assert run.returncode == 2
    assert "the file that NEARFAR_DATABASE_FILE names cannot be read" in run.stderr
    assert run.stderr.count("\n") == 1
