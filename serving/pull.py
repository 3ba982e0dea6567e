"""Fetching a model from the hub into the data folder.

A folder under `<data_dir>/models` is a model once it has a manifest. What is still being fetched lies in
`<data_dir>/pulling`, where a later attempt goes on with it, and moves by one rename when it is whole and checked.
A fetch sends names of models and files, never an input, so the policy on inputs does not concern it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from models.adopt import adopt
from models.bundle import MANIFEST, Bundle, Source, sha256_of
from models.catalog import (
    DEFAULT_RECIPE,
    EXPORTED_BYTES_PER_WEIGHT,
    OTHER_RECIPES,
    PUBLISHED,
    Row,
    find,
)
from models.errors import BadRequest, BundleError, NotFound, Unavailable
from models.loaded_model import LoadedModel
from models.quality import safer_recipes
from serving.local_models import local_bundles
from serving.settings import Settings
from serving.verify import failure

CONFIGURATION = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json",
    "chat_template.jinja",
)  # fmt: skip
PICKLE = b"\x80"  # its first byte; safetensors begin with a length, ONNX with a field tag of 8
Report = Callable[[int, int], None]  # bytes that are there, bytes in all


def cached_dataset(hub_id: str) -> Path:
    """The folder of a data set in the hub's own cache on this machine. Nothing is fetched. Raises NotFound."""
    hub = _hub()
    try:
        return Path(hub.snapshot_download(hub_id, repo_type="dataset", local_files_only=True))
    except (hub.errors.LocalEntryNotFoundError, hub.errors.HFValidationError) as error:
        raise NotFound(
            f"the data set {hub_id} is not in the hub's cache on this machine, and nothing is fetched here: "
            f"hf download {hub_id} --repo-type dataset"
        ) from error


class Rejected(NamedTuple):
    """Why a fetched model was removed again, and the recipe to take instead."""

    reason: str
    safer: str


