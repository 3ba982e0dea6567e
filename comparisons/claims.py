"""What reviews and vendors say, what would show it, and what the answers at hand show of it: computed, or untested."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal, NamedTuple

from comparisons.evidence import Case, Evidence
from comparisons.pairs import Outcome, is_local
from comparisons.quality import quality
from comparisons.report import pairs
from comparisons.statistics import wilson
from models.catalog import ROWS

Status = Literal["holds", "does not hold", "undecided", "in part", "untested"]
TIMES_LARGER = 3
DISCOUNT = 0.9
GPU_BYTES = 16e9
FIRST_ANSWER_S = 600
FEWER = 0.4
ABSENT = ("asked=absent", "asked=absent, colour and shape apart there", "asked=unanswerable")  # of `scenes-absent`


class Result(NamedTuple):
    """What came of a test: in a word, and in a sentence with its n. Untested: the sentence says what is missing."""

    status: Status
    text: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim, who makes it, how it is tested here, and what to run where that cannot be done yet."""

    claim: str
    source: str
    test: str
    needs: str
    check: Callable[[Evidence], Result | None]


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A claim with its result. `needs` only of what is not settled."""

    claim: str
    source: str
    test: str
    status: Status
    result: str
    needs: str | None


def checked(evidence: Evidence) -> list[Checked]:
    """All claims against that evidence."""
    found = []
    for each in CLAIMS:
        result = each.check(evidence) or Result("untested", "nothing here bears on it")
        settled = result.status in ("holds", "does not hold")
        found.append(
            Checked(
                claim=each.claim,
                source=each.source,
                test=each.test,
                status=result.status,
                result=result.text,
                needs=None if settled else each.needs,
            )
        )
    return found


def _parameters(target: str) -> int | None:
    """Of a local target's model, where the catalog knows it."""
    row = ROWS.get(target.removeprefix("local/").partition("@")[0]) if is_local(target) else None
    return row.shape.parameters if row else None


def _three_times(evidence: Evidence) -> Result | None:
    sizes = {target: size for target in evidence.targets if (size := _parameters(target))}
    tried = []
    for small, large in permutations(sizes, 2):
        found = quality(pairs(evidence, small, large)) if sizes[large] >= TIMES_LARGER * sizes[small] else None
        if found is not None:
            tried.append((found.n, small, large, found.difference))
    if not tried:
        return None
    n, small, large, gap = max(tried)
    ratio = sizes[large] / sizes[small]
    text = (
        f"{large}, with {ratio:.1f} times the parameters, scores {gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f}) "
        f"against {small}, n = {n}"
    )
    return Result("holds" if gap.sign < 0 else "does not hold" if gap.sign > 0 else "undecided", text)


def _hallucinations(evidence: Evidence) -> Result | None:
    """Of the claim's own two models it says whether; of others, how often each says that it sees what is not there."""
    probes = [case for case in evidence.cases if set(case.slices) & set(ABSENT) and not case.is_corrupted]
    shares = []
    wrong = {}
    for target in evidence.targets:
        answers = [case.answers[target][0] for case in probes if case.answers.get(target)]
        if answers:
            count = sum(each.score != 1.0 for each in answers)
            share = wilson(count, len(answers))
            wrong[target] = share
            bounds = f"{share.low:.1%} to {share.high:.1%}"
            shares.append(f"{target} wrong on {share.value:.1%} of the probes ({bounds}, n = {len(answers)})")
    if not shares:
        return None
    new, old = (next((t for t in wrong if name in t), None) for name in ("claude-sonnet-4", "claude-3-5-sonnet"))
    if new is None or old is None:
        return Result("untested", f"of the claim's two models there are no answers; {'; '.join(shares)}")
    best, worst = 1 - wrong[new].low / wrong[old].high, 1 - wrong[new].high / max(wrong[old].low, 1e-9)
    status: Status = "holds" if worst >= FEWER else "does not hold" if best < FEWER else "undecided"
    return Result(status, "; ".join(shares))


def _cache(evidence: Evidence) -> Result | None:
    answers = _answers(evidence, is_asked=lambda target: not is_local(target))
    priced = [each for each in answers if each.usd is not None and each.cache_saved_usd is not None]
    read = [each for each in priced if each.cached_tokens]
    if not read:
        return None
    paid, saved = sum(each.usd or 0.0 for each in read), sum(each.cache_saved_usd or 0.0 for each in read)
    less = saved / (paid + saved) if paid + saved else 0.0
    tokens = sum(each.cached_tokens or 0 for each in read) / max(1, sum(each.prompt_tokens or 0 for each in read))
    text = (
        f"answers that read from a cache cost {less:.0%} less than the same tokens without one, n = {len(read)} of "
        f"{len(priced)} hosted answers with a price; {tokens:.0%} of their prompt tokens came from the cache"
    )
    return Result("holds" if less >= DISCOUNT else "does not hold", text)


