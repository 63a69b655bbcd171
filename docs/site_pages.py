"""Takes the pages that lie elsewhere in the repository into the documentation site, and points links at them (mkdocs hooks)."""

import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "engines/README.md": "engines.md",
}
_LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and one of all commands, which typer writes from their own help."""
    program = [sys.executable, "-m", "typer", "chexnet_deploy.cli.main", "utils", "docs"]
    program += ["--name", "chexnet-deploy", "--title", "Commands"]
    commands = subprocess.run(program, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files.append(File.generated(config, "commands.md", content=commands))
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links between files of the repository at pages of the site; files that are no page become plain text."""
    sources = {page_name: source for source, page_name in PAGES.items()}
    name = page.file.src_uri
    folder = (ROOT / sources.get(name, f"docs/{name}")).parent

    def on_site(match: re.Match[str]) -> str:
        target = (folder / match[1]).resolve()
        if not target.exists() or not target.is_relative_to(ROOT):
            return match[1]  # mkdocs says that it is missing
        path = target.relative_to(ROOT).as_posix()
        return PAGES.get(path, path.removeprefix("docs/"))

    markdown = _LINK.sub(on_site, markdown)
    return re.sub(r"\[([^\]]+)\]\((?:examples|benchmarks|training|tests)(?:/[^)]*)?\)", r"`\1`", markdown)
