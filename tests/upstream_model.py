"""For tests/upstream.sh where the checkout is an unpacked source distribution of transformers: it has the tests that all models
share (tests/test_modeling_common.py), but not the file that applies them to Qwen2-VL. This applies them.
"""

from __future__ import annotations

import sys
import unittest
from types import ModuleType

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLModel

for name, mixin in (("generation.test_utils", "GenerationTesterMixin"), ("exporters.test_export", "ExportTesterMixin")):
    module = ModuleType(f"tests.{name}")  # not in a source distribution either
    setattr(module, mixin, type(mixin, (), {}))
    sys.modules.setdefault(f"tests.{name}", module)

from tests.test_modeling_common import ModelTesterMixin  # noqa: E402

IMAGE = 97


class Tester:
    """What ModelTesterMixin asks of a model's tester: its sizes, and a config with inputs. One image of 2x2 patches a row."""

    is_training = True
    batch_size, seq_length = 3, 9
    vocab_size, hidden_size, intermediate_size, num_hidden_layers = 99, 32, 37, 2
    num_attention_heads, num_key_value_heads = 4, 2

    def get_config(self) -> Qwen2VLConfig:
        return Qwen2VLConfig(
            vocab_size=self.vocab_size, hidden_size=self.hidden_size, intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers, num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads, max_position_embeddings=128, max_window_layers=2,
            rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1]}, tie_word_embeddings=True, bos_token_id=0,
            eos_token_id=1, pad_token_id=2, vision_start_token_id=94, vision_end_token_id=95, vision_token_id=96,
            image_token_id=IMAGE, video_token_id=98,
            vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2},
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self) -> tuple[Qwen2VLConfig, dict[str, torch.Tensor]]:
        input_ids = torch.randint(3, 94, (self.batch_size, self.seq_length))
        input_ids[:, 3] = IMAGE
        return self.get_config(), {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "mm_token_type_ids": (input_ids == IMAGE).int(),
            "pixel_values": torch.rand(4 * self.batch_size, 1176),
            "image_grid_thw": torch.tensor([[1, 2, 2]] * self.batch_size),
        }


class Qwen2VLTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (Qwen2VLModel, Qwen2VLForConditionalGeneration)
    _is_composite = True

    def setUp(self) -> None:
        torch.manual_seed(0)
        self.model_tester = Tester()
