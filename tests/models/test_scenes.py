"""Drawn scenes: determined by their seed, held apart from training, and asked what is true of them."""

from __future__ import annotations

import json
import random

from models.tiny_scenes import scenes


def test_a_seed_fixes_a_scene_and_its_questions() -> None:
    def draw() -> tuple[bytes, list[object]]:
        rng = random.Random("7")
        scene = scenes.draw_scene(rng)
        return scene.image.tobytes(), [ask(scene, rng) for ask in scenes.ASKERS.values()]

    assert draw() == draw()


def test_numbers_that_are_held_out_are_never_written_in_training() -> None:
    rng = random.Random(1)
    training = {scenes.draw_scene(rng, number=True).number for _ in range(300)}
    held_out = {scenes.draw_scene(rng, number=True, held_out=True).number for _ in range(300)}
    assert not any(scenes.is_held_out_number(number) for number in training)
    assert all(scenes.is_held_out_number(number) for number in held_out)


def test_unseen_phrasings_are_never_asked_in_training() -> None:
    rng = random.Random(2)
    for kind, options in scenes.PHRASINGS.items():
        words = {name: "x" for name in ("shape", "color", "some", "thing", "one", "other", "side", "choice")}
        asked = {scenes.phrase(kind, rng, **words) for _ in range(300)}
        assert options[-1].format(**words) not in asked
        assert scenes.phrase(kind, rng, unseen=True, **words) == options[-1].format(**words)


def test_answers_are_short_lower_case_and_balanced_between_yes_and_no() -> None:
    rng = random.Random(3)
    answers = []
    for _ in range(400):
        scene = scenes.draw_scene(rng, number=False)
        pair = scenes.ask_presence(scene, rng)
        assert pair
        answers.append(pair[1])
        assert scenes.caption(scene) == scenes.caption(scene).lower()
    assert 0.4 < answers.count("yes") / 400 < 0.6


def test_questions_are_answered_by_what_was_drawn() -> None:
    rng = random.Random(4)
    for _ in range(300):
        scene = scenes.draw_scene(rng, number=False)
        color = scenes.ask_color(scene, rng)
        if color:
            assert color[1] in {thing.color for thing in scene.things}
        shape = scenes.ask_shape(scene, rng)
        if shape:
            assert shape[1] in {thing.kind for thing in scene.things}
        reply = scenes.ask_json(scene, rng)
        assert reply
        value = json.loads(reply[1])
        assert value.get("count", len(scene.things)) == len(scene.things)


def test_shapes_are_where_they_are_said_to_be() -> None:
    rng = random.Random(5)
    for _ in range(100):
        scene = scenes.draw_scene(rng, number=False)
        for thing in scene.things:
            x, y = int(thing.x * scene.image.width), int(thing.y * scene.image.height)
            drawn = scene.image.getpixel((x, y))
            assert isinstance(drawn, tuple)
            assert all(abs(a - b) <= 20 for a, b in zip(drawn, scenes.COLORS[thing.color], strict=True))
