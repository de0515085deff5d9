"""The dashboard in a real browser on the real service."""

import re
import sys
from collections.abc import Iterator
from uuid import UUID

import pytest
from playwright.sync_api import Browser, expect

from helpers.browser import HOSTILE, Tab, chromium, needs_chromium
from helpers.service import Service, kill

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def tab(browser: Browser, service: Service) -> Iterator[Tab]:
    """Logged in, at the list; whatever it does, its console stays silent and no request leaves the host."""
    opened = Tab(browser, service.url)
    opened.page.goto(service.client.dashboard_link())
    expect(opened.page.get_by_role("heading", name="Operations")).to_be_visible()
    yield opened
    opened.close()


def test_from_a_link_to_a_run_that_was_cancelled_and_resumed(service: Service, tab: Tab) -> None:
    page = tab.page
    assert page.url == f"{service.url}/#/"  # the code is out of the address

    page.keyboard.press("n")
    page.get_by_label("Name").fill("from the browser")
    page.get_by_label("Max epochs").fill("14")
    page.get_by_label("Checkpoint every").fill("200 steps")
    page.get_by_role("button", name="Submit").dblclick()
    expect(page.get_by_role("heading", name="from the browser")).to_be_visible()
    id = UUID(page.url.rpartition("/")[2])

    loss = page.get_by_role("img", name="loss. ").first
    expect(loss).to_have_attribute("aria-label", some_steps())
    assert loss.locator("path.js-line").count() == 1

    page.get_by_role("button", name="Cancel").click()
    page.get_by_label("Reason").fill("to see it go on")
    page.get_by_role("button", name="Cancel operation").click()
    expect(page.locator(".facts .chip")).to_have_text("cancelled")
    stopped_at = service.get(id).progress.step  # type: ignore[union-attr]

    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_role("dialog")).to_contain_text(f"goes on from step {stopped_at}")
    page.get_by_role("dialog").get_by_role("button", name="Resume").click()
    expect(page.locator(".facts .chip")).to_have_text("completed")
    expect(loss).to_have_attribute("aria-label", final_step(14 * 48))

    hostile = service.client.submit({"workload": "digits", "name": HOSTILE, "labels": {"a": HOSTILE}})
    service.client.cancel(hostile.id, HOSTILE)
    tab.go(f"/operations/{hostile.id}")
    expect(page.get_by_role("heading", name=HOSTILE).first).to_be_visible()
    assert page.locator("img").count() == 0
    assert page.evaluate("typeof hacked") == "undefined"

    assert len(list(service.client.list(q="from the browser"))) == 1  # the second click was the same wish
    moves = [name for name in service.events(id) if name != "note"]
    assert moves == ["submit", "claim", "cancel", "stop", "resume", "claim", "complete"]


SAYS_LOSS = "import sys; print('{\"step\": 0, \"loss\": %s}' % sys.argv[1].removeprefix('--rate='), flush=True)"


def test_a_study_is_one_row_and_its_page_has_its_children_and_what_they_gave(service: Service, tab: Tab) -> None:
    page = tab.page
    grid = {"type": "grid", "axes": {"args.rate": [0.5, 2]}}
    id = service.client.submit({"command": [sys.executable, "-c", SAYS_LOSS], "study": grid, "name": "two rates"}).id
    row = page.get_by_role("row", name="two rates")
    expect(row).to_contain_text("of 2 children")
    expect(page.get_by_role("link", name="rate=0.5")).to_have_count(0)

    row.get_by_role("link").click()
    expect(page.locator(".facts .chip").first).to_have_text("completed")
    children = page.get_by_role("region", name="Children, in the order of the plan")
    expect(children.get_by_role("row", name="completed")).to_have_count(2)
    expect(page.get_by_role("img", name="loss against args.rate. 0.5000 at 0.5000, 2.000 at 2.000")).to_be_visible()
    points = "(({x, y}) => x.map((rate, i) => [rate, y[i]]))(document.querySelector('.canvas').data.at(-1))"
    assert page.evaluate(points) == [[0.5, 0.5], [2, 2]]
    children.get_by_role("link").first.click()
    expect(page.get_by_role("img", name="loss. ").first).to_be_visible()
    expect(page.get_by_role("link", name=f"study {str(id)[:8]}")).to_be_visible()


