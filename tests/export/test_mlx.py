"""The embedded checkpoint as MLX folders, read by mlx-vlm itself: its answers beside ours, its source, what is refused.

Those marked `mlx` run in an environment of their own (`make check-mlx`), the others everywhere.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.bundle import Bundle, sha256_of
from models.quality import QualityGateFailed
from models.tiny_scenes import BUNDLES, SAMPLES

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "models" / "tiny_scenes" / "checkpoint"
QUESTIONS: list[dict[str, str]] = json.loads((SAMPLES / "samples.json").read_text())
MIN_EQUAL_SAMPLES = {"int8": 6, "int4": 5}  # of the 6 bundled samples, with our fp32 bundle; seen: 6 and 6
on_mlx = pytest.mark.mlx
pytestmark = [
    pytest.mark.timeout(1500),  # MLX has no fast kernels for processors
    pytest.mark.filterwarnings("default"),  # what mlx-vlm and transformers warn of is theirs
]


def nearfar(*words: str | Path, prefix: str = "pass") -> subprocess.CompletedProcess[str]:
    code = f"{prefix}; import sys; from serving.cli import app; app(sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1400)


def assert_fails(run: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    """One line of ours is the last, and no traceback is above it, whatever mlx-vlm tells of its progress."""
    assert run.returncode == status, run.stderr
    assert "Traceback" not in run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("nearfar: ")
    for word in words:
        assert word in last


class Folders(dict[str, Path]):
    """MLX folders of the embedded checkpoint by recipe, each made when first asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, recipe: str) -> Path:
        out = self._folder / recipe
        words = ("--format", "mlx", "--recipe", recipe, "--name", "tiny-scenes", "--out", out, "--json")
        run = nearfar("export", CHECKPOINT, *words)
        assert run.returncode == 0, run.stderr
        assert json.loads(run.stdout) == json.loads((out / "nearfar.json").read_text())
        self[recipe] = out
        return out


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("mlx"))


def told(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "nearfar.json").read_text())
    return manifest


@functools.cache
def ours(recipe: str) -> list[str]:
    """What `nearfar infer` says to the bundled samples, cut into tiles as mlx-vlm cuts them."""
    answers = []
    for sample in QUESTIONS:
        target = f"tiny-scenes@{recipe}"
        run = nearfar("infer", SAMPLES / sample["file"], sample["question"], "--model", target, "--detail", "high")
        assert run.returncode == 0, run.stderr
        answers.append(run.stdout.strip())
    return answers


def theirs(folder: Path) -> list[str]:
    """What mlx-vlm says to them, loading the folder as its users do."""
    from mlx_vlm import generate, load
    from mlx_vlm.prompt_utils import apply_chat_template

    model, processor = load(str(folder), trust_remote_code=False)
    answers = []
    for sample in QUESTIONS:
        prompt = apply_chat_template(processor, model.config, sample["question"], num_images=1)
        found = generate(
            model, processor, prompt, image=[str(SAMPLES / sample["file"])], max_tokens=32, temperature=0.0
        )
        answers.append(found.text.strip())
    return answers


@on_mlx
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_mlx_vlm_answers_the_samples_as_we_do(folders: Folders, recipe: str) -> None:
    answers = theirs(folders[recipe])
    equal = {known: sum(map(str.__eq__, answers, ours(known))) for known in ("fp32", "int8")}
    print(f"MLX {recipe}: of {len(answers)} samples answered as by our bundle: {equal}")
    assert min(equal.values()) >= MIN_EQUAL_SAMPLES[recipe], answers


@on_mlx
@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "bits", "group_size", "most_bytes"), [("int8", 8, 64, 9.7e6), ("int4", 4, 32, 8.9e6)]
)
def test_the_folder_says_what_it_is_and_names_the_source_of_the_bundle(
    folders: Folders, recipe: str, bits: int, group_size: int, most_bytes: float
) -> None:
    folder, manifest = folders[recipe], told(folders[recipe])
    bundle = Bundle.read(BUNDLES["tiny-scenes@fp32"]).manifest
    assert manifest["source"]["sha256"] == bundle.source.sha256 == sha256_of(CHECKPOINT / "model.safetensors")
    assert bundle.source.sha256 in (folder / "README.md").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (bits, group_size)
    assert (manifest["bits"], manifest["group_size"]) == (bits, group_size)
    on_disk = {path.name: path for path in folder.iterdir()}
    assert set(on_disk) == {*manifest["files"], "nearfar.json"}
    for name, entry in manifest["files"].items():
        assert (on_disk[name].stat().st_size, sha256_of(on_disk[name])) == (entry["bytes"], entry["sha256"])
    assert on_disk["model.safetensors"].stat().st_size < most_bytes


