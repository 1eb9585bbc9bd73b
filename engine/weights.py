# SPDX-License-Identifier: Apache-2.0
"""Find, check, load and save weights: safetensors with the model's configuration in their header.

Those of SAM 2.1 and of VIRST at full size come in forms of their own: model/checkpoint.py, model/weights_folder.py.
Nothing here executes what a file contains. Weights are stored as float16 and run as float32.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from virst_engine.backends.base import Stages
from virst_engine.backends.choice import choose_stages
from virst_engine.backends.torch_backend import TorchStages
from virst_engine.config import METHOD_WINDOWS, VIRST_7B, EngineParameters, MemoryParameters, ModelParameters
from virst_engine.errors import BadGoal, WeightsError
from virst_engine.model.chat_tokenizer import ChatTokenizer
from virst_engine.model.checkpoint import checkpoint_file, load_sam2
from virst_engine.model.config import VirstConfig
from virst_engine.model.methods import load_method, read_method_config
from virst_engine.model.sam2 import Sam2
from virst_engine.model.stored import read_metadata, read_model_card, read_weights, write_weights
from virst_engine.model.tempvrs import TempVrsConfig
from virst_engine.model.virst import Virst
from virst_engine.model.visa import Visa, VisaConfig
from virst_engine.model.weights_folder import find_folder, load_reasoner_model, load_segmenter_model, read_manifest
from virst_engine.model.words import WordTokenizer
from virst_engine.slow.grounding_reasoner import IDENTITY, GroundingReasoner, phrase_of
from virst_engine.slow.reasoner import Reasoner
from virst_engine.slow.virst_7b_reasoner import WINDOWS, Virst7bReasoner
from virst_engine.slow.virst_reasoner import LONGEST_GOAL_WORDS, VirstReasoner
from virst_engine.slow.window_reasoner import TempVrsReasoner, VisaReasoner

log = logging.getLogger(__name__)

FORMAT = "virst-weights-1"
SAM2_PREFIX, SAM2_IMAGE_SIZE = "sam2.1-", 1024
VIDEO_SIZE = 128  # of the small frames that a session keeps for a reasoner, where the model names none
SHIPPED = Path(__file__).parent / "weights"
REMEDY = "reinstall the package, train them with `virst train`, or give another file with the parameter model.weights"


def weights_path(parameters: ModelParameters) -> Path:
    """The file that `parameters` mean, or the folder of virst-7b. Raises WeightsError when it does not exist."""
    if is_full_size(parameters):
        return find_folder(parameters.weights)
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


def reasoner_identity(parameters: ModelParameters, method: str = "virst", reasoner_weights: str = "") -> str:
    """Of the reasoner that a segmenter of these parameters can use. Boxes mean the same to any. Raises WeightsError."""
    if method == "grounding":
        return IDENTITY
    if method in METHOD_WINDOWS:
        path = method_weights_path(parameters, method, reasoner_weights)
        return f"{weights_identity(parameters)} {method} {file_sha256(path)[:12]}"
    return weights_identity(parameters)


def method_weights_path(parameters: ModelParameters, method: str, reasoner_weights: str = "") -> Path:
    """The file of a reasoner beside VIRST's, for this model. Raises WeightsError when there is none."""
    if reasoner_weights:
        path = Path(reasoner_weights).expanduser()
    else:
        path = SHIPPED / f"{parameters.name}-{method}.safetensors"
    if not path.is_file():
        raise WeightsError(
            f"there is no reasoner of the method {method} for {parameters.name}: no file {path}; choose another "
            f"reasoner.method, or train one with `virst train --method {method}` and name it in reasoner.weights"
        )
    return path


def load_method_config(
    parameters: ModelParameters, method: str, reasoner_weights: str = ""
) -> VisaConfig | TempVrsConfig:
    """Of the reasoner's file. Raises WeightsError where it is of another method, or for another segmenter."""
    path = method_weights_path(parameters, method, reasoner_weights)
    config = read_method_config(path)
    found = "visa" if isinstance(config, VisaConfig) else "tempvrs"
    if found != method:
        raise WeightsError(f"{path} holds a reasoner of the method {found}, reasoner.method is {method}; change one")
    if config.segmenter != weights_sha256(parameters):
        raise WeightsError(
            f"{path} was trained for other weights of {parameters.name} than {weights_path(parameters)}, whose SAM 2 "
            "would not understand its prompts; use the weights that it was trained for, or train it again"
        )
    if config.window_frames != METHOD_WINDOWS[method][0]:
        raise WeightsError(
            f"{path} reads windows of {config.window_frames} frames, a segmenter sends {METHOD_WINDOWS[method][0]}; "
            "train it again with this version"
        )
    return config


