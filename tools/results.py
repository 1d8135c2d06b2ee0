"""The tables of nbs/index.ipynb that come from recorded results: whatever stands between `<!-- NAME -->` and `<!-- /NAME -->` is written anew from the JSON of that record."""
import json
import re
from pathlib import Path

from execnb.nbio import read_nb, write_nb

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT/"nbs/index.ipynb"


def _table(head, rows):
    return "\n".join(f"| {' | '.join(r)} |" for r in [head, [":--"]*len(head), *rows])


def _cell(b, k, sign=""):
    if b.get(k) is None: return "-"
    ci = b.get(f"{k}_ci")
    return f"{b[k]:{sign}.2f}" + (f" [{ci[0]:{sign}.2f}, {ci[1]:{sign}.2f}]" if ci else "")


def ladder():
    "The steps of runs/ladder, from the floor upwards, each with its gain over the one below."
    from cxr_nbdev.ladder import NUMBERS, ceiling_numbers
    r = json.loads((ROOT/"runs/ladder/ladder.json").read_text(encoding="utf-8"))
    keys = ("map_30", "map_50", "t_30", "found", "auroc")
    line = lambda name, b, gain="": [name, *(_cell(b, k) for k in keys), gain]
    rows = [line("*blind floor*", r["blind_floor"])]
    for n in r["steps"]:
        d = r["differences"][n]
        rows.append(line(f"`{n}`: {' '.join(f'{k}={v}' for k, v in r['changes'][n].items()) if isinstance(r['changes'][n], dict) else 'vote of '+r['changes'][n]}", r["results"][n], f"{_cell(d, 'map_30', '+')} over {d['on']}"))
    if top := ceiling_numbers(r["reader_ceiling"]): rows.append(line("*second readers*", top))
    return _table(["step", *(NUMBERS[k] for k in keys), "AP@0.3, gain"], rows)


def shipped():
    "The shipped detector on the fold that it has not seen, class by class."
    r = json.loads((ROOT/"runs/nih7_lite0.json").read_text(encoding="utf-8"))["eval"]
    v, f, areas = r["val"], r["val"]["blind_floor"], r["image_level"]
    one = lambda name, b, low, area: [name, str(b["n_boxes"]) if "n_boxes" in b else "", *(o for k in (50, 30) for o in (_cell(b, f"{'ap' if 'n_boxes' in b and name != '*mean*' else 'map'}_{k}"), _cell({"x": low.get(f"{'ap' if name != '*mean*' else 'map'}_{k}")}, "x"))), _cell(area, "auroc")]
    rows = [one(c, b, f["per_class"][c], areas["per_class"][c]) for c, b in v["per_class"].items()]
    return _table(["finding", "boxes", "AP@0.5", "floor", "AP@0.3", "floor", "image-level AUROC"], [*rows, one("*mean*", {k: o for k, o in v.items() if k != "n_boxes"}, f, areas["macro"])])


TABLES = dict(ladder=ladder, shipped=shipped)


def write(only_check=False):
    "Bring the tables up to date; False where one was not."
    book, same = read_nb(INDEX), True
    for c in book.cells:
        for name, make in TABLES.items():
            inside = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
            if c.cell_type != "markdown" or not inside.search(c.source): continue
            text = inside.sub(lambda m: f"{m[1]}{make()}\n{m[2]}", c.source)
            same &= text == c.source
            c.source = text
    if not same and not only_check: write_nb(book, INDEX)
    return same
