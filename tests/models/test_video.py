"""Videos are sampled, stamped and resized as transformers' SmolVLMProcessor does; see golden/make_videos.py."""

from __future__ import annotations

import io
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from models.documents import read_document
from models.errors import BadRequest, UnsupportedMedia
from models.expand import Expansion, expand, file_kind, in_words
from models.images import Grid, ImageProcessing, decode_image, tile_frame
from models.prompt import PromptRenderer
from models.request import AnswerRequest, ImagePart, Message, Part, TextPart, VideoPart
from models.tokenizer import TextTokenizer
from models.video import read_video, sample_indices

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
CHECKPOINT = HERE.parents[1] / "models" / "tiny_scenes" / "checkpoint"
CLIPS = ["short.mp4", "long.mp4", "clip.webm", "clip.gif"]
TINY = ImageProcessing(longest_edge=128, tile_px=64, auto_tile_px=256)


@pytest.fixture(scope="module")
def golden() -> Iterator[Any]:
    with np.load(GOLDEN / "videos.npz") as arrays:
        yield arrays


def conversation(name: str, golden: Any) -> AnswerRequest:
    """The golden conversation, its video not yet expanded."""

    def part(content: dict[str, str]) -> Part:
        is_video = content["type"] == "video"
        return VideoPart(data=(GOLDEN / name).read_bytes()) if is_video else TextPart(text=content["text"])

    turns = json.loads(str(golden[f"{name}/conversation"]))
    return AnswerRequest(
        messages=tuple(Message(role=turn["role"], parts=tuple(map(part, turn["content"]))) for turn in turns)
    )


def expanded(name: str, golden: Any) -> AnswerRequest:
    return expand(conversation(name, golden), Expansion(frame_edge_px=TINY.tile_px))


@pytest.mark.parametrize("name", CLIPS)
def test_the_token_ids_of_a_conversation_with_a_video_equal_the_reference(name: str, golden: Any) -> None:
    request = expanded(name, golden)
    renderer = PromptRenderer.from_folder(CHECKPOINT, TextTokenizer(CHECKPOINT / "tokenizer.json"), 16)
    ids = renderer.ids(request.messages, [Grid(0, 0)] * len(request.images))
    assert ids == golden[f"{name}/ids"].tolist()


@pytest.mark.parametrize("name", CLIPS)
def test_the_same_frames_are_taken_at_the_same_times(name: str, golden: Any) -> None:
    stamps = [image.origin.timestamp_s for image in expanded(name, golden).images if image.origin]
    assert stamps == pytest.approx(golden[f"{name}/timestamps"].tolist(), abs=0.001)


@pytest.mark.parametrize("name", CLIPS)
def test_pixels_equal_the_reference_within_two_levels(name: str, golden: Any) -> None:
    """Two levels, not one: torch rounds its BICUBIC weights more coarsely than Pillow, in each of two resizes."""
    theirs = golden[f"{name}/pixels"]  # of the first frames
    frames = expanded(name, golden).images[: len(theirs)]
    tiles = [tile_frame(decode_image(part.data).image, TINY).pixels[0] for part in frames]
    difference = np.abs(np.round((np.stack(tiles) + 1) * 127.5) - theirs)
    assert difference.max() <= 2
    assert difference.mean() < 0.05


def every_frame(data: bytes) -> list[np.ndarray[Any, Any]]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("name", CLIPS)
def test_frames_reached_from_key_frames_are_those_of_decoding_it_all(name: str, golden: Any) -> None:
    data = (GOLDEN / name).read_bytes()
    frames = every_frame(data)
    height, width = frames[0].shape[:2]
    video = read_video(data, longest_edge=max(width, height))  # the frames' own size: resizing copies
    assert (video.width, video.height) == (width, height)
    for frame, index in zip(video.frames, golden[f"{name}/indices"].tolist(), strict=True):
        np.testing.assert_array_equal(np.asarray(frame.image), frames[index])


