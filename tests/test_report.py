"""Reports: what they say, that the pictures show the data the right way up, that pages need nothing else."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from stflow_fast import report
from stflow_fast.errors import InputError
from stflow_fast.evaluation import score
from stflow_fast.report.maps import _round_length
from stflow_fast.synthetic import make_cohort

GENES = ["ERBB2", "GATA3", "VWF", "[bold]odd</td>", "FLAT"]


@pytest.fixture(scope="module")
def result():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(200, 5))
    noise = rng.normal(size=truth.shape)
    prediction = truth + noise * [0.1, 1.0, 2.0, 4.0, 1.0]
    prediction[:, 4] = 1.0
    made = score(truth, prediction, GENES)
    made["baselines"] = {
        "train_mean": score(truth, np.zeros_like(truth), GENES),
        "ridge_alpha_1e4": score(truth, truth + 3 * noise, GENES),
        "depth_oracle": score(truth, truth + 2 * noise, GENES),
    }
    return made


def shown(table, width=80):
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def picture(path):
    """[height, width, 3] in 0..1."""
    return imread(path)[..., :3]


def test_results_table_puts_the_model_first_and_hides_no_constant_gene(result):
    lines = [line for line in shown(report.results_table(result)).splitlines() if line.strip()]
    rows = {line.split("  ")[0].strip(): line.split() for line in lines[3:7]}
    assert list(rows) == ["stflow-fast", "train mean", "ridge alpha 1e4", "depth oracle"]
    assert f"{result['pearson_mean']:.3f}" in rows["stflow-fast"]
    assert f"{result['mse_mean']:.3f}" in rows["stflow-fast"]
    assert rows["stflow-fast"][-1] == "1"
    assert rows["train mean"][2:7] == ["-"] * 5
    assert rows["train mean"][-1] == "5"
    assert "reads the true total count" in lines[-1]


@pytest.mark.parametrize("table", [report.results_table, lambda result: report.biomarker_table(result, ["ERBB2"])])
def test_tables_say_what_the_epoch_was_chosen_on(result, table):
    assert "epoch chosen on TEST." in shown(table({**result, "selected_on": "TEST"}))
    assert "epoch chosen" not in shown(table(result))


def test_pictures_say_what_the_epoch_was_chosen_on(result, tmp_path):
    for name, chosen in (("plain", {}), ("test", {"selected_on": "TEST"})):
        report.score_bars(tmp_path / f"{name}.png", {**result, **chosen})
    # A line of text stands at the top left, where there was the start of the axis.
    plain, test = ((picture(tmp_path / f"{name}.png")[:40] < 0.5).sum() for name in ("plain", "test"))
    assert test > 2 * plain


def test_tables_fit_a_terminal_of_80_columns(result):
    text = shown(report.results_table(result)) + shown(report.biomarker_table(result, ["ERBB2"]))
    assert "…" not in text
    assert "stflow-fast" in text


def test_biomarker_table_shows_each_gene_beside_the_baselines(result):
    text = shown(report.biomarker_table(result, ["VWF", "[bold]odd</td>"]), width=120)
    baseline = result["baselines"]["ridge_alpha_1e4"]["genes"][2]["pearson"]
    line = next(line for line in text.splitlines() if "VWF" in line)
    assert f"{result['genes'][2]['pearson']:.3f}" in line
    assert f"{baseline:.3f}" in line
    assert "[bold]odd</td>" in text
    assert "train mean" not in text  # it has no Pearson for any gene


def test_biomarker_table_names_the_genes_that_were_not_predicted(result):
    with pytest.raises(InputError, match="UBE2C, MKI67 not among the 5"):
        report.biomarker_table(result, ["VWF", "UBE2C", "MKI67"])


def test_pick_genes_takes_best_median_and_worst_of_the_defined(result):
    assert report.pick_genes(result) == ("ERBB2", "GATA3", "[bold]odd</td>")
    one = {"genes": [gene for gene in result["genes"] if gene["name"] in ("VWF", "FLAT")]}
    assert report.pick_genes(one) == ("VWF", "VWF", "VWF")
    with pytest.raises(InputError, match="all 5 are constant"):
        report.pick_genes(result["baselines"]["train_mean"])


def draw_maps(path, truth, prediction, coords, **more):
    names = [f"gene{i}" for i in range(truth.shape[1])]
    report.gene_maps(path, coords, truth, prediction, names, [0.5] * len(names), "slide", **more)
    return picture(path)


def lattice(side=40):
    row, column = np.divmod(np.arange(side * side), side)
    return np.column_stack([column, row]) * 100.0


def test_gene_maps_draw_y_downward_and_x_to_the_right(tmp_path):
    coords = lattice()
    truth = coords[:, 1:]  # bright at the bottom
    prediction = coords[:, :1]  # bright at the right
    image = draw_maps(tmp_path / "maps.png", truth, prediction, coords, labels=()).mean(axis=2)
    height, width = image.shape
    left = image[int(0.2 * height) : int(0.8 * height), int(0.1 * width) : int(0.3 * width)]
    right = image[int(0.3 * height) : int(0.7 * height), int(0.52 * width) : int(0.85 * width)]
    assert left[-20:].mean() > left[:20].mean() + 0.3
    assert right[:, -20:].mean() > right[:, :20].mean() + 0.3


def test_gene_maps_fill_the_tissue_whatever_the_number_of_spots(tmp_path):
    for side in (12, 40, 150):
        coords = lattice(side)
        zero = np.zeros((len(coords), 1))
        image = draw_maps(tmp_path / f"{side}.png", zero, zero, coords, labels=())
        height, width = image.shape[:2]
        tissue = image[int(0.3 * height) : int(0.7 * height), int(0.1 * width) : int(0.3 * width)]
        background = np.abs(tissue - np.array([0xEE, 0xF0, 0xF2]) / 255).max(axis=2) < 0.05
        assert background.mean() < 0.08, side


def test_gene_maps_stand_a_single_outlier(tmp_path):
    coords = lattice()
    values = np.random.default_rng(0).random((len(coords), 1))
    plain = draw_maps(tmp_path / "plain.png", values, values, coords)
    values[0] = 1e6
    image = draw_maps(tmp_path / "outlier.png", values, values, coords)
    assert image.shape == plain.shape
    assert np.abs(image - plain).mean() < 0.02


def test_gene_maps_add_a_scale_bar_only_where_pixels_have_a_size(tmp_path):
    coords = lattice()
    with_bar = draw_maps(tmp_path / "a.png", coords, coords, coords, micron_per_pixel=0.5)
    without = draw_maps(tmp_path / "b.png", coords, coords, coords)
    found = [(image[-200:, 30:60].max(axis=2) < 0.02).all(axis=1).any() for image in (with_bar, without)]
    assert found == [True, False]


@pytest.mark.parametrize(("width_mm", "length"), [(20.0, 5.0), (6.5, 1.0), (4.0, 1.0), (1.0, 0.2), (0.9, 0.2)])
def test_scale_bar_has_a_round_length_of_at_most_a_quarter(width_mm, length):
    assert _round_length(width_mm / 4) == length


@pytest.mark.parametrize("n", [1, 2])
def test_gene_maps_draw_the_smallest_slides(tmp_path, n):
    coords = np.full((n, 2), 7.0)  # one spot, or two at one place
    values = np.zeros((n, 1))
    report.gene_maps(tmp_path / "maps.png", coords, values, values, ["A"], [None], "tiny", micron_per_pixel=0.5)
    assert picture(tmp_path / "maps.png").std() > 0


def test_gene_maps_refuse_shapes_that_disagree(tmp_path):
    with pytest.raises(InputError, match="1600 spots and 1 genes"):
        report.gene_maps(tmp_path / "m.png", lattice(), np.zeros((9, 1)), np.zeros((9, 1)), ["A"], [0.1], "slide")
    assert not list(tmp_path.iterdir())


def test_evaluation_pictures_map_every_slide(tmp_path):
    cohort = make_cohort(n_train=1, train_spots=120, test_spots=150, n_genes=4, feature_dim=8, seed=1)
    slides = [cohort.test[0], cohort.train[0]]
    truth = [slide.expression(cohort.genes) for slide in slides]
    predicted = [values + np.arange(len(values))[:, None] % 7 for values in truth]
    result = score(np.concatenate(truth), np.concatenate(predicted), cohort.genes)
    written = report.evaluation_pictures(tmp_path, result, slides, truth, predicted)
    assert [path.name for path in written] == ["scores.png", *(f"maps_{slide.id}.png" for slide in slides)]
    assert sorted(written) == sorted(tmp_path.iterdir())
    constant = [np.zeros_like(values) for values in truth]
    result = score(np.concatenate(truth), np.concatenate(constant), cohort.genes)
    assert len(report.evaluation_pictures(tmp_path / "flat", result, slides, truth, constant)) == 1


def test_training_curves_mark_the_last_best_epoch_and_bear_gaps(tmp_path):
    records = [
        {
            "epoch": epoch,
            "train_loss": 1 / (epoch + 1),
            "selection_mse": None,
            "selection_pearson": 0.01 * epoch,
            "best": epoch < 7,
        }
        for epoch in range(10)
    ]
    del records[3]["train_loss"]
    report.training_curves(tmp_path / "curves.png", records)
    image = picture(tmp_path / "curves.png")
    accent = np.abs(image - np.array([0xB8, 0x74, 0x00]) / 255).max(axis=2) < 0.1
    columns = np.flatnonzero(accent.sum(axis=0) > 100)
    left, right = 0.075 * image.shape[1], image.shape[1]  # of the axes
    assert 6 / 9 - 0.05 < (columns.mean() - left) / (right - left) < 6 / 9 + 0.05
    with pytest.raises(InputError, match="no epochs"):
        report.training_curves(tmp_path / "none.png", [])


def test_score_bars_are_as_long_as_the_scores(tmp_path, result):
    report.score_bars(tmp_path / "bars.png", result)
    image = picture(tmp_path / "bars.png")

    def length(color):
        pale = 0.35 * np.array(color) / 255 + 0.65
        return (np.abs(image - pale).max(axis=2) < 0.02).sum(axis=1).max()

    model, oracle = length((0x00, 0x72, 0xB2)), length((0xB8, 0x74, 0x00))
    expected = result["pearson_mean"] / result["baselines"]["depth_oracle"]["pearson_mean"]
    assert model / oracle == pytest.approx(expected, rel=0.1)


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.sources, self.text, self.open = [], [], "", []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.sources += [values[key] for key in ("src", "href") if key in values]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_self_contained_and_escaped(tmp_path, result):
    report.score_bars(tmp_path / "bars.png", result)
    hostile = '<script>alert(1)</script> & "more"'
    sections = [
        (hostile, f"first\n{hostile}"),
        ("Scores", report.results_table(result)),
        ("", report.biomarker_table(result, GENES)),
    ]
    report.write_html(tmp_path / "index.html", hostile, sections, [(hostile, tmp_path / "bars.png")])
    source = (tmp_path / "index.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(source)
    assert page.open == []
    assert "script" not in page.tags
    assert page.text.count(hostile) == 5  # title, heading, section heading, text, caption
    assert "[bold]odd</td>" in page.text
    assert f"{result['pearson_mean']:.3f}" in page.text
    assert all(address.startswith("data:image/png;base64,") for address in page.sources)
    assert len(page.sources) == 1
    assert not re.search(r"https?://|@import|url\(", source)
    assert "prefers-color-scheme: dark" in source


def test_page_names_the_picture_that_is_missing_and_leaves_nothing_half_written(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png: cannot be read"):
        report.write_html(tmp_path / "index.html", "t", [], [("caption", tmp_path / "gone.png")])
    assert not list(tmp_path.iterdir())


def test_pictures_leave_nothing_behind_where_they_cannot_be_written(tmp_path, result):
    (tmp_path / "bars.png").mkdir()  # a folder is in the way
    with pytest.raises(InputError, match=r"bars\.png: cannot be written"):
        report.score_bars(tmp_path / "bars.png", result)
    assert [path.name for path in tmp_path.iterdir()] == ["bars.png"]


@pytest.mark.parametrize(("n_genes", "called"), [(3, "neighbourhoods "), (2, "neighbourhoods (2 genes)")])
def test_certainty_of_neighborhoods_says_of_how_many_genes_it_is(n_genes, called):
    found = {"crps_mean": 0.25, "coverage_50": 0.5, "coverage_90": 0.875, "spread_ratio": None}
    result = {
        "genes": [{}] * 3,
        "certainty": found,
        "certainty_of_neighborhoods": {**found, "crps_mean": 0.125, "n_genes": n_genes},
        "baselines": {"train_mean": {"certainty": found}, "ridge": {}},
    }
    text = shown(report.certainty_table(result))
    assert re.search(r"stflow-fast +0\.250 +0\.500 +0\.875 +-", text)
    assert re.search(r"stflow-fast, " + re.escape(called) + r" *0\.125", text)
    assert "random training spots" in text
    assert "ridge" not in text
    alone = shown(report.certainty_table({"genes": [{}], "certainty": found}))
    assert "stflow-fast, neighbourhoods" not in alone
