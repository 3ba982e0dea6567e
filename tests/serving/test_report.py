"""`nearfar report` and `GET /report`: figures of real runs and records, the page's as JSON has them; errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx2
import pytest
from typer.testing import CliRunner

from comparisons.run_file import read_run
from models.errors import Unavailable
from serving import plots
from serving.cli import app
from serving.ledger import FOLDER
from serving.plots import Bar, intervals
from serving.report import Terms, report_of_run
from serving.report_page import page_of
from tests.serving.conftest import picture, running
from tests.serving.test_cli import nearfar

INT8, FP32 = "local/tiny-scenes@int8", "local/tiny-scenes@fp32"


class Figures(HTMLParser):
    """What stands in `<data value>` elements, by the id of the table around them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: dict[str | None, list[float]] = {}
        self._table: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        if tag == "table":
            self._table = given.get("id")
        elif tag == "data":
            self.tables.setdefault(self._table, []).append(float(given["value"]))


class Evaluated(dict[str, Any]):
    """What `evaluate --json` printed, and its file."""

    file: Path


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """Twelve probes through both embedded recipes, each again blurred a little and much."""
    out = tmp_path_factory.mktemp("run") / "run.jsonl"
    made = nearfar(
        *("evaluate", "scenes-absent", "--limit", "12", "--corrupt", "blur", "--severity", "1,5", "--json"),
        *("--out", str(out)),
    )
    assert made.returncode == 0, made.stderr
    result = Evaluated(json.loads(made.stdout))
    result.file = out
    return result


def figures_of(each: dict[str, Any] | None) -> list[float]:
    if each is None:
        return []
    bounds = [] if each["low"] is None else [each["low"], each["high"]]
    return [each["value"], *bounds, each["n"]]


