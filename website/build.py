"""Builds the documentation site, strictly: no warning, no broken link, no public name without its text.

python -m website.build          writes site/; needs zensical and mkdocstrings-python (nox -s docs)
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

from spatial_tokens import SPProjectorConfig, list_presets
from website import api

HERE = Path(__file__).parent
ROOT = HERE.parent

REPOSITORY = "https://github.com/OWNER/spatial-tokens"
BESIDE_DOCS = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
PICTURES = ("scaling.png", "projectors.png", "place_probe.png")


def main(site: Path) -> None:
    """Stages the pages, builds them, and checks what was built."""
    with tempfile.TemporaryDirectory() as folder:
        documented = stage(Path(folder))
        command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "--config-file", f"{folder}/mkdocs.yml"]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            sys.exit(f"{finished.stdout}{finished.stderr}\nwebsite: what is named above must be mended")
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(Path(folder) / "site", site)
    problems = [*broken_links(site), *missing_names(site, documented)]
    if problems:
        sys.exit("\n".join(problems))


def stage(folder: Path) -> dict[str, list[str]]:
    """Writes what the site is made of into a folder; gives the public names that each page of the reference documents."""
    pages = folder / "docs"
    shutil.copytree(ROOT / "docs", pages)
    shutil.copytree(HERE / "pages", pages, dirs_exist_ok=True)
    for picture in PICTURES:
        shutil.copy(ROOT / "benchmarks" / "results" / "cpu" / picture, pages / "images")
    for source, target in BESIDE_DOCS.items():
        shutil.copy(ROOT / source, pages / target)
    for page in pages.rglob("*.md"):
        page.write_text(rewritten(page.read_text(encoding="utf-8"), page.relative_to(pages), pages), encoding="utf-8")
    reference, documented = api.written()
    for name, text in reference.items():
        (pages / name).parent.mkdir(exist_ok=True)
        (pages / name).write_text(text, encoding="utf-8")
    script = pages / "windows.js"
    script.write_text(script.read_text().replace("/*presets*/ {}", json.dumps(presets())))
    config = yaml.safe_load((HERE / "mkdocs.yml").read_text())
    config["plugins"][1]["mkdocstrings"]["handlers"]["python"]["paths"] = [str(ROOT / "src")]
    for part in config["nav"]:
        if "Reference" in part:
            part["Reference"] = [{title: name} for title, name in zip(api.PAGES, reference, strict=True)]
    listed = set(re.findall(r"[\w/.-]+\.md", str(config["nav"])))
    if unlisted := [name for page in pages.rglob("*.md") if (name := str(page.relative_to(pages))) not in listed]:
        sys.exit(f"website/mkdocs.yml: nav lacks {', '.join(sorted(unlisted))}")
    (folder / "mkdocs.yml").write_text(yaml.safe_dump({**config, "docs_dir": "docs", "site_dir": "site"}, sort_keys=False))
    return documented


def rewritten(text: str, page: Path, pages: Path) -> str:
    """A page with links that hold on the site: to other pages, to pictures (copied to them), or to the file in the repository."""
    at_root = str(page) in BESIDE_DOCS.values()
    folder = ROOT if at_root else (ROOT / "docs" / page).parent

    def link(match: re.Match[str]) -> str:
        target, _, fragment = match[1].partition("#")
        if not target or urlsplit(target).scheme:
            return match[0]
        if not (folder / target).exists():  # a page of the site alone
            return match[0]
        path = (folder / target).resolve().relative_to(ROOT)
        anchor = f"#{fragment}" if fragment else ""
        if path.suffix == ".png" and path.parts[0] != "docs":
            shutil.copy(ROOT / path, pages / "images")
            return f"]({'../' * (len(page.parts) - 1)}images/{path.name})"
        if str(path) in BESIDE_DOCS:
            return f"]({'../' * (len(page.parts) - 1)}{BESIDE_DOCS[str(path)]}{anchor})"
        if path.parts[0] == "docs":
            return f"]({path.relative_to('docs')}{anchor})" if at_root else match[0]
        return f"]({REPOSITORY}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}{anchor})"

    text = re.sub(r"\]\(([^)\s]+)\)", link, text)
    return re.sub(r"^```python\n(?=>>> )", "```pycon\n", text, flags=re.MULTILINE)


def presets() -> dict[str, dict[str, str]]:
    """What the live figure's controls show for each preset."""
    found = {}
    for name in list_presets():
        config = SPProjectorConfig.from_preset(name)
        sizes = [str(size) if isinstance(size, int) else "x".join(map(str, size)) for size in config.kernel_sizes]
        found[name] = {
            "rows": str(config.grid_size[0]), "columns": str(config.grid_size[1]), "variant": config.variant,
            "kernels": ", ".join(sizes), "vision": str(config.vision_hidden_size), "spatial": str(config.spatial_hidden_size),
            "rank": str(config.rank or config.vision_hidden_size // 8),
        }  # fmt: skip
    return found


class _Page(HTMLParser):
    """The links and the anchors of a page, and the words below each anchor."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.words: dict[str, int] = {}
        self._anchor = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Collects them."""
        values = dict(attributes)
        if values.get("id"):
            self._anchor = str(values["id"])
            self.words.setdefault(self._anchor, 0)
        for name in ("href", "src"):
            if values.get(name) is not None and tag != "base":
                self.links.append(str(values[name]))

    def handle_data(self, data: str) -> None:
        """Counts them."""
        self.words[self._anchor] = self.words.get(self._anchor, 0) + len(data.split())


def broken_links(site: Path) -> list[str]:
    """Links within the site to a file or an anchor that is not there."""
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    problems = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links start at the site's address
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                problems.append(f"{path.relative_to(site)}: {link} leads nowhere")
            elif (
                parts.fragment
                and not parts.fragment.startswith("__")  # the theme's own
                and target.suffix == ".html"
                and parts.fragment not in pages[target].words
            ):
                problems.append(f"{path.relative_to(site)}: {link} has no such anchor")
    return problems


def missing_names(site: Path, documented: dict[str, list[str]]) -> list[str]:
    """Public names that their page does not document."""
    problems = []
    for name, names in documented.items():
        page = _Page((site / name).with_suffix(".html").read_text(encoding="utf-8"))
        problems += [f"{name}: {each} has no text" for each in names if page.words.get(each, 0) < 3]
    return problems


if __name__ == "__main__":
    main(ROOT / "site")
    print(f"wrote {ROOT / 'site'}")
