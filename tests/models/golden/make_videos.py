"""Makes the clips beside it and `videos.npz`: what transformers' own SmolVLMProcessor makes of them.

The processor needs torchvision, which does not load beside the CPU build of torch, so this runs in an environment of
its own, made from the one of the tests, and the results are committed. From the root of the repository:

    python3 -m venv golden-env
    golden-env/bin/pip install num2words==0.5.14 docopt
    golden-env/bin/pip install --no-deps torchvision==0.28.0
    realpath .venv-test/lib/python3.*/site-packages > $(echo golden-env/lib/python3.*/site-packages)/tests.pth
    golden-env/bin/python tests/models/golden/make_videos.py

An MP4 is read by the reference's own PyAV reader. That one takes the count of frames from the header, where WebM and
GIF have none, so their frames are decoded from first to last here, and the reference samples them.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

# The operators that torchvision compiles are not needed; that they have been declared is.
declared = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from transformers import PreTrainedTokenizerFast, SmolVLMProcessor  # noqa: E402
from transformers.models.idefics3.image_processing_idefics3 import Idefics3ImageProcessor  # noqa: E402
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor  # noqa: E402
from transformers.video_utils import VideoMetadata, read_video_pyav  # noqa: E402

HERE = Path(__file__).parent
CHECKPOINT = HERE.parents[2] / "models" / "tiny_scenes" / "checkpoint"
TILE_PX = 64
KEPT_FRAMES = 6  # whose pixels are stored
CLIPS = {
    # Name: codec, pixel format, size, frames, frames a second, encoder options.
    "short.mp4": ("libx264", "yuv420p", (112, 64), 60, 12, {"g": "25", "crf": "28"}),
    "long.mp4": ("libx264", "yuv420p", (48, 64), 320, 4, {"g": "50", "crf": "30"}),
    "clip.webm": ("libvpx-vp9", "yuv420p", (64, 64), 75, 25, {"g": "20", "crf": "40", "b": "0"}),
    "clip.gif": ("gif", "rgb8", (40, 30), 24, 10, {}),
}
CONVERSATIONS = {
    "short.mp4": [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]}],
    "long.mp4": [
        {"role": "system", "content": [{"type": "text", "text": "Be short."}]},
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Describe the video."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A square moves."}]},
        {"role": "user", "content": [{"type": "text", "text": "Where to?"}]},
    ],
    "clip.webm": [{"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "video"}]}],
    "clip.gif": [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Why?"}]}],
}


def make_clip(path: Path) -> None:
    """A bright square that crosses a gradient; every frame is another."""
    codec, pixel_format, (width, height), frames, fps, options = CLIPS[path.name]
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        for number in range(frames):
            pixels = np.empty((height, width, 3), np.uint8)
            pixels[..., 0] = np.linspace(0, 200, width)[None, :]
            pixels[..., 1] = np.linspace(200, 20, height)[:, None]
            pixels[..., 2] = number * 255 // frames
            left, top = number * 3 % (width - 12), number * 2 % (height - 12)
            pixels[top : top + 12, left : left + 12] = (255, 240, number * 7 % 256)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def make_processor() -> Any:
    videos = SmolVLMVideoProcessor(
        size={"longest_edge": TILE_PX},
        max_image_size={"longest_edge": TILE_PX},
        video_sampling={"fps": 1, "max_frames": 64, "video_size": {"longest_edge": TILE_PX}},
        resample=1,  # LANCZOS, as published; it takes BICUBIC instead, and says so
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return SmolVLMProcessor(
        Idefics3ImageProcessor(), PreTrainedTokenizerFast.from_pretrained(CHECKPOINT), videos, image_seq_len=16
    )


SmolVLMProcessor.image_processor_class = "Idefics3ImageProcessor"  # the same, and needs no torchvision


def read(path: Path, processor: Any) -> tuple[np.ndarray, VideoMetadata]:
    """The sampled frames, uint8 [frame, height, width, 3], and what the reference knows of them."""
    sample = partial(processor.video_processor.sample_frames, num_frames=64, fps=1)
    if path.suffix == ".mp4":
        return read_video_pyav(str(path), lambda metadata, **_: sample(metadata=metadata))
    with av.open(path) as container:
        fps = float(container.streams.video[0].average_rate)
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    metadata = VideoMetadata(total_num_frames=len(frames), fps=fps, duration=len(frames) / fps)
    metadata.frames_indices = sample(metadata=metadata)
    return frames[metadata.frames_indices], metadata


def main() -> None:
    processor = make_processor()
    arrays: dict[str, np.ndarray] = {}
    for name, conversation in CONVERSATIONS.items():
        make_clip(HERE / name)
        frames, metadata = read(HERE / name, processor)
        text = processor.apply_chat_template(conversation, add_generation_prompt=True)
        found = processor(
            text=text,
            videos=[[frames]],
            video_metadata=[metadata],
            do_sample_frames=False,
            add_special_tokens=False,
            return_tensors="pt",
        )
        pixels = found["pixel_values"][0, :KEPT_FRAMES].numpy()  # [frame, channel, height, width], -1 to 1
        arrays[f"{name}/ids"] = found["input_ids"][0].numpy().astype(np.int32)
        arrays[f"{name}/indices"] = np.array(metadata.frames_indices, np.int32)
        arrays[f"{name}/timestamps"] = np.array(metadata.timestamps)
        arrays[f"{name}/pixels"] = np.round((pixels + 1) * 127.5).astype(np.uint8)
        arrays[f"{name}/conversation"] = np.array(json.dumps(conversation))
    np.savez_compressed(HERE / "videos.npz", **arrays)


if __name__ == "__main__":
    main()