def test_the_page_has_the_figures_of_the_json_and_evaluate_has_them_too(evaluated: Evaluated, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    made = nearfar("report", "--run", str(evaluated.file), "--out", str(page), "--json")
    assert made.returncode == 0, made.stderr
    assert "12 inputs" in made.stderr
    whole = json.loads(made.stdout)
    assert (whole["source"]["inputs"], whole["source"]["corrupted"]) == (12, 24)
    shown = Figures(page.read_text()).tables
    expected: list[float] = []
    for each in whole["targets"]:
        expected += figures_of(each["accuracy"]) + figures_of(each["total_ms"])
        expected += [] if each["total_ms_p95"] is None else [each["total_ms_p95"]]
        expected += figures_of(each["usd_per_1000"]) + figures_of(each["ttft_ms"]) + figures_of(each["bytes_sent"])
        expected += [each["failed"], each["inputs"]]
    assert shown["targets"] == expected
    assert shown["severities"] == [value for each in whole["severities"] for value in figures_of(each["accuracy"])]
    assert shown["slices"] == [
        value for shares in whole["slices"].values() for share in shares.values() for value in figures_of(share)
    ]
    clean = {each["target"]: each["accuracy"] for each in evaluated["slices"]["corruption=none"]}
    for each in whole["targets"]:
        assert each["accuracy"]["n"] == 12
        assert each["accuracy"]["value"] == pytest.approx(clean[each["target"]]["value"], rel=1e-5)
    blurred = {(each["target"], each["severity"]): each["accuracy"] for each in whole["severities"]}
    for each in evaluated["slices"]["corruption=blur-5"]:
        assert blurred[each["target"], 5]["value"] == pytest.approx(each["accuracy"]["value"], rel=1e-5)
    assert whole["verdict"]["text"] == evaluated["decisions"][0]["text"]


def test_every_figure_of_the_page_stands_beside_its_n(evaluated: Evaluated) -> None:
    made = report_of_run(evaluated.file, Terms())
    page = page_of(made)
    assert page.count("<svg") == 4  # the balance, accuracy, time and one corruption: nothing here costs anything
    for each in made.object["targets"]:
        assert f"n = {each['accuracy']['n']}" in page
    for svg in page.split("<svg")[1:]:
        assert "n = 12" in svg[: svg.index(">")]


def test_it_tells_versions_hashes_formulas_and_what_the_reviews_say(evaluated: Evaluated) -> None:
    whole = report_of_run(evaluated.file, Terms()).object
    for target in (INT8, FP32):
        (versions,) = whole["method"]["versions"][target]
        assert {"model", "recipe", "preprocessing", "prompt", "nearfar", "genai-prices", "runs_on"} <= set(versions)
    hashes = whole["method"]["hashes"]
    assert hashes["run file, sha256"] == read_run(evaluated.file).sha256
    assert len(hashes["inputs, sha256"]) == 64
    assert {"accuracy", "median_interval", "at_all_times"} <= set(whole["method"]["formulas"])
    claims = {each["claim"]: each for each in whole["claims"]}
    assert len(claims) == 5
    probes = claims["40 % fewer hallucinations"]
    asked = [row for row in read_run(evaluated.file).rows if not row.is_corrupted]
    absent = sum(any(name.split("=")[1].startswith(("absent", "unanswer")) for name in row.slices) for row in asked)
    assert f"n = {absent}" in probes["result"]
    assert all(each["status"] in ("untested", "in part") and each["needs"] for each in whole["claims"])


def test_a_run_that_is_not_finished_is_reported_on_as_far_as_it_came(evaluated: Evaluated, tmp_path: Path) -> None:
    cut = tmp_path / "cut.jsonl"
    content = evaluated.file.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    before = cut.read_bytes()
    whole = report_of_run(cut, Terms(rows=3)).object
    assert 0 < whole["source"]["inputs"] < 12
    assert whole["source"]["left_out"]["rows that were not asked yet"] > 0
    assert len(whole["rows"]["shown"]) == 3
    assert cut.read_bytes() == before


def test_without_matplotlib_there_are_figures_and_a_line_that_says_what_to_install(
    evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    made = report_of_run(evaluated.file, Terms())
    with pytest.raises(Unavailable, match=r"nearfar\[report\]"):
        page_of(made)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ((), 2, ("--out", "--json")),
        (("--json",), 1, ("no comparison to report on",)),
        (("--json", "--run", "RUN", "--wrong"), 2, ("--run",)),
        (("--json", "--run", "RUN", "--rows", "0"), 2, ("rows",)),
        (("--json", "--run", "RUN", "--targets", "one,two"), 2, ("no target",)),
        (("--json", "--run", "RUN", "--weights", "quality=-1"), 2, ("quality",)),
        (("--json", "--run", "nowhere.jsonl"), 1, ("nowhere.jsonl",)),
        (("--json", "--run", "EMPTY"), 1, ("no answers",)),
        (("--json", "--run", "OTHER"), 1, ("no file of an evaluation",)),
        (("--run", "RUN", "--out", "/nowhere/report.html"), 1, ("/nowhere/report.html",)),
        (("--run", "RUN", "--out", "/"), 1, ("nearfar: /: ",)),
    ],
)  # fmt: skip
def test_what_cannot_be_reported_on_is_told_in_a_line(
    evaluated: Evaluated, tmp_path: Path, arguments: tuple[str, ...], status: int, words: tuple[str, ...]
) -> None:
    empty, other = tmp_path / "empty.jsonl", tmp_path / "other.jsonl"
    empty.write_bytes(evaluated.file.read_bytes().splitlines(keepends=True)[0])
    other.write_text('{"image": "a.png"}\n')
    files = {"RUN": evaluated.file, "EMPTY": empty, "OTHER": other}
    given = [str(files.get(each, each)) for each in arguments]
    run = CliRunner().invoke(app, ["report", *given], env={"NEARFAR_DATA_DIR": str(tmp_path / "data")})
    assert run.exit_code == status
    assert run.stdout == ""
    assert run.stderr.startswith("nearfar: ")
    assert len(run.stderr.splitlines()) == 1
    assert all(word in run.stderr for word in words)


