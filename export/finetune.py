"""Fine-tunes a checkpoint by LoRA: peft's layers, transformers' Trainer. What comes out is an adapter folder, which
`nearfar export --adapter` merges.

A run grows in a hidden folder beside OUT, which holds its checkpoints and outlives a kill; the adapter is written into
a folder of its own there, and takes OUT's place by a rename.
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from export.checkpoint import RECORD, load_checkpoint
from export.folders import check_target, move_into_place
from export.lessons import Example, Lessons, Reader, collate
from models.errors import BadRequest, InvalidValue, NearfarError, Unavailable
from models.images import Detail
from models.machine import process_peak_bytes

Parts = Literal["text", "connector", "all"]
# The linear layers that get an adapter, by their names in transformers' model of the family.
_TEXT = r".*\.text_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
_CONNECTOR = r".*\.modality_projection\.proj"
_VISION = r".*\.vision_model\.encoder\.layers\.\d+\.(self_attn\.([qkv]|out)_proj|mlp\.fc[12])"
LAYERS: Mapping[Parts, str] = {
    "text": _TEXT,
    "connector": f"({_TEXT}|{_CONNECTOR})",
    "all": f"({_TEXT}|{_CONNECTOR}|{_VISION})",
}
MAX_RANK = 1024  # beyond the width of the smaller models it adds nothing
MAX_SEED = 2**32 - 1  # NumPy's
RUN = "run.json"  # in a run's folder: what it is a run of
LOCK = "lock"  # there too: held as long as somebody trains
CHECKPOINTS = "checkpoints"
STATE = "trainer_state.json"  # the last file of a checkpoint: one without it is half-written
MADE_WITH = ("torch", "transformers", "peft", "accelerate")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to train. `steps` in place of epochs; `every`: steps between checkpoints and validations, None: an epoch's.

    `patience`: so many validations in a row without a better one end the training; 0 trains to the end.
    """

    epochs: float = 3.0
    steps: int | None = None
    batch: int = 8
    accumulate: int = 1
    learning_rate: float = 2e-4
    rank: int = 16
    parts: Parts = "text"
    patience: int = 3
    every: int | None = None
    seed: int = 0
    detail: Detail = "auto"
    auto_tile_px: int | None = None
    save_memory: bool = False

    def __post_init__(self) -> None:
        least: Mapping[str, float] = {"batch": 1, "accumulate": 1, "rank": 1, "patience": 0, "seed": 0}
        for name, bound in {**least, "steps": 1, "every": 1, "auto_tile_px": 1}.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise InvalidValue(f"{name} must be at least {bound}, got {value}", param=name)
        for name, bound in {"rank": MAX_RANK, "seed": MAX_SEED}.items():
            if getattr(self, name) > bound:
                raise InvalidValue(f"{name} must be at most {bound}, got {getattr(self, name)}", param=name)
        for name in ("epochs", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidValue(f"{name} must be a number above 0, got {getattr(self, name)}", param=name)
        for name, kind in (("parts", Parts), ("detail", Detail)):
            if getattr(self, name) not in get_args(kind):
                choices = ", ".join(get_args(kind))
                raise InvalidValue(f"{name} must be one of {choices}, got {getattr(self, name)!r}", param=name)


@dataclass(frozen=True, kw_only=True)
class Material:
    """What is learnt from, what decides when to stop, and texts to be written beside the adapter, by file name.

    `fingerprint` tells one data set from another, so that a run is not resumed with other rows.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    beside: Mapping[str, str]
    fingerprint: str


def finetune(
    base: Path,
    material: Material,
    out: Path,
    plan: Plan,
    *,
    resume: bool = False,
    overwrite: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Train an adapter of the checkpoint folder `base` into the folder `out`; returns its record, RECORD beside it.

    Raises BadRequest for wrong arguments and for examples that cannot be learnt from, before anything is trained;
    CheckpointError for a base that does not load; Unavailable where another process trains `out`; NearfarError where
    the disk refuses, or nothing but infinite weights came of it. `out` is then as it was, and what was trained until
    then is kept for `resume`.
    """
    base, out = base.resolve(), out.resolve()
    work = out.with_name(f".{out.name}.training")
    check_target(base, out, mark=RECORD)
    _check_work(out, work, resume=resume, overwrite=overwrite)
    if not material.train:
        raise BadRequest("no row is left to learn from")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = torch.bfloat16 if device == "cuda" else torch.float32
    checkpoint = load_checkpoint(base, precision=precision)
    named = {"name": base.name, "sha256": checkpoint.weights_sha256}
    run = {"base": named, "data": material.fingerprint, "plan": asdict(plan)}
    if resume:
        _check_run(work, run)
    processing = checkpoint.processing
    processing = replace(processing, auto_tile_px=plan.auto_tile_px or processing.auto_tile_px)
    reader = Reader(checkpoint=checkpoint, processing=processing, detail=plan.detail)
    train, validation = Lessons(material.train, reader), Lessons(material.validation, reader)
    for lessons in (train, validation):
        lessons.check(show_progress=show_progress)
    try:
        with _alone(out, work):
            _begin(work, run, material.beside, fresh=not resume)
            config = LoraConfig(r=plan.rank, lora_alpha=2 * plan.rank, target_modules=LAYERS[plan.parts], bias="none")
            torch.manual_seed(plan.seed)  # of the adapter's first weights
            model: PeftModel = get_peft_model(checkpoint.model, config)
            follower = _Follower(show_progress=show_progress)
            trainer = _trainer(model, train, validation, work, plan, follower, on_gpu=device == "cuda")
            trainer.train(resume_from_checkpoint=_last_whole(work / CHECKPOINTS) if resume else None)
            _check_numbers(model)
            record = run | {
                "adapter": {"layers": plan.parts, "trained_parameters": _trained(model)},
                "rows": {"train": len(train), "validation": len(validation)},
                "result": _result(trainer, follower, device),
                "made_with": {package: version(package) for package in MADE_WITH},
            }
            _write(model, base.name, work / "adapter", record, material.beside)
            move_into_place(work / "adapter", out)
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise NearfarError(f"{out} cannot be written: {error.strerror or error}") from error
    except torch.OutOfMemoryError as error:
        raise NearfarError("a step does not fit into the GPU's memory: a smaller batch, or --save-memory") from error
    return record


@contextmanager
def _alone(out: Path, work: Path) -> Iterator[None]:
    """One run at a time in the folder `work`, which is made. Raises Unavailable, and OSError."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when the process ends, however it ends
        except BlockingIOError:
            raise Unavailable(f"{out} is being trained by another process") from None
        yield


def _check_work(out: Path, work: Path, *, resume: bool, overwrite: bool) -> None:
    if (out / RECORD).is_file() and not overwrite:
        raise BadRequest(f"{out} holds an adapter already; --overwrite replaces it", param="out")
    if resume and not (work / RUN).is_file():
        raise BadRequest(f"there is no unfinished run of {out} to resume", param="resume")
    if (work / LOCK).is_file():  # told before the base is loaded
        with _alone(out, work):
            pass
    if work.exists() and not resume and not overwrite:
        raise BadRequest(f"an unfinished run of {out} is there: --resume goes on with it, --overwrite begins anew")


def _check_run(work: Path, run: Mapping[str, Any]) -> None:
    """Raises BadRequest where the unfinished run is one of another base, data set or plan."""
    try:
        begun = json.loads((work / RUN).read_text())
        begun, asked = {**begun, **begun.pop("plan")}, {**run, **run["plan"]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadRequest(f"{work / RUN} cannot be read; --overwrite begins anew") from error
    for name, value in asked.items():
        if name != "plan" and begun.get(name) != value:
            raise BadRequest(f"the unfinished run has {name} {begun.get(name)}, not {value}", param=name)


def _begin(work: Path, run: Mapping[str, Any], beside: Mapping[str, str], *, fresh: bool) -> None:
    if fresh:
        for old in work.iterdir():
            if old.is_dir():
                shutil.rmtree(old)
            elif old.name != LOCK:
                old.unlink()
        for name, text in beside.items():  # here already, so that the base can be asked while it trains
            (work / name).write_text(text)
        (work / RUN).write_text(json.dumps(run, indent=2) + "\n")


def _last_whole(folder: Path) -> str | None:
    """The newest checkpoint whose last file is there and whole; the others are removed. None: from the beginning."""
    whole = []
    for each in folder.glob("checkpoint-*"):
        try:
            whole.append((int(json.loads((each / STATE).read_text())["global_step"]), each))
        except (OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(each)
    return str(max(whole)[1]) if whole else None


class _Trainer(Trainer):
    """transformers' own, which leaves no half-written checkpoint behind where the disk refuses."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            with warnings.catch_warnings():  # saved within a second, checkpoints are told apart by number: as well
                warnings.filterwarnings("ignore", "mtime may not be reliable")
                super()._save_checkpoint(model, trial)  # type: ignore[no-untyped-call]
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have kinds of their own
            half = Path(str(self.args.output_dir), f"checkpoint-{self.state.global_step}")
            shutil.rmtree(half, ignore_errors=True)
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:200]
            raise NearfarError(f"{half} cannot be written: {reason}; --resume goes on from the one before") from error