def understands_sentences(parameters: ModelParameters, method: str = "virst") -> bool:
    """Whether there can be a reasoner by this method for this model."""
    return method == "grounding" or not is_sam2(parameters)


def answers_questions(parameters: ModelParameters, method: str = "virst") -> bool:
    """Whether the reasoner of this method and model has words, too. Raises WeightsError."""
    if is_full_size(parameters) and method == "virst":
        return read_manifest(weights_path(parameters)).has_words
    return method != "grounding" and understands_sentences(parameters, method)


def weights_sha256(parameters: ModelParameters) -> str:
    """SHA-256 of the weights file, in hexadecimal; of virst-7b, of what its manifest says. Raises WeightsError."""
    path = weights_path(parameters)
    return read_manifest(path).sha256 if is_full_size(parameters) else file_sha256(path)


def file_sha256(path: Path) -> str:
    """In hexadecimal. Raises WeightsError."""
    digest = hashlib.sha256()
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
    write_weights(path, model, {"format": FORMAT, "config": model.config.to_json(), "card": json.dumps(card or {})})


def read_card(path: Path) -> dict[str, object]:
    """The facts that `save_model` stored. Raises WeightsError for a file that is not ours."""
    return read_model_card(path, read_metadata(path, FORMAT, REMEDY), REMEDY)


def load_model(path: Path, *, device: str = "cpu", train_on: bool = False) -> Virst:
    """The model of a weights file, in evaluation mode, float32. Raises WeightsError naming cause and remedy.

    `train_on`: also from a file of before `occ_predictor` was trained; it starts from nothing then.
    """
    metadata = read_metadata(path, FORMAT, REMEDY)

    def build() -> Virst:
        config = VirstConfig.from_json(metadata["config"])
        if train_on:
            config = replace(config, fusion=replace(config.fusion, predicts_presence=True))
        return Virst(config)

    return read_weights(path, build, REMEDY, device=device, may_lack=("occ_predictor.",) if train_on else ())