CURVES = """async () => {
    const {Curve, smoothed} = await import(document.querySelector('script[type=module]').src.replace('main', 'curve'));
    const curve = new Curve('id', 'loss');
    const report = (attempt, start_step, ...points) => ({attempt, start_step, series: [{name: 'loss', points}]});
    Object.assign(curve, {loaded: true, whole: {steps: [0, 1, 2, 3], values: [4, 3, 2, 1]}, starts: [[0, 1]]});
    curve.take(report(1, 0, [3, 1], [4, 0]));
    curve.take(report(2, 2, [2, 'NaN']));
    curve.take(report(1, 0, [5, 9]));
    curve.take(report(2, 2, [3, '-Infinity']));
    const anew = curve.take(report(2, 1, [1, 0]));
    return [curve.whole.steps, curve.whole.values.map(String), curve.starts, anew, smoothed([NaN, 1, 1, 5], 0.5)];
}"""


@pytest.mark.slow
def test_a_curve_forgets_what_a_later_attempt_replaces(tab: Tab) -> None:
    steps, values, starts, read_anew, smooth = tab.page.evaluate(CURVES)
    assert (steps, values) == ([0, 1, 2, 3], ["4", "3", "NaN", "-Infinity"])
    assert starts == [[0, 1], [2, 2]]
    assert read_anew  # the attempt began elsewhere than was said
    assert smooth == [None, 1, 1, pytest.approx(23 / 7)]


SAYS_HOSTILE = f"""
import json
print("<script>hacked=1</script> \\x1b[31mred\\x1b[0m")
print("10%\\r50%\\r99%")
print(json.dumps({{"step": 1, "{HOSTILE}": 1.5, "loss": float("nan")}}), flush=True)
"""


@pytest.mark.slow
def test_whatever_things_are_called_is_text(service: Service, tab: Tab) -> None:
    page = tab.page
    job = {"command": [sys.executable, "-c", SAYS_HOSTILE], "name": HOSTILE, "labels": {HOSTILE: HOSTILE}}
    id = service.client.submit(job).id
    service.wait(id, "completed")

    page.get_by_role("link", name=HOSTILE).and_(page.locator(f"[href*='{id}']")).click()
    expect(page.get_by_role("heading", name=HOSTILE).first).to_be_visible()
    expect(page.get_by_role("img", name=f"{HOSTILE}. ")).to_be_visible()
    expect(page.get_by_text("NaN at 1 step, first at 1.")).to_be_visible()
    page.get_by_role("tab", name="logs").click()
    expect(page.get_by_role("log")).to_contain_text("<script>hacked=1</script> red\n99%\n")
    tab.go(f"/compare?ids={id},{id}")
    expect(page.get_by_role("img", name=f"{HOSTILE}. ")).to_be_visible()
    for name in ("events", "job", "artifacts", "attempts", "checkpoints"):
        tab.go(f"/operations/{id}?tab={name}")
        expect(page.get_by_role("tab", name=name)).to_have_attribute("aria-selected", "true")

    assert page.evaluate("typeof hacked") == "undefined"
    assert page.locator("img, script[src*=x]").count() == 0


@pytest.mark.slow
def test_an_attempt_that_was_killed_is_seen_where_it_ended_and_what_was_redone(service: Service, tab: Tab) -> None:
    page = tab.page
    id = service.submit(max_epochs=25)
    tab.go(f"/operations/{id}")
    service.until_saved(id, attempt=1, number=2)
    kill(service.attempts(id)[0].trainer_pid)

    track = page.get_by_role("region", name="Attempts over time")
    expect(track.get_by_text("Attempt 1 on")).to_contain_text("failed; steps 0 to")
    expect(track.get_by_text("Attempt 2 on")).to_be_attached()
    expect(page.locator(".chart").first.get_by_text("attempt 2")).to_be_visible()
    service.wait(id, "completed")
    [first, second] = service.attempts(id)
    redone = first.last_step + 1 - second.start_step  # type: ignore[operator]
    expect(page.locator(".facts .chip")).to_have_text("completed")
    if redone:
        expect(page.get_by_text(re.compile(rf"^{redone} steps? redone$"))).to_be_visible()
    # What grew before the reader's eyes, over the kill, is what there is.
    expect(page.get_by_role("img", name="loss. ").first).to_have_attribute("aria-label", final_step(25 * 48))
    drawn = page.evaluate("(({x, y}) => x.map((step, i) => [step, y[i]]))(document.querySelector('.canvas').data[0])")
    assert [tuple(point) for point in drawn] == service.curves(id)["loss"]
    page.keyboard.press("2")
    expect(page.get_by_role("row", name="trainer killed")).to_be_visible()
    assert page.evaluate("document.querySelector('.track').children.length") == 2


