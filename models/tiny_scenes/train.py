"""Trains tiny-scenes from scratch: `python -m models.tiny_scenes.train --out checkpoint`.

One row of a batch is one picture with many questions about it. The row holds the picture's prompt once and each
question with its answer as a branch that sees the prompt and itself alone (a block mask, positions counted anew in
each branch), so that every branch is to the model exactly the prompt that serving builds, and the picture is encoded
once for all of them. Two things make so small a model learn at all in an hour on two cores: dense captions, which
name everything in the picture, and for the first part of training a linear probe on the image features that says what
each cell holds.

Deterministic by seed: batch number k is a function of (seed, k), whether or not the run was interrupted.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, SmolVLMConfig, SmolVLMForConditionalGeneration

from models.images import Detail, Grid, ImageProcessing, tile_image
from models.tiny_scenes import scenes

PROCESSING = ImageProcessing(longest_edge=128, tile_px=64, auto_tile_px=256)
IMAGE_TOKENS = 16  # per tile: (64 / 8 / 2) ** 2
TEXT_VOCABULARY = 512
FIRST_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LAST_TOKENS = (
    "<global-img>",
    *(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)),
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
)
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
CELL_CLASSES = ("nothing", *scenes.SHAPES, *"0123456789")
ROW_TOKENS = 176  # a row's length bound, prompt included
PROBE_UNTIL = 0.5  # the probe's loss fades out by this share of the steps


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with single digits, learnt on questions and answers, and SmolVLM's special tokens."""
    rng = random.Random(seed)
    texts = []
    for _ in range(3000):
        scene = scenes.draw_scene(rng, side_px=64)
        for ask in scenes.ASKERS.values():
            pair = ask(scene, rng)
            texts.extend([pair[0], " " + pair[1]] if pair else [])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_VOCABULARY,
        special_tokens=list(FIRST_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in LAST_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=1024,
        chat_template=CHAT_TEMPLATE,
        additional_special_tokens=list(LAST_TOKENS),
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> SmolVLMForConditionalGeneration:
    """The SmolVLM architecture at about 3.9 million parameters, freshly initialised."""
    torch.manual_seed(seed)
    vocabulary = len(tokenizer)
    config = SmolVLMConfig(
        text_config={
            "model_type": "llama", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
            "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": vocabulary,
            "max_position_embeddings": 1024, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": False,
        },
        vision_config={
            "model_type": "smolvlm_vision", "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4,
            "num_attention_heads": 6, "image_size": 64, "patch_size": 8, "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
        },
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
        pad_token_id=2,
    )  # fmt: skip
    model = SmolVLMForConditionalGeneration(config)
    assert model.generation_config is not None
    model.generation_config.update(bos_token_id=0, eos_token_id=tokenizer.eos_token_id, pad_token_id=2)
    return model


def save_checkpoint(model: SmolVLMForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """A checkpoint folder in the hub's layout."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    preprocessor = {
        "do_convert_rgb": True, "do_image_splitting": True, "do_normalize": True, "do_pad": True, "do_rescale": True,
        "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 1, "rescale_factor": 1 / 255,
        "image_processor_type": "SmolVLMImageProcessor", "processor_class": "SmolVLMProcessor",
        "size": {"longest_edge": PROCESSING.longest_edge}, "max_image_size": {"longest_edge": PROCESSING.tile_px},
    }  # fmt: skip
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    processor = {"image_seq_len": IMAGE_TOKENS, "processor_class": "SmolVLMProcessor"}
    (out / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def image_text(grid: Grid) -> str:
    """The expanded placeholder of one picture, as the reference processor writes it."""
    image, fake = "<image>" * IMAGE_TOKENS, "<fake_token_around_image>"
    rows = "".join(
        "".join(f"{fake}<row_{row + 1}_col_{col + 1}>{image}" for col in range(grid.cols)) + "\n"
        for row in range(grid.rows)
    )
    return f"{rows}{chr(10) if grid.rows else ''}{fake}<global-img>{image}{fake}"


class Row(NamedTuple):
    """One picture and its questions as token ids."""

    ids: list[int]
    positions: list[int]
    branch: list[int]  # 0 is the shared prompt, 1.. the branches
    target: list[int]  # the id to predict at this position, -1 where nothing is learnt


class Batch(NamedTuple):
    """Tensors of one step. `cells` holds the probe's targets, None where the pictures have several tiles."""

    pixels: torch.Tensor  # [picture * tile, 3, 64, 64]
    ids: torch.Tensor  # [row, position]
    positions: torch.Tensor
    branch: torch.Tensor  # [row, position], -1 is padding
    target: torch.Tensor
    cells: torch.Tensor | None  # [row, 16, 2]: kind and colour


class Batches(Dataset[Batch]):
    """Batch number k, drawn from (seed, k)."""

    def __init__(self, tokenizer_path: Path, seed: int, steps: int, rows: int) -> None:
        self.tokenizer = Tokenizer.from_file(str(tokenizer_path))
        self.seed, self.steps, self.rows = seed, steps, rows
        self.image_id = self.tokenizer.token_to_id("<image>")
        self.known: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return self.steps

    def encode(self, text: str) -> list[int]:
        if text not in self.known:
            if len(self.known) > 50_000:
                self.known.clear()
            self.known[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.known[text]

    def __getitem__(self, step: int) -> Batch:
        rng = random.Random(f"{self.seed}:{step}")
        # One step in eight shows pictures of several tiles: detail=high, or large ones under detail=auto.
        detail: Detail = "auto"
        side_px, rows = 0, self.rows
        if step % 8 == 7:
            detail, side_px, rows = ("high", 0, self.rows // 4) if step % 16 == 7 else ("auto", 300, self.rows // 3)
        text_first = step % 6 == 4
        pictures, cells = [], []
        packed: list[Row] = []
        grid: Grid | None = None
        while len(packed) < rows:
            scene = scenes.draw_scene(rng, side_px=side_px)
            tiled = tile_image(scene.image, detail, PROCESSING)
            grid = grid or tiled.grid
            if tiled.grid != grid:  # the tiles of a step are one array: all its pictures have the first one's grid
                continue
            pictures.append(tiled.pixels)
            packed.append(self.pack(scene, grid, rng, text_first))
            cells.append(cell_targets(scene))
        assert grid is not None
        length = max(len(row.ids) for row in packed)

        def padded(name: str, fill: int) -> torch.Tensor:
            values = np.full((rows, length), fill, dtype=np.int64)
            for index, row in enumerate(packed):
                values[index, : len(row.ids)] = getattr(row, name)
            return torch.from_numpy(values)

        return Batch(
            pixels=torch.from_numpy(np.concatenate(pictures)),
            ids=padded("ids", 0),
            positions=padded("positions", 0),
            branch=padded("branch", -1),
            target=padded("target", -1),
            cells=None if grid.rows else torch.from_numpy(np.stack(cells)),
        )

    def pack(self, scene: scenes.Scene, grid: Grid, rng: random.Random, text_first: bool) -> Row:
        """The prompt once, then as many branches as fit: the caption, then questions of every kind in turn."""
        picture = image_text(grid)
        head = "<|im_start|>User:" if text_first else f"<|im_start|>User:{picture}"
        row = Row([], [], [], [])
        start = self.encode(head)
        self._append(row, start, 0, 0, [-1] * len(start))
        bound = ROW_TOKENS + len(self.encode(picture)) * (3 if text_first else 1)
        # What is learnt early is asked half of the time; what is hardest comes again as long as there is room.
        names = [name for name in ("color", "shape", "presence") if rng.random() < 0.5]
        names += ["count", "position", "number"]
        rng.shuffle(names)
        names = ["caption", *names, "json", *["count", "position", "count", "number"] * 3]
        for number, name in enumerate(names, start=1):
            pair = scenes.ASKERS[name](scene, rng)
            if pair is None:
                continue
            if rng.random() < 0.1:  # in text and picture, a second turn that must not mind the first
                follow = scenes.ASKERS[rng.choice(names)](scene, rng)
                turns = [pair, follow] if follow else [pair]
            else:
                turns = [pair]
            ids, targets = self._branch(turns, picture if text_first else "")
            if len(row.ids) + len(ids) > bound and number > 1:
                break
            self._append(row, ids, number, len(start), targets)
        return row

    def _branch(self, turns: list[scenes.Question], picture: str) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        targets: list[int] = []
        for index, (question, answer) in enumerate(turns):
            # The template puts a space before a message that begins with text, none before one that begins with a
            # picture.
            opening = "\nUser: " if index else " " if picture else ""
            ask = self.encode(f"{opening}{question}{picture if index == 0 else ''}<end_of_utterance>\nAssistant:")
            reply = self.encode(f" {answer}<end_of_utterance>")
            targets += [-1] * (len(ask) - 1) + reply + [-1]
            ids += ask + reply
        return ids, targets

    @staticmethod
    def _append(row: Row, ids: list[int], branch: int, first_position: int, targets: list[int]) -> None:
        row.ids.extend(ids)
        row.positions.extend(range(first_position, first_position + len(ids)))
        row.branch.extend([branch] * len(ids))
        row.target.extend(targets)


def cell_targets(scene: scenes.Scene) -> np.ndarray[Any, np.dtype[np.int64]]:
    """What the probe should say of each image feature: [16, 2], the class in CELL_CLASSES and the colour's index."""
    cells = np.zeros((IMAGE_TOKENS, 2), dtype=np.int64)
    side = int(math.sqrt(IMAGE_TOKENS))
    for thing in scene.things:
        column, row = min(int(thing.x * side), side - 1), min(int(thing.y * side), side - 1)
        cells[row * side + column] = CELL_CLASSES.index(thing.kind), list(scenes.COLORS).index(thing.color)
    return cells


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) in float32, matrices of one shape orthogonalised together.

    torch.optim.Muon computes in bfloat16, which a processor without AMX or AVX512-BF16 emulates: 6.3 s a step here (two
    Zen 3 cores) against 0.15 s for this.
    """

    def __init__(self, matrices: list[nn.Parameter], *, momentum: float = 0.95, weight_decay: float = 0.02) -> None:
        super().__init__(matrices, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                shapes.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in shapes.items():
                updates = []
                for matrix in matrices:
                    assert matrix.grad is not None
                    buffer = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                    buffer.lerp_(matrix.grad, 1 - group["momentum"])
                    updates.append(torch.lerp(matrix.grad, buffer, group["momentum"]))
                # The scale that gives an update the root mean square of a typical AdamW update.
                scale = 0.2 * math.sqrt(max(shape))
                for matrix, update in zip(matrices, orthogonalised(torch.stack(updates)), strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def orthogonalised(updates: torch.Tensor) -> torch.Tensor:
    """[matrix, row, column] with singular values near 1: five Newton-Schulz steps with Muon's quintic coefficients."""
    wide: torch.Tensor = updates if updates.shape[1] <= updates.shape[2] else updates.mT
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide if updates.shape[1] <= updates.shape[2] else wide.mT


@dataclass
class Learner:
    """Model, probe and optimizers; everything that a resumed run restores."""

    model: SmolVLMForConditionalGeneration
    probe: nn.Linear
    muon: Muon
    adam: torch.optim.Optimizer
    step: int = 0

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(), "probe": self.probe.state_dict(), "step": self.step,
            "muon": self.muon.state_dict(), "adam": self.adam.state_dict(),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        for name in ("model", "probe", "muon", "adam"):
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]


def make_learner(tokenizer: PreTrainedTokenizerFast, seed: int) -> Learner:
    """Muon for the layers' matrices, AdamW for everything else."""
    model = make_model(tokenizer, seed)
    probe = nn.Linear(192, len(CELL_CLASSES) + len(scenes.COLORS))
    named = model.named_parameters()
    matrices = [p for name, p in named if p.dim() == 2 and ("layers" in name or "modality_projection" in name)]
    chosen = {id(p) for p in matrices}
    others = [p for p in (*model.parameters(), *probe.parameters()) if id(p) not in chosen]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.98), weight_decay=0.01)
    return Learner(model, probe, muon, adam)


