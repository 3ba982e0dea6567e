"""Models on this machine by name, and fetching one from the hub into the data folder.

A folder under `<data_dir>/models` is a model once it has a manifest. What is still being fetched lies elsewhere and
moves there by one rename.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from models.bundle import MANIFEST, Bundle
from models.catalog import ALIASES, find
from models.errors import BundleError, NotFound
from models.tiny_scenes import BUNDLES
from serving.settings import Settings

RECIPE_PREFERENCE = ("int8", "int8-fast", "int4", "fp16", "fp32")


def local_bundles(settings: Settings) -> list[Bundle]:
    """The models on this machine, the most capable first, the embedded ones last, as their manifests say: unchecked."""
    found = []
    for path in (settings.data_dir / "models").glob(f"*/{MANIFEST}"):
        with suppress(BundleError):  # not one of ours, or of another version: naming it says why
            found.append(Bundle.read(path.parent))
    return [*sorted(found, key=_capability), *map(Bundle.read, BUNDLES.values())]


def _capability(bundle: Bundle) -> tuple[int, int, str]:
    recipe = bundle.manifest.recipe
    place = RECIPE_PREFERENCE.index(recipe) if recipe in RECIPE_PREFERENCE else len(RECIPE_PREFERENCE)
    return -bundle.manifest.shapes.parameters, place, bundle.target


def aliases(settings: Settings) -> dict[str, tuple[str, str]]:
    """What each name without a checkpoint of its own stands for here: a model's or a target's name, and the notice."""
    known = {
        name: (f"{alias.model}@{alias.recipe}" if alias.recipe else alias.model, alias.notice)
        for name, alias in ALIASES.items()
    }
    if settings.smolvlm_3b:
        own = Bundle.read(settings.smolvlm_3b).target
        known["smolvlm-3b"] = own, f"No published checkpoint is called SmolVLM-3B: smolvlm-3b stands for {own} here."
    return known


def model_folder(name: str, settings: Settings) -> Path:
    """The folder behind a name, an alias or a path. Raises NotFound: no such name, or not on this machine yet."""
    short = name.removeprefix("local/")
    if "/" in short or Path(name).is_dir():
        return Path(name)
    if short == "smolvlm-3b" and settings.smolvlm_3b:
        return settings.smolvlm_3b
    wanted = aliases(settings)[short][0] if short in ALIASES else short
    for bundle in local_bundles(settings):
        if wanted in (bundle.manifest.name, bundle.target.removeprefix("local/")):
            return bundle.folder
    find(wanted)
    raise NotFound(f"{wanted} is not on this machine; fetch it with: nearfar pull {wanted}", param="model")
