"""The page in a real browser against the real service. Two tests answer `POST /compare` themselves, as each says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import expect

pytestmark = [pytest.mark.browser, pytest.mark.enable_socket, pytest.mark.timeout(300)]

OpenPage = Callable[..., Any]
TARGETS = ["local/tiny-scenes@int8", "local/tiny-scenes@fp32"]
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
DURATION = re.compile(r"[\d.,]+ m?s")
MISSING = "not measured"

# The lowest contrast of any text that shows, by WCAG 2: [ratio, that text]. Disabled controls are exempt there too.
LOWEST_CONTRAST = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => channels(color).slice(0, 3).map((level) => level / 255)
    .map((level) => (level <= 0.04045 ? level / 12.92 : ((level + 0.055) / 1.055) ** 2.4))
    .reduce((sum, level, at) => sum + level * [0.2126, 0.7152, 0.0722][at], 0);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if ((channels(color)[3] ?? 1) === 1) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const shown = [...document.querySelectorAll("body *")].filter((element) => element.checkVisibility()
    && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
  return shown.map((element) => {
    const [a, b] = [light(getComputedStyle(element).color), light(ground(element))];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.textContent];
  }).reduce((low, next) => (next[0] < low[0] ? next : low));
}"""


def choose_sample(page: Any, at: int = 0) -> None:
    page.locator(".sample").nth(at).click()
    page.locator("#preview").wait_for()


def wait_for_verdict(page: Any) -> None:
    page.locator(".verdict:visible").wait_for()


def card(page: Any, target: str) -> Any:
    return page.get_by_role("article", name=target)


def slot(page: Any, target: str, name: str) -> str:
    text: str = card(page, target).locator(f"[data-slot={name}]").inner_text()
    return text


def fact(page: Any, target: str, name: str) -> str:
    row = card(page, target).locator("dl > div").filter(has=page.locator(f"dt:text-is('{name}')"))
    text: str = row.locator("dd").inner_text()
    return text


def sideways_px(page: Any) -> int:
    px: int = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    return px


def test_a_sample_is_one_enter_away_from_both_answers_and_their_figures(open_page: OpenPage) -> None:
    page = open_page()
    choose_sample(page)
    assert page.locator("#question").input_value() == "What color is the circle?"
    page.locator("#question").press("Enter")
    wait_for_verdict(page)

    assert page.locator(".card h3").all_inner_texts() == TARGETS
    for target in TARGETS:
        assert slot(page, target, "state") == "Done"
        assert slot(page, target, "answer") == "red"
        assert slot(page, target, "badge") == "✓ Right"
        for name in ("First token", "Total"):
            assert DURATION.fullmatch(fact(page, target, name)), name
        assert re.fullmatch(r"160 × 160 used as 64 × 64, 1 tile, 16 tokens", fact(page, target, "Picture"))
        for name in ("Model size", "Process peak"):
            assert re.fullmatch(r"[\d.,]+ [MG]B", fact(page, target, name)), name
        assert fact(page, target, "Cost").startswith("$")
        assert "stayed on this device" in fact(page, target, "Sent")
        stages = card(page, target).locator("tbody tr")
        assert stages.count() == 5
        assert all(DURATION.fullmatch(text) for text in stages.locator("td").all_inner_texts())
        assert card(page, target).locator("[data-slot=stages] > *").count() == 5
    widths = [
        card(page, target).locator("[data-slot=total_bar]").evaluate("bar => bar.style.width") for target in TARGETS
    ]
    assert "100%" in widths
    assert sorted(fact(page, target, "Turn") for target in TARGETS) == ["first", "second"]
    assert page.locator("[data-slot=choice]").first.inner_text() == "undecided"
    assert page.locator("[data-slot=verdict_text]").first.inner_text()


def test_the_first_view_names_targets_destinations_and_the_toy(open_page: OpenPage) -> None:
    page = open_page()
    rows = page.locator("#targets label")
    assert [text.split("\n")[0] for text in rows.all_inner_texts()] == TARGETS
    assert all("stays on this device" in text for text in rows.all_inner_texts())
    assert all(box.is_checked() for box in page.locator("#targets input").all())
    assert "toy" in page.locator("#notices").inner_text()
    for box in page.locator("#targets input").all():
        box.uncheck()
    assert page.locator("#notices").inner_text() == ""


