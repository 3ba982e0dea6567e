"""Shapes against the published sizes, the made tokenizer against the family's ids, real text weights against a fact."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from export import exact_shapes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smolvlm2-256m", 256_484_928),
        ("smolvlm2-500m", 507_482_304),
        ("smolvlm2-2.2b", 2_246_784_880),
        ("3b-llama", 2_246_784_880 + 12 * (4 * 2048**2 + 3 * 2048 * 8192 + 2 * 2048)),
        ("3b-smollm3", 3_510_000_000),
    ],
)
def test_a_shape_has_as_many_parameters_as_the_model(name: str, parameters: int) -> None:
    model = exact_shapes.empty_model(name, image_token_id=49_190)
    tolerance = 0.002 if name == "3b-smollm3" else 0  # known to three digits
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(parameters, rel=tolerance)


def test_the_made_tokenizer_has_the_special_ids_of_the_family() -> None:
    tokenizer = exact_shapes._tokenizer(exact_shapes.VOCABULARY)
    assert len(tokenizer) == 49_280
    words = ["<global-img>", "<row_1_col_1>", "<row_6_col_6>", "<fake_token_around_image>", "<image>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(words) == [49_152, 49_153, 49_188, 49_189, 49_190, 2]
    assert tokenizer.eos_token_id == 49_279
    assert tokenizer.decode(tokenizer.encode("café 12")) == "café 12"


def test_leaving_the_grid_changes_the_weights_and_not_the_function() -> None:
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=64, tie_word_embeddings=True, **shape))
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    with torch.no_grad():
        expected = model(torch.arange(20)[None]).logits
        exact_shapes._leave_grid(model, torch.Generator().manual_seed(7))
        torch.testing.assert_close(model(torch.arange(20)[None]).logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model.model.layers[0].mlp.up_proj.weight, before, rtol=0.05)
