"""GLSCL: vision-language pre-training by global and local semantic completion (arXiv 2306.07096).

The model, its masks and its processor. Knows nothing of files, clusters or the rest of the project.
"""

from model.cached import backward_in_parts
from model.configuration import OBJECTIVES, GLSCLConfig, ModelConfigurationError
from model.glscl import GLSCLModel, GLSCLModelOutput, TextFeatures, VisionFeatures
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
    "ModelConfigurationError",
    "PretrainingMasks",
    "TextFeatures",
    "VisionFeatures",
    "backward_in_parts",
    "draw_masks",
]