def test_a_ledger_that_cannot_be_read_is_told_by_its_own_name(evaluated: Evaluated, tmp_path: Path) -> None:
    segment = tmp_path / "data" / FOLDER / "0000000000000001.jsonl"
    segment.mkdir(parents=True)
    command = ["report", "--run", str(evaluated.file), "--out", str(tmp_path / "report.html")]
    run = CliRunner().invoke(app, command, env={"NEARFAR_DATA_DIR": str(tmp_path / "data")})
    assert run.exit_code == 1
    assert str(segment) in run.stderr
    assert "report.html" not in run.stderr


def test_a_figure_that_cannot_be_made_does_not_keep_the_next_from_being_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Bar(label="one", told="0.5, n = 4", value=0.5)
    with monkeypatch.context() as broken:
        broken.setattr("matplotlib.figure.Figure.add_subplot", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            intervals([row], scale="share", label="share", title="one")
    assert not plots._DRAWING.locked()
    assert intervals([row], scale="share", label="share", title="one").startswith("<svg")


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx2.Client, Path]]:
    """Two keys: one has seven comparisons, one of an input twice and a blind one; the other has none."""
    folder = tmp_path_factory.mktemp("keyed")
    with running(data_dir=folder, api_keys=("first-key", "second-key")) as service:
        client = service.ready().client
        for size in (100, 101, 102, 103, 104, 105, 100):
            ask(client, picture(size, size), reference="red")
        ask(client, picture(90, 90), blind="true")
        yield client, folder


def ask(client: httpx2.Client, image: bytes, **fields: str) -> None:
    data = {"prompt": "What color is the circle?", **fields}
    answer = client.post("/compare", files={"image": image}, data=data, headers={"x-api-key": "first-key"})
    assert answer.status_code == 200, answer.text


def get(client: httpx2.Client, key: str = "first-key", **query: Any) -> httpx2.Response:
    return client.get("/report", params=query, headers={"x-api-key": key})


def test_a_key_gets_its_own_comparisons_once_each_and_nothing_that_is_to_be_voted_on(
    keyed: tuple[httpx2.Client, Path],
) -> None:
    client, _ = keyed
    whole = get(client, format="json").json()
    assert whole["source"]["inputs"] == 6
    assert whole["source"]["left_out"] == {
        "records that asked an input again": 1,
        "blind comparisons that nobody has voted on": 1,
    }
    assert [each["accuracy"]["n"] for each in whole["targets"]] == [6, 6]
    verdict = client.get("/verdict", headers={"x-api-key": "first-key"}).json()
    assert (whole["verdict"]["text"], whole["verdict"]["n"]) == (verdict["text"], 6)
    other = get(client, key="second-key")
    assert (other.status_code, other.json()["error"]["type"]) == (404, "not_found")
    assert client.get("/report").status_code == 401


def test_over_http_it_is_a_page_that_may_load_nothing(keyed: tuple[httpx2.Client, Path]) -> None:
    client, _ = keyed
    answer = get(client)
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "script" not in answer.headers["content-security-policy"]
    assert answer.text.count("data:image/webp") == 6
    assert len(answer.content) < 300_000


@pytest.mark.parametrize("query", [{"rows": 0}, {"format": "pdf"}, {"volume": 0}, {"weights": "speed=nan"}, {"no": 1}])
def test_a_wrong_query_is_told(keyed: tuple[httpx2.Client, Path], query: dict[str, Any]) -> None:
    answer = get(keyed[0], **query)
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["message"]


def test_the_command_reports_on_the_same_records(keyed: tuple[httpx2.Client, Path], tmp_path: Path) -> None:
    _, folder = keyed
    page = tmp_path / "report.html"
    command = ["report", "--out", str(page), "--since", "2020-01-01", "--json"]
    made = CliRunner().invoke(app, command, env={"NEARFAR_DATA_DIR": str(folder)})
    assert made.exit_code == 0, made.stderr
    assert json.loads(made.stdout)["source"]["inputs"] == 6
    assert page.read_text().startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