@pytest.mark.slow
def test_a_lost_connection_is_said_quietly_and_comes_back_by_itself(service: Service, tab: Tab) -> None:
    page = tab.page
    tab.expected += ["ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_EMPTY_RESPONSE"]
    tab.expected += ["ERR_CONNECTION_RESET"]
    id = service.submit(max_epochs=60)
    tab.go(f"/operations/{id}")
    loss = page.get_by_role("img", name="loss. ").first
    expect(loss).to_have_attribute("aria-label", some_steps())
    service.server.kill()
    service.server.close()
    expect(page.get_by_text("Connection lost")).to_be_visible()
    expect(page.get_by_role("heading", name="digits")).to_be_visible()  # what was there still is
    service.restart_server()

    expect(page.get_by_text("Connection lost")).to_have_count(0)
    expect(page.locator(".facts .chip")).to_have_text("completed")
    expect(loss).to_have_attribute("aria-label", final_step(60 * 48))


@pytest.mark.slow
def test_two_tabs_see_the_same_and_log_out_together(service: Service, tab: Tab) -> None:
    tab.expected += ["status of 401"]
    id = service.submit(max_epochs=200)
    first, second = tab.page, tab.open()
    for page in (first, second):
        page.goto(f"{service.url}/#/operations/{id}")
        expect(page.get_by_role("button", name="Cancel")).to_be_visible()
    first.keyboard.press("c")
    second.keyboard.press("c")
    for page in (first, second):
        page.get_by_role("button", name="Cancel operation").click()
        if page is first:
            expect(page.locator(".facts .chip")).to_have_text("cancelled")
    # The other one had its dialog open: it is told why nothing happens any more.
    tab.expected += ["status of 409"]
    expect(second.get_by_role("dialog").get_by_role("alert")).to_contain_text("not cancellable")
    second.keyboard.press("Escape")
    expect(second.locator(".facts .chip")).to_have_text("cancelled")

    first.get_by_role("button", name="Log out").click()
    for page in (first, second):
        expect(page.get_by_role("heading", name="Log in to Relight")).to_be_visible()
    assert second.url.endswith(f"/#/operations/{id}")
    second.get_by_label("Or a token").fill("wrong")
    second.keyboard.press("Enter")
    expect(second.get_by_role("alert")).to_contain_text("no token of a user here")
    second.get_by_label("Or a token").fill(service.token)
    second.keyboard.press("Enter")
    expect(second.locator(".facts .chip")).to_have_text("cancelled")  # where it was


@pytest.mark.slow
def test_a_link_works_once(service: Service, browser: Browser) -> None:
    link = service.client.dashboard_link()
    used, late = Tab(browser, service.url), Tab(browser, service.url)
    late.expected += ["status of 401"]
    used.page.goto(link)
    expect(used.page.get_by_role("heading", name="Operations")).to_be_visible()
    late.page.goto(link)
    expect(late.page.get_by_role("alert")).to_contain_text("ops dashboard")
    assert late.page.url == f"{service.url}/#/"
    used.close()
    late.close()


@pytest.mark.slow
def test_output_is_followed_and_the_page_keeps_a_part_of_it(service: Service, tab: Tab) -> None:
    page = tab.page
    program = "import sys\nfor i in range(20000): print(f'line {i}', '.' * 60)\nprint('the end', flush=True)"
    id = service.client.submit({"command": [sys.executable, "-c", program]}).id
    tab.go(f"/operations/{id}?tab=logs")
    log = page.get_by_role("log")
    expect(log).to_contain_text("the end\n")
    assert len(log.text_content() or "") < 700_000
    newest = log.text_content() or ""

    page.get_by_role("button", name="Earlier").click()
    expect(log).not_to_have_text(newest)
    assert (log.text_content() or "").endswith("the end\n")
    expect(page.get_by_label("Follow")).not_to_be_checked()


