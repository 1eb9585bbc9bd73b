# SPDX-License-Identifier: Apache-2.0
"""Find, check, load and save weights: safetensors with the model's configuration in their header.

Nothing here executes what a file contains. Weights are stored as float16 and run as float32.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from virst_engine.backends.base import Stages
from virst_engine.backends.choice import choose_stages
from virst_engine.backends.torch_backend import TorchStages
from virst_engine.config import EngineParameters, MemoryParameters, ModelParameters
from virst_engine.errors import BadGoal, WeightsError
from virst_engine.model.checkpoint import checkpoint_file, load_sam2
from virst_engine.model.config import VirstConfig
from virst_engine.model.sam2 import Sam2
from virst_engine.model.virst import Virst
from virst_engine.model.words import WordTokenizer
from virst_engine.slow.grounding_reasoner import IDENTITY, GroundingReasoner, phrase_of
from virst_engine.slow.reasoner import Reasoner
from virst_engine.slow.virst_reasoner import LONGEST_GOAL_WORDS, VirstReasoner

log = logging.getLogger(__name__)

FORMAT = "virst-weights-1"
SAM2_PREFIX, SAM2_IMAGE_SIZE = "sam2.1-", 1024
VIDEO_SIZE = 128  # of the small frames that a session keeps for a reasoner, where the model names none
SHIPPED = Path(__file__).parent / "weights"
REMEDY = "reinstall the package, train them with `virst train`, or give another file with the parameter model.weights"


def weights_path(parameters: ModelParameters) -> Path:
    """The file that `parameters` mean. Raises WeightsError when it does not exist."""
    if is_sam2(parameters):
        return checkpoint_file(parameters.name.removeprefix(SAM2_PREFIX), parameters.weights)
    path = Path(parameters.weights).expanduser() if parameters.weights else SHIPPED / f"{parameters.name}.safetensors"
    if not path.is_file():
        raise WeightsError(f"the weights of {parameters.name} are missing: no file {path}; {REMEDY}")
    return path


def weights_identity(parameters: ModelParameters) -> str:
    """What tells these weights from others: the model's name and the start of the file's SHA-256. Raises WeightsError.

    The segmenter and the reasoner compare it: an answer means nothing to other weights than those that gave it.
    """
    return f"{parameters.name} {weights_sha256(parameters)[:12]}"


def reasoner_identity(parameters: ModelParameters, method: str = "virst") -> str:
    """Of the reasoner that a segmenter of these parameters can use. Boxes mean the same to any. Raises WeightsError."""
    return IDENTITY if method == "grounding" else weights_identity(parameters)


def understands_sentences(parameters: ModelParameters, method: str = "virst") -> bool:
    """Whether there is a reasoner by this method for this model."""
    return method == "grounding" or not is_sam2(parameters)


def answers_questions(parameters: ModelParameters, method: str = "virst") -> bool:
    """Whether the reasoner of this method and model has words, too."""
    return method != "grounding" and understands_sentences(parameters, method)


def weights_sha256(parameters: ModelParameters) -> str:
    """SHA-256 of the weights file, in hexadecimal. Raises WeightsError."""
    path, digest = weights_path(parameters), hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error}); {REMEDY}") from error
    return digest.hexdigest()


def save_model(model: Virst, path: Path, card: dict[str, object] | None = None) -> None:
    """Write all weights of a model as float16, with its configuration and a few facts about their origin.

    Raises WeightsError for weights that are not finite, or too large for float16.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (value.half() if value.is_floating_point() else value).contiguous().cpu()
        for name, value in model.state_dict().items()
    }
    broken = _not_finite(tensors)
    if broken:
        raise WeightsError(
            f"{path} is not written: {len(broken)} tensors are not finite in float16, for example {broken[0]}; "
            "go back to an earlier checkpoint of the training"
        )
    metadata = {"format": FORMAT, "config": model.config.to_json(), "card": json.dumps(card or {})}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata)
    partial.replace(path)  # a reader never sees half a file