def test_everything_works_from_the_keyboard_alone(open_page: OpenPage) -> None:
    page = open_page()

    def tab_to(selector: str, key: str = "Tab") -> None:
        for _ in range(30):
            page.keyboard.press(key)
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                ring = "getComputedStyle(document.activeElement).outlineStyle"
                assert page.evaluate(ring) == "solid", f"no focus ring on {selector}"
                return
        pytest.fail(f"{selector} is not reached with {key}")

    tab_to(".sample")
    page.keyboard.press("Enter")
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.press("Shift+Enter")
    assert "\n" in page.locator("#question").input_value()
    page.keyboard.press("Backspace")
    tab_to("#targets input[value$=fp32]")
    page.keyboard.press("Space")
    tab_to("#parallel")
    tab_to("#ask")
    page.keyboard.press("Space")
    wait_for_verdict(page)
    assert page.locator(".card h3").all_inner_texts() == TARGETS[:1]
    assert slot(page, TARGETS[0], "answer") == "red"


def test_arms_that_ran_together_are_marked_as_no_measurement(open_page: OpenPage) -> None:
    page = open_page()
    choose_sample(page)
    page.locator("#parallel").check()
    page.locator("#ask").click()
    wait_for_verdict(page)
    assert all("no measurement" in slot(page, target, "remarks") for target in TARGETS)


def test_files_that_cannot_be_sent_are_refused_with_the_reason(open_page: OpenPage) -> None:
    page = open_page()

    def refusal(name: str, mime: str, content: str = "", zeros: int = 0) -> str:
        page.locator("#file").evaluate(
            """(input, [name, type, content, zeros]) => {  // made over there: a large file is slow to hand to a browser
              const chosen = new DataTransfer();
              chosen.items.add(new File([content, new Uint8Array(zeros)], name, { type }));
              input.files = chosen.files;
              input.dispatchEvent(new Event("change"));
            }""",
            [name, mime, content, zeros],
        )
        expect(page.locator("#message")).to_have_text(re.compile("^" + re.escape(name)))
        assert not page.locator("#preview").is_visible()
        text: str = page.get_by_role("alert").inner_text()
        return text

    assert (
        refusal("notes.txt", "text/plain", "x") == "notes.txt is text/plain. Choose a JPEG, PNG, WebP or GIF picture."
    )
    assert "at most 20 MB" in refusal("large.png", "image/png", zeros=20_000_001)
    assert "empty" in refusal("nothing.png", "image/png")
    assert "could not be read" in refusal("damaged.png", "image/png", "no picture at all")


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        ("short.mp4", r"5 frames of 112 × 64 used as 64 × 64, 1 tile, 16 tokens each"),
        ("page.pdf", r"page 1 of 1: 128 × 128 used as .*"),
    ],
)
def test_a_video_and_a_document_are_asked_about_like_a_picture(
    open_page: OpenPage, tmp_path: Path, file: str, shown: str
) -> None:
    Image.new("RGB", (128, 128), "red").save(tmp_path / "page.pdf")
    golden = Path(__file__).parents[1] / "models" / "golden"
    page = open_page()
    page.locator("#file").set_input_files((golden if file.endswith("mp4") else tmp_path) / file)
    assert page.locator("#drop_title").inner_text() == f"{file}: choose another"
    page.locator("#question").fill("What color is the circle?")
    page.locator("#question").press("Enter")
    wait_for_verdict(page)
    for target in TARGETS:
        assert re.fullmatch(shown, fact(page, target, "Picture"))


def test_what_is_missing_is_asked_for_and_focused(open_page: OpenPage) -> None:
    page = open_page()
    page.locator("#ask").click()
    assert "Choose a picture" in page.get_by_role("alert").inner_text()
    assert page.evaluate("document.activeElement.id") == "file"
    choose_sample(page)
    page.locator("#question").fill("  ")
    page.locator("#ask").click()
    assert page.get_by_role("alert").inner_text() == "Type a question."


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_picture_can_be_dropped_and_pasted(open_page: OpenPage, way: str) -> None:
    page = open_page()
    choose_sample(page)
    page.evaluate(
        """async (way) => {
          const blob = await (await fetch("/samples/wide.png")).blob();
          const files = new DataTransfer();
          files.items.add(new File([blob], "own.png", { type: "image/png" }));
          const event = way === "drop"
            ? new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true })
            : new ClipboardEvent("paste", { clipboardData: files, bubbles: true, cancelable: true });
          document.getElementById("drop").dispatchEvent(event);
        }""",
        way,
    )
    page.get_by_alt_text("Chosen picture: own.png").wait_for()
    expect(page.locator("#preview")).to_have_js_property("naturalWidth", 320)
    assert page.locator("#question").input_value() == "", "the sample's question is not about this picture"
    assert page.locator(".sample[aria-pressed=true]").count() == 0
    page.locator("#question").fill("Describe the image.")
    page.locator("#question").press("Enter")
    wait_for_verdict(page)
    assert fact(page, TARGETS[0], "Picture").startswith("320 × 200 used as 128 × 64, ")
    assert not card(page, TARGETS[0]).locator("[data-slot=badge]").is_visible(), "nothing says what is right"


