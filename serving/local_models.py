"""The models on this machine: by name, and those that are served where none is named."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from models.bundle import MANIFEST, Bundle
from models.catalog import ALIASES, find, meaning
from models.errors import BundleError, NotFound
from models.memory import LEAST_CONTEXT, default_budget, need_of, total_bytes
from models.tiny_scenes import BUNDLES
from serving.settings import Settings

RECIPE_PREFERENCE = ("int8", "int8-fast", "int4", "fp16", "fp32")
SUGGESTED = "smolvlm2-500m"


def local_bundles(settings: Settings) -> list[Bundle]:
    """The models on this machine, the most capable first, the embedded ones last, as their manifests say: unchecked."""
    found = []
    for path in (settings.data_dir / "models").glob(f"*/{MANIFEST}"):
        with suppress(BundleError):  # not one of ours, or of another version: naming it says why
            found.append(Bundle.read(path.parent))
    by_target: dict[str, Bundle] = {}
    for bundle in (*sorted(found, key=_capability), *map(Bundle.read, BUNDLES.values())):
        by_target.setdefault(bundle.target, bundle)
    return list(by_target.values())


def _capability(bundle: Bundle) -> tuple[int, bool, int, str]:
    """A model stands before its fine-tuned ones, which know one task: they are asked by name."""
    recipe = bundle.manifest.recipe
    place = RECIPE_PREFERENCE.index(recipe) if recipe in RECIPE_PREFERENCE else len(RECIPE_PREFERENCE)
    return -bundle.manifest.shapes.parameters, "+" in bundle.manifest.name, place, bundle.target


class Choice(NamedTuple):
    """The models that are served where none is named, the default first, and one line that says why."""

    bundles: list[Bundle]
    text: str


def default_models(settings: Settings) -> Choice:
    """All of this machine's models that fit into the memory budget.

    As many as fit together, the most capable first, with the embedded ones; then those that are loaded in their place.
    """
    budget = settings.memory_budget or default_budget()
    every = local_bundles(settings)
    embedded = [bundle for bundle in every if bundle.folder in BUNDLES.values()]
    together: list[Bundle] = []
    instead: list[Bundle] = []
    too_large: list[Bundle] = []
    for bundle in every[: len(every) - len(embedded)]:
        if _fit([*together, bundle, *embedded], budget):
            together.append(bundle)
        else:
            (instead if _fit([bundle], budget) else too_large).append(bundle)
    chosen = [*together, *embedded, *instead]
    why = "the most capable model here that fits into memory"
    if chosen[0].folder in BUNDLES.values():
        why = f"a toy; nearfar pull {SUGGESTED} fetches a real one"
    text = f"default model: {chosen[0].target}, {why} ({_gigabytes(chosen[0])} of {budget / 1e9:.1f} GB)"
    for told, bundles in (("loaded when asked for, in its place", instead), ("left out", too_large)):
        if bundles:
            text += f"; {told}: {', '.join(f'{each.target} ({_gigabytes(each)})' for each in bundles)}"
    return Choice(chosen, text)


def _fit(bundles: Sequence[Bundle], budget: int) -> bool:
    return total_bytes(list(map(need_of, bundles)), 1, LEAST_CONTEXT) <= budget


def _gigabytes(bundle: Bundle) -> str:
    return f"{total_bytes([need_of(bundle)], 1, LEAST_CONTEXT) / 1e9:.1f} GB"


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
    wanted, _ = meaning(short, aliases(settings))
    for bundle in local_bundles(settings):
        if wanted in (bundle.manifest.name, bundle.target.removeprefix("local/")):
            return bundle.folder
    find(wanted)
    raise NotFound(f"{wanted} is not on this machine; fetch it with: nearfar pull {wanted}", param="model")


def model_folders(settings: Settings) -> list[Path]:
    """Bundle folders of the named models; without names, of all here that fit into memory. Raises NotFound."""
    named = [model_folder(name, settings) for name in settings.models]
    return named or [bundle.folder for bundle in default_models(settings).bundles]