def _trainer(
    model: PeftModel, train: Lessons, validation: Lessons, work: Path, plan: Plan, follower: _Follower, *, on_gpu: bool
) -> _Trainer:
    if plan.save_memory:
        model.enable_input_require_grads()
    epoch = math.ceil(math.ceil(len(train) / plan.batch) / plan.accumulate)
    steps = plan.steps or math.ceil(plan.epochs * epoch)
    every = min(plan.every or epoch, steps)
    validated = len(validation) > 0
    arguments = TrainingArguments(
        output_dir=str(work / CHECKPOINTS), max_steps=steps, per_device_train_batch_size=plan.batch,
        per_device_eval_batch_size=plan.batch, gradient_accumulation_steps=plan.accumulate,
        learning_rate=plan.learning_rate, lr_scheduler_type="cosine", warmup_ratio=0.03, logging_steps=10,
        save_strategy="steps", save_steps=every, save_total_limit=2, eval_strategy="steps" if validated else "no",
        eval_steps=every if validated else None, load_best_model_at_end=validated, metric_for_best_model="eval_loss",
        greater_is_better=False, restore_callback_states_from_checkpoint=True, prediction_loss_only=True,
        label_names=["labels"], remove_unused_columns=False, dataloader_num_workers=4 if on_gpu else 0,
        dataloader_pin_memory=on_gpu, bf16=on_gpu, use_cpu=not on_gpu, gradient_checkpointing=plan.save_memory,
        gradient_checkpointing_kwargs={"use_reentrant": False} if plan.save_memory else None, seed=plan.seed,
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    stop: list[TrainerCallback] = [EarlyStoppingCallback(plan.patience)] if validated and plan.patience else []
    trainer: _Trainer = _Trainer(
        model=model, args=arguments, train_dataset=train, eval_dataset=validation if validated else None,
        data_collator=collate, callbacks=[follower, *stop],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # type: ignore[no-untyped-call]  # which writes to standard output
    return trainer


class _Follower(TrainerCallback):
    """Shows how far it is, and keeps what a step took. A step is what lies between two updates of the weights."""

    def __init__(self, *, show_progress: bool) -> None:
        self.step_s: list[float] = []
        self._shown, self._bar, self._begun = show_progress, None, 0.0
        self._told: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._bar = tqdm(
            desc="train", unit="step", total=state.max_steps, initial=state.global_step, file=sys.stderr,
            disable=not self._shown,
        )  # fmt: skip

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.step_s.append(time.perf_counter() - self._begun)
        assert self._bar is not None
        self._bar.update()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        names = {"loss": "loss", "eval_loss": "validation"}
        self._told |= {names[name]: f"{value:.3f}" for name, value in (logs or {}).items() if name in names}
        if self._bar is not None:
            self._bar.set_postfix(self._told)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._bar is not None
        self._bar.close()


def _check_numbers(model: nn.Module) -> None:
    """Raises NearfarError where the adapter is none any more."""
    if not all(weight.isfinite().all() for weight in model.parameters() if weight.requires_grad):
        raise NearfarError(
            "the training ended in weights that are no numbers: --overwrite with a lower --learning-rate"
        )


def _trained(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def _result(trainer: _Trainer, follower: _Follower, device: str) -> dict[str, Any]:
    losses = {each["step"]: each["eval_loss"] for each in trainer.state.log_history if "eval_loss" in each}
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else process_peak_bytes()
    return {
        "steps": trainer.state.global_step,
        "stopped_early": trainer.state.global_step < trainer.state.max_steps,
        "best_step": min(losses, key=lambda step: losses[step]) if losses else None,
        "validation_loss": min(losses.values()) if losses else None,
        "step_s": statistics.median(follower.step_s) if follower.step_s else None,  # None: resumed when all was done
        "peak_bytes": memory,
        "device": device,
    }


def _write(model: PeftModel, base: str, folder: Path, record: Mapping[str, Any], beside: Mapping[str, str]) -> None:
    """The adapter in peft's layout, without the path of the base, which is of this machine."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config = replace(model.peft_config["default"], base_model_name_or_path=base, inference_mode=True)
    config.save_pretrained(str(folder))
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = {name: weight.float().contiguous().cpu() for name, weight in weights.items()}
    try:
        save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    except SafetensorError as error:
        raise NearfarError(f"{folder} cannot be written: {error}; --resume writes it again") from error
    for name, text in beside.items():
        (folder / name).write_text(text)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
