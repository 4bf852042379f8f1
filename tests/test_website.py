"""The documentation site, built strictly, and its live figure in a browser: `nox -s docs`."""

import functools
import http.server
import shutil
import threading

import pytest

pytest.importorskip("zensical", reason="the site is built in an environment of its own: nox -s docs")

from spatial_tokens import SPProjectorConfig
from spatial_tokens.grid import as_size, crop_window, pool_bins
from website import api, build

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def site():
    folder = build.ROOT / "site"
    build.main(folder)  # which exits at a warning, a broken link, or a name without text
    return folder


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def address(site):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def figure(browser, address):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.goto(f"{address}/windows.html")
    yield page
    assert not page.faults
    page.close()


def choose(page, **values):
    for name, value in values.items():
        field = page.locator(f"#{name}")
        field.select_option(value) if name in ("variant", "preset") else field.fill(str(value))


def facts(page):
    return {each.get_attribute("data-fact"): int(each.inner_text().replace(",", "")) for each in page.locator("[data-fact]").all()}


def drawn(page):
    """The rectangles of each token, as (top, left, height, width)."""
    script = "svg => [...svg.querySelectorAll('rect')].map(r => ['y', 'x', 'height', 'width'].map(n => Number(r.getAttribute(n))))"
    return [[tuple(each) for each in svg.evaluate(script)] for svg in page.locator("#windows-figure svg").all()]


@pytest.mark.parametrize(
    ("grid", "variant", "kernels", "widths"),
    [
        ((24, 24), "cropping", (4, 8, 12, 16, 20, 24), (1024, 512, 128)),
        ((24, 24), "pooling", (16, 20, 24), (1024, 512, 128)),
        ((16, 24), "cropping", ((4, 12), (16, 24)), (64, 32, 8)),
        ((7, 10), "pooling", (1, 2, (3, 7)), (12, 5, 3)),
    ],
)
def test_the_figure_draws_and_counts_what_the_library_does(figure, grid, variant, kernels, widths):
    vision, spatial, rank = widths
    text = ", ".join(str(size) if isinstance(size, int) else "x".join(map(str, size)) for size in kernels)
    choose(figure, rows=grid[0], columns=grid[1], variant=variant, kernels=text, vision=vision, spatial=spatial, rank=rank)
    assert figure.locator("#windows-error").inner_text() == ""
    dense = SPProjectorConfig(
        vision_hidden_size=vision, text_hidden_size=8, grid_size=grid, variant=variant, kernel_sizes=kernels,
        spatial_hidden_size=spatial, detail_kernel_size=None,
    )  # fmt: skip
    factorized = SPProjectorConfig.from_dict({**dense.to_dict(), "rank": rank})
    assert facts(figure) == {
        "spatial tokens": dense.num_spatial_tokens,
        "patch tokens": dense.num_patches,
        "tokens in all": dense.num_tokens,
        "dense parameters": dense.costs()[0].parameters,
        "in bfloat16, MiB": round(dense.costs()[0].bytes / 2**20),
        "factorized parameters": factorized.costs()[0].parameters,
    }
    sizes = [as_size(size, "size") for size in kernels]
    expected = [[crop_window(grid, size)] if variant == "cropping" else list(pool_bins(grid, size)) for size in sizes]
    assert drawn(figure) == [[tuple(window) for window in windows] for windows in expected]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": 27}, "a window of 4 cannot be centered in 27 rows: 27 - 4 is odd"),
        ({"kernels": "4, 26"}, "kernel 26 x 26 is larger than the grid of 24 x 24"),
        ({"kernels": "8, 4"}, "kernel sizes must increase"),
        ({"kernels": "4, x"}, 'kernel sizes are numbers, or height x width, with commas between: not "x"'),
        ({"columns": 0}, "Grid, columns must be a positive integer"),
        ({"rank": 2000}, "the rank is at most the vision width"),
    ],
)
def test_what_cannot_be_drawn_is_said(figure, values, message):
    choose(figure, **values)
    assert figure.locator("#windows-error").inner_text() == message
    assert drawn(figure) == []
    choose(figure, preset="llava-sp-pooling")
    assert figure.locator("#windows-error").inner_text() == ""
    assert len(drawn(figure)) == 6


def test_an_address_keeps_what_was_chosen(figure):
    choose(figure, rows=12, kernels="2, 4", columns=12)
    kept = figure.evaluate("location.href")
    figure.goto("about:blank")
    figure.goto(kept)
    assert figure.locator("#kernels").input_value() == "2, 4"
    assert facts(figure)["patch tokens"] == 144


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["index", "windows", "reference/hugging-face-models"])
def test_pages_are_as_wide_as_the_window(browser, address, name, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(f"{address}/{name}.html")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("h1").first.is_visible()
    page.close()


def test_every_public_name_of_the_library_is_documented(site):
    import spatial_tokens

    names = {name for names in api.written()[1].values() for name in names}
    for module in (spatial_tokens, spatial_tokens.modules):
        assert {f"{module.__name__}.{name}" for name in module.__all__ if name != "__version__"} <= names


def test_faults_are_found(tmp_path):
    links = "".join(f'<a href="{link}">x</a>' for link in ("b.html#there", "c.html", "#here"))
    (tmp_path / "a.html").write_text(f'<p id="here">words</p>{links}')
    (tmp_path / "b.html").write_text("<p id='name'></p>")
    assert sorted(build.broken_links(tmp_path)) == ["a.html: b.html#there has no such anchor", "a.html: c.html leads nowhere"]
    assert build.missing_names(tmp_path, {"b.md": ["name", "other"]}) == ["b.md: name has no text", "b.md: other has no text"]