def test_a_phone_needs_no_sideways_scrolling(open_page: OpenPage) -> None:
    page = open_page(**PHONE)
    assert sideways_px(page) <= 0
    choose_sample(page, 5)
    page.locator("#ask").click()
    wait_for_verdict(page)
    assert sideways_px(page) <= 0
    small = page.evaluate(
        "[...document.querySelectorAll('button')].filter(b => b.checkVisibility() && b.offsetHeight < 44).length"
    )
    assert small == 0, "a finger needs 44 px"


def test_all_text_is_legible_in_light_and_dark(open_page: OpenPage) -> None:
    grounds = set()
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        choose_sample(page)
        page.locator("#ask").click()
        wait_for_verdict(page)
        expect(page.locator("#ask")).to_have_attribute("aria-disabled", "false")
        page.mouse.move(0, 0)
        ratio, text = page.evaluate(LOWEST_CONTRAST)
        assert ratio >= 4.5, f"{scheme}: {text}"
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2


@pytest.mark.parametrize(("motion", "expected"), [("reduce", ["auto", "0s"]), ("no-preference", ["smooth", "0.25s"])])
def test_nothing_moves_for_those_who_want_less_motion(open_page: OpenPage, motion: str, expected: list[str]) -> None:
    page = open_page(reduced_motion=motion)
    choose_sample(page)
    page.locator("#ask").click()
    wait_for_verdict(page)
    bar = page.locator("[data-slot=total_bar]").first
    scrolling = page.evaluate("getComputedStyle(document.documentElement).scrollBehavior")
    assert [scrolling, bar.evaluate("bar => getComputedStyle(bar).transitionDuration")] == expected