def _gpu(evidence: Evidence) -> Result | None:
    peaks = []
    claimed: list[int] = []
    for target in filter(is_local, evidence.targets):
        found = [each.process_peak_bytes for each in _answers(evidence, is_asked=target.__eq__)]
        known = [peak for peak in found if peak]
        if known:
            peaks.append(f"{target} answered in a process of {max(known) / 1e9:.2f} GB at its peak, n = {len(known):,}")
            on_cpu = all(each.get("runs_on") == "cpu" for each in evidence.versions.get(target, ({},)))
            if on_cpu and (_parameters(target) or 0) > 2e9:
                claimed.append(max(known))
    if not peaks:
        return None
    text = "; ".join(peaks)
    if not claimed:
        return Result("untested", f"no answer of a model of 2.2 billion parameters without a GPU is here; {text}")
    return Result("does not hold" if min(claimed) < GPU_BYTES else "undecided", text)


def _first_answer(evidence: Evidence) -> Result | None:
    answers = _answers(evidence, is_asked=is_local)
    firsts = [each.load_ms + each.total_ms for each in answers if each.load_ms is not None and each.total_ms]
    alone = [each.total_ms for each in answers if each.total_ms]
    if not alone:
        return None
    if not firsts:
        text = f"the models were in memory; the slowest answer took {max(alone) / 1e3:.2f} s, n = {len(alone):,}"
        return Result("in part", text)
    slowest = max(firsts) / 1e3
    text = f"loading the model and the first answer took up to {slowest:.1f} s, n = {len(firsts)} loads"
    return Result("does not hold" if slowest > FIRST_ANSWER_S else "in part", text)


def _answers(evidence: Evidence, *, is_asked: Callable[[str], bool]) -> Sequence[Outcome]:
    cases: Sequence[Case] = evidence.cases
    return [
        each
        for case in cases
        for target, given in case.answers.items()
        if is_asked(target)
        for each in given
        if each.ok
    ]


CLAIMS: tuple[Claim, ...] = (
    Claim(
        claim="SmolVLM2 outperforms models up to three times its size",
        source="review of SmolVLM2 at shiporskip.io, of MMBench and TextVQA; without figures there",
        test=f"two local models, one with at least {TIMES_LARGER} times the other's parameters, on the same inputs "
        "with references: the paired difference of their scores, with bounds that hold at all times",
        needs="nearfar evaluate TEXTVQA.json --targets smolvlm2-256m,smolvlm2-2.2b, or your own inputs",
        check=_three_times,
    ),
    Claim(
        claim="40 % fewer hallucinations",
        source="review of Claude 4 Sonnet at shiporskip.io, against Claude 3.5 Sonnet, as the vendor claims it",
        test="questions about what is not in the picture: the share that each model gets wrong, with Wilson's "
        "interval; the claim holds where the ratio of the bounds leaves no other way",
        needs="nearfar evaluate scenes-absent --policy any with both models as targets, while somebody serves them",
        check=_hallucinations,
    ),
    Claim(
        claim="90 % off with a prompt cache",
        source="reviews of prompt caching, after the providers' price lists, where it is of a cached token",
        test="hosted answers that read from a cache: what they cost against the same tokens without one. It is of the "
        "whole bill, of which cached tokens are a part",
        needs="hosted targets asked again about long prompts: nearfar compare --repeats 2 --policy any",
        check=_cache,
    ),
    Claim(
        claim="It takes a GPU with 16 GB",
        source="reviews, no published figure found; the paper (arXiv 2504.05299) has 4.9 GB for 2.2B and one picture",
        test="the largest resident set of a process that answered with a model of 2.2 billion parameters and no GPU, "
        "beside the models at hand",
        needs="nearfar pull smolvlm2-2.2b and the same comparison with it",
        check=_gpu,
    ),
    Claim(
        claim="Ten minutes to the first answer",
        source="reviews, no published figure found",
        test="how long loading the model and its first answer took; installing and downloading leave no record",
        needs="a clock beside the README's two commands on a fresh machine",
        check=_first_answer,
    ),
)
