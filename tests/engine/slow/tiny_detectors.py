# SPDX-License-Identifier: Apache-2.0
"""Snapshot folders of detectors with tiny random weights: the code path of the real ones, without a download."""

import string
from pathlib import Path

import torch

WORDS = ("the", "red", "green", "blue", "cup", "ball", "square", "left", "of", ".")


def write_grounding_dino(folder: Path) -> Path:
    from transformers import (
        BertConfig,
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SwinConfig,
    )

    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS))}
    backbone = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        image_size=64,
        out_features=["stage2", "stage3", "stage4"],
    )
    text = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    model = GroundingDinoForObjectDetection(
        GroundingDinoConfig(
            backbone_config=backbone,
            text_config=text,
            d_model=32,  # 32 groups of its normalisation
            num_queries=12,
            encoder_layers=1,
            decoder_layers=2,  # they share a head
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            max_text_len=24,
        )
    )
    images = GroundingDinoImageProcessor(size={"shortest_edge": 128, "longest_edge": 192})
    model.save_pretrained(folder)
    GroundingDinoProcessor(images, BertTokenizer(vocab=vocabulary)).save_pretrained(folder)
    return folder


def write_owlv2(folder: Path) -> Path:
    from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: i for i, token in enumerate((*letters, "<|startoftext|>", "<|endoftext|>"))}
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Owlv2ForObjectDetection(
        Owlv2Config(
            text_config={
                **small,
                "vocab_size": len(vocabulary),
                "bos_token_id": len(letters),
                "eos_token_id": len(letters) + 1,
            },
            vision_config={**small, "image_size": 64, "patch_size": 16},
            projection_dim=16,
        )
    )
    images = Owlv2ImageProcessor(size={"height": 64, "width": 64})
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)
    model.save_pretrained(folder)
    Owlv2Processor(images, tokenizer).save_pretrained(folder)
    return folder


TINY = {"grounding-dino": write_grounding_dino, "owlv2": write_owlv2}
