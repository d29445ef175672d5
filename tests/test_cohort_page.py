"""What a person gets of a cohort: a page, pictures and tables that show what was predicted and what failed, whatever is
in the names."""

from __future__ import annotations

import csv
import os
import re
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from stflow_fast.cohort.maps import draw_map
from stflow_fast.cohort.page import PAGE, write_page
from stflow_fast.cohort.state import DONE, FAILED, SlideLine
from stflow_fast.cohort.tables import GENES_HEADER, SLIDES_HEADER, write_tables
from stflow_fast.errors import OutputError

ABOUT = {
    "model": "runs/<b>best</b>",
    "weights_sha256": "0123456789abcdef" * 4,
    "version": "9.8.7",
    "selected_on": "validation",
    "seed": 41,
    "n_sample_steps": 5,
    "prior": {"name": "zinb"},
    "precision": "bfloat16",
}
ODD = [
    "<script>alert(1)</script>",
    "a & b \"c\" 'd'",
    "100%.#1?x=y",
    "javascript:alert(1)",
    "a:b",
    "Gewebe µ 组织",
    os.fsdecode(b"not-utf8-\xff"),
]


def done(slide, genes=(), mean=0.5, micron=8000.0, **more):
    maps = {gene: {"path": f"maps/{slide}.{number}.png", "micron": micron} for number, gene in enumerate(genes)}
    n = len(genes)
    found = {"genes": list(genes), "mean": [mean] * n, "std": [0.25] * n, "zeros": [0.0] * n} if genes else {}
    known = {"file": f"{slide}.h5ad", "spots": 4992, "genes": 50, "seconds": 12.25, "maps": maps, "statistics": found}
    return SlideLine(slide, f"/data/{slide}.h5", DONE, **{**known, **more})


def failed(slide, reason="features: has no rows; give some", **more):
    return SlideLine(slide, f"/data/{slide}.h5", FAILED, reason=reason, **more)


def lattice(width, height, pitch=1.0):
    """[width * height, 2], row by row."""
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).reshape(-1, 2) * pitch