def read_card(path: Path) -> dict[str, object]:
    """The facts that `save_model` stored. Raises WeightsError for a file that is not ours."""
    try:
        return dict(json.loads(_read_metadata(path)["card"]))
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} has no readable model card ({error!r}); {REMEDY}") from error


def load_model(path: Path, *, device: str = "cpu", train_on: bool = False) -> Virst:
    """The model of a weights file, in evaluation mode, float32. Raises WeightsError naming cause and remedy.

    `train_on`: also from a file of before `occ_predictor` was trained; it starts from nothing then.
    """
    metadata = _read_metadata(path)
    try:
        config = VirstConfig.from_json(metadata["config"])
        if train_on:
            config = replace(config, fusion=replace(config.fusion, predicts_presence=True))
        model = Virst(config)
    except Exception as error:  # whatever torch, sam2 or transformers say to sizes that make no sense
        raise WeightsError(f"{path} holds a configuration that we cannot build ({error!r}); {REMEDY}") from error
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is damaged ({error}); {REMEDY}") from error
    expected = model.state_dict()
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if train_on and (new := {name for name in missing if name.startswith("occ_predictor.")}):
        log.warning("%s is of an earlier version: occ_predictor starts from nothing", path)
        tensors |= {name: expected[name] for name in new}
        missing = missing - new
    shapes = [name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape]
    for kind, names in (("lacks", missing), ("has unknown", unexpected), ("has wrong shapes for", shapes)):
        if names:
            raise WeightsError(f"{path} {kind} {len(names)} tensors, for example {min(names)}; {REMEDY}")
    broken = _not_finite(tensors)
    if broken:
        raise WeightsError(
            f"{path} is damaged: {len(broken)} tensors are not finite, for example {broken[0]}; {REMEDY}"
        )
    model.load_state_dict({name: value.to(expected[name].dtype) for name, value in tensors.items()})
    try:
        return model.eval().to(device)
    except (RuntimeError, AssertionError) as error:
        raise WeightsError(f"the model cannot run on device {device!r}: {error}; set model.device") from error