@pytest.mark.slow
def test_a_fork_is_tried_dry_then_made(service: Service, tab: Tab, undisturbed_id: UUID) -> None:
    page = tab.page
    tab.expected += ["status of 422"]
    tab.go(f"/operations/{undisturbed_id}?tab=checkpoints")
    page.get_by_role("button", name=re.compile("Fork from step")).first.click()
    page.get_by_label("Max epochs").fill("-3")
    page.get_by_role("button", name="Dry run").click()
    expect(page.get_by_label("Max epochs")).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_role("alert")).to_contain_text("max_epochs")
    page.get_by_label("Max epochs").fill("14")
    page.get_by_label("Name").fill("a fork of the browser")
    page.get_by_role("button", name="Dry run").click()
    expect(page.get_by_text("This is what would run")).to_be_visible()
    expect(page.locator("#answer pre")).to_contain_text('"max_epochs": 14')
    assert not list(service.client.list(q="a fork of the browser"))

    page.get_by_role("button", name="Fork", exact=True).click()
    expect(page.get_by_role("heading", name="a fork of the browser")).to_be_visible()
    expect(page.get_by_text("a fork of", exact=False).first).to_be_visible()
    expect(page.locator(".facts .chip")).to_have_text("completed")


@pytest.mark.slow
def test_a_worker_is_drained_and_takes_work_again(service: Service, tab: Tab) -> None:
    page = tab.page
    [name, *_] = [worker.name for worker in service.workers]
    tab.go("/workers")
    page.get_by_role("button", name=f"Drain {name}", exact=True).click()
    expect(page.get_by_role("dialog")).to_contain_text("What runs there finishes")
    page.get_by_role("dialog").get_by_role("button", name="Drain").click()
    expect(page.get_by_text("draining")).to_be_visible()
    assert [worker.draining for worker in service.client.workers() if worker.name == name and worker.live] == [True]
    page.get_by_role("button", name=f"Undrain {name}").click()
    expect(page.get_by_text("draining")).to_have_count(0)


@pytest.mark.slow
def test_all_of_it_by_keyboard(service: Service, tab: Tab, undisturbed_id: UUID) -> None:
    page = tab.page
    keys, focused = page.keyboard, page.locator(":focus")
    keys.press("Tab")
    expect(focused).to_have_text("Skip to the content")
    keys.press("Enter")
    expect(page.locator("main")).to_be_focused()
    keys.press("?")
    expect(page.get_by_role("dialog", name="Keyboard")).to_be_visible()
    keys.press("Escape")
    keys.press("/")
    expect(focused).to_have_attribute("type", "search")
    keys.type(str(undisturbed_id)[:8])
    expect(page.locator("td.name a")).to_have_count(1)
    keys.press("Escape")
    page.locator("h1").click()
    keys.press("j")
    keys.press("Enter")
    expect(page.get_by_role("tab", name="curves")).to_be_visible()
    page.get_by_role("tab", name="curves").focus()
    keys.press("ArrowRight")
    expect(page.get_by_role("tab", name="attempts")).to_be_focused()
    keys.press("7")
    expect(page.get_by_role("link", name="model.safetensors")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="model.safetensors").focus()
        keys.press("Enter")
    assert download.value.suggested_filename == "model.safetensors"
    keys.press("f")
    expect(page.get_by_role("heading", name="Fork")).to_be_visible()
    keys.press("o")
    expect(page.get_by_role("heading", name="Operations")).to_be_visible()


@pytest.mark.slow
def test_a_hidden_tab_asks_nothing_and_what_is_unchanged_is_not_sent_again(service: Service, tab: Tab) -> None:
    tab.page.clock.install()
    with tab.page.expect_response(lambda answer: answer.status == 304):
        tab.page.reload()
    asked: list[str] = []
    tab.hide(True)
    tab.page.on("request", lambda request: asked.append(request.url))
    tab.page.clock.run_for("01:00")
    tab.page.evaluate("fetch('/health/live')")
    assert asked == [f"{tab.url}/health/live"]
    with tab.page.expect_response("**/api/v1/operations?*"):
        tab.hide(False)


def some_steps() -> re.Pattern[str]:
    """Of what a curve says of itself: that it has at least ten."""
    return re.compile(r", \S+ at step \d\d+\.$")


def final_step(steps: int) -> re.Pattern[str]:
    return re.compile(rf"at step {steps - 1:,}\.$")
