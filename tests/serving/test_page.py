"""The page of a served model in headless Chromium: answers, errors, two models, flows, a phone.

One browser opens one page of the test, whose frames are the page at several addresses and widths.
"""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from support.listening import listening
from support.served_shop import free_identifiers, write_folders
from support.tiny_shop import make_model, make_scorer

from gflowgr.serving.requests import Add

for _package in ("fastapi", "prometheus_client", "httpx", "uvicorn"):
    pytest.importorskip(_package, reason=f"{_package} is not installed (pip install -e '.[dev]')")

import httpx  # noqa: E402
from fastapi.responses import HTMLResponse  # noqa: E402

from gflowgr.serving.http_api import ServerConfig, make_app  # noqa: E402
from gflowgr.serving.service import Service  # noqa: E402

pytestmark = pytest.mark.process

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
EVIL = "<script>document.title = 'ran'</script><img src=x onerror=\"document.title = 'ran'\">"
FRAMES = {
    "answers": (1200, "?history=3%2Cevil&k=5"),
    "phone": (390, "?user=17&k=200"),
    "error": (390, "?history=3,nothing-of-this-name"),
    "empty": (390, ""),
}
FRAMES_PAGE = """<!doctype html><pre id=out></pre><script>
const frames = %s, out = {};
for (const [name, [width, query]] of Object.entries(frames)) {
  const frame = document.createElement("iframe");
  frame.width = width;
  frame.src = "/" + query;
  document.body.append(frame);
  frame.addEventListener("load", () => {
    const page = frame.contentDocument, texts = (of, where) =>
      [...of.querySelectorAll(where)].map(each => each.textContent);
    const look = () => {
      const shown = !page.getElementById("answer").hidden, wrong = page.getElementById("error");
      if (query && !shown && wrong.hidden) return setTimeout(look, 20);
      out[name] = {
        title: page.title, width: page.documentElement.scrollWidth, shown,
        history: page.getElementById("history").value, user: page.getElementById("user").value,
        error: wrong.hidden ? null : wrong.textContent, past: texts(page, "#past li"),
        scripts: page.scripts.length, images: page.images.length,
        models: [...page.querySelectorAll("article")].map(each => ({
          name: each.querySelector("h2").textContent, titles: texts(each, "td .title"),
          items: texts(each, "td div.id").map(text => text.split(" \\u00b7 ")[0]),
          shares: texts(each, "td:last-child"), rest: each.querySelector(".rest").textContent,
          left: Math.round(each.getBoundingClientRect().left),
          flows: ["probability", "target"].map(kind => texts(each, ".shares ." + kind)),
          pieces: ["probability", "target"].map(
            kind => each.querySelectorAll(".bar." + kind + " i").length),
        })),
      };
      document.getElementById("out").textContent = JSON.stringify(out);
    };
    look();
  });
}
</script>"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with two models and a collaborative one."""
    root = tmp_path_factory.mktemp("page")
    folders = write_folders(root)
    make_scorer().save(root / "scorer")
    make_model(objective="flow_kl", seed=1, reward_temperature=0.5).save_pretrained(root / "other")
    service = Service(
        folders["model0"],
        folders["data"],
        str(root / "state"),
        num_beams=8,
        beside=str(root / "other"),
        collaborative=str(root / "scorer"),
    )
    service.change(Add("evil", free_identifiers()[0], EVIL), "me")
    app = make_app(service, ServerConfig())
    app.get("/frames")(lambda: HTMLResponse(FRAMES_PAGE % json.dumps(FRAMES)))
    with listening(app) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def frames(served: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each frame shows."""
    if BROWSER is None:
        pytest.skip("no chromium, chromium-browser or google-chrome is installed")
    profile = tmp_path_factory.mktemp("profile")
    options = (
        "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-extensions "
        "--disable-background-networking --disable-component-update --no-first-run "
        "--no-proxy-server --virtual-time-budget=20000 --dump-dom"
    )
    found = subprocess.run(
        [BROWSER, *options.split(), f"--user-data-dir={profile}", f"{served}/frames"],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    text = re.search('<pre id="out">(.*?)</pre>', found.stdout, re.DOTALL)
    assert text is not None, found.stderr
    shown: dict[str, Any] = json.loads(html.unescape(text.group(1)))
    assert set(shown) == set(FRAMES)
    return shown


def ask(served: str, path: str, **body: Any) -> Any:
    found = httpx.post(f"{served}/{path}", json=body, trust_env=False, timeout=60)
    assert found.status_code == 200, found.text
    return found.json()


def check_shares(texts: list[str], wanted: list[float]) -> None:
    """Percentages of two decimals, or of two digits where they are smaller."""
    assert len(texts) == len(wanted)
    for text, share in zip(texts, wanted, strict=True):
        shown = float(text.removesuffix(" %")) / 100
        assert abs(shown - share) <= (5.1e-5 if share >= 1e-4 else 0.06 * share), (text, share)


def test_both_models_answer_side_by_side_as_over_http(served: str, frames: dict[str, Any]) -> None:
    shown = frames["answers"]
    assert (shown["history"], shown["user"], shown["error"]) == ("3,evil", "", None)
    assert [each["name"] for each in shown["models"]] == ["SFT", "GFlowGR-FlowKL"]
    first, second = (each["left"] for each in shown["models"])
    assert second > first + 400
    answers = []
    for beside, column in enumerate(shown["models"]):
        wanted = ask(
            served,
            "recommend",
            history=[3, "evil"],
            k=5,
            with_scores=True,
            with_titles=True,
            beside=bool(beside),
        )
        assert column["items"] == [str(item) for item in wanted["items"]]
        assert column["titles"] == wanted["titles"]
        check_shares(column["shares"], [math.exp(score) for score in wanted["scores"]])
        answers.append(wanted["items"])
    assert answers[0] != answers[1]


def test_the_rewards_flow_stands_beside_the_models(served: str, frames: dict[str, Any]) -> None:
    for beside, column in enumerate(frames["answers"]["models"]):
        tree = ask(served, "tree", history=[3, "evil"], beside=bool(beside))
        sums: dict[int, list[float]] = {}
        for each in tree["beginnings"]:
            pair = sums.setdefault(each["codes"][0], [0.0, 0.0])
            pair[0] += each["probability"]
            pair[1] += each["target"]
        rows = sorted(sums.values(), key=max, reverse=True)[:12]
        for kind in (0, 1):
            check_shares(column["flows"][kind], [row[kind] for row in rows])
            assert column["pieces"][kind] >= len(rows)
        assert column["rest"].endswith("hold 100.00 % of the model and 100.00 % of the target.")


def test_a_title_is_text_whatever_it_holds(frames: dict[str, Any]) -> None:
    shown = frames["answers"]
    assert shown["title"] == "What comes next?"
    assert f"{EVIL} evil" in shown["past"]
    assert (shown["scripts"], shown["images"]) == (1, 0)


def test_a_bad_id_is_said_on_the_page(frames: dict[str, Any]) -> None:
    shown = frames["error"]
    assert shown["error"].startswith("history must name items of the catalogue, such as 0; got")
    assert "nothing-of-this-name" in shown["error"]
    assert not shown["shown"]
    assert (frames["empty"]["shown"], frames["empty"]["error"]) == (False, None)


def test_nothing_is_wider_than_a_phone(frames: dict[str, Any]) -> None:
    assert frames["phone"]["user"] == "17"
    assert len(frames["phone"]["models"][0]["items"]) > 100
    for name in ("phone", "error", "empty"):
        assert frames[name]["width"] <= 390, name