def read_config(path: Path) -> VirstConfig:
    """The dimensions of the model in a weights file. Raises WeightsError."""
    try:
        return VirstConfig.from_json(read_metadata(path, FORMAT, REMEDY)["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} holds a configuration that we cannot read ({error}); {REMEDY}") from error


def load_goal_check(
    parameters: ModelParameters, method: str = "virst", reasoner_weights: str = ""
) -> Callable[[str], None]:
    """A function that raises BadGoal for a sentence that this model's reasoner could not read. Raises WeightsError.

    What a detector (`method` grounding) can read is known to the detector alone: it says so when it is asked.
    """
    if method == "grounding":

        def has_words(sentence: str) -> None:
            phrase_of(sentence)

        return has_words
    if method in METHOD_WINDOWS:
        load_method_config(parameters, method, reasoner_weights)  # no goal could be answered without it
    if is_sam2(parameters):

        def refuse(sentence: str) -> None:
            raise BadGoal(
                f"{parameters.name} understands no sentences; point objects out with a box, points or a mask, or let a "
                "detector find them (reasoner.method grounding)"
            )

        return refuse
    if method in METHOD_WINDOWS:
        tokenizer = WordTokenizer(load_method_config(parameters, method, reasoner_weights).words)
    elif is_full_size(parameters):
        folder = weights_path(parameters)
        chat = ChatTokenizer(folder, read_manifest(folder).config.language.vocabulary)

        def is_text(sentence: str) -> None:  # it reads any word
            chat.row(sentence, st_tokens=0)

        return is_text
    else:
        tokenizer = WordTokenizer(read_config(weights_path(parameters)).words)

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
    if is_full_size(parameters):
        video_size = read_manifest(weights_path(parameters)).config.vision.image_size
    elif not is_sam2(parameters):
        video_size = read_config(weights_path(parameters)).video.image_size

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
    path = weights_path(parameters)
    if is_full_size(parameters):
        config = read_manifest(path).config
        _check_image_size(parameters, config.sam2.image_size)
        return load_segmenter_model(path, parameters.device), config.fusion.feature_level
    model = load_model(path, device=parameters.device)
    _check_image_size(parameters, model.config.sam2.image_size)
    return model.seg_model, model.config.fusion.feature_level


def _check_image_size(parameters: ModelParameters, side: int) -> None:
    if parameters.image_size not in (0, side):
        raise WeightsError(
            f"{parameters.name} sees images of {side} px, model.image_size is {parameters.image_size}; set it to 0"
        )


def _check_sha256(parameters: ModelParameters, digest: str) -> None:
    if parameters.sha256 and parameters.sha256.lower() != digest:
        raise WeightsError(
            f"the weights have the SHA-256 {digest}, model.sha256 asks for {parameters.sha256}; {REMEDY}"
        )


def is_sam2(parameters: ModelParameters) -> bool:
    """Whether this is SAM 2.1 alone, without a reasoner."""
    return parameters.name.startswith(SAM2_PREFIX)


def is_full_size(parameters: ModelParameters) -> bool:
    """Whether this is VIRST at full size, whose weights are a folder."""
    return parameters.name == VIRST_7B


def stages_of(model: Virst) -> TorchStages:
    return TorchStages(
        model.seg_model, fusion_level=model.config.fusion.feature_level, video_size=model.config.video.image_size
    )


def load_reasoner(
    parameters: ModelParameters,
    method: str = "virst",
    reasoner_weights: str = "",
    *,
    initial_fusion: bool = True,
    second_fusion: bool = True,
    top_k: int = 0,
    memory_budget_gib: float = 0.0,
    weight_bits: int = 16,
) -> Reasoner:
    """The reasoner on `parameters.device`, of a method that needs no detector.

    Args:
        reasoner_weights: file of the method `visa` or `tempvrs`; empty: the shipped one.
        initial_fusion, second_fusion: False: VIRST's ablations of table 4, of tabletop-tiny only.
        top_k: of TempVRS; 0: the model's.
        memory_budget_gib, weight_bits: of virst-7b, `reasoner.memory_budget_gib` and `reasoner.weight_bits`.

    Raises:
        WeightsError: there is none, or none that can be used, or it has fewer clips than `top_k`.
    """
    if is_sam2(parameters):
        raise WeightsError(
            f"{parameters.name} has no reasoner; choose a model that has one (tabletop-tiny), or --method grounding"
        )
    if weight_bits != 16 and not (is_full_size(parameters) and method == "virst"):
        raise WeightsError(
            f"weights of {weight_bits} bits are for the model {VIRST_7B} and its own method, not {parameters.name} "
            f"with the method {method}; leave out --weight-bits"
        )
    _limit_threads(parameters)
    if method in METHOD_WINDOWS:
        load_method_config(parameters, method, reasoner_weights)
        path = method_weights_path(parameters, method, reasoner_weights)
        found = load_method(path, device=parameters.device)
        if isinstance(found, Visa):
            return VisaReasoner(found)
        try:
            return TempVrsReasoner(found, top_k=top_k)
        except ValueError as error:
            raise WeightsError(f"{path}: {error}") from error
    if is_full_size(parameters):
        if not (initial_fusion and second_fusion):
            raise WeightsError(f"{parameters.name} is not evaluated without its fusion; use tabletop-tiny")
        folder = weights_path(parameters)
        full = load_reasoner_model(folder, parameters.device, memory_budget_gib, WINDOWS, weight_bits)
        return Virst7bReasoner(full, ChatTokenizer(folder, full.config.language.vocabulary))
    model = load_model(weights_path(parameters), device=parameters.device)
    return VirstReasoner(model, initial_fusion=initial_fusion, second_fusion=second_fusion)


def detector_folder(detector: str, parameters: ModelParameters) -> Path:
    """The folder that is named, or the shipped one of this model. Raises WeightsError when there is none to choose."""
    if detector:
        return Path(detector).expanduser()
    folder = SHIPPED / f"{parameters.name}-grounding"
    if not folder.is_dir():
        raise WeightsError(
            f"the method grounding needs --detector, the folder of a zero-shot object detector: {parameters.name} has "
            "none of its own (tabletop-tiny has, for the simulated tabletop)"
        )
    return folder


def detector_identity(detector: str, parameters: ModelParameters) -> str:
    """What tells a detector from others: the start of the SHA-256 of its weights. Raises WeightsError."""
    folder = detector_folder(detector, parameters)
    return " ".join(file_sha256(path)[:12] for path in sorted(folder.glob("*.safetensors")))


def load_grounding(
    detector: str, parameters: ModelParameters, *, threshold: float = 0.0, most_boxes: int = 1
) -> GroundingReasoner:
    """The method `grounding` on `parameters.device`.

    Args:
        detector: folder of a zero-shot object detector; empty: the one that is shipped with the model.
        threshold, most_boxes: see GroundingReasoner.

    Raises:
        WeightsError: there is none that can be used.
        ValueError: of threshold or most_boxes.
    """
    from virst_engine.slow.transformers_detector import load_detector  # a session needs no language model

    folder = detector_folder(detector, parameters)
    _limit_threads(parameters)
    found = load_detector(folder, device=parameters.device)
    return GroundingReasoner(found, threshold=threshold, most_boxes=most_boxes)


def _limit_threads(parameters: ModelParameters) -> None:
    if parameters.threads:
        torch.set_num_threads(parameters.threads)
