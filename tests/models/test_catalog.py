"""The catalog's figures follow from its shapes, and every name leads somewhere."""

from __future__ import annotations

import pytest

from models.bundle import Bundle
from models.catalog import ALIASES, PUBLISHED, ROWS, find
from models.errors import NotFound
from models.memory import LEAST_CONTEXT, need_of_row, total_bytes
from models.tiny_scenes import BUNDLES

# As the hub counts the tensors of the published checkpoints.
STATED_PARAMETERS = {
    "smolvlm2-256m": 256_484_928,
    "smolvlm2-500m": 507_482_304,
    "smolvlm2-2.2b": 2_246_784_880,
    "smolvlm-256m": 256_484_928,
    "smolvlm-500m": 507_482_304,
    "smoldocling-256m": 256_484_928,
}


@pytest.mark.parametrize(("name", "parameters"), STATED_PARAMETERS.items())
def test_the_stated_parameters_follow_from_the_shape(name: str, parameters: int) -> None:
    assert ROWS[name].shape.parameters == parameters


def test_the_smaller_vocabulary_is_all_that_makes_the_first_2b_smaller() -> None:
    first, second = ROWS["smolvlm-2.2b"].shape, ROWS["smolvlm2-2.2b"].shape
    assert second.parameters - first.parameters == 2 * (49_280 - 49_155) * 2048


def test_the_embedded_model_has_the_shape_that_its_bundle_has() -> None:
    shapes = Bundle.read(BUNDLES["tiny-scenes@fp32"]).manifest.shapes
    shape = ROWS["tiny-scenes"].shape
    assert (shape.parameters, shape.image_tokens_per_tile) == (shapes.parameters, shapes.image_tokens_per_tile)
    assert (shape.layers, shape.kv_heads, shape.head_dim) == (shapes.layers, shapes.kv_heads, shapes.head_dim)


def test_bytes_by_formula_are_the_bytes_of_a_real_bundle() -> None:
    for recipe in ("fp32", "int8"):
        real = Bundle.read(BUNDLES[f"tiny-scenes@{recipe}"]).model_bytes
        # On a model this small the graphs' own structure counts: 0.2 to 0.5 MB in all.
        assert 0 <= real - ROWS["tiny-scenes"].file_bytes(recipe) <= 0.6e6


def test_bytes_by_formula_are_the_sizes_of_the_published_256m_files() -> None:
    parameters = ROWS["smolvlm2-256m"].shape.parameters_by_graph
    assert parameters["decoder_model_merged"] * 4 == pytest.approx(541e6, rel=0.01)
    assert parameters["embed_tokens"] * 4 == pytest.approx(114e6, rel=0.01)
    decoder = (
        ROWS["smolvlm2-256m"].file_bytes("int4") - parameters["vision_encoder"] * 4 - parameters["embed_tokens"] * 2
    )
    assert decoder == pytest.approx(87e6, rel=0.015)


def test_turbo_is_below_2b_parameters_and_2_gb_on_disk_and_in_memory() -> None:
    named = find("smolvlm2-turbo")
    assert named.recipe == "int4"
    assert named.row.shape.parameters < 2e9
    assert named.row.file_bytes("int4") < 2e9
    assert total_bytes([need_of_row(named.row, "int4")], 1, LEAST_CONTEXT) < 2e9
    assert "smolvlm2-500m@int4" in (named.notice or "")


@pytest.mark.parametrize("name", [*ROWS, *ALIASES])
def test_every_name_is_found_with_and_without_prefix_and_recipe(name: str) -> None:
    row = find(name).row
    assert find(f"local/{name}").row is row
    assert find(f"{name}@fp32").recipe == "fp32"
    assert row.name in ROWS


def test_an_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(NotFound, match="did you mean smolvlm2-500m"):
        find("smolvlm2-500")
    with pytest.raises(NotFound, match=r"known are .*smolvlm2-turbo"):
        find("gpt")


def test_no_revision_is_invented_and_every_claim_names_its_source() -> None:
    assert all(row.revision is None for row in ROWS.values())
    claims = [claim for named in (*ROWS.values(), *ALIASES.values()) for claim in named.claims]
    assert all(claim.source for claim in claims)
    assert all(claim.figure is not None or "no published figure" in claim.source for claim in claims)


def test_every_published_choice_says_why() -> None:
    for recipe, graphs in PUBLISHED.items():
        assert set(graphs) == {"vision_encoder", "embed_tokens", "decoder_model_merged"}, recipe
        assert all(choice.why for choice in graphs.values())
