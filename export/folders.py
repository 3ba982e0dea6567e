"""A folder that takes its place whole or not at all, and what is written into every kind of it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from models.bundle import MANIFEST, Bundle, FileEntry, sha256_of
from models.errors import BadRequest, NearfarError

COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "processor_config.json", "generation_config.json",
)  # fmt: skip


def check_target(source: Path, out: Path, *, mark: str, overwrite: bool = False) -> None:
    """Raises BadRequest where `out` may not be replaced: it holds the source, or is full and has no file `mark`,
    by which an earlier export of the same kind is known. `overwrite`: any folder may.
    """
    if out == source or out in source.parents:
        raise BadRequest(f"{out} holds the source, which would be lost", param="out")
    if not out.exists():
        return
    if not out.is_dir():
        raise BadRequest(f"{out} is a file", param="out")
    if not overwrite and not (out / mark).is_file() and any(out.iterdir()):
        raise BadRequest(f"{out} exists and is no earlier export: it has no {mark}", param="out")


@contextmanager
def folder_beside(out: Path) -> Iterator[Path]:
    """A hidden folder on the same file system as `out`, gone afterwards unless it was moved.

    Raises NearfarError where the system refuses to write: a full disk, no permission.
    """
    folder = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        yield folder
    except OSError as error:
        raise NearfarError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def move_into_place(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`, whose former content goes; where that fails it is there as it was."""
    folder.chmod(0o755)  # mkdtemp makes it for this user alone
    if not out.exists():
        folder.rename(out)
        return
    with folder_beside(out) as aside:
        old = out.rename(aside / "old")
        try:
            folder.rename(out)
        except OSError:
            old.rename(out)
            raise


def share_files(folder: Path, files: Mapping[str, FileEntry], among: Path) -> None:
    """Make a file that a bundle in the folder `among` has too a second name of that one, where the system can.

    So the graphs that an adapter leaves as they are lie on disk once. A bundle's files are replaced, never written to.
    """
    for manifest in among.glob(f"*/{MANIFEST}"):
        with suppress(NearfarError, OSError):  # a folder that is no bundle, another file system
            known = Bundle.read(manifest.parent).manifest.files
            for name in (name for name, entry in files.items() if known.get(name) == entry):
                own, whole, link = folder / name, manifest.parent / name, folder / f"{name}.link"
                if not whole.samefile(own) and sha256_of(whole) == files[name].sha256:
                    link.hardlink_to(whole)
                    link.replace(own)


def hashes(folder: Path) -> dict[str, FileEntry]:
    """Of every file below, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder).as_posix()): FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in files
    }
