"""Builds the site into _docs without quarto, and checks it: every link and anchor, every public name, no outside files, no failed cell.

nbdev processes the notebooks (as `nbdev_docs` does), mkdocs renders them at the addresses that quarto gives. `--no-build` only checks."""
import gc
import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

import reference
from nb2md import callouts, to_markdown

ROOT = Path(__file__).resolve().parent.parent
DOCS, PAGES = ROOT/"_docs", ROOT/"_proc/_pages"


def pandoc_id(text, sep="-"):
    "The id that pandoc, and so quarto, gives to a heading."
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", sep, re.sub(r"[^\w\s.-]", "", text.strip().lower()))) or "section"


def sidebar_pages(contents):
    "The files that quarto's sidebar names, in order."
    for o in contents:
        if isinstance(o, str): yield o
        elif "contents" in o: yield from sidebar_pages(o["contents"])
        else: yield o["href"]


def page_name(stem):
    "The name of a page on the site: nbdev leaves the number of a chapter out of it, as its links do."
    return re.sub(r"^\d+[a-zA-Z0-9]*_", "", stem)


def write_pages(home):
    "Every page as Markdown in PAGES; links to notebooks and to the published site become links between pages."
    proc = ROOT/"_proc"
    shutil.rmtree(PAGES, ignore_errors=True)
    PAGES.mkdir(parents=True)
    for path in sorted(proc.glob("*.ipynb"))+sorted(proc.glob("*.qmd")):
        if path.suffix == ".ipynb": text = to_markdown(path, PAGES/"figures", " { .text .output }")
        else:
            front, body = re.match(r"---\n(.*?)\n---\n(.*)", path.read_text(encoding="utf-8"), re.S).groups()
            front = yaml.safe_load(front)
            text = f"# {front['title']}\n\n> {front.get('description', '')}\n\n{callouts(body)}"
        text = re.sub(rf"\]\({re.escape(home)}/([\w.-]+)\.html", r"](\1.md", text)
        text = re.sub(r"\]\((?!https?:)([\w./-]+)\.(?:ipynb|qmd)\b", lambda m: f"]({page_name(m[1])}.md", text)
        (PAGES/f"{page_name(path.stem)}.md").write_text(text, encoding="utf-8")
    for name in ("images", "styles.css"):
        if (proc/name).is_dir(): shutil.copytree(proc/name, PAGES/name)
        elif (proc/name).exists(): shutil.copy(proc/name, PAGES)


def nav(contents):
    "quarto's sidebar as mkdocs' navigation."
    return [{o["section"]: nav(o["contents"])} if isinstance(o, dict) and "section" in o
            else page_name(re.sub(r"\.\w+$", ".md", o if isinstance(o, str) else o["href"])) for o in contents]


def build():
    "Process, convert, render."
    from mkdocs.commands.build import build as mkdocs_build
    from mkdocs.config import load_config
    from nbdev.config import get_config
    from nbdev.serve import proc_nbs
    os.chdir(ROOT)
    os.environ["NO_MKDOCS_2_WARNING"] = "1"
    cfg = get_config()
    site = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))["website"]
    proc_nbs(n_workers=0, force=True)
    write_pages(cfg.doc_host+cfg.doc_baseurl)
    toggle = lambda scheme, icon, to: {"scheme": scheme, "primary": "blue grey", "accent": "teal",
                                       "toggle": {"icon": f"material/{icon}", "name": f"Switch to {to} mode"}}
    (ROOT/"_proc/mkdocs.yml").write_text(f"site_name: {cfg.title}\n")
    mkdocs_build(load_config(
        config_file=str(ROOT/"_proc/mkdocs.yml"), site_description=cfg.description, docs_dir=str(PAGES), site_dir=str(DOCS),
        use_directory_urls=False, nav=nav(site["sidebar"]["contents"]), extra_css=["styles.css"], copyright=site["page-footer"]["center"],
        extra={"generator": False, "social": [{"icon": "fontawesome/brands/github", "link": cfg.git_url}]},
        theme={"name": "material", "font": False, "features": ["navigation.sections", "navigation.top", "navigation.footer", "toc.follow",
                                                              "search.highlight", "content.code.copy"],
               "palette": [toggle("default", "weather-night", "dark"), toggle("slate", "weather-sunny", "light")]},
        plugins=["search"],
        markdown_extensions=["tables", "attr_list", "md_in_html", "admonition", "footnotes", "pymdownx.superfences",
                             {"pymdownx.highlight": {"use_pygments": True}}, {"toc": {"permalink": True, "slugify": pandoc_id}}]))


