"""Writes nbs/reference.qmd: every public name of the library with its first line, linked to its chapter. `--check` only compares."""
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = """---
title: Reference
description: Every public name of the library, by chapter.
---

<!-- written by tools/reference.py: do not edit -->
"""


def patched(node):
    "`Class.method` of a function under @patch, else its plain name."
    is_patch = any("patch" in ast.unparse(d) for d in node.decorator_list)
    args = node.args.posonlyargs+node.args.args if isinstance(node, ast.FunctionDef) else []
    return f"{ast.unparse(args[0].annotation)}.{node.name}" if is_patch and args and args[0].annotation else node.name


def entries(source):
    "(name, anchor, what it says) of each public function, class, patched method and constant; a constant has no anchor."
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = patched(node)
            if not node.name.startswith("_"): yield name, "#"+name.lower(), (ast.get_docstring(node) or "").split("\n")[0]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for t in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if not isinstance(t, ast.Name) or t.id.startswith("_"): continue
                value = ast.unparse(node.value) if node.value else ""
                yield t.id, "", f"`{value if len(value) < 70 else value[:66]+' ...'}`"


def modules():
    "(chapter, module name, source) in the order of the chapters."
    found = []
    for path in (ROOT/"cxr_nbdev").glob("[!_]*.py"):
        source = path.read_text(encoding="utf-8")
        made_by = re.search(r"File to edit: \.\./nbs/(\S+)\.ipynb", source)
        if made_by: found.append((made_by[1], path.stem, source))
    return sorted(found)


def reference():
    "The page's text."
    out = [HEAD]
    for chapter, module, source in modules():
        rows = [f"| [{name}]({chapter}.ipynb{anchor}) | "+says.replace("|", "\\|")+" |\n" for name, anchor, says in entries(source)]
        if rows: out += [f"\n## cxr_nbdev.{module}\n\n[{chapter}]({chapter}.ipynb)\n\n| name | what it is |\n|:--|:--|\n", *rows]
    return "".join(out)


if __name__ == "__main__":
    path = ROOT/"nbs/reference.qmd"
    if "--check" not in sys.argv: path.write_text(reference(), encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != reference():
        sys.exit("nbs/reference.qmd is not what the library makes: run `make prepare`")