def read_config(path: Path) -> VirstConfig:
    """The dimensions of the model in a weights file. Raises WeightsError."""
    try:
        return VirstConfig.from_json(_read_metadata(path)["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} holds a configuration that we cannot read ({error}); {REMEDY}") from error


def _read_metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is no readable safetensors file ({error}); {REMEDY}") from error
    found = metadata.get("format", "none")
    if found != FORMAT or "config" not in metadata:
        raise WeightsError(
            f"{path} is a safetensors file, but not one that this version of `virst train` writes "
            f"(format {found}, wanted {FORMAT}); {REMEDY}"
        )
    return metadata


def _not_finite(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]


def load_goal_check(parameters: ModelParameters, method: str = "virst") -> Callable[[str], None]:
    """A function that raises BadGoal for a sentence that this model's reasoner could not read. Raises WeightsError.

    What a detector (`method` grounding) can read is known to the detector alone: it says so when it is asked.
    """
    if method == "grounding":

        def has_words(sentence: str) -> None:
            phrase_of(sentence)

        return has_words
    if is_sam2(parameters):

        def refuse(sentence: str) -> None:
            raise BadGoal(
                f"{parameters.name} understands no sentences; point objects out with a box, points or a mask, or let a "
                "detector find them (reasoner.method grounding)"
            )

        return refuse
    path = weights_path(parameters)
    tokenizer = WordTokenizer(read_config(path).words)

    def check(sentence: str) -> None:
        tokenizer.encode_goal(sentence, LONGEST_GOAL_WORDS)

    return check


def load_stages(
    parameters: ModelParameters, engine: EngineParameters | None = None, memory: MemoryParameters | None = None
) -> Stages:
    """The segmenter's stages on `parameters.device`, run by the backend that `engine` asks for.

    `memory`: what exported stages must have room for.

    Raises:
        WeightsError: the weights are missing, damaged or of another model.
        BackendError: the backend cannot run here.
        ExportError: `engine.path` is no export of this model.
    """
    engine = EngineParameters() if engine is None else engine
    _limit_threads(parameters)
    digest = ""
    if engine.path:  # exported stages are run without a look at the weights
        digest = weights_sha256(parameters)
        _check_sha256(parameters, digest)
    video_size = VIDEO_SIZE
    if not is_sam2(parameters):
        config = read_config(weights_path(parameters))
        video_size = config.video.image_size

    def torch_stages(image_size: int) -> TorchStages:
        sam2, fusion_level = load_segmenter(replace(parameters, image_size=image_size))
        if engine.pooled_keys:
            sam2.pool_memory(2)
        return TorchStages(
            sam2,
            fusion_level=fusion_level,
            video_size=video_size,
            precision=engine.precision,
            compiled=engine.compiled,
        )

    return choose_stages(
        parameters,
        engine,
        MemoryParameters() if memory is None else memory,
        weights_sha256=digest,
        video_size=video_size,
        torch_stages=torch_stages,
    )


def load_segmenter(parameters: ModelParameters) -> tuple[Sam2, int]:
    """SAM 2 alone, of any model, in evaluation mode; and the FPN level that its reasoner reads. Raises WeightsError."""
    if is_sam2(parameters):
        size = parameters.name.removeprefix(SAM2_PREFIX)
        image_size = parameters.image_size or SAM2_IMAGE_SIZE
        sam2 = load_sam2(size, parameters.weights, image_size, parameters.sha256, parameters.device)
        return sam2, -1
    if parameters.sha256:
        _check_sha256(parameters, weights_sha256(parameters))
    model = load_model(weights_path(parameters), device=parameters.device)
    side = model.config.sam2.image_size
    if parameters.image_size not in (0, side):
        raise WeightsError(
            f"{parameters.name} sees images of {side} px, model.image_size is {parameters.image_size}; set it to 0"
        )
    return model.seg_model, model.config.fusion.feature_level


def _check_sha256(parameters: ModelParameters, digest: str) -> None:
    if parameters.sha256 and parameters.sha256.lower() != digest:
        raise WeightsError(
            f"the weights have the SHA-256 {digest}, model.sha256 asks for {parameters.sha256}; {REMEDY}"
        )


def is_sam2(parameters: ModelParameters) -> bool:
    """Whether this is SAM 2.1 alone, without a reasoner."""
    return parameters.name.startswith(SAM2_PREFIX)


def stages_of(model: Virst) -> TorchStages:
    return TorchStages(
        model.seg_model, fusion_level=model.config.fusion.feature_level, video_size=model.config.video.image_size
    )


def load_reasoner(
    parameters: ModelParameters, *, method: str = "virst", initial_fusion: bool = True, second_fusion: bool = True
) -> Reasoner:
    """The reasoner on `parameters.device`; a fusion that is False: the ablations of table 4. Raises WeightsError."""
    if method != "virst":
        raise WeightsError(f"{parameters.name} has no weights for the method {method}")
    if is_sam2(parameters):
        raise WeightsError(
            f"{parameters.name} has no reasoner; choose a model that has one (tabletop-tiny), or --method grounding"
        )
    _limit_threads(parameters)
    model = load_model(weights_path(parameters), device=parameters.device)
    return VirstReasoner(model, initial_fusion=initial_fusion, second_fusion=second_fusion)


def load_grounding(
    detector: str, parameters: ModelParameters, *, threshold: float = 0.0, most_boxes: int = 1
) -> GroundingReasoner:
    """The method `grounding` with the detector in that folder, on `parameters.device`.

    Raises:
        WeightsError: there is none that can be used.
        ValueError: of threshold or most_boxes, see GroundingReasoner.
    """
    from virst_engine.slow.transformers_detector import load_detector  # a session needs no language model

    if not detector:
        raise WeightsError("the method grounding needs --detector, the folder of a zero-shot object detector")
    _limit_threads(parameters)
    found = load_detector(Path(detector), device=parameters.device)
    return GroundingReasoner(found, threshold=threshold, most_boxes=most_boxes)


def _limit_threads(parameters: ModelParameters) -> None:
    if parameters.threads:
        torch.set_num_threads(parameters.threads)
