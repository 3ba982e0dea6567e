"""`nearfar verify`: a model checked where it will run, against the float32 graphs of the same weights.

The two are loaded one after the other, never together. The quick form, for which `pull` asks, fits into a stated time
and does without a reference where there is none: what then can be told is whether the graphs give numbers and the text
is more than noise.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from models import quality
from models.bundle import MANIFEST, Bundle, sha256_of
from models.errors import BadRequest, BundleError, Unavailable
from models.execution import RUNTIME
from models.files import write_whole
from models.images import decode_image
from models.loaded_model import LoadedModel
from models.machine import machine
from models.request import question
from serving.engine.prepare import prepare

if TYPE_CHECKING:
    from rich.console import Console

QUICK_S = 20.0  # for all of a quick check, on whatever machine
REFERENCE_SHARE = 0.55  # of that time: float32 is the slower of the two
ANSWER_TOKENS, QUICK_ANSWER_TOKENS = 24, 12
TEXT_START, TEXT_STEP, TEXT_END = 32, 16, 224  # tokens of the text: the first prompt, each continuation, the last
# A tokenizer that takes more tokens than this has not been made for prose, and its model is not asked to continue any.
PROSE_CHARACTERS_PER_TOKEN = 2.5
SAME_TOKEN_SHARE, SAME_TOKEN_FROM = 0.8, 24
PIXEL_TOLERANCE = 1 / 255
# The reference implementation's way from an RGB picture and a question to ids and tiles [tile, 3, height, width].
Processor = Callable[[Image.Image, str], tuple[list[int], quality.Floats]]
PACKAGES = ("nearfar", "numpy", "pillow", "tokenizers")


class Check(NamedTuple):
    """One thing looked at. `passed` None: it could not be told, and `text` says why."""

    name: str
    passed: bool | None
    text: str


class Answer(NamedTuple):
    """What the model says to one picture, and what the reference says."""

    picture: str
    question: str
    text: str
    reference: str | None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a verification found. A figure that would mean nothing is None."""

    bundle: Bundle
    reference: Bundle | None  # the float32 graphs of the same weights
    quick: bool
    checks: tuple[Check, ...]
    answers: tuple[Answer, ...]
    figures: dict[str, Any]
    seconds: float

    @property
    def passed(self) -> bool:
        return all(each.passed is not False for each in self.checks)

    @property
    def reason(self) -> str | None:
        """One line on the first check that failed."""
        failed = next((each for each in self.checks if each.passed is False), None)
        return f"{self.bundle.target}: {failed.name}: {failed.text}" if failed else None

    def report(self, made: datetime) -> dict[str, Any]:
        """All of it as JSON, to be kept or sent: models/reports/README.md says where to."""
        manifest, other = self.bundle.manifest, self.reference
        return {
            "format": 1, "made": made.isoformat(timespec="seconds"), "seconds": round(self.seconds, 1),
            "target": self.bundle.target, "model": manifest.name, "recipe": manifest.recipe,
            "source": manifest.source.model_dump(), "passed": self.passed, "quick": self.quick,
            "checks": [each._asdict() for each in self.checks],
            "figures": self.figures,
            "answers": [each._asdict() for each in self.answers],
            "reference": other and {"target": other.target, "sha256": sha256_of(other.folder / MANIFEST)},
            "manifest_sha256": sha256_of(self.bundle.folder / MANIFEST),
            "files": {name: entry.sha256 for name, entry in manifest.files.items()},
            "machine": machine(),
            "versions": {"runtime": RUNTIME, **{package: version(package) for package in PACKAGES}},
        }  # fmt: skip


class _Task(NamedTuple):
    """A picture with its question, or a stretch of the text, as ids and tiles."""

    specimen: quality.Specimen | None
    ids: list[int]
    pixels: quality.Floats  # [tile, 3, height, width], no tile for text
    forced: list[int]  # the text's own continuation; empty for a picture


