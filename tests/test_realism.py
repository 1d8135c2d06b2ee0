"""Real films stay out of the notebooks: what is drawn from them is curves, and pages of them go to files."""
import re

import pytest
from test_notebooks import NOTEBOOKS, directives, read, source

DRAWS_PIXELS = re.compile(r"\b(show_images?|imshow|side_by_side|mean_variance|imread)\(")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda o: o.stem)
def test_no_pixels_from_data_cells(path):
    "A `#| data` cell that draws pixels keeps no picture."
    for c in read(path)["cells"]:
        if "data" not in directives(c) or not DRAWS_PIXELS.search(source(c)): continue
        pictures = [k for o in c["outputs"] for k in o.get("data", {}) if k.startswith("image/")]
        assert not pictures, f"{path.name}, cell {c['id']}, draws real films and keeps {pictures}: clear its output"
