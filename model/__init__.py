"""GLSCL: vision-language pre-training by global and local semantic completion (arXiv 2306.07096).

The model, its masks, its processor and the import of pre-trained weights. Knows nothing of storage, clusters
or the rest of the project.
"""

from model.cached import backward_in_parts
from model.configuration import OBJECTIVES, GLSCLConfig, ModelConfigurationError
from model.glscl import GLSCLModel, GLSCLModelOutput, TextFeatures, VisionFeatures
from model.importers import ImportReport, WeightImportError, WeightKind, import_weights
from model.masking import PretrainingMasks, draw_masks
from model.pretraining import GLSCLForPreTraining, GLSCLPreTrainingOutput
from model.processing import GLSCLProcessor

__all__ = [
    "OBJECTIVES",
    "GLSCLConfig",
    "GLSCLForPreTraining",
    "GLSCLModel",
    "GLSCLModelOutput",
    "GLSCLPreTrainingOutput",
    "GLSCLProcessor",
    "ImportReport",
    "ModelConfigurationError",
    "PretrainingMasks",
    "TextFeatures",
    "VisionFeatures",
    "WeightImportError",
    "WeightKind",
    "backward_in_parts",
    "draw_masks",
    "import_weights",
]