class RemoteFile(NamedTuple):
    """A file as the hub lists it. `digest` is a sha256 for large files, git's sha1 of the blob for small ones."""

    name: str
    bytes: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a fetch takes and where it goes. `recipe` None: the checkpoint, for an export to read."""

    row: Row
    recipe: str | None
    revision: str  # the commit
    files: tuple[RemoteFile, ...]
    folder: Path
    staging: Path

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def name(self) -> str:
        return f"{self.row.name}@{self.recipe}" if self.recipe else f"the checkpoint of {self.row.name}"

    @property
    def missing_bytes(self) -> int:
        return max(0, self.bytes - _bytes_in(self.staging))


def wanted(name: str, recipe: str | None) -> tuple[Row, str]:
    """The row and recipe behind `model`, `model@recipe` or an alias. Raises NotFound; BadRequest for the recipe."""
    named = find(name)
    chosen = recipe or named.recipe or DEFAULT_RECIPE
    known = (*EXPORTED_BYTES_PER_WEIGHT, *OTHER_RECIPES)
    if chosen not in known:
        raise BadRequest(f"there is no recipe {chosen!r}; there are {', '.join(sorted(known))}", param="recipe")
    if named.row.hub_id is None:
        raise BadRequest(f"{named.row.name} is embedded, there is nothing to fetch", param="model")
    return named.row, chosen


def plan_pull(name: str, data_dir: Path, *, recipe: str | None, revision: str | None, checkpoint: bool = False) -> Plan:
    """Ask the hub what a model consists of: its published ONNX files where the recipe has such, else its checkpoint.

    Raises NotFound, BadRequest, Unavailable where the hub cannot be reached, BundleError for a listing that is unsafe.
    """
    row, chosen = wanted(name, recipe)
    assert row.hub_id is not None
    hub = _hub()
    with _hub_errors(row.hub_id, revision):
        info = hub.HfApi().model_info(
            row.hub_id, revision=revision or row.revision, files_metadata=True, timeout=30, token=_token()
        )
        listed = [_remote_file(sibling) for sibling in info.siblings]
        commit = str(info.sha)
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise BundleError(f"the hub names no commit for {row.hub_id}")
    names = {file.name for file in listed}
    graphs = [f"onnx/{graph}{choice.suffix}.onnx" for graph, choice in PUBLISHED.get(chosen, {}).items()]
    onnx = bool(graphs) and names.issuperset(graphs) and not checkpoint
    files = [file for file in listed if file.name in CONFIGURATION or _is_weights(file.name, graphs if onnx else None)]
    if not onnx and not any(file.name.endswith(".safetensors") for file in files):
        raise BundleError(f"{row.hub_id} has neither ONNX files for {chosen} nor safetensors; pickles are never opened")
    target = f"{row.name}@{chosen}" if onnx else f"{row.name}@{commit}"
    return Plan(
        row=row,
        recipe=chosen if onnx else None,
        revision=commit,
        files=tuple(files),
        folder=data_dir / ("models" if onnx else "checkpoints") / target,
        staging=data_dir / "pulling" / f"{row.name}@{chosen if onnx else 'checkpoint'}@{commit}",
    )


def fetch(plan: Plan, report: Report) -> Path:
    """Carry out a plan: fetch what is missing, check every hash, write the manifest, put the folder in its place.

    Another process that fetches the same is waited for. Raises Unavailable for the network and the disk, BundleError
    for files that are not what the hub says or no model.
    """
    with _hub_errors(str(plan.row.hub_id), plan.revision):
        plan.staging.parent.mkdir(parents=True, exist_ok=True)
        with (plan.staging.parent / f"{plan.folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets it go when the process ends, however it ends
            if not is_there(plan):
                _fetch_all(plan, report)
    return plan.folder


def _fetch_all(plan: Plan, report: Report) -> None:
    for other in plan.staging.parent.glob(f"{plan.staging.name.rpartition('@')[0]}@*"):
        if other.is_dir() and other != plan.staging:
            shutil.rmtree(other)  # of another commit
    _check_disk(plan)
    with _reporting(plan, report):
        for file in plan.files:
            _fetch_file(plan, file)
    shutil.rmtree(plan.staging / ".cache", ignore_errors=True)  # the library's notes on what is incomplete
    _finish(plan)


def is_there(plan: Plan) -> bool:
    """Is this very commit in its place already?"""
    if plan.recipe is None:
        return plan.folder.is_dir()
    with suppress(BundleError):
        return Bundle.read(plan.folder).manifest.source.revision == plan.revision
    return False


def _finish(plan: Plan) -> None:
    """A manifest for what was fetched, then one rename. What is no model after all is not kept."""
    if plan.recipe:
        suffixes = {graph: choice.suffix for graph, choice in PUBLISHED[plan.recipe].items()}
        source = Source(name=str(plan.row.hub_id), sha256="", license=plan.row.license, revision=plan.revision)
        try:
            adopt(plan.staging, suffixes=suffixes, name=plan.row.name, recipe=plan.recipe, source=source)
            LoadedModel.load(plan.staging)
        except BundleError as error:
            shutil.rmtree(plan.staging)
            raise BundleError(f"what {plan.row.hub_id} holds does not run: {error.message}") from error
    plan.folder.parent.mkdir(parents=True, exist_ok=True)
    if plan.folder.exists():
        old = plan.staging.with_name(f"{plan.folder.name}.old")
        plan.folder.rename(old)
        plan.staging.rename(plan.folder)
        shutil.rmtree(old)
    else:
        plan.staging.rename(plan.folder)


def reject(folder: Path, settings: Settings) -> Rejected | None:
    """Check a model that was just fetched or exported, in about 20 seconds; one that fails is removed.

    Raises BundleError where it fails and no recipe is safer.
    """
    bundle = Bundle.read(folder)
    reason = failure(folder, local_bundles(settings))
    if reason is None:
        return None
    shutil.rmtree(folder)
    safer = next((recipe for recipe in safer_recipes(bundle.manifest.recipe) if recipe in PUBLISHED), None)
    if safer is None:
        raise BundleError(f"{reason}; it was removed, and no recipe is safer")
    return Rejected(f"{reason}; it was removed, and {safer} is taken instead", safer)


def record_source(folder: Path, plan: Plan) -> None:
    """Write into an exported bundle's manifest which repository and commit its checkpoint came from."""
    manifest = Bundle.read(folder).manifest
    source = manifest.source.model_copy(update={"name": plan.row.hub_id, "revision": plan.revision})
    text = manifest.model_copy(update={"source": source}).model_dump_json(indent=2)
    beside = folder.with_name(f"{folder.name}.manifest")
    beside.write_text(text + "\n")
    beside.replace(folder / MANIFEST)