def clip(codec: str = "mpeg4", container: str = "mp4", *, frames: int = 3, fps: int = 1, gap: int = 1) -> bytes:
    """A small video whose frames are `gap` frame times apart."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for number in range(frames):
            pixels = np.full((32, 64, 3), number * 50, np.uint8)
            pixels[:8, :8] = 255  # a corner that tells up from down
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number * gap
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def test_a_video_that_lies_on_its_side_is_shown_upright() -> None:
    data = clip()
    plain = (65536).to_bytes(4, "big")
    upright = plain + bytes(12) + plain  # a, b, u, c, d of the track header's matrix
    clockwise = bytes(4) + plain + bytes(4) + (-65536 % 2**32).to_bytes(4, "big") + bytes(4)
    at = data.index(upright, data.index(b"tkhd"))
    turned = data[:at] + clockwise + data[at + 20 :]
    video = read_video(turned, longest_edge=64)
    assert (video.width, video.height) == (32, 64)
    straight = np.asarray(read_video(data, longest_edge=64).frames[1].image)
    np.testing.assert_array_equal(np.asarray(video.frames[1].image), np.rot90(straight, -1))


@pytest.mark.parametrize(
    ("total", "fps", "count"), [(1, 1000.0, 1), (10, 100.0, 1), (90, 30.0, 3), (2000, 24.0, 64), (10**5, 30.0, 64)]
)
def test_a_frame_a_second_is_taken_and_64_at_most(total: int, fps: float, count: int) -> None:
    indices = sample_indices(total, fps=fps, duration_s=total / fps)
    assert len(indices) == count
    assert indices == sorted(set(indices))
    assert 0 <= indices[0] <= indices[-1] < total


def test_the_first_and_last_second_of_a_long_video_are_left_out() -> None:
    assert sample_indices(700, fps=10.0, duration_s=70.0)[::63] == [10, 690]
    assert sample_indices(600, fps=10.0, duration_s=60.0)[::59] == [0, 599]


def test_numbers_are_written_in_words() -> None:
    assert [in_words(number) for number in (1, 12, 20, 21, 45, 64)] == [
        "one", "twelve", "twenty", "twenty-one", "forty-five", "sixty-four",
    ]  # fmt: skip


def test_a_file_is_told_by_its_first_bytes() -> None:
    clips = {name: (GOLDEN / name).read_bytes() for name in CLIPS}
    assert [file_kind(clips[name]) for name in CLIPS] == ["video", "video", "video", "image"]
    assert file_kind(b"\x00\x00\x00\x18ftypheic" + bytes(8)) == "image"
    assert [file_kind(head) for head in (b"%PDF-1.4", b"II*\x00", b"MM\x00*")] == ["document"] * 3


@pytest.mark.parametrize("name", CLIPS)
def test_whatever_bytes_are_damaged_the_video_is_read_or_refused(name: str) -> None:
    data, rng = (GOLDEN / name).read_bytes(), random.Random(5)
    refused = 0
    for _ in range(40):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 60)):
            damaged[rng.randrange(12, min(len(data), 6000))] = rng.randrange(256)
        try:
            assert read_video(bytes(damaged), longest_edge=64).frames
        except BadRequest:
            refused += 1
    assert refused


def test_without_its_extra_a_file_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    data = clip()
    for package in ("av", "pypdfium2"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UnsupportedMedia, match=r"pip install 'nearfar\[video\]'"):
        read_video(data, longest_edge=64)
    with pytest.raises(UnsupportedMedia, match=r"pip install 'nearfar\[documents\]'"):
        read_document(b"%PDF-1.7", longest_edge=64)


def test_expanding_leaves_a_request_without_media_files_alone() -> None:
    request = AnswerRequest(messages=(Message(role="user", parts=(ImagePart(data=b"x"), TextPart(text="?"))),))
    assert expand(request, Expansion()) is request
