"""Models by name: the catalog, the aliases, and what lies in the data folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import httpx2
import pytest

from models.catalog import ALIASES, NOT_VERIFIED, ROWS
from models.errors import NotFound
from models.memory import LEAST_CONTEXT, need_of, total_bytes
from models.tiny_scenes import BUNDLES
from serving.local_models import default_models, local_bundles, model_folder
from serving.settings import Settings
from tests.serving.conftest import running
from tests.serving.test_cli import PICTURE, nearfar

QUESTION = "What color is the circle?"


def install(data_dir: Path, name: str, recipe: str = "int8") -> Path:
    """The embedded bundle under another name, as if it had been fetched."""
    folder = data_dir / "models" / f"{name}@{recipe}"
    shutil.copytree(BUNDLES["tiny-scenes@int8"], folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "name": name, "recipe": recipe}))
    return folder


def test_the_catalog_is_listed_with_what_is_claimed_measured_and_not_verified(client: httpx2.Client) -> None:
    rows = {row["name"]: row for row in client.get("/models").json()["catalog"]}
    assert set(rows) == {*ROWS, *ALIASES}
    row = rows["smolvlm2-500m"]
    assert (row["parameters"], row["verified"], row["verification"]) == (507_482_304, None, NOT_VERIFIED)
    assert row["recipes"]["int4"]["published_files"]["decoder_model_merged"]["suffix"] == "_q4"
    assert {"measure": "MLVU", "figure": 47.3, "source": f"model card of {row['source']}"} in row["claims"]
    assert row["revision"] is None
    assert [each["recipe"] for each in rows["tiny-scenes"]["installed"]] == ["int8", "fp32"]
    assert "smolvlm2-500m@int4" in rows["smolvlm2-turbo"]["notice"]


def test_the_command_lists_the_same_catalog(client: httpx2.Client) -> None:
    assert json.loads(nearfar("models", "--json").stdout)["catalog"] == client.get("/models").json()["catalog"]
    shown = nearfar("models", COLUMNS="200").stdout
    for name in (*ROWS, *ALIASES):
        assert f"\n{name}\n" in shown
    assert NOT_VERIFIED in shown


def test_a_fine_tuned_model_is_asked_as_model_plus_adapter_and_is_never_the_default(
    tmp_path: Path, red_circle_url: str
) -> None:
    names = ["smolvlm2-256m", "smolvlm2-256m+inspection"]
    for name in names:
        install(tmp_path, name)
    assert [each.target for each in default_models(Settings(data_dir=tmp_path)).bundles[:2]] == [
        f"local/{name}@int8" for name in names
    ]
    with running(data_dir=tmp_path, models=(*names,)) as service:
        ask = service.ready().client.post
        answers = [
            ask("/infer", json={"prompt": QUESTION, "images": [red_circle_url], "model": name}).json()
            for name in (*names, f"local/{names[1]}@int8")
        ]
        form = {"prompt": (None, QUESTION), "model": (None, names[1]), "image": ("a.png", Path(PICTURE).read_bytes())}
        answers.append(ask("/infer", files=form).json())
    assert [answer["target"] for answer in answers] == [f"local/{names[at]}@int8" for at in (0, 1, 1, 1)]
    assert {answer["text"] for answer in answers} == {"red"}


def test_an_alias_answers_and_says_what_it_stands_for(tmp_path: Path, red_circle_url: str) -> None:
    install(tmp_path, "smolvlm2-500m", "int4")
    body = {"prompt": QUESTION, "images": [red_circle_url], "model": "smolvlm2-turbo"}
    with running(data_dir=tmp_path, models=("smolvlm2-turbo",)) as service:
        answer = service.ready().client.post("/infer", json=body).json()
        with_recipe = service.client.post("/infer", json={**body, "model": "local/smolvlm2-turbo@int4"}).json()
        absent = service.client.post("/infer", json={**body, "model": "smolvlm-3b"})
    assert (answer["text"], answer["target"]) == ("red", "local/smolvlm2-500m@int4")
    assert answer["notice"].startswith("No published checkpoint is called SmolVLM2 Turbo")
    assert (with_recipe["target"], with_recipe["notice"]) == (answer["target"], answer["notice"])
    assert absent.status_code == 404
    assert "nearfar pull smolvlm2-2.2b" in absent.json()["error"]["message"]


def test_smolvlm_3b_is_the_bundle_that_the_user_sets(tmp_path: Path, red_circle_url: str) -> None:
    own = install(tmp_path / "elsewhere", "mine-3b")
    body = {"prompt": QUESTION, "images": [red_circle_url], "model": "smolvlm-3b"}
    with running(data_dir=tmp_path, models=("smolvlm-3b",), smolvlm_3b=own) as service:
        answer = service.ready().client.post("/infer", json=body).json()
    assert answer["target"] == "local/mine-3b@int8"
    assert "smolvlm-3b stands for local/mine-3b@int8" in answer["notice"]


def test_a_model_of_the_data_folder_is_named_like_an_embedded_one(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    folder = install(tmp_path, "mine")
    assert model_folder("mine", settings) == model_folder("local/mine@int8", settings) == folder
    assert local_bundles(settings)[0].target == "local/mine@int8"
    with pytest.raises(NotFound, match="nearfar pull smolvlm2-256m@fp32"):
        model_folder("smolvlm2-256m@fp32", settings)
    with pytest.raises(NotFound, match="did you mean"):
        model_folder("smolvlm2-257m", settings)


def test_the_most_capable_model_that_fits_is_the_default_and_the_first_line_of_the_log_says_so(tmp_path: Path) -> None:
    assert "toy" in default_models(Settings(data_dir=tmp_path)).text
    small, large = install(tmp_path, "small"), install(tmp_path, "large")
    manifest = json.loads((large / "manifest.json").read_text())
    manifest["shapes"]["parameters"] *= 100
    (large / "manifest.json").write_text(json.dumps(manifest))
    roomy = default_models(Settings(data_dir=tmp_path))
    assert [bundle.folder for bundle in roomy.bundles] == [large, small, *BUNDLES.values()]
    one = total_bytes([need_of(bundle) for bundle in roomy.bundles if bundle.folder != small], 1, LEAST_CONTEXT)
    tight = Settings(data_dir=tmp_path, memory_budget=one)
    choice = default_models(tight)
    assert [bundle.folder for bundle in choice.bundles] == [large, *BUNDLES.values(), small]
    assert choice.text.startswith("default model: local/large@int8, the most capable")
    assert "loaded when asked for, in its place: local/small@int8" in choice.text
    assert default_models(Settings(data_dir=tmp_path, memory_budget=1)).bundles[0].folder in BUNDLES.values()
    with running(data_dir=tmp_path, memory_budget=one) as service:  # what was chosen loads within the same budget
        states = {row["name"]: row["state"] for row in service.ready().client.get("/models").json()["models"]}
    assert states == {"large": "loaded", "tiny-scenes": "loaded", "small": "unloaded"}


def test_infer_without_a_name_asks_the_default_alone(tmp_path: Path) -> None:
    install(tmp_path, "mine")
    run = nearfar("infer", PICTURE, QUESTION, "--json", NEARFAR_DATA_DIR=str(tmp_path))
    assert json.loads(run.stdout)["target"] == "local/mine@int8"


def test_an_own_model_of_an_embedded_name_takes_its_place(tmp_path: Path) -> None:
    own = install(tmp_path, "tiny-scenes")
    bundles = local_bundles(Settings(data_dir=tmp_path))
    assert [bundle.folder for bundle in bundles] == [own, BUNDLES["tiny-scenes@fp32"]]
