"""A notebook as Markdown: for README.md, and for the site where quarto is not at hand."""
import base64
import re
from pathlib import Path

import nbformat
import yaml

IMAGES = {"image/png": "png", "image/jpeg": "jpg", "image/svg+xml": "svg"}


def fence(text, info=""):
    "`text` as a code block that its own backticks cannot end."
    ticks = "`"*max(3, *(len(o)+1 for o in re.findall(r"`{3,}", text)), 3)
    return f"{ticks}{info}\n{text.rstrip()}\n{ticks}"


def joined(o): return "".join(o) if isinstance(o, list) else o


def split_options(source):
    "The quarto options (`#| echo: false`) at the top of a cell, and the rest of it."
    lines, options = source.splitlines(), {}
    while lines and lines[0].startswith("#|"):
        key, _, value = lines.pop(0)[2:].partition(":")
        options[key.strip()] = value.strip().strip('"')
    return options, "\n".join(lines).strip("\n")


def callouts(text):
    "Quarto's callouts as admonitions."
    def change(m):
        body = m[2].strip()
        title = re.match(r"#+\s*(.+)\n", body)
        if title: body = body[title.end():]
        return f"!!! {m[1]}" + (f' "{title[1]}"' if title else "") + "\n\n" + re.sub(r"^(?=.)", "    ", body, flags=re.M)
    return re.sub(r"^:{3,}\s*\{\.callout-(\w+)[^}]*\}\n(.*?)\n:{3,}\s*$", change, text, flags=re.M | re.S)


def unlinked_code(text):
    "nbdev links names in the comments of a signature too, where Markdown shows the link as text: back to the plain name."
    return re.sub(r"^```.*?^```", lambda m: re.sub(r"\[`([^`\n]+)`\]\([^)\s]*\)", r"`\1`", m[0]), text, flags=re.M | re.S)


def output(o, write_image, info):
    "One output of a cell; `write_image(bytes, suffix)` answers with its link."
    if o.output_type == "error": return fence(f"{o.ename}: {o.evalue}", info)
    if o.output_type == "stream": return fence(joined(o.text), info)
    data = o.get("data", {})
    for kind, suffix in IMAGES.items():
        if kind not in data: continue
        raw = joined(data[kind])
        return f"![]({write_image(raw.encode() if suffix == 'svg' else base64.b64decode(raw), suffix)})"
    if "text/html" in data: return '<div class="output-html">\n'+re.sub(r"\n\s*\n", "\n", joined(data["text/html"]))+"\n</div>"
    if "text/markdown" in data: return unlinked_code(joined(data["text/markdown"]))
    if "text/plain" in data: return fence(joined(data["text/plain"]), info)
    return ""


def cell_markdown(c, write_image, output_info=""):
    "One cell with its outputs."
    if c.cell_type == "raw":
        front = c.source.strip().strip("-").strip()
        front = yaml.safe_load(front) if front else {}
        return f"# {front.get('title', '')}\n\n" + (f"> {front['description']}" if "description" in front else "")
    if c.cell_type == "markdown": return callouts(c.source)
    options, source = split_options(c.source)
    if options.get("include") == "false": return ""
    parts = [fence(source, "python")] if source and options.get("echo") != "false" else []
    if "code-fold" in options and parts:
        opened = " open" if options["code-fold"] == "show" else ""
        parts = [f'<details{opened} markdown="1"><summary>{options.get("code-summary", "Code")}</summary>', *parts, "</details>"]
    return "\n\n".join(parts + [output(o, write_image, output_info) for o in c.outputs])


def to_markdown(path, image_dir, output_info=""):
    "The notebook `path` as Markdown; its pictures go to `image_dir` and are linked by that folder's name."
    path, image_dir, n = Path(path), Path(image_dir), 0

    def write_image(raw, suffix):
        nonlocal n
        n += 1
        image_dir.mkdir(parents=True, exist_ok=True)
        (image_dir/f"{path.stem}_{n}.{suffix}").write_bytes(raw)
        return f"{image_dir.name}/{path.stem}_{n}.{suffix}"

    hidden = re.compile(r"^#\|\s*(hide|default_exp|export|exporti)\b", re.M)
    parts = [cell_markdown(c, write_image, output_info) for c in nbformat.read(path, 4).cells if not hidden.search(c.source)]
    return "\n\n".join(o for o in parts if o.strip())+"\n"
