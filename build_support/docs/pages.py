"""What mkdocs does with our pages beyond its own: links that leave docs/, notebooks, and comments that tests read.

On GitHub a page may link to any file of the repository. The site takes such a link to ``repo_url`` where one is set,
and else to a copy: Markdown and code become pages under ``repository/``, other files lie there as they are.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from build_support.docs.blocks import links
from build_support.docs.markdown import from_notebook, from_page

ROOT = Path(__file__).resolve().parents[2]
COPIES = "repository/"
CODE = {".py": "python", ".sh": "bash", ".h": "cpp", ".cpp": "cpp", ".cu": "cpp", ".cuh": "cpp", ".toml": "toml"}
OTHERS = (".ipynb", ".py")
PAGES = {".md", *OTHERS}


class Other(File):
    """A notebook or a script: a page for mkdocs, so that the navigation and links name it as they do on GitHub."""

    def is_documentation_page(self) -> bool:
        """It is one."""
        return True


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """In the navigation FOLDER/* means the pages of a folder besides its first."""
    for section in config.nav or []:
        entries = next(iter(section.values())) if isinstance(section, dict) else None
        if isinstance(entries, list) and isinstance(entries[-1], str) and entries[-1].endswith("/*"):
            folder = Path(config.docs_dir) / entries.pop().removesuffix("/*")
            pages = sorted(file for file in folder.iterdir() if file.suffix in PAGES and file.name != "index.md")
            entries += [{file.name: file.relative_to(config.docs_dir).as_posix()} for file in pages]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Make pages of notebooks and scripts; add what pages link to outside docs/, and what that links to."""
    for file in list(files):
        if file.src_uri.endswith(OTHERS):
            files.remove(file)
            dest_uri = f"{file.src_uri}.html"  # a notebook and a script may have one name
            options = {"use_directory_urls": config.use_directory_urls, "dest_uri": dest_uri}
            files.append(Other(file.src_uri, file.src_dir, config.site_dir, **options))
    waiting = [] if config.repo_url else list(files.documentation_pages())
    while waiting:
        page = waiting.pop()
        for path in sorted(filter(None, (_path(link, page.src_uri) for link in links(_markdown(page))))):
            if files.get_file_from_path(_copied(path)) is None:
                files.append(copy := _copy(path, config))
                waiting += [copy] if copy.is_documentation_page() else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page's Markdown as mkdocs is to read it; the search leaves copies out."""
    if page.file.src_uri.startswith(COPIES):
        page.meta["search"] = {"exclude": True}

    def moved(link: str) -> str:
        path = _path(link, page.file.src_uri)
        if path is None:
            return link
        anchor = "".join(link.partition("#")[1:])
        if config.repo_url:
            return f"{config.repo_url.rstrip('/')}/blob/main/{path}{anchor}"
        there = posixpath.relpath(_copied(path), posixpath.dirname(page.file.src_uri) or ".")
        return there + (anchor if path.endswith(".md") else "")  # of code it would be a line

    return from_page(_markdown(page.file) if isinstance(page.file, Other) else markdown, moved)


def _markdown(file: File) -> str:
    if not isinstance(file, Other):
        return file.content_string
    if file.src_uri.endswith(".ipynb"):
        return from_notebook(json.loads(file.content_string))
    return _listing(posixpath.basename(file.src_uri), file.content_string)


def _path(link: str, src_uri: str) -> str | None:
    """Where in the repository the link of a page points, if mkdocs does not find that by itself."""
    if re.match(r"[a-z]+:|/|#", link):
        return None
    copy = src_uri.startswith(COPIES)
    here = src_uri.removeprefix(COPIES).removesuffix(".md") if copy else f"docs/{src_uri}"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here), link.partition("#")[0]))
    if path.startswith("../") or not (ROOT / path).exists() or (path.startswith("docs/") and not copy):
        return None
    return f"{path}/README.md" if (ROOT / path / "README.md").exists() else path


def _copied(path: str) -> str:
    """The page or file of the site, as a path below docs/."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    page = (ROOT / path).is_dir() or Path(path).suffix in {".md", *CODE}
    return f"{COPIES}{path}.md" if page else f"{COPIES}{path}"


def _listing(path: str, code: str) -> str:
    return f"# {path}\n\n````{CODE[Path(path).suffix]}\n{code}````\n"


def _copy(path: str, config: MkDocsConfig) -> File:
    source, src_uri, hidden = ROOT / path, _copied(path), InclusionLevel.NOT_IN_NAV
    if source.is_dir():
        inside = sorted(item.name for item in source.iterdir() if not item.name.startswith((".", "__")))
        content = f"# {path}/\n\n" + "".join(f"- `{name}`\n" for name in inside)
    elif source.suffix in CODE:
        content = _listing(path, source.read_text(encoding="utf-8"))
    elif source.suffix == ".md":
        content = source.read_text(encoding="utf-8")
    else:
        return File.generated(config, src_uri, abs_src_path=str(source), inclusion=hidden)
    return File.generated(config, src_uri, content=content, inclusion=hidden)
