"""What the routes work with: models, targets, records, money, ledger, built from the settings. It knows no HTTP."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from comparisons.workload import Model
from models.bundle import Bundle
from models.errors import BadRequest, Forbidden, InvalidValue, NearfarError, Overloaded, Unavailable
from models.execution import runs_on_gpu, untested
from models.loaded_model import LoadedModel
from models.machine import Remembered
from models.memory import Seat, default_budget
from models.quality import safer_recipes
from models.replay import ReplayFailed
from serving.energy import Power
from serving.engine.loop import EngineFigures
from serving.engine.residents import LocalModel, Resident, Residents
from serving.hosted.budgets import Budgets
from serving.hosted.hosted_model import HostedModel
from serving.hosted.providers import Provider
from serving.hosted.rows import PROVIDERS, absent, alias_notice, available, parse_endpoint, with_aliased
from serving.ledger import Ledger
from serving.local_models import aliases, local_bundles, model_folders
from serving.power import find_meters
from serving.pull import fetch, plan_pull, reject, wanted
from serving.records import Records, bundle_versions
from serving.routes.table import Routes
from serving.settings import Settings
from serving.spending import Spending, budgets_of
from serving.targets import Target, Targets

Result = TypeVar("Result")
log = logging.getLogger("nearfar")


@dataclass
class Pulling:
    """How far the fetching of a model is. It changes while it is fetched, on one thread, and is read on another."""

    model: str
    state: Literal["fetching", "loading", "done", "failed"] = "fetching"
    bytes: int = 0
    total_bytes: int | None = None  # None: the hub has not said yet
    error: str | None = None

    def report(self, there: int, total: int) -> None:
        self.bytes, self.total_bytes = there, total


class Services:
    """What the routes work with. Loading runs beside the server, so that probes are answered from the first moment.

    Making it loads nothing and starts no thread. Raises InvalidValue for a malformed endpoint, Unavailable for an
    execution provider that the installed onnxruntime has not.
    """

    def __init__(self, settings: Settings, environment: Mapping[str, str]) -> None:
        self.settings = settings
        self._execution_notice = untested(settings.execution_provider)
        hops = {hop.target: hop.target for route in settings.routes.values() for hop in route.hops}
        named = {**hops, **settings.aliases}
        self._rows = with_aliased([*PROVIDERS, *map(parse_endpoint, settings.endpoints)], named)
        self.routes = Routes(settings.routes)
        self._hosted = available(self._rows, environment)
        _check_budgets(settings, {row.name for row in self._rows})
        self.spending = Spending(settings.data_dir, budgets_of(settings))
        self.ledger = Ledger(settings.data_dir, size=settings.ledger_size)
        gpu = runs_on_gpu(settings.execution_provider)
        self._runs_on = (
            ("cuda" if gpu else "cpu") if settings.execution_provider == "auto" else settings.execution_provider
        )
        self.power = Power(
            find_meters(gpu=gpu),
            electricity=settings.electricity,
            hardware=settings.hardware,
        )
        self._watching: asyncio.Task[None] | None = None
        self.residents: Residents | None = None
        self._budget = settings.memory_budget or default_budget()  # now, before the models take theirs
        self._targets: Targets | None = None
        self._reason: str | None = "the models are being loaded"
        self._leaving = False
        self.records = Records(settings)
        self.pulling: Pulling | None = None  # the model that is being fetched, or was last

    async def load(self) -> None:
        """Load the models that fit together and build the targets. A failure is kept as why the service is not ready.

        The other models are loaded when somebody asks for them.
        """
        try:
            bundles = [Bundle.read(folder) for folder in model_folders(self.settings)]
            residents = await self._load_first(bundles)
            local = [self._local_target(resident, residents) for resident in residents.all]
            self._targets = self._all_targets([*local, *await asyncio.to_thread(self._hosted_targets)])
            await self.power.measure_idle()
            self._watching = asyncio.create_task(self.power.watch())
            self._reason = None
        except NearfarError as error:
            self._reason = error.message
        except Exception:
            self._reason = "loading failed unexpectedly; the log says how"
            log.exception("loading failed")

    def not_ready(self) -> str | None:
        """Why requests cannot be answered now; None where they can."""
        if self._leaving:
            return "the service is going down"
        if self.residents and not self.residents.engine.loop.alive:
            return "the engine has failed; the log says how"
        return self._reason

    def stop_accepting(self) -> None:
        """From now on not ready: running answers end, new ones are turned away."""
        self._leaving = True

    def targets(self) -> Targets:
        """All targets. Raises Unavailable while there are none."""
        reason = self.not_ready()
        if reason or self._targets is None:
            raise Unavailable(reason or "not ready")
        return self._targets

    def resident(self, target: Target) -> Resident:
        """The model behind a target. Raises BadRequest for one that is not on this machine."""
        found = [each for each in self.residents.all if each.bundle.target == target.name] if self.residents else []
        if not found:
            raise BadRequest(f"{target.name} is not a model of this service", param="model")
        return found[0]

    def priced_models(self) -> list[Model]:
        """Every hosted model that is known by name and may have a price, whether or not its key is here."""
        return priced_models(self._rows)

    def engine_figures(self) -> EngineFigures:
        """How full the engine is; it wakes nothing."""
        return self.residents.engine.figures() if self.residents else EngineFigures()

    async def _load_first(self, bundles: Sequence[Bundle]) -> Residents:
        """Where a model computes wrongly on this processor, a safer recipe of it that is here is taken in its place."""
        residents = self.residents = Residents(
            bundles,
            self._load_model,
            budget=self._budget,
            max_running=self.settings.max_running,
            max_waiting=self.settings.max_waiting,
            idle_s=self.settings.model_ttl_s,
            power=self.power,
        )
        try:
            await residents.load_first()
        except ReplayFailed as error:
            found = [bundle for bundle in local_bundles(self.settings) if bundle.manifest.name == error.manifest.name]
            here = {bundle.manifest.recipe: bundle for bundle in found}
            other = next((here[recipe] for recipe in safer_recipes(error.manifest.recipe) if recipe in here), None)
            if other is None:
                raise
            log.warning("%s; %s is taken instead", error.message, other.target)
            others = {
                bundle.folder: bundle for bundle in (other if each.folder == error.folder else each for each in bundles)
            }
            await residents.aclose()
            return await self._load_first(list(others.values()))
        return residents

    def _load_model(self, bundle: Bundle, seat: Seat) -> LoadedModel:
        return LoadedModel.load(
            bundle.folder,
            context=seat.context,
            slots=seat.slots,
            threads=self.settings.threads,
            provider=self.settings.execution_provider,
            vision=self.settings.vision_backend,
            remembered=Remembered(self.settings.data_dir / "machine.json"),
        )

    def pull(self, name: str) -> None:
        """Begin to fetch a catalog model and to serve it; `self.pulling` tells how far it is. One at a time.

        Raises NotFound, BadRequest, Forbidden where the service is offline, Overloaded while another is on its way.
        """
        self.targets()
        row, recipe = wanted(name, None)
        if self.settings.offline:
            raise Forbidden("this service is offline: it fetches no model", param="model")
        if self.pulling and self.pulling.state in ("fetching", "loading"):
            raise Overloaded(f"{self.pulling.model} is being fetched; one at a time", retry_after_s=30)
        self.pulling = Pulling(f"{row.name}@{recipe}")
        self._pull_task = asyncio.create_task(self._pull(name, self.pulling))

    async def _pull(self, name: str, pulling: Pulling, recipe: str | None = None) -> None:
        try:
            plan = await in_daemon_thread(plan_pull, name, self.settings.data_dir, recipe=recipe, revision=None)
            if plan.recipe is None:
                raise BadRequest(f"{name} has no published ONNX files; on the command line, nearfar pull exports it")
            folder = await in_daemon_thread(fetch, plan, pulling.report)
            pulling.state = "loading"
            rejected = await in_daemon_thread(reject, folder, self.settings)
            if rejected:
                log.warning(rejected.reason)
                pulling.model, pulling.state = f"{plan.row.name}@{rejected.safer}", "fetching"
                return await self._pull(name, pulling, rejected.safer)
            await self._serve_also(folder)
            pulling.state = "done"
        except Exception as error:
            pulling.state, pulling.error = "failed", "fetching failed unexpectedly; the log says how"
            if isinstance(error, NearfarError):
                pulling.error = error.message
            else:
                log.exception("fetching %s failed", name)

    async def _serve_also(self, folder: Path) -> None:
        """One more local target, loaded. Raises Unavailable where its model does not fit into memory."""
        residents, bundle = self.residents, Bundle.read(folder)
        assert residents
        if bundle.target in [other.bundle.target for other in residents.all]:
            return
        added = residents.add(bundle)
        try:
            await residents.load(added)
        except NearfarError:
            residents.all.remove(added)
            raise
        present = list(self.targets())
        local = sum(target.kind == "local" for target in present)
        target = self._local_target(added, residents)
        self._targets = self._all_targets([*present[:local], target, *present[local:]])

    def _local_target(self, resident: Resident, residents: Residents) -> Target:
        manifest = resident.bundle.manifest
        return Target(
            answerer=LocalModel(resident, residents),
            kind="local",
            model=manifest.name,
            recipe=manifest.recipe,
            notice="; ".join(filter(None, (manifest.notice, self._execution_notice))) or None,
            versions={**bundle_versions(resident.bundle), "runs_on": self._runs_on},
            context_tokens=manifest.shapes.max_positions,
        )

    def _all_targets(self, targets: Sequence[Target]) -> Targets:
        own = {alias: (target, alias_notice(alias, target)) for alias, target in self.settings.aliases.items()}
        missing = absent(self._rows, [provider for provider, _ in self._hosted])
        names = {**aliases(self.settings), **own}
        models = [target for target in targets if target.kind != "route"]
        routes = self.routes.over(Targets(models, names, missing))
        return Targets([*models, *routes], names, missing)

    def _hosted_targets(self) -> list[Target]:
        gates = (Budgets(self.spending, unpriced_usd=self.settings.unpriced_usd), self.ledger)  # the ledger last
        return [
            Target(
                answerer=HostedModel(provider, model, key, gates=gates),
                kind="hosted",
                model=model,
                destination=provider.destination,
                leaves_device=provider.leaves_device,
                notice=provider.description,
                facts=(facts := provider.facts(model)),
                context_tokens=facts.context_tokens,
                versions={"model": model, "protocol": provider.protocol},
                estimate=partial(provider.estimate, model),
            )
            for provider, key in self._hosted
            for model in provider.models
        ]

    async def aclose(self) -> None:
        """Close every answerer and end the engine."""
        if self._watching:
            self._watching.cancel()
        for target in self._targets or ():
            await target.answerer.aclose()
        if self.residents:
            await self.residents.aclose()
        self.spending.close()
        self.records.close()


def _check_budgets(settings: Settings, providers: Set[str]) -> None:
    """Raises InvalidValue where a budget's name is nothing that spends: it would bound nothing."""
    for name in settings.budgets:
        known = (*settings.aliases, *settings.routes)
        if name not in known and name.partition("/")[0] not in providers:
            raise InvalidValue(f"budgets: {name[:64]!r} is no provider, hosted target, route or alias", param="budgets")


def priced_models(rows: Sequence[Provider]) -> list[Model]:
    """Of those rows whose providers have prices."""
    return [Model(row.name, row.price_provider, name) for row in rows if row.price_provider for name in row.models]


async def in_daemon_thread(work: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """Await a function in a thread that does not hold up the end of the process: a fetch may take an hour."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[Result] = loop.create_future()

    def settle(set_outcome: Callable[[Any], None], value: Any) -> None:
        if not outcome.done():
            set_outcome(value)

    def run() -> None:
        told: tuple[Any, ...]
        try:
            told = (outcome.set_result, work(*arguments, **options))
        except Exception as error:
            told = (outcome.set_exception, error)
        with suppress(RuntimeError):  # the event loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, *told)

    threading.Thread(target=run, name="nearfar-pull", daemon=True).start()
    return await outcome