@on_mlx
@pytest.mark.slow
def test_the_8_bit_folder_passes_the_gate_against_our_fp32_bundle(folders: Folders) -> None:
    quality = told(folders["int8"])["quality"]
    assert "local/tiny-scenes@fp32" in quality["mean_kl_is"]
    assert quality["kl_meaningful"]
    assert quality["mean_kl"] < 1e-3
    assert quality["vision_cosine_mean"] > 0.9999
    assert quality["equal_answers"] > 0.9


@on_mlx
@pytest.mark.slow
def test_weights_of_too_few_bits_fail_the_gate_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export import mlx

    monkeypatch.setitem(mlx.BITS, "int8", 2)
    with pytest.raises(QualityGateFailed, match="mean_kl"):
        mlx.export_mlx(CHECKPOINT, recipe="int8", out=tmp_path / "out", show_progress=False)
    assert list(tmp_path.iterdir()) == []


@on_mlx
@pytest.mark.slow
def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000,) * 2)"
    run = nearfar("export", CHECKPOINT, "--format", "mlx", "--out", tmp_path / "out", prefix=limit)
    assert_fails(run, 1, f"{tmp_path / 'out'} cannot be written", "disk full")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(CHECKPOINT, tmp_path / "copy")


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.text_model.norm.weight"]
    save_file(weights, folder / "model.safetensors")


def without_a_module_in_shards(folder: Path) -> None:
    """What an index of shards does not name, mlx-vlm does without: a whole connector, say."""
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if ".connector." not in name}
    save_file(kept, folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(kept, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def of_another_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.text_model.norm.weight"] = np.ones(96, np.float32)
    save_file(weights, folder / "model.safetensors")


def configured(text: dict[str, Any], **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["text_config"] |= text
        path.write_text(json.dumps(config | changes))

    return change


@on_mlx
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_a_weight, ["language_model.norm.weight"]),
        (without_a_module_in_shards, ["connector"]),
        (of_another_shape, ["norm.weight"]),
        (configured({}, model_type="qwen2_vl"), ["qwen2_vl", "smolvlm or idefics3"]),
        (configured({"model_type": "smollm3"}), ["llama"]),
        (configured({"intermediate_size": 500}), ["groups of 64 or 32", "500"]),
        (configured({}, auto_map={"AutoModel": "modeling.Evil"}), ["remote code"]),
    ],
)
def test_what_mlx_cannot_take_is_one_line_and_leaves_nothing(
    copy: Path, damage: Callable[[Path], None], words: list[str]
) -> None:
    damage(copy)
    assert_fails(nearfar("export", copy, "--format", "mlx", "--out", copy.parent / "out"), 1, *words)
    assert list(copy.parent.iterdir()) == [copy]


@on_mlx
def test_wrong_words_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    assert_fails(nearfar("export", CHECKPOINT, "--format", "mlx", "--recipe", "fp16", *out), 2, "int8 or int4")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("precious")
    run = nearfar("export", CHECKPOINT, "--format", "mlx", "--out", tmp_path / "thesis")
    assert_fails(run, 2, "nearfar.json")
    assert (tmp_path / "thesis" / "thesis.txt").read_text() == "precious"


@on_mlx
def test_a_fetched_checkpoint_gives_its_name_without_the_commit(tmp_path: Path) -> None:
    run = nearfar("export", tmp_path / "smolvlm2-256m@c0ffee", "--format", "mlx", "--out", tmp_path / "out")
    assert_fails(run, 1, "is no checkpoint: config.json cannot be read")  # and no word about the name


@on_mlx
def test_a_reference_of_other_weights_is_refused(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    other = BUNDLES["tiny-scenes@int8"]
    run = nearfar("export", CHECKPOINT, "--format", "mlx", "--reference", other, *out)
    assert_fails(run, 2, "no fp32 bundle of the weights")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_and_what_is_for_bundles_are_refused_for_mlx(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    assert_fails(nearfar("export", CHECKPOINT, "--format", "mlx", "--adapter", tmp_path, *out), 2, "merge it")
    assert_fails(nearfar("export", CHECKPOINT, "--format", "mlx", "--notice", "a toy", *out), 2, "--notice")
    assert_fails(nearfar("export", CHECKPOINT, "--reference", tmp_path, *out), 2, "--format mlx")


@pytest.mark.skipif(importlib.util.find_spec("mlx_vlm") is not None, reason="mlx-vlm is installed here")
def test_without_mlx_vlm_one_line_says_what_to_install(tmp_path: Path) -> None:
    run = nearfar("export", CHECKPOINT, "--format", "mlx", "--out", tmp_path / "out")
    assert_fails(run, 1, "mlx is missing", "pip install 'mlx-vlm")
    assert list(tmp_path.iterdir()) == []