class _Seen(NamedTuple):
    """What the model under test made of a task, and what the reference did."""

    task: _Task
    case: quality.Case
    expected: quality.Case | None


def verify_bundle(
    folder: Path,
    *,
    reference: Path | None = None,
    quick: bool = False,
    console: Console | None = None,
    processor: Processor | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Verdict:
    """Put the specimens to the reference, then to the model, and judge by the recipe's gate.

    Raises BadRequest where the reference is not fp32 or not of the same weights, BundleError where one does not load.
    """
    from rich.progress import Progress  # for the command line: a server has this module and shows no bar

    begun = clock()
    tokens = QUICK_ANSWER_TOKENS if quick else ANSWER_TOKENS
    compared = Bundle.read(reference) if reference else None
    if compared and not (compared.manifest.recipe == "fp32" and _same_weights(Bundle.read(folder), compared)):
        raise BadRequest(f"{compared.target} is not fp32 of the same weights: source, revision or recipe differ")
    expected: list[quality.Case] = []
    shown = console is not None and console.is_terminal  # elsewhere a bar would leave an empty line
    with Progress(console=console, transient=True, disable=not shown) as progress:

        def within(tasks: list[_Task], seconds: float, target: str) -> Iterator[_Task]:
            chosen = _within(tasks, begun + seconds if quick else math.inf, clock)
            return iter(progress.track(chosen, total=len(tasks), description=target))

        if compared:
            model = LoadedModel.load(compared.folder)
            for task in within(_tasks(model, quick), QUICK_S * REFERENCE_SHARE, compared.target):
                expected.append(quality.observe(model.onnx, task.ids, task.pixels, tokens=tokens, forced=task.forced))
            del model  # before the other is loaded: memory need not hold both
        model = LoadedModel.load(folder)
        tasks = _tasks(model, quick)[: len(expected) or None]
        markers = _markers(model, tasks, expected)
        seen = []
        for number, task in enumerate(within(tasks if markers.passed else [], QUICK_S, model.bundle.target)):
            wanted = expected[number] if expected else None
            forced = wanted.answer if wanted else task.forced
            case = quality.observe(model.onnx, task.ids, task.pixels, tokens=tokens, forced=forced)
            seen.append(_Seen(task, case, wanted))
        figures: dict[str, Any] = {}
        return Verdict(
            bundle=model.bundle,
            reference=compared,
            quick=quick,
            checks=(markers, *(_judge(model, seen, processor, figures) if seen else ())),
            answers=tuple(_answer(model, each) for each in seen if each.task.specimen),
            figures=figures,
            seconds=clock() - begun,
        )


def save_report(report: dict[str, Any], path: Path) -> None:
    """Write it beside and rename. Raises Unavailable where it cannot be written."""
    try:
        write_whole(path, json.dumps(report, ensure_ascii=False, indent=2) + "\n")
    except OSError as error:
        raise Unavailable(f"{path} cannot be written: {error.strerror}") from error


def find_reference(tested: Bundle, bundles: Iterable[Bundle]) -> Bundle | None:
    """The first other bundle that holds the same weights in fp32."""
    fp32 = (each for each in bundles if each.manifest.recipe == "fp32" and each.folder != tested.folder)
    return next((each for each in fp32 if _same_weights(tested, each)), None)


def failure(folder: Path, here: Iterable[Bundle]) -> str | None:
    """What a quick check found wrong, in one line; None where nothing. A reference may be among the bundles `here`."""
    try:
        reference = find_reference(Bundle.read(folder), here)
        return verify_bundle(folder, reference=reference.folder if reference else None, quick=True).reason
    except BundleError as error:
        return error.message


def _same_weights(one: Bundle, other: Bundle) -> bool:
    """One checkpoint by its hash, or one repository at one commit: published files differ from recipe to recipe."""
    first, second = one.manifest.source, other.manifest.source
    same_commit = first.revision is not None and (first.name, first.revision) == (second.name, second.revision)
    return one.manifest.shapes == other.manifest.shapes and (first.sha256 == second.sha256 or same_commit)


def _within(tasks: Sequence[_Task], deadline: float, clock: Callable[[], float]) -> Iterator[_Task]:
    """Tasks while there is time for one as long as the longest so far; the first in any case."""
    longest = 0.0
    for task in tasks:
        started = clock()
        if longest and started + longest > deadline:
            return
        yield task
        longest = max(longest, clock() - started)


def _tasks(model: LoadedModel, quick: bool) -> list[_Task]:
    """Pictures and stretches of text in turn. In a quick check every picture is one tile."""
    pictures = []
    for specimen in quality.SPECIMENS:
        asked = question(specimen.question, (specimen.read(),), detail="low" if quick else specimen.detail)
        prompt = prepare(model, asked, time.perf_counter)
        pictures.append(_Task(specimen, prompt.ids, prompt.pixels, []))
    ids = model.tokenizer.encode_literal(quality.prose())
    last = min(TEXT_END, model.onnx.shapes.max_positions - TEXT_STEP)
    if len(ids) * PROSE_CHARACTERS_PER_TOKEN > len(quality.prose()):
        last = 0
    stretches = [
        _Task(None, ids[:at], quality.NO_PIXELS, ids[at : at + TEXT_STEP]) for at in range(TEXT_START, last, TEXT_STEP)
    ]
    turns = range(max(len(pictures), len(stretches)))
    return [task for turn in turns for row in (pictures, stretches) for task in row[turn : turn + 1]]


def _answer(model: LoadedModel, seen: _Seen) -> Answer:
    def words(tokens: Sequence[int]) -> str:
        return model.tokenizer.decode([id for id in tokens if id not in model.onnx.shapes.stop_token_ids]).strip()

    (specimen, *_), case, expected = seen
    assert specimen
    said = case.answer
    if expected and (case.logits.argmax(-1) != case.answer).any():  # left to itself it says something else
        said = model.onnx.greedy(case.ids, case.features, len(case.answer))
    return Answer(specimen.file, specimen.question, words(said), words(expected.answer) if expected else None)


def _judge(
    model: LoadedModel, seen: Sequence[_Seen], processor: Processor | None, figures: dict[str, Any]
) -> Iterator[Check]:
    """Check after check; fills in the figures. Of graphs that give no numbers nothing more is asked."""
    stored = model.bundle.manifest.replay is not None  # loading has played it
    told = (
        "passed while the model was loaded" if stored else "no stored answer to compare with: published files have none"
    )
    yield Check("replay", stored or None, told)
    arrays = [array for each in seen for array in (each.case.logits, each.case.features)]
    if not all(np.isfinite(array).all() for array in arrays):
        yield Check("numbers", False, "features or logits are infinite or no numbers")
        return
    yield Check("numbers", True, "every feature and logit is finite")
    yield from _sense(model, seen, figures)
    if seen[0].expected:
        yield _distance(model, seen, figures)
    if processor:
        yield _same_as(processor, model)


def _markers(model: LoadedModel, tasks: Sequence[_Task], expected: Sequence[quality.Case]) -> Check:
    """Do tokenizer and manifest mean the same token, and both models the same prompt? Their number is held by embed."""
    shapes, name = model.onnx.shapes, "image tokens"
    if model.tokenizer.marker("<image>") != shapes.image_token_id:
        return Check(name, False, f"<image> is not token {shapes.image_token_id} of the tokenizer")
    if any(task.ids != case.ids for task, case in zip(tasks, expected, strict=False)):
        return Check(name, False, "the same prompt has other token ids than with the reference")
    return Check(name, True, "tokenizer, template and tiles agree")


def _sense(model: LoadedModel, seen: Sequence[_Seen], figures: dict[str, Any]) -> Iterator[Check]:
    """Is the text more than noise? Random weights spread evenly, broken ones repeat one token or guess prose badly."""
    most = math.log(model.onnx.shapes.vocab_size)
    rows = [row for each in seen for row in quality.log_softmax(each.case.logits)]
    share = float(np.mean([-(np.exp(row) * row).sum() for row in rows])) / most
    untrained = model.bundle.manifest.quality.get("kl_meaningful") is False
    told = f"mean entropy is {share:.2f} of the largest possible, below {quality.RANDOM_ENTROPY_SHARE} is asked for"
    if untrained:
        yield Check("sense", None, f"the weights are random, as the export found: {told}")
        return
    yield Check("not random", share < quality.RANDOM_ENTROPY_SHARE, told)
    said = [token for each in seen if each.task.specimen for token in each.case.logits.argmax(-1).tolist()]
    commonest = figures["commonest_token_share"] = Counter(said).most_common(1)[0][1] / len(said)
    told = f"the commonest of {len(said)} tokens is {commonest:.2f} of them, at most {SAME_TOKEN_SHARE} is asked for"
    yield Check("not one word", commonest <= SAME_TOKEN_SHARE if len(said) >= SAME_TOKEN_FROM else None, told)
    stretches = [each.case for each in seen if not each.task.specimen]
    if stretches:
        nats = np.concatenate([quality.surprise(case) for case in stretches])
        perplexity = figures["text_perplexity"] = math.exp(nats.mean())
        others = [quality.surprise(each.expected) for each in seen if each.expected and not each.task.specimen]
        figures["text_perplexity_fp32"] = math.exp(np.concatenate(others).mean()) if others else None
        told = f"perplexity {perplexity:.1f} over {len(nats)} tokens of English"
        yield Check("text", bool(nats.mean() < quality.RANDOM_ENTROPY_SHARE * most), told)


def _distance(model: LoadedModel, seen: Sequence[_Seen], figures: dict[str, Any]) -> Check:
    """Vision, answers and text against the float32 graphs, by the recipe's gate."""
    pictures, text, vocabulary = quality.Differences(), quality.Differences(), model.onnx.shapes.vocab_size
    for task, case, expected in seen:
        assert expected
        (pictures if task.specimen else text).add(expected, case)
    found = quality.summary(pictures, vocabulary, reference="fp32", inputs="bundled pictures, greedy answers")
    if text.prompts:
        found["text"] = quality.summary(text, vocabulary, reference="fp32", inputs="bundled text, as it goes on")
    figures |= found
    try:
        quality.check(found, quality.gate_of(model.bundle.manifest.recipe))
    except quality.QualityGateFailed as error:
        return Check("against fp32", False, error.message)
    kl = [each["mean_kl"] for each in (found, found.get("text", found))]
    told = "not meaningful" if None in kl else f"{max(kl):.4f}"
    cosine, top = found["vision_cosine_mean"], found["top1_agreement"]
    return Check("against fp32", True, f"mean KL {told}, top-1 {top:.3f}, vision cosine {cosine:.5f}")


def _same_as(processor: Processor, model: LoadedModel) -> Check:
    """Tiles and token ids at full detail, against the reference implementation."""
    furthest = 0.0
    for specimen in quality.SPECIMENS:
        data = specimen.read()
        ids, pixels = processor(decode_image(data).image, specimen.question)
        prompt = prepare(model, question(specimen.question, (data,), detail="high"), time.perf_counter)
        mine = prompt.pixels
        if prompt.ids != ids or mine.shape != pixels.shape:
            return Check("reference processor", False, f"{specimen.file}: other tiles or token ids")
        furthest = max(furthest, float(np.abs(mine - pixels).max()))
    told = f"token ids equal, pixels differ by at most {furthest:.2g} (at most {PIXEL_TOLERANCE:.2g})"
    return Check("reference processor", furthest <= PIXEL_TOLERANCE, told)
