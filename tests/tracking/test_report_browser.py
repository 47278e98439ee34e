"""The report in a real browser: it renders in light and dark, runs without errors, and asks the network for nothing."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from fake_runs import write_pipeline

from distllm.testing.gloo import patient
from distllm.tracking.report import write_report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    run = write_pipeline(folder / "demo", chain=[("pretrain", 1), ("sft", 1), ("ppo", 1)])
    return write_report([run], folder / "report.html")


def browse(page, tmp_path, *flags):
    """Open `page` headless and return (stdout, stderr, the URLs that the page requested)."""
    net_log = tmp_path / "net.json"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-default-apps", "--disable-extensions", "--hide-scrollbars", "--window-size=1440,900",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={net_log}",
        "--enable-logging=stderr", "--virtual-time-budget=2000", *flags, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=patient(120))
    params = [event.get("params", {}) for event in json.loads(net_log.read_text())["events"]]
    # The browser's own errands, and the page itself, have no document as their initiator.
    asked = {p["url"] for p in params if p.get("initiator", "not an origin") != "not an origin"}
    return done.stdout, done.stderr, asked


def test_dom_is_complete_and_quiet(report, tmp_path):
    dom, errors, urls = browse(report, tmp_path, "--dump-dom")
    assert "<h1>demo</h1>" in dom
    assert dom.count('class="pill yes"') == 8
    assert dom.count("<svg") == dom.count("data-plot=") > 20
    assert "Kneser-Ney 5-gram is ahead" in dom
    assert "CONSOLE" not in errors
    assert urls == set()


def test_errors_of_the_page_would_be_seen(report, tmp_path):
    """The two checks above can fail: a page that throws and loads an image from elsewhere is caught."""
    source = report.read_text().replace("default-src 'none'", "default-src 'none'; img-src http:")
    bad = tmp_path / "bad.html"
    bad.write_text(
        re.sub(r"img-src data:", "", source).replace(
            "</body>", "<img src='http://127.0.0.1:9/x.png'><script>nothing.here()</script></body>"
        )
    )
    _, errors, urls = browse(bad, tmp_path, "--dump-dom")
    assert "CONSOLE" in errors and "nothing is not defined" in errors
    assert urls == {"http://127.0.0.1:9/x.png"}


@pytest.mark.parametrize(("scheme", "dark"), [(1, False), (0, True)])
def test_first_screen_is_drawn_in_both_themes(report, tmp_path, scheme, dark):
    from PIL import Image

    shot = tmp_path / "shot.png"
    browse(
        report, tmp_path, f"--screenshot={shot}", f"--blink-settings=preferredColorScheme={scheme}"
    )
    image = Image.open(shot).convert("RGB")
    assert image.size == (1440, 900)
    pixels = np.asarray(image).astype(int)
    background = pixels[5, 5].mean()
    assert background < 40 if dark else background > 220
    lightness = pixels.mean(2)
    inked = np.abs(lightness - background) > 60
    assert 0.005 < inked.mean() < 0.3  # text and lines, but neither blank nor covered
    rows = inked.any(1)
    assert np.diff(np.flatnonzero(rows)).max() < 120  # content all the way down


def test_curves_are_drawn_in_the_colours_of_the_theme(report, tmp_path):
    from PIL import Image

    found = {}
    for scheme in (0, 1):
        shot = tmp_path / f"{scheme}.png"
        browse(
            report,
            tmp_path,
            f"--screenshot={shot}",
            "--window-size=1440,2400",
            f"--blink-settings=preferredColorScheme={scheme}",
        )
        found[scheme] = np.asarray(Image.open(shot).convert("RGB"))[600:]
    css = report.read_text()
    light, dark = (
        tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in re.findall(r"--c1: (#\w{6})", css)
    )
    counts = {
        (scheme, color): int((pixels == color).all(-1).sum())
        for scheme, pixels in found.items()
        for color in (light, dark)
    }
    assert min(counts[1, light], counts[0, dark]) > 300
    assert max(counts[1, dark], counts[0, light]) == 0


def test_pointer_shows_the_values_under_it(report, tmp_path):
    probe = """<script>
      const plot = document.querySelector(".plot"), svg = plot.querySelector("svg");
      const { box, series } = JSON.parse(plot.dataset.plot);
      const at = new DOMPoint(box[2] - 1, (box[1] + box[3]) / 2).matrixTransform(svg.getScreenCTM());
      plot.dispatchEvent(new PointerEvent("pointermove", { clientX: at.x, clientY: at.y }));
      document.body.dataset.probe = document.getElementById("tip").hidden + "|" +
        document.getElementById("tip").innerText.replace(/\\s+/g, " ") + "|" +
        series.map((one) => one.points.at(-1).join(" ")).join(" ");
    </script></body>"""
    page = tmp_path / "probe.html"
    page.write_text(report.read_text().replace("</body>", probe))
    dom, errors, _ = browse(page, tmp_path, "--dump-dom")
    assert "CONSOLE" not in errors
    hidden, shown, last = re.search(r'data-probe="([^"]*)"', dom)[1].split("|")
    train_step, train_loss, eval_step, eval_loss = map(float, last.split())
    assert hidden == "false"
    assert (train_step, eval_step) == (600, 600)
    words = shown.split()
    assert words[:2] == ["step", "600"]
    assert words[2::2] != []
    numbers = [float(word) for word in words if re.fullmatch(r"[\d.]+", word)]
    assert numbers[1:] == pytest.approx([train_loss, eval_loss], rel=1e-3)


@pytest.mark.parametrize("width", [1440, 500])
def test_nothing_is_wider_than_the_screen(report, tmp_path, width):
    probe = """<script>document.body.dataset.wide =
      document.documentElement.scrollWidth + " " + innerWidth;</script></body>"""
    page = tmp_path / "probe.html"
    page.write_text(report.read_text().replace("</body>", probe))
    dom, _, _ = browse(page, tmp_path, "--dump-dom", f"--window-size={width},900")
    content, window = map(int, re.search(r'data-wide="([^"]*)"', dom)[1].split())
    assert content <= window


BROWSE = """<script>
  const card = document.querySelector(".browse"), out = [];
  const see = () => {
    const cells = [...card.querySelectorAll("tbody tr")].map((row) => row.cells);
    out.push({
      steps: [...new Set(cells.map((c) => c[0].innerText))], rows: cells.length,
      first: cells.length ? cells[0][2].innerText : "", rewards: cells.map((c) => c[4].innerText),
      status: card.querySelector("output").innerText, step: card.querySelector("select").value,
    });
  };
  const press = (key) => card.querySelector(".scroll").dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true }));
  const set = (name, value) => {
    const control = card.querySelector("form").elements[name];
    control.value = value;
    control.dispatchEvent(new Event("input", { bubbles: true }));
  };
  see();
  press("ArrowLeft"); see();
  press("ArrowRight"); press("ArrowRight"); see();
  set("step", ""); see();
  press("PageDown"); see();
  set("order", "high"); see();
  set("find", "LANTERN"); see();
  set("find", "no such text"); see();
  const focusable = [...card.querySelectorAll("select,input,button,[tabindex]")].filter((e) => e.tabIndex === 0);
  document.body.dataset.out = JSON.stringify({ out, focusable: focusable.length });
