"""GLSCL: vision-language pre-training by global and local semantic completion (arXiv 2306.07096).

The model, its masks, its processor and the import of pre-trained weights, in the conventions of transformers:
``from_pretrained`` and ``save_pretrained``, and after ``from model import GLSCLModel`` (any of its classes), or
``import model.auto``, the Auto classes know it. Knows nothing of storage, clusters or the rest of the project.

Light to import: the names below come with the code of the model at first use, since the command line looks into
the configuration before it starts anything.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.alignment import WordMaps, text_grids, word_maps, words_on_grid
    from model.cached import backward_in_parts
    from model.configuration import OBJECTIVES, GLSCLConfig, ModelConfigurationError
    from model.glscl import (
        GLSCLModel,
        GLSCLModelOutput,
        GLSCLPreTrainedModel,
        TextFeatures,
        VisionFeatures,
    )
    from model.importers import ImportReport, WeightImportError, WeightKind, import_weights, plan_import
    from model.masking import PretrainingMasks, draw_masks
    from model.nlvr2 import GLSCLForNLVR2, GLSCLNLVR2Output
    from model.pretraining import GLSCLForPreTraining, GLSCLPreTrainingOutput
    from model.processing import GLSCLImageProcessor, GLSCLProcessor, TokenizerError
    from model.question_answering import GLSCLForVisualQuestionAnswering, GLSCLVisualQuestionAnsweringOutput
    from model.retrieval import GLSCLForImageTextRetrieval, GLSCLImageTextRetrievalOutput

__all__ = [
    "OBJECTIVES",
    "GLSCLConfig",
    "GLSCLForImageTextRetrieval",
    "GLSCLForNLVR2",
    "GLSCLForPreTraining",
    "GLSCLForVisualQuestionAnswering",
    "GLSCLImageProcessor",
    "GLSCLImageTextRetrievalOutput",
    "GLSCLModel",
    "GLSCLModelOutput",
    "GLSCLNLVR2Output",
    "GLSCLPreTrainedModel",
    "GLSCLPreTrainingOutput",
    "GLSCLProcessor",
    "GLSCLVisualQuestionAnsweringOutput",
    "ImportReport",
    "ModelConfigurationError",
    "PretrainingMasks",
    "TextFeatures",
    "TokenizerError",
    "VisionFeatures",
    "WeightImportError",
    "WeightKind",
    "WordMaps",
    "backward_in_parts",
    "draw_masks",
    "import_weights",
    "plan_import",
    "text_grids",
    "word_maps",
    "words_on_grid",
]

_HOME = {
    **dict.fromkeys(("WordMaps", "text_grids", "word_maps", "words_on_grid"), "alignment"),
    "backward_in_parts": "cached",
    **dict.fromkeys(("OBJECTIVES", "GLSCLConfig", "ModelConfigurationError"), "configuration"),
    **dict.fromkeys(
        ("GLSCLModel", "GLSCLModelOutput", "GLSCLPreTrainedModel", "TextFeatures", "VisionFeatures"), "glscl"
    ),
    **dict.fromkeys(
        ("ImportReport", "WeightImportError", "WeightKind", "import_weights", "plan_import"), "importers"
    ),
    **dict.fromkeys(("PretrainingMasks", "draw_masks"), "masking"),
    **dict.fromkeys(("GLSCLForNLVR2", "GLSCLNLVR2Output"), "nlvr2"),
    **dict.fromkeys(("GLSCLForPreTraining", "GLSCLPreTrainingOutput"), "pretraining"),
    **dict.fromkeys(("GLSCLImageProcessor", "GLSCLProcessor", "TokenizerError"), "processing"),
    **dict.fromkeys(
        ("GLSCLForVisualQuestionAnswering", "GLSCLVisualQuestionAnsweringOutput"), "question_answering"
    ),
    **dict.fromkeys(("GLSCLForImageTextRetrieval", "GLSCLImageTextRetrievalOutput"), "retrieval"),
}
# What needs no more than the configuration; anything else is a use of the model, which the Auto classes then know.
_LIGHT = ("configuration", "masking")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOME[name] not in _LIGHT:
        import_module(f"{__name__}.auto")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