def _fetch_file(plan: Plan, file: RemoteFile) -> None:
    """One file, checked. What was there and is not right (a cut attempt may have edited it) is fetched anew."""
    path = _download(plan, file, anew=False)
    if _digest(path, file.digest) != file.digest:
        path = _download(plan, file, anew=True)
    if _digest(path, file.digest) != file.digest:
        path.unlink()
        raise BundleError(f"{file.name} of {plan.row.hub_id} does not match its hash at the hub; it was removed")
    with path.open("rb") as opened:
        if file.name not in CONFIGURATION and opened.read(1) == PICKLE:
            shutil.rmtree(plan.staging)
            raise BundleError(f"{file.name} of {plan.row.hub_id} is a pickle, which is never opened")


def _download(plan: Plan, file: RemoteFile, *, anew: bool) -> Path:
    """The file's place. A connection that was cut is taken up again as long as each attempt brings something."""
    options: dict[str, Any] = {"revision": plan.revision, "local_dir": plan.staging, "token": _token()}
    while True:
        before = _bytes_in(plan.staging)
        try:
            return Path(_hub().hf_hub_download(plan.row.hub_id, file.name, force_download=anew, **options))
        except OSError as error:
            if error.errno or _bytes_in(plan.staging) <= before:
                raise


def _digest(path: Path, expected: str) -> str:
    if len(expected) == 64:
        return sha256_of(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _remote_file(sibling: Any) -> RemoteFile:
    name = str(sibling.rfilename)
    if name.startswith("/") or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise BundleError(f"the hub lists a file that would leave the model's folder: {name[:100]!r}")
    digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    return RemoteFile(name, int(sibling.size), str(digest))


def _is_weights(name: str, graphs: list[str] | None) -> bool:
    """One of these graphs or its external data; without graphs, the checkpoint's safetensors and their index."""
    if graphs is None:
        return "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))
    return any(name == graph or re.fullmatch(re.escape(graph) + r"[._]data(_\d+)?", name) for graph in graphs)


def _check_disk(plan: Plan) -> None:
    # A graph that is edited when it is adopted is written beside itself once.
    needed = plan.missing_bytes + max(file.bytes for file in plan.files)
    free = shutil.disk_usage(plan.staging.parent).free
    if needed > free:
        raise Unavailable(
            f"{plan.name} needs {needed / 1e9:.1f} GB in {plan.staging.parent}, where {free / 1e9:.1f} GB are free"
        )


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # renamed meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total


@contextmanager
def _reporting(plan: Plan, report: Report) -> Iterator[None]:
    """Tell how much is there while the block runs, by looking: that holds for resumed transfers too."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.2):
            report(min(_bytes_in(plan.staging), plan.bytes), plan.bytes)

    watcher = threading.Thread(target=look, name="nearfar-pull", daemon=True)
    watcher.start()
    try:
        yield
        report(plan.bytes, plan.bytes)
    finally:
        over.set()
        watcher.join()


def _hub() -> Any:
    """huggingface_hub, imported when something is fetched: it reads these settings then, and HF_ENDPOINT with them."""
    # Without Xet a large file is one HTTP transfer, which goes on where it was cut.
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_XET"):
        os.environ.setdefault(name, "1")
    import huggingface_hub.constants
    import huggingface_hub.errors

    return huggingface_hub


def _token() -> str | bool:
    return os.environ.get("HF_TOKEN") or False  # False: no token, not even one that lies in the user's files


@contextmanager
def _hub_errors(hub_id: str, revision: str | None) -> Iterator[None]:
    errors = _hub().errors
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise NotFound(f"{hub_id} has no revision {revision!r}", param="revision") from error
    except errors.RepositoryNotFoundError as error:
        raise NotFound(f"the hub has no {hub_id}, or does not show it without a token (HF_TOKEN)") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        raise Unavailable(f"the hub answered {status} for {hub_id}; what was fetched is kept") from error
    except OSError as error:  # the library's network errors are all of this kind
        if error.errno and not isinstance(error, ConnectionError | TimeoutError):  # of this machine's disk
            raise Unavailable(f"{error.filename or 'the data folder'}: {error.strerror}") from error
        where = _hub().constants.ENDPOINT
        if _hub().constants.HF_HUB_OFFLINE:
            raise Unavailable(f"HF_HUB_OFFLINE is set, so {hub_id} cannot be fetched") from error
        why = type(error).__name__
        raise Unavailable(f"the hub cannot be reached at {where} ({why}); what was fetched is kept") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Unavailable(f"the hub's answer for {hub_id} is no listing of a model's files") from error