class Seen(HTMLParser):
    """Rows and cells of the table, and all elements of a page."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.elements, self.text, self.in_cell = [], [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell &= tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(folder, lines, about=ABOUT):
    return Seen(write_page(folder, lines, about).read_text(encoding="utf-8"))


def picture(path):
    """[H, H, 4] in 0..255."""
    return np.asarray(Image.open(path).convert("RGBA")).astype(float)


def brightness(path):
    """[H, H], NaN where the ground is; it rises with the values."""
    image = picture(path)
    return np.where(image[..., 3] > 0, image[..., :3] @ (0.2126, 0.7152, 0.0722), np.nan)


# The page.


def test_failures_are_first_then_slides_by_id(tmp_path):
    page = page_of(tmp_path, [done("b"), failed("z"), done("a"), failed("c")])
    assert [row[0].split("/")[0] for row in page.rows[1:]] == ["c", "z", "a", "b"]
    assert [row[1] for row in page.rows[1:]] == ["failed", "failed", "done", "done"]
    assert [head["aria-sort"] for head in page.of("th")].index("ascending") == page.rows[0].index("status")


def test_the_page_says_what_became_of_all_and_what_made_them(tmp_path):
    lines = [done("a", seconds=3000.0), done("b", seconds=900.0, spots=8), failed("c")]
    page = page_of(tmp_path, lines)
    parts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", (tmp_path / PAGE).read_text()))
    assert (parts["done"], parts["failed"], parts["spots"], parts["genes"]) == ("2", "1", "5,000", "50")
    assert parts["time of all slides"] == "1 h 5 min"
    assert (parts["seed"], parts["precision"], parts["prior"], parts["stflow-fast"]) == (
        "41",
        "bfloat16",
        "zinb",
        "9.8.7",
    )
    assert parts["epoch chosen on"] == "validation"
    assert "runs/<b>best</b>" in page.text
    assert not page.of("b")


def test_a_page_of_no_slides_or_of_an_older_manifest_can_be_drawn(tmp_path):
    assert len(page_of(tmp_path, [], {}).rows) == 1


def test_reasons_and_notes_are_there_in_full(tmp_path):
    reason = "coords: " + "much is wrong with them; " * 40
    page = page_of(tmp_path, [failed("a", reason), done("b", notes=("2 sections", "odd pitch"))])
    assert page.rows[1][6] == reason
    assert page.rows[2][6] == "2 sectionsodd pitch"


@pytest.mark.parametrize("name", ODD)
def test_names_are_text_and_links_find_their_files(tmp_path, name):
    page = page_of(tmp_path, [done(name, [name]), failed("z", reason=name)])
    shown = name.encode("utf-8", "backslashreplace").decode()
    assert page.rows[0][-1] == shown
    assert page.rows[1][6] == shown
    assert page.rows[2][0] == f"{shown}/data/{shown}.h5"
    assert page.rows[2][6:] == ["", f"2 mm{shown} mean 0.5"]
    assert len(page.of("script")) == 1
    assert page.of("td")[-8]["data-v"] == shown
    assert page.of("img")[0]["alt"] == f"map of {shown}"
    for attributes, path in ((page.of("a")[-1], "href"), (page.of("img")[0], "src")):
        link = urlsplit(attributes[path])
        assert (link.scheme, link.netloc, link.query, link.fragment) == ("", "", "", "")
        assert attributes[path].isascii()
    assert unquote(page.of("a")[-1]["href"], errors="surrogateescape") == f"{name}.h5ad"
    assert unquote(page.of("img")[0]["src"], errors="surrogateescape") == f"maps/{name}.0.png"


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_no_name_makes_an_element(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("page")
    plain, odd = (page_of(folder, [done(name, [name]), failed(name, name)]) for name in ("x", text))
    assert [tag for tag, _ in odd.elements if tag not in ("wbr", "p")] == [
        tag for tag, _ in plain.elements if tag not in ("wbr", "p")
    ]


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    page = page_of(tmp_path, [done("a", ["ERBB2"]), failed("b")])
    text = (tmp_path / PAGE).read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert not any("src" in attributes for attributes in page.of("script"))
    assert [link["href"] for link in page.of("link")] == ["data:,"]
    assert {link["href"] for link in page.of("a")} == {"slides.csv", "genes.csv", "a.h5ad"}


def test_pictures_are_loaded_late_and_have_a_scale_where_it_is_known(tmp_path):
    lines = [done("a", ["ERBB2", "VIM"], micron=8000.0), done("b", ["ERBB2"], micron=600.0)]
    lines += [done("c", ["VIM"], micron=None), done("d")]
    page = page_of(tmp_path, lines)
    images = page.of("img")
    assert len(images) == 4
    assert {(image["loading"], image["width"], image["height"]) for image in images} == {("lazy", "160", "160")}
    assert [row[7:] for row in page.rows[1:]] == [
        ["2 mmERBB2 mean 0.5", "2 mmVIM mean 0.5"],
        ["200 µmERBB2 mean 0.5", ""],
        ["", "VIM mean 0.5"],
        [],
    ]
    # 2 mm of 8, and 200 um of 600, of 160 pixels
    assert [bar["style"] for bar in page.of("i")] == ["width:40.0px", "width:40.0px", "width:53.3px"]


def test_the_table_is_one_to_a_screen_reader_and_sorts_by_buttons(tmp_path):
    page = page_of(tmp_path, [done("a", ["ERBB2"]), failed("b")])
    heads = page.of("th")
    assert len(page.of("button")) == len(heads) == 8
    assert all(head["scope"] == "col" and head["role"] == "columnheader" for head in heads)
    assert all(cell["role"] == "cell" for cell in page.of("td"))
    # A failed slide's reason takes the place of its pictures.
    assert [cell["colspan"] for cell in page.of("td") if "colspan" in cell] == ["2"]
    sorted_by = [cell["data-v"] for cell in page.of("td") if "data-v" in cell]
    assert sorted_by == ["b", "0", "1", "a", "1", "4992", "50", "12.25", "1", "0.5"]


def test_two_thousand_slides_make_less_than_five_megabytes(tmp_path):
    lines = [done(f"TCGA-{i:04d}-{'x' * 50}", ["ENSG00000141510", "ERBB2"], notes=("n" * 100,)) for i in range(1960)]
    lines += [failed(f"TCGA-{i:04d}", "r" * 300) for i in range(1960, 2000)]
    page = write_page(tmp_path, lines, ABOUT)
    assert page.read_text().count("<img ") == 2 * 1960
    assert page.stat().st_size < 5e6


def test_a_page_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / PAGE).mkdir()
    with pytest.raises(OutputError, match=r"index\.html: cannot be written"):
        write_page(tmp_path, [], ABOUT)


# Pictures.


def test_a_gradient_comes_out_as_one(tmp_path):
    coords = lattice(60, 40, 100.0)
    width = draw_map(tmp_path / "a.png", coords[:, 0], coords, 0.5)
    shown = brightness(tmp_path / "a.png")
    rows = np.flatnonzero(np.isfinite(shown).any(axis=1))
    middle = shown[rows[len(rows) // 2]]
    middle = middle[np.isfinite(middle)]
    assert (np.diff(middle) >= 0).all()
    assert middle[-1] > middle[0] + 100
    # Along y nothing changes, and there are no holes.
    columns = shown[rows[5:-5], 5:-5]
    assert np.isfinite(columns).all()
    assert (np.ptp(columns, axis=0) == 0).all()
    # 60 columns of 50 micron, and the spots' own size at both ends
    assert 59 * 50 < width < 62 * 50


def test_pictures_are_as_one_sees_the_slide(tmp_path):
    coords = lattice(20, 20)
    value = (coords == (0, 0)).all(axis=1) * 1.0 + (coords[:, 1] > 15) * 0.4  # a corner, and the rows below
    draw_map(tmp_path / "a.png", value, coords, None)
    shown = brightness(tmp_path / "a.png")
    side, near = len(shown), len(shown) // 16
    assert shown[near // 2 : near, near // 2 : near].mean() > shown[side // 3, side // 3] + 50
    assert shown[-near, side // 2] > shown[side // 2, side // 2] + 30
    assert shown[near, -near] == shown[side // 2, side // 2]


@pytest.mark.parametrize(("width", "height"), [(100.0, 10.0), (10.0, 100.0)])
def test_tissue_keeps_its_shape_in_the_middle_of_a_square(tmp_path, width, height):
    draw_map(tmp_path / "a.png", np.arange(2500.0), lattice(50, 50) * (width / 49, height / 49), None)
    there = picture(tmp_path / "a.png")[..., 3] > 0
    side = len(there)
    assert there.shape == (side, side)
    assert 0 < there.sum() < 0.2 * side**2
    rows, columns = np.nonzero(there)
    for found in (rows, columns):
        assert found.min() + found.max() == pytest.approx(side - 1, abs=2)
    assert np.ptp(columns) / np.ptp(rows) == pytest.approx(width / height, rel=0.5)


@pytest.mark.parametrize(("n", "one_place"), [(0, False), (1, False), (2, False), (7, True)])
def test_slides_of_few_spots_have_a_picture(tmp_path, n, one_place):
    coords = np.zeros((n, 2)) if one_place else np.arange(2.0 * n).reshape(n, 2) ** 2
    width = draw_map(tmp_path / "new" / "a.png", np.arange(n, dtype=np.float32), coords, 0.5)
    there = picture(tmp_path / "new" / "a.png")[..., 3] > 0
    assert there.any() == (n > 0)
    assert (width is None) == (n < 2 or one_place)


def test_a_constant_gene_is_of_one_colour_and_the_ground_transparent(tmp_path):
    coords = lattice(20, 15)
    draw_map(tmp_path / "a.png", np.full(len(coords), 3.0), coords, None)
    image = picture(tmp_path / "a.png")
    there = image[..., 3] > 0
    assert len(np.unique(image[there], axis=0)) == 1
    assert not there[0, 0]


def test_spots_that_share_a_pixel_show_their_mean(tmp_path):
    coords = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    draw_map(tmp_path / "a.png", np.array([1.0, 0, 1, 2, 2]), coords[[0, 1, 1, 1, 2]], None)
    draw_map(tmp_path / "b.png", np.array([1.0, 1, 2]), coords, None)
    assert np.array_equal(picture(tmp_path / "a.png"), picture(tmp_path / "b.png"))


@settings(max_examples=60, deadline=None)
@given(
    coords=arrays(np.int64, st.tuples(st.integers(1, 40), st.just(2)), elements=st.integers(-(10**6), 10**6)),
    shift=st.integers(-(10**6), 10**6),
    scale=st.sampled_from([0.25, 2.0, 1024.0]),
)
def test_any_places_make_a_picture_whatever_the_origin_and_the_unit(tmp_path_factory, coords, shift, scale):
    folder = tmp_path_factory.mktemp("map")
    values = np.arange(len(coords), dtype=np.float32)
    draw_map(folder / "a.png", values, coords.astype(np.float64), None)
    draw_map(folder / "b.png", values, (coords + shift) * scale, None)
    shown = picture(folder / "a.png")
    assert (shown[..., 3] > 0).any()
    assert np.array_equal(shown, picture(folder / "b.png"))


# The tables.


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_tables_come_back_as_they_were(tmp_path):
    odd = 'a, "b"\nc'
    lines = [done("b", ["VIM"], mean=-0.5, notes=("one", "two; three")), failed("c", odd, attempts=3), done(odd)]
    write_tables(tmp_path, lines)
    slides = rows_of(tmp_path / "slides.csv")
    assert tuple(slides[0]) == SLIDES_HEADER
    assert [row["slide"] for row in slides] == ["c", odd, "b"]
    assert (slides[0]["status"], slides[0]["reason"], slides[0]["attempts"]) == ("failed", odd, "3")
    assert (slides[0]["spots"], slides[0]["seconds"], slides[0]["file"]) == ("", "", "")
    assert (slides[2]["spots"], slides[2]["genes"], slides[2]["seconds"]) == ("4992", "50", "12.25")
    assert (slides[2]["input"], slides[2]["file"]) == ("/data/b.h5", "b.h5ad")
    assert slides[2]["notes"] == "one; two; three"
    genes = rows_of(tmp_path / "genes.csv")
    assert tuple(genes[0]) == GENES_HEADER
    assert genes == [{"slide": "b", "gene": "VIM", "mean": "-0.5", "std": "0.25", "zeros": "0.0"}]


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\r", "\uff1d"])
def test_no_name_becomes_a_formula(tmp_path, first):
    text = f'{first}HYPERLINK("http://x")'
    line = done(text, [text], mean=-1.0, notes=(text,))
    write_tables(tmp_path, [line, SlideLine(text, text, FAILED, reason=text)])
    guarded = "'" + text
    one, other = rows_of(tmp_path / "slides.csv")
    assert [one[name] for name in ("slide", "input", "reason")] == [guarded] * 3
    assert [other[name] for name in ("slide", "file", "notes")] == [guarded, f"{guarded}.h5ad", guarded]
    (gene,) = rows_of(tmp_path / "genes.csv")
    assert [gene["slide"], gene["gene"], gene["mean"]] == [guarded, guarded, "-1.0"]


def test_names_that_are_not_utf8_are_written(tmp_path):
    write_tables(tmp_path, [done(ODD[-1])])
    assert rows_of(tmp_path / "slides.csv")[0]["slide"] == r"not-utf8-\udcff"


def test_tables_of_no_slides_have_their_headers(tmp_path):
    write_tables(tmp_path, [])
    assert (tmp_path / "slides.csv").read_text() == ",".join(SLIDES_HEADER) + "\n"
    assert (tmp_path / "genes.csv").read_text() == ",".join(GENES_HEADER) + "\n"