class Page(HTMLParser):
    "The ids, links and loaded files of a page."

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads, self.words = set(), [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if a.get("id"): self.ids.add(a["id"])
        if tag == "a" and "href" in a: self.links.append(a["href"])
        elif tag == "link" and a.get("rel") not in ("canonical", "prev", "next"): self.loads.append(a.get("href"))
        elif tag in ("img", "script", "iframe", "source") and a.get("src"): self.loads.append(a["src"])

    def handle_data(self, data): self.words.append(data)


def check_links(pages):
    "What is wrong with the links of all pages."
    for path, page in pages.items():
        where = path.relative_to(DOCS)
        for link in page.links+page.loads:
            url = urlsplit(link)
            if url.scheme in ("data", "mailto"): continue
            if url.scheme or url.netloc:
                if link in page.loads: yield f"{where} loads {link}: the site must work offline"
                continue
            target = (path.parent/unquote(url.path)).resolve() if url.path else path
            if not target.exists(): yield f"{where} links to {link}, which does not exist"
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids | {"__search"}:
                yield f"{where} links to {link}, which has no such heading"


def check_names(pages):
    "Public names that their page does not explain."
    def words_of(page): return set(re.findall(r"\w+", " ".join(page.words)))
    listed = (DOCS/"reference.html").resolve()
    reference_words = words_of(pages[listed]) if listed in pages else set()
    for chapter, module, source in reference.modules():
        path = (DOCS/f"{page_name(chapter)}.html").resolve()
        if path not in pages: continue
        words = words_of(pages[path])
        for name, anchor, _ in reference.entries(source):
            if anchor and anchor[1:] not in pages[path].ids: yield f"{chapter}: {name} has no entry"
            elif not anchor and name not in words|reference_words: yield f"{chapter}: the constant {name} is never mentioned"


def check_sidebar():
    "Pages that the sidebar forgets, or names without there being any."
    site = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))["website"]
    named = list(sidebar_pages(site["sidebar"]["contents"]))
    there = {o.name for pattern in ("*.ipynb", "*.qmd") for o in (ROOT/"nbs").glob(pattern) if o.name[0] not in "._"}
    yield from (f"_quarto.yml: the sidebar names {o}, which is not in nbs/" for o in named if o not in there)
    yield from (f"_quarto.yml: {o} is missing in the sidebar" for o in sorted(there-set(named)))


def check_cells():
    "Cells that ended in an error."
    for path in sorted((ROOT/"_proc").glob("*.ipynb")):
        for o in (o for c in json.loads(path.read_text(encoding="utf-8"))["cells"] for o in c.get("outputs", [])):
            if o["output_type"] == "error": yield f"{path.stem}: a cell ended in {o['ename']}: {o['evalue']}"


def check():
    "All problems of the built site."
    pages = {o.resolve(): Page(o) for o in DOCS.rglob("*.html") if o.name != "404.html"}
    problems = [*check_cells(), *check_sidebar(), *check_links(pages), *check_names(pages)]
    if not (DOCS/"index.html").exists(): problems.append("there is no index.html")
    return len(pages), sum(len(p.links) for p in pages.values()), problems


if __name__ == "__main__":
    gc.disable()  # the heap is large and lives to the end: looking for cycles in it takes a third of the time
    if "--no-build" not in sys.argv: build()
    n, links, problems = check()
    for o in problems: print("problem:", o)
    print(f"{DOCS/'index.html'}: {n} pages, {links} links, {len(problems)} problems")
    sys.stdout.flush()
    os._exit(bool(problems))  # each notebook's shell would collect the garbage once more
