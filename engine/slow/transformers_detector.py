# SPDX-License-Identifier: Apache-2.0
"""Any zero-shot object detector of `transformers` (Grounding DINO, OWLv2, OWL-ViT, OmDet-Turbo), from a local folder.

The folder is a snapshot as the Hugging Face hub keeps it: config.json, model.safetensors, preprocessor_config.json and
the tokenizer's files. Nothing is downloaded and no code of the folder is run; only safetensors are read.
"""

import inspect
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from jaxtyping import UInt8

from virst_engine.errors import BadGoal, WeightsError
from virst_engine.slow.grounding_reasoner import Detections

logger = logging.getLogger(__name__)

NEEDED = "transformers >= 4.50"
# Model type -> the score from which it usually means what it says: the defaults of its own post-processing, but for
# OWL's, which is as often wrong as right there.
THRESHOLDS = {"grounding-dino": 0.3, "mm-grounding-dino": 0.3, "omdet-turbo": 0.3, "owlv2": 0.2, "owlvit": 0.15}
OTHER_THRESHOLD = 0.3
WEAKEST = 0.01  # scores below it are not looked at
SNAPSHOT = (
    "download its snapshot once (`hf download IDEA-Research/grounding-dino-tiny --local-dir FOLDER`) and name FOLDER"
)


def load_detector(folder: Path, *, device: str = "cpu") -> "TransformersDetector":
    """The detector of a snapshot folder, in evaluation mode.

    Raises:
        WeightsError: the folder, the detector, its processor or its weights are missing or damaged, the installed
            `transformers` is too old for it, or the device cannot be used.
    """
    folder = folder.expanduser()
    kind = _model_type(folder)
    try:
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor, __version__
        from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES as KNOWN
    except ImportError as error:
        raise WeightsError(f"detectors need {NEEDED} ({error}): pip install --upgrade transformers") from error
    if kind not in KNOWN:
        raise WeightsError(
            f"{folder} holds a model of type {kind!r}, which is no detector that transformers {__version__} knows "
            f"({', '.join(sorted(KNOWN))}); name a folder that holds one, or install a newer transformers"
        )
    if not (any(folder.glob("*.safetensors")) or (folder / "model.safetensors.index.json").is_file()):
        raise WeightsError(f"{folder} has no *.safetensors: other formats may run code and are not read; {SNAPSHOT}")
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = AutoProcessor.from_pretrained(folder, **local)
    except Exception as error:  # each processor fails in its own way
        raise WeightsError(
            f"{folder} has no processor that can be read (preprocessor_config.json and the tokenizer's files): "
            f"{_first_line(error)}; {SNAPSHOT}"
        ) from error
    if not hasattr(processor, "post_process_grounded_object_detection"):
        raise WeightsError(
            f"the processor in {folder} ({type(processor).__name__}) lacks post_process_grounded_object_detection: "
            f"transformers {__version__} is too old, or files are missing; install {NEEDED}, or {SNAPSHOT}"
        )
    try:
        model, report = AutoModelForZeroShotObjectDetection.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **local
        )
    except Exception as error:
        raise WeightsError(f"the detector in {folder} cannot be loaded: {_first_line(error)}; {SNAPSHOT}") from error
    if missing := sorted(report["missing_keys"]):
        raise WeightsError(f"the weights in {folder} lack {len(missing)} tensors, for example {missing[0]}; {SNAPSHOT}")
    try:
        model = model.eval().to(device)
    except (RuntimeError, AssertionError) as error:
        raise WeightsError(f"the detector cannot run on device {device!r}: {error}; choose another --device") from error
    detector = TransformersDetector(model, processor, THRESHOLDS.get(kind, OTHER_THRESHOLD))
    try:
        detector.detect(np.zeros((32, 32, 3), np.uint8), "cup")  # some packages are asked for only now
    except ImportError as error:
        raise WeightsError(f"the detector in {folder} needs another package: {_first_line(error)}") from error
    except Exception as error:
        raise WeightsError(f"the detector in {folder} cannot run: {_first_line(error)}; {SNAPSHOT}") from error
    logger.info("detector %s of %s", kind, folder)
    return detector


class TransformersDetector:
    """`Detector` on a model and its processor."""

    def __init__(self, model: Any, processor: Any, threshold: float = OTHER_THRESHOLD) -> None:
        self.threshold = threshold
        self._model, self._processor = model, processor
        self._parameters = inspect.signature(processor.post_process_grounded_object_detection).parameters
        self._most_tokens = _most_tokens(model.config)

    @torch.inference_mode()
    def detect(self, image_rgb_u8: UInt8[np.ndarray, "height width 3"], phrase: str) -> Detections:
        tokens = len(self._processor.tokenizer(phrase)["input_ids"])
        if self._most_tokens and tokens > self._most_tokens:
            raise BadGoal(
                f"the detector reads at most {self._most_tokens} tokens, the sentence has {tokens}; "
                "say a plain noun phrase, like 'red cup'"
            )
        image = PIL.Image.fromarray(np.ascontiguousarray(image_rgb_u8))  # of an array they guess where the channels are
        inputs = self._processor(images=image, text=[[phrase]], return_tensors="pt").to(self._model.device)
        outputs = self._model(**inputs)
        height, width = image_rgb_u8.shape[:2]
        # What the processors agree on, and what only some of them take.
        wanted = {
            "input_ids": inputs.get("input_ids"),
            "threshold": WEAKEST,
            "text_threshold": 1.0,  # which words a box is of is not asked
            "target_sizes": [(height, width)],
            "text_labels": [[phrase]],
        }
        arguments = {name: value for name, value in wanted.items() if name in self._parameters}
        (found,) = self._processor.post_process_grounded_object_detection(outputs, **arguments)
        scores = found["scores"].float().cpu().numpy()
        boxes = found["boxes"].float().cpu().numpy().reshape(-1, 4) / np.array([width, height] * 2, np.float32)
        is_finite = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
        order = [i for i in np.argsort(-scores, kind="stable") if is_finite[i]]
        return Detections(boxes[order].astype(np.float32), scores[order].astype(np.float32))


def _model_type(folder: Path) -> str:
    if not folder.is_dir():
        raise WeightsError(f"there is no folder {folder} of a detector; {SNAPSHOT}")
    file = folder / "config.json"
    try:
        kind = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{folder} holds no detector: {file.name} is missing or unreadable ({error}); {SNAPSHOT}"
        ) from error
    return str(kind)


def _most_tokens(config: Any) -> int:
    """Of the text that the model reads; 0: it does not say."""
    told = getattr(config, "max_text_len", 0)
    text = getattr(config, "text_config", None)
    return int(told or getattr(text, "max_position_embeddings", 0) or 0)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
