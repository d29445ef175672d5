"""The model in LazySlide: what its protocol asks for, and what its runner makes of it where LazySlide is installed."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import anndata
import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st

from stflow_fast.cohort import SamplingConfig
from stflow_fast.cohort import predict as predict_cohort
from stflow_fast.errors import InputError
from stflow_fast.integrations.lazyslide import STFlowPredictor
from stflow_fast.model import Denoiser
from stflow_fast.sampling import sample
from stflow_fast.slides import ReadOptions, Slide

from .builders import FEATURES, PATCH, arrays, small_model

GENES = ("ERBB2", "CD3E", "GATA3", "VWF")


@pytest.fixture(scope="module")
def model() -> Denoiser:
    return small_model(len(GENES), GENES, "uni")


@pytest.fixture(scope="module")
def base() -> ModuleType:
    """``lazyslide_models.base``, as it is on the disk. Its package, which loads every model, is passed by, and so is
    timm, of which the file wants two constants: it brings torchvision, which must fit the torch that is there."""
    package = importlib.util.find_spec("lazyslide_models")
    if package is None:
        pytest.skip("lazyslide-models is not installed (pip install --no-deps lazyslide-models)")
    names = ("lazyslide_models", "timm", "timm.data", "timm.data.constants")
    stand_ins = {name: ModuleType(name) for name in names}
    stand_ins["lazyslide_models"].__path__ = list(package.submodule_search_locations)
    vars(stand_ins["timm.data.constants"]).update(IMAGENET_DEFAULT_MEAN=(), IMAGENET_DEFAULT_STD=())
    with mock.patch.dict(sys.modules, stand_ins):
        return importlib.import_module("lazyslide_models.base")


def table_of(predicted: dict[str, np.ndarray]) -> np.ndarray:
    return np.column_stack(list(predicted.values()))


def test_it_is_of_the_protocol(base: ModuleType, model: Denoiser) -> None:
    predictor = STFlowPredictor(model)
    assert isinstance(predictor, base.FeaturePredictionModelProtocol)
    assert set(inspect.get_annotations(base.FeaturePredictionModel)) <= set(dir(predictor))
    for of_protocol in (base.ModelBaseProtocol.to, base.FeaturePredictionModel.predict):
        ours = inspect.signature(getattr(STFlowPredictor, of_protocol.__name__)).parameters
        wanted = inspect.signature(of_protocol).parameters
        assert list(ours) == list(wanted)
        assert [each.default for each in ours.values()] == [each.default for each in wanted.values()]
    assert predictor.needs_coords
    assert predictor.whole_slide
    assert predictor.to("cpu") is predictor


@pytest.mark.parametrize("make", [np.asarray, np.float16, scipy.sparse.csr_matrix, torch.from_numpy])
def test_values_are_those_of_sample_by_gene(model: Denoiser, make: Any) -> None:
    made = arrays("S0")
    features = made["features"].astype(np.float16).astype(np.float32)
    sampling = SamplingConfig(seed=3, n_sample_steps=4)
    found = STFlowPredictor(model, sampling, slide_id="B4").predict(make(features), made["centres"])
    slide = Slide("B4", features, made["centres"], made["barcodes"])
    assert tuple(found) == GENES
    assert all(values.shape == (60,) and values.dtype == np.float32 for values in found.values())
    assert np.array_equal(table_of(found), sample(model, slide, n_sample_steps=4, seed=3).expression)


def test_genes_without_names_are_numbered(model: Denoiser) -> None:
    predictor = STFlowPredictor(Denoiser(model.config))
    made = arrays("S0")
    assert tuple(predictor.predict(made["features"], made["centres"])) == ("gene_0", "gene_1", "gene_2", "gene_3")
    assert predictor.features_model_name is None


def test_corners_of_tiles_are_as_good_as_centres(model: Denoiser) -> None:
    made, predictor = arrays("S0"), STFlowPredictor(model)
    at_centres = predictor.predict(made["features"], made["centres"])
    at_corners = predictor.predict(made["features"], made["centres"] - PATCH / 2)
    np.testing.assert_allclose(table_of(at_corners), table_of(at_centres), rtol=1e-5, atol=1e-5)


@given(seed=st.integers(0, 2**32 - 1))
def test_the_order_of_tiles_decides_their_noise_alone(model: Denoiser, seed: int) -> None:
    rng = np.random.default_rng(seed)
    features, coords = rng.normal(size=(60, FEATURES)).astype(np.float32), rng.uniform(0, 5000, (60, 2))
    order = rng.permutation(60)
    predictor = STFlowPredictor(model, SamplingConfig(prior="zero"))
    there, here = predictor.predict(features, coords), predictor.predict(features[order], coords[order])
    np.testing.assert_allclose(table_of(here), table_of(there)[order], rtol=1e-5, atol=1e-5)


def test_noise_is_of_the_seed_and_the_slide(model: Denoiser) -> None:
    made = arrays("S0")

    def drawn(seed: int, slide_id: str) -> bytes:
        predictor = STFlowPredictor(model, SamplingConfig(seed=seed), slide_id)
        return table_of(predictor.predict(made["features"], made["centres"])).tobytes()

    assert drawn(0, "A") == drawn(0, "A")
    assert len({drawn(0, "A"), drawn(1, "A"), drawn(0, "B")}) == 3


def test_the_runner_s_amp_and_inference_mode_change_nothing(model: Denoiser) -> None:
    """Nor is the model spoilt for training by them."""
    made = arrays("S0")
    predictor = STFlowPredictor(Denoiser(model.config, model.provenance))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        under = predictor.predict(made["features"], made["centres"])
    plain = predictor.predict(made["features"], made["centres"])
    assert np.array_equal(table_of(under), table_of(plain))
    spots = torch.zeros(1, 60, len(GENES)), torch.zeros(1, 60, FEATURES), torch.rand(1, 60, 2)
    predictor.model.inference(*spots, torch.tensor([0.5])).sum().backward()


def with_nan(values: np.ndarray) -> np.ndarray:
    spoilt = values.copy()
    spoilt[7] = np.nan
    return spoilt


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"coords": None}, "^coords: the model needs them; give the corners of the tiles"),
        ({"features": lambda x: x[:, 1:]}, r"^slide wsi: features: must have shape \[N, 16\], not \[60, 15\]; use"),
        ({"features": lambda x: x[0]}, r"^slide wsi: features: must have shape \[N, F\], not \[16\]$"),
        ({"features": with_nan}, "^slide wsi: features of 1 of 60 spots are NaN or infinite; remove"),
        ({"coords": with_nan}, "^slide wsi: coords of 1 of 60 spots are NaN or infinite; remove"),
        ({"coords": lambda x: x[1:]}, r"^slide wsi: coords: must have shape \[60, 2\], not \[59, 2\]"),
        ({"features": lambda x: x[:0], "coords": lambda x: x[:0]}, "^slide wsi: has no spots$"),
    ],
)
def test_bad_input_is_one_line(model: Denoiser, change: dict[str, Any], said: str) -> None:
    made = arrays("S0")
    given_ = {"features": made["features"], "coords": made["centres"]}
    given_.update({name: spoil and spoil(given_[name]) for name, spoil in change.items()})
    with pytest.raises(InputError, match=said) as raised:
        STFlowPredictor(model).predict(**given_)
    assert "\n" not in str(raised.value)


def test_a_device_that_cannot_be_is_refused(model: Denoiser) -> None:
    with pytest.raises(InputError, match="^device: must be auto, cpu, cuda or cuda:N, not 'mps'$"):
        STFlowPredictor(model).to(torch.device("mps"))


def test_no_run_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="its training did not finish"):
        STFlowPredictor(tmp_path)


@pytest.fixture
def wsi(tmp_path: Path) -> Any:
    """A slide with tiles and their features, as wsidata writes it."""
    wsidata = pytest.importorskip("wsidata", reason="wsidata is not installed")
    tifffile = pytest.importorskip("tifffile", reason="wsidata needs an image, and tifffile is not installed")
    import shapely

    tifffile.imwrite(
        tmp_path / "slide.tiff", np.zeros((768, 1024, 3), dtype=np.uint8), tile=(256, 256), photometric="rgb"
    )
    wsi = wsidata.open_wsi(tmp_path / "slide.tiff")
    wsi.set_mpp(0.5)
    x, y = np.meshgrid(np.arange(0, 960, 64), np.arange(0, 704, 64))
    corners = np.column_stack([x.ravel(), y.ravel()])
    wsidata.io.add_tissues(wsi, "tissues", [shapely.box(0, 0, 1024, 768)])
    spec = wsidata.TileSpec.from_wsidata(wsi, tile_px=64, mpp=0.5)
    wsidata.io.add_tiles(wsi, "tiles", corners, spec, np.zeros(len(corners), dtype=int))
    features = np.random.default_rng(0).normal(size=(len(corners), FEATURES)).astype(np.float32)
    wsidata.io.add_features(wsi, "uni_tiles", "tiles", features)
    return wsi


def test_lazyslide_stores_what_predict_writes_for_the_store(wsi: Any, model: Denoiser, tmp_path: Path) -> None:
    """Not in batches. Nothing is said of the table of features: it is that of the model's encoder."""
    if importlib.util.find_spec("lazyslide") is None:
        pytest.skip("lazyslide is not installed")
    import lazyslide

    predictor = STFlowPredictor(model, slide_id="slide")
    lazyslide.tl.feature_prediction(wsi, predictor, batch_size=7, device="cpu", amp=True, compile=True)
    stored = wsi.tables["stflow_tiles"]
    wsi.write()
    reading = ReadOptions(features_key="uni")
    predict_cohort(model, tmp_path / "slide.zarr", tmp_path / "out", reading=reading)
    written = anndata.read_h5ad(tmp_path / "out" / "slide.h5ad")
    assert tuple(stored.var_names) == tuple(written.var_names) == GENES
    assert stored.obs["tile_id"].astype(str).tolist() == written.obs_names.tolist()
    np.testing.assert_allclose(stored.X, written.X, rtol=1e-5, atol=1e-5)