def test_markup_in_an_answer_or_a_verdict_stays_text(open_page: OpenPage) -> None:
    """The service's answer is replaced: no model can be made to say this on demand."""
    page = open_page()
    attack = "<img src=x onerror='window.harmed = true'><b>bold</b>"
    result = {
        "ok": True, "target": TARGETS[0], "order": 0, "contended": False, "text": attack, "finish_reason": "stop",
        "usage": {}, "timings": {"total_ms": None}, "images": [], "memory": {"model_bytes": None},
        "egress": {"left_device": True, "bytes_sent": 1234, "destination": "example.test:443"},
        "cost": {"usd": None, "basis": attack}, "correct": None,
    }  # fmt: skip
    failure = {"ok": False, "target": TARGETS[1], "order": 1, "error": {"message": attack, "request_id": "req_1"}}
    verdict = {"choice": attack, "text": attack, "reasons": [attack]}
    events = [
        ("delta", {"target": TARGETS[0], "text": attack}),
        ("finished", result),
        ("error", failure),
        ("comparison", {"id": attack, "results": [result, failure], "verdict": verdict}),
    ]
    body = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)
    page.route("**/compare", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    choose_sample(page)
    page.locator("#question").press("Enter")
    wait_for_verdict(page)

    assert slot(page, TARGETS[0], "answer") == attack
    assert slot(page, TARGETS[1], "error") == f"{attack} (request req_1)"
    assert slot(page, TARGETS[1], "state") == "Failed"
    assert page.locator("[data-slot=verdict_text]").first.inner_text() == attack
    assert page.locator("#live img, #live b").count() == 0
    assert page.evaluate("window.harmed") is None
    # A figure that is null is never shown as 0.
    for name in ("Total", "Model size", "Picture", "Tokens"):
        assert fact(page, TARGETS[0], name) == MISSING
    assert fact(page, TARGETS[0], "Cost").startswith("not known")
    assert fact(page, TARGETS[0], "Sent") == "1.2 kB of request body to example.test:443; the input left this device"


def test_stop_ends_a_comparison_that_is_under_way(open_page: OpenPage) -> None:
    """The request is held back: the real answers are there before a hand could stop them."""
    page = open_page()
    held: list[Any] = []
    page.route("**/compare", lambda route: held.append(route))
    choose_sample(page)
    page.locator("#question").press("Enter")
    assert slot(page, TARGETS[0], "state") == "Waiting"
    page.get_by_role("button", name="Stop").click()
    page.locator("#stop").wait_for(state="hidden")
    assert [slot(page, target, "state") for target in TARGETS] == ["Stopped", "Stopped"]
    assert page.get_by_role("status").inner_text() == "Stopped."
    assert page.evaluate("document.activeElement.id") == "ask"
    held.pop().abort()  # nothing is left waiting when the browser closes


def test_events_are_read_however_the_bytes_are_cut(open_page: OpenPage) -> None:
    page = open_page()
    stream = (
        '\ufeff: a comment\r\n\r\nevent: delta\r\ndata: {"é": "日本\U0001f600"}\r\n\r\n'
        "data:first\ndata: second\nid: 7\nretry: 5\n\nevent: none\n\nevent: end\rdata\r\r"
    )
    expected = [
        {"event": "delta", "data": '{"é": "日本\U0001f600"}'},
        {"event": "message", "data": "first\nsecond"},
        {"event": "end", "data": ""},
    ]
    read = page.evaluate(
        """async (text) => {
          const { readEvents } = await import("/page/sse.js");
          const all = [];
          for (const end of ["", "data: never closed", "data: never closed\\n"]) {
            const bytes = new TextEncoder().encode(text + end);
            for (let size = 1; size <= bytes.length; size += 1) {
              const stream = new ReadableStream({ start(controller) {
                for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
                controller.close();
              } });
              const events = [];
              for await (const event of readEvents(stream)) events.push(event);
              all.push(events);
            }
          }
          return all;
        }""",
        stream,
    )
    assert len(read) > 3 * len(stream)
    assert all(events == expected for events in read)


def test_figures_are_written_with_their_units(open_page: OpenPage) -> None:
    page = open_page()
    cases: list[tuple[str, Any, Any]] = [
        ("milliseconds", 0, "0 ms"),
        ("milliseconds", 7.356, "7.36 ms"),
        ("milliseconds", 42.31, "42.3 ms"),
        ("milliseconds", 812.4, "812 ms"),
        ("milliseconds", 999.7, "1.00 s"),
        ("milliseconds", 12345, "12.35 s"),
        ("milliseconds", None, None),
        ("bytes", 0, "0 bytes"),
        ("bytes", 1, "1 byte"),
        ("bytes", 5_210_000, "5.2 MB"),
        ("bytes", 999_999, "1 MB"),
        ("bytes", 2_640_000_000, "2.6 GB"),
        ("bytes", None, None),
        ("dollars", 0, "$0"),
        ("dollars", 0.000413, "$0.000413"),
        ("dollars", 1.5, "$1.50"),
        ("dollars", None, None),
        ("joules", {"joules": 3.21, "idle_joules": 11.4}, "3.2 J, beyond 11 J of idling"),
        ("joules", {"joules": None, "idle_joules": None}, None),
        ("joules", None, None),
        ("rate", 1400.4, "1,400"),
        ("rate", None, None),
        ("tokens", {"prompt_tokens": None}, None),
        ("tokens", {"prompt_tokens": 31, "image_tokens": 16, "cached_tokens": 0, "completion_tokens": 1},
         "31 in the prompt (16 of the picture, 0 cached), 1 in the answer"),
        ("tokens", {"prompt_tokens": 31, "cache_write_tokens": 9, "completion_tokens": 12, "thinking_tokens": 10},
         "31 in the prompt (9 written to a cache), 12 in the answer (10 of thinking)"),
        ("imageReport", {"width": 640, "height": 480, "used_width": None},
         "640 × 480, what was used of it is not reported"),
        ("egress", {"left_device": False, "bytes_sent": 0, "destination": None},
         "nothing; the input stayed on this device"),
        ("egress", {"left_device": False, "bytes_sent": None, "destination": "127.0.0.1:8001"},
         "an unmeasured number of bytes of request body to 127.0.0.1:8001, on this device; the input did not leave it"),
        ("egress", {"left_device": True, "bytes_sent": 1200, "destination": "a:443",
                    "withheld": {"pixels": 5000, "bytes": 90, "metadata_bytes": 20}},
         "1.2 kB of request body to a:443; the input left this device; "
         "5,000 pixels and 20 bytes of metadata stayed here"),
        ("stageShares", {"vision_ms": 3, "prefill_ms": 1, "decode_ms": None},
         [["vision_ms", 0.75], ["prefill_ms", 0.25]]),
    ]  # fmt: skip
    written = page.evaluate(
        """async (cases) => {
          const format = await import("/page/format.js");
          return cases.map(([name, value]) => format[name](value));
        }""",
        [[name, value] for name, value, _ in cases],
    )
    assert written == [expected for _, _, expected in cases]