</script></body>"""


def test_samples_are_browsed_by_step_page_order_and_text_with_the_keyboard(report, tmp_path):
    page = tmp_path / "probe.html"
    page.write_text(report.read_text().replace("</body>", BROWSE))
    dom, errors, urls = browse(page, tmp_path, "--dump-dom")
    assert "CONSOLE" not in errors and urls == set()
    found = json.loads(html.unescape(re.search(r'data-out="([^"]*)"', dom)[1]))
    start, back, end, every, second, high, lantern, none = found["out"]
    assert (start["steps"], start["rows"]) == (["60"], 7)
    assert start["status"] == "1 to 7 of 7, mean reward 1"
    assert back["steps"] == ["59"] and back["step"] == "59"
    assert end["steps"] == ["60"]  # the last step is the end
    assert every["rows"] == 10 and every["status"].startswith("1 to 10 of 420")
    assert second["status"].startswith("11 to 20 of 420")
    assert set(high["rewards"][:7]) == {"1"} and high["status"].startswith("1 to 10")
    assert lantern["status"].startswith("1 to 10 of 60")
    assert none["rows"] == 0 and none["status"] == "none"
    assert found["focusable"] == 8  # two lists, a search, four buttons, the table itself


def test_without_its_script_the_page_still_shows_the_last_samples(report, tmp_path):
    page = tmp_path / "still.html"
    page.write_text(
        re.sub(r'"use strict".*?</script>', "</script>", report.read_text(), flags=re.S)
    )
    dom, _, _ = browse(page, tmp_path, "--dump-dom")
    table = dom[dom.index('class="samples rollouts"') :]
    assert table[: table.index("</table>")].count("<tr>") == 1 + 5
    assert re.search(r'class="controls" hidden', dom)