def image_features(model: SmolVLMForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """[tile, 16, hidden]. The tower without its per-picture loop over patch masks: tiles are always full squares."""
    vision = model.model.vision_model
    hidden = vision.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    hidden = hidden + vision.embeddings.position_embedding.weight
    hidden = vision.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
    features: torch.Tensor = model.model.connector(vision.post_layernorm(hidden))
    return features


def losses(learner: Learner, batch: Batch, image_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of the answers, share of answer tokens that are right, and the probe's loss or 0."""
    model = learner.model
    features = image_features(model, batch.pixels)
    rows, length = batch.ids.shape
    embeds = model.model.text_model.embed_tokens(batch.ids)
    places = batch.ids == image_id
    tiles_per_row = len(batch.pixels) // rows
    per_row = features.reshape(rows, tiles_per_row * IMAGE_TOKENS, -1)
    # Where the picture stands after the question, each branch shows it once more: the same features, repeated.
    order = (places.cumsum(1) - 1).clamp(min=0) % per_row.shape[1]
    gathered = per_row.gather(1, order[..., None].expand(-1, -1, per_row.shape[2]))
    embeds = torch.where(places[..., None], gathered, embeds)
    same = batch.branch[:, :, None] == batch.branch[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = causal & (same | (batch.branch[:, None, :] == 0))
    mask = torch.zeros(rows, 1, length, length).masked_fill_(~seen[:, None], -1e9)
    hidden = model.model.text_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    learnt = batch.target >= 0
    logits = model.lm_head(hidden[learnt])
    target = batch.target[learnt]
    answer_loss = nn.functional.cross_entropy(logits, target)
    right = (logits.argmax(-1) == target).float().mean()
    probe_loss = torch.zeros(())
    if batch.cells is not None:
        said = learner.probe(features)
        kinds, colors = said.split([len(CELL_CLASSES), len(scenes.COLORS)], dim=-1)
        filled = batch.cells[..., 0] > 0
        probe_loss = nn.functional.cross_entropy(kinds.flatten(0, 1), batch.cells[..., 0].flatten())
        probe_loss = probe_loss + 0.5 * nn.functional.cross_entropy(colors[filled], batch.cells[..., 1][filled])
    return answer_loss, right, probe_loss


def rate_at(step: int, steps: int) -> float:
    """Warm up over 3 %, hold, then fall linearly to a hundredth over the last 70 %."""
    warm, fall = step / (0.03 * steps), (steps - step) / (0.7 * steps)
    return max(0.01, min(1.0, warm, fall))


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks instead of returning them to the kernel, where there is a glibc.

    Otherwise every step maps and unmaps its activations anew; page faults were a third of the processor time here.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def train(out: Path, *, steps: int, rows: int, seed: int, peak: float, save_every: int, workers: int) -> None:
    """Train for `steps`; resume where `out` holds a state of the same run. Writes a usable checkpoint at every save."""
    keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    state_path = out / "training_state.pt"
    # The tokenizer is learnt on drawn scenes: a resumed run keeps its own, even where the drawing has changed since.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out) if state_path.exists() else make_tokenizer(seed)
    tokenizer.save_pretrained(out)
    learner = make_learner(tokenizer, seed)
    if state_path.exists():
        learner.restore(torch.load(state_path, weights_only=True))
        tqdm.write(f"resumed at step {learner.step}")
    data = Batches(out / "tokenizer.json", seed, steps, rows)
    loader = DataLoader(
        data, batch_size=None, sampler=range(learner.step, steps), num_workers=workers,
        prefetch_factor=4 if workers else None,
    )  # fmt: skip
    parameters = sum(p.numel() for p in learner.model.parameters())
    tqdm.write(f"{parameters} parameters, {steps} steps of {rows} pictures, seed {seed}")
    log = (out / "training_log.jsonl").open("a")
    learner.model.train()
    begun = time.monotonic()
    bar = tqdm(loader, initial=learner.step, total=steps, unit="step", smoothing=0.02)
    for batch in bar:
        rate = peak * rate_at(learner.step, steps)
        for optimizer in (learner.muon, learner.adam):
            for group in optimizer.param_groups:
                group["lr"] = rate
        answer_loss, right, probe_loss = losses(learner, batch, data.image_id)
        weight = max(0.0, 1 - learner.step / (PROBE_UNTIL * steps))
        (answer_loss + weight * probe_loss).backward()
        nn.utils.clip_grad_norm_([*learner.model.parameters(), *learner.probe.parameters()], 1.0)
        for optimizer in (learner.muon, learner.adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        learner.step += 1
        bar.set_postfix(loss=f"{answer_loss.item():.3f}", right=f"{right.item():.3f}", probe=f"{probe_loss.item():.3f}")
        if learner.step % 20 == 0:
            record = {
                "step": learner.step, "loss": round(answer_loss.item(), 4), "right": round(right.item(), 4),
                "probe": round(probe_loss.item(), 4), "rate": rate, "seconds": round(time.monotonic() - begun, 1),
            }  # fmt: skip
            log.write(json.dumps(record) + "\n")
            log.flush()
        if learner.step % save_every == 0 or learner.step == steps:
            partial = state_path.with_suffix(".partial")
            torch.save(learner.state(), partial)
            partial.replace(state_path)
            save_checkpoint(learner.model, tokenizer, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder; resumes what it finds there")
    parser.add_argument("--steps", type=int, default=2100)
    parser.add_argument("--rows", type=int, default=80, help="pictures per step")
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--peak", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes")
    arguments = vars(parser.parse_args())
    train(arguments.pop("out"), **arguments)


if __name__ == "__main__":
    main()
