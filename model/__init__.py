"""GLSCL: vision-language pre-training by global and local semantic completion (arXiv 2306.07096).

The model, its masks, its processor and the import of pre-trained weights, in the conventions of transformers:
``from_pretrained`` and ``save_pretrained``, and after ``import model`` the Auto classes know it. Knows nothing of
storage, clusters or the rest of the project.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForVisualQuestionAnswering,
    AutoProcessor,
)

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

# exist_ok: a reload of the package is no clash of names.
AutoConfig.register("glscl", GLSCLConfig, exist_ok=True)
AutoModel.register(GLSCLConfig, GLSCLModel, exist_ok=True)
AutoModelForPreTraining.register(GLSCLConfig, GLSCLForPreTraining, exist_ok=True)
AutoModelForVisualQuestionAnswering.register(GLSCLConfig, GLSCLForVisualQuestionAnswering, exist_ok=True)
# One class under both of transformers' backends, or it would report a fallback.
AutoImageProcessor.register(
    GLSCLConfig,
    image_processor_classes={"torchvision": GLSCLImageProcessor, "pil": GLSCLImageProcessor},
    exist_ok=True,
)
AutoProcessor.register(GLSCLConfig, GLSCLProcessor, exist_ok=True)

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
