"""The promises of every import: all or nothing, everything accounted for, kinds told apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model import WeightImportError, import_weights
from tests.model.importers import sources
from tests.model.small import small_config, small_model


def _clip() -> dict[str, Tensor]:
    return sources.noise(sources.openai_clip(small_config(), blocks=3, grid=6))


def _sources() -> dict[str, dict[str, Tensor]]:
    config = small_config()
    return {
        "openai_clip": _clip(),
        "roberta": dict(sources.roberta(config).state_dict()),
        "glscl": sources.noise(sources.released(config, video=True)),
    }


@pytest.mark.parametrize("kind", ["openai_clip", "roberta", "glscl"])
def test_each_parameter_is_loaded_or_untouched_and_each_name_used_or_ignored(kind: str) -> None:
    model, state = small_model(small_config()), _sources()[kind]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    report = import_weights(model, state)
    assert report.kind == kind
    assert not set(report.loaded) & set(report.untouched)
    assert set(report.loaded) | set(report.untouched) == set(before)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(report.loaded)
    # A name that is not ignored matters: without it the import fails.
    for name in state:
        if name not in report.ignored and name.endswith(("weight", "embedding", "bias")) and ".1." in name:
            rest = {other: value for other, value in state.items() if other != name}
            with pytest.raises(WeightImportError) as caught:
                import_weights(model, rest)
            assert caught.value.missing == (name,)


def test_what_is_wrong_is_named_all_at_once_and_the_model_is_untouched() -> None:
    state = _clip()
    del state["visual.ln_pre.bias"]
    state |= {"visual.surprise": torch.ones(1), "visual.ln_post.weight": torch.ones(17)}
    state["visual.ln_post.bias"] = torch.zeros(16, dtype=torch.int64)
    model = small_model(small_config())
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(WeightImportError) as caught:
        import_weights(model, state)
    error = caught.value
    assert (error.missing, error.unexpected) == (("visual.ln_pre.bias",), ("visual.surprise",))
    assert sorted(error.problems) == [
        "visual.ln_post.bias is of torch.int64, not floating point",
        "visual.ln_post.weight gives [17], but glscl.vision_encoder.ln_post.weight is [16]",
    ]
    for name in ("visual.ln_pre.bias", "visual.surprise", "visual.ln_post.weight", "nothing was loaded"):
        assert name in str(error)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_without_strict_missing_and_unexpected_names_are_reported() -> None:
    state = _clip()
    del state["visual.ln_pre.bias"]
    state["visual.surprise"] = torch.ones(1)
    model = small_model(small_config())
    before = model.glscl.vision_encoder.ln_pre.bias.clone()
    report = import_weights(model, state, strict=False)
    assert (report.missing, report.unexpected) == (("visual.ln_pre.bias",), ("visual.surprise",))
    assert torch.equal(model.glscl.vision_encoder.ln_pre.bias, before)
    assert report.untouched["glscl.vision_encoder.ln_pre.bias"] == "the file lacks it"
    state["visual.ln_pre.weight"] = torch.ones(17)
    with pytest.raises(WeightImportError, match=r"gives \[17\]"):
        import_weights(model, state, strict=False)


def test_the_report_reads_well() -> None:
    assert str(import_weights(small_model(small_config()), _clip())).splitlines()[:2] == [
        "openai_clip weights of the mapping: 31 parameters loaded",
        "  adapted glscl.vision_encoder.position_embedding: 6 x 6 -> 4 x 4 patches (bicubic)",
    ]


def test_weights_of_no_known_kind_are_refused() -> None:
    model = small_model(small_config())
    with pytest.raises(WeightImportError, match="its 1 names begin with layer"):
        import_weights(model, {"layer.weight": torch.ones(1)})
    with pytest.raises(WeightImportError, match="load it with from_pretrained"):
        import_weights(model, model.state_dict())
    with pytest.raises(ValueError, match="kind 'clip' is unknown: choose one of auto, openai_clip"):
        import_weights(model, _clip(), kind="clip")  # type: ignore[arg-type]


def test_a_kind_that_is_named_is_not_guessed() -> None:
    with pytest.raises(WeightImportError, match="does not fit the model as timm_clip weights") as caught:
        import_weights(small_model(small_config()), _clip(), kind="timm_clip")
    assert "cls_token" in caught.value.missing


def test_a_model_without_values_is_refused() -> None:
    with pytest.raises(WeightImportError, match="lie on the meta device"):
        import_weights(small_model(small_config()).to("meta"), _clip())
