"""RoBERTa into the text encoder."""

from __future__ import annotations

import pytest
import torch

from model import GLSCLModel, WeightImportError, import_weights
from tests.model.importers import sources
from tests.model.small import small_batch, small_config, small_model


@pytest.mark.parametrize("prefix", ["roberta.", ""])
def test_states_are_those_of_transformers_own_model(prefix: str) -> None:
    config = small_config()
    theirs, model = sources.roberta(config), small_model(config)
    state = {name.replace("roberta.", prefix, 1): value for name, value in theirs.state_dict().items()}
    if not prefix:
        state = {name: value for name, value in state.items() if not name.startswith("lm_head.")}
    head = [parameter.clone() for parameter in model.language_head.parameters()]
    report = import_weights(model, state)
    assert report.kind == "roberta"
    assert set(report.loaded) == {n for n, _ in model.named_parameters() if ".text_encoder." in n}
    batch = small_batch(config)
    got = model.glscl.text_encoder(batch.input_ids, batch.attention_mask)
    want = theirs.roberta(batch.input_ids, batch.attention_mask).last_hidden_state
    real = batch.attention_mask.bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-10, atol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(head, model.language_head.parameters(), strict=True))
    assert set(report.ignored) == {name for name in state if name.startswith("lm_head.")}


@pytest.mark.parametrize("tied_once", [True, False])
def test_the_masked_language_head_is_loaded_when_asked_for(tied_once: bool) -> None:
    """Files by ``save_pretrained`` hold tied tensors once: decoder and word embedding, both biases."""
    config = small_config()
    theirs, model = sources.roberta(config), small_model(config)
    state = dict(theirs.state_dict())
    if tied_once:
        del state["lm_head.decoder.weight"], state["lm_head.decoder.bias"]
    report = import_weights(model, state, language_head=True)
    assert {n for n, _ in model.named_parameters() if n.startswith("language_head.")} <= set(report.loaded)
    states = torch.randn(5, 16, dtype=torch.float64)
    # The head's LayerNorm has another epsilon here (1e-12) than RoBERTa's (1e-5).
    torch.testing.assert_close(model.language_head(states), theirs.lm_head(states), rtol=1e-3, atol=1e-3)


def test_a_language_head_that_nobody_has_is_an_error() -> None:
    config = small_config()
    with pytest.raises(WeightImportError, match="the model has no masked-language head"):
        import_weights(GLSCLModel(config), sources.roberta(config).state_dict(), language_head=True)
    clip = sources.noise(sources.openai_clip(config, blocks=2, grid=4))
    with pytest.raises(ValueError, match="holds openai_clip weights"):
        import_weights(small_model(config), clip, language_head=True)


def test_buffers_and_pooler_of_older_files_are_ignored_with_a_reason() -> None:
    config = small_config()
    state = dict(sources.roberta(config).state_dict())
    extra = {
        "roberta.embeddings.position_ids": torch.arange(16)[None],
        "roberta.pooler.dense.weight": torch.zeros(16, 16),
        "roberta.pooler.dense.bias": torch.zeros(16),
    }
    report = import_weights(small_model(config), state | extra)
    assert set(extra) <= set(report.ignored)
    assert "pooler, which nothing here reads" in str(report)


def test_text_positions_beyond_the_configured_number_are_cut_and_reported() -> None:
    config = small_config()
    theirs, model = sources.roberta(config, max_position_embeddings=20), small_model(config)
    report = import_weights(model, theirs.state_dict())
    name = "embeddings.position_embeddings.weight"
    assert report.adapted == {f"glscl.text_encoder.roberta.{name}": "the first 16 of 20 rows"}
    got = model.glscl.text_encoder.roberta.get_parameter(name)
    assert torch.equal(got, theirs.roberta.get_parameter(name)[:16])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"max_position_embeddings": 14}, "14 rows, but max_position_embeddings is 16"),
        ({"vocab_size": 61}, "a vocabulary of 61 tokens, but vocab_size is 60"),
        ({"num_hidden_layers": 3}, "3 layers in the file, but text_layers is 2"),
        ({"num_hidden_layers": 1}, "1 layers in the file, but text_layers is 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_both_named(sizes: dict[str, int], message: str) -> None:
    config = small_config()
    with pytest.raises(WeightImportError, match=message) as caught:
        import_weights(small_model(config), sources.roberta(config, **sizes).state_dict())
    assert len(caught.value.problems) == 1
    assert not caught.value.missing
    assert not caught.value.unexpected
